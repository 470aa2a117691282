"""Config files: the packaged ones, and reading a file as plain keys and values within limits."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.files.untrusted import MAX_CONFIG_BYTES, read_text

__all__ = [
    "CONFIGS",
    "PLACES",
    "ConfigLayer",
    "config_of",
    "find_config",
    "methods_of",
    "nearest_file",
    "packaged_configs",
    "read_layer",
    "read_yaml",
]

CONFIGS = Path(str(files("bpn_lightning.configs")))

#: Keys for where and how outputs are written: runs that differ only in these have the same results,
#: including config.yaml.
PLACES = (
    "runs",
    "to",
    "names",
    "overwrite",
    "ckpt_path",
    "logger",
    "log_artifacts",
    "quiet",
    "json",
)

#: Groups of which each key is a name with a mapping of its own.
NAMED = ("strategies", "gates", "fronts")

#: Keys whose value has to be a mapping; anything else would cause a traceback.
GROUPS = ("trainer", "model", *NAMED)

#: The maximum number of values in a config, counting aliases at each occurrence, which can expand to billions.
MAX_VALUES = 100_000

#: The number of characters of a text that count as one value.
CHARACTERS = 100


@dataclass
class ConfigLayer:
    """A config file: its name for messages, and its validated content."""

    name: str
    content: dict[str, Any]

    @property
    def text(self) -> str:
        """The content for ``--config``, so that the parser opens no file."""
        text: str = yaml.safe_dump(self.content, sort_keys=False)
        return text

    @property
    def strategies(self) -> dict[str, Any]:
        """The values of strategies, by their names."""
        return self.values("strategies")

    def values(self, group: str) -> dict[str, Any]:
        """The values of a group: of :data:`GROUPS`."""
        return self.content.get(group) or {}

    def only(self, group: str, names: Container[str] = ()) -> "ConfigLayer":
        """A copy with the values of these names of a group, and everything else."""
        kept = {name: value for name, value in self.values(group).items() if name in names}
        content = {key: value for key, value in self.content.items() if key != group}
        return ConfigLayer(self.name, {**content, group: kept} if kept else content)


def packaged_configs() -> list[str]:
    """File names of the packaged experiments."""
    return sorted(path.name for path in CONFIGS.glob("*.yaml"))


def methods_of(experiment: str, folder: Path = CONFIGS) -> list[str]:
    """Methods with tuned values for an experiment."""
    return sorted(path.stem for path in (folder / "methods" / experiment).glob("*.yaml"))


def find_config(name: str) -> Path:
    """Find a config by path, or a packaged config by name, with or without its suffix.

    Raises:
        ConfigurationError: neither exists.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    near = nearest_file(name, packaged_configs())
    raise ConfigurationError(
        f"Expected --config to be a file or a packaged config, but got {name!r}.{near} "
        "`bpn-fit --list` lists the packaged ones."
    )


def config_of(file: Path, config: str) -> str:
    """The config that a grid or a search names: a file, one beside it, or a packaged experiment.

    Beside those that are packaged there are others, some named as an experiment, and no config.

    Args:
        file: of the grid or the search.
        config: as it is named there.
    """
    beside = file.parent / config
    packaged = file.resolve().parent.parent == CONFIGS.resolve()
    return (
        str(beside) if not Path(config).is_file() and beside.is_file() and not packaged else config
    )


def read_yaml(path: Path, kind: str = "YAML") -> dict[str, Any]:
    """The keys and values of a file, in plain types and within limits.

    Args:
        path: the file.
        kind: its expected kind, for messages.

    Raises:
        ConfigurationError: it cannot be read, is not YAML with keys and values, or is too large.
    """
    try:
        content = yaml.safe_load(read_text(path, max_bytes=MAX_CONFIG_BYTES))
    except OSError as error:
        raise ConfigurationError(
            f"Expected {path} to be readable, but got {error.strerror}. Check its permissions."
        ) from error
    # Besides YAMLError: invalid UTF-8, dates or numbers, or too much nesting.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        if isinstance(error, RecursionError):
            problem = "it is nested too deeply"
        raise ConfigurationError(
            f"Expected {path} to be {kind}, but got an error{line}: {problem}. Correct that line."
        ) from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigurationError(
            f"Expected {path} to hold keys and values, but got {content!r:.80}. "
            "Start from the output of `bpn-fit --config digits_inc.yaml --print_config`."
        )
    if _count_values(content, MAX_VALUES) > MAX_VALUES:
        raise ConfigurationError(
            f"Expected {path} to hold at most {MAX_VALUES:,} values, but got more, counting those that "
            "aliases repeat. Remove the aliases."
        )
    return content


def _count_values(content: Any, enough: int) -> int:
    """The number of keys and values in a value, including itself; stops counting above ``enough``."""
    stack, count = [content], 0
    while stack and count <= enough:
        value = stack.pop()
        count += 1
        if isinstance(value, dict):
            stack += value.keys()
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str | bytes):
            count += len(value) // CHARACTERS
    return count


def nearest_file(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x.yaml'?"``, ignoring the common suffix in the comparison."""
    near = did_you_mean(Path(name).stem, [Path(one).stem for one in known])
    return near.replace("'?", ".yaml'?")


def read_layer(path: Path) -> ConfigLayer:
    """Read a config file, and check that groups of keys are mappings.

    Raises:
        ConfigurationError: it cannot be read, or a group is not a mapping.
    """
    content = read_yaml(path)
    for group in GROUPS:
        if group in content and not isinstance(content[group], Mapping):
            raise ConfigurationError(
                f"Expected `{group}:` in {path} to be a mapping, but got {content[group]!r}. "
                f"Put its keys below `{group}:`, indented."
            )
    for group in NAMED:
        for name, value in (content.get(group) or {}).items():
            if not isinstance(value, Mapping):
                raise ConfigurationError(
                    f"Expected `{group}.{name}:` in {path} to be a mapping, but got {value!r}. "
                    f"For its defaults write `{name}: {{}}`."
                )
    return ConfigLayer(str(path), content)
