"""What bpn-fit does with an earlier run in its folder: nothing of it is lost or mixed up by accident."""

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from copies import work_in_a_copy

from bpn_lightning.cli import train
from bpn_lightning.cli.main import main
from bpn_lightning.files.lock import FolderLock
from bpn_lightning.terminal import plain_warnings

pytestmark = pytest.mark.slow

LINE = [
    *("--config", "digits_inc.yaml", "--method", "finetune", "--trainer.accelerator", "cpu"),
    *("--data.init_args.num_tasks", "2", "--data.init_args.epochs_per_task", "1"),
    *("--trainer.enable_progress_bar", "false"),
]
RUN = Path("runs", "digits_inc", "finetune", "seed_0")
LAST = RUN / "checkpoints" / "last.ckpt"

CRASH = """
from lightning.pytorch import Callback


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise ZeroDivisionError
"""


def run(*flags: str) -> int:
    return main([*LINE, *flags])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below `runs` a finished run, below `early` one that max_steps ended in its second task."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(place)
        patch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
        patch.setenv("PL_SEED_WORKERS", "0")
        warnings.simplefilter("ignore")
        assert run() == 0
        assert run("--runs", "early", "--trainer.max_steps", "11") == 0
    return place


@pytest.fixture(autouse=True)
def _a_folder_with_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in_a_copy(made, tmp_path, monkeypatch)
    Path("crashing_code.py").write_text(CRASH)
    monkeypatch.syspath_prepend(os.getcwd())


