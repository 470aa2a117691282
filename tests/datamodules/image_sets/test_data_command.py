"""``bpn-data check`` on an empty root, a part of the sets, and all of them."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from bpn_lightning.cli.data import check_set, main
from bpn_lightning.datamodules.image_sets import IMAGE_SETS, Counts, Flowers102

Trees = Callable[..., Any]
Said = pytest.CaptureFixture[str]


def states(said: str) -> dict[str, str]:
    rows = [line.split() for line in said.splitlines() if line and line[0] != " "]
    return {row[0]: row[1] for row in rows if row[0] in IMAGE_SETS}


@pytest.fixture
def made_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the sets had been published as the test writes them: 3 classes, 2 and 1 images each."""
    for name, kind in IMAGE_SETS.items():
        classes = {"svhn": 10, "actions": 10}.get(name, 3)
        counts = Counts(None, None, 15) if name == "letters" else Counts(2 * classes, classes)
        if name != "actions":
            monkeypatch.setattr(kind, "counts", counts)
            monkeypatch.setattr(kind, "num_classes", classes)


def test_an_empty_root_lacks_all_sets(tmp_path: Path, capsys: Said) -> None:
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert states(said) == dict.fromkeys(IMAGE_SETS, "absent")
    assert "0 of 8 sets are complete" in said
    for image_set in IMAGE_SETS.values():
        assert image_set.download_hint in said
        assert str(tmp_path / image_set.folders[0]) in said


def test_a_part_of_the_sets(made_counts: None, trees: Trees, capsys: Said) -> None:
    tree = trees("flowers", "birds", "svhn")
    gone = Path(tree.parts["birds"]["train"][0][0])
    gone.unlink()
    assert main(["check", str(tree.root)]) == 1
    said = capsys.readouterr().out
    present = {"flowers": "complete", "birds": "incomplete", "svhn": "complete"}
    assert states(said) == dict.fromkeys(IMAGE_SETS, "absent") | present
    assert f"{gone} is missing" in said
    assert "2 of 8 sets are complete" in said
    assert main(["check", str(tree.root), "--sets", "svhn,flowers"]) == 0
    assert list(states(capsys.readouterr().out)) == ["svhn", "flowers"]


def test_all_sets(made_counts: None, trees: Trees, capsys: Said) -> None:
    tree = trees()
    assert main(["check", str(tree.root)]) == 0
    said = capsys.readouterr().out
    assert states(said) == dict.fromkeys(IMAGE_SETS, "complete")
    assert "8 of 8 sets are complete" in said
    (line,) = (line for line in said.splitlines() if line.startswith("flowers"))
    assert line.split()[:5] == ["flowers", "complete", "3", "6", "3"]


def test_other_numbers_than_the_published_ones_are_incomplete(trees: Trees, capsys: Said) -> None:
    """But for the actions, whose people with one action nobody has published a number of."""
    assert main(["check", str(trees().root)]) == 1
    said = capsys.readouterr().out
    wanted = dict.fromkeys(IMAGE_SETS, "incomplete") | {"actions": "complete"}
    assert states(said) == wanted
    assert "Expected 102 classes, but got 3." in said
    assert "Expected 6,149 test images, but got 3." in said
    assert "no published number to compare with" in said


def test_damaged_images_are_found_if_asked_for(
    made_counts: None, trees: Trees, capsys: Said
) -> None:
    tree = trees("flowers")
    damaged = Path(tree.parts["flowers"]["test"][0][0])
    damaged.write_bytes(damaged.read_bytes()[:300])
    line = ["check", str(tree.root), "--sets", "flowers"]
    assert main(line) == 0
    assert main([*line, "--images"]) == 1
    assert f"{damaged} is damaged: " in capsys.readouterr().out


def test_many_damaged_images_are_counted(trees: Trees) -> None:
    tree = trees("flowers")
    for path, _ in tree.parts["flowers"]["train"] + tree.parts["flowers"]["test"]:
        Path(path).write_bytes(b"")
    faults = check_set(Flowers102(tree.root), open_images=True).faults
    assert sum("is damaged" in fault for fault in faults) == 5
    assert "4 more images are damaged." in faults


def test_options_change_what_is_expected(trees: Trees, capsys: Said) -> None:
    line = ["check", str(trees("aircraft").root), "--sets", "aircraft", "--option"]
    assert main([*line, "aircraft.level=variant"]) == 1
    assert "Expected 100 classes, but got 3." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no folder"),
        ([".", "--sets", "flower"], "Did you mean 'flowers'?"),
        ([".", "--option", "aircraft"], "SET.OPTION=VALUE"),
        ([".", "--option", "aircraft.level=kind"], "one of variant, family, manufacturer"),
        ([".", "--sets", "svhn", "--option", "aircraft.level=variant"], "one of 'aircraft'"),
    ],
)
def test_a_wrong_line_is_one_message(
    arguments: list[str], said: str, capsys: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("bpn-data: error: Expected ")
    assert (said in shown.err, shown.err.count("\n"), shown.out) == (True, 1, "")


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from bpn_lightning.cli.data import main;"
        f"main(['check', {str(tmp_path)!r}]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="bpn-data")
    assert command.value == "bpn_lightning.cli.data:main"
