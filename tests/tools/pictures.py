"""Runs without their pictures, which take half the time of a short one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["left_blank"]


@contextmanager
def left_blank() -> Iterator[None]:
    """Empty files in place of a run's pictures."""
    from bpn_lightning.run import drawing

    def touch(_: object, path: Path) -> None:
        for form in drawing.FORMATS:
            path.with_name(f"{path.name}.{form}").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save_figure", touch)
        yield
