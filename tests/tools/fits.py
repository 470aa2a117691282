"""Networks and trainers that several test files make alike."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

__all__ = ["Function", "trainer_of"]


class Function(nn.Module):
    """A network whose forward is a function of its parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


def trainer_of(devices: int, callbacks: list[Callback], **flags: Any) -> Trainer:
    """A trainer on the CPU that writes and shows nothing; several devices by DDP."""
    return Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **flags,
    )
