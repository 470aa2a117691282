"""What a promise is, and by which of its declarations a strategy does not make one.

Functions that take a case return the declaration, in words for the summary; empty if the promise is made.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

from bpn_lightning.conformance.cases import Case
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.bitfit import BitFit
from bpn_lightning.strategies.gates.base import TaskGate

__all__ = [
    "acts_at_once",
    "corrects_weights",
    "expect_nothing",
    "has_no_gate",
    "has_no_null",
    "is_alone",
    "lacks",
    "needs_task_id",
    "projects",
    "promise",
    "trains_on_other_tasks",
]

_Test = TypeVar("_Test", bound=Callable[..., None])


def promise(unless: Callable[[Case], str] = lambda case: "") -> Callable[[_Test], _Test]:
    """Mark a test as a promise.

    Args:
        unless: the declaration of a case by which it does not make this promise; empty if it does.
    """

    def mark(test: _Test) -> _Test:
        test.not_applicable = unless  # type: ignore[attr-defined]
        return test

    return mark


def expect_nothing(found: Sequence[str], what: str, remedy: str) -> None:
    """Fail, in words, where something was found that a promise rules out."""
    __tracebackhide__ = True
    if found:
        shown = [f"  {line}" for line in found[:8]]
        if len(found) > len(shown):
            shown.append(f"  and {len(found) - len(shown)} more")
        pytest.fail("\n".join([f"{what}:", *shown, remedy]), pytrace=False)


def has_no_null(case: Case) -> str:
    """Without arguments with which it is fine-tuning."""
    without = case.which(lambda part: part.strategy.null_arguments is None)
    return without and f"null_arguments of {without} is None"


def acts_at_once(case: Case) -> str:
    """It acts before any task has ended."""
    acting = case.which(lambda part: not part.strategy.plain_first_task)
    return acting and f"plain_first_task of {acting} is False"


def needs_task_id(case: Case) -> str:
    """It answers in the mode of a task."""
    needing = case.which(lambda part: part.strategy.needs_task_id)
    return needing and f"needs_task_id of {needing} is True"


def projects(case: Case) -> str:
    """It replaces gradients."""
    projecting = case.which(lambda part: part.strategy.projects)
    return projecting and f"projects of {projecting} is True"


def corrects_weights(case: Case) -> str:
    """It moves shared weights after the optimizer."""
    correcting = [type(s).__name__ for s in case.make() if s.corrects_weights]
    return f"corrects_weights of {' and '.join(correcting)} is True" if correcting else ""


def trains_on_other_tasks(case: Case) -> str:
    """Samples of other tasks move their rows of the head."""
    for hook in ("training_tasks", "replayed_tasks"):
        mixing = case.which(lambda part, hook=hook: part.overrides(hook))  # type: ignore[misc]
        if mixing:
            return f"{hook} of {mixing} adds data of other tasks"
    return ""


def is_alone(case: Case) -> str:
    """It composes with nothing, or has bias units itself."""
    exclusive = case.which(lambda part: part.strategy.exclusive)
    has_units = case.which(lambda part: issubclass(part.strategy, BeneficialPerturbation | BitFit))
    if exclusive:
        return f"exclusive of {exclusive} is True"
    return has_units and f"{has_units} has bias units already"


def has_no_gate(case: Case) -> str:
    """No part names tasks."""
    return "" if case.which(lambda part: issubclass(part.strategy, TaskGate)) else "it has no gate"


def lacks(case: Case, *hooks: str) -> str:
    """Nobody overrides these hooks."""
    has = case.which(lambda part: any(part.overrides(hook) for hook in hooks))
    return "" if has else f"it has no {' and no '.join(hooks)}"
