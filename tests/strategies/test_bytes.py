"""Declared bytes are measured bytes for every strategy, whatever a stream stores and a network computes in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from bpn_lightning.conformance.runs import Setting, batch_norm_dropout
from bpn_lightning.conformance.runs import fit as fit_digits
from bpn_lightning.costs import Bytes, measured_bytes
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.datamodules.gaussians import Gaussians
from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.stream_of import StreamOf
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.registry import strategies
from bpn_lightning.strategies import (
    AveragedGEM,
    BeneficialPerturbation,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    ParameterSuperposition,
)

MAKERS: dict[str, Callable[[], ContinualStrategy]] = {
    **{
        name: lambda found=found: found.load()()
        for name, found in strategies().items()
        if name != "prompt"  # of transformers: tests/strategies/test_prompt.py
    },
    "gem": partial(GradientEpisodicMemory, 20),
    "gem, per class": partial(GradientEpisodicMemory, 3, memory_per="class"),
    "agem": partial(AveragedGEM, 20),
    "ebll": partial(EncoderBasedLifelongLearning, code_size=2, autoencoder_epochs=1),
    "imm, mean": partial(IncrementalMomentMatching, "mean", 0.0),
    "imm, drop": partial(IncrementalMomentMatching, drop=0.3),
    "bd, one layer": partial(BeneficialPerturbation, 8, layers=["head"]),
}


@dataclass(eq=False, repr=False, kw_only=True)
class Stored(SplitDigits):
    """Digits that are stored in another type than bytes."""

    kind: torch.dtype = torch.float32
    constants = ChannelStats((0.0,), (1.0,))

    def read(self) -> ImageData:
        data = super().read()
        parts = (
            part._replace(images=part.images.to(self.kind)) for part in (data.train, data.test)
        )
        return ImageData(*parts, data.class_names, data.source)

    def normalize(self, images: Tensor) -> Tensor:
        return images.float() / 16


def learned(strategy: ContinualStrategy, stream: Any, **module: Any) -> ContinualModule:
    learner = ContinualModule(MLP([8]), **module)
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[strategy],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, stream)
    return learner


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.uint8, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MAKERS)
def test_whatever_the_stream_stores(name, kind):
    strategy = MAKERS[name]()
    stream = Stored(num_tasks=2, epochs_per_task=1, batch_size=128, seed=0, kind=kind)
    module = learned(strategy, stream)
    assert strategy.declared_bytes(module.host).held == measured_bytes(strategy, module.host)


@pytest.mark.parametrize("name", MAKERS)
def test_points_of_a_plane(name):
    strategy = MAKERS[name]()
    stream = Gaussians(train_samples=20, test_samples=5, epochs_per_task=1, seed=0)
    module = learned(strategy, stream, mask="shared")
    assert strategy.declared_bytes(module.host).held == measured_bytes(strategy, module.host)


@pytest.mark.parametrize("make", [MAKERS["gem"], MAKERS["agem"]], ids=["gem", "agem"])
def test_a_memory_is_what_its_samples_take_as_they_are_stored(make):
    """By hand: two coordinates of 4 bytes and a label of 8, for 20 samples of each of two tasks."""
    strategy = make()
    stream = Gaussians(train_samples=20, test_samples=5, epochs_per_task=1, seed=0)
    module = learned(strategy, stream, mask="shared")
    assert measured_bytes(strategy, module.host) == Bytes(2 * 20 * (2 * 4 + 8), 0)
    assert strategy.declared_bytes(module.host).per_task == 20 * (2 * 4 + 8)


def test_a_memory_of_two_streams_takes_the_larger_type():
    """One tensor holds it all; images are prepared alike from it."""
    parts = [
        Stored(num_tasks=1, epochs_per_task=1, batch_size=128, seed=0, kind=kind)
        for kind in (torch.uint8, torch.float32)
    ]
    strategy = GradientEpisodicMemory(20)
    module = learned(strategy, StreamOf(parts))
    assert measured_bytes(strategy, module.host) == Bytes(2 * 20 * (64 * 4 + 8), 0)
    assert strategy.declared_bytes(module.host).held == measured_bytes(strategy, module.host)
    assert strategy.declared_bytes(module.host).per_task == 20 * (64 + 8)


@pytest.mark.parametrize("name", [*MAKERS, "psp, complex"])
def test_in_double_precision(name):
    """Running statistics and weights of 8 bytes."""
    make = partial(ParameterSuperposition, "complex") if "complex" in name else MAKERS[name]
    backbone = partial(MLP, [8]) if "complex" in name else batch_norm_dropout
    run = fit_digits([make()], Setting(backbone, trainer={"precision": "64-true"}))
    (strategy,) = run.strategies
    assert strategy.declared_bytes(run.module.host).held == measured_bytes(
        strategy, run.module.host
    )
