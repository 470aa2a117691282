"""Whatever ends a run, what continues from its checkpoints is the run that nothing ended."""

import os
import random
import resource
import signal
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_script
from lightning.pytorch import Trainer

from bpn_lightning.cli.main import main
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.run.checkpoints import AtomicCheckpointIO, read_checkpoint
from bpn_lightning.run.recording import Intervals, LastCheckpoint, MetricsFile

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

ROOT = Path(__file__).parent.parent.parent
LINE = [
    *("--config", "digits_inc.yaml", "--method", "ewc", "--trainer.accelerator", "cpu"),
    *("--data.init_args.num_tasks", "2", "--data.init_args.epochs_per_task", "2"),
    *("--model.optimizer", "Adam", "--model.optimizer.lr", "0.002"),
    *("--strategies.ewc.update", "gradient"),
    *("--trainer.log_every_n_steps", "3", "--trainer.enable_progress_bar", "false"),
]
RUN = Path("runs", "digits_inc", "ewc", "seed_0")
CHECKPOINTS = RUN / "checkpoints"

FAULTS = """
import os
import resource

from lightning.pytorch import Callback


class Send(Callback):
    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class KillInFront(Callback):
    # While it is fitted, in its first or in its last pass over the images; or when it is used first.

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_fit_start(self, trainer, pl_module):
        front = pl_module.network.front
        setattr(front, self.moment, lambda *_: os.kill(os.getpid(), 9))


class FullDisk(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 30:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


class Crash(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 30:
            raise ZeroDivisionError
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    Path("user_code.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(os.getcwd())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing ended."""
    runs = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        assert run("--runs", str(runs)) == 0
    return Path(runs, *RUN.parts[1:])


def run(*flags: str) -> int:
    return main([*LINE, *flags])


def with_fault(name: str, *flags: str) -> int:
    return run("--trainer.callbacks", f"user_code.{name}", *flags)


def figures(run: Path) -> list[str]:
    return [(run / name).read_text() for name in ("metrics.csv", "accuracy_matrix.csv")]


def weights(run: Path) -> torch.Tensor:
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    parts = [value.double().flatten() for value in state.values() if value.is_floating_point()]
    return torch.cat(parts).nan_to_num(-7)


def assert_same(whole: Path) -> None:
    assert figures(whole) == figures(RUN)
    assert torch.equal(weights(whole), weights(RUN))


