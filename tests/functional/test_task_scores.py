"""Scores of tasks against scipy, finite differences, and loops over tasks and temperatures."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy

from bpn_lightning.functional import task_scores

LOGITS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double() * 3


def test_scores_without_a_fit_are_those_of_scipy() -> None:
    p = softmax(LOGITS.numpy(), 2)
    np.testing.assert_allclose(task_scores.confidence(LOGITS), np.log(p.max(2)).T)
    np.testing.assert_allclose(task_scores.negative_entropy(LOGITS), -entropy(p, axis=2).T)
    np.testing.assert_allclose(task_scores.energy(LOGITS), logsumexp(LOGITS.numpy(), 2).T)


def test_masked_classes_take_no_part() -> None:
    masked = torch.cat((LOGITS, torch.full((3, 5, 1), -torch.inf)), 2)
    for score in (task_scores.confidence, task_scores.negative_entropy, task_scores.energy):
        torch.testing.assert_close(score(masked), score(LOGITS))


def test_one_step_gradient_is_a_finite_difference_of_the_entropy() -> None:
    found = task_scores.one_step_gradient(task_scores.mixed_logits(LOGITS.float()), 5, 3, "cpu")
    logits, step = LOGITS.numpy(), 1e-5
    for sample in range(5):
        for task in range(3):
            sides = []
            for sign in (1, -1):
                alphas = np.full(3, 1 / 3)
                alphas[task] += sign * step
                sides.append(entropy(softmax(alphas @ logits[:, sample])))
            slope = -(sides[0] - sides[1]) / (2 * step)
            assert float(found[sample, task]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_one_step_gradient_works_inside_no_grad_and_leaves_the_logits_alone() -> None:
    logits = LOGITS.float().requires_grad_()
    with torch.no_grad():
        scores = task_scores.one_step_gradient(task_scores.mixed_logits(logits), 5, 3, "cpu")
    assert not scores.requires_grad
    assert logits.grad is None


def test_rows_of_a_task_add_up_also_where_other_tasks_are_far_away() -> None:
    scores = torch.randn(6, 5) * 1000
    tasks = torch.tensor([0, 2, 0, 1, 2])
    found = task_scores.by_task(scores, tasks, 4)
    for task in range(3):
        expected = logsumexp(scores[:, tasks == task].double().numpy(), 1)
        np.testing.assert_allclose(found[:, task], expected, rtol=1e-5)
    assert (found[:, 3] == -torch.inf).all()


def test_likelihoods_of_temperatures_are_those_of_a_loop() -> None:
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 10
    tasks, targets = torch.tensor([0, 2, 0, 1, 2]), torch.tensor([0, 0, 1, 2, 2, 1])
    found = task_scores.temperature_log_likelihoods(scores, tasks, targets)
    for index in (0, 30, 37, 60):
        heated = scores.double().numpy() / task_scores.TEMPERATURES[index]
        total = 0.0
        for row, target in zip(heated, targets.tolist(), strict=True):
            total += logsumexp(row[tasks.numpy() == target]) - logsumexp(row)
        assert float(found[index]) == pytest.approx(total, rel=1e-9)


def test_temperature_of_scaled_log_probabilities_is_the_scale() -> None:
    """Labels drawn from p, scores 10 log p: the likelihood is largest where 10 is taken back."""
    generator = torch.Generator().manual_seed(2)
    logs = (torch.randn(4000, 3, generator=generator) * 2).log_softmax(1)
    drawn = torch.multinomial(logs.exp(), 1, generator=generator)[:, 0]
    sums = task_scores.temperature_log_likelihoods(10 * logs, torch.arange(3), drawn)
    assert task_scores.TEMPERATURES[int(sums.argmax())] == pytest.approx(10, rel=0.3)
