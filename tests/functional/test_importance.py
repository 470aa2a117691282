"""Importances against closed forms in numpy and a batch-of-one loop of autograd."""

import random
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import DataError
from bpn_lightning.functional.importance import fisher_diagonal, output_sensitivity
from bpn_lightning.model.host import Host
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.tasks import Batch

MODES = ("empirical", "sampled", "exact", "predicted")


# --- softmax regression, in closed form ----------------------------------------------------------


def made(module: nn.Module | None = None, mask: Any = "all", **stream: Any) -> Host:
    """A module in double precision on the digits, three tasks, with weights that are not small."""
    data = SplitDigits(**{"num_tasks": 3} | stream)
    data.setup()
    host = ContinualModule(module or nn.Flatten(), mask=mask).host
    host.attach(data)
    host.network.double()
    with torch.no_grad():
        for parameter in host.network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return host


def shared(host: Host) -> dict[str, nn.Parameter]:
    return host.network.shared_parameters(include_head=True)


def in_numpy(host: Host, task: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, softmax and one-hot labels of a task, (samples, ...) each."""
    batches = list(host.batches(task, "train"))
    x = torch.cat([batch.inputs for batch in batches]).flatten(1).double().numpy()
    y = torch.cat([batch.targets for batch in batches]).numpy()
    assert host.network.head is not None
    logits = (
        x @ host.network.head.weight.detach().numpy().T + host.network.head.bias.detach().numpy()
    )
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return x, exponentials / exponentials.sum(1, keepdims=True), np.eye(logits.shape[1])[y]


@pytest.mark.parametrize("mode", ["empirical", "exact", "predicted"])
@pytest.mark.parametrize("task", [0, 2])
def test_softmax_regression_has_a_closed_form(mode: Any, task: int) -> None:
    host = made()
    x, p, y = in_numpy(host, task)
    residual = {
        "empirical": (p - y) ** 2,
        "exact": p * (1 - p),  # the expectation of (p - y)^2 over y ~ p
        "predicted": (p - np.eye(p.shape[1])[p.argmax(1)]) ** 2,
    }[mode]
    fisher = fisher_diagonal(host, task, shared(host), mode)
    assert set(fisher) == {"head.weight", "head.bias"}
    np.testing.assert_allclose(fisher["head.weight"], residual.T @ x**2 / len(x), rtol=1e-6)
    np.testing.assert_allclose(fisher["head.bias"], residual.mean(0), rtol=1e-6)


def test_drawn_labels_have_the_exact_expectation() -> None:
    """Five standard errors, which are known too: a label is k with probability p_k."""
    host, draws = made(classes_per_task=1), 150
    _, p, _ = in_numpy(host, 1)
    drawn = [
        fisher_diagonal(host, 1, shared(host), "sampled", seeded_generator(draw))["head.bias"]
        for draw in range(draws)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    variance = (p * (1 - p) * ((1 - p) ** 2 - p**2) ** 2).mean(0) / len(p) / draws
    error = torch.stack(drawn).mean(0).numpy() - (p * (1 - p)).mean(0)
    assert (np.abs(error) < 5 * np.sqrt(variance)).all()
    again = fisher_diagonal(host, 1, shared(host), "sampled", seeded_generator(0))
    assert torch.equal(again["head.bias"], drawn[0])


def test_drawn_labels_are_drawn_anew_in_every_batch() -> None:
    """Of the outputs, by one generator that goes through all batches; here the others hold the same."""
    host = made(classes_per_task=1, eval_batch_size=16)
    x, p, _ = in_numpy(host, 1)
    generator, labels = seeded_generator("one"), []
    for batch in host.batches(1, "train"):
        number = torch.rand(len(batch.targets), generator=generator).double().numpy()
        at = slice(len(labels), len(labels) + len(number))
        labels += [int((row.cumsum() <= u).sum()) for row, u in zip(p[at], number, strict=True)]
    residual = (p - np.eye(p.shape[1])[labels]) ** 2
    found = fisher_diagonal(host, 1, shared(host), "sampled", seeded_generator("one"))
    np.testing.assert_allclose(found["head.bias"], residual.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["head.weight"], residual.T @ x**2 / len(x), rtol=1e-6)


def test_trace_of_the_biases_is_what_is_left_of_certainty() -> None:
    """Sum of p (1 - p) = 1 - |p|^2, for any network."""
    host = made(MLP([12, 9]))
    fisher = fisher_diagonal(host, 1, shared(host), "exact")
    with torch.no_grad():
        inputs = torch.cat([batch.inputs for batch in host.batches(1, "train")])
        squares = host.network(inputs).softmax(1).square().sum(1)
    torch.testing.assert_close(fisher["head.bias"].sum(), 1 - squares.mean())


# --- what must not matter ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["empirical", "exact", "predicted"])
@pytest.mark.parametrize("size", [1, 7, 96, 1000])
def test_batch_size_is_irrelevant(mode: Any, size: int) -> None:
    host = made(MLP([6]))
    whole = fisher_diagonal(host, 0, shared(host), mode)
    host.stream.eval_batch_size = size
    torch.testing.assert_close(fisher_diagonal(host, 0, shared(host), mode), whole)


@pytest.mark.parametrize("mode", ["empirical", "exact", "predicted"])
def test_order_and_copies_of_samples_are_irrelevant(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = made(MLP([6]))
    whole = fisher_diagonal(host, 0, shared(host), mode)
    (batch,) = host.batches(0, "train")
    for indices in (torch.randperm(len(batch.targets)), torch.arange(len(batch.targets)).repeat(3)):
        changed = batch._replace(inputs=batch.inputs[indices], targets=batch.targets[indices])
        monkeypatch.setattr(host, "batches", lambda *_, changed=changed: iter([changed]))
        torch.testing.assert_close(fisher_diagonal(host, 0, shared(host), mode), whole)


def test_squares_samples_and_not_their_mean() -> None:
    """The usual mistake, squaring a batch's gradient, is far off: more than half."""
    host = made(MLP([6]))
    fisher = fisher_diagonal(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    loss = F.cross_entropy(host.network(batch.inputs), batch.targets)
    (gradient,) = torch.autograd.grad(loss, [host.network.head.weight])
    assert gradient.square().sum() < 0.5 * fisher["head.weight"].sum()


# --- memory aware synapses -----------------------------------------------------------------------


@pytest.mark.parametrize("task", [0, 2])
def test_sensitivity_of_a_linear_network_has_a_closed_form(task: int) -> None:
    """The mean of 2 |f_k| |x_j|."""
    host = made()
    x, _, _ = in_numpy(host, task)
    weight, bias = (p.detach().numpy() for p in (host.network.head.weight, host.network.head.bias))
    logits = np.abs(x @ weight.T + bias)
    found = output_sensitivity(host, task, shared(host))
    wanted = 2 * logits.T @ np.abs(x) / len(x)
    np.testing.assert_allclose(found["head.weight"], wanted, rtol=1e-6)
    np.testing.assert_allclose(found["head.bias"], 2 * logits.mean(0), rtol=1e-6)


def with_samples(host: Host, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let a task have these inputs or targets."""
    changed = next(iter(host.batches(0, "train")))._replace(**changes)
    monkeypatch.setattr(host, "batches", lambda *_: iter([changed]))


def test_labels_do_not_matter_to_sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    host = made(MLP([6]))
    before = output_sensitivity(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    with_samples(host, monkeypatch, targets=batch.targets[torch.randperm(len(batch.targets))])
    after = output_sensitivity(host, 0, shared(host))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_sensitivity_takes_absolute_values_before_it_adds() -> None:
    """Never below the absolute value of a batch's sum, and far above it in all."""
    host = made(MLP([6]))
    found = output_sensitivity(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    mean = host.network(batch.inputs).square().sum() / len(batch.inputs)
    of_batch = torch.autograd.grad(mean, list(shared(host).values()))
    for (name, value), gradient in zip(found.items(), of_batch, strict=True):
        assert (gradient.abs() <= value + 1e-9).all(), name
    total = sum(float(gradient.abs().sum()) for gradient in of_batch)
    assert total < 0.8 * sum(float(value.sum()) for value in found.values())


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_sensitivity_below_the_head_grows_with_its_square(alpha: float) -> None:
    host = made(MLP([6]))
    before = output_sensitivity(host, 0, shared(host))
    with torch.no_grad():
        for parameter in host.network.head.parameters():
            parameter.mul_(alpha)
    after = output_sensitivity(host, 0, shared(host))
    for name, value in before.items():
        factor = alpha if name.startswith("head") else alpha**2
        torch.testing.assert_close(after[name], factor * value)


def test_nothing_matters_to_outputs_that_are_zero() -> None:
    host = made(MLP([6]))
    with torch.no_grad():
        for parameter in host.network.head.parameters():
            parameter.zero_()
    assert not any(value.any() for value in output_sensitivity(host, 0, shared(host)).values())


def test_sensitivity_of_one_sample_is_twice_the_outputs_in_the_jacobian(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = made(MLP([6]))
    (batch,) = host.batches(0, "train")
    one = batch.inputs[3:4].double()
    with_samples(host, monkeypatch, inputs=one, targets=batch.targets[3:4])
    names, values = zip(*shared(host).items(), strict=True)

    def outputs(*values: Tensor) -> Tensor:
        return functional_call(host.network, dict(zip(names, values, strict=True)), (one,))[0]

    jacobian = torch.autograd.functional.jacobian(outputs, tuple(v.detach() for v in values))
    f = host.network(one)[0].detach()
    found = output_sensitivity(host, 0, shared(host))
    for name, rows in zip(names, jacobian, strict=True):
        torch.testing.assert_close(found[name], (2 * torch.tensordot(f, rows, 1)).abs())


@pytest.mark.parametrize("size", [1, 50])
def test_sensitivity_follows_neither_batches_nor_order_nor_copies(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = made(MLP([6]))
    whole = output_sensitivity(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    host.stream.eval_batch_size = size
    torch.testing.assert_close(output_sensitivity(host, 0, shared(host)), whole)
    indices = torch.randperm(len(batch.targets)).repeat(2)
    with_samples(host, monkeypatch, inputs=batch.inputs[indices], targets=batch.targets[indices])
    torch.testing.assert_close(output_sensitivity(host, 0, shared(host)), whole)


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_sensitivity_is_of_the_active_columns(mask: Any) -> None:
    host = made(MLP([6]), mask=mask)
    host.network.opened = 1
    rows = output_sensitivity(host, 1, shared(host))["head.bias"] > 0
    first, stop = host.network.columns(1)
    assert rows[first:stop].all()
    assert not rows[:first].any()
    assert not rows[stop:].any()


# --- in a module ---------------------------------------------------------------------------------


def loop_over_task(host: Host, task: int) -> dict[str, Tensor]:
    """Empirical Fisher by the definition, through the module's own forward."""
    first, stop = host.network.columns(task)
    sums = {name: torch.zeros_like(value) for name, value in shared(host).items()}
    host.network.eval()
    count = 0
    for batch in host.batches(task, "train"):
        for x, y in zip(batch.inputs.split(1), batch.targets.split(1), strict=True):
            loss = F.cross_entropy(host.network(x, task=task)[:, first:stop], y - first)
            gradients = torch.autograd.grad(loss, list(shared(host).values()))
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += gradient**2
            count += 1
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("mask", ["all", "task", "seen"])
@pytest.mark.parametrize("bias_units", [True, False])
def test_columns_and_biases_of_the_task_are_active(mask: Any, bias_units: bool) -> None:
    host = made(MLP([6]), mask=mask)
    host.network.opened = 1
    if bias_units:
        strategy = BeneficialPerturbation(4, m_start="normal")
        strategy.configure(host, host.stream)
        host.network.double()
        strategy.on_task_start(host, host.network.tasks[0])
        strategy.on_task_end(host, host.network.tasks[0])
        strategy.on_task_start(host, host.network.tasks[1])  # live
    own = {task: fisher_diagonal(host, task, shared(host)) for task in (0, 1)}
    for task, fisher in own.items():
        torch.testing.assert_close(fisher, loop_over_task(host, task), rtol=1e-6, atol=1e-12)
        first, stop = host.network.columns(task)
        rows = fisher["head.weight"].sum(1) > 0
        assert rows[first:stop].all()
        assert not rows[:first].any()
        assert not rows[stop:].any()
    if bias_units:
        with host.network.task_mode(1), torch.no_grad():
            for layer in host.network.linear_layers().values():
                layer.bias_units.bank[0] = 0  # the other task's mode, with its bias gone
        changed = fisher_diagonal(host, 0, shared(host))
        assert not torch.allclose(changed["head.weight"], own[0]["head.weight"], rtol=1e-3)


@pytest.mark.parametrize("measure", [fisher_diagonal, output_sensitivity])
def test_counts_all_processes_before_it_divides(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with uneven shares: what they add up is the sum, never the mean of means."""
    host = made(MLP([6]))
    whole = measure(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    shares = [slice(0, 30), slice(30, None)]
    reduced: list[list[Tensor]] = [[], []]

    def share(own: slice) -> Iterator[Batch]:
        yield batch._replace(inputs=batch.inputs[own], targets=batch.targets[own])

    for rank, own in enumerate(shares):
        monkeypatch.setattr(host, "batches", lambda *_, own=own: share(own))
        notes = reduced[rank]
        monkeypatch.setattr(host, "all_reduce", lambda t, notes=notes: notes.append(t.clone()) or t)
        measure(host, 0, shared(host))
    totals = iter([a + b for a, b in zip(*reduced, strict=True)])
    monkeypatch.setattr(host, "all_reduce", lambda tensor: next(totals))
    torch.testing.assert_close(measure(host, 0, shared(host)), whole)


class Twice(nn.Module):
    """A layer whose weight a function uses too, which no closed form knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(self.layer(inputs.flatten(1)).tanh(), self.layer.weight)


@pytest.mark.parametrize("backbone", [MLP([6]), Twice()], ids=["closed form", "none"])
@pytest.mark.parametrize("measure", [fisher_diagonal, output_sensitivity])
def test_a_share_of_no_samples_says_nothing_of_the_network(
    measure: Any, backbone: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether closed forms hold is tried once for a pass, on its first sample."""
    host = made(deepcopy(backbone))
    whole = measure(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    cuts = [slice(0, 0), slice(0, 40), slice(40, None)]
    parts = [batch._replace(inputs=batch.inputs[c], targets=batch.targets[c]) for c in cuts]
    monkeypatch.setattr(host, "batches", lambda *_: iter(parts))
    torch.testing.assert_close(measure(host, 0, shared(host)), whole)


@pytest.mark.parametrize("measure", [fisher_diagonal, output_sensitivity])
def test_no_samples_are_an_error(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host = made()
    monkeypatch.setattr(host, "batches", lambda *_: iter(()))
    with pytest.raises(DataError) as error:
        measure(host, 1, shared(host))
    assert str(error.value) == "Expected task 1 to have training samples, but it has none."


def everything(host: Any) -> Any:
    """All that an importance pass must leave as it is."""
    return deepcopy(
        {
            "state": host.network.state_dict(),
            "gradients": {
                n: p.grad for n, p in host.network.named_parameters() if p.grad is not None
            },
            "flags": [part.training for part in host.network.modules()],
            "needs": [p.requires_grad for p in host.network.parameters()],
            "mode": host.network.head.bias_units.active,
            "optimizer": host.trainer.optimizers[0].state_dict(),
            "torch": torch.get_rng_state(),
        }
    ), (random.getstate(), str(np.random.get_state()))


PASSES = {
    **{mode: partial(EWC, 1.0, fisher=mode, update="gradient") for mode in MODES},
    "sensitivity": partial(MemoryAwareSynapses, 1.0),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("closed_form", [True, False])
def test_the_pass_changes_nothing(fit: Any, name: str, closed_form: bool) -> None:
    compared = []
    make = PASSES[name]

    class Watched(make.func):  # type: ignore[name-defined,misc]
        def on_task_end(self, host: Any, task: Any) -> None:
            host.network.backbone[1].eval()  # frozen by its user, with the rest in training
            for parameter in host.network.parameters():
                parameter.grad = torch.randn_like(parameter)
            before = everything(host)
            super().on_task_end(host, task)
            after = everything(host)
            torch.testing.assert_close(after[0], before[0], rtol=0, atol=0, equal_nan=True)
            assert after[1] == before[1]
            compared.append(before)

    last = nn.ReLU(inplace=True) if closed_form else nn.LayerNorm(8)
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(144, 8),
        last,
    )
    fit(
        [BeneficialPerturbation(4), Watched(*make.args, **make.keywords)],
        backbone=backbone,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    assert len(compared) == 2
    state = compared[0][0]
    assert set(state["flags"]) == {True, False}
    assert state["gradients"]
    assert state["optimizer"]["state"]
