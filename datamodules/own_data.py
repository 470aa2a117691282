"""Streams of custom data: class folders of images, or arrays of images, features or tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bpn_lightning.checks import check_positive_int
from bpn_lightning.datamodules.arrays import ARRAYS, VALIDATION, from_arrays
from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
from bpn_lightning.datamodules.normalization import IDENTITY, ChannelStats
from bpn_lightning.datamodules.readers import ImageData, read_class_folders, read_npz

__all__ = ["SplitArrays", "SplitImageFolder"]


@dataclass(eq=False, repr=False)
class SplitImageFolder(ClassIncrementalDataModule):
    """Images in ``<root>/{train,test}/<class>/``, split by class.

    Accepts every image format that Pillow reads; 16-bit grayscale is reduced to the upper 8 bits.
    Normalized by the mean and standard deviation of the first task's training images, so that no
    information leaks from later tasks or test images.

    Args:
        root: the folder that contains ``train/`` and ``test/``.
        image_size: height and width in pixels to which every image is resized, ignoring its aspect ratio.
        channels: 3 reads images in color, 1 in grayscale.
    """

    root: str
    image_size: int = 64
    channels: Literal[1, 3] | None = field(default=3, kw_only=True)

    title = "the images"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("image_size", self.image_size)

    def read(self) -> ImageData:
        """Decode all images."""
        folder = Path(self.root).expanduser().absolute()
        size = (self.image_size, self.image_size)
        return read_class_folders(folder, self.channels or 3, *size, resize=True)


@dataclass(eq=False, repr=False)
class SplitArrays(ClassIncrementalDataModule):
    """Arrays in one ``.npz`` archive, or in memory, split by class.

    ``train_labels`` and ``test_labels`` are integers or strings, (n,) or (n, 1). Each distinct label is a
    class, in ascending order. The inputs are of one of three kinds:

    - ``train_images`` and ``test_images``: uint8 or uint16, (n, height, width) or (n, height, width,
      channels), as in MedMNIST. 16-bit images are reduced to the upper 8 bits. Normalized by the mean
      and standard deviation of each channel over the first task's training images.
    - ``train_features`` and ``test_features``: numbers, (n, features) or (n, features, ...), stored
      as float32. Each feature is standardized by its mean and standard deviation over the first task's
      training samples.
    - ``train_tokens`` and ``test_tokens``: integers, (n, length), passed as int64 to a network that
      begins with ``torch.nn.Embedding``.

    No information leaks from later tasks or test samples. Other arrays are ignored.

    Args:
        path: the archive; in Python also a mapping of these names to arrays.
        standardize: whether features are standardized.
        own_validation: hold out the archive's own validation part, ``val_labels`` with ``val_images`` (or
            features or tokens), as MedMNIST has it, instead of a fraction of the training samples.
    """

    path: str | Mapping[str, Any]
    standardize: bool = True
    own_validation: bool = False

    title = "the arrays"

    def __post_init__(self) -> None:
        self.holds_out = self.own_validation
        super().__post_init__()

    def read(self) -> ImageData:
        """Load the arrays."""
        arrays, source = self.path, "the arrays"
        if not isinstance(arrays, Mapping):
            file = Path(arrays).expanduser().absolute()
            wanted = (*ARRAYS, *VALIDATION) if self.own_validation else ARRAYS
            arrays, source = read_npz(file, wanted), str(file)
        return from_arrays(arrays, source, self.own_validation)

    def known_normalization(self, data: ImageData) -> ChannelStats | None:
        """The identity for features if ``standardize`` is off."""
        features = data.train.images.is_floating_point()
        return IDENTITY if features and not self.standardize else super().known_normalization(data)
