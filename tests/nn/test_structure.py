"""What a module consists of is read as it was written, or refused."""

from typing import Any

import pytest

from bpn_lightning.errors import CheckpointError
from bpn_lightning.nn.structure import Attachment, Structure
from bpn_lightning.preparation import Preparation
from bpn_lightning.tasks import Mask, Task

TASKS = [Task(0, (0, 2), ("a", "b"), 3), Task(1, (2, 5), ("c", "d", "e"), 1)]


def structure(mask: Mask = "all") -> Structure:
    return Structure(
        mask=mask,
        tasks=TASKS,
        num_classes=5,
        input_shape=(1, 4, 4),
        preparations=[Preparation(2, "float32", (1, 4, 4), [])],
        attached=[
            Attachment("bias_units", {"layer": "head", "rank": 2}),
            Attachment("weight_bank", {}),
        ],
    )


def test_a_structure_is_read_as_it_was_written() -> None:
    record = structure().record()
    assert Structure.read(record) == structure()
    assert Structure.read(record).record() == record


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": []},
        {"tasks": [{"id": 0}]},
        {"input_shape": 3},
        {"input_dtype": "object"},
        {"preparations": []},
        {"attached": [["bias_units", "head", 2]]},
        {"attached": [{"part": "bias_units", "layer": "head"}]},
        {"attached": [{"part": "bias_units", "layer": "head", "rank": -1}]},
        {"attached": [{"part": "low_rank", "layer": "backbone.1", "rank": 0}]},
        {"attached": [{"part": "bias_units", "layer": "head", "rank": True}]},
        {"attached": [{"part": "keys", "layer": "head", "kind": 1}]},
        {"attached": [{"part": "eval"}]},
    ],
    ids=str,
)
def test_a_structure_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"The file is damaged or made up\."):
        Structure.read(structure().record() | change)


@pytest.mark.parametrize(
    ("mask", "opened", "columns", "sets"),
    [
        ("all", 0, [(0, 5), (0, 5)], {(0, 5)}),
        ("seen", -1, [(0, 5), (0, 5)], {(0, 2), (0, 5)}),
        ("seen", 0, [(0, 2), (0, 2)], {(0, 2), (0, 5)}),
        ("seen", 1, [(0, 5), (0, 5)], {(0, 2), (0, 5)}),
        ("task", 0, [(0, 2), (2, 5)], {(0, 2), (2, 5)}),
    ],
)
def test_output_units_of_a_mode(
    mask: Mask, opened: int, columns: list[tuple[int, int]], sets: set[tuple[int, int]]
) -> None:
    made = structure(mask)
    assert [made.columns(task, opened) for task in (0, 1)] == columns
    assert made.column_sets() == sets