# --- the harness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("ebll", ["--most", "3"]),
        ("bd+ewc", ["--continued", "--most", "4"]),
        pytest.param("gem", ["--continued", "--seed", "1"], marks=pytest.mark.matrix),
        pytest.param("lwf", ["--continued", "--seed", "2"], marks=pytest.mark.matrix),
        pytest.param("stl", ["--continued", "--seed", "3"], marks=pytest.mark.matrix),
        pytest.param(
            "bd+psp",
            ["--continued", "--processes", "2", "--most", "8"],
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_faults_at_drawn_moments_leave_no_difference(method: str, flags: list[str]) -> None:
    """All processes are the harness's own; its table with every strategy is in docs/resume.md."""
    script = str(ROOT / "benchmarks" / "faults.py")
    done = run_script([script, "--methods", method, "--clock", "0", *flags])
    assert done.returncode == 0, done.stderr + done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {method} "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert int(cells[1]) >= 3
    assert int(cells[4]) > 800
    assert (cells[5], cells[7], cells[8]) == ("0", "0", "0")


# --- signals -------------------------------------------------------------------------------------


def test_sigterm_stops_after_the_update(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    term = f"--trainer.callbacks.number={int(signal.SIGTERM)}"
    assert with_fault("Send", term, "--trainer.callbacks.step=20") == 143
    assert capsys.readouterr().err == (
        f"bpn-fit: Terminated. The same command with --ckpt_path last resumes {RUN}.\n"
    )
    assert read_checkpoint(CHECKPOINTS / "last.ckpt")["global_step"] == 21
    assert run("--ckpt_path", "last") == 0
    assert_same(whole)


def test_slurm_is_asked_to_queue_the_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a double of scontrol, in the environment that SLURM makes."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" > asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NAME": "stream",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    number = f"--trainer.callbacks.number={int(signal.SIGUSR1)}"
    accumulate = ["--trainer.accumulate_grad_batches", "2"]
    assert with_fault("Send", number, "--trainer.callbacks.step=7", *accumulate) == 143
    assert Path("asked").read_text() == "requeue 42\n"
    assert read_checkpoint(CHECKPOINTS / "last.ckpt")["global_step"] == 8
    assert not list(RUN.glob("hpc_ckpt*"))
    assert run("--ckpt_path", "last", *accumulate) == 0
    assert run("--runs", "whole", *accumulate) == 0
    assert_same(Path("whole", *RUN.parts[1:]))


# --- user code ---------------------------------------------------------------------------------------


def test_what_is_logged_after_a_checkpoint_is_not_lost(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning logs an update after the hook in which a checkpoint of it is taken."""
    log_metrics = MetricsFile.log_metrics

    def fails_once(self: MetricsFile, metrics: Any, step: int | None = None) -> None:
        if step == 29:  # of the update after which there are 30
            raise ZeroDivisionError
        log_metrics(self, metrics, step)

    often = ["--checkpoint_every_n_steps", "5"]
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "log_metrics", fails_once)
        with pytest.raises(ZeroDivisionError):
            run(*often)
    assert read_checkpoint(CHECKPOINTS / "next.ckpt")["global_step"] == 30
    assert run(*often, "--ckpt_path", "last") == 0
    assert_same(whole)


# --- disks ---------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_in_one_sentence(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        assert with_fault("FullDisk") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == (
        f"bpn-fit: error: No space left for the files of {RUN}: [Errno 27] File too large. "
        f"Free some. The same command with --ckpt_path last resumes {RUN}.\n"
    )
    assert {path.name for path in CHECKPOINTS.iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert run("--ckpt_path", "last") == 0
    assert_same(whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ZeroDivisionError):
        with_fault("Crash", "--checkpoint_every_n_steps", "5")
    last, previous = CHECKPOINTS / "last.ckpt", CHECKPOINTS / "previous.ckpt"
    steps = [read_checkpoint(path)["global_step"] for path in (last, previous)]
    assert steps == [27, 25]
    content = bytearray(last.read_bytes())
    place = content.rindex(b"\x3f")  # in the last tensor of any size
    content[place] ^= 1
    last.write_bytes(content)
    capsys.readouterr()
    assert run("--ckpt_path", "last", "--checkpoint_every_n_steps", "5") == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"bpn-fit: warning: Expected {last} to be a checkpoint, but it cannot be read: archive/"
    )
    assert said.endswith(
        f" does not match its checksum. Resuming from {previous}, the checkpoint before it.\n"
    )
    assert_same(whole)


def test_two_damaged_checkpoints_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    CHECKPOINTS.mkdir(parents=True)
    for name in ("last.ckpt", "previous.ckpt"):
        (CHECKPOINTS / name).write_bytes(b"PK\x03\x04 and no more")
    assert run("--ckpt_path", "last") == 2
    assert capsys.readouterr().err == (
        f"bpn-fit: error: Expected {CHECKPOINTS / 'last.ckpt'} to be a checkpoint, but it cannot be "
        f"read: File is not a zip file. Expected {CHECKPOINTS / 'previous.ckpt'} to be a checkpoint, but "
        "it cannot be read: File is not a zip file. Start from scratch with --overwrite instead of --ckpt_path.\n"
    )


def test_a_kill_between_two_renames(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHECKPOINTS.mkdir(parents=True)
    last, previous = CHECKPOINTS / "last.ckpt", CHECKPOINTS / "previous.ckpt"
    previous.write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes())
    (RUN / "metrics.csv").write_bytes((whole / "metrics.csv").read_bytes())
    assert run("--ckpt_path", "last") == 0
    assert capsys.readouterr().err == (
        f"bpn-fit: warning: There is no {last}. Resuming from {previous}, the checkpoint before it.\n"
    )


FRONT = ["--front", "patches", "--gate", "slda"]
for name, number in {"num_patches": 8, "size": 3, "samples": 2000, "iterations": 3}.items():
    FRONT += [f"--fronts.patches.{name}", str(number)]


@pytest.fixture(scope="module")
def whole_with_front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("front")
    assert run(*FRONT, "--runs", str(runs)) == 0
    (folder,) = runs.glob("*/*/seed_0")
    return folder


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(["KillInFront", "--trainer.callbacks.moment=_draw"], marks=pytest.mark.matrix),
        ["KillInFront", "--trainer.callbacks.moment=_standardize"],
        ["KillInFront", "--trainer.callbacks.moment=forward"],
        ["Send", "--trainer.callbacks.number=9", "--trainer.callbacks.step=30"],
    ],
)
def test_a_kill_while_a_front_is_fitted_or_used(whole_with_front: Path, fault: list[str]) -> None:
    """Its features are computed again, and are the same bits."""
    whole = whole_with_front
    line = ["-m", "bpn_lightning.cli.main", *LINE, *FRONT]
    line += ["--trainer.callbacks", f"user_code.{fault[0]}", *fault[1:]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert run_script(line, env=environment).returncode == -signal.SIGKILL
    there = Path("runs", *whole.parts[-3:])
    assert (there / "checkpoints" / "last.ckpt").exists() == (fault[0] == "Send")
    assert run(*FRONT, "--ckpt_path", "last") == 0
    assert figures(whole) == figures(there)
    assert torch.equal(weights(whole), weights(there))
    assert (whole / "gates.csv").read_text() == (there / "gates.csv").read_text()


def test_every_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """Of a file with many small records, which has the most of what no checksum is over."""
    tree = {"weights": torch.arange(300.0), "counts": [torch.arange(5), 7, "name", None]}
    path = tmp_path / "some.ckpt"
    AtomicCheckpointIO().save_checkpoint(tree, path)
    whole, rng = path.read_bytes(), random.Random(0)
    found = 0
    for place in [*range(0, 400, 7), *rng.sample(range(len(whole)), 400)]:
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            read = read_checkpoint(path)
        except CheckpointError:
            found += 1
        else:
            assert torch.equal(read["weights"], tree["weights"])
            assert torch.equal(read["counts"][0], tree["counts"][0])
            assert read["counts"][1:] == tree["counts"][1:]
    assert found > 100
    for length in rng.sample(range(len(whole)), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


# --- what a resumed run may differ in ------------------------------------------------------------


def test_another_configuration_is_refused_key_by_key(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = whole / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    other = ["--strategies.ewc.strength", "7", "--data.init_args.batch_size", "16"]
    assert run("--ckpt_path", str(last), "--runs", "other", *other) == 2
    assert capsys.readouterr().err == (
        "bpn-fit: error: Expected ckpt_path to be a checkpoint of this configuration, but "
        f"{last} differs: data.init_args.batch_size is 16 here and 32 there; strategies.ewc.strength "
        "is 7.0 here and 2000.0 there. Resume with the configuration that wrote it (config.yaml next to "
        "it), or start a new run in another --runs folder.\n"
    )


def test_what_does_not_change_a_run_may_change(whole: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with_fault("Crash")
    flags = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    flags += ["--trainer.enable_progress_bar", "true", "--checkpoint_every_n_epochs", "null"]
    assert run("--ckpt_path", "last", *flags) == 0
    assert_same(whole)


def resume_in_two(folder: str) -> tuple[int, str]:
    """The exit code of the command, and what it says."""
    flags = ("--ckpt_path", "last", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as said:
        patch.chdir(folder)
        return run(*flags), said.getvalue()


def test_two_processes_go_on_where_one_stopped(whole: Path, ranks: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        with_fault("Crash", "--checkpoint_every_n_steps", "5")
    statuses, said = zip(*ranks(resume_in_two, str(Path.cwd())), strict=True)
    assert statuses == (0, 0), said
    assert "".join(said).count("The checkpoint is of 1 and this run of 2 processes.") == 1
    torch.testing.assert_close(weights(RUN), weights(whole), rtol=1e-4, atol=1e-5)
    assert figures(RUN)[1] == figures(whole)[1]


# --- when checkpoints are taken ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intervals", "steps"),
    [
        (Intervals(steps=None, epochs=1), [3, 6, 9, 12]),
        (Intervals(steps=None, epochs=2, tasks=None), [6, 12]),
        (Intervals(steps=None, epochs=None, tasks=2), [12]),
        (Intervals(steps=None, epochs=None, tasks=None), [12]),
        (Intervals(steps=2, epochs=None, tasks=None), [2, 4, 6, 8, 10, 12]),
        (Intervals(steps=None, epochs=None, tasks=None, minutes=3.5), [4, 8, 12]),
    ],
)
def test_intervals(
    fit: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    intervals: Intervals,
    steps: list[int],
) -> None:
    """Three updates an epoch, two epochs a task, two tasks; an update takes a minute."""
    from bpn_lightning.run import recording

    saved: list[int] = []
    real = Trainer.save_checkpoint

    def save(trainer: Trainer, *args: Any) -> None:
        saved.append(trainer.global_step)
        real(trainer, *args)

    callback = LastCheckpoint(tmp_path / "last.ckpt", intervals, {})

    def clock() -> float:
        return 60.0 * callback._step

    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    monkeypatch.setattr(recording.time, "monotonic", clock)
    fit([callback], trainer={"limit_train_batches": 3, "enable_checkpointing": True})
    assert saved == steps
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12
    assert (tmp_path / "previous.ckpt").exists() == (len(saved) > 1)


@pytest.mark.parametrize("unit", ["steps", "epochs", "tasks", "minutes"])
def test_intervals_of_nothing_are_refused(unit: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"Expected checkpoint_every_n_{unit} to be .*got 0"
    ):
        Intervals(**{unit: 0})
