"""What gates gave in results.json and gates.csv, against numbers written by hand."""

import csv
import json
from io import StringIO

import pytest

from bpn_lightning.metrics.gate_scores import GateScores
from bpn_lightning.run.figures import gate_calibration, gates_over_stream
from bpn_lightning.run.gates import gate_results, gates_csv
from bpn_lightning.run.schema import GateResults, violations


def scores(gate: str, after: int, accuracy: float) -> GateScores:
    """Of a stream of three tasks; later tasks are 0.1 worse than the one before."""
    values = [accuracy - 0.1 * task if task < after else None for task in range(3)]
    return {
        "after": after,
        "epoch": 2 * after,
        "gate": gate,
        "modes": 2,
        "samples": [10, 10, 10],
        "task_accuracy": values,
        "end_to_end": values,
        "mixture": values,
        "own_class": None if gate == "energy" else values,
        "own_class_task_given": None if gate == "energy" else [1.0] * after + [None] * (3 - after),
        "calibration": {
            "error": 0.25,
            "counts": [0] * 14 + [4],
            "confidence": [None] * 14 + [1.0],
            "accuracy": [None] * 14 + [0.75],
        },
        "rejection": None if after == 3 else 0.875,
        "bytes_held": 100 + 8 * after,
        "bytes_per_task": 8,
    }


MOMENTS = [scores(gate, after, 0.9) for after in (1, 2, 3) for gate in ("slda", "energy")]


def test_averages_are_over_the_tasks_learned() -> None:
    gates = gate_results(MOMENTS)
    assert list(gates) == ["slda", "energy"]
    assert gates["slda"]["task_accuracy"] == {
        "average": pytest.approx(0.8),
        "per_task": pytest.approx([0.9, 0.8, 0.7]),
    }
    assert [one["mixture"] for one in gates["slda"]["over_stream"]] == pytest.approx(
        [0.9, 0.85, 0.8]
    )
    assert gates["energy"]["own_class"] is None
    assert gates["slda"]["bytes_held"] == 124


def test_results_follow_the_schema() -> None:
    for gate in json.loads(json.dumps(gate_results(MOMENTS))).values():
        assert list(violations(gate, GateResults, "")) == []


def test_a_row_of_gates_csv_for_each_gate_and_moment() -> None:
    rows = list(csv.DictReader(StringIO(gates_csv(gate_results(MOMENTS)))))
    assert [(row["gate"], row["after"]) for row in rows] == [
        (gate, str(after)) for gate in ("slda", "energy") for after in (1, 2, 3)
    ]
    assert rows[1]["rejection"] == "0.875"
    assert rows[2]["rejection"] == ""
    assert float(rows[1]["task_accuracy"]) == pytest.approx(0.85)


def test_pictures_hold_what_was_measured() -> None:
    gates = gate_results(MOMENTS)
    lines = gates_over_stream(gates).axes[0].get_lines()
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in lines}
    assert drawn["slda: task accuracy"] == pytest.approx([0.9, 0.85, 0.8])
    assert "energy: gate's own class" not in drawn
    (points, _) = gate_calibration(gates).axes[0].collections
    assert points.get_offsets().tolist() == [[1.0, 0.75]]
