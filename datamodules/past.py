"""Streams that go on where another one ended: the numbers of their tasks and columns follow its own."""

from collections.abc import Sequence
from dataclasses import replace

import lightning as L
import torch

from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.datamodules.splitting import quoted_names
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.preparation import Preparation, prepare_raw
from bpn_lightning.tasks import Batch, Past, Task

__all__ = ["ContinuedStream"]


class ContinuedStream(L.LightningDataModule):
    """What a stream has of one that was learned before it: a record, and possibly its data.

    Attributes:
        tasks: those of the past, then its own, after ``setup``.
    """

    tasks: list[Task]

    _past: Past | None = None
    _past_data: "ContinuedStream | None" = None
    _past_alike = True  # whether the past's inputs were prepared as its own

    def continue_from(self, past: Past, past_data: "ContinuedStream | None" = None) -> None:
        """Let the tasks follow those of a stream that was learned.

        Numbers of tasks and columns, and all that is drawn by them, continue from the past's; so does its seed,
        unless another is given, and its normalization.

        Args:
            past: what is known of it.
            past_data: the stream itself, or one with the same tasks, to measure accuracies on its tasks;
                None leaves them unmeasured. Nothing is trained on it.
        """
        if past.learned < len(past.tasks):
            raise ConfigurationError(
                f"Expected a run that has learned its {len(past.tasks)} tasks before it continues with new "
                f"ones, but got one that stopped after {past.learned}. Resume it with its own stream first."
            )
        before: ContinuedStream | None = past_data
        while before is not None:
            if before is self:
                raise ConfigurationError(
                    "Expected past_data to be another stream than the one that goes on, but got that one. "
                    "Make a second stream, of the tasks that are learned."
                )
            before = before._past_data
        self._past, self._past_data = past, past_data
        self._forget_setup()

    def _forget_setup(self) -> None:
        raise NotImplementedError

    @property
    def first_task(self) -> int:
        """The first task that is its own; those before it are the past's."""
        return 0 if self._past is None else len(self._past.tasks)

    @property
    def first_column(self) -> int:
        """The column of its own first class."""
        return 0 if self._past is None else self._past.first_column

    def has_data(self, task_id: int) -> bool:
        """Whether there are samples of a task to measure its accuracy."""
        return task_id >= self.first_task or self._past_data is not None

    def _set_up_past_data(self) -> None:
        past, data = self._past, self._past_data
        if past is None or data is None:
            return
        data.setup("fit")
        learned, given = (
            [replace(task, epochs=0) for task in tasks] for tasks in (past.tasks, data.tasks)
        )
        if given != learned:
            odd = next((task for task in given if task not in learned), given[-1])
            raise ConfigurationError(
                f"Expected past_data to be a stream of the {len(learned)} tasks that are learned, but got "
                f"{len(given)} with task {odd.id} of the classes {quoted_names(odd.class_names)} in the "
                f"columns from {odd.columns[0]} on. Pass the stream that was learned."
            )

    def _after_past(self, tasks: Sequence[Task]) -> list[Task]:
        """The past's tasks, then these."""
        past = self._past
        if past is None:
            return list(tasks)
        if past.shared:
            self._check_same_columns(past, tasks)
        else:
            self._check_new_classes(past, tasks)
        first, column = self.first_task, self.first_column
        return [
            *past.tasks,
            *(
                replace(
                    task,
                    id=first + task.id,
                    columns=(task.columns[0] + column, task.columns[1] + column),
                )
                for task in tasks
            ),
        ]

    @staticmethod
    def _check_same_columns(past: Past, tasks: Sequence[Task]) -> None:
        odd = next((task for task in tasks if task.columns != past.tasks[0].columns), None)
        if odd is not None:
            raise ConfigurationError(
                f"Expected new tasks of the {past.tasks[0].num_classes} columns that all learned tasks share, "
                f"but task {odd.id} ({odd.name}) has columns {odd.columns[0]} to {odd.columns[1] - 1}. Make "
                "the stream domain-incremental, with as many classes in each task."
            )

    @staticmethod
    def _check_new_classes(past: Past, tasks: Sequence[Task]) -> None:
        known = {name: task.id for task in past.tasks for name in task.class_names}
        for task in tasks:
            for name in task.class_names:
                if name in known:
                    raise ConfigurationError(
                        f"Expected new classes after those that are learned, but {name!r} is one of task "
                        f"{known[name]} already. Leave it out with class_order. More data of known classes "
                        "are a domain-incremental task: that needs a module with mask='shared'."
                    )

    def _past_normalization(self) -> ChannelStats | None:
        """Mean and deviation of the first task that was learned; None where it has none."""
        steps = self._past.preparations[0].steps if self._past is not None else None
        found = next((step for step in steps or () if step[0] == "normalize"), None)
        return None if found is None else ChannelStats(tuple(found[1]), tuple(found[2]))

    def _with_past(self, own: Preparation) -> list[Preparation]:
        """How the past's tasks were prepared, then its own; one where both are alike."""
        if self._past is None:
            return [own]
        before = self._past.preparations
        last = before[-1]
        if (last.dtype, last.shape) != (own.dtype, own.shape):
            raise ConfigurationError(
                f"Expected raw inputs as those of the learned tasks, {last.dtype} of shape {last.shape}, but "
                f"got {own.dtype} of shape {own.shape}. Give the stream data of that kind."
            )
        if own.counts_tasks:
            own = replace(own, offset=self.first_task)
        follows = not own.counts_tasks or last.offset + last.tasks == own.offset
        if follows and replace(last, tasks=own.tasks, offset=own.offset) == own:
            return [*before[:-1], replace(last, tasks=last.tasks + own.tasks)]
        return [*before, own]

    def _prepared_as_past(self, batch: Batch) -> Batch | None:
        """A batch with samples of past tasks, if these were prepared in another way; else None."""
        past, task = self._past, batch.task
        if past is None or self._past_alike:
            return None
        old = torch.as_tensor(task < self.first_task).expand(len(batch.targets))
        if not bool(old.any()):
            return None
        ids = torch.as_tensor(task).expand(len(batch.targets))
        code = next((one.code for one in past.preparations if one.steps is None), "")
        if code:
            raise ConfigurationError(
                f"Expected past tasks whose preparation is known without their stream, but it is {code}, "
                "which is code. Continue with a stream of that class."
            )
        found = prepare_raw(past.preparations, batch.inputs[old], ids[old])
        inputs = found.new_empty(len(old), *found.shape[1:])
        inputs[old] = found
        if not bool(old.all()):
            own = Batch(batch.inputs[~old], batch.targets[~old], ids[~old], batch.global_size)
            inputs[~old] = self._prepare_own(own).inputs
        return batch._replace(inputs=inputs, augmentation=None)

    def _prepare_own(self, batch: Batch, augment: bool = False) -> Batch:
        raise NotImplementedError

    def _refuse_past(self, task_id: int) -> None:
        """Refuse samples of a past task.

        Raises:
            DataError: names it.
        """
        if task_id < self.first_task and self._past is not None:
            raise DataError(
                f"Expected data of task {task_id} ({self._past.tasks[task_id].name}), but this stream has "
                f"those of the tasks from {self.first_task} on: it continues a past without its data. "
                "Methods that train on data of past tasks need a stream that begins with them."
            )
