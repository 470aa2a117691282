"""A network that answers in the modes of its tasks: one backbone and one head; nothing here trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.attaching import NetworkOfLayers
from bpn_lightning.nn.execution import compiled_in_place, mixing_samples
from bpn_lightning.nn.feature_width import feature_width
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.head import empty_head
from bpn_lightning.nn.inference import FixedModeNetwork, PerSampleNetwork, closed_columns_added
from bpn_lightning.nn.sharding import is_sharded
from bpn_lightning.nn.structure import Structure, check_mask
from bpn_lightning.tasks import Mask, Task

__all__ = ["AnsweringNetwork"]


class AnsweringNetwork(NetworkOfLayers):
    """What answers, without what only learning needs.

    Args:
        backbone: maps ``(batch, *input_shape)`` to features ``(batch, features)``.
        front: what turns prepared inputs into the features that the network takes; None: they are the same.
        mask: the output units of the head that take part: ``all``, ``seen`` (those of the tasks opened so
            far), ``task`` (the mode's own) or ``shared`` (every task has the same).

    Attributes:
        structure: what it consists of besides the backbone; checkpoints and exports hold it.
        head: one linear layer over all classes, of which it computes the open ones. None before the stream
            is known.
        opened: the task that was opened last, -1 before the first.
        closed: the last task that is learned, consolidated and evaluated, -1 before the first.
        mode: the task whose mode holds, or ``(batch,)`` one of each sample.

    Raises:
        ConfigurationError: the mask is unknown.
    """

    def __init__(self, backbone: nn.Module, mask: Mask = "all", front: Front | None = None) -> None:
        super().__init__()
        self.front = front
        self.backbone = compiled_in_place(backbone)
        self.head = None
        self.weight_bank = None
        self.structure = Structure(check_mask(mask))
        self.opened = -1
        self.closed = -1
        self.mode: int | Tensor = 0
        self._mixing = None  # layers that mix samples; None: not known yet

    # --- structure -------------------------------------------------------------------------------

    @property
    def mask(self) -> Mask:
        """Which columns of the head take part in a task's loss."""
        return self.structure.mask

    @property
    def has_modes(self) -> bool:
        """Whether the network answers differently in different tasks' modes."""
        return bool(self.task_modules())

    def build(
        self,
        tasks: list[Task],
        num_classes: int,
        input_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make a head whose weights are not set, with one dry forward through the backbone.

        Args:
            tasks: of the stream.
            num_classes: output units of the head.
            input_shape: of one input of the network.
            dtype: of its inputs.
            device: that the backbone lies on.

        Raises:
            ConfigurationError: the backbone's output is no feature matrix.
        """
        structure = self.structure
        features = feature_width(self.backbone, input_shape, dtype, device)
        structure.tasks, structure.num_classes = tasks, num_classes
        structure.input_shape, structure.input_dtype = input_shape, dtype
        self.head = empty_head(features, num_classes, device)

    def bytes_built(self, num_tasks: int) -> int:
        """Bytes of what :meth:`build` makes for tasks besides the head, before it is made."""
        return 0

    @property
    def num_open(self) -> int:
        """How many of the head's columns are open: it computes them, from the first on."""
        head = self.built_head
        return head.out_features if head.num_open is None else head.num_open

    @property
    def has_closed_columns(self) -> bool:
        """Whether the head has columns that it does not compute."""
        return self.num_open < self.built_head.out_features

    # --- forward and modes -----------------------------------------------------------------------

    def forward(self, inputs: Tensor, task: "int | Tensor | None" = None) -> Tensor:
        """Logits of every class of the stream, -inf for the columns that the mask leaves out.

        Args:
            inputs: ``(batch, *input_shape)``, prepared, through the front where there is one.
            task: a task id, or ``(batch,)`` one per sample; None answers in the mode that holds.

        Returns:
            ``(batch, num_classes)``.
        """
        if task is not None:
            if isinstance(task, Tensor) and self._kept_apart():
                self.check_task_ids(task)
                return self._answer_groups(inputs, task)
            with self.task_mode(task):
                return self(inputs)  # type: ignore[no-any-return]
        logits = self.all_logits(inputs)
        if self.structure.forgotten:
            if isinstance(self.mode, int):
                self.check_task_ids(self.mode)
            logits = self.mask_forgotten(logits)
        if self.mask not in ("seen", "task"):
            return logits
        columns = torch.arange(logits.shape[1], device=logits.device)
        if isinstance(self.mode, Tensor):
            table = torch.tensor(
                [self.columns(t) for t in range(len(self.tasks))], device=logits.device
            )[self.mode]
            outside = (columns < table[:, :1]) | (columns >= table[:, 1:])
        else:
            first, stop = self.columns(self.mode)
            outside = (columns < first) | (columns >= stop)
        return logits.masked_fill(outside, float("-inf"))

    def mask_forgotten(self, logits: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` with -inf in the columns that only forgotten tasks have."""
        outside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        outside[self.structure.forgotten_columns] = True
        return logits.masked_fill(outside, float("-inf"))

    def _kept_apart(self) -> list[str]:
        """What keeps samples of different tasks from being in one batch; empty if nothing does."""
        if self._mixing is None:
            with self.task_mode(self.structure.known(range(len(self.tasks)))[0]):
                layers = mixing_samples(self.backbone, self._dry_inputs(3))
            self._mixing = [
                f"{layer}, whose first dimension is not the samples" for layer in layers
            ]
        whole = [type(part).__name__ for part in self.task_modules() if not part.per_sample]
        return whole or self._mixing

    def _answer_groups(self, inputs: Tensor, task: Tensor) -> Tensor:
        """Logits where a batch can only have one task: one forward for each that occurs.

        Where the backbone is sharded, one for each task: all processes have to run it equally often.
        """
        order = task.argsort(stable=True)
        ids = sorted(set(task.tolist()))
        if is_sharded(self.backbone):
            ids = self.structure.known(range(len(self.tasks)))
        answers = [self(inputs[task == one], task=one) for one in ids]
        return torch.cat(answers)[order.argsort()] if ids else self(inputs, task=0)

    def all_logits(self, inputs: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` in the mode that holds, of every open column; else -inf."""
        return closed_columns_added(self.open_logits(inputs), self.built_head.out_features)

    def open_logits(self, inputs: Tensor) -> Tensor:
        """Logits ``(batch, open columns)`` in the mode that holds, whatever the mask leaves out."""
        if inputs.dtype == torch.uint8:
            raise ConfigurationError(
                "Expected inputs that the stream has prepared, but got uint8. module.predict(images) "
                "prepares raw images, and answers for them."
            )
        head = self.built_head
        if inputs.is_floating_point():
            # Images become floats after Lightning converts precision.
            inputs = inputs.to(head.weight.dtype)
        logits: Tensor = head(self.backbone(inputs))
        return logits

    def columns(self, task_id: int) -> tuple[int, int]:
        """``(start, stop)`` of the head's output units that take part in a task's mode."""
        return self.structure.columns(task_id, self.opened)

    def active_columns(self, task_id: int) -> "slice | Tensor":
        """The same as an index of columns, without those that only forgotten tasks have."""
        first, stop = self.columns(task_id)
        gone = set(self.structure.forgotten_columns) if self.structure.forgotten else set()
        if gone.isdisjoint(range(first, stop)):
            return slice(first, stop)
        kept = [column for column in range(first, stop) if column not in gone]
        return torch.tensor(kept, dtype=torch.long, device=self.built_head.weight.device)

    @property
    def resting_task(self) -> int:
        """The task whose mode holds outside of a fit: the open one, or the first; none that is forgotten."""
        return self.structure.resting_task(self.opened)

    def for_inference(self, task: int | None = None) -> nn.Module:
        """A copy of the network that only answers, for ``torch.export`` and ``torch.onnx.export``.

        Args:
            task: whose mode it is in for good; None: each sample names its own.

        Returns:
            In evaluation mode, with ``forward(inputs)`` or ``forward(inputs, tasks)``: inputs ``(batch,
            ...)`` as the stream prepares them, which go through the front first, task IDs ``(batch,)``
            int64, logits ``(batch, num_classes)``.

        Raises:
            ConfigurationError: the stream has no such task, the backbone cannot be copied, or task is
                None where a batch can only have one task.
        """
        structure = self.structure
        if task is not None:
            with self.task_mode(task):
                columns = [self.columns(task)]
                return FixedModeNetwork(
                    self.backbone, self.built_head, columns, self.front, structure.forgotten_columns
                )
        apart = self._kept_apart()
        if apart:
            raise ConfigurationError(
                "Expected task to be a task ID where a batch can only have one task, but got None, and "
                f"the network has {apart[0]}. Make one network for each task."
            )
        known = structure.known(range(len(self.tasks)))
        columns = [self.columns(task.id) if task.id in known else (0, 0) for task in self.tasks]
        with self.task_mode(known[-1]):  # the columns of all tasks that may be named
            return PerSampleNetwork(
                self.backbone, self.built_head, columns, self.front, structure.forgotten_columns
            )

    @contextmanager
    def task_mode(self, task: "int | Tensor") -> Iterator[None]:
        """Whatever runs inside uses this task's mode; the one before returns, also on an error.

        Args:
            task: a task id, or ``(batch,)`` int64, one id per sample of every forward inside.

        Raises:
            ConfigurationError: the stream has no such task.
        """
        self.check_task_ids(task)
        before = self.mode
        try:
            self.switch(task)
            yield
        finally:
            self.switch(before)

    def check_task_ids(self, task: "int | Tensor") -> None:
        """Refuse what is no task ID of the stream.

        Raises:
            ConfigurationError: it is none, of the wrong shape, or forgotten.
        """
        self.structure.check_task_ids(task)

    def switch(self, task: "int | Tensor") -> None:
        """Answer in a task's mode from now on; :meth:`task_mode` does so for a while, and checks."""
        self.mode = task
        if self.head is not None:
            last = task if isinstance(task, int) else self._last_of(task)
            self.head.open_outputs(self.structure.open_columns(last, self.opened))
        for part in self.task_modules():
            part.switch(task)

    def _last_of(self, tasks: Tensor) -> int:
        """The last of some tasks; looked up only where the open columns follow it."""
        return int(tasks.max()) if self.mask == "task" and len(tasks) else 0
