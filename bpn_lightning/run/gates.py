"""What gates gave, as results.json and gates.csv hold it. No torch here."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from bpn_lightning.files.writing import csv_text
from bpn_lightning.run.schema import GateAccuracy, GateMoment, GateResults

if TYPE_CHECKING:
    from bpn_lightning.metrics.gate_scores import GateScores

__all__ = ["GATE_ACCURACIES", "gate_results", "gates_csv", "shared_bytes"]

#: The accuracies of a gate, and what each is for people.
GATE_ACCURACIES = {
    "task_accuracy": "task accuracy",
    "end_to_end": "mode of the likeliest task",
    "mixture": "gate and modes",
    "own_class": "gate's own class",
    "own_class_task_given": "own class, task ID given",
}


def gate_results(scores: Sequence["GateScores"]) -> dict[str, GateResults]:
    """By gate, its accuracies after the last task learned, and their averages over the stream.

    Args:
        scores: of all moments and gates, in their order, as the module's ``gate_scores``.
    """
    names = dict.fromkeys(one["gate"] for one in scores)
    return {name: _of_gate([one for one in scores if one["gate"] == name]) for name in names}


def shared_bytes(gate: GateResults) -> int:
    """What a gate stores for all tasks together, such as a covariance."""
    learned = gate["over_stream"][-1]["after"] if gate["over_stream"] else 0
    return gate["bytes_held"] - gate["bytes_per_task"] * learned


def gates_csv(gates: Mapping[str, GateResults]) -> str:
    """A row for each gate and moment; an empty cell was not measured."""
    columns = list(GateMoment.__annotations__)
    rows = [
        [name, *(cast(Mapping[str, Any], moment)[key] for key in columns)]
        for name, gate in gates.items()
        for moment in gate["over_stream"]
    ]
    return csv_text([["gate", *columns], *rows])


def _of_gate(moments: Sequence["GateScores"]) -> GateResults:
    last = moments[-1]
    return {
        "task_accuracy": _accuracy(last["task_accuracy"]),
        "end_to_end": _accuracy(last["end_to_end"]),
        "mixture": _accuracy(last["mixture"]),
        "modes": last["modes"],
        "own_class": None if last["own_class"] is None else _accuracy(last["own_class"]),
        "own_class_task_given": None
        if last["own_class_task_given"] is None
        else _accuracy(last["own_class_task_given"]),
        "calibration": last["calibration"],
        "over_stream": [_moment(one) for one in moments],
        "bytes_held": last["bytes_held"],
        "bytes_per_task": last["bytes_per_task"],
    }


def _moment(one: "GateScores") -> GateMoment:
    calibration = one["calibration"]
    return {
        "after": one["after"],
        "epoch": one["epoch"],
        "task_accuracy": _average(one["task_accuracy"]),
        "end_to_end": _average(one["end_to_end"]),
        "mixture": _average(one["mixture"]),
        "own_class": _average(one["own_class"]),
        "own_class_task_given": _average(one["own_class_task_given"]),
        "calibration_error": None if calibration is None else calibration["error"],
        "rejection": one["rejection"],
    }


def _accuracy(per_task: Sequence[float | None]) -> GateAccuracy:
    return {"average": _average(per_task), "per_task": list(per_task)}


def _average(per_task: Sequence[float | None] | None) -> float | None:
    """The mean over tasks, as ACC is: each counts alike, whatever its number of samples."""
    known = [value for value in per_task or () if value is not None]
    return fmean(known) if known else None
