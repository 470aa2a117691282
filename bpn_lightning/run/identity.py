"""The identity of a run, and the differences between two runs."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "CLASS_ORDER",
    "OBSERVED",
    "SEED_ORDER",
    "decides",
    "defining",
    "differences",
    "flatten",
    "is_method_folder",
    "method_folder",
    "named_value",
    "other_gates",
    "part_names",
    "run_name",
    "run_names",
    "setup_name",
    "short",
]

#: The keys that have to be the same in a run and its checkpoints; docs/resume.md lists those that may
#: differ.
DEFINING = (
    *("method", "gate", "front", "model", "data", "strategies", "gates", "fronts"),
    *(
        f"trainer.{flag}"
        for flag in (
            "precision",
            "accumulate_grad_batches",
            "gradient_clip_val",
            "gradient_clip_algorithm",
            "limit_train_batches",
            "sync_batchnorm",
        )
    ),
)

#: Arguments of streams and fronts for the location of their data.
DATA_PLACES = ("root", "path", "cache_dir", "download")

#: Keys that change when and where results are shown, but not the results.
OBSERVED = ("model.evaluate_every", "model.task_agnostic")

PARTS = ("gate", "front")
"""What a run may have besides a method."""

CLASS_ORDER = "data.init_args.class_order_seed"
"""The key by which the order of classes varies."""

SEED_ORDER = "stream"
"""Its value where the seed of the stream draws the order."""

MOST = 10
"""The maximum number of differences that a message names."""


def defining(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that determines the results, by dotted keys.

    >>> defining({"runs": "here", "data": {"init_args": {"root": "there", "batch_size": 8}}})
    {'data.init_args.batch_size': 8}
    """
    return {key: value for key, value in flatten(config).items() if decides(key)}


def decides(key: str) -> bool:
    """Whether a key of a configuration affects the results."""
    if key.startswith(("data.", "fronts.")) and key.rpartition(".")[2] in DATA_PLACES:
        return False
    return any(key == part or key.startswith(f"{part}.") for part in DEFINING)


def run_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Experiment, method, seed, gate and front, which determine the folder of a run.

    The last two are None where a run has none.
    """
    named = ("experiment", "method", "gate", "front")
    return {name: config.get(name) for name in named} | {"seed": config.get("seed_everything")}


def run_name(names: Mapping[str, Any]) -> str:
    """The same as readable text.

    >>> run_name({"experiment": "toy", "method": "psp", "gate": "slda", "front": None, "seed": 0})
    'toy, method psp, gate slda, seed 0'
    """
    parts = part_names(names["gate"], names["front"])
    first = [str(names["experiment"]), f"method {names['method']}"]
    return ", ".join([*first, *parts, f"seed {names['seed']}"])


def part_names(gate: str | None, front: str | None) -> list[str]:
    """Gates and front as readable texts, of those that a run has.

    >>> part_names("slda+ppca", None)
    ['gate slda+ppca']
    """
    return [f"{part} {name}" for part, name in zip(PARTS, (gate, front), strict=True) if name]


def other_gates(method: str, gates: Iterable[str]) -> str | None:
    """Gates that a method does not consist of, as ``--gate`` takes them.

    >>> other_gates("slda", ["slda", "ncm"]), other_gates("slda", ["slda"])
    ('ncm', None)
    """
    return "+".join(gate for gate in gates if gate not in method.split("+")) or None


def setup_name(method: str, gates: Iterable[str], front: str | None) -> str:
    """A method with the names of its gates and front, as titles and tables have it.

    >>> setup_name("psp", ["slda", "ncm"], "patches"), setup_name("slda", ["slda"], "random")
    ('psp, gate slda+ncm, front patches', 'slda, front random')
    """
    return ", ".join([method, *part_names(other_gates(method, gates), front)])


def method_folder(method: str, gate: str | None = None, front: str | None = None) -> str:
    """The name of the folder of a method's runs.

    >>> method_folder("psp"), method_folder("psp", "slda+ppca", "patches")
    ('psp', 'psp,gate=slda+ppca,front=patches')
    """
    named = zip(PARTS, (gate, front), strict=True)
    return ",".join([method, *(f"{part}={name}" for part, name in named if name is not None)])


def is_method_folder(folder: str, method: str) -> bool:
    """Whether a folder has the name that :func:`method_folder` gives with some gates and front.

    >>> is_method_folder("psp,front=patches", "psp"), is_method_folder("rank=10", "psp")
    (True, False)
    """
    return folder == method or folder.startswith(tuple(f"{method},{part}=" for part in PARTS))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, joining the keys by dots.

    >>> flatten({"model": {"mask": "all", "backbone": {"hidden": [64, 64]}}, "method": "ewc"})
    {'model.mask': 'all', 'model.backbone.hidden': [64, 64], 'method': 'ewc'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def short(key: str) -> str:
    """The last part of a dotted key.

    >>> short("strategies.bd.rank")
    'rank'
    """
    return key.rpartition(".")[2]


def named_value(key: str, value: Any) -> tuple[str, Any]:
    """What tables and folders call a setting and its value.

    >>> named_value("strategies.bd.rank", 8), named_value("data.init_args.class_order_seed", None)
    (('rank', 8), ('order', 'fixed'))
    """
    if key == CLASS_ORDER and value in (None, SEED_ORDER):
        return "order", "fixed" if value is None else "seed"
    return short(key), value


def differences(here: Mapping[str, Any], there: Mapping[str, Any], most: int = MOST) -> list[str]:
    """Describe the differences between the configurations of a run and an earlier one, per key.

    Args:
        here: of the run, by dotted keys.
        there: of the earlier one, or of its checkpoint.
        most: maximum number of keys to name; the others are counted.

    >>> differences({"mask": "all", "rank": 8}, {"mask": "seen", "epsilon": 0.1, "rank": 8})
    ["mask is 'all' here and 'seen' there", 'epsilon is not here and 0.1 there']
    """

    def describe(side: Mapping[str, Any], key: str) -> str:
        return repr(side[key]) if key in side else "not"

    missing = object()
    keys = [key for key in {**here, **there} if here.get(key, missing) != there.get(key, missing)]
    found = [
        f"{key} is {describe(here, key)} here and {describe(there, key)} there"
        for key in keys[:most]
    ]
    return [*found, f"and {len(keys) - most} more"] if len(keys) > most else found
