"""Runs that a module of tests makes once, and each test changes in a copy."""

import shutil
from pathlib import Path

import pytest

__all__ = ["work_in_a_copy"]


def work_in_a_copy(made: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy a folder with runs, and stand in it.

    Args:
        made: the folder.
        place: an empty one.
        monkeypatch: of the test.
    """
    shutil.copytree(made, place, dirs_exist_ok=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
