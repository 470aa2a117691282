"""What a module consists of besides its backbone: one record, which checkpoints and exports share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate
from typing import Any, get_args

import torch
from torch import Tensor

from bpn_lightning.checks import check_positive_int
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.nn.common_normalization import CommonNormalization
from bpn_lightning.preparation import (
    Preparation,
    differing_preparation,
    first_preparations,
    read_preparations,
)
from bpn_lightning.tasks import Mask, Task, named_dtype

__all__ = [
    "SCHEMA",
    "Attachment",
    "FrontRecord",
    "Structure",
    "check_mask",
    "check_reserved",
    "check_schema",
    "schema_fields",
]

SCHEMA = 3
"""Of checkpoints and exports. Goes up when a field is renamed, removed or changes its meaning."""

MOST_RESERVED = 1_000_000
"""Classes that a head may be given room for."""

ATTACHMENTS: Mapping[str, Mapping[str, type]] = {
    "bias_units": {"layer": str, "rank": int},
    "scales": {"layer": str},
    "low_rank": {"layer": str, "rank": int},
    "prompts": {"layer": str, "tokens": int, "place": str},
    "keys": {"layer": str, "kind": str},
    "weight_bank": {},
}
"""Parts that a network may have besides backbone and head, and the arguments of ``attach_<part>``."""

MAX_ARGUMENT = 2**20


def schema_fields() -> dict[str, Any]:
    """The fields by which a file says how it is to be read, and by which version it was written."""
    return {"schema": SCHEMA, "bpn_lightning": version("bpn_lightning")}


def check_schema(record: Mapping[str, Any], what: str) -> None:
    """Refuse a record whose fields mean something else.

    Args:
        record: with the fields of :func:`schema_fields`; without them it is older than they are.
        what: the kind of file, for the message.

    Raises:
        CheckpointError: the record is of a newer or an older schema; names the version that wrote it.
    """
    schema = record.get("schema", 1)
    if type(schema) is int and schema == SCHEMA:
        return
    writer = record.get("bpn_lightning", "0.1.0")
    remedy = (
        f"Use bpn_lightning {writer:.20} for it" if isinstance(writer, str) else "Use another one"
    )
    newer = type(schema) is int and schema > SCHEMA
    raise CheckpointError(
        f"Expected {what} of schema {SCHEMA}, but got schema {schema!r:.20}, written by bpn_lightning "
        f"{writer!s:.20}. {remedy}{', or a newer one' if newer else ', or train again'}."
    )


def check_mask(mask: Any) -> Mask:
    """The mask, if it is one.

    Raises:
        ConfigurationError: it is none.
    """
    masks: tuple[Mask, ...] = get_args(Mask)
    if mask not in masks:
        raise ConfigurationError(
            f"Expected mask to be one of {', '.join(masks)}, but got {mask!r}."
        )
    return masks[masks.index(mask)]


def check_reserved(reserve_classes: int | None, mask: Mask) -> None:
    """Refuse reserved classes where they take no part.

    Raises:
        ConfigurationError: they are no whole number of at least 1, or the mask is not ``all``.
    """
    if reserve_classes is None:
        return
    check_positive_int("reserve_classes", reserve_classes, "Leave it out for none.")
    if reserve_classes > MOST_RESERVED:
        raise ConfigurationError(
            f"Expected reserve_classes to be at most {MOST_RESERVED}, but got {reserve_classes}. Each has a "
            "row of the head from the start."
        )
    if mask != "all":
        raise ConfigurationError(
            f"Expected reserve_classes to be left out with mask {mask!r}, where classes take part from "
            f"their task on, but got {reserve_classes}. Leave it out, or set mask to 'all'."
        )


@dataclass(frozen=True)
class Attachment:
    """What a strategy has given to a network.

    Args:
        part: ``bias_units``, ``scales``, ``low_rank``, ``prompts``, ``keys`` or ``weight_bank``.
        arguments: of the network's method ``attach_<part>``, by name.
    """

    part: str
    arguments: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """Part and arguments, as plain values."""
        return {"part": self.part, **self.arguments}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Attachment":
        """The inverse of :meth:`record`.

        Raises:
            CheckpointError: there is no such part, or an argument is of another name, type or size.
        """
        part, arguments = record["part"], {k: v for k, v in record.items() if k != "part"}
        types = ATTACHMENTS.get(part)
        fits = types is not None and {k: type(v) for k, v in arguments.items()} == types
        sizes = [value for value in arguments.values() if isinstance(value, int)]
        least = 0 if part == "bias_units" else 1  # a bias of rank 0 has no factorization
        if not fits or any(not least <= size < MAX_ARGUMENT for size in sizes):
            raise CheckpointError(
                f"Expected an attachment to be one of {', '.join(ATTACHMENTS)} with its arguments, but "
                f"got {dict(record)!r:.120}. The file is damaged or made up."
            )
        return cls(part, arguments)


@dataclass(frozen=True)
class FrontRecord:
    """What stands before a network.

    Args:
        kind: its registered name, or the import path of its class, which no file is asked to import.
        arguments: of the class, and the shape of its inputs, as plain values.
        fingerprint: a hash of these and of all that was fitted or loaded.
    """

    kind: str
    arguments: Mapping[str, Any]
    fingerprint: str

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "FrontRecord":
        """The inverse of ``dataclasses.asdict``; arguments are checked by the class that takes them.

        Raises:
            TypeError: it is none.
            KeyError: the shape of its inputs is missing.
        """
        made = cls(**record)
        made.arguments["input_shape"]
        return cls(str(made.kind), made.arguments, str(made.fingerprint))


@dataclass
class Structure:
    """The structure of a module: what its head, its tasks and its layers are.

    Args:
        mask: the output units of the head that take part.
        tasks: of the stream, in order; empty before the module knows its stream.
        num_classes: output units of the head.
        input_shape: of one prepared input.
        input_dtype: of prepared inputs.
        preparations: how each task's inputs are prepared, in order; or one for all.
        attached: in the order in which it was attached.
        front: what stands before the network; None before it is fitted, and where there is none.
        forgotten: IDs of the tasks that were forgotten, ascending.
    """

    mask: Mask
    tasks: list[Task] = field(default_factory=list)
    num_classes: int = 0
    input_shape: tuple[int, ...] = ()
    input_dtype: torch.dtype = torch.float32
    preparations: list[Preparation] = field(default_factory=list)
    attached: list[Attachment] = field(default_factory=list)
    front: FrontRecord | None = None
    forgotten: list[int] = field(default_factory=list)

    @property
    def forgotten_columns(self) -> list[int]:
        """The head's output units that only forgotten tasks have; they take part in no answer."""
        if not self.forgotten:
            return []
        forgotten = set(self.forgotten)
        gone, kept = (
            {c for t in self.tasks if (t.id in forgotten) == which for c in range(*t.columns)}
            for which in (True, False)
        )
        return sorted(gone - kept)

    def freed_columns(self, task: int) -> slice:
        """Those of a forgotten task that no other task has: all of its own, or none."""
        first, stop = self.tasks[task].columns
        return slice(first, stop if first in self.forgotten_columns else first)

    def known(self, tasks: Iterable[int]) -> list[int]:
        """Those of some tasks that are not forgotten."""
        forgotten = set(self.forgotten)
        return [task for task in tasks if task not in forgotten]

    _ends: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _ends_of: list[Task] | None = field(default=None, init=False, repr=False, compare=False)

    def columns(self, task: int, opened: int) -> tuple[int, int]:
        """``(start, stop)`` of the head's output units that take part in a task's mode.

        Args:
            task: whose mode.
            opened: the task that was opened last. With the mask ``seen`` the units are those of the tasks
                opened so far, in every mode: following the mode would use the task ID.
        """
        if self.mask == "task":
            return self.tasks[task].columns
        if self.mask == "seen" and opened >= 0:
            return 0, self._column_ends()[opened]
        return 0, self.num_classes

    def open_columns(self, mode: int, opened: int) -> int:
        """How many of the head's output units are computed, from the first on.

        All with the masks ``all`` and ``shared``; else those of the tasks opened so far. The others are
        -inf, so that nothing depends on how many tasks there will be.

        Args:
            mode: the task whose mode it is; with the mask ``task`` one that is not opened yet has its
                units too.
            opened: the task that was opened last.
        """
        last = max(opened, mode) if self.mask == "task" else opened
        if self.mask not in ("seen", "task") or last < 0:
            return self.num_classes
        return self._column_ends()[last]

    def _column_ends(self) -> list[int]:
        """How many columns each task and those before it have; kept, as modes are switched often."""
        if self._ends_of is not self.tasks:
            self._ends_of = self.tasks
            self._ends = [*accumulate((task.columns[1] for task in self.tasks), max)]
        return self._ends

    def check_task_ids(self, task: "int | Tensor") -> None:
        """Refuse what is no task ID of the stream.

        Raises:
            ConfigurationError: it is none, of the wrong shape, or forgotten.
        """
        if isinstance(task, Tensor) and torch.compiler.is_compiling():
            raise ConfigurationError(
                "Expected task to be a number where the module itself is exported, but got a tensor, "
                "whose values are not known then. Export module.for_inference()."
            )
        if isinstance(task, Tensor) and task.dim() != 1:
            raise ConfigurationError(
                f"Expected task to be a number or (batch,) numbers, but got {task.dim()} dimensions."
            )
        ids = set(task.tolist()) if isinstance(task, Tensor) else {task}
        for one in ids:
            if not 0 <= one < len(self.tasks):
                raise ConfigurationError(
                    f"Expected task to be an id from 0 to {len(self.tasks) - 1}, but got {one}."
                )
            if one in self.forgotten:
                raise ConfigurationError(
                    f"Expected task to be one that is known, but got {one}, which was forgotten: its mode "
                    "and its rows of the head are overwritten. Name another task."
                )

    def column_sets(self) -> set[tuple[int, int]]:
        """Every set of output units that a loss will be of."""
        if self.mask == "task":
            return {task.columns for task in self.tasks}
        if self.mask == "seen":
            return {(0, stop) for stop in self._column_ends()}
        return {(0, self.num_classes)}

    def check_mask_fits(self, tasks: Sequence[Task]) -> None:
        """Refuse a stream whose classes are others than the mask says.

        Raises:
            ConfigurationError: names the masks that fit.
        """
        shared = len({task.columns for task in tasks}) == 1
        if len(tasks) > 1 and shared != (self.mask == "shared"):
            wanted, why = "'all', 'seen' or 'task'", "brings new classes with every task"
            if shared:
                wanted, why = "'shared'", "has the same classes in every task"
            raise ConfigurationError(
                f"Expected mask to be {wanted} for a stream that {why}, but got {self.mask!r}. Set "
                "model.mask, or choose another stream."
            )

    @property
    def reserved_classes(self) -> int:
        """Output units of the head, if more than the tasks have columns; else 0."""
        used = max((task.columns[1] for task in self.tasks), default=0)
        return self.num_classes if self.num_classes > used else 0

    def with_reserved(self, num_classes: int, reserve_classes: int | None) -> int:
        """Output units of a head for so many classes, and for those that are reserved.

        Raises:
            ConfigurationError: fewer are reserved than there are classes.
        """
        if reserve_classes and num_classes > reserve_classes:
            raise ConfigurationError(
                f"Expected reserve_classes to be at least the {num_classes} classes of the stream, but got "
                f"{reserve_classes}. Raise it, or leave it out."
            )
        return max(num_classes, reserve_classes or 0, self.reserved_classes)

    def resting_task(self, opened: int) -> int:
        """The task whose mode holds outside of a fit: the one opened last, or the nearest that is known."""
        last = max(opened, 0)
        if last not in self.forgotten:
            return last
        known = self.known(range(len(self.tasks)))
        return max((task for task in known if task < last), default=min(known, default=last))

    def is_continued_by(self, tasks: Sequence[Task], closed: int) -> bool:
        """Whether a stream begins with these tasks, all of which are learned, and has more.

        Args:
            tasks: of the stream.
            closed: the last task that is learned.

        Raises:
            ConfigurationError: it has more tasks, but other ones than those that are learned.
        """
        learned = self.tasks
        if len(tasks) <= len(learned) or closed + 1 < len(learned):
            return False
        for own, other in zip(learned, tasks, strict=False):
            if own != other:
                raise ConfigurationError(
                    f"Expected the stream to begin with the {len(learned)} tasks that are learned, but its "
                    f"task {own.id} is {_described(other)}, not {_described(own)}. Give it these tasks "
                    "as they were, and new ones after them; module.extend takes a stream of the new ones."
                )
        return True

    def check_stream(
        self, tasks: Sequence[Task], num_classes: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Refuse a stream of other sizes than this structure was built for.

        Raises:
            ConfigurationError: the two differ.
        """
        built = (len(self.tasks), self.num_classes, self.input_shape, self.input_dtype)
        wanted = (len(tasks), num_classes, shape, dtype)
        if built != wanted:
            raise ConfigurationError(
                "Expected the stream that this module was built for, with (tasks, classes, input "
                f"shape, input dtype) of {built}, but got {wanted}. Make a new module for another "
                "stream; module.extend continues with new tasks after those learned."
            )

    def set_preparations(self, found: Sequence[Preparation]) -> None:
        """Take how a stream prepares inputs, or refuse another way than the one that was learned.

        Raises:
            ConfigurationError: the two differ.
        """
        before, sizes = (
            self.preparations,
            [sum(one.tasks for one in p) for p in (self.preparations, found)],
        )
        if before and sizes[0] < sizes[1]:  # of a stream that goes on
            found, whole = first_preparations(found, sizes[0]), list(found)
            before = first_preparations(before, sizes[0])
        else:
            whole = before or list(found)
        different = differing_preparation(before, list(found)) if before else None
        if different:
            raise ConfigurationError(
                "Expected the stream to prepare its inputs as the one that this module was built for, "
                f"{different[0]}, but got {different[1]}. Give it the data and the seed of that stream; "
                "module.predict takes other images."
            )
        self.preparations = whole
        self.__dict__.pop("common_normalization", None)  # of the tasks before

    @cached_property
    def common_normalization(self) -> CommonNormalization:
        """What gates and fronts see of the inputs; only once it is known how these are prepared."""
        return CommonNormalization(self.preparations)

    def record(self) -> dict[str, Any]:
        """The structure as names and plain values."""
        return {
            "mask": self.mask,
            "tasks": [asdict(task) for task in self.tasks],
            "num_classes": self.num_classes,
            "input_shape": list(self.input_shape),
            "input_dtype": str(self.input_dtype),
            "preparations": [one.record() for one in self.preparations],
            "attached": [one.record() for one in self.attached],
            "front": None if self.front is None else asdict(self.front),
            "forgotten": list(self.forgotten),
        }

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Structure":
        """The inverse of :meth:`record`; sizes are checked when something is built of them.

        Raises:
            CheckpointError: a field is missing, or is not what it has to be.
        """
        try:
            tasks = _read_tasks(record["tasks"])
            return cls(
                mask=check_mask(record["mask"]),
                tasks=tasks,
                num_classes=record["num_classes"],
                input_shape=tuple(record["input_shape"]),
                input_dtype=named_dtype(record["input_dtype"]),
                preparations=read_preparations(record["preparations"], len(tasks)),
                attached=[Attachment.read(one) for one in record["attached"]],
                front=FrontRecord.read(record["front"]) if record.get("front") else None,
                forgotten=_read_forgotten(record.get("forgotten", []), len(tasks)),
            )
        except (CheckpointError, ConfigurationError):
            raise
        # A damaged record, or one that somebody made up, may raise any exception here.
        except Exception as error:
            raise CheckpointError(
                f"Expected the structure of a module, but got {type(error).__name__}: {error!s:.200}. "
                "The file is damaged or made up."
            ) from error


def _read_forgotten(record: Any, tasks: int) -> list[int]:
    forgotten = [int(task) for task in record]
    if forgotten != sorted(set(forgotten)) or not set(forgotten) <= set(range(tasks)):
        raise ValueError(f"forgotten tasks {record!r:.80} of {tasks}")
    return forgotten


def _described(task: Task) -> str:
    return (
        f"({task.name} in columns {task.columns[0]} to {task.columns[1] - 1}, {task.epochs} epochs)"
    )


def _read_tasks(records: Iterable[Mapping[str, Any]]) -> list[Task]:
    tasks = []
    for record in records:
        task = Task(**record)
        first, stop = task.columns
        names = tuple(str(name) for name in task.class_names)
        tasks.append(Task(int(task.id), (first, stop), names, int(task.epochs)))
    if not tasks:
        raise ValueError("no tasks")
    return tasks
