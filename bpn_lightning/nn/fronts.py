"""Fixed feature extractors that stand before a network: fitted once on the first task, never trained."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bpn_lightning.checks import check_above_zero, check_choice, check_positive_int
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.nn.weights import digest_tensors
from bpn_lightning.random_state import run_seed, seeded_generator

__all__ = ["Front", "Images", "RandomFeatures"]

#: Each call yields all batches of images again, ``(n, *input_shape)`` floats.
Images = Callable[[], Iterable[Tensor]]

#: The remedy for an argument that is out of range.
DEFAULT = "Leave it out for the default."


class Front(nn.Module):
    """Maps inputs to features that are the same for all tasks.

    A front is in evaluation mode whatever is asked, takes no part in gradients, and works in full
    precision. Its features have mean 0 and deviation 1 over the images that it was fitted on, each or, with
    ``one_deviation``, on average. What was fitted depends neither on their order nor on how they are divided
    among processes, but for rounding.

    Write one by overriding :meth:`width`, :meth:`extract` and, for what is measured on images,
    :meth:`allocate` and :meth:`fit_extractor`.

    State:
        ``mean`` and ``deviation`` of the features, ``(width,)`` float32.
    """

    one_deviation: ClassVar[bool] = False
    """Whether all features are divided by one number, the root of their mean variance."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.input_shape: tuple[int, ...] | None = None
        super().train(False)

    # --- what a front says -----------------------------------------------------------------------

    @abstractmethod
    def width(self, input_shape: Sequence[int]) -> int:
        """How many features an input of this shape has; from arguments alone.

        Raises:
            ConfigurationError: it takes no inputs of this shape.
        """

    @abstractmethod
    def extract(self, inputs: Tensor) -> Tensor:
        """Features before they are standardized, ``(n, width)``, of ``(n, *input_shape)`` floats."""

    def fit_extractor(self, images: Images, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Measure on images what :meth:`extract` needs."""

    def given_state(self) -> Mapping[str, Tensor]:
        """By name, what a file gave it: a checkpoint of other values is refused."""
        return {}

    def allocate(self, input_shape: Sequence[int]) -> None:
        """Make room for what is fitted, before it is fitted or loaded; an argument ``seed`` that is None is the run's."""
        self.input_shape = tuple(input_shape)
        if self.arguments.get("seed", 0) is None:
            self.arguments["seed"] = run_seed()
        width = self.width(input_shape)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    # --- fitting ---------------------------------------------------------------------------------

    def fit(self, images: Images, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Measure what is fitted, then the mean and deviation of the features.

        Args:
            images: a process's own; they are read several times.
            all_reduce: gives sums over all processes; None where there is one.

        Raises:
            DataError: there are no images, or their features are not finite or all constant.
        """
        first = next(iter(images()), None)
        if first is None:
            raise DataError(
                f"Expected images to fit the front {type(self).__name__} on, but got none. Fit it on "
                "the training part of the first task."
            )
        self.allocate(first.shape[1:])
        self.to(first.device)
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            self.fit_extractor(images, all_reduce or _alone)
            self._standardize(images, all_reduce or _alone)

    def _standardize(self, images: Images, all_reduce: Callable[[Tensor], Tensor]) -> None:
        mean, square = _mean_and_square(map(self._features, images()), self.mean, all_reduce)
        variance = square - mean.square()
        varies, finite = variance > 1e-10 * square, bool(square.isfinite().all())
        if not (finite and bool(varies.any())):
            what = "constant ones only" if finite else "NaN or infinite values"
            raise DataError(
                f"Expected the features of the front {type(self).__name__} to be finite and to vary, but "
                f"got {what}. Look at the images of the first task."
            )
        self.mean.copy_(mean)
        variance = variance.mean() if self.one_deviation else torch.where(varies, variance, 1.0)
        self.deviation.copy_(variance.sqrt())

    # --- inference -------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        """Standardized features, ``(n, width)``, of ``(n, *input_shape)`` floats.

        Raises:
            ConfigurationError: it was not fitted, or the inputs have another shape.
        """
        if self.input_shape is None:
            raise ConfigurationError(
                f"Expected the front {type(self).__name__} to be fitted before it is used. Call fit, or "
                "load what was fitted."
            )
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise ConfigurationError(
                f"Expected inputs of shape (n, {', '.join(map(str, self.input_shape))}) for the front "
                f"{type(self).__name__}, but got {tuple(inputs.shape)}. Bring them to that shape."
            )
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            return (self._features(inputs) - self.mean) / self.deviation

    def standardized(self, inputs: Tensor) -> Tensor:
        """The same without checks and of any batch size: what an exported program does."""
        return (self.extract(inputs.float()) - self.mean) / self.deviation

    def _features(self, inputs: Tensor) -> Tensor:
        features = self.extract(inputs.float())
        if features.shape != (len(inputs), len(self.mean)):
            raise ConfigurationError(
                f"Expected the front {type(self).__name__} to give a vector of {len(self.mean)} features for "
                f"each input, but got {tuple(features.shape)} for {len(inputs)}. Flatten its output."
            )
        return features

    def train(self, mode: bool = True) -> "Front":
        """Stay in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Front":
        """Follow a move to another device, but stay in full precision."""

        def move(value: Tensor) -> Tensor:
            return value.to(fn(value.new_empty(0)).device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call,no-any-return]

    # --- record ----------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Its arguments and the shape of its inputs, as plain values; ``state_dict`` has the rest."""
        return {**self.arguments, "input_shape": list(self.input_shape or ())}

    def fingerprint(self) -> str:
        """A hash of the arguments and of every bit that was fitted or loaded."""
        digest = blake2b(repr((type(self).__name__, sorted(self.record().items()))).encode())
        digest_tensors(digest.update, self.state_dict())
        return digest.hexdigest()[:32]


def _alone(sums: Tensor) -> Tensor:
    return sums


def _mean_and_square(
    batches: Iterable[Tensor], like: Tensor, all_reduce: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Means of the columns and of their squares over all processes, ``(width,)`` float64 each.

    Args:
        batches: a process's own, ``(n, width)``; a process may have none.
        like: has the width and the device of the result.
        all_reduce: gives sums over all processes.
    """
    sums = torch.zeros(3, len(like), dtype=torch.float64, device=like.device)
    for batch in batches:
        x = batch.double()
        sums += torch.stack((x.new_full(x.shape[1:], len(x)), x.sum(0), x.square().sum(0)))
    count, first, second = all_reduce(sums)
    return first / count, second / count


class RandomFeatures(Front):
    r"""Random features: half of them 0, or those of a Gaussian kernel.

    .. math:: \max(0, x R / \sqrt d) \qquad\text{or}\qquad
        \sqrt{2 / M} \cos(x R / \ell + b), \quad R_{ij} \sim N(0, 1),\ b_j \sim U(0, 2 \pi)

    The products of the cosines go to :math:`\exp(-|x - y|^2 / 2 \ell^2)` with their number (Rahimi and
    Recht, 2007, Alg. 1). RanDumb (Prabhu et al., 2024, https://arxiv.org/abs/2402.08823) is a shared
    Gaussian, the gate ``slda``, on them.

    Args:
        features: M, how many.
        kind: ``cosine``, or ``relu`` for those of the first formula.
        length: l over the root of the inputs' summed variances, which is measured.
        seed: of R and b, which are never stored; None: that of seed_everything, then 0.

    State:
        ``scale``, one float32, next to mean and deviation: 8 M + 4 bytes.

    Raises:
        ConfigurationError: an argument breaks a rule.
    """

    matrix: Tensor
    phase: Tensor
    scale: Tensor

    def __init__(
        self,
        features: int = 2000,
        kind: Literal["cosine", "relu"] = "cosine",
        *,
        length: float = 1.0,
        seed: int | None = None,
    ) -> None:
        check_positive_int("features of a front", features, DEFAULT)
        check_choice("kind of a front", kind, ("cosine", "relu"))
        check_above_zero("length of a front", length, "1 is the size of the inputs' deviation.")
        super().__init__(features=features, kind=kind, length=length, seed=seed)
        self.features, self.kind, self.length = features, kind, length

    def width(self, input_shape: Sequence[int]) -> int:
        """As many as was asked for."""
        return self.features

    def allocate(self, input_shape: Sequence[int]) -> None:
        """Draw R and b."""
        super().allocate(input_shape)
        generator = seeded_generator("random front", self.arguments["seed"])
        size = prod(input_shape)
        matrix = torch.randn(size, self.features, generator=generator, device="cpu")
        phase = torch.rand(self.features, generator=generator, device="cpu") * 2 * torch.pi
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("phase", phase, persistent=False)
        self.register_buffer("scale", torch.tensor(size**-0.5))

    def fit_extractor(self, images: Images, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Measure the size of the inputs, for cosines."""
        if self.kind == "relu":
            return
        inputs = (batch.flatten(1) for batch in images())
        mean, square = _mean_and_square(inputs, self.matrix[:, 0], all_reduce)
        variance = (square - mean.square()).sum().clamp(min=0)
        # Inputs that do not vary are refused where their features are standardized.
        self.scale.copy_(torch.where(variance > 0, self.length * variance.sqrt(), 1.0).reciprocal())

    def extract(self, inputs: Tensor) -> Tensor:
        """The formula."""
        products: Tensor = inputs.flatten(1) @ self.matrix * self.scale
        if self.kind == "relu":
            return products.relu()
        waves: Tensor = (products + self.phase).cos()
        return waves.mul((2 / self.features) ** 0.5)
