"""The run that a command line goes on from with new tasks, and those before it; nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpn_lightning.cli.config_files import ConfigLayer, read_layer
from bpn_lightning.errors import ConfigurationError

__all__ = ["PastRun", "find_past", "first_experiment", "past_layers", "runs_before"]

#: Keys of a run's config.yaml that are not those of a run that goes on from it.
_OWN = ("data", "experiment", "continue_from", "past_data")

MAX_RUNS = 1000
"""Of a stream that was learned in several runs."""


@dataclass(frozen=True)
class PastRun:
    """A run whose tasks are learned.

    Args:
        folder: of the run; where the checkpoint stands alone, the folder that would be it.
        checkpoint: from which another run goes on.
    """

    folder: Path
    checkpoint: Path

    @property
    def layer(self) -> ConfigLayer | None:
        """The run's config.yaml, if it is there."""
        config = self.folder / "config.yaml"
        return read_layer(config) if config.is_file() else None


def find_past(wanted: str, option: str = "continue_from") -> PastRun:
    """A run by its folder, or by one of its checkpoints.

    Args:
        wanted: the path.
        option: that gave it, for messages.

    Raises:
        ConfigurationError: neither is there.
    """
    path = Path(wanted)
    if path.is_dir():
        found = PastRun(path, path / "checkpoints" / "last.ckpt")
    else:
        found = PastRun(path.parent.parent, path)
    if not found.checkpoint.is_file():
        raise ConfigurationError(
            f"Expected {option} to be the folder of a finished run or one of its checkpoints, but "
            f"there is no file {str(found.checkpoint)!r}. Runs are in <runs>/<experiment>/<method>/seed_<n>."
        )
    return found


def past_layers(wanted: str, with_data: bool) -> list[ConfigLayer]:
    """What a run that goes on takes over from the past one's configuration: all but the stream.

    Args:
        wanted: the past run; see :func:`find_past`.
        with_data: whether the streams that were learned are read again, to measure accuracies on their
            tasks: ``past_data`` lists them, the oldest first.

    Raises:
        ConfigurationError: a run is not there, has no config.yaml, or goes on from itself.
    """
    run = find_past(wanted)
    layer = run.layer
    content = {} if layer is None else dict(layer.content)
    content = {key: value for key, value in content.items() if key not in _OWN}
    if with_data:
        content["past_data"] = [_stream(one) for one in runs_before(run)]
    name = str(run.folder / "config.yaml") if layer is not None else str(run.checkpoint)
    return [ConfigLayer(name, content)] if content else []


def runs_before(run: PastRun) -> list[PastRun]:
    """A run and those that it goes on from, the oldest first.

    Raises:
        ConfigurationError: one is not there, or they have no beginning.
    """
    found = [run]
    while (layer := found[0].layer) is not None:
        before = layer.content.get("continue_from")
        if before is None:
            return found
        found.insert(0, find_past(str(before)))
        if len(found) > MAX_RUNS:
            raise ConfigurationError(
                f"Expected continue_from to lead to a first run, but got more than {MAX_RUNS} runs: "
                f"{run.folder} goes on from itself. Correct its config.yaml."
            )
    return found


def first_experiment(run: PastRun) -> str:
    """The experiment in which a stream began, or that of the oldest of its runs that is still there."""
    for _ in range(MAX_RUNS):
        before = None if run.layer is None else run.layer.content.get("continue_from")
        if before is None:
            break
        try:
            run = find_past(str(before))
        except ConfigurationError:  # it is needed for its data only
            break
    named = None if run.layer is None else run.layer.content.get("experiment")
    return run.folder.parent.parent.name if named is None else str(named)


def _stream(run: PastRun) -> Any:
    """The ``data:`` of a run."""
    data = None if run.layer is None else run.layer.content.get("data")
    if data is None:
        raise ConfigurationError(
            f"Expected past_data to find each past stream in its run's config.yaml, but {run.folder} has "
            "none. Leave --past_data out: accuracies on its tasks are then not measured."
        )
    return data
