"""Checks of single arguments, whose errors name the argument, the rule, the value and the remedy."""

from collections.abc import Sequence
from math import inf, isfinite
from typing import TypeGuard

from bpn_lightning.errors import ConfigurationError, did_you_mean

__all__ = ["check_above_zero", "check_choice", "check_number", "check_positive_int"]


def check_choice(argument: str, value: object, known: Sequence[object]) -> None:
    """Refuse a value that is none of some.

    Raises:
        ConfigurationError: names the argument and its choices.

    >>> check_choice("per", "clas", ("class", "task"))
    Traceback (most recent call last):
    bpn_lightning.errors.ConfigurationError: Expected per to be one of class, task, but got 'clas'. Did you mean 'class'?
    """
    if value not in known:
        choices = [str(choice) for choice in known]
        raise ConfigurationError(
            f"Expected {argument} to be one of {', '.join(choices)}, but got {value!r}."
            f"{did_you_mean(str(value), choices)}"
        )


def check_positive_int(argument: str, value: object, remedy: str = "Raise it.") -> None:
    """Refuse a value that is not a whole number of at least 1.

    Raises:
        ConfigurationError: names the argument.
    """
    if type(value) is not int or value < 1:
        raise ConfigurationError(
            f"Expected {argument} to be a whole number of at least 1, but got {value!r}. {remedy}"
        )


def check_number(argument: str, value: object, remedy: str, *, at_most: float = inf) -> None:
    """Refuse a value that is not a number from 0 to a limit.

    Raises:
        ConfigurationError: names the argument.
    """
    if not (_is_finite(value) and 0 <= value <= at_most):
        rule = f"a number from 0 to {at_most:g}" if isfinite(at_most) else "0 or a positive number"
        raise ConfigurationError(f"Expected {argument} to be {rule}, but got {value!r}. {remedy}")


def check_above_zero(argument: str, value: object, remedy: str) -> None:
    """Refuse a value that is not a finite number above 0.

    Raises:
        ConfigurationError: names the argument.
    """
    if not (_is_finite(value) and value > 0):
        raise ConfigurationError(
            f"Expected {argument} to be a positive number, but got {value!r}. {remedy}"
        )


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and isfinite(value)
