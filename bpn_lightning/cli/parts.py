"""What a command line uses by name, and the values that belong to it.

A method consists of strategies, or of gates that learn alone; ``gate:`` names gates joined by ``+``, and
``front:`` one front. Values are below ``strategies.<name>``, ``gates.<name>`` and ``fronts.<name>``. A folder of configs has tuned ones of an
experiment's gates and front in ``gates/<experiment>.yaml``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bpn_lightning import registry
from bpn_lightning.cli.config_files import ConfigLayer, read_layer
from bpn_lightning.errors import ConfigurationError, did_you_mean

__all__ = ["check_one_front", "check_values", "choose", "gates_alone", "tuned_layer"]

#: The option that names what is used of each kind.
OPTIONS = {"strategy": "method", "gate": "gate", "front": "front"}


def choose(option: str, wanted: object) -> dict[str, registry.Registered]:
    """The gates or the front that an option names, in order.

    Args:
        option: ``"gate"``, ``"front"``, or ``"method"`` of gates alone.
        wanted: its value; None for none.

    Raises:
        ConfigurationError: a name is unknown or given twice.
    """
    known = registry.registered("front" if option == "front" else "gate")
    names = [] if wanted is None else [str(wanted)] if option == "front" else str(wanted).split("+")
    for name in names:
        if name not in known:
            what = "a front" if option == "front" else "gates joined by '+'"
            raise ConfigurationError(
                f"Expected --{option} to be {what}, but got {wanted!r:.80} with the unknown {name!r:.80}."
                f"{did_you_mean(name, known)} It has to be one of {', '.join(known)}."
            )
        if names.count(name) > 1:
            raise ConfigurationError(
                f"Expected --{option} to name each gate once, but got {wanted!r}. Leave one {name!r} out."
            )
        known[name].check_name()
    return {name: known[name] for name in names}


def gates_alone(method: str, known_methods: Sequence[str]) -> dict[str, registry.Registered]:
    """The gates of a method that consists of nothing else, in order; empty for other methods.

    Args:
        method: names joined by ``+``.
        known_methods: methods that files describe.

    Raises:
        ConfigurationError: gates are joined to strategies, or one is named twice.
    """
    names, gates = method.split("+"), registry.gates()
    strategies = {*registry.strategies(), *registry.ALIASES}
    found = [name for name in names if name in gates and name not in strategies]
    if not found or method in known_methods:
        return {}
    others = [name for name in names if name not in found]
    if others:
        raise ConfigurationError(
            f"Expected --method to be strategies or gates joined by '+', but got both in {method!r}. Give the "
            f"gates by --gate: --method {'+'.join(others)} --gate {'+'.join(found)}."
        )
    return choose("method", method)


def check_values(
    kind: str,
    chosen: Mapping[str, object],
    owner: str,
    layers: Sequence[ConfigLayer],
    flags: Sequence[str],
) -> None:
    """Refuse values of what is not used, which would be ignored silently.

    Args:
        kind: ``"strategy"``, ``"gate"`` or ``"front"``.
        chosen: what is used of it, by name.
        owner: what uses it, for messages.
        layers: the config files.
        flags: names of the flags, without dashes.

    Raises:
        ConfigurationError: names the key.
    """
    group = registry.KINDS[kind].group
    named = [(f"{group}.{name}", name) for layer in layers for name in layer.values(group)]
    keys = [flag.split(".") for flag in flags]
    named += [(f"--{'.'.join(key)}", key[1]) for key in keys if key[0] == group and len(key) > 1]
    for spelling, name in named:
        if name not in chosen:
            remedy = f"{did_you_mean(name, chosen)} `bpn-fit --list` lists all {group}."
            if name in registry.registered(kind):
                remedy = f" Add it, such as by --{OPTIONS[kind]} {name}, or leave it out."
            raise ConfigurationError(
                f"Expected {spelling} to be about a {kind} of {owner} ({', '.join(chosen) or 'none'}), "
                f"but got {name!r}.{remedy}"
            )


def check_one_front(
    front: Mapping[str, object], layers: Sequence[ConfigLayer], flags: Sequence[str]
) -> None:
    """Refuse a front by name together with one by import path.

    Raises:
        ConfigurationError: names both.
    """
    stated = any(layer.values("model").get("front") is not None for layer in layers)
    stated |= any(flag.split(".")[:2] == ["model", "front"] for flag in flags)
    if front and stated:
        raise ConfigurationError(
            f"Expected either --front or model.front to give the front, but got both --front "
            f"{', '.join(front)} and model.front. Leave one out; model.front takes the import path of your "
            "own class."
        )


def tuned_layer(
    experiments: Sequence[str],
    folders: Sequence[Path],
    gates: Mapping[str, object],
    front: Mapping[str, object],
) -> ConfigLayer | None:
    """The tuned values of an experiment for the gates and the front that are used.

    Args:
        experiments: names, the first that has values decides.
        folders: of configs.
        gates: what is used, by name.
        front: likewise.
    """
    for path in (folder / "gates" / f"{name}.yaml" for name in experiments for folder in folders):
        if path.is_file() and (gates or front):
            return read_layer(path).only("gates", gates).only("fronts", front)
    return None
