"""Each gate, learned task by task, against scikit-learn or a loop on all samples at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from bpn_lightning.functional.moments import draw_held_out
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.gates.features import FeatureGate
from bpn_lightning.strategies.gates.fecam import FeCAM
from bpn_lightning.strategies.gates.ncm import NearestClassMean
from bpn_lightning.strategies.gates.ppca import ProbabilisticPCA
from bpn_lightning.strategies.gates.ranpac import RIDGES, RanPAC
from bpn_lightning.strategies.gates.slda import SHRINKAGES, SLDA

Learn = Callable[..., FeatureGate]
Digits = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def answers(gate: FeatureGate, x: Tensor) -> np.ndarray:
    return gate.own_columns(x).numpy()


def test_nearest_class_mean_is_that_of_scikit_learn(learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    # Pixels that never vary within a class are a warning of its.
    x, held = (part + torch.randn(part.shape) / 100 for part in (x, held))
    peer = NearestCentroid().fit(x.numpy(), y.numpy())
    gate = learn(NearestClassMean(), x, y)
    np.testing.assert_array_equal(answers(gate, held), peer.predict(held.numpy()))
    np.testing.assert_allclose(gate.rows["means"], peer.centroids_, atol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.01, 0.3])
@pytest.mark.parametrize("solver", ["lsqr", "eigen"])
def test_slda_is_that_of_scikit_learn(
    learn: Learn, digits: Digits, shrinkage: float, solver: str
) -> None:
    """Its covariance weighs the classes by their frequencies; ours counts samples, which is the same."""
    (x, y), (held, _) = digits
    frequencies = np.bincount(y.numpy()) / len(y)
    peer = LinearDiscriminantAnalysis(solver=solver, shrinkage=shrinkage, priors=frequencies)
    peer.fit(x.double().numpy(), y.numpy())
    # To ours all classes are equally frequent.
    expected = peer.predict_log_proba(held.double().numpy()) - np.log(frequencies)
    expected -= np.logaddexp.reduce(expected, 1, keepdims=True)
    found = learn(SLDA(shrinkage), x, y).log_scores(held).double().log_softmax(1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_slda_scores_are_log_likelihoods(learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    gate = learn(SLDA(0.1), x, y)
    within = sum(
        np.cov(x[y == k].double().numpy().T, bias=True) * int((y == k).sum()) for k in range(10)
    )
    covariance = within / len(x)
    covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / 64 * np.eye(64)
    for column in (0, 7):
        mean = x[y == column].double().numpy().mean(0)
        expected = multivariate_normal(mean, covariance).logpdf(held.double().numpy())
        np.testing.assert_allclose(gate.log_scores(held)[:, column], expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tukey", [1.0, 0.5])
def test_fecam_is_a_loop_over_classes(learn: Learn, digits: Digits, tukey: float) -> None:
    (x, y), (held, _) = digits
    gate = learn(FeCAM(0.5, tukey=tukey), x, y)
    found = gate.log_scores(held)
    u, v = x.double().numpy() ** tukey, held.double().numpy() ** tukey
    for column in range(10):
        own = u[y.numpy() == column]
        covariance = np.cov(own.T, bias=True)
        off = covariance[~np.eye(64, dtype=bool)].mean()
        shrunk = covariance + 0.5 * off
        shrunk[np.diag_indices(64)] = np.diag(covariance) + 0.5 * np.diag(covariance).mean()
        deviation = np.sqrt(np.diag(shrunk))
        inverse = np.linalg.inv(shrunk / np.outer(deviation, deviation))
        delta = v - own.mean(0)
        expected = -0.5 * np.einsum("ni,ij,nj->n", delta, inverse, delta)
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-3, atol=1e-3)


def test_fecam_without_normalization_is_the_gaussian(learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    gate = learn(FeCAM(0.5, normalize=False), x, y)
    own = x[y == 3].double().numpy()
    covariance = np.cov(own.T, bias=True)
    off = covariance[~np.eye(64, dtype=bool)].mean()
    shrunk = covariance + 0.5 * off
    shrunk[np.diag_indices(64)] = np.diag(covariance) + 0.5 * np.diag(covariance).mean()
    expected = multivariate_normal(own.mean(0), shrunk).logpdf(held.double().numpy())
    np.testing.assert_allclose(gate.log_scores(held)[:, 3], expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("per", ["class", "task"])
def test_ppca_is_that_of_scikit_learn(learn: Learn, digits: Digits, per: Any) -> None:
    (x, y), (held, _) = digits
    gate = learn(ProbabilisticPCA(8, per=per), x, y)
    groups = y if per == "class" else y // 2
    for row in (0, 4):
        own = x[groups == row].double().numpy()
        peer = PCA(8, svd_solver="full").fit(own)
        peer.explained_variance_ *= (len(own) - 1) / len(own)
        peer.noise_variance_ *= (len(own) - 1) / len(own)
        expected = peer.score_samples(held.double().numpy())
        np.testing.assert_allclose(gate.log_scores(held)[:, row], expected, rtol=1e-4, atol=1e-2)


def test_ranpac_is_a_ridge_classifier_on_random_features(learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    gate = learn(RanPAC(200, 0.1), x, y)
    generator = seeded_generator("random features", 0, "ranpac")
    matrix = torch.randn(64, 200, generator=generator) / 8
    h, g = ((part @ matrix).relu().double().numpy() for part in (x, held))
    # It regresses on -1 and 1, where 0 and 1 differ by an intercept; compare on our targets.
    peer = Ridge(0.1, fit_intercept=False).fit(h, np.eye(10)[y.numpy()])
    np.testing.assert_allclose(gate.log_scores(held), peer.predict(g), atol=1e-4)
    classifier = RidgeClassifier(0.1, fit_intercept=False).fit(h, y.numpy())
    assert (answers(gate, held) == classifier.predict(g)).mean() > 0.95


# --- what held-out samples choose ----------------------------------------------------------------


def test_chosen_shrinkage_is_the_likeliest_of_a_loop(learn: Learn, digits: Digits) -> None:
    (x, y), _ = digits
    gate = learn(SLDA(held_out=0.2), x, y)
    residuals: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for number in range(5):
        mine = y // 2 == number
        features, columns = x[mine].double(), y[mine]
        held = draw_held_out(torch.arange(len(columns)), 0.2)
        for column in (2 * number, 2 * number + 1):
            own = columns == column
            mean = features[own & ~held].mean(0)
            for part in (False, True):
                residuals[part].append((features[own & (held == part)] - mean).numpy())
    fitted, held_out = np.concatenate(residuals[False]), np.concatenate(residuals[True])
    covariance = fitted.T @ fitted / len(fitted)
    target = np.trace(covariance) / 64 * np.eye(64)
    likelihoods = []
    for alpha in SHRINKAGES:
        shrunk = (1 - alpha) * covariance + alpha * target
        distances = (held_out @ np.linalg.inv(shrunk) * held_out).sum(1)
        likelihoods.append(-np.linalg.slogdet(shrunk)[1] - distances.mean())
    assert 0 < np.argmax(likelihoods) < len(SHRINKAGES) - 1
    assert gate.chosen == SHRINKAGES[int(np.argmax(likelihoods))]


def test_chosen_ridge_has_the_least_held_out_error(learn: Learn, digits: Digits) -> None:
    (x, y), _ = digits
    gate = learn(RanPAC(100, held_out=0.2), x, y)
    held = torch.zeros(len(y), dtype=torch.bool)
    for number in range(5):
        mine = (y // 2 == number).nonzero()[:, 0]
        held[mine] = draw_held_out(torch.arange(len(mine)), 0.2)
    matrix = torch.randn(64, 100, generator=seeded_generator("random features", 0, "ranpac")) / 8
    h, targets = (x @ matrix).relu().double().numpy(), np.eye(10)[y.numpy()]
    fit, rest = ~held.numpy(), held.numpy()
    errors = [
        (
            (
                Ridge(ridge, fit_intercept=False).fit(h[fit], targets[fit]).predict(h[rest])
                - targets[rest]
            )
            ** 2
        ).sum()
        for ridge in RIDGES[5:]
    ]
    assert gate.chosen == RIDGES[5 + int(np.argmin(errors))]


# --- what they are for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (NearestClassMean, 0.85),
        (SLDA, 0.93),
        (FeCAM, 0.95),
        (lambda: ProbabilisticPCA(8), 0.96),
        (lambda: ProbabilisticPCA(8, per="task"), 0.93),
        (lambda: RanPAC(500), 0.95),
        (lambda: SLDA(project=32), 0.85),
    ],
)
def test_tasks_of_digits_are_named(
    learn: Learn, digits: Digits, make: Callable[[], FeatureGate], least: float
) -> None:
    (x, y), (held, labels) = digits
    gate = learn(make(), x, y)
    assert (gate.tasks(held) == labels // 2).double().mean() > least


@pytest.mark.parametrize("make", [SLDA, RanPAC, NearestClassMean])
def test_temperature_makes_probabilities_honest(
    learn: Learn, digits: Digits, make: Callable[[], FeatureGate]
) -> None:
    """On test images: likelier than at temperature 1, and confident about as often as right."""
    (x, y), (held, labels) = digits
    gate = learn(make(), x, y)
    logs = gate.task_log_probabilities(held).double()
    right = labels // 2
    assert gate.temperature != 1
    calibrated = logs.gather(1, right[:, None]).mean()
    gate.likelihoods = torch.zeros_like(gate.likelihoods)
    plain = gate.task_log_probabilities(held).double().gather(1, right[:, None]).mean()
    assert calibrated > plain
    accuracy = (logs.argmax(1) == right).double().mean().item()
    assert logs.exp().amax(1).mean().item() == pytest.approx(accuracy, abs=0.06)
