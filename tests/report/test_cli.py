"""The command from outside: what it writes, what it refuses, and how it ends."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from bpn_lightning.report.cli import main

pytestmark = pytest.mark.slow

Make = Callable[..., Path]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = entry_points(group="console_scripts", name="bpn-report")
    assert command.load() is main
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: bpn-report RUN_OR_FOLDER")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bpn-report ")


def test_the_page_lies_in_the_folder_or_where_it_is_wished(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run()
    (make_run("psp") / "results.json").unlink()
    assert main([str(tmp_path / "runs")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/runs/report.html\n"
    assert said.err.startswith("bpn-report: digits_inc/psp/seed_0: not finished. ")
    page = (tmp_path / "runs" / "report.html").read_bytes()
    # a page that lies among the runs is no run
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_bytes() == page
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "other.html")]) == 0  # again


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["nowhere"], "Expected nowhere to be the folder of a run"),
        (["."], "Expected . to hold runs"),
        (["runs", "more"], "but got 'more'"),
        (["runs", "--ot", "x"], "but got '--ot'"),
        (["--out", "x"], "but got 'no folder'"),
        (["runs", "--out"], "expected one argument"),
        (
            ["runs", "--out", "runs/digits_inc/ewc/seed_0/results.json"],
            "Expected --out to be a new file or an earlier page",
        ),
        (["runs", "--out", "runs"], "Expected --out to be a new file or an earlier page"),
        (["runs", "--reference", "ewk"], "but got 'ewk'. Did you mean 'ewc'?"),
        (
            ["runs", "--out", "no/such/folder.html"],
            "Expected --out to be a file that can be written",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    line: list[str],
    message: str,
    make_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if line[0] == "runs":
        make_run()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    texts = [path.read_bytes() for path in before if path.is_file()]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("bpn-report: error: ")
    assert message in said
    assert sorted(tmp_path.rglob("*")) == before
    assert [path.read_bytes() for path in before if path.is_file()] == texts


def test_no_torch_is_imported(make_run: Make, tmp_path: Path) -> None:
    make_run()
    code = (
        "import sys; from bpn_lightning.report.cli import main; main(sys.argv[1:]);"
        "sys.exit(str(found) if (found := {'torch', 'lightning'} & set(sys.modules)) else 0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
