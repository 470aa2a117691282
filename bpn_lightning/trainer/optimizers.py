"""Which optimizers are compatible with which flags and strategies."""

from collections.abc import Sequence
from inspect import Parameter, signature

from lightning.pytorch import Trainer
from torch.optim import LBFGS, Optimizer

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream
from bpn_lightning.trainer.lightning import grad_scaler, handles_unscaling

__all__ = ["check_optimizer", "check_repeated_evaluation"]


def check_optimizer(
    trainer: Trainer,
    optimizer: Optimizer,
    strategies: Sequence[ContinualStrategy],
    stream: ContinualStream,
) -> None:
    """Refuse an optimizer that would not work as documented with these flags and strategies.

    Raises:
        ConfigurationError: names the optimizer, the rule and the remedy.
    """
    scaled = grad_scaler(trainer) is not None
    if scaled and handles_unscaling(optimizer) and trainer.gradient_clip_val:
        raise ConfigurationError(
            "Expected an optimizer without fused=True when gradients are clipped in 16-mixed precision, "
            f"but got a fused {type(optimizer).__name__}. Set fused to False, or use bf16-mixed."
        )
    if scaled and _needs_closure(optimizer):
        raise ConfigurationError(
            "Expected the optimizer to step without a closure in 16-mixed precision, whose scaler checks "
            f"the gradients once per update, but got {type(optimizer).__name__}. Use bf16-mixed."
        )
    if isinstance(optimizer, LBFGS):
        _check_lbfgs(trainer, optimizer, strategies, stream)


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step has an argument without a default, which can only be a closure."""
    first = next(iter(signature(optimizer.step).parameters.values()), None)
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return first is not None and first.kind in named and first.default is Parameter.empty


def _check_lbfgs(
    trainer: Trainer,
    optimizer: Optimizer,
    strategies: Sequence[ContinualStrategy],
    stream: ContinualStream,
) -> None:
    """Refuse LBFGS if the gradients, or losses in a line search, are not comparable between evaluations."""
    search = optimizer.param_groups[0]["line_search_fn"]
    projecting = [type(s).__name__ for s in strategies if s.projects]
    penalizing = [
        type(s).__name__
        for s in strategies
        if type(s).penalty_grad is not ContinualStrategy.penalty_grad
    ]
    for broken, what, why in (
        (
            trainer.accumulate_grad_batches > 1,
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}",
            "After the first evaluation of an update it would use only the last of its batches.",
        ),
        (
            bool(trainer.gradient_clip_val),
            f"gradient_clip_val={trainer.gradient_clip_val}",
            "It would estimate the curvature from clipped gradients.",
        ),
        (
            stream.reset_optimizer == "never",
            "reset_optimizer='never'",
            "Its history would be from the loss of the previous task.",
        ),
        (
            bool(projecting),
            " and ".join(projecting),
            "Projected gradients have no curvature, and its step is not along them.",
        ),
        (
            bool(search and penalizing),
            f"{' and '.join(penalizing)} with line_search_fn={search!r}",
            "Its line search would minimize a loss without the penalty along a gradient with the penalty.",
        ),
    ):
        if broken:
            raise ConfigurationError(
                f"Expected the optimizer not to be LBFGS with {what}, but got LBFGS. {why} "
                "Leave one of the two out."
            )


def check_repeated_evaluation(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an optimizer that evaluates its closure repeatedly while gradients accumulate.

    Other optimizers than LBFGS are only recognized in their first update, before any weights change.

    Raises:
        ConfigurationError: names the optimizer, the flag and the remedy.
    """
    if trainer.accumulate_grad_batches > 1:
        raise ConfigurationError(
            "Expected trainer.accumulate_grad_batches to be 1 with an optimizer that evaluates its "
            f"closure several times, but got {trainer.accumulate_grad_batches} with "
            f"{type(optimizer).__name__}. It would use only an update's last batch. Use a larger "
            "batch_size."
        )
