"""Fits small enough to compare bit for bit: real digits, a real Trainer, five updates per task."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.strategies.base import ContinualStrategy

Hook = Callable[..., None]


class Watch(ContinualStrategy):
    """Looks on: calls a function of ours at each hook; in a list of callbacks, before or after."""

    numbers = count()

    def __init__(self, **hooks: Hook) -> None:
        self.hooks = hooks
        self.number = next(self.numbers)

    @property
    def state_key(self) -> str:
        return f"watch {self.number}"

    def call(self, name: str, *arguments: Any) -> None:
        if name in self.hooks:
            self.hooks[name](*arguments)

    def on_task_start(self, host: Any, task: Any) -> None:
        self.call("start", host, task)

    def on_task_end(self, host: Any, task: Any) -> None:
        self.call("end", host, task)

    def loss_terms(self, host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        return self.hooks["terms"](host, batch, logits) if "terms" in self.hooks else {}

    def capture_grad(self, host: Any, parameters: Any) -> None:
        self.call("capture", host, parameters)

    def project_grad(self, host: Any, parameters: Any) -> None:
        self.call("project", host, parameters)

    def consume_grad(self, host: Any, parameters: Any) -> None:
        self.call("consume", host, parameters)

    def correct_step(self, host: Any, parameters: Any) -> None:
        self.call("stepped", host, parameters)


@dataclass
class Run:
    """A module, its stream and its trainer, ready to fit."""

    module: ContinualModule
    stream: SplitDigits
    trainer: L.Trainer
    random: list[Any] = field(default_factory=list)

    def fit(self) -> "Run":
        self.trainer.fit(self.module, self.stream)
        # What would tell that a method drew from a global generator.
        self.random = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]
        return self

    def weights(self) -> dict[str, Tensor]:
        """Backbone and head without anything of bias units."""
        entries = self.module.network.state_dict().items()
        return {
            name: value.clone()
            for name, value in entries
            if name.startswith(("backbone", "head")) and "bias_units" not in name
        }

    def optimizer_state(self) -> dict[str, Any]:
        """What the optimizer keeps, by the name of the parameter; nothing of bias units."""
        state = self.trainer.optimizers[0].state
        return {
            name: state[parameter]
            for name, parameter in self.module.network.named_parameters()
            if parameter in state and "bias_units" not in name
        }


@pytest.fixture
def watch() -> type[Watch]:
    return Watch


@pytest.fixture
def prepare() -> Callable[..., Run]:
    """A run that has its weights and has not begun."""

    def make(
        *strategies: ContinualStrategy,
        backbone: Callable[[], nn.Module] = lambda: MLP([16, 12]),
        stream: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        **module: Any,
    ) -> Run:
        torch.manual_seed(0)
        data = SplitDigits(
            **{"num_tasks": 2, "epochs_per_task": 1, "batch_size": 64} | (stream or {})
        )
        data.setup()
        learner = ContinualModule(backbone(), **module)
        learner.attach(data)
        torch.manual_seed(1)
        driver = L.Trainer(
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(strategies),
            **(trainer or {}),
        )
        return Run(learner, data, driver)

    return make


@pytest.fixture
def learn(prepare: Callable[..., Run]) -> Callable[..., Run]:
    """A run that is over."""
    return lambda *strategies, **arguments: prepare(*strategies, **arguments).fit()


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """Assert that two nested collections of tensors are equal bit for bit."""
    return lambda one, other: torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
