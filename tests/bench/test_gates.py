"""Tables of gates, against numbers written by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval
from bpn_lightning.bench.gates import gates

Make = Callable[..., RunRecord]


def gate(own_class: float, mixture: float) -> dict[str, Any]:
    """A gate of 10 bytes for each of two tasks and 7 for both."""
    keys = ("task_accuracy", "end_to_end", "mixture", "own_class", "own_class_task_given")
    after_last = dict.fromkeys(keys, 0.9) | {"own_class": own_class, "mixture": mixture}
    over_stream = [
        {"after": 1, "epoch": 2, **dict.fromkeys(keys, 1.0), "rejection": 0.875},
        {"after": 2, "epoch": 4, **after_last, "rejection": None},
    ]
    averages = {key: {"average": value, "per_task": []} for key, value in after_last.items()}
    bins = {
        "error": own_class,
        "counts": [*[0] * 14, 4],
        "confidence": [*[None] * 14, 1.0],
        "accuracy": [*[None] * 14, 0.75],
    }
    sizes = {"modes": 2, "bytes_held": 27, "bytes_per_task": 10}
    return {**averages, "calibration": bins, "over_stream": over_stream, **sizes}


@pytest.fixture
def collection(record: Make) -> Collection:
    """Two seeds of a method with a gate and a front."""
    records = []
    for seed, (own_class, mixture) in enumerate([(0.8, 0.7), (0.9, 0.6)]):
        plain = record("psp", seed, [[1.0], [0.8, 0.9]])
        of_gate = {"gates": {"slda": gate(own_class, mixture)}}
        front = {"front": {"name": "patches", "bytes": 100}}
        records.append(replace(plain, results={**plain.results, **of_gate, **front}))
    return Collection("g", "G", "", (), ("gates",), (), (), tuple(records))


def test_the_gain_is_taken_seed_by_seed_and_bytes_are_of_gate_and_front(
    collection: Collection,
) -> None:
    accuracies, *_ = gates(collection)
    ((name, *cells),) = accuracies.table.rows
    values = dict(zip(accuracies.table.columns[1:], cells, strict=True))
    assert name == "psp, slda on patches"
    gain = values["gate and modes less own class"]
    assert isinstance(gain, Interval)
    assert gain.mean == pytest.approx(-0.2)
    assert gain.half == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem([-0.1, -0.3]))
    assert values["bytes per task, gate"] == 10
    assert values["bytes shared"] == 7 + 100


def test_accuracy_over_the_number_of_tasks(collection: Collection) -> None:
    _, over_tasks, _ = gates(collection)
    assert over_tasks.data is not None
    rows = [[row[1], row[3]] for row in over_tasks.data.rows]
    assert over_tasks.data.columns[3] == "gate's own class"
    assert [learned for learned, _ in rows] == [1, 2]
    means = [own.mean for _, own in rows if isinstance(own, Interval)]
    assert means == pytest.approx([1.0, 0.85])


def test_calibration_and_rejection(collection: Collection) -> None:
    _, _, calibration = gates(collection)
    ((_, error, rejection),) = calibration.table.rows
    assert isinstance(error, Interval)
    assert isinstance(rejection, Interval)
    assert (error.mean, rejection.mean) == (pytest.approx(0.85), 0.875)
    assert calibration.data is not None
    assert list(calibration.data.rows[-1]) == ["psp, slda on patches", 8, 1.0, 0.75]


def test_runs_without_gates_have_no_table(record: Make) -> None:
    one = record("ewc", 0, [[1.0]])
    assert gates(Collection("g", "G", "", (), ("gates",), (), (), (one,))) == []
