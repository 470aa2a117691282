"""Streams of people's own images: a tree of folders, or one archive of arrays."""

from dataclasses import dataclass
from pathlib import Path

from bpn_lightning.datamodules.base import at_least_one
from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
from bpn_lightning.datamodules.readers import ImageData, read_class_folders, read_npz

__all__ = ["SplitArrays", "SplitImageFolder"]


@dataclass(eq=False, repr=False)
class SplitImageFolder(ClassIncrementalDataModule):
    """Images in ``<root>/{train,test}/<class>/``, split by class.

    Every kind of image that Pillow reads will do. Normalised by the mean and the standard deviation
    of the first task's training images, so that nothing is known of later tasks or of test images.

    Args:
        root: the folder that holds ``train/`` and ``test/``.
        image_size: height and width in pixels that every image is resized to, whatever its shape.
        grayscale: read one channel instead of three.
    """

    root: str
    image_size: int = 64
    grayscale: bool = False

    title = "the images"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("image_size", self.image_size)

    def read(self) -> ImageData:
        """Decode every image once."""
        folder = Path(self.root).expanduser().absolute()
        channels = 1 if self.grayscale else 3
        return read_class_folders(folder, channels, self.image_size, self.image_size, resize=True)


@dataclass(eq=False, repr=False)
class SplitArrays(ClassIncrementalDataModule):
    """Images in one ``.npz`` archive, as MedMNIST ships them, split by class.

    The archive holds ``train_images`` and ``test_images``, uint8 of shape (n, height, width) or
    (n, height, width, channels), and ``train_labels`` and ``test_labels``, integers of shape (n,) or
    (n, 1). Further arrays, such as MedMNIST's ``val_images``, are not read: ``validation_fraction``
    takes from the training images here as everywhere. A class's name is its label.

    Normalised by the mean and the standard deviation of the first task's training images, so that
    nothing is known of later tasks or of test images.

    Args:
        path: the archive.
    """

    path: str

    title = "the arrays"

    def read(self) -> ImageData:
        """Load the four arrays."""
        return read_npz(Path(self.path).expanduser().absolute())
