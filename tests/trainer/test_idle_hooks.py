"""Empty hooks are passed over; those of somebody are called as ever."""

from collections import Counter
from typing import Any

from lightning.pytorch import Callback

from bpn_lightning.strategies import EWC
from bpn_lightning.trainer.idle_hooks import UPDATE_HOOKS


class Counting(Callback):
    """Overrides one hook in the class, calls the base's in it, and has another of its own."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.on_after_backward = lambda *_: self.calls.update(["on_after_backward"])

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.calls.update(["on_train_batch_end"])


class Inheriting(Counting):
    """Overrides nothing itself."""


def test_hooks_that_somebody_has_are_called_and_the_others_are_not(fit: Any) -> None:
    callbacks = [Counting(), Inheriting()]
    _, trainer = fit([EWC(1.0), *callbacks])
    steps = trainer.global_step
    for callback in callbacks:
        assert callback.calls == {"on_after_backward": steps, "on_train_batch_end": steps}
        idle = {name for name in UPDATE_HOOKS if getattr(callback, name) is None}
        assert idle == {*UPDATE_HOOKS} - {"on_after_backward", "on_train_batch_end"}
