"""Learning without forgetting."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from bpn_lightning.checks import check_above_zero, check_choice, check_number
from bpn_lightning.costs import DeclaredBytes, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.distillation import distillation_of_heads
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.head import without_rows
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, ContinualStream, Phase, Task
from bpn_lightning.teacher import Columns, Outputs, Teacher, concatenated_heads, student_outputs

__all__ = ["LearningWithoutForgetting"]

HEADS = ("per_task", "joint")


def _in_old_modes(host: ContinualHost, run: Callable[[], Outputs]) -> list[Outputs]:
    outputs = []
    for task_id in host.network.structure.known(range(host.network.opened)):
        with host.network.task_mode(task_id):
            outputs.append(run())
    return outputs


class LearningWithoutForgetting(ContinualStrategy):
    r"""LwF: preserve the outputs of old tasks' heads on the samples of a new task.

    .. math:: \lambda \sum_{k<t} \Big(-\sum_c q_{k,c} \log p_{k,c}\Big), \quad
              q_k = \mathrm{softmax}(v_k / T), \; p_k = \mathrm{softmax}(z_k / T)

    The distillation loss of Li and Hoiem (2016), https://arxiv.org/abs/1606.09282: z_k and v_k are the
    logits of old task k's head, from the network and from a teacher, a snapshot of the network at the
    start of the task. Both get the same augmented samples; the teacher runs without dropout. With
    ``mask="shared"`` there is a single head, distilled once. If the network has modes, both run in the
    mode of each old task: one more forward and backward pass per old task.

    As in the paper, the teacher logits of a task's samples are recorded once, before training on them.
    With augmentation the teacher runs at every update, because its logits vary; so it does if a task
    has a single epoch, or if an epoch does not cover the whole task.

    Differs from the paper: by default there is no warm-up, since it adds epochs that other methods do
    not have; with ``mask="task"`` the old head rows are frozen, as in every method, and only the
    features adapt; the learning rate is not lowered after the first task, and weight decay is the
    optimizer's.

    Args:
        strength: lambda, dimensionless; 0 is fine-tuning.
        temperature: T, dimensionless; 2 in the paper. The loss is not multiplied by its square, so a
            higher temperature also reduces the gradient.
        heads: ``per_task`` uses a softmax over each old task's classes, ``joint`` one over all old
            classes, as other implementations do with a single head. If each task has one class, only
            ``joint`` has an effect, from the third task on.
        warm_up_epochs: epochs at the start of a task in which only its head rows are trained, with a
            separate optimizer; none in the first task and with ``mask="shared"``.
        record: false runs the teacher at every update for any stream. Both agree up to rounding, as
            a sample's logits depend slightly on the batch size.

    State:
        teacher: one tensor per shared parameter and float buffer, 4 bytes per number, from the second
        task on; nothing is needed for inference. During a task also the recorded logits: 4 bytes per
        sample and old class; they are not in checkpoints.

    Raises:
        ConfigurationError: a value is out of range or unknown, or every softmax is over one class.
    """

    regularizer: ClassVar[bool] = True
    needs_trainable_core: ClassVar[bool] = True
    weights_in_state: ClassVar[Collection[str]] = ("teacher",)
    null_arguments: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    def __init__(
        self,
        strength: float = 1.0,
        *,
        temperature: float = 2.0,
        heads: Literal["per_task", "joint"] = "per_task",
        warm_up_epochs: int = 0,
        record: bool = True,
    ) -> None:
        check_number(
            "strength",
            strength,
            "0 is fine-tuning; 1 gives each old task the weight of the new one.",
        )
        check_above_zero(
            "temperature", temperature, "The paper uses 2; 1 leaves the softmax unchanged."
        )
        check_choice("heads", heads, HEADS)
        if not isinstance(warm_up_epochs, int) or warm_up_epochs < 0:
            raise ConfigurationError(
                f"Expected warm_up_epochs to be a whole number of at least 0, but got {warm_up_epochs}. "
                "0 is no warm-up."
            )
        self.strength = strength
        self.temperature = temperature
        self.heads = heads
        self.warm_up_epochs = warm_up_epochs
        self.record = record
        self.reset()

    def reset(self) -> None:
        """Start without a teacher."""
        self.teacher = Teacher()
        self._recorded: Tensor | None = None  # (samples of the open task, old classes)
        self._shared_head = False

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is used."""
        return self.strength > 0

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Store whether all tasks share the head."""
        self._shared_head = host.network.mask == "shared"

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse a run in which every softmax is over one output unit, and therefore always 1."""
        heads = [task.columns for task in host.network.tasks[:-1]]
        if self.strength == 0 or not heads or max(self._widths(heads)) > 1:
            return
        if self._shared_head or len(heads) == 1 or self.heads == "joint":
            raise ConfigurationError(
                "Expected the tasks before the last to have at least two classes in total for distillation, "
                f"but got one. Set the strength of {type(self).__name__} to 0."
            )
        raise ConfigurationError(
            "Expected heads to be 'joint' when every old task has one class, but got 'per_task', with "
            "which nothing is distilled: a softmax over one class is always 1. Set heads to 'joint'."
        )

    def phases(self, task: Task, phases: list[Phase]) -> list[Phase]:
        """Prepend the warm-up."""
        if task.id == 0 or self._shared_head or self.warm_up_epochs == 0:
            return phases
        return [Phase("warm_up", self.warm_up_epochs, trains="head"), *phases]

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Take a snapshot of the network as the teacher."""
        if task.id > 0 and self.needs_teacher:
            self.teacher.snapshot(host)

    def distills(self, host: ContinualHost) -> bool:
        """Whether there is something to distill; in a warm-up, old rows and features are frozen anyway."""
        fixed = host.phase.trains == "head" and not self._shared_head
        old = host.network.structure.known(range(host.network.opened))
        return bool(self.teacher and old) and not fixed

    # --- outputs of student and teacher ------------------------------------------------------------

    def student_outputs(
        self, host: ContinualHost, batch: Batch, outputs: Outputs, layer: str | None = None
    ) -> list[Outputs]:
        """The network's outputs for a batch: one per old task if it has modes, else a single one.

        Args:
            host: the module.
            batch: of the current task.
            outputs: those of the network in the current task's mode.
            layer: the layer whose features are returned too.
        """
        if not host.network.has_modes:
            return [outputs]
        return _in_old_modes(host, lambda: student_outputs(host, batch.inputs, layer))

    def teacher_outputs(
        self, host: ContinualHost, inputs: Tensor, layer: str | None = None
    ) -> list[Outputs]:
        """The teacher's outputs, likewise."""
        if not host.network.has_modes:
            return [self.teacher.forward(host, inputs, layer)]
        return _in_old_modes(host, lambda: self.teacher.forward(host, inputs, layer))

    def old_heads(self, host: ContinualHost) -> list[Columns]:
        """The output units to distill; shared ones are listed once, or once per mode."""
        network = host.network
        old = network.structure.known(range(network.opened))
        heads = [network.tasks[task_id].columns for task_id in old]
        return heads if host.network.has_modes else list(dict.fromkeys(heads))

    def distilled(self, student: Tensor, teacher: Tensor, heads: Sequence[Columns]) -> Tensor:
        """The distillation loss of concatenated old heads, including the strength: ``(batch,)``."""
        widths = self._widths(heads)
        return self.strength * distillation_of_heads(student, teacher, widths, self.temperature)

    def _widths(self, heads: Sequence[Columns]) -> list[int]:
        """The number of output units of each softmax."""
        widths = [stop - first for first, stop in heads]
        return [sum(widths)] if self.heads == "joint" and not self._shared_head else widths

    # --- recorded teacher logits -----------------------------------------------------------------

    def recorded(self, host: ContinualHost, batch: Batch) -> Tensor | None:
        """The recorded teacher logits of a batch, ``(batch, old classes)``; None: run the teacher."""
        if batch.samples is None or isinstance(batch.task, Tensor):  # samples of several tasks
            return None
        if self._recorded is None:
            limit = host.trainer.limit_train_batches
            whole = isinstance(limit, float) and limit == 1  # the integer 1 is one batch
            if not (self.record and whole and host.phase.epochs > 1):
                return None
            self._recorded = self._record(host)
        return self._recorded.index_select(0, batch.samples)

    @torch.no_grad()
    def _record(self, host: ContinualHost) -> Tensor:
        """The teacher logits of the whole task: each process computes its shard, then they are summed."""
        indices, logits, samples = [], [], 0
        heads = self.old_heads(host)
        for batch in host.batches(host.network.opened, "train"):
            assert batch.samples is not None  # evaluation batches are not augmented
            indices.append(batch.samples.to(host.device))
            logits.append(concatenated_heads(self.teacher_outputs(host, batch.inputs), heads))
            samples += batch.global_size
        shard = torch.cat(logits)
        recorded = shard.new_zeros(samples, shard.shape[1])
        recorded[torch.cat(indices)] = shard
        return host.all_reduce(recorded)

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The distillation of all old heads."""
        if not self.distills(host):
            return {}
        heads = self.old_heads(host)
        student = concatenated_heads(self.student_outputs(host, batch, Outputs(logits)), heads)
        teacher = self.recorded(host, batch)
        if teacher is None:
            teacher = concatenated_heads(self.teacher_outputs(host, batch.inputs), heads)
        return {"lwf": self.distilled(student, teacher, heads)}

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Discard the recorded logits."""
        self._recorded = None

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Overwrite its rows of the teacher's head; the rest is shared."""
        rows = host.network.structure.freed_columns(task.id)
        self.teacher.tensors = without_rows(self.teacher.tensors, rows)
        return ["the teacher, a copy of the shared weights"] if self.teacher else []

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Training: a copy of the shared weights and float buffers, from the second task on."""
        kept = self.needs_teacher and host.network.opened > 0
        return DeclaredBytes(tensor_bytes(Teacher.state(host).values()) if kept else 0)

    def training_state(self) -> str:
        """The network of the task before."""
        return "teacher"

    def state_dict(self) -> dict[str, Any]:
        """The teacher."""
        return {"teacher": self.teacher.tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the teacher."""
        self.teacher.tensors = dict(state_dict["teacher"])
        self._recorded = None

    def move_state(self, host: ContinualHost) -> None:
        """Move the teacher to the host's device."""
        self.teacher.to(host.device)
