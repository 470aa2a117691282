"""What every command shows in the same way."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from typing import Any

__all__ = ["INTERRUPTED", "PIPE_CLOSED", "command", "is_utf8", "plain_warnings", "printable"]

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it."""


PIPE_CLOSED = 141
"""Exit status of a command whose reader ended first, as ``head`` does; as shells have it of SIGPIPE."""

_Main = Callable[[Sequence[str] | None], int]


def command(program: str) -> "Callable[[_Main], Callable[..., int]]":
    """Let a command end without a traceback where nothing takes what it prints.

    Quietly if whoever read it is gone, as in ``bpn-fit --list | head``; in one line if its disk is full.

    Args:
        program: the name of the command.
    """

    def decorate(main: _Main) -> Callable[..., int]:
        @wraps(main)
        def whole(argv: Sequence[str] | None = None) -> int:
            output: Any = _Output(sys.stdout)
            try:
                with redirect_stdout(output):
                    try:
                        status = main(argv)
                    finally:
                        output.flush()
            except (OSError, SystemExit):  # argparse prints its help, and exits
                if output.failure is None:
                    raise
            if output.failure is None:
                return status
            failure = output.failure
            # Python would write it once more when it exits.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(failure, BrokenPipeError):
                return PIPE_CLOSED
            print(
                f"{program}: error: Expected standard output to take what is printed, but got: "
                f"{failure.strerror}. Free space, or send it elsewhere.",
                file=sys.stderr,
            )
            return 2

        return whole

    return decorate


class _Output:
    """Standard output, which remembers why it did not take something."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        with self._remembered():
            written: int = self.stream.write(text)
        return written

    def flush(self) -> None:
        """Write what is kept."""
        with self._remembered():
            self.stream.flush()

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def plain_warnings(program: str) -> Iterator[None]:
    """Show warnings as one line each, without the place in the source that gave them.

    ``bpn-fit: warning: text``. Filters and whoever records warnings are not touched.

    Args:
        program: the name of the command.
    """

    def one_line(message: Warning | str, *_: object) -> str:
        return f"{program}: warning: {printable(' '.join(str(message).split()))}\n"

    before = warnings.formatwarning
    warnings.formatwarning = one_line  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before


def printable(text: object) -> str:
    r"""The text with whatever is no character to be seen as its escape.

    Names of files, folders and classes may hold sequences that move a terminal's cursor, set its title or
    turn the text around, and bytes that are no UTF-8, which cannot be printed at all. Ends of lines and
    tabulators stay.

    >>> printable("ant\x1b[31m\udcff")
    'ant\\x1b[31m\\udcff'
    """
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in str(text)
    )


def is_utf8(text: str) -> bool:
    r"""Whether a text can be written to a file; names of files may have bytes that cannot.

    >>> is_utf8("fourmi é"), is_utf8("ant\udcff")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
