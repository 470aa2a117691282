"""Remedies for data sets whose files are near the expected location."""

import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["misplaced_hint"]


def misplaced_hint(
    root: Path,
    folder: Path,
    missing: Sequence[str],
    archives: Sequence[str],
    others: Sequence[Path],
) -> str:
    """How to fix missing files that are packed or in another folder; empty if they are not found.

    Searches the expected folder, the folders between it and the root, and the same location below the
    parents of the root, so that data sets with equal file names are not confused.

    Args:
        root: the configured folder of data sets.
        folder: the expected folder of the files, below the root.
        missing: the names of the missing files.
        archives: the names of the archives that contain them.
        others: additional folders to search.
    """
    inner = folder.relative_to(root)
    between = [one for one in folder.parents if root in (one, *one.parents)]
    above = {one / inner: one for one in list(root.parents)[: len(inner.parts)]}
    for place in (folder, *between, *others, *above):
        if missing and place != folder and all((place / name).is_file() for name in missing):
            if place in above:
                return f"They are in {place}: set the root with `--data.init_args.root {_word(above[place])}`."
            return f"They are in {place}: move them to {folder}."
        packed = [
            name
            for name in archives
            if (place / name).is_file() and (name.endswith(".tar.gz") or name[:-3] in missing)
        ]
        if packed and missing:
            first = "" if place == folder else f"move them to {folder} and "
            command = f"gunzip -k {_word(folder)}/*.gz"
            if packed[0].endswith(".tar.gz"):
                first = ""
                command = f"tar -xzf {_word(place / packed[0])} -C {_word(folder.parent)}"
            return f"{', '.join(packed)} are in {place}: {first}unpack them with `{command}`."
    return ""


def _word(path: Path) -> str:
    return shlex.quote(str(path))
