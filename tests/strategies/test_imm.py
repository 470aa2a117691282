"""Moment matching against averages that are written out, closed-form optima, autograd and fine-tuning."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bpn_lightning.costs import measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.importance import fisher_diagonal
from bpn_lightning.functional.penalties import merged_quadratic
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.imm import IncrementalMomentMatching as IMM
from bpn_lightning.strategies.imm import drop_transfer

MODES = ("mean", "mode")


def normalizing() -> nn.Module:
    """With running statistics, dropout and two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(16, 12), nn.ReLU(),
    )  # fmt: skip


# --- the running average -------------------------------------------------------------------------


def made(number: int) -> tuple[Tensor, Tensor]:
    """Solutions far from 0, and weights over many orders of magnitude, a quarter of them 0."""
    solutions = 3 + torch.randn(number, 200, dtype=torch.float64)
    weights = 10 ** (6 * torch.rand(number, 200, dtype=torch.float64) - 5)
    return solutions, weights * (torch.rand(number, 200) > 0.25)


def running(solutions: Tensor, weights: Tensor) -> Tensor:
    mean, mass = torch.full_like(solutions[0], 99.0), torch.zeros_like(solutions[0])
    for solution, weight in zip(solutions, weights, strict=True):
        mass, mean, _ = merged_quadratic(mass, mean, weight, solution)
    torch.testing.assert_close(mass, weights.sum(0).expand_as(mass), rtol=1e-12, atol=0)
    return mean


@pytest.mark.parametrize("number", [1, 2, 3, 20])
def test_the_running_average_is_the_average(number: int) -> None:
    solutions, weights = made(number)
    has_any = weights.sum(0) > 0
    wanted = np.average(solutions[:, has_any], axis=0, weights=weights[:, has_any])
    mean = running(solutions, weights)
    np.testing.assert_allclose(mean[has_any], wanted, rtol=1e-12)
    assert torch.equal(mean[~has_any], solutions[-1][~has_any])


def test_the_mode_is_where_the_pulls_cancel() -> None:
    solutions, weights = made(5)
    mean = running(solutions, weights)
    pull = (weights * (mean - solutions)).sum(0) / weights.sum(0).clamp(min=1e-30)
    assert pull.abs().max() < 1e-12


