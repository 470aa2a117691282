"""What every command shows in the same way."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "plain_warnings"]

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""


@contextmanager
def plain_warnings(program: str) -> Iterator[None]:
    """Show warnings as one line each, without the place in the source that gave them.

    ``bpn-fit: warning: text``. Filters and whoever records warnings are not touched.

    Args:
        program: the name of the command.
    """

    def one_line(message: Warning | str, *_: object) -> str:
        return f"{program}: warning: {' '.join(str(message).split())}\n"

    before = warnings.formatwarning
    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before
