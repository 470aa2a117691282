"""What a strategy works on: the network, its stream, and the fit that trains it."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.tasks import Batch, ContinualStream, Phase, Split

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["ContinualHost"]


class ContinualHost(Protocol):
    """What a strategy gets in its hooks.

    Attributes:
        network: inputs ``(batch, ...)`` to logits ``(batch, columns)``; its structure, its modes and its
            shared parameters.
        in_step_forward: whether the forward that runs is the training step's own, on its batch in its
            mode. A hook on a layer hears others too: of teachers, memories and importances, and of whatever
            other strategies add to the loss.
    """

    network: ContinualNetwork
    in_step_forward: bool

    @property
    def device(self) -> torch.device:
        """The device that the network lies on."""

    @property
    def stream(self) -> ContinualStream:
        """The stream that is learned."""

    @property
    def trainer(self) -> "Trainer":
        """The trainer of the fit."""

    @property
    def phase(self) -> Phase:
        """The phase that runs."""

    @property
    def task_progress(self) -> float:
        """The fraction of the open task's updates that have happened, 0 at its first one.

        Of those that are planned in its phases that train the whole network. A task that early stopping
        ends does not come near 1.
        """

    @property
    def trains_own_rows_only(self) -> bool:
        """Whether of the head only the rows of the open task's own classes move."""

    @property
    def global_rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def loss_scale(self) -> float:
        """What gradients of parameters outside the optimizer are still multiplied by (fp16)."""

    @property
    def training_weights(self) -> Mapping[str, Tensor]:
        """By name, the weights of training while merged ones are in their place; else empty."""

    def learning_rate(self, parameter: nn.Parameter) -> float:
        """The current optimizer's learning rate of a parameter."""

    def batches(
        self, task_id: int, split: Split, max_samples: int | None = None
    ) -> Iterable[Batch]:
        """This process's share of a task's samples, each once, on the device and prepared."""

    def gate_batches(self, task_id: int, split: Split) -> Iterable[Batch]:
        """The same as gates see them, under one normalization for all tasks."""

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """A raw batch as the network takes it: prepared by the stream, then through the front."""

    def losses(self, logits: Tensor, targets: Tensor, task: "int | Tensor") -> Tensor:
        """Each sample's loss ``(batch,)``, of logits ``(batch, num_classes)`` in its task's columns."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
