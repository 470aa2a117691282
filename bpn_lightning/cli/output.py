"""Messages of ``bpn-fit``, and suppression of Lightning's hints."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from bpn_lightning.terminal import plain_warnings, printable
from bpn_lightning.trainer.lightning import is_first_process

__all__ = ["notify", "quiet_lightning"]


def notify(line: str) -> None:
    """Print one line for the user, on the first process only."""
    if is_first_process():
        print(f"bpn-fit: {printable(line)}", file=sys.stderr)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's hints about hardware and products, and three of its warnings."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), plain_warnings("bpn-fit"):
            # Between Lightning and torch; users cannot fix it.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            # The interval counts updates over the whole stream, so short epochs are not a problem.
            warnings.filterwarnings("ignore", ".*is smaller than the logging interval")
            # An error is raised instead.
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
