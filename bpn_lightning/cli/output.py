"""What ``bpn-fit`` prints besides its progress: lines for the user, and none of Lightning's hints."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from bpn_lightning.terminal import plain_warnings, printable
from bpn_lightning.trainer.lightning import is_first_process

__all__ = ["notify", "quiet_lightning"]


def notify(line: str) -> None:
    """Print one line for the user, by the first process only."""
    if is_first_process():
        print(f"bpn-fit: {printable(line)}", file=sys.stderr)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's hints about hardware and products off, its warnings on but for three."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), plain_warnings("bpn-fit"):
            # Between Lightning and torch, and nothing that a user could fix.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            # Updates are counted over the whole stream: an epoch need not be as long as the interval.
            warnings.filterwarnings("ignore", ".*is smaller than the logging interval")
            # Refused in the place of it.
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
