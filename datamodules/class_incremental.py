"""Streams whose tasks are made of different classes of one data set."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from bpn_lightning.checks import check_positive_int
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.division import SamplesOfTasks
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.splitting import blur_boundaries, choose_classes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.tasks import Order, Task

__all__ = ["ClassIncrementalDataModule"]


@dataclass(eq=False, repr=False, kw_only=True)
class ClassIncrementalDataModule(ContinualDataModule):
    """A data set split by class: each task has the next ``classes_per_task`` classes of the order.

    The classes of a task use the columns of the head after those of the previous tasks, whatever their
    labels in the data set; classes beyond the last task are unused. In a domain-incremental stream, all
    tasks share the same columns. With blurry task boundaries, all tasks have all classes, each with its
    own column, and differ in the number of samples per class.

    Args:
        num_tasks: number of tasks; by default as many as the classes allow.
        classes_per_task: number of classes per task, one number for all tasks or a list with one number
            per task.
        class_order: the classes in the order of the tasks, by name or by index in the data set; classes
            that are not listed are unused. By default all classes in the data set's own order
            (alphabetical for folders).
        class_order_seed: shuffles the order with this seed; ``stream`` is the stream's own seed, so that each
            seed has an order of its own. By default it is not shuffled.
        domain_incremental: whether the j-th class of every task uses column j of the head; requires the
            module's mask ``shared``.
        blurry: fraction of each class's training samples that are moved to other tasks at random, in
            [0, 1); test samples are not moved. Above 0, requires the module's mask ``shared``.
    """

    num_tasks: int | None = None
    classes_per_task: int | list[int] = 2
    class_order: list[str | int] | None = None
    class_order_seed: int | Literal["stream"] | None = None
    domain_incremental: bool = False
    blurry: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.classes_per_task
        for size in sizes if isinstance(sizes, list) else [sizes]:
            check_positive_int("classes_per_task", size)
        if self.num_tasks is not None:
            check_positive_int("num_tasks", self.num_tasks)
            self.epochs_of(self.num_tasks)
        wanted = self.num_tasks or (len(sizes) if isinstance(sizes, list) else 0) or 1
        if isinstance(sizes, list) and len(sizes) != wanted:
            raise ConfigurationError(
                f"Expected classes_per_task to have one entry for each task, {wanted} in all, but got "
                f"{len(sizes)}. Give one number for all tasks, {wanted} of them, or another num_tasks."
            )
        if self.domain_incremental and isinstance(sizes, list) and len(set(sizes)) > 1:
            raise ConfigurationError(
                "Expected classes_per_task to be the same for all tasks in a domain-incremental stream, "
                f"whose tasks share their columns, but got {sizes}. Give one number, or set "
                "domain_incremental to false."
            )
        order_seed = self.class_order_seed
        if order_seed not in (None, "stream") and type(order_seed) is not int:
            raise ConfigurationError(
                "Expected class_order_seed to be a whole number, 'stream' or null, but got "
                f"{order_seed!r}. 'stream' shuffles the classes with the stream's own seed."
            )
        if not 0 <= self.blurry < 1 or (self.blurry and self.domain_incremental):
            raise ConfigurationError(
                "Expected blurry to be at least 0 and below 1, and 0 in a domain-incremental stream, but "
                f"got {self.blurry}. Use 0.1 to move a tenth of each class to other tasks."
            )

    @property
    def order(self) -> Order:
        """``seed`` where the stream's seed shuffles the classes."""
        return "seed" if self.class_order_seed == "stream" else "fixed"

    def tuning_arguments(self) -> dict[str, Any]:
        """Other classes, if the tasks leave enough of them; else the same ones in an order that the seed draws.

        Where a seed draws the order, every class that it may take counts as taken.
        """
        taken = {name for task in self.tasks for name in task.class_names}
        if self.class_order_seed is not None:
            every = choose_classes(self._class_names, self.class_order)
            taken = {self._class_names[place] for place in every}
        unused: list[str | int] = [name for name in self._class_names if name not in taken]
        sizes = self.classes_per_task
        wanted = sum(sizes) if isinstance(sizes, list) else sizes * len(self.tasks)
        if len(unused) < wanted:
            return {"class_order_seed": "stream"}
        arguments = {"class_order": unused, "class_order_seed": "stream"}
        return arguments | ({} if isinstance(sizes, list) else {"num_tasks": len(self.tasks)})

    def divide(self, data: ImageData) -> tuple[list[Task], list[list[int]], SamplesOfTasks | None]:
        """Split the ordered classes into tasks."""
        order_seed = self.seed if self.class_order_seed == "stream" else self.class_order_seed
        order = choose_classes(data.class_names, self.class_order, order_seed)
        sizes = self._sizes(data, order)
        ends = [*accumulate(sizes, initial=0)]
        classes = [order[first:stop] for first, stop in pairwise(ends)]
        if self.blurry:
            return self._blurred(data, classes)
        tasks = []
        for k, epochs in enumerate(self.epochs_of(len(sizes))):
            first = 0 if self.domain_incremental else ends[k]
            names = tuple(data.class_names[c] for c in classes[k])
            tasks.append(Task(k, (first, first + sizes[k]), names, epochs))
        return tasks, classes, None

    def _sizes(self, data: ImageData, order: list[int]) -> list[int]:
        """The number of classes of each task."""
        sizes, num_tasks = self.classes_per_task, self.num_tasks
        if isinstance(sizes, int):
            number = len(order) // sizes if num_tasks is None else num_tasks
            rule, got = "num_tasks * classes_per_task", f"{max(number, 1)} * {sizes}"
            sizes = [sizes] * number
        else:
            rule, got = (
                "the sum of classes_per_task",
                f"{' + '.join(map(str, sizes))} = {sum(sizes)}",
            )
        if not 0 < sum(sizes) <= len(order):
            where = f"the {len(order)} classes of {self.title} in {data.source}"
            if self.class_order is not None:
                where = f"the {len(order)} classes that class_order lists"
            remedy = "Lower one of the two" if "*" in got else "Lower some of them"
            raise ConfigurationError(
                f"Expected {rule} to be at most {where}, but got {got}. {remedy}, or add classes."
            )
        return sizes

    def _blurred(
        self, data: ImageData, classes: list[list[int]]
    ) -> tuple[list[Task], list[list[int]], SamplesOfTasks]:
        """Tasks with all classes, each with most samples of its own classes."""
        if len(classes) < 2:
            raise ConfigurationError(
                f"Expected two or more tasks where boundaries are blurry, but got {len(classes)}. Lower "
                "classes_per_task, or leave blurry out."
            )
        order = [one for of_task in classes for one in of_task]
        names = tuple(data.class_names[one] for one in order)
        epochs = self.epochs_of(len(classes))
        tasks = [Task(k, (0, len(order)), names, epochs[k]) for k in range(len(classes))]
        samples: SamplesOfTasks = {
            "train": blur_boundaries(data.train.labels, classes, self.blurry, self.seed),
            "test": blur_boundaries(data.test.labels, classes, 0.0, self.seed),
        }
        return tasks, [order] * len(classes), samples
