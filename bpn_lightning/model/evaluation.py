"""Accuracy over a stream: one plain function, the same before, during and after training."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.tasks import Batch, Split

__all__ = ["evaluate", "evaluate_task_agnostic", "most_confident", "validation_scores"]

Observe = Callable[[int, Tensor, Tensor], None]
"""Gets a task's number, and of each of its batches the logits and the targets."""


@torch.no_grad()
def evaluate(
    host: ContinualHost,
    tasks: Sequence[int] | None = None,
    split: Split = "test",
    observe: Observe | None = None,
) -> Tensor:
    """Accuracy on some tasks, each in its own mode: the task ID is given.

    Leaves weights, running statistics, modes and the global random state as they were.

    Args:
        host: of a module with a stream; under DDP every process calls this and gets the same.
        tasks: task ids; all of the stream by default.
        split: which part of their data.
        observe: called with the same logits, of every batch.

    Returns:
        ``(tasks,)`` float64, fractions of the samples; NaN where a task has none, or was forgotten.
    """
    network = host.network
    forgotten = network.structure.forgotten
    ids = range(len(network.tasks)) if tasks is None else tasks
    counts = torch.zeros(2, len(ids), dtype=torch.float64, device=host.device)
    with evaluation_mode(network):
        for index, task in enumerate(ids):
            if task in forgotten:
                continue
            with network.task_mode(task):
                for batch in _batches(host, task, split):
                    logits = network(batch.inputs)
                    counts[0, index] += (logits.argmax(1) == batch.targets).sum()
                    counts[1, index] += len(batch.targets)
                    if observe is not None:
                        observe(task, logits, batch.targets)
    return _accuracy(host, counts)


@torch.no_grad()
def evaluate_task_agnostic(
    host: ContinualHost,
    tasks: Sequence[int],
    split: Split = "test",
    max_samples: int | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Accuracy on some tasks where the task ID of a sample is not given.

    Every sample is answered in the mode, among these tasks' modes, whose largest softmax is the
    largest: class-incremental accuracy. Costs one forward per mode; one in all where the network has
    no modes.

    Args:
        host: of a module with a stream and one head for all tasks.
        tasks: ids of the learned tasks; no other mode competes.
        split: which part of their data.
        max_samples: samples of each task, drawn alike for every method; None: all.
        observe: called with the logits that answer, of every batch.

    Returns:
        ``(tasks,)`` float64, fractions of the samples; NaN where a task has none, or was forgotten.

    Raises:
        ConfigurationError: every task has a head of its own, so that there is no common answer.
    """
    network = host.network
    if network.mask == "task":
        raise ConfigurationError(
            "Expected one head for all tasks where no task id is given, but got the mask 'task'. "
            "Use evaluate, or train with another mask."
        )
    counts = torch.zeros(2, len(tasks), dtype=torch.float64, device=host.device)
    known = network.structure.known(tasks)
    modes = known if network.has_modes else known[-1:]
    with evaluation_mode(network):
        for index, task in enumerate(tasks):
            if task not in known:
                continue
            for batch in _batches(host, task, split, max_samples):
                logits = most_confident(network, batch.inputs, modes)
                counts[0, index] += (logits.argmax(1) == batch.targets).sum()
                counts[1, index] += len(batch.targets)
                if observe is not None:
                    observe(task, logits, batch.targets)
    return _accuracy(host, counts)


def most_confident(network: ContinualNetwork, inputs: Tensor, modes: Sequence[int]) -> Tensor:
    """Each sample's logits in the mode, among these, whose largest softmax is the largest.

    Args:
        network: with one head for all tasks.
        inputs: ``(batch, *input_shape)``, prepared.
        modes: task ids, at least one; the first of equals answers.

    Returns:
        ``(batch, num_classes)``.
    """
    with network.task_mode(modes[0]):
        logits: Tensor = network(inputs)
    confidence = logits.softmax(1).amax(1)
    for mode in modes[1:]:
        with network.task_mode(mode):
            others = network(inputs)
        surer = others.softmax(1).amax(1)
        logits = torch.where((surer > confidence)[:, None], others, logits)
        confidence = torch.maximum(surer, confidence)
    return logits


@torch.no_grad()
def validation_scores(host: ContinualHost, task: int) -> tuple[float, float]:
    """Mean loss and accuracy on a task's validation split, in its mode."""
    network = host.network
    sums = torch.zeros(3, dtype=torch.float64, device=host.device)
    with evaluation_mode(network), network.task_mode(task):
        for batch in host.batches(task, "val"):
            logits = network(batch.inputs)
            sums[0] += host.losses(logits, batch.targets, task).sum()
            sums[1] += (logits.argmax(1) == batch.targets).sum()
            sums[2] += len(batch.targets)
    loss, right, total = host.all_reduce(sums).tolist()
    return loss / total, right / total


def _batches(
    host: ContinualHost, task: int, split: Split, max_samples: int | None = None
) -> Iterable[Batch]:
    """Of a task, or none where the stream has not its data."""
    return host.batches(task, split, max_samples) if host.stream.has_data(task) else ()


def _accuracy(host: ContinualHost, counts: Tensor) -> Tensor:
    correct, total = host.all_reduce(counts).cpu().unbind()
    return correct / total
