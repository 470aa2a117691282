"""Layers with per-task parameters, backbones, and a loss that configs can name."""

from bpn_lightning.losses import CrossEntropy
from bpn_lightning.nn.backbones import MLP, torchvision_backbone
from bpn_lightning.nn.fronts import FrozenNetwork, RandomFeatures
from bpn_lightning.nn.patches import Patches

__all__ = [
    "MLP",
    "CrossEntropy",
    "FrozenNetwork",
    "Patches",
    "RandomFeatures",
    "torchvision_backbone",
]


def __dir__() -> list[str]:
    return __all__
