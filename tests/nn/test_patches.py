"""Patches against loops over places and centers, an eigendecomposition, and scikit-learn's k-means."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from bpn_lightning.nn import patches
from bpn_lightning.nn.patches import Patches, kmeans, zca


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 2, 7, 6, generator=torch.Generator().manual_seed(0))


def fitted(**arguments: int) -> Patches:
    front = Patches(**{"num_patches": 5, "size": 3, "samples": 120, "iterations": 4} | arguments)
    front.fit(lambda: [images()])
    return front


def drawn_patches(front: Patches) -> np.ndarray:
    """Every patch of every image, which is what so many samples ask for."""
    x, size = images().double().numpy(), front.size
    places = [(i, y, z) for i in range(6) for y in range(8 - size) for z in range(7 - size)]
    return np.stack([x[i, :, y : y + size, z : z + size].ravel() for i, y, z in places])


def normalized(points: np.ndarray, floor: float) -> np.ndarray:
    return (points - points.mean(1, keepdims=True)) / np.sqrt(points.var(1, keepdims=True) + floor)


def test_whitening_is_a_direct_eigendecomposition() -> None:
    front = fitted()
    points = drawn_patches(front)
    floor = 0.005 * points.var(1).mean()
    assert float(front.floor) == pytest.approx(floor, rel=1e-5)
    points = normalized(points, floor)
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
    whiten = vectors @ np.diag(1 / np.sqrt(values + 0.1)) @ vectors.T
    centered = whiten - whiten.mean(1, keepdims=True)
    np.testing.assert_allclose(front.filters.flatten(1), centered, atol=1e-4)
    np.testing.assert_allclose(front.offset, whiten @ points.mean(0), atol=1e-4)


def test_zca_whitens_and_is_symmetric() -> None:
    covariance = torch.cov(torch.randn(5, 40, dtype=torch.float64))
    matrix = zca(covariance, 1e-12)
    torch.testing.assert_close(matrix, matrix.T)
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(matrix @ covariance @ matrix, identity, rtol=0, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 5, 50])
def test_kmeans_is_that_of_scikit_learn_from_the_same_start(
    iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "CHUNK", 100)  # in parts of 10 points
    generator = np.random.default_rng(0)
    points = generator.normal(size=(300, 4)) + 4 * generator.integers(3, size=(300, 1))
    start = points[:10].copy()
    peer = KMeans(10, init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it had not converged yet
        peer.fit(points)
    found = kmeans(torch.from_numpy(points), torch.from_numpy(start), iterations)
    np.testing.assert_allclose(found, peer.cluster_centers_, atol=1e-9)


def test_a_center_without_points_stays() -> None:
    points, start = torch.randn(20, 2), torch.tensor([[0.0, 0.0], [1000.0, 0.0]])
    found = kmeans(points, start, 3)
    torch.testing.assert_close(found[0], points.mean(0))
    assert torch.equal(found[1], start[1])


@pytest.mark.parametrize(
    ("stride", "pool", "square_root"), [(1, 1, True), (1, 2, False), (2, 2, True)]
)
def test_features_are_a_loop_over_places_and_centers(
    stride: int, pool: int, square_root: bool
) -> None:
    front = fitted(stride=stride, pool=pool, square_root=square_root)
    points = normalized(drawn_patches(front), float(front.floor))
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
    whiten = vectors @ np.diag(1 / np.sqrt(values + 0.1)) @ vectors.T
    mean, centers, x = points.mean(0), front.centers.double().numpy(), images().double().numpy()
    rows, columns = range(0, 5, stride), range(0, 4, stride)
    for index in range(6):
        maps = np.zeros((5, len(rows), len(columns)))
        for i, y in enumerate(rows):
            for j, z in enumerate(columns):
                patch = normalized(
                    x[index, :, y : y + 3, z : z + 3].reshape(1, -1), float(front.floor)
                )
                distances = np.linalg.norm(whiten @ (patch[0] - mean) - centers, axis=1)
                maps[:, i, j] = np.maximum(0, distances.mean() - distances)
        parts = [
            maps[
                :, top : -(-len(rows) * (p + 1) // pool), left : -(-len(columns) * (q + 1) // pool)
            ]
            for p in range(pool)
            for q in range(pool)
            for top, left in [(len(rows) * p // pool, len(columns) * q // pool)]
        ]
        expected = np.stack([part.mean((1, 2)) for part in parts], 1).ravel()
        expected = np.sqrt(expected) if square_root else expected
        found = front.extract(images()[index : index + 1])[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_mirrored_image_has_the_same_features() -> None:
    one_way, both = fitted(square_root=False), fitted(square_root=False, mirror=True)
    mirrored = both.extract(images().flip(3))
    assert torch.equal(both.extract(images()), mirrored)
    expected = (one_way.extract(images()) + one_way.extract(images().flip(3))) / 2
    torch.testing.assert_close(mirrored, expected)
    assert not torch.equal(one_way.extract(images()), mirrored)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    front = fitted()
    whole = front(images())
    monkeypatch.setattr(patches, "CHUNK", 1)
    torch.testing.assert_close(front(images()), whole, rtol=1e-5, atol=1e-5)


def test_bytes_are_those_of_the_formula() -> None:
    front = fitted()
    d, k, pool = 2 * 3 * 3, 5, 2
    held = sum(value.numel() * value.element_size() for value in front.state_dict().values())
    assert held == 4 * (d * d + d + k * d + 1) + 8 * k * pool**2
