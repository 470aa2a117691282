"""Quadratic penalties against lists that are written out, autograd, scipy and closed-form optima."""

from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from bpn_lightning.costs import tensor_bytes
from bpn_lightning.functional.penalties import (
    add_penalty_grad_,
    gradient_coefficients,
    merged_quadratic,
    proximal_step_,
    proximal_weights,
)
from bpn_lightning.strategies.penalty import QuadraticPenalty

Tasks = list[tuple[dict[str, Tensor], dict[str, Tensor]]]
SHAPES = {"weight": (5, 4), "bias": (5,)}


def made_tasks(number: int, dtype: torch.dtype = torch.float64) -> Tasks:
    """Importances over many orders of magnitude, a quarter of them 0, and solutions far from 0."""
    tasks = []
    for _ in range(number):
        importance = {
            name: (10 ** (6 * torch.rand(shape, dtype=dtype) - 5)) * (torch.rand(shape) > 0.25)
            for name, shape in SHAPES.items()
        }
        solution = {name: 3 + torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
        tasks.append((importance, solution))
    return tasks


def added_up(tasks: Tasks) -> QuadraticPenalty:
    penalty = QuadraticPenalty()
    for importance, solution in tasks:
        penalty.add(importance, solution)
    return penalty


def written_out(tasks: Tasks, parameters: dict[str, Tensor]) -> Tensor:
    """The sum over tasks as the paper writes it, for autograd."""
    terms = [
        (importance[name] * (value - solution[name]) ** 2).sum()
        for importance, solution in tasks
        for name, value in parameters.items()
    ]
    return torch.stack(terms).sum()


def leaves(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in SHAPES.items()
    }


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- the running sums ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 20])
def test_running_sums_are_the_list_in_value_and_gradient(number: int) -> None:
    tasks, theta = made_tasks(number), leaves()
    penalty, value = added_up(tasks), written_out(tasks, theta)
    torch.testing.assert_close(penalty.value(theta), value.detach(), rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(value, list(theta.values()))
    for (name, at), gradient in zip(theta.items(), gradients, strict=True):
        analytic = 2 * penalty.importance[name] * (at.detach() - penalty.anchor[name])
        torch.testing.assert_close(analytic, gradient, rtol=1e-10, atol=1e-10)


def test_where_nothing_is_important_the_anchor_is_the_last_solution() -> None:
    none = torch.zeros(4, dtype=torch.float64)
    first, last = torch.randn(2, 4, dtype=torch.float64)
    total, anchor, constant = merged_quadratic(none, first, none, last)
    assert torch.equal(anchor, last)
    assert not total.any()
    assert constant == 0


def test_order_of_tasks_is_irrelevant() -> None:
    tasks, theta = made_tasks(6), leaves()
    there, back = added_up(tasks), added_up(tasks[::-1])
    torch.testing.assert_close(there.value(theta), back.value(theta), rtol=1e-12, atol=0)
    torch.testing.assert_close(there.importance, back.importance, rtol=1e-12, atol=0)
    for name, importance in there.importance.items():
        held = importance > 0  # where nothing is held, the anchor pulls nothing
        torch.testing.assert_close(there.anchor[name][held], back.anchor[name][held])


def test_one_task_is_kept_as_it_is() -> None:
    ((importance, solution),) = made_tasks(1)
    penalty = added_up([(importance, solution)])
    same(penalty.importance, importance)
    same(penalty.anchor, solution)
    assert penalty.value(solution) == 0


def test_size_does_not_grow_with_tasks() -> None:
    def size(number: int) -> int:
        state = added_up(made_tasks(number, torch.float32)).state_dict()
        assert isinstance(state["constant"], float)
        return tensor_bytes([*state["importance"].values(), *state["anchor"].values()])

    assert size(1) == size(2) == size(30) == 8 * 25


def test_single_precision_does_not_drift() -> None:
    """Sums of F theta would cancel: these anchors lie at 1000 and differ by 1."""
    tasks = made_tasks(100)
    for _, solution in tasks:
        for name in solution:
            solution[name] += 1000
    rounded = [tuple({k: v.float() for k, v in d.items()} for d in task) for task in tasks]
    single, double = added_up(rounded), added_up(tasks)
    theta = {name: 1003 + torch.randn(shape).double() for name, shape in SHAPES.items()}
    for name, at in theta.items():
        pull = [p.importance[name] * (at - p.anchor[name]) for p in (single, double)]
        torch.testing.assert_close(pull[0], pull[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(single.value(theta), double.value(theta), rtol=1e-3, atol=0)


def test_state_is_everything() -> None:
    tasks, theta = made_tasks(5), leaves()
    whole, resumed = added_up(tasks), QuadraticPenalty()
    assert not resumed
    resumed.load_state_dict(added_up(tasks[:2]).state_dict())
    assert resumed
    for task in tasks[2:]:
        resumed.add(*task)
    same(resumed.value(theta), whole.value(theta))
    same(resumed.anchor, whole.anchor)


def test_a_parameter_that_one_task_lacks_keeps_its_importance() -> None:
    tasks, theta = made_tasks(3), leaves()
    del tasks[1][0]["bias"]
    penalty = added_up(tasks)
    tasks[1][0]["bias"] = torch.zeros(SHAPES["bias"], dtype=torch.float64)
    torch.testing.assert_close(penalty.value(theta), written_out(tasks, theta).detach())


# --- one anchor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_importances_decay_and_the_anchor_is_the_last_solution(keep: float) -> None:
    tasks, penalty = made_tasks(4), QuadraticPenalty()
    for importance, solution in tasks:
        penalty.accumulate(importance, solution, keep=keep)
    for name in SHAPES:
        powers = [keep ** (3 - k) for k in range(4)]
        wanted = sum(w * task[0][name] for w, task in zip(powers, tasks, strict=True))
        torch.testing.assert_close(penalty.importance[name], wanted, rtol=1e-12, atol=0)
    same(penalty.anchor, tasks[-1][1])
    assert penalty.value(tasks[-1][1]) == penalty.constant == 0


def test_one_anchor_is_an_anchor_for_each_task_where_all_solutions_are_one() -> None:
    tasks, theta = made_tasks(5), leaves()
    one, each = QuadraticPenalty(), QuadraticPenalty()
    for importance, _ in tasks:
        one.accumulate(importance, tasks[0][1])
        each.add(importance, tasks[0][1])
    torch.testing.assert_close(one.importance, each.importance, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.anchor, each.anchor, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.value(theta), each.value(theta), rtol=1e-12, atol=0)


def test_one_anchor_is_another_penalty_where_solutions_differ() -> None:
    tasks, theta = made_tasks(2), leaves()
    one = QuadraticPenalty()
    for task in tasks:
        one.accumulate(*task)
    assert not torch.isclose(one.value(theta), added_up(tasks).value(theta), rtol=0.01)


def test_what_a_task_lacks_fades_and_keeps_its_anchor() -> None:
    tasks, penalty = made_tasks(2), QuadraticPenalty()
    del tasks[1][0]["bias"]
    for task in tasks:
        penalty.accumulate(*task, keep=0.5)
    torch.testing.assert_close(penalty.importance["bias"], tasks[0][0]["bias"] / 2)
    same(penalty.anchor["bias"], tasks[0][1]["bias"])


@pytest.mark.parametrize("way", ["add", "accumulate", "replace"])
def test_does_not_follow_the_weights_that_it_was_given(way: str) -> None:
    ((importance, solution),) = made_tasks(1)
    penalty = QuadraticPenalty()
    given = {name: value.clone() for name, value in importance.items()}
    getattr(penalty, way)(given, solution)
    before = {name: value.clone() for name, value in penalty.anchor.items()}
    for value in solution.values():
        value.fill_(7)
    same(penalty.anchor, before)
    if way != "replace":  # which is for those who have computed them
        for value in given.values():
            value.fill_(7)
        assert not any((value == 7).any() for value in penalty.importance.values())


def test_one_anchor_in_single_precision_does_not_drift() -> None:
    tasks = made_tasks(200)
    single, double = QuadraticPenalty(), QuadraticPenalty()
    for importance, solution in tasks:
        rounded = ({k: v.float() for k, v in part.items()} for part in (importance, solution))
        single.accumulate(*rounded, keep=0.99)
        double.accumulate(importance, solution, keep=0.99)
    for name, value in double.importance.items():
        torch.testing.assert_close(single.importance[name].double(), value, rtol=2e-5, atol=0)


# --- known optima --------------------------------------------------------------------------------


def optimum(h: Tensor, a: Tensor, penalty: QuadraticPenalty) -> Tensor:
    """Of L = h (theta - a)^2 / 2 and half the penalty: a linear equation."""
    if not penalty:
        return a.clone()
    pull = penalty.importance["x"]
    return (h * a + pull * penalty.anchor["x"]) / (h + pull)


@pytest.mark.parametrize(("way", "third_is_joint"), [("add", False), ("accumulate", True)])
def test_quadratic_tasks_have_known_optima(way: str, third_is_joint: bool) -> None:
    """Two tasks end at the joint optimum; three only where there is one anchor.

    The anchors of later tasks already hold the earlier ones, which per-task penalties count twice.
    """
    h, a = torch.rand(3, 50, dtype=torch.float64) + 0.1, 3 * torch.randn(3, 50).double()
    penalty, ends = QuadraticPenalty(), []
    for curvature, center in zip(h, a, strict=True):
        ends.append(optimum(curvature, center, penalty))
        getattr(penalty, way)({"x": curvature}, {"x": ends[-1]})
    joint = [(h[:k] * a[:k]).sum(0) / h[:k].sum(0) for k in (1, 2, 3)]
    torch.testing.assert_close(ends[0], joint[0])
    torch.testing.assert_close(ends[1], joint[1])
    far = (ends[2] - joint[2]).abs().max()
    assert far < 1e-12 if third_is_joint else far > 0.1


def test_per_task_anchors_end_where_the_list_does() -> None:
    """The optimum of three tasks' penalties, written out and solved."""
    h, a = torch.rand(3, 50, dtype=torch.float64) + 0.1, 3 * torch.randn(3, 50).double()
    penalty, tasks = QuadraticPenalty(), []
    for curvature, center in zip(h, a, strict=True):
        numerator, denominator = curvature * center, curvature.clone()
        for importance, solution in tasks:
            numerator += importance["x"] * solution["x"]
            denominator += importance["x"]
        end = numerator / denominator
        torch.testing.assert_close(optimum(curvature, center, penalty), end, rtol=1e-12, atol=1e-12)
        tasks.append(({"x": curvature}, {"x": end}))
        penalty.add(*tasks[-1])


# --- three updates -------------------------------------------------------------------------------


def held(number: int = 3) -> tuple[QuadraticPenalty, dict[str, Tensor], Tensor]:
    """Some tasks' penalty, parameters, and what autograd says of the two at strength 0.7."""
    tasks, theta = made_tasks(number), leaves()
    return added_up(tasks), theta, 0.7 * written_out(tasks, theta)


def test_pulls_are_autograd_of_the_written_penalty() -> None:
    penalty, theta, value = held()
    before = [torch.randn_like(at) for at in theta.values()]
    wanted = torch.autograd.grad(value, list(theta.values()))
    gradients = [gradient.clone() for gradient in before]
    pulls = gradient_coefficients([penalty.importance[name] for name in theta], 0.7)
    add_penalty_grad_(gradients, list(theta.values()), [penalty.anchor[n] for n in theta], pulls)
    for found, there, added in zip(gradients, before, wanted, strict=True):
        torch.testing.assert_close(found, there + added, rtol=1e-10, atol=1e-10)


def test_limited_pulls_reach_the_anchor_and_do_not_pass_it() -> None:
    """By steps of plain gradient descent: without the limit the same steps diverge."""
    importance = torch.tensor([0.0, 0.1, 1.0, 50.0]).double()
    anchor, start, rate = torch.zeros(4).double(), torch.ones(4).double(), 0.5
    (free,) = gradient_coefficients([importance], 1.0)
    (limited,) = gradient_coefficients([importance], 1.0, [rate])
    same(limited, torch.tensor([0.0, 0.2, 2.0, 2.0]).double())
    same(free, 2 * importance)
    ends = []
    for pull in (free, limited):
        theta = start.clone()
        for _ in range(30):
            gradient = torch.zeros(4).double()
            add_penalty_grad_([gradient], [theta], [anchor], [pull])
            theta -= rate * gradient
        ends.append(theta)
    assert ends[0][3].abs() > 1e20
    torch.testing.assert_close(ends[1], torch.tensor([1.0, 0.9**30, 0.0, 0.0]).double())


def test_a_rate_of_zero_limits_nothing() -> None:
    (pull,) = gradient_coefficients([torch.tensor([1e9])], 1.0, [0.0])
    assert pull == 2e9


@pytest.mark.parametrize("rate", [0.0, 0.01, 30.0])
def test_the_implicit_step_minimizes_its_objective(rate: float) -> None:
    """The rate times the penalty plus half the squared distance, one number at a time by scipy."""
    tasks = made_tasks(3)
    penalty, strength = added_up(tasks), 40.0
    theta = {name: value.detach().clone() for name, value in leaves().items()}
    start = {name: value.clone() for name, value in theta.items()}
    shares = proximal_weights([penalty.importance[n] for n in theta], strength, [rate] * len(theta))
    proximal_step_(list(theta.values()), [penalty.anchor[name] for name in theta], shares)
    for place in [(0, 0), (2, 3), (4, 1)]:

        def objective(value: float, place: tuple[int, int] = place) -> float:
            gaps = [
                float(f["weight"][place]) * (value - float(s["weight"][place])) ** 2
                for f, s in tasks
            ]
            distance = (value - float(start["weight"][place])) ** 2
            return rate * strength * sum(gaps) + distance / 2

        best = minimize_scalar(objective, tol=1e-12).x
        assert float(theta["weight"][place]) == pytest.approx(best, rel=1e-6, abs=1e-7)
    if rate == 0:
        same(theta, start)


def test_at_infinite_strength_the_implicit_step_is_the_anchor() -> None:
    (share,) = proximal_weights([torch.tensor([0.0, 1.0])], 1e12, [0.1])
    same(share, torch.tensor([0.0, 1.0]))
