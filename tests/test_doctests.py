"""The examples in docstrings print what they say, wherever the package is installed from."""

import doctest
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

ROOMS = ("bpn_lightning", "bpn_lightning.strategies", "bpn_lightning.datamodules")


def modules_with_examples() -> list[str]:
    found = []
    for room in ROOMS:
        folder = files(room)
        assert isinstance(folder, Path)
        for path in sorted(folder.rglob("*.py")):
            parts = [room, *path.relative_to(folder).with_suffix("").parts]
            if ">>> " in path.read_text(encoding="utf-8"):
                found.append(".".join(parts).removesuffix(".__init__"))
    return sorted(set(found))  # a wheel has the two rooms below the root as well


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples(module: str) -> None:
    result = doctest.testmod(
        import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.attempted > 0
    assert result.failed == 0
