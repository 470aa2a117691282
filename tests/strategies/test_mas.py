"""MAS against loops over samples, written-out penalties and what must not matter."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from bpn_lightning.costs import measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.si import SynapticIntelligence

OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.003),
}


def by_hand(host: Any, task: int, names: Any) -> dict[str, Tensor]:
    """One backward for each sample; absolute values, and then their mean."""
    parameters = {n: p for n, p in host.network.named_parameters() if n in names}
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    first, stop = host.network.columns(task)
    flags = [(part, part.training) for part in host.network.modules()]
    host.network.eval()
    count = 0
    for batch in host.batches(task, "train"):
        for sample in batch.inputs.split(1):
            length = (host.network(sample, task=task)[0, first:stop] ** 2).sum()
            found = torch.autograd.grad(length, list(parameters.values()))
            for value, gradient in zip(sums.values(), found, strict=True):
                value += gradient.abs()
            count += 1
    for part, flag in flags:
        part.training = flag
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_importances_are_the_sum_over_tasks_of_their_means(
    learn: Any, watch: Any, mask: Any
) -> None:
    """In each task's mode, of its active columns; the anchor is the last solution."""
    mas, own, solutions = MemoryAwareSynapses(0.01), [], []

    def note(host: Any, task: Any) -> None:
        held = mas.parameters(host)
        own.append(by_hand(host, task.id, held))
        solutions.append({name: value.detach().clone() for name, value in held.items()})

    learn(watch(end=note), BeneficialPerturbation(4), mas, mask=mask, stream={"num_tasks": 3})
    assert len(own) == 3
    wanted = {name: sum(of_task[name] for of_task in own) for name in own[0]}
    torch.testing.assert_close(mas.penalty.importance, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mas.penalty.anchor, solutions[-1], rtol=0, atol=0)
    assert ("head.weight" in wanted) == (mask != "task")


