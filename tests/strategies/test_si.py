"""SI against identities on quadratics that hold for any optimizer, closed forms, and loops."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from bpn_lightning.costs import measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.si import SynapticIntelligence, add_importance

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.05),
}


# --- diagonal quadratics, without a trainer ------------------------------------------------------


class Quadratics:
    """Tasks L_k = h_k (theta - a_k)^2 / 2 in double precision, and the little that SI asks a host."""

    mask = "all"

    def __init__(self, tasks: int = 1, size: int = 40) -> None:
        self.h = torch.rand(tasks, size, dtype=torch.float64) + 0.5
        self.a = 3 * torch.randn(tasks, size, dtype=torch.float64)
        self.theta = nn.Parameter(torch.randn(size, dtype=torch.float64))
        self.rate = 0.0
        self.network = self  # as far as it is asked

    def shared_parameters(self, include_head: bool) -> dict[str, nn.Parameter]:
        return {"theta": self.theta}

    def learning_rate(self, parameter: nn.Parameter) -> float:
        return self.rate

    def loss(self, task: int) -> Tensor:
        """Element by element."""
        return self.h[task] * (self.theta - self.a[task]) ** 2 / 2

    def learn(
        self,
        si: SynapticIntelligence,
        task: int,
        make: Callable[..., Optimizer],
        steps: int = 30,
        clip: float | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The hooks of a task's updates, in their order; yields each one's gradient and change."""
        host: Any = self
        optimizer = make([self.theta])
        self.rate = optimizer.param_groups[0]["lr"]
        si.on_task_start(host, SimpleNamespace(id=task))
        parameters = self.shared_parameters(True)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(task).sum().backward()
            gradient, before = self.theta.grad.clone(), self.theta.detach().clone()
            si.capture_grad(host, parameters)
            si.penalty_grad(host, parameters)
            if clip is not None:
                nn.utils.clip_grad_norm_([self.theta], clip)
            optimizer.step()
            si.correct_step(host, parameters)
            si.observe_step(host, parameters)
            yield gradient, self.theta.detach() - before

    def joint(self, number: int) -> Tensor:
        """The optimum of the first tasks' losses together."""
        return (self.h[:number] * self.a[:number]).sum(0) / self.h[:number].sum(0)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_path_is_the_fall_of_the_loss_and_what_steps_overshoot(name: str, clip: Any) -> None:
    """Exact for any optimizer: -g d = L(theta) - L(theta + d) + h d^2 / 2 on a parabola."""
    world, si = Quadratics(), SynapticIntelligence()
    first = world.loss(0).detach()
    moves = [move for _, move in world.learn(si, 0, OPTIMIZERS[name], clip=clip)]
    fall = first - world.loss(0).detach()
    overshoot = world.h[0] * torch.stack(moves).square().sum(0) / 2
    assert overshoot.sum() > 1e-3 * fall.sum()
    torch.testing.assert_close(si.path["theta"], fall + overshoot, rtol=1e-10, atol=1e-10)


def test_the_path_of_plain_descent_has_a_closed_form() -> None:
    world, si, rate, steps = Quadratics(), SynapticIntelligence(), 0.3, 25
    h, distance = world.h[0], (world.theta - world.a[0]).detach()
    fall = world.loss(0).detach()
    list(world.learn(si, 0, partial(SGD, lr=rate), steps))
    rho = 1 - rate * h
    series = (1 - rho ** (2 * steps)) / (1 - rho**2)
    wanted = rate * h**2 * distance**2 * series
    torch.testing.assert_close(si.path["theta"], wanted, rtol=1e-10, atol=0)
    fall = fall - world.loss(0).detach()
    torch.testing.assert_close(si.path["theta"] / fall, 2 / (2 - rate * h), rtol=1e-10, atol=0)


