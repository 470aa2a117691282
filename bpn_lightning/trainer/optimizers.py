"""Which optimizers may run with which flags and strategies."""

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
    """Refuse an optimizer that would do something else than it says with these flags and strategies.

    Raises:
        ConfigurationError: names the optimizer, the rule and the remedy.
    """
    scaled = grad_scaler(trainer) is not None
    if scaled and handles_unscaling(optimizer) and trainer.gradient_clip_val:
        raise ConfigurationError(
            "Expected the optimizer not to be fused where gradients are clipped in 16-mixed precision, "
            f"but got a fused {type(optimizer).__name__}. Set fused to False, or use bf16-mixed."
        )
    if scaled and _needs_closure(optimizer):
        raise ConfigurationError(
            "Expected the optimizer to step without a closure in 16-mixed precision, whose scaler looks at "
            f"the gradients once per update, but got {type(optimizer).__name__}. Use bf16-mixed."
        )
    if isinstance(optimizer, LBFGS):
        _check_lbfgs(trainer, optimizer, strategies, stream)


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step has an argument without a default: nothing but a closure can be meant."""
    first = next(iter(signature(optimizer.step).parameters.values()), None)
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return first is not None and first.kind in named and first.default is Parameter.empty


def _check_lbfgs(
    trainer: Trainer,
    optimizer: Optimizer,
    strategies: Sequence[ContinualStrategy],
    stream: ContinualStream,
) -> None:
    """LBFGS compares gradients, and losses where it searches a line, from one point to the next."""
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
            "After its first look at an update's batches it would see the last of them only.",
        ),
        (
            bool(trainer.gradient_clip_val),
            f"gradient_clip_val={trainer.gradient_clip_val}",
            "It would take the curvature from clipped gradients.",
        ),
        (
            stream.reset_optimizer == "never",
            "reset_optimizer='never'",
            "What it remembers of the loss is of the task before.",
        ),
        (
            bool(projecting),
            " and ".join(projecting),
            "Projected gradients have no curvature, and its step is not along them.",
        ),
        (
            bool(search and penalizing),
            f"{' and '.join(penalizing)} with line_search_fn={search!r}",
            "It would search along a penalized gradient for the least of a loss without the penalty.",
        ),
    ):
        if broken:
            raise ConfigurationError(
                f"Expected the optimizer not to be LBFGS with {what}, but got LBFGS. {why} "
                "Leave one of the two out."
            )


def check_repeated_evaluation(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an optimizer that asks for an update's gradients again where they accumulate.

    Only LBFGS can be told before its first update; nothing is learned by then.

    Raises:
        ConfigurationError: names the optimizer, the flag and the remedy.
    """
    if trainer.accumulate_grad_batches > 1:
        raise ConfigurationError(
            "Expected trainer.accumulate_grad_batches to be 1 with an optimizer that evaluates its "
            f"closure several times, but got {trainer.accumulate_grad_batches} with "
            f"{type(optimizer).__name__}. It would see an update's last batch only. Use a larger "
            "batch_size."
        )
