"""EWC against lists of penalties that are written out, autograd, scipy and closed-form optima."""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bpn_lightning.costs import measured_bytes, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.importance import fisher_diagonal
from bpn_lightning.nn import MLP
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.imm import IncrementalMomentMatching

Tasks = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


def written_out(tasks: Tasks, parameters: dict[str, Tensor]) -> Tensor:
    """The sum over tasks as the paper writes it, for autograd."""
    terms = [
        (importance[name] * (value - solution[name]) ** 2).sum()
        for importance, solution in tasks
        for name, value in parameters.items()
    ]
    return torch.stack(terms).sum()


# --- the three updates, inside real fits ---------------------------------------------------------


class Ledger:
    """Keeps every task's Fisher and solution in a list, as the paper does."""

    def __init__(self, watch: Any, include_head: bool = True) -> None:
        self.tasks: Tasks = []
        self.include_head = include_head
        self.watcher = watch(end=self.note)

    def note(self, host: Any, task: Any) -> None:
        parameters = host.network.shared_parameters(self.include_head)
        fisher = fisher_diagonal(host, task.id, parameters)
        solution = {name: value.detach().clone() for name, value in parameters.items()}
        self.tasks.append((fisher, solution))

    def gradient(self, parameters: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
        """Of the written-out penalty, by autograd."""
        names = self.tasks[0][0]
        theta = {name: parameters[name].detach().requires_grad_() for name in names}
        penalty = strength * written_out(self.tasks, theta)
        return dict(zip(names, torch.autograd.grad(penalty, list(theta.values())), strict=True))


def both_sides(watch: Any, hook: str, other: str, read: Callable[..., Tensor]) -> Any:
    """Two watchers around a method, and the list of pairs of what they read."""
    pairs: list[list[dict[str, Tensor]]] = []

    def before(host: Any, parameters: Any) -> None:
        pairs.append([{name: read(value).clone() for name, value in parameters.items()}])

    def after(host: Any, parameters: Any) -> None:
        pairs[-1].append({name: read(value).clone() for name, value in parameters.items()})

    return watch(**{hook: before}), watch(**{other: after}), pairs


def run_gradient_update(learn: Any, watch: Any, ewc: EWC, **arguments: Any) -> Any:
    """What the update adds to the gradient, what it should add, where, and at which rate."""
    ledger = Ledger(watch)
    rows = []
    before, after, pairs = both_sides(watch, "capture", "project", lambda value: value.grad)

    def measure(host: Any, parameters: Any) -> None:
        if not ledger.tasks:
            return
        there, here = pairs[-1]
        added = {name: here[name] - there[name] for name in ledger.tasks[0][0]}
        exact = ledger.gradient(parameters, ewc.strength)
        for name, value in added.items():
            at, scale = parameters[name].detach().clone(), there[name].abs().max()
            rate = host.learning_rate(parameters[name])
            rows.append((value, exact[name], scale, name, rate, at))

    learn(ledger.watcher, before, ewc, after, watch(consume=measure), **arguments)
    return rows, ledger


def test_gradient_is_autograd_of_the_written_penalty(learn: Any, watch: Any) -> None:
    rows, ledger = run_gradient_update(
        learn,
        watch,
        EWC(3.0, update="gradient"),
        stream={"num_tasks": 3},
        optimizer=partial(SGD, lr=0.01, momentum=0.9),
    )
    assert len(ledger.tasks) == 3
    assert len(rows) == 10 * 6  # every update but those of the first task, every tensor
    assert max(exact.abs().max() for _, exact, *_ in rows) > 0.01
    for added, exact, scale, *_ in rows:
        # What was added is a difference of float32 numbers of the gradient's size.
        torch.testing.assert_close(added, exact, rtol=1e-4, atol=1e-6 * float(scale + 1))


def test_clamped_pull_is_at_most_one_over_the_rate(learn: Any, watch: Any) -> None:
    strength = 2000.0
    rows, ledger = run_gradient_update(
        learn,
        watch,
        EWC(strength, update="clamped"),
        stream={"num_tasks": 3, "epochs_per_task": 2},
        optimizer=partial(SGD, lr=0.05),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
    )
    halfway = len(rows) // 2  # rows of task 2, then of task 3
    limited = 0
    for index, (added, _, scale, name, rate, value) in enumerate(rows):
        tasks = ledger.tasks[: 1 if index < halfway else 2]
        importance = sum(fisher[name] for fisher, _ in tasks)
        anchor = sum(f[name] * s[name] for f, s in tasks) / importance
        pull = (2 * strength * importance).clamp(max=1 / rate)
        wanted = torch.where(importance > 0, pull * (value - anchor), 0)
        limited += int((2 * strength * importance > 1 / rate).sum())
        tolerance = 1e-5 * float(scale + wanted.abs().max() + 1)
        torch.testing.assert_close(added, wanted, rtol=1e-3, atol=tolerance)
    assert limited > 0
    assert len({row[4] for row in rows}) > 5  # the scheduler's, not the first one


def test_clamped_is_gradient_where_the_limit_is_far(learn: Any, same: Any) -> None:
    runs = [
        learn(EWC(0.5, update=update), stream={"num_tasks": 3}, optimizer=partial(SGD, lr=0.01))
        for update in ("clamped", "gradient")
    ]
    same(runs[0].weights(), runs[1].weights())


@pytest.mark.parametrize(
    "scheduler",
    [None, lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
    ids=["one rate", "many rates"],
)
def test_proximal_step_minimizes_its_objective(learn: Any, watch: Any, scheduler: Any) -> None:
    """The rate times the penalty plus half the squared distance, by scipy and by Newton."""
    strength, ledger = 100.0, Ledger(watch)
    before, after, pairs = both_sides(watch, "stepped", "stepped", lambda value: value.detach())
    rates = []

    def note_rate(host: Any, parameters: Any) -> None:
        rates.append(host.learning_rate(parameters["head.weight"]) if ledger.tasks else None)

    learn(
        ledger.watcher,
        before,
        EWC(strength),
        after,
        watch(stepped=note_rate),
        stream={"num_tasks": 3},
        optimizer=partial(SGD, lr=0.05),
        scheduler=scheduler,
    )
    moved = 0.0
    steps = len(pairs) // 3
    for index, (rate, (there, here)) in enumerate(zip(rates, pairs, strict=True)):
        if rate is None:
            torch.testing.assert_close(there, here, rtol=0, atol=0)
            continue
        tasks = [
            tuple({n: v.double() for n, v in part.items()} for part in task)
            for task in ledger.tasks[: index // steps]
        ]
        start = {name: value.double() for name, value in there.items()}
        theta = {name: value.clone().requires_grad_() for name, value in start.items()}
        objective = rate * strength * written_out(tasks, theta) + sum(
            ((theta[name] - start[name]) ** 2).sum() / 2 for name in theta
        )
        slopes = torch.autograd.grad(objective, list(theta.values()), create_graph=True)
        for (name, value), slope in zip(theta.items(), slopes, strict=True):
            # Separable, so the row sums of the Hessian are its diagonal; quadratic: one step.
            (curvature,) = torch.autograd.grad(slope.sum(), value, retain_graph=True)
            best = (value - slope / curvature).detach()
            torch.testing.assert_close(here[name].double(), best, rtol=1e-5, atol=1e-7)
            moved = max(moved, float((best - start[name]).abs().max()))
        name = "head.weight"
        for place in range(0, start[name].numel(), 7):
            flat = [(f[name].flatten()[place], s[name].flatten()[place]) for f, s in tasks]
            at = start[name].flatten()[place]

            def of_one(x: float, flat: Any = flat, at: Any = at, rate: float = rate) -> float:
                pull = sum(fisher * (x - solution) ** 2 for fisher, solution in flat)
                return float(rate * strength * pull + (x - at) ** 2 / 2)

            best = minimize_scalar(of_one).x
            assert float(here[name].flatten()[place]) == pytest.approx(best, abs=1e-5)
    assert moved > 1e-3


def test_proximal_holds_at_any_strength(learn: Any, watch: Any) -> None:
    """The explicit update would be inf after two steps."""
    ledger = Ledger(watch)
    run = learn(
        ledger.watcher, EWC(1e12), stream={"epochs_per_task": 3}, optimizer=partial(SGD, lr=0.1)
    )
    (fisher, solution), _ = ledger.tasks
    free = 0
    for name, value in run.module.network.shared_parameters(include_head=True).items():
        assert value.isfinite().all()
        held = fisher[name] > 1e-6
        torch.testing.assert_close(value[held], solution[name][held], rtol=1e-4, atol=1e-5)
        free += int((value[fisher[name] == 0] != solution[name][fisher[name] == 0]).sum())
    assert free > 0  # rows of classes not seen before are free


@pytest.mark.parametrize(
    ("update", "momentum"), [("proximal", 0.0), ("clamped", 0.9), ("gradient", 0.9)]
)
def test_strength_zero_is_fine_tuning_bit_for_bit(
    learn: Any, same: Any, update: Any, momentum: float
) -> None:
    runs = [
        learn(
            strategy,
            stream={"num_tasks": 3, "reset_optimizer": "never"},
            optimizer=partial(SGD, lr=0.05, momentum=momentum, weight_decay=0.01),
            trainer={"gradient_clip_val": 0.5},
        )
        for strategy in (EWC(0, update=update), FineTuning())
    ]
    same(runs[0].weights(), runs[1].weights())
    same(runs[0].optimizer_state(), runs[1].optimizer_state())
    assert str(runs[0].random) == str(runs[1].random)


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact", "predicted"])
def test_draws_nothing_from_global_generators(learn: Any, fisher: Any) -> None:
    assert str(learn(EWC(fisher=fisher)).random) == str(learn().random)


def test_the_drawn_labels_follow_from_the_stream_alone(learn: Any, watch: Any, same: Any) -> None:
    def shift(host: Any, task: Any) -> None:
        torch.rand(7)

    one, other = EWC(1.0, fisher="sampled"), EWC(1.0, fisher="sampled")
    learn(one)
    learn(watch(end=shift), other)
    same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("strategy", [EWC, IncrementalMomentMatching])
def test_every_task_and_seed_draws_labels_of_its_own(
    learn: Any, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    place, seeds = sys.modules[strategy.__module__], []
    original = place.fisher_diagonal

    def note(*arguments: Any) -> Any:
        seeds.append(arguments[-1].initial_seed())
        return original(*arguments)

    monkeypatch.setattr(place, "fisher_diagonal", note)
    for seed in range(2):
        learn(strategy(fisher="sampled"), stream={"num_tasks": 3, "seed": seed})
    assert len(seeds) == len(set(seeds)) == 6


@pytest.mark.slow
def test_remembers_what_fine_tuning_forgets(learn: Any) -> None:
    stream = {"num_tasks": 2, "epochs_per_task": 4, "batch_size": 32}
    kept, lost = (
        learn(s, stream=stream, optimizer=partial(SGD, lr=0.05)).module.accuracy_matrix.accuracy
        for s in (EWC(), FineTuning())
    )
    assert kept[1, 0] > 0.9
    assert kept[2, 0] > 0.55
    assert lost[2, 0] < 0.3


# --- online: one anchor --------------------------------------------------------------------------


def online(gamma: float) -> EWC:
    return EWC(5.0, gamma=gamma, update="gradient")


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_online_is_the_recursion_of_the_paper(learn: Any, watch: Any, gamma: float) -> None:
    """Gamma in the recursion and in the loss; one anchor, the last solution."""
    rows, ledger = run_gradient_update(
        learn, watch, ewc := online(gamma), stream={"num_tasks": 3}, optimizer=partial(SGD, lr=0.01)
    )
    past: dict[str, Tensor] = {}
    recursion = []
    for fisher, solution in ledger.tasks:
        past = {name: gamma * past.get(name, 0) + value for name, value in fisher.items()}
        recursion.append((past, solution))
    assert len(rows) == 10 * 6
    for index, (added, _, scale, name, _, at) in enumerate(rows):
        importance, anchor = recursion[index // 30]  # of task 2, then of task 3
        exact = 2 * 5.0 * gamma * importance[name] * (at - anchor[name])
        torch.testing.assert_close(added, exact, rtol=1e-4, atol=1e-6 * float(scale + 1))
    torch.testing.assert_close(ewc.penalty.importance, recursion[2][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ewc.penalty.anchor, ledger.tasks[2][1], rtol=0, atol=0)


def test_online_without_a_past_is_fine_tuning(learn: Any, same: Any) -> None:
    runs = [learn(strategy, stream={"num_tasks": 3}) for strategy in (online(0.0), FineTuning())]
    same(runs[0].weights(), runs[1].weights())


def test_two_tasks_online_with_all_of_the_past_are_the_sum(learn: Any, same: Any) -> None:
    """The first task's anchor is its solution in both."""
    runs = [learn(EWC(50.0, gamma=gamma)) for gamma in (1.0, None)]
    same(runs[0].weights(), runs[1].weights())


def test_three_tasks_online_are_not_the_sum(learn: Any) -> None:
    weights = [
        learn(EWC(50.0, gamma=gamma), stream={"num_tasks": 3}).weights()["head.weight"]
        for gamma in (1.0, None)
    ]
    assert not torch.allclose(*weights, rtol=1e-3)


@pytest.mark.parametrize("tasks", [1, 4])
def test_online_bytes_do_not_grow(learn: Any, tasks: int) -> None:
    run = learn(ewc := EWC(gamma=0.9), stream={"num_tasks": tasks, "classes_per_task": 2})
    parameters = sum(
        p.numel() for p in run.module.network.shared_parameters(include_head=True).values()
    )
    assert (
        ewc.declared_bytes(run.module.host).held
        == measured_bytes(ewc, run.module.host)
        == (8 * parameters, 0)
    )


def test_logs_the_penalty_with_its_strength(learn: Any, watch: Any) -> None:
    """The written one, gamma included."""
    ledger, ewc, values = Ledger(watch), EWC(3.0, gamma=0.5), []

    def read(host: Any, parameters: Any) -> None:
        if ledger.tasks:
            theta = host.network.shared_parameters(include_head=True)
            values.append((ewc.logs(host)["penalty/ewc"], 1.5 * written_out(ledger.tasks, theta)))

    learn(ledger.watcher, ewc, watch(stepped=read))
    assert len(values) == 5
    for logged, wanted in values:
        torch.testing.assert_close(logged, wanted.detach())
    assert values[-1][0] > 0


# --- what is held --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "include_head", "head_is_held"),
    [
        ("all", None, True),
        ("seen", None, True),
        ("task", None, False),
        ("all", False, False),
        ("task", True, True),
    ],
)
def test_the_head_is_held_where_tasks_share_it(
    learn: Any, mask: str, include_head: bool | None, head_is_held: bool
) -> None:
    ewc = EWC(include_head=include_head)
    learn(BeneficialPerturbation(3), ewc, mask=mask)
    layers = ["backbone.1", "backbone.3"] + ["head"] * head_is_held
    assert set(ewc.penalty.importance) == {f"{x}.{p}" for x in layers for p in ("weight", "bias")}


def test_rows_of_unseen_classes_are_free(learn: Any, watch: Any) -> None:
    ewc, held = EWC(), []

    def note(host: Any, task: Any) -> None:
        held.append((ewc.penalty.importance["head.bias"] > 0).tolist())

    learn(ewc, watch(end=note), stream={"num_tasks": 3}, mask="seen")
    assert held == [[True] * 2 * k + [False] * (6 - 2 * k) for k in (1, 2, 3)]


def test_frozen_layers_are_not_held(prepare: Any) -> None:
    run = prepare(ewc := EWC())
    run.module.network.backbone[1].requires_grad_(False)
    run.fit()
    assert set(ewc.penalty.importance) == {
        f"{layer}.{p}" for layer in ("backbone.3", "head") for p in ("weight", "bias")
    }


@pytest.mark.parametrize("update", ["proximal", "clamped", "gradient"])
def test_a_layer_may_be_frozen_between_tasks(learn: Any, watch: Any, update: str) -> None:
    def freeze(host: Any, task: Any) -> None:
        host.network.backbone[1].requires_grad_(task.id == 0)

    learn(watch(start=freeze), EWC(update=update))


@pytest.mark.parametrize("update", ["proximal", "clamped", "gradient"])
@pytest.mark.parametrize("nothing", ["no parameters", "all frozen since"])
def test_there_may_be_nothing_to_hold(learn: Any, watch: Any, update: Any, nothing: str) -> None:
    """Multi-head, where the head is not held: with it, softmax regression has no shared weights."""

    def freeze(host: Any, task: Any) -> None:
        host.network.backbone.requires_grad_(task.id == 0)

    learn(
        watch(start=freeze),
        EWC(update=update),
        backbone=nn.Flatten if nothing == "no parameters" else lambda: MLP([8]),
        mask="task",
        trainer={"log_every_n_steps": 1},
    )


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_without_strength_nothing_is_measured_or_stored(
    learn: Any, monkeypatch: pytest.MonkeyPatch, gamma: float | None
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a pass over the task")

    monkeypatch.setattr("bpn_lightning.strategies.ewc.fisher_diagonal", refuse)
    run = learn(ewc := EWC(0.0, gamma=gamma))
    assert (
        ewc.declared_bytes(run.module.host).held == measured_bytes(ewc, run.module.host) == (0, 0)
    )
    assert not ewc.logs(run.module.host)


def test_says_what_it_is() -> None:
    assert EWC.regularizer
    assert EWC.null_arguments == {"strength": 0.0}
    assert not EWC.projects
    assert not EWC.needs_task_id
    assert EWC().corrects_weights
    assert not EWC(0.0).corrects_weights
    assert not EWC(update="clamped").corrects_weights


def test_stores_nothing_for_use_after_training(learn: Any) -> None:
    run = learn(ewc := EWC())
    assert (
        ewc.declared_bytes(run.module.host).per_task
        == ewc.declared_bytes(run.module.host).per_task_in_paper
        == 0
    )
    parameters = run.module.network.shared_parameters(include_head=True).values()
    state = ewc.state_dict()
    training = tensor_bytes([*state["importance"].values(), *state["anchor"].values()])
    assert training == 8 * sum(parameter.numel() for parameter in parameters)
    assert (
        ewc.declared_bytes(run.module.host).held
        == measured_bytes(ewc, run.module.host)
        == (training, 0)
    )


# --- refusals ------------------------------------------------------------------------------------

STRENGTH = " 0 is fine-tuning; the paper uses 2000."
GAMMA = " 1 keeps past importances without decay; None keeps one anchor per task."


def test_proximal_refuses_adam(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(EWC(), optimizer=Adam)
    assert str(error.value) == (
        "Expected the optimizer to be torch.optim.SGD without momentum when EWC's update is "
        "'proximal', but got Adam. Set update to 'clamped'."
    )


def test_proximal_refuses_momentum(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"to be torch\.optim\.SGD without momentum"):
        learn(EWC(), optimizer=partial(SGD, lr=0.01, momentum=0.9))


def test_proximal_names_the_momentum_that_it_refuses(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(EWC(), optimizer=partial(SGD, lr=0.01, momentum=0.9))
    assert str(error.value) == (
        "Expected the optimizer to be torch.optim.SGD without momentum when EWC's update is "
        "'proximal', but got SGD with momentum 0.9. Set update to 'clamped'."
    )


@pytest.mark.parametrize("update", ["proximal", "gradient"])
def test_fused_optimizers_are_refused_beside_a_scaler(prepare: Any, update: Any) -> None:
    """They take off the scale inside their step, after the penalty was added."""
    module = prepare().module
    fused, plain = (SGD(module.parameters(), lr=0.1, fused=flag) for flag in (True, False))
    scaled = SimpleNamespace(loss_scale=65536.0)
    EWC(update=update).check(scaled, plain)
    EWC(update=update).check(SimpleNamespace(loss_scale=1.0), fused)
    EWC(0.0, update=update).check(scaled, fused)
    with pytest.raises(ConfigurationError) as error:
        EWC(update=update).check(scaled, fused)
    assert str(error.value) == (
        "Expected an optimizer without fused=True for EWC in 16-mixed precision, but got a fused "
        "SGD. Set fused to False, or use bf16-mixed."
    )


@pytest.mark.parametrize("optimizer", [Adam, partial(SGD, lr=0.01, momentum=0.9)])
@pytest.mark.parametrize("update", ["clamped", "gradient"])
def test_explicit_updates_take_any_optimizer(learn: Any, optimizer: Any, update: str) -> None:
    learn(EWC(1.0, update=update), optimizer=optimizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"strength": -1},
            "Expected strength to be 0 or a positive number, but got -1." + STRENGTH,
        ),
        (
            {"strength": float("nan")},
            "Expected strength to be 0 or a positive number, but got nan." + STRENGTH,
        ),
        (
            {"gamma": -0.1},
            "Expected gamma to be from 0 to 1, or None, but got -0.1." + GAMMA,
        ),
        ({"gamma": 1.5}, "Expected gamma to be from 0 to 1, or None, but got 1.5." + GAMMA),
        (
            {"gamma": float("nan")},
            "Expected gamma to be from 0 to 1, or None, but got nan." + GAMMA,
        ),
        (
            {"fisher": "true"},
            "Expected fisher to be one of empirical, sampled, exact, predicted, but got 'true'.",
        ),
        (
            {"update": "explicit"},
            "Expected update to be one of proximal, clamped, gradient, but got 'explicit'.",
        ),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        EWC(**arguments)
    assert str(error.value) == message
