"""Convert arrays of images, features or tokens with labels to samples, and validate them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bpn_lightning.datamodules.limits import to_uint8, warn_if_dark
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.errors import DataError

__all__ = ["ARRAYS", "KINDS", "VALIDATION", "from_arrays"]

Kind = Literal["images", "features", "tokens"]
KINDS: tuple[Kind, ...] = ("images", "features", "tokens")
PARTS = ("train", "test")
ARRAYS = tuple(f"{part}_{kind}" for kind in (*KINDS, "labels") for part in PARTS)
"""The supported array names."""
VALIDATION = tuple(f"val_{kind}" for kind in (*KINDS, "labels"))
"""Those of samples that are held out."""

_OBJECTS = "Write them as one plain array: strings, such as those of pandas, by .astype(str)."


def from_arrays(arrays: Mapping[str, Any], source: str, validation: bool = False) -> ImageData:
    """Convert arrays to samples; each distinct label is a class, in ascending order.

    Args:
        arrays: ``train_labels`` and ``test_labels``, integers or strings, ``(n,)`` or ``(n, 1)``, and for
            train and test one of ``images``, uint8 or uint16, ``(n, height, width)`` or ``(n, height,
            width, channels)``; ``features``, numbers, ``(n, features, ...)``; ``tokens``, integers,
            ``(n, ...)``. Other arrays are ignored.
        source: where the arrays come from, for messages.
        validation: whether ``val_labels`` and the inputs of ``val`` are training samples that are held out;
            otherwise they are ignored.

    Returns:
        Images as uint8 (the upper 8 of 16 bits), features as float32, tokens as int64.

    Raises:
        DataError: an array is missing or invalid.
    """
    parts = (*PARTS, "val") if validation else PARTS
    kind = _kind(arrays, parts, source)
    held = {key: np.asarray(arrays[key]) for key in (*ARRAYS, *VALIDATION) if key in arrays}
    values = {part: _labels(f"{part}_labels", held, source) for part in parts}
    for part in parts[1:]:
        if values[part].dtype.kind != values["train"].dtype.kind:
            raise DataError(
                f"Expected train_labels and {part}_labels in {source} to be of one kind, but got "
                f"{held['train_labels'].dtype} and {held[f'{part}_labels'].dtype}. Make both integers, or "
                "both strings."
            )
    classes = np.unique(np.concatenate([*values.values()]))

    def samples(part: str) -> Samples:
        key = f"{part}_{kind}"
        inputs = {"images": _images, "features": _features, "tokens": _tokens}[kind](
            key, held[key], source
        )
        labels = torch.from_numpy(np.searchsorted(classes, values[part]).astype(np.int64))
        if len(inputs) != len(labels):
            raise DataError(
                f"Expected {part}_labels in {source} to have one entry for each of the {len(inputs)} "
                f"{kind}, but got {len(labels)}. Write both completely to the archive."
            )
        return Samples(inputs, labels)

    found = {part: samples(part) for part in parts}
    train = found["train"]
    for part in parts[1:]:
        shapes = [tuple(one.images.shape[1:]) for one in (train, found[part])]
        if shapes[0] != shapes[1]:
            what = " (channels, height, width)" if kind == "images" else ""
            raise DataError(
                f"Expected train_{kind} and {part}_{kind} in {source} to be of one size, but got {shapes[0]} "
                f"and {shapes[1]}{what}. Bring both to the same size."
            )
    data = ImageData(train, found["test"], [str(value) for value in classes.tolist()], source)
    return _holding_out(data, found["val"]) if validation else data


def _holding_out(data: ImageData, val: Samples) -> ImageData:
    """With these samples behind those of training, of which they are held out."""
    pairs = zip(data.train, val, strict=True)
    held_out = torch.arange(len(data.train.labels) + len(val.labels)) >= len(data.train.labels)
    return data._replace(train=Samples(*map(torch.cat, pairs)), held_out=held_out)


def _kind(arrays: Mapping[str, Any], parts: Sequence[str], source: str) -> Kind:
    found = [kind for kind in KINDS if any(f"{part}_{kind}" in arrays for part in PARTS)]
    if len(found) > 1:
        raise DataError(
            f"Expected {source} to hold images, features or tokens, but got {' and '.join(found)}. Leave "
            "all but one kind out."
        )
    kind: Kind = found[0] if found else "images"
    wanted = [f"{part}_{what}" for part in parts for what in (kind, "labels")]
    missing = [key for key in wanted if key not in arrays]
    if missing:
        others = "" if found else " For features or tokens use train_features or train_tokens."
        raise DataError(
            f"Expected {source} to hold the arrays {', '.join(wanted)}, but got "
            f"{', '.join(map(str, arrays)) or 'none'}. Add {', '.join(missing)}.{others}"
        )
    return kind


def _images(key: str, array: Any, source: str) -> Tensor:
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (3, 4):
        remedy = "Scale them to 0 .. 255 and convert them with .astype('uint8')."
        if array.ndim == 2:
            remedy = f"Name rows of numbers {key.replace('images', 'features')}."
        elif array.ndim not in (3, 4):
            remedy = "Bring them into one of these shapes."
        raise DataError(
            f"Expected {key} in {source} to be uint8 or uint16 of shape (n, height, width) or (n, height, "
            f"width, channels), but got {array.dtype} of shape {array.shape}. {remedy}"
        )
    if array.dtype == np.uint16:
        warn_if_dark(int(array.max(initial=0)), f"{key} in {source}")
        array = to_uint8(array)
    images = torch.from_numpy(array)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _features(key: str, array: Any, source: str) -> Tensor:
    if array.dtype.kind not in "fiub" or array.ndim < 2:
        remedy = (
            _OBJECTS
            if array.dtype.kind == "O"
            else "Turn categories into numbers, one column each."
        )
        raise DataError(
            f"Expected {key} in {source} to be numbers of shape (n, features), but got {array.dtype} of "
            f"shape {array.shape}. {remedy}"
        )
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if not np.isfinite(narrow).all():
        rows = int((~np.isfinite(narrow)).reshape(len(narrow), -1).any(1).sum())
        raise DataError(
            f"Expected {key} in {source} to be finite in 32 bits, but {rows} of {len(narrow)} rows are not. "
            "Fill in what is missing, for example with numpy.nan_to_num, or leave those rows out."
        )
    if not np.can_cast(array.dtype, np.float32) and len(array):
        wide = np.moveaxis(array.astype(np.float64), 1, 0).reshape(array.shape[1], -1)
        error = np.abs(np.moveaxis(narrow, 1, 0).reshape(wide.shape) - wide).max(1)
        mean, std = wide.mean(1), wide.std(1)
        coarse = np.flatnonzero((error > 0.01 * std) & (std > 1e-10 * np.abs(mean)))
        if len(coarse):
            first = coarse[0]
            raise DataError(
                f"Expected {key} in {source} to vary by more than the resolution of 32 bits, but feature "
                f"{first} is {mean[first]:.6g} +- {std[first]:.2g}. Subtract its mean."
            )
    return torch.from_numpy(narrow)


def _tokens(key: str, array: Any, source: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim < 2:
        raise DataError(
            f"Expected {key} in {source} to be integers of shape (n, length), but got {array.dtype} of "
            f"shape {array.shape}. Pad sequences to one length, and number the tokens from 0."
        )
    if array.size and array.min() < 0:
        raise DataError(
            f"Expected {key} in {source} to be 0 or more, as indices into a vocabulary, but got "
            f"{array.min()}. Number the tokens from 0, with one of its own for padding."
        )
    return torch.from_numpy(array.astype(np.int64))


def _labels(key: str, held: Mapping[str, Any], source: str) -> Any:
    array = held[key]
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"Expected {key} in {source} to be strings in UTF-8, but got {error}. Write them with "
                ".astype(str)."
            ) from error
    if array.ndim != 1 or array.dtype.kind not in "biuU":
        remedy = "Samples with several labels each cannot be split into tasks by class."
        if array.dtype.kind == "O":
            remedy = _OBJECTS
        elif array.ndim == 1 and array.dtype.kind == "f" and bool((array == np.round(array)).all()):
            remedy = "Convert them with .astype('int64')."
        elif array.ndim == 1 and array.dtype.kind in "fc":
            remedy = (
                "Regression targets are not classes: discretize them, for example with "
                "numpy.digitize."
            )
        raise DataError(
            f"Expected {key} in {source} to be integers or strings of shape (n,) or (n, 1), one class per "
            f"sample, but got {held[key].dtype} of shape {held[key].shape}. {remedy}"
        )
    return array.astype(np.int64) if array.dtype.kind in "iu" else array
