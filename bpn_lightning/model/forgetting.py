"""Tasks that end: what is stored of one is overwritten, and what cannot be taken out is listed."""

from collections.abc import Iterator

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.host import Host, check_own_strategies
from bpn_lightning.nn.head import without_rows
from bpn_lightning.tasks import Task

__all__ = ["forget"]


def forget(host: Host, task_id: int) -> list[str]:
    """Overwrite what a module and its strategies store of a task: its mode, rows, statistics and samples.

    The columns that no other task has are -inf from then on, with every mask; task IDs and shapes are
    kept. Told the task, the logits of the others in their own columns are the same bit for bit. Files that
    were written before still hold the task; ``trainer.save_checkpoint`` and ``export_module`` write new
    ones.

    Args:
        host: of a module outside of a fit; with several processes each of them calls this.
        task_id: of a task that was learned.

    Returns:
        What cannot be taken out, one line each.

    Raises:
        ConfigurationError: the task is not learned or was forgotten before, a fit or an evaluation runs,
            or the head's weights are computed from others.
    """
    _check(host, task_id)
    network = host.network
    network.structure.forgotten = sorted([*network.structure.forgotten, task_id])
    rows = network.structure.freed_columns(task_id)
    for part in network.task_modules():
        part.forget(task_id)
    shared = network.weight_bank is None  # else each task has a head of its own, in the bank
    with torch.no_grad():
        for parameter in network.built_head.parameters(recurse=False) if shared else ():
            parameter[rows] = 0
    network.switch(network.resting_task)
    host.merged.training = without_rows(host.merged.training, rows)
    task = network.tasks[task_id]
    left = [*_left_in_network(host, task), *_clear_optimizer(host, rows)]
    for strategy in dict.fromkeys([*host.strategies, *host.gates.values()]):
        left += [f"{strategy.state_key}: {line}" for line in strategy.forget(host, task)]
    return left


def _check(host: Host, task_id: int) -> None:
    network = host.network
    if host.has_trainer and host.trainer.state.status == TrainerStatus.RUNNING:
        raise ConfigurationError(
            "Expected forget to be called outside of a run of the trainer, but one is running. Call it "
            "afterwards."
        )
    if type(task_id) is not int or not 0 <= task_id <= network.closed:
        raise ConfigurationError(
            f"Expected task to be the id of a learned task, but got {task_id!r}, and the module has learned "
            f"{network.closed + 1} tasks, from 0. Name one of them."
        )
    if task_id in network.structure.forgotten:
        raise ConfigurationError(
            f"Expected task to be one that is known, but got {task_id}, which was forgotten before. Name "
            "another task."
        )
    check_own_strategies(host.strategies, host)
    if is_parametrized(network.built_head):
        raise ConfigurationError(
            "Expected the head to have weights of its own, whose rows can be overwritten, but they are "
            "computed from others. Remove the parametrization first, by "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )


def _left_in_network(host: Host, task: Task) -> Iterator[str]:
    network = host.network
    if network.weight_bank is None and task.epochs:  # gates alone train nothing
        yield "the shared weights and running statistics, where they were trained on it"
    rows = network.structure.freed_columns(task.id)
    if rows.start == rows.stop:
        yield "the head, whose rows other tasks share"
    if task.id == 0 or len(network.structure.preparations) > 1:
        yield "the normalization of inputs, where it was measured on its training data"
    if task.id == 0 and network.front is not None:
        yield "the front, which was fitted on it"
    yield "the names of its classes, and the accuracies measured on it"


def _clear_optimizer(host: Host, rows: slice) -> Iterator[str]:
    """Overwrite what the last optimizer keeps of a task's gradients.

    An optimizer of one task is of no use after that task; one that goes on has sums over tasks.
    """
    network = host.network
    optimizers = host.trainer.optimizers if host.has_trainer else []
    if not optimizers:
        return
    goes_on = not host.has_stream or host.stream.reset_optimizer == "never"
    open_task = network.opened > network.closed
    for optimizer in optimizers:
        if not goes_on:
            if not open_task:
                optimizer.state.clear()
            continue
        for parameter in network.built_head.parameters(recurse=False):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[rows] = 0
        for part in network.task_modules() if not open_task else ():
            for parameter in part.parameters():
                optimizer.state.pop(parameter, None)
    if goes_on:
        yield "the optimizer's state, which continues from task to task"
