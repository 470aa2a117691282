"""Runs a search: every trial is runs of ``bpn-fit`` on the tuning stream, and tuning.json has what they gave."""

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from bpn_lightning.bench.cell import UNTRUSTED, Cell, setting_flags
from bpn_lightning.bench.runner import BPN_FIT, Executor, Failure, Runner, on_this_machine
from bpn_lightning.bench.search import Outcome, Search, Trial, make_search, optimize
from bpn_lightning.bench.tuning import ARGUMENTS, Tuning
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files.lock import FolderLock
from bpn_lightning.files.untrusted import read_json, read_text
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.run.tuning import (
    OTHER_CLASSES,
    OTHER_DRAWS,
    OTHER_ORDER,
    SAME_TASKS,
    TrialRecord,
    TuningRecord,
    TuningStream,
    read_tuning,
)

__all__ = ["RECORD", "find_stream", "tune"]

RECORD = "tuning.json"


def tune(
    tuning: Tuning,
    root: Path,
    jobs: int = 1,
    passed_on: Sequence[str] = (),
    executor: Executor = on_this_machine,
    command: Sequence[str] = (BPN_FIT,),
) -> tuple[TuningRecord, list[Failure]]:
    """Run a search, or continue it, and write tuning.json into a folder.

    Args:
        tuning: what is searched.
        root: the folder; the runs are below it.
        jobs: processes at a time.
        passed_on: more flags for every ``bpn-fit``.
        executor: runs the processes.
        command: the program.

    Returns:
        The record, and the runs that failed.

    Raises:
        ConfigurationError: the tuning stream is wrong, or the folder has another search.
    """
    search = make_search(tuning.space, tuning.sampler, tuning.sampler_seed, tuning.pruner)
    stream = find_stream(tuning, passed_on)
    head = _head(tuning, stream, search)
    lock = FolderLock(root, ".tune.lock")
    if owner := lock.acquire():
        raise ResultsError(f"Expected {root} to be free, but {owner} uses it. Give another --runs.")
    try:
        earlier = _earlier(root, head)
        trials = _Trials(tuning, stream, root, jobs, passed_on, executor, command)

        def save(done: list[TrialRecord]) -> None:
            _write(root, {**head, "trials": done, "best": _best(done)})

        done = optimize(search, tuning.trials, trials.run, earlier, save, max(jobs, 1))
        return _write(root, {**head, "trials": done, "best": _best(done)}), trials.failures
    finally:
        lock.release()


def find_stream(tuning: Tuning, passed_on: Sequence[str] = ()) -> TuningStream:
    """Choose the tuning stream, or check the given one, by setting both streams up.

    Raises:
        ConfigurationError: it shares classes with the evaluated stream, though other classes were asked for.
        BPNLightningError: the data cannot be read.
    """
    from bpn_lightning.cli.stream import read_stream  # slow: imports torch

    middle = {key: one.values()[0] for key, one in tuning.space.items()}
    flags = setting_flags(tuple({**tuning.settings, **middle}.items()))
    head = ["--config", tuning.config, "--method", tuning.method, UNTRUSTED, *flags, *passed_on]
    evaluated = read_stream(head)
    classes = {name for task in evaluated.tasks for name in task.class_names}
    arguments = evaluated.tuning_arguments() if tuning.stream is None else dict(tuning.stream)
    found: TuningStream = {
        "differs": SAME_TASKS,
        "arguments": arguments,
        "validation_fraction": tuning.validation_fraction,
        "tasks": 0,
        "classes": [],
    }
    seed = tuning.seeds[0]
    extra = setting_flags(tuple(_stream_settings(found).items()))
    stream = read_stream([*head, *extra, "--seed_everything", str(seed)])
    found["tasks"] = len(stream.tasks)
    own = [name for task in stream.tasks for name in task.class_names]
    shared = sorted(classes & set(own))
    if not shared:
        found["differs"] = OTHER_CLASSES
        # Other seeds may take others of those that are listed.
        listed = [name for name in arguments.get("class_order") or () if isinstance(name, str)]
        found["classes"] = list(dict.fromkeys([*own, *listed]))
    elif tuning.stream is not None:
        raise ConfigurationError(
            f"Expected stream of {tuning.name} to have other classes than the evaluated stream, but both have "
            f"{len(shared)}, such as {shared[0]!r}. Leave `stream:` out, and it is chosen."
        )
    elif stream.order == "seed" and stream.seed == seed:
        ordered = arguments.get("class_order_seed") is not None
        found["differs"] = OTHER_ORDER if ordered else OTHER_DRAWS
    return found


