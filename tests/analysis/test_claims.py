"""What a table lacks for a claim, phrase by phrase, and that a grid that lacks nothing says nothing."""

from typing import Any

import pytest
from scipy import stats

from bpn_lightning.analysis.claims import not_comparable, scenarios_of, small_test
from bpn_lightning.analysis.comparison import MethodRow, method_rows, score_title
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import binomial_half
from bpn_lightning.run.scenarios import scenarios

METHODS = ("finetune", "joint", "slda", "er", "der")


def run(method: str, seed: int, **changes: Any) -> RunRecord:
    """Of a grid that lacks nothing, but for the changes to its results."""
    counts = {
        "samples_per_task": [50, 50],
        "classes": [*"abcd"],
        "samples": [25] * 4,
        "per_class": [0.5] * 4,
        "balanced": 0.5,
    }
    results = {
        "accuracy": {"average": 0.5 + seed / 100, "first_task": 0.5},
        "accuracy_task_agnostic": {"average": 0.4, "first_task": 0.4},
        "bytes_per_task": {"measured": 8, "paper": None},
        "bytes_held": {"training": 800, "inference": 0},
        "by_class": {"accuracy": counts},
        "conditions": {
            "scenarios": scenarios("all", task_id_at_inference=True, agnostic=True),
            "order": "seed",
            "tuned_for": None,
            "updates": 100,
        },
    }
    for key, value in changes.pop("conditions", {}).items():
        results["conditions"][key] = value
    for key in changes.pop("without", ()):
        del results["conditions"][key]
    matrix = [[None, None], [0.5, None], [0.5, 0.5]]
    return RunRecord("digits_inc", method, seed, results | changes, matrix, [1, 1])


def rows(
    *runs: RunRecord, methods: Any = METHODS, seeds: int = 5, **changes: Any
) -> list[MethodRow]:
    every = [run(method, seed, **changes) for method in methods for seed in range(seeds)]
    return method_rows([*every, *runs])


def test_a_grid_that_lacks_nothing_says_nothing() -> None:
    assert not_comparable(rows()) == ""
    # Bounds and simple rows have memory, updates and values of their own.
    bound = [
        run("stl", seed, bytes_held={"training": 9}, conditions={"updates": 0}) for seed in range(5)
    ]
    assert not_comparable(rows(*bound)) == ""


def held(training: int) -> dict[str, dict[str, int]]:
    return {"bytes_held": {"training": training, "inference": 0}}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (rows(seeds=3), "fewer than 5 seeds (3)"),
        (rows(methods=("joint", "ncm", "er")), "no lower bound (finetune)"),
        (rows(methods=("finetune", "ncm", "er")), "no upper bound (joint or stl)"),
        (rows(methods=("finetune", "stl", "er")), "no row without training (ncm or slda)"),
        (rows(conditions={"order": "fixed"}), "one order of classes or tasks for all seeds"),
        (
            rows(conditions={"tuned_for": "digits_inc"}),
            "values tuned for digits_inc, not on a stream of their own",
        ),
        (
            rows(*(run("gem", seed, **held(9000)) for seed in range(5))),
            "unequal memory (800 to 9,000 bytes held in training)",
        ),
        (
            rows(*(run("gem", seed, conditions={"updates": 7}) for seed in range(5))),
            "unequal updates (7 to 100)",
        ),
        (rows(conditions={"split": "val"}), "accuracies on held-out training samples"),
        (rows(without=["tuned_for", "updates"]), "not recorded: tuning, updates"),
        (rows(by_class=None), "not recorded: test samples"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(found: list[MethodRow], said: str) -> None:
    assert not_comparable(found) == f"Not comparable: {said}."


def test_runs_of_earlier_releases_say_what_was_not_recorded() -> None:
    assert not_comparable(rows(conditions={}, by_class=None, seeds=5)).startswith(
        "Not comparable: not"
    )
    old = [run("er", 0, by_class=None)]
    old[0].results.pop("conditions")  # type: ignore[attr-defined]
    said = not_comparable(method_rows(old))
    assert "not recorded: scenario, class order, tuning, updates, test samples" in said
    assert scenarios_of(method_rows(old)) == ""
    assert score_title("average", old) == "ACC, task ID given"


def test_several_orders_are_an_order_that_varies() -> None:
    key = "data.init_args.class_order_seed"
    runs = [run(m, s, conditions={"order": "fixed"}) for m in METHODS for s in range(5)]
    varied = [
        RunRecord(**{**vars(one), "variant": {key: order}}) for one in runs for order in (0, 1)
    ]
    assert not_comparable(method_rows(varied)) == ""


def test_places_are_told_apart_where_they_differ() -> None:
    other = [RunRecord(**{**vars(run("er", 0)), "experiment": "mnist_inc"})]
    said = not_comparable(rows(*other))
    assert said.startswith("Not comparable. mnist_inc: fewer than 5 seeds (1); no lower bound")
    assert "digits_inc" not in said


def test_titles_have_the_scenario() -> None:
    runs = [run("er", 0), run("er", 1)]
    assert score_title("average", runs) == "ACC, task-incremental, task ID given"
    assert score_title("average_task_agnostic", runs) == "ACC, class-incremental, task ID not given"
    shared = scenarios("shared", task_id_at_inference=True, agnostic=False)
    mixed = [*runs, run("er", 2, conditions={"scenarios": shared})]
    assert score_title("average", mixed) == "ACC, task ID given"
    assert scenarios_of(method_rows(runs)) == (
        "Scenarios: task-incremental, task ID given; class-incremental, task ID not given."
    )


@pytest.mark.parametrize(("right", "samples"), [(0, 7), (36, 72), (95, 100), (9999, 10000)])
def test_the_interval_of_a_fraction_is_wilsons(right: int, samples: int) -> None:
    found = stats.binomtest(right, samples).proportion_ci(0.95, "wilson")
    assert binomial_half(right / samples, samples) == pytest.approx((found.high - found.low) / 2)


def test_a_small_test_is_warned_of_where_a_difference_is_smaller_than_its_interval() -> None:
    first, second = rows(methods=("er", "der"))
    assert binomial_half(0.52, 100) == pytest.approx(0.096, abs=1e-3)
    differences = [("er - der", 0.05, first, second), ("der - er", -0.2, second, first)]
    assert small_test(differences) == (
        "Small tests: with 100 test samples, the binomial 95 % interval of an ACC is up to ± 0.096, wider than the "
        "difference of er - der."
    )
    assert small_test(differences[1:]) == ""
    unknown = rows(methods=("er",), by_class=None)[0]
    assert small_test([("er - er", 0.0, unknown, unknown)]) == ""
