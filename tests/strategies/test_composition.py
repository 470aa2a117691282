"""What may not run together is refused when the run is built, in words; what forgets says so."""

import warnings
from typing import Any, ClassVar

import pytest
import torch

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError, ExpectedForgettingWarning
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.imm import IncrementalMomentMatching
from bpn_lightning.strategies.joint import JointTraining
from bpn_lightning.strategies.stl import IndependentNetworks
from bpn_lightning.tasks import Phase
from bpn_lightning.trainer.composition import check_phases


class Started(ContinualStrategy):
    """Notes that training began, which a refusal comes before."""

    starts: ClassVar[list[str]] = []

    def on_stream_start(self, host: Any, stream: Any) -> None:
        self.starts.append(self.state_key)


class Projects(Started):
    projects = True


class ProjectsToo(Projects):
    pass


class Merges(Started):
    def merged_weights(self, host: Any) -> dict[str, torch.Tensor]:
        return {}


class Alone(Started):
    exclusive = True


class Asks(Started):
    needs_task_id = True


class Pulls(Started):
    regularizer = True


class PullsToo(Pulls):
    pass


class Corrects(Pulls):
    corrects_weights = True


class Numbered(Started):
    """One class, as many instances as one likes."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def state_key(self) -> str:
        return f"number {self.number}"


class Declares(Started):
    """Puts phases before a task's own, from the second on."""

    def __init__(self, *phases: Phase) -> None:
        self.declared = phases

    def phases(self, task: Any, phases: list[Phase]) -> list[Phase]:
        return [*self.declared, *phases] if task.id else phases

    def phase_optimizer(self, host: Any, phase: Phase) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


class DeclaresToo(Declares):
    pass


def digits(**options: Any) -> SplitDigits:
    return SplitDigits(**{"num_tasks": 2, "epochs_per_task": 1, "batch_size": 500} | options)


@pytest.fixture
def refusal(fit: Any) -> Any:
    """The message of a run that is refused before it begins."""

    def message(
        strategies: list[Any], *, stream: dict[str, Any] | None = None, **module: Any
    ) -> str:
        Started.starts.clear()
        with pytest.raises(ConfigurationError) as error:
            fit(strategies, stream=digits(**(stream or {})), **module)
        assert not Started.starts
        return str(error.value)

    return message


def test_two_projections(refusal: Any) -> None:
    assert refusal([Projects(), EWC(update="clamped"), ProjectsToo()]) == (
        "Expected at most one strategy that projects gradients, but got Projects and ProjectsToo. "
        "Remove all but one."
    )


def test_two_mergers(refusal: Any) -> None:
    assert refusal([IncrementalMomentMatching(), Merges()]) == (
        "Expected at most one strategy that merges weights, but got IncrementalMomentMatching and "
        "Merges. Remove all but one."
    )


@pytest.mark.parametrize("alone", [Alone, IndependentNetworks, JointTraining])
@pytest.mark.parametrize("other", [EWC, BeneficialPerturbation, FineTuning, Projects])
@pytest.mark.parametrize("first", [True, False])
def test_an_exclusive_strategy_beside_anything(
    refusal: Any, alone: Any, other: Any, first: bool
) -> None:
    both = [alone(), other()] if first else [other(), alone()]
    names = " and ".join(type(strategy).__name__ for strategy in both)
    assert refusal(both) == (
        f"Expected {alone.__name__} to be the only strategy, but got {names}. "
        f"Remove {alone.__name__}, or all the others."
    )


@pytest.mark.parametrize("first", [True, False])
def test_a_correction_of_weights_beside_a_projection(refusal: Any, first: bool) -> None:
    both = [Corrects(), Projects()]
    assert refusal(both if first else both[::-1]) == (
        "Expected no strategy to change weights after the step with Projects, which constrains the step's direction, but got Corrects with update 'proximal'. "
        "Set its update to 'clamped' or 'gradient'."
    )


@pytest.mark.parametrize("first", [True, False])
def test_two_corrections_of_weights(refusal: Any, first: bool) -> None:
    """Each is a step to an anchor of its own: the second would win, whichever that is."""
    both = [Corrects(), EWC(update="proximal")]
    names = "Corrects and EWC" if first else "EWC and Corrects"
    assert refusal(both if first else both[::-1]) == (
        f"Expected at most one strategy to change shared weights after the step, as each would undo part of the other's, but got {names} with update 'proximal'. "
        "Set the update of all but one to 'clamped' or 'gradient'."
    )


@pytest.mark.parametrize("strategy", [Asks, BeneficialPerturbation, IndependentNetworks])
def test_a_need_of_the_task_id_where_nobody_tells_it(refusal: Any, strategy: Any) -> None:
    assert refusal([strategy()], stream={"task_id_at_inference": False}) == (
        f"{strategy.__name__} needs the task ID at inference, but the stream has "
        "task_id_at_inference=False. Set it to True, or choose another method."
    )


def test_heads_of_tasks_where_nobody_tells_the_task(refusal: Any) -> None:
    assert refusal([FineTuning()], stream={"task_id_at_inference": False}, mask="task") == (
        "mask='task' needs the task ID at inference, but the stream has task_id_at_inference=False. "
        "Set it to True, or choose another method."
    )


