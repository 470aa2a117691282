"""The files of a trained network, which hold numbers and words and no code.

::

    <folder>/
    ├── config.json          schema, network, structure without tasks, hashes, the run, gates, base
    ├── README.md            a model card
    ├── model.safetensors    weights that tasks share
    ├── front.safetensors    of a front, if there is one
    ├── gate.safetensors     what gates share over tasks, if there are any
    ├── accuracy.safetensors the accuracy matrix, as far as it is known
    ├── training_state/      what learning goes on from, if it was asked for
    └── tasks/<name>/
        ├── adapter_config.json       the task, its preparation, hashes, the base that it belongs to
        ├── adapter_model.safetensors biases, keys, adapters (in the layout of config.json), rows of the head
        └── gate.safetensors          rows of gates, if there are any

A task is one folder, and the folders are the table of tasks: one that is added or removed needs no change
elsewhere. Every file is read once, as far as it says, and its hash compared before it is parsed. Accuracies and what
gates share may be replaced: ``config.json`` then names files with their hashes in their names.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from bpn_lightning.errors import BPNLightningError, CheckpointError, ConfigurationError
from bpn_lightning.files.untrusted import is_inside, read_json
from bpn_lightning.files.writing import check_name, write_atomically
from bpn_lightning.modes.hashed import read_named, read_tensors, stamp_of, write_tensors
from bpn_lightning.modes.layout import layout_of, packed, unpacked
from bpn_lightning.nn.structure import Structure, check_schema, schema_fields
from bpn_lightning.nn.weights import digest_tensors
from bpn_lightning.preparation import Preparation
from bpn_lightning.tasks import Task

__all__ = [
    "ACCURACY",
    "CARD",
    "CONFIG",
    "FRONT",
    "GATE",
    "MODEL",
    "TASKS",
    "TASK_CONFIG",
    "Bundle",
    "TaskFiles",
    "check_task_name",
    "explained",
    "progress_of",
    "read_bundle",
    "read_task",
    "structure_of",
    "task_records",
    "with_task",
    "write_bundle",
    "write_task",
]

FORMAT, TASK_FORMAT = "bpn_lightning bundle", "bpn_lightning task"
CONFIG, CARD, TASKS = "config.json", "README.md", "tasks"
MODEL, FRONT, GATE, ACCURACY = (
    f"{name}.safetensors" for name in ("model", "front", "gate", "accuracy")
)
TASK_CONFIG, TASK_MODEL = "adapter_config.json", "adapter_model.safetensors"

MAX_TASKS = 10_000  # folders that one bundle may have
_BUNDLE = (
    "a bundle of bpn-export for this network",
    "Export it again, or pass its original backbone.",
)
_TASK = "the folder of a task", "Name tasks/NAME of a bundle with the same shared weights."
PROGRESS = ("learned", "open", "planned")


@dataclass(frozen=True)
class TaskFiles:
    """What one folder of ``tasks/`` holds.

    Args:
        name: of the folder.
        task: as its stream has it; its ID says its place in the table.
        preparation: of its raw inputs, that of the group of tasks that it is prepared with.
        within: its place in this group.
        progress: ``learned``, ``open`` (in training) or ``planned``.
        tensors: biases, keys, adapters and rows of the head, by ``<module>.<buffer>``.
        gates: by gate, what it holds of this task, and plain values.
        gate_tensors: tensors of ``gates``, by name.
        base: a hash of what all tasks share.
        stamp: name, inode, time and size of each file, before it was read.
    """

    name: str
    task: Task
    preparation: Preparation
    within: int = 0
    progress: str = "learned"
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Any] = field(default_factory=dict)
    gate_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    base: str = ""
    stamp: tuple[tuple[str, int, int, int], ...] = ()

    def record(self, common: Any = None) -> dict[str, Any]:
        """Task and preparation as plain values; without a preparation that is the common one."""
        preparation = {**self.preparation.record(), "tasks": 1}
        found: dict[str, Any] = {"task": asdict(self.task)}
        if preparation != common:
            found["preparation"] = preparation
        if self.within:
            found["within"] = self.within
        return {**found, **({} if self.progress == "learned" else {"progress": self.progress})}

    @classmethod
    def of_record(
        cls, name: str, record: Mapping[str, Any], common: Any, **parts: Any
    ) -> "TaskFiles":
        """The inverse of :meth:`record`.

        Raises:
            ValueError: it is none.
        """
        task, within = Task(**record["task"]), record.get("within", 0)
        progress = record.get("progress", "learned")
        first, stop = task.columns
        numbers = [task.id, first, stop, task.epochs, within]
        if not all(type(number) is int and 0 <= number < 2**24 for number in numbers):
            raise ValueError(f"a task of {record['task']!r:.120}")
        names = tuple(str(one) for one in task.class_names)
        if stop <= first or len(names) != stop - first or progress not in PROGRESS:
            raise ValueError(f"a task of {record!r:.120}")
        task = Task(task.id, (first, stop), names, task.epochs)
        preparation = Preparation.of_record(record.get("preparation", common))
        return cls(name, task, preparation, within, progress, **parts)


@dataclass
class Bundle:
    """A folder as it was read.

    Attributes:
        record: of ``config.json``.
        files: tensors of each file next to it, by the file's name.
        tasks: by the folder's name, in the order of their IDs.
    """

    record: dict[str, Any]
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tasks: dict[str, TaskFiles] = field(default_factory=dict)

    @property
    def progress(self) -> tuple[int, int]:
        """The tasks that were opened and closed last, -1 before the first."""
        opened = [t.task.id for t in self.tasks.values() if t.progress != "planned"]
        learned = [t.task.id for t in self.tasks.values() if t.progress == "learned"]
        gone = [one["task"]["id"] for one in self.record.get("forgotten", [])]
        return max([*opened, *gone], default=-1), max([*learned, *gone], default=-1)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the tensors that all tasks share."""
        return sum(value.nbytes for part in self.files.values() for value in part.values())

    @property
    def base(self) -> str:
        """A hash of what all tasks share: a task of another one answers something else."""
        digest = blake2b(digest_size=16)
        described = {name: self.record.get(name) for name in ("plain", "pretrained", "layout")}
        structure = {k: v for k, v in self.record["structure"].items() if k != "num_classes"}
        described["structure"] = structure
        digest.update(json.dumps(described, sort_keys=True).encode())
        tensors = self.files.get(MODEL, {})
        if self.record.get("spare") is not None:  # rows of the head that tasks to come take over
            tensors = {name: v for name, v in tensors.items() if not name.startswith("head.")}
        digest_tensors(digest.update, tensors)
        return digest.hexdigest()


