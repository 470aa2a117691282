"""A cursor goes through a schedule, and is saved and loaded."""

import pytest
from torch import nn

from bpn_lightning.errors import CheckpointError
from bpn_lightning.model.cursor import Cursor
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.tasks import Phase, Schedule


def planned() -> Cursor:
    cursor = Cursor(ContinualNetwork(nn.Flatten()))
    cursor.plan(
        Schedule(
            [[Phase("train", 3)], [Phase("warm_up", 1, trains="head"), Phase("train", 2)]],
        )
    )
    return cursor


def test_a_cursor_goes_through_tasks_and_phases() -> None:
    cursor = planned()
    assert (cursor.network.opened, cursor.network.closed, cursor.task) == (-1, -1, 0)
    cursor.begin_task(0)
    cursor.consolidated.append("ewc")
    assert not cursor.begin_phase("train")
    cursor.network.closed = 0
    cursor.begin_task(1)
    assert (cursor.phase.name, cursor.consolidated) == ("warm_up", [])
    assert cursor.begin_phase("train")
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


def test_progress_counts_updates_of_the_whole_network() -> None:
    """Tasks of 3 epochs, and of 1 of the head and 2, of 4 updates each."""
    cursor = planned()
    cursor.updates_per_epoch = [4, 4]
    cursor.begin_task(0)
    seen = []
    for _ in range(13):
        seen.append(cursor.task_progress)
        cursor.count_update()
    assert seen == [*(n / 12 for n in range(13))]
    assert cursor.task_progress == 1  # an update too many
    cursor.begin_task(1)
    cursor.count_update()
    assert cursor.task_progress == 0
    cursor.begin_phase("train")
    cursor.count_update()
    assert cursor.task_progress == 1 / 8
    cursor.schedule.end_phase(4)
    assert cursor.task_progress == 1 / 4


def test_a_cursor_is_saved_and_loaded() -> None:
    cursor = planned()
    cursor.begin_task(0)
    cursor.schedule.end_phase(1)
    cursor.network.closed, cursor.checked_epochs = 0, 2
    cursor.begin_task(1)
    cursor.begin_phase("train")
    cursor.consolidated.append("ewc")
    cursor.updates = 7
    again = planned()
    again.load_state_dict(cursor.state_dict())
    assert again.state_dict() == cursor.state_dict()
    assert again.phase == cursor.phase
    assert again.schedule.total == 5

    alone = Cursor(ContinualNetwork(nn.Flatten()))  # of a module that is loaded without its run
    alone.load_progress(cursor.state_dict())
    assert (alone.network.opened, alone.network.closed, alone.schedule.total) == (1, 0, 1)

    other = Cursor(ContinualNetwork(nn.Flatten()))
    with pytest.raises(CheckpointError, match=r"phases of \[1\] epochs"):
        other.load_state_dict(cursor.state_dict())
