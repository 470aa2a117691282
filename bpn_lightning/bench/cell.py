"""One run of a grid: its folder, and its flags for ``bpn-fit``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpn_lightning.run.identity import PARTS, method_folder, named_value, setup_name

__all__ = ["PROBES", "UNTRUSTED", "Cell", "Variant", "part_flags", "setting_flags", "tuned_flags"]

PROBES = {"regions": "Regions", "drift": "Drift", "moves": "Moves"}
"""What ``probes:`` may name, and the classes of :mod:`bpn_lightning.paper.probes`."""

UNTRUSTED = "--trust=false"

_PROBE_FLAG = "--trainer.callbacks+=bpn_lightning.paper.probes"

Variant = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Args:
        config: for ``bpn-fit --config``.
        experiment: its name.
        method: as ``bpn-fit --method`` takes it.
        seed: of the run.
        label: what tells entries with the same config apart, or "".
        variant: the varied keys and their values.
        settings: the keys that the entry sets, and their values.
        probes: names of :data:`PROBES`.
        gate: as ``bpn-fit --gate`` takes them, or None.
        front: as ``bpn-fit --front`` takes it, or None.
        tuned: as ``bpn-fit --tuned`` takes it, or None.
    """

    config: str
    experiment: str
    method: str
    seed: int
    label: str = ""
    variant: Variant = ()
    settings: Variant = ()
    probes: tuple[str, ...] = ()
    gate: str | None = None
    front: str | None = None
    tuned: str | None = None

    @property
    def setup(self) -> str:
        """The method with its gates and front, as tables name it."""
        return setup_name(self.method, self.gate.split("+") if self.gate else [], self.front)

    @property
    def name(self) -> str:
        """``digits_inc, bd+ewc, seed 0, rank 10``, for people."""
        label = [self.label] if self.label else []
        seed = f"seed {self.seed}"
        return ", ".join([self.experiment, *label, self.setup, seed, *self._varied(" ")])

    @property
    def row(self) -> str:
        """``bd+ewc, rank 10``, as tables name it with what is varied."""
        return ", ".join([self.setup, *self._varied(" ")])

    def runs(self, root: Path) -> Path:
        """What ``bpn-fit --runs`` gets: variants lie next to each other, each with runs of its own."""
        words = ",".join(self._varied("="))
        return root.joinpath(*filter(None, (self.label, words.replace("/", "_"))))

    def folder(self, root: Path) -> Path:
        """Where its results are."""
        method = method_folder(self.method, self.gate, self.front)
        return self.runs(root) / self.experiment / method / f"seed_{self.seed}"

    @property
    def flags(self) -> list[str]:
        """For ``bpn-fit``, but for where the results go."""
        # The grid's words become a command line, and nobody has typed them.
        head = ["--config", self.config, "--method", self.method, UNTRUSTED]
        values = setting_flags(self.settings + self.variant)
        looks = [f"{_PROBE_FLAG}.{PROBES[name]}" for name in self.probes]
        head += [*part_flags(self.gate, self.front), *tuned_flags(self.tuned)]
        return [*head, "--seed_everything", str(self.seed), *values, *looks]

    def _varied(self, separator: str) -> list[str]:
        named = (named_value(key, value) for key, value in self.variant)
        return [f"{name}{separator}{value}" for name, value in named]


def part_flags(gate: str | None, front: str | None) -> list[str]:
    """``--gate`` and ``--front``, of those that are named."""
    named = zip(PARTS, (gate, front), strict=True)
    return [word for key, value in named if value for word in (f"--{key}", value)]


def tuned_flags(tuned: str | None) -> list[str]:
    """``--tuned``, if there is one."""
    return [] if tuned is None else ["--tuned", tuned]


def setting_flags(settings: Variant) -> list[str]:
    """``--key=value``; what is no text is written as JSON, which YAML reads."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in settings
    ]
