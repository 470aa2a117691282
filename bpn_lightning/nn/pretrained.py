"""Networks that were trained elsewhere, with the preprocessing that their weights were trained with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.checks import check_choice, check_positive_int
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.common_normalization import normalization_of
from bpn_lightning.nn.weights import hash_of
from bpn_lightning.tasks import ContinualStream

__all__ = [
    "Interpolation",
    "Origin",
    "Pretrained",
    "adopt_normalization",
    "cut_classifier",
    "import_extra",
    "with_origin",
]

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Origin:
    """Where the weights of a network come from; results and exports record it.

    Args:
        library: the package that has the network.
        version: of that package.
        name: of the network in it.
        weights: their ID in the library or in the package that has them, or the name of a file.
        sha256: of the weights' names, types, shapes and bits as they were loaded.
        shippable: whether an export may hold them; if not, it names them by ``weights`` and ``sha256``.
    """

    library: str
    version: str
    name: str
    weights: str
    sha256: str
    shippable: bool = True


class Pretrained(nn.Module):
    """A network with the preprocessing that its weights were trained with.

    It takes images as a stream prepares them: when a
    :class:`~bpn_lightning.ContinualModule` first meets its stream, the stream's normalization is replaced by
    this one. On its own it takes pixels from 0 to 1. Images of one channel are repeated as red, green and
    blue.

    Args:
        network: maps ``(batch, channels, height, width)`` to features ``(batch, features)``.
        size: height and width in pixels of what the network sees; images that have it are not resized.
            None leaves all images as they are.
        resize: pixels that the shorter side of an image is scaled to before the central square of ``size``
            is cut out; None: ``size``.
        mean: of each channel, of pixels from 0 to 1; None keeps the stream's normalization.
        std: likewise.
        interpolation: of resizing, which is antialiased.

    State:
        ``scale`` and ``shift``, ``(channels, 1, 1)`` float32 each, from the stream's normalization to this.

    Attributes:
        origin: where the weights come from; None where that is not known.

    Raises:
        ConfigurationError: an argument breaks a rule.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        size: int | None = None,
        resize: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        if size is not None:
            check_positive_int("size", size, "Null leaves images as they are.")
        if resize is not None and (type(resize) is not int or size is None or resize < size):
            raise ConfigurationError(
                f"Expected resize to be at least size, but got {resize!r} and {size}. Leave it out to "
                "cut nothing off."
            )
        check_choice("interpolation", interpolation, ("bilinear", "bicubic"))
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()) or mean == []:
            raise ConfigurationError(
                f"Expected mean and std to have one number for each channel, but got {mean} and {std}. "
                "Leave both out to keep the stream's normalization."
            )
        if std is not None and not all(value > 0 for value in std):
            raise ConfigurationError(
                f"Expected std to be above 0 for each channel, but got {list(std)}. Leave mean and std out "
                "to keep the stream's normalization."
            )
        self.network = network
        self.size, self.resize, self.interpolation = size, resize or size, interpolation
        self.mean = None if mean is None else tuple(map(float, mean))
        self.std = None if std is None else tuple(map(float, std))
        self.origin: Origin | None = None
        self._names: tuple[str, ...] = ()  # of the tensors that have this origin
        channels = len(self.mean or (0.0,))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.register_buffer("shift", torch.zeros(channels, 1, 1))
        self.replace_normalization([0.0], [1.0])

    def replace_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take inputs that were normalized by other numbers.

        Args:
            mean: of the inputs' normalization, for each channel or for all, of pixels from 0 to 1.
            std: likewise.

        Raises:
            ConfigurationError: they are of another number of channels.
        """
        if self.mean is None or self.std is None:
            return
        if len(mean) not in (1, len(self.mean)):
            raise ConfigurationError(
                f"Expected images of 1 or {len(self.mean)} channels, which the pretrained network was "
                f"trained on, but the stream normalizes {len(mean)}. Set the stream's channels."
            )
        own_mean, own_std, theirs, deviations = (
            torch.tensor(numbers, dtype=torch.float64)
            for numbers in (self.mean, self.std, tuple(mean), tuple(std))
        )
        self.scale.copy_((deviations / own_std).view(-1, 1, 1))
        self.shift.copy_(((theirs - own_mean) / own_std).view(-1, 1, 1))

    def set_origin(
        self, library: str, name: str, weights: str, *, shippable: bool = True
    ) -> "Pretrained":
        """Record where the weights come from, right after they were loaded.

        Args:
            library: the distribution that has the network.
            name: of the network in it.
            weights: as of :class:`Origin`.
            shippable: likewise.

        Returns:
            The same network.
        """
        self._names = tuple(self.network.state_dict())
        found = hash_of(self.original_state())
        self.origin = Origin(library, metadata.version(library), name, weights, found, shippable)
        return self

    def original_state(self) -> dict[str, Tensor]:
        """What the tensors that were loaded are now, by their names in ``state_dict``."""
        state = self.network.state_dict(prefix="network.")
        return {key: state[key] for key in (f"network.{name}" for name in self._names)}

    def forward(self, images: Tensor) -> Tensor:
        """Features of ``(batch, channels, height, width)``, as the network gives them."""
        features: Tensor = self.network(self.preprocess(images))
        return features

    def preprocess(self, images: Tensor) -> Tensor:
        """What the network sees, ``(batch, channels, size, size)``: resized, cropped, normalized."""
        if self.size is not None and self.resize is not None:
            images = _resized(images, self.size, self.resize, self.interpolation)
        return images if self.mean is None else images * self.scale + self.shift


def _resized(images: Tensor, size: int, resize: int, interpolation: Interpolation) -> Tensor:
    """The central square of images whose shorter side is scaled to ``resize``, as torchvision does it."""
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    shorter = min(height, width)
    sides = [int(resize * side / shorter) for side in (height, width)]
    images = F.interpolate(images, sides, mode=interpolation, antialias=True)
    top, left = (round((side - size) / 2) for side in sides)
    return images[..., top : top + size, left : left + size]


def adopt_normalization(network: nn.Module, stream: ContinualStream) -> None:
    """Have pretrained parts of a network take inputs as a stream normalizes them.

    Args:
        network: a front in it sees all tasks with the first one's normalization.
        stream: after its ``setup``.

    Raises:
        ConfigurationError: the normalization is not known, or tasks have different ones.
    """
    parts = [
        (name, part)
        for name, part in network.named_modules()
        if isinstance(part, Pretrained) and part.mean is not None
    ]
    of_tasks = [normalization_of(one) for one in stream.preparations()] if parts else []
    for name, part in parts:
        seen = of_tasks[:1] if name.startswith("front.") else of_tasks
        first = seen[0]
        if first is None or None in seen:
            raise ConfigurationError(
                "Expected a stream whose preparation_steps say how it normalizes images, as a pretrained "
                "network has a normalization of its own, but they do not. Describe the steps, or pass "
                "the part network of Pretrained, and inputs as that takes them."
            )
        if any(one != first for one in seen):
            raise ConfigurationError(
                "Expected one normalization for all tasks with a pretrained backbone, which has its own, "
                "but the stream's tasks differ in theirs. Use the network as a front: FrozenNetwork."
            )
        part.replace_normalization(*first)


def cut_classifier(network: nn.Module) -> str | None:
    """Replace the last linear layer by the identity, or the last convolution where there is none.

    Returns:
        The layer's name; None if there is no such layer.
    """
    for kind in (nn.Linear, nn.Conv2d):
        name = next(
            (n for n, part in reversed([*network.named_modules()]) if type(part) is kind), ""
        )
        if name:
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, nn.Identity())
            return name
    return None


def with_origin(network: nn.Module) -> Iterator[tuple[str, Pretrained, Origin]]:
    """The parts of a network whose weights come from elsewhere: names, parts and origins."""
    for name, part in network.named_modules():
        if isinstance(part, Pretrained) and part.origin is not None:
            yield name, part, part.origin


def import_extra(module: str, extra: str, needed_by: str) -> Any:
    """Import an optional package.

    Args:
        module: its import path.
        extra: of this package, that brings it.
        needed_by: what needs it, for the message.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"Expected {error.name} to be installed for {needed_by}, but it is not. Install it: pip "
            f"install 'bpn_lightning[{extra}]'"
        ) from error