def files(folder: Path = RUN) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def refused(*flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, without the program's name, of a line that changes nothing."""
    before = files(Path())
    capsys.readouterr()
    assert run(*flags) == 2
    assert files(Path()) == before
    said = capsys.readouterr().err
    assert said.startswith("bpn-fit: error: ")
    return said.removeprefix("bpn-fit: error: ").rstrip("\n")


def early() -> Path:
    return Path("early", *RUN.parts[1:])


# --- --overwrite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["relative", "absolute", "dotted", "link", "hard link", "previous"])
def test_what_is_replaced_is_not_what_the_run_begins_with(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(LAST, LAST.with_name("previous.ckpt"))
    Path("link").symlink_to(RUN.parent)
    os.link(LAST, "hard.ckpt")
    path, found = {
        "relative": (LAST, LAST),
        "absolute": (LAST.absolute(), LAST),
        "dotted": (Path(f"early/../{LAST}"), LAST),
        "link": (Path("link/seed_0/checkpoints/last.ckpt"), LAST),
        "hard link": (Path("hard.ckpt"), LAST),
        "previous": (LAST.with_name("previous.ckpt"),) * 2,
    }[way]
    assert refused("--overwrite", "--ckpt_path", str(path), capsys=capsys) == (
        f"Expected ckpt_path to be a file that --overwrite does not replace, but got {path}, which is {found} "
        "of the run to be replaced. Copy it to another folder, or leave --overwrite out."
    )


def test_nor_data_or_weights(capsys: pytest.CaptureFixture[str]) -> None:
    stream = ["--data", "SplitArrays", "--data.init_args.path", str(RUN / "metrics.csv")]
    said = refused("--overwrite", *stream, capsys=capsys)
    assert said.startswith(
        "Expected data.init_args.path to be a file that --overwrite does not replace"
    )


def test_a_run_may_be_repeated_from_its_own_config() -> None:
    before = files()
    assert main(["--config", str(RUN / "config.yaml"), "--overwrite"]) == 0
    assert {name: text for name, text in files().items() if name != "results.json"}.keys() == {
        name: text for name, text in before.items() if name != "results.json"
    }.keys()
    for name in ("config.yaml", "metrics.csv", "accuracy_matrix.csv"):
        assert files()[name] == before[name]


@pytest.mark.parametrize(("step", "back"), [(0, True), (10, False)])
def test_an_earlier_run_is_kept_until_the_new_one_has_a_checkpoint(
    step: int, back: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    crash = ["--trainer.callbacks", "crashing_code.Crash", f"--trainer.callbacks.step={step}"]
    with pytest.raises(ZeroDivisionError):
        run("--overwrite", "--model.mask", "seen", *crash)
    said = "bpn-fit: The run had no checkpoint yet, so the earlier one in {} is restored.\n"
    assert (said.format(RUN) in capsys.readouterr().err) == back
    assert (files() == before) == back
    if not back:
        assert "results.json" not in files()
        assert not any(name.startswith(".") for name in files())
        assert run("--model.mask", "seen", "--ckpt_path", "last") == 0


def test_without_checkpoints_it_is_kept_until_there_are_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    off = ["--overwrite", "--trainer.enable_checkpointing=false"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_results", interrupt)
        assert run(*off) == 130
    assert files() == before
    assert capsys.readouterr().err == (
        "bpn-fit: Interrupted. It had no checkpoint yet.\n"
        f"bpn-fit: The run had no checkpoint yet, so the earlier one in {RUN} is restored.\n"
    )
    assert run(*off) == 0
    assert "checkpoints/last.ckpt" not in files()
    assert not any(name.startswith(".") for name in files())


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_results_are_written_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_results", interrupt)
        assert run("--overwrite") == 130
    assert capsys.readouterr().err == (
        "bpn-fit: Interrupted. The same command with --ckpt_path last instead of --overwrite resumes "
        f"{RUN}.\n"
    )
    assert run("--ckpt_path", "last") == 0


def test_results_are_whole_where_a_logger_cannot_keep_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(train, "upload_artifacts", unreachable)
    assert run("--runs", "new", "--log_artifacts") == 2
    here = Path("new", *RUN.parts[1:])
    assert capsys.readouterr().err == (
        "bpn-fit: error: Expected the loggers to upload the run's files, but got: no server. "
        f"Its results are complete in {here}: upload them manually.\n"
    )
    assert files(here).keys() == files().keys()


# --- a checkpoint of another folder ---------------------------------------------------------------


def test_a_checkpoint_of_another_folder_brings_its_rows_along(made: Path) -> None:
    for flags in (["--runs", "moved"], ["--overwrite"]):
        before = files(early())
        assert run(*flags, "--ckpt_path", str(early() / "checkpoints/last.ckpt")) == 0
        assert files(early()) == before
        here = Path(flags[1], *RUN.parts[1:]) if flags[1:] else RUN
        for name in ("metrics.csv", "accuracy_matrix.csv"):
            assert (here / name).read_bytes() == (made / RUN / name).read_bytes()


def test_it_does_not_replace_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(LAST)
    said = refused("--runs", "early", "--ckpt_path", path, capsys=capsys)
    assert said.startswith(f"Expected {early()} to hold no finished run")
    (early() / "results.json").unlink()
    said = refused("--runs", "early", "--ckpt_path", path, capsys=capsys)
    assert said.startswith(f"Expected {early()} to hold no unfinished run")


# --- metrics.csv ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, b"\xff\xfe"])
def test_rows_that_are_lost_are_said_and_nothing_more_is_lost(
    text: bytes | None, made: Path
) -> None:
    path = early() / "metrics.csv"
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    with pytest.warns(UserWarning, match=f"Expected {path} to have [0-9]+ rows of metrics, but it"):
        assert run("--runs", "early", "--ckpt_path", "last") == 0
    rows = (made / RUN / "metrics.csv").read_text().splitlines()
    assert path.read_text().splitlines()[-1].split(",")[0] == rows[-1].split(",")[0]
    kept = path.with_name("metrics.csv.damaged")
    assert (kept.read_bytes() if kept.exists() else None) == text


# --- two at once ----------------------------------------------------------------------------------


def test_two_runs_at_once_do_not_write_into_one_folder(capsys: pytest.CaptureFixture[str]) -> None:
    lock = FolderLock(RUN)
    assert lock.acquire() is None
    for flags in (["--overwrite"], ["--ckpt_path", "last"], []):
        said = refused(*flags, capsys=capsys)
        assert said.startswith(f"Expected {RUN} to be unused, but process {os.getpid()} on ")
    lock.release()
    assert run("--overwrite") == 0


def test_a_run_that_cannot_begin_leaves_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    refused("--runs", "new", "--data.init_args.num_tasks", "6", capsys=capsys)
    assert not Path("new").exists()


# --- another run, another configuration ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "different"),
    [
        (["--data.init_args.seed", "3"], "data.init_args.seed is 3 here and None there"),
        (["--data.init_args.num_tasks", "5"], "data.init_args.num_tasks is 5 here and 2 there"),
        (["--model.mask", "seen"], "model.mask is 'seen' here and 'all' there"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_another_configuration_is_named(
    flags: list[str], different: str, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not finished:
        (RUN / "results.json").unlink()
    assert refused(*flags, capsys=capsys) == (
        f"Expected {RUN} to hold no run of another configuration, but got one: {different}. Keep both with another --experiment or --runs, or replace it with --overwrite."
    )


def test_a_folder_by_another_name_is_not_taken_for_another_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A link here; names that differ in case alone, where a file system takes them for the same."""
    RUN.with_name("seed_1").symlink_to("seed_0")
    for flags in ([], ["--overwrite"]):
        said = refused("--seed_everything", "1", *flags, capsys=capsys)
        assert said.startswith(
            f"Expected {RUN.with_name('seed_1')} to be the folder of digits_inc, method finetune, seed 1, "
            "but it is that of digits_inc, method finetune, seed 0, because of a link"
        )


# --- warnings -------------------------------------------------------------------------------------


def test_a_warning_begins_with_the_commands_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(message: Any, category: Any, file: Any, line: Any, *_: object) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, file, line))

    monkeypatch.setattr(warnings, "showwarning", shown)  # as Python has it, and pytest has not
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", ".*isinstance.treespec")
        assert run("--runs", "other", "--trainer.max_steps", "3") == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "not learned" in line]
        assert all(line.startswith("bpn-fit: ") for line in lines)
        warnings.warn("as ever\nin Python", stacklevel=1)
        assert f"{__file__}:" in capsys.readouterr().err
        with plain_warnings("bpn-x"):
            warnings.warn("two\n lines", stacklevel=1)
    assert capsys.readouterr().err == "bpn-x: warning: two lines\n"
