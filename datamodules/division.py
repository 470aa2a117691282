"""What `read` gave and what `divide` made of it, checked, and which samples are whose."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.tasks import Task

__all__ = ["Division", "SamplesOfTasks", "check_data", "columns_of_classes", "members_of_tasks"]

#: For "train" and "test" each, the samples of every task: ``(n,)`` int64, places in that part.
SamplesOfTasks = Mapping[Literal["train", "test"], Sequence[Tensor]]


class Division(NamedTuple):
    """The tasks of a stream, and what belongs to them.

    Attributes:
        tasks: in order.
        classes: for each task the data set's numbers of its classes, in the order of its columns.
        samples: for each task its samples, where they are not all those of its classes.
    """

    tasks: list[Task]
    classes: list[list[int]]
    samples: SamplesOfTasks | None = None


def check_data(data: ImageData) -> None:
    """Refuse data that no stream can be made of.

    Raises:
        DataError: labels are no classes or not one for each sample, inputs are of no known kind or not
            finite, or the parts differ.
    """
    for part, (inputs, labels) in (("training", data.train), ("test", data.test)):
        if labels.dim() != 1 or len(inputs) != len(labels):
            raise DataError(
                f"Expected one label for each of the {len(inputs)} {part} samples of {data.source}, but "
                f"got labels of shape {tuple(labels.shape)}. Let there be as many of both."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise DataError(
                f"Expected the {part} labels of {data.source} to be classes, whole numbers from 0, but "
                f"got {labels.dtype}. Numbers to be predicted are no classes: cut them into some, for "
                "example with torch.bucketize."
            )
        if labels.dtype != torch.int64:
            raise DataError(
                f"Expected the {part} labels of {data.source} to be int64, but got {labels.dtype}. Convert "
                "them with .long()."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(data.class_names):
            raise DataError(
                f"Expected the {part} labels of {data.source} to be places in its "
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
            f"{kinds[0]} and {kinds[1]}. Bring both to the same."
        )


def columns_of_classes(division: Division, class_names: Sequence[str]) -> Tensor:
    """Which column of the head each class has: ``(classes,)`` int64, -1 where no task has it.

    Raises:
        ConfigurationError: two tasks have a class in different columns.
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
    """Of the samples that take part, those of each task, in the order of the store.

    Tasks of the same samples share one tensor.

    Args:
        division: of the stream.
        part: which one.
        samples: of that part, labels as the data set numbers them.
        taking_part: ``(n,)`` bool.

    Raises:
        ConfigurationError: ``divide`` gave a task samples that are not there, or not of its classes.
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
                f"Expected divide to give task {task.id} places in the {len(samples.labels)} samples of "
                f"{part}, int64 and each once, but got {indices}. Give it (n,) whole numbers from 0."
            )
        if not bool(known[tuple(own_classes)][ordered].all()):
            raise ConfigurationError(
                f"Expected divide to give task {task.id} samples of its own classes ({task.name}), but "
                f"some of {part} are of others. Give the task all classes that its samples have."
            )
        members.append(ordered[taking_part[ordered]])
    return members
