"""What a network that has learned answers for raw inputs: prepared as in its stream, without the stream."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.evaluation import most_confident
from bpn_lightning.model.gating import answer, find_gate, task_probabilities
from bpn_lightning.model.host import Host
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.preparation import find_preparation, prepare_raw
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.tasks import Batch

__all__ = ["check_code", "check_predictable", "predict", "predict_tasks", "raw_inputs"]


@torch.no_grad()
def predict(
    host: Host, images: Tensor, task: "int | Tensor | None" = None, gate: str | None = None
) -> Tensor:
    """Logits of raw inputs, prepared to the same bits as the stream prepares them.

    In evaluation mode and without a gradient; modes and flags stay as they were. A module that was
    loaded from a checkpoint or an export needs no stream for it, unless its stream prepares inputs by
    code of its own: then attach that stream.

    Args:
        host: of a network that has learned tasks.
        images: ``(batch, *shape)`` or one of them, as the stream holds them: uint8 from 0 to 255, or
            float32 or float64 from 0 to 1, of image streams; else floats in the data's own units, or
            integer tokens.
        task: the task ID of all, or ``(batch,)``, one of each. None: a gate names it, where the module has
            one, and the logits are those of :func:`~bpn_lightning.model.gating.answer`, as they are also with
            the task of a module whose gates learned alone. Without gates each
            sample is answered in the mode of the learned task whose largest softmax is the largest, as in
            :func:`~bpn_lightning.model.evaluation.evaluate_task_agnostic`.
        gate: the name of the one that is asked; None: the first, where no task is given.

    Returns:
        ``(batch, num_classes)``, or ``(num_classes,)`` for one input, on the network's device; -inf for the
        columns that the mask leaves out.

    Raises:
        ConfigurationError: the inputs are of another shape, type or range, there is no such task, or no
            task is given where it has to be.
    """
    network = host.network
    if host.classifier is not None and network.closed >= 0:
        if task is not None:
            network.check_task_ids(task)
        return _by_gate(host, images, gate, partial(answer, task=task))
    if gate is not None or (task is None and host.gates and network.closed >= 0):
        return _by_gate(host, images, gate, answer)
    check_predictable(host, task)
    of_task = _a_task(task)
    own, _ = find_preparation(network.structure.preparations, of_task)
    single = own.is_one(images)
    images = images[None] if single else images
    if isinstance(task, Tensor) and task.shape != (len(images),):
        raise ConfigurationError(
            f"Expected task to be one id, or one for each of the {len(images)} inputs, but got the shape "
            f"{tuple(task.shape)}. Pass an int for all of them."
        )
    images = images.to(host.device) if isinstance(images, Tensor) else images
    inputs = _prepared(host, images, of_task if task is None else task)
    if network.front is not None:
        inputs = network.front(inputs)
    with evaluation_mode(network):
        if task is not None:
            logits = cast(Tensor, network(inputs, task=task))
        else:
            logits = most_confident(network, inputs, _modes(network))
    return logits[0] if single else logits


@torch.no_grad()
def predict_tasks(host: Host, images: Tensor, gate: str | None = None) -> Tensor:
    """Probabilities of the learned tasks for raw inputs, prepared as for :func:`predict`.

    Args:
        host: of a network that has learned tasks with gates.
        images: as of :func:`predict`.
        gate: the name of the one that is asked; None: the first.

    Returns:
        ``(batch, learned tasks)``, or ``(learned tasks,)`` for one input, on the network's device.

    Raises:
        ConfigurationError: there is no such gate, no task is learned, or the inputs are of another shape,
            type or range.
    """
    return _by_gate(host, images, gate, task_probabilities)


def _by_gate(
    host: Host,
    images: Tensor,
    name: str | None,
    ask: Callable[[Host, TaskGate, Tensor], Tensor],
) -> Tensor:
    chosen = find_gate(host, name)
    network = host.network
    preparations = network.structure.common_normalization.preparations
    if len(preparations) > 1 or preparations[0].differs_by_task:
        raise ConfigurationError(
            "Expected raw inputs that all tasks prepare alike but for their normalization where a gate "
            "names the task, but every task makes its images in its own way. Call "
            "module.predict(images, task)."
        )
    check_code(host)
    single = preparations[0].is_one(images)
    images = images.to(host.device) if isinstance(images, Tensor) else images
    inputs = _prepared(host, images, 0)
    chosen.move_state(host)
    with evaluation_mode(network):
        found = ask(host, chosen, inputs if network.front is None else network.front(inputs))
    return found[0] if single else found


def check_predictable(host: Host, task: "int | Tensor | None" = None) -> None:
    """Refuse what no raw input could be answered for.

    Raises:
        ConfigurationError: the module knows no stream, has to be told the task, or cannot prepare inputs.
    """
    network = host.network
    preparations = network.structure.preparations
    find_preparation(preparations, 0)
    if task is not None:
        network.check_task_ids(task)
    differ = len(preparations) > 1 or preparations[0].differs_by_task
    if task is None and (network.mask == "task" or differ):
        why = "every task prepares its inputs in its own way"
        if network.mask == "task":
            why = "every task has a head of its own (mask 'task')"
        raise ConfigurationError(
            f"Expected task to be given where {why}, but got None. Call module.predict(images, task), with a "
            "task id or one for each image."
        )
    check_code(host)


def check_code(host: Host) -> None:
    """Refuse a stream that prepares inputs by code where the stream is not there.

    Raises:
        ConfigurationError: names the code.
    """
    preparations = host.network.structure.preparations
    code = next((one.code for one in preparations if one.steps is None), "")
    if code and not host.has_stream:
        raise ConfigurationError(
            f"Expected a stream whose preparation a file can hold, but its inputs go through {code}, which "
            "is code. Call module.attach(stream) first, or pass inputs that the stream has prepared to "
            "module(inputs, task)."
        )


def raw_inputs(batch: Any) -> Tensor:
    """The inputs of a plain DataLoader's batch: itself, or the first of a tuple or list.

    Raises:
        ConfigurationError: it is something else.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor):
        raise ConfigurationError(
            "Expected batches to be tensors of raw inputs, or tuples that begin with one, but got "
            f"{type(inputs).__name__}. Let the DataLoader collate tensors, or call module.predict(images)."
        )
    return inputs


def _a_task(task: "int | Tensor | None") -> int:
    """One whose inputs are of the shape that is asked for."""
    if isinstance(task, Tensor):
        return int(task[0]) if len(task) else 0
    return 0 if task is None else task


def _modes(network: ContinualNetwork) -> list[int]:
    """Of the learned tasks that are not forgotten; one where all answer alike."""
    known = network.structure.known(range(max(network.closed, 0) + 1))
    if not known:
        raise ConfigurationError(
            "Expected a learned task that is not forgotten, but all of them are. Learn another one first."
        )
    return known if network.has_modes else known[-1:]


def _prepared(host: Host, images: Tensor, task: "int | Tensor") -> Tensor:
    structure, front = host.network.structure, host.network.front
    common = structure.common_normalization
    preparations = structure.preparations if front is None else common.preparations
    if all(one.steps is not None for one in preparations):
        return prepare_raw(preparations, images, task)
    own, _ = find_preparation(preparations, _a_task(task))
    raw = own.batch(images)
    targets = torch.zeros(len(raw), dtype=torch.long, device=raw.device)
    inputs = host.stream.prepare(Batch(raw, targets, task, len(raw))).inputs
    return inputs if front is None else common.to_first(inputs, task)
