"""GEM against quadprog, SLSQP, optimality conditions, closed forms and one-by-one autograd."""

import warnings
from collections.abc import Callable
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import quadprog
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bpn_lightning.costs import Bytes, measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.projection import (
    combined,
    inner_products,
    multipliers,
    project,
    violated,
)
from bpn_lightning.memory import EpisodicMemory, balanced, draw
from bpn_lightning.nn import MLP
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.gem import AveragedGEM, GradientEpisodicMemory
from bpn_lightning.strategies.psp import ParameterSuperposition

# --- the quadratic program, against other solvers ------------------------------------------------

Problem = tuple[Tensor, Tensor]


def made_problem(seed: int, length: float = 1.0, memories: int | None = None) -> Problem:
    """A gradient that violates something and memories of lengths over three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = memories or int(torch.randint(1, 13, (), generator=generator))
    gradients = normal(count, 40) + 0.5 * normal(40)  # tasks have something in common
    gradients *= length * 10 ** (normal(count, 1) / 2) / 40**0.5
    gradient = length * (normal(40) / 40**0.5 - 0.3 * gradients.sum(0) / gradients.sum(0).norm())
    if (gradients @ gradient >= 0).all():
        gradient = -gradient
    return gradient, gradients


def ridged(gradients: Tensor, ridge: float) -> np.ndarray[Any, Any]:
    """GG^T + R in the units of the problem, as other solvers get it."""
    gram = gradients.double() @ gradients.double().T
    return (gram + ridge * gram.diagonal().diag()).numpy()


def by_quadprog(gradient: Tensor, gradients: Tensor, margin: float, ridge: float) -> Tensor:
    """The dual's v: quadprog minimizes v^T K v / 2 - a^T v under v >= b.

    Its tolerances are absolute, and with numbers of 10^6 it stops early: the objective, which may be
    multiplied by anything, is brought to the size of 1.
    """
    count = len(gradients)
    matrix, linear = ridged(gradients, ridge), -(gradients @ gradient).numpy()
    unit, lower = np.trace(matrix), np.full(count, float(margin))
    return torch.from_numpy(
        quadprog.solve_qp(matrix / unit, linear / unit, np.eye(count), lower)[0]
    )


def by_slsqp(gradient: Tensor, gradients: Tensor, margin: float, ridge: float) -> Tensor:
    matrix, linear = ridged(gradients, ridge), (gradients @ gradient).numpy()
    found = minimize(
        lambda v: 0.5 * v @ matrix @ v + linear @ v,
        np.full(len(gradients), float(margin)),
        jac=lambda v: matrix @ v + linear,
        bounds=[(margin, None)] * len(gradients),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return torch.from_numpy(found.x)


def nearest(gradient: Tensor, gradients: Tensor) -> Tensor:
    """The primal by SLSQP: the nearest vector that no memory objects to, without any dual."""
    g, rows = gradient.numpy(), gradients.numpy()
    found = minimize(
        lambda z: 0.5 * ((z - g) ** 2).sum(),
        g,
        jac=lambda z: z - g,
        constraints={"type": "ineq", "fun": lambda z: rows @ z, "jac": lambda z: rows},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return torch.from_numpy(found.x)


def solved(gradient: Tensor, gradients: Tensor, *arguments: Any) -> Tensor:
    return multipliers(gradients @ gradient, gradients @ gradients.T, *arguments)


LENGTHS = [1e-6, 1e-3, 1.0, 1e3]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_equals_quadprog(length: float, margin: float) -> None:
    for seed in range(100):
        gradient, gradients = made_problem(seed, length)
        v = solved(gradient, gradients, margin, "constraint", 1e-6)
        wanted = by_quadprog(gradient, gradients, margin, 1e-6)
        assert (v >= margin).all()
        projected = project(gradient, gradients, margin, "constraint", 1e-6)
        torch.testing.assert_close(
            projected, gradient + wanted @ gradients, rtol=0, atol=1e-8 * float(projected.norm())
        )
        torch.testing.assert_close(v, wanted, rtol=1e-6, atol=1e-6 * float(wanted.max()))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_equals_slsqp_in_the_dual(margin: float) -> None:
    for seed in range(50):
        gradient, gradients = made_problem(seed, memories=seed % 5 + 1)
        v = solved(gradient, gradients, margin, "constraint", 1e-6)
        wanted = by_slsqp(gradient, gradients, margin, 1e-6)
        ours, theirs = gradient + v @ gradients, gradient + wanted @ gradients
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.norm() + 1))


def test_equals_slsqp_in_the_primal() -> None:
    for seed in range(50):
        gradient, gradients = made_problem(seed, memories=seed % 5 + 1)
        projected = project(gradient, gradients, 0.0, ridge=1e-12)
        torch.testing.assert_close(projected, nearest(gradient, gradients), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_meets_the_optimality_conditions(length: float, margin: float) -> None:
    """Of min over v >= gamma: K v + G g >= 0, and = 0 wherever v > gamma."""
    for seed in range(100):
        gradient, gradients = made_problem(seed, length)
        v = solved(gradient, gradients, margin, "constraint", 1e-6)
        slope = torch.from_numpy(ridged(gradients, 1e-6)) @ v + gradients @ gradient
        units = gradients.norm(dim=1) * (gradient.norm() + (v @ gradients).norm())
        assert (v >= margin).all()
        assert (slope >= -1e-9 * units).all()
        free = v > margin * (1 + 1e-9)
        assert (slope.abs() <= 1e-9 * units)[free].all()


@pytest.mark.parametrize("length", LENGTHS)
def test_no_memory_objects_to_the_projection(length: float) -> None:
    objected = 0
    for seed in range(100):
        gradient, gradients = made_problem(seed, length)
        units = gradients.norm(dim=1) * gradient.norm()
        objected += int((gradients @ gradient < -1e-2 * units).sum())
        projected = project(gradient, gradients, 0.0)
        # With a ridge: <g_k, result> >= -ridge |g_k|^2 v_k.
        v = solved(gradient, gradients, 0.0)
        allowed = 1e-6 * gradients.square().sum(1) * v + 1e-12 * units
        assert (gradients @ projected >= -allowed).all()
        assert projected.norm() <= gradient.norm() * (1 + 1e-12)
    assert objected > 100


@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1e6])
def test_lengths_do_not_matter(factor: float) -> None:
    """Without a margin, the projection of c g is c times that of g, and c g_k says what g_k says."""
    for seed in range(20):
        gradient, gradients = made_problem(seed)
        projected = project(gradient, gradients, 0.0)
        scaled = project(factor * gradient, gradients, 0.0)
        torch.testing.assert_close(scaled / factor, projected, rtol=1e-9, atol=1e-12)
        factors = torch.ones(len(gradients), 1, dtype=torch.float64)
        factors[::2] = factor
        torch.testing.assert_close(
            project(gradient, factors * gradients, 0.0), projected, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("length", LENGTHS)
def test_one_memory_is_the_averaged_form(length: float) -> None:
    for seed in range(50):
        gradient, gradients = made_problem(seed, length, memories=1)
        (m,) = gradients
        closed = gradient - min(0, float(gradient @ m)) / (m @ m) * m
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-12 * float(gradient.norm()))
        close(project(gradient, gradients, 0.0, ridge=0.0), closed)
        close(project(gradient, gradients, 0.0, ridge=1e-14), closed)


def test_additive_margin_is_added_to_the_solution_without_one() -> None:
    """The example of three unknowns in which the two readings differ, and random ones."""
    for seed in range(50):
        gradient, gradients = made_problem(seed)
        plain = by_quadprog(gradient, gradients, 0.0, 1e-6)
        v = solved(gradient, gradients, 0.5, "additive", 1e-6)
        torch.testing.assert_close(v, plain + 0.5, rtol=1e-6, atol=1e-6)
    gradient, gradients = made_problem(0, memories=3)
    readings = [solved(gradient, gradients, 0.5, mode) for mode in ("constraint", "additive")]
    assert (readings[0] - readings[1]).abs().max() > 0.1


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["constraint", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_violates_nothing_is_left_as_it_is(margin: float, mode: Any, dtype: Any) -> None:
    gradients = torch.randn(4, 30).abs().to(dtype)
    gradient = torch.randn(30).abs().to(dtype)
    before = gradient.clone()
    assert project(gradient, gradients, margin, mode) is gradient
    assert torch.equal(gradient, before)


def test_an_orthogonal_memory_objects_to_nothing() -> None:
    gradient = torch.tensor([1.0, 0.0])
    assert project(gradient, torch.tensor([[0.0, 1.0]])) is gradient


def test_the_batch_as_its_own_memory_never_objects() -> None:
    for seed in range(20):
        gradient, _ = made_problem(seed)
        assert project(gradient, gradient[None]) is gradient


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_opposite_memory_stops_it(length: float, dtype: Any) -> None:
    gradient = length * torch.randn(500).to(dtype)
    projected = project(gradient, -gradient[None], 0.0)
    assert projected.norm() <= 2e-6 * gradient.norm()


@pytest.mark.parametrize("length", LENGTHS)
def test_duplicates_change_nothing(length: float) -> None:
    for seed in range(50):
        gradient, gradients = made_problem(seed, length, memories=4)
        once = project(gradient, gradients, 0.0, ridge=1e-10)
        thrice = project(gradient, gradients.repeat(3, 1), 0.0, ridge=1e-10)
        torch.testing.assert_close(thrice, once, rtol=0, atol=1e-7 * float(gradient.norm()))


def test_solves_what_has_more_memories_than_dimensions() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        gradients = torch.randn(30, 4, generator=generator).double()
        gradients[:, 0] += 2  # else nothing but 0 pleases all
        gradient = torch.tensor([-1.0, 0.3, 0, 0]).double()
        projected = project(gradient, gradients, 0.0)
        torch.testing.assert_close(projected, nearest(gradient, gradients), rtol=0, atol=1e-4)
        assert (gradients @ projected >= -1e-4).all()


def test_a_memory_without_gradient_objects_to_nothing() -> None:
    gradient, gradients = made_problem(1, memories=3)
    padded = torch.cat([gradients, torch.zeros(2, 40).double()])
    torch.testing.assert_close(project(gradient, padded), project(gradient, gradients))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_are_left_to_those_who_skip_them(value: float) -> None:
    gradient = torch.tensor([value, -1.0])
    assert project(gradient, torch.tensor([[1.0, 1.0]])) is gradient
    assert not violated(torch.tensor([-1.0, value]))


def test_nearly_opposite_memories_cancel_exactly_enough() -> None:
    """Multipliers of 10^3 on float32 gradients: their sum must not be rounded on the way."""
    one = F.normalize(torch.randn(10_000), dim=0)
    other = F.normalize(-one + 1e-3 * F.normalize(torch.randn(10_000), dim=0), dim=0)
    gradients = torch.stack([one, other])
    gradient = torch.randn(10_000)
    gradient -= 3 * gradients.sum(0) / gradients.sum(0).norm() * gradient.norm()
    exact = project(gradient.double(), gradients.double(), 0.0, ridge=1e-12)
    single = project(gradient, gradients, 0.0, ridge=1e-12)
    products, gram = inner_products(gradient, gradients)
    v = multipliers(products, gram, 0.0, "constraint", 1e-12)
    assert v.max() > 1e3
    torch.testing.assert_close(single, exact.float(), rtol=1e-6, atol=1e-6)


def test_products_and_sums_in_pieces_are_those_of_the_whole(monkeypatch: Any) -> None:
    monkeypatch.setattr("bpn_lightning.functional.projection.CHUNK", 10)
    gradient, gradients = made_problem(0, memories=3)
    products, gram = inner_products(gradient, gradients)
    torch.testing.assert_close(products, gradients @ gradient)
    torch.testing.assert_close(gram, gradients @ gradients.T)
    v = torch.rand(3).double()
    torch.testing.assert_close(combined(gradient, gradients, v), gradient + v @ gradients)


# --- the memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_balance_gives_as_evenly_as_classes_allow(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    available = torch.randint(1, 30, (6,), generator=generator).tolist()
    total = int(torch.randint(1, sum(available) + 1, (), generator=generator))
    shares = balanced(available, total)
    assert sum(shares) == total
    assert all(0 <= share <= most for share, most in zip(shares, available, strict=True))
    wanting = [s for s, most in zip(shares, available, strict=True) if s < most]
    assert not wanting or max(shares) - min(wanting) <= 1


@pytest.mark.parametrize(("memory_per", "counts"), [("task", [3, 3, 2]), ("class", [8, 8, 8])])
def test_every_class_has_its_part(memory_per: Any, counts: list[int]) -> None:
    targets = torch.randint(4, 7, (100,))
    chosen = draw(targets, 8, memory_per, ("key",))
    assert sorted(targets[chosen].bincount(minlength=7)[4:].tolist(), reverse=True) == counts
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_the_choice_follows_from_the_key_and_reaches_the_whole_task() -> None:
    targets = torch.zeros(50, dtype=torch.int64)
    choices = [draw(targets, 5, "task", ("memory", 0, task)).tolist() for task in range(100)]
    assert choices[0] == draw(targets, 5, "task", ("memory", 0, 0)).tolist()
    assert choices[0] != choices[1]
    assert {place for choice in choices for place in choice} == set(range(50))


def test_memory_is_what_it_was_given(same: Any) -> None:
    memory, parts = EpisodicMemory(), []
    for size in (3, 1, 4):
        part = torch.randint(256, (size, 1, 2, 2), dtype=torch.uint8), torch.randint(9, (size,))
        parts.append(part)
        memory.add(*part)
    resumed = EpisodicMemory()
    resumed.load_state_dict(memory.state_dict())
    for one in (memory, resumed):
        assert len(one) == 8
        assert one.tasks().tolist() == [0] * 3 + [1] + [2] * 4
        same(one.inputs, torch.cat([inputs for inputs, _ in parts]))
        same(one.targets, torch.cat([targets for _, targets in parts]))
    before = resumed.state_dict()["sizes"]
    resumed.add(*parts[0])
    assert (before, memory.sizes, resumed.sizes) == ([3, 1, 4], [3, 1, 4], [3, 1, 4, 3])


STREAM = {"num_tasks": 3, "epochs_per_task": 1, "batch_size": 64}


@pytest.mark.parametrize(("memory_per", "number"), [("task", 11), ("class", 22)])
@pytest.mark.parametrize("kind", [GradientEpisodicMemory, AveragedGEM])
def test_keeps_samples_of_every_task(learn: Any, kind: Any, memory_per: str, number: int) -> None:
    run = learn(gem := kind(11, memory_per=memory_per), stream=STREAM)
    assert gem.memory.sizes == [number] * 3
    assert gem.memory.inputs.dtype == torch.uint8
    parts = zip(gem.memory.inputs.split(number), gem.memory.targets.split(number), strict=True)
    for task, (inputs, targets) in enumerate(parts):
        assert set(targets.tolist()) == {2 * task, 2 * task + 1}
        counts = targets.bincount()[2 * task :].tolist()
        assert sorted(counts) == ([5, 6] if memory_per == "task" else [11, 11])
        store = [(b.inputs, b.targets) for b in run.stream.loader(task, "train")]
        images, labels = (torch.cat(several) for several in zip(*store, strict=True))
        places = [
            ((images == image).flatten(1).all(1) & (labels == label)).nonzero().flatten().tolist()
            for image, label in zip(inputs, targets, strict=True)
        ]
        assert all(places), "every sample is one of the task's, with its label"
        assert len({tuple(where) for where in places}) == number


def test_the_memory_follows_from_the_stream_alone(learn: Any, watch: Any, same: Any) -> None:
    def shift(host: Any, task: Any) -> None:
        torch.rand(7)

    one, other = GradientEpisodicMemory(20), GradientEpisodicMemory(20)
    learn(one, stream=STREAM, optimizer=partial(SGD, lr=0.1))
    learn(watch(end=shift), other, stream=STREAM | {"batch_size": 100})
    same(one.memory.state_dict(), other.memory.state_dict())
    learn(third := GradientEpisodicMemory(20), stream=STREAM | {"seed": 5})
    assert not torch.equal(third.memory.inputs, one.memory.inputs)


def test_tasks_with_the_same_classes_draw_on_their_own(learn: Any, monkeypatch: Any) -> None:
    keys = []

    def note(targets: Tensor, memory_size: int, memory_per: Any, key: Any) -> Tensor:
        keys.append(key)
        return draw(targets, memory_size, memory_per, key)

    monkeypatch.setattr("bpn_lightning.memory.draw", note)
    learn(
        GradientEpisodicMemory(20),
        stream=STREAM | {"domain_incremental": True, "seed": 4},
        mask="shared",
    )
    assert len(set(keys)) == 3
    assert all(4 in key for key in keys)


# --- inside real fits ----------------------------------------------------------------------------


class WithNorm(nn.Sequential):
    """Batch normalization, a convolution and dropout: what an update must not disturb."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * 6 * 6, 10),
            nn.ReLU(),
        )