def _stream_settings(stream: TuningStream) -> dict[str, Any]:
    own = {ARGUMENTS + name: value for name, value in stream["arguments"].items()}
    held = {
        f"{ARGUMENTS}validation_fraction": stream["validation_fraction"],
        f"{ARGUMENTS}evaluation_split": "val",
    }
    return {**own, **held}


class _Trials:
    """Runs trials, each with all seeds."""

    def __init__(
        self,
        tuning: Tuning,
        stream: TuningStream,
        root: Path,
        jobs: int,
        passed_on: Sequence[str],
        executor: Executor,
        command: Sequence[str],
    ) -> None:
        self.tuning, self.root, self.tasks = tuning, root, stream["tasks"]
        self.settings = _stream_settings(stream)
        self.failures: list[Failure] = []
        self.runner = Runner(
            root, jobs, retry=True, passed_on=passed_on, executor=executor, command=command
        )

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Run some trials to their ends, or until they are pruned."""
        cells = {trial: self._cells(trial) for trial in trials}

        def watch() -> None:
            for trial, of_trial in cells.items():
                if trial.report(self._steps(of_trial)):
                    for cell in of_trial:
                        self.runner.stop(cell)

        self.runner.on_wait = watch
        failures = self.runner.run([cell for of_trial in cells.values() for cell in of_trial])
        watch()
        pruned = [cell for trial, of in cells.items() if trial.pruned for cell in of]
        self.failures += [one for one in failures if one.cell not in pruned]
        return [self._outcome(cells[trial]) for trial in trials]

    def _cells(self, trial: Trial) -> list[Cell]:
        settings = {**self.settings, **trial.values}
        label = f"trial_{trial.number:03d}"
        return [self.tuning.cell(seed, label, settings) for seed in self.tuning.seeds]

    def _steps(self, cells: Sequence[Cell]) -> list[float]:
        """Means over the seeds after each task that all of them have learned, but the last."""
        runs = [_after_tasks(cell.folder(self.root) / "metrics.csv") for cell in cells]
        steps = min(min(len(run) for run in runs), self.tasks - 1)
        return [fmean(run[step] for run in runs) for step in range(steps)]

    def _outcome(self, cells: Sequence[Cell]) -> Outcome:
        values = []
        for cell in cells:
            try:
                results = read_json(cell.folder(self.root) / "results.json")
                value = (results[self.tuning.score] or {}).get("average")
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                value = None
            if not isinstance(value, int | float):
                return None, True
            values.append(float(value))
        return fmean(values), False


def _after_tasks(path: Path) -> list[float]:
    """Mean accuracies over the tasks so far, after the first, the second, ..., of a run's metrics.csv."""
    try:
        text = read_text(path)
    except (OSError, ValueError):
        return []
    whole = text[: text.rfind("\n") + 1]  # a line may be half written
    found: dict[int, float] = {}
    for row in csv.DictReader(StringIO(whole)):
        try:
            found[int(float(row["stream/tasks_learned"]))] = float(row["accuracy/average"])
        except (KeyError, TypeError, ValueError):
            continue
    steps: list[float] = []
    while len(steps) + 1 in found:
        steps.append(found[len(steps) + 1])
    return steps


def _head(tuning: Tuning, stream: TuningStream, search: Search) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": tuning.name,
        "config": Path(tuning.config).name,
        "experiment": tuning.experiment,
        "method": tuning.method,
        "settings": dict(tuning.settings),
        "stream": stream,
        "seeds": list(tuning.seeds),
        "score": tuning.score,
        "sampler": tuning.sampler,
        "sampler_seed": tuning.sampler_seed,
        "pruner": tuning.pruner,
        "optuna": search.version,
        "space": {key: one.record() for key, one in tuning.space.items()},
        "budget": tuning.trials,
    }


def _earlier(root: Path, head: Mapping[str, Any]) -> list[TrialRecord]:
    """Trials of the same search that were run before; a larger budget continues them."""
    if not (root / RECORD).exists():
        return []
    found = read_tuning(root / RECORD)
    for key, value in head.items():
        if key not in ("budget", "optuna") and found.get(key) != value:
            raise ConfigurationError(
                f"Expected {root / RECORD} to be of this search, but its {key} is {found.get(key)!r:.200}, not {value!r:.200}. "
                "Give another --runs."
            )
    return found["trials"]


def _best(trials: Sequence[TrialRecord]) -> dict[str, Any] | None:
    known = [one for one in trials if one["value"] is not None]
    if not known:
        return None
    best = max(known, key=lambda one: (one["value"], -one["number"]))
    return {"number": best["number"], "values": best["values"], "value": best["value"]}


def _write(root: Path, record: Mapping[str, Any]) -> TuningRecord:
    root.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(root / RECORD, text.encode())
    return read_tuning(root / RECORD)
