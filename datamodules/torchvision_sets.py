"""Split streams of torchvision's data sets, from its files or from class folders."""

import os
import struct
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from bpn_lightning.datamodules.class_incremental import ClassIncrementalDataModule
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.misplaced import misplaced_hint
from bpn_lightning.datamodules.normalization import ChannelStats
from bpn_lightning.datamodules.readers import ImageData, has_class_folders, read_class_folders
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.files.untrusted import open_untrusted

__all__ = ["SplitCIFAR10", "SplitCIFAR100", "SplitFashionMNIST", "SplitMNIST"]


@dataclass(eq=False, repr=False)
class _NamedDataModule(ClassIncrementalDataModule):
    """One of torchvision's data sets, split by class.

    Args:
        root: the folder of data sets, with torchvision's files or ``<name>/{train,test}/<class>/``; by
            default the environment variable BPN_DATA, then ``data``.
        download: whether to download torchvision's files if they are missing.
    """

    root: str | None = None
    download: bool = True

    class_in_torchvision: ClassVar[str]
    tree: ClassVar[str]
    """The folder below the root that may contain ``{train,test}/<class>/``."""
    shape: ClassVar[tuple[int, int, int]]
    """``(channels, height, width)``."""

    @property
    def root_folder(self) -> Path:
        """The absolute path of the folder of data sets."""
        root = self.root or os.environ.get("BPN_DATA") or "data"
        return Path(root).expanduser().absolute()

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this in one process only."""
        if self.download and not has_class_folders(self.root_folder / self.tree):
            self._open(train=True, download=True)

    def read(self) -> ImageData:
        """Read the class folders if they exist, otherwise torchvision's files."""
        tree = self.root_folder / self.tree
        if has_class_folders(tree):
            return read_class_folders(tree, *self.shape, resize=False)
        train, test = (self._open(train=part, download=False) for part in (True, False))
        names = [name.split(" - ")[0] for name in train.classes]  # MNIST's are "0 - zero" ...
        parts = _samples(train), _samples(test)
        for samples in parts:
            self._check_arrays(samples, len(names))
        return ImageData(*parts, names, str(self.root_folder))

    def _check_arrays(self, samples: Samples, classes: int) -> None:
        """Check shapes and labels, which torchvision does not."""
        images, labels = samples
        largest = int(labels.max()) if len(labels) else -1
        if (
            tuple(images.shape[1:]) != self.shape
            or len(images) != len(labels)
            or largest >= classes
        ):
            raise DataError(
                f"Expected {self.title} in {self.root_folder} to be images of {self.shape} (channels, "
                f"height, width) with a label below {classes} each, but got {len(images)} of "
                f"{tuple(images.shape[1:])} with {len(labels)} labels up to {largest}. Delete the "
                "files to have them downloaded again."
            )

    def _open(self, train: bool, download: bool) -> Any:
        from torchvision import datasets  # slow to import, and not needed for class folders

        dataset = getattr(datasets, self.class_in_torchvision)
        try:
            with warnings.catch_warnings():
                # numpy 2.4 warns about arrays pickled in 2009
                warnings.simplefilter("ignore")
                return dataset(self.root_folder, train=train, download=download)
        # torchvision may raise any exception here: AssertionError, RuntimeError, URLError, OSError,
        # EOFError, UnpicklingError ...
        except Exception as error:
            raise DataError(self._describe_failure(dataset, download, error)) from error

    def _describe_failure(self, dataset: Any, download: bool, error: Exception) -> str:
        root = self.root_folder
        folder, faults = self._faults(dataset)
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        if download:
            fetched = f"torchvision, free to download, ended with {said}"
        elif self.download:
            fetched = "nothing was downloaded here, as only prepare_data() does that"
        else:
            fetched = "nothing was downloaded, as download is off"
        again = (
            " Delete damaged files to have them downloaded again." if "damaged" in faults else ""
        )
        names = [file.name for file in self._files(dataset) if not file.is_file()]
        others = [root / self.tree, root / self.tree / "raw"]
        remedy = misplaced_hint(root, folder, names, self._archives(dataset), others) or (
            "Name the folder that has them with `--data.init_args.root DIR` or `export BPN_DATA=DIR`, or "
            f"download them from {self._address(dataset)} into {folder}."
        )
        return (
            f"Expected the images of {self.title} in {root}, but did not find them. Tried: the "
            f"folders {root / self.tree}{os.sep}{{train,test}}{os.sep}<class> (missing); "
            f"torchvision's files in {folder} ({faults or said}); {fetched}. {remedy}{again}"
        )

    def _faults(self, dataset: Any) -> tuple[Path, str]:
        """Torchvision's folder, and its missing or damaged files."""
        whole = self._files(dataset)
        return next(iter(whole)).parent, _describe(whole)

    @abstractmethod
    def _files(self, dataset: Any) -> dict[Path, bool]:
        """Torchvision's unpacked files, and whether each is intact."""

    @abstractmethod
    def _archives(self, dataset: Any) -> list[str]:
        """The names of the downloaded archives."""

    @abstractmethod
    def _address(self, dataset: Any) -> str:
        """The address from which torchvision downloads."""


