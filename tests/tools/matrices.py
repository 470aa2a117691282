"""Which cells of a matrix stand for the others: a test with several parameters has one for each of them."""

from collections.abc import Hashable, Mapping, Sequence


def representatives(cells: Sequence[Mapping[Hashable, Hashable]]) -> set[int]:
    """Indices of cells that together have each value of each parameter, about as few as can be.

    Args:
        cells: the value of each parameter, for each cell.

    Each next cell has the most values that no earlier one has. Of a whole product with sides of a and b
    values, this leaves max(a, b) cells; of a single list, all.
    """
    chosen: set[int] = set()
    values = [set(cell.items()) for cell in cells]
    missing = set().union(*values)
    while missing:
        best = max(range(len(cells)), key=lambda index: len(values[index] & missing))
        chosen.add(best)
        missing -= values[best]
    return chosen
