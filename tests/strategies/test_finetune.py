"""Fine-tuning against a training loop that is written out by hand, and against plain reasoning."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning

OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.003, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.003, weight_decay=0.1),
}


class Plain(nn.Module):
    """The same network without the framework: nothing but torch."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.backbone = deepcopy(run.module.network.backbone)
        self.head = deepcopy(run.module.network.head)

    def forward(self, inputs: Tensor, stop: int | None = None) -> Tensor:
        """Of the columns before ``stop``: those after it are of tasks to come."""
        head = self.head
        return F.linear(self.backbone(inputs), head.weight[:stop], head.bias[:stop])


def train(
    network: nn.Module,
    stream: Any,
    make_optimizer: Callable[..., Optimizer],
    columns: Callable[[int], slice] = lambda task: slice(None),
) -> Optimizer:
    """Every task in turn, with a fresh optimizer if the stream asks for one."""
    optimizer = make_optimizer(network.parameters())
    for task in stream.tasks:
        if stream.reset_optimizer == "always":
            optimizer = make_optimizer(network.parameters())
        for epoch in range(task.epochs):
            for batch in stream.train_loader(task.id, epoch):
                active = columns(task.id)
                logits = network(stream.prepare(batch).inputs, active.stop)[:, active]
                loss = F.cross_entropy(logits, batch.targets - (active.start or 0))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("reset", ["always", "never"])
def test_equals_a_plain_loop_bit_for_bit(prepare: Any, same: Any, name: str, reset: str) -> None:
    run = prepare(
        FineTuning(),
        stream={"num_tasks": 3, "epochs_per_task": [2, 1, 1], "reset_optimizer": reset},
        optimizer=OPTIMIZERS[name],
    )
    plain = Plain(run)
    optimizer = train(plain, run.stream, OPTIMIZERS[name])
    assert not torch.equal(plain.head.weight, run.module.network.head.weight)
    run.fit()
    same(run.weights(), plain.state_dict())
    names = dict(plain.named_parameters())
    same(run.optimizer_state(), {n: optimizer.state[p] for n, p in names.items() if name != "sgd"})


@pytest.mark.parametrize(
    "strategies",
    [
        (),
        (EWC,),
        (partial(EWC, update="clamped"),),
        (partial(BeneficialPerturbation, 5, epsilon=0), EWC),
    ],
    ids=["none", "ewc", "clamped", "bd0+ewc"],
)
def test_one_task_of_any_method_is_plain_training(
    prepare: Any, same: Any, strategies: tuple[Any, ...]
) -> None:
    run = prepare(
        *(make() for make in strategies),
        stream={"num_tasks": 1, "epochs_per_task": 3},
        optimizer=OPTIMIZERS["sgd"],
    )
    plain = Plain(run)
    train(plain, run.stream, OPTIMIZERS["sgd"])
    run.fit()
    same(run.weights(), plain.state_dict())


@pytest.mark.parametrize(
    ("mask", "columns"),
    [
        ("seen", lambda task: slice(0, 2 * task + 2)),
        ("task", lambda task: slice(2 * task, 2 * task + 2)),
    ],
)
def test_masks_choose_the_columns_of_the_loss(
    prepare: Any, same: Any, mask: str, columns: Callable[[int], slice]
) -> None:
    run = prepare(stream={"num_tasks": 3}, optimizer=OPTIMIZERS["sgd"], mask=mask)
    plain = Plain(run)
    train(plain, run.stream, OPTIMIZERS["sgd"], columns)
    run.fit()
    same(run.weights(), plain.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["all", "seen"])
def test_a_single_head_forgets_all_but_the_last_task(learn: Any, mask: str) -> None:
    """1/T and not more: a mask that followed the mode would hand over the task's identity."""
    run = learn(
        FineTuning(),
        stream={"num_tasks": 5, "epochs_per_task": 3, "batch_size": 32},
        optimizer=partial(SGD, lr=0.1),
        mask=mask,
    )
    final = run.module.accuracy_matrix.accuracy[-1]
    assert final[-1] > 0.8
    assert final[:-1].max() < 0.1
    assert final.mean() == pytest.approx(1 / 5, abs=0.05)
    # Nobody said which task a sample is from, so the scores without the oracle are the same.
    torch.testing.assert_close(run.module.accuracy_matrix.task_agnostic, final, rtol=0, atol=0)


def test_seen_columns_do_not_follow_the_mode(learn: Any) -> None:
    run = learn(stream={"num_tasks": 3}, mask="seen")
    batch = next(iter(run.module.host.batches(0, "test")))
    answers = [run.module(batch.inputs, task=task) for task in range(3)]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert answers[0].isfinite().all()


def test_columns_of_tasks_to_come_are_not_seen(learn: Any, watch: Any) -> None:
    finite = []

    def look(host: Any, task: Any) -> None:
        batch = next(iter(host.batches(0, "test")))
        modes = (host.network(batch.inputs, task=mode).isfinite() for mode in range(3))
        finite.append([mode.sum(1).unique().tolist() for mode in modes])

    learn(watch(end=look), stream={"num_tasks": 3}, mask="seen")
    assert finite == [[[2]] * 3, [[4]] * 3, [[6]] * 3]


@pytest.mark.parametrize("reset", ["always", "never"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_heads_do_not_move(learn: Any, watch: Any, name: str, reset: str) -> None:
    """Momentum, Adam's averages and weight decay would move rows that have no gradient."""
    heads: list[tuple[Tensor, Tensor]] = []

    def keep(host: Any, task: Any) -> None:
        heads.append(
            (host.network.head.weight.detach().clone(), host.network.head.bias.detach().clone())
        )

    learn(
        watch(start=keep, end=keep),
        stream={"num_tasks": 3, "epochs_per_task": 2, "reset_optimizer": reset},
        optimizer=OPTIMIZERS[name],
        mask="task",
    )
    for task, (before, after) in enumerate(zip(heads[::2], heads[1::2], strict=True)):
        own = torch.arange(2 * task, 2 * task + 2)
        others = torch.tensor([row for row in range(6) if row not in own])
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[others], old[others])
            assert (new[own] != old[own]).any()


def test_a_new_head_starts_with_clean_optimizer_state(learn: Any, watch: Any) -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    rows, steps = [], []

    def before(host: Any, parameters: Any) -> None:
        rows.append(host.network.head.weight[2:4].detach().clone())

    def after(host: Any, parameters: Any) -> None:
        if host.network.opened == 1:
            steps.append((host.network.head.weight[2:4] - rows[-1]).abs().max().item())

    learn(
        watch(capture=before, stepped=after),
        stream={"epochs_per_task": [8, 1], "reset_optimizer": "never"},
        optimizer=partial(Adam, lr=0.001),
        mask="task",
    )
    assert steps[0] == pytest.approx(0.001, rel=0.01)


def test_the_strategy_is_no_strategy(learn: Any, same: Any) -> None:
    with_it, without_it = learn(FineTuning()), learn()
    same(with_it.weights(), without_it.weights())
    assert str(with_it.random) == str(without_it.random)
    assert FineTuning().declared_bytes(with_it.module).per_task == 0
