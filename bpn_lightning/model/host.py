"""What the strategies of a module work on, and the objects that run them: network, stream, trainer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.cursor import Cursor
from bpn_lightning.model.front_cache import FrontCache
from bpn_lightning.model.frozen_core import FrozenCore
from bpn_lightning.model.learned_by import LearnedBy
from bpn_lightning.model.merged_weights import MergedWeights
from bpn_lightning.modes.fronts import describe
from bpn_lightning.nn.losses import LossFunction, SampleLoss
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.nn.pretrained import adopt_normalization
from bpn_lightning.preparation import prepare_raw
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.tasks import Batch, ContinualStream, Phase, Position, Split, TrainingEpoch
from bpn_lightning.trainer.lightning import grad_scaler, is_attached

__all__ = ["Host", "check_own_strategies"]


class Host:
    """A network that learns, with all that it learns by: a :class:`~bpn_lightning.host.ContinualHost`.

    Args:
        module: has the trainer, the device and the loggers.
        network: that learns.
        loss: of each sample; see :class:`~bpn_lightning.nn.losses.SampleLoss`.
        core: what tasks share, which may be frozen.
        front_cache_gb: see :class:`~bpn_lightning.model.front_cache.FrontCache`.

    Attributes:
        cursor: where in the stream it is.
        strategies: the continual strategies of the trainer, in the order of its callbacks.
        phase_owners: the strategies that declared phases, by task and the phase's name.
        gates: what names tasks, by name, in the order of the trainer's callbacks, or of a file.
        front_cache: has features of what a fit asked for.
        learned_by: the run that learned the network's tasks; None before the first fit.
        merged: keeps the weights of training while merged ones are in their place.
        in_step_forward: whether the forward that runs is the training step's own.
        param_groups: of the current optimizer, by the ``id`` of each of its parameters.
        token: what strategies that learn with it keep, in copies as well.

    Raises:
        ConfigurationError: the loss is none, or front_cache_gb is below 0.
    """

    def __init__(
        self,
        module: LightningModule,
        network: ContinualNetwork,
        loss: LossFunction | None,
        core: FrozenCore,
        front_cache_gb: float,
    ) -> None:
        self.module = module
        self.network = network
        self.core = core
        self.sample_loss = SampleLoss(loss)
        self.cursor = Cursor(network)
        self.strategies: Sequence[ContinualStrategy] = ()
        self.gates: Mapping[str, TaskGate] = {}
        self.phase_owners: dict[tuple[int, str], ContinualStrategy] = {}
        self.front_cache = FrontCache(
            front_cache_gb,
            lambda task, split: self.stream.loader(task, split),
            lambda batch: self.for_gates(self._on_device(batch)).inputs,
            self.all_reduce,
        )
        self.learned_by: LearnedBy | None = None
        self.merged = MergedWeights()
        self.in_step_forward = False
        self.param_groups: dict[int, dict[str, Any]] = {}
        self.token = object()
        self._stream: ContinualStream | None = None

    def note_run(self) -> None:
        """A fit has begun: its stream and its strategies are those that learn."""
        keys = tuple(strategy.state_key for strategy in self.strategies)
        self.learned_by = LearnedBy(self.stream.seed, keys)

    # --- the stream ------------------------------------------------------------------------------

    @property
    def stream(self) -> ContinualStream:
        """The stream that is learned: the trainer's datamodule, or the one given to `attach`."""
        if self._stream is None:
            raise ConfigurationError(
                "Expected the module to have a stream, but it has none. Pass a ContinualDataModule to "
                "trainer.fit, or call module.attach(stream) to evaluate without a trainer."
            )
        return self._stream

    @property
    def has_stream(self) -> bool:
        """Whether there is one; a loaded module answers without."""
        return self._stream is not None

    def attach(self, stream: ContinualStream, grow: bool = False) -> None:
        """Use a stream, for which the network is built, or to which it has to fit.

        Args:
            stream: after its ``setup``.
            grow: whether a network that has learned all of its tasks grows for a stream that goes on.

        Raises:
            ConfigurationError: they do not fit.
        """
        learned_alone = self.network.opened >= 0 and self.classifier is not None
        if self.network.head is None:
            adopt_normalization(self.network, stream)
        self.network.build_for(stream, self.device, grow)
        if learned_alone:
            self.plan_no_training()
        self._stream = stream

    def batches(
        self, task_id: int, split: Split, max_samples: int | None = None
    ) -> Iterator[Batch]:
        """This process's share of a task's samples, each once, on the device and prepared."""
        raw = self._raw_batches(task_id, split, max_samples)
        if self.network.front is not None:
            return (self._seen_by_gates(batch, split) for batch in raw)
        return map(self.prepare, raw)

    def _raw_batches(
        self, task_id: int, split: Split, max_samples: int | None = None
    ) -> Iterator[Batch]:
        loader = self.stream.loader(task_id, split, max_samples=max_samples)
        return map(self._on_device, loader)

    def _on_device(self, batch: Batch) -> Batch:
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        return batch._replace(inputs=inputs, targets=targets)

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """A raw batch as the network takes it: prepared by the stream, then through the front."""
        if self.network.front is not None and not (augment and batch.augmentation is not None):
            return self.for_gates(batch)
        return self.apply_front(self.stream.prepare(batch, augment))

    def apply_front(self, batch: Batch, split: Split | None = None) -> Batch:
        """A batch that the stream has prepared, as the network takes it: through the front.

        Args:
            batch: of the epoch that runs, or any.
            split: which part of the stream's data an epoch's batch is of; None of any.
        """
        front = self.network.front
        if front is None:
            return batch
        cached = None if split is None else self._cached(batch, split)
        if cached is not None:
            return batch._replace(inputs=cached)
        common = self.network.structure.common_normalization
        return batch._replace(inputs=front(common.to_first(batch.inputs, batch.task)))

    def gate_batches(self, task_id: int, split: Split) -> Iterator[Batch]:
        """This process's share of a task's samples, each once, as gates see them."""
        return (self._seen_by_gates(one, split) for one in self._raw_batches(task_id, split))

    def _seen_by_gates(self, batch: Batch, split: Split) -> Batch:
        cached = self._cached(batch, split)
        if cached is None:
            return self.for_gates(batch)
        return batch._replace(inputs=cached, augmentation=None)

    def _cached(self, batch: Batch, split: Split) -> Tensor | None:
        """Features of a batch of a task, or of the epoch that runs, where they are cached."""
        if self.network.front is None or not self._in_fit:
            return None
        tasks: Sequence[int] = [batch.task] if isinstance(batch.task, int) else []
        if not tasks:
            now = self.cursor.task
            tasks = self.training_tasks(now) if split == "train" else range(now + 1)
        (width,) = self.network.structure.input_shape
        return self.front_cache.look_up(batch, tasks, split, width)

    @property
    def _in_fit(self) -> bool:
        state = self.trainer.state if self.has_trainer else None
        return state is not None and state.fn == "fit" and state.status == "running"

    def for_gates(self, batch: Batch) -> Batch:
        """A raw batch as gates see it: under the first task's normalization, and through the front."""
        inputs = self._normalized_alike(batch)
        front = self.network.front
        return batch._replace(inputs=inputs if front is None else front(inputs), augmentation=None)

    def _normalized_alike(self, batch: Batch) -> Tensor:
        common = self.network.structure.common_normalization
        if common.differs and all(one.steps is not None for one in common.preparations):
            return prepare_raw(
                common.preparations, batch.inputs, batch.task
            )  # one task's bits for all
        return common.to_first(self.stream.prepare(batch).inputs, batch.task)

    def for_modes(self, inputs: Tensor, task: "int | Tensor") -> Tensor:
        """What gates saw as the network takes it in a task's mode: under that task's normalization."""
        if self.network.front is not None:
            return inputs
        return self.network.structure.common_normalization.from_first(inputs, task)

    @property
    def classifier(self) -> TaskGate | None:
        """The first of a run's gates, where these are all that learns: its own class is the answer.

        Such a network has tasks of 0 epochs, which files of a module keep.
        """
        trained = any(task.epochs for task in self.network.tasks)
        return None if trained else next(iter(self.gates.values()), None)

    def plan_no_training(self) -> None:
        """Give every task 0 epochs: gates are all that learns."""
        structure = self.network.structure
        structure.tasks = [replace(task, epochs=0) for task in structure.tasks]

    def fit_front(self) -> None:
        """Fit what stands before the network on the first task, without augmentation."""
        front = self.network.front
        if front is None:
            return
        self.front_cache.clear()
        front.fit(
            lambda: map(self._normalized_alike, self._raw_batches(0, "train")), self.all_reduce
        )
        self.network.structure.front = describe(front)

    @property
    def can_answer(self) -> bool:
        """Whether what stands before the network is fitted; not in Lightning's sanity check of a new fit."""
        return self.network.front is None or self.network.front.input_shape is not None

    def mark_front(self, training: bool) -> None:
        """Show it as Lightning expects parts when a fit starts; it warns of those in evaluation mode."""
        for part in self.network.front.modules() if self.network.front is not None else ():
            part.training = training

    @property
    def position(self) -> Position:
        """Task, phase and epoch of the trainer's current epoch; outside a fit, the task opened last."""
        if self.trainer.state.fn != "fit":
            return Position(self.cursor.task, "train", 0)
        return self.cursor.locate(self.trainer.current_epoch)

    def training_epoch(self) -> TrainingEpoch:
        """What the stream's train loader is of."""
        task, _, epoch = self.position
        return TrainingEpoch(task, epoch, self.training_tasks(task))

    @property
    def phase(self) -> Phase:
        """The phase that runs."""
        return self.cursor.phase

    @property
    def task_progress(self) -> float:
        """The fraction of the open task's planned updates of the whole network that happened, 0 to 1."""
        return self.cursor.task_progress

    @property
    def phase_owner(self) -> ContinualStrategy:
        """The strategy that declared the phase that runs."""
        return self.phase_owners[self.cursor.task, self.phase.name]

    @property
    def trains_own_rows_only(self) -> bool:
        """Whether of the head only the rows of the open task's own classes move."""
        return self.network.mask == "task" or self.phase.trains == "head" or self.core.frozen

    def training_tasks(self, task_id: int) -> list[int]:
        """The tasks whose data a task is trained on: its own, and what a strategy adds of those known."""
        task = self.network.tasks[task_id]
        wanted = (strategy.training_tasks(task) for strategy in self.strategies)
        return self.network.structure.known(sorted({task_id}.union(*wanted)))

    def head_tasks(self, task_id: int) -> list[int]:
        """The tasks whose own rows of the head a task trains: on whose data, or samples of a memory."""
        tasks = set(self.training_tasks(task_id))
        if self.phase.trains == "network" and not self.core.frozen:
            task = self.network.tasks[task_id]
            tasks = tasks.union(*(strategy.replayed_tasks(task) for strategy in self.strategies))
        return self.network.structure.known(sorted(tasks))

    # --- the fit ---------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The trainer; a loaded module answers without."""
        return self.module.trainer

    @property
    def has_trainer(self) -> bool:
        """Whether there is one."""
        return is_attached(self.module)

    @property
    def device(self) -> torch.device:
        """The device that the network lies on."""
        return self.module.device

    @property
    def global_rank(self) -> int:
        """The number of this process, from 0."""
        return self.module.global_rank

    @property
    def training_weights(self) -> Mapping[str, Tensor]:
        """By name, the weights of training while merged ones are in their place; else empty."""
        return self.merged.training

    def learning_rate(self, parameter: nn.Parameter) -> float:
        """The current optimizer's learning rate of a parameter."""
        return float(self.param_groups[id(parameter)]["lr"])

    @property
    def loss_scale(self) -> float:
        """The scaler's factor, which parameters outside the optimizer keep in their gradients."""
        scaler = grad_scaler(self.trainer)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def losses(self, logits: Tensor, targets: Tensor, task: "int | Tensor") -> Tensor:
        """Each sample's loss on the columns of its task.

        Args:
            logits: ``(batch, num_classes)``; where samples have several tasks, with -inf outside of each
                one's columns.
            targets: ``(batch,)`` int64, columns of the head.
            task: of all samples, or ``(batch,)``, one of each.

        Returns:
            ``(batch,)``.
        """
        network = self.network
        self.sample_loss.without = network.structure.forgotten_columns
        if isinstance(task, int):
            first, stop = network.columns(task)
            return self.sample_loss(logits[:, first:stop], targets - first, first)
        if network.has_closed_columns and len(targets) and int(targets.max()) < network.num_open:
            logits = logits[:, : network.num_open]  # a softmax over more has other last bits
        if self.sample_loss.loss is None or network.mask not in ("seen", "task"):
            return self.sample_loss(logits, targets)
        return self.sample_loss.by_task(logits, targets, task, network.columns)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if not self.has_trainer or self.trainer.world_size == 1:
            return tensor
        own = tensor.clone(memory_format=torch.contiguous_format)  # nccl takes no other
        return cast(Tensor, self.trainer.strategy.reduce(own, reduce_op="sum"))

    def broadcast_buffers(self) -> None:
        """Take the first process's running statistics, as DDP would at the next forward."""
        if self.trainer.world_size == 1:
            return
        for buffer in self.network.backbone.buffers():
            if buffer.is_floating_point():
                own = buffer if self.global_rank == 0 else torch.zeros_like(buffer)
                buffer.copy_(self.all_reduce(own))


def check_own_strategies(strategies: Sequence[ContinualStrategy], host: Host) -> None:
    """Refuse strategies that hold what they learned with another module.

    Raises:
        ConfigurationError: names the first.
    """
    for strategy in strategies:
        if strategy._token not in (None, host.token):
            raise ConfigurationError(
                f"Expected strategies as the module's last fit left them, but {strategy.state_key} has learned "
                "with another module since. Load a checkpoint of this module, and make strategies for each."
            )