@pytest.mark.parametrize("others", [[], [FineTuning()]])
def test_the_same_strategy_twice(refusal: Any, others: list[Any]) -> None:
    assert refusal([Numbered(1), *others, Numbered(1)]) == (
        "Expected every strategy once, but got Numbered 2 times. Remove all but one."
    )


def test_the_same_strategy_twice_is_refused_by_the_trainer_where_it_has_a_state(fit: Any) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `EWC`"):
        fit([EWC(), EWC(1.0)])


@pytest.mark.parametrize(
    "strategies",
    [
        [],
        [Projects(), EWC(update="clamped")],
        [Projects(), EWC(update="gradient"), BeneficialPerturbation(3)],
        [EWC(), BeneficialPerturbation(3)],
        [EWC(), IncrementalMomentMatching()],
        [IncrementalMomentMatching(), BeneficialPerturbation(3)],
        [Numbered(1), Numbered(2)],
        [IndependentNetworks()],
        [JointTraining()],
    ],
    ids=lambda strategies: "+".join(type(strategy).__name__ for strategy in strategies),
)
def test_what_fits_together_runs(fit: Any, strategies: list[Any]) -> None:
    module, _ = fit(strategies, stream=digits())
    assert module.closed == 1
    assert not module.accuracy_matrix.accuracy.isnan().any()


@pytest.mark.parametrize("strategy", [FineTuning, EWC, IncrementalMomentMatching, JointTraining])
def test_what_needs_no_task_id_runs_where_nobody_tells_it(fit: Any, strategy: Any) -> None:
    module, _ = fit([strategy()], stream=digits(task_id_at_inference=False))
    assert module.closed == 1


# --- phases --------------------------------------------------------------------------------------


def test_two_phases_of_one_name(refusal: Any) -> None:
    phase = Phase("warm_up", 1, "head")
    assert refusal([Declares(phase), Numbered(1), DeclaresToo(phase)]) == (
        "Expected the phases of a task to have unique names, but task 1 has 'warm_up' 2 times. "
        "Remove one of the strategies."
    )


def test_a_phase_that_is_called_as_the_tasks_own(refusal: Any) -> None:
    assert "task 1 has 'train' 2 times" in refusal([Declares(Phase("train", 2))])


def test_a_phase_without_epochs(refusal: Any) -> None:
    assert refusal([Declares(Phase("warm_up", 0, "head"))]) == (
        "Expected every phase to have at least 1 epoch, but 'warm_up' of task 1 has 0. "
        "Leave the phase out, or give it epochs."
    )


def test_a_phase_with_an_optimizer_of_its_own_where_the_optimizer_goes_on(refusal: Any) -> None:
    phase = Phase("autoencoder", 1, "strategy")
    assert refusal([Declares(phase)], stream={"reset_optimizer": "never"}) == (
        "Expected reset_optimizer to be 'always' when a phase has a separate optimizer, such as "
        "'autoencoder' of task 1, but got 'never'. Set it to 'always'."
    )


def test_the_same_name_in_different_tasks_is_none_twice(fit: Any) -> None:
    module, _ = fit(
        [Declares(Phase("warm_up", 1, "head"))], stream=digits(num_tasks=3, reset_optimizer="never")
    )
    check_phases(module.schedule, module.host.stream, module.trainer)
    assert module.schedule.total == 5


# --- the warning ---------------------------------------------------------------------------------


def warned(fit: Any, strategies: list[Any], stream: dict[str, Any], **module: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ExpectedForgettingWarning)
        fit(strategies, stream=digits(**stream), **module)
    return [str(w.message) for w in found if w.category is ExpectedForgettingWarning]


@pytest.mark.parametrize("mask", ["all", "seen"])
@pytest.mark.parametrize(("tasks", "figure"), [(2, "1/2 = 0.50"), (3, "1/3 = 0.33")])
def test_regularizers_with_one_head_are_expected_to_forget(
    fit: Any, tasks: int, figure: str, mask: str
) -> None:
    (message,) = warned(
        fit, [Pulls(), IncrementalMomentMatching()], {"num_tasks": tasks}, mask=mask
    )
    assert message.startswith(
        "Pulls and IncrementalMomentMatching with one head over the classes of all tasks"
    )
    assert figure in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("strategies", "stream", "mask"),
    [
        ([Pulls()], {}, "task"),  # a head for each task
        ([Pulls()], {"domain_incremental": True}, "shared"),
        ([Pulls()], {"num_tasks": 1}, "all"),
        ([Pulls(), BeneficialPerturbation(3)], {}, "all"),  # which uses the task's id
        ([Pulls(), Projects()], {}, "all"),
        ([FineTuning()], {}, "all"),
        ([], {}, "all"),
    ],
)
def test_nothing_else_is_warned_of(
    fit: Any, strategies: list[Any], stream: dict[str, Any], mask: Any
) -> None:
    assert not warned(fit, strategies, stream, mask=mask)


def test_the_warning_is_given_once_and_can_be_silenced_by_its_category(fit: Any) -> None:
    fit([Pulls()], stream=digits())  # as setup.cfg does; any other warning is an error
    with pytest.warns(ExpectedForgettingWarning) as found:
        fit([Pulls()], stream=digits())
    assert len([w for w in found if w.category is ExpectedForgettingWarning]) == 1
