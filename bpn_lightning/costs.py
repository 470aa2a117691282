"""Bytes: what is stored for each task, measured and by the paper's accounting."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

__all__ = ["HasCosts", "bias_unit_bytes", "bytes_per_task", "tensor_bytes"]

FLOAT32 = 4


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the elements of some tensors take.

    >>> import torch
    >>> tensor_bytes([torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)])
    16
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bias_unit_bytes(hidden: Sequence[int], classes: int) -> int:
    """Bytes of one task's bias units, as the paper counts them.

    One float32 for each unit of a hidden layer and for each of the task's own outputs, not for the
    other tasks' outputs that a single head also has.

    Table I of Wen et al. has four hidden layers of 300 and 2 classes:

    >>> bias_unit_bytes([300] * 4, classes=2)
    4808
    """
    return FLOAT32 * (sum(hidden) + classes)


class HasCosts(Protocol):
    """A strategy, as far as its costs go."""

    def bytes_per_task(self, host: Any) -> int: ...  # noqa: D102

    def paper_bytes_per_task(self, host: Any) -> int: ...  # noqa: D102


def bytes_per_task(strategies: Iterable[HasCosts], host: Any) -> dict[str, int]:
    """What one task adds to what is stored for use after training.

    The paper's rule (supplement A) leaves out what only training needs, such as the importances of
    EWC and M and W of the bias units.

    Returns:
        ``measured``, from the tensors, and ``paper``, by its accounting for the same network.
    """
    strategies = list(strategies)
    return {
        "measured": sum(strategy.bytes_per_task(host) for strategy in strategies),
        "paper": sum(strategy.paper_bytes_per_task(host) for strategy in strategies),
    }