# --- reading -------------------------------------------------------------------------------------


@contextmanager
def explained(folder: str | os.PathLike[str], task: bool = False) -> Iterator[None]:
    """Say in one way what is wrong with a bundle, or with the folder of a task."""
    expected, remedy = _TASK if task else _BUNDLE
    try:
        yield
    # A damaged or malicious file may raise any exception here.
    except Exception as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        kind = "" if isinstance(error, BPNLightningError) else f"{type(error).__name__}: "
        got = f"{kind}{said}. {remedy}"
        raise CheckpointError(f"Expected {folder} to be {expected}, but got {got}") from error


def read_bundle(folder: str | os.PathLike[str], before: Bundle | None = None) -> Bundle:
    """Read all files of a bundle.

    Args:
        folder: of the bundle.
        before: as it was read before, whose tasks are taken over where their files are the same by inode, time
            and size.

    Raises:
        OSError: a file is missing, or leads out of the folder.
        ValueError: a file is damaged, or not the one that its hash says.
        CheckpointError: the bundle is of another schema, or a task is of another base.
    """
    root = Path(folder)
    record = read_json(root / CONFIG, within=root)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{CONFIG} of format {_format(record)!r:.40}")
    check_schema(record, "a bundle")
    bundle = Bundle(record)
    for name, sums in record["files"].items():
        if name not in (MODEL, FRONT, GATE, ACCURACY):
            raise ValueError(f"a file {name!r:.40}, which no bundle has")
        bundle.files[name] = read_named(root, name, sums)
    if MODEL not in bundle.files:
        raise ValueError(f"no {MODEL}")
    base = bundle.base
    known = before.tasks if before is not None and before.record == record else {}
    found = []
    for place in _task_folders(root):
        try:
            one, stamp = known.get(place.name), stamp_of(place)
            if one is None or one.stamp != stamp:
                one = replace(read_task(place, record, root), stamp=stamp)
        except FileNotFoundError:
            if place.exists():
                raise
            continue  # removed in the meantime
        _check_base(one, base, record)
        found.append(one)
    found.sort(key=lambda one: one.task.id)
    for one, other in pairwise(found):
        if one.task.id == other.task.id:
            raise ValueError(
                f"tasks {one.name!r} and {other.name!r}, which are both number {one.task.id}"
            )
    bundle.tasks = {one.name: one for one in found}
    return bundle


