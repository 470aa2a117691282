"""A search over runs: its file, its stream, its record, a kill, pruning, and what uses the best values."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpn_lightning.analysis.claims import not_comparable, tuned_apart
from bpn_lightning.analysis.comparison import method_rows
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.bench.cli import main
from bpn_lightning.bench.grid import read_grid
from bpn_lightning.bench.runner import Runner
from bpn_lightning.bench.search import Trial
from bpn_lightning.bench.tune import _Trials, find_stream, tune
from bpn_lightning.bench.tuning import packaged_tunings, read_tuning_file
from bpn_lightning.cli.command import read_command
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.run.tuning import TuningStream, read_tuned, read_tuning

SEARCH = """\
config: digits_inc.yaml
method: gd+ewc
space:
  strategies.bd.epsilon: {low: 0.1, high: 10.0, log: true, points: 3}
"""

STREAM: TuningStream = {
    "differs": "another order",
    "arguments": {"class_order_seed": "stream"},
    "validation_fraction": 0.1,
    "tasks": 5,
    "classes": [],
}

# Accuracies fall by .01 a task from 1 - |log10 epsilon - 1| / 4: the best epsilon is 10.
STAND_IN = """\
import json, math, os, sys, time
from pathlib import Path
words = sys.argv[1:]
given = dict(zip(words, words[1:]))
values = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
folder = Path(given["--runs"], "digits_inc", given["--method"], "seed_" + given["--seed_everything"])
epsilon = float(values["strategies.bd.epsilon"])
with open("calls", "a") as file:
    file.write(json.dumps(values) + "\\n")
if epsilon == float(os.environ.get("FAILS", -1)):
    sys.exit("no such data")
best = 1 - abs(math.log10(epsilon) - 1) / 4
scores = [best - 0.01 * task for task in range(5)]
hangs = epsilon == float(os.environ.get("HANGS", -1))
lines = ["step,accuracy/average,stream/tasks_learned", "0,,0"]
lines += [f"{task},{score},{task}" for task, score in enumerate(scores[: 2 if hangs else 5], 1)]
(folder / "metrics.csv").write_text("\\n".join(lines) + "\\n9,0.1")  # and half a line
if hangs:
    time.sleep(3600)
results = {"tasks_not_learned": [], "accuracy": {"average": scores[-1]}}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a search of stand-ins in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bpn_lightning.bench.tune.find_stream", lambda *_: STREAM)
    Path("stand_in.py").write_text(STAND_IN)

    def run(text: str = SEARCH, **more: Any) -> Any:
        Path("t.yaml").write_text(text)
        return tune(
            read_tuning_file("t.yaml"),
            Path("runs"),
            command=[sys.executable, str(tmp_path / "stand_in.py")],
            **more,
        )

    return run


def calls() -> list[dict[str, str]]:
    return [json.loads(line) for line in Path("calls").read_text().splitlines()]


# ---------------------------------------------------------------------- the file


