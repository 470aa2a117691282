"""Gradient episodic memory, and its averaged form."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from bpn_lightning.costs import Bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.segments import segment_gradients, segments_have_closed_forms
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.base import ContinualStrategy, refuse_fused
from bpn_lightning.tasks import Batch, ContinualHost, Task

__all__ = ["AveragedGEM", "EpisodicMemory", "GradientEpisodicMemory", "multipliers", "project"]

MarginMode = Literal["constraint", "additive"]
MemoryPer = Literal["task", "class"]

MARGIN_MODES = ("constraint", "additive")
RIDGE = 1e-6

#: Elements of gradients that are held in float64 at a time: 2 MB, which stays in a processor's cache,
#: and on other devices 128 MB.
CHUNK, GPU_CHUNK = 2**18, 2**24


# --- the projection ------------------------------------------------------------------------------


def project(
    gradient: Tensor,
    memory_gradients: Tensor,
    margin: float = 0.5,
    margin_mode: MarginMode = "constraint",
    ridge: float = RIDGE,
) -> Tensor:
    r"""The vector nearest to a gradient that makes no memory's loss rise, to first order.

    .. math:: \tilde g = g + G^T v, \qquad v = \arg\min_{v \ge \gamma}
        \tfrac12 v^T (G G^T + R) v + (G g)^T v

    if any :math:`\langle g, g_k \rangle` is negative, else g itself; see :func:`multipliers`.

    Args:
        gradient: g, ``(parameters,)``.
        memory_gradients: G, ``(memories, parameters)``.
        margin: gamma, in units of v.
        margin_mode: see :func:`multipliers`.
        ridge: R over the squared norms of the memories' gradients.

    Returns:
        ``(parameters,)``; the very tensor that was given where nothing is violated.

    >>> project(torch.tensor([-1.0, 2.0]), torch.tensor([[1.0, 0.0]]), margin=0, ridge=0)
    tensor([0., 2.])
    """
    products, gram = inner_products(gradient, memory_gradients)
    if not violated(products):
        return gradient
    v = multipliers(products, gram, margin, margin_mode, ridge)
    return combined(gradient, memory_gradients, v.to(gradient.device))


def violated(products: Tensor) -> bool:
    """Whether a step against the gradient would raise a memory's loss.

    Args:
        products: of the gradient with every memory's, ``(memories,)``. Of gradients that are not finite
            nothing is said: a scaler is about to skip them, or training has diverged.
    """
    return bool(products.isfinite().all() and (products < 0).any())


def multipliers(
    products: Tensor,
    gram: Tensor,
    margin: float = 0.5,
    margin_mode: MarginMode = "constraint",
    ridge: float = RIDGE,
) -> Tensor:
    r"""The dual's solution v, from inner products alone.

    With D the norms of the memories' gradients, C = D^-1 G G^T D^-1 their cosines and
    C + ridge I = L L^T, the quadratic program in w = D v >= D gamma is the non-negative least squares
    problem :math:`\min_{u \ge 0} |L^T u + L^{-1} (D^{-1} G g + (C + ridge I) D \gamma)|` with
    u = w - D gamma. In these units nothing depends on how long gradients are.

    Args:
        products: G g, ``(memories,)`` float64.
        gram: G G^T, ``(memories, memories)`` float64.
        margin: gamma.
        margin_mode: ``constraint`` solves under v >= gamma; ``additive`` under v >= 0 and then adds
            gamma.
        ridge: added to the cosines' diagonal, 1; it decides where gradients are linearly dependent.

    Returns:
        v, ``(memories,)`` float64 on the CPU.
    """
    floor = margin if margin_mode == "constraint" else 0.0
    norms = gram.diagonal().sqrt().cpu().numpy()
    live = norms > 0  # a memory without gradient constrains nothing
    norms = norms[live]
    cosines = gram.cpu().numpy()[np.ix_(live, live)] / np.outer(norms, norms)
    cosines += ridge * np.eye(len(norms))
    factor = np.linalg.cholesky(cosines)
    linear = products.cpu().numpy()[live] / norms + cosines @ (floor * norms)
    target = -solve_triangular(factor, linear, lower=True)
    # The solver compares with fixed tolerances, and its problem is homogeneous.
    scale = np.abs(target).max(initial=0) or 1.0
    solution, _ = nnls(factor.T, target / scale, maxiter=100 * len(norms))
    v = np.full(len(live), floor, dtype=np.float64)
    v[live] += solution * scale / norms
    if margin_mode == "additive":
        v += margin
    return torch.from_numpy(v)


def inner_products(gradient: Tensor, memory_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Of a gradient with every memory's, and of those with each other, in float64.

    Args:
        gradient: g, ``(parameters,)``.
        memory_gradients: G, ``(memories, parameters)``.

    Returns:
        G g, ``(memories,)``, and G G^T, ``(memories, memories)``.
    """
    size = len(memory_gradients) + 1
    total = torch.zeros(size, size, dtype=torch.float64, device=gradient.device)
    for part, of_memories in _pieces(gradient, memory_gradients):
        rows = torch.cat((part[None], of_memories)).double()
        total.addmm_(rows, rows.T)
    return total[0, 1:], total[1:, 1:]


