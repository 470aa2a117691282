"""Loss and accuracy of each task over the batches of Lightning's validation and test loops."""

import torch
from torch import Tensor

from bpn_lightning.model.host import Host
from bpn_lightning.tasks import Batch

__all__ = ["TaskScores"]


class TaskScores:
    """Counts losses and right answers, each sample in its own task's mode.

    State: ``(3, tasks)`` float64 on the device, of this process; only while a loop runs.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(3, 0)

    def reset(self, host: Host) -> None:
        """Start counting."""
        tasks = len(host.network.tasks)
        self._counts = torch.zeros(3, tasks, dtype=torch.float64, device=host.device)

    def add(self, host: Host, batch: Batch) -> None:
        """Count a prepared batch, but for samples of forgotten tasks."""
        tasks = torch.as_tensor(batch.task, device=host.device).expand(len(batch.targets))
        inputs, targets, task = batch.inputs, batch.targets, batch.task
        if host.network.structure.forgotten:
            known = torch.tensor(host.network.structure.known(range(len(host.network.tasks))))
            kept = torch.isin(tasks, known.to(tasks))
            inputs, targets, tasks = inputs[kept], targets[kept], tasks[kept]
            task = tasks
        logits = host.network(inputs, task=task)
        losses = host.losses(logits, targets, tasks)
        right = logits.argmax(1) == targets
        values = torch.stack([losses, right, torch.ones_like(losses)]).double()
        self._counts.index_add_(1, tasks, values)

    def compute(self, host: Host) -> tuple[Tensor, Tensor]:
        """Mean losses and accuracies over all processes, ``(tasks,)`` each; NaN without samples."""
        loss, right, total = host.all_reduce(self._counts)
        return loss / total, right / total
