"""Streams of tasks as LightningDataModules, imported lazily."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpn_lightning.datamodules.base import ContinualDataModule
    from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
    from bpn_lightning.datamodules.digits import SplitDigits
    from bpn_lightning.datamodules.division import SamplesOfTasks
    from bpn_lightning.datamodules.eight_datasets import EightDatasets
    from bpn_lightning.datamodules.gaussians import Gaussians
    from bpn_lightning.datamodules.loading import Samples
    from bpn_lightning.datamodules.own_data import SplitArrays, SplitImageFolder
    from bpn_lightning.datamodules.permuted import PermutedMNIST, RotatedMNIST
    from bpn_lightning.datamodules.readers import ImageData
    from bpn_lightning.datamodules.stream_of import StreamOf
    from bpn_lightning.datamodules.torchvision_sets import (
        SplitCIFAR10,
        SplitCIFAR100,
        SplitFashionMNIST,
        SplitMNIST,
    )

__all__ = [
    "DATAMODULES",
    "ClassIncrementalDataModule",
    "ContinualDataModule",
    "EightDatasets",
    "Gaussians",
    "ImageData",
    "PermutedMNIST",
    "RotatedMNIST",
    "Samples",
    "SamplesOfTasks",
    "SplitArrays",
    "SplitCIFAR10",
    "SplitCIFAR100",
    "SplitDigits",
    "SplitFashionMNIST",
    "SplitImageFolder",
    "SplitMNIST",
    "StreamOf",
]

DATAMODULES: dict[str, str] = {
    "SplitDigits": "bpn_lightning.datamodules.digits:SplitDigits",
    "SplitMNIST": "bpn_lightning.datamodules.torchvision_sets:SplitMNIST",
    "SplitFashionMNIST": "bpn_lightning.datamodules.torchvision_sets:SplitFashionMNIST",
    "SplitCIFAR10": "bpn_lightning.datamodules.torchvision_sets:SplitCIFAR10",
    "SplitCIFAR100": "bpn_lightning.datamodules.torchvision_sets:SplitCIFAR100",
    "PermutedMNIST": "bpn_lightning.datamodules.permuted:PermutedMNIST",
    "RotatedMNIST": "bpn_lightning.datamodules.permuted:RotatedMNIST",
    "Gaussians": "bpn_lightning.datamodules.gaussians:Gaussians",
    "EightDatasets": "bpn_lightning.datamodules.eight_datasets:EightDatasets",
    "StreamOf": "bpn_lightning.datamodules.stream_of:StreamOf",
    "SplitImageFolder": "bpn_lightning.datamodules.own_data:SplitImageFolder",
    "SplitArrays": "bpn_lightning.datamodules.own_data:SplitArrays",
}
"""The registered streams, and where each is defined."""

_FOR_AUTHORS = {
    "ContinualDataModule": "bpn_lightning.datamodules.base:ContinualDataModule",
    "ClassIncrementalDataModule": (
        "bpn_lightning.datamodules.class_incremental:ClassIncrementalDataModule"
    ),
    "ImageData": "bpn_lightning.datamodules.readers:ImageData",
    "Samples": "bpn_lightning.datamodules.loading:Samples",
    "SamplesOfTasks": "bpn_lightning.datamodules.division:SamplesOfTasks",
}


def __getattr__(name: str) -> Any:
    place = (DATAMODULES | _FOR_AUTHORS).get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = place.split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
