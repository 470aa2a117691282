"""A table as Markdown and as CSV."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO

from bpn_lightning.analysis.statistics import Interval

__all__ = ["Table"]

Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Table:
    """Named columns, and rows of texts, numbers and intervals; None is a dash.

    Args:
        columns: names.
        rows: one cell for each column.
        digits: after the point of a number, in Markdown; CSV has them all.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 3

    def markdown(self) -> str:
        """A pipe table; what could be taken for a column's end is escaped."""
        rows = ([self._text(cell) for cell in row] for row in self.rows)
        lines = [self.columns, ["---"] * len(self.columns), *rows]
        cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def csv(self) -> str:
        """Comma-separated; a column of intervals is followed by one of their half widths."""
        wide = [
            any(isinstance(row[index], Interval) for row in self.rows)
            for index in range(len(self.columns))
        ]
        names = [
            [name, f"{name}, ±"] if w else [name]
            for name, w in zip(self.columns, wide, strict=True)
        ]
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([name for pair in names for name in pair])
        for row in self.rows:
            writer.writerow(list(_values(row, wide)))
        return text.getvalue()

    def _text(self, cell: Cell) -> str:
        if cell is None:
            return "-"
        if isinstance(cell, Interval):
            return cell.text(self.digits)
        if isinstance(cell, float):
            return f"{cell:.{self.digits}f}"
        return f"{cell:,}" if isinstance(cell, int) else cell


def _values(row: Sequence[Cell], wide: Sequence[bool]) -> Iterator[object]:
    for cell, has_width in zip(row, wide, strict=True):
        if isinstance(cell, Interval):
            yield cell.mean
            yield cell.half
        else:
            yield cell
            if has_width:
                yield None
