"""A class of one's own adds to what a stream is learned by, and does not silently replace it."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.rules import check_overrides
from bpn_lightning.nn import MLP


class OwnStep(ContinualModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch.inputs), batch.targets)


class Grandchild(OwnStep):
    pass


class OwnOptimizers(ContinualModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnForward(ContinualModule):
    def forward(self, inputs: Any, task: Any = None) -> Any:
        return self.built_head(self.backbone(inputs))


class OwnEpochStart(ContinualModule):
    def on_train_epoch_start(self) -> None:
        pass


class OwnCheckpoint(ContinualModule):
    def on_save_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["mine"] = 1


class ByHand(ContinualModule):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            OwnStep,
            "does not. Pass a loss of your own as ContinualModule(loss=...), or call super().training_step.",
        ),
        (Grandchild, "Expected OwnStep.training_step to call super().training_step"),
        (OwnOptimizers, "does not. Pass optimizer and scheduler to ContinualModule, or call super()."),
        (OwnForward, "does not. Put the computation into the backbone, or call super().forward."),
        (OwnEpochStart, "Expected OwnEpochStart.on_train_epoch_start to call super()."),
        (OwnCheckpoint, "Expected OwnCheckpoint.on_save_checkpoint to call super()."),
        (ByHand, "Expected automatic_optimization to be True"),
    ],
)  # fmt: skip
def test_what_drops_the_strategies_is_refused(kind: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        check_overrides(kind(MLP([4])), ContinualModule)


def test_a_fit_asks(tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"Expected OwnStep\.training_step to call super"):
        trainer.fit(OwnStep(MLP([4])), SplitDigits(num_tasks=2))


def noted(method: Any) -> Any:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


def test_what_adds_to_it_is_not() -> None:
    class Adds(ContinualModule):
        @noted
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 2 * super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            def inner() -> None:
                super(Adds, self).on_train_epoch_end()

            inner()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Of one's own."""

        def on_train_batch_end(self, *args: Any) -> None:
            """Nothing of ours to lose."""

    check_overrides(Adds(MLP([4])), ContinualModule)
    check_overrides(ContinualModule(MLP([4])), ContinualModule)
