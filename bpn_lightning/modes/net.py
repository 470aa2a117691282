"""A trained network at run time: loaded from a bundle, switched between its tasks by an argument."""

import operator
import os
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bpn_lightning.checks import check_number
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.modes.asking import (
    gate_logits,
    learned_by_gates,
    most_confident_mode,
    task_and_logits,
)
from bpn_lightning.modes.bundle import Bundle, explained, read_bundle, read_task, with_task
from bpn_lightning.modes.snapshot import Snapshot
from bpn_lightning.preparation import find_preparation

__all__ = ["Modes", "Prediction", "load"]


class Prediction(NamedTuple):
    """What is answered for one input.

    Attributes:
        class_name: of the likeliest class.
        column: of the head, which is this class.
        task: the name of the task in whose mode it is answered.
        task_id: of that task.
        confidence: the class's probability; with a gate its share of the mixture over tasks.
        rejected: whether the confidence is below the threshold.
    """

    class_name: str
    column: int
    task: str
    task_id: int
    confidence: float
    rejected: bool


class Modes:
    """A trained network that answers in the mode of any of its tasks, also of different ones in a batch.

    Raw inputs are prepared as the tasks' streams prepared them. Reading threads need no lock: what changes is
    a copy, which takes the place of the one before at once, and an answer comes from one of the two.

    Args:
        folder: of the bundle.
        backbone: that its weights are put into; None: the one that it names.
        trust: import paths that its network may name, besides torch's layers and networks of this package.
        device: where it answers.

    Attributes:
        now: what it answers from, until that is replaced.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, or its network needs trust.
        ConfigurationError: there is no such device.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        backbone: nn.Module | None = None,
        trust: Collection[str] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        self.folder = Path(folder)
        self._backbone, self._trust, self._device = backbone, tuple(trust), _usable(device)
        self._changing = threading.Lock()  # of those that change it
        with explained(self.folder):
            self.now = self._made(read_bundle(self.folder))

    def _made(self, bundle: Bundle) -> Snapshot:
        return Snapshot(bundle, self._backbone, self._trust, self._device)

    @property
    def tasks(self) -> list[str]:
        """The names of its tasks, in the order of their IDs."""
        return [*self.now.names]

    @property
    def task_ids(self) -> dict[str, int]:
        """The ID of each task."""
        now = self.now
        return dict(zip(now.names, now.ids, strict=True))

    @property
    def classes(self) -> list[str]:
        """The name of the class of each column of the logits; empty where no task has it."""
        return [*self.now.classes]

    def raw_shape(self, task: str | int) -> tuple[int, ...]:
        """The shape of one raw input of a task; 0 for the sides of square images of any size."""
        now = self.now
        own, _ = find_preparation(now.structure.preparations, now.place(task))
        return own.shape

    def raw_dtype(self, task: str | int) -> str:
        """The type of a task's raw inputs: ``uint8`` (images), ``float32``, ``float64`` or ``int64`` (tokens)."""
        now = self.now
        own, _ = find_preparation(now.structure.preparations, now.place(task))
        return own.dtype

    @property
    def gates(self) -> list[str]:
        """The names of the bundle's gates, of which the first names the task where it is not given."""
        return [gate["arguments"]["name"] for gate in self.now.gates]

    @property
    def nbytes(self) -> int:
        """Bytes of weights in memory."""
        return self.now.nbytes

    # --- answers ---------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, images: Any, task: Any) -> Tensor:
        """Logits of raw inputs in the mode of a task.

        Args:
            images: ``(batch, *shape)`` or one of them, a tensor or an array, as the stream holds them: uint8
                from 0 to 255, or floats from 0 to 1, of image streams; channels may come last in arrays.
            task: the name or the ID of a task, or an ID for each input.

        Returns:
            ``(batch, num_classes)``, or ``(num_classes,)`` for one input; -inf for columns that the mask
            leaves out.

        Raises:
            ConfigurationError: there is no such task, or the inputs are of another shape, type or range.
        """
        return self._logits(self.now, images, task)

    @staticmethod
    def _logits(now: Snapshot, images: Any, task: Any) -> Tensor:
        task = _number(task)
        place = now.place(task) if isinstance(task, str | int) else 0
        batch, single = now.batch(images, place)
        places: int | Tensor = place
        if not isinstance(task, str | int):
            places = now.places([task] if single and not _has_length(task) else task, len(batch))
        if learned_by_gates(now):
            found = gate_logits(now, batch, places)
        else:
            found = now.logits(now.prepared(batch, places), places)
        return found[0] if single else found

    @torch.no_grad()
    def answer(self, inputs: Tensor, task: "str | int | Tensor") -> Tensor:
        """Logits of inputs that are prepared already, through the front where there is one.

        Args:
            inputs: ``(batch, *input_shape)`` floats, or tokens.
            task: as of a call.
        """
        now = self.now
        inputs = inputs.to(now.device)
        if isinstance(task, str | int):
            return now.logits(inputs, now.place(task))
        return now.logits(inputs, now.places(task, len(inputs)))

    @torch.no_grad()
    def predict(self, images: Any, task: Any = None, reject_below: float = 0.0) -> list[Prediction]:
        """The likeliest class of each raw input.

        Args:
            images: as of a call.
            task: as of a call; None: the bundle's first gate names the task, and without a gate it is the
                learned task in whose mode the largest softmax is the largest.
            reject_below: confidence below which an answer is marked as rejected.

        Raises:
            ConfigurationError: as of a call, or the task has to be given.
        """
        check_number("reject_below", reject_below, "0 rejects nothing.", at_most=1)
        now = self.now
        if task is None:
            batch, _ = now.batch(images, 0)
            gated = bool(now.gates)
            places, logits = (task_and_logits if gated else most_confident_mode)(now, batch)
            known = logits if gated else logits.log_softmax(1)
        else:
            logits = self._logits(now, images, task)
            known = logits.reshape(-1, logits.shape[-1]).log_softmax(1)
            places = self._task_places(now, task, len(known))
        confidence, columns = known.double().exp().max(1)
        return [
            Prediction(now.classes[c], c, now.names[p], now.ids[p], value, value < reject_below)
            for c, p, value in zip(
                columns.tolist(), places.tolist(), confidence.tolist(), strict=True
            )
        ]

    @staticmethod
    def _task_places(now: Snapshot, task: Any, samples: int) -> Tensor:
        task = _number(task)
        if isinstance(task, str | int):
            return torch.full((samples,), now.place(task))
        return now.places(task if _has_length(task) else [task], samples)

    def fold(self, task: str | int) -> nn.Module:
        """One task's network as a plain module, which maps prepared inputs to logits.

        Linear layers, convolutions, attention and norms with biases are torch's own there. It shares no tensors
        with this network.
        """
        now = self.now
        return now.folded(now.place(task))

    # --- change ----------------------------------------------------------------------------------

    def reload(self) -> None:
        """Read the folder again; answers come from what was before until all of it is read.

        Tasks whose files are the same, by inode, time and size, are not read again.

        Raises:
            CheckpointError: as when it was loaded; what was before goes on answering.
        """
        with self._changing, explained(self.folder):
            self.now = self._made(read_bundle(self.folder, self.now.bundle))

    def add_task(self, folder: str | os.PathLike[str], name: str | None = None) -> str:
        """Answer in the mode of one more task; the bundle's folder is not changed.

        Args:
            folder: of one task of a bundle of the same base.
            name: by which it is known; None: the folder's.

        Returns:
            The name.

        Raises:
            CheckpointError: a file is damaged, or of another base.
            ConfigurationError: the name, the ID or the columns are taken.
        """
        with self._changing:
            bundle = self.now.bundle
            with explained(folder, task=True):
                one = read_task(folder, bundle.record)
            one = replace(one, name=name or one.name)
            changed = with_task(bundle, one)
            with explained(folder, task=True):
                self.now = self._made(changed)
            return one.name

    def remove_task(self, task: str | int) -> None:
        """Answer in the mode of a task no more; the bundle's folder is not changed."""
        with self._changing:
            now = self.now
            name = now.names[now.place(task)]
            left = {key: one for key, one in now.bundle.tasks.items() if key != name}
            if not left:
                raise ConfigurationError(
                    f"Expected a task to be left, but {name!r} is the only one. Delete the bundle instead."
                )
            self.now = self._made(replace(now.bundle, tasks=left))


def _usable(device: str | torch.device) -> torch.device:
    """A device that there is."""
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise ValueError("it holds no values")
        torch.empty(0, device=found)
    # Each backend has errors of its own.
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"Expected device to be one that torch can use here, but got {str(device)!r:.40}: {said:.200} Use 'cpu'."
        ) from error
    return found


def _has_length(task: Any) -> bool:
    return isinstance(task, list | tuple) or bool(getattr(task, "shape", ()))


def _number(task: Any) -> Any:
    """An integer of a tensor or an array without dimensions as a plain one."""
    if getattr(task, "shape", None) != () or str(task.dtype).endswith("bool"):
        return task
    try:
        return operator.index(task)
    except TypeError:
        return task


def load(
    folder: str | os.PathLike[str],
    backbone: nn.Module | None = None,
    trust: Collection[str] = (),
    device: str | torch.device = "cpu",
) -> Modes:
    """Load a bundle that ``bpn-export`` or ``export_module`` wrote; see :class:`Modes`."""
    return Modes(folder, backbone, trust, device)
