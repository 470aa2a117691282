"""Bytes: what is stored for each task, measured and by the paper's accounting."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = [
    "Bytes",
    "DeclaredBytes",
    "HasCosts",
    "HeldTensors",
    "bias_unit_bytes",
    "bytes_held",
    "bytes_per_task",
    "measured_bytes",
    "tensor_bytes",
    "tensors_in",
]

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


class Bytes(NamedTuple):
    """What a strategy holds beside the network's own weights.

    Attributes:
        training: bytes between updates, all that it needs to go on learning.
        inference: bytes of it that are needed to use what was learned.
    """

    training: int
    inference: int


class DeclaredBytes(NamedTuple):
    """The same by formula, from shapes and the number of learned tasks, and how it grows.

    Attributes:
        training: bytes between updates, all that it needs to go on learning.
        inference: bytes of it that are needed to use what was learned.
        per_task: what one task adds to what is stored, by the rule of :func:`bytes_per_task`.
        per_task_in_paper: the same network by the accounting of Wen et al.
    """

    training: int = 0
    inference: int = 0
    per_task: int = 0
    per_task_in_paper: int = 0

    @property
    def held(self) -> Bytes:
        """What is to be equal to :func:`measured_bytes`."""
        return Bytes(self.training, self.inference)


class HeldTensors(NamedTuple):
    """What a strategy holds beside the network's own weights; a tensor in both counts once.

    Attributes:
        training: what only going on to learn needs.
        inference: what is needed to use what was learned.
    """

    training: Iterable[Tensor] = ()
    inference: Iterable[Tensor] = ()


class HasCosts(Protocol):
    """A strategy, as far as its costs go."""

    def declared_bytes(self, host: Any) -> DeclaredBytes: ...  # noqa: D102

    def held_tensors(self, host: Any) -> HeldTensors: ...  # noqa: D102


def measured_bytes(strategy: HasCosts, host: Any) -> Bytes:
    """What a strategy holds now, from its tensors; one that is listed twice counts once."""
    training, inference = map(list, strategy.held_tensors(host))
    everything = [*inference, *training]
    return Bytes(_once(everything), _once(inference))


def bytes_held(strategies: Iterable[HasCosts], host: Any) -> Bytes:
    """What all strategies of a run hold together."""
    held = [measured_bytes(strategy, host) for strategy in strategies]
    return Bytes(sum(b.training for b in held), sum(b.inference for b in held))


def _once(tensors: Iterable[Tensor]) -> int:
    return tensor_bytes({(t.data_ptr(), t.numel()): t for t in tensors}.values())


def tensors_in(state: object) -> list[Tensor]:
    """Every tensor in nested mappings and lists, such as a state_dict."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [tensor for part in state for tensor in tensors_in(part)]
    return []


def bytes_per_task(strategies: Iterable[HasCosts], host: Any) -> dict[str, int]:
    """What one task adds to what is stored for use after training.

    The paper's rule (supplement A) leaves out what only training needs, such as the importances of
    EWC and M and W of the bias units.

    Returns:
        ``measured``, of the network that was built, and ``paper``, by its accounting for the same network.
    """
    declared = [strategy.declared_bytes(host) for strategy in strategies]
    return {
        "measured": sum(each.per_task for each in declared),
        "paper": sum(each.per_task_in_paper for each in declared),
    }
