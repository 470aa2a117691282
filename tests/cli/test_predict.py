"""`bpn-predict` answers as the module whose bundle it reads, and says what it cannot read."""

import csv
import json
import os
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bpn_lightning import ContinualModule
from bpn_lightning.cli import answers
from bpn_lightning.cli.predict import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.export.exporting import export_module
from bpn_lightning.strategies import BeneficialPerturbation

Said = pytest.CaptureFixture[str]


@pytest.fixture
def module(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ContinualModule:
    """With its bundle, and three folders of images of digits."""
    monkeypatch.chdir(tmp_path)
    stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=64, seed=0)
    made, _ = fit([BeneficialPerturbation(4)], stream=stream)
    export_module(made.eval(), "out", names=["low", "high"])
    for label in ("0", "1", "2"):
        Path("set", label).mkdir(parents=True)
        for number, image in enumerate(images(int(label))):
            Image.fromarray(image).save(Path("set", label, f"{number}.png"))
    done: ContinualModule = made
    return done


def images(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (3, 8, 8), dtype=np.uint8)


def expected(module: ContinualModule, task: int | None) -> list[str]:
    raw = torch.from_numpy(np.concatenate([images(seed) for seed in range(3)]))[:, None]
    columns = module.predict(raw, task=task).argmax(1).tolist()
    return [str(column) for column in columns]  # digits in order


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text)))


def test_a_folder_of_images(module: ContinualModule, capsys: Said) -> None:
    assert main(["out", "set", "--confusion", "table.csv", "--batch_size", "4"]) == 0
    said = capsys.readouterr()
    found = rows(said.out)
    assert [row["class"] for row in found] == expected(module, None)
    assert [row["input"] for row in found[:4]] == [
        "set/0/0.png",
        "set/0/1.png",
        "set/0/2.png",
        "set/1/0.png",
    ]
    assert {row["task"] for row in found} <= {"low", "high"}
    table = rows(Path("table.csv").read_text())
    assert [row["label"] for row in table] == ["0", "1", "2"]
    assert all(sum(int(v) for k, v in row.items() if k != "label") == 3 for row in table)
    right = sum(int(row.get(row["label"], 0)) for row in table)
    assert said.err == f"bpn-predict: {right} of 9 answers are the label\n"


def test_arrays_and_a_task(module: ContinualModule, capsys: Said) -> None:
    whole = np.concatenate([images(seed) for seed in range(3)])
    np.savez("a.npz", images=whole, labels=np.repeat([0, 1, 2], 3))
    line = [
        "out",
        "a.npz",
        "--task",
        "high",
        "--format",
        "jsonl",
        "--to",
        "lines",
        "--reject_below",
        "1",
    ]
    assert main([*line, "--confusion", "table.csv"]) == 0
    found = [json.loads(text) for text in Path("lines").read_text().splitlines()]
    assert [row["class"] for row in found] == expected(module, 1)
    assert {row["task"] for row in found} == {"high"}
    assert all(row["rejected"] is True and 0 < row["confidence"] <= 1 for row in found)
    assert found[4]["input"] == "a.npz[4]"
    capsys.readouterr()
    assert main(line) == 2
    assert "Expected lines to be a new file, but it exists." in capsys.readouterr().err


