"""The objects of a module by themselves: structure, cursor, early stopping, merged weights."""

from math import inf
from typing import Any

import pytest
import torch
from torch import nn

from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.model.cursor import Cursor
from bpn_lightning.model.early_stopping import PhaseEarlyStopping
from bpn_lightning.model.merged_weights import MergedWeights
from bpn_lightning.model.structure import Attachment, Structure
from bpn_lightning.preparation import Preparation
from bpn_lightning.tasks import Mask, Phase, Schedule, Task

# --- structure -----------------------------------------------------------------------------------

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
        {"attached": [{"part": "bias_units", "layer": "head", "rank": 0}]},
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


# --- cursor --------------------------------------------------------------------------------------


def planned() -> Cursor:
    cursor = Cursor()
    cursor.plan(
        Schedule(
            [[Phase("train", 3)], [Phase("warm_up", 1, trains="head"), Phase("train", 2)]],
        )
    )
    return cursor


def test_a_cursor_goes_through_tasks_and_phases() -> None:
    cursor = planned()
    assert (cursor.opened, cursor.closed, cursor.task) == (-1, -1, 0)
    cursor.open(0)
    cursor.consolidated.append("ewc")
    assert not cursor.enter("train")
    cursor.closed = 0
    cursor.open(1)
    assert (cursor.phase.name, cursor.consolidated) == ("warm_up", [])
    assert cursor.enter("train")
    assert cursor.phase == Phase("train", 2)
    assert [cursor.phase_of(epoch).name for epoch in range(6)] == [
        *("train", "train", "train", "warm_up", "train", "train"),
    ]


def test_epochs_that_may_end_a_tasks_training() -> None:
    cursor = planned()
    late = [cursor.may_end_training(epoch, early=False) for epoch in range(6)]
    assert late == [False, True, True, False, True, True]
    early = [cursor.may_end_training(epoch, early=True) for epoch in range(6)]
    assert early == [True, True, True, False, True, True]


def test_a_cursor_is_saved_and_loaded() -> None:
    cursor = planned()
    cursor.open(0)
    cursor.schedule.end_phase(1)
    cursor.closed, cursor.checked_epochs = 0, 2
    cursor.open(1)
    cursor.enter("train")
    cursor.consolidated.append("ewc")
    again = planned()
    again.load_state_dict(cursor.state_dict())
    assert again.state_dict() == cursor.state_dict()
    assert again.phase == cursor.phase
    assert again.schedule.total == 5

    alone = Cursor()  # of a module that is loaded without its run
    alone.load_progress(cursor.state_dict())
    assert (alone.opened, alone.closed, alone.schedule.total) == (1, 0, 1)

    other = Cursor()
    with pytest.raises(CheckpointError, match=r"phases of \[1\] epochs"):
        other.load_state_dict(cursor.state_dict())


# --- early stopping ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "losses", "ends"),
    [
        (1, [1.0, 0.5, 0.5], [False, False, True]),  # equal is no improvement
        (2, [1.0, 2.0, 0.5, 3.0, 3.0], [False, False, False, False, True]),
        (1, [float("nan")], [True]),
        (None, [1.0, 2.0, 3.0], [False, False, False]),
    ],
)
def test_a_phase_ends(patience: int | None, losses: list[float], ends: list[bool]) -> None:
    stopping = PhaseEarlyStopping(patience)
    assert [stopping.update(loss) for loss in losses] == ends
    again = PhaseEarlyStopping(patience)
    again.load_state_dict(stopping.state_dict())
    assert vars(again) == vars(stopping)
    stopping.reset()
    assert stopping.state_dict() == {"best_loss": inf, "bad_epochs": 0}


def test_patience_below_one_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="patience to be at least 1 epoch or null, but got 0"
    ):
        PhaseEarlyStopping(0)


# --- merged weights ------------------------------------------------------------------------------


def test_merged_weights_are_swapped_in_and_out() -> None:
    layer = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    merged = MergedWeights()
    merged.swap_out(layer)  # nothing to do
    merged.swap_in(layer, {"weight": torch.ones(2, 2)})
    assert torch.equal(layer.weight, torch.ones(2, 2))
    assert torch.equal(merged.training["weight"], before["weight"])
    merged.swap_out(layer)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert merged.training == {}
