"""What helps where a data set's files lie near the place where they are looked for."""

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
    """What to do about missing files that are there, packed or in another folder; empty if none is.

    Looked at are the right folder, those between it and the root, and the same place below folders that
    hold the root: data sets that share the names of their files are not mixed up.

    Args:
        root: the folder of data sets, as it was given.
        folder: where the files belong, below the root.
        missing: the names of files that are not there.
        archives: names of the packed files that they come out of.
        others: further folders to look at.
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
