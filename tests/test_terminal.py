"""What reaches a terminal is text: no sequence of a name's moves its cursor, and no name stops a run."""

import os
import sys
import unicodedata
from collections.abc import Callable
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from bpn_lightning import AccuracyMatrix, errors
from bpn_lightning.analysis.pictures import Line, line_chart
from bpn_lightning.analysis.statistics import Interval
from bpn_lightning.bench.runner import _say
from bpn_lightning.cli import data as data_command
from bpn_lightning.cli import main as cli
from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.cli.output import notify
from bpn_lightning.costs import Bytes
from bpn_lightning.datamodules import SplitImageFolder
from bpn_lightning.errors import BPNLightningError, ConfigurationError, DataError
from bpn_lightning.report import cli as report
from bpn_lightning.run.console import StreamProgress, final_table, format_task_line
from bpn_lightning.run.drawing import save_figure
from bpn_lightning.tasks import Task
from bpn_lightning.terminal import is_utf8, printable

Said = pytest.CaptureFixture[str]

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e[red]ant[/red][link=x:y]\udcff"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e[red]ant[/red][link=x:y]\udcff"  # letter by letter


def is_text(shown: str) -> bool:
    """By Unicode's own table: no control, no mark of direction, no lone surrogate."""
    return all(
        unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn") or letter in "\n\t"
        for letter in shown
    )


@given(text=st.text())
def test_what_is_printable_is_text_and_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert is_text(shown)
    assert is_utf8(shown)
    assert printable(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_an_escape_is_pythons() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("é ü 蟻 \t\n") == "é ü 蟻 \t\n"
    assert printable(Path("a\x07")) == r"a\x07"


@pytest.mark.parametrize(
    "kind", [getattr(errors, name) for name in errors.__all__ if "Error" in name]
)
def test_no_error_writes_more_than_text(kind: type[BPNLightningError]) -> None:
    error = kind(f"Expected a class, but got {EVIL}.")
    assert str(error) == f"Expected a class, but got {SHOWN}."
    assert error.args == (f"Expected a class, but got {EVIL}.",)


TASKS = [Task(id=0, columns=(0, 1), class_names=(EVIL,), epochs=1)]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_shows_names_as_they_are(terminal: bool) -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, width=300)
    StreamProgress(console).print(format_task_line(TASKS, 0, [0.5]))
    matrix = AccuracyMatrix(1)
    folder = Path(EVIL)
    final_table(console, EVIL, TASKS, matrix.summary(), {}, Bytes(0, 0), folder)
    shown = out.getvalue()
    assert is_text(shown)
    assert shown.count(SHOWN) >= 4  # the line, the title, the class (cut), the folder twice


@pytest.mark.parametrize("say", [notify, _say], ids=["bpn-fit", "bpn-bench"])
def test_a_line_beside_a_run(say: Callable[[str], None], capsys: Said) -> None:
    say(EVIL)
    assert capsys.readouterr().err.rstrip().endswith(SHOWN)


def test_commands_that_only_look(tmp_path: Path, capsys: Said) -> None:
    folder = tmp_path / "a\x1b[31m"
    (folder / "b\x9b").mkdir(parents=True)
    (folder / "b\x9b" / "results.json").write_text("{")
    assert report.main([str(folder)]) == 0
    assert bench_main(["report", str(folder)]) == 2
    assert data_command.main(["check", str(folder), "--sets", "svhn"]) == 1
    assert cli.main(["--config", str(folder / "x.yaml")]) == 2
    shown = capsys.readouterr()
    assert is_text(shown.out + shown.err)
    assert r"a\x1b[31m" in shown.out
    assert r"b\x9b: unreadable" in shown.err


def bench_main(argv: list[str]) -> int:
    from bpn_lightning.bench.cli import main

    return main(argv)


def test_a_name_in_a_legend_is_no_formula(tmp_path: Path) -> None:
    """It would stop the report of a grid, or be set in another type."""
    lines = [Line(r"$\frac", [1.0, 2.0], [Interval(0.5, None, 1)] * 2), Line("b", [1.0], [None])]
    save_figure(line_chart([("$x_", lines)], title="$", xlabel="x"), tmp_path / "x.png")


# --- names that no file can hold -----------------------------------------------------------------


def class_folders(root: Path, name: bytes) -> None:
    for part in ("train", "test"):
        for label in (name, b"bee"):
            place = os.path.join(os.fsencode(root), part.encode(), label)
            os.makedirs(place)
            with open(os.path.join(place, b"1.png"), "wb") as file:
                Image.new("RGB", (4, 4)).save(file, "PNG")


def test_a_class_that_is_no_utf8_is_refused_while_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path, b"ant\xff")
    monkeypatch.setattr("bpn_lightning.datamodules.readers._decode", None)  # before any image
    with pytest.raises(DataError) as caught:
        SplitImageFolder(root=str(tmp_path), image_size=4).setup()
    assert str(caught.value) == (
        f"Expected the folders in {tmp_path / 'train'} to have names in UTF-8, but got 'ant\\udcff'. "
        "Rename it."
    )


def test_a_stream_of_such_classes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads them."""
    class_folders(tmp_path, b"ant")
    stream = SplitImageFolder(root=str(tmp_path), image_size=4)
    data = stream.read()._replace(class_names=["ant\udcff", "bee"])
    monkeypatch.setattr(stream, "read", lambda: data)
    with pytest.raises(DataError, match=r"to have names in UTF-8, but got 'ant.udcff'"):
        stream.setup()


@pytest.mark.parametrize(
    ("flags", "content"),
    [(["--data.init_args.root", "b\udcff"], ""), ([], 'data: {init_args: {root: "\\udcff"}}')],
)
def test_a_value_that_is_no_utf8_is_refused(flags: list[str], content: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    config: list[Any] = ["--config", "digits_inc", "--config", str(tmp_path / "x.yaml")]
    with pytest.raises(ConfigurationError, match="to be UTF-8 text"):
        read_command([*config, "--method", "ewc", *flags])
    assert not is_utf8("\udcff")


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (
            OSError(28, "No space left on device"),
            2,
            "Expected to write to standard output, but got: No space left on device.",
        ),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "cli.main",
        "cli.export",
        "cli.predict",
        "cli.bundle",
        "cli.data",
        "bench.cli",
        "report.cli",
        "serve.cli",
    ],
)
def test_output_that_nothing_takes_ends_every_command(
    name: str,
    failure: OSError,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full(StringIO):
        def write(self, text: str) -> int:
            raise failure

        def flush(self) -> None:
            raise failure

    main = import_module(f"bpn_lightning.{name}").main
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert main(["--help"]) == status
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == bool(said)


def test_other_errors_of_a_command_stay() -> None:
    @entry_point("bpn-x")
    def main(argv: object = None) -> int:
        raise BrokenPipeError(32, "of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        main()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DataError("Expected images."), 2, "bpn-x: error: Expected images.\n"),
        (KeyboardInterrupt(), 130, "bpn-x: Interrupted. Nothing was written.\n"),
    ],
)
@pytest.mark.parametrize("flushes", [True, False])
def test_an_expected_end_of_a_command_is_one_line(
    error: BaseException,
    status: int,
    said: str,
    flushes: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Closed(StringIO):
        def flush(self) -> None:
            if not flushes:
                raise BrokenPipeError(32, "Broken pipe")

    @entry_point("bpn-x", interrupted="Nothing was written.")
    def main(argv: object) -> int:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert main([]) == (status if flushes else 141)
    assert capsys.readouterr().err == said
