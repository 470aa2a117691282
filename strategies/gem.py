"""Gradient episodic memory (GEM) and averaged GEM (A-GEM)."""

import warnings
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bpn_lightning.checks import check_above_zero, check_choice, check_number, check_positive_int
from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.projection import (
    MARGIN_MODES,
    RIDGE,
    MarginMode,
    combined,
    inner_products,
    multipliers,
    violated,
)
from bpn_lightning.functional.segments import segment_gradients, segments_have_closed_forms
from bpn_lightning.host import ContinualHost
from bpn_lightning.memory import (
    EpisodicMemory,
    MemoryPer,
    check_memory_size,
    memory_bytes,
    num_processes,
    stored_dtype,
)
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy, refuse_fused
from bpn_lightning.tasks import Task

__all__ = ["AveragedGEM", "GradientEpisodicMemory"]


class GradientEpisodicMemory(ContinualStrategy):
    r"""Gradient episodic memory (GEM): no step may increase the loss on any past task's memory.

    .. math:: \min_{\tilde g} \tfrac12 |\tilde g - g|^2 \quad \text{under} \quad
        \langle \tilde g, g_k \rangle \ge 0 \quad \text{for all tasks } k \text{ before this one}

    Lopez-Paz and Ranzato (2017), https://arxiv.org/abs/1706.08840; g is the gradient of the batch, after
    any penalty, and g_k that of the mean loss over the memory of task k, in its mode. Solved in the
    dual, :func:`multipliers`, which has one unknown per task.

    Differs from the paper: its G has rows -g_k, which contradicts its own constraint; here, as in the
    authors' code, they are +g_k. The margin is a lower bound of v as in that code (``constraint``) or
    is added to it as in the paper (``additive``). The ridge, which regularizes linearly dependent
    gradients, is relative to their norms; the authors' absolute 0.001 dominates small gradients. Each
    class gets its part of the memory, sampled from the whole task at its end. Frozen head rows (those
    of other tasks with ``mask="task"``) are excluded.

    Wen et al. write GEM (n) for n images per class and a final linear classifier per task, selected by
    the given task ID: ``memory_per="class"`` with the module's ``mask="task"``.

    Args:
        memory_size: samples kept of each task, or of each class.
        memory_per: which of the two, ``task`` or ``class``.
        margin: gamma, in units of v, at least 0: how much of every memory's gradient is added if any
            constraint is violated.
        margin_mode: ``constraint`` or ``additive``.
        ridge: added to the diagonal of GG^T, as a fraction of it.
        replay_batch_size: samples of the memory per forward pass of one process; None: all.

    State:
        the samples as the stream stores them, images as uint8, and their labels: per sample the bytes
        of an input plus 8. During a projection, G: 4 bytes per parameter and past task.

    Raises:
        ConfigurationError: an argument is invalid, a memory is larger than a task, or gradients are
            clipped by value.
    """

    projects: ClassVar[bool] = True
    needs_full_precision: ClassVar[bool] = True

    def __init__(
        self,
        memory_size: int = 256,
        *,
        memory_per: MemoryPer = "task",
        margin: float = 0.5,
        margin_mode: MarginMode = "constraint",
        ridge: float = RIDGE,
        replay_batch_size: int | None = None,
    ) -> None:
        check_positive_int(
            "memory_size", memory_size, "Without a memory it is fine-tuning: leave GEM out."
        )
        if replay_batch_size is not None:
            check_positive_int("replay_batch_size", replay_batch_size, "null uses all at once.")
        check_choice("memory_per", memory_per, ("task", "class"))
        check_choice("margin_mode", margin_mode, MARGIN_MODES)
        check_number(
            "margin", margin, "0 projects onto the constraints; 0.5 is the authors' value."
        )
        check_above_zero(
            "ridge",
            ridge,
            "Without it, the solution is not unique for memories with equal gradients; "
            f"{RIDGE} is small enough.",
        )
        self.memory_size = memory_size
        self.memory_per: MemoryPer = memory_per
        self.margin = margin
        self.margin_mode: MarginMode = margin_mode
        self.ridge = ridge
        self.replay_batch_size = replay_batch_size
        self.reset()

    def reset(self) -> None:
        """Empty the memory."""
        self.memory = EpisodicMemory()
        self._violated = 0  # memories, in the last update
        self._lowest: float | None = None  # cosine of its gradient with a memory's
        self._closed_forms: dict[tuple[str, ...], bool] = {}
        self._processes = 1

    # --- checks ----------------------------------------------------------------------------------

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse runs that violate the constraints or cannot fill the memory; warn if they may."""
        trainer = host.trainer
        name = type(self).__name__
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ConfigurationError(
                f"Expected trainer.gradient_clip_algorithm to be 'norm' with {name}, but got 'value'. "
                "Clipping by value changes the direction of the projected gradient."
            )
        refuse_fused(name, host, optimizer)
        check_memory_size(host, self.memory_size, self.memory_per)
        changes = _non_sgd_rule(optimizer)
        if changes and host.global_rank == 0:
            warnings.warn(
                f"{name} projects gradients, but {changes} does not step along them, so its steps may "
                "violate the constraints. torch.optim.SGD without momentum satisfies them.",
                UserWarning,
                stacklevel=2,
            )

    # --- the memory ------------------------------------------------------------------------------

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Store samples of the task, the same in every process."""
        self.memory.store(host, task, self.memory_size, self.memory_per)

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Delete the task's samples."""
        self.memory.forget(task.id)
        return []

    def replay_indices(self, host: ContinualHost) -> tuple[Tensor, Tensor]:
        """The samples replayed in an update, and their groups.

        Returns:
            Indices into the memory, and indices of groups in ascending order, each ``(samples,)`` on the
            CPU; each group is one constraint.
        """
        sizes = torch.tensor([size for size in self.memory.sizes if size])  # of tasks not forgotten
        return torch.arange(len(self.memory)), torch.arange(len(sizes)).repeat_interleave(sizes)

    # --- an update -------------------------------------------------------------------------------

    def project_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Replace the gradient by the nearest one that satisfies all constraints."""
        moving = {name: value for name, value in parameters.items() if value.grad is not None}
        if not len(self.memory) or not moving:
            return
        gradients = [
            host.network.open_part(name, value.grad)
            for name, value in moving.items()
            if value.grad is not None
        ]
        whole = self.memory_gradients(host, moving)
        gradient = torch.cat([part.flatten() for part in gradients])
        products, gram = inner_products(gradient, whole)
        products = self._from_first_process(host, products)
        known, gram = products.cpu(), gram.cpu()
        if known.isfinite().all():  # else the gradient scaler will skip the update
            lengths = gram.diagonal().sqrt() * torch.linalg.vector_norm(gradient).cpu().double()
            cosines = known / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
            self._violated, self._lowest = int((known < 0).sum()), float(cosines.min())
        if not violated(known):
            return
        v = torch.zeros_like(products)
        if host.global_rank == 0:  # solvers may differ in the last bits between devices
            v.copy_(multipliers(known, gram, self.margin, self.margin_mode, self.ridge))
        v = self._from_first_process(host, v)
        sizes = [part.numel() for part in gradients]
        moved = torch.split(combined(gradient, whole, v), sizes)
        for part, value in zip(gradients, moved, strict=True):
            part.copy_(value.view_as(part))

    def _from_first_process(self, host: ContinualHost, value: Tensor) -> Tensor:
        return host.all_reduce(value if host.global_rank == 0 else torch.zeros_like(value))

    def memory_gradients(
        self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]
    ) -> Tensor:
        """The gradient of each group's mean loss over the memory, the same in every process.

        Computed in evaluation mode and full precision, each sample in the mode of its task; ``.grad``,
        running statistics and random states are not changed. The samples are sharded over processes.

        Returns:
            G, ``(groups, P)``: the parameters flattened, in their order; of the head its open columns.
        """
        positions, groups = self.replay_indices(host)
        totals = groups.bincount()
        own = slice(host.global_rank, None, self._processes)
        size = self.replay_batch_size or len(positions)
        total: Tensor | None = None
        with evaluation_mode(host.network), torch.autocast(host.device.type, enabled=False):
            for start in range(0, len(positions[own]), size):
                part = slice(start, start + size)
                sizes = groups[own][part].bincount(minlength=len(totals))
                there = sizes.nonzero().flatten()
                found = self._segments(host, parameters, positions[own][part], sizes[there])
                if not torch.equal(sizes, totals):  # this part has only some samples of a group
                    found *= (sizes[there].double() / totals[there]).to(found)[:, None]
                total = _added(total, found, there, len(totals))
        if total is None:  # more processes than samples
            count = sum(host.network.open_part(*item).numel() for item in parameters.items())
            total = next(iter(parameters.values())).new_zeros(len(totals), count)
        self._zero_frozen_rows(host, parameters, total)
        return host.all_reduce(total)

    def _segments(
        self,
        host: ContinualHost,
        parameters: Mapping[str, nn.Parameter],
        indices: Tensor,
        sizes: Tensor,
    ) -> Tensor:
        """The gradient of each group's mean loss over some samples, ``(groups, P)``."""
        raw = self.memory.batch(indices)
        inputs, targets = host.prepare(raw).inputs, raw.targets
        tasks = cast(Tensor, raw.task)

        def losses(logits: Tensor, part: slice) -> Tensor:
            return host.losses(logits, targets[part], tasks[part])

        network, key = host.network, tuple(parameters)
        if key not in self._closed_forms:
            self._closed_forms[key] = segments_have_closed_forms(
                network, parameters, inputs[:1], tasks=tasks[:1]
            )
        return segment_gradients(
            network,
            parameters,
            inputs,
            losses,
            sizes.tolist(),
            tasks=tasks,
            closed_forms=self._closed_forms[key],
            rows=self._open_rows(host, parameters),
        )

    @staticmethod
    def _open_rows(host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
        """Of the parameters of the head, how many rows belong to open columns."""
        heads = {n: p for n, p in parameters.items() if n.rpartition(".")[0] == "head"}
        return {name: len(host.network.open_part(name, p)) for name, p in heads.items()}

    def _zero_frozen_rows(
        self, host: ContinualHost, parameters: Mapping[str, nn.Parameter], gradients: Tensor
    ) -> None:
        """Set the gradients of frozen head rows to 0; the module restores these rows after the step."""
        if not host.trains_own_rows_only:
            return
        first, stop = host.network.tasks[host.network.opened].columns
        opened = {name: host.network.open_part(name, p) for name, p in parameters.items()}
        parts = torch.split(gradients, [value.numel() for value in opened.values()], 1)
        for (name, value), part in zip(opened.items(), parts, strict=True):
            if name.rpartition(".")[0] == "head":
                rows = part.view(len(part), len(value), -1)
                rows[:, :first] = 0
                rows[:, stop:] = 0

    # --- state and costs -------------------------------------------------------------------------

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Clear the cache of layer types, which may have changed."""
        self._closed_forms = {}

    def training_state(self) -> str:
        """The samples of past tasks."""
        return "memory"

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the logged values of the last update."""
        conflict = {"violated": self._violated, "lowest_cosine": self._lowest}
        return {**self.memory.state_dict(), **conflict}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory."""
        self.memory.load_state_dict(state_dict)
        self._violated, self._lowest = state_dict["violated"], state_dict["lowest_cosine"]

    def move_state(self, host: ContinualHost) -> None:
        """Move the memory to the host's device, and count the processes."""
        self.memory.to(host.device)
        self._processes = num_processes(host)

    def _samples(self, task: Task) -> int:
        return self.memory_size * (task.num_classes if self.memory_per == "class" else 1)

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """The memories of the learned tasks, which are not needed for inference.

        A task adds inputs as the stream stores them, and labels. The paper counts three bytes per value
        of an image, as its Table I implies: 47,040 for 20 images of 784 values.
        """
        tasks, sizes = host.network.tasks, self.memory.sizes
        samples = [self._samples(task) for task in tasks]
        dtype = self.memory.inputs.dtype
        if host.stream.has_data(0):
            dtype = stored_dtype(host, tasks[:1])
        learned = sum(one for one, size in zip(samples, sizes, strict=False) if size)
        return DeclaredBytes(
            training=memory_bytes(host, learned, self.memory.inputs.dtype),
            per_task=memory_bytes(host, samples[0], dtype),
            per_task_in_paper=samples[0] * prod(host.stream.input_shape) * 3,
        )

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """The number of constraints that the last gradient violated, and the lowest cosine.

        The cosine is between the gradient before projection and the gradient of a memory.
        """
        found = {"memories/violated": torch.tensor(float(self._violated), device=host.device)}
        if self._lowest is not None:
            found["memories/lowest_cosine"] = torch.tensor(self._lowest, device=host.device)
        return found


class AveragedGEM(GradientEpisodicMemory):
    r"""Averaged GEM (A-GEM): no step may increase the mean loss on the memory of all past tasks.

    .. math:: \tilde g = g - \frac{\langle g, m \rangle}{\langle m, m \rangle} m \quad
        \text{where } \langle g, m \rangle < 0

    Chaudhry et al. (2018), https://arxiv.org/abs/1812.00420; m is the gradient of the mean loss over
    samples drawn from the memory at every update, in their tasks' modes. It is GEM with a single
    constraint and margin 0.

    Differs from the paper: the memory is filled at a task's end, as GEM's here.

    Args:
        memory_size: samples kept of each task, or of each class.
        memory_per: which of the two, ``task`` or ``class``.
        sample_size: samples drawn for an update, without replacement; None: all.
        replay_batch_size: samples of the memory per forward pass of one process; None: all.

    State:
        GEM's, and the number of draws; during a projection, 4 bytes per parameter.

    Raises:
        ConfigurationError: as GEM's.
    """

    def __init__(
        self,
        memory_size: int = 256,
        *,
        memory_per: MemoryPer = "task",
        sample_size: int | None = 256,
        replay_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            memory_size,
            memory_per=memory_per,
            margin=0.0,
            replay_batch_size=replay_batch_size,
        )
        if sample_size is not None:
            check_positive_int("sample_size", sample_size, "null uses the whole memory.")
        self.sample_size = sample_size
        self.ridge = 0.0  # a single gradient needs no regularization

    def reset(self) -> None:
        """Empty the memory, and restart the draws."""
        super().reset()
        self.draws = 0

    def replay_indices(self, host: ContinualHost) -> tuple[Tensor, Tensor]:
        """Random samples of all tasks, as one group."""
        positions = torch.arange(len(self.memory))
        if self.sample_size is not None and self.sample_size < len(positions):
            generator = seeded_generator("memory draw", host.stream.seed, self.draws)
            drawn = torch.randperm(len(positions), generator=generator)[: self.sample_size]
            positions = drawn.sort().values
        self.draws += 1
        return positions, torch.zeros_like(positions)

    def state_dict(self) -> dict[str, Any]:
        """The memory, and the number of draws."""
        return {**super().state_dict(), "draws": self.draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory."""
        super().load_state_dict(state_dict)
        self.draws = int(state_dict["draws"])


def _added(total: Tensor | None, found: Tensor, groups: Tensor, number: int) -> Tensor:
    """Add the gradients of some groups, ``(len(groups), P)``, to those of all, ``(number, P)``."""
    if total is None and len(groups) == number:
        return found  # the usual case, without a second tensor of this size
    if total is None:
        total = found.new_zeros(number, found.shape[1])
    return total.index_add_(0, groups.to(total.device), found)


def _non_sgd_rule(optimizer: Optimizer) -> str:
    """Why steps are not multiples of the gradient, in words; empty for plain SGD."""
    name = type(optimizer).__name__
    if type(optimizer) is not SGD:
        return name
    for what in ("momentum", "weight_decay"):
        value = max(group[what] for group in optimizer.param_groups)
        if value:
            return f"{name} with {what} {value}"
    return ""
