"""The digits that come with scikit-learn: no files, no network."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits

from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.datamodules.splitting import hold_out

__all__ = ["SplitDigits"]


@dataclass(eq=False, repr=False)
class SplitDigits(ClassIncrementalDataModule):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, split by class.

    The data set has no test part: a fixed fifth of each class, independent of the seed, is used as the
    test set. Pixels are rescaled from 0 to 16 to 0 to 255.

    Normalized by the mean and standard deviation of the 1,438 training images.
    """

    title = "the digits"
    constants = ChannelStats(mean=(0.3057,), std=(0.3761,))
    mirrored = False

    def read(self) -> ImageData:
        """Load the bundled arrays and split off the test set."""
        digits = _bundled()
        images = torch.from_numpy(digits.images).unsqueeze(1).mul(255 / 16).round().byte()
        labels = torch.from_numpy(digits.target).long()
        test = hold_out(labels, 0.2, "digits: test part")
        return ImageData(
            train=Samples(images[~test], labels[~test]),
            test=Samples(images[test], labels[test]),
            class_names=[str(digit) for digit in range(10)],
            source="scikit-learn",
        )


@cache
def _bundled() -> Any:
    """scikit-learn's arrays: it parses a text file at every call, for as long as a short task trains."""
    return load_digits()
