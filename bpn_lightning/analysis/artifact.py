"""One thing that a report shows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bpn_lightning.analysis.table import Table
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.run.drawing import save_figure

__all__ = ["Artifact", "seeds_text", "slug"]


@dataclass(frozen=True)
class Artifact:
    """A table and its picture.

    Args:
        name: of its files.
        title: one line.
        caption: what is seen, in plain words.
        table: the numbers.
        figure: the picture; None where there is nothing to draw yet.
        data: what the CSV has; None where it has the table.
        places: whose accuracies it compares.
        missing: what they lack for a claim, or "".
    """

    name: str
    title: str
    caption: str
    table: Table
    figure: Figure | None = None
    data: Table | None = None
    places: Sequence[str] = ()
    missing: str = ""

    def markdown(self, picture: str = "") -> str:
        """Title, picture, table and caption.

        Args:
            picture: path of the PNG from where the text stands; none is shown without it.
        """
        image = [f"![{self.title}]({picture})"] if picture and self.figure else []
        said = filter(None, [self.caption, self.missing])
        return "\n\n".join([f"### {self.title}", *image, self.table.markdown(), *said])

    def write(self, folder: Path) -> None:
        """Write the ``.md``, ``.csv``, ``.png`` and ``.svg``, each in one step."""
        text = self.markdown(f"{self.name}.png") + "\n"
        write_atomically(folder / f"{self.name}.md", text.encode())
        write_atomically(folder / f"{self.name}.csv", (self.data or self.table).csv().encode())
        if self.figure is not None:
            save_figure(self.figure, folder / self.name)


def slug(text: str) -> str:
    """A file's name out of a title."""
    letters = (letter if letter.isalnum() else "_" for letter in text.replace(", ", "_"))
    return "".join(letters).lower()


def seeds_text(seeds: Iterable[int]) -> str:
    """For captions: which seeds, and what the numbers of several are."""
    known = sorted(set(seeds))
    if len(known) < 2:
        return f"seed {known[0]}" if known else "no runs yet"
    return f"seeds {', '.join(map(str, known))}: mean and 95 % interval"
