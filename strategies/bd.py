"""Beneficial perturbations: the bias units of the Beneficial Perturbation Network."""

from collections.abc import Mapping, Sequence
from math import cos, pi
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from bpn_lightning.checks import check_above_zero, check_choice, check_number, check_positive_int
from bpn_lightning.costs import DeclaredBytes, HeldTensors, bias_unit_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import BiasUnits
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream, Task

__all__ = ["BeneficialPerturbation", "Direction", "StepSchedule", "perturbation"]

Direction = Literal["sign", "gradient", "normalized", "frozen"]
DIRECTIONS = ("sign", "gradient", "normalized", "frozen")

StepSchedule = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")


def perturbation(gradients: list[Tensor], direction: Direction, epsilon: float) -> Sequence[Tensor]:
    r"""The steps to subtract from several M, with the shapes of their gradients.

    ``sign`` is :math:`\epsilon\,\mathrm{sign}(g)` (Alg. 2 of Wen et al.), ``gradient`` is
    :math:`\epsilon g` (their GD), ``normalized`` is :math:`\epsilon \sqrt{H}\, g / \|g\|`, whose norm is
    that of ``sign``, and ``frozen`` is 0.

    >>> g = [torch.tensor([[3.0, -4.0]])]
    >>> perturbation(g, "sign", 0.1)[0]
    tensor([[ 0.1000, -0.1000]])
    >>> perturbation(g, "normalized", 0.1)[0].norm() / 2**0.5
    tensor(0.1000)
    """
    if direction == "sign":
        return torch._foreach_mul(torch._foreach_sign(gradients), epsilon)
    if direction == "gradient":
        return torch._foreach_mul(gradients, epsilon)
    if direction == "normalized":
        norms = torch._foreach_norm(gradients)
        return [
            g * torch.where(norm > 0, epsilon * g.numel() ** 0.5 / norm, norm)
            for g, norm in zip(gradients, norms, strict=True)
        ]
    return [torch.zeros_like(g) for g in gradients]


def scheduled(epsilon: float, schedule: StepSchedule, progress: float) -> float:
    r"""The step of M at a point of its task, :math:`\epsilon` at its start.

    ``linear`` is :math:`\epsilon\,(1 - p)`, ``cosine`` :math:`\epsilon\,(1 + \cos \pi p) / 2`: both end at 0.

    Args:
        epsilon: the first step.
        schedule: how it falls.
        progress: p, the fraction of the task's updates that came before, 0 to 1.

    >>> [scheduled(0.5, "linear", n / 4) for n in range(4)]
    [0.5, 0.375, 0.25, 0.125]
    """
    if schedule == "linear":
        return epsilon * (1 - progress)
    if schedule == "cosine":
        return epsilon * (1 + cos(pi * progress)) / 2
    return epsilon


