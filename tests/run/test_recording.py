import csv
from pathlib import Path
from typing import Any

import pytest

from bpn_lightning.run.recording import MetricsFile


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_on_disk_at_once_and_a_new_metric_gets_a_column(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.log_metrics({"loss": 0.5, "epoch": 0}, step=4)
    assert path.read_text() == "step,epoch,loss\n4,0,0.5\n"
    metrics.log_metrics({"accuracy": 1.0}, step=5)
    assert path.read_text() == "step,epoch,accuracy,loss\n4,0,,0.5\n5,,1.0,\n"
    metrics.log_metrics({"loss": 0.25, "epoch": 1}, step=9)
    assert path.read_text().endswith("9,1,,0.25\n")
    assert metrics.rows == 3


def test_a_run_from_the_start_replaces_an_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,old\n1,2\n")
    MetricsFile(path).log_metrics({"loss": 1.0}, step=0)
    assert path.read_text() == "step,loss\n0,1.0\n"


def test_a_resumed_run_ends_with_the_file_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    """Whatever was written after the checkpoint, columns and half a line included."""
    logged = [({"loss": 0.5 / (step + 1)}, step) for step in range(6)]
    last = ({"accuracy": 0.75}, 6)
    whole = MetricsFile(tmp_path / "whole.csv")
    for entry in [*logged, last]:
        whole.log_metrics(*entry)

    path = tmp_path / "stopped.csv"
    stopped = MetricsFile(path)
    for entry in logged[:4]:
        stopped.log_metrics(*entry)
    rows_at_checkpoint = stopped.rows - 1  # of step 4: the row of its last update came later
    stopped.log_metrics(*logged[4])
    stopped.log_metrics({"a metric of the lost part": 1.0}, step=5)
    with path.open("a") as file:
        file.write("6,0")

    resumed = MetricsFile(path)
    resumed.resume(rows_at_checkpoint, global_step=4)
    for entry in [*logged[4:], last]:
        resumed.log_metrics(*entry)
    assert path.read_text() == (tmp_path / "whole.csv").read_text()


def test_a_checkpoint_from_elsewhere_begins_a_new_file(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    with pytest.warns(UserWarning, match="to have 7 rows of metrics, but it does not exist"):
        metrics.resume(rows=7, global_step=70)
    metrics.log_metrics({"loss": 1.0}, step=70)
    assert rows(metrics.path) == [{"step": "70", "loss": "1.0"}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"step,epoch\n0,0\n", "but it has 1."),
        (b"", "but it has 0."),
        (b"\xff\xfe", "but it cannot be read ("),
        (b"a,b\n1,2\n", "but it cannot be read ('step')"),
        (b"step,a\nx,2\n", "but it cannot be read (line 2 has no step)"),
        (b'step,a\n"1,2\n', "but it cannot be read ("),
        (
            b"step,a\n1,2,3\n",
            "but it cannot be read (line 2 does not have the columns of the first line)",
        ),
        (
            b"step,a\n1\n",
            "but it cannot be read (line 2 does not have the columns of the first line)",
        ),
    ],
)
def test_what_is_missing_is_said_and_what_is_no_table_is_kept(
    text: bytes, said: str, tmp_path: Path
) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for other in (b"older\nx\n", text):
        metrics.path.write_bytes(other)
        with pytest.warns(UserWarning, match="to have 2 rows of metrics, but it") as caught:
            metrics.resume(rows=2, global_step=0)
    assert said in str(caught[0].message)
    metrics.log_metrics({"loss": 1.0}, step=9)
    assert rows(metrics.path)[-1]["step"] == "9"
    kept = [path.read_bytes() for path in sorted(tmp_path.glob("*.damaged*"))]
    assert kept == [b"older\nx\n", *([text] if "cannot" in said else [])]


def test_a_file_that_is_taken_away_begins_again_with_its_header(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.log_metrics({"loss": 1.0}, step=0)
    metrics.path.unlink()
    metrics.log_metrics({"loss": 0.5}, step=1)
    assert rows(metrics.path) == [{"step": "1", "loss": "0.5"}]
    with pytest.warns(UserWarning, match="to have 2 rows of metrics, but it has 1"):
        metrics.log_metrics({"new": 1.0}, step=2)


def test_the_rows_of_a_resumed_run_are_written_when_it_begins(tmp_path: Path) -> None:
    source, text = tmp_path / "other.csv", "step,loss\n0,1.0\n1,0.5\n2,0.25\n"
    source.write_text(text)
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.resume(rows=2, global_step=2, source=source)
    assert not metrics.path.exists()
    metrics.begin()
    assert metrics.path.read_text() == "step,loss\n0,1.0\n1,0.5\n"
    assert source.read_text() == text
    metrics.log_metrics({"loss": 0.125}, step=2)
    assert metrics.path.read_text().endswith("1,0.5\n2,0.125\n")