def test_a_spreadsheet_computes_no_name(module: ContinualModule, capsys: Said) -> None:
    """A file or a task of somebody else's, in CSV alone; a path is another one of the same file."""
    Path("out/tasks/high").rename("out/tasks/=1+1")
    Path("set/0/0.png").rename("@a.png")
    Path("set/1").rename("set/-1")
    Path("set/2").rename("set/+cmd")
    assert main(["out", "@a.png", "--task", "=1+1"]) == 0
    (line,) = rows(capsys.readouterr().out)
    assert (line["input"], line["task"]) == ("./@a.png", "'=1+1")
    assert Path(line["input"]).is_file()
    assert -1 <= float(line["confidence"]) <= 1
    assert main(["out", "@a.png", "--task", "=1+1", "--format", "jsonl"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["input"], record["task"]) == ("@a.png", "=1+1")
    assert main(["out", "set", "--confusion", "table.csv"]) == 0
    assert [row["label"] for row in rows(Path("table.csv").read_text())] == ["'+cmd", "-1", "0"]


def test_parquet_by_the_ending(
    module: ContinualModule, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(answers, "GROUP_ROWS", 4)
    assert main(["out", "set", "--to", "a.parquet", "--batch_size", "2"]) == 0
    assert main(["out", "set", "--format", "jsonl", "--batch_size", "2"]) == 0
    wanted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    file = tables.ParquetFile("a.parquet")
    assert file.read().to_pylist() == wanted
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [4, 4, 1]
    Path("set", "2", "2.png").write_bytes(b"nothing")
    assert main(["out", "set", "--to", "b.parquet", "--batch_size", "2"]) == 2
    assert tables.read_table("b.parquet").to_pylist() == wanted[:6]  # what was answered before
    assert main(["out", "set", "--to", "c.parquet", "--format", "csv"]) == 2
    assert Path("c.parquet").read_text().startswith("input,class,task,")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--format", "parquet"], "Expected --to where --format is parquet"),
        (["--to", "a.PARQUET"], "pip install 'bpn_lightning[parquet]'"),
    ],
)
def test_parquet_that_cannot_be_written(
    line: list[str],
    said: str,
    module: ContinualModule,
    capsys: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    capsys.readouterr()
    assert main(["out", "set", *line]) == 2
    assert said in capsys.readouterr().err
    assert not Path("a.PARQUET").exists()


def test_bad_files_are_skipped_by_request_only(module: ContinualModule, capsys: Said) -> None:
    Path("set", "1", "1.png").write_bytes(b"nothing")
    Path("set", "2", "0.png").unlink()
    Path("set", "2", "0.png").symlink_to("/etc/hostname")
    assert main(["out", "set"]) == 2
    assert "Expected set/1/1.png to be an input of the bundle, but got" in capsys.readouterr().err
    assert main(["out", "set", "--skip_bad"]) == 1
    said = capsys.readouterr()
    assert [row["input"] for row in rows(said.out)].count("set/1/1.png") == 0
    assert len(rows(said.out)) == 7
    lines = said.err.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " skipped set/1/1.png",
        " skipped set/2/0.png",
    ]
    assert "leads out of set" in lines[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["nowhere", "set"], "Expected nowhere to be a bundle"),
        (["out", "nowhere.png"], "Expected nowhere.png to be an input of the bundle"),
        (["out", "set", "--task", "middle"], "one of low (0), high (1), but got 'middle'."),
        (["out", "set", "--task", "7"], "one of low (0), high (1), but got 7."),
        (["out", "set", "--reject_below", "2"], "Expected reject_below to be a number from 0 to 1"),
        (["out", "set", "--device", "toaster"], "Expected device to be one that torch can use"),
        (["out", "set", "--to", "no/a.csv"], "Name a file in a folder that exists"),
        (["out", "set", "--batch_size", "0"], "Expected batch_size to be a whole number"),
        (["out", "out"], "Expected out to hold 1 to 10,000,000 images, but got 0."),
        (["out", "b.npz"], "Expected b.npz to hold one of images, features, tokens"),
    ],
)
def test_what_is_refused(line: list[str], said: str, module: ContinualModule, capsys: Said) -> None:
    np.savez("b.npz", pictures=images(0))
    capsys.readouterr()
    assert main(line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_arrays_that_are_none(module: ContinualModule, capsys: Said) -> None:
    whole = images(0)
    for array in (whole[0], whole[None, None], np.array(["a"]), np.uint8(3), whole * 1j):
        np.savez("c.npz", images=array)
        assert main(["out", "c.npz"]) == 2
        assert "Expected c.npz to be an input of the bundle, but got" in capsys.readouterr().err
    for labels in (np.uint8(3), np.zeros((3, 2)), np.zeros(2)):
        np.savez("c.npz", images=whole, labels=labels)
        assert main(["out", "c.npz"]) == 2
        assert "Expected labels in c.npz to have one entry" in capsys.readouterr().err


def test_one_bad_array_of_a_batch_is_skipped(module: ContinualModule, capsys: Said) -> None:
    whole = images(0) / 255
    whole[1] = np.nan
    np.savez("c.npz", images=whole)
    assert main(["out", "c.npz"]) == 2
    assert "Expected c.npz[1] to be an input of the bundle, but got" in capsys.readouterr().err
    assert main(["out", "c.npz", "--skip_bad"]) == 1
    said = capsys.readouterr()
    assert [row["input"] for row in rows(said.out)] == ["c.npz[0]", "c.npz[2]"]
    assert said.err.startswith("bpn-predict: skipped c.npz[1]: ")


def test_a_name_that_is_a_number_and_one_that_is_no_text(
    module: ContinualModule, capsys: Said
) -> None:
    Path("out/tasks/high").rename("out/tasks/0")
    Path("set/0/0.png").rename(os.fsdecode(b"set/0/\xff.png"))
    assert main(["out", "set", "--task", "0", "--to", "lines"]) == 0
    found = rows(Path("lines").read_text())
    assert [row["class"] for row in found] == [
        *expected(module, 1)[1:3],
        *expected(module, 1)[:1],
        *expected(module, 1)[3:],
    ]
    assert found[2]["input"] == "set/0/\\udcff.png"


@pytest.mark.parametrize("path", ["n" * 5000, "out/config.json/x"])
def test_paths_that_cannot_be(path: str, module: ContinualModule, capsys: Said) -> None:
    assert main(["out", path]) == 2
    assert main(["out", "set", "--confusion", path]) == 2
    assert f"Expected to write {path}, but got" in capsys.readouterr().err
