"""Answers without the task ID: a gate names the task, and the modes of the likeliest tasks the class."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bpn_lightning.errors import ConfigurationError, did_you_mean
from bpn_lightning.memory import num_processes
from bpn_lightning.metrics.gate_scores import GateScores, auroc, calibration
from bpn_lightning.metrics.scores import BINS
from bpn_lightning.model.host import Host
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.tasks import Split

__all__ = [
    "answer",
    "evaluate_gates",
    "evaluate_own_class",
    "find_gate",
    "mixed",
    "mode_logits",
    "task_probabilities",
]

COUNTS = ("samples", "task_accuracy", "end_to_end", "mixture", "own_class", "own_class_task_given")


# --- answers -------------------------------------------------------------------------------------


def find_gate(host: Host, name: str | None) -> TaskGate:
    """A module's gate by name, or its first.

    Raises:
        ConfigurationError: there is none, or no task is learned.
    """
    known = host.gates
    if not known or (name is not None and name not in known):
        raise ConfigurationError(
            f"Expected gate to be one of the module's gates, {', '.join(known) or 'of which it has none'}, "
            f"but got {name!r}.{did_you_mean(str(name), known)} Gates are callbacks of the trainer."
        )
    if host.network.closed < 0:
        raise ConfigurationError(
            "Expected a gate to be asked after a task was learned, but got inputs before any was. Call "
            "trainer.fit(module, stream) first."
        )
    if not host.network.structure.known(range(host.network.closed + 1)):
        raise ConfigurationError(
            "Expected a learned task that is not forgotten, but all of them are. Learn another one first."
        )
    return next(iter(known.values())) if name is None else known[name]


def task_probabilities(host: Host, gate: TaskGate, inputs: Tensor) -> Tensor:
    """Of the learned tasks, ``(batch, tasks)``, of inputs as gates see them."""
    learned = host.network.closed + 1
    seen = _looked_at(host, gate, inputs, learned)
    return _log_probabilities(host, gate, seen, learned).exp()


def answer(
    host: Host, gate: TaskGate, inputs: Tensor, task: "int | Tensor | None" = None
) -> Tensor:
    """Logits in the mode of the likeliest task, or the log of the mixture over several.

    Args:
        host: of a network that has learned tasks.
        gate: says how many modes; the logits of 0 modes are its own.
        inputs: ``(batch, *input_shape)`` as gates see them.
        task: where it is given, for a gate of 0 modes.

    Returns:
        ``(batch, num_classes)``; -inf for the columns that the mask leaves out.
    """
    learned = host.network.closed + 1
    seen = _looked_at(host, gate, inputs, learned)
    if gate.modes == 0:
        return gate.own_logits(seen, host.network.structure.num_classes, task)
    found = _log_probabilities(host, gate, seen, learned)
    first, mixture = mixed(host, inputs, found, gate.modes)
    return first if gate.modes == 1 else mixture


def mixed(
    host: Host, inputs: Tensor, log_probabilities: Tensor, modes: int
) -> tuple[Tensor, Tensor]:
    r"""What the likeliest modes say: :math:`\log \sum_{t \in \text{m likeliest}} p(t)\, p(c | t)`.

    Args:
        host: of the network.
        inputs: ``(batch, *input_shape)`` as gates see them.
        log_probabilities: of tasks, ``(batch, tasks)``.
        modes: m; all where there are fewer.

    Returns:
        Logits in the likeliest task's mode, and the formula, ``(batch, num_classes)`` each.
    """
    known = host.network.structure.known(range(log_probabilities.shape[1]))
    weights, tasks = log_probabilities.topk(min(modes, len(known)), 1)
    answers = [host.network(host.for_modes(inputs, task), task=task) for task in tasks.unbind(1)]
    joint = [
        weight[:, None] + logits.log_softmax(1)
        for weight, logits in zip(weights.unbind(1), answers, strict=True)
    ]
    return answers[0], torch.stack(joint).logsumexp(0)


def mode_logits(host: Host, inputs: Tensor, tasks: int) -> Tensor:
    """What each of the first tasks' modes says at its own columns, ``(tasks, batch, columns)``.

    Without those that were forgotten. Modes of fewer columns than others have -inf in the rest.
    """
    network, found = host.network, []
    for task in network.structure.known(range(tasks)):
        logits = network(host.for_modes(inputs, task), task=task)
        found.append(logits[:, network.active_columns(task)])
    widest = max(logits.shape[1] for logits in found)
    return torch.stack(
        [F.pad(logits, (0, widest - logits.shape[1]), value=-torch.inf) for logits in found]
    )


def _scores(host: Host, gate: TaskGate, seen: Tensor, learned: int) -> Tensor:
    """Log-scores of the learned tasks, ``(batch, tasks)``, -inf of those that were forgotten."""
    scores, structure = gate.task_scores(seen), host.network.structure
    if not structure.forgotten:
        return scores
    known = structure.known(range(learned))
    if gate.looks_at == "features":  # of its last rows' task, or of all
        scores = scores[:, known]
    whole = scores.new_full((len(scores), learned), -torch.inf)
    whole[:, known] = scores
    return whole


def _log_probabilities(host: Host, gate: TaskGate, seen: Tensor, learned: int) -> Tensor:
    if not host.network.structure.forgotten:
        return gate.task_log_probabilities(seen)
    return _scores(host, gate, seen, learned).log_softmax(1)


def _looked_at(host: Host, gate: TaskGate, inputs: Tensor, learned: int) -> Tensor:
    if gate.looks_at == "features":
        return inputs.flatten(1)
    return mode_logits(host, inputs, learned)


@torch.no_grad()
def evaluate_own_class(
    host: Host,
    gate: TaskGate,
    tasks: Sequence[int] | None = None,
    split: Split = "test",
    observe: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Accuracy of a gate's own class on some tasks, whose IDs are given.

    Args:
        host: of the gate; under DDP every process calls this and gets the same.
        gate: that names classes.
        tasks: learned ones; all of them by default.
        split: which part of their data.
        observe: called with the task, the logits where its ID is given and where it is not, and the targets of
            every batch.

    Returns:
        ``(tasks,)`` float64, fractions of the samples; NaN where a task has none.
    """
    classes = host.network.structure.num_classes
    learned = host.network.closed + 1
    ids = range(learned) if tasks is None else tasks
    counts = torch.zeros(2, len(ids), dtype=torch.float64, device=host.device)
    with evaluation_mode(host.network):
        for index, task in enumerate(ids):
            for batch in host.gate_batches(task, split):
                seen = _looked_at(host, gate, batch.inputs, learned)
                logits = gate.own_logits(seen, classes, task)
                counts[0, index] += (logits.argmax(1) == batch.targets).sum()
                counts[1, index] += len(batch.targets)
                if observe is not None:
                    observe(task, logits, gate.own_logits(seen, classes, None), batch.targets)
    right, total = host.all_reduce(counts).cpu().unbind()
    return right / total


