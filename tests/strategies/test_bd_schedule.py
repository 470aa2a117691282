"""The step of M over a task: against torch's schedulers, over the updates that happened."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.early_stopping import PhaseEarlyStopping
from bpn_lightning.strategies import EWC, BeneficialPerturbation
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Phase

EPSILON = 0.05

TORCH: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, total: LambdaLR(optimizer, lambda step: 1.0),
    "linear": lambda optimizer, total: LinearLR(optimizer, 1.0, 0.0, total),
    "cosine": lambda optimizer, total: CosineAnnealingLR(optimizer, total),
}


def by_torch(schedule: str, total: int) -> list[float]:
    """The learning rate of each update, as torch has it."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=EPSILON)
    scheduler = TORCH[schedule](optimizer, total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


class Steps(ContinualStrategy):
    """The largest move of the head's M in each update, of each task; stands behind BD."""

    def __init__(self) -> None:
        self.of_tasks: list[list[float]] = []

    def on_task_start(self, host: Any, task: Any) -> None:
        self.of_tasks.append([])
        self.before = self.m(host)

    def m(self, host: Any) -> torch.Tensor:
        return host.network.head.bias_units.M.detach().clone()

    def correct_step(self, host: Any, parameters: Any) -> None:
        if host.phase.trains == "head":  # M rests
            return
        after = self.m(host)
        self.of_tasks[-1].append(float((after - self.before).abs().max()))
        self.before = after


class Phases(ContinualStrategy):
    """Two phases that train the network, after a warm-up of the head, and one of its own after them."""

    def __init__(self) -> None:
        self.own = nn.Parameter(torch.zeros(()))

    def phases(self, task: Any, phases: list[Phase]) -> list[Phase]:
        return [
            Phase("warm_up", 2, "head"),
            Phase("first", 1),
            *phases,
            Phase("own", 1, "strategy"),
        ]

    def phase_optimizer(self, host: Any, phase: Any) -> Optimizer:
        return SGD([self.own], lr=0.1)

    def phase_loss(self, host: Any, phase: Any, batch: Any) -> torch.Tensor:
        return self.own.square() * torch.ones(len(batch.inputs))


def check(steps: Steps, schedule: str, total: int) -> None:
    for of_task in steps.of_tasks:
        assert of_task == pytest.approx(by_torch(schedule, total), abs=1e-6)


@pytest.mark.parametrize("schedule", TORCH)
@pytest.mark.parametrize(
    ("flags", "total"),
    [
        ({}, 10),  # two epochs of 288 samples in batches of 64
        ({"accumulate_grad_batches": 2}, 6),
        ({"limit_train_batches": 3}, 6),
        ({"gradient_clip_val": 0.01}, 10),
    ],
)
def test_steps_are_those_of_torchs_schedulers_over_each_task(
    fit: Any, schedule: Any, flags: dict[str, Any], total: int
) -> None:
    steps = Steps()
    fit([BeneficialPerturbation(6, EPSILON, schedule=schedule), steps], trainer=flags)
    check(steps, schedule, total)
    assert len(steps.of_tasks) == 2


def test_the_rate_of_the_core_has_no_part_in_it(fit: Any) -> None:
    steps, bd = Steps(), BeneficialPerturbation(6, EPSILON, schedule="linear")
    fit([bd, steps], scheduler=partial(LinearLR, start_factor=0.5, end_factor=0.1))
    check(steps, "linear", 10)


def test_all_phases_that_train_the_network_are_one_stretch(fit: Any) -> None:
    steps, bd = Steps(), BeneficialPerturbation(6, EPSILON, schedule="linear")
    fit([bd, Phases(), steps])
    check(steps, "linear", 15)


def test_early_stopping_ends_a_task_before_its_step_is_zero(fit: Any, monkeypatch: Any) -> None:
    """The first phase loses its second epoch, so the rest is shorter; the task loses its last two."""
    monkeypatch.setattr(
        PhaseEarlyStopping, "update", lambda self, loss: next(ends)
    )  # after each epoch
    ends = iter([True, False, True])
    stream = SplitDigits(num_tasks=1, epochs_per_task=4, batch_size=64, validation_fraction=0.2)
    steps, bd = Steps(), BeneficialPerturbation(6, EPSILON, schedule="linear")

    class Two(ContinualStrategy):
        def phases(self, task: Any, phases: list[Phase]) -> list[Phase]:
            return [Phase("first", 2), *phases]

    module, _ = fit([bd, Two(), steps], stream=stream, patience=1)
    (of_task,) = steps.of_tasks
    assert module.host.cursor.schedule.lengths == [1, 2]
    epoch = 4  # updates
    wanted = [1 - n / (6 * epoch) for n in range(epoch)]
    wanted += [1 - n / (5 * epoch) for n in range(epoch, 3 * epoch)]
    assert of_task == pytest.approx([EPSILON * step for step in wanted], abs=1e-6)


@pytest.mark.parametrize("steps", [3, 7, 10, 13])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    fit: Any, same: Any, tmp_path: Any, schedule: Any, steps: int
) -> None:
    """In the first epoch, the second, at the end of the task and in the next one."""

    def strategies() -> list[ContinualStrategy]:
        return [BeneficialPerturbation(6, EPSILON, schedule=schedule), EWC(100.0)]

    whole, _ = fit(strategies())
    with pytest.warns(UserWarning, match="stopped before its end"):
        _, trainer = fit(strategies(), trainer={"max_steps": steps})
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = fit(strategies(), seed=1, ckpt_path=tmp_path / "part.ckpt")
    same(rest.state_dict(), whole.state_dict())


def test_updates_that_a_scaler_skips_do_not_count(fit: Any) -> None:
    """The first scale makes float16 overflow; it is halved until an update happens."""
    steps, bd = Steps(), BeneficialPerturbation(6, EPSILON, schedule="linear")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    stream = SplitDigits(num_tasks=1, epochs_per_task=2, batch_size=64, seed=0)
    fit([bd, steps], stream=stream, trainer={"plugins": [precision]})
    (of_task,) = steps.of_tasks
    assert 0 < len(of_task) < 10
    assert of_task == pytest.approx(by_torch("linear", 10)[: len(of_task)], abs=1e-6)


def test_an_unknown_schedule_is_refused() -> None:
    wanted = "Expected schedule to be one of constant, linear, cosine, but got 'step'"
    with pytest.raises(ConfigurationError, match=wanted):
        BeneficialPerturbation(schedule="step")  # type: ignore[arg-type]
