"""The loss of each sample over the active output units: cross-entropy, or a custom loss."""

import warnings
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError

__all__ = ["CrossEntropy", "LossFunction", "SampleLoss"]

if TYPE_CHECKING:
    LossFunction = nn.Module | Callable[[Tensor, Tensor], Tensor]
else:
    LossFunction = nn.Module  # a config may only name modules, not arbitrary functions


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's cross-entropy with class weights as a list, so that a config can set them.

    Args:
        class_weights: one per class of the stream, in the order of the head; None: equal weights.
        label_smoothing: from 0 to 1, the fraction of the target spread over the active classes.
    """

    def __init__(
        self, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float)
        super().__init__(weight, label_smoothing=label_smoothing)


class SampleLoss:
    r"""The loss per sample; an update uses the mean over all samples of its batch.

    .. math:: L = \frac{1}{N} \sum_n \ell(f(x_n), y_n)

    A module of ``torch.nn`` is applied with ``reduction="none"``, and its class weights, one for each
    class of the stream, are restricted to the active classes. Differs from torch: weighted losses are
    averaged over samples, whereas torch's ``reduction="mean"`` divides by the sum of the weights, which
    varies between batches and is not known to a process that has only its shard of the batch.

    It is not part of the network: its tensors are not in checkpoints, and it has no parameters.

    Args:
        loss: maps active logits ``(batch, classes)`` and targets ``(batch,)`` int64, relative to the
            first active class, to losses ``(batch,)``; None: cross-entropy.

    Attributes:
        without: classes that take part in no loss: those of forgotten tasks.

    Raises:
        ConfigurationError: it is neither a module nor a function, sums over samples, or has parameters.
    """

    def __init__(self, loss: LossFunction | None) -> None:
        self.loss = loss
        self.without: Sequence[int] = ()
        self._parts: dict[tuple[object, ...], nn.Module] = {}  # by active classes, device and dtype
        if loss is None:
            return
        if not callable(loss) or isinstance(loss, type):
            raise ConfigurationError(
                f"Expected loss to be a module or a function of (logits, targets), but got {loss!r}. "
                "Pass an object, such as torch.nn.CrossEntropyLoss(label_smoothing=0.1)."
            )
        if isinstance(loss, nn.Module):
            _check_module(loss)

    def __call__(self, logits: Tensor, targets: Tensor, first: int = 0) -> Tensor:
        """Losses ``(batch,)``.

        Args:
            logits: ``(batch, classes)``, of the active classes.
            targets: ``(batch,)`` int64, relative to the first active class.
            first: index of the first active class in the head.
        """
        columns = self._columns(first, logits.shape[1])
        if len(columns) < logits.shape[1]:
            index = torch.tensor(columns, device=logits.device) - first
            logits, targets = logits[:, index], torch.searchsorted(index, targets)
        if self.loss is None:
            return F.cross_entropy(logits, targets, reduction="none")
        if not isinstance(self.loss, nn.Module):
            return self.loss(logits, targets)
        where = logits.device
        # Operations that autocast runs in full precision need weights in full precision.
        dtype = torch.float32 if torch.is_autocast_enabled(where.type) else logits.dtype
        key = (columns, where, dtype)
        if key not in self._parts:
            self._parts[key] = _of_columns(self.loss, columns).to(where, dtype)
        losses: Tensor = self._parts[key](logits, targets)
        return losses

    def _columns(self, first: int, number: int) -> Sequence[int]:
        """The classes of so many columns that take part, ascending."""
        columns = range(first, first + number)
        if not self.without:
            return columns
        return tuple(column for column in columns if column not in self.without)

    def by_task(
        self,
        logits: Tensor,
        targets: Tensor,
        tasks: Tensor,
        columns: Callable[[int], tuple[int, int]],
    ) -> Tensor:
        """Losses of samples of several tasks, ``(batch,)``, each over its own task's classes.

        Args:
            logits: ``(batch, num_classes)``.
            targets: ``(batch,)`` int64, indices into the head.
            tasks: ``(batch,)`` int64.
            columns: maps a task to ``(start, stop)`` of its output units.
        """
        losses = torch.zeros_like(targets, dtype=logits.dtype)
        ids = sorted(set(tasks.tolist()))
        for first, stop in sorted({columns(one) for one in ids}):
            same = [one for one in ids if columns(one) == (first, stop)]
            own = torch.isin(tasks.to(targets.device), torch.tensor(same, device=targets.device))
            of_own = self(logits[own, first:stop], targets[own] - first, first)
            losses = losses.to(of_own.dtype).masked_scatter(own, of_own)
        return losses

    def check(self, num_classes: int, columns: Collection[tuple[int, int]]) -> None:
        """Evaluate it on two random samples for each set of active classes.

        Args:
            num_classes: of the stream.
            columns: ``(start, stop)`` of each set of output units that may be active.

        Raises:
            ConfigurationError: the number of class weights is wrong, or it does not return one loss per
                sample.
        """
        if self.loss is None:
            return
        for name, part in _weighted(self.loss):
            if part.shape != (num_classes,):
                raise ConfigurationError(
                    f"Expected {name} of loss to hold a weight for each of the {num_classes} classes of "
                    f"the stream, but got the shape {tuple(part.shape)}. Use the order of the head."
                )
        for first, stop in columns:
            logits = torch.linspace(-1, 1, 2 * (stop - first)).view(2, -1).requires_grad_()
            kept = self._columns(first, stop - first)
            targets = torch.tensor([kept[0], kept[-1]]) - first
            rule = (
                f"Expected loss to map logits (batch, {stop - first}) and targets (batch,) to losses "
                "(batch,)"
            )
            try:
                with warnings.catch_warnings(), torch.enable_grad():
                    warnings.simplefilter("ignore")  # the error below explains the problem
                    losses: object = self(logits, targets, first)
            except Exception as error:  # a custom loss may raise any exception here
                said = " ".join(str(error).split())
                raise ConfigurationError(
                    f"{rule}, but it raised {type(error).__name__}: {said}. Pass one for class indices, "
                    "such as torch.nn.CrossEntropyLoss."
                ) from error
            if not isinstance(losses, Tensor) or losses.shape != (2,):
                shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ConfigurationError(
                    f"{rule}, but got {shape} for 2 samples. Return one loss per sample, as "
                    "reduction='none' does."
                )
            if not (losses.requires_grad and losses.isfinite().all()):
                raise ConfigurationError(
                    f"{rule} that are finite and have a gradient, but got {losses}. Compute them from "
                    "the logits, by differentiable functions."
                )
        self._parts.clear()


def _check_module(loss: nn.Module) -> None:
    learning = [name for name, parameter in loss.named_parameters() if parameter.requires_grad]
    if learning:
        raise ConfigurationError(
            f"Expected loss to have no parameters, but got {type(loss).__name__} with {learning[0]}. "
            "Move the parameters into the backbone, or freeze them with requires_grad_(False)."
        )
    if isinstance(loss, nn.NLLLoss):
        raise ConfigurationError(
            "Expected loss to be a function of logits, but got NLLLoss, which takes log-probabilities. "
            "Use torch.nn.CrossEntropyLoss."
        )
    for part in loss.modules():
        if getattr(part, "reduction", "none") not in ("mean", "none"):
            raise ConfigurationError(
                "Expected loss to have reduction 'mean' or 'none', but got "
                f"{part.reduction!r}. An update is the mean over its samples: use 'mean', and a higher "
                "learning rate."
            )


def _weighted(loss: LossFunction) -> list[tuple[str, Tensor]]:
    """The class weights of a loss of torch, by name."""
    parts = loss.named_modules() if isinstance(loss, nn.Module) else ()
    weighted = [
        (f"{name}.weight".lstrip("."), getattr(part, "weight", None))
        for name, part in parts
        if isinstance(part, nn.modules.loss._WeightedLoss)
    ]
    return [(name, weight) for name, weight in weighted if isinstance(weight, Tensor)]


def _of_columns(loss: nn.Module, columns: Sequence[int]) -> nn.Module:
    """A copy that returns one loss per sample, restricted to some classes."""
    copy = deepcopy(loss)
    for part in copy.modules():
        if isinstance(getattr(part, "reduction", None), str):
            part.__dict__["reduction"] = "none"
        if not isinstance(part, nn.modules.loss._WeightedLoss):
            continue
        if isinstance(part.weight, Tensor):
            part.weight = part.weight[list(columns)].to(
                torch.promote_types(part.weight.dtype, torch.half)
            )
        if isinstance(getattr(part, "ignore_index", None), int):
            ignored = part.ignore_index
            place = columns.index(ignored) if ignored in columns else -100
            part.__dict__["ignore_index"] = place
    return copy