@pytest.mark.parametrize(
    ("update", "strength"),
    [
        ("gradient", 0.003),  # it diverges at the other
        ("clamped", 0.003),
        ("clamped", 30.0),
        ("proximal", 0.003),
        ("proximal", 30.0),
    ],
)
def test_updates_are_those_of_the_written_penalty(
    learn: Any, watch: Any, update: Any, strength: float
) -> None:
    """Autograd's gradient of it, limited or not, or the minimizer near the weights."""
    mas, seen, steps = MemoryAwareSynapses(strength, update=update), [], []
    hooks = ("stepped", "stepped") if update == "proximal" else ("capture", "project")

    def read(value: Any) -> Tensor:
        return (value if update == "proximal" else value.grad).detach().clone()

    def before(host: Any, parameters: Any) -> None:
        seen.append({name: read(value) for name, value in parameters.items()})

    def after(host: Any, parameters: Any) -> None:
        if not mas.penalty:
            return
        for name, there in seen[-1].items():
            at = there if update == "proximal" else parameters[name].detach()
            theta = at.clone().requires_grad_()
            gaps = theta - mas.penalty.anchor[name]
            value = strength * (mas.penalty.importance[name] * gaps**2).sum()
            (slope,) = torch.autograd.grad(value, [theta], create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), [theta], retain_graph=True)
            rate = 0.05
            change = {
                "gradient": slope,
                "clamped": curvature.clamp(max=1 / rate) * gaps,
                "proximal": -slope * rate / (1 + rate * curvature),
            }[update].detach()
            scale = float(there.abs().max() + change.abs().max())
            found = read(parameters[name]) - there
            torch.testing.assert_close(found, change, rtol=1e-3, atol=2e-6 * (scale + 1))
            steps.append(bool((curvature > 1 / rate).any()))

    learn(
        watch(**{hooks[0]: before}),
        mas,
        watch(**{hooks[1]: after}),
        stream={"num_tasks": 3},
        optimizer=partial(SGD, lr=0.05),
    )
    assert len(steps) == 60
    assert any(steps) == (strength > 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mask", ["all", "task"])
def test_strength_zero_is_fine_tuning_bit_for_bit(
    learn: Any, same: Any, name: str, mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a pass over the task")

    monkeypatch.setattr("bpn_lightning.strategies.mas.output_sensitivity", refuse)
    mas = MemoryAwareSynapses(0)
    runs = [
        learn(
            strategy,
            stream={"num_tasks": 3, "reset_optimizer": "never"},
            optimizer=OPTIMIZERS[name],
            mask=mask,
            trainer={"gradient_clip_val": 0.5},
        )
        for strategy in (mas, FineTuning())
    ]
    same(runs[0].weights(), runs[1].weights())
    same(runs[0].optimizer_state(), runs[1].optimizer_state())
    assert str(runs[0].random) == str(runs[1].random)
    assert mas.declared_bytes(runs[0].module).held == measured_bytes(mas, runs[0].module) == (0, 0)


def test_one_task_is_plain_training_and_draws_nothing(learn: Any, same: Any) -> None:
    runs = [learn(s, stream={"num_tasks": 1}) for s in (MemoryAwareSynapses(), FineTuning())]
    same(runs[0].weights(), runs[1].weights())
    assert str(runs[0].random) == str(runs[1].random)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("mask", ["all", "task"])
def test_bytes_are_two_tensors_of_what_is_held(learn: Any, mask: Any, tasks: int) -> None:
    run = learn(mas := MemoryAwareSynapses(), mask=mask, stream={"num_tasks": tasks})
    held = run.module.network.shared_parameters(include_head=mask != "task")
    size = sum(value.numel() for value in held.values())
    assert (
        mas.declared_bytes(run.module.host).held
        == measured_bytes(mas, run.module.host)
        == (8 * size, 0)
    )
    assert mas.declared_bytes(run.module.host).per_task == 0


def test_at_any_strength_what_matters_stays(learn: Any, watch: Any) -> None:
    """A limited pull reaches the anchor at every step; without the limit it would be inf by then."""
    moved = []
    for strategy in (MemoryAwareSynapses(1e6), FineTuning()):
        ends = []

        def note(host: Any, task: Any, ends: Any = ends) -> None:
            ends.append(host.network.backbone[1].weight.detach().clone())

        learn(strategy, watch(end=note), stream={"epochs_per_task": 3})
        moved.append(float((ends[1] - ends[0]).abs().max()))
    held, free = moved
    assert held < 0.2 * free


@pytest.mark.slow
def test_remembers_what_fine_tuning_forgets(learn: Any) -> None:
    stream = {"num_tasks": 2, "epochs_per_task": 6, "batch_size": 32}
    kept, lost = (
        learn(
            strategy, stream=stream, optimizer=partial(SGD, lr=0.05), mask="task"
        ).module.accuracy_matrix.accuracy[2, 0]
        for strategy in (MemoryAwareSynapses(1.0), FineTuning())
    )
    assert kept >= lost
    assert kept > 0.9


def test_penalties_add_up(learn: Any, watch: Any) -> None:
    """Three strategies in one run pull as much as each alone would."""
    penalties = [
        EWC(3.0, update="gradient"),
        SynapticIntelligence(0.5, update="gradient"),
        MemoryAwareSynapses(0.01, update="gradient"),
    ]
    before: list[dict[str, Tensor]] = []
    checked = []

    def capture(host: Any, parameters: Any) -> None:
        before.append({name: value.grad.clone() for name, value in parameters.items()})

    def compare(host: Any, parameters: Any) -> None:
        if not penalties[0].penalty:
            return
        for name, value in parameters.items():
            pulls = [
                2
                * part.strength
                * part.penalty.importance[name]
                * (value.detach() - part.penalty.anchor[name])
                for part in penalties
            ]
            wanted = before[-1][name] + sum(pulls)
            torch.testing.assert_close(value.grad, wanted, rtol=1e-4, atol=1e-5)
            checked.append(all(pull.any() for pull in pulls))

    learn(watch(capture=capture), *penalties, watch(project=compare), optimizer=OPTIMIZERS["sgd"])
    assert len(checked) == 30
    assert sum(checked) >= 20  # at a task's first update there is no gap yet


# --- refusals ------------------------------------------------------------------------------------


def test_the_implicit_step_refuses_adam(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(MemoryAwareSynapses(update="proximal"), optimizer=Adam)
    assert str(error.value) == (
        "Expected the optimizer to be torch.optim.SGD without momentum when MemoryAwareSynapses's "
        "update is 'proximal', but got Adam. Set update to 'clamped'."
    )


def test_any_optimizer_by_default(learn: Any) -> None:
    learn(MemoryAwareSynapses(), optimizer=partial(Adam, lr=0.01))
    assert not MemoryAwareSynapses().corrects_weights
    assert MemoryAwareSynapses(update="proximal").corrects_weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"strength": float("inf")},
            "Expected strength to be 0 or a positive number, but got inf."
            + " 0 is fine-tuning; the paper uses 1.",
        ),
        (
            {"update": "explicit"},
            "Expected update to be one of proximal, clamped, gradient, but got 'explicit'.",
        ),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        MemoryAwareSynapses(**arguments)
    assert str(error.value) == message