class Strange(nn.Module):
    """A layer without a closed form: a weight that is used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 64) / 8)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.scale * F.linear(inputs.flatten(1), self.weight))


def one_by_one(gem: Any, host: Any, parameters: Any) -> Tensor:
    """G by its definition: a forward and a backward for every task, in its mode and columns."""
    rows = []
    network = host.network
    for task in range(len(gem.memory.sizes)):
        here = gem.memory.tasks() == task
        inputs, targets = gem.memory.inputs[here], gem.memory.targets[here]
        mean, std = torch.tensor(host.stream.normalization)[:, :, None, None]
        with evaluation_mode(network), host.network.task_mode(task):
            first, stop = host.network.columns(task)
            logits = network((inputs / 255 - mean) / std)[:, first:stop]
            loss = F.cross_entropy(logits, targets - first)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), found, strict=True)
        full = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}
        if host.network.mask == "task":
            for name in full.keys() & {"head.weight", "head.bias"}:
                moves = torch.zeros(len(full[name]), dtype=torch.bool)
                moves[slice(*host.network.tasks[host.network.opened].columns)] = True
                full[name] = full[name].clone()
                full[name][~moves] = 0
        opened = [network.open_part(name, value).flatten() for name, value in full.items()]
        rows.append(torch.cat(opened))
    return torch.stack(rows)


def flat_gradient(host: Any, parameters: Any) -> Tensor:
    """Of the open columns: the others have none."""
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return torch.cat([host.network.open_part(n, g).flatten() for n, g in found.items()])


MODES = {
    "none": list,
    "bd": lambda: [BeneficialPerturbation(4, 0.5)],
    "psp": lambda: [ParameterSuperposition()],
}
NETWORKS = {"plain": lambda: MLP([16, 12]), "norm": WithNorm, "strange": Strange}


@pytest.mark.filterwarnings("ignore:The layers backbone .Strange. have weights, but no bias units")
@pytest.mark.parametrize("mask", ["all", "seen", "task", "shared"])
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_segments_are_one_by_one_autograd(
    learn: Any, watch: Any, mask: str, modes: str, network: str
) -> None:
    gem, tasks = GradientEpisodicMemory(10, memory_per="class"), []

    def compare(host: Any, parameters: Any) -> None:
        if gem.memory.sizes:
            wanted = one_by_one(gem, host, parameters)
            found = gem.memory_gradients(host, parameters)
            atol = 1e-5 * float(wanted.abs().max())
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol)
            tasks.append(len(wanted))

    stream = {**STREAM, "domain_incremental": mask == "shared"}
    learn(
        *MODES[modes](),
        watch(project=compare),
        gem,
        mask=mask,
        stream=stream,
        backbone=NETWORKS[network],
    )
    assert sorted(set(tasks)) == [1, 2]
    assert set(gem._closed_forms.values()) == {network != "strange"}, "the price of one backward"


@pytest.mark.parametrize("size", [1, 7, 20, 1000])
def test_a_memory_may_be_replayed_in_pieces(learn: Any, watch: Any, size: int) -> None:
    whole, pieces = GradientEpisodicMemory(13), GradientEpisodicMemory(13, replay_batch_size=size)
    number = []

    def compare(host: Any, parameters: Any) -> None:
        pieces.memory = whole.memory
        if whole.memory.sizes:
            one, other = (gem.memory_gradients(host, parameters) for gem in (whole, pieces))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            number.append(len(one))

    learn(watch(project=compare), whole, stream=STREAM)
    assert len(number) == 10


def test_uneven_memories_weigh_each_task_once(learn: Any, watch: Any) -> None:
    """Memories of 3 and 10 samples; in pieces of 4 they mix."""
    gem, seen = GradientEpisodicMemory(5, memory_per="class", replay_batch_size=4), []

    def shorten(host: Any, task: Any) -> None:
        if task.id == 0:
            memory = gem.memory
            memory.inputs, memory.targets, memory.sizes = memory.inputs[:3], memory.targets[:3], [3]

    def compare(host: Any, parameters: Any) -> None:
        if len(gem.memory.sizes) == 2:
            wanted = one_by_one(gem, host, parameters)
            found = gem.memory_gradients(host, parameters)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
            seen.append(list(gem.memory.sizes))

    learn(gem, watch(project=compare, end=shorten), stream=STREAM)
    assert seen == [[3, 10]] * 5


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("mask", ["all", "task"])
def test_the_update_follows_the_projected_gradient(
    learn: Any, watch: Any, margin: float, mask: str
) -> None:
    """From autograd and quadprog to the weights: nothing of the solver's or the layers' code."""
    gem, before, moved = GradientEpisodicMemory(40, margin=margin), [], []

    def note(host: Any, parameters: Any) -> None:
        before[:] = [flat_gradient(host, parameters)]
        if gem.memory.sizes:
            before.append(one_by_one(gem, host, parameters))

    def compare(host: Any, parameters: Any) -> None:
        after = flat_gradient(host, parameters)
        if len(before) == 1:
            assert torch.equal(after, before[0])
            return
        gradient, rows = (value.double() for value in before)
        wanted = gradient
        if (rows @ gradient < 0).any():
            wanted = gradient + by_quadprog(gradient, rows, margin, 1e-6) @ rows
            moved.append(len(rows))
            # The constraints hold on what really moves: other heads' rows take no part.
            floor = -1e-5 * rows.norm(dim=1) * gradient.norm()
            if margin == 0:
                assert (rows @ after.double() >= floor).all()
        else:
            assert torch.equal(after, before[0])
        atol = 1e-4 * float(wanted.norm())
        torch.testing.assert_close(after.double(), wanted, rtol=1e-3, atol=atol)

    learn(
        watch(project=note),
        gem,
        watch(consume=compare),
        mask=mask,
        stream=STREAM | {"epochs_per_task": 2},
        optimizer=partial(SGD, lr=0.1),
    )
    assert moved.count(1) >= 3
    assert moved.count(2) >= 3


@pytest.mark.parametrize("kind", [GradientEpisodicMemory, partial(AveragedGEM, sample_size=7)])
def test_looking_at_the_memory_leaves_no_trace(
    learn: Any, same: Any, monkeypatch: Any, kind: Any
) -> None:
    """Nothing violated is fine-tuning bit for bit, on a network that has running statistics."""
    monkeypatch.setattr("bpn_lightning.strategies.gem.violated", lambda products: False)
    arguments = {"backbone": WithNorm, "stream": STREAM, "optimizer": partial(SGD, lr=0.05)}
    with_it, without = learn(kind(20), **arguments), learn(FineTuning(), **arguments)
    same(with_it.module.network.state_dict(), without.module.network.state_dict())
    assert str(with_it.random) == str(without.random)
    assert all(part.training for part in with_it.module.modules())


def test_replay_leaves_gradients_modes_and_flags_alone(learn: Any, watch: Any, same: Any) -> None:
    gem, times = GradientEpisodicMemory(20), []

    def look(host: Any, parameters: Any) -> None:
        if not gem.memory.sizes:
            return
        host.network.backbone[4].eval()

        def everything() -> Any:
            flags = [part.training for part in host.network.modules()]
            gradients = [p.grad.clone() for p in parameters.values()]
            return [
                host.network.state_dict(),
                gradients,
                flags,
                host.network.mode,
                torch.get_rng_state(),
            ]

        before = everything()
        before[0] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in before[0].items()}
        gem.memory_gradients(host, parameters)
        same(everything(), before)
        times.append(host.network.mode)
        host.network.backbone[4].train()

    learn(BeneficialPerturbation(3), watch(project=look), gem, backbone=WithNorm, stream=STREAM)
    assert times == [1] * 5 + [2] * 5


def test_memory_gradients_are_not_autocast(learn: Any, watch: Any, same: Any) -> None:
    gem, times = GradientEpisodicMemory(20), []

    def compare(host: Any, parameters: Any) -> None:
        if gem.memory.sizes:
            plain = gem.memory_gradients(host, parameters)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = gem.memory_gradients(host, parameters)
            same(inside, plain)
            assert plain.dtype == torch.float32
            times.append(1)

    learn(watch(project=compare), gem, trainer={"precision": "bf16-mixed"})
    assert times


@pytest.mark.parametrize("kind", [GradientEpisodicMemory, AveragedGEM])
def test_one_task_is_plain_training(learn: Any, same: Any, kind: Any) -> None:
    with_it, without = learn(kind(20), stream={"num_tasks": 1}), learn(stream={"num_tasks": 1})
    same(with_it.weights(), without.weights())


def test_projects_once_for_accumulated_batches(learn: Any, monkeypatch: Any) -> None:
    calls = []
    whole = GradientEpisodicMemory.memory_gradients
    monkeypatch.setattr(
        GradientEpisodicMemory,
        "memory_gradients",
        lambda *a: (calls.append(1), whole(*a))[1],
    )
    learn(GradientEpisodicMemory(20), trainer={"accumulate_grad_batches": 2})
    assert len(calls) == 3  # five batches of the second task


def test_a_frozen_layer_takes_no_part(prepare: Any, watch: Any) -> None:
    gem, seen = GradientEpisodicMemory(20, margin=0.0), []
    run = prepare(gem, watch(consume=lambda host, parameters: seen.append(set(parameters))))
    run.module.network.backbone[1].requires_grad_(False)
    before = run.module.network.backbone[1].weight.clone()
    run.fit()
    assert torch.equal(run.module.network.backbone[1].weight, before)
    assert all("backbone.1.weight" not in names for names in seen)


class WarmUp(ContinualStrategy):
    """Trains the head alone for an epoch at the start of every task."""

    def phases(self, task: Any, phases: Any) -> Any:
        from bpn_lightning.tasks import Phase

        return [Phase("warm_up", 1, "head"), *phases]


def test_where_only_the_head_trains_only_its_moving_rows_count(learn: Any, watch: Any) -> None:
    gem, seen = GradientEpisodicMemory(20), []

    def look(host: Any, parameters: Any) -> None:
        if gem.memory.sizes and host.phase.trains == "head":
            rows = gem.memory_gradients(host, parameters)
            weight = rows[:, : parameters["head.weight"].numel()].view(len(rows), 4, -1)
            assert list(parameters) == ["head.weight", "head.bias"]
            assert (weight[:, 2:] != 0).any()
            assert (weight[:, :2] == 0).all()
            assert (rows[:, -4:-2] == 0).all()
            seen.append(1)

    learn(WarmUp(), watch(project=look), gem)
    assert len(seen) == 5


# --- the averaged form ---------------------------------------------------------------------------


def test_averaged_update_is_the_closed_form(learn: Any, watch: Any) -> None:
    gem, before, moved = AveragedGEM(40), [], []
    gem.sample_size = None

    def note(host: Any, parameters: Any) -> None:
        before[:] = [flat_gradient(host, parameters).double()]
        if gem.memory.sizes:  # tasks have equal memories: the mean over all is the mean of means
            before.append(one_by_one(gem, host, parameters).double().mean(0))

    def compare(host: Any, parameters: Any) -> None:
        after, (gradient, *rest) = flat_gradient(host, parameters).double(), before
        for m in rest:
            wanted = gradient - min(0, float(gradient @ m)) / (m @ m) * m
            torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-6)
            moved.append(bool(gradient @ m < 0))

    learn(watch(project=note), gem, watch(consume=compare), stream=STREAM)
    assert len(moved) == 10
    assert sum(moved) >= 6


def test_with_one_memory_and_no_margin_gem_is_the_averaged_form(learn: Any) -> None:
    gem = learn(GradientEpisodicMemory(30, margin=0.0, ridge=1e-12))
    averaged = learn(AveragedGEM(30, sample_size=None))
    torch.testing.assert_close(gem.weights(), averaged.weights(), rtol=1e-5, atol=1e-6)
    plain = learn(FineTuning()).weights()
    assert (plain["head.weight"] - gem.weights()["head.weight"]).abs().max() > 1e-3


def test_draws_from_all_tasks_anew_for_every_update(
    learn: Any, watch: Any, monkeypatch: Any
) -> None:
    draws, whole = [], AveragedGEM.replay_indices

    def note(self: Any, host: Any) -> Any:
        positions, groups = whole(self, host)
        assert (groups == 0).all()
        draws.append(positions.tolist())
        return positions, groups

    monkeypatch.setattr(AveragedGEM, "replay_indices", note)
    learn(AveragedGEM(30, sample_size=12), stream=STREAM)
    first = list(draws)
    assert len(first) == 10
    assert all(len(set(draw)) == 12 for draw in first)
    assert len({tuple(draw) for draw in first}) == 10
    assert all(max(draw) < 30 for draw in first[:5])
    assert {place // 30 for draw in first[5:] for place in draw} == {0, 1}
    draws.clear()
    shift = watch(capture=lambda host, parameters: torch.rand(7))
    learn(shift, AveragedGEM(30, sample_size=12), stream=STREAM)
    assert draws == first, "they follow from the stream's seed"


# --- composed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
def test_the_penalty_comes_before_the_projection(learn: Any, watch: Any, order: int) -> None:
    gem, ewc = GradientEpisodicMemory(30), EWC(50.0, update="gradient")
    kept, seen = [], []

    def note(host: Any, parameters: Any) -> None:
        kept.clear()
        if gem.memory.sizes:
            with_penalty = [
                value.grad
                + 2 * 50.0 * ewc.penalty.importance[name] * (value - ewc.penalty.anchor[name])
                for name, value in parameters.items()
            ]
            gradient = torch.cat([value.detach().flatten() for value in with_penalty])
            kept.append(project(gradient, one_by_one(gem, host, parameters)))
            seen.append(bool((kept[0] != gradient).any()))

    def compare(host: Any, parameters: Any) -> None:
        for wanted in kept:
            torch.testing.assert_close(
                flat_gradient(host, parameters), wanted, rtol=1e-3, atol=1e-5
            )

    pair = [gem, ewc][:: 1 - 2 * order]
    learn(watch(capture=note), *pair, watch(consume=compare), stream=STREAM)
    assert sum(seen) >= 5


def test_beneficial_perturbations_steps_are_not_projected(learn: Any, watch: Any) -> None:
    """They are no shared parameters: M moves by epsilon, whatever the memories say."""
    last: list[Tensor] = []
    moves = []

    def note(host: Any, parameters: Any) -> None:
        units = host.network.head.bias_units
        if last and host.network.opened == 1:
            moves.extend((units.M.detach() - last[0]).abs().flatten().tolist())
        last[:] = [units.M.detach().clone()]

    bd, gem = BeneficialPerturbation(4, 0.25, m_start="zero"), GradientEpisodicMemory(30)
    learn(bd, gem, watch(stepped=note, start=lambda *_: last.clear()))
    assert moves == pytest.approx([0.25] * len(moves))
    assert len(moves) == 16


def test_refuses_a_second_projection(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match="at most one strategy that projects gradients"):
        learn(GradientEpisodicMemory(20), AveragedGEM(20))


def test_refuses_corrections_after_the_step(learn: Any) -> None:
    class Correcting(FineTuning):
        corrects_weights = True

    with pytest.raises(ConfigurationError, match="no strategy to change weights after the step"):
        learn(GradientEpisodicMemory(20), Correcting())


@pytest.mark.slow
def test_remembers_what_fine_tuning_forgets(learn: Any) -> None:
    stream = {"num_tasks": 3, "epochs_per_task": 3, "batch_size": 32}
    averages = {}
    for name, strategy in {
        "gem": GradientEpisodicMemory(100),
        "agem": AveragedGEM(100),
        "finetune": FineTuning(),
    }.items():
        run = learn(strategy, stream=stream, optimizer=partial(SGD, lr=0.05), mask="seen")
        averages[name] = float(run.module.accuracy_matrix.accuracy[-1].mean())
    assert averages["gem"] > 0.8
    assert averages["gem"] > averages["agem"] > averages["finetune"] + 0.1


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GradientEpisodicMemory, partial(AveragedGEM, sample_size=7)])
def test_resuming_inside_a_task_changes_nothing(
    prepare: Any, same: Any, tmp_path: Any, kind: Callable[..., Any]
) -> None:
    from lightning.pytorch import Callback

    paths = []

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            paths.append(tmp_path / f"{len(paths)}.ckpt")
            trainer.save_checkpoint(paths[-1])

    def final(*more: Any, path: Any = None) -> Any:
        gem = kind(20)
        run = prepare(gem, *more, stream=STREAM, backbone=WithNorm)
        weights_only = True if path else None
        run.trainer.fit(run.module, run.stream, ckpt_path=path, weights_only=weights_only)
        return [run.module.network.state_dict(), gem.state_dict(), torch.get_rng_state()]

    reference = final(Save())
    assert len(paths) == 15
    for path in paths[3:13]:
        same(final(path=path), reference)


def test_bytes_are_those_of_its_tensors(learn: Any) -> None:
    for gem, size in (
        (GradientEpisodicMemory(15), 15),
        (GradientEpisodicMemory(15, memory_per="class"), 30),
        (AveragedGEM(15), 15),
    ):
        run = learn(gem, stream=STREAM)
        assert gem.declared_bytes(run.module.host).per_task == size * (64 + 8)
        assert gem.declared_bytes(run.module.host).per_task_in_paper == size * 64 * 3
        assert gem.declared_bytes(run.module.host).held == Bytes(3 * size * 72, 0)
        assert measured_bytes(gem, run.module.host) == gem.declared_bytes(run.module.host).held


@pytest.mark.parametrize(
    ("memory_size", "shape", "paper"),
    [
        (10, (1, 28, 28), 47_040),
        (256, (3, 32, 32), 4_718_592),
        (150, (3, 32, 32), 2_764_800),
        (209, (3, 32, 32), 3_852_288),
    ],
)
def test_the_papers_bytes_are_those_of_its_table(memory_size: int, shape: Any, paper: int) -> None:
    class Host:
        class stream:
            input_shape = shape

            @staticmethod
            def has_data(task_id: int) -> bool:
                return True

            @staticmethod
            def loader(*_: Any, **__: Any) -> list[Any]:
                return [SimpleNamespace(inputs=torch.zeros(1, *shape, dtype=torch.uint8))]

        class network:
            tasks = (SimpleNamespace(id=0, num_classes=2),)

    gem = GradientEpisodicMemory(memory_size, memory_per="class")
    assert gem.declared_bytes(Host).per_task_in_paper == paper
    assert gem.declared_bytes(Host).per_task == 2 * memory_size * (prod(shape) + 8)


def test_logs_how_many_memories_objected_and_how_much(learn: Any, watch: Any) -> None:
    gem, pairs = GradientEpisodicMemory(20), []

    def count(host: Any, parameters: Any) -> None:
        number, lowest = 0, None
        if gem.memory.sizes:
            rows, gradient = one_by_one(gem, host, parameters), flat_gradient(host, parameters)
            number = int((rows @ gradient < 0).sum())
            lowest = pytest.approx(float(F.cosine_similarity(rows, gradient[None]).min()), abs=1e-5)
        pairs.append([(number, lowest)])

    def note(host: Any, parameters: Any) -> None:
        found = gem.logs(host)
        lowest = found.get("memories/lowest_cosine")
        pairs[-1].append((int(found["memories/violated"]), lowest and float(lowest)))

    learn(watch(project=count), gem, watch(consume=note), stream=STREAM)
    assert {here for (here, _), _ in pairs} >= {0, 1}
    assert all(here == there for here, there in pairs)


# --- refusals and warnings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (Adam, "Adam"),
        (partial(SGD, lr=0.01, momentum=0.9), "SGD with momentum 0.9"),
        (partial(SGD, lr=0.01, weight_decay=0.1), "SGD with weight_decay 0.1"),
    ],
)
def test_warns_where_a_step_is_not_the_gradient(learn: Any, optimizer: Any, what: str) -> None:
    wanted = f"GradientEpisodicMemory projects gradients, but {what} does not step along them, so its steps may violate the constraints. torch.optim.SGD without momentum satisfies them."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        learn(GradientEpisodicMemory(20), optimizer=optimizer)
    ours = [str(w.message) for w in found if "GradientEpisodicMemory" in str(w.message)]
    assert ours == [wanted]


def test_refuses_clipping_by_value(learn: Any) -> None:
    arguments = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    with pytest.raises(ConfigurationError) as error:
        learn(AveragedGEM(20), trainer=arguments)
    assert str(error.value) == (
        "Expected trainer.gradient_clip_algorithm to be 'norm' with AveragedGEM, but got 'value'. Clipping by value changes the direction of the projected gradient."
    )


@pytest.mark.parametrize(
    "clipping",
    [
        {"gradient_clip_val": 1.0},
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"},
        {"gradient_clip_algorithm": "value"},
    ],
)
def test_takes_clipping_that_keeps_directions(learn: Any, clipping: Any) -> None:
    learn(GradientEpisodicMemory(20), trainer=clipping)


@pytest.mark.parametrize(
    ("memory_per", "message"),
    [
        (
            "task",
            "at most the 288 training samples of task 0, but got 300. Lower it to 288",
        ),
        (
            "class",
            "at most the 142 training samples of class '0' in task 0, but got 300. Lower it to 142",
        ),
    ],
)
def test_refuses_a_memory_larger_than_a_task(prepare: Any, memory_per: str, message: str) -> None:
    run = prepare(GradientEpisodicMemory(300, memory_per=memory_per))
    with pytest.raises(ConfigurationError) as error:
        run.fit()
    assert str(error.value) == f"Expected memory_size to be {message} or less."
    assert run.module.opened == -1


def test_takes_a_memory_of_the_whole_task(learn: Any) -> None:
    run = learn(gem := GradientEpisodicMemory(280), stream={"num_tasks": 2})
    sizes = [sum(len(b.targets) for b in run.stream.loader(task, "train")) for task in (0, 1)]
    assert gem.memory.sizes == [280, 280]
    learn(GradientEpisodicMemory(min(sizes)), stream={"num_tasks": 2})


MARGIN = "0 projects onto the constraints; 0.5 is the authors' value."
RIDGE = "Without it, the solution is not unique for memories with equal gradients; 1e-06 is small enough."
WHOLE = "to be a whole number of at least 1, but got"


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            GradientEpisodicMemory,
            {"memory_size": 0},
            f"Expected memory_size {WHOLE} 0. Without a memory it is fine-tuning: leave GEM out.",
        ),
        (
            AveragedGEM,
            {"memory_size": -3},
            f"Expected memory_size {WHOLE} -3. Without a memory it is fine-tuning: leave GEM out.",
        ),
        (
            GradientEpisodicMemory,
            {"replay_batch_size": 0},
            f"Expected replay_batch_size {WHOLE} 0. null uses all at once.",
        ),
        (
            AveragedGEM,
            {"sample_size": 0},
            f"Expected sample_size {WHOLE} 0. null uses the whole memory.",
        ),
        (
            GradientEpisodicMemory,
            {"memory_per": "label"},
            "Expected memory_per to be one of task, class, but got 'label'.",
        ),
        (
            GradientEpisodicMemory,
            {"margin_mode": "paper"},
            "Expected margin_mode to be one of constraint, additive, but got 'paper'.",
        ),
        (
            GradientEpisodicMemory,
            {"margin": -0.5},
            f"Expected margin to be 0 or a positive number, but got -0.5. {MARGIN}",
        ),
        (
            GradientEpisodicMemory,
            {"ridge": 0},
            f"Expected ridge to be a positive number, but got 0. {RIDGE}",
        ),
    ],
)
def test_refuses_what_it_cannot_do(kind: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        kind(**arguments)
    assert str(error.value) == message
