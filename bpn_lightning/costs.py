"""Memory costs in bytes: what is stored per task, measured and by the paper's accounting."""

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
    """Total bytes of the elements of tensors.

    >>> import torch
    >>> tensor_bytes([torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)])
    16
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bias_unit_bytes(hidden: Sequence[int], classes: int) -> int:
    """Bytes of one task's bias units, as the paper counts them.

    One float32 per hidden unit and per output of the task itself, not counting the other tasks'
    outputs in a single head.

    Table I of Wen et al. has four hidden layers of 300 and 2 classes:

    >>> bias_unit_bytes([300] * 4, classes=2)
    4808
    """
    return FLOAT32 * (sum(hidden) + classes)


class Bytes(NamedTuple):
    """The size of a strategy's state, in addition to the network's own weights.

    Attributes:
        training: bytes between updates, everything needed to continue training.
        inference: the bytes of it that are needed for inference.
    """

    training: int
    inference: int


class DeclaredBytes(NamedTuple):
    """The same size computed from shapes and the number of learned tasks, and its growth per task.

    Attributes:
        training: bytes between updates, everything needed to continue training.
        inference: the bytes of it that are needed for inference.
        per_task: bytes added per task, by the rule of :func:`bytes_per_task`.
        per_task_in_paper: the same by the accounting of Wen et al.
    """

    training: int = 0
    inference: int = 0
    per_task: int = 0
    per_task_in_paper: int = 0

    @property
    def held(self) -> Bytes:
        """The part that has to equal :func:`measured_bytes`."""
        return Bytes(self.training, self.inference)


class HeldTensors(NamedTuple):
    """The tensors of a strategy's state, without the network's own weights; duplicates count once.

    Attributes:
        training: needed only to continue training.
        inference: needed for inference.
    """

    training: Iterable[Tensor] = ()
    inference: Iterable[Tensor] = ()


class HasCosts(Protocol):
    """The cost methods of a strategy."""

    def declared_bytes(self, host: Any) -> DeclaredBytes: ...  # noqa: D102

    def held_tensors(self, host: Any) -> HeldTensors: ...  # noqa: D102


def measured_bytes(strategy: HasCosts, host: Any) -> Bytes:
    """The current size of a strategy's state, from its tensors; duplicates count once."""
    training, inference = map(list, strategy.held_tensors(host))
    everything = [*inference, *training]
    return Bytes(_once(everything), _once(inference))


def bytes_held(strategies: Iterable[HasCosts], host: Any) -> Bytes:
    """The total size of the state of all strategies of a run."""
    held = [measured_bytes(strategy, host) for strategy in strategies]
    return Bytes(sum(b.training for b in held), sum(b.inference for b in held))


def _once(tensors: Iterable[Tensor]) -> int:
    return tensor_bytes({(t.data_ptr(), t.numel()): t for t in tensors}.values())


def tensors_in(state: object) -> list[Tensor]:
    """All tensors in nested mappings and lists, such as a state_dict."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [tensor for part in state for tensor in tensors_in(part)]
    return []


def bytes_per_task(strategies: Iterable[HasCosts], host: Any) -> dict[str, int]:
    """The bytes that one task adds to what is needed for inference.

    The paper's rule (supplement A) excludes what only training needs, such as the importances of EWC
    and M and W of the bias units.

    Returns:
        ``measured`` for the actual network, and ``paper`` for the same network by the paper's accounting.
    """
    declared = [strategy.declared_bytes(host) for strategy in strategies]
    return {
        "measured": sum(each.per_task for each in declared),
        "paper": sum(each.per_task_in_paper for each in declared),
    }
