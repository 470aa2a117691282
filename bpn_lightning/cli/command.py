"""Parsing of a command line of ``bpn-fit``, before torch is imported.

Config files and the command line are merged in order of precedence, the last one winning::

    the past run's config.yaml < experiment files < the method's file < files with `strategies:` < `--tuned` < the command line

regardless of the order of flags. A file with ``strategies:`` (such as a run's resolved ``config.yaml``)
takes precedence over the method's file; if ``--method`` names another method than the files, their
``strategies:`` are ignored.

A method consists of registered names or class paths: the values of ``bd+my_lab.replay.Replay`` are below
``strategies.Replay``.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bpn_lightning import registry
from bpn_lightning.cli.config_files import CONFIGS, ConfigLayer, find_config, read_layer
from bpn_lightning.cli.parts import check_one_front, check_values, choose, gates_alone, tuned_layer
from bpn_lightning.cli.past import past_layers
from bpn_lightning.cli.trust import (
    FLAGS,
    Named,
    Trust,
    decide_trust,
    imported_by,
    named_classes,
    words,
)
from bpn_lightning.cli.tuned import TunedValues, read_tuned_values
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.files.writing import check_name
from bpn_lightning.terminal import is_utf8

__all__ = ["Command", "flag_values", "read_command"]


@dataclass(frozen=True)
class Command:
    """A command line in order of precedence.

    Args:
        layers: the config files and the method's values, in order of precedence.
        flags: the flags that override them, in their order.
        experiment: name of the results folder.
        method: name of the method.
        strategies: name of each strategy, in order, and its registry entry; None if a config or a flag
            gives its class path.
        gates: name of each gate, in order, and its registry entry.
        front: the same of the front; empty if there is none.
        plugins: streams of other packages that are used.
        tuned: the best values of a search, among the flags.
        trust: what may be imported by name.
        notices: messages for the user, before anything is imported.
    """

    layers: list[ConfigLayer]
    flags: list[str]
    experiment: str
    method: str
    strategies: dict[str, registry.Registered | None]
    gates: dict[str, registry.Registered]
    front: dict[str, registry.Registered]
    plugins: list[registry.Registered]
    tuned: TunedValues | None
    trust: Trust
    notices: list[str]

    @property
    def entries(self) -> dict[str, registry.Registered | None]:
        """The same of strategies, gates and front, by the keys of their values, such as ``gates.slda``."""
        groups: dict[str, Mapping[str, registry.Registered | None]] = {
            "strategies": self.strategies,
            "gates": self.gates,
            "fronts": self.front,
        }
        return {
            f"{group}.{name}": entry
            for group, named in groups.items()
            for name, entry in named.items()
        }

    @property
    def tuned_for(self) -> str | None:
        """The experiment whose tuned values the method has, or else its gates; None for other values."""
        places = [Path(layer.name).parent for layer in self.layers]
        method = next((place.name for place in places if place.parent.name == "methods"), None)
        gates = next((Path(one.name).stem for one in self.layers if _tunes_gates(one)), None)
        return method or gates

    @property
    def gates_alone(self) -> bool:
        """Whether the method is gates, beside which no network is trained."""
        return not self.strategies and set(self.method.split("+")) <= set(self.gates)

    @property
    def args(self) -> list[str]:
        """The arguments for the parser."""
        return [
            *(token for layer in self.layers for token in ("--config", layer.text)),
            *self.flags,
        ]


#: Flags that need no value, and what they do.
SWITCHES = {
    "trust": "import everything that the configs name",
    "past_data": "measure accuracies on the learned tasks too",
}


def read_command(argv: Sequence[str]) -> Command:
    """Find the files and the method, and order them by precedence, without importing what they name.

    Raises:
        ConfigurationError: a config, method or strategy is unknown, a file cannot be read, or it names
            a class that is not trusted.
    """
    flags, rest = _split(argv)
    paths = [find_config(name) for name in flags.config]
    layers = [read_layer(path) for path in paths]
    experiments = _experiments(flags.experiment, layers, paths)
    past = flags.continue_from
    past = _last(layers, "continue_from") if past is None else past
    if past is not None:
        layers = [*past_layers(past, flags.past_data), *layers]
    elif flags.past_data:
        raise ConfigurationError(
            "Expected --past_data together with --continue_from, but got it alone. Name the run whose "
            "streams it is to read."
        )
    folders = list(dict.fromkeys([*(path.parent for path in paths[:1]), CONFIGS]))
    places = [folder / "methods" / name for name in experiments for folder in folders]
    known_methods = sorted({path.stem for place in places for path in place.glob("*.yaml")})
    stated = _last(layers, "method")
    method = _method(flags.method or stated, known_methods)

    notices = []
    if flags.method is not None and flags.method != stated:
        for layer in [layer for layer in layers if layer.strategies]:
            notices.append(f"--method {method} overrides the `strategies:` of {layer.name}.")
        layers = [layer.only("strategies") if layer.strategies else layer for layer in layers]
    alone = gates_alone(method, known_methods)
    chosen: dict[str, registry.Registered | None] = {}
    method_layer: ConfigLayer | None = None
    if not alone:  # whose values are those of gates
        chosen, method_layer = _choose(method, places, known_methods, layers, rest)
        notices += _notice_of_values(method, experiments[0], chosen, method_layer, layers)
    check_values("strategy", chosen, f"the method {method!r}", layers, _flags(rest))

    first = next((i for i, layer in enumerate(layers) if layer.strategies), len(layers))
    if method_layer is not None:
        layers.insert(first, method_layer)
    gates, layers = _gates_or_front("gate", flags.gate, layers, rest, alone)
    front, layers = _gates_or_front("front", flags.front, layers, rest, {})
    if alone:
        layers.append(ConfigLayer(method, {"gates": {name: {"modes": 0} for name in gates}}))
    check_one_front(front, layers, _flags(rest))
    of_parts = tuned_layer(experiments, folders, gates, front)
    if of_parts is not None:
        layers.insert(0, of_parts)
    _check_text(argv, layers)

    plugins = _named_plugins(layers, rest)
    tuned = read_tuned_values(flags.tuned, method, experiments)
    by_files, typed = _named_classes(layers, rest, flags.method, method)
    entries = (*plugins, *chosen.values(), *gates.values(), *front.values())
    registered = [one.class_path for one in entries if one is not None]
    apart = ("runs", "to", "names", "ckpt_path")
    in_flags = [value for key, value in flag_values(rest) if key not in apart]
    trust = decide_trust(
        by_files + typed,
        in_files=words([*(layer.content for layer in layers), *registered]),
        typed=set() if flags.trust is False else words([*in_flags, flags.method]),
        everything=flags.trust is True,
    )
    return Command(
        layers=layers,
        flags=[
            f"--experiment={experiments[0]}",
            f"--method={method}",
            *([] if flags.gate is None else [f"--gate={flags.gate}"]),
            *([] if flags.front is None else [f"--front={flags.front}"]),
            *([] if past is None else [f"--continue_from={past}"]),
            *([] if tuned is None else tuned.flags),
            *rest,  # last, since `--data.help CLASS` consumes the rest of the line
        ],
        experiment=experiments[0],
        method=method,
        strategies=chosen,
        gates=gates,
        front=front,
        plugins=plugins,
        tuned=tuned,
        trust=trust,
        notices=notices + imported_by(by_files),
    )


def _split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the flags for files and method from the others, which keep their order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--method")
    parser.add_argument("--experiment")
    parser.add_argument("--gate")
    parser.add_argument("--front")
    parser.add_argument("--continue_from")
    parser.add_argument("--tuned")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", nargs="?", const="true")
    try:
        flags, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigurationError(
            f"Expected {error.argument_name} to be followed by a value, but got none. "
            "`bpn-fit --help` shows the usage."
        ) from error
    for name, effect in SWITCHES.items():
        value = getattr(flags, name)
        if value not in (None, "true", "false"):
            raise ConfigurationError(
                f"Expected --{name} to be true or false, but got {value!r}. Use --{name} to {effect}."
            )
        setattr(flags, name, None if value is None else value == "true")
    return flags, rest


def _tunes_gates(layer: ConfigLayer) -> bool:
    """Whether a layer is a file of tuned values for gates, and has some that are used."""
    return Path(layer.name).parent.name == "gates" and bool(layer.content)


def _last(layers: Sequence[ConfigLayer], key: str) -> str | None:
    values = [layer.content[key] for layer in layers if layer.content.get(key) is not None]
    return str(values[-1]) if values else None


def _experiments(
    typed: str | None, layers: Sequence[ConfigLayer], paths: Sequence[Path]
) -> list[str]:
    """The name of the results folder, and those of the experiments on which it is based.

    A renamed experiment uses the values that were tuned for the original one.
    """
    wanted = [typed, _last(layers, "experiment"), *(path.stem for path in paths[:1])]
    names = list(dict.fromkeys(str(name) for name in wanted if name)) or ["unnamed"]
    for name in names:
        check_name("experiment", name)
    return names


def _method(wanted: str | None, known: Sequence[str]) -> str:
    """The name of the method, which has to be given."""
    if wanted is None:
        raise ConfigurationError(
            "Expected --method (or `method:` in a config) to name a method, but got none. "
            f"Try --method {known[0] if known else 'bd+ewc'}; `bpn-fit --list` lists them."
        )
    check_name("method", wanted)
    return wanted


def _notice_of_values(
    method: str,
    experiment: str,
    chosen: Iterable[str],
    method_layer: ConfigLayer | None,
    layers: Sequence[ConfigLayer],
) -> list[str]:
    """A notice if the strategies use values that are not tuned for the experiment."""
    if method_layer is None or method_layer.name == method:
        given = {name for layer in layers for name in layer.strategies}
        untuned = f"There are no tuned values of {method} for {experiment}"
        return [] if set(chosen) <= given else [f"{untuned}: its strategies use their defaults."]
    source = Path(method_layer.name).parent.name
    return [] if source == experiment else [f"The values of {method} are those tuned for {source}."]


def _check_text(argv: Sequence[str], layers: Sequence[ConfigLayer]) -> None:
    """Refuse bytes that config.yaml cannot hold."""
    for where, values in [(FLAGS, list(argv)), *((layer.name, layer.content) for layer in layers)]:
        if not is_utf8(json.dumps(values, ensure_ascii=False, default=str, skipkeys=True)):
            raise ConfigurationError(
                f"Expected {where} to be UTF-8 text, the encoding of config.yaml, but got other "
                "bytes. Rename the folder or file."
            )


def _gates_or_front(
    option: str,
    typed: str | None,
    layers: list[ConfigLayer],
    rest: Sequence[str],
    of_method: Mapping[str, registry.Registered],
) -> tuple[dict[str, registry.Registered], list[ConfigLayer]]:
    """The gates or the front that are used, and the configs without values of those that a flag replaces.

    Raises:
        ConfigurationError: a name is unknown, or given twice.
    """
    if typed is None:
        stated = [layer.content[option] for layer in layers if option in layer.content]
        chosen = choose(option, stated[-1] if stated else None)
    else:
        chosen = choose(option, None if typed == "null" else typed)
    for name in of_method:
        if name in chosen:
            raise ConfigurationError(
                f"Expected --{option} to name others than the method, but got {name!r} in both. Leave "
                f"--{option} {name} out."
            )
    chosen = {**of_method, **chosen}
    if typed is not None:
        layers = [layer.only(registry.KINDS[option].group, chosen) for layer in layers]
    check_values(option, chosen, "the run", layers, _flags(rest))
    return chosen, layers


def _choose(
    method: str,
    places: Sequence[Path],
    known_methods: Sequence[str],
    layers: Sequence[ConfigLayer],
    rest: Sequence[str],
) -> tuple[dict[str, registry.Registered | None], ConfigLayer | None]:
    """The method's strategies in order, and the config with its values, if there is one."""
    known = registry.strategies()
    by_path = _with_class_path(layers, rest)
    given = [name for layer in layers for name in layer.strategies]
    known |= _by_class_path(method)
    for place in places:
        path = place / f"{method}.yaml"
        if path.is_file():
            layer = read_layer(path)
            return _look_up(list(layer.strategies), method, known, by_path, known_methods), layer
    parts = method.split("+")
    names = {*registry.ALIASES, *known, *by_path}
    if given and not all(part in names or registry.is_class_path(part) for part in parts):
        parts = list(dict.fromkeys(given))
    values: dict[str, dict[str, Any]] = {}
    for part in parts:
        name, arguments = _strategy_and_values(part, known)
        if name in values:
            raise ConfigurationError(
                f"Expected --method to name each strategy once, but got {method!r}. "
                f"Leave one {part!r} out."
            )
        values[name] = arguments
    chosen = _look_up(list(values), method, known, by_path, known_methods)
    arguments = {name: value for name, value in values.items() if value}
    content = {"strategies": arguments}
    return chosen, ConfigLayer(method, content) if arguments else None


