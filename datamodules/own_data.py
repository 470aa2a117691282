"""Streams of people's own data: a tree of folders of images, or arrays of images, features or tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bpn_lightning.datamodules.arrays import ARRAYS, from_arrays
from bpn_lightning.datamodules.base import IDENTITY, Normalisation, check_positive_int
from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
from bpn_lightning.datamodules.readers import ImageData, read_class_folders, read_npz

__all__ = ["SplitArrays", "SplitImageFolder"]


@dataclass(eq=False, repr=False)
class SplitImageFolder(ClassIncrementalDataModule):
    """Images in ``<root>/{train,test}/<class>/``, split by class.

    Every kind of image that Pillow reads will do; of gray ones with 16 bits the upper 8 are taken. Normalised by the mean and the standard deviation
    of the first task's training images, so that nothing is known of later tasks or of test images.

    Args:
        root: the folder that holds ``train/`` and ``test/``.
        image_size: height and width in pixels that every image is resized to, whatever its shape.
        channels: 3 reads all images in color, 1 in gray.
    """

    root: str
    image_size: int = 64
    channels: Literal[1, 3] | None = field(default=3, kw_only=True)

    title = "the images"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("image_size", self.image_size)

    def read(self) -> ImageData:
        """Decode every image once."""
        folder = Path(self.root).expanduser().absolute()
        size = (self.image_size, self.image_size)
        return read_class_folders(folder, self.channels or 3, *size, resize=True)


@dataclass(eq=False, repr=False)
class SplitArrays(ClassIncrementalDataModule):
    """Arrays in one ``.npz`` archive, or in memory, split by class.

    ``train_labels`` and ``test_labels`` are integers or strings, (n,) or (n, 1); a class's name is its
    label, and classes are in ascending order. With them come the inputs, of one of three kinds:

    - ``train_images`` and ``test_images``: uint8 or uint16, (n, height, width) or (n, height, width,
      channels), as MedMNIST ships them. Of 16 bits the upper 8 are taken. Normalised by the mean and
      the standard deviation of each channel of the first task's training images.
    - ``train_features`` and ``test_features``: numbers, (n, features) or (n, features, ...), kept as
      float32. Each feature is standardized by its mean and standard deviation over the first task's
      training samples.
    - ``train_tokens`` and ``test_tokens``: integers, (n, length), for a network that begins with
      ``torch.nn.Embedding``; as they are, int64 all the way.

    So nothing is known of later tasks or of test samples. Further arrays, such as MedMNIST's
    ``val_images``, are not read: ``validation_fraction`` takes from the training samples here as
    everywhere.

    Args:
        path: the archive; in Python also the arrays themselves by these names.
        standardize: whether features are standardized; if not, they stay as they are.
    """

    path: str | Mapping[str, Any]
    standardize: bool = True

    title = "the arrays"

    def read(self) -> ImageData:
        """Load the four arrays."""
        arrays, source = self.path, "the arrays"
        if not isinstance(arrays, Mapping):
            file = Path(arrays).expanduser().absolute()
            arrays, source = read_npz(file, ARRAYS), str(file)
        return from_arrays(arrays, source)

    def known_normalization(self, data: ImageData) -> Normalisation | None:
        """Nothing is done to features that are not to be standardized."""
        features = data.train.images.is_floating_point()
        return IDENTITY if features and not self.standardize else super().known_normalization(data)
