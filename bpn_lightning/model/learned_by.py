"""Which run learned the tasks of a module: what a stream that goes on needs to know of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bpn_lightning.errors import CheckpointError
from bpn_lightning.nn.structure import Structure
from bpn_lightning.tasks import Past

__all__ = ["LearnedBy"]


@dataclass(frozen=True)
class LearnedBy:
    """The run that learned a module's tasks.

    Args:
        seed: of its stream.
        strategies: by their state keys, in order.
    """

    seed: int
    strategies: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def past(self, structure: Structure, closed: int) -> Past:
        """What a stream that goes on needs to know.

        Args:
            structure: of the module.
            closed: the last task that it has learned.
        """
        return Past(
            tasks=tuple(structure.tasks),
            preparations=tuple(structure.preparations),
            seed=self.seed,
            shared=structure.mask == "shared",
            learned=closed + 1,
        )

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "LearnedBy":
        """The inverse of :meth:`record`; other fields are not looked at.

        Raises:
            CheckpointError: a field is missing, or is not what it has to be.
        """
        seed, strategies = record.get("seed"), record.get("strategies")
        named = isinstance(strategies, list | tuple) and all(type(one) is str for one in strategies)
        if type(seed) is not int or not named:
            raise CheckpointError(
                f"Expected the seed of a run and the names of its strategies, but got {seed!r:.80} and "
                f"{strategies!r:.80}. The file is damaged or made up."
            )
        return cls(seed, tuple(strategies or ()))
