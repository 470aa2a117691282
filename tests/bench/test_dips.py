"""Dips, counted by hand in a curve of two tasks of two epochs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bpn_lightning.analysis.collection import Collection
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import Interval
from bpn_lightning.bench.dips import dips, falls

Make = Callable[..., RunRecord]


def with_curve(record: RunRecord, *points: tuple[int, int, list[float | None]]) -> RunRecord:
    keys = ("epoch", "task", "accuracy")
    curve: list[dict[str, Any]] = [dict(zip(keys, point, strict=True)) for point in points]
    return replace(record, curve=curve)


def test_dips_are_counted_by_whether_the_task_is_being_learned(record: Make) -> None:
    seeds = [
        with_curve(
            record("bd+ewc", 0, [[0.75], [0.5, 0.75]]),
            (0, 0, [0.5, 0.5]),
            (1, 0, [0.875, 0.5]),
            (2, 0, [0.75, 0.0]),  # task 1: -0.125 while learned; task 2 has not begun
            (3, 1, [0.75, 0.875]),
            (4, 1, [0.5, 0.75]),  # task 1: -0.25 afterwards; task 2: -0.125
        ),
        with_curve(
            record("bd+ewc", 1, [[1.0], [1.0, 1.0]]),
            (1, 0, [1.0, 0.5]),
            (2, 0, [0.9375, 0.5]),  # too little
            (3, 1, [None, 0.5]),  # not tested
            (4, 1, [0.75, 1.0]),
        ),
    ]
    assert [fall for _, fall, learned_now in falls(seeds[0]) if learned_now] == [0.125, 0.125]
    (found,) = dips(Collection("g", "G", "", (), ("dips",), (), (), tuple(seeds)))
    (row,) = found.table.rows
    acc = row[5]
    assert row[:5] == ["bd+ewc", 2, 4, 1, 2]
    assert isinstance(acc, Interval)
    assert row[6] == min(one.at("accuracy", "average") for one in seeds)


def test_runs_without_a_curve_have_no_table(record: Make) -> None:
    assert dips(Collection("g", "G", "", (), ("dips",), (), (), (record("ewc", 0, [[1.0]]),))) == []
