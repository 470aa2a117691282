"""Clusters in the plane: a minimal stream whose decision regions can be plotted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from bpn_lightning.checks import check_above_zero, check_positive_int
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.normalization import IDENTITY
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.tasks import Task

__all__ = ["Gaussians"]

CENTERS = ((0.0, 0.0), (-2.5, 0.0), (2.5, 0.0))
NAMES = ("black", "red", "light blue")


@dataclass(eq=False, repr=False, kw_only=True)
class Gaussians(ContinualDataModule):
    """Separate two clusters per task, as in Fig. 5 of Wen et al.

    The first cluster, black, is part of every task and uses column 0 of the head; task k separates it
    from cluster k + 1, which uses column 1. Inputs are points in the plane and are not normalized, so
    that decision regions can be plotted in the coordinates of the data.

    The paper only says that the three clusters of its figure are normal and drawn at random. Centers,
    deviation and sample sizes are ours, arranged as in the figure, with black in the middle.

    Args:
        centers: two coordinates per cluster, the common cluster first; there is one task fewer than
            clusters.
        deviation: standard deviation of each cluster, in both directions.
        train_samples: training points per cluster.
        test_samples: test points per cluster.
    """

    centers: Sequence[Sequence[float]] = CENTERS
    deviation: float = 0.5
    train_samples: int = 500
    test_samples: int = 500

    channels: Literal[1, 3] | None = field(init=False, default=None)  # points have none

    title = "the clusters"
    constants = IDENTITY

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_samples", "test_samples"):
            check_positive_int(name, getattr(self, name))
        if len(self.centers) < 2 or any(len(center) != 2 for center in self.centers):
            raise ConfigurationError(
                "Expected centers to be two or more pairs of coordinates, but got "
                f"{self.centers!r}. The default is {[*map(list, CENTERS)]}."
            )
        check_above_zero("deviation", self.deviation, "The default is 0.5.")
        self.epochs_of(len(self.centers) - 1)

    def read(self) -> ImageData:
        """Draw the points from the stream's seed."""
        names = [*NAMES, *(f"cluster {k + 1}" for k in range(len(NAMES), len(self.centers)))]
        train = self._draw("train", self.train_samples)
        test = self._draw("test", self.test_samples)
        return ImageData(train, test, names[: len(self.centers)], self.title)

    def _draw(self, part: str, count: int) -> Samples:
        """``(clusters * count, 2)`` float32, cluster by cluster."""
        centers = torch.tensor([*map(list, self.centers)], dtype=torch.float32)
        generator = seeded_generator("clusters", part, self.seed)
        points = torch.randn(len(centers), count, 2, generator=generator) * self.deviation
        labels = torch.arange(len(centers)).repeat_interleave(count)
        return Samples((points + centers[:, None]).flatten(0, 1), labels)

    def divide(self, data: ImageData) -> tuple[list[Task], list[list[int]]]:
        """Pair the first cluster with each of the others."""
        first, *others = data.class_names
        epochs = self.epochs_of(len(others))
        tasks = [Task(k, (0, 2), (first, other), epochs[k]) for k, other in enumerate(others)]
        return tasks, [[0, k + 1] for k in range(len(others))]
