"""Encoder-based lifelong learning."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adadelta, Optimizer
from torch.utils.hooks import RemovableHandle

from bpn_lightning.checks import check_above_zero, check_number, check_positive_int
from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import evaluation_mode, full_precision
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.lwf import LearningWithoutForgetting
from bpn_lightning.tasks import Batch, ContinualStream, Phase, Task, dry_inputs
from bpn_lightning.teacher import Outputs, concatenated_heads, student_outputs

__all__ = ["Autoencoder", "EncoderBasedLifelongLearning", "code_loss", "codes"]

PHASE = "autoencoder"


# --- the mathematics -----------------------------------------------------------------------------


def codes(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""The codes of features, :math:`\sigma(W_k F + b_k)`, in the encoders' precision.

    Args:
        features: F, ``(batch, features)``.
        weight: W of one or more encoders, ``(encoders, code, features)``.
        bias: b, ``(encoders, code)``.

    Returns:
        ``(batch, encoders * code)``.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(weight.dtype)
        return F.linear(features, weight.flatten(0, 1), bias.flatten()).sigmoid()


def code_loss(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    r"""The drift of codes, :math:`\frac{\alpha}{2} \|c - c^*\|^2`, for each sample.

    Its gradient with respect to the features is
    :math:`\alpha W^T [(c - c^*) \odot c \odot (1 - c)]`, exactly 0 if student and teacher agree or
    differ only in the null space of W.

    Args:
        student: c, ``(batch, codes)``.
        teacher: c*, the same.
        alpha: dimensionless.

    Returns:
        ``(batch,)``.

    >>> code_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.25]]), alpha=2.0)
    tensor([0.0625])
    """
    return (student - teacher).square().sum(1) * (alpha / 2)


class Autoencoder(nn.Module):
    r"""An under-complete autoencoder of one hidden layer, :math:`r(F) = W_{dec}\,\sigma(W F + b) + b'`.

    Args:
        features: d.
        code_size: c, below d.
        generator: initializes the weights, uniform within 1 / sqrt(inputs); the biases are 0. None
            leaves them uninitialized, to be loaded.
        activation: the sigmoid; with the identity it can learn a principal component analysis.
    """

    def __init__(
        self,
        features: int,
        code_size: int,
        generator: torch.Generator | None = None,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight, self.decoder_weight = (
            nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) / shape[1] ** 0.5)
            if generator is not None
            else nn.Parameter(torch.empty(*shape))
            for shape in ((code_size, features), (features, code_size))
        )
        self.bias = nn.Parameter(torch.zeros(code_size))
        self.decoder_bias = nn.Parameter(torch.zeros(features))

    def forward(self, features: Tensor) -> Tensor:
        """Reconstruct features, ``(batch, d)``, in the precision of the weights."""
        with torch.autocast(features.device.type, enabled=False):
            code = self.activation(F.linear(features.to(self.weight.dtype), self.weight, self.bias))
            return F.linear(code, self.decoder_weight, self.decoder_bias)


def reconstructed(
    network: nn.Module, layer: str, autoencoder: Autoencoder, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The logits of a network with a layer's features replaced by their reconstruction.

    The network's parameters are detached: only the autoencoder's get gradients.

    Args:
        network: maps ``(batch, ...)`` to logits, in evaluation mode.
        layer: name of the layer.
        autoencoder: r.
        inputs: ``(batch, ...)``.

    Returns:
        The logits of the rest of the network for r(F), and :math:`\|r(F) - F\|^2` for each sample,
        ``(batch,)``.
    """
    errors = []

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        features = output.flatten(1)
        rebuilt: Tensor = autoencoder(features)
        errors.append((rebuilt - features).square().sum(1))
        return rebuilt.to(output.dtype).view_as(output)

    detached = {name: parameter.detach() for name, parameter in network.named_parameters()}
    handle = network.get_submodule(layer).register_forward_hook(replace)
    try:
        logits: Tensor = functional_call(network, detached, (inputs,))
    finally:
        handle.remove()
    return logits, errors[0]


# --- the strategy --------------------------------------------------------------------------------


