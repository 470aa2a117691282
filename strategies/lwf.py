"""Learning without forgetting."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from bpn_lightning.costs import Bytes, tensor_bytes
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.nn.layers import TaskModule, evaluation_mode, full_precision
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, ContinualHost, ContinualStream, Phase, Task

__all__ = [
    "Answer",
    "LearningWithoutForgetting",
    "Teacher",
    "distillation",
    "side_by_side",
    "student_answer",
]

HEADS = ("per_task", "joint")

Columns = tuple[int, int]


# --- the loss ------------------------------------------------------------------------------------


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    r"""Cross-entropy between softened outputs, :math:`-\sum_c q_c \log p_c`.

    .. math:: q = \mathrm{softmax}(v / T), \quad p = \mathrm{softmax}(z / T)

    Its gradient by z is :math:`(p - q) / T`, without a factor of :math:`T^2`, and exactly 0 where
    student and teacher agree. In float32 at least.

    Args:
        student: z, logits ``(..., classes)``.
        teacher: v, logits of the same shape.
        temperature: T, dimensionless.

    Returns:
        ``(...)``; where they agree, the entropy of q.

    >>> distillation(torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, 5.0]]))  # log 2
    tensor([0.6931])
    """
    z, v = full_precision(student) / temperature, full_precision(teacher) / temperature
    # Written so that autograd computes p as q is computed here: equal logits cancel bit for bit.
    q = (v - v.logsumexp(-1, keepdim=True)).exp()
    return z.logsumexp(-1) - (q * z).sum(-1)


def distillation_of_heads(
    student: Tensor, teacher: Tensor, widths: Sequence[int], temperature: float
) -> Tensor:
    """The sum of heads' :func:`distillation`, a softmax each.

    Args:
        student: logits of the heads side by side, ``(batch, sum of widths)``.
        teacher: the same of the teacher.
        widths: classes of each head.
        temperature: T, dimensionless.

    Returns:
        ``(batch,)``.
    """
    if len(set(widths)) == 1:  # all heads at once
        shape = (len(student), len(widths), widths[0])
        return distillation(student.reshape(shape), teacher.reshape(shape), temperature).sum(1)
    edges = [0, *accumulate(widths)]
    heads = [slice(first, stop) for first, stop in pairwise(edges)]
    terms = [distillation(student[:, head], teacher[:, head], temperature) for head in heads]
    return torch.stack(terms).sum(0)


# --- what student and teacher say ----------------------------------------------------------------


class Answer(NamedTuple):
    """What a network says to a batch.

    Attributes:
        logits: ``(batch, all columns)``, whatever the mask.
        features: ``(batch, features)`` of one of its layers, None unless asked for.
    """

    logits: Tensor
    features: Tensor | None = None


def side_by_side(answers: Sequence[Answer], heads: Sequence[Columns]) -> Tensor:
    """The columns of each head, all from the same answer or each from its own, in the mode of its task."""
    logits = [answer.logits for answer in answers]
    if len(logits) == 1:
        if all(left[1] == right[0] for left, right in pairwise(heads)):
            return logits[0][:, heads[0][0] : heads[-1][1]]
        logits = logits * len(heads)
    return torch.cat([z[:, first:stop] for z, (first, stop) in zip(logits, heads, strict=True)], 1)


class _Unmasked(nn.Module):
    """A module's backbone and head, by their names in it, without its mask."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.backbone = module.get_submodule("backbone")
        self.head = module.get_submodule("head")

    def forward(self, inputs: Tensor) -> Tensor:
        """``(batch, ...)`` to ``(batch, all columns)``."""
        head = cast(nn.Linear, self.head)
        if inputs.is_floating_point():  # as the module does, whose weights may be in low precision
            inputs = inputs.to(head.weight.dtype)
        logits: Tensor = head(self.backbone(inputs))
        return logits


