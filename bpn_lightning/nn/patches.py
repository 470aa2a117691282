"""Features of small patches that are learned without labels."""

from collections.abc import Callable, Sequence
from itertools import product
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from bpn_lightning.checks import check_above_zero, check_positive_int
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.nn.fronts import DEFAULT, Front, Images
from bpn_lightning.random_state import seeded_generator

__all__ = ["Patches", "kmeans", "triangle", "whitened_maps", "zca"]

#: Numbers that are held of a batch at a time: 4 MB of float32, which stays in a processor's cache, and
#: on other devices 256 MB.
CHUNK, GPU_CHUNK = 2**20, 2**26


# --- the mathematics -----------------------------------------------------------------------------


def zca(covariance: Tensor, regularization: float) -> Tensor:
    r"""The symmetric matrix that whitens, :math:`V (\Lambda + \epsilon I)^{-1/2} V^T`.

    Args:
        covariance: :math:`V \Lambda V^T`, ``(d, d)``.
        regularization: epsilon, above 0.
    """
    values, vectors = torch.linalg.eigh(covariance)
    whiten: Tensor = vectors / (values.clamp(min=0) + regularization).sqrt() @ vectors.T
    return whiten


def kmeans(
    points: Tensor,
    start: Tensor,
    iterations: int,
    all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Lloyd's algorithm from a given start, by float64 sums over all processes.

    A center that no point is nearest to stays where it is.

    Args:
        points: a process's own, ``(n, d)``.
        start: the same in all processes, ``(centers, d)``.
        iterations: how often centers move.
        all_reduce: gives sums over all processes.

    Returns:
        ``(centers, d)``.
    """
    centers = start
    for _ in range(iterations):
        sums = centers.new_zeros(len(centers), centers.shape[1] + 1, dtype=torch.float64)
        for part in torch.split(points, chunk_of(len(centers), points.device)):
            nearest = (part @ centers.T - centers.square().sum(1) / 2).argmax(1)
            counted = F.pad(part, (0, 1), value=1.0)
            sums.index_add_(0, nearest, counted.double())
        sums = all_reduce(sums)
        means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        centers = torch.where(sums[:, -1:] > 0, means, centers.double()).to(start.dtype)
    return centers


def whitened_maps(
    images: Tensor, filters: Tensor, offset: Tensor, floor: Tensor, stride: int
) -> Tensor:
    r"""Every patch p of an image, normalized and whitened, at its place.

    .. math:: W \frac{p - \bar p}{\sqrt{\operatorname{var}(p) + \epsilon}} - W m

    Args:
        images: ``(n, channels, height, width)``.
        filters: the rows of W, each less its mean, which takes off a patch's, ``(d, channels, s, s)``.
        offset: W m, ``(d,)``, with the mean m of normalized patches.
        floor: epsilon, a scalar.
        stride: between patches.

    Returns:
        ``(n, d, rows, columns)``.
    """
    size = filters.shape[-1]
    mean = F.avg_pool2d(images.mean(1, keepdim=True), size, stride)
    square = F.avg_pool2d(images.square().mean(1, keepdim=True), size, stride)
    variance = (square - mean.square()).clamp(min=0)
    response = F.conv2d(images, filters, stride=stride)
    return response / (variance + floor).sqrt() - offset[:, None, None]


def triangle(maps: Tensor, centers: Tensor, pool: int) -> Tensor:
    r"""How much nearer than on average each center is, averaged over parts of the image.

    .. math:: f_k(x) = \max(0, \bar z - z_k), \quad z_k = |x - c_k|

    The "triangle" activation of Coates, Ng and Lee (2011), as means over a part where they have sums.

    Args:
        maps: of :func:`whitened_maps`, ``(n, d, rows, columns)``.
        centers: ``(k, d)``.
        pool: parts of the image in each direction.

    Returns:
        ``(n, k * pool * pool)``.
    """
    shape = (maps.shape[0], len(centers), *maps.shape[2:])
    points = maps.flatten(2)
    squares = centers.square().sum(1)[:, None] - 2 * centers @ points
    distances = squares.add_(points.square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()
    nearer = (distances.mean(1, keepdim=True) - distances).relu_()
    return F.adaptive_avg_pool2d(nearer.view(shape), pool).flatten(1)


def chunk_of(numbers: int, device: torch.device) -> int:
    """How many samples are worked on at a time, each of so many numbers."""
    return max((CHUNK if device.type == "cpu" else GPU_CHUNK) // numbers, 1)


def patches_at(images: Tensor, places: Sequence[tuple[int, int]], size: int) -> Tensor:
    """The patches at some places of each image, ``(places * n, channels * size * size)``."""
    found = [images[:, :, y : y + size, x : x + size].flatten(1) for y, x in places]
    return torch.cat(found)


# --- the front -----------------------------------------------------------------------------------


class Patches(Front):
    r"""What each part of an image has of a vocabulary of whitened patches.

    Coates, Ng, Lee, "An analysis of single-layer networks in unsupervised feature learning" (2011):
    patches of the first task's images, each standardized by its own mean and deviation, are
    whitened and clustered by k-means; an image's features are the triangle activations of all centers
    over its patches, averaged over pool x pool parts.

    Differs from the paper: patches are drawn at the same places of all images, and k-means begins with
    small normal vectors, so that the result does not depend on which process has which image; a
    patch's variance is raised by a fraction of the mean variance and not by 10 gray levels squared,
    and parts are averaged, not summed. A square root makes features of a few strong and many weak
    activations less skewed, and so nearer to the Gaussians that gates fit; the mean over an image and
    its mirror image is the same for both.

    Args:
        num_patches: K, centers; there are K times pool squared features.
        size: height and width of a patch, pixels.
        stride: between patches, pixels.
        pool: parts of the image in each direction.
        mirror: whether features are the mean of those of an image and of its mirror image, which takes
            twice the time; for images whose left and right may be exchanged.
        square_root: whether the square roots of the activations are the features.
        samples: about how many patches are drawn to fit with, over all processes; one of each image at
            least, all of which are held while it is fitted.
        iterations: of k-means.
        contrast: what a patch's variance is raised by, as a fraction of the mean variance.
        regularization: what the variances of normalized patches are raised by when they are whitened.
        seed: of the places and of the start; None: that of seed_everything, then 0.

    State:
        ``filters`` (d, c, s, s) with d = c s^2, ``offset`` (d,), ``centers`` (K, d) and ``floor``,
        float32, next to mean and deviation: 4 (d^2 + d + K d + 1) + 8 K pool^2 bytes.

    Raises:
        ConfigurationError: an argument breaks a rule, or inputs are no images of at least a patch.
    """

    filters: Tensor
    offset: Tensor
    centers: Tensor
    floor: Tensor

    def __init__(
        self,
        num_patches: int = 400,
        size: int = 6,
        *,
        stride: int = 1,
        pool: int = 2,
        mirror: bool = False,
        square_root: bool = True,
        samples: int = 100_000,
        iterations: int = 20,
        contrast: float = 0.005,
        regularization: float = 0.1,
        seed: int | None = None,
    ) -> None:
        numbers = {
            "num_patches": num_patches,
            "size": size,
            "stride": stride,
            "pool": pool,
            "samples": samples,
            "iterations": iterations,
        }
        for argument, number in numbers.items():
            check_positive_int(f"{argument} of a front", number, DEFAULT)
        check_above_zero("contrast of a front", contrast, DEFAULT)
        check_above_zero("regularization of a front", regularization, DEFAULT)
        super().__init__(
            **numbers,
            mirror=mirror,
            square_root=square_root,
            contrast=contrast,
            regularization=regularization,
            seed=seed,
        )
        self.mirror, self.square_root = mirror, square_root
        self.num_patches, self.size, self.stride, self.pool = num_patches, size, stride, pool
        self.samples, self.iterations = samples, iterations
        self.contrast, self.regularization = contrast, regularization

    def width(self, input_shape: Sequence[int]) -> int:
        """K for each part of the image.

        Raises:
            ConfigurationError: the inputs are no images, or too small.
        """
        if len(input_shape) != 3 or min(self._rows_and_columns(input_shape)) < 1:
            raise ConfigurationError(
                f"Expected inputs of the front Patches to be images of at least {self.size} x {self.size} "
                f"pixels, (channels, height, width), but got {tuple(input_shape)}. Lower size, or use "
                "another front."
            )
        return self.num_patches * self.pool**2

    def _rows_and_columns(self, input_shape: Sequence[int]) -> tuple[int, int]:
        height, width = input_shape[-2:]
        return (height - self.size) // self.stride + 1, (width - self.size) // self.stride + 1

    def allocate(self, input_shape: Sequence[int]) -> None:
        """Make room for filters and centers."""
        super().allocate(input_shape)
        shape = (input_shape[0], self.size, self.size)
        dimensions = torch.Size(shape).numel()
        self.register_buffer("filters", torch.zeros(dimensions, *shape))
        self.register_buffer("offset", torch.zeros(dimensions))
        self.register_buffer("centers", torch.zeros(self.num_patches, dimensions))
        self.register_buffer("floor", torch.ones(()))

    def fit_extractor(self, images: Images, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Whiten patches of the images, then cluster them."""
        points = self._draw(images, all_reduce)
        points = points - points.mean(1, keepdim=True)
        variances = points.square().mean(1)
        count, total = all_reduce(
            torch.stack((variances.new_full((), len(points)), variances.sum())).double()
        )
        if not 0 < total < float("inf"):
            raise DataError(
                "Expected the images that the front Patches is fitted on to be finite and to vary within "
                f"a patch, but got a summed variance of {float(total):g}. Look at the images of the first "
                "task."
            )
        self.floor.copy_(self.contrast * total / count)
        points = points / (variances + self.floor).sqrt()[:, None]
        whiten, mean = self._whitening(points, count, all_reduce)
        self.filters.copy_((whiten - whiten.mean(1, keepdim=True)).view_as(self.filters))
        self.offset.copy_(whiten @ mean)
        points = (points - mean) @ whiten.T
        start = torch.randn(
            self.centers.shape, generator=seeded_generator("centers", self.arguments["seed"])
        ).to(points)
        self.centers.copy_(kmeans(points, start / 10, self.iterations, all_reduce))

    def _draw(self, images: Images, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Patches at the same places of all images, ``(n, d)``."""
        number = torch.zeros((), dtype=torch.float64, device=self.offset.device)
        for batch in images():
            number += len(batch)
            height, width = batch.shape[2:]
        every = list(product(range(height - self.size + 1), range(width - self.size + 1)))
        of_each = min(ceil(self.samples / max(float(all_reduce(number)), 1)), len(every))
        drawn = torch.randperm(
            len(every), generator=seeded_generator("places", self.arguments["seed"])
        )
        places = [every[index] for index in drawn[:of_each].tolist()]
        return torch.cat([patches_at(batch.float(), places, self.size) for batch in images()])

    def _whitening(
        self, points: Tensor, count: Tensor, all_reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The whitening matrix and the mean of all processes' patches."""
        sums = points.new_zeros(len(self.offset) + 1, len(self.offset), dtype=torch.float64)
        for part in torch.split(points, chunk_of(len(self.offset), points.device)):
            exact = part.double()
            sums[0] += exact.sum(0)
            sums[1:].addmm_(exact.T, exact)
        sums = all_reduce(sums)
        mean = sums[0] / count
        covariance = sums[1:] / count - torch.outer(mean, mean)
        return zca(covariance, self.regularization).to(points), mean.to(points)

    def extract(self, inputs: Tensor) -> Tensor:
        """A chunk of images at a time; all at once in an exported program, whose batch has any size."""
        chunks: Sequence[Tensor] = [inputs]
        if not torch.compiler.is_compiling():
            rows, columns = self._rows_and_columns(inputs.shape)
            numbers = rows * columns * (self.num_patches + len(self.offset))
            chunks = torch.split(inputs, chunk_of(numbers, inputs.device))
        features = torch.cat([self._activations(chunk) for chunk in chunks])
        return features.sqrt() if self.square_root else features

    def _activations(self, images: Tensor) -> Tensor:
        maps = whitened_maps(images, self.filters, self.offset, self.floor, self.stride)
        found = triangle(maps, self.centers, self.pool)
        if self.mirror:
            maps = whitened_maps(images.flip(3), self.filters, self.offset, self.floor, self.stride)
            found = (found + triangle(maps, self.centers, self.pool)) / 2
        return found