def _samples(dataset: Any) -> Samples:
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Samples(images.contiguous(), torch.as_tensor(dataset.targets))


@dataclass(eq=False, repr=False)
class _IdxDataModule(_NamedDataModule):
    """MNIST and Fashion-MNIST: four files with one array each.

    Args:
        padding: black pixels on every side of an image; 2 makes 32 x 32 of 28 x 28. The normalization
            is that of the padded images.
    """

    padding: int = 0

    shape = (1, 28, 28)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ConfigurationError(
                f"Expected padding to be a number of pixels, 0 or more, but got {self.padding!r}."
            )

    @property
    def constants(self) -> ChannelStats:  # type: ignore[override]
        """The constants of padded images, computed from those of unpadded images."""
        if self.padding == 0:
            return self.unpadded
        (mean,), (std,) = self.unpadded
        share = prod(self.shape[1:]) / prod(size + 2 * self.padding for size in self.shape[1:])
        of_all = mean * share
        return ChannelStats((of_all,), ((share * (std**2 + mean**2) - of_all**2) ** 0.5,))

    unpadded: ClassVar[ChannelStats]
    """Mean and standard deviation of the unpadded images."""

    def read(self) -> ImageData:
        """Read the images and pad them."""
        data = super().read()
        if self.padding == 0:
            return data
        train, test = (
            Samples(F.pad(part.images, [self.padding] * 4), part.labels)
            for part in (data.train, data.test)
        )
        return data._replace(train=train, test=test)

    def _files(self, dataset: Any) -> dict[Path, bool]:
        folder = self.root_folder / self.class_in_torchvision / "raw"
        files = [folder / Path(name).stem for name in self._archives(dataset)]
        return {file: _is_whole_idx(file) for file in files}

    def _archives(self, dataset: Any) -> list[str]:
        return [name for name, _ in dataset.resources]

    def _address(self, dataset: Any) -> str:
        return str(dataset.mirrors[0])


class _PickledDataModule(_NamedDataModule):
    """CIFAR-10 and CIFAR-100: pickled batches with MD5 sums known to torchvision."""

    shape = (3, 32, 32)

    def _files(self, dataset: Any) -> dict[Path, bool]:
        from torchvision.datasets.utils import check_integrity

        folder = self.root_folder / dataset.base_folder
        sums = [*dataset.train_list, *dataset.test_list]
        sums.append([dataset.meta["filename"], dataset.meta["md5"]])
        return {folder / name: check_integrity(folder / name, md5) for name, md5 in sums}

    def _archives(self, dataset: Any) -> list[str]:
        return [str(dataset.filename)]

    def _address(self, dataset: Any) -> str:
        return str(dataset.url)


def _describe(whole: dict[Path, bool]) -> str:
    missing = [file.name for file in whole if not file.is_file()]
    damaged = [file.name for file, good in whole.items() if not good and file.is_file()]
    lists = {"missing": missing, "damaged": damaged}
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in lists.items() if names)


def _is_whole_idx(file: Path) -> bool:
    """Whether the size of a file matches its header."""
    try:
        with open_untrusted(file, max_bytes=None) as stream:
            dimensions = stream.read(4)[3]
            sizes = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
        return bool(file.stat().st_size == 4 + 4 * dimensions + prod(sizes))
    except (OSError, IndexError, struct.error):
        return False


class SplitMNIST(_IdxDataModule):
    """MNIST, 60,000 training and 10,000 test grayscale images of 28 x 28 pixels in 10 classes, split by class.

    Normalized by the mean and standard deviation of all its 60,000 training images.
    """

    title = "MNIST"
    class_in_torchvision = "MNIST"
    tree = "mnist"
    unpadded = ChannelStats(mean=(0.1307,), std=(0.3081,))
    mirrored = False


class SplitFashionMNIST(_IdxDataModule):
    """Fashion-MNIST, 60,000 training and 10,000 test grayscale images of 28 x 28 pixels in 10 classes, split by class.

    Normalized by the mean and standard deviation of all its 60,000 training images.
    """

    title = "Fashion-MNIST"
    class_in_torchvision = "FashionMNIST"
    tree = "fashion_mnist"
    unpadded = ChannelStats(mean=(0.2860,), std=(0.3530,))


class SplitCIFAR10(_PickledDataModule):
    """CIFAR-10, 50,000 training and 10,000 test color images of 32 x 32 pixels in 10 classes, split by class.

    Normalized by the mean and standard deviation of all its 50,000 training images, per channel.
    """

    title = "CIFAR-10"
    class_in_torchvision = "CIFAR10"
    tree = "cifar10"
    constants = ChannelStats(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


class SplitCIFAR100(_PickledDataModule):
    """CIFAR-100, 50,000 training and 10,000 test color images of 32 x 32 pixels in 100 classes, split by class.

    Normalized by the mean and standard deviation of all its 50,000 training images, per channel.
    """

    title = "CIFAR-100"
    class_in_torchvision = "CIFAR100"
    tree = "cifar100"
    constants = ChannelStats(mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
