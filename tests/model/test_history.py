"""The curve, the metrics of the newest moment, and what a checkpoint keeps of both."""

import json
from typing import Literal

import pytest
import torch

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.settling import Unsettled
from bpn_lightning.model.history import History, stream_metrics
from bpn_lightning.nn import MLP
from bpn_lightning.tasks import Phase, Schedule


def module(every: Literal["task", "epoch"] = "task") -> ContinualModule:
    stream = SplitDigits(num_tasks=2, epochs_per_task=2)
    stream.setup()
    made = ContinualModule(MLP([2]), evaluate_every=every)
    made.attach(stream)
    made.host.cursor.plan(Schedule([[Phase("train", 2)], [Phase("train", 3)]]))
    return made


def test_a_curve_of_epochs_has_each_epoch_once() -> None:
    history = History("epoch")
    for epoch, value in ((0, 0.1), (1, 0.2), (1, 0.9), (2, float("nan"))):
        history.add_point(torch.tensor([value, 0.5]), 0, epoch)
    again = History("epoch")
    again.load_state_dict(json.loads(json.dumps(history.state_dict(right=0))))
    for one in (history, again):
        curve = one.curve(module("epoch").host)
        assert [point["epoch"] for point in curve] == [0, 1, 2]
        assert curve[1]["accuracy"] == pytest.approx([0.2, 0.5])
        assert curve[2]["accuracy"] == [None, 0.5]


def test_a_curve_of_tasks_is_the_accuracy_matrix() -> None:
    made = module()
    assert made.curve == []
    for moment in range(3):
        row = torch.tensor([moment / 10, moment / 5], dtype=torch.float64)
        made.accuracy_matrix.update(moment, row)
    made.host.cursor.begin_task(0)
    made.network.closed = 0
    made.host.cursor.begin_task(1)
    made.network.closed = 1
    assert made.curve == [
        {"epoch": 0, "task": 0, "accuracy": [0.0, 0.0]},
        {"epoch": 2, "task": 0, "accuracy": [0.1, 0.2]},
        {"epoch": 5, "task": 1, "accuracy": [0.2, 0.4]},
    ]


def test_lists_among_metrics_are_kept_of_the_newest_moment() -> None:
    history = History("task")
    history.add_metrics(0, {0: {"F1Score": 0.5, "each": [0.1, 0.9]}})
    history.add_metrics(1, {0: {"F1Score": 0.6, "each": [0.2, 0.8]}})
    history.add_metrics(1, {0: {"F1Score": 0.7, "each": [0.3, 0.7]}})  # after a failure in between
    assert history.metrics == [
        {"after": 0, "task": 0, "values": {"F1Score": 0.5}},
        {"after": 1, "task": 0, "values": {"F1Score": 0.7, "each": [0.3, 0.7]}},
    ]


def test_tasks_that_did_not_settle_are_kept_by_name() -> None:
    history = History("task")
    history.settling.unsettled.append(Unsettled(1, "val", 0.9, 0.5))
    state = history.state_dict(right=0)
    assert state["settling"]["unsettled"] == [
        {"task": 1, "split": "val", "before": 0.9, "after": 0.5}
    ]
    again = History("task")
    again.load_state_dict(state)
    assert again.settling.unsettled == history.settling.unsettled


@pytest.mark.parametrize(
    ("closed", "current_only", "names"),
    [
        (-1, False, {"accuracy/task_1", "accuracy/task_2"}),
        (-1, True, set()),
        (0, True, {"accuracy/current"}),
    ],
)
def test_metrics_between_two_tasks(closed: int, current_only: bool, names: set[str]) -> None:
    made = module()
    made.accuracy_matrix.update(0, torch.tensor([0.1, 0.2], dtype=torch.float64))
    made.accuracy_matrix.update(1, torch.tensor([0.9, 0.2], dtype=torch.float64))
    made.network.closed = closed
    found = stream_metrics(made.host, current_only)
    assert {name for name in found if name.startswith("accuracy/")} == names
    assert found["stream/tasks_learned"] == closed + 1


def test_an_unknown_moment_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'task' or 'epoch', but got 'step'"):
        History("step")  # type: ignore[arg-type]
