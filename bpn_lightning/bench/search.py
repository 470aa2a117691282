"""Samplers and pruners: which values are tried next, and which trials are not worth finishing.

A search depends on nothing but its space, its seed and the values that were told so far. So one that was interrupted goes on by
asking again for the trials that are recorded, and telling what they gave.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from bpn_lightning.bench.space import Range, Space, grid_points
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.run.tuning import TrialRecord, Value

__all__ = ["PRUNERS", "SAMPLERS", "Outcome", "Search", "Trial", "make_search", "optimize"]

SAMPLERS = ("grid", "random", "tpe")
"""``grid`` needs nothing; the others are Optuna's."""

PRUNERS = ("median", "halving")
"""Optuna's MedianPruner and SuccessiveHalvingPruner."""


class Trial:
    """Values to be tried, and what is known of them so far.

    Args:
        number: from 0.
        values: by their keys.
        prune: told a step and its value, says whether the trial is to be stopped; None for never.
        finish: told the final value, or None and whether the trial failed.

    Attributes:
        reported: the values of the steps, as far as they were told.
        pruned: whether it is to be stopped.
    """

    def __init__(
        self,
        number: int,
        values: dict[str, Value],
        prune: Callable[[int, float], bool] | None = None,
        finish: Callable[[float | None, bool], None] | None = None,
    ) -> None:
        self.number, self.values = number, values
        self.reported: list[float] = []
        self.pruned = False
        self._prune, self._finish = prune, finish

    def report(self, steps: Sequence[float]) -> bool:
        """Tell the values of all steps so far; those that were told before are not told again.

        Returns:
            Whether the trial is to be stopped, which no later step changes.
        """
        for value in steps[len(self.reported) :]:
            if self.pruned:
                break
            self.reported.append(value)
            self.pruned = self._prune is not None and self._prune(len(self.reported), value)
        return self.pruned

    def finish(self, value: float | None, failed: bool = False) -> None:
        """Tell the final value; None where it was pruned or failed."""
        if self._finish is not None:
            self._finish(value, failed)


class Search(ABC):
    """Asks for values, one trial after the other.

    Attributes:
        independent: whether trials do not depend on what others gave, so that several may run at a time.
        version: of Optuna; None where it is not used.
    """

    independent: bool = True
    version: str | None = None

    @abstractmethod
    def ask(self, number: int) -> Trial:
        """The next trial."""


class GridSearch(Search):
    """Every combination of the grid's values, in order; no trial is pruned."""

    def __init__(self, space: Space) -> None:
        self.points = grid_points(space)

    def ask(self, number: int) -> Trial:
        """The point of that number."""
        return Trial(number, self.points[number])


class OptunaSearch(Search):
    """Optuna's samplers and pruners, in memory.

    Args:
        space: ranges and choices.
        sampler: ``random`` or ``tpe``.
        seed: of the sampler.
        pruner: one of :data:`PRUNERS`, or None.

    Raises:
        ConfigurationError: Optuna is not installed.
    """

    def __init__(self, space: Space, sampler: str, seed: int, pruner: str | None) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigurationError(
                f"Expected Optuna to be installed for the sampler {sampler}, but it is not. Install it by "
                "`pip install 'bpn_lightning[tune]'`, or write `sampler: grid`, which needs nothing."
            ) from error
        self._optuna: Any = optuna
        self.version = metadata.version("optuna")
        self.independent = sampler == "random" and pruner is None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        samplers: dict[str, Any] = {
            "random": optuna.samplers.RandomSampler,
            "tpe": optuna.samplers.TPESampler,
        }
        pruners: dict[str | None, Any] = {
            "median": optuna.pruners.MedianPruner,
            "halving": optuna.pruners.SuccessiveHalvingPruner,
            None: optuna.pruners.NopPruner,
        }
        self._study = optuna.create_study(
            direction="maximize", sampler=samplers[sampler](seed=seed), pruner=pruners[pruner]()
        )
        self._space = {key: self._distribution(one) for key, one in space.items()}

    def ask(self, number: int) -> Trial:
        """What the sampler draws next."""
        asked = self._study.ask(self._space)

        def prune(step: int, value: float) -> bool:
            asked.report(value, step)
            return bool(asked.should_prune())

        def finish(value: float | None, failed: bool) -> None:
            states = self._optuna.trial.TrialState
            if value is None:
                self._study.tell(asked, state=states.FAIL if failed else states.PRUNED)
            else:
                self._study.tell(asked, value)

        return Trial(number, dict(asked.params), prune, finish)

    def _distribution(self, one: Any) -> Any:
        kinds = self._optuna.distributions
        if not isinstance(one, Range):
            return kinds.CategoricalDistribution(one.choices)
        kind = kinds.IntDistribution if one.whole else kinds.FloatDistribution
        return kind(one.low, one.high, log=one.log)


def make_search(space: Space, sampler: str, seed: int, pruner: str | None) -> Search:
    """The search of a sampler's name; see :data:`SAMPLERS` and :data:`PRUNERS`."""
    return GridSearch(space) if sampler == "grid" else OptunaSearch(space, sampler, seed, pruner)


Outcome = tuple[float | None, bool]
"""The final value of a trial, None without one, and whether it failed."""


def optimize(
    search: Search,
    budget: int,
    run: Callable[[Sequence[Trial]], Sequence[Outcome]],
    earlier: Sequence[TrialRecord] = (),
    save: Callable[[list[TrialRecord]], None] = lambda trials: None,
    at_a_time: int = 1,
) -> list[TrialRecord]:
    """Try values until the budget is spent.

    Args:
        search: a new one.
        budget: trials, those of before included.
        run: runs trials, reports their steps to them, and returns what each came to.
        earlier: trials of a search that was interrupted.
        save: called with all trials whenever some are finished.
        at_a_time: trials for each call of ``run``, if they are independent.

    Returns:
        All trials.

    Raises:
        ConfigurationError: earlier trials are not those of this search.
    """
    trials: list[TrialRecord] = []
    for record in earlier[:budget]:
        trial = search.ask(record["number"])
        if trial.values != record["values"]:
            raise ConfigurationError(
                f"Expected trial {record['number']} to have the values {record['values']}, as recorded, but this search "
                f"tries {trial.values}: the record is of another search, or of another release of Optuna. Give another --runs."
            )
        trial.report(record["after_task"])
        trial.finish(record["value"], record["state"] == "failed")
        trials.append(record)
    step = at_a_time if search.independent else 1
    while len(trials) < budget:
        numbers = range(len(trials), min(len(trials) + step, budget))
        asked = [search.ask(number) for number in numbers]
        for trial, (value, failed) in zip(asked, run(asked), strict=True):
            value = None if trial.pruned or failed else value
            trial.finish(value, failed)
            trials.append(_record(trial, value))
        save(trials)
    return trials


def _record(trial: Trial, value: float | None) -> TrialRecord:
    state = "pruned" if trial.pruned else "failed" if value is None else "complete"
    return {
        "number": trial.number,
        "values": trial.values,
        "state": state,
        "after_task": trial.reported,
        "value": value,
    }
