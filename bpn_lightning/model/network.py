"""A network whose mode follows the task: one backbone, one wide head, and bias units on its layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.losses import LossFunction, SampleLoss
from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
from bpn_lightning.model.attaching import make_keys
from bpn_lightning.model.cursor import Cursor
from bpn_lightning.model.feature_width import feature_width
from bpn_lightning.model.inference import FixedModeNetwork, PerSampleNetwork
from bpn_lightning.model.merged_weights import MergedWeights
from bpn_lightning.model.structure import Attachment, Structure, check_mask
from bpn_lightning.nn.execution import compiled_in_place, leave_fast_paths
from bpn_lightning.nn.layers import (
    BiasUnits,
    Keys,
    SwitchableConv2d,
    SwitchableLinear,
    TaskModule,
    WeightBank,
    is_linear,
)
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, ContinualStream, Mask, Phase, Schedule, Split, Task
from bpn_lightning.trainer.lightning import HookNameAsPlainAttribute, grad_scaler, is_attached

__all__ = ["ContinualNetwork"]


class ContinualNetwork(HookNameAsPlainAttribute):
    """Structure, forward and modes: what strategies see of :class:`~bpn_lightning.model.module.ContinualModule`.

    Args:
        backbone: maps ``(batch, *input_shape)`` to features ``(batch, features)``.
        mask: the output units of the head that take part; see there.
        loss: of each sample; see :class:`~bpn_lightning.losses.SampleLoss`.

    Attributes:
        structure: what it consists of besides the backbone; checkpoints and exports hold it.
        cursor: where in the stream it is.
        strategies: the continual strategies of the trainer, in the order of its callbacks.
        phase_owners: the strategies that declared phases, by task and the phase's name.
        merged: keeps the weights of training while merged ones are in their place.
        in_step_forward: whether the forward that runs is the training step's own.
        param_groups: of the current optimizer, by the ``id`` of each of its parameters.

    Raises:
        ConfigurationError: the mask is unknown, or the loss is none.
    """

    accuracy_matrix: AccuracyMatrix

    def __init__(
        self, backbone: nn.Module, mask: Mask = "all", loss: LossFunction | None = None
    ) -> None:
        super().__init__()
        self.backbone = compiled_in_place(backbone)
        self.head: nn.Linear | None = None
        self.weight_bank: WeightBank | None = None
        self.structure = Structure(check_mask(mask))
        self.cursor = Cursor()
        self.strategies: Sequence[ContinualStrategy] = ()
        self.phase_owners: dict[tuple[int, str], ContinualStrategy] = {}
        self.merged = MergedWeights()
        self.sample_loss = SampleLoss(loss)
        self.in_step_forward = False
        self.param_groups: dict[int, dict[str, Any]] = {}
        self._stream: ContinualStream | None = None
        self._mode: int | Tensor = 0

    # --- structure -------------------------------------------------------------------------------

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
    def has_trainer(self) -> bool:
        """Whether there is one; a loaded module answers without."""
        return is_attached(self)

    @property
    def has_stream(self) -> bool:
        """Whether there is one; a loaded module answers without."""
        return self._stream is not None

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks of the stream."""
        return self.structure.tasks

    @property
    def opened(self) -> int:
        """The task that was opened last, -1 before the first."""
        return self.cursor.opened

    @property
    def closed(self) -> int:
        """The last task that is learned, consolidated and evaluated, -1 before the first."""
        return self.cursor.closed

    @property
    def schedule(self) -> Schedule:
        """Of the epochs of the stream."""
        return self.cursor.schedule

    @property
    def phase(self) -> Phase:
        """The phase that runs."""
        return self.cursor.phase

    @property
    def phase_owner(self) -> ContinualStrategy:
        """The strategy that declared the phase that runs."""
        return self.phase_owners[self.cursor.task, self.phase.name]

    @property
    def mode(self) -> "int | Tensor":
        """The task whose mode holds, or ``(batch,)`` one of each sample."""
        return self._mode

    def training_tasks(self, task_id: int) -> list[int]:
        """The tasks whose data a task is trained on: its own, and what a strategy adds."""
        wanted = (strategy.training_tasks(self.tasks[task_id]) for strategy in self.strategies)
        return sorted({task_id}.union(*wanted))

    @property
    def mask(self) -> Mask:
        """Which columns of the head take part in a task's loss."""
        return self.structure.mask

    @property
    def has_modes(self) -> bool:
        """Whether the network answers differently in different tasks' modes."""
        return bool(self.task_modules())

    def batches(
        self, task_id: int, split: Split, max_samples: int | None = None
    ) -> Iterator[Batch]:
        """This process's share of a task's samples, each once, on the device and prepared."""
        for batch in self.stream.loader(task_id, split, max_samples=max_samples):
            inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
            yield self.stream.prepare(batch._replace(inputs=inputs, targets=targets))

    def attach(self, stream: ContinualStream) -> None:
        """Use a stream: build the head on the first call, check the fit on later ones.

        Raises:
            ConfigurationError: the backbone's output is no feature matrix, the mask and the stream's
                classes do not fit, or the module was built for another stream.
        """
        self.structure.check_mask_fits(stream.tasks)
        self.build(
            list(stream.tasks), stream.num_classes, tuple(stream.input_shape), stream.input_dtype
        )
        self.structure.set_preparations(stream.preparations())
        self._stream = stream

    def build(
        self, tasks: list[Task], num_classes: int, input_shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Make head and accuracy matrix, with one dry forward through the backbone.

        Args:
            tasks: of the stream.
            num_classes: output units of the head.
            input_shape: of one prepared input.
            dtype: of prepared inputs.

        Raises:
            ConfigurationError: the backbone's output is no feature matrix, or the module was built for
                a stream of other sizes.
        """
        structure = self.structure
        if self.head is not None:
            structure.check_stream(tasks, num_classes, input_shape, dtype)
            structure.tasks = tasks
            return
        features = feature_width(self.backbone, input_shape, dtype, self.device)
        structure.tasks, structure.num_classes = tasks, num_classes
        structure.input_shape, structure.input_dtype = input_shape, dtype
        self.head = nn.Linear(features, num_classes, device=self.device)
        nn.init.normal_(self.head.weight, std=features**-0.5)
        nn.init.zeros_(self.head.bias)
        self.accuracy_matrix = AccuracyMatrix(len(tasks))

    def network(self) -> nn.Module:
        """The module itself, as the function from inputs to logits."""
        return self

    def linear_layers(self) -> dict[str, nn.Linear]:
        """Every fully connected layer by name, the head among them."""
        layers = {
            name: part
            for name, part in self.backbone.named_modules(prefix="backbone")
            if is_linear(part)
        }
        return {**cast(dict[str, nn.Linear], layers), "head": self.built_head}

    def attach_bias_units(self, layer: str, rank: int) -> nn.Module:
        """Give a linear layer bias units, or return those that it has."""
        linear = self.linear_layers()[layer]
        units = getattr(linear, "bias_units", None)
        if units is None:
            units = BiasUnits(len(self.tasks), rank, linear.out_features)
            SwitchableLinear.convert(linear, bias_units=units)
            leave_fast_paths(self.backbone)
            self._note("bias_units", layer=layer, rank=rank)
        if units.M.shape[1] != rank:
            raise ConfigurationError(
                f"Expected rank to be {units.M.shape[1]}, as in the bias units that layer "
                f"{layer} has, but got {rank}."
            )
        return cast(BiasUnits, units)

    def attach_keys(self, layer: str, kind: str) -> nn.Module:
        """Give a linear layer or a convolution keys, or return those that it has.

        Args:
            layer: its name; convolutions have binary keys only.
            kind: ``binary``, or ``complex``, which makes the layer's weights complex too.

        Raises:
            ConfigurationError: there is no such layer, or it has keys of the other kind.
        """
        known: dict[str, nn.Module] = {**self.linear_layers()}
        if kind != "complex":
            known |= {
                name: part
                for name, part in self.backbone.named_modules(prefix="backbone")
                if type(part) in (nn.Conv2d, SwitchableConv2d)
            }
        if layer not in known:
            raise ConfigurationError(
                f"Expected layers to be linear or convolutional layers of the network, but got "
                f"{layer!r}.{did_you_mean(layer, known)} It has {', '.join(known)}."
            )
        keys = getattr(known[layer], "keys", None)
        if keys is None:
            keys = make_keys(layer, known[layer], kind, len(self.tasks), layer == "head")
            leave_fast_paths(self.backbone)
            self._note("keys", layer=layer, kind=kind)
        if keys.kind != kind:
            raise ConfigurationError(
                f"Expected keys to be {keys.kind!r}, as those that layer {layer} has, but got {kind!r}."
            )
        return cast(Keys, keys)

    def attach_weight_bank(self) -> WeightBank:
        """Keep a whole set of weights for every task, or return the bank that does."""
        if self.weight_bank is None:
            self.weight_bank = WeightBank(len(self.tasks), self, ("backbone", "head"))
            self._note("weight_bank")
        return self.weight_bank

    def _note(self, part: str, **arguments: Any) -> None:
        self.structure.attached.append(Attachment(part, arguments))

    @property
    def built_head(self) -> nn.Linear:
        """The head, where there is one.

        Raises:
            ConfigurationError: the module knows no stream yet.
        """
        if self.head is None:
            raise ConfigurationError(
                "Expected the module to know its stream, but it has no head yet. Call "
                "trainer.fit(module, stream), module.attach(stream) or load a checkpoint first."
            )
        return self.head

    def task_modules(self) -> list[TaskModule]:
        """The parts that hold something for every task."""
        return [part for part in self.modules() if isinstance(part, TaskModule)]

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
        for buffer in self.backbone.buffers():
            if buffer.is_floating_point():
                own = buffer if self.global_rank == 0 else torch.zeros_like(buffer)
                buffer.copy_(self.all_reduce(own))

    def shared_parameters(self, include_head: bool) -> dict[str, nn.Parameter]:
        """The trainable parameters that tasks share, by name; never those of bias units."""
        own = {id(p) for part in self.task_modules() for p in part.parameters()}
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
            and id(parameter) not in own
            and (include_head or not name.startswith("head."))
        }

    # --- forward and modes -----------------------------------------------------------------------

    def forward(self, inputs: Tensor, task: "int | Tensor | None" = None) -> Tensor:
        """Logits of every class of the stream, -inf for the columns that the mask leaves out.

        Args:
            inputs: ``(batch, *input_shape)``, prepared.
            task: a task id, or ``(batch,)`` one per sample; None answers in the mode that holds.

        Returns:
            ``(batch, num_classes)``.
        """
        if task is not None:
            if isinstance(task, Tensor) and not all(p.per_sample for p in self.task_modules()):
                self.check_task_ids(task)
                return self._answer_groups(inputs, task)
            with self.task_mode(task):
                return self(inputs)  # type: ignore[no-any-return]
        logits = self.all_logits(inputs)
        if self.mask not in ("seen", "task"):
            return logits
        columns = torch.arange(logits.shape[1], device=logits.device)
        if isinstance(self._mode, Tensor):
            table = torch.tensor(
                [self.columns(t) for t in range(len(self.tasks))], device=logits.device
            )[self._mode]
            outside = (columns < table[:, :1]) | (columns >= table[:, 1:])
        else:
            first, stop = self.columns(self._mode)
            outside = (columns < first) | (columns >= stop)
        return logits.masked_fill(outside, float("-inf"))

    def _answer_groups(self, inputs: Tensor, task: Tensor) -> Tensor:
        """Logits where a batch can only have one task: one forward for each that occurs."""
        order = task.argsort(stable=True)
        ids = sorted(set(task.tolist()))
        answers = [self(inputs[task == one], task=one) for one in ids]
        return torch.cat(answers)[order.argsort()] if ids else self(inputs, task=0)

    def all_logits(self, inputs: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` in the mode that holds, whatever the mask leaves out."""
        if inputs.dtype == torch.uint8:
            raise ConfigurationError(
                "Expected inputs that the stream has prepared, but got uint8. module.predict(images) "
                "prepares raw images, and answers for them."
            )
        if inputs.is_floating_point():
            # Images become floats after Lightning converts precision.
            inputs = inputs.to(self.dtype)
        logits: Tensor = self.built_head(self.backbone(inputs))
        return logits

    def columns(self, task_id: int) -> tuple[int, int]:
        """``(start, stop)`` of the head's output units that take part in a task's mode."""
        return self.structure.columns(task_id, self.opened)

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
        if isinstance(task, int):
            first, stop = self.columns(task)
            return self.sample_loss(logits[:, first:stop], targets - first, first)
        if self.sample_loss.loss is None or self.mask not in ("seen", "task"):
            return self.sample_loss(logits, targets)
        return self.sample_loss.by_task(logits, targets, task, self.columns)

    def for_inference(self, task: int | None = None) -> nn.Module:
        """A copy of the network that only answers, for ``torch.export`` and ``torch.onnx.export``.

        Args:
            task: whose mode it is in for good; None: each sample names its own.

        Returns:
            In evaluation mode, with ``forward(inputs)`` or ``forward(inputs, tasks)``: prepared inputs
            ``(batch, *input_shape)``, task IDs ``(batch,)`` int64, logits ``(batch, num_classes)``.

        Raises:
            ConfigurationError: the stream has no such task, the backbone cannot be copied, or task is
                None where a batch can only have one task.
        """
        if task is not None:
            with self.task_mode(task):
                return FixedModeNetwork(self.backbone, self.built_head, self.columns(task))
        whole = [type(part).__name__ for part in self.task_modules() if not part.per_sample]
        if whole:
            raise ConfigurationError(
                "Expected task to be a task ID where a batch can only have one task, but got None, and "
                f"the network has {whole[0]}. Make one network for each task."
            )
        columns = [self.columns(task.id) for task in self.tasks]
        return PerSampleNetwork(self.backbone, self.built_head, columns)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: nothing says for which task."""
        raise _no_task_named(
            "to_onnx", "torch.onnx.export(module.for_inference(task), (inputs,), dynamo=True)"
        )

    def to_torchscript(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: TorchScript is at its end, and takes no modes."""
        raise _no_task_named(
            "to_torchscript", "torch.export.export(module.for_inference(task), (inputs,))"
        )

    def to_tensorrt(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: nothing says for which task."""
        raise _no_task_named(
            "to_tensorrt", "torch_tensorrt.compile(module.for_inference(task), inputs=[inputs])"
        )

    @contextmanager
    def task_mode(self, task: "int | Tensor") -> Iterator[None]:
        """Whatever runs inside uses this task's mode; the one before returns, also on an error.

        Args:
            task: a task id, or ``(batch,)`` int64, one id per sample of every forward inside.

        Raises:
            ConfigurationError: the stream has no such task.
        """
        self.check_task_ids(task)
        before = self._mode
        try:
            self.switch(task)
            yield
        finally:
            self.switch(before)

    def check_task_ids(self, task: "int | Tensor") -> None:
        """Refuse what is no task ID of the stream.

        Raises:
            ConfigurationError: it is none, or of the wrong shape.
        """
        if isinstance(task, Tensor) and torch.compiler.is_compiling():
            raise ConfigurationError(
                "Expected task to be a number where the module itself is exported, but got a tensor, "
                "whose values are not known then. Export module.for_inference()."
            )
        if isinstance(task, Tensor) and task.dim() != 1:
            raise ConfigurationError(
                f"Expected task to be a number or (batch,) numbers, but got {task.dim()} dimensions."
            )
        ids = set(task.tolist()) if isinstance(task, Tensor) else {task}
        for one in ids:
            if not 0 <= one < len(self.tasks):
                raise ConfigurationError(
                    f"Expected task to be an id from 0 to {len(self.tasks) - 1}, but got {one}."
                )

    def switch(self, task: "int | Tensor") -> None:
        """Answer in a task's mode from now on; :meth:`task_mode` does so for a while, and checks."""
        self._mode = task
        for part in self.task_modules():
            part.switch(task)


def _no_task_named(method: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        f"Expected a network in a task's mode to be exported, but got {method} of a module that has one "
        f"for each task. Use {remedy}."
    )