def _format(record: Any) -> Any:
    return record.get("format") if isinstance(record, Mapping) else record


def _check_base(one: TaskFiles, base: str, record: Mapping[str, Any]) -> None:
    if one.base != base:
        raise CheckpointError(
            f"Expected task {one.name!r} to belong to the bundle's shared weights, with the hash {base}, but it "
            f"was written for those with {one.base:.32}. Take it from a bundle of the same base"
        )


def _task_folders(root: Path) -> list[Path]:
    places = []
    try:
        with os.scandir(root / TASKS) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_dir():
                    check_task_name(entry.name)
                    places.append(Path(entry.path))
                if len(places) > MAX_TASKS:
                    raise ValueError(f"more than {MAX_TASKS:,} folders in {TASKS}")
    except FileNotFoundError:
        return []
    return sorted(places)


def read_task(
    folder: str | os.PathLike[str], bundle: Mapping[str, Any], within: Path | None = None
) -> TaskFiles:
    """Read the folder of one task.

    Args:
        folder: with its files.
        bundle: record of the bundle that it is for: the layout of its rows, and the preparation of tasks that
            name none.
        within: a folder that has to contain them after links are resolved; None: the folder itself.

    Raises:
        OSError: a file is missing, or leads out of the folder.
        ValueError: a file is damaged, or not the one that its hash says.
    """
    place = Path(folder)
    root = place if within is None else within
    if not is_inside(root, place):
        raise OSError(f"{place} leads out of {root}")
    record = read_json(place / TASK_CONFIG, within=root)
    if not isinstance(record, dict) or record.get("format") != TASK_FORMAT:
        raise ValueError(f"{TASK_CONFIG} of {place.name!r:.80} of format {_format(record)!r:.40}")
    check_schema(record, f"task {place.name!r:.80}")
    tensors = {
        name: read_tensors(place / name, sums, root)
        for name, sums in record["files"].items()
        if name in (TASK_MODEL, GATE)
    }
    return TaskFiles.of_record(
        place.name,
        record,
        bundle["structure"]["preparation"],
        tensors=unpacked(tensors[TASK_MODEL], bundle["layout"]),
        gates=record.get("gates", {}),
        gate_tensors=tensors.get(GATE, {}),
        base=str(record["base"]),
    )


def structure_of(bundle: Bundle, compact: bool = False) -> Structure:
    """The structure that a bundle describes.

    Args:
        bundle: as it was read.
        compact: whether tasks are numbered anew from 0; else by their IDs, and those without a folder have
            to be listed as forgotten.

    Raises:
        CheckpointError: a field is missing, or a task is.
    """
    entries = [*bundle.tasks.values()]
    forgotten: list[int] = []
    described = dict(bundle.record["structure"])
    common = described.pop("preparation")
    if not compact:
        gone = [
            TaskFiles.of_record("", one, common, base="forgotten")
            for one in bundle.record.get("forgotten", [])
        ]
        there = {one.task.id for one in entries}  # one of them may have been put back
        gone = [one for one in gone if one.task.id not in there]
        entries = sorted([*entries, *gone], key=lambda one: one.task.id)
        forgotten = [one.task.id for one in entries if one.base == "forgotten"]
        ids = [one.task.id for one in entries]
        missing = next((n for n, found in enumerate(ids) if n != found), None)
        if missing is not None:
            raise CheckpointError(
                f"Expected a folder in {TASKS} for each task, but there is none of number {missing}. Put it "
                "back; bpn-bundle remove takes a task out for good"
            )
    tasks = [replace(one.task, id=n) for n, one in enumerate(entries)]
    widest = max((task.columns[1] for task in tasks), default=0)
    num_classes = described["num_classes"]
    if type(num_classes) is int:
        num_classes = max(num_classes, widest)
    return Structure.read(
        {
            **described,
            "tasks": [dict(vars(task)) for task in tasks],
            "num_classes": num_classes,
            "preparations": [one.record() for one in _grouped(entries)],
            "forgotten": forgotten,
        }
    )


def _grouped(entries: list[TaskFiles]) -> list[Preparation]:
    """Preparations of tasks one after another, of which those of a group are one."""
    found: list[Preparation] = []
    last: tuple[Preparation, int] | None = None
    for one in entries:
        own, before = one.preparation, last
        last = own, one.within
        if before is not None and (own, one.within) == (before[0], before[1] + 1):
            found[-1] = replace(found[-1], tasks=found[-1].tasks + 1)
        elif one.within and own.counts_tasks:
            found.append(replace(own, offset=own.offset + one.within))
        else:
            found.append(own)
    return found


