"""Ridge regression from sums against scikit-learn on the samples themselves."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from bpn_lightning.functional.ridge import held_out_errors, ridge_weights

RNG = np.random.default_rng(1)
X, HELD = RNG.normal(size=(50, 7)) + 1, RNG.normal(size=(20, 7)) + 1
Y, HELD_Y = np.eye(3)[RNG.integers(3, size=50)], np.eye(3)[RNG.integers(3, size=20)]
RIDGES = [1e-3, 1.0, 100.0]


def sums(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(x.T @ x), torch.from_numpy(y.T @ x)


@pytest.mark.parametrize("ridge", RIDGES)
def test_weights_are_those_of_scikit_learn(ridge: float) -> None:
    peer = Ridge(ridge, fit_intercept=False).fit(X, Y)
    found = ridge_weights(*sums(X, Y), ridge)
    assert found is not None
    np.testing.assert_allclose(found, peer.coef_, rtol=1e-8, atol=1e-12)


def test_errors_are_those_of_the_predictions() -> None:
    expected = [
        ((Ridge(ridge, fit_intercept=False).fit(X, Y).predict(HELD) - HELD_Y) ** 2).sum()
        for ridge in RIDGES
    ]
    found = held_out_errors(*sums(X, Y), *sums(HELD, HELD_Y), 20, RIDGES)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_without_a_ridge_few_samples_have_no_weights() -> None:
    gram, totals = sums(X[:3], Y[:3])
    assert ridge_weights(gram, totals, 0.0) is None
    errors = held_out_errors(gram, totals, *sums(HELD, HELD_Y), 20, [0.0, 1.0])
    assert errors[0] == torch.inf
    assert errors[1].isfinite()
