"""What every command shows in the same way."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "is_utf8", "plain_warnings", "printable"]

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
