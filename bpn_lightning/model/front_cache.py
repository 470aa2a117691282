"""Features of a front that are computed once for each image, as long as a part of a task fits in memory."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.tasks import Batch, Split

__all__ = ["FrontCache"]

GIGABYTE = 10**9


class FrontCache:
    """Features of whole parts of tasks, in memory, for one fit.

    A part is computed in one pass in the order of its loader, and every process gets all of it. What is
    cached therefore depends neither on the batch in which a sample is asked for, nor on what was asked
    for before, nor on where a run was resumed. Parts that do not fit are not cached; where not all of
    them fit at once, those asked for longest ago make room and are computed again.

    Args:
        gigabytes: of features that are kept, on the network's device and in each process; 0 for none.
        loader: yields this process's shard of a part, raw.
        extract: features of a raw batch on the network's device, ``(batch, width)`` float32.
        all_reduce: gives sums over all processes.

    Raises:
        ConfigurationError: gigabytes is below 0 or no number.
    """

    def __init__(
        self,
        gigabytes: float,
        loader: Callable[[int, Split], Iterable[Batch]],
        extract: Callable[[Batch], Tensor],
        all_reduce: Callable[[Tensor], Tensor],
    ) -> None:
        if not (isinstance(gigabytes, int | float) and gigabytes >= 0):
            raise ConfigurationError(
                f"Expected front_cache_gb to be gigabytes, 0 or more, but got {gigabytes!r}. 0 caches "
                "nothing."
            )
        self.max_bytes = int(gigabytes * GIGABYTE) if gigabytes < float("inf") else 2**63
        self._loader, self._extract, self._all_reduce = loader, extract, all_reduce
        self._parts: dict[tuple[int, Split], Tensor] = {}  # the one asked for last is last
        self._samples: dict[tuple[int, Split], int] = {}

    def clear(self) -> None:
        """Forget everything: the front or the stream is another one."""
        self._parts, self._samples = {}, {}

    @property
    def bytes_held(self) -> int:
        """Of all features."""
        return sum(part.nbytes for part in self._parts.values())

    def features(self, tasks: Sequence[int], split: Split, width: int) -> dict[int, Tensor] | None:
        """Features of all samples of some tasks, by task, in the order of the stream's loader.

        Under DDP every process calls this at the same time.

        Args:
            tasks: those that are used at once.
            split: the part of each.
            width: of the features.

        Returns:
            ``(samples, width)`` float32 each; None where they do not fit together.
        """
        keys = [(task, split) for task in tasks]
        if not self.max_bytes or sum(map(self._count, keys)) * width * 4 > self.max_bytes:
            return None
        for key in keys:
            if key in self._parts:
                self._parts[key] = self._parts.pop(key)
        for key in keys:
            if key not in self._parts:
                self._make_room(self._samples[key] * width * 4)
                self._parts[key] = self._compute(key, width)
        return {task: self._parts[task, split] for task in tasks}

    def look_up(
        self, batch: Batch, tasks: Sequence[int], split: Split, width: int
    ) -> Tensor | None:
        """Features of a batch, ``(batch, width)``; None where they are to be computed.

        Args:
            batch: of one of these tasks, or of several.
            tasks: those that are used at once.
            split: the part that the batch is of.
            width: of the features.
        """
        if batch.samples is None:
            return None
        found = self.features(tasks, split, width)
        if found is None:
            return None
        if isinstance(batch.task, int):
            part = found[batch.task]
            return part.index_select(0, batch.samples.to(part.device))
        rows = torch.empty(len(batch.targets), width, device=batch.targets.device)
        for task in torch.unique(batch.task).tolist():
            own = batch.task == task
            rows[own] = found[task][batch.samples[own]]
        return rows

    def _count(self, key: tuple[int, Split]) -> int:
        """Samples of a part over all processes."""
        if key not in self._samples:
            self._samples[key] = sum(batch.global_size for batch in self._loader(*key))
        return self._samples[key]

    def _make_room(self, needed: int) -> None:
        while self._parts and self.bytes_held + needed > self.max_bytes:
            del self._parts[next(iter(self._parts))]

    @torch.no_grad()
    def _compute(self, key: tuple[int, Split], width: int) -> Tensor:
        whole, done = torch.zeros(self._samples[key], width), 0
        for batch in self._loader(*key):
            own = self._extract(batch)
            whole = whole.to(own.device)
            rows = whole[done : done + batch.global_size]
            rows[batch.start : batch.start + len(own)] = own
            rows.copy_(self._all_reduce(rows))
            done += batch.global_size
        return whole
