"""Checkpoint files: written atomically, and checked before they are used.

Checkpoints have Lightning's format, so ``trainer.fit(ckpt_path=...)`` reads them as well. The checksums
are those of the zip archive that torch writes, with a CRC-32 per record, which ``torch.load`` ignores.
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
from bpn_lightning.files.untrusted import is_bomb, open_untrusted, refuse_deflated
from bpn_lightning.files.writing import why_unreadable, write_atomically
from bpn_lightning.run.pickles import check_pickle

__all__ = ["AtomicCheckpointIO", "callback_state", "read_checkpoint"]

#: The maximum nesting depth of values, and their maximum number per byte of the file.
_DEEPEST = 200
_MOST_TIMES_LARGER = 100


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written by :func:`~bpn_lightning.files.writing.write_atomically`.

    Lightning's own plugin needs twice the size of the file in memory, and renames it before it is flushed
    to disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write to a temporary file, flush, rename; on remote file systems as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(path, partial(torch.save, checkpoint))
        except RuntimeError as error:
            # After a failed write, torch also fails when closing its archive.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after verifying all checksums; its tensors are memory-mapped.

    Raises:
        CheckpointError: it is damaged, truncated, or not a checkpoint.
    """
    try:
        with open_untrusted(path, max_bytes=None) as file, ZipFile(file) as archive:
            packed = refuse_deflated(file, archive)
            damaged = archive.testzip()
    except Exception as error:  # zipfile may raise any exception on a damaged file
        raise _unreadable(path, why_unreadable(error)) from error
    if damaged is not None:
        raise _unreadable(path, f"{damaged} does not match its checksum")
    try:
        check_pickle(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # so may torch, which also rejects code here
        raise _unreadable(path, why_unreadable(error)) from error
    if not isinstance(checkpoint, dict):
        raise _unreadable(path, f"it holds a {type(checkpoint).__name__}")
    if _unfolded(checkpoint, {}) > _MOST_TIMES_LARGER * packed:
        raise _unreadable(
            path, "its lists contain themselves, are nested too deeply, or repeat others too often"
        )
    unpacked = sum(one.numel() * one.element_size() for one in _tensors(checkpoint, set()))
    if is_bomb(packed, unpacked):
        raise _unreadable(path, f"its {packed:,} bytes hold tensors of {unpacked:,}")
    return checkpoint


def _unfolded(tree: Any, known: dict[int, float], depth: int = 0) -> float:
    """The number of values in nested mappings and lists, counting shared ones at each occurrence.

    Comparing, printing or copying visits this number. Infinite if a container contains itself.
    """
    if depth > _DEEPEST:
        return float("inf")
    if id(tree) not in known:
        known[id(tree)] = float("inf")  # found again before it is computed: it contains itself
        known[id(tree)] = 1 + sum(_unfolded(one, known, depth + 1) for one in _values(tree))
    return known[id(tree)]


def _tensors(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    """All distinct tensors in nested mappings and lists; those of stride 0 are larger than their data."""
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
        ]  # an OrderedDict's own method could be overridden
    return tree if isinstance(tree, list | tuple | set) else ()


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"Expected {path} to be a checkpoint, but it cannot be read: {reason}.")


def callback_state(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The state of a callback in a checkpoint; empty if there is none or it has another type."""
    callbacks = checkpoint.get("callbacks")
    state = callbacks.get(name) if isinstance(callbacks, Mapping) else None
    return state if isinstance(state, Mapping) else {}
