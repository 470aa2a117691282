"""Files that are either whole or not there."""

import os
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no reader, and no crash, ever meets half of it.

    The bytes go to ``.<name>.tmp`` in the same folder, reach the disk, and take the final name in
    one step. What a crash leaves behind is the earlier file, and at most one such temporary file
    that the next write replaces.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
