"""A network whose mode follows the task: one backbone, one wide head, and bias units on its layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.model.inference import FixedModeNetwork, PerSampleNetwork
from bpn_lightning.nn.execution import compiled_in_place, leave_fast_paths
from bpn_lightning.nn.layers import (
    BiasUnits,
    ComplexKeys,
    ComplexLinear,
    KernelKeys,
    Keys,
    SwitchableConv2d,
    SwitchableLinear,
    TaskModule,
    WeightBank,
    evaluation_mode,
    is_linear,
)
from bpn_lightning.preparation import Preparation, differing_preparation
from bpn_lightning.tasks import Batch, ContinualStream, Mask, Split, Task

__all__ = ["ContinualNetwork"]

MASKS = ("all", "seen", "task", "shared")


class ContinualNetwork(L.LightningModule):
    """Structure, forward and modes; :class:`~bpn_lightning.model.module.ContinualModule` trains it.

    Args:
        backbone: maps ``(batch, *input_shape)`` to features ``(batch, features)``.
        mask: the columns of the head that take part; see there.

    Raises:
        ConfigurationError: the mask is unknown.
    """

    def __init__(self, backbone: nn.Module, mask: Mask = "all") -> None:
        super().__init__()
        if mask not in MASKS:
            raise ConfigurationError(
                f"Expected mask to be one of {', '.join(MASKS)}, but got {mask!r}."
            )
        self.backbone = compiled_in_place(backbone)
        self.head: nn.Linear | None = None
        self.opened = -1
        self._mask: Mask = mask
        self._tasks: list[Task] = []
        self._input_shape: tuple[int, ...] = ()
        self._input_dtype = torch.float32
        self._preparations: list[Preparation] = []  # of all tasks, in order
        self.weight_bank: WeightBank | None = None
        self._attached: list[list[Any]] = []  # what was attached: kind and arguments
        self._stream: ContinualStream | None = None
        self._mode: int | Tensor = 0
        self._training_weights: dict[str, Tensor] = {}  # while merged ones are in their place

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes which hook runs, some forty times per update: that is no parameter."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

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
    def tasks(self) -> Sequence[Task]:
        """The tasks of the stream."""
        return self._tasks

    @property
    def mask(self) -> Mask:
        """Which columns of the head take part in a task's loss."""
        return self._mask

    @property
    def has_modes(self) -> bool:
        """Whether the network answers differently in different tasks' modes."""
        return bool(self._task_modules())

    def batches(self, task_id: int, split: Split, at_most: int | None = None) -> Iterator[Batch]:
        """This process's share of a task's samples, each once, on the device and prepared."""
        for batch in self.stream.loader(task_id, split, at_most=at_most):
            inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
            yield self.stream.prepare(batch._replace(inputs=inputs, targets=targets))

    def attach(self, stream: ContinualStream) -> None:
        """Use a stream: build the head on the first call, check the fit on later ones.

        Raises:
            ConfigurationError: the backbone's output is no feature matrix, the mask and the stream's
                classes do not fit, or the module was built for another stream.
        """
        shared = len({task.columns for task in stream.tasks}) == 1
        if len(stream.tasks) > 1 and shared != (self._mask == "shared"):
            wanted, why = "'all', 'seen' or 'task'", "brings new classes with every task"
            if shared:
                wanted, why = "'shared'", "has the same classes in every task"
            raise ConfigurationError(
                f"Expected mask to be {wanted} for a stream that {why}, but got {self._mask!r}. Set "
                "model.mask, or choose another stream."
            )
        self._build(
            list(stream.tasks), stream.num_classes, tuple(stream.input_shape), stream.input_dtype
        )
        self._check_preparation(stream.preparations())
        self._stream = stream

    def _check_preparation(self, found: list[Preparation]) -> None:
        """Take how a stream prepares inputs, or refuse another way than the one that was learned."""
        different = differing_preparation(self._preparations, found) if self._preparations else None
        if different:
            raise ConfigurationError(
                "Expected the stream to prepare its inputs as the one that this module was built for, "
                f"{different[0]}, but got {different[1]}. Give it the data and the seed of that stream; "
                "module.predict takes other images."
            )
        self._preparations = self._preparations or found

    def _build(
        self, tasks: list[Task], num_classes: int, input_shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Make head and matrix with one dry forward through the backbone."""
        if self.head is not None:
            built = (len(self._tasks), self.head.out_features, self._input_shape, self._input_dtype)
            wanted = (len(tasks), num_classes, input_shape, dtype)
            if built != wanted:
                raise ConfigurationError(
                    "Expected the stream that this module was built for, with (tasks, classes, input "
                    f"shape, input dtype) of {built}, but got {wanted}. Make a new module for another "
                    "stream."
                )
            self._tasks = tasks
            return
        features = self._features(input_shape, dtype)
        self._tasks, self._input_shape, self._input_dtype = tasks, input_shape, dtype
        self.head = nn.Linear(features, num_classes, device=self.device)
        nn.init.normal_(self.head.weight, std=features**-0.5)
        nn.init.zeros_(self.head.bias)

    def _features(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Width of the backbone's output for inputs of this shape and dtype."""
        inputs = torch.zeros(1, *input_shape, dtype=dtype, device=self.device)
        wanted = f"(batch, {', '.join(map(str, input_shape))})"
        eagerly = torch.compiler.set_stance("force_eager")  # a graph of before the layers switch
        with torch.no_grad(), evaluation_mode(self.backbone), eagerly:
            try:
                output = self.backbone(inputs)
            except Exception as error:
                raise ConfigurationError(
                    f"Expected backbone to accept {_kind(dtype)} of shape {wanted}, but its forward "
                    f"raised {type(error).__name__}: {str(error).rstrip('.')}. "
                    f"{_remedy(str(error), inputs)}"
                ) from error
        if not isinstance(output, Tensor) or output.dim() != 2:
            tensor = isinstance(output, Tensor)
            got = f"shape {tuple(output.shape)}" if tensor else f"a {type(output).__name__}"
            remedy = "Let it return a tensor with a row for each sample."
            if tensor and output.dim() > 2:
                remedy = "End it with nn.Flatten(), or with a mean over what is neither sample nor feature."
            raise ConfigurationError(
                f"Expected backbone to map {wanted} to (batch, features), but got {got} for a batch of "
                f"1. {remedy}"
            )
        return output.shape[1]

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
        return {**cast(dict[str, nn.Linear], layers), "head": self._head}

    def attach_bias_units(self, layer: str, rank: int) -> nn.Module:
        """Give a linear layer bias units, or return those that it has."""
        linear = self.linear_layers()[layer]
        units = getattr(linear, "bias_units", None)
        if units is None:
            units = BiasUnits(len(self._tasks), rank, linear.out_features)
            SwitchableLinear.convert(linear, bias_units=units)
            leave_fast_paths(self.backbone)
            self._attached.append(["bias_units", layer, rank])
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
            keys = self._make_keys(layer, known[layer], kind)
            leave_fast_paths(self.backbone)
            self._attached.append(["keys", layer, kind])
        if keys.kind != kind:
            raise ConfigurationError(
                f"Expected keys to be {keys.kind!r}, as those that layer {layer} has, but got {kind!r}."
            )
        return cast(Keys, keys)

    def _make_keys(self, layer: str, part: nn.Module, kind: str) -> Keys:
        tasks = len(self._tasks)
        if isinstance(part, nn.Conv2d):
            return SwitchableConv2d.convert(
                part, KernelKeys(tasks, part.groups * part.weight[0].numel())
            ).keys
        assert isinstance(part, nn.Linear)
        if kind == "complex":
            if "weight" not in dict(part.named_parameters(recurse=False)):
                raise ConfigurationError(
                    "Expected layers with weights of their own where keys are 'complex', but layer "
                    f"{layer} makes its weights from others. Set keys to 'binary', or take weight_norm "
                    "and other parametrizations away."
                )
            keys = ComplexKeys(tasks, part.in_features)
            return ComplexLinear.make_complex(part, keys, real_output=part is self.head).keys
        return cast(Keys, SwitchableLinear.convert(part, keys=Keys(tasks, part.in_features)).keys)

    def attach_weight_bank(self) -> WeightBank:
        """Keep a whole set of weights for every task, or return the bank that does."""
        if self.weight_bank is None:
            self.weight_bank = WeightBank(len(self._tasks), self, ("backbone", "head"))
            self._attached.append(["weight_bank"])
        return self.weight_bank

    @property
    def _head(self) -> nn.Linear:
        if self.head is None:
            raise ConfigurationError(
                "Expected the module to know its stream, but it has no head yet. Call "
                "trainer.fit(module, stream), module.attach(stream) or load a checkpoint first."
            )
        return self.head

    def _task_modules(self) -> list[TaskModule]:
        return [part for part in self.modules() if isinstance(part, TaskModule)]

    @property
    def training_weights(self) -> Mapping[str, Tensor]:
        """By name, the weights of training while merged ones are in their place; else empty."""
        return self._training_weights

    def shared_parameters(self, include_head: bool) -> dict[str, nn.Parameter]:
        """The trainable parameters that tasks share, by name; never those of bias units."""
        own = {id(p) for part in self._task_modules() for p in part.parameters()}
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
            if isinstance(task, Tensor) and not all(p.per_sample for p in self._task_modules()):
                self._check_tasks(task)
                return self._answer_groups(inputs, task)
            with self.task_mode(task):
                return self(inputs)  # type: ignore[no-any-return]
        logits = self._logits(inputs)
        if self._mask not in ("seen", "task"):
            return logits
        columns = torch.arange(logits.shape[1], device=logits.device)
        if isinstance(self._mode, Tensor):
            table = torch.tensor(
                [self.columns(t) for t in range(len(self._tasks))], device=logits.device
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

    def _logits(self, inputs: Tensor) -> Tensor:
        """Of all columns, in the mode that holds."""
        if inputs.dtype == torch.uint8:
            raise ConfigurationError(
                "Expected inputs that the stream has prepared, but got uint8. module.predict(images) "
                "prepares raw images, and answers for them."
            )
        if inputs.is_floating_point():
            inputs = inputs.to(
                self.dtype
            )  # images become floats after Lightning converts precision
        logits: Tensor = self._head(self.backbone(inputs))
        return logits

    def columns(self, task_id: int) -> tuple[int, int]:
        """``(start, stop)`` of the head's columns that take part in a task's mode."""
        if self._mask == "task":
            return self._tasks[task_id].columns
        if self._mask == "seen" and self.opened >= 0:
            # Of the tasks opened so far, in every mode: following the mode would be an oracle.
            return 0, max(task.columns[1] for task in self._tasks[: self.opened + 1])
        return 0, self._head.out_features

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
                return FixedModeNetwork(self.backbone, self._head, self.columns(task))
        whole = [type(part).__name__ for part in self._task_modules() if not part.per_sample]
        if whole:
            raise ConfigurationError(
                "Expected task to be a task ID where a batch can only have one task, but got None, and "
                f"the network has {whole[0]}. Make one network for each task."
            )
        columns = [self.columns(task.id) for task in self._tasks]
        return PerSampleNetwork(self.backbone, self._head, columns)

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
        self._check_tasks(task)
        before = self._mode
        try:
            self._switch(task)
            yield
        finally:
            self._switch(before)

    def _check_tasks(self, task: "int | Tensor") -> None:
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
            if not 0 <= one < len(self._tasks):
                raise ConfigurationError(
                    f"Expected task to be an id from 0 to {len(self._tasks) - 1}, but got {one}."
                )

    def _switch(self, task: "int | Tensor") -> None:
        self._mode = task
        for part in self._task_modules():
            part.switch(task)


def _kind(dtype: torch.dtype) -> str:
    return "inputs" if dtype.is_floating_point else f"integer tokens ({dtype})"


def _remedy(said: str, inputs: Tensor) -> str:
    """What helps against an error that a forward raised on these inputs."""
    if not inputs.is_floating_point():
        return "Begin it with nn.Embedding, which turns tokens into floats."
    if "indices" in said:  # of an embedding
        return (
            "An embedding needs a stream of integer tokens: this one's inputs are floats. Pass another "
            "network, or tokens as integers."
        )
    if "more than 1 value per channel" in said:
        return (
            "A layer that normalizes batches has no running statistics to answer a single sample with: "
            "make it with track_running_stats=True, or normalize each sample."
        )
    if "channels" in said and inputs.dim() == 4 and inputs.shape[1] in (1, 3):
        return (
            f"Set the stream's channels to {4 - inputs.shape[1]}, or pass a network for images of "
            f"{inputs.shape[1]}."
        )
    if inputs.dim() > 2 and "mat1 and mat2" in said:
        return "Begin it with nn.Flatten(), or pass a network for inputs of this shape."
    return "Pass a network for inputs of this shape."


def _no_task_named(method: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        f"Expected a network in a task's mode to be exported, but got {method} of a module that has one "
        f"for each task. Use {remedy}."
    )
