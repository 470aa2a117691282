"""Which numbers of two trees of runs differ: ``python benchmarks/compare_results.py before after``.

Runs are matched by their path in the tree, and read from results.json, accuracy_matrix.csv and metrics.csv.
A key that was renamed since is compared under its name of today, so that runs of an older release can be
compared with runs of this one. Provenance (seconds, date, versions, commit, machine) is listed and not
compared. Differences are grouped by key, and tasks and epochs of one key together; the exit status is 1
where there are any.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: What the first part of a key was called in an older release, and is called today.
RENAMED = {"accuracy_without_oracle": "accuracy_task_agnostic"}

TABLES = ("accuracy_matrix.csv", "metrics.csv")
MISSING = "(none)"
EQUAL = "everything that is compared is equal"


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of what was read from JSON, each with the path to it: ``accuracy.per_task.0``."""
    if isinstance(value, dict | list) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            yield from flatten(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def cells(path: Path) -> Iterator[tuple[str, str]]:
    """Values of a CSV file, by column and row."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file)):
                yield from ((f"{column}#{number}", value) for column, value in row.items() if value)


def rename(key: str) -> str:
    """The name of today of a key in results.json (``a.b``) or of a column (``a/b#row``)."""
    first = re.split(r"[./#]", key)[0]
    return RENAMED.get(first, first) + key[len(first) :]


def read_run(folder: Path) -> dict[str, Any]:
    """Every number and text that a run left, by file and key."""
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    found = {f"results.json {rename(key)}": value for key, value in flatten(record)}
    for name in TABLES:
        found |= {f"{name} {rename(key)}": value for key, value in cells(folder / name)}
    return found


def read_tree(root: Path) -> dict[str, dict[str, Any]]:
    """All runs below a folder, by their path in it."""
    files = sorted(root.rglob("results.json"))
    return {path.parent.relative_to(root).as_posix(): read_run(path.parent) for path in files}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys whose values differ, or that only one of the two has, each with what is said of it."""
    for key in sorted({*before, *after}):
        old, new = before.get(key, MISSING), after.get(key, MISSING)
        if old != new:
            yield key, f"{old} -> {new}"


def group(key: str) -> str:
    """A key without the numbers of its task and row."""
    return re.sub(r"#\d+$|\.\d+(?=\.|$)", "", re.sub(r"task_\d+", "task_*", key))


def report(before: Path, after: Path) -> Iterator[str]:
    """The comparison, line by line: what is compared, what is not, and each group of differences."""
    old, new = read_tree(before), read_tree(after)
    both = sorted(old.keys() & new.keys())
    yield f"{len(both)} runs are in both trees"
    yield from (f"only in one: {run}" for run in sorted(old.keys() ^ new.keys()))
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in both:
        for key, change in differences(old[run], new[run]):
            kind = (
                "differs" if {key} <= old[run].keys() & new[run].keys() else "is only in one tree"
            )
            groups[f"{group(key)} {kind}"][run].append(change)
    left_out = [key for key in sorted(groups) if key.startswith("results.json provenance.")]
    yield from (f"not compared: {key}, {len(groups.pop(key))} runs" for key in left_out)
    for key, runs in sorted(groups.items()):
        yield f"{key}, {len(runs)} runs"
        yield from (f"  {run}: {len(all_)} values, first {all_[0]}" for run, all_ in runs.items())
    yield "everything else is equal" if groups else EQUAL


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    lines = list(report(*map(Path, sys.argv[1:])))
    print(*lines, sep="\n")
    sys.exit(lines[-1] != EQUAL)
