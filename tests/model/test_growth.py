"""A stream that goes on learns, bit for bit, what it would have learned had all its tasks been known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.losses import CrossEntropy
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies import (
    EWC,
    SLDA,
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    FineTuning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    IndependentNetworks,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    NearestClassMean,
    ParameterSuperposition,
    SynapticIntelligence,
)
from tests.tools.fits import trainer_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::bpn_lightning.errors.ExpectedForgettingWarning"),
    pytest.mark.filterwarnings("ignore:.*projects gradients, but SGD with weight_decay"),
]

PAST, ALL = 3, 5
"""Tasks of two digits each."""

METHODS: Mapping[str, Callable[[], list[ContinualStrategy]]] = {
    "finetune": lambda: [FineTuning()],
    "bd": lambda: [BeneficialPerturbation(4)],
    "bd+ewc": lambda: [BeneficialPerturbation(4), EWC(100.0)],
    "ewc": lambda: [EWC(100.0)],
    "online": lambda: [EWC(100.0, gamma=0.9, fisher="sampled", update="clamped")],
    "si": lambda: [SynapticIntelligence()],
    "mas": lambda: [MemoryAwareSynapses()],
    "slnid": lambda: [SLNID()],
    "mean": lambda: [IncrementalMomentMatching("mean", drop=0.2)],
    "mode": lambda: [IncrementalMomentMatching("mode")],
    "lwf": lambda: [LearningWithoutForgetting(warm_up_epochs=1)],
    "ebll": lambda: [EncoderBasedLifelongLearning(autoencoder_epochs=1)],
    "gem": lambda: [GradientEpisodicMemory(20)],
    "agem": lambda: [AveragedGEM(20, sample_size=10)],
    "psp": lambda: [ParameterSuperposition()],
    "complex": lambda: [ParameterSuperposition("complex")],
    "stl": lambda: [IndependentNetworks()],
    "gates": lambda: [BeneficialPerturbation(4), NearestClassMean(), SLDA()],
}
MASKS: Mapping[str, Mapping[str, Any]] = {
    "all": {"mask": "all", "reserve_classes": 2 * ALL},
    "seen": {"mask": "seen"},
    "task": {"mask": "task"},
    "shared": {"mask": "shared"},
}

sgd = partial(SGD, lr=0.05, weight_decay=0.01)


def stream_of(first: int, stop: int, mask: str, **arguments: Any) -> SplitDigits:
    """Some of the five tasks of the digits."""
    order: list[str | int] = list(range(2 * first, 2 * stop))
    given = {"epochs_per_task": 1, "batch_size": 64, "seed": 3, "class_order": order, **arguments}
    return SplitDigits(domain_incremental=mask == "shared", **given)


def module_of(mask: str, **arguments: Any) -> ContinualModule:
    torch.manual_seed(7)
    given = {"optimizer": sgd, **MASKS[mask], **arguments}
    backbone: Callable[[], nn.Module] = given.pop("backbone", lambda: MLP([16, 12]))
    return ContinualModule(backbone(), **given)


def fit(
    module: ContinualModule,
    stream: SplitDigits,
    strategies: Sequence[ContinualStrategy],
    ckpt_path: Path | None = None,
    **flags: Any,
) -> Trainer:
    trainer = trainer_of(1, list(strategies), **flags)
    torch.manual_seed(11)
    trainer.fit(module, stream, ckpt_path=ckpt_path, weights_only=False)
    return trainer


def plain(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by their paths."""
    if isinstance(tree, Mapping):
        return {k: v for key, one in tree.items() for k, v in plain(one, f"{path}/{key}").items()}
    if isinstance(tree, list | tuple):
        return plain(dict(enumerate(tree)), path)
    return {path: tree.detach().clone() if isinstance(tree, Tensor) else tree}


