"""Files of tensors with their sizes and hashes: what is read is what was written."""

import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from bpn_lightning.files.untrusted import open_untrusted
from bpn_lightning.files.writing import write_atomically

__all__ = [
    "is_named_by_hash",
    "read_named",
    "read_tensors",
    "stamp_of",
    "write_named",
    "write_tensors",
]

_BY_HASH = re.compile(r"[a-z_]+-[0-9a-f]{16}\.safetensors")


def read_tensors(path: Path, sums: Mapping[str, Any], root: Path) -> dict[str, Tensor]:
    """Tensors of a file that has to be the one that was written."""
    size, wanted = sums["bytes"], sums["sha256"]
    with open_untrusted(path, max_bytes=None, within=root) as file:
        there = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if type(size) is int and size == there else b""
    if len(content) != size or sha256(content).hexdigest() != wanted:
        raise ValueError(
            f"{path.name} of {path.parent.name} that is not the file of {size!r:.20} bytes that was written: it "
            "was truncated or changed, perhaps while it was read"
        )
    found: dict[str, Tensor] = parse_tensors(content)
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors; returns size and hash of the file."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    content = tensor_bytes(plain)
    write_atomically(path, content)
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def is_named_by_hash(name: str) -> bool:
    """Whether a file is one of :func:`write_named`."""
    return _BY_HASH.fullmatch(name) is not None


def write_named(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors next to an earlier file, under a name with their hash; returns it with size and hash."""
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    sums = write_tensors(temporary, tensors)
    named = f"{Path(name).stem}-{sums['sha256'][:16]}.safetensors"
    temporary.replace(folder / named)
    return {"name": named, **sums}


def read_named(folder: Path, name: str, sums: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the file that a record knows as ``name``, which may have a hash in its name by now."""
    named = sums.get("name", name)
    if named != name and not is_named_by_hash(str(named)):
        raise ValueError(f"a file {named!r:.80} for {name}")
    return read_tensors(folder / named, sums, folder)


def stamp_of(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Name, inode, time and size of each file of a folder; a file that changes, changes one of them."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat()) for entry in entries]
    return tuple(sorted((n, s.st_ino, s.st_mtime_ns, s.st_size) for n, s in found))