def combined(gradient: Tensor, memory_gradients: Tensor, v: Tensor) -> Tensor:
    """The sum g + G^T v, added up in float64: large multiples of gradients may cancel.

    Args:
        gradient: g, ``(parameters,)``.
        memory_gradients: G, ``(memories, parameters)``.
        v: ``(memories,)`` float64.

    Returns:
        ``(parameters,)``, of the gradient's type.
    """
    sums = [
        torch.addmv(part.double(), of_memories.double().T, v).to(gradient.dtype)
        for part, of_memories in _pieces(gradient, memory_gradients)
    ]
    return torch.cat(sums)


def _pieces(gradient: Tensor, memory_gradients: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some columns at a time: in float64 they are twice as large."""
    elements = CHUNK if gradient.device.type == "cpu" else GPU_CHUNK
    step = max(1, elements // (len(memory_gradients) + 1))
    return zip(torch.split(gradient, step), torch.split(memory_gradients, step, 1), strict=True)


# --- the memory ----------------------------------------------------------------------------------


class EpisodicMemory:
    """Samples of past tasks, as their stream stores them.

    State:
        ``inputs`` ``(samples, *input_shape)``, uint8 of images, and ``targets`` ``(samples,)`` int64,
        those of task 0 first; ``sizes``, samples of each task. Bytes of an input plus 8 for each sample.
    """

    def __init__(self) -> None:
        self.inputs = torch.empty(0, dtype=torch.uint8)
        self.targets = torch.empty(0, dtype=torch.int64)
        self.sizes: list[int] = []

    def __len__(self) -> int:
        return len(self.targets)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a task's samples, on the device that the memory lies on."""
        if self.sizes:
            inputs = torch.cat((self.inputs, inputs))
            targets = torch.cat((self.targets, targets))
        self.sizes.append(len(targets) - len(self))
        self.inputs, self.targets = inputs, targets

    def tasks(self) -> Tensor:
        """The task of each sample, ``(samples,)`` int64 on the CPU."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs."""
        return {"inputs": self.inputs, "targets": self.targets, "sizes": list(self.sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.inputs, self.targets = state["inputs"], state["targets"]
        self.sizes = list(state["sizes"])

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)


def balanced(available: Sequence[int], total: int) -> list[int]:
    """Divide a number of samples over classes as evenly as they allow.

    >>> balanced([9, 9, 2], 10)
    [4, 4, 2]
    """
    shares = [0] * len(available)
    for left, index in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        shares[index] = min(available[index], total // (len(available) - left))
        total -= shares[index]
    return shares


def choose(
    targets: Tensor, memory_size: int, memory_per: MemoryPer, key: Sequence[int | str]
) -> Tensor:
    """Draw samples of a task for its memory, each class by a generator of its own.

    Args:
        targets: ``(samples,)``, of the whole task.
        memory_size: how many to choose, altogether or of each class.
        memory_per: which of the two.
        key: what the generators are seeded with, beside the class.

    Returns:
        Positions of the chosen in ascending order.
    """
    classes = sorted(set(targets.tolist()))
    places = [(targets == one).nonzero().flatten() for one in classes]
    numbers = [memory_size] * len(classes)
    if memory_per == "task":
        numbers = balanced([len(positions) for positions in places], memory_size)
    drawn = [
        positions[torch.randperm(len(positions), generator=seeded_generator(*key, one))[:number]]
        for one, positions, number in zip(classes, places, numbers, strict=True)
    ]
    return torch.cat(drawn).sort().values


class Share(NamedTuple):
    """What this process reads of a task, and the whole task's labels.

    Attributes:
        places: for each batch of the loader, where its samples stand in the task.
        targets: ``(samples of the task,)``, over all processes.
    """

    places: list[Tensor]
    targets: Tensor


def read_share(host: ContinualHost, task_id: int) -> Share:
    """Number a task's training samples in one order, whichever process reads them.

    That is the order of the batches and, within one, of the processes, which for slices of a global
    batch is that of a single process.
    """
    own = [batch.targets.cpu() for batch in host.stream.loader(task_id, "train")]
    sizes = torch.zeros(len(own), _number_of_processes(host), dtype=torch.int64)
    sizes[:, host.global_rank] = torch.tensor([len(part) for part in own], dtype=torch.int64)
    sizes = host.all_reduce(sizes.to(host.device)).cpu()
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes)
    first = starts[:, host.global_rank].tolist()
    places = [start + torch.arange(len(part)) for start, part in zip(first, own, strict=True)]
    targets = torch.zeros(int(sizes.sum()), dtype=torch.int64)
    for place, part in zip(places, own, strict=True):
        targets[place] = part
    return Share(places, host.all_reduce(targets.to(host.device)).cpu())


def gather(host: ContinualHost, task_id: int, share: Share, chosen: Tensor) -> Tensor:
    """The raw inputs of chosen samples, on the host's device, the same in every process."""
    slots = torch.full((len(share.targets),), -1)
    slots[chosen] = torch.arange(len(chosen))
    gathered = torch.empty(0, dtype=torch.uint8)
    for place, batch in zip(share.places, host.stream.loader(task_id, "train"), strict=True):
        if not len(gathered):
            gathered = batch.inputs.new_zeros(len(chosen), *batch.inputs.shape[1:])
        mine = slots[place]
        gathered[mine[mine >= 0]] = batch.inputs[mine >= 0]
    return host.all_reduce(gathered.to(host.device))


def stored_type(host: ContinualHost, tasks: Sequence[Task]) -> torch.dtype:
    """The type that holds the inputs of some tasks as their streams store them: uint8 of images."""
    samples = (next(iter(host.stream.loader(task.id, "train", at_most=1))).inputs for task in tasks)
    return reduce(torch.promote_types, (sample.dtype for sample in samples))


# --- the methods ---------------------------------------------------------------------------------


class GradientEpisodicMemory(ContinualStrategy):
    r"""Gradient episodic memory (GEM): no step may raise the loss on what is kept of any past task.

    .. math:: \min_{\tilde g} \tfrac12 |\tilde g - g|^2 \quad \text{under} \quad
        \langle \tilde g, g_k \rangle \ge 0 \quad \text{for all tasks } k \text{ before this one}

    Lopez-Paz and Ranzato (2017), https://arxiv.org/abs/1706.08840; g is the gradient of the batch, after
    any penalty, and g_k that of the mean loss over the memory of task k, in its mode. Solved in its
    dual, :func:`multipliers`, which has one unknown per task.

    Differs from the paper: its G has rows -g_k, which contradicts its own constraint; here as in the
    authors' code they are +g_k. The margin bounds v as there (``constraint``) or is added to it as in
    the paper (``additive``). The ridge, which makes linearly dependent gradients solvable, is relative
    to their lengths; the authors' absolute 0.001 swallows short ones. Each class has its part of a
    memory, drawn over the whole task at its end. Rows of the head that are not learned now (other
    tasks' under ``mask="task"``) do not move and so take no part.

    The paper of Wen et al. writes GEM (n) for n images per class and a final linear classifier for each
    task, chosen by a task oracle: ``memory_per="class"`` beside the module's ``mask="task"``.

    Args:
        memory_size: samples kept of each task, or of each class.
        memory_per: which of the two, ``task`` or ``class``.
        margin: gamma, in units of v, from 0: how much of every memory's gradient is added where any
            is violated.
        margin_mode: ``constraint`` or ``additive``.
        ridge: added to GG^T's diagonal, as a fraction of it.
        replay_batch_size: samples of the memory in one forward of one process; None: all.

    State:
        the samples as the stream stores them, images as uint8, and their labels: bytes of an input
        plus 8 for each sample. While a gradient is projected, G: 4 bytes per parameter and past task.

    Raises:
        ConfigurationError: an argument breaks its rule, a memory is larger than a task, or gradients
            are clipped by value.
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
        _at_least_one(
            "memory_size", memory_size, "Without memories it is fine-tuning: leave it out."
        )
        if replay_batch_size is not None:
            _at_least_one("replay_batch_size", replay_batch_size, "null takes all at once.")
        for argument, choice, known in (
            ("memory_per", memory_per, ("task", "class")),
            ("margin_mode", margin_mode, MARGIN_MODES),
        ):
            if choice not in known:
                raise ConfigurationError(
                    f"Expected {argument} to be {known[0]!r} or {known[1]!r}, but got {choice!r}."
                )
        if not 0 <= margin < float("inf"):
            raise ConfigurationError(
                f"Expected margin to be 0 or a positive number, but got {margin}. "
                "0 projects onto the constraints; 0.5 is the authors' value."
            )
        if not 0 < ridge < float("inf"):
            raise ConfigurationError(
                f"Expected ridge to be a positive number, but got {ridge}. Without it, memories with "
                f"the same gradient have no unique solution; {RIDGE} is small enough."
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

    # --- what is refused -------------------------------------------------------------------------

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse what breaks the constraints again or cannot be filled; warn of what may."""
        trainer = cast(Any, host).trainer
        name = type(self).__name__
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            raise ConfigurationError(
                f"Expected trainer.gradient_clip_algorithm to be 'norm' beside {name}, but got 'value'. "
                "Clipping each value turns a gradient away from where it was projected to."
            )
        refuse_fused(name, host, optimizer)
        for task in host.tasks:
            self._check_size(host, task)
        changes = _what_turns_steps(optimizer)
        if changes and host.global_rank == 0:
            warnings.warn(
                f"{name} projects gradients, and {changes} makes other steps of them, which need not "
                "satisfy its constraints. torch.optim.SGD without momentum takes them as they are.",
                UserWarning,
                stacklevel=2,
            )

    def _check_size(self, host: ContinualHost, task: Task) -> None:
        targets = read_share(host, task.id).targets
        available, whose = len(targets), f"task {task.id}"
        if self.memory_per == "class":
            counts = {column: int((targets == column).sum()) for column in range(*task.columns)}
            rarest = min(counts, key=lambda column: counts[column])
            label = task.class_names[rarest - task.columns[0]]
            available, whose = counts[rarest], f"class {label!r} in task {task.id}"
        if self.memory_size > available:
            raise ConfigurationError(
                f"Expected memory_size to be at most the {available} training samples of {whose}, but "
                f"got {self.memory_size}. Lower it to {available} or less."
            )

    # --- the memory ------------------------------------------------------------------------------

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Keep some samples of the task, the same in every process."""
        share = read_share(host, task.id)
        key = ("memory", host.stream.seed, task.id)
        chosen = choose(share.targets, self.memory_size, self.memory_per, key)
        inputs = gather(host, task.id, share, chosen)
        self.memory.add(inputs, share.targets[chosen].to(inputs.device))

    def replayed(self, host: ContinualHost) -> tuple[Tensor, Tensor]:
        """Which samples an update looks at, and the group that each belongs to.

        Returns:
            Positions in the memory and numbers of groups from 0, ascending, ``(samples,)`` on the CPU;
            every group makes one constraint.
        """
        return torch.arange(len(self.memory)), self.memory.tasks()

    # --- an update -------------------------------------------------------------------------------

    def project_grad(self, host: ContinualHost, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move the gradient to the nearest one that no memory objects to."""
        moving = {name: value for name, value in parameters.items() if value.grad is not None}
        if not self.memory.sizes or not moving:
            return
        gradients = [value.grad for value in moving.values() if value.grad is not None]
        whole = self.memory_gradients(host, moving)
        gradient = torch.cat([part.flatten() for part in gradients])
        products, gram = inner_products(gradient, whole)
        products = self._from_first_process(host, products)
        known, gram = products.cpu(), gram.cpu()
        if known.isfinite().all():  # else a scaler is about to skip the update
            lengths = gram.diagonal().sqrt() * torch.linalg.vector_norm(gradient).cpu().double()
            cosines = known / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
            self._violated, self._lowest = int((known < 0).sum()), float(cosines.min())
        if not violated(known):
            return
        v = torch.zeros_like(products)
        if host.global_rank == 0:  # solvers need not agree to the last bit where devices differ
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

        In evaluation mode and full precision, each sample in the mode of its task; ``.grad``, running
        statistics and random states are left alone. Processes divide the samples among them.

        Returns:
            G, ``(groups, P)``: the parameters flattened, in their order.
        """
        positions, groups = self.replayed(host)
        totals = groups.bincount()
        own = slice(host.global_rank, None, self._processes)
        size = self.replay_batch_size or len(positions)
        total: Tensor | None = None
        with evaluation_mode(host.network()), torch.autocast(host.device.type, enabled=False):
            for start in range(0, len(positions[own]), size):
                part = slice(start, start + size)
                sizes = groups[own][part].bincount(minlength=len(totals))
                there = sizes.nonzero().flatten()
                found = self._segments(host, parameters, positions[own][part], sizes[there])
                if not torch.equal(sizes, totals):  # only some of a group's samples are here
                    found *= (sizes[there].double() / totals[there]).to(found)[:, None]
                total = _added(total, found, there, len(totals))
        if total is None:  # more processes than samples
            count = sum(value.numel() for value in parameters.values())
            total = next(iter(parameters.values())).new_zeros(len(totals), count)
        self._forget_resting_rows(host, parameters, total)
        return host.all_reduce(total)

    def _segments(
        self,
        host: ContinualHost,
        parameters: Mapping[str, nn.Parameter],
        places: Tensor,
        sizes: Tensor,
    ) -> Tensor:
        """The gradient of the mean loss of each group of some samples, ``(groups, P)``."""
        tasks = self.memory.tasks()[places].to(host.device)
        places = places.to(host.device)
        targets = self.memory.targets.index_select(0, places)
        raw = Batch(self.memory.inputs.index_select(0, places), targets, tasks, len(places))
        inputs = host.stream.prepare(raw).inputs

        def losses(logits: Tensor, part: slice) -> Tensor:
            return host.losses(logits, targets[part], tasks[part])

        network, key = host.network(), tuple(parameters)
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
        )

    def _forget_resting_rows(
        self, host: ContinualHost, parameters: Mapping[str, nn.Parameter], gradients: Tensor
    ) -> None:
        """Set to 0 where the module restores the head's rows after the step: they do not move."""
        if host.mask != "task" and host.phase.trains != "head":
            return
        first, stop = host.tasks[host.opened].columns
        parts = torch.split(gradients, [value.numel() for value in parameters.values()], 1)
        for (name, value), part in zip(parameters.items(), parts, strict=True):
            if name.rpartition(".")[0] == "head":
                rows = part.view(len(part), len(value), -1)
                rows[:, :first] = 0
                rows[:, stop:] = 0

    # --- state and costs -------------------------------------------------------------------------

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Look at the network's layers anew: they may have changed."""
        self._closed_forms = {}

    def state_dict(self) -> dict[str, Any]:
        """The memory, and what the next update may log."""
        conflict = {"violated": self._violated, "lowest_cosine": self._lowest}
        return {**self.memory.state_dict(), **conflict}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved memory."""
        self.memory.load_state_dict(state_dict)
        self._violated, self._lowest = state_dict["violated"], state_dict["lowest_cosine"]

    def move_state(self, host: ContinualHost) -> None:
        """Move the memory to the host's device, and see how many processes there are."""
        self.memory.to(host.device)
        self._processes = _number_of_processes(host)

    def _samples(self, task: Task) -> int:
        return self.memory_size * (task.num_classes if self.memory_per == "class" else 1)

    def bytes_per_task(self, host: Any) -> int:
        """Inputs as the stream stores them, and labels; kept for as long as further tasks are learned."""
        first = host.tasks[0]
        return self._samples(first) * (_values(host) * stored_type(host, [first]).itemsize + 8)

    def paper_bytes_per_task(self, host: Any) -> int:
        """Three bytes per value of an image, as the paper's Table I implies: 47,040 for 20 images of 784 values."""
        return self._samples(host.tasks[0]) * _values(host) * 3

    def declared_bytes(self, host: ContinualHost) -> Bytes:
        """The memories of the learned tasks, none of which is needed to answer."""
        learned = host.tasks[: len(self.memory.sizes)]
        if not learned:
            return Bytes(0, 0)
        samples = sum(self._samples(task) for task in learned)
        of_input = _values(host) * stored_type(host, learned).itemsize
        return Bytes(training=samples * (of_input + 8), inference=0)

    def logs(self, host: ContinualHost) -> dict[str, Tensor]:
        """How many memories objected to the last gradient, and the worst conflict with one.

        That is the lowest cosine between the gradient, before it was projected, and a memory's.
        """
        found = {"memories/violated": torch.tensor(float(self._violated), device=host.device)}
        if self._lowest is not None:
            found["memories/lowest_cosine"] = torch.tensor(self._lowest, device=host.device)
        return found


class AveragedGEM(GradientEpisodicMemory):
    r"""Averaged GEM (A-GEM): no step may raise the mean loss on what is kept of all past tasks.

    .. math:: \tilde g = g - \frac{\langle g, m \rangle}{\langle m, m \rangle} m \quad
        \text{where } \langle g, m \rangle < 0

    Chaudhry et al. (2018), https://arxiv.org/abs/1812.00420; m is the gradient of the mean loss over
    samples drawn from the memories at every update, in their tasks' modes. It is GEM with one
    constraint and margin 0.

    Differs from the paper: the memory is filled at a task's end, as GEM's here.

    Args:
        memory_size: samples kept of each task, or of each class.
        memory_per: which of the two, ``task`` or ``class``.
        sample_size: samples drawn for an update, without replacement; None: all.
        replay_batch_size: samples of the memory in one forward of one process; None: all.

    State:
        GEM's, and how many updates have drawn; while a gradient is projected, 4 bytes per parameter.

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
            _at_least_one("sample_size", sample_size, "null takes the whole memory.")
        self.sample_size = sample_size
        self.ridge = 0.0  # one gradient depends on no other

    def reset(self) -> None:
        """Empty the memory, and draw from the beginning."""
        super().reset()
        self.draws = 0

    def replayed(self, host: ContinualHost) -> tuple[Tensor, Tensor]:
        """Some samples of all tasks, as one group."""
        positions = torch.arange(len(self.memory))
        if self.sample_size is not None and self.sample_size < len(positions):
            generator = seeded_generator("memory draw", host.stream.seed, self.draws)
            drawn = torch.randperm(len(positions), generator=generator)[: self.sample_size]
            positions = drawn.sort().values
        self.draws += 1
        return positions, torch.zeros_like(positions)

    def state_dict(self) -> dict[str, Any]:
        """The memory, and how many updates have drawn from it."""
        return {**super().state_dict(), "draws": self.draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved memory."""
        super().load_state_dict(state_dict)
        self.draws = int(state_dict["draws"])


def _added(total: Tensor | None, found: Tensor, groups: Tensor, number: int) -> Tensor:
    """Add gradients ``(groups there, P)`` to those of all groups, ``(number, P)``."""
    if total is None and len(groups) == number:
        return found  # all at once, as usual: a tensor of this size exists once
    if total is None:
        total = found.new_zeros(number, found.shape[1])
    return total.index_add_(0, groups.to(total.device), found)


def _at_least_one(argument: str, value: int, remedy: str) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"Expected {argument} to be a whole number of at least 1, but got {value!r}. {remedy}"
        )


def _number_of_processes(host: ContinualHost) -> int:
    return int(host.all_reduce(torch.ones((), device=host.device)))


def _values(host: ContinualHost) -> int:
    """Of one image."""
    shape: tuple[int, ...] = host.stream.input_shape
    return prod(shape)


def _what_turns_steps(optimizer: Optimizer) -> str:
    """What makes a step that is no multiple of the gradient, in words; nothing for plain SGD."""
    name = type(optimizer).__name__
    if type(optimizer) is not SGD:
        return name
    for what in ("momentum", "weight_decay"):
        value = max(group[what] for group in optimizer.param_groups)
        if value:
            return f"{name} with {what} {value}"
    return ""
