"""Learning without forgetting."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from bpn_lightning.costs import DeclaredBytes, tensor_bytes
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.functional.distillation import distillation_of_heads
from bpn_lightning.host import ContinualHost
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, ContinualStream, Phase, Task
from bpn_lightning.teacher import Columns, Outputs, Teacher, concatenated_heads, student_outputs

__all__ = ["LearningWithoutForgetting"]

HEADS = ("per_task", "joint")


def _in_old_modes(host: ContinualHost, run: Callable[[], Outputs]) -> list[Outputs]:
    outputs = []
    for task_id in range(host.network.opened):
        with host.network.task_mode(task_id):
            outputs.append(run())
    return outputs


class LearningWithoutForgetting(ContinualStrategy):
    r"""LwF: on a new task's samples, keep the outputs of the old tasks' heads as they were.

    .. math:: \lambda \sum_{k<t} \Big(-\sum_c q_{k,c} \log p_{k,c}\Big), \quad
              q_k = \mathrm{softmax}(v_k / T), \; p_k = \mathrm{softmax}(z_k / T)

    The distillation loss of Li and Hoiem (2016), https://arxiv.org/abs/1606.09282: z_k and v_k are the
    logits of old task k's head, of the network and of a teacher, which is the network as it was when
    the task began. Both see the same augmented samples; the teacher without dropout. Under
    ``mask="shared"`` there is one head, and it is distilled once. Where the network has modes, both
    run in the mode of every old task: one more forward and backward for each.

    As in the paper, the teacher logits of a task's samples are recorded once, before they are learned.
    Where they are augmented the teacher runs at every update, since augmentation varies its logits, and so
    where an epoch is all that a task has, or does not see the whole task.

    Differs from the paper: there is no warm-up unless it is asked for, since its epochs come on top of
    those that other methods have; under ``mask="task"`` the old rows of the head stay as they were, as
    with every method, and only the features follow; the learning rate does not fall after the first
    task, and weight decay is the optimizer's.

    Args:
        strength: lambda, dimensionless; 0 is fine-tuning.
        temperature: T, dimensionless; the paper's is 2. There is no factor of its square, so a larger
            one also weakens the gradient.
        heads: ``per_task`` takes a softmax over each old task's classes, ``joint`` one over all old
            classes, as other implementations do with a single head. Where every task brings one class,
            only ``joint`` distills anything, from the third task on.
        warm_up_epochs: epochs at a task's beginning in which only its own rows of the head learn, with
            an optimizer of their own; none in the first task and under ``mask="shared"``.
        record: false runs the teacher at every update whatever the stream. The two agree to rounding:
            a sample's outputs depend a little on the size of the batch that it is in.

    State:
        teacher: one tensor per shared parameter and float buffer, 4 bytes per number, from the second
        task on; nothing that has to be stored for use after training. While a task is learned, what was
        recorded: 4 bytes for each of its samples and each old class; it is in no checkpoint.

    Raises:
        ConfigurationError: a value is out of range or unknown, or every softmax is over one class.
    """

    regularizer: ClassVar[bool] = True
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
        if not 0 <= strength < float("inf"):
            raise ConfigurationError(
                f"Expected strength to be 0 or a positive number, but got {strength}. "
                "0 is fine-tuning; 1 weighs an old task as the new one."
            )
        if not 0 < temperature < float("inf"):
            raise ConfigurationError(
                f"Expected temperature to be a positive number, but got {temperature}. "
                "The paper's is 2; 1 leaves the outputs as they are."
            )
        if heads not in HEADS:
            raise ConfigurationError(
                f"Expected heads to be one of {', '.join(HEADS)}, but got {heads!r}."
                f"{did_you_mean(heads, HEADS)}"
            )
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
        """Know no teacher."""
        self.teacher = Teacher()
        self._recorded: Tensor | None = None  # (samples of the open task, old classes)
        self._shared_head = False

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is used."""
        return self.strength > 0

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Note whether tasks have rows of their own."""
        self._shared_head = host.network.mask == "shared"

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse where every softmax would be over one column, and so 1 whatever the logits are."""
        heads = [task.columns for task in host.network.tasks[:-1]]
        if self.strength == 0 or not heads or max(self._widths(heads)) > 1:
            return
        if self._shared_head or len(heads) == 1 or self.heads == "joint":
            raise ConfigurationError(
                "Expected the tasks before the last to have more than one class together where old "
                f"outputs are distilled, but got one. Set the strength of {type(self).__name__} to 0."
            )
        raise ConfigurationError(
            "Expected heads to be 'joint' where every old task has one class, but got 'per_task', with "
            "which nothing is distilled: a softmax over one class is always 1. Set heads to 'joint'."
        )

    def phases(self, task: Task, phases: list[Phase]) -> list[Phase]:
        """Prepend the warm-up."""
        if task.id == 0 or self._shared_head or self.warm_up_epochs == 0:
            return phases
        return [Phase("warm_up", self.warm_up_epochs, trains="head"), *phases]

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Let the teacher be what was learned so far."""
        if task.id > 0 and self.needs_teacher:
            self.teacher.snapshot(host)

    def distills(self, host: ContinualHost) -> bool:
        """Whether there is something to distill; old rows and features stay in a warm-up by themselves."""
        fixed = host.phase.trains == "head" and not self._shared_head
        return bool(self.teacher) and not fixed

    # --- outputs of student and teacher ------------------------------------------------------------

    def student_outputs(
        self, host: ContinualHost, batch: Batch, outputs: Outputs, layer: str | None = None
    ) -> list[Outputs]:
        """The network's outputs for a batch: one for each old task where it has modes, else one.

        Args:
            host: the module.
            batch: of the open task.
            outputs: those of the network in that task's mode.
            layer: whose features to note.
        """
        if not host.network.has_modes:
            return [outputs]
        return _in_old_modes(host, lambda: student_outputs(host, batch.inputs, layer))

    def teacher_outputs(
        self, host: ContinualHost, inputs: Tensor, layer: str | None = None
    ) -> list[Outputs]:
        """The same of the teacher."""
        if not host.network.has_modes:
            return [self.teacher.forward(host, inputs, layer)]
        return _in_old_modes(host, lambda: self.teacher.forward(host, inputs, layer))

    def old_heads(self, host: ContinualHost) -> list[Columns]:
        """The columns that are distilled; those that tasks share once, or once for each mode."""
        heads = [task.columns for task in host.network.tasks[: host.network.opened]]
        return heads if host.network.has_modes else list(dict.fromkeys(heads))

    def distilled(self, student: Tensor, teacher: Tensor, heads: Sequence[Columns]) -> Tensor:
        """The loss of what they say of the old heads, strength included: ``(batch,)``."""
        widths = self._widths(heads)
        return self.strength * distillation_of_heads(student, teacher, widths, self.temperature)

    def _widths(self, heads: Sequence[Columns]) -> list[int]:
        """Columns under each softmax."""
        widths = [stop - first for first, stop in heads]
        return [sum(widths)] if self.heads == "joint" and not self._shared_head else widths

    # --- what was recorded -----------------------------------------------------------------------

    def recorded(self, host: ContinualHost, batch: Batch) -> Tensor | None:
        """The teacher logits of these samples' old heads, ``(batch, old classes)``; None: run the teacher."""
        if batch.samples is None or isinstance(batch.task, Tensor):  # beside other tasks' samples
            return None
        if self._recorded is None:
            limit = host.trainer.limit_train_batches
            whole = isinstance(limit, float) and limit == 1  # and not one batch
            if not (self.record and whole and host.phase.epochs > 1):
                return None
            self._recorded = self._record(host)
        return self._recorded.index_select(0, batch.samples)

    @torch.no_grad()
    def _record(self, host: ContinualHost) -> Tensor:
        """Ask of the whole task; each process its share, and then all know everything."""
        indices, logits, samples = [], [], 0
        heads = self.old_heads(host)
        for batch in host.batches(host.network.opened, "train"):
            assert batch.samples is not None  # in evaluation nothing is augmented
            indices.append(batch.samples.to(host.device))
            logits.append(concatenated_heads(self.teacher_outputs(host, batch.inputs), heads))
            samples += batch.global_size
        found = torch.cat(logits)
        everything = found.new_zeros(samples, found.shape[1])
        everything[torch.cat(indices)] = found
        return host.all_reduce(everything)

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
        """Forget what was recorded of the task's samples."""
        self._recorded = None

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Training: the shared weights and float buffers once more, from the second task on."""
        kept = self.needs_teacher and host.network.opened > 0
        return DeclaredBytes(tensor_bytes(Teacher.state(host).values()) if kept else 0)

    def state_dict(self) -> dict[str, Any]:
        """The teacher."""
        return {"teacher": self.teacher.tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved teacher."""
        self.teacher.tensors = dict(state_dict["teacher"])
        self._recorded = None

    def move_state(self, host: ContinualHost) -> None:
        """Move the teacher to the host's device."""
        self.teacher.to(host.device)
