"""Of a matrix, what stands for the other cells has each value of each side."""

from itertools import product
from typing import Any

import pytest
from matrices import representatives


def of(*sides: Any) -> list[dict[int, Any]]:
    return [dict(enumerate(cell)) for cell in product(*sides)]


@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (4, 4, 2), (1, 5)], ids=str)
def test_of_a_product_as_many_as_its_longest_side(sides: tuple[int, ...]) -> None:
    cells = of(*map(range, sides))
    chosen = [cells[index] for index in representatives(cells)]
    assert len(chosen) == max(sides)
    for side, length in enumerate(sides):
        assert {cell[side] for cell in chosen} == set(range(length))


def test_of_one_list_all() -> None:
    assert representatives(of("abc")) == {0, 1, 2}


def test_where_the_product_has_gaps_no_value_is_left_out() -> None:
    cells = [cell for cell in of(range(4), range(4)) if cell[0] <= cell[1]]
    chosen = [cells[index] for index in representatives(cells)]
    assert [{cell[side] for cell in chosen} for side in (0, 1)] == [set(range(4))] * 2


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("other", [0, 1])
def test_of_two_lists_one_diagonal_is_not_marked(
    request: pytest.FixtureRequest, side: int, other: int
) -> None:
    assert bool(request.node.get_closest_marker("matrix")) == (side != other)


@pytest.mark.parametrize(("side", "other"), [(0, 0), (0, 1), (1, 1), (1, 0)])
def test_no_row_of_one_list_is_marked(
    request: pytest.FixtureRequest, side: int, other: int
) -> None:
    assert not request.node.get_closest_marker("matrix")
