"""The metrics against figures worked out by hand, against NumPy loops, and across processes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.accuracy_matrix import (
    AccuracyMatrix,
    accuracy_after_learning,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learned_part,
    retention,
    tasks_learned,
)

NAN = float("nan")

# Three tasks, every figure chosen so that the sums below are easy.
HAND = torch.tensor(
    [
        [0.50, 0.40, 0.30],  # before training
        [0.90, 0.50, 0.40],  # after task 1
        [0.60, 0.80, 0.60],  # after task 2
        [0.50, 0.90, 0.70],  # after task 3
    ],
    dtype=torch.float64,
)


def filled(values: torch.Tensor) -> AccuracyMatrix:
    matrix = AccuracyMatrix(values.shape[1])
    for row, accuracies in enumerate(values):
        matrix.update(row, accuracies)
    return matrix


@pytest.fixture
def matrix() -> AccuracyMatrix:
    return filled(HAND)


def test_by_hand() -> None:
    # (.5 + .9 + .7) / 3 = 2.1 / 3
    assert average_accuracy(HAND).item() == pytest.approx(0.7)
    assert retention(HAND).item() == 0.5
    assert retention(HAND, task_id=2).item() == 0.7
    assert accuracy_after_learning(HAND).tolist() == [0.9, 0.8, 0.7]
    # ((.5 - .9) + (.9 - .8)) / 2 = (-.4 + .1) / 2
    assert backward_transfer(HAND).item() == pytest.approx(-0.15)
    # task 2: .5 - .4 = .1; task 3: .6 - .3 = .3
    assert forward_transfer(HAND).item() == pytest.approx(0.2)
    # task 1: max(.9, .6) - .5 = .4; task 2: max(.5, .8) - .9 = -.1
    assert forgetting(HAND).item() == pytest.approx(0.15)
    # (1 - .9 + 1 - .8 + 1 - .7) / 3 = .6 / 3
    assert intransigence(HAND, torch.ones(3)).item() == pytest.approx(0.2)


def test_forgetting_looks_for_the_best_moment_not_the_first() -> None:
    values = torch.tensor([[0.1, 0.1, 0.1], [0.6, 0.1, 0.1], [0.9, 0.7, 0.1], [0.5, 0.7, 0.8]])
    # BWT starts from the diagonal: (.5 - .6 + .7 - .7) / 2; forgetting from the peak: (.9 - .5 + 0) / 2
    assert backward_transfer(values).item() == pytest.approx(-0.05)
    assert forgetting(values).item() == pytest.approx(0.2)


@pytest.mark.parametrize("tasks", [2, 3, 7, 20])
@pytest.mark.parametrize("seed", range(3))
def test_against_loops(tasks: int, seed: int) -> None:
    values = np.random.default_rng(seed).random((tasks + 1, tasks))
    r = {(i, j): values[i, j - 1] for i in range(tasks + 1) for j in range(1, tasks + 1)}
    before_last = range(1, tasks)
    reference = np.random.default_rng(seed + 100).random(tasks)
    expected = {
        average_accuracy: np.mean([r[tasks, j] for j in range(1, tasks + 1)]),
        backward_transfer: np.mean([r[tasks, j] - r[j, j] for j in before_last]),
        forward_transfer: np.mean([r[j - 1, j] - r[0, j] for j in range(2, tasks + 1)]),
        forgetting: np.mean(
            [max(r[i, j] for i in range(1, tasks)) - r[tasks, j] for j in before_last]
        ),
    }
    matrix = torch.from_numpy(values)
    for function, value in expected.items():
        assert function(matrix).item() == pytest.approx(value, abs=1e-14), function.__name__
    assert intransigence(matrix, torch.from_numpy(reference)).item() == pytest.approx(
        np.mean([reference[j - 1] - r[j, j] for j in range(1, tasks + 1)]), abs=1e-14
    )


def test_learning_nothing_and_forgetting_nothing_is_zero() -> None:
    constant = torch.full((6, 5), 0.25)
    assert backward_transfer(constant) == forward_transfer(constant) == forgetting(constant) == 0


def test_stream_that_ended_early_is_the_shorter_stream(matrix: AccuracyMatrix) -> None:
    ended = HAND.clone()
    ended[3] = NAN
    assert tasks_learned(ended) == 2
    assert torch.equal(learned_part(ended), HAND[:3, :2])
    for function in (average_accuracy, backward_transfer, forward_transfer, forgetting):
        assert torch.equal(function(ended), function(HAND[:3, :2]))

    summary = filled(ended).summary()
    # after task 2: (.6 + .8) / 2; .6 - .9; .5 - .4; .9 - .6
    assert summary["average"] == pytest.approx(0.7)
    assert summary["per_task"] == [0.6, 0.8, None]
    assert summary["after_learning"]["per_task"] == [0.9, 0.8, None]
    assert summary["bwt"] == pytest.approx(-0.3)
    assert summary["fwt"] == pytest.approx(0.1)
    assert summary["forgetting"] == pytest.approx(0.3)


def test_what_was_not_measured_is_not_averaged_away() -> None:
    lower = HAND.clone()  # only tasks learned so far were scored
    lower[torch.ones_like(lower, dtype=torch.bool).triu()] = NAN
    assert forward_transfer(lower).isnan()
    assert torch.equal(backward_transfer(lower), backward_transfer(HAND))
    assert torch.equal(forgetting(lower), forgetting(HAND))

    hole = HAND.clone()
    hole[2, 0] = NAN  # since task 1 was learned
    assert forgetting(hole).isnan()
    assert not backward_transfer(hole).isnan()
    hole[3, 1] = NAN
    assert average_accuracy(hole).isnan()
    assert backward_transfer(hole).isnan()


def test_single_task() -> None:
    summary = filled(torch.tensor([[0.5], [0.75]])).summary()
    assert summary == {
        "average": 0.75,
        "first_task": 0.75,
        "per_task": [0.75],
        "bwt": None,
        "fwt": None,
        "forgetting": None,
        "after_learning": {"average": 0.75, "per_task": [0.75]},
        "task_agnostic": None,
    }


@pytest.mark.parametrize("rows", [0, 1])
def test_before_the_first_task_nothing_is_known(rows: int) -> None:
    matrix = AccuracyMatrix(2)
    for row in range(rows):
        matrix.update(row, [0.5, 0.5])
    summary = matrix.summary()
    assert matrix.tasks_learned == 0
    assert summary["per_task"] == summary["after_learning"]["per_task"] == [None, None]
    assert summary["average"] is summary["first_task"] is summary["forgetting"] is None
    assert summary["bwt"] is summary["fwt"] is None


def test_summary_and_compute_agree(matrix: AccuracyMatrix) -> None:
    matrix.update_task_agnostic([0.1, 0.2, 0.6])
    summary, computed = matrix.summary(), matrix.compute()
    assert summary["task_agnostic"] == {
        "average": pytest.approx(0.3),
        "first_task": 0.1,
        "per_task": [0.1, 0.2, 0.6],
    }
    assert computed["after_learning"].item() == summary["after_learning"]["average"]
    assert computed["task_agnostic"].item() == summary["task_agnostic"]["average"]
    for key in ("average", "first_task", "bwt", "fwt", "forgetting"):
        assert computed[key].item() == summary[key]
        assert computed[key].shape == ()
    assert matrix.intransigence([1.0, 1.0, 1.0]) == pytest.approx(0.2)


def test_reset_forgets_everything(matrix: AccuracyMatrix) -> None:
    matrix.update_task_agnostic(torch.ones(3))
    matrix.update(0, [0.5] * 3, [1, 2, 3])
    matrix.reset()
    for state in (matrix.accuracy, matrix.task_agnostic, matrix.samples):
        assert state.isnan().all()
    assert matrix.accuracy.dtype == torch.float64


@pytest.mark.parametrize(
    ("row", "accuracies", "message"),
    [
        (-1, [0.5, 0.5], "row to be from 0"),
        (3, [0.5, 0.5], "but got 3"),
        (1, [0.5], r"2 tasks, but got the shape \(1,\)"),
        (1, [[0.5, 0.5]], r"\(1, 2\)"),
        (1, [0.5, 95.0], "but got 95. Divide percentages"),
        (1, [-0.1, 0.5], "but got -0.1"),
        (1, [float("inf"), 0.5], "but got inf"),
    ],
)
def test_bad_rows(row: int, accuracies: list[float], message: str) -> None:
    matrix = AccuracyMatrix(2)
    with pytest.raises(ConfigurationError, match=message):
        matrix.update(row, torch.tensor(accuracies))
    assert matrix.accuracy.isnan().all()


def test_other_bad_input(matrix: AccuracyMatrix) -> None:
    with pytest.raises(
        ConfigurationError, match="num_tasks to be a whole number of at least 1, but got 0"
    ):
        AccuracyMatrix(0)
    with pytest.raises(ConfigurationError, match="3 tasks"):
        matrix.update_task_agnostic([0.5])
    with pytest.raises(ConfigurationError, match=r"\(tasks \+ 1, tasks\)"):
        average_accuracy(torch.ones(3, 3))
    with pytest.raises(ConfigurationError, match="each of the 3 tasks"):
        intransigence(HAND, torch.ones(2))


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: module.to("meta"),
        lambda module: module[1].set_dtype(torch.float16) and module,
    ],
)
def test_precision_survives_what_happens_to_the_module(
    convert: Callable[[nn.Sequential], object], matrix: AccuracyMatrix
) -> None:
    matrix.update(0, [1 / 3, 1 / 7, 1 / 9])
    convert(nn.Sequential(nn.Linear(2, 2), matrix))
    matrix.update(1, [0.1, 0.2, 0.3])
    assert matrix.accuracy.dtype == matrix.compute()["average"].dtype == torch.float64
    assert matrix.accuracy[:2].tolist() == [[1 / 3, 1 / 7, 1 / 9], [0.1, 0.2, 0.3]]


def test_state_dict_round_trip(matrix: AccuracyMatrix, tmp_path: Path) -> None:
    matrix.update_task_agnostic([0.1, 0.2, NAN])
    torch.save(nn.ModuleDict({"m": matrix}).state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert sorted(saved) == [
        f"m.{name}" for name in ("accuracy", "samples", "task_agnostic", "task_agnostic_samples")
    ]

    other = AccuracyMatrix(3)
    nn.ModuleDict({"m": other}).load_state_dict(saved)
    assert torch.equal(other.accuracy, HAND)
    torch.testing.assert_close(other.task_agnostic, matrix.task_agnostic, equal_nan=True)
    other.compute()  # torchmetrics warns of a metric that it believes was never updated
    other.update(0, [0.0, 0.0, 0.0])
    assert torch.equal(saved["m.accuracy"], HAND)  # no memory is shared with the checkpoint


def test_samples_are_those_that_a_task_was_tested_with_last(matrix: AccuracyMatrix) -> None:
    matrix.update(1, [0.5, 0.5, NAN], [40, 30, 0])
    matrix.update(2, [NAN, 0.5, NAN], [0, 20, None])
    matrix.update(3, [0.5, 0.5, 0.5])
    matrix.update_task_agnostic([0.5, 0.5, 0.5], [4, 4, 4])
    larger = matrix.grown(4)
    assert larger.samples.nan_to_num(-1).tolist() == [40, 20, -1, -1]
    assert larger.task_agnostic_samples.nan_to_num(-1).tolist() == [4, 4, 4, -1]


def test_a_checkpoint_without_numbers_of_samples_is_read(matrix: AccuracyMatrix) -> None:
    state = {n: v for n, v in matrix.state_dict().items() if not n.endswith("samples")}
    other = AccuracyMatrix(3)
    other.load_state_dict(state)
    assert torch.equal(other.accuracy, HAND)
    assert other.samples.isnan().all()


def test_result_is_not_stale_after_loading(matrix: AccuracyMatrix) -> None:
    state = copy.deepcopy(matrix.state_dict())
    matrix.update(3, [0.0, 0.0, 0.0])
    assert matrix.compute()["average"] == 0
    matrix.load_state_dict(state)
    assert matrix.compute()["average"].item() == pytest.approx(0.7)


def test_checkpoint_of_another_stream_is_refused(matrix: AccuracyMatrix) -> None:
    with pytest.raises(RuntimeError, match="stream of another length"):
        AccuracyMatrix(2).load_state_dict(matrix.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        AccuracyMatrix(2).load_state_dict({})


def test_copies_are_independent(matrix: AccuracyMatrix) -> None:
    twin = matrix.clone()
    twin.update(3, [0.0, 0.0, 0.0])
    assert torch.equal(matrix.accuracy, HAND)


def test_forward_returns_the_row_and_keeps_the_rest(matrix: AccuracyMatrix) -> None:
    matrix(3, [0.2, 0.4, 0.6])
    assert matrix.accuracy[:3].tolist() == HAND[:3].tolist()
    assert matrix.accuracy[3].tolist() == [0.2, 0.4, 0.6]


def test_in_a_metric_collection() -> None:
    collection = MetricCollection({"a": AccuracyMatrix(2), "b": AccuracyMatrix(2)})
    collection["a"].update(1, [0.5, 0.5])
    collection["b"].update(1, [1.0, 1.0])
    computed = collection.compute()
    assert computed["a_average"] == 0.5
    assert computed["b_average"] == 1.0


def test_in_a_trainer(tmp_path: Path) -> None:
    class Learner(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.matrix = AccuracyMatrix(2)

        def training_step(self, batch: int) -> torch.Tensor:
            return self.layer(torch.ones(4, 2, dtype=torch.bfloat16)).sum()

        def on_train_epoch_end(self) -> None:
            self.matrix.update(self.current_epoch + 1, [1 / 3, 0.5])
            self.log_dict({f"accuracy/{k}": v for k, v in self.matrix.compute().items()})

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(
        max_epochs=2,
        precision="bf16-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    learner = Learner()
    trainer.fit(learner, range(1))
    assert trainer.callback_metrics["accuracy/first_task"].item() == pytest.approx(1 / 3)
    assert learner.matrix.accuracy[1:].tolist() == [[1 / 3, 0.5], [1 / 3, 0.5]]
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["matrix.accuracy"][1:], learner.matrix.accuracy[1:])


def measure(rank_alone: int) -> None:
    matrix = AccuracyMatrix(2)
    for row, accuracies in enumerate([[0.5, 0.5], [0.75, 0.25], [0.5, 1.0]]):
        matrix.update(row, accuracies)
    matrix.update_task_agnostic([0.25, 0.5])
    if torch.distributed.get_rank() == rank_alone:  # a collective in here would wait for the other
        first = matrix.compute()
        assert {k: v.item() for k, v in first.items() if v.item() == v.item()} == {
            "average": 0.75,
            "first_task": 0.5,
            "after_learning": 0.875,
            "bwt": -0.25,
            "fwt": -0.25,
            "forgetting": 0.25,
            "task_agnostic": 0.375,
        }, first
    torch.distributed.barrier()
    matrix.sync()  # by hand: still neither stacked nor summed
    assert matrix.accuracy.tolist() == [[0.5, 0.5], [0.75, 0.25], [0.5, 1.0]]
    assert matrix.task_agnostic.tolist() == [0.25, 0.5]
    matrix.unsync()
    assert matrix.summary()["average"] == 0.75


def test_two_processes_neither_sum_nor_wait(ranks: Any) -> None:
    ranks(measure, 0)
