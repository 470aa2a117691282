"""A search for a method's values, read from a YAML and checked before anything runs.

::

    config: cifar100_inc.yaml             a file, one beside this one, or a packaged experiment
    method: gd+ewc                        one, as `bpn-fit --method` takes it
    space:                                what is searched
      strategies.bd.epsilon: {low: 0.01, high: 100.0, log: true, points: 5}     a range
      strategies.bd.schedule: [constant, linear]                                choices
    set: {model.optimizer.init_args.lr: 0.01}       flags of every run
    score: accuracy                       or accuracy_task_agnostic, where the task ID is not given
    seeds: [100]                          a trial's value is the mean over them
    validation_fraction: 0.1              of the training samples: what accuracies are measured on
    trials: 20                            at most; by default all points of the grid, and 20 of other samplers
    sampler: grid                         or random, tpe: Optuna's, the extra `tune`
    sampler_seed: 0
    pruner: median                        or halving: Optuna's; by default none
    stream: {class_order: [...]}          arguments of the tuning stream; by default chosen, see below

The tuning stream has other classes than the evaluated one where the data set has enough of them, else the same in an order that
the seed draws. Streams whose seed draws their tasks, such as permutations, have other seeds than the evaluation. The test set is
not used: accuracies are measured on the held-out part (``evaluation_split: val``).

No torch here: a wrong file is refused in a second, not after an import.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpn_lightning.bench.cell import UNTRUSTED, Cell, setting_flags
from bpn_lightning.bench.grid import check_key
from bpn_lightning.bench.search import PRUNERS, SAMPLERS
from bpn_lightning.bench.space import Space, grid_points, read_space
from bpn_lightning.checks import check_choice, check_positive_int
from bpn_lightning.cli.command import flag_values, read_command
from bpn_lightning.cli.config_files import CONFIGS, config_of, nearest_file, read_yaml
from bpn_lightning.errors import ConfigurationError, did_you_mean

__all__ = ["ARGUMENTS", "Tuning", "packaged_tunings", "read_tuning_file"]

_KEYS = (
    *("config", "method", "space", "set", "score", "seeds", "validation_fraction", "trials"),
    *("sampler", "sampler_seed", "pruner", "stream"),
)

SCORES = ("accuracy", "accuracy_task_agnostic")

ARGUMENTS = "data.init_args."
"""What the keys of a stream's arguments begin with."""

_OURS = ("validation_fraction", "evaluation_split", "class_order", "class_order_seed", "seed")
"""Arguments of the stream that a search sets itself."""

MOST_TRIALS = 10_000

TRIALS = 20
"""Of samplers that have no end of their own."""


@dataclass(frozen=True)
class Tuning:
    """A checked search.

    Args:
        name: of its file.
        config: for ``bpn-fit --config``.
        experiment: its name.
        method: whose values are searched.
        space: by key.
        settings: flags of every run.
        score: one of ``accuracy`` and ``accuracy_task_agnostic``.
        seeds: of the runs of each trial.
        validation_fraction: of the training samples.
        trials: budget.
        sampler: one of :data:`SAMPLERS`.
        sampler_seed: of the sampler.
        pruner: one of :data:`PRUNERS`, or None.
        stream: arguments of the tuning stream; None: chosen by the evaluated stream.
    """

    name: str
    config: str
    experiment: str
    method: str
    space: Space
    settings: Mapping[str, Any]
    score: str
    seeds: tuple[int, ...]
    validation_fraction: float
    trials: int
    sampler: str
    sampler_seed: int
    pruner: str | None
    stream: Mapping[str, Any] | None

    def cell(self, seed: int, label: str, settings: Mapping[str, Any]) -> Cell:
        """A run of the search."""
        own = tuple({**self.settings, **settings}.items())
        return Cell(self.config, self.experiment, self.method, seed, label, (), own)


def packaged_tunings() -> list[str]:
    """File names of the searches that come with this package."""
    return sorted(path.name for path in (CONFIGS / "tune").glob("*.yaml"))


