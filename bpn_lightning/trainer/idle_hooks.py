"""Hooks that Lightning calls for nobody at every update, left out.

It calls six hooks of every callback, also those that are the empty ones of the base class; beside a small
network's update that takes time. ``benchmarks/lightning_overhead.py`` measures it.
"""

from lightning.pytorch import Callback, Trainer

__all__ = ["leave_out_idle_hooks"]

UPDATE_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def leave_out_idle_hooks(trainer: Trainer) -> None:
    """Let the trainer pass over the empty hooks of its callbacks.

    Lightning calls a hook that can be called, so an instance has None where its class overrides nothing;
    the class keeps its method, and with it ``super()``.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        for name in UPDATE_HOOKS:
            if getattr(callback, name) == getattr(Callback, name).__get__(callback):
                setattr(callback, name, None)
