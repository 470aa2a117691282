"""``--tuned``: the best values of a search, which ``bpn-bench tune`` has recorded, and what they may be used for."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.run.schema import Tuned
from bpn_lightning.run.tuning import DRAWN_BY_SEED, TuningRecord, read_tuned, tuned

__all__ = ["TunedValues", "read_tuned_values"]


@dataclass(frozen=True)
class TunedValues:
    """A record, and how it was given.

    Args:
        path: as given.
        record: what is in it.
        digest: SHA-256 of the file.
    """

    path: str
    record: TuningRecord
    digest: str

    @property
    def values(self) -> dict[str, Any]:
        """Of the best trial, by their keys."""
        best = self.record["best"]
        return {} if best is None else best["values"]

    @property
    def flags(self) -> list[str]:
        """The values as flags."""
        return [f"--{key}={json.dumps(value)}" for key, value in self.values.items()]

    def check(self, value_of: Callable[[str], Any], seed: int) -> None:
        """Refuse a run that has other values, or the seed of the tuning where it draws the tasks.

        Args:
            value_of: the value of a key in the run's configuration; raises KeyError where there is none.
            seed: of the run.

        Raises:
            ConfigurationError: names the key or the seed.
        """
        for key, value in self.values.items():
            try:
                found = value_of(key)
            except KeyError:
                found = None
            if found != value:
                raise ConfigurationError(
                    f"Expected {key} to be {value!r}, the best of {self.path}, but got {found!r:.80}. Leave it to --tuned, "
                    "or leave --tuned out."
                )
        if seed in self.record["seeds"] and self.record["stream"]["differs"] in DRAWN_BY_SEED:
            raise ConfigurationError(
                f"Expected seed_everything to be none of {self.record['seeds']}, whose streams {self.path} was tuned on, but "
                f"got {seed}. Evaluate with other seeds."
            )

    def summary(self, classes: set[str]) -> Tuned:
        """For results.json, of a run that has learned these classes."""
        return tuned(self.record, self.digest, classes)


def read_tuned_values(
    path: str | None, method: str, experiments: Sequence[str]
) -> TunedValues | None:
    """Read the record that ``--tuned`` names.

    Args:
        path: of tuning.json or its folder, or None.
        method: that gets its best values.
        experiments: names of the experiment.

    Raises:
        ConfigurationError: it cannot be read, has no best values, or is of another method or experiment.
    """
    if path is None:
        return None
    record, digest = read_tuned(Path(path), method)
    if record["experiment"] not in experiments:
        raise ConfigurationError(
            f"Expected --tuned to be of {experiments[0]}, but {path} is of {record['experiment']}. Tune {method} for "
            f"{experiments[0]}, or leave --tuned out."
        )
    return TunedValues(path, record, digest)