def read_tuning_file(name: str, passed_on: Sequence[str] = ()) -> Tuning:
    """Read a search and check everything that can be known without torch.

    Args:
        name: a file, or a packaged search.
        passed_on: flags that every run gets besides.

    Raises:
        ConfigurationError: a key, a range, the config or the method is wrong; names it.
    """
    path = _find(name)
    content, where = read_yaml(path, "a search in YAML"), path.name
    for key in content:
        if key not in _KEYS:
            raise ConfigurationError(
                f"Expected the keys of {where} to be among {', '.join(_KEYS)}, but got {key!r}."
                f"{did_you_mean(key, _KEYS)}"
            )
    for key in ("config", "method"):
        if not isinstance(content.get(key), str):
            raise ConfigurationError(
                f"Expected {key} of {where} to be a name, but got {content.get(key)!r:.80}. Write `config: digits_inc.yaml` "
                "and `method: bd+ewc`: a search is for one method of one config."
            )
    config, method = content["config"], content["method"]
    config = config_of(path, config)
    space = read_space(content.get("space"), where)
    settings = _mapping(content, "set", where) or {}
    stream = _mapping(content, "stream", where)
    given = [*space, *settings, *(key for key, _ in flag_values(passed_on))]
    _check_keys(given, where)
    sampler, pruner = content.get("sampler", "grid"), content.get("pruner")
    check_choice(f"sampler of {where}", sampler, SAMPLERS)
    score = content.get("score", "accuracy")
    check_choice(f"score of {where}", score, SCORES)
    if pruner is not None:
        check_choice(f"pruner of {where}", pruner, PRUNERS)
        if sampler == "grid" or score != "accuracy":
            raise ConfigurationError(
                f"Expected pruner of {where} to be left out with the sampler grid and the score accuracy_task_agnostic, which is "
                f"not known before the end, but got {pruner}. Leave it out, or write `sampler: tpe`."
            )
    tuning = Tuning(
        name=path.stem,
        config=config,
        experiment=read_command(["--config", config, "--method", method, UNTRUSTED]).experiment,
        method=method,
        space=space,
        settings=settings,
        score=score,
        seeds=_seeds(content.get("seeds", [100]), where),
        validation_fraction=_fraction(content.get("validation_fraction", 0.1), where),
        trials=_trials(content.get("trials"), sampler, space, where),
        sampler=sampler,
        sampler_seed=_seeds(content.get("sampler_seed", 0), where, "sampler_seed")[0],
        pruner=pruner,
        stream=stream,
    )
    _check_command(tuning, passed_on, where)
    return tuning


def _find(name: str) -> Path:
    for path in (Path(name), CONFIGS / "tune" / name, CONFIGS / "tune" / f"{name}.yaml"):
        if path.is_file():
            return path
    raise ConfigurationError(
        f"Expected a search to be a file or one of {', '.join(packaged_tunings())}, but got {name!r}."
        f"{nearest_file(name, packaged_tunings())} bpn_lightning/bench/tuning.py shows what is in one."
    )


def _mapping(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any] | None:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigurationError(
            f"Expected {key} of {where} to hold keys and values, but got {value!r:.80}. Indent them below {key}."
        )
    return value


def _check_keys(keys: Sequence[str], where: str) -> None:
    for key in keys:
        if key == "trust":
            continue
        check_key(key, where)
        if key.startswith("data.") and key.rpartition(".")[2] in _OURS:
            raise ConfigurationError(
                f"Expected {where} and the flags to leave {key} to the search, but got it. What is held out is "
                "`validation_fraction:`, and what the tuning stream has instead of the evaluated one's classes is `stream:`."
            )
    if twice := {key for key in keys if list(keys).count(key) > 1}:
        raise ConfigurationError(
            f"Expected a key in only one of space, set and the flags of {where}, but got {min(twice)} twice."
        )


def _check_command(tuning: Tuning, passed_on: Sequence[str], where: str) -> None:
    """Let ``bpn-fit`` say what it would refuse of keys and names."""
    values = {key: one.values()[0] for key, one in tuning.space.items()}
    flags = setting_flags(tuple({**tuning.settings, **values}.items()))
    head = ["--config", tuning.config, "--method", tuning.method, UNTRUSTED]
    try:
        read_command([*head, *flags, *passed_on])
    except ConfigurationError as error:
        raise ConfigurationError(f"In {where}: {error}") from error


def _seeds(value: Any, where: str, name: str = "seeds") -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(type(one) is not int or not 0 <= one < 2**32 for one in numbers):
        raise ConfigurationError(
            f"Expected {name} of {where} to be whole numbers from 0, but got {value!r:.80}. Leave it out for the default."
        )
    if len(set(numbers)) < len(numbers):
        raise ConfigurationError(
            f"Expected {name} of {where} to be different numbers, but got {value}."
        )
    return tuple(numbers)


def _fraction(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1:
        raise ConfigurationError(
            f"Expected validation_fraction of {where} to be between 0 and 1, but got {value!r:.80}: values are chosen on held-out "
            "samples. Leave it out for 0.1."
        )
    return float(value)


def _trials(value: Any, sampler: str, space: Space, where: str) -> int:
    if value is not None:
        check_positive_int(f"trials of {where}", value, "Leave it out for the default.")
    if sampler != "grid":
        return int(value or TRIALS)
    if (points := len(grid_points(space))) > MOST_TRIALS:
        raise ConfigurationError(
            f"Expected the grid of {where} to have at most {MOST_TRIALS:,} points, but it has {points:,}. Lower the `points:` of "
            "ranges, or write `sampler: tpe`."
        )
    if value is not None and value != points:
        raise ConfigurationError(
            f"Expected trials of {where} to be left out or the {points} points of the grid, but got {value}. Lower the `points:` "
            "of ranges, or write `sampler: random`."
        )
    return points
