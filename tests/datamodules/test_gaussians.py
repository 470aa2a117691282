"""Clusters in the plane."""

from typing import Any

import pytest
import torch
from scipy import stats

from bpn_lightning.datamodules import Gaussians
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies import GradientEpisodicMemory


def made(**arguments: Any) -> Gaussians:
    stream = Gaussians(seed=0, **arguments)
    stream.setup()
    return stream


def test_black_is_in_every_task_and_has_the_first_column() -> None:
    stream = made()
    assert [(t.columns, t.class_names) for t in stream.tasks] == [
        ((0, 2), ("black", "red")),
        ((0, 2), ("black", "light blue")),
    ]
    assert (stream.num_classes, stream.input_shape) == (2, (2,))
    black = []
    for task in range(2):
        (batch,) = stream.loader(task, "test")
        black.append(batch.inputs[batch.targets == 0])
        assert batch.targets.bincount().tolist() == [500, 500]
    assert torch.equal(*black)


def test_points_are_normal_around_their_centers_and_reach_the_network_as_they_are() -> None:
    """Kolmogorov and Smirnov would refuse another center, deviation or shape at 1 in 1,000."""
    centers = [[0.0, 1.0], [-2.5, 0.0], [2.5, 0.5]]
    stream = made(centers=centers, deviation=0.7, train_samples=2000)
    for task, (other, sign) in enumerate([(1, -1), (2, 1)]):
        batch = stream.prepare(next(iter(stream.loader(task, "train", 4000))))
        assert batch.inputs.dtype == torch.float32
        for column, center in enumerate([centers[0], centers[other]]):
            points = batch.inputs[batch.targets == column].numpy()
            assert len(points) == 2000
            for axis in range(2):
                found = stats.kstest(points[:, axis], stats.norm(center[axis], 0.7).cdf)
                assert found.pvalue > 1e-3
        assert sign * batch.inputs[batch.targets == 1, 0].mean() > 2


def test_parts_and_seeds_have_points_of_their_own() -> None:
    stream = made()
    train, test = (next(iter(stream.loader(0, part))).inputs for part in ("train", "test"))
    assert not torch.equal(train, test)
    other = Gaussians(seed=1)
    other.setup()
    assert not torch.equal(train, next(iter(other.loader(0, "train"))).inputs)
    again = made()
    assert torch.equal(train, next(iter(again.loader(0, "train"))).inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"centers": [[0.0, 0.0]]}, "centers"),
        ({"centers": [[0.0, 0.0], [1.0, 2.0, 3.0]]}, "centers"),
        ({"deviation": 0.0}, "deviation"),
        ({"train_samples": 0}, "train_samples"),
        ({"augment": True}, "augment"),
        ({"epochs_per_task": [1, 2, 3]}, "epochs_per_task"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        made(**arguments)


def test_they_are_learned_and_kept_by_gem_as_floats(fit: Any) -> None:
    """The clusters lie five deviations apart: both tasks are nearly perfect, told which it is."""
    stream = made(epochs_per_task=5, train_samples=200)
    gem = GradientEpisodicMemory(memory_size=20)
    module, _ = fit([gem], stream=stream, mask="shared", lr=0.1)
    assert module.accuracy_matrix.accuracy[1, 0] > 0.96
    assert module.accuracy_matrix.accuracy[2, 1] > 0.96
