"""A network's state as parts: what all tasks share, and what each task has alone.

A task's part is its row of every bank, its rows of the head, or its own set of weights, so it can be
written, shipped, added and removed alone. :func:`assembled` is the inverse of :func:`split`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bpn_lightning.modes.rebuilding import rebuild
from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.head import BY_COLUMN
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.nn.structure import Structure
from bpn_lightning.nn.weight_bank import WeightBank

__all__ = ["Parts", "assembled", "fill", "ranges_of", "split"]

BANK = "weight_bank."
ACCURACY = "accuracy_matrix."
EXTRA = "_extra_state"

#: Rows of different tasks are padded to the widest: at most so many times their bytes, and so many more.
PADDING, SPARE_BYTES = 16, 2**24


@dataclass
class Parts:
    """The state of a network.

    Attributes:
        shared: tensors that all tasks share, by their names in ``state_dict``. With a weight bank these
            are the initial weights, behind ``weight_bank.``.
        tasks: by task ID, tensors by ``<module>.<buffer>``; ``head.weight`` and ``head.bias`` hold the
            task's own rows.
        accuracy: the accuracy matrix.
        plain: other values, by their names in ``state_dict``.
        spare: ``[first, stop]`` of columns that no task has; ``shared`` holds their rows of the head.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    tasks: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    accuracy: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    spare: list[list[int]] = field(default_factory=list)


