"""The gates and the front of a command line: registered names, and values that belong to them.

``gate:`` names gates joined by ``+``, and ``front:`` one front. Values are below ``gates.<name>`` and
``fronts.<name>``. A folder of configs has tuned ones of an experiment in ``gates/<experiment>.yaml``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bpn_lightning import registry
from bpn_lightning.cli.config_files import ConfigLayer, read_layer
from bpn_lightning.errors import ConfigurationError, did_you_mean

__all__ = ["GROUPS", "check_values", "choose", "tuned_layer", "without_other"]

#: The group of values for each option.
GROUPS = {"gate": "gates", "front": "fronts"}


def choose(option: str, wanted: str | None) -> dict[str, registry.Registered]:
    """The registered classes that an option names, in order.

    Args:
        option: ``"gate"`` or ``"front"``.
        wanted: its value; None for none.

    Raises:
        ConfigurationError: a name is unknown or given twice.
    """
    known = registry.gates() if option == "gate" else registry.fronts()
    names = [] if wanted is None else wanted.split("+") if option == "gate" else [wanted]
    for name in names:
        if name not in known:
            what = "gates joined by '+'" if option == "gate" else "a front"
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


def check_values(
    option: str, chosen: Mapping[str, object], layers: Sequence[ConfigLayer], flags: Sequence[str]
) -> None:
    """Refuse values of what is not used, which would be ignored silently.

    Args:
        option: ``"gate"`` or ``"front"``.
        chosen: what it names.
        layers: the config files.
        flags: names of the flags, without dashes.

    Raises:
        ConfigurationError: names the key.
    """
    group = GROUPS[option]
    named = [(f"{group}.{name}", name) for layer in layers for name in layer.values(group)]
    keys = [flag.split(".") for flag in flags]
    if option == "front" and chosen and _states_front(layers, flags):
        raise ConfigurationError(
            f"Expected either --front or model.front to give the front, but got both --front "
            f"{', '.join(chosen)} and model.front. Leave one out; model.front takes the import path of your "
            "own class."
        )
    named += [(f"--{'.'.join(key)}", key[1]) for key in keys if key[0] == group and len(key) > 1]
    for spelling, name in named:
        if name not in chosen:
            used = ", ".join(chosen) or "none"
            raise ConfigurationError(
                f"Expected {spelling} to be about a {option} of the run ({used}), but got {name!r}."
                f"{did_you_mean(name, chosen)} Add it by --{option} {name}, or leave it out."
            )


def _states_front(layers: Sequence[ConfigLayer], flags: Sequence[str]) -> bool:
    in_files = any(layer.values("model").get("front") is not None for layer in layers)
    return in_files or any(flag.split(".")[:2] == ["model", "front"] for flag in flags)


def without_other(layer: ConfigLayer, option: str, chosen: Mapping[str, object]) -> ConfigLayer:
    """A config without the values of gates or fronts that are not used."""
    group = GROUPS[option]
    kept = {name: value for name, value in layer.values(group).items() if name in chosen}
    content = {key: value for key, value in layer.content.items() if key != group}
    return ConfigLayer(layer.name, {**content, group: kept} if kept else content)


def tuned_layer(
    experiments: Sequence[str], folders: Sequence[Path], chosen: Mapping[str, Mapping[str, object]]
) -> ConfigLayer | None:
    """The tuned values of an experiment for the gates and the front that are used.

    Args:
        experiments: names, the first that has values decides.
        folders: of configs.
        chosen: what each option names.
    """
    for path in (folder / "gates" / f"{name}.yaml" for name in experiments for folder in folders):
        if path.is_file() and any(chosen.values()):
            layer = read_layer(path)
            for option, names in chosen.items():
                layer = without_other(layer, option, names)
            return layer
    return None
