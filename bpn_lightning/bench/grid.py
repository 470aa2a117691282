"""A grid: experiments x methods x seeds, read from a YAML and checked before anything runs.

::

    title: Every method on the digits
    text: What it shows, in plain words.
    seeds: [0, 1, 2]
    order: seed                           classes in an order that each seed draws, one for all
                                          methods, where the stream has one; fixed: as the config
                                          has them; [fixed, seed]: both, as rows of their own
    experiments:
      - config: digits_inc.yaml           a file, one beside the grid, or a packaged one
        methods: all                      those with tuned values, or a list
        gate: slda+ncm                    as `bpn-fit --gate` takes them
        front: patches                    as `bpn-fit --front` takes it
        set: {data.init_args.epochs_per_task: 5}              flags of every run
        vary: {strategies.bd.rank: [1, 10, 100]}              one run per value
        tuned: FILE                       tuning.json of `bpn-bench tune`: its best values for the one method
        label: short                      tells apart entries with the same config
        seeds: [0]                        instead of the grid's, and so is
        order: fixed
        probes: [drift]                   looks into the network after each task
      - config: cifar10_inc.yaml
        methods: all
        not_run: CIFAR-10's images were not at hand.          a row, and no run
    compare: [[bd+ewc, ewc]]              pairs for the paired tests, as tables name them: of what
                                          is varied, ["bd+ewc, rank 1", "bd+ewc, rank 10"]
    report: [accuracy, paired_tests]      what is made of the results

No torch here: a grid is refused in a second, not after an import.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from bpn_lightning.analysis.collection import NotRun
from bpn_lightning.bench.cell import (
    PROBES,
    UNTRUSTED,
    Cell,
    part_flags,
    setting_flags,
    tuned_flags,
)
from bpn_lightning.bench.orders import ORDER, class_orders
from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.config_files import CONFIGS, config_of, methods_of, nearest_file, read_yaml
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.files.writing import check_name
from bpn_lightning.run.identity import CLASS_ORDER, PARTS, named_value

__all__ = [
    "ARTIFACTS",
    "OPTIONS",
    "Grid",
    "check_key",
    "find_grid",
    "only",
    "packaged_grids",
    "read_grid",
]

ARTIFACTS = (
    "accuracy",
    "bytes_per_task",
    "table_1",
    "table_2",
    "figure_5",
    "figure_6",
    "figure_7",
    "sweeps",
    "gains",
    "drift",
    "parameters",
    "paired_tests",
    "gates",
    "dips",
    "moves",
)
"""What ``report:`` may name, in the order of :mod:`bpn_lightning.bench.report`."""

GROUPS = ("trainer", "model", "data", "strategies", "gates", "fronts")
"""What the keys of a run begin with."""

SINGLE_KEYS = tuple(
    f"checkpoint_every_n_{unit}" for unit in ("steps", "epochs", "tasks", "minutes")
)

OPTIONS = ("--jobs", "--executor", "--address", "--gpus", "--retry", "--only", "--runs", "--out")
"""Of ``bpn-bench`` itself."""

GRIDS = CONFIGS / "bench"
"""Where the grids are that come with this package."""

MOST_RUNS = 10_000

_KEYS = ("title", "text", "seeds", ORDER, "experiments", "compare", "report")
_ENTRY_KEYS = (
    *("config", "methods", "gate", "front", "seeds", ORDER, "set", "vary", "label", "probes"),
    *("tuned", "not_run"),
)


@dataclass(frozen=True)
class Grid:
    """A checked grid.

    Args:
        name: of its file.
        title: of its report.
        text: what it shows.
        cells: the runs, in the order of the file.
        not_run: entries without runs.
        compare: pairs of methods for the paired tests.
        report: names of :data:`ARTIFACTS`.
    """

    name: str
    title: str
    text: str
    cells: tuple[Cell, ...]
    not_run: tuple[NotRun, ...]
    compare: tuple[tuple[str, str], ...]
    report: tuple[str, ...]


def check_key(key: str, where: str) -> None:
    """Refuse at once what ``bpn-fit`` would refuse in every run.

    Raises:
        ConfigurationError: the key belongs to no part of a run.
    """
    group, dot, _ = key.partition(".")
    if not (dot and group in GROUPS) and key not in SINGLE_KEYS:
        known = [*(f"{name}." for name in GROUPS), *SINGLE_KEYS]
        raise ConfigurationError(
            f"Expected a key in {where} to begin with {', '.join(known)}, but got {key!r}."
            f"{did_you_mean(group + dot, [*known, *OPTIONS])} `bpn-fit --help_all` shows all keys."
        )


def packaged_grids() -> list[str]:
    """File names of the grids that come with this package."""
    return sorted(path.name for path in GRIDS.glob("*.yaml"))


def find_grid(name: str) -> Path:
    """A path first, then a packaged grid, with or without its suffix.

    Raises:
        ConfigurationError: there is none.
    """
    for path in (Path(name), GRIDS / name, GRIDS / f"{name}.yaml"):
        if path.is_file():
            return path
    near = nearest_file(name, packaged_grids())
    raise ConfigurationError(
        f"Expected a grid to be a file or one of {', '.join(packaged_grids())}, but got {name!r}.{near}"
    )


def read_grid(name: str, passed_on: Sequence[str] = ()) -> Grid:
    """Read a grid and check everything that can be known without torch.

    Args:
        name: a file, or a packaged grid.
        passed_on: flags that every run gets besides.

    Raises:
        ConfigurationError: a key, a config, a method, a seed or a strategy is wrong; names it.
    """
    path = find_grid(name)
    content = read_yaml(path, "a grid in YAML")
    where = path.name
    _check_keys(content, _KEYS, where)
    seeds = _seeds(content.get("seeds", [0]), f"seeds of {where}")
    common = {ORDER: content[ORDER]} if ORDER in content else {}
    cells: list[Cell] = []
    not_run: list[NotRun] = []
    for number, entry in enumerate(_list(content, "experiments", where), start=1):
        here = f"experiment {number} of {where}"
        if not isinstance(entry, Mapping):
            raise ConfigurationError(
                f"Expected {here} to hold keys and values, but got {entry!r}. "
                "Write `- config: digits_inc.yaml` and `methods: all` below it."
            )
        _check_keys(entry, _ENTRY_KEYS, here)
        found = _cells(entry, common, seeds, path, here, passed_on)
        if "not_run" in entry:
            methods = tuple(dict.fromkeys(cell.method for cell in found))
            not_run.append(NotRun(found[0].experiment, methods, str(entry["not_run"])))
        else:
            cells += found
    _check_twice(cells, where)
    known = {name for cell in cells for name in (cell.method, cell.setup, cell.row)}
    known |= {method for one in not_run for method in one.methods}
    return Grid(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        text=str(content.get("text", "")).strip(),
        cells=tuple(cells),
        not_run=tuple(not_run),
        compare=_pairs(content.get("compare") or [], known, where),
        report=_report(content.get("report", ["accuracy"]), where),
    )


def only(cells: Iterable[Cell], words: Sequence[str]) -> list[Cell]:
    """The cells that some words name: experiments, labels, methods, ``seed_0``, ``rank=10``.

    Words of one kind are alternatives, words of different kinds have to hold together.

    Raises:
        ConfigurationError: no cell has such a word.
    """
    cells = list(cells)
    kinds: dict[str, set[str]] = {}
    for word in words:
        kind = next((kind for cell in cells for kind, has in _words(cell) if has == word), None)
        if kind is None:
            known = list(dict.fromkeys(has for cell in cells for _, has in _words(cell)))
            raise ConfigurationError(
                f"Expected --only to name an experiment, a method or a seed of the grid, but got {word!r}."
                f"{did_you_mean(word, known)} It has {', '.join(known)}."
            )
        kinds.setdefault(kind, set()).add(word)
    return [
        cell
        for cell in cells
        if all(any((kind, word) in _words(cell) for word in kinds[kind]) for kind in kinds)
    ]


def _words(cell: Cell) -> list[tuple[str, str]]:
    varied = [(key, "{}={}".format(*named_value(key, value))) for key, value in cell.variant]
    named = [("experiment", cell.experiment), ("method", cell.method), ("label", cell.label)]
    return [pair for pair in (*named, ("seed", f"seed_{cell.seed}"), *varied) if pair[1]]


def _cells(
    entry: Mapping[str, Any],
    common: Mapping[str, Any],
    seeds: tuple[int, ...],
    grid: Path,
    here: str,
    passed_on: Sequence[str],
) -> list[Cell]:
    if not isinstance(entry.get("config"), str):
        raise ConfigurationError(
            f"Expected config of {here} to name an experiment, but got {entry.get('config')!r}. "
            "`bpn-fit --list` shows the packaged ones."
        )
    config = config_of(grid, entry["config"])
    trust = [word for word in passed_on if word.partition("=")[0] == "--trust"]
    command = _command(["--config", config, UNTRUSTED, *trust], here)
    experiment = command.experiment
    if "seeds" in entry:
        seeds = _seeds(entry["seeds"], f"seeds of {here}")
    settings = tuple(_mapping(entry, "set", here).items())
    varied = _mapping(entry, "vary", here)
    for key, values in varied.items():
        if not isinstance(values, list) or not values:
            raise ConfigurationError(
                f"Expected vary of {here} to give {key} a list of values, but got {values!r}. "
                f"Write {key}: [{values}]; `set:` takes single values."
            )
    orders = class_orders(entry, common, command, (settings, varied, passed_on), here)
    if len(orders) == 1:
        settings += ((CLASS_ORDER, orders[0]),)
    elif orders:
        varied = {CLASS_ORDER: [*orders], **varied}
    count = prod(map(len, varied.values())) * len(seeds)
    if count > MOST_RUNS:
        raise ConfigurationError(
            f"Expected {here} to make at most {MOST_RUNS:,} runs of a method, but got {count:,}. Vary "
            "fewer keys together, in entries of their own."
        )
    variants = [tuple(zip(varied, values, strict=True)) for values in product(*varied.values())]
    methods = _methods(entry, config, experiment, here)
    label = str(entry.get("label", ""))
    if label:
        check_name(f"label of {here}", label)
    for key in (*dict(settings), *varied):
        check_key(str(key), here)
    gate, front = (_part(entry, key, here) for key in PARTS)
    tuned = _tuned(entry, methods, grid, here)
    for method, variant in product(methods, variants):
        flags = setting_flags(settings + variant)
        head = ["--config", config, "--method", method, UNTRUSTED, *part_flags(gate, front)]
        read = _command([*head, *tuned_flags(tuned), *flags, *passed_on], here)
        if read.tuned is not None:  # so that an earlier run with other values is found out
            own = {key for key, _ in (*settings, *variant)}
            settings += tuple((k, v) for k, v in read.tuned.values.items() if k not in own)
    probes = entry.get("probes") or ()
    probes = tuple(probes) if isinstance(probes, list) else (probes,) if probes else ()
    for name in probes:
        if name not in list(PROBES):
            raise ConfigurationError(
                f"Expected probes of {here} to name some of {', '.join(PROBES)}, but got {name!r}."
                f"{did_you_mean(str(name), PROBES)}"
            )
    cells = [
        Cell(config, experiment, method, seed, label, variant, settings, probes, gate, front, tuned)
        for variant, method, seed in product(variants, methods, seeds)
    ]
    for cell in cells:
        if varied:
            check_name(f"the values of vary of {here}, joined,", cell.runs(Path()).name)
    return cells


def _part(entry: Mapping[str, Any], key: str, here: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(
            f"Expected {key} of {here} to be a name, but got {value!r:.80}. Write `{key}: "
            f"{'slda+ncm' if key == 'gate' else 'patches'}`."
        )
    return value


def _tuned(entry: Mapping[str, Any], methods: Sequence[str], grid: Path, here: str) -> str | None:
    """The file, beside the grid or where the command is called."""
    value = entry.get("tuned")
    if value is None:
        return None
    if len(methods) > 1:
        raise ConfigurationError(
            f"Expected one method in {here}, which has the values of one search, but got {', '.join(methods)}. "
            "Write an entry for each."
        )
    if not isinstance(value, str):
        raise ConfigurationError(
            f"Expected tuned of {here} to be a file, but got {value!r:.80}. `bpn-bench tune` writes it."
        )
    beside = grid.parent / value
    return str(beside) if beside.exists() and not Path(value).exists() else value


def _methods(entry: Mapping[str, Any], config: str, experiment: str, here: str) -> list[str]:
    wanted = entry.get("methods")
    if wanted == "all":
        folders = [Path(config).parent, CONFIGS]
        found = {method for folder in folders for method in methods_of(experiment, folder)}
        wanted = sorted(found)
    if not isinstance(wanted, list) or not wanted or not all(isinstance(m, str) for m in wanted):
        raise ConfigurationError(
            f"Expected methods of {here} to be a list of names, or `all` with tuned values, but got "
            f"{wanted!r}. `bpn-fit --list` shows them."
        )
    return wanted


def _command(argv: Sequence[str], here: str) -> Any:
    """What ``bpn-fit`` would make of these flags, so that its own words say what is wrong."""
    try:
        return read_command(argv)
    except ConfigurationError as error:
        raise ConfigurationError(f"In {here}: {error}") from error


def _check_keys(content: Mapping[str, Any], known: Sequence[str], here: str) -> None:
    for key in content:
        if key not in known:
            raise ConfigurationError(
                f"Expected the keys of {here} to be among {', '.join(known)}, but got {key!r}."
                f"{did_you_mean(str(key), known)}"
            )


def _list(content: Mapping[str, Any], key: str, here: str) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list) or not value:
        raise ConfigurationError(
            f"Expected {key} of {here} to be a list, but got {value!r:.80}. "
            "Give it at least one entry, `- config: digits_inc.yaml`."
        )
    return value


def _mapping(entry: Mapping[str, Any], key: str, here: str) -> dict[str, Any]:
    value = entry.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"Expected {key} of {here} to hold keys and values, but got {value!r:.80}. "
            "Write {model.optimizer.init_args.lr: 0.1}."
        )
    return value


def _seeds(value: Any, here: str) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    for seed in numbers:
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ConfigurationError(
                f"Expected {here} to be whole numbers from 0, but got {seed!r}. Write [0, 1, 2]."
            )
    if not numbers or len(set(numbers)) != len(numbers):
        raise ConfigurationError(
            f"Expected {here} to be different numbers, but got {numbers}. Name each seed once."
        )
    return tuple(numbers)


def _pairs(value: Any, methods: Iterable[str], where: str) -> tuple[tuple[str, str], ...]:
    known = sorted(methods)
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigurationError(
                f"Expected compare of {where} to be pairs of methods, but got {pair!r}. "
                "Write [[bd+ewc, ewc]]."
            )
        for method in pair:
            if method not in known:
                raise ConfigurationError(
                    f"Expected compare of {where} to name methods of the grid, but got {method!r}."
                    f"{did_you_mean(str(method), known)} It has {', '.join(known)}."
                )
    return tuple((str(first), str(second)) for first, second in value)


def _report(value: Any, where: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in ARTIFACTS:
            raise ConfigurationError(
                f"Expected report of {where} to name some of {', '.join(ARTIFACTS)}, but got {name!r}."
                f"{did_you_mean(str(name), ARTIFACTS)}"
            )
    return tuple(names)


def _check_twice(cells: Sequence[Cell], where: str) -> None:
    """Two cells in one folder would be one run."""
    folders = Counter(cell.folder(Path()) for cell in cells)
    for cell in cells:
        if folders[cell.folder(Path())] > 1:
            raise ConfigurationError(
                f"Expected the entries of {where} to differ, but got {cell.name} twice. "
                "Give one of them a `label:`, or leave it out."
            )
