"""Tables of what probes saw, against means by hand."""

from typing import Any

from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.paper.mechanism import moves


def record(seed: int, method: str, probes: dict[str, Any]) -> RunRecord:
    return RunRecord("digits_inc", method, seed, {}, [[0.5], [1.0]], [2], probes=probes)


def test_moves_are_means_over_tasks_and_seeds() -> None:
    flips = [0.0, *[0.5] * 9, *[1.0] * 10]  # of 20 stretches, a tenth is two
    seeds = [
        [{"size": [1.0] * 20, "flips": flips}, {"size": [2.0] * 20, "flips": flips}],
        [{"size": [3.0] * 20, "flips": flips}, {"size": [4.0] * 19, "flips": flips}],
    ]
    records = [record(seed, "bd+ewc", {"moves": tasks}) for seed, tasks in enumerate(seeds)]
    records.append(record(0, "ewc", {}))  # has no M
    (found,) = moves(Collection("g", "G", "", (), ("moves",), (), (), tuple(records)))
    assert found.table.rows == [["bd+ewc", 2.5, 2.5, 0.25, 1.0]]
    assert found.figure is not None
    assert len(found.figure.axes) == 1
    assert moves(Collection("g", "G", "", (), ("moves",), (), (), (records[-1],))) == []