def _by_class_path(method: str) -> dict[str, registry.Registered]:
    """The strategies of a method that are given by class path, by the names of the classes."""
    paths = [part for part in method.split("+") if registry.is_class_path(part)]
    found = {}
    for one in map(registry.by_class_path, paths):
        if one.name in found:
            raise ConfigurationError(
                f"Expected --method to list classes with different names, but got {method!r} with "
                f"{one.name!r} twice. Leave one out, or give one another name: "
                f"`strategies: {{other: {{class_path: {one.class_path}}}}}`."
            )
        found[one.name] = one
    return found


def _strategy_and_values(
    part: str, known: Mapping[str, registry.Registered]
) -> tuple[str, dict[str, Any]]:
    """The key of a strategy for a part of a method, and the values of an alias."""
    if registry.is_class_path(part):
        return part.rpartition(".")[2], {}
    if part in registry.ALIASES and part in known:
        known[part].check_name()  # a plugin uses the same name
    return registry.ALIASES.get(part, (part, {}))


def _look_up(
    names: Sequence[str],
    method: str,
    known: Mapping[str, registry.Registered],
    by_path: Iterable[str],
    known_methods: Sequence[str],
) -> dict[str, registry.Registered | None]:
    for name in names:
        if name not in known and name not in by_path:
            parts = [*known, *registry.ALIASES]
            near = did_you_mean(name, [*known_methods, *parts] if name == method else parts)
            raise ConfigurationError(
                f"Expected --method to be strategies joined by '+', but got {method!r} with the "
                f"unknown {name!r}.{near} `bpn-fit --list` lists methods and strategies; "
                "use the full import path of your own class, package.module.Class."
            )
        if name in known:
            known[name].check_name()
    return {name: known.get(name) for name in names}