def _ask(
    network: _Unmasked, tensors: Mapping[str, Tensor], inputs: Tensor, layer: str | None
) -> Answer:
    """Call a network with some of its tensors replaced, in the mode that holds."""
    features: list[Tensor] = []

    def hear(_: nn.Module, __: Any, output: Tensor) -> None:
        features.append(output.flatten(1).clone())  # the next layer may write into it

    handle = network.get_submodule(layer).register_forward_hook(hear) if layer else None
    try:
        logits: Tensor = functional_call(network, dict(tensors), (inputs,))
    finally:
        if handle is not None:
            handle.remove()
    return Answer(logits, *features[-1:])  # another strategy's hook may have called the layer too


def _shared(host: ContinualHost, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Of some tensors of the module by name, those of the network that belong to no one task."""
    parts = [part for part in host.network().modules() if isinstance(part, TaskModule)]
    own = {id(tensor) for part in parts for tensor in chain(part.parameters(), part.buffers())}
    return {
        name: tensor
        for name, tensor in named
        if name.startswith(("backbone.", "head.")) and id(tensor) not in own
    }


class Teacher:
    """The network as it was when a task began, to be asked what it would have said.

    State:
        ``tensors``: shared weights and float buffers by name, 4 bytes per number; never a copy of the
        module with its hooks. What belongs to one task, such as frozen biases and keys, does not
        change any more and is the network's own.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @staticmethod
    def of(host: ContinualHost) -> dict[str, Tensor]:
        """What a teacher keeps of a network; frozen weights too, as they may be set free later."""
        network = host.network()
        tensors = _shared(host, chain(network.named_parameters(), network.named_buffers()))
        return {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}

    def learn(self, host: ContinualHost) -> None:
        """Become what the network is now."""
        self.tensors = {name: tensor.clone() for name, tensor in self.of(host).items()}

    @torch.no_grad()
    def answer(self, host: ContinualHost, inputs: Tensor, layer: str | None = None) -> Answer:
        """Of the teacher in the mode that holds: no dropout, running statistics as they were.

        Args:
            host: the module that it is the past of.
            inputs: ``(batch, ...)``, prepared.
            layer: whose features to note, by name within the module.

        Raises:
            ConfigurationError: it has not learned anything yet.
        """
        if not self.tensors:
            raise ConfigurationError(
                "Expected a teacher to be asked after a first task, but no task is learned yet. The "
                "first task has nothing to be distilled: ask from the second task's start on."
            )
        network = _Unmasked(host.network())
        with evaluation_mode(network):
            return _ask(network, self.tensors, inputs, layer)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}


def student_answer(host: ContinualHost, inputs: Tensor, layer: str | None = None) -> Answer:
    """Of the network as it trains, once more: its running statistics stay those of its own task."""
    network = _Unmasked(host.network())
    buffers = {n: buffer.clone() for n, buffer in _shared(host, network.named_buffers()).items()}
    return _ask(network, buffers, inputs, layer)


def _in_old_modes(host: ContinualHost, ask: Callable[[], Answer]) -> list[Answer]:
    answers = []
    for task_id in range(host.opened):
        with host.task_mode(task_id):
            answers.append(ask())
    return answers


# --- the strategy --------------------------------------------------------------------------------


