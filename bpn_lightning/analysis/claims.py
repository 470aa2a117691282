"""What a table lacks before one of its methods may be called better than another."""

from collections.abc import Iterable, Sequence

from bpn_lightning.analysis.comparison import MethodRow
from bpn_lightning.analysis.record import RunRecord
from bpn_lightning.analysis.statistics import binomial_half
from bpn_lightning.run.identity import CLASS_ORDER, short
from bpn_lightning.run.scenarios import scenario_text
from bpn_lightning.run.tuning import SAME_TASKS, SHARED_CLASSES

__all__ = [
    "MIN_SEEDS",
    "missing_for_a_claim",
    "not_comparable",
    "scenarios_of",
    "small_test",
    "test_samples",
    "tuned_apart",
]

MIN_SEEDS = 5
"""Below it, a paired t-test hardly finds anything, and an interval is wide."""

LOWER, UPPER, SIMPLE = ("finetune",), ("joint", "stl"), ("ncm", "slda")
"""Rows that a table should have: what is reached without a method, what could be reached, and without training."""

RECORDED = {
    "scenarios": "scenario",
    "order": "class order",
    "tuned_for": "tuning",
    "updates": "updates",
}
"""Conditions of results.json that runs of earlier releases lack."""


def scenarios_of(rows: Sequence[MethodRow]) -> str:
    """The scenarios of the rows' accuracies as a sentence; "" where none is recorded."""
    texts: dict[str, None] = {}
    for row in rows:
        for record in row.records:
            for one in (record.at("conditions", "scenarios") or {}).values():
                if one is not None:
                    texts[scenario_text(one)] = None
    if not texts:
        return ""
    return f"Scenario{'s' if len(texts) > 1 else ''}: {'; '.join(texts)}."


def tuned_apart(rows: Sequence[MethodRow]) -> str:
    """Which rows have tuned values with a record, as a sentence; "" where none has."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        one = row.records[0].at("conditions", "tuned")
        if one is not None:
            keys = ", ".join(short(key) for key in one["keys"])
            text = f"{keys}, {one['trials']} trials on {one['stream']}"
            texts.setdefault(text, []).append(row.name)
    if not texts:
        return ""
    parts = (f"{', '.join(dict.fromkeys(names))} ({text})" for text, names in texts.items())
    return f"Tuned on held-out samples: {'; '.join(parts)}."


def not_comparable(rows: Sequence[MethodRow]) -> str:
    """What the rows of one place or of several lack for a claim, as a sentence; "" where nothing is missing."""
    places = dict.fromkeys(row.place for row in rows)
    missing = {
        place: missing_for_a_claim([r for r in rows if r.place == place]) for place in places
    }
    missing = {place: phrases for place, phrases in missing.items() if phrases}
    if not missing:
        return ""
    same = len(missing) == len(places) and len({tuple(one) for one in missing.values()}) == 1
    if same:
        return f"Not comparable: {'; '.join(next(iter(missing.values())))}."
    parts = (f"{place}: {'; '.join(phrases)}" for place, phrases in missing.items())
    return f"Not comparable. {'. '.join(parts)}."


def missing_for_a_claim(rows: Sequence[MethodRow]) -> list[str]:
    """What the rows of one place lack, a phrase for each; bounds and simple rows need no equal conditions."""
    records = [record for row in rows for record in row.records]
    methods = {record.method for record in records}
    fewest = min(len(row.seeds) for row in rows)
    found = []
    if fewest < MIN_SEEDS:
        found.append(f"fewer than {MIN_SEEDS} seeds ({fewest})")
    for kinds, what in (
        (LOWER, "lower bound"),
        (UPPER, "upper bound"),
        (SIMPLE, "row without training"),
    ):
        if not any(_is_of(method, kinds) for method in methods):
            found.append(f"no {what} ({' or '.join(kinds)})")
    if not _orders_vary(records):
        found.append("one order of classes or tasks for all seeds")
    if any(record.at("conditions", "split") == "val" for record in records):
        found.append("accuracies on held-out training samples")
    others = [row for row in rows if not _is_simple(row)]
    own = [record for row in others for record in row.records]
    tuned = {
        name
        for one in own
        if (name := one.at("conditions", "tuned_for")) and one.at("conditions", "tuned") is None
    }
    if tuned:
        found.append(
            f"values tuned for {' and '.join(sorted(tuned))}, not on a stream of their own"
        )
    if any(one.at("conditions", "tuned", "stream") in (SAME_TASKS, SHARED_CLASSES) for one in own):
        found.append("values tuned on held-out samples of the evaluated classes")
    held = _numbers(own, "bytes_held", "training")
    if len(held) > 1:
        found.append(f"unequal memory ({min(held):,} to {max(held):,} bytes held in training)")
    updates = _numbers(own, "conditions", "updates")
    if len(updates) > 1:
        found.append(f"unequal updates ({min(updates):,} to {max(updates):,})")
    unknown = [words for key, words in RECORDED.items() if _lacks(records, key)]
    if any(record.at("by_class") is None for record in records):
        unknown.append("test samples")
    if unknown:
        found.append(f"not recorded: {', '.join(unknown)}")
    return found


def test_samples(records: Sequence[RunRecord]) -> int | None:
    """Test samples of the learned tasks of the first run; None where they were not recorded."""
    counts = records[0].at("by_class", "accuracy", "samples_per_task") if records else None
    return sum(counts) if counts else None


def small_test(differences: Iterable[tuple[str, float, MethodRow, MethodRow]]) -> str:
    """A warning of differences in ACC that chance in the choice of test samples may make; "" where there are none.

    Args:
        differences: the name of each, its mean, and its rows.
    """
    small = []
    widest, fewest = 0.0, 0
    for name, mean, *rows in differences:
        for row in rows:
            samples, score = test_samples(row.records), row.scores["average"]
            if samples and score is not None:
                half = binomial_half(score.mean, samples)
                if half > abs(mean):
                    small.append(name)
                    widest, fewest = max(widest, half), min(fewest or samples, samples)
    if not small:
        return ""
    return (
        f"Small tests: with {fewest:,} test samples, the binomial 95 % interval of an ACC is up to ± {widest:.3f}, "
        f"wider than the difference of {'; '.join(dict.fromkeys(small))}."
    )


def _is_of(method: str, kinds: Sequence[str]) -> bool:
    """Whether a method is one of these, or one of them with other settings, such as ``joint_task_mask``."""
    return method in kinds or method.startswith(tuple(f"{kind}_" for kind in kinds))


def _is_simple(row: MethodRow) -> bool:
    return _is_of(row.records[0].method, (*LOWER, *UPPER, *SIMPLE))


def _orders_vary(records: Sequence[RunRecord]) -> bool:
    """Whether the seeds draw the order, or several were run; also where it is not recorded."""
    if len({record.variant.get(CLASS_ORDER) for record in records}) > 1:
        return True
    return all(record.at("conditions", "order") in ("seed", None) for record in records)


def _lacks(records: Sequence[RunRecord], key: str) -> bool:
    return any(key not in (record.at("conditions") or {}) for record in records)


def _numbers(records: Sequence[RunRecord], *keys: str) -> set[int]:
    """The different values that are known."""
    return {value for record in records if (value := record.at(*keys)) is not None}
