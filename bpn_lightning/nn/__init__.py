"""Layers that behave differently for each task, and backbones to put them in."""

from bpn_lightning.nn.backbones import MLP, torchvision_backbone

__all__ = ["MLP", "torchvision_backbone"]