def with_task(bundle: Bundle, one: TaskFiles) -> Bundle:
    """A bundle with one more task.

    Raises:
        CheckpointError: the task belongs to other shared weights.
        ConfigurationError: its name, its ID or its columns are taken, or gates would have to be fitted again.
    """
    check_task_name(one.name)
    _check_base(one, bundle.base, bundle.record)
    for name, other in bundle.tasks.items():
        a, b = one.task.columns, other.task.columns
        shared = bundle.record["structure"]["mask"] == "shared"
        taken = None
        if name == one.name:
            taken = f"the name {name!r}"
        elif other.task.id == one.task.id:
            taken = f"the ID {one.task.id}"
        elif not shared and a[0] < b[1] and b[0] < a[1]:
            taken = f"columns {a[0]} to {a[1] - 1} of the head"
        if taken:
            raise ConfigurationError(
                f"Expected task {one.name!r} to have a name, an ID and columns of its own, but {name!r} has "
                f"{taken}. Remove that one first, or learn the new task after it."
            )
    together = [gate["arguments"]["name"] for gate in bundle.record["gates"] if gate["together"]]
    if together:
        raise ConfigurationError(
            f"Expected a bundle whose gates have rows for each task alone, but those of {together[0]} are solved "
            "for all tasks together. Export the run again with the new task."
        )
    tasks = sorted([*bundle.tasks.values(), one], key=lambda each: each.task.id)
    return replace(bundle, tasks={each.name: each for each in tasks})


# --- writing -------------------------------------------------------------------------------------


def task_records(structure: Structure) -> list[TaskFiles]:
    """Each task with its preparation, and no tensors; in the order of their IDs."""
    found, tasks = [], iter(structure.tasks)
    for own in structure.preparations:
        for within in range(own.tasks):
            task = next(tasks)
            found.append(TaskFiles("", task, replace(own, tasks=1), within))
    return found


def progress_of(task: int, opened: int, closed: int) -> str:
    """How far a task is, of a network that has opened and closed tasks."""
    return "learned" if task <= closed else "open" if task <= opened else "planned"


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a bundle into a folder that nobody reads yet.

    Args:
        bundle: whose record lacks what is computed here: format, schema, hashes.
        folder: an empty one.
    """
    bundle.record = {"format": FORMAT, **schema_fields(), **bundle.record}
    sums = {name: write_tensors(folder / name, part) for name, part in bundle.files.items()}
    bundle.record["files"] = sums
    bundle.record["layout"] = layout_of([one.tensors for one in bundle.tasks.values()])
    base = bundle.base
    (folder / TASKS).mkdir()
    for name, one in bundle.tasks.items():
        write_task(replace(one, base=base), folder / TASKS / name, bundle.record)
    write_atomically(folder / CONFIG, json.dumps(bundle.record, indent=1).encode())


def write_task(one: TaskFiles, folder: Path, bundle: Mapping[str, Any]) -> None:
    """Write the folder of a task; it appears only when it is complete.

    Args:
        one: with its base.
        folder: a new one; its name is the task's.
        bundle: record of the bundle, whose layout and preparation are not repeated.

    Raises:
        ConfigurationError: the name is none of a folder, or is taken.
    """
    check_task_name(folder.name)
    temporary = folder.with_name(f".{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        tensors = packed(one.tensors, bundle["layout"])
        files = {TASK_MODEL: write_tensors(temporary / TASK_MODEL, tensors)}
        if one.gate_tensors:
            files[GATE] = write_tensors(temporary / GATE, one.gate_tensors)
        record = {
            "format": TASK_FORMAT,
            **schema_fields(),
            "base": one.base,
            **one.record(bundle["structure"]["preparation"]),
            **({"gates": one.gates} if one.gates else {}),
            "files": files,
        }
        write_atomically(
            temporary / TASK_CONFIG, json.dumps(record, separators=(",", ":")).encode()
        )
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_task_name(name: str) -> None:
    """Refuse a task's name that is none of a folder, or would be hidden.

    Raises:
        ConfigurationError: names the rule.
    """
    check_name("the name of a task", name)
    if name.startswith("."):
        raise ConfigurationError(
            f"Expected the name of a task not to begin with a dot, but got {name!r}. Choose another one."
        )
