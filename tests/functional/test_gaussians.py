"""Gaussians from sums against scipy's and scikit-learn's on the samples themselves."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal
from sklearn.covariance import shrunk_covariance
from sklearn.decomposition import PCA

from bpn_lightning.functional import gaussians

RNG = np.random.default_rng(5)
MIX = RNG.normal(size=(6, 6))


def samples(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 6)) @ MIX + np.arange(6)


def scatter_about(x: np.ndarray, mean: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((x - mean).T @ (x - mean))


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_shrinking_is_that_of_scikit_learn(alpha: float) -> None:
    covariance = np.cov(samples(20).T)
    found = gaussians.shrink(torch.from_numpy(covariance), alpha)
    np.testing.assert_allclose(found, shrunk_covariance(covariance, alpha), rtol=1e-12)


def test_shrinking_apart_adds_the_two_means() -> None:
    covariance = np.cov(samples(20).T)
    off = ~np.eye(6, dtype=bool)
    expected = covariance + 0.7 * np.where(off, covariance[off].mean(), np.diag(covariance).mean())
    found = gaussians.shrink_apart(torch.from_numpy(covariance), 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_correlation_is_that_of_numpy() -> None:
    found = gaussians.correlation(torch.from_numpy(np.cov(samples(20).T)))
    np.testing.assert_allclose(found, np.corrcoef(samples(20).T), rtol=1e-12)


def test_whitening_turns_the_covariance_into_the_identity() -> None:
    covariance = torch.from_numpy(np.cov(samples(30).T))
    found = gaussians.whitening(covariance)
    assert found is not None
    identity = found.matrix @ covariance @ found.matrix.T
    torch.testing.assert_close(identity, torch.eye(6).double(), rtol=0, atol=1e-9)
    assert float(found.log_determinant) == pytest.approx(np.linalg.slogdet(covariance.numpy())[1])


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_covariance_of_too_few_samples_has_no_whitening(count: int) -> None:
    covariance = np.cov(samples(count).T, bias=True)
    assert gaussians.whitening(torch.from_numpy(covariance)) is None


def test_distances_are_those_of_scipy_far_from_the_origin() -> None:
    """In float32 squares of 1000 would swallow the differences."""
    x, centers = samples(9) + 1000, samples(4, seed=1) + 1000
    found = gaussians.squared_distances(
        torch.from_numpy(x).float(), torch.from_numpy(centers).float()
    )
    np.testing.assert_allclose(found, cdist(x, centers, "sqeuclidean"), rtol=1e-3)


def test_likelihoods_over_shrinkages_are_those_of_scipy() -> None:
    x, held, alphas = samples(8), samples(17, seed=1), [0.01, 0.2, 1.0]
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    expected = [
        multivariate_normal(mean, shrunk_covariance(covariance, alpha)).logpdf(held).mean()
        for alpha in alphas
    ]
    found = gaussians.shrinkage_log_likelihoods(
        torch.from_numpy(covariance), scatter_about(held, mean), 17, alphas
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_no_shrinkage_is_never_the_likeliest_of_a_singular_covariance() -> None:
    covariance = torch.from_numpy(np.cov(samples(3).T, bias=True))
    held = torch.eye(6).double()
    found = gaussians.shrinkage_log_likelihoods(covariance, held, 1, [0.0, 0.5])
    assert found[0] == -torch.inf
    assert found[1].isfinite()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_probabilistic_pca_is_that_of_scikit_learn(rank: int) -> None:
    x, held = samples(40), samples(11, seed=1)
    peer = PCA(rank, svd_solver="full").fit(x)
    # It divides by n - 1; the likelihood's maximum by n.
    peer.explained_variance_ *= 39 / 40
    peer.noise_variance_ *= 39 / 40
    found = gaussians.principal_subspaces(
        torch.from_numpy(x.mean(0))[None], torch.from_numpy(np.cov(x.T, bias=True))[None], rank
    )
    likelihoods = gaussians.subspace_log_likelihoods(torch.from_numpy(held), found)
    np.testing.assert_allclose(likelihoods[:, 0], peer.score_samples(held), rtol=1e-9)


def test_probabilistic_pca_of_all_but_one_direction_is_the_gaussian() -> None:
    x, held = samples(40), samples(11, seed=1)
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    found = gaussians.principal_subspaces(
        torch.from_numpy(mean)[None], torch.from_numpy(covariance)[None], 5
    )
    likelihoods = gaussians.subspace_log_likelihoods(torch.from_numpy(held), found)
    expected = multivariate_normal(mean, covariance).logpdf(held)
    np.testing.assert_allclose(likelihoods[:, 0], expected, rtol=1e-9)