def learned(module: ContinualModule, trainer: Trainer) -> dict[str, Any]:
    """All that is learned and would be learned from, but for what only a known stream measures."""
    weights = {k: v for k, v in module.network.state_dict().items() if "accuracy_matrix" not in k}
    strategies = {s.state_key: s.state_dict() for s in module.host.strategies}
    matrix = module.accuracy_matrix.accuracy[1:].tril()
    names = [name for name, _ in module.network.named_parameters()]
    optimizer = trainer.optimizers[0].state_dict()
    inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [module(inputs, task=task) for task in range(len(module.tasks))]
    return plain(
        {
            "weights": weights,
            "strategies": strategies,
            "matrix": matrix,
            "logits": logits,
            "parameters": names,
            "optimizer": optimizer,
            "random": random_state(),
            "training weights": dict(module.host.training_weights),
            "epoch": [trainer.current_epoch, trainer.global_step, *module.schedule.lengths],
        }
    )


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two differ in a single bit."""
    found = sorted(one.keys() ^ other.keys())
    for path in one.keys() & other.keys():
        a, b = one[path], other[path]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            alike = a.shape == b.shape and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        else:
            alike = repr(a) == repr(b)
        found += [] if alike else [path]
    return found


@dataclass(frozen=True)
class Setting:
    """Everything of a fit but its strategies and its mask."""

    module: Mapping[str, Any] = field(default_factory=dict)
    stream: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def fit(
        self, method: str, mask: str, first: int, stop: int, ckpt_path: Path | None = None
    ) -> tuple[ContinualModule, Trainer]:
        """Learn some of the tasks."""
        module = module_of(mask, **self.module)
        stream = stream_of(first, stop, mask, **self.stream)
        return module, fit(module, stream, METHODS[method](), ckpt_path, **self.trainer)

    def longer(self, method: str, mask: str, folder: Path) -> dict[str, Any]:
        """Learn the past, then go on from its checkpoint with a stream that begins with it."""
        self.fit(method, mask, 0, PAST)[1].save_checkpoint(folder / "past.ckpt")
        return learned(*self.fit(method, mask, 0, ALL, folder / "past.ckpt"))

    def extended(self, method: str, mask: str) -> dict[str, Any]:
        """Learn the past, then its new tasks alone, with the same module and the past's data to test on."""
        module, trainer = self.fit(method, mask, 0, PAST)
        torch.rand(3)  # whatever is drawn in the meantime
        return learned(module, self.go_on(module, trainer.callbacks, method, mask))

    def go_on(
        self, module: ContinualModule, callbacks: Sequence[Any], method: str, mask: str
    ) -> Trainer:
        """Learn the new tasks."""
        past_data = stream_of(0, PAST, mask, **self.stream)
        new = stream_of(PAST, ALL, mask, **{**self.stream, "seed": None})
        module.extend(new, past_data)
        strategies = [one for one in callbacks if isinstance(one, ContinualStrategy)]
        return fit(module, new, strategies, **self.trainer)

    def loaded(self, method: str, mask: str, folder: Path) -> dict[str, Any]:
        """The same with a module that is loaded from a file, and with new strategies."""
        self.fit(method, mask, 0, PAST)[1].save_checkpoint(folder / "past.ckpt")
        fresh = module_of(mask, **self.module)
        module = ContinualModule.load_from_checkpoint(
            folder / "past.ckpt",
            backbone=fresh.backbone,
            optimizer=fresh.optimization.optimizer,
            **{
                k: v
                for k, v in {**MASKS[mask], **self.module}.items()
                if k not in ("backbone", "optimizer")
            },
        )
        return learned(module, self.go_on(module, METHODS[method](), method, mask))


SETTINGS = {
    "clipped": Setting(trainer={"gradient_clip_val": 0.5}),
    "adam kept": Setting(
        module={"optimizer": partial(AdamW, lr=0.01)}, stream={"reset_optimizer": "never"}
    ),
    "momentum kept": Setting(
        module={"optimizer": partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.1)},
        stream={"reset_optimizer": "never"},
    ),
    "validation": Setting(
        module={"patience": 1, "evaluate_every": "epoch", "evaluate_on": "seen_and_next"},
        stream={"epochs_per_task": 3, "validation_fraction": 0.2},
    ),
    "batch norm": Setting(
        module={
            "backbone": lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)
            )
        },
        stream={"augment": True},
    ),
    "label smoothing": Setting(module={"loss": CrossEntropy(label_smoothing=0.1)}),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_longer_stream_goes_on_from_a_checkpoint(method: str, mask: str, tmp_path: Path) -> None:
    found = Setting().longer(method, mask, tmp_path)
    assert differing(learned(*Setting().fit(method, mask, 0, ALL)), found) == []


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_module_is_extended_by_new_tasks_alone(method: str, mask: str) -> None:
    found = Setting().extended(method, mask)
    assert differing(learned(*Setting().fit(method, mask, 0, ALL)), found) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_module_is_extended(method: str, tmp_path: Path) -> None:
    found = Setting().loaded(method, "seen", tmp_path)
    assert differing(learned(*Setting().fit(method, "seen", 0, ALL)), found) == []


@pytest.mark.parametrize("mask", ["seen", "task"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_it_goes_on_under_any_trainer_and_optimizer(
    setting: str, mask: str, tmp_path: Path
) -> None:
    one = SETTINGS[setting]
    found = one.longer("bd", mask, tmp_path)
    assert differing(learned(*one.fit("bd", mask, 0, ALL)), found) == []
