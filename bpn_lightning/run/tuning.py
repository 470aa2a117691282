"""What a search for a method's values leaves: one JSON file, from which ``bpn-fit --tuned`` takes the best.

::

    <runs>/tuning.json       the search, every trial's values and accuracies, and the best trial
    <runs>/trial_<n>/...     the runs of each trial, as those of a grid

Every accuracy is of held-out training samples.
"""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict, cast

from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files.untrusted import MAX_TEXT_BYTES, open_untrusted
from bpn_lightning.run.schema import Tuned, read_schema

__all__ = [
    "DRAWN_BY_SEED",
    "OTHER_CLASSES",
    "OTHER_DRAWS",
    "OTHER_ORDER",
    "SAME_TASKS",
    "SHARED_CLASSES",
    "STREAMS",
    "Best",
    "TrialRecord",
    "TuningRecord",
    "TuningStream",
    "Value",
    "is_plain",
    "read_tuned",
    "read_tuning",
    "tuned",
]

SCHEMA_VERSION = 1
"""Goes up when a key of tuning.json is renamed, removed or changes its meaning."""

OTHER_CLASSES, OTHER_ORDER, OTHER_DRAWS = "other classes", "another order", "other draws"
SAME_TASKS, SHARED_CLASSES = "the same tasks", "shared classes"

STREAMS = (OTHER_CLASSES, OTHER_ORDER, OTHER_DRAWS, SAME_TASKS, SHARED_CLASSES)
"""What the stream of a record may differ in."""

DRAWN_BY_SEED = (OTHER_ORDER, OTHER_DRAWS)
"""Streams that differ from the evaluated one by their seed alone."""

Value = int | float | bool | str | None
"""Of a key; a text is a plain word, and names no class."""


class TrialRecord(TypedDict):
    """One trial: the runs of all seeds at some values."""

    number: int
    """From 0; the runs are in ``trial_<number>``."""
    values: dict[str, Any]
    """By their keys."""
    state: str
    """"complete"; "pruned" where it was stopped early; "failed" where a run failed or had no accuracy."""
    after_task: list[float]
    """Mean accuracies over the tasks so far, after each task but the last, means over the seeds."""
    value: float | None
    """The mean accuracy over all tasks at the stream's end, mean over the seeds; null unless complete."""


class Best(TypedDict):
    """The trial with the highest value, the first of equals."""

    number: int
    values: dict[str, Any]
    value: float


class TuningStream(TypedDict):
    """The stream that trials learn."""

    differs: str
    """From the evaluated one: "other classes"; "another order" of the same; "other draws", such as
    permutations; "the same tasks"."""
    arguments: dict[str, Any]
    """Of the stream, by their names, in addition to those of the config."""
    validation_fraction: float
    """Of the training samples, on which accuracies are measured."""
    tasks: int
    classes: list[str]
    """Of the tasks with the first seed, if they are other classes than the evaluated ones."""


class TuningRecord(TypedDict):
    """The schema of tuning.json."""

    schema_version: int
    name: str
    """Of the file that describes the search."""
    config: str
    experiment: str
    method: str
    settings: dict[str, Any]
    """What every run has besides, by its keys."""
    stream: TuningStream
    seeds: list[int]
    score: str
    """"accuracy", where the task ID is given, or "accuracy_task_agnostic"."""
    sampler: str
    sampler_seed: int
    pruner: str | None
    optuna: str | None
    """Its version; null where it is not used."""
    space: dict[str, Any]
    budget: int
    """Trials, at most."""
    trials: list[TrialRecord]
    best: Best | None
    """Null until a trial is complete."""


def read_tuning(path: Path) -> TuningRecord:
    """Read a tuning.json, or the one of a folder, and check it against its schema.

    Raises:
        ResultsError: it is missing, is no JSON, has another version, lacks a key or holds a value of
            another type; names the file and the key.
    """
    path = path / "tuning.json" if path.is_dir() else path
    what, remedy = "what bpn-bench tune writes", "Run it again."
    found = read_schema(path, TuningRecord, SCHEMA_VERSION, what, remedy)
    return cast(TuningRecord, found)


def read_tuned(path: Path, method: str) -> tuple[TuningRecord, str]:
    """Read a record whose best values a method is to have.

    Args:
        path: of tuning.json or its folder.
        method: that gets the values.

    Returns:
        The record, and the SHA-256 of its file in hexadecimal digits.

    Raises:
        ConfigurationError: it is of another method, or has no values that can be used.
    """
    path = path / "tuning.json" if path.is_dir() else path
    try:
        record = read_tuning(path)
        with open_untrusted(path, max_bytes=MAX_TEXT_BYTES) as file:
            digest = sha256(file.read()).hexdigest()
    except (OSError, ResultsError) as error:
        raise ConfigurationError(str(error)) from error
    if record["method"] != method:
        raise ConfigurationError(
            f"Expected --tuned to be of the method {method}, but {path} is of {record['method']}. Tune "
            f"{method}, or leave --tuned out."
        )
    if record["best"] is None:
        raise ConfigurationError(
            f"Expected {path} to have a complete trial, but it has none. Continue it by bpn-bench tune."
        )
    for key, value in record["best"]["values"].items():
        if not re.fullmatch(r"(model|strategies|gates|fronts|data|trainer)(\.\w+)+", key):
            raise ConfigurationError(
                f"Expected the keys of {path} to be of a run, but got {key!r:.80}."
            )
        if not is_plain(value):
            raise ConfigurationError(
                f"Expected the values of {path} to be numbers or plain words, but {key} is {value!r:.80}."
            )
    return record, digest


def is_plain(value: object) -> bool:
    """Whether a value is a number, a boolean, null or a word without dots, which names no class.

    >>> is_plain(0.1), is_plain("linear"), is_plain("os.system"), is_plain([1])
    (True, True, False, False)
    """
    if isinstance(value, str):
        return re.fullmatch(r"[\w-]+", value) is not None
    return value is None or isinstance(value, int | float)


def tuned(record: TuningRecord, digest: str, classes: set[str]) -> Tuned:
    """What results.json says of the record whose values a run has.

    Args:
        record: the record.
        digest: SHA-256 of its file.
        classes: names of the classes that the run has learned.
    """
    stream = record["stream"]["differs"]
    if stream == OTHER_CLASSES and classes & set(record["stream"]["classes"]):
        stream = SHARED_CLASSES
    return {
        "sha256": digest,
        "keys": list(record["space"]),
        "trials": len(record["trials"]),
        "seeds": record["seeds"],
        "sampler": record["sampler"],
        "score": record["score"],
        "stream": stream,
    }
