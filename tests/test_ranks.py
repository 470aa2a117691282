"""What the other tests run in several processes: a rank that fails is quoted, and no other waits for it."""

import os
from pathlib import Path

import pytest
import torch
from ranks import Ranks


def count(start: int) -> list[float]:
    total = torch.tensor([float(start + torch.distributed.get_rank())])
    torch.distributed.all_reduce(total)
    return [*total.tolist(), torch.distributed.get_world_size()]


def fail_in_rank_1(how: str) -> None:
    if torch.distributed.get_rank() == 1:
        if how == "exits":
            os._exit(7)
        raise ValueError("I would rather be alone.")
    torch.distributed.barrier()


def test_ranks_are_of_one_group(ranks: Ranks) -> None:
    assert ranks(count, 10) == [[21, 2]] * 2
    assert ranks(count, 10, number=3) == [[33, 3]] * 3
    assert ranks(count, 20) == [[41, 2]] * 2


@pytest.mark.matrix  # each failure ends the processes, and starting them takes seconds
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"In rank 1:\n(.|\n)*I would rather be alone"),
        ("exits", "Rank 1 ended with .* 7"),
    ],
)
def test_a_rank_that_fails_is_quoted(tmp_path: Path, how: str, message: str) -> None:
    ranks = Ranks(tmp_path)
    try:
        with pytest.raises(RuntimeError, match=message):
            ranks(fail_in_rank_1, how)
        assert ranks(count, 10) == [[21, 2]] * 2
    finally:
        ranks.stop()