def _with_class_path(layers: Sequence[ConfigLayer], rest: Sequence[str]) -> set[str]:
    """Names of strategies that are given as ``{class_path, init_args}``."""
    found = {
        name
        for layer in layers
        for name, value in layer.strategies.items()
        if "class_path" in value
    }
    for flag in _flags(rest):
        keys = flag.split(".")
        if keys[0] == "strategies" and (len(keys) == 2 or keys[2:] == ["class_path"]):
            found.add(keys[1])
    return found


def _named_classes(
    layers: Sequence[ConfigLayer], rest: Sequence[str], typed_method: str | None, method: str
) -> tuple[list[Named], list[Named]]:
    """Classes that are given by class path, in files and on the command line."""
    found = [one for layer in layers for one in named_classes(layer.name, layer.content)]
    in_files = [one for one in found if one.key != "method"]
    typed = [one for key, value in flag_values(rest) for one in named_classes(FLAGS, value, key)]
    if typed_method is None:
        of = next(one.name for one in reversed(layers) if one.content.get("method") is not None)
        in_files += named_classes(of, method, "method")
    else:
        typed += named_classes(FLAGS, method, "method")
    return in_files, typed


def flag_values(rest: Sequence[str]) -> list[tuple[str, Any]]:
    """The flags and their values, parsed as YAML."""
    pairs = []
    for token, following in zip(rest, [*rest, ""][1:], strict=True):
        if token.startswith("--"):
            key, equals, attached = token[2:].partition("=")
            text = attached if equals else following
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError, RecursionError):
                value = text
            pairs.append((key.removesuffix("+"), value))
    return pairs


