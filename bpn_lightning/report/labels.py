"""What tells settings apart, in a few words."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["setting_labels"]

NAMED = 3
"""Keys that a label names."""

LONGEST = 30
"""Characters of a value in a label."""

_ABSENT = "not set"


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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