def test_the_trapezoid_of_two_gradients_is_the_fall_itself() -> None:
    """So the path is that sum and half the change of the gradient times the change: signs, again."""
    world, si = Quadratics(), SynapticIntelligence()
    start = world.loss(0).detach()
    steps = list(world.learn(si, 0, OPTIMIZERS["momentum"]))
    last = (world.h[0] * (world.theta - world.a[0])).detach()
    gradients = [gradient for gradient, _ in steps] + [last]
    trapezoid = sum(
        -(now + after) * move / 2
        for (now, after), (_, move) in zip(pairwise(gradients), steps, strict=True)
    )
    torch.testing.assert_close(trapezoid, start - world.loss(0).detach())
    rest = sum(
        (after - now) * move / 2
        for (now, after), (_, move) in zip(pairwise(gradients), steps, strict=True)
    )
    torch.testing.assert_close(si.path["theta"], trapezoid + rest, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("damping", [1e-12, 0.5])
def test_small_steps_find_half_the_curvature(damping: float) -> None:
    """Omega goes to h d^2 / 2 (d^2 + damping): with c = 1 the penalty is the task's own loss."""
    world = Quadratics()
    si = SynapticIntelligence(damping=damping, update="gradient")
    start = world.theta.detach().clone()
    list(world.learn(si, 0, partial(SGD, lr=0.02), 800))
    si.on_task_end(world, SimpleNamespace(id=0))  # type: ignore[arg-type]
    d = (world.theta - start).detach()
    wanted = world.h[0] / 2 * d**2 / (d**2 + damping)
    overshoot = 2 / (2 - 0.02 * world.h[0])  # of steps that are not infinitely small
    found = si.penalty.importance["theta"]
    torch.testing.assert_close(found, wanted * overshoot, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found, wanted, rtol=0.016, atol=1e-9)


@pytest.mark.slow
def test_two_quadratic_tasks_end_at_the_joint_optimum_and_three_do_not() -> None:
    """A negative control: the third task's weight is what the second one's path happened to be."""
    world = Quadratics(tasks=3)
    si = SynapticIntelligence(1.0, damping=1e-12, update="gradient")
    far = []
    for task in range(3):
        list(world.learn(si, task, partial(SGD, lr=0.02), 1000))
        si.on_task_end(world, SimpleNamespace(id=task))  # type: ignore[arg-type]
        far.append((world.theta.detach() - world.joint(task + 1)).abs().max())
    assert far[0] < 1e-3
    assert far[1] < 0.06  # of distances around 3: the rate's share of it
    assert far[2] > 0.2


@pytest.mark.slow
def test_the_joint_optimum_is_that_of_small_steps() -> None:
    gaps = []
    torch.manual_seed(5)
    made = Quadratics(tasks=2)
    for rate in (0.04, 0.02, 0.01):
        world = Quadratics(tasks=2)
        world.h, world.a = made.h, made.a
        world.theta.data.copy_(made.theta.data)
        si = SynapticIntelligence(1.0, damping=1e-12, update="gradient")
        for task in range(2):
            list(world.learn(si, task, partial(SGD, lr=rate), int(12 / rate)))
            si.on_task_end(world, SimpleNamespace(id=task))  # type: ignore[arg-type]
        gaps.append(float((world.theta.detach() - world.joint(2)).abs().max()))
    assert gaps[1] / gaps[0] == pytest.approx(0.5, rel=0.1)
    assert gaps[2] / gaps[1] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("update", ["gradient", "clamped", "proximal"])
def test_the_path_is_the_tasks_own_while_the_penalty_pulls(update: Any) -> None:
    """The identity again, on a second task: g is of the task's loss, the change is what happened."""
    world, si = Quadratics(tasks=2), SynapticIntelligence(3.0, update=update)
    list(world.learn(si, 0, OPTIMIZERS["sgd"]))
    si.on_task_end(world, SimpleNamespace(id=0))  # type: ignore[arg-type]
    start, first = world.theta.detach().clone(), world.loss(1).detach()
    moves = [move for _, move in world.learn(si, 1, OPTIMIZERS["sgd"])]
    torch.testing.assert_close(torch.stack(moves).sum(0), world.theta.detach() - start)
    fall = first - world.loss(1).detach()
    wanted = fall + world.h[1] * torch.stack(moves).square().sum(0) / 2
    torch.testing.assert_close(si.path["theta"], wanted, rtol=1e-10, atol=1e-10)
    plain, free = SynapticIntelligence(), Quadratics()
    free.h, free.a = world.h[1:], world.a[1:]
    free.theta.data.copy_(start)
    list(free.learn(plain, 0, OPTIMIZERS["sgd"]))
    assert (free.theta - world.theta).abs().max() > 0.1  # it did pull


def test_an_update_that_is_skipped_adds_nothing() -> None:
    """As fp16's scaler does when gradients overflow: inf times a change of 0 would be nan for ever."""
    world, si = Quadratics(), SynapticIntelligence()
    host: Any = world
    list(world.learn(si, 0, OPTIMIZERS["sgd"], 5))
    before = si.path["theta"].clone()
    world.theta.grad = torch.full_like(world.theta, float("inf"))
    si.capture_grad(host, {"theta": world.theta})
    si.penalty_grad(host, {"theta": world.theta})  # and the optimizer does not step
    assert torch.equal(si.path["theta"], before)
    world.theta.grad = torch.ones_like(world.theta)
    si.capture_grad(host, {"theta": world.theta})
    with torch.no_grad():
        world.theta.sub_(0.5)
    si.observe_step(host, {"theta": world.theta})
    torch.testing.assert_close(si.path["theta"], before + 0.5)


def test_what_has_no_gradient_adds_nothing() -> None:
    """Momentum still moves it."""
    world, si = Quadratics(), SynapticIntelligence()
    host: Any = world
    si.on_task_start(host, SimpleNamespace(id=0))  # type: ignore[arg-type]
    world.theta.grad = None
    si.capture_grad(host, {"theta": world.theta})
    with torch.no_grad():
        world.theta.sub_(1.0)
    si.observe_step(host, {"theta": world.theta})
    si.capture_grad(host, {})  # in a phase that trains something else
    si.observe_step(host, {})
    assert not si.path["theta"].any()


# --- importances ---------------------------------------------------------------------------------


def test_importances_are_the_formula() -> None:
    old, path, change = (torch.randn(100, dtype=torch.float64) for _ in range(3))
    old = old.abs()
    for clamp in ("cumulative", "per_task", "none"):
        found = add_importance(old, path, change, 0.3, clamp)
        for i in range(100):
            added = float(path[i]) / (float(change[i]) ** 2 + 0.3)
            wanted = {
                "cumulative": max(0.0, float(old[i]) + added),
                "per_task": float(old[i]) + max(0.0, added),
                "none": float(old[i]) + added,
            }[clamp]
            assert float(found[i]) == pytest.approx(wanted, rel=1e-12)


def tasks_that_go_up(clamp: Any) -> list[Tensor]:
    """Importances after each task where paths are of both signs, through the strategy."""
    world = Quadratics()
    host: Any = world
    si, found = SynapticIntelligence(clamp=clamp), []
    for task in range(5):
        si.on_task_start(host, SimpleNamespace(id=task))  # type: ignore[arg-type]
        si.path["theta"].normal_()
        with torch.no_grad():
            world.theta.add_(torch.randn_like(world.theta))
        si.on_task_end(host, SimpleNamespace(id=task))  # type: ignore[arg-type]
        found.append(si.penalty.importance["theta"])
    return found


def test_clamps_keep_what_they_say_from_being_negative() -> None:
    cumulative, per_task, none = map(tasks_that_go_up, ("cumulative", "per_task", "none"))
    assert all((value >= 0).all() for value in cumulative)
    assert any((b < a).any() for a, b in pairwise(cumulative))
    assert all((b >= a).all() for a, b in pairwise(per_task))
    assert any((value < 0).any() for value in none)


def test_every_task_begins_a_path_of_its_own() -> None:
    world, si = Quadratics(tasks=2), SynapticIntelligence()
    host: Any = world
    list(world.learn(si, 0, OPTIMIZERS["sgd"]))
    assert si.path["theta"].any()
    si.on_task_end(host, SimpleNamespace(id=0))  # type: ignore[arg-type]
    assert not si.path["theta"].any()
    assert torch.equal(si.penalty.anchor["theta"], world.theta)
    with torch.no_grad():
        world.theta.add_(1.0)  # whatever happens between tasks
    si.on_task_start(host, SimpleNamespace(id=1))  # type: ignore[arg-type]
    assert torch.equal(si.penalty.anchor["theta"], world.theta)
    assert not si.path["theta"].any()


# --- inside real fits ----------------------------------------------------------------------------


class PathByHand:
    """Minus the gradient times the change of every update, added up by two watchers.

    The gradient is autograd's of the batch's cross-entropy: not what is in ``.grad`` in any phase.
    """

    def __init__(self, watch: Any) -> None:
        self.first = watch(start=self.begin, terms=self.terms)
        self.last = watch(stepped=self.stepped)
        self.path: dict[str, Tensor] = {}
        self.updates = 0

    def begin(self, host: Any, task: Any) -> None:
        self.path = {
            n: torch.zeros_like(p) for n, p in host.network.shared_parameters(True).items()
        }

    def terms(self, host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        parameters = host.network.shared_parameters(True)
        loss = nn.functional.cross_entropy(logits, batch.targets)
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        self.gradient = {n: g.double() for n, g in zip(parameters, found, strict=True)}
        self.before = {n: p.detach().double() for n, p in parameters.items()}
        return {}

    def stepped(self, host: Any, parameters: Any) -> None:
        self.updates += 1
        for n, p in parameters.items():
            self.path[n] = self.path[n] - self.gradient[n] * (p.detach() - self.before[n])


@pytest.mark.parametrize(
    ("update", "of_other"),
    [("clamped", "clamped"), ("clamped", "proximal"), ("proximal", "clamped")],
)
def test_the_path_is_of_raw_gradients_and_real_changes(
    learn: Any, watch: Any, update: Any, of_other: Any
) -> None:
    """Beside bias units, a second penalty before it, clipping and weight decay."""
    by_hand, si, compared = PathByHand(watch), SynapticIntelligence(5.0, update=update), []

    def compare(host: Any, task: Any) -> None:
        for name, value in si.path.items():
            torch.testing.assert_close(
                value.double(), by_hand.path[name], rtol=1e-4, atol=1e-7, check_dtype=False
            )
            compared.append(float(value.abs().max()))

    learn(
        watch(end=compare),
        by_hand.first,
        BeneficialPerturbation(4),
        EWC(10.0, update=of_other),
        si,
        by_hand.last,
        stream={"num_tasks": 3},
        optimizer=partial(SGD, lr=0.05, weight_decay=0.01),
        trainer={"gradient_clip_val": 0.3},
    )
    assert by_hand.updates == 15
    assert len(compared) == 18
    assert min(compared) > 1e-5


def test_half_batches_that_are_accumulated_are_batches(prepare: Any) -> None:
    """One contribution for each update, of the accumulated gradient."""

    def run(batch_size: int, accumulate: int) -> SynapticIntelligence:
        si = SynapticIntelligence()
        prepare(
            si,
            stream={"batch_size": batch_size, "num_tasks": 2, "classes_per_task": 2},
            optimizer=partial(SGD, lr=0.05),
            trainer={"accumulate_grad_batches": accumulate, "limit_train_batches": 4 * accumulate},
        ).fit()
        return si

    whole, halves = run(64, 1), run(32, 2)
    assert whole.penalty.importance["head.weight"].any()
    torch.testing.assert_close(
        halves.penalty.importance, whole.penalty.importance, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(halves.penalty.anchor, whole.penalty.anchor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mask", ["all", "task"])
def test_strength_zero_is_fine_tuning_bit_for_bit(
    learn: Any, same: Any, name: str, mask: Any
) -> None:
    si = SynapticIntelligence(0)
    runs = [
        learn(
            strategy,
            stream={"num_tasks": 3, "reset_optimizer": "never"},
            optimizer=OPTIMIZERS[name],
            mask=mask,
            trainer={"gradient_clip_val": 0.5},
        )
        for strategy in (si, FineTuning())
    ]
    same(runs[0].weights(), runs[1].weights())
    same(runs[0].optimizer_state(), runs[1].optimizer_state())
    assert str(runs[0].random) == str(runs[1].random)
    assert si.declared_bytes(runs[0].module).held == measured_bytes(si, runs[0].module) == (0, 0)


def test_the_first_task_is_plain_training(learn: Any, same: Any) -> None:
    runs = [learn(s, stream={"num_tasks": 1}) for s in (SynapticIntelligence(), FineTuning())]
    same(runs[0].weights(), runs[1].weights())


@pytest.mark.parametrize("mask", ["all", "task"])
def test_bytes_are_three_tensors_of_what_is_held(learn: Any, mask: Any) -> None:
    run = learn(si := SynapticIntelligence(), mask=mask)
    held = run.module.network.shared_parameters(include_head=mask == "all")
    size = sum(value.numel() for value in held.values())
    assert (
        si.declared_bytes(run.module.host).held
        == measured_bytes(si, run.module.host)
        == (12 * size, 0)
    )
    assert set(si.penalty.importance) == set(si.path) == set(held)
    assert si.declared_bytes(run.module.host).per_task == 0


def test_rows_that_have_no_gradient_have_no_importance(learn: Any, watch: Any) -> None:
    rows: list[list[bool]] = []
    si = SynapticIntelligence(include_head=True)

    def note(host: Any, task: Any) -> None:
        rows.append((si.penalty.importance["head.weight"] != 0).any(1).tolist())

    learn(si, watch(end=note), stream={"num_tasks": 3}, mask="task")
    assert rows == [[True] * 2 * k + [False] * (6 - 2 * k) for k in (1, 2, 3)]


@pytest.mark.parametrize("update", ["proximal", "clamped", "gradient"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_layer_may_be_frozen_in_a_task(learn: Any, watch: Any, update: Any, frozen: int) -> None:
    """In the first task there is nothing of it to remember; in the second what there is stays."""
    si, kept = SynapticIntelligence(update=update), []

    def freeze(host: Any, task: Any) -> None:
        host.network.backbone[1].requires_grad_(task.id != frozen)

    def note(host: Any, task: Any) -> None:
        kept.append(dict(si.penalty.importance))

    learn(watch(start=freeze), si, watch(end=note))
    name = "backbone.1.weight"
    if frozen == 0:
        assert name not in kept[0]
        assert kept[1][name].any()
    else:
        assert torch.equal(kept[1][name], kept[0][name])


@pytest.mark.slow
def test_remembers_what_fine_tuning_forgets(learn: Any) -> None:
    stream = {"num_tasks": 2, "epochs_per_task": 6, "batch_size": 32}
    kept, lost = (
        learn(
            strategy, stream=stream, optimizer=partial(SGD, lr=0.05), mask="task"
        ).module.accuracy_matrix.accuracy[2, 0]
        for strategy in (SynapticIntelligence(10.0), FineTuning())
    )
    assert kept >= lost
    assert kept > 0.9


# --- refusals ------------------------------------------------------------------------------------

STRENGTH = " 0 is fine-tuning; the authors use 0.1 and 1."
NEGATIVE = "a proximal step needs importances of at least 0. Set update to 'clamped'."


def test_the_implicit_step_refuses_adam(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(SynapticIntelligence(update="proximal"), optimizer=Adam)
    assert str(error.value) == (
        "Expected the optimizer to be torch.optim.SGD without momentum when SynapticIntelligence's "
        "update is 'proximal', but got Adam. Set update to 'clamped'."
    )


def test_any_optimizer_by_default(learn: Any) -> None:
    learn(SynapticIntelligence(), optimizer=partial(Adam, lr=0.01))
    assert not SynapticIntelligence().corrects_weights
    assert SynapticIntelligence(update="proximal").corrects_weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"strength": -1},
            "Expected strength to be 0 or a positive number, but got -1." + STRENGTH,
        ),
        (
            {"damping": 0},
            "Expected damping to be a positive number, but got 0. The authors use 0.1 and 0.001.",
        ),
        (
            {"damping": float("nan")},
            "Expected damping to be a positive number, but got nan. The authors use 0.1 and 0.001.",
        ),
        (
            {"clamp": "relu"},
            "Expected clamp to be one of cumulative, per_task, none, but got 'relu'.",
        ),
        (
            {"update": "explicit"},
            "Expected update to be one of proximal, clamped, gradient, but got 'explicit'.",
        ),
        (
            {"update": "proximal", "clamp": "none"},
            "Expected clamp to be cumulative or per_task when update is 'proximal', but got 'none': "
            + NEGATIVE,
        ),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        SynapticIntelligence(**arguments)
    assert str(error.value) == message
