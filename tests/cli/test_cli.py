"""The command from end to end, on the bundled digits."""

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from waiting import PATIENCE

from bpn_lightning import __version__
from bpn_lightning.cli.main import main

pytestmark = pytest.mark.slow

BPN_FIT = str(Path(sys.executable).with_name("bpn-fit"))
SHORT = ["--trainer.accelerator", "cpu", "--data.init_args.epochs_per_task", "2"]
RUN = Path("runs", "digits_inc", "bd+ewc", "seed_0")

KILL = """
from lightning.pytorch import Callback


class Kill(Callback):
    def __init__(self, hook: str, step: int) -> None:
        def stop(trainer, *args, **kwargs):
            if trainer.global_step >= step:
                raise ZeroDivisionError("killed")
        setattr(self, hook, stop)
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def run(*flags: str, config: str = "digits_inc.yaml") -> int:
    return main(["--config", config, *SHORT, *flags])


def resolved(*line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What would run."""
    assert main([*line, "--print_config"]) == 0
    shown: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return shown


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def files(folder: Path) -> list[str]:
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith("checkpoints"))


def results(folder: Path) -> dict[str, Any]:
    """All but what may differ between equal runs."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in found.items() if key != "provenance"}


def assert_equal_runs(one: Path, other: Path) -> None:
    assert files(one) == files(other)
    names = [name for name in files(one) if name != "results.json"]
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])
    assert results(one) == results(other)


# --- without torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h", "--version", "--list"])
def test_short_answers_need_no_torch(flag: str) -> None:
    code = (
        "import sys; from bpn_lightning.cli.main import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 10 * bool({'torch', 'lightning', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, flag], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_help_version_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bpn-fit {__version__}\n"
    assert main([]) == main(["--help"]) == 0
    assert "usage: bpn-fit --config NAME" in capsys.readouterr().out
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    (digits,) = [line for line in shown.splitlines() if line.startswith("  digits_inc.yaml ")]
    assert {"bd+ewc", "ewc", "finetune"} <= set(digits.split(maxsplit=1)[1].split(", "))
    assert "  ewc                  bpn_lightning.strategies.ewc.EWC  (built in)\n" in shown
    assert "  gd                   bd with direction gradient\n" in shown
    assert "SplitCIFAR100" in shown


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--help_all", "--strategies.bd.epsilon"),
        ("--help", "--trainer.max_steps"),
        ("--data.help SplitMNIST", "--data.download"),
        ("--model.backbone.help bpn_lightning.nn.MLP", "--model.backbone.hidden"),
        ("--model.optimizer.help Adam", "--model.optimizer.betas"),
    ],
)
def test_the_long_helps(flags: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "digits_inc.yaml", *flags.split()]) == 0
    shown = capsys.readouterr().out
    assert expected in shown
    assert shown.count("\n") < 800


def test_every_option_is_shown_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help_all"]) == 0
    assert "--strategies.bd.epsilon" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, True])
def test_nvidias_library_is_looked_for_at_every_update_only_where_a_gpu_is(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    monkeypatch.setenv(name, "1")  # as Lightning does on import
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert main(["--help_all"]) == 0
    assert (name in os.environ) == gpu


# --- configuration -------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_method_over_the_experiment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    method = "strategies: {ewc: {strength: 20}}\nmodel: {mask: seen, patience: 3}\n"
    Path("methods/mine").mkdir(parents=True)
    Path("methods/mine/slow.yaml").write_text(method)
    text = "method: slow\nmodel: {mask: task, patience: 2, evaluate_every: epoch}\n"
    base = ["--config", "digits_inc.yaml", "--config", write("mine.yaml", text)]
    line = ["--experiment", "mine", "--method", "slow"]
    write(
        "digits_inc.yaml",
        (Path(__file__).parent.parent.parent / "configs/digits_inc.yaml").read_text(),
    )

    model = resolved(*base, *line, capsys=capsys)["model"]
    assert (model["mask"], model["patience"], model["evaluate_every"]) == ("seen", 3, "epoch")
    for order in ([*base, "--model.mask=all", *line], ["--model.mask=all", *line, *base]):
        assert resolved(*order, capsys=capsys)["model"]["mask"] == "all"
    shown = resolved("--strategies.ewc.strength", "5", *line, *base, capsys=capsys)
    assert shown["strategies"]["ewc"]["strength"] == 5


def test_interpolations_follow_overrides_and_reach_across_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = write(
        "first.yaml", "data: {init_args: {classes_per_task: '${data.init_args.num_tasks}'}}"
    )
    second = write(
        "second.yaml",
        "method: bd\nstrategies: {bd: {rank: '${data.init_args.classes_per_task}'}}\n"
        "trainer: {log_every_n_steps: '${model.patience}'}\nmodel: {patience: 8}\n",
    )
    line = ["--config", "digits_inc.yaml", "--config", first, "--config", second]
    shown = resolved(*line, capsys=capsys)
    assert shown["data"]["init_args"]["classes_per_task"] == 5  # within a file of its own
    assert shown["strategies"]["bd"]["rank"] == 5  # across two files
    assert shown["trainer"]["log_every_n_steps"] == 8
    shown = resolved("--data.init_args.num_tasks", "3", *line, capsys=capsys)
    assert shown["data"]["init_args"]["classes_per_task"] == 3  # an override reaches what it feeds
    assert shown["strategies"]["bd"]["rank"] == 3


def test_another_method_replaces_the_whole_set(capsys: pytest.CaptureFixture[str]) -> None:
    shown = resolved("--config", "digits_inc.yaml", capsys=capsys)
    assert list(shown["strategies"]) == ["bd", "ewc"]
    shown = resolved("--config", "digits_inc.yaml", "--method", "ewc", capsys=capsys)
    assert list(shown["strategies"]) == ["ewc"]
    assert shown["method"] == "ewc"


def test_a_run_without_a_tuned_method_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--config", "digits_inc.yaml", "--method", "bd", "--print_config"]) == 0
    assert capsys.readouterr().err == (
        "bpn-fit: There are no tuned values of bd for digits_inc: its strategies use their defaults.\n"
    )


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_writes_its_folder_and_the_same_line_writes_the_same_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert f"results: {RUN / 'results.json'}" in shown.out
    assert {"config.yaml", "metrics.csv", "accuracy_matrix.csv", "results.json"} <= set(files(RUN))
    assert (RUN / "checkpoints" / "last.ckpt").is_file()
    found = results(RUN)
    assert (found["experiment"], found["method"], found["seed"]) == ("digits_inc", "bd+ewc", 0)
    assert found["tasks_not_learned"] == []

    assert run("--runs", "again", "--checkpoint_every_n_steps", "500") == 0
    assert_equal_runs(RUN, Path("again", *RUN.parts[1:]))

    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert "runs" not in config
    assert config["data"]["init_args"]["epochs_per_task"] == 2


def test_a_finished_run_is_not_replaced_by_accident(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--method", "finetune") == 0
    before = Path("runs/digits_inc/finetune/seed_0/results.json").read_bytes()
    capsys.readouterr()
    assert run("--method", "finetune") == 2
    assert "to hold no finished run" in capsys.readouterr().err
    assert Path("runs/digits_inc/finetune/seed_0/results.json").read_bytes() == before
    assert run("--method", "finetune", "--overwrite") == 0


OFTEN = ["--checkpoint_every_n_steps", "5", "--trainer.log_every_n_steps", "5"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    runs = tmp_path_factory.mktemp("whole")
    assert run(*OFTEN, "--runs", str(runs)) == 0
    return Path(runs, *RUN.parts[1:])


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 31),  # inside an epoch
        ("on_train_batch_start", 36),  # before a task's first update
        ("on_train_batch_end", 36),  # after its last
        ("on_train_epoch_end", 50),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_files(
    whole: Path,
    hook: str,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("killer.py", KILL)
    monkeypatch.syspath_prepend(os.getcwd())
    stop = ["--trainer.callbacks", "killer.Kill", f"--trainer.callbacks.hook={hook}"]
    with pytest.raises(ZeroDivisionError):
        run(*OFTEN, *stop, f"--trainer.callbacks.step={step}")

    capsys.readouterr()
    assert run(*OFTEN) == 2
    assert "to hold no unfinished run" in capsys.readouterr().err
    assert run(*OFTEN, "--ckpt_path", "last") == 0
    assert_equal_runs(whole, RUN)


def test_a_stream_that_max_steps_ended_goes_on(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="not learned"):
        assert run(*OFTEN, "--trainer.max_steps", "40") == 0
    assert results(RUN)["tasks_not_learned"] != []
    assert run(*OFTEN, "--ckpt_path", "last") == 0
    assert_equal_runs(whole, RUN)


def test_last_starts_afresh_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--ckpt_path", "last") == 0
    last = RUN / "checkpoints" / "last.ckpt"
    assert (
        capsys.readouterr().err
        == f"bpn-fit: There is no {last} yet: this run starts from scratch.\n"
    )


def test_a_checkpoint_of_another_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    capsys.readouterr()
    last = str(RUN / "checkpoints" / "last.ckpt")
    assert run("--ckpt_path", last, "--seed_everything", "1") == 2
    assert capsys.readouterr().err == (
        "bpn-fit: error: Expected ckpt_path to be a checkpoint of digits_inc, method bd+ewc, seed 1, "
        f"but {last} is one of digits_inc, method bd+ewc, seed 0. "
        "Resume that run with its own config, method and seed.\n"
    )
    Path("half.ckpt").write_bytes(Path(last).read_bytes()[:1000])
    assert run("--ckpt_path", "half.ckpt", "--seed_everything", "1") == 2
    assert "Expected half.ckpt to be a checkpoint, but it cannot be read" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    write("runs", "a file")
    assert run() == 2
    assert "Choose another with --runs." in capsys.readouterr().err


def test_any_logger_of_lightning_beside_ours() -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert run(*logger, "--method", "finetune") == 0
    assert list(Path("logs").rglob("metrics.csv"))
    assert Path("runs/digits_inc/finetune/seed_0/metrics.csv").is_file()


def test_our_files_can_be_switched_off() -> None:
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    assert run(*off, "--trainer.enable_progress_bar=false", "--method", "finetune") == 0
    folder = Path("runs/digits_inc/finetune/seed_0")
    assert (folder / "results.json").is_file()
    assert not (folder / "metrics.csv").exists()
    assert not (folder / "checkpoints").exists()


def test_two_processes_reach_the_accuracies_of_one() -> None:
    """Through the installed command, which Lightning starts again for the second process."""
    assert run() == 0
    line = [BPN_FIT, "--config", "digits_inc.yaml", *SHORT, "--runs", "two"]
    line += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--logger", "tensorboard"]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    other = Path("two", *RUN.parts[1:])
    assert (RUN / "accuracy_matrix.csv").read_text() == (other / "accuracy_matrix.csv").read_text()
    assert done.stdout.count("results: ") == 1
    assert len(list((other / "tensorboard").rglob("events.*"))) == 1  # the first process's


def test_ctrl_c_says_how_to_go_on() -> None:
    # Tests that run in the background have SIGINT ignored, and so would what they start.
    listen = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    start = [sys.executable, "-c", listen + "os.execv(sys.argv[1], sys.argv[1:])"]
    line = [BPN_FIT, "--config", "digits_inc.yaml", *SHORT, "--data.init_args.epochs_per_task=9999"]
    with subprocess.Popen(
        [*start, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while not (RUN / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == (f"bpn-fit: Interrupted. The same command with --ckpt_path last resumes {RUN}.\n")