def ranges_of(numbers: Iterable[int]) -> list[list[int]]:
    """Ascending numbers as ``[first, stop]``.

    >>> ranges_of([2, 3, 7])
    [[2, 4], [7, 8]]
    """
    runs = [
        [number for _, number in group]
        for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    return [[run[0], run[-1] + 1] for run in runs]


def _has_rows(structure: Structure, names: Iterable[str]) -> bool:
    """Whether each task has rows of the head of its own."""
    bank = any(one.part == "weight_bank" for one in structure.attached)
    return structure.mask != "shared" and not bank and "head.weight" in names


def split(network: AnsweringNetwork) -> Parts:
    """The parts of a network's state; tensors may be views of its own."""
    structure, parts = network.structure, Parts()
    modules = {name: part for name, part in network.named_modules() if isinstance(part, TaskModule)}
    known = structure.known(range(len(structure.tasks)))
    parts.tasks = {task: _task_part(structure, modules, task) for task in known}
    state = network.state_dict()
    bank = network.weight_bank
    if bank is not None:
        parts.shared = {f"{BANK}{name}": value for name, value in bank.beginning.items()}
        state = {name: v for name, v in state.items() if name not in bank.beginning}
    own = tuple(f"{name}." for name in modules)
    for name, value in state.items():
        if name.startswith(own):
            if name.endswith(EXTRA) and not name.startswith(BANK):
                parts.plain[name] = {**value, "live": None}
        elif name.startswith(ACCURACY):
            parts.accuracy[name] = value
        elif isinstance(value, Tensor):
            parts.shared[name] = value
        else:
            parts.plain[name] = value
    if _has_rows(structure, parts.shared):
        _split_head(structure, parts)
    return parts


def _task_part(
    structure: Structure, modules: Mapping[str, TaskModule], task: int
) -> dict[str, Tensor]:
    found = {
        f"{name}.{key}": value
        for name, part in modules.items()
        for key, value in part.task_state(task).items()
    }
    row, columns = found.get("head.bias_units.bank"), structure.open_columns(task, task)
    if row is not None and not row[columns:].any():
        found["head.bias_units.bank"] = row[:columns]
    return found


def _split_head(structure: Structure, parts: Parts) -> None:
    used = {column for task in structure.tasks for column in range(*task.columns)}
    spare = [column for column in range(structure.num_classes) if column not in used]
    parts.spare = ranges_of(spare)
    for name in BY_COLUMN:
        rows = parts.shared.pop(name, None)
        if rows is None:
            continue
        for task, part in parts.tasks.items():
            part[name] = rows[slice(*structure.tasks[task].columns)]
        if spare:
            parts.shared[name] = rows[spare]


# --- back together -------------------------------------------------------------------------------


def assembled(structure: Structure, parts: Parts) -> dict[str, Any]:
    """The ``state_dict`` of a network, without parameters that only training needs.

    Args:
        structure: as a file describes it, whose tasks are numbered from 0.
        parts: as files hold them; nothing is built of them that is much larger than they are.

    Raises:
        ValueError: the parts do not belong together.
    """
    held = sum(v.nbytes for part in (parts.shared, *parts.tasks.values()) for v in part.values())
    limit = PADDING * held + SPARE_BYTES
    state: dict[str, Any] = {**parts.shared, **parts.accuracy, **parts.plain}
    beginning = {n.removeprefix(BANK): v for n, v in parts.shared.items() if n.startswith(BANK)}
    if beginning:
        for name in beginning:
            state.pop(BANK + name)
        state |= beginning
        learned = {
            task: {n.removeprefix(BANK): v for n, v in part.items() if n.startswith(BANK)}
            for task, part in parts.tasks.items()
        }
        state[BANK + EXTRA] = {
            "beginning": beginning,
            "learned": {task: weights for task, weights in learned.items() if weights},
            "live": None,
            "inside": -1,
        }
    names = {n for part in parts.tasks.values() for n in part if not n.startswith(BANK)}
    rows = set(BY_COLUMN) & names
    for name in sorted(names - rows):
        values = {task: _of(part, name, task) for task, part in parts.tasks.items()}
        state[name], limit = _stacked(name, values, len(structure.tasks), limit)
    for name in sorted(rows):
        values = {task: _of(part, name, task) for task, part in parts.tasks.items()}
        state[name], limit = _head_rows(name, structure, values, parts, limit)
    return state


def _of(part: Mapping[str, Tensor], name: str, task: int) -> Tensor:
    if name not in part:
        raise ValueError(f"no {name} in task {task}, which other tasks have")
    return part[name]


def _empty(name: str, shape: Sequence[int], like: Tensor, limit: int) -> tuple[Tensor, int]:
    """Zeros, and how many bytes are left after them."""
    left = _bytes_left(name, shape, like, limit)
    return like.new_zeros(tuple(shape)), left


def _bytes_left(name: str, shape: Sequence[int], like: Tensor, limit: int) -> int:
    """How many bytes are left of a limit after a tensor."""
    numbers = 1
    for size in shape:
        numbers *= size
    left = limit - numbers * like.element_size()
    if left < 0:
        raise ValueError(f"{name} of shape {tuple(shape)}, which is larger than the files")
    return left


def _alike(name: str, values: Iterable[Tensor]) -> None:
    kinds = {(value.dtype, value.dim(), value.shape[1:]) for value in values}
    if len(kinds) != 1 or next(iter(kinds))[1] == 0:
        raise ValueError(f"{name} of other shapes or types in some tasks")


def _stacked(name: str, values: Mapping[int, Tensor], tasks: int, limit: int) -> tuple[Tensor, int]:
    """A bank of rows, of which narrower ones are 0 beyond their end."""
    _alike(name, values.values())
    like = next(iter(values.values()))
    width = max(value.shape[0] for value in values.values())
    shape = (tasks, width, *like.shape[1:])
    if len(values) == tasks and all(value.shape[0] == width for value in values.values()):
        left = _bytes_left(name, shape, like, limit)
        return torch.stack([values[task] for task in range(tasks)]), left
    bank, left = _empty(name, shape, like, limit)
    for task, value in values.items():
        bank[task, : len(value)] = value
    return bank, left


def _head_rows(
    name: str, structure: Structure, values: Mapping[int, Tensor], parts: Parts, limit: int
) -> tuple[Tensor, int]:
    """The rows of all tasks and of columns that no task has; 0 where a task was forgotten."""
    spare = parts.shared.get(name)
    _alike(name, [*values.values(), *([] if spare is None else [spare])])
    like = next(iter(values.values()))
    head, left = _empty(name, (structure.num_classes, *like.shape[1:]), like, limit)
    if spare is not None:
        head[[c for first, stop in parts.spare for c in range(first, stop)]] = spare
    for task, value in values.items():
        head[slice(*structure.tasks[task].columns)] = value
    return head, left


def fill(network: AnsweringNetwork, structure: Structure, parts: Parts) -> None:
    """Build a network as a file describes it, and fill it.

    Args:
        network: with the backbone, whose weights are overwritten; no task is learned yet.
        structure: as the file describes it.
        parts: as files hold them.

    Raises:
        CheckpointError: a size is none, or something is larger than all tensors of the parts together.
        ValueError: the parts do not belong together.
        RuntimeError: names or shapes are not those of the network.
    """
    state = assembled(structure, parts)
    held = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    rebuild(network, structure, state, spare=max(PADDING * held, SPARE_BYTES))
    own = network.state_dict()
    live = {
        f"{name}.{key}"
        for name, part in network.named_modules()
        if isinstance(part, TaskModule) and not isinstance(part, WeightBank)
        for key, _ in part.named_parameters(recurse=False)
    }
    bank = state.get(BANK + EXTRA, {"beginning": ()})
    wanted = {name: v for name, v in state.items() if name in own or name not in bank["beginning"]}
    bank_name = "head.bias_units.bank"
    if bank_name in wanted and isinstance(own.get(bank_name), Tensor):
        wanted[bank_name] = _widened(wanted[bank_name], own[bank_name].shape[1])
    network.load_state_dict({**{name: own[name] for name in live}, **wanted})


def _widened(rows: Tensor, width: int) -> Tensor:
    """Biases of the head's output units, 0 for those that came after a task."""
    if rows.dim() != 2 or rows.shape[1] > width:
        raise ValueError(f"biases of {rows.shape[1:]} output units of a head of {width}")
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