def test_order_of_tasks_is_irrelevant_where_anything_has_weight() -> None:
    solutions, weights = made(6)
    held = weights.sum(0) > 0
    there, back = running(solutions, weights), running(solutions.flip(0), weights.flip(0))
    torch.testing.assert_close(there[held], back[held], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_solution_is_kept_bit_for_bit(dtype: torch.dtype) -> None:
    solutions, weights = made(4)
    solutions, weights = solutions.to(dtype), weights.to(dtype)
    assert torch.equal(running(solutions[:1], weights[:1]), solutions[0])
    for only in range(4):
        of_one = torch.zeros_like(weights)
        of_one[only] = weights[only] + 1e-9
        assert torch.equal(running(solutions, of_one), solutions[only])
    same = solutions[:1].expand_as(solutions)
    assert torch.equal(running(same, weights + 1), solutions[0])


def test_equal_weights_are_the_arithmetic_mean() -> None:
    solutions, _ = made(7)
    ones = torch.ones(7, 1, dtype=torch.float64)
    for weights in (ones, 0.3 * ones, 4e-5 * ones.expand_as(solutions)):
        torch.testing.assert_close(running(solutions, weights), solutions.mean(0))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_mode_of_quadratic_tasks_is_their_joint_optimum(number: int) -> None:
    """L_k = h (theta - a)^2 / 2, each learned alone, by gradient descent; jointly by least squares.

    Also at three tasks, where per-task penalties such as EWC's count the early ones twice.
    """
    h, a = torch.rand(number, 40, dtype=torch.float64) + 0.1, 3 * torch.randn(number, 40).double()
    ends, theta = [], torch.zeros(40, dtype=torch.float64)
    for curvature, center in zip(h, a, strict=True):
        for _ in range(400):
            theta = theta - 0.9 * curvature * (theta - center)
        ends.append(theta)
    rows = torch.diag_embed(h.sqrt()).flatten(0, 1).numpy()
    joint = np.linalg.lstsq(rows, (h.sqrt() * a).flatten().numpy(), rcond=None)[0]
    np.testing.assert_allclose(running(torch.stack(ends), h), joint, atol=1e-9)
    assert np.abs(a.mean(0).numpy() - joint).max() > 0.1, "the mean is another place"


# --- the average of real runs --------------------------------------------------------------------


class Ends:
    """The weights and Fishers that tasks end and start with, in lists."""

    def __init__(self, watch: Any) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []
        self.fishers: list[dict[str, Tensor]] = []
        self.watcher = watch(start=self.note_start, end=self.note_end)

    def note_start(self, host: Any, task: Any) -> None:
        self.starts.append(parts_of(host))

    def note_end(self, host: Any, task: Any) -> None:
        self.ends.append(parts_of(host))
        self.fishers.append(
            fisher_diagonal(host, task.id, host.network.shared_parameters(True), "exact")
        )


def parts_of(host: Any) -> dict[str, Tensor]:
    """All tensors of backbone and head, copied."""
    entries = host.network.state_dict().items()
    return {name: v.clone() for name, v in entries if name.startswith(("backbone", "head"))}


def averaged(ends: list[dict[str, Tensor]], fishers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums over the list, as the paper writes them; without importance, the last solution."""
    found = {}
    for name, last in ends[-1].items():
        values = torch.stack([end[name].double() for end in ends])
        if not last.is_floating_point():
            found[name] = last
        elif not fishers or name not in fishers[0]:
            found[name] = values.mean(0).to(last.dtype)
        else:
            weights = torch.stack([fisher[name].double() for fisher in fishers])
            mean = (weights * values).sum(0) / weights.sum(0)
            found[name] = torch.where(weights.sum(0) > 0, mean, last).to(last.dtype)
    return found


def scores(run: Any, weights: dict[str, Tensor], own_columns: bool) -> list[float]:
    """Accuracies of a plain network with these weights."""
    network = nn.Sequential(
        deepcopy(run.module.network.backbone), deepcopy(run.module.network.head)
    ).eval()
    prefixes = {"0.": "backbone.", "1.": "head."}
    network.load_state_dict(
        {new + k[len(old) :]: v for k, v in weights.items() for new, old in prefixes.items()
         if k.startswith(old)}
    )  # fmt: skip
    accuracies = []
    for task in run.stream.tasks:
        right = total = 0
        for batch in run.module.host.batches(task.id, "test"):
            logits = network(batch.inputs).detach().numpy()
            if own_columns:
                others = np.delete(np.arange(logits.shape[1]), range(*task.columns))
                logits[:, others] = -np.inf
            right += int((logits.argmax(1) == batch.targets.numpy()).sum())
            total += len(logits)
        accuracies.append(right / total)
    return accuracies


@pytest.mark.parametrize("mask", ["all", "task"])
@pytest.mark.parametrize("mode", MODES)
def test_serves_the_average_of_the_networks_that_tasks_ended_with(
    learn: Any, watch: Any, mode: Any, mask: str
) -> None:
    record = Ends(watch)
    run = learn(
        record.watcher,
        imm := IMM(mode, 0.0, fisher="exact"),
        stream={"num_tasks": 3, "epochs_per_task": 2},
        optimizer=partial(SGD, lr=0.1),
        backbone=normalizing,
        mask=mask,
    )
    assert len(record.ends) == 3
    for learned in (1, 2, 3):
        ends, fishers = record.ends[:learned], record.fishers[:learned]
        wanted = averaged(ends, fishers if mode == "mode" else [])
        if mask == "task":  # every task has rows of its own
            wanted |= {name: v for name, v in ends[-1].items() if name.startswith("head")}
        row = run.module.accuracy_matrix.accuracy[learned].tolist()
        assert row == scores(run, wanted, mask == "task")
    torch.testing.assert_close(parts_of(run.module), wanted, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(wanted[name], value) for name, value in ends[-1].items())
    assert {"backbone.2.running_mean", "backbone.2.running_var"} < imm.mean.keys()
    assert ("head.weight" in imm.mean) == (mask == "all")


def test_weights_of_tasks(learn: Any, watch: Any) -> None:
    record = Ends(watch)
    run = learn(record.watcher, IMM("mean", 0.0, weights=[3, 1, 2]), stream={"num_tasks": 3})
    values = [end["head.weight"] for end in record.ends]
    wanted = (3 * values[0] + values[1] + 2 * values[2]) / 6
    torch.testing.assert_close(run.module.network.head.weight.data, wanted)


def test_weights_of_tasks_weigh_their_importances(
    learn: Any, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mode, sum of alpha F theta over sum of alpha F, with importances of 1, 2, and 3."""
    monkeypatch.setattr(
        "bpn_lightning.strategies.imm.fisher_diagonal",
        lambda host, task, parameters, *_: {
            name: torch.full_like(value, 1.0 + task) for name, value in parameters.items()
        },
    )
    record = Ends(watch)
    run = learn(record.watcher, IMM("mode", 0.0, weights=[3, 1, 2]), stream={"num_tasks": 3})
    values = [end["head.weight"] for end in record.ends]
    wanted = (3 * values[0] + 2 * values[1] + 6 * values[2]) / 11
    torch.testing.assert_close(run.module.network.head.weight.data, wanted)


def test_a_common_factor_of_the_weights_changes_nothing(learn: Any) -> None:
    one, other = learn(IMM(weights=[1, 1])), learn(IMM(weights=[50, 50]))
    torch.testing.assert_close(one.weights(), other.weights())


def test_equal_importances_make_the_mode_the_mean(
    learn: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bpn_lightning.strategies.imm.fisher_diagonal",
        lambda host, task, parameters, *_: {
            name: torch.full_like(value, 0.37) for name, value in parameters.items()
        },
    )
    runs = [learn(IMM(mode), stream={"num_tasks": 3}) for mode in MODES]
    torch.testing.assert_close(runs[0].weights(), runs[1].weights(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_one_task_is_served_as_it_was_trained(learn: Any, same: Any, mode: Any) -> None:
    arguments = {"stream": {"num_tasks": 1, "epochs_per_task": 2}, "backbone": normalizing}
    one, plain = learn(IMM(mode, 0.3, drop=0.5), **arguments), learn(**arguments)
    same(one.weights(), plain.weights())
    same(one.module.accuracy_matrix.accuracy, plain.module.accuracy_matrix.accuracy)
    assert str(one.random) == str(plain.random)


@pytest.mark.slow
@pytest.mark.parametrize("reset", ["always", "never"])
@pytest.mark.parametrize("mask", ["all", "task"])
@pytest.mark.parametrize("mode", MODES)
def test_without_transfers_training_is_fine_tuning_bit_for_bit(
    learn: Any, watch: Any, same: Any, mode: Any, mask: str, reset: str
) -> None:
    """Whatever is served in between, running statistics and momentum included."""
    runs, records = [], []
    for strategy in (IMM(mode, 0.0), FineTuning()):
        records.append(Ends(watch))
        runs.append(
            learn(
                strategy,
                records[-1].watcher,
                stream={"num_tasks": 3, "reset_optimizer": reset},
                optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
                backbone=normalizing,
                mask=mask,
            )
        )
    same(records[0].starts, records[1].starts)
    same(records[0].ends, records[1].ends)
    same(runs[0].optimizer_state(), runs[1].optimizer_state())
    assert str(runs[0].random) == str(runs[1].random)
    assert not torch.equal(
        runs[0].module.network.backbone[1].weight, runs[1].module.network.backbone[1].weight
    )


def test_within_a_task_the_training_weights_are_evaluated(learn: Any, same: Any) -> None:
    curves = [
        learn(
            strategy, stream={"epochs_per_task": 3}, evaluate_every="epoch", mask="task"
        ).module.curve
        for strategy in (IMM(strength=0.0), FineTuning())
    ]
    accuracies = [[point["accuracy"] for point in curve] for curve in curves]
    assert accuracies[0][:6] == accuracies[1][:6]  # 3 epochs; the average of one; 2 epochs


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_draws_nothing_from_global_generators(learn: Any, fisher: Any) -> None:
    assert str(learn(IMM(fisher=fisher)).random) == str(learn().random)


def test_the_drawn_labels_follow_from_the_stream_alone(learn: Any, watch: Any, same: Any) -> None:
    one, other = (IMM(strength=0.0, fisher="sampled") for _ in range(2))
    learn(one)
    learn(watch(end=lambda *_: torch.rand(7)), other)
    same(one.state_dict(), other.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_remembers_what_fine_tuning_forgets(learn: Any, mode: Any) -> None:
    """What the method is for; with one head, where fine-tuning ends at 1/5."""
    run = learn(
        IMM(mode, 0.01),
        stream={"num_tasks": 5, "epochs_per_task": 5, "batch_size": 32},
        optimizer=partial(SGD, lr=0.1),
        backbone=lambda: MLP([32, 32]),
    )
    assert run.module.accuracy_matrix.accuracy[-1].mean() > 0.3


# --- L2-transfer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["all", "task"])
def test_the_pull_is_autograd_of_the_squared_distance(learn: Any, watch: Any, mask: str) -> None:
    record, strength, compared = Ends(watch), 0.7, []
    before: list[dict[str, Tensor]] = []

    def look(host: Any, parameters: Any) -> None:
        before.append({name: value.grad.clone() for name, value in parameters.items()})

    def measure(host: Any, parameters: Any) -> None:
        for name, value in parameters.items():
            added = value.grad - before[-1][name]
            wanted = torch.zeros_like(added)
            if record.ends and not (mask == "task" and name.startswith("head")):
                theta = value.detach().clone().requires_grad_()
                distance = strength * (theta - record.ends[-1][name]).square().sum()
                (wanted,) = torch.autograd.grad(distance, theta)
                compared.append(float(wanted.abs().max()))
            torch.testing.assert_close(added, wanted, rtol=1e-3, atol=1e-6)

    learn(
        record.watcher,
        watch(capture=look),
        IMM("mean", strength),
        watch(project=measure),
        stream={"num_tasks": 3},
        optimizer=partial(SGD, lr=0.05, momentum=0.9),
        mask=mask,
    )
    assert len(compared) == 2 * 5 * (6 if mask == "all" else 4)
    assert max(compared) > 0.05


def test_the_logged_penalty_is_its_value(learn: Any, watch: Any) -> None:
    record, imm, found = Ends(watch), IMM("mean", 0.25), []

    def look(host: Any, parameters: Any) -> None:
        logged = imm.logs(host)
        assert bool(logged) == bool(record.ends)
        if logged:
            gaps = [((p.data - record.ends[-1][n]) ** 2).sum() for n, p in parameters.items()]
            found.append(float(logged["penalty/imm"]))
            assert found[-1] == pytest.approx(float(0.25 * sum(gaps)), rel=1e-5)

    learn(record.watcher, imm, watch(stepped=look), trainer={"log_every_n_steps": 1})
    assert max(found) > 1e-4
    assert not IMM("mean", 0.0).logs(None)


def test_frozen_layers_stay_as_they_are(prepare: Any) -> None:
    run = prepare(imm := IMM("mode", 0.1, drop=0.3), optimizer=partial(Adam, lr=0.01))
    run.module.network.backbone[1].requires_grad_(False)
    before = run.module.network.backbone[1].weight.clone()
    run.fit()
    assert torch.equal(run.module.network.backbone[1].weight, before)
    assert not any(name.startswith("backbone.1.") for name in imm.mean)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_may_be_frozen_between_tasks(learn: Any, watch: Any, mode: Any) -> None:
    def freeze(host: Any, task: Any) -> None:
        host.network.backbone[1].requires_grad_(task.id != 1)

    record = Ends(watch)
    run = learn(
        watch(start=freeze), record.watcher, IMM(mode, 0.1, drop=0.3), stream={"num_tasks": 3}
    )
    if mode == "mean":  # of the two tasks in which it was trained
        wanted = (record.ends[0]["backbone.1.weight"] + record.ends[2]["backbone.1.weight"]) / 2
        torch.testing.assert_close(run.module.network.backbone[1].weight.data, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_there_may_be_nothing_to_average(learn: Any, same: Any, mode: Any) -> None:
    """Multi-head, where heads are not averaged: with it, softmax regression has no shared weights."""
    arguments = {"backbone": nn.Flatten, "mask": "task", "trainer": {"log_every_n_steps": 1}}
    same(learn(IMM(mode, 0.5), **arguments).weights(), learn(**arguments).weights())


# --- drop-transfer -------------------------------------------------------------------------------


def test_drops_the_difference_and_nothing_else() -> None:
    output, before = torch.randn(400, 50).double(), torch.randn(400, 50).double()
    found = drop_transfer(output, before, 0.3)
    dropped = found == before
    torch.testing.assert_close(found[~dropped], (before + (output - before) / 0.7)[~dropped])
    assert float(dropped.double().mean()) == pytest.approx(0.3, abs=0.013)  # 4 sigma of 20,000
    assert torch.equal(drop_transfer(before, before, 0.9), before)
    torch.testing.assert_close(drop_transfer(output, before, 0.0), output)


def train_with_drop(run: Any, states: list[Tensor], rate: float) -> nn.Module:
    """Two tasks by a loop that is written out, with masks drawn as an ordinary dropout draws them."""
    network = nn.Sequential(
        deepcopy(run.module.network.backbone), deepcopy(run.module.network.head)
    )
    first, second, head = network[0][1], network[0][3], network[1]
    old = None
    for task in run.stream.tasks:
        torch.set_rng_state(states[task.id])
        optimizer = SGD(network.parameters(), lr=0.05)
        for epoch in range(task.epochs):
            for batch in run.stream.train_loader(task.id, epoch):
                taken = run.stream.prepare(batch).inputs.flatten(1)
                for place, layer in enumerate((first, second)):
                    output = layer(taken)
                    if old is not None:
                        weight, bias = old[place]
                        mask = F.dropout(torch.ones_like(output), rate)
                        rest = taken @ weight.T + bias
                        output = rest + mask * (output - rest)
                    taken = output.relu()
                optimizer.zero_grad()
                F.cross_entropy(head(taken), batch.targets).backward()
                optimizer.step()
        old = [(p.weight.detach().clone(), p.bias.detach().clone()) for p in (first, second)]
    return network


def test_drop_transfer_equals_a_loop_that_is_written_out(prepare: Any, watch: Any) -> None:
    rate, states, record = 0.4, [], Ends(watch)
    run = prepare(
        watch(start=lambda *_: states.append(torch.get_rng_state())),
        IMM("mode", 0.0, drop=rate),
        record.watcher,
        stream={"epochs_per_task": 2},
        optimizer=partial(SGD, lr=0.05),
    )
    untouched = deepcopy(run)
    run.fit()
    network = train_with_drop(untouched, states, rate)
    expected = dict(network.named_parameters())
    for name, value in record.ends[-1].items():
        new = name.replace("backbone.", "0.").replace("head.", "1.")
        torch.testing.assert_close(value, expected[new].detach(), rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped_in_the_first_task_in_evaluation_or_afterwards(
    learn: Any, watch: Any
) -> None:
    answers = []

    def look(host: Any, *_: Any) -> None:
        batch = next(iter(host.batches(0, "test"))).inputs
        flags = [part.training for part in host.network.modules()]
        random = torch.get_rng_state()
        plain = nn.Sequential(host.network.backbone, host.network.head)
        for part in plain.modules():
            part.training = False
        with torch.no_grad():
            one, other = host.network(batch), host.network(batch)
            wanted = batch.flatten(1)
            for layer in (host.network.backbone[1], host.network.backbone[3]):
                wanted = (wanted @ layer.weight.T + layer.bias).relu()
            wanted = wanted @ host.network.head.weight.T + host.network.head.bias
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted)
        assert torch.equal(torch.get_rng_state(), random)
        for part, flag in zip(host.network.modules(), flags, strict=True):
            part.training = flag
        with torch.no_grad():
            answers.append(torch.equal(host.network(batch), host.network(batch)))

    run = learn(IMM(drop=0.5), watch(stepped=look))
    assert answers == [True] * 5 + [False] * 5
    run.module.train()
    inputs = next(iter(run.module.host.batches(0, "test"))).inputs
    assert torch.equal(run.module(inputs), run.module(inputs))
    assert not any(part._forward_hooks for part in run.module.modules())


def test_importances_are_those_without_drop_transfer(learn: Any, watch: Any, same: Any) -> None:
    """The closed forms read layers' inputs and outputs by hooks of their own."""
    fishers = []

    def compare(host: Any, task: Any) -> None:
        parameters = host.network.shared_parameters(True)
        fishers.append(fisher_diagonal(host, task.id, parameters))
        hooks = [part._forward_hooks.copy() for part in host.network.modules()]
        for part in host.network.modules():
            part._forward_hooks.clear()
        fishers.append(fisher_diagonal(host, task.id, parameters))
        for part, mine in zip(host.network.modules(), hooks, strict=True):
            part._forward_hooks.update(mine)

    learn(IMM(drop=0.5), watch(end=compare))
    same(fishers[0], fishers[1])
    same(fishers[2], fishers[3])


def test_beside_bias_units(learn: Any, watch: Any) -> None:
    """Their frozen biases are not averaged: every task has one of its own."""
    imm, banks = IMM("mode", 0.01, drop=0.2), []
    run = learn(
        BeneficialPerturbation(6),
        watch(end=lambda host, task: banks.append(host.network.head.bias_units.bank.clone())),
        imm,
        stream={"num_tasks": 3},
    )
    assert not any("bias_units" in name for name in imm.mean)
    assert torch.equal(run.module.network.head.bias_units.bank, banks[-1])
    assert torch.equal(banks[-1][0], banks[0][0])


class Keyed(FineTuning):
    """Random keys on every linear layer, drawn anew for each task."""

    state_key = "keyed"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def configure(self, host: Any, stream: Any) -> None:
        self.keys = [
            host.network.attach_keys(name, self.kind) for name in host.network.linear_layers()
        ]

    def on_stream_start(self, host: Any, stream: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for keys in self.keys:
            drawn = torch.rand(keys.bank.shape, generator=generator)
            for task, key in enumerate(drawn > 0.5):
                keys.write(task, 2 * key - 1 if self.kind == "binary" else 3 * drawn[task])


@pytest.mark.parametrize(
    "other",
    [
        partial(BeneficialPerturbation, 6, m_start="normal"),
        partial(Keyed, "binary"),
        partial(Keyed, "complex"),
    ],
    ids=["bias units", "keys", "complex keys"],
)
def test_a_task_begins_with_nothing_to_drop(learn: Any, watch: Any, other: Any) -> None:
    """The weights are the last task's, and the bias and the key of now are not a difference."""
    found = []

    def look(host: Any, task: Any) -> None:
        inputs = next(iter(host.batches(0, "test"))).inputs
        with torch.no_grad():
            answer = host.network.train()(inputs)
            wanted = host.network.eval()(inputs)
            host.network.backbone[3].weight.add_(0.1)
            moved = host.network.train()(inputs), host.network.train()(inputs)
            host.network.backbone[3].weight.sub_(0.1)
        torch.testing.assert_close(answer, wanted)
        found.append(torch.equal(*moved))

    learn(other(), IMM("mean", drop=0.5), watch(start=look), stream={"num_tasks": 3})
    assert found == [True, False, False]


# --- merged weights in checkpoints ---------------------------------------------------------------


class SaveEverywhere(Callback):
    """A checkpoint after each epoch's last batch, and when the epoch is over."""

    def __init__(self, folder: Any) -> None:
        self.folder, self.paths = folder, []

    def save(self, trainer: Any) -> None:
        self.paths.append(self.folder / f"{len(self.paths):02d}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer)


@pytest.fixture
def fit_imm(fit: Any, digits: Callable[..., Any]) -> Callable[..., Any]:
    def run(*more: Any, mode: Any = "mode", **options: Any) -> Any:
        imm = IMM(mode, 0.05, drop=0.3)
        torch.manual_seed(0)
        module, trainer = fit(
            [imm, *more],
            stream=digits(),
            backbone=normalizing(),
            optimizer=partial(SGD, lr=0.05, momentum=0.9),
            **options,
        )
        return module, trainer, imm

    return run


@pytest.fixture
def digits() -> Callable[..., Any]:
    from bpn_lightning.datamodules.digits import SplitDigits

    return lambda **options: SplitDigits(
        **{"num_tasks": 2, "epochs_per_task": 2, "batch_size": 100, "seed": 0} | options
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_resuming_from_every_checkpoint_changes_nothing(
    fit_imm: Any, same: Any, tmp_path: Any, mode: Any
) -> None:
    def state(module: Any, trainer: Any, imm: Any) -> Any:
        found = [parts_of(module), module.host.training_weights, imm.state_dict()]
        return [*found, module.accuracy_matrix.accuracy], str(random_state())

    saves = SaveEverywhere(tmp_path)
    reference, random = state(*fit_imm(saves, mode=mode))
    served = 0
    for path in saves.paths:
        saved = torch.load(path, weights_only=True)["continual"]
        served += bool(saved["training_weights"])
        resumed, resumed_random = state(*fit_imm(mode=mode, seed=9, ckpt_path=path))
        same(resumed, reference)
        assert resumed_random == random
    assert served > 0, "no checkpoint was taken while merged weights were served"


def test_a_checkpoint_serves_the_average_and_keeps_the_weights_of_training(
    fit_imm: Any, watch: Any, same: Any, tmp_path: Any, digits: Any
) -> None:
    record = Ends(watch)
    module, trainer, imm = fit_imm(record.watcher)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    last = record.ends[-1]
    same(saved["continual"]["training_weights"], {name: last[name] for name in imm.mean})
    same({name: saved["state_dict"][f"network.{name}"] for name in imm.mean}, imm.mean)
    loaded = ContinualModule.load_from_checkpoint(
        tmp_path / "last.ckpt", backbone=normalizing(), weights_only=True
    )
    stream = digits()
    stream.setup()
    loaded.attach(stream)
    assert torch.equal(loaded.evaluate(), module.accuracy_matrix.accuracy[-1])


@pytest.mark.parametrize("task", [0, 1])
def test_a_failure_while_a_task_closes_merges_nothing_twice(
    fit_imm: Any, same: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, task: int
) -> None:
    """The average is served by then, and must not be taken for the weights of training."""
    from bpn_lightning.model import task_loop as home

    class Saves(Callback):
        def on_exception(self, trainer: Any, module: Any, error: Any) -> None:
            trainer.save_checkpoint(tmp_path / "broken.ckpt")

    whole, _, whole_imm = fit_imm()
    real, calls = home.evaluate, []

    def fails_once(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == task + 2:
            raise RuntimeError("power cut")
        return real(*arguments)

    monkeypatch.setattr(home, "evaluate", fails_once)
    with pytest.raises(RuntimeError, match="power cut"):
        fit_imm(Saves())
    rest, _, rest_imm = fit_imm(seed=3, ckpt_path=tmp_path / "broken.ckpt")
    same(parts_of(rest), parts_of(whole))
    same(rest.host.training_weights, whole.host.training_weights)
    same(rest_imm.state_dict(), whole_imm.state_dict())


# --- what it costs, what it refuses --------------------------------------------------------------


@pytest.mark.parametrize("mask", ["all", "task"])
@pytest.mark.parametrize(("strength", "drop"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("mode", MODES)
def test_bytes(learn: Any, mode: Any, strength: float, drop: float, mask: str) -> None:
    imm = IMM(mode, strength, drop=drop)
    run = learn(imm, mask=mask, backbone=normalizing)
    body = (64 * 16 + 16) + 2 * 16 + (16 * 12 + 12) + (12 * 4 + 4) * (mask == "all")
    copies = 2 + (mode == "mode") + (strength + drop > 0)  # the average, the weights of training
    wanted = 4 * (copies * body + 2 * 2 * 16)  # running mean and variance, averaged and kept
    assert (
        measured_bytes(imm, run.module.host)
        == imm.declared_bytes(run.module.host).held
        == (wanted, 0)
    )
    assert imm.declared_bytes(run.module.host).per_task == 0


def test_size_does_not_grow_with_tasks(learn: Any) -> None:
    sizes = []
    for tasks in (2, 5):
        run = learn(imm := IMM("mode"), stream={"num_tasks": tasks}, mask="task")
        sizes.append(measured_bytes(imm, run.module.host))
    assert sizes[0] == sizes[1]


L2 = " It is the lambda of the L2-transfer; 0 disables it."
DROP = " It is the rate of the drop-transfer; 0 disables it."
ALPHAS = " They are the alphas up to a common factor; leave them out for equal ones."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mode": "median"},
            "Expected mode to be one of mean, mode, but got 'median'. Did you mean 'mean'?",
        ),
        (
            {"fisher": "true"},
            "Expected fisher to be one of empirical, sampled, exact, predicted, but got 'true'.",
        ),
        ({"strength": -1}, "Expected strength to be 0 or a positive number, but got -1." + L2),
        (
            {"strength": float("nan")},
            "Expected strength to be 0 or a positive number, but got nan." + L2,
        ),
        ({"drop": 1.0}, "Expected drop to be at least 0 and below 1, but got 1.0." + DROP),
        ({"drop": -0.1}, "Expected drop to be at least 0 and below 1, but got -0.1." + DROP),
        (
            {"weights": [1.0, 0.0]},
            "Expected weights to be positive numbers, but got [1.0, 0.0]." + ALPHAS,
        ),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        IMM(**arguments)
    assert str(error.value) == message


def test_fused_optimizers_are_refused_beside_a_scaler(prepare: Any) -> None:
    """They take off the scale inside their step, after the pull was added."""
    fused = SGD(prepare().module.parameters(), lr=0.1, fused=True)
    scaled = SimpleNamespace(loss_scale=65536.0)
    IMM().check(SimpleNamespace(loss_scale=1.0), fused)
    IMM(strength=0.0).check(scaled, fused)
    with pytest.raises(ConfigurationError, match="fused=True for IncrementalMomentMatching in 16"):
        IMM().check(scaled, fused)


def test_refuses_weights_of_other_tasks(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(IMM(weights=[1, 2, 3]))
    assert str(error.value) == (
        "Expected weights to have one number for each of the 2 tasks, but got 3. "
        "Leave them out for equal ones."
    )


def test_refuses_drop_transfer_where_nothing_would_be_dropped(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(IMM(drop=0.5), backbone=nn.Flatten)
    assert str(error.value) == (
        "Expected the backbone to have linear layers when drop is set, but it has none. Set drop to 0."
    )
