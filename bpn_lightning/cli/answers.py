"""Where the answers of ``bpn-predict`` go: lines of CSV or JSON as they come, or row groups of a Parquet file."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.nn.pretrained import import_extra

__all__ = ["FORMATS", "answer_file", "format_of", "without_formula"]

FIELDS = ("input", "class", "task", "confidence", "rejected")
FORMATS = ("csv", "jsonl", "parquet")
GROUP_ROWS = 2**16
"""Rows of a Parquet file that are held until they are written together."""

_FORMULA = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""What a spreadsheet takes for the beginning of a formula, after OWASP's "CSV injection"; wide forms of = + - @, too."""

Write = Callable[[Sequence[Sequence[Any]]], None]
"""Takes rows of :data:`FIELDS`: three texts, a float and a bool."""


def format_of(named: str | None, to: str | None) -> str:
    """The format that was asked for, or that the file's ending says; ``csv`` where neither does.

    Raises:
        ConfigurationError: a Parquet file, which is no text, has no name.
    """
    ending = Path(to or "").suffix.lower().removeprefix(".")
    found = named or (ending if ending in FORMATS else "csv")
    if found == "parquet" and to is None:
        raise ConfigurationError(
            "Expected --to where --format is parquet, which is no text to print, but got none. Name a file."
        )
    return found


def without_formula(name: str) -> str:
    """A name of somebody else's for a CSV cell, with a quote in front where a spreadsheet would compute it.

    Numbers are no danger, and stay what they are.

    >>> [without_formula(name) for name in ("cat", "=1+1", "-1", "-x")]
    ['cat', "'=1+1", '-1', "'-x"]
    """
    if name[:1] not in _FORMULA or _is_number(name):
        return name
    return f"'{name}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and text == text.strip()


def _path_without_formula(path: str) -> str:
    """Another name of the same file."""
    return f"./{path}" if path[:1] in _FORMULA else path


@contextmanager
def answer_file(kind: str, to: str | None) -> Iterator[Write]:
    """A function that writes rows to a new file, or prints them.

    What was written before an error or Ctrl-C is complete, and stays.

    Args:
        kind: one of :data:`FORMATS`.
        to: the file; None: standard output.

    Raises:
        ConfigurationError: the package for the format is not installed.
        ResultsError: the file exists, or cannot be written.
    """
    tables = (
        import_extra("pyarrow.parquet", "parquet", "Parquet files") if kind == "parquet" else None
    )
    if to is None:
        yield _lines(kind, sys.stdout)
        return
    try:
        if tables is not None:
            with open(to, "xb") as binary, _row_groups(binary, tables) as write:
                yield write
            return
        with open(to, "x", encoding="utf-8", newline="") as text:
            yield _lines(kind, text)
    except FileExistsError as error:
        raise ResultsError(
            f"Expected {to} to be a new file, but it exists. Name another one, or remove it."
        ) from error
    except OSError as error:
        raise ResultsError(
            f"Expected to write {to}, but got: {error.strerror}. Name a file in a folder that exists, free some space or "
            "grant write access."
        ) from error


def _lines(kind: str, file: TextIO) -> Write:
    table = csv.writer(file, lineterminator="\n")
    if kind == "csv":
        table.writerow(FIELDS)

    def write(rows: Sequence[Sequence[Any]]) -> None:
        for row in rows:
            if kind == "jsonl":
                file.write(json.dumps(dict(zip(FIELDS, row, strict=True))) + "\n")
            else:
                path, *names, confidence, rejected = row
                cells = [_path_without_formula(path), *map(without_formula, names)]
                table.writerow([*cells, f"{confidence:.6g}", str(rejected).lower()])
        file.flush()

    return write


@contextmanager
def _row_groups(file: Any, tables: Any) -> Iterator[Write]:
    pyarrow = import_extra("pyarrow", "parquet", "Parquet files")
    text = pyarrow.string()
    kinds = (text, text, text, pyarrow.float64(), pyarrow.bool_())
    schema = pyarrow.schema(list(zip(FIELDS, kinds, strict=True)))
    waiting: list[Sequence[Any]] = []
    # Its end writes the table of row groups, without which nobody could read them.
    with tables.ParquetWriter(file, schema) as table:

        def write_group() -> None:
            columns = [*zip(*waiting, strict=True)] if waiting else [()] * len(FIELDS)
            arrays = [pyarrow.array(c, k) for c, k in zip(columns, kinds, strict=True)]
            table.write_batch(pyarrow.record_batch(arrays, schema=schema))
            waiting.clear()

        def write(rows: Sequence[Sequence[Any]]) -> None:
            waiting.extend(rows)
            if len(waiting) >= GROUP_ROWS:
                write_group()

        try:
            yield write
        finally:
            if waiting:
                write_group()
