"""The base class of continual-learning methods and its hooks."""

from collections.abc import Collection, Mapping, Sequence
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

    Implement a method by overriding the hooks that it needs; several strategies compose in the order
    of the trainer's callbacks. State that has to survive a restart belongs in ``state_dict`` or in the
    module's bias units; its tensors are moved to the device before training.

    The hooks of an update run in this order: ``training_batch``; ``task_losses`` and ``loss_terms`` in the
    forward pass; then, on gradients
    that are reduced over processes and unscaled but not yet clipped, ``capture_grad``,
    ``penalty_grad``, ``project_grad``, ``consume_grad``; then, only if the optimizer actually stepped,
    ``correct_step`` and, after the ``correct_step`` of all strategies, ``observe_step``. Each receives
    the shared parameters that are trained in the current phase, by name, including the head. An
    optimizer may evaluate its closure several times per update, at different weights: ``penalty_grad``
    and ``project_grad`` run in every evaluation, ``capture_grad`` and ``consume_grad`` only in the
    first.
    """

    # --- properties, used to reject invalid combinations when a run is set up ---------------------

    #: Replaces gradients by a projection: at most one strategy of a run may do so.
    projects: ClassVar[bool] = False
    #: Cannot be combined with any other strategy.
    exclusive: ClassVar[bool] = False
    #: Runs the network in the mode of a task, so the task ID has to be given at inference.
    needs_task_id: ClassVar[bool] = False
    #: Accumulates values too small for weights in half precision (bf16-true, 16-true).
    needs_full_precision: ClassVar[bool] = False
    #: Only keeps weights or outputs close to old ones: with a single head and no task ID given
    #: (class-incremental) it is expected to forget.
    regularizer: ClassVar[bool] = False
    #: Arguments that make it bitwise equal to fine-tuning; None if there are none.
    null_arguments: ClassVar[Mapping[str, Any] | None] = None
    #: Its first task is plain training; False if it acts from the first update on.
    plain_first_task: ClassVar[bool] = True
    #: Works on what tasks share, so it is refused where that is frozen (``train="modes"``).
    needs_trainable_core: ClassVar[bool] = False
    #: Whether it needs a transformer's blocks; the conformance suite has some for it.
    needs_tokens: ClassVar[bool] = False
    #: Entries of its ``state_dict`` that hold weights by parameter name, such as averages: when a stream
    #: continues with new classes, their rows start as those of the network; any other entry's start as 0.
    weights_in_state: ClassVar[Collection[str]] = ()

    _token: object | None = None  # of the module that it learned with last

    @property
    def corrects_weights(self) -> bool:
        """Whether it changes shared weights after the optimizer's step, bypassing any projection."""
        return False

    # --- the stream ------------------------------------------------------------------------------

    def reset(self) -> None:
        """Initialize all state, discarding that of earlier fits.

        Called by the constructor, and by the module whenever a fit starts from scratch or from a
        checkpoint, before ``configure`` and before the checkpoint is loaded. One object can therefore
        be used in many fits, such as a loop over seeds. A fit that continues with the same module, and
        validation, test and prediction, keep the state.
        """

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Create layers and banks whenever the trainer starts, before any checkpoint is loaded."""

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Raise ConfigurationError for an invalid run, before training starts."""

    def phases(self, task: Task, phases: list[Phase]) -> list[Phase]:
        """The phases of a task, given those of earlier strategies: prepend or append your own."""
        return phases

    def training_tasks(self, task: Task) -> Sequence[int]:
        """The IDs of the tasks whose data a task is trained on, by default only its own."""
        return [task.id]

    def replayed_tasks(self, task: Task) -> Sequence[int]:
        """The IDs of earlier tasks whose samples it replays, by default none.

        Their rows of the head are trained too where each task has its own (``mask="task"``).
        """
        return ()

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Called once, before the first task."""

    def on_stream_growth(self, host: ContinualHost, tasks: Sequence[Task]) -> None:
        """Called when a learned stream goes on, before its checkpoint is loaded.

        Prepare what the network has of the new tasks, such as their keys. The state of the strategy itself
        grows without it: tensors by parameter name get the shapes of the network's.

        Args:
            host: its network has the new shapes.
            tasks: the new ones.
        """

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Called once per task, in its mode, before its optimizer is created."""

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Called once per task, in its mode, to consolidate. Compute first, then assign state.

        ``host.batches(task.id, "train")`` yields this process's shard of the samples, each once.
        """

    def training_state(self) -> str:
        """What of its state only training needs, in words; empty if there is none.

        Exports, and copies of a module, hold the network and what gates answer by, and no training state:
        a strategy continues from them if it has none.
        """
        return "state" if self.state_dict() else ""

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Overwrite what the state holds of a learned task; say what of it cannot be taken out.

        Called outside of a fit. ``host.network.structure.freed_columns(task.id)`` are the rows of the head
        that no other task has; what is in the network's modules is overwritten there.

        Returns:
            A phrase for each thing that stays, such as ``importances, summed over tasks``.
        """
        return (
            ["its state, which it does not divide by task"] if tensors_in(self.state_dict()) else []
        )

    def merged_weights(self, host: ContinualHost) -> Mapping[str, Tensor] | None:
        """Weights by name to swap in from a task's end until the next task starts; None: no swap.

        The module keeps the training weights in the meantime and restores them.
        """
        return None

    # --- phases of the strategy ------------------------------------------------------------------

    def phase_optimizer(self, host: ContinualHost, phase: Phase) -> Optimizer:
        """The optimizer of a phase that the strategy added, over parameters that it owns."""
        raise NotImplementedError(
            f"{type(self).__name__} adds phase {phase.name!r} but does not implement its training."
        )

    def phase_loss(self, host: ContinualHost, phase: Phase, batch: Batch) -> Tensor:
        """The loss of such a phase: per sample, ``(batch,)``, or summed.

        The network is in evaluation mode; detach its parameters so that they get no gradients.
        """
        raise NotImplementedError(
            f"{type(self).__name__} adds phase {phase.name!r} but does not implement its training."
        )

    # --- an update -------------------------------------------------------------------------------

    def training_batch(self, host: ContinualHost, batch: Batch) -> Batch:
        """The prepared samples that an update is made on: by default those of the stream's batch.

        Called once for each batch, before the forward pass; at most one strategy of a run may override it.
        """
        return batch

    def task_losses(self, host: ContinualHost, batch: Batch, logits: Tensor) -> Tensor:
        """Each sample's loss, in place of the module's: per sample, ``(batch,)``, or summed.

        At most one strategy of a run may override it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not replace the module's loss.")

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """Terms to add to the loss, by name: per sample, ``(batch,)``, or summed."""
        return {}

    def capture_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Read the gradients of the task's own loss."""

    def penalty_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the analytic gradient of a penalty."""

    def project_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Replace the gradients of shared parameters."""

    def consume_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Use the gradients of parameters that the strategy owns, and set them to None."""

    def correct_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Change the parameters after the optimizer's step."""

    def observe_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Read the parameters after the complete update, without changing them."""

    # --- costs and logs --------------------------------------------------------------------------

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Bytes of its state, computed from the shapes and the number of learned tasks."""
        return DeclaredBytes()

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The tensors of its state: by default all of ``state_dict``, needed for training only."""
        return HeldTensors(training=tensors_in(self.state_dict()))

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """Scalars to log every ``log_every_n_steps`` steps, by key, such as ``penalty/ewc``."""
        return {}

    def move_state(self, host: ContinualHost) -> None:
        """Move the strategy's tensors to the host's device, after a checkpoint was loaded."""

    @property
    def state_key(self) -> str:
        """The key of its state in checkpoints: the name in ``STRATEGIES``, else the class's import path."""
        module, name = type(self).__module__, type(self).__qualname__
        registered = {target: key for key, target in STRATEGIES.items()}
        return registered.get(f"{module}:{name}", f"{module}.{name}")


def refuse_fused(name: str, host: ContinualHost, optimizer: Optimizer) -> None:
    """Refuse an optimizer that unscales fp16 gradients in its step, after a strategy has edited them.

    Raises:
        ConfigurationError: names the strategy that edits the gradients.
    """
    if handles_unscaling(optimizer) and host.loss_scale != 1:
        raise ConfigurationError(
            f"Expected an optimizer without fused=True for {name} in 16-mixed precision, but got a "
            f"fused {type(optimizer).__name__}. Set fused to False, or use bf16-mixed."
        )