class EncoderBasedLifelongLearning(LearningWithoutForgetting):
    r"""EBLL: LwF, and a penalty on changes of the features that past tasks' autoencoders encode.

    .. math:: L_{\mathrm{LwF}} + \sum_{k<t} \frac{\alpha}{2}
              \big\| \sigma(W_k F(x) + b_k) - \sigma(W_k F^*(x) + b_k) \big\|^2

    Rannen Triki et al. (2017), https://arxiv.org/abs/1704.01920. F are the features of the network, F*
    those of LwF's teacher, for the same sample. W_k, b_k is the encoder of an under-complete
    autoencoder r that was trained on the features of task k at the end of that task, with the network
    frozen, by minimizing

    .. math:: \alpha_r \| r(F) - F \|^2 + \mathrm{CE}(T_k(r(F)), y)

    where T_k is the rest of the network. If the network has modes, F and F* are computed in the mode
    of task k.

    Differs from the paper: the teacher's codes are recomputed for every batch, not recorded once; the
    stream's last task has an autoencoder too, since the stream may go on; the warm-up and the learning
    rate are as in LwF. Implementations that average over batch and codes (``nn.MSELoss``)
    scale alpha differently: ours is theirs times 2 / code_size.

    Args:
        strength: lambda of LwF, dimensionless.
        alpha: weight of the code loss, dimensionless; 0 is LwF.
        code_size: c, units of the code, below the number of features; by default 100 or half of the
            features, whichever is less.
        layer: name of the layer whose output is F, flattened: ``"backbone"`` or a part of it.
        autoencoder_epochs: epochs over a task's samples to train its autoencoder.
        autoencoder_lr: learning rate of its optimizer, Adadelta.
        reconstruction: alpha_r, weight of the squared error, which is summed over features.
        temperature: T of LwF, dimensionless.
        heads: as in LwF.
        warm_up_epochs: as in LwF.

    State:
        LwF's teacher; for each past task an encoder, W ``(c, d)`` and b ``(c,)``, 4 (c d + c) bytes;
        while one is trained, the whole autoencoder. Nothing is needed for inference.

    Raises:
        ConfigurationError: a value is out of range or unknown, the layer does not exist or is not used
            exactly once per forward pass, the code is not smaller than the features, or as in LwF.
    """

    null_arguments: ClassVar[Mapping[str, Any]] = {"strength": 0.0, "alpha": 0.0}

    _handle: RemovableHandle | None = None  # of the hook on the layer

    def __init__(
        self,
        strength: float = 1.0,
        alpha: float = 0.02,
        *,
        code_size: int | None = None,
        layer: str = "backbone",
        autoencoder_epochs: int = 10,
        autoencoder_lr: float = 1.0,
        reconstruction: float = 0.01,
        temperature: float = 2.0,
        heads: Literal["per_task", "joint"] = "per_task",
        warm_up_epochs: int = 0,
    ) -> None:
        super().__init__(
            strength,
            temperature=temperature,
            heads=heads,
            warm_up_epochs=warm_up_epochs,
            record=False,  # features take much memory, and the teacher has to run for them anyway
        )
        check_number("alpha", alpha, "0 is LwF.")
        check_number("reconstruction", reconstruction, "0 uses only the cross-entropy.")
        if code_size is not None:
            check_positive_int(
                "code_size", code_size, "Leave it out for 100 or half of the features."
            )
        check_positive_int(
            "autoencoder_epochs",
            autoencoder_epochs,
            "Without autoencoders EBLL is LwF: set alpha to 0.",
        )
        check_above_zero(
            "autoencoder_lr",
            autoencoder_lr,
            "It scales the steps of Adadelta; 1 leaves them unchanged.",
        )
        self.alpha = alpha
        self.code_size = code_size
        self.layer = layer
        self.autoencoder_epochs = autoencoder_epochs
        self.autoencoder_lr = autoencoder_lr
        self.reconstruction = reconstruction

    def reset(self) -> None:
        """Start without a teacher and encoders, and remove the hook on the layer."""
        super().reset()
        self.encoders: dict[str, Tensor] = {}  # weight (tasks, c, d) and bias (tasks, c)
        self.autoencoder: Autoencoder | None = None
        self._features: Tensor | None = None  # of the step's batch, until its loss is computed
        self._remove_hook()

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is used."""
        return self.strength > 0 or self.alpha > 0

    @property
    def num_encoders(self) -> int:
        """The number of stored encoders."""
        return len(self.encoders["weight"]) if self.encoders else 0

    # --- launch ----------------------------------------------------------------------------------

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Find the layer, and register a hook on it."""
        super().configure(host, stream)
        network = host.network
        known = dict(network.get_submodule("backbone").named_modules(prefix="backbone"))
        if self.layer not in known:
            raise ConfigurationError(
                f"Expected layer to be 'backbone' or a part of it, but got {self.layer!r}."
                f"{did_you_mean(self.layer, known)} It has {', '.join(known)}."
            )
        self._remove_hook()
        if self.alpha > 0:
            hook = partial(self._record_features, host)
            self._handle = known[self.layer].register_forward_hook(hook)

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse a code that is not smaller than the features, after all strategies are configured."""
        super().check(host, optimizer)
        features = self._num_features(host)
        if self.code_size is not None and self.code_size >= features:
            raise ConfigurationError(
                f"Expected code_size to be below the {features} features of layer {self.layer!r}, but "
                f"got {self.code_size}. Leave it out for 100 or half of the features."
            )

    def _num_features(self, host: ContinualHost) -> int:
        """Width of the layer's flattened output, from one dry forward pass."""
        network, outputs = host.network, []
        layer = network.get_submodule(self.layer)
        handle = layer.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
        sample = dry_inputs(host.network.structure, 1, host.device)
        try:
            with torch.no_grad(), evaluation_mode(network):
                network(sample)
        finally:
            handle.remove()
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].numel() < 2:
            raise ConfigurationError(
                f"Expected layer to output one tensor with several features per forward pass, but got "
                f"{len(outputs)} outputs from {self.layer!r}. Choose a layer that is used once."
            )
        return outputs[0].numel()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook."""
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _record_features(
        self, host: ContinualHost, layer: nn.Module, arguments: Any, output: Tensor
    ) -> None:
        if host.in_step_forward and self.encoders:
            self._features = output.flatten(1).clone()  # the next layer may be in-place

    # --- the autoencoder of a task ---------------------------------------------------------------

    def phases(self, task: Task, phases: list[Phase]) -> list[Phase]:
        """Append the training of the autoencoder."""
        phases = super().phases(task, phases)
        if self.alpha == 0:
            return phases
        return [*phases, Phase(PHASE, self.autoencoder_epochs, trains="strategy")]

    def phase_optimizer(self, host: ContinualHost, phase: Phase) -> Optimizer:
        """Adadelta, over a new autoencoder, or over the restored one when resuming."""
        autoencoder = self.autoencoder or self._new_autoencoder(host)
        if self.num_encoders == host.network.opened:
            self.autoencoder = autoencoder
        # else the task is finished, and resuming only needs an optimizer to load the state into
        return Adadelta(autoencoder.to(host.device).parameters(), lr=self.autoencoder_lr)

    def _new_autoencoder(self, host: ContinualHost) -> Autoencoder:
        features = self._num_features(host)
        generator = seeded_generator("autoencoder", host.stream.seed, host.network.opened)
        return Autoencoder(features, self.code_size or min(100, features // 2), generator)

    def phase_loss(self, host: ContinualHost, phase: Phase, batch: Batch) -> Tensor:
        """The reconstruction error plus the task's loss on the reconstruction: ``(batch,)``."""
        assert self.autoencoder is not None
        logits, errors = reconstructed(host.network, self.layer, self.autoencoder, batch.inputs)
        losses = host.losses(full_precision(logits), batch.targets, host.network.opened)
        return self.reconstruction * errors + losses

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Store the encoder and discard the decoder."""
        if self.autoencoder is None:
            return
        learned = {"weight": self.autoencoder.weight, "bias": self.autoencoder.bias}
        for name, value in learned.items():
            if not value.isfinite().all():
                raise ConfigurationError(
                    f"Expected the encoder of task {task.id} to be finite, but its {name} is not. "
                    "Lower autoencoder_lr or reconstruction."
                )
        self.encoders = {
            name: torch.cat(
                [*([self.encoders[name]] if self.encoders else []), value.detach()[None]]
            )
            for name, value in learned.items()
        }
        self.autoencoder = None

    # --- the loss of later tasks -----------------------------------------------------------------

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The distillation loss of all old heads, and the code loss of all old tasks."""
        features, self._features = self._features, None
        if not self.distills(host):
            return {}
        layer = self.layer if self.encoders else None
        outputs = Outputs(logits, features)
        if layer and features is None:  # the layer did not run
            outputs = student_outputs(host, batch.inputs, layer)
        students = self.student_outputs(host, batch, outputs, layer)
        teachers = self.teacher_outputs(host, batch.inputs, layer)
        terms = {}
        if self.strength:
            heads = self.old_heads(host)
            student, teacher = (
                concatenated_heads(students, heads),
                concatenated_heads(teachers, heads),
            )
            terms["lwf"] = self.distilled(student, teacher, heads)
        if self.encoders:
            known = host.network.structure.known(range(self.num_encoders))
            terms["ebll"] = self.code_term(students, teachers, known)
        return terms

    def code_term(
        self,
        students: Sequence[Outputs],
        teachers: Sequence[Outputs],
        tasks: Sequence[int] | None = None,
    ) -> Tensor:
        """The code loss of these outputs, including alpha: ``(batch,)``.

        Args:
            students: one for each encoder of these tasks, or one for all.
            teachers: likewise.
            tasks: IDs; None: all.
        """
        tasks = range(self.num_encoders) if tasks is None else tasks
        several = len(students) > 1
        losses = []
        for index, pair in enumerate(zip(students, teachers, strict=True)):
            own = list(tasks[index : index + 1] if several else tasks)
            weight, bias = self.encoders["weight"][own], self.encoders["bias"][own]
            student, teacher = (
                codes(one.features, weight, bias) for one in pair if one.features is not None
            )
            losses.append(code_loss(student, teacher, self.alpha))
        return torch.stack(losses).sum(0)

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """LwF's; overwrite its encoder."""
        self.encoders = {name: value.clone() for name, value in self.encoders.items()}
        for value in self.encoders.values():
            value[task.id : task.id + 1] = 0  # the last task has none
        return super().forget(host, task)

    # --- bookkeeping -----------------------------------------------------------------------------

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Training: LwF's, 4 (c d + c) per encoder, and the autoencoder in training, if any."""
        training, number = super().declared_bytes(host).training, self.num_encoders
        if number:
            _, c, d = self.encoders["weight"].shape
            training += 4 * number * (c * d + c)
        if self.autoencoder is not None:
            c, d = self.autoencoder.weight.shape
            training += 4 * (2 * c * d + c + d)
        return DeclaredBytes(training)

    def training_state(self) -> str:
        """LwF's, and what past tasks' features are encoded by."""
        return "teacher and autoencoders"

    def state_dict(self) -> dict[str, Any]:
        """The teacher, the encoders, and the autoencoder in training, if any."""
        live = {} if self.autoencoder is None else self.autoencoder.state_dict()
        return {
            **super().state_dict(),
            "encoders": self.encoders,
            "autoencoder": dict(live),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the teacher, the encoders and the autoencoder."""
        super().load_state_dict(state_dict)
        self.encoders = dict(state_dict["encoders"])
        live, self.autoencoder = state_dict["autoencoder"], None
        if live:
            code_size, features = live["weight"].shape
            self.autoencoder = Autoencoder(features, code_size)
            self.autoencoder.load_state_dict(live)

    def move_state(self, host: ContinualHost) -> None:
        """Move everything to the host's device, in place so that the optimizer's references stay valid."""
        super().move_state(host)
        self.encoders = {name: value.to(host.device) for name, value in self.encoders.items()}
        if self.autoencoder is not None:
            self.autoencoder.to(host.device)
