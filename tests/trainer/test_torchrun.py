"""``bpn-fit`` under those that start its processes: torchrun on one machine and on two, and SLURM.

The machines are two network namespaces, which reach each other by a virtual cable only; SLURM is a
double, the variables that srun sets for each process.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import PATIENCE

from bpn_lightning.cli.main import main
from bpn_lightning.errors import DataError

pytestmark = pytest.mark.slow

FIT = str(Path(sys.executable).parent / "bpn-fit")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Batches of 41 leave one of 288 samples over: all processes but one have none of it. In double
# precision a sample that is dropped or counted twice shows, and rounding turns no sign of M's gradient.
FLAGS = [
    "--config", "digits_inc.yaml", "--method", "bd+ewc", "--trainer.accelerator", "cpu",
    "--trainer.precision", "64-true", "--data.init_args.num_tasks", "2", "--data.init_args.seed", "0",
    "--data.init_args.epochs_per_task", "1", "--data.init_args.batch_size", "41",
    "--trainer.log_every_n_steps", "2", "--model.check_processes", "true",
]  # fmt: skip
RUN = Path("digits_inc", "bd+ewc", "seed_0")


def start(command: list[str], **variables: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    return subprocess.Popen(
        command,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: "subprocess.Popen[str]") -> list[str]:
    try:
        return [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def report(runs: Path) -> dict[str, Any]:
    """What a run has learned and logged, and the files that it left."""
    folder = runs / RUN
    results = json.loads((folder / "results.json").read_text())
    del results["provenance"]
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "results": results,
        "weights": saved["state_dict"],
        "strategies": {key: value for key, value in saved["callbacks"].items() if "EWC" in key},
        "files": sorted(str(path.relative_to(runs)) for path in runs.rglob("*")),
        "metrics": [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        ],
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process learns."""
    runs = tmp_path_factory.mktemp("alone")
    assert main([*FLAGS, "--runs", str(runs)]) == 0
    return report(runs)


def assert_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for part in ("weights", "strategies", "metrics"):
        torch.testing.assert_close(
            found[part], alone[part], rtol=1e-9, atol=1e-12, equal_nan=True
        )  # fmt: skip
    for part in ("results", "files"):
        assert found[part] == alone[part]


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_torchrun_learns_what_one_process_learns(
    tmp_path: Path, alone: dict[str, Any], number: int
) -> None:
    launch = [*TORCHRUN, "--standalone", "--nproc-per-node", str(number), "--no-python", FIT]
    flags = ["--trainer.devices", str(number), "--trainer.strategy", "ddp", "--runs", str(tmp_path)]
    run = start([*launch, *FLAGS, *flags])
    (said,) = finish(run)
    assert run.returncode == 0, said
    assert_same(report(tmp_path), alone)
    assert said.count("results: ") == 1


@pytest.mark.matrix  # what each process prints is asked of the command below
def test_an_error_is_printed_once(tmp_path: Path) -> None:
    launch = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python", FIT]
    run = start([*launch, *FLAGS, "--strategies.bd.epsilom", "1", "--runs", str(tmp_path)])
    (said,) = finish(run)
    lines = [line for line in said.splitlines() if line.startswith("bpn-fit: error")]
    assert len(lines) == 1, said
    assert "epsilom" in lines[0]
    assert run.returncode == 1, "torchrun's own; its report has those of the processes"
    assert "exitcode  : 2" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variables",
    [
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
    ],
)
@pytest.mark.parametrize(
    ("flags", "got"),
    [(["--trainer.devices", "2", "--trainer.strategy", "ddp"], "2 * 1"), ([], "1 * 1")],
)
def test_processes_that_were_started_are_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    flags: list[str],
    got: str,
) -> None:
    """Each would learn alone, and write to the same folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([*FLAGS, *flags, "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bpn-fit: error: Expected trainer.devices * num_nodes to be 4, the number of processes that were started, "
        f"but got {got}. Set devices to the processes per machine, num_nodes to the machines, and strategy to 'ddp'."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "process"),
    [
        ({}, ""),
        ({"LOCAL_RANK": "0"}, ""),
        ({"LOCAL_RANK": "1"}, " in process 1"),
        ({"NODE_RANK": "1"}, " in process 0 of machine 1"),
        ({"RANK": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, " in process 2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, ""),
        ({"SLURM_PROCID": "10", "SLURM_LOCALID": "0"}, " in process 10"),
    ],
)
def test_only_the_first_process_of_all_machines_says_what_all_would(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: Any,
    process: str,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", "no_such.yaml", "--method", "ewc"]) == 2
    assert bool(capsys.readouterr().err) == (not process)

    def fail(argv: Any) -> int:
        raise DataError("Expected a disk.")

    monkeypatch.setattr("bpn_lightning.cli.main._fit", fail)
    assert main(["--method", "ewc"]) == 2
    assert capsys.readouterr().err == f"bpn-fit: error{process}: Expected a disk.\n"


# --- two machines --------------------------------------------------------------------------------

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with a cable between them: the name of each, and of its end."""
    names = [f"bpn{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        yield [(name, name) for name in names]
    except FileNotFoundError:
        pytest.skip("no command `ip` (Debian's iproute2), so no network namespaces")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.matrix  # of torchrun too, above
def test_two_machines_learn_what_one_process_learns(
    tmp_path: Path, machines: list[tuple[str, str]], alone: dict[str, Any]
) -> None:
    """Without a disk in common: the first machine has the results, the other one writes nothing."""
    running = []
    for number, (namespace, device) in enumerate(machines):
        rendezvous = ["--master-addr", ADDRESSES[0], "--master-port", "29543"]
        launch = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", *rendezvous]
        flags = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
        command = [*TORCHRUN, *launch, "--no-python", FIT, *FLAGS, *flags]
        command += ["--runs", str(tmp_path / str(number))]
        inside = ["ip", "netns", "exec", namespace, *command]
        running.append(start(inside, GLOO_SOCKET_IFNAME=device))
    said = finish(*running)
    assert [run.returncode for run in running] == [0, 0], "\n".join(said)
    assert_same(report(tmp_path / "0"), alone)
    assert not (tmp_path / "1").exists()


# --- SLURM ---------------------------------------------------------------------------------------


def fit_in_slurm(runs: str) -> int:
    """The exit code of the command, with the variables that srun sets."""
    number = str(torch.distributed.get_rank())
    slurm = {
        "SLURM_JOB_NAME": "bpn",
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": number,
        "SLURM_LOCALID": number,
    }
    flags = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--runs", runs]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LOCAL_RANK", "NODE_RANK"):
            patch.delenv(name)
        for name, value in slurm.items():
            patch.setenv(name, value)
        return main([*FLAGS, *flags])


def test_srun_learns_what_one_process_learns(
    tmp_path: Path, alone: dict[str, Any], ranks: Any
) -> None:
    """By its variables, which is all that Lightning knows of SLURM."""
    assert ranks(fit_in_slurm, str(tmp_path)) == [0, 0]
    assert_same(report(tmp_path), alone)
