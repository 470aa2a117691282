"""One clear error for each input that no gate can work with: the gate, the argument, the remedy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bpn_lightning.errors import CheckpointError, ConfigurationError, DataError
from bpn_lightning.strategies.gates.base import check_gate_names
from bpn_lightning.strategies.gates.features import FeatureGate
from bpn_lightning.strategies.gates.fecam import FeCAM
from bpn_lightning.strategies.gates.logits import Confidence
from bpn_lightning.strategies.gates.ncm import NearestClassMean
from bpn_lightning.strategies.gates.ppca import ProbabilisticPCA
from bpn_lightning.strategies.gates.ranpac import RanPAC
from bpn_lightning.strategies.gates.slda import SLDA
from bpn_lightning.tasks import Task

PAIR = Task(3, (6, 8), ("six", "seven"), 1)
ALL = [NearestClassMean, SLDA, FeCAM, ProbabilisticPCA, RanPAC]


def finish(gate: FeatureGate, x: Tensor, y: Tensor, held: Tensor | None = None) -> None:
    gate.add(PAIR, x, y, held)
    gate.finish()


def noise(count: int = 40, width: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(count, width), 6 + torch.arange(count) % 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SLDA(per="clas"),
            "Expected per to be one of class, task, but got 'clas'. Did you",
        ),  # type: ignore[arg-type]
        (
            lambda: SLDA(project=0),
            "Expected project to be a whole number of at least 1, but got 0. ",
        ),
        (
            lambda: SLDA(held_out=1),
            "Expected held_out to be a fraction from 0 to below 1, but got 1.",
        ),
        (lambda: SLDA(1.5), "Expected shrinkage to be a number from 0 to 1, but got 1.5. Null"),
        (lambda: SLDA(float("nan")), "Expected shrinkage to be a number from 0 to 1, but got nan"),
        (lambda: FeCAM(-1), "Expected shrinkage to be 0 or a positive number, but got -1."),
        (lambda: FeCAM(tukey=0), "Expected tukey to be a positive number, but got 0. 1 leaves"),
        (
            lambda: ProbabilisticPCA(0),
            "Expected rank to be a whole number of at least 1, but got 0.",
        ),
        (lambda: RanPAC(0), "Expected width to be a whole number of at least 1, but got 0."),
        (lambda: RanPAC(ridge=-1), "Expected ridge to be 0 or a positive number, but got -1. Null"),
    ],
)
def test_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(make: Callable[[], FeatureGate], value: float) -> None:
    gate, (x, y) = make(), noise()
    x[5, 2] = value
    with pytest.raises(
        DataError, match=f"features of task 3 to be finite for gate {gate.name}, but"
    ):
        gate.add(PAIR, x, y)


@pytest.mark.parametrize(
    "gate", [SLDA(0.5), FeCAM(), ProbabilisticPCA(2), RanPAC(30, 0.5)], ids=lambda gate: gate.name
)
def test_features_that_are_constant(gate: FeatureGate) -> None:
    with pytest.raises(
        DataError, match=f"features of gate {gate.name} to vary within a class, but"
    ):
        finish(gate, torch.full((40, 20), 0.3), noise()[1])


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (SLDA(0.0), "Expected shrinkage of gate slda to make the covariance of 50 features invertible, but got 0.0. Raise it"),
        (FeCAM(0.0), "Expected shrinkage of gate fecam to make the covariance of 50 features invertible, but got 0.0. Raise it"),
        (RanPAC(60, 0.0), "Expected ridge of gate ranpac to make the covariance of 60 features invertible, but got 0.0. Raise it"),
        (ProbabilisticPCA(20), "Expected rank of gate ppca to be at most 18, with 50 features"),
    ],
)  # fmt: skip
def test_covariances_that_cannot_be_inverted(gate: FeatureGate, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        finish(gate, *noise(40, 50))
    assert str(error.value).startswith(message)
    assert gate.row_tasks == []


def test_ppca_of_features_in_fewer_directions_than_its_rank() -> None:
    x, y = noise()
    with pytest.raises(ConfigurationError, match="rank of gate ppca to be below the number of dir"):
        finish(ProbabilisticPCA(8), x[:, :4] @ torch.randn(4, 20), y)


@pytest.mark.parametrize("make", [FeCAM, lambda: ProbabilisticPCA(1)])
def test_a_class_of_one_sample_where_it_needs_a_covariance(make: Callable[[], FeatureGate]) -> None:
    gate, (x, _) = make(), noise()
    y = torch.full((40,), 6)
    y[3] = 7
    with pytest.raises(DataError) as error:
        finish(gate, x, y)
    assert str(error.value) == (
        "Expected class 'seven' of task 3 to have at least 2 training samples for gate "
        f"{gate.name}, but got 1. Add samples, or leave the gate out."
    )


@pytest.mark.parametrize("make", ALL)
def test_a_class_without_samples(make: Callable[[], FeatureGate]) -> None:
    with pytest.raises(DataError, match="class 'seven' of task 3 to have at least"):
        finish(make(), noise()[0], torch.full((40,), 6))


@pytest.mark.parametrize("make", ALL)
def test_a_task_without_samples(make: Callable[[], FeatureGate]) -> None:
    with pytest.raises(DataError, match=r"Expected samples of a task for gate .*, but got none"):
        make().finish()


@pytest.mark.parametrize(("make", "argument"), [(SLDA, "shrinkage"), (RanPAC, "ridge")])
def test_nothing_held_out_to_choose_with(make: Callable[[], FeatureGate], argument: str) -> None:
    gate = make()
    with pytest.raises(
        ConfigurationError, match=f"Expected {argument} of gate {gate.name} to be a"
    ):
        finish(gate, *noise())
    finish(gate, *noise(), held=torch.arange(40) < 10)


@pytest.mark.parametrize("make", ALL)
def test_asked_before_any_task_is_learned(make: Callable[[], FeatureGate]) -> None:
    with pytest.raises(ConfigurationError, match="to be asked after a task was learned"):
        make().task_scores(noise()[0])


def test_features_of_another_width() -> None:
    gate = NearestClassMean()
    finish(gate, *noise())
    with pytest.raises(DataError) as error:
        gate.log_scores(torch.zeros(5, 3))
    assert str(error.value) == (
        "Expected features of shape (n, 20) for gate ncm, but got (5, 3). Use the front that it was "
        "fitted with."
    )


def test_negative_features_to_a_broken_power() -> None:
    with pytest.raises(DataError, match=r"at least 0 where tukey of gate fecam is 0\.5, but got -"):
        finish(FeCAM(tukey=0.5), *noise())


def test_a_state_of_other_arguments() -> None:
    gate = ProbabilisticPCA(2)
    finish(gate, *noise())
    other = ProbabilisticPCA(3)
    with pytest.raises(CheckpointError, match="state of gate ppca to hold 2 rows of width 20, but"):
        other.load_state_dict(gate.state_dict())


def test_gates_of_one_name() -> None:
    check_gate_names([SLDA(), NearestClassMean(), Confidence(), SLDA(0.1, name="slda_10")])
    with pytest.raises(
        ConfigurationError, match="names of their own, but got 2 of the name 'slda'"
    ):
        check_gate_names([SLDA(), Confidence(), SLDA(0.1)])


def test_a_failed_finish_leaves_the_gate_as_it_was() -> None:
    gate = SLDA(0.0, held_out=0)
    finish(gate, *noise(60, 4))
    before: dict[str, Any] = {key: value.clone() for key, value in gate.rows.items()}
    with pytest.raises(DataError, match="class 'seven' of task 3"):
        finish(gate, torch.randn(9, 4), torch.full((9,), 6))
    torch.testing.assert_close(gate.rows, before, rtol=0, atol=0)
    assert gate.row_tasks == [3, 3]