def _flags(rest: Sequence[str]) -> list[str]:
    """The names of the flags, without dashes, values and the ``+`` that appends."""
    return [
        token[2:].partition("=")[0].removesuffix("+") for token in rest if token.startswith("--")
    ]


def _named_plugins(layers: Sequence[ConfigLayer], rest: Sequence[str]) -> list[registry.Registered]:
    """The streams of other packages that are used; unknown or ambiguous names are errors."""
    known = registry.streams()
    stated: list[Any] = []
    for layer in layers:
        data = layer.content.get("data")
        stated.append(data.get("class_path") if isinstance(data, Mapping) else data)
    for token, value in zip(rest, [*rest, ""][1:], strict=True):
        key, equals, attached = token.partition("=")
        if key in ("--data", "--data.class_path", "--data.help"):
            stated.append(attached if equals else value)
    names = [name for name in stated if isinstance(name, str)]
    for name in names:
        if name.isidentifier() and name not in known:
            raise ConfigurationError(
                f"Expected data.class_path to be a stream, but got {name!r}."
                f"{did_you_mean(name, known)} `bpn-fit --list` lists them; "
                "use the full import path of your own class, package.module.Class."
            )
    for name in names[-1:]:  # the last one takes precedence
        if name in known:
            known[name].check_name()
    named = [known[name] for name in dict.fromkeys(names) if name in known]
    return [one for one in named if one.origin != registry.BUILT_IN]
