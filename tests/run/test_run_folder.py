"""What lies in a run's folder is there, whole, until something else is: whatever ends the process that writes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bpn_lightning.errors import ResultsError
from bpn_lightning.files.lock import FolderLock, holder
from bpn_lightning.run import folder as run_folder
from bpn_lightning.run.folder import RunFolder

# Takes the folder in another process, and says so; ends when its input does, or is killed.
HOLD = """
import sys
from pathlib import Path
from bpn_lightning.files.lock import FolderLock
print(FolderLock(Path(sys.argv[1])).acquire(), flush=True)
sys.stdin.read()
"""


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_text() for path in files}


NAMES = (
    *("results.json", "config.yaml", "metrics.csv", "accuracy_matrix.csv"),
    *("figures/accuracy_matrix.png", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"),
)


def a_run(folder: Path, names: Sequence[str] = NAMES) -> dict[str, str]:
    """The files of a finished run."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    return contents(folder)


def taken(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    assert run.acquire() is False
    return run


# --- the lock ------------------------------------------------------------------------------------


def test_a_folder_has_one_process_until_it_ends_by_whatever(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seed_0"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "None\n"
        said = f"process {other.pid} on {os.uname().nodename}"
        assert holder(folder) == said
        with pytest.raises(ResultsError) as caught:
            RunFolder(folder).acquire()
        assert str(caught.value) == (
            f"Expected {folder} to be unused, but {said} is writing there. Wait for it to end or stop it, or choose another folder with --runs. If that process was on another machine that is no longer running, remove {folder / '.lock'}."
        )
        other.kill()
        other.wait()
    assert (folder / ".lock").exists()  # nobody could remove it
    assert holder(folder) is None
    run = taken(folder)
    run.release()
    assert contents(tmp_path) == {}


def test_what_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    run = taken(tmp_path / "runs" / "x" / "seed_0")
    run.release()
    assert list(tmp_path.iterdir()) == []
    run = taken(tmp_path / "runs" / "x" / "seed_0")
    (tmp_path / "runs" / "note").write_text("")
    run.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["note"]


def test_a_lock_of_two_begins_again_after_each(tmp_path: Path) -> None:
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    for _ in range(3):
        assert one.acquire() is None
        assert other.acquire() is not None
        other.release()  # has nothing, and takes nothing away
        assert other.acquire() is not None
        one.release()
        assert other.acquire() is None
        other.release()
    assert FolderLock(tmp_path, ".other").acquire() is None


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A data loader's workers live a few seconds longer than a run that is killed."""
    script = (
        "import os, sys, time\n" + HOLD.replace("sys.stdin.read()", "")
    ) + "if not os.fork():\n    print('child', flush=True)\n    time.sleep(60)\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as other:
        assert other.stdout is not None
        assert [other.stdout.readline() for _ in range(2)] == ["None\n", "child\n"]
        assert holder(tmp_path) is not None
        other.kill()
        other.wait()
        assert holder(tmp_path) is None
        os.killpg(other.pid, 9)


def test_a_file_that_says_nothing_of_a_process(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert lock.acquire() is None
    lock.path.write_text("\x1b[31m1 2 3")
    assert holder(tmp_path) == "another process"
    lock.release()


def test_without_locks_a_run_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="does not support locks"):
        taken(tmp_path).release()


# --- replacing ------------------------------------------------------------------------------------


def begins(folder: Path) -> None:
    """What a run writes before its first checkpoint."""
    for name in ("config.yaml", "metrics.csv", "checkpoints/next.ckpt"):
        (folder / name).write_text("new")


def test_the_earlier_run_goes_when_the_new_one_has_a_checkpoint(tmp_path: Path) -> None:
    old = a_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    run = taken(tmp_path)
    run.set_aside()
    assert not (tmp_path / "results.json").exists()
    begins(tmp_path)
    run.settle()
    assert {f".replaced/{name}" for name in old} < set(contents(tmp_path))
    (tmp_path / "checkpoints/last.ckpt").write_text("new")
    run.settle()
    assert set(contents(tmp_path).values()) == {"new", "mine"}
    assert run.release() is False
    assert set(contents(tmp_path).values()) == {"new", "mine"}


def test_the_earlier_run_comes_back_when_the_new_one_has_nothing(tmp_path: Path) -> None:
    old = a_run(tmp_path)
    run = taken(tmp_path)
    run.set_aside()
    begins(tmp_path)
    assert run.release() is True
    assert contents(tmp_path) == old
    assert not list(tmp_path.glob(".*"))


class Killed(BaseException):
    """As nothing in a run catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("saves", [False, True])
def test_a_kill_between_any_two_steps_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    """A process may die before every rename and removal, and so may the one that puts things right."""
    left = [0]  # steps to live

    def mortal(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return step(*args, **kwargs)

        return wrapped

    for name in ("replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(Path, name, mortal(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", mortal(shutil.rmtree))

    def live(folder: Path, steps: int, body: Callable[[RunFolder], None]) -> bool:
        """Whether a process with so many steps to live came to its end."""
        run = RunFolder(folder)
        left[0] = steps
        try:
            run.acquire()
            body(run)
            run.release()
        except Killed:
            return False
        finally:
            left[0] = 1000
            run._lock.release()  # as the system does
        return True

    def overwrites(run: RunFolder) -> None:
        run.set_aside()
        begins(run.path)
        if saves:
            (run.path / "checkpoints/last.ckpt").write_text("new")
        run.settle()

    names = ("results.json", "metrics.csv", "checkpoints/last.ckpt")
    for steps in range(100):
        ends = []
        for more in range(0, 12, 3):
            folder = tmp_path / f"{steps}-{more}"
            old = a_run(folder, names)
            ends.append(live(folder, steps, overwrites))
            live(folder, more, lambda _: None)
            assert live(folder, 1000, lambda _: None)
            found = contents(folder)
            new = saves and set(found.values()) == {"new"} and "checkpoints/last.ckpt" in found
            assert new or found == old
        if all(ends):
            break
    assert 4 < steps < 99
    assert bool(new) == saves


def test_only_what_a_run_writes_is_replaced(tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / "checkpoints" / "sharded.ckpt").mkdir()
    (tmp_path / "checkpoints" / "sharded.ckpt" / "0.distcp").write_text("old")
    (tmp_path / "checkpoints" / "epoch=1.ckpt").write_text("old")
    (tmp_path / "elsewhere.ckpt").write_text("kept")
    (tmp_path / "checkpoints" / "link.ckpt").symlink_to(tmp_path / "elsewhere.ckpt")
    for left in (".results.json.tmp", "figures/.x.png.tmp", "checkpoints/.next.ckpt.1.tmp"):
        (tmp_path / left).write_text("a crash left it")
    for mine in ("notes.txt", "figures/mine.png", "checkpoints/notes.txt"):
        (tmp_path / mine).write_text("kept")
    run = taken(tmp_path)
    run.set_aside()
    (tmp_path / "results.json").write_text("new")
    run.release()
    assert contents(tmp_path) == {
        "checkpoints/notes.txt": "kept",
        "elsewhere.ckpt": "kept",
        "figures/mine.png": "kept",
        "notes.txt": "kept",
        "results.json": "new",
    }


def test_nothing_to_replace_is_no_error(tmp_path: Path) -> None:
    run = taken(tmp_path)
    run.set_aside()
    assert run.release() is False


def test_files_are_known_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "file").symlink_to(last)
    os.link(last, tmp_path / "hard")
    monkeypatch.chdir(tmp_path / "run" / "figures")
    run = RunFolder(tmp_path / "run")
    for path in ("../checkpoints/last.ckpt", "../../link/checkpoints/last.ckpt", "../../file"):
        assert run.replaced(path) == last
    assert run.replaced(str(tmp_path / "hard")) == last
    for path in ("..", "last.ckpt", "", "\0", "x" * 5000, str(tmp_path)):
        assert run.replaced(path) is None


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results.json", "metrics.csv", "figures", "checkpoints"])
def test_what_lies_where_results_go_is_found_before_training(tmp_path: Path, name: str) -> None:
    if "." in name:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("")
    with pytest.raises(
        ResultsError, match=rf"Expected \S+{name} to be a f\w+ of a run, but it is something"
    ):
        RunFolder(tmp_path).acquire()
    assert holder(tmp_path) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ResultsError, match=r"to be a writable folder, but got: .*--runs"):
            RunFolder(folder).acquire()
    (tmp_path / "run" / "figures").mkdir(parents=True)
    monkeypatch.setattr(run_folder.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ResultsError, match=r"figures to be a writable folder"):
        RunFolder(tmp_path / "run").acquire()
