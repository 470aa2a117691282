"""The settings in which runs differ: all of them, and in a few words."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bpn_lightning.analysis.comparison import MethodRow

__all__ = ["DifferingSetting", "differing_settings", "setting_labels"]

NAMED = 3
"""Keys that a label names."""

LONGEST = 30
"""Characters of a value in a label."""

_ABSENT = "not set"

# They name a run or where it is, not what was learned and how.
_NOT_SETTINGS = ("seed_everything", "experiment", "method", "data.init_args.seed")


@dataclass(frozen=True)
class DifferingSetting:
    """A key of config.yaml in which runs differ.

    Args:
        key: with dots.
        values: each value as text, and the methods that have it; a method whose seeds differ is named
            with its seeds.
        own: it has one value, and some methods do not know it.
    """

    key: str
    values: list[tuple[str, list[str]]]
    own: bool


def setting_labels(settings: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """A label for each setting: the keys in which not all agree, and its values there.

    Args:
        settings: by dotted keys; None where they are not known.

    Returns:
        As many labels; different settings have different ones. ``""`` where all agree, and where they
        are not known.

    >>> setting_labels([{"a.rank": 8, "b": 1}, {"a.rank": 4, "b": 1}, None])
    ['rank 8', 'rank 4', '']
    >>> setting_labels([{"a.rank": 8}, {"a.rank": 8}])
    ['', '']
    """
    texts = [None if one is None else {k: _text(v) for k, v in one.items()} for one in settings]
    known = [one for one in texts if one is not None]
    keys = [
        key
        for key in dict.fromkeys(key for one in known for key in one)
        if len({one.get(key) for one in known}) > 1
    ]
    labels: dict[tuple[str | None, ...], str] = {}
    for one in known:
        values = tuple(one.get(key) for key in keys)
        if values not in labels:
            label = _label(keys, values)
            twins = sum(other.startswith(label) for other in labels.values())
            labels[values] = f"{label} ({twins + 1})" if twins else label
    return [
        "" if one is None or not keys else labels[tuple(one.get(key) for key in keys)]
        for one in texts
    ]


def _label(keys: Sequence[str], values: Sequence[str | None]) -> str:
    shorts = [key.rpartition(".")[2] for key in keys]
    words = []
    for key, short, value in list(zip(keys, shorts, values, strict=True))[:NAMED]:
        name = short if shorts.count(short) == 1 else key.replace(".init_args", "")
        shown = _ABSENT if value is None else value
        words.append(f"{name} {shown[:LONGEST]}{'…' if len(shown) > LONGEST else ''}")
    more = [f"and {len(keys) - NAMED} more"] if len(keys) > NAMED else []
    return ", ".join([*words, *more])


def differing_settings(found: Sequence[MethodRow]) -> list[DifferingSetting]:
    """The keys that not all runs have with one value, in the order of config.yaml.

    A method whose runs have no config.yaml is left out: its settings are not known.
    """
    known = [(row, [run for run in row.records if run.settings is not None]) for row in found]
    label = _labels(found)
    keys = dict.fromkeys(key for _, runs in known for run in runs for key in run.settings or ())
    settings = []
    for key in keys:
        if key in _NOT_SETTINGS:
            continue
        values: dict[str, list[str]] = {}
        for row, runs in known:
            own: dict[str, list[int]] = {}
            for run in runs:
                own.setdefault(_value(run.settings or {}, key), []).append(run.seed)
            for value, seeds in own.items():
                which = f" (seed {', '.join(map(str, seeds))})" if len(own) > 1 else ""
                values.setdefault(value, []).append(label(row) + which)
        if len(values) > 1:
            absent = values.pop(_ABSENT, None)
            order = [*values.items(), *([(_ABSENT, absent)] if absent else [])]
            settings.append(DifferingSetting(key, order, own=len(values) == 1))
    return settings


def _value(settings: Mapping[str, Any], key: str) -> str:
    return _text(settings[key]) if key in settings else _ABSENT


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _labels(found: Sequence[MethodRow]) -> Callable[[MethodRow], str]:
    """A row's name: its method, with its place where there are several."""
    if len({row.place for row in found}) == 1:
        return lambda row: row.name
    return lambda row: f"{row.place}: {row.name}"
