"""A learned network as plain modules that only answer: what ``torch.export`` takes."""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.nn.sharding import check_whole

__all__ = ["FixedModeNetwork", "PerSampleNetwork", "closed_columns_added"]


def closed_columns_added(logits: Tensor, num_classes: int) -> Tensor:
    """Logits ``(batch, open columns)`` of a head, with -inf for its other columns."""
    closed = num_classes - logits.shape[1]
    return F.pad(logits, (0, closed), value=float("-inf")) if closed else logits


class _CopiedNetwork(nn.Module):
    """A copy of a network, in evaluation mode.

    Args:
        backbone: maps ``(batch, *input_shape)``, or a front's features, to features.
        head: maps features to logits.
        columns: ``(start, stop)`` of the head's columns that take part, for each mode.
        front: what inputs go through before the backbone; None: they do not.
        forgotten: columns that take part in no mode.

    Raises:
        ConfigurationError: the backbone cannot be copied, or is sharded.
    """

    outside: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        columns: Sequence[tuple[int, int]],
        front: Front | None = None,
        forgotten: Sequence[int] = (),
    ) -> None:
        super().__init__()
        check_whole(backbone)
        try:
            self.backbone, self.head, self.front = deepcopy((backbone, head, front))
        except (RuntimeError, TypeError) as error:
            raise ConfigurationError(
                f"Expected backbone to be a network that copy.deepcopy copies, but got: {error}. Where it "
                "has torch.nn.utils.weight_norm, use that of torch.nn.utils.parametrizations."
            ) from error
        outside = _outside(columns, head)
        outside[:, list(forgotten)] = True
        self.register_buffer("outside", outside)
        self.leaves_out = bool(outside.any())
        self.eval()

    def _logits(self, inputs: Tensor) -> Tensor:
        if self.front is not None:
            inputs = self.front.standardized(inputs)
        logits: Tensor = self.head(self.backbone(inputs))
        return closed_columns_added(logits, self.outside.shape[1])


class FixedModeNetwork(_CopiedNetwork):
    """A copy of a network in the mode that it is in: logits as a function of inputs alone.

    ``columns`` has one entry, that of the mode.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """``(batch, *input_shape)``, prepared, to logits ``(batch, num_classes)``.

        They are -inf in the columns that the mask leaves out.
        """
        logits = self._logits(inputs)
        return logits.masked_fill(self.outside, float("-inf")) if self.leaves_out else logits


class PerSampleNetwork(_CopiedNetwork):
    """A copy of a network in which each sample has its own mode: a function of inputs and task IDs.

    ``columns`` has one entry for each task.
    """

    def forward(self, inputs: Tensor, tasks: Tensor) -> Tensor:
        """``(batch, *input_shape)`` and ``(batch,)`` int64 to logits ``(batch, num_classes)``.

        They are -inf in the columns that the mask leaves out of a sample's mode.
        """
        parts = [part for part in self.modules() if isinstance(part, TaskModule)]
        for part in parts:
            part.switch(tasks)
        try:
            logits = self._logits(inputs)
        finally:
            for part in parts:
                part.switch(0)  # a module keeps no tensor of one call
        return logits.masked_fill(self.outside[tasks], float("-inf"))


def _outside(columns: Sequence[tuple[int, int]], head: nn.Linear) -> Tensor:
    """Which columns take no part, ``(modes, num_classes)``."""
    edges = torch.tensor(columns, device=head.weight.device)
    indices = torch.arange(head.out_features, device=head.weight.device)
    return (indices < edges[:, :1]) | (indices >= edges[:, 1:])