class BeneficialPerturbation(ContinualStrategy):
    r"""Bias units that switch one network between tasks: :math:`\mathrm{BIAS}_t = M_t W_t`.

    .. math:: V^{i+1} = \sigma(W^i V^i + b^i + M^i_t W^i_t), \quad
              M \leftarrow M - \epsilon\,\mathrm{sign}(\nabla_M L)

    Eq. 1 and Alg. 1 and 2 of Wen, Rios, Ge, Itti, "Beneficial Perturbation Network for designing
    general adaptive artificial intelligence systems". W is learned by the optimizer; M moves by
    epsilon after each optimizer step, independent of the learning rate; the product is frozen at the
    end of the task and selected by the task's mode.

    Where the paper leaves it open: epsilon is the step itself, not multiplied by the learning rate; M
    starts at 0 and W at N(0, 1/H), so a task starts as the network without bias units; the sign is
    taken once per update, of the gradient over all processes and accumulated batches; M descends on
    the loss (the text names the sign of the gradient, Alg. 2 lists it among gradients).

    Args:
        rank: H, width of the factorization; the paper uses 1 to 2500.
        epsilon: the step of M per update; the tuned values of the configs are between 0.03 and 0.1.
        schedule: how the step changes over the updates of each task: ``constant``, the paper's; ``linear``
            or ``cosine``, from epsilon at the first update to 0 after the last one, so that the signs of a
            gradient that is about 0 do not move M at the end. It counts the updates that happened, of all
            phases in which M moves, and resumes with the run. The last one is that of the planned epochs:
            a task that early stopping ends before, ends at a step above 0.
        direction: how M is updated. ``sign`` is the paper's BD, ``gradient`` its GD, ``normalized`` the
            gradient scaled to the norm of the sign's step; ``frozen`` is a control, in which neither M
            nor W is trained and M is sampled from N(0, 1).
        layers: which layers get bias units: names (``"head"`` and names within ``backbone``), wildcards
            such as ``"backbone.layer4.*"``, and kinds: ``linear``, ``conv``, ``attention``, ``norm``,
            ``embedding``, ``recurrent``. By default all of the first three kinds; where batch
            normalization follows directly, it has the units in the place of the layer, since it would
            take a bias away again.
        m_start: ``zero`` or ``normal``, N(0, 1); by default ``normal`` if M is frozen, else ``zero``.
        w_scale: the initial standard deviation of W times the square root of H.

    State:
        in the module: M (1, H), W (H, K) and a bank of frozen biases (T, K) per layer; a task stores
        4 K bytes per layer. K is the number of outputs, channels or features; of attention, 4 times its
        width, for the projections of queries, keys, values and output.

    Raises:
        ConfigurationError: a value is out of range or unknown, or a layer does not exist.
    """

    needs_task_id = True
    needs_full_precision = True
    plain_first_task = False
    null_arguments: ClassVar[Mapping[str, Any]] = {"epsilon": 0.0}

    def __init__(
        self,
        rank: int = 100,
        epsilon: float = 0.05,
        *,
        schedule: StepSchedule = "constant",
        direction: Direction = "sign",
        layers: Sequence[str] | None = None,
        m_start: Literal["zero", "normal"] | None = None,
        w_scale: float = 1.0,
    ) -> None:
        check_positive_int("rank", rank, "The paper's networks use 25 to 900.")
        check_number(
            "epsilon", epsilon, "It is the step of M per update: 0.03 to 0.1 with direction 'sign'."
        )
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("direction", direction, DIRECTIONS)
        if m_start is not None:
            check_choice("m_start", m_start, ("zero", "normal"))
        if direction == "frozen" and m_start == "zero":
            raise ConfigurationError(
                "Expected m_start to be 'normal' when direction is 'frozen', but got 'zero'. A frozen "
                "M of 0 is a network without bias units: leave the strategy out instead."
            )
        check_above_zero("w_scale", w_scale, "M and W both at 0 never move.")
        self.rank = rank
        self.epsilon = epsilon
        self.schedule: StepSchedule = schedule
        self.direction: Direction = direction
        if layers is not None and not layers:
            raise ConfigurationError(
                "Expected layers to name at least one layer, but got none. "
                "Leave it out for the default: linear, convolutional and attention layers."
            )
        self.layers = None if layers is None else list(layers)
        self.m_start = m_start or ("normal" if direction == "frozen" else "zero")
        self.w_scale = w_scale
        self.reset()

    def reset(self) -> None:
        """Drop the references to the module's bias units, and any pending update."""
        self.units: dict[str, BiasUnits] = {}
        self._all_m: list[nn.Parameter] = []
        self._moving: list[nn.Parameter] = []  # in the current update, and their steps
        self._steps: Sequence[Tensor] = []

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Attach bias units to the selected layers."""
        names = host.network.layers_for("bias_units", self.layers)
        self.units = {name: host.network.attach_bias_units(name, self.rank) for name in names}
        for units in self.units.values():
            # Before DDP wraps the module, which would wait for the gradients of frozen parameters.
            units.requires_grad_(self.direction != "frozen")
        self._all_m = [units.M for units in self.units.values()]

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Reinitialize M and W, identically on every process and after resuming.

        W of the head is drawn by column, and 0 in those of tasks to come, so that it does not depend on
        how many there are.
        """
        for name, units in self.units.items():
            key = ("bias units", host.stream.seed, task.id, name)
            generator = seeded_generator(*key)
            if name == "head":
                w = torch.zeros(units.W.shape)
                for column in range(host.network.num_open):
                    draw = seeded_generator(*key, column)
                    w[:, column] = torch.randn(self.rank, generator=draw)
            else:
                w = torch.randn(units.W.shape, generator=generator)
            m = torch.zeros(units.M.shape)
            if self.m_start == "normal":
                m = torch.randn(units.M.shape, generator=generator)
            units.start(task.id, m, w * self.w_scale / self.rank**0.5)

    def consume_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Compute the steps of M, and remove its gradients before clipping and the optimizer."""
        scale = host.loss_scale
        moving = [m for m in self._all_m if m.grad is not None]
        gradients = [m.grad for m in moving if m.grad is not None]
        if scale != 1:  # the gradient scaler does not check these for overflow
            gradients = [
                torch.where(g.isfinite().all(), g / scale, torch.zeros_like(g)) for g in gradients
            ]
        self._moving, self._steps = moving, []
        if moving:
            self._steps = perturbation(gradients, self.direction, self._step_size(host))
        for m in moving:
            m.grad = None

    def _step_size(self, host: ContinualHost) -> float:
        if self.schedule == "constant":
            return self.epsilon
        return scheduled(self.epsilon, self.schedule, host.task_progress)

    def correct_step(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Apply the steps to M, only now because the gradient scaler may skip an update."""
        if self._steps:
            with torch.no_grad():
                torch._foreach_sub_(cast(list[Tensor], self._moving), list(self._steps))
            self._moving, self._steps = [], []

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Freeze the product; M and W are no longer needed."""
        for units in self.units.values():
            units.freeze()

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """M and W of the current task, and the banks of frozen biases."""
        live = [tensor for units in self.units.values() for tensor in (units.M, units.W)]
        return HeldTensors(training=live, inference=[u.bank for u in self.units.values()])

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """In float32 numbers: T K per layer, allocated for all tasks; training: H + H K more.

        A task adds a row of each bank; the paper counts only the task's outputs of the head.
        """
        outputs = {name: units.bank.shape[1] for name, units in self.units.items()}
        size = next(iter(self.units.values())).bank.element_size()  # 8 in double precision
        row = size * sum(outputs.values())
        banks = len(host.network.tasks) * row
        live = self.rank * (size * len(outputs) + row)
        hidden = [units for name, units in outputs.items() if name != "head"]
        own = host.network.tasks[0].num_classes if "head" in outputs else 0
        return DeclaredBytes(banks + live, banks, row, bias_unit_bytes(hidden, own))

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """The norm of each layer's current bias."""
        with torch.no_grad():
            return {f"bias_norm/{name}": u.product().norm() for name, u in self.units.items()}
