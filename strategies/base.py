"""The hooks of a continual-learning method, and what they are handed inside a step."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensors_in
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.strategies.table import STRATEGIES
from bpn_lightning.tasks import Batch, ContinualStream, Phase, Task
from bpn_lightning.trainer.lightning import handles_unscaling

__all__ = ["ContinualStrategy", "refuse_fused"]


class ContinualStrategy(Callback):
    """A continual-learning method: an ordinary Lightning callback with hooks at task boundaries.

    Write a method by overriding the hooks that it needs; several strategies compose in the order of
    the trainer's callbacks. State that matters after a restart belongs in ``state_dict`` or in the
    module's bias units; tensors among it are moved to the device before training.

    The hooks of an update run in this order: ``loss_terms`` in the forward; then, on gradients that are
    reduced over processes and unscaled but not clipped, ``capture_grad``, ``penalty_grad``,
    ``project_grad``, ``consume_grad``; then, only when the optimizer really stepped,
    ``correct_step`` and, after that of every strategy, ``observe_step``. Each gets the shared
    parameters that train in the current phase, by name, the head among them. An optimizer may ask for
    an update's gradients several times, at other weights each time: ``penalty_grad`` and
    ``project_grad`` are called for all of them, ``capture_grad`` and ``consume_grad`` for the first
    only.
    """

    # --- what it is, so that runs which cannot be right are refused when they are built -----------

    #: Replaces gradients by a projection: at most one strategy of a run may.
    projects: ClassVar[bool] = False
    #: Composes with no other strategy.
    exclusive: ClassVar[bool] = False
    #: Answers in the mode of a task, so somebody has to name the task at test.
    needs_task_id: ClassVar[bool] = False
    #: Measures or adds up what weights in half precision (bf16-true, 16-true) would lose.
    needs_full_precision: ClassVar[bool] = False
    #: Holds weights or outputs near old ones and nothing else: with one head for all classes and no
    #: task id it is expected to forget.
    regularizer: ClassVar[bool] = False
    #: Arguments with which it is fine-tuning bit for bit; None where there are none.
    null_arguments: ClassVar[Mapping[str, Any] | None] = None
    #: Its first task is plain training; False where it acts from the first update on.
    plain_first_task: ClassVar[bool] = True

    @property
    def corrects_weights(self) -> bool:
        """Whether it moves shared weights after the optimizer's step, past any projection."""
        return False

    # --- the stream ------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every earlier fit: a strategy defines all of its state here.

        The constructor calls it, and so does the module at the launch of a fit that begins or goes on
        from a checkpoint, before ``configure`` and before the checkpoint is loaded. So one object may
        take part in many fits, such as a loop over seeds. A fit that goes on with its own module, and
        validation, test and prediction, keep what was learned.
        """

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Build structure (layers, banks) at every launch, before any checkpoint is loaded."""

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Raise ConfigurationError where the run cannot be right, before training starts."""

    def phases(self, task: Task, phases: list[Phase]) -> list[Phase]:
        """The phases of a task, given those so far: prepend a warm-up, append a stage."""
        return phases

    def training_tasks(self, task: Task) -> Sequence[int]:
        """The tasks whose data a task is trained on; they need not be its own only."""
        return [task.id]

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Once, before the first task."""

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Once per task, in its mode, before its optimizer is made."""

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Once per task, in its mode: consolidate. Compute first, commit last.

        ``host.batches(task.id, "train")`` has this process's share of the samples, each once.
        """

    def merged_weights(self, host: ContinualHost) -> Mapping[str, Tensor] | None:
        """Weights by name to serve from a task's end until the next task starts; None: those it has.

        The module keeps the weights of training meanwhile, and puts them back.
        """
        return None

    # --- a phase of its own ----------------------------------------------------------------------

    def phase_optimizer(self, host: ContinualHost, phase: Phase) -> Optimizer:
        """The optimizer of a phase that trains a strategy, over parameters that the strategy owns."""
        raise NotImplementedError(f"{type(self).__name__} declares phase {phase.name!r} only.")

    def phase_loss(self, host: ContinualHost, phase: Phase, batch: Batch) -> Tensor:
        """The loss of such a phase: per sample ``(batch,)``, or their sum.

        The network is in evaluation mode, and its parameters must not take part: detach them.
        """
        raise NotImplementedError(f"{type(self).__name__} declares phase {phase.name!r} only.")

    # --- an update -------------------------------------------------------------------------------

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """Terms to add to the loss, by name: per sample ``(batch,)``, or their sum."""
        return {}

    def capture_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Read the gradients of the task's own loss."""

    def penalty_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the analytic gradient of a penalty."""

    def project_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Replace the gradients of shared parameters."""

    def consume_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take gradients of parameters of one's own and set them to None."""

    def correct_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """The parameters have moved; move them on, if that is the method."""

    def observe_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """The update is over, whatever strategies have added to it: look, and move nothing."""

    # --- what it costs, what it says -------------------------------------------------------------

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Bytes that it holds, by formula, from the shapes and the number of learned tasks."""
        return DeclaredBytes()

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The tensors that it holds: by default every one of ``state_dict``, for training only."""
        return HeldTensors(training=tensors_in(self.state_dict()))

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """Scalars to log every ``log_every_n_steps`` steps, by key, such as ``penalty/ewc``."""
        return {}

    def move_state(self, host: ContinualHost) -> None:
        """Move tensors of one's own to the host's device, after a checkpoint was loaded."""

    @property
    def state_key(self) -> str:
        """The name of this strategy's state in checkpoints: its own in the table, or its class's path."""
        module, name = type(self).__module__, type(self).__qualname__
        registered = {target: key for key, target in STRATEGIES.items()}
        return registered.get(f"{module}:{name}", f"{module}.{name}")


def refuse_fused(name: str, host: ContinualHost, optimizer: Optimizer) -> None:
    """Refuse an optimizer that takes off fp16's loss scale in its step, after gradients were edited.

    Raises:
        ConfigurationError: names the strategy that edits them.
    """
    if handles_unscaling(optimizer) and host.loss_scale != 1:
        raise ConfigurationError(
            f"Expected the optimizer not to be fused where {name} runs in 16-mixed precision, but "
            f"got a fused {type(optimizer).__name__}. Set fused to False, or use bf16-mixed."
        )
