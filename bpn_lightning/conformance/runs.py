"""Fits small enough to compare bit for bit: bundled digits, a real Trainer, a few updates per task."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from math import isnan
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.model.gating import task_probabilities
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.nn.layers import TaskModule, evaluation_mode
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, Position
from bpn_lightning.trainer.processes import leaves

__all__ = [
    "BATCH_NORM_DROPOUT",
    "PLAIN",
    "Run",
    "Setting",
    "batch_norm_dropout",
    "differences",
    "fit",
    "flatten",
    "plain",
    "with_tokens",
    "without_gates",
]


def plain() -> nn.Module:
    """Linear layers and ReLUs: any number of processes computes the same."""
    return MLP([16, 12])


def batch_norm_dropout() -> nn.Module:
    """Batch normalization and dropout: whoever leaves the beaten track moves state on it."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 12),
        nn.ReLU(),
    )


class _Rows(nn.Module):
    """Images ``(batch, 1, 8, 8)`` as eight tokens."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0]


def with_tokens(backbone: nn.Module) -> nn.Module:
    """A backbone behind a transformer's block."""
    block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(_Rows(), block, backbone)


@dataclass(frozen=True)
class Setting:
    """Everything of a fit but its strategies.

    Args:
        backbone: makes the network.
        optimizer: of the module.
        stream: arguments of ``SplitDigits``.
        module: further arguments of ``ContinualModule``.
        trainer: further arguments of ``Trainer``.
    """

    backbone: Callable[[], nn.Module] = plain
    optimizer: Callable[..., Any] = field(default_factory=lambda: partial(SGD, lr=0.05))
    stream: Mapping[str, Any] = field(default_factory=dict)
    module: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


#: Three tasks of 5 updates.
PLAIN = Setting()
#: The same on a network with state of its own and on augmented images.
BATCH_NORM_DROPOUT = Setting(batch_norm_dropout, stream={"augment": True})


class Digits(SplitDigits):
    """The stream of every fit here, read from its file once."""

    def read(self) -> ImageData:
        """As ever; nobody writes into it."""
        return _read()


@cache
def _read() -> ImageData:
    return SplitDigits().read()


