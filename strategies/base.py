"""The hooks of a continual-learning method, and what they are handed inside a step."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from bpn_lightning.tasks import Batch, ContinualHost, ContinualStream, Phase, Task

__all__ = ["ContinualStrategy"]


class ContinualStrategy(Callback):
    """A continual-learning method: an ordinary Lightning callback with hooks at task boundaries.

    Write a method by overriding the hooks that it needs; several strategies compose in the order of
    the trainer's callbacks. State that matters after a restart belongs in ``state_dict`` or in the
    module's bias units; tensors among it are moved to the device before training.

    The hooks of an update run in this order: ``loss_terms`` in the forward; then, on gradients that are
    reduced over processes and unscaled but not clipped, ``capture_grad``, ``penalty_grad``,
    ``project_grad``, ``consume_grad``; then, only when the optimizer really stepped,
    ``on_optimizer_stepped``. Each gets the trainable shared parameters by name, the head among them.
    """

    #: Replaces gradients by a projection: at most one strategy of a run may.
    projects: ClassVar[bool] = False

    # --- the stream ------------------------------------------------------------------------------

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Build structure (layers, banks) at every launch, before any checkpoint is loaded."""

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Raise ConfigurationError where the run cannot be right, before training starts."""

    def phases(self, task: Task, phases: list[Phase]) -> list[Phase]:
        """The phases of a task, given those so far: prepend a warm-up, append a stage."""
        return phases

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Once, before the first task."""

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Once per task, in its mode, before its optimizer is made."""

    def on_task_switch(self, host: ContinualHost, task: "int | Tensor") -> None:
        """The module's mode changes, for training, evaluation, replay or an importance pass."""

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Once per task, in its mode: consolidate. Compute first, commit last.

        ``host.batches(task.id, "train")`` has this process's share of the samples, each once.
        """

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

    def on_optimizer_stepped(
        self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """The parameters have moved."""

    # --- what it costs, what it says -------------------------------------------------------------

    def bytes_per_task(self, host: Any) -> int:
        """Bytes that one task adds to what is stored for use after training."""
        return 0

    def paper_bytes_per_task(self, host: Any) -> int:
        """The same by the accounting of Wen et al."""
        return self.bytes_per_task(host)

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """Scalars to log every ``log_every_n_steps`` steps, by name, such as the penalty."""
        return {}

    def move_state(self, host: ContinualHost) -> None:
        """Move tensors of one's own to the host's device, after a checkpoint was loaded."""

    @property
    def state_key(self) -> str:
        """The name of this strategy's state in checkpoints."""
        return f"{type(self).__module__}.{type(self).__qualname__}"
