"""The state of a gate as parts: what all tasks share, and the rows of each task."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["joined_gate", "split_gate"]


def split_gate(
    state: Mapping[str, Any], shared_rows: Collection[str]
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """What a gate answers by, in parts.

    Args:
        state: with ``row_tasks``, ``row_columns`` and ``rows``, tensors with a row for each of them; without
            these, all of it is shared.
        shared_rows: names in ``rows`` of what all rows share.

    Returns:
        The shared part, and by task ID ``columns`` and ``rows`` of each task.
    """
    if not {"row_tasks", "row_columns", "rows"} <= state.keys():
        return dict(state), {}
    tasks, columns, rows = state["row_tasks"], state["row_columns"], state["rows"]
    parts = {}
    for task in sorted(set(tasks)):
        places = [place for place, one in enumerate(tasks) if one == task]
        own = {name: value[places] for name, value in rows.items() if name not in shared_rows}
        parts[task] = {"columns": [columns[place] for place in places], "rows": own}
    common = {name: value for name, value in rows.items() if name in shared_rows}
    return {**state, "row_tasks": [], "row_columns": [], "rows": common}, parts


def joined_gate(
    shared: Mapping[str, Any], parts: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The inverse of :func:`split_gate`, for tasks in the order of their IDs.

    Raises:
        ValueError: a task has other rows than the others, or than its columns.
    """
    if not {"row_tasks", "row_columns", "rows"} <= shared.keys():
        return dict(shared)
    tasks: list[int] = []
    columns: list[int] = []
    rows: dict[str, list[Tensor]] = {}
    for task, part in sorted(parts.items()):
        number = len(part["columns"])
        tasks += [task] * number
        columns += [int(column) for column in part["columns"]]
        if rows and rows.keys() != part["rows"].keys():
            raise ValueError(f"rows of a gate for task {task} that other tasks do not have")
        for name, value in part["rows"].items():
            if value.dim() == 0 or len(value) != number:
                raise ValueError(f"{name} of a gate for task {task}, without a row for each column")
            rows.setdefault(name, []).append(value)
    whole = {**shared["rows"], **{name: torch.cat(values) for name, values in rows.items()}}
    return {**shared, "row_tasks": tasks, "row_columns": columns, "rows": whole}
