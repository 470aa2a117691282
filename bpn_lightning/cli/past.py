"""The run that a command line continues from with new tasks, and those before it; nothing here imports torch."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpn_lightning.cli.config_files import PLACES, ConfigLayer, read_layer
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.files.writing import EXPORT_FILES

__all__ = [
    "PastRun",
    "continues_run",
    "find_past",
    "first_experiment",
    "past_layers",
    "runs_before",
]

#: Keys of a run's config.yaml that are not those of a run that continues from it.
_OWN = ("data", "experiment", "continue_from", "past_data", *PLACES)


@dataclass(frozen=True)
class PastRun:
    """A run whose tasks are learned.

    Args:
        folder: of the run, or of an export; where the checkpoint stands alone, the folder that would be it.
        checkpoint: from which another run goes on; None: the folder is an export.
    """

    folder: Path
    checkpoint: Path | None

    @property
    def source(self) -> Path:
        """What is read: the checkpoint, or the export."""
        return self.checkpoint or self.folder

    @property
    def layer(self) -> ConfigLayer | None:
        """The run's config.yaml, if it is there."""
        config = self.folder / "config.yaml"
        return read_layer(config) if config.is_file() else None


def find_past(wanted: str, option: str = "continue_from") -> PastRun:
    """A run by its folder, by one of its checkpoints, or by an export.

    Args:
        wanted: the path.
        option: that gave it, for messages.

    Raises:
        ConfigurationError: none of them is there.
    """
    path = Path(wanted)
    if path.is_dir() and any((path / name).is_file() for name in EXPORT_FILES):
        return PastRun(path, None)
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        raise ConfigurationError(
            f"Expected {option} to be the folder of a finished run, one of its checkpoints or an export, but "
            f"there is no file {str(checkpoint)!r}. Runs are in <runs>/<experiment>/<method>/seed_<n>; if "
            "it has moved, name its new place."
        )
    return PastRun(path if path.is_dir() else path.parent.parent, checkpoint)


def past_layers(wanted: str, with_data: bool) -> list[ConfigLayer]:
    """What a run that goes on takes over from the past one's configuration: all but the stream.

    Args:
        wanted: the past run; see :func:`find_past`.
        with_data: whether the streams that were learned are read again, to measure accuracies on their
            tasks: ``past_data`` lists them, the oldest first.

    Raises:
        ConfigurationError: a run is not there, has no config.yaml, or continues from itself.
    """
    run = find_past(wanted)
    layer = run.layer
    content = {} if layer is None else dict(layer.content)
    content = {key: value for key, value in content.items() if key not in _OWN}
    if with_data:
        content["past_data"] = [_stream(one) for one in runs_before(run)]
    name = str(run.folder / "config.yaml") if layer is not None else str(run.source)
    return [ConfigLayer(name, content)] if content else []


def runs_before(run: PastRun) -> list[PastRun]:
    """A run and those that it continues from, the oldest first.

    Raises:
        ConfigurationError: one is not there, or they have no beginning.
    """
    return [*_newest_first(run)][::-1]


def continues_run(run: PastRun, folder: Path) -> bool:
    """Whether a folder is that of a run, or of one before it, as far as these are there."""
    return any(one.folder.resolve() == folder.resolve() for one in _existing_runs(run))


def first_experiment(run: PastRun) -> str:
    """The experiment in which a stream began, or that of the oldest of its runs that is still there."""
    first = _existing_runs(run)[-1]
    named = None if first.layer is None else first.layer.content.get("experiment")
    return first.folder.parent.parent.name if named is None else str(named)


def _existing_runs(run: PastRun) -> list[PastRun]:
    """The newest first."""
    found: list[PastRun] = []
    with suppress(ConfigurationError):  # one is needed for its data only
        found.extend(_newest_first(run))
    return found


def _newest_first(run: PastRun) -> Iterator[PastRun]:
    """A run, the one that it continues from, and so on.

    Raises:
        ConfigurationError: one is not there, or they have no beginning.
    """
    known = set()
    while True:
        yield run
        known.add(run.folder.resolve())
        before = None if run.layer is None else run.layer.content.get("continue_from")
        if before is None:
            return
        config = run.folder / "config.yaml"
        run = find_past(_from_where_it_ran(run, str(before)), f"continue_from in {config}")
        if run.folder.resolve() in known:
            raise ConfigurationError(
                f"Expected continue_from in {config} to lead to a first run, but got {before}, which goes "
                "on from this one. Correct it."
            )


def _from_where_it_ran(run: PastRun, named: str) -> str:
    """A path in a run's config.yaml: the command was given in one of the folders above the run's."""
    places = [above / named for above in run.folder.resolve().parents]
    return str(next((place for place in places if place.exists()), named))


def _stream(run: PastRun) -> Any:
    """The ``data:`` of a run."""
    data = None if run.layer is None else run.layer.content.get("data")
    if data is None:
        raise ConfigurationError(
            f"Expected past_data to find each past stream in its run's config.yaml, but {run.folder} has "
            "none. Leave --past_data out: accuracies on its tasks are then not measured."
        )
    return data