class Observed(ContinualModule):
    """Calls functions of ours right before and right after a task is closed."""

    before_close: Callable[[int], None] = staticmethod(lambda task: None)
    after_close: Callable[[int], None] = staticmethod(lambda task: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._close = self.task_loop.close
        self.task_loop.close = self._observed_close  # type: ignore[method-assign]

    def _observed_close(self, task_id: int) -> None:
        closing = task_id > self.closed
        if closing:
            self.before_close(task_id)
        self._close(task_id)
        if closing:
            self.after_close(task_id)


class _EveryBatch(Callback):
    run: "Run"

    def __init__(self, look: Callable[["Run", Position, int, bool], None]) -> None:
        self.look = look

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.look(self.run, self.run.module.position, batch_idx, trainer.is_last_batch)


@dataclass
class Run:
    """A module, its stream, its strategies and its trainer."""

    module: Observed
    stream: Digits
    strategies: Sequence[ContinualStrategy]
    trainer: L.Trainer

    def parts_of_tasks(self) -> list[str]:
        """Names of the parts of the network that hold something for each task."""
        named = self.module.network.named_modules()
        return [f"{name}." for name, part in named if isinstance(part, TaskModule)]

    def learned(self) -> dict[str, Any]:
        """Everything of the module and of the strategies that a checkpoint has to hold."""
        states = {strategy.state_key: strategy.state_dict() for strategy in self.strategies}
        return flatten({"module": self.module.state_dict(), "state_dict of": states})

    @torch.no_grad()
    def answers(self) -> dict[str, Tensor]:
        """Of each gate, its probabilities of tasks for some test images."""
        host, raw = self.module.host, _read().test
        images, targets = raw.images[:200].to(host.device), raw.labels[:200]
        inputs = host.for_gates(Batch(images, targets, 0, len(images))).inputs
        with evaluation_mode(host.network):
            return {
                f"answers of gate {name}": task_probabilities(host, gate, inputs)
                for name, gate in host.gates.items()
            }

    def plain(self) -> dict[str, Any]:
        """What fine-tuning has as well: weights, their optimizer's state, the random states."""
        added = tuple(self.parts_of_tasks())
        weights = self.module.network.state_dict().items()
        mine = self.module.network.shared_parameters(include_head=True)
        state = self.trainer.optimizers[0].state
        return flatten(
            {
                "weights": {n: v for n, v in weights if not (added and n.startswith(added))},
                "optimizer": {n: state[p] for n, p in mine.items() if p in state},
                "random": _random_states(),
            }
        )

    def surroundings(self) -> dict[str, Any]:
        """What a glance may not change, though no checkpoint holds all of it."""
        module = self.module
        return flatten(
            {
                "random": _random_states(),
                "training flags": {name: part.training for name, part in module.named_modules()},
                "gradients": {name: p.grad for name, p in module.named_parameters()},
            }
        )


def fit(
    strategies: Sequence[ContinualStrategy],
    setting: Setting = PLAIN,
    *,
    seed: int = 0,
    watch: Callable[[Run], None] = lambda run: None,
    at_batch: Callable[[Run, Position, int, bool], None] | None = None,
    checkpoint: Any = None,
) -> Run:
    """Learn a small stream.

    Args:
        strategies: the trainer's, in their order.
        setting: everything else.
        seed: of the global generators; the stream's seed is 0.
        watch: called with the run before it begins.
        at_batch: called after every batch with the run, the position, the number of the batch and
            whether it is the last of its epoch.
        checkpoint: a path to continue from.
    """
    _seed_globally(seed)
    stream = Digits(
        **{"num_tasks": 3, "epochs_per_task": 1, "batch_size": 64, "seed": 0, **setting.stream}
    )
    stream.setup()
    backbone = setting.backbone()
    if any(getattr(callback, "needs_tokens", False) for callback in strategies):
        backbone = with_tokens(backbone)
    module = Observed(backbone, optimizer=setting.optimizer, **setting.module)
    module.attach(stream)
    observers = [] if at_batch is None else [_EveryBatch(at_batch)]
    with _quiet_and_alone():
        trainer = L.Trainer(
            max_epochs=-1,
            callbacks=[*strategies, *observers],
            **{
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **setting.trainer,
            },
        )
        run = Run(module, stream, strategies, trainer)
        for observer in observers:
            observer.run = run
        watch(run)
        _seed_globally(seed + 1)  # whatever building drew
        trainer.fit(module, stream, ckpt_path=checkpoint, weights_only=False)
    return run


def _seed_globally(seed: int) -> None:
    """Set every global generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _random_states() -> dict[str, Any]:
    """Of the global generators, as what can be compared at a glance."""
    states = random_state()
    return {
        "torch": states["torch"],
        "numpy": states["numpy"],
        "python": hash(random.getstate()),
    }


@contextmanager
def _quiet_and_alone() -> Iterator[None]:
    """Without Lightning's lines about devices and reasons to stop, and on one thread.

    With several, networks this small are slower, and sums may come in any order.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- comparing -----------------------------------------------------------------------------------


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of nested mappings and lists by their paths; tensors are copied.

    >>> flatten({"a": [1, {"b": 2.0}]})
    {'a/0': 1, 'a/1/b': 2.0}
    """
    return {
        path: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        for path, leaf in leaves(tree)
    }


def without_gates(learned: Mapping[str, Any]) -> dict[str, Any]:
    """What was learned but the state of gates, which may factor the same sums in many ways."""
    return {
        path: leaf for path, leaf in learned.items() if not path.startswith("state_dict of/gate ")
    }


def differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], *, tolerance: float = 0.0
) -> list[str]:
    """Where two flat trees differ, in words; bit for bit unless a tolerance is given.

    Args:
        mine: leaves by path.
        theirs: what they should be.
        tolerance: relative, and a tenth of it absolute.

    >>> differences({"a": 1, "b": 2.0}, {"a": 1, "b": 2.5, "c": None})
    ['c is missing', 'b is 2.0, not 2.5']
    """
    found = [f"{path} is missing" for path in theirs if path not in mine]
    found += [f"{path} is there besides" for path in mine if path not in theirs]
    for path in mine:
        if path in theirs:
            said = _difference(mine[path], theirs[path], tolerance)
            found += [f"{path} {said}"] if said else []
    return found


def _difference(mine: Any, theirs: Any, tolerance: float) -> str:
    if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor)):
        alike = type(mine) is type(theirs)
        if alike and isinstance(mine, float):
            close = abs(mine - theirs) <= tolerance * (abs(theirs) + 0.1)
            alike = close or mine == theirs or (isnan(mine) and isnan(theirs))
        elif alike:
            alike = bool(mine == theirs)
        return "" if alike else f"is {mine!r:.40}, not {theirs!r:.40}"
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return f"is {_kind(mine)}, not {_kind(theirs)}"
    same = torch.isclose(mine, theirs, tolerance, tolerance / 10, equal_nan=True)
    if same.all():
        return ""
    largest = (mine.double() - theirs.double()).abs().nan_to_num(float("inf")).max()
    return f"differs in {int((~same).sum())} of {same.numel()} numbers, by up to {largest:.2g}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