@pytest.mark.parametrize("name", packaged_tunings())
def test_packaged_searches_can_be_read(name: str) -> None:
    assert read_tuning_file(name).trials > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spaces: {}", "'spaces'. Did you mean 'space'"),
        ("config: 3", "config of t.yaml to be a name, but got 3"),
        (SEARCH.replace("gd+ewc", "[a, b]"), "method of t.yaml to be a name"),
        (SEARCH.replace("digits_inc", "digit_inc"), "Did you mean 'digits_inc.yaml'"),
        (SEARCH.replace("gd+ewc", "gd+ewk"), "unknown 'ewk'"),
        (SEARCH.replace("strategies.bd.", "strategies.si."), "a strategy of the method 'gd.ewc'"),
        (SEARCH.replace("strategies.bd.epsilon", "strategy.epsilon"), "Did you mean 'strategies.'"),
        (SEARCH.replace("strategies.bd.epsilon", "data.init_args.seed"), "leave data.init_args.s"),
        (SEARCH + "set: {strategies.bd.epsilon: 1}", "got strategies.bd.epsilon twice"),
        (SEARCH + "set: {data.init_args.evaluation_split: test}", "to the search, but got it"),
        (SEARCH + "set: 3", "set of t.yaml to hold keys and values"),
        (SEARCH + "validation_fraction: 0", "between 0 and 1, but got 0: values are chosen on"),
        (SEARCH + "validation_fraction: 1.0", "between 0 and 1, but got 1.0"),
        (SEARCH + "seeds: []", "seeds of t.yaml to be whole numbers"),
        (SEARCH + "seeds: [1, 1]", "different numbers, but got"),
        (SEARCH + "sampler: bayes", "sampler of t.yaml to be one of grid, random, tpe"),
        (SEARCH + "score: test", "score of t.yaml to be one of accuracy, accuracy_task_agnostic"),
        (SEARCH + "pruner: median", "pruner of t.yaml to be left out with the sampler grid"),
        (SEARCH + "{sampler: tpe, pruner: worst}", "an error in line"),
        (SEARCH + "sampler: tpe\npruner: worst", "pruner of t.yaml to be one of median, halving"),
        (SEARCH + "trials: 0", "trials of t.yaml to be a whole number of at least 1"),
        (SEARCH + "trials: 7", "the 3 points of the grid, but got 7"),
    ],
)
def test_a_wrong_file_is_an_error(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_tuning_file("t.yaml")


def test_a_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean 'digits_inc_gd.yaml'"):
        read_tuning_file("digits_inc_dg.yaml")


# ---------------------------------------------------------------------- the runs


def test_the_record_has_every_trial_and_the_best(search: Any) -> None:
    record, failures = search()
    assert not failures
    assert record == read_tuning(Path("runs"))
    values = [one["values"]["strategies.bd.epsilon"] for one in record["trials"]]
    assert values == [0.1, 1.0, 10.0]
    assert [one["value"] for one in record["trials"]] == pytest.approx([0.46, 0.71, 0.96])
    assert record["trials"][1]["after_task"] == pytest.approx([0.75, 0.74, 0.73, 0.72])
    assert record["best"]["number"] == 2
    assert (record["stream"], record["seeds"], record["budget"]) == (STREAM, [100], 3)
    for call in calls():
        assert call["data.init_args.evaluation_split"] == "val"
        assert call["data.init_args.validation_fraction"] == "0.1"
        assert call["data.init_args.class_order_seed"] == "stream"


def test_a_trial_is_the_mean_over_its_seeds(search: Any) -> None:
    record, _ = search(SEARCH + "seeds: [1, 2]", jobs=2)
    assert [one["value"] for one in record["trials"]] == pytest.approx([0.46, 0.71, 0.96])
    assert len(calls()) == 6


def test_settings_may_be_lists(search: Any) -> None:
    record, _ = search(SEARCH + "set: {model.backbone.init_args.hidden: [8, 8]}")
    assert record["best"]["number"] == 2
    assert all(call["model.backbone.init_args.hidden"] == "[8, 8]" for call in calls())


def test_a_search_goes_on_where_it_was_killed(search: Any) -> None:
    whole, _ = search()
    Path("calls").unlink()
    # As a kill leaves it: two trials recorded, the third one's run finished.
    kept = {**whole, "trials": whole["trials"][:2], "best": None}
    Path("runs/tuning.json").write_text(json.dumps(kept))
    assert search()[0] == whole
    assert not Path("calls").exists()
    Path("runs/trial_002/digits_inc/gd+ewc/seed_100/results.json").unlink()
    Path("runs/tuning.json").write_text(json.dumps(kept))
    assert search()[0] == whole
    assert len(calls()) == 1


def test_a_folder_of_another_search_is_refused(search: Any) -> None:
    search()
    with pytest.raises(ConfigurationError, match="to be of this search, but its space is"):
        search(SEARCH.replace("0.1", "0.2"))


def test_a_run_that_fails_is_reported_and_ends_nothing(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "0.1")
    record, failures = search()
    assert [one["state"] for one in record["trials"]] == ["failed", "complete", "complete"]
    assert "no such data" in str(failures[0])


def test_a_pruned_trial_is_ended_and_no_failure(
    search: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HANGS", "0.1")
    before = threading.active_count()
    Path("t.yaml").write_text(SEARCH)
    program = [sys.executable, str(tmp_path / "stand_in.py")]
    trials = _Trials(read_tuning_file("t.yaml"), STREAM, Path("runs"), 1, (), Runner.executor, program)  # fmt: skip
    bad = Trial(0, {"strategies.bd.epsilon": 0.1}, prune=lambda step, value: value < 0.6)
    good = Trial(1, {"strategies.bd.epsilon": 10.0}, prune=lambda step, value: value < 0.6)
    bad_outcome, good_outcome = trials.run([bad, good])
    assert bad.pruned
    assert bad.reported == [0.5]
    assert bad_outcome[0] is None
    assert not good.pruned
    assert good_outcome == (pytest.approx(0.96), False)
    assert not trials.failures
    assert not list(Path("runs").rglob("failed.json"))
    assert threading.active_count() == before


# ---------------------------------------------------------------------- the stream


def stream_of(text: str, tmp_path: Path) -> TuningStream:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    return find_stream(read_tuning_file(str(path)))


@pytest.mark.slow
def test_other_classes_are_taken_where_there_are_enough(tmp_path: Path) -> None:
    four = SEARCH + "set: {data.init_args.num_tasks: 2}\n"
    found = stream_of(four, tmp_path)
    assert found["differs"] == "other classes"
    assert set(found["classes"]) == set("456789")
    assert (found["tasks"], found["arguments"]["num_tasks"]) == (2, 2)
    given = stream_of(four + "stream: {class_order: ['9', '8', '7', '6']}", tmp_path)
    assert (given["differs"], given["classes"]) == ("other classes", ["9", "8", "7", "6"])
    with pytest.raises(ConfigurationError, match="both have 1, such as '3'"):
        stream_of(four + "stream: {class_order: ['9', '8', '7', '3']}", tmp_path)


@pytest.mark.slow
def test_where_all_classes_are_evaluated_the_order_is_another(tmp_path: Path) -> None:
    assert stream_of(SEARCH, tmp_path) == STREAM
    wrong = SEARCH.replace("strategies.bd.epsilon", "strategies.bd.epsilom")
    with pytest.raises(ConfigurationError, match=r"strategies.bd.epsilom.*Did you mean"):
        stream_of(wrong, tmp_path)


# ---------------------------------------------------------------------- what uses it


@pytest.fixture
def tuning(search: Any) -> Path:
    """A finished search."""
    search()
    return Path("runs/tuning.json").absolute()


def test_a_run_takes_the_best_values_before_those_of_files(tuning: Path) -> None:
    argv = ["--config", "digits_inc.yaml", "--method", "gd+ewc", "--tuned", str(tuning)]
    command = read_command(argv)
    assert "--strategies.bd.epsilon=10.0" in command.flags
    assert command.tuned is not None
    summary = command.tuned.summary({"1"})
    assert (summary["trials"], summary["stream"]) == (3, "another order")
    command.tuned.check({"strategies.bd.epsilon": 10.0}.__getitem__, 0)
    with pytest.raises(ConfigurationError, match=r"epsilon to be 10.0, the best of .* got 3.0"):
        command.tuned.check({"strategies.bd.epsilon": 3.0}.__getitem__, 0)
    with pytest.raises(ConfigurationError, match=r"seed_everything to be none of \[100\]"):
        command.tuned.check({"strategies.bd.epsilon": 10.0}.__getitem__, 100)


def test_a_record_of_something_else_is_refused(tuning: Path) -> None:
    def read(config: str, method: str, path: Path = tuning) -> None:
        read_command(["--config", config, "--method", method, "--tuned", str(path)])

    with pytest.raises(ConfigurationError, match=r"to be of the method bd.ewc, but"):
        read("digits_inc.yaml", "bd+ewc")
    with pytest.raises(ConfigurationError, match=r"to be of mnist_inc, but .* is of digits_inc"):
        read("mnist_inc.yaml", "gd+ewc")
    with pytest.raises(ConfigurationError, match="to be what bpn-bench tune writes"):
        read("digits_inc.yaml", "gd+ewc", tuning.with_name("none.json"))
    record = json.loads(tuning.read_text())
    for best, message in (
        (None, "to have a complete trial"),
        ({"number": 0, "value": 1.0, "values": {"runs": 1}}, "to be of a run, but got 'runs'"),
        (
            {"number": 0, "value": 1.0, "values": {"model.optimizer": "os.system"}},
            "numbers or plain words, but model.optimizer is 'os.system'",
        ),
    ):
        tuning.write_text(json.dumps({**record, "best": best}))
        with pytest.raises(ConfigurationError, match=message):
            read_tuned(tuning, "gd+ewc")


def test_a_grid_hands_the_record_to_its_runs(tuning: Path) -> None:
    Path("g.yaml").write_text(
        "experiments:\n  - config: digits_inc.yaml\n    methods: [gd+ewc]\n    tuned: runs/tuning.json\n"
    )
    (cell,) = read_grid("g.yaml").cells
    assert "--tuned runs/tuning.json" in " ".join(cell.flags)
    assert ("strategies.bd.epsilon", 10.0) in cell.settings
    Path("g.yaml").write_text(Path("g.yaml").read_text().replace("gd+ewc", "gd+ewc, ewc"))
    with pytest.raises(ConfigurationError, match="Expected one method in experiment 1"):
        read_grid("g.yaml")


def test_tables_say_what_was_tuned_and_where(record: Callable[..., RunRecord]) -> None:
    known = {
        "sha256": "0" * 64,
        "keys": ["strategies.bd.epsilon"],
        "trials": 3,
        "seeds": [100],
        "sampler": "grid",
        "score": "accuracy",
    }

    def rows(stream: str | None) -> Any:
        found = {} if stream is None else {"tuned": {**known, "stream": stream}}
        conditions = {"tuned_for": "digits_inc", "split": "test", **found}
        return method_rows([record("gd+ewc", s, [[0.5], [0.5, 0.5]], recorded=conditions) for s in range(5)])  # fmt: skip

    assert "values tuned for digits_inc, not on a stream of their own" in not_comparable(rows(None))
    assert tuned_apart(rows(None)) == ""
    assert "tuned" not in not_comparable(rows("other classes"))
    assert (
        tuned_apart(rows("other classes"))
        == "Tuned on held-out samples: gd+ewc (epsilon, 3 trials on other classes)."
    )
    for stream in ("shared classes", "the same tasks"):
        assert "held-out samples of the evaluated classes" in not_comparable(rows(stream))


@pytest.mark.slow
def test_a_search_on_the_digits_finds_a_step_that_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GD's step of M: at 0.1 nothing is kept, at 10 most is."""
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(
        SEARCH.replace("points: 3", "points: 2") + "set: {data.init_args.epochs_per_task: 3}"
    )
    assert main(["tune", "t.yaml", "--trainer.accelerator", "cpu", "--jobs", "2"]) == 0
    assert "best: strategies.bd.epsilon 10.0" in capsys.readouterr().out
    record = read_tuning(Path("runs/tune/t"))
    low, high = (one["value"] for one in record["trials"])
    assert low is not None
    assert high is not None
    assert high > low + 0.2
    results = json.loads(next(Path("runs/tune/t/trial_001").rglob("results.json")).read_text())
    assert results["conditions"]["split"] == "val"
    assert results["accuracy"]["average"] == results["validation"]["average"] == high
    assert main(["tune", "t.yaml", "--out", "x"]) == 2
