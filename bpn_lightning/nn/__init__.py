"""Layers with per-task parameters, backbones, and a loss that configs can name."""

from bpn_lightning.nn.backbones import MLP
from bpn_lightning.nn.fronts import RandomFeatures
from bpn_lightning.nn.frozen_network import FrozenNetwork
from bpn_lightning.nn.losses import CrossEntropy
from bpn_lightning.nn.patches import Patches
from bpn_lightning.nn.pretrained import Pretrained
from bpn_lightning.nn.sources import (
    efficientnet_lite_backbone,
    timm_backbone,
    torchvision_backbone,
)
from bpn_lightning.nn.transformers_source import transformers_backbone

__all__ = [
    "MLP",
    "CrossEntropy",
    "FrozenNetwork",
    "Patches",
    "Pretrained",
    "RandomFeatures",
    "efficientnet_lite_backbone",
    "timm_backbone",
    "torchvision_backbone",
    "transformers_backbone",
]


def __dir__() -> list[str]:
    return __all__
