"""Searches on objectives whose optimum is known, interrupted anywhere, and pruned."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from bpn_lightning.bench.search import Outcome, Trial, make_search, optimize
from bpn_lightning.bench.space import Choices, Range, Space, grid_points, read_space
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.run.tuning import TrialRecord

SPACE: Space = {"x": Range(0.01, 100.0, log=True), "kind": Choices(("flat", "peak"))}


def objective(values: Any) -> float:
    """1 at x = 1 of the peak, and nowhere more."""
    if values["kind"] == "flat":
        return 0.0
    return 1 - math.log10(values["x"]) ** 2 / 4


def run(trials: Sequence[Trial]) -> list[Outcome]:
    return [(objective(trial.values), False) for trial in trials]


def best(trials: Sequence[TrialRecord]) -> TrialRecord:
    return max((one for one in trials if one["value"] is not None), key=lambda one: one["value"])


def needs_optuna() -> None:
    pytest.importorskip("optuna", reason="the extra `tune` is not installed")


def test_the_grid_has_every_point_once_and_finds_the_peak() -> None:
    points = grid_points(SPACE)
    xs = sorted({point["x"] for point in points})  # type: ignore[type-var]
    assert xs == pytest.approx([0.01, 0.1, 1.0, 10.0, 100.0])
    assert len(points) == 10
    trials = optimize(make_search(SPACE, "grid", 0, None), 10, run)
    assert [one["values"] for one in trials] == points
    assert best(trials)["values"] == {"x": 1.0, "kind": "peak"}
    assert best(trials)["value"] == 1.0


def test_independent_trials_run_several_at_a_time() -> None:
    sizes = []

    def together(trials: Sequence[Trial]) -> list[Outcome]:
        sizes.append(len(trials))
        return run(trials)

    optimize(make_search(SPACE, "grid", 0, None), 10, together, at_a_time=4)
    assert sizes == [4, 4, 2]


def test_a_failed_trial_has_no_value_and_is_no_end() -> None:
    def fails(trials: Sequence[Trial]) -> list[Outcome]:
        return [(None, True) if one.number == 0 else run([one])[0] for one in trials]

    trials = optimize(make_search(SPACE, "grid", 0, None), 10, fails)
    assert trials[0]["state"] == "failed"
    assert [one["state"] for one in trials[1:]] == ["complete"] * 9


@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize("stopped_after", [3, 17])
def test_optunas_samplers_go_on_as_if_never_stopped(sampler: str, stopped_after: int) -> None:
    needs_optuna()
    saved: list[list[TrialRecord]] = []

    def save(trials: list[TrialRecord]) -> None:
        saved.append(list(trials))

    whole = optimize(make_search(SPACE, sampler, 7, None), 30, run, save=save)
    again = optimize(make_search(SPACE, sampler, 7, None), 30, run, saved[stopped_after - 1])
    assert again == whole
    other = optimize(make_search(SPACE, sampler, 8, None), 30, run)
    assert [one["values"] for one in other] != [one["values"] for one in whole]
    with pytest.raises(ConfigurationError, match="the record is of another search"):
        optimize(make_search(SPACE, sampler, 8, None), 30, run, whole)


def test_tpe_comes_closer_to_the_peak_than_its_random_start() -> None:
    needs_optuna()
    trials = optimize(make_search(SPACE, "tpe", 0, None), 60, run)
    assert best(trials)["value"] > 0.999  # |log10 x| < 0.063, 1.6 % of the range
    late = [one["values"]["kind"] for one in trials[30:]]
    assert late.count("peak") > 20


def steps_of(values: Any) -> list[float]:
    """After each of 5 tasks: good trials fall slowly."""
    return [objective(values) - 0.01 * step for step in range(5)]


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_what_is_pruned_is_worse_than_the_median_of_those_before(pruner: str) -> None:
    needs_optuna()

    def stepwise(trials: Sequence[Trial]) -> list[Outcome]:
        (trial,) = trials
        for step in range(1, 6):
            if trial.report(steps_of(trial.values)[:step]):
                break
        return [(objective(trial.values), False)]

    trials = optimize(make_search(SPACE, "random", 0, pruner), 40, stepwise)
    pruned = [one for one in trials if one["state"] == "pruned"]
    assert len(pruned) > 5
    assert all(one["value"] is None and len(one["after_task"]) < 6 for one in pruned)
    assert best(trials)["value"] == max(objective(one["values"]) for one in trials)
    if pruner == "median":
        for one in pruned:
            step = len(one["after_task"])
            earlier = [
                steps_of(t["values"])[step - 1]
                for t in trials[: one["number"]]
                if t["state"] == "complete"
            ]
            assert one["after_task"][-1] < sorted(earlier)[len(earlier) // 2]
    # Told all at once, as by a search that goes on, it is pruned at the same step.
    assert optimize(make_search(SPACE, "random", 0, pruner), 40, stepwise, trials[:20]) == trials


def test_steps_are_told_once_and_none_after_the_pruning() -> None:
    told: list[tuple[int, float]] = []

    def prune(step: int, value: float) -> bool:
        told.append((step, value))
        return value < 0.5

    trial = Trial(0, {}, prune)
    assert not trial.report([0.9])
    assert not trial.report([0.9, 0.8])
    assert trial.report([0.9, 0.8, 0.4, 0.9])
    assert trial.report([0.9, 0.8, 0.4, 0.9, 0.9])
    assert told == [(1, 0.9), (2, 0.8), (3, 0.4)]
    assert trial.reported == [0.9, 0.8, 0.4]


def test_without_optuna_its_samplers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'bpn_lightning\[tune\]'"):
        make_search(SPACE, "tpe", 0, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "space of t.yaml to name at least one key"),
        (None, "space of t.yaml to name at least one key"),
        ([1], "space of t.yaml to name at least one key"),
        ({"a": []}, "a in space of t.yaml to have at least one choice"),
        ({"a": 3}, "a in space of t.yaml to be a list of choices or a range"),
        ({"a": {"low": 1}}, "to be a list of choices or a range with low and high"),
        ({"a": {"low": 1, "high": 2, "step": 1}}, "but a has 'step'"),
        ({"a": {"low": 2, "high": 1}}, "low of a .* below high, but got low 2 and high 1"),
        ({"a": {"low": 1, "high": 1}}, "below high, but got low 1 and high 1"),
        ({"a": {"low": "1e-3", "high": 1}}, "write 1.0e-3"),
        ({"a": {"low": True, "high": 2}}, "to be a number below high"),
        ({"a": {"low": 0, "high": 1, "log": True}}, "above 0 where log is true"),
        ({"a": {"low": 0, "high": 1, "log": 1}}, "to be true or false, but got 1"),
        ({"a": {"low": 0, "high": 1, "points": 0}}, "points of a .* at least 1, but got 0"),
        ({"a": [1, 1]}, "each once, but got 1"),
        ({"a": ["os.system"]}, "plain words, each once, but got 'os.system'"),
    ],
)
def test_a_wrong_space_is_an_error(content: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_space(content, "t.yaml")
