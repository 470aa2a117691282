"""New tasks for a module that has learned: its training state as a checkpoint, which the next fit resumes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Trainer

from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.model.checkpoint import entry_of
from bpn_lightning.model.history import History
from bpn_lightning.model.host import Host, check_own_strategies
from bpn_lightning.model.learned_by import LearnedBy
from bpn_lightning.model.weights_alone import WeightsAlone
from bpn_lightning.modes.bundle import explained
from bpn_lightning.modes.training_state import read_training_state
from bpn_lightning.nn.structure import Structure
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.tasks import ContinualStream, Past
from bpn_lightning.trainer.lightning import (
    callbacks_of,
    dump_checkpoint,
    resume_from_memory,
    set_max_epochs,
)

__all__ = ["Extension", "extension_of", "past_of"]


def past_of(checkpoint: Mapping[str, Any]) -> Past:
    """What a stream that goes on needs to know of a run, by one of its checkpoints.

    Raises:
        CheckpointError: it is none of a ContinualModule, of another schema, or damaged.
    """
    saved = entry_of(checkpoint)
    structure = Structure.read(saved.get("structure", {}))
    cursor = saved.get("cursor")
    numbers = (saved.get("seed"), cursor.get("closed") if isinstance(cursor, Mapping) else None)
    if not all(type(number) is int for number in numbers):
        raise CheckpointError(
            f"Expected a seed and the last task that is learned, but got {numbers!r:.80}. The file is "
            "damaged or made up."
        )
    _, closed = cast(tuple[int, int], numbers)
    return LearnedBy.read(saved).past(structure, closed)


def extension_of(module: Any) -> "Extension":
    """What a :class:`~bpn_lightning.model.module.ContinualModule` continues from."""
    found: Extension = module._extension
    return found


class _Fit(NamedTuple):
    """What a module had in its last fit."""

    trainer: Trainer
    stream: ContinualStream
    strategies: Sequence[ContinualStrategy]
    gates: Mapping[str, TaskGate]

    def give_back(self, host: Host) -> None:
        host.module.trainer = self.trainer
        host.strategies, host.gates = self.strategies, self.gates
        host.attach(self.stream)


class Extension:
    """What a module continues from: the trainer of its last fit, the checkpoint that it was loaded from, or itself.

    Args:
        host: of the module.
        path: of that checkpoint, or of the bundle with a training state that it was loaded from.

    State: none; a reference to that trainer, or the file's path, and between :meth:`begin` and the next fit
    a checkpoint, with a copy of the weights, or what the module holds without one.
    """

    def __init__(self, host: Host, path: Path | None = None) -> None:
        self.host = host
        self._fit: _Fit | None = None
        self.path = path
        self._checkpoint: dict[str, Any] | None = None
        self._alone: WeightsAlone | None = None

    def begin(self, stream: ContinualDataModule, past_data: ContinualDataModule | None) -> None:
        """Let a stream continue what is learned, and have the next fit begin there.

        Raises:
            ConfigurationError: nothing is learned, or a task is not finished.
            CheckpointError: the training state is not there, or is of other weights.
        """
        self._check_streams(stream, past_data)
        network = self.host.network
        if network.closed < 0 or network.closed + 1 < len(network.tasks):
            raise ConfigurationError(
                f"Expected a module that has learned all tasks of its stream, but it has learned "
                f"{network.closed + 1} of {len(network.tasks)}. Fit it, or resume it with ckpt_path, first."
            )
        self.done()
        if self._fit is None and self.path is None:
            alone = WeightsAlone(self.host)
            stream.continue_from(alone.past, past_data)
            self._alone = alone
        else:
            checkpoint = self.training_state()
            stream.continue_from(past_of(checkpoint), past_data)
            self._checkpoint = checkpoint
        of_export = self._fit is None and (self.path is None or self.path.is_dir())
        if of_export and not self.host.module.training:  # as load_exported leaves it
            self.host.module.train()

    def _check_streams(self, stream: Any, past_data: Any) -> None:
        for name, one in (("stream", stream), ("past_data", past_data)):
            absent = one is None and name == "past_data"
            if not absent and not isinstance(one, ContinualDataModule):
                raise ConfigurationError(
                    f"Expected {name} to be a ContinualDataModule, but got {one!r:.80}. StreamOf joins "
                    "several streams to one."
                )
        if self._fit is not None and stream is self._fit.stream:
            raise ConfigurationError(
                "Expected a stream of new tasks, but got the one that the module has learned. Make another "
                "one; the learned one may be its past_data."
            )

    def check(self, trainer: Trainer, stream: ContinualStream) -> None:
        """Refuse a fit that needs more of the past than there is."""
        if self._alone is not None:
            found = [one for one in callbacks_of(trainer) if isinstance(one, ContinualStrategy)]
            self._alone.check(found, stream)

    def remember(self) -> None:
        """A fit is over: what it had is what the module continues from."""
        host = self.host
        self._fit = _Fit(host.trainer, host.stream, host.strategies, host.gates)

    def lengthen(self, trainer: Trainer) -> None:
        """Let the trainer of the last fit train for longer: its end was that of the past."""
        if self._checkpoint is not None and self._fit is not None and trainer is self._fit.trainer:
            set_max_epochs(trainer, -1)

    def resume(self, trainer: Trainer, history: History) -> None:
        """Hand a trainer what is to be resumed, if there is anything; its ``ckpt_path`` goes first."""
        if self._checkpoint is not None:
            resume_from_memory(trainer, dict(self._checkpoint))
        if self._alone is not None:
            self._alone.resume(history)

    def done(self) -> None:
        """The fit has begun."""
        self._checkpoint = self._alone = None

    def training_state(self) -> dict[str, Any]:
        """The checkpoint of all that is learned.

        Raises:
            CheckpointError: it is not there, is of other weights, or holds a task that was forgotten since.
        """
        if self._fit is not None:
            check_own_strategies(self._fit.strategies, self.host)
            self._fit.give_back(self.host)  # another trainer may have tested the module since
            checkpoint = dump_checkpoint(self._fit.trainer)
            weights = checkpoint["state_dict"].items()  # which growing may write into
            checkpoint["state_dict"] = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in weights
            }
            return checkpoint
        if self.path is None:
            raise CheckpointError(
                "Expected a module with a training state, but this one has none: it is a copy, or was loaded "
                "from an export without one. Fit it, or load one of its run's checkpoints."
            )
        if self.path.is_dir():
            with explained(self.path):
                return read_training_state(self.path, self.host.module.state_dict())
        checkpoint = read_checkpoint(self.path)
        if "optimizer_states" not in checkpoint:
            raise CheckpointError(
                f"Expected {self.path} to have the training state of a run, but it has the weights alone. "
                "Load another one of the run's checkpoints."
            )
        gone = self.host.network.structure.forgotten
        if gone != entry_of(checkpoint)["structure"].get("forgotten", []):
            raise CheckpointError(
                f"Expected {self.path} to be written after tasks were forgotten, but it still holds what was "
                f"stored of task {gone[-1]}. Resume it in a trainer, forget the task there, and continue from "
                "what trainer.save_checkpoint writes."
            )
        own, saved = self.host.module.state_dict(), checkpoint["state_dict"]
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and not _same(value, saved.get(name)):
                raise CheckpointError(
                    f"Expected {self.path} to have the weights that were loaded from it, but its {name} is "
                    "another one. Load it again."
                )
        return checkpoint


def _same(value: torch.Tensor, saved: Any) -> bool:
    if not isinstance(saved, torch.Tensor) or saved.shape != value.shape:
        return False
    return torch.allclose(saved.to(value), value, rtol=0, atol=0, equal_nan=True)
