"""Text that a terminal shows as it is, and warnings in one line."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_utf8", "plain_warnings", "printable"]


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
