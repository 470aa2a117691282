"""What a module consists of besides its backbone: one record, which checkpoints and exports share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate
from typing import Any, get_args

import torch

from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.nn.common_normalization import CommonNormalization
from bpn_lightning.preparation import Preparation, differing_preparation, read_preparations
from bpn_lightning.tasks import Mask, Task, named_dtype

__all__ = [
    "SCHEMA",
    "Attachment",
    "FrontRecord",
    "Structure",
    "check_mask",
    "check_schema",
    "schema_fields",
]

SCHEMA = 3
"""Of checkpoints and exports. Goes up when a field is renamed, removed or changes its meaning."""

ATTACHMENTS: Mapping[str, Mapping[str, type]] = {
    "bias_units": {"layer": str, "rank": int},
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


@dataclass(frozen=True)
class Attachment:
    """What a strategy has given to a network.

    Args:
        part: ``bias_units``, ``keys`` or ``weight_bank``.
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
        if not fits or any(not 0 < size < MAX_ARGUMENT for size in sizes):
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
            return 0, max(one.columns[1] for one in self.tasks[: opened + 1])
        return 0, self.num_classes

    def column_sets(self) -> set[tuple[int, int]]:
        """Every set of output units that a loss will be of."""
        if self.mask == "task":
            return {task.columns for task in self.tasks}
        if self.mask == "seen":
            return {(0, stop) for stop in accumulate((t.columns[1] for t in self.tasks), max)}
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
                "stream."
            )

    def set_preparations(self, found: Sequence[Preparation]) -> None:
        """Take how a stream prepares inputs, or refuse another way than the one that was learned.

        Raises:
            ConfigurationError: the two differ.
        """
        different = (
            differing_preparation(self.preparations, list(found)) if self.preparations else None
        )
        if different:
            raise ConfigurationError(
                "Expected the stream to prepare its inputs as the one that this module was built for, "
                f"{different[0]}, but got {different[1]}. Give it the data and the seed of that stream; "
                "module.predict takes other images."
            )
        self.preparations = self.preparations or list(found)

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
