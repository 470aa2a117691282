"""The strategies that a run of the suite is about: by name, by class path, or composed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bpn_lightning.cli.trust import find_here
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.registry import ALIASES, by_class_path, gates, is_class_path, strategies
from bpn_lightning.strategies.base import ContinualStrategy

__all__ = ["Case", "Part", "read_cases"]


@dataclass(frozen=True)
class Part:
    """One strategy of a composition.

    Args:
        name: as it was written.
        strategy: the class.
        arguments: of its constructor.
    """

    name: str
    strategy: type[ContinualStrategy]
    arguments: Mapping[str, Any]

    def make(self) -> ContinualStrategy:
        """A new one."""
        return self.strategy(**self.arguments)

    def overrides(self, hook: str) -> bool:
        """Whether it has a hook of its own."""
        return getattr(self.strategy, hook) is not getattr(ContinualStrategy, hook)


@dataclass(frozen=True)
class Case:
    """What the promises are asked of: a strategy, or several that run together.

    Args:
        name: as it was written, such as ``"ewc"`` or ``"bd+my_lab.MyStrategy"``.
        parts: in the order of the trainer's callbacks.
    """

    name: str
    parts: tuple[Part, ...]

    def make(self) -> list[ContinualStrategy]:
        """New strategies."""
        return [part.make() for part in self.parts]

    def make_null(self) -> list[ContinualStrategy]:
        """New strategies with the arguments that they declare to be fine-tuning."""
        return [
            replace(
                part, arguments={**part.arguments, **(part.strategy.null_arguments or {})}
            ).make()
            for part in self.parts
        ]

    def which(self, is_so: Callable[[Part], bool]) -> str:
        """The names of the parts of which something is so; empty where of none."""
        return " and ".join(part.name for part in self.parts if is_so(part))


def read_cases(names: Sequence[str], arguments: Mapping[str, Any]) -> list[Case]:
    """What was asked for on the command line.

    Args:
        names: registered names of strategies and gates, and class paths, composed by ``+``.
        arguments: of constructors, by the name of the strategy as it is written there.

    Raises:
        ConfigurationError: there is no such strategy, it cannot be made with these arguments, or
            arguments are given for one that was not named.
    """
    if not names:
        raise ConfigurationError(
            "Expected --strategy to be a strategy to examine, but got none. "
            "Pass a class path or a registered name: --strategy my_lab.MyStrategy"
        )
    named = {part for name in names for part in name.split("+")}
    for name, values in arguments.items():
        if name not in named:
            raise ConfigurationError(
                f"Expected --strategy-arguments to be for a strategy of --strategy, but got {name!r}."
                f"{did_you_mean(name, named)} These are named: {', '.join(sorted(named))}."
            )
        if not isinstance(values, Mapping):
            raise ConfigurationError(
                f"Expected --strategy-arguments to have a mapping of arguments for {name!r}, but got "
                f"{values!r}. Write them as {{{name}: {{argument: value}}}}."
            )
    cases = []
    for name in dict.fromkeys(names):
        parts = [_read_part(part, arguments.get(part, {})) for part in name.split("+")]
        cases.append(Case(name, tuple(parts)))
    return cases


def _read_part(name: str, arguments: Mapping[str, Any]) -> Part:
    known = gates() | strategies()
    registered, given = ALIASES.get(name, (name, {}))
    if is_class_path(name):
        find_here([name.partition(".")[0]])
        found = by_class_path(name)
    elif registered in known:
        found = known[registered]
    else:
        raise ConfigurationError(
            f"Expected --strategy to name strategies or gates, but got {name!r}.{did_you_mean(name, known)} "
            f"Pass a class path such as my_lab.MyStrategy, or one of {', '.join(known)}."
        )
    try:
        part = Part(name, found.load(), {**given, **arguments})
    except ConfigurationError as error:
        # The registry speaks to people who run `bpn-fit`.
        raise ConfigurationError(str(error).replace("--method", "--strategy")) from error
    try:
        part.make()
    except Exception as error:
        raise ConfigurationError(
            f"Expected {name} to be made with the arguments {dict(part.arguments)}, but it raised "
            f"{type(error).__name__}: {error}. Pass others: "
            f"--strategy-arguments '{{{name}: {{argument: value}}}}'"
        ) from error
    return part
