"""What every command does about errors, Ctrl-C, and output that cannot be written."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from typing import Any

from bpn_lightning.errors import BPNLightningError
from bpn_lightning.terminal import plain_warnings

__all__ = ["INTERRUPTED", "PIPE_CLOSED", "USAGE_ERROR", "entry_point"]

USAGE_ERROR = 2
"""Exit status of a command that cannot do what it is asked to; argparse's as well."""

INTERRUPTED = 130
"""Exit status of a command that was interrupted by Ctrl-C, as in shells."""

PIPE_CLOSED = 141
"""Exit status of a command whose reader has closed the pipe, such as ``head``; as in shells for SIGPIPE."""


def entry_point(
    program: str, interrupted: str = ""
) -> "Callable[[Callable[[Sequence[str]], int]], Callable[..., int]]":
    """Make a command of a function: one line for an error of this package, and for Ctrl-C.

    Output that cannot be written ends it without a traceback: silently if the reader has closed the pipe,
    as in ``bpn-fit --list | head``; with one line if the disk is full. Warnings take one line each.

    Args:
        program: the name of the command.
        interrupted: what to say after Ctrl-C of what was done.
    """

    def decorate(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
        @wraps(main)
        def whole(argv: Sequence[str] | None = None) -> int:
            output: Any = _Output(sys.stdout)
            try:
                with redirect_stdout(output), plain_warnings(program):
                    try:
                        status = main(list(sys.argv[1:] if argv is None else argv))
                    except BPNLightningError as error:
                        print(f"{program}: error: {error}", file=sys.stderr)
                        status = USAGE_ERROR
                    except KeyboardInterrupt:
                        print(f"{program}: Interrupted. {interrupted}".rstrip(), file=sys.stderr)
                        status = INTERRUPTED
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
            return USAGE_ERROR

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
