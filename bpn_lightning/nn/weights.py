"""Weights from files that may come from anywhere: tensors and nothing else, whose names and shapes have to fit."""

import re
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bpn_lightning.errors import DataError
from bpn_lightning.files.untrusted import check_untrusted, open_untrusted, refuse_deflated
from bpn_lightning.files.writing import why_unreadable

__all__ = ["digest_tensors", "hash_of", "load_weights", "other_network", "read_state_dict"]

#: As torch.hub names files: by the first digits of their SHA-256 hash.
_NAMED_BY_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")

_SHOWN = 3
"""Names of each kind in a message."""


def read_state_dict(path: Path, advice: str) -> dict[str, Tensor]:
    """Weights from a file of ``torch.save`` or safetensors; nothing but tensors is loaded from it.

    Args:
        path: where it lies. If its name ends in the first digits of its SHA-256 hash, as torchvision's do
            (``resnet18-f37072fd.pth``), the hash is checked.
        advice: what to do instead, for the message.

    Raises:
        DataError: the file is missing, damaged, has another hash, or holds something else.
    """
    try:
        _check_hash(path, advice)
        state = load_file(check_untrusted(path)) if path.suffix == ".safetensors" else _load(path)
    except DataError:
        raise
    # Missing, not readable, damaged, or with code in it: OSError, RuntimeError, UnpicklingError ...
    except Exception as error:
        raise DataError(
            f"Expected weights_file to be a file of weights, but reading {path} failed with "
            f"{type(error).__name__}: {why_unreadable(error)}. {advice}"
        ) from error
    tensors = state.values() if isinstance(state, Mapping) else [None]
    if not all(isinstance(value, Tensor) for value in tensors):
        raise DataError(
            f"Expected {path} to hold tensors by name, but got another kind of content. {advice}"
        )
    return dict(state)


def _load(path: Path) -> Any:
    with open_untrusted(path, max_bytes=None) as file:
        if is_zipfile(file):  # torch had another format once, which many weights still have
            with ZipFile(file) as archive:
                refuse_deflated(file, archive)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_hash(path: Path, advice: str) -> None:
    named = _NAMED_BY_HASH.search(path.name)
    if named is None:
        return
    digest = sha256()
    with open_untrusted(path, max_bytes=None) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(named[1]):
        raise DataError(
            f"Expected {path} to have the SHA-256 hash that its name begins with, {named[1]}, but got "
            f"{digest.hexdigest()}. The file is damaged or another one: download it again. {advice}"
        )


def load_weights(network: nn.Module, found: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Load weights into a network that has exactly these.

    Args:
        network: takes the weights.
        found: from a file.
        what: the file and whose weights it should hold, for the message: ``"a.pth to hold those of x"``.
        advice: what to do instead, for the message.

    Raises:
        DataError: names are missing or unknown, or shapes differ; the message has the first of each.
    """
    kept = network.state_dict()
    shapes = {
        key: (tuple(found[key].shape), tuple(value.shape))
        for key, value in kept.items()
        if key in found and found[key].shape != value.shape
    }
    if kept.keys() != found.keys() or shapes:
        raise other_network(
            what, kept.keys() - found.keys(), found.keys() - kept.keys(), shapes, advice
        )
    network.load_state_dict(found)


def other_network(
    what: str,
    missing: Collection[str],
    unknown: Collection[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    advice: str,
) -> DataError:
    """The error for weights of another network, with the keys that differ.

    Args:
        what: as of :func:`load_weights`.
        missing: names that the network has and the file has not.
        unknown: names that the file has and the network has not.
        shapes: by name the shape in the file, and that of the network.
        advice: what to do instead.
    """
    said = []
    if missing:
        said.append(f"without {_first(sorted(missing))}")
    if unknown:
        said.append(f"with {_first(sorted(unknown))}, which it has not")
    if shapes:
        key = min(shapes)
        more = f", and {len(shapes) - 1} more of another shape" if len(shapes) > 1 else ""
        said.append(f"with {key!r} of shape {shapes[key][0]} instead of {shapes[key][1]}{more}")
    return DataError(
        f"Expected {what}, but got weights of another network: {'; '.join(said)}. {advice}"
    )


def _first(names: list[str]) -> str:
    shown = ", ".join(f"{name!r:.120}" for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def digest_tensors(update: Callable[[bytes], object], tensors: Mapping[str, Tensor]) -> None:
    """Feed a hash with the names, types, shapes and bits of tensors, in the order of their names."""
    for name, value in sorted(tensors.items()):
        update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        update(bits.numpy().tobytes())


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 hash of tensors by name: of names, types, shapes and bits, not of a file."""
    digest = sha256()
    digest_tensors(digest.update, tensors)
    return digest.hexdigest()
