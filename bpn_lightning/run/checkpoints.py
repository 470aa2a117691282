"""Checkpoint files: written whole, and checked before they are used.

A checkpoint is an ordinary one of Lightning, so ``trainer.fit(ckpt_path=...)`` reads it as well. The
checksum is the one that is in there anyway: torch writes a zip archive with a CRC-32 of every record,
which ``torch.load`` does not look at.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from bpn_lightning.errors import CheckpointError
from bpn_lightning.files import why_unreadable, write_atomically
from bpn_lightning.run.pickles import check_pickle
from bpn_lightning.untrusted import is_bomb, open_untrusted, refuse_deflated

__all__ = ["AtomicCheckpointIO", "callback_state", "read_checkpoint"]

#: How deep values nest at most, and how many they are for each byte of the file.
_DEEPEST = 200
_MOST_TIMES_LARGER = 100


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written by :func:`~bpn_lightning.files.write_atomically`.

    Lightning's own keep the whole file in memory twice while they write it, and rename it before it
    has reached the disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write it to a temporary name, flush, rename; elsewhere than on disk as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(path, partial(torch.save, checkpoint))
        except RuntimeError as error:
            # Torch closes its archive after a failed write, and fails in that.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after a look at every record's checksum; its tensors stay on disk.

    Raises:
        CheckpointError: it is damaged, cut off, or something else than a checkpoint.
    """
    try:
        with open_untrusted(path, max_bytes=None) as file, ZipFile(file) as archive:
            packed = refuse_deflated(file, archive)
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises whatever the damage leads it to
        raise _unreadable(path, why_unreadable(error)) from error
    if damaged is not None:
        raise _unreadable(path, f"{damaged} does not match its checksum")
    try:
        check_pickle(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # and so does torch, which finds code here, too
        raise _unreadable(path, why_unreadable(error)) from error
    if not isinstance(checkpoint, dict):
        raise _unreadable(path, f"it holds a {type(checkpoint).__name__}")
    if _unfolded(checkpoint, {}) > _MOST_TIMES_LARGER * packed:
        raise _unreadable(
            path, "its lists hold themselves, nest too deeply, or repeat others too often"
        )
    unpacked = sum(one.numel() * one.element_size() for one in _tensors(checkpoint, set()))
    if is_bomb(packed, unpacked):
        raise _unreadable(path, f"its {packed:,} bytes hold tensors of {unpacked:,}")
    return checkpoint


def _unfolded(tree: Any, known: dict[int, float], depth: int = 0) -> float:
    """How many values nested mappings and lists have, counting again those that stand in several places.

    Whoever compares, prints or copies them goes through as many. Infinite if they hold themselves.
    """
    if depth > _DEEPEST:
        return float("inf")
    if id(tree) not in known:
        known[id(tree)] = float("inf")  # until it is known, it holds itself
        known[id(tree)] = 1 + sum(_unfolded(one, known, depth + 1) for one in _values(tree))
    return known[id(tree)]


def _tensors(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in nested mappings and lists, once; one of stride 0 is larger than what is saved of it."""
    if id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, Tensor):
        yield tree
    for value in _values(tree):
        yield from _tensors(value, seen)


def _values(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        return [
            *dict.keys(tree),
            *dict.values(tree),
        ]  # of an OrderedDict, whose own could be replaced
    return tree if isinstance(tree, list | tuple | set) else ()


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"Expected {path} to be a checkpoint, but it cannot be read: {reason}.")


def callback_state(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a callback saved in a checkpoint; empty where there is none, or something else."""
    callbacks = checkpoint.get("callbacks")
    state = callbacks.get(name) if isinstance(callbacks, Mapping) else None
    return state if isinstance(state, Mapping) else {}
