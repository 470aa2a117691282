"""Streams whose tasks are made of different classes of one data set."""

from dataclasses import dataclass

from bpn_lightning.datamodules.base import ContinualDataModule, at_least_one
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.splitting import choose_classes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.tasks import Task

__all__ = ["ClassIncrementalDataModule"]


@dataclass(eq=False, repr=False, kw_only=True)
class ClassIncrementalDataModule(ContinualDataModule):
    """A data set that is split by class: task k has the k-th ``classes_per_task`` of the order.

    Task k's classes are the head's columns ``k * classes_per_task`` and up, whatever their labels
    in the data set; classes beyond the last task are left out. In a domain-incremental stream all
    tasks have the same columns, and the question is only which of its classes an image is.

    Args:
        num_tasks: how many tasks; by default as many as the classes make.
        classes_per_task: how many classes each task brings.
        class_order: the classes in the order of the tasks, each by its name or by its number in the
            data set; classes that are not listed are left out. By default all, in the data set's
            own order (alphabetical for folders).
        class_order_seed: shuffles that order, by a generator of its own; by default it is kept.
        domain_incremental: whether every task's j-th class is the head's column j; the module's mask
            is ``shared`` then.
    """

    num_tasks: int | None = None
    classes_per_task: int = 2
    class_order: list[str | int] | None = None
    class_order_seed: int | None = None
    domain_incremental: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("classes_per_task", self.classes_per_task)
        if self.num_tasks is not None:
            at_least_one("num_tasks", self.num_tasks)
            self.epochs_of(self.num_tasks)

    def divide(self, data: ImageData) -> tuple[list[Task], list[list[int]]]:
        """Cut the order of classes into tasks."""
        size = self.classes_per_task
        order = choose_classes(data.class_names, self.class_order, self.class_order_seed)
        num_tasks = len(order) // size if self.num_tasks is None else self.num_tasks
        if not 0 < num_tasks * size <= len(order):
            where = f"the {len(order)} classes of {self.title} in {data.source}"
            if self.class_order is not None:
                where = f"the {len(order)} classes that class_order lists"
            raise ConfigurationError(
                f"Expected num_tasks * classes_per_task to be at most {where}, but got "
                f"{max(num_tasks, 1)} * {size}. Lower one of the two, or add classes."
            )
        classes = [order[k * size : (k + 1) * size] for k in range(num_tasks)]
        tasks = []
        for k, epochs in enumerate(self.epochs_of(num_tasks)):
            first = 0 if self.domain_incremental else k * size
            names = tuple(data.class_names[c] for c in classes[k])
            tasks.append(Task(k, (first, first + size), names, epochs))
        return tasks, classes
