"""Intervals and tests against closed forms, and which pairs and settings are compared."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from bpn_lightning.analysis.comparison import MOST_COMPARED, compare
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.report.reading import find_runs
from bpn_lightning.report.settings import differing_settings

Make = Callable[..., Path]


@pytest.fixture
def runs_of(make_run: Make, tmp_path: Path) -> Callable[[dict[str, list[float]]], list[RunRecord]]:
    """Runs of one task, by method, whose ACC over seeds is given."""

    def make(scores: dict[str, list[float]]) -> list[RunRecord]:
        for method, values in scores.items():
            for seed, value in enumerate(values):
                make_run(method, seed, [[0.1], [value]], accuracy_task_agnostic=None)
        return find_runs(tmp_path / "runs").runs

    return make


def cauchy_p(first: list[float], second: list[float]) -> float:
    """Two-sided p of the paired t-test for two seeds: Student's t of one degree of freedom is Cauchy's."""
    a, b = (x - y for x, y in zip(first, second, strict=True))
    return 1 - 2 / math.pi * math.atan(abs((a + b) / (a - b)))


def test_intervals_and_tests_of_two_seeds_are_the_closed_form(runs_of) -> None:
    a, b, c = [0.9, 0.8], [0.5, 0.45], [0.7, 0.69]
    found = compare(runs_of({"a": a, "b": b, "c": c}))
    score = found.rows[0].scores["average"]
    assert score is not None
    assert score.mean == pytest.approx(0.85)
    assert score.half == pytest.approx(math.tan(0.475 * math.pi) * 0.05)
    tests = {(test.first.name, test.second.name): test for test in found.tests}
    expected = {("a", "b"): cauchy_p(a, b), ("a", "c"): cauchy_p(a, c), ("b", "c"): cauchy_p(b, c)}
    assert {pair: test.difference.p for pair, test in tests.items()} == pytest.approx(expected)
    low, middle, high = sorted(expected.values())
    corrected = sorted(test.corrected for test in found.tests if test.corrected is not None)
    assert corrected[0] == pytest.approx(3 * low)
    assert corrected[1] == pytest.approx(max(3 * low, 2 * middle))
    assert corrected[2] == pytest.approx(max(3 * low, 2 * middle, high))


def test_verdicts_name_the_higher_one_and_claim_no_equality(runs_of) -> None:
    found = compare(
        runs_of(
            {
                "down": [0.1, 0.101, 0.102, 0.1],
                "up": [0.9, 0.902, 0.9, 0.901],
                "wide": [0.1, 0.9, 0.3, 0.2],
                "same": [0.2, 0.201, 0.202, 0.2],
                "one": [0.5],
            }
        )
    )
    verdicts = {(test.first.name, test.second.name): test.verdict for test in found.tests}
    assert verdicts["down", "up"] == "up is higher"
    assert verdicts["down", "wide"] == "no difference shown"
    assert verdicts["down", "one"] == "one seed: no test"
    assert verdicts["down", "same"] == "no spread over seeds: no test"


def test_pairs_of_a_grid_and_of_a_reference(runs_of) -> None:
    runs = runs_of({name: [0.5, 0.6] for name in "abcd"})
    assert len(compare(runs).tests) == 6
    wanted = [("a", "b"), ("c", "x")]
    assert [(t.first.name, t.second.name) for t in compare(runs, wanted).tests] == [("a", "b")]
    pairs = [(t.first.name, t.second.name) for t in compare(runs, wanted, reference="d").tests]
    assert pairs == [("a", "d"), ("b", "d"), ("c", "d")]
    with pytest.raises(ConfigurationError, match=r"but got 'e'\. They have a, b, c, d\."):
        compare(runs, reference="e")


def test_too_many_pairs_are_left_out_with_a_word(runs_of) -> None:
    found = compare(runs_of({f"m{n}": [0.5] for n in range(MOST_COMPARED + 1)}))
    assert found.tests == []
    assert "not in digits_inc (13)" in found.pairs
    assert "--reference" in found.pairs


def test_a_mean_is_not_taken_over_fewer_seeds(make_run: Make, tmp_path: Path) -> None:
    make_run("ewc", 0)
    make_run("ewc", 1, accuracy_task_agnostic=None)
    (row,) = compare(find_runs(tmp_path / "runs").runs).rows
    assert row.scores["average_task_agnostic"] is None
    assert row.scores["average"] is not None


def test_only_settings_that_differ(make_run: Make, tmp_path: Path) -> None:
    same = {"trainer": {"devices": 1}, "data": {"init_args": {"seed": None}}}
    ewc = same | {"strategies": {"ewc": {"strength": 5.0}}}
    make_run("ewc", 0, config=ewc | {"lr": 0.1, "sizes": [1, 2]})
    make_run("ewc", 1, config=ewc | {"lr": 0.2, "sizes": [1, 2]})
    make_run("psp", 0, config=same | {"lr": 0.1, "sizes": [1, 3]})
    found = differing_settings(compare(find_runs(tmp_path / "runs").runs).rows)
    assert {setting.key: (setting.values, setting.own) for setting in found} == {
        "lr": ([("0.1", ["ewc (seed 0)", "psp"]), ("0.2", ["ewc (seed 1)"])], False),
        "sizes": ([("[1, 2]", ["ewc"]), ("[1, 3]", ["psp"])], False),
        "strategies.ewc.strength": ([("5.0", ["ewc"]), ("not set", ["psp"])], True),
    }
