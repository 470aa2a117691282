"""Validation of the results of `read` and `divide`, and the samples of each task."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bpn_lightning.checks import check_choice
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.splitting import quoted_names
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.tasks import Split, Task

__all__ = [
    "Division",
    "SamplesOfTasks",
    "check_data",
    "check_held_out",
    "columns_of_classes",
    "members_of_tasks",
    "refuse_empty_classes",
    "refuse_empty_tasks",
]

#: For "train" and "test", the indices of each task's samples in that part: ``(n,)`` int64.
SamplesOfTasks = Mapping[Literal["train", "test"], Sequence[Tensor]]


class Division(NamedTuple):
    """The tasks of a stream, with their classes and samples.

    Attributes:
        tasks: in order.
        classes: for each task, the indices of its classes in the data set, in the order of its columns.
        samples: the samples of each task, if not all those of its classes.
    """

    tasks: list[Task]
    classes: list[list[int]]
    samples: SamplesOfTasks | None = None


def check_data(data: ImageData) -> None:
    """Refuse data that cannot form a stream.

    Raises:
        DataError: labels are not class indices, there is not one label per sample, inputs have an
            unsupported dtype or are not finite, or training and test inputs differ in dtype or shape.
    """
    for part, (inputs, labels) in (("training", data.train), ("test", data.test)):
        if labels.dim() != 1 or len(inputs) != len(labels):
            raise DataError(
                f"Expected one label for each of the {len(inputs)} {part} samples of {data.source}, but "
                f"got labels of shape {tuple(labels.shape)}. Provide one label per sample."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise DataError(
                f"Expected the {part} labels of {data.source} to be classes, whole numbers from 0, but "
                f"got {labels.dtype}. Regression targets are not classes: discretize them, for "
                "example with torch.bucketize."
            )
        if labels.dtype != torch.int64:
            raise DataError(
                f"Expected the {part} labels of {data.source} to be int64, but got {labels.dtype}. Convert "
                "them with .long()."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(data.class_names):
            raise DataError(
                f"Expected the {part} labels of {data.source} to be indices into its "
                f"{len(data.class_names)} class names, but got {int(labels.min())} to "
                f"{int(labels.max())}. Number the classes from 0."
            )
        if not inputs.is_floating_point() and inputs.dtype not in (torch.uint8, torch.int64):
            raise DataError(
                f"Expected the {part} inputs of {data.source} to be images as uint8, features as floats "
                f"or tokens as int64, but got {inputs.dtype}. Convert them to one of these."
            )
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            raise DataError(
                f"Expected the {part} features of {data.source} to be finite, but some are not. Fill in "
                "or leave out what is missing."
            )
    kinds = [(samples.images.dtype, tuple(samples.images.shape[1:])) for samples in data[:2]]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"Expected training and test inputs of {data.source} to be of one dtype and shape, but got "
            f"{kinds[0]} and {kinds[1]}. Convert both to the same."
        )


def check_held_out(fraction: float, evaluation_split: str, holds_out: bool = False) -> None:
    """Refuse a held-out part that cannot be, or that is to be evaluated and is empty.

    Args:
        fraction: of each class's training samples.
        evaluation_split: ``test`` or ``val``.
        holds_out: whether the data set itself holds some out.

    Raises:
        ConfigurationError: names the argument.
    """
    if not 0 <= fraction < 1:
        raise ConfigurationError(
            "Expected validation_fraction to be at least 0 and below 1, but got "
            f"{fraction}. Use 0 for no validation part, 0.1 for a tenth."
        )
    check_choice("evaluation_split", evaluation_split, ("test", "val"))
    if holds_out and fraction:
        raise ConfigurationError(
            f"Expected validation_fraction to be 0 where the data set's own validation part is used, but got {fraction}. "
            "Leave one of the two out."
        )
    if evaluation_split == "val" and not (fraction or holds_out):
        raise ConfigurationError(
            "Expected validation_fraction to be above 0 where evaluation_split is val, but got 0. Hold out "
            "a tenth with 0.1, or leave evaluation_split out."
        )


def columns_of_classes(division: Division, class_names: Sequence[str]) -> Tensor:
    """The column of the head for each class: ``(classes,)`` int64, -1 for unused classes.

    Raises:
        ConfigurationError: two tasks use different columns for the same class.
    """
    columns = torch.full((len(class_names),), -1)
    for task, of_task in zip(division.tasks, division.classes, strict=True):
        own = torch.arange(*task.columns)
        before = columns[of_task]
        odd = ((before >= 0) & (before != own)).nonzero().flatten().tolist()
        if odd:
            raise ConfigurationError(
                "Expected divide to give a class the same column of the head in every task, but got "
                f"{int(before[odd[0]])} and {int(own[odd[0]])} for {class_names[of_task[odd[0]]]!r}. "
                "Let tasks that share a class share its column."
            )
        columns[of_task] = own
    return columns


def members_of_tasks(
    division: Division, part: Literal["train", "test"], samples: Samples, taking_part: Tensor
) -> list[Tensor]:
    """Indices of the selected samples of each task, in ascending order.

    Tasks with the same samples share one tensor.

    Args:
        division: the tasks of the stream.
        part: "train" or "test".
        samples: the samples of that part, with labels as in the data set.
        taking_part: ``(n,)`` bool, the selected samples.

    Raises:
        ConfigurationError: ``divide`` returned indices out of range, or samples of other classes.
    """
    known: dict[tuple[int, ...], Tensor] = {}
    for of_task in map(tuple, division.classes):
        if of_task not in known:
            known[of_task] = torch.isin(samples.labels, torch.tensor(of_task))
    if division.samples is None:
        chosen = {key: (taking_part & own).nonzero().flatten() for key, own in known.items()}
        return [chosen[tuple(of_task)] for of_task in division.classes]
    members = []
    given = zip(division.tasks, division.classes, division.samples[part], strict=True)
    for task, own_classes, indices in given:
        ordered = torch.as_tensor(indices).sort().values
        valid = ordered.dtype == torch.int64 and ordered.dim() == 1
        if (
            not valid
            or (len(ordered) and not 0 <= int(ordered[0]) <= int(ordered[-1]) < len(samples.labels))
            or bool((ordered[1:] == ordered[:-1]).any())
        ):
            raise ConfigurationError(
                f"Expected divide to give task {task.id} indices into the {len(samples.labels)} samples of "
                f"{part}, int64 and each once, but got {indices}. Return (n,) whole numbers from 0."
            )
        if not bool(known[tuple(own_classes)][ordered].all()):
            raise ConfigurationError(
                f"Expected divide to give task {task.id} samples of its own classes ({task.name}), but "
                f"some of {part} are of others. Add all classes of its samples to the task."
            )
        members.append(ordered[taking_part[ordered]])
    return members


_PART_NAMES: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}


def refuse_empty_classes(
    tasks: Sequence[Task], samples: Samples, members: Sequence[Tensor], split: Split, source: str
) -> None:
    """Refuse a class of a task that has no samples.

    Args:
        tasks: of the stream.
        samples: of the split, with columns of the head as labels.
        members: the indices of each task's samples.
        split: named in the message.
        source: of the data, named in the message.

    Raises:
        DataError: names the classes.
    """
    checked = set()
    for task, indices in zip(tasks, members, strict=True):
        if (key := (id(indices), task.columns)) in checked:  # same samples as before
            continue
        checked.add(key)
        found = torch.unique(samples.labels[indices]).tolist()
        empty = [
            name
            for column, name in enumerate(task.class_names, task.columns[0])
            if column not in found
        ]
        if empty:
            what = "images" if samples.images.dtype == torch.uint8 else "samples"
            raise DataError(
                f"Expected every class of the stream to have {_PART_NAMES[split]} {what} in "
                f"{source}, but got none of {quoted_names(empty)}. Add {what}, or leave the class out "
                "with class_order."
            )


def refuse_empty_tasks(
    tasks: Sequence[Task], samples: Samples, members: Sequence[Tensor], split: Split, source: str
) -> None:
    """Refuse a task without samples; the arguments are those of :func:`refuse_empty_classes`.

    Raises:
        DataError: names the task.
    """
    for task, indices in zip(tasks, members, strict=True):
        if not len(indices):
            raise DataError(
                f"Expected every task to have {_PART_NAMES[split]} samples of {source}, but got none "
                f"for task {task.id}. Let divide give it some, or make fewer tasks."
            )
