"""The words name what was shown, and above all what was not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bpn_lightning.analysis.comparison import compare
from bpn_lightning.report.reading import find_runs
from bpn_lightning.report.summary import Summary, summarize

Make = Callable[..., Path]


@pytest.fixture
def summary(tmp_path: Path) -> Callable[[], Summary]:
    """Of all runs that a test has made."""

    def make() -> Summary:
        found = find_runs(tmp_path / "runs")
        return summarize(found, compare(found.runs))

    return make


def test_one_run(make_run: Make, summary: Callable[[], Summary]) -> None:
    make_run("bd+ewc", 4)
    shown = " ".join(summary().shown)
    assert "1 run of 1 method on digits_inc, seed 4." in shown
    assert "an ACC (mean over the tasks learned) of 0.600 with the task ID given" in shown
    assert "and of 0.300 without it" in shown
    assert "One seed only: no value has an interval" in " ".join(summary().not_shown)


def test_means_over_seeds(make_run: Make, summary: Callable[[], Summary]) -> None:
    for seed, low in enumerate([0.1, 0.101, 0.102]):
        make_run("ewc", seed, [[0.1], [low]])
        make_run("psp", seed, [[0.1], [0.9 - low]])
    shown = summary().shown
    assert shown[0].startswith(
        "6 runs of 2 methods on digits_inc, 3 seeds each, with 95 % intervals"
    )
    assert "the highest mean ACC is 0.799 ± 0.002 (psp)" in shown[1]
    assert "it is 0.300 ± 0.000 (ewc and psp)" in shown[1]  # as high: both are named
    assert shown[2].startswith("Scenarios: task-incremental, task ID given; class-incremental")
    assert "1 of 1 are significant at 5 %" in shown[3]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"accuracy_task_agnostic": None}, "Every mean here is with the task ID"),
        ({"accuracy_task_agnostic": None}, "ewc: not measured, or every task has outputs"),
        (
            {"accuracy_task_agnostic": None, "config": {"model": {"mask": "task"}}},
            "ewc: every task has outputs of its own, which cannot be chosen",
        ),
        (
            {"accuracy_task_agnostic": None, "config": {"model": {"task_agnostic": False}}},
            "ewc: it was not asked for",
        ),
        (
            {
                "accuracy_task_agnostic": None,
                "matrix": [[0.1, 0.2], [0.9, 0.3], [None, None]],
            },
            "ewc: it is measured at the end of the stream, which was not reached",
        ),
        ({"config": {"model": {"task_agnostic": 50}}}, "(model.task_agnostic 50) in all runs"),
        ({"matrix": [[0.1, 0.2], [0.9, 0.3], [None, None]]}, "seed 0 (1 of 2)"),
        (
            {"config": {"data": {"init_args": {"train_samples": 60}}}},
            "train_samples 60) in all runs",
        ),
        ({"config": {"data": {"init_args": {"validation_fraction": 0.1}}}}, "held out"),
        ({"config": {"trainer": {"limit_train_batches": 2}}}, "part of each epoch's batches"),
        (
            {"provenance": {"commit": "0-dirty", "versions": {}, "seconds": 1.0, "date": ""}},
            "not committed",
        ),
    ],
)
def test_what_one_run_does_not_show(
    make_run: Make, summary: Callable[[], Summary], given: dict[str, object], words: str
) -> None:
    if "provenance" in given:
        host = {"name": "h", "platform": "p", "cpu": "c", "gpu": None, "threads": 1}
        given = {"provenance": {**given["provenance"], "host": host}}  # type: ignore[dict-item]
    make_run(**given)
    assert words in " ".join(summary().not_shown)


def test_a_plain_run_needs_none_of_these_words(
    make_run: Make, summary: Callable[[], Summary]
) -> None:
    config = {"data": {"init_args": {"train_samples": None, "validation_fraction": 0.0}}}
    config["model"] = {"task_agnostic": True}
    for seed in range(3):
        make_run(seed=seed, config=config)
    given, missing = summary().not_shown
    assert given.startswith("Task ID given:")
    assert missing.startswith("Not comparable: fewer than 5 seeds (3); no lower bound (finetune)")


def test_what_several_runs_do_not_show(make_run: Make, summary: Callable[[], Summary]) -> None:
    make_run("ewc", 0, config={"lr": 0.1})
    make_run("ewc", 1, config={"lr": 0.2})
    make_run("stl", 0, accuracy_task_agnostic=None)
    make_run("gem", 0, accuracy_task_agnostic=None)
    make_run("gem", 1)
    (make_run("psp", 0) / "config.yaml").unlink()
    (make_run("psp", 1) / "results.json").unlink()
    words = " ".join(summary().not_shown)
    assert "there is no mean for stl:" in words
    assert "there is no mean for gem: not all seeds have a value" in words
    assert "One seed only, hence no interval: psp and stl." in words
    assert "Two seeds only, whose intervals are very wide: ewc and gem." in words
    assert "not all methods have the same seeds" in words
    assert "The seeds of ewc do not share all their settings" in words
    assert "The settings of 1 run were not kept" in words
    assert "1 incomplete, 1 not finished" in words


def test_nothing_but_unfinished_runs(make_run: Make, summary: Callable[[], Summary]) -> None:
    (make_run() / "results.json").unlink()
    assert summary() == Summary([], ["No run here has results."])