# --- scores --------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """What is counted of a gate on this process.

    Attributes:
        counts: by :data:`COUNTS`, ``(6, tasks of the stream)`` float64.
        bins: of task probabilities: samples, sums of them, right tasks, ``(3, 15)`` float64.
        learned: largest task score of each sample of a learned task, ``(batch,)`` for each batch.
        unlearned: the same of the others.
    """

    counts: Tensor
    bins: Tensor
    learned: list[Tensor]
    unlearned: list[Tensor]


@torch.no_grad()
def evaluate_gates(host: Host, tasks: Iterable[int], learned: int, epoch: int) -> list[GateScores]:
    """Score every gate on the test samples of some tasks.

    What is answered depends on no task ID, nor on which samples share a batch but for rounding.

    Args:
        host: of a network with gates; under DDP every process calls this and gets the same.
        tasks: IDs; those that are not learned yet take part in rejection alone.
        learned: how many tasks are learned.
        epoch: epochs of the stream done by then.

    Returns:
        One record for each gate, in their order.
    """
    network, device = host.network, host.device
    number = len(network.tasks)
    sums = {
        name: _Sums(
            torch.zeros(len(COUNTS), number, dtype=torch.float64, device=device),
            torch.zeros(3, BINS, dtype=torch.float64, device=device),
            [],
            [],
        )
        for name in host.gates
    }
    with evaluation_mode(network):
        for task in filter(host.stream.has_data, network.structure.known(tasks)):
            for batch in host.gate_batches(task, "test"):
                # Made when the first gate asks, then kept for the others.
                logits = cache(partial(mode_logits, host, batch.inputs, learned))
                for name, gate in host.gates.items():
                    features = gate.looks_at == "features"
                    seen = batch.inputs.flatten(1) if features else logits()
                    given = task if task < learned else None
                    scores = _scores(host, gate, seen, learned)
                    _add(host, gate, sums[name], (batch.inputs, seen, scores), batch.targets, given)
    return [_record(host, gate, sums[name], learned, epoch) for name, gate in host.gates.items()]


def _add(
    host: Host,
    gate: TaskGate,
    sums: _Sums,
    inputs_seen_scores: tuple[Tensor, Tensor, Tensor],
    targets: Tensor,
    task: int | None,
) -> None:
    """Count a batch of a learned task; of another one, None, its scores only."""
    inputs, seen, scores = inputs_seen_scores
    (sums.unlearned if task is None else sums.learned).append(scores.amax(1).double())
    if task is None:
        return
    log_probabilities = scores.log_softmax(1)
    right = log_probabilities.argmax(1) == task
    of_modes = [torch.zeros_like(targets)] * 2
    if gate.modes:
        both = mixed(host, inputs, log_probabilities, gate.modes)
        of_modes = [logits.argmax(1) == targets for logits in both]
    answers = [
        torch.ones_like(targets),
        right,
        *of_modes,
        *(
            torch.zeros_like(targets) if own is None else own == targets
            for own in (gate.own_columns(seen), gate.own_columns(seen, task))
        ),
    ]
    sums.counts[:, task] += torch.stack([one.sum() for one in answers]).double()
    confidence = log_probabilities.amax(1).double().exp()
    places = (confidence * BINS).long().clamp(max=BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, right.double()])
    sums.bins.index_add_(1, places, values)


def _record(host: Host, gate: TaskGate, sums: _Sums, learned: int, epoch: int) -> GateScores:
    counts = host.all_reduce(sums.counts).cpu()
    samples = [int(n) if n else None for n in counts[0]]
    shares: dict[str, list[float | None]] = {
        name: [float(right / n) if n else None for right, n in zip(row, counts[0], strict=True)]
        for name, row in zip(COUNTS, counts, strict=True)
    }
    if gate.modes == 0:
        shares |= {name: [None] * len(samples) for name in ("end_to_end", "mixture")}
    declared = gate.declared_bytes(host)
    return GateScores(
        after=learned,
        epoch=epoch,
        gate=gate.name,
        modes=gate.modes,
        samples=samples,
        task_accuracy=shares["task_accuracy"],
        end_to_end=shares["end_to_end"],
        mixture=shares["mixture"],
        own_class=shares["own_class"] if gate.names_classes else None,
        own_class_task_given=shares["own_class_task_given"] if gate.names_classes else None,
        calibration=calibration(host.all_reduce(sums.bins)),
        rejection=auroc(_gathered(host, sums.learned), _gathered(host, sums.unlearned)),
        bytes_held=declared.inference,
        bytes_per_task=declared.per_task,
    )


def _gathered(host: Host, own: list[Tensor]) -> Tensor:
    """All processes' numbers, on each of them."""
    values = torch.cat([torch.zeros(0, dtype=torch.float64, device=host.device), *own])
    sizes = torch.zeros(num_processes(host), dtype=torch.int64, device=host.device)
    sizes[host.global_rank] = len(values)
    sizes = host.all_reduce(sizes)
    start = int(sizes[: host.global_rank].sum())
    whole = torch.zeros(int(sizes.sum()), dtype=torch.float64, device=host.device)
    whole[start : start + len(values)] = values
    return host.all_reduce(whole)