class LearningWithoutForgetting(ContinualStrategy):
    r"""LwF: on a new task's samples, keep saying of the old ones what was said before.

    .. math:: \lambda \sum_{k<t} \Big(-\sum_c q_{k,c} \log p_{k,c}\Big), \quad
              q_k = \mathrm{softmax}(v_k / T), \; p_k = \mathrm{softmax}(z_k / T)

    The distillation loss of Li and Hoiem (2016), https://arxiv.org/abs/1606.09282: z_k and v_k are the
    logits of old task k's head, of the network and of a teacher, which is the network as it was when
    the task began. Both answer the same augmented samples; the teacher without dropout. Under
    ``mask="shared"`` there is one head, and it is distilled once. Where the network has modes, both
    answer in the mode of every old task: one more forward and backward for each.

    As in the paper, what the teacher says of a task's samples is recorded once, before they are learned.
    Where they are augmented it is asked at every update, since augmentation varies what it says, and so
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
        record: false asks the teacher at every update whatever the stream. The two agree to rounding:
            a sample's outputs depend a little on the size of the batch that it is in.

    State:
        teacher: one tensor per shared parameter and float buffer, 4 bytes per number, from the second
        task on; nothing that has to be stored for use after training. While a task is learned, what was
        recorded: 4 bytes for each of its samples and each old class; it is in no checkpoint.

    Raises:
        ConfigurationError: a value is out of range or unknown, or every softmax is over one class.
    """

    regulariser: ClassVar[bool] = True
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
        """Whether anything is asked of a teacher."""
        return self.strength > 0

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Note whether tasks have rows of their own."""
        self._shared_head = host.mask == "shared"

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse where every softmax would be over one column, and so 1 whatever the network says."""
        heads = [task.columns for task in host.tasks[:-1]]
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
            self.teacher.learn(host)

    def asks(self, host: ContinualHost) -> bool:
        """Whether there is something to ask; old rows and features stay in a warm-up by themselves."""
        fixed = host.phase.trains == "head" and not self._shared_head
        return bool(self.teacher) and not fixed

    # --- what student and teacher say ------------------------------------------------------------

    def students(
        self, host: ContinualHost, batch: Batch, answer: Answer, layer: str | None = None
    ) -> list[Answer]:
        """What the network says to a batch: one answer for each old task where it has modes, else one.

        Args:
            host: the module.
            batch: of the open task.
            answer: what the network said to it in that task's mode.
            layer: whose features to note.
        """
        if not host.has_modes:
            return [answer]
        return _in_old_modes(host, lambda: student_answer(host, batch.inputs, layer))

    def teachers(
        self, host: ContinualHost, inputs: Tensor, layer: str | None = None
    ) -> list[Answer]:
        """The same of the teacher."""
        if not host.has_modes:
            return [self.teacher.answer(host, inputs, layer)]
        return _in_old_modes(host, lambda: self.teacher.answer(host, inputs, layer))

    def old_heads(self, host: ContinualHost) -> list[Columns]:
        """The columns that are distilled; those that tasks share once, or once for each mode."""
        heads = [task.columns for task in host.tasks[: host.opened]]
        return heads if host.has_modes else list(dict.fromkeys(heads))

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
        """What the teacher said of these samples' old heads, ``(batch, old classes)``; None: ask it."""
        if batch.samples is None or isinstance(batch.task, Tensor):  # beside other tasks' samples
            return None
        if self._recorded is None:
            limit = cast(Any, host).trainer.limit_train_batches
            whole = isinstance(limit, float) and limit == 1  # and not one batch
            if not (self.record and whole and host.phase.epochs > 1):
                return None
            self._recorded = self._record(host)
        return self._recorded.index_select(0, batch.samples)

    @torch.no_grad()
    def _record(self, host: ContinualHost) -> Tensor:
        """Ask of the whole task; each process its share, and then all know everything."""
        places, answers, samples = [], [], 0
        heads = self.old_heads(host)
        for batch in host.batches(host.opened, "train"):
            assert batch.samples is not None  # in evaluation nothing is augmented
            places.append(batch.samples.to(host.device))
            answers.append(side_by_side(self.teachers(host, batch.inputs), heads))
            samples += batch.global_size
        found = torch.cat(answers)
        everything = found.new_zeros(samples, found.shape[1])
        everything[torch.cat(places)] = found
        return host.all_reduce(everything)

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The distillation of all old heads."""
        if not self.asks(host):
            return {}
        heads = self.old_heads(host)
        student = side_by_side(self.students(host, batch, Answer(logits)), heads)
        teacher = self.recorded(host, batch)
        if teacher is None:
            teacher = side_by_side(self.teachers(host, batch.inputs), heads)
        return {"lwf": self.distilled(student, teacher, heads)}

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Forget what was recorded of the task's samples."""
        self._recorded = None

    def declared_bytes(self, host: ContinualHost) -> Bytes:
        """Training: the shared weights and float buffers once more, from the second task on."""
        kept = self.needs_teacher and host.opened > 0
        return Bytes(tensor_bytes(Teacher.of(host).values()) if kept else 0, 0)

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
