"""Readers of published image sets in their official layouts; they list images without decoding them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from bpn_lightning.datamodules.image_sets.actions import VOCActions
from bpn_lightning.datamodules.image_sets.aircraft import FGVCAircraft
from bpn_lightning.datamodules.image_sets.birds import CUB200
from bpn_lightning.datamodules.image_sets.cars import StanfordCars
from bpn_lightning.datamodules.image_sets.flowers import Flowers102
from bpn_lightning.datamodules.image_sets.indoor import Indoor67
from bpn_lightning.datamodules.image_sets.letters import Chars74K
from bpn_lightning.datamodules.image_sets.listing import Counts, Entry, ImageSet, Listing
from bpn_lightning.datamodules.image_sets.svhn import SVHN
from bpn_lightning.errors import ConfigurationError, did_you_mean

__all__ = [
    "CUB200",
    "IMAGE_SETS",
    "SVHN",
    "Chars74K",
    "Counts",
    "Entry",
    "FGVCAircraft",
    "Flowers102",
    "ImageSet",
    "Indoor67",
    "Listing",
    "StanfordCars",
    "VOCActions",
    "make_image_set",
]

IMAGE_SETS: dict[str, type[ImageSet]] = {
    each.name: each
    for each in (
        Flowers102,
        Indoor67,
        CUB200,
        StanfordCars,
        FGVCAircraft,
        VOCActions,
        Chars74K,
        SVHN,
    )
}
"""The image sets by name, in the paper's order."""


def make_image_set(name: str, root: Path, options: dict[str, Any] | None = None) -> ImageSet:
    """Create an image set by its name.

    Args:
        name: a key of ``IMAGE_SETS``.
        root: the folder of data sets.
        options: keyword arguments of its class.

    Raises:
        ConfigurationError: the set or an option is unknown, or a value has the wrong type.
    """
    if name not in IMAGE_SETS:
        raise ConfigurationError(
            f"Expected the name of an image set, but got {name!r}.{did_you_mean(name, IMAGE_SETS)} "
            f"The sets are {', '.join(IMAGE_SETS)}."
        )
    arguments = {one.name: one for one in fields(IMAGE_SETS[name]) if one.init}
    known = [argument for argument in arguments if argument != "root"]
    for option, value in (options or {}).items():
        if option not in known:
            takes = ", ".join(known) or "none"
            raise ConfigurationError(
                f"Expected an option of {name}, but got {option!r}.{did_you_mean(option, known)} It "
                f"takes {takes}."
            )
        wanted = type(arguments[option].default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ConfigurationError(
                f"Expected {option} of {name} to be of type {wanted.__name__}, but got {value!r}."
            )
    return IMAGE_SETS[name](root, **(options or {}))
