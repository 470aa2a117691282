"""Layers with per-task parameters, backbones, and a loss that configs can name."""

from bpn_lightning.losses import CrossEntropy
from bpn_lightning.nn.backbones import MLP, torchvision_backbone

__all__ = ["MLP", "CrossEntropy", "torchvision_backbone"]


def __dir__() -> list[str]:
    return __all__
