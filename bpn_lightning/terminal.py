"""Terminal output shared by all commands."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from typing import Any

__all__ = ["INTERRUPTED", "PIPE_CLOSED", "command", "is_utf8", "plain_warnings", "printable"]

INTERRUPTED = 130
"""Exit status of a command that was interrupted by Ctrl-C, as in shells."""


PIPE_CLOSED = 141
"""Exit status of a command whose reader has closed the pipe, such as ``head``; as in shells for SIGPIPE."""

_Main = Callable[[Sequence[str] | None], int]


def command(program: str) -> "Callable[[_Main], Callable[..., int]]":
    """End a command without a traceback if its output cannot be written.

    Silently if the reader has closed the pipe, as in ``bpn-fit --list | head``; with one line if the disk
    is full.

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
            except (OSError, SystemExit):  # argparse prints its help and exits
                if output.failure is None:
                    raise
            if output.failure is None:
                return status
            failure = output.failure
            # Otherwise Python would try to write it again at exit.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(failure, BrokenPipeError):
                return PIPE_CLOSED
            print(
                f"{program}: error: Expected to write to standard output, but got: "
                f"{failure.strerror}. Free some space, or redirect the output.",
                file=sys.stderr,
            )
            return 2

        return whole

    return decorate


class _Output:
    """Standard output that stores the error of a failed write."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with self._remembered():
            written: int = self.stream.write(text)
        return written

    def flush(self) -> None:
        """Flush the buffer."""
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
    """Show each warning as one line, ``bpn-fit: warning: text``, without its location in the source.

    Filters and recorded warnings are not affected.

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
    r"""Escape all characters that are not printable, except line ends and tabs.

    Names of files, folders and classes may contain sequences that move a terminal's cursor, set its title
    or reverse the text, and bytes that are not UTF-8 and cannot be printed.

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
    r"""Whether a text can be encoded as UTF-8; file names may contain bytes that cannot.

    >>> is_utf8("fourmi é"), is_utf8("ant\udcff")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
