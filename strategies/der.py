"""Dark experience replay, with its labels (DER++) and without (DER)."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from bpn_lightning.checks import check_number
from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.er import ExperienceReplay
from bpn_lightning.tasks import Batch, Task

__all__ = ["DarkExperienceReplay"]

FORWARD = 256
"""Samples of a forward pass that takes the logits to store."""


class DarkExperienceReplay(ExperienceReplay):
    r"""Dark experience replay (DER, DER++): replays the logits that samples had, and their labels.

    .. math:: \frac{1}{|B|} \sum_{i \in B} \ell(x_i, y_i)
        + \frac{\alpha}{|R|} \sum_{j \in R} \frac{|z_j - h(x_j)|^2}{C_j}
        + \frac{\beta}{|R'|} \sum_{j \in R'} \ell(x_j, y_j)

    DER++ of Buzzega et al. (2020), https://arxiv.org/abs/2004.07211; beta 0 is their DER. R and R' are
    independent draws of as many samples as B has, from a reservoir as in :class:`ExperienceReplay`.

    z_j are the C_j logits that took part when the sample was stored: with the masks ``all`` and ``shared``
    those of every class, with ``seen`` of the classes seen until then, with ``task`` of its own task. Only
    these are compared, however many the head has by now, and without those of forgotten tasks.

    Differs from the paper: logits are those of the network at the end of a sample's task, in evaluation
    mode, and not of the update that met it. The squares are divided by C, as in the authors' code, for
    which their alphas are. Memory and draws are those of :class:`ExperienceReplay` here.

    Args:
        memory_size: samples of all tasks together.
        alpha: weight of the logits, dimensionless.
        beta: weight of the labels, dimensionless; with alpha 0 and beta 0 it is fine-tuning.

    State:
        as of :class:`ExperienceReplay`, and the logits: 4 bytes for each that took part.

    Raises:
        ConfigurationError: memory_size is no whole number of at least 0, or alpha or beta is negative.
    """

    null_arguments: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "beta": 0.0}

    def __init__(self, memory_size: int = 200, *, alpha: float = 0.5, beta: float = 0.5) -> None:
        check_number("alpha", alpha, "It is the weight of the logits; 0 replays labels alone.")
        check_number("beta", beta, "It is the weight of the labels; 0 is DER, without them.")
        self.alpha = alpha
        self.beta = beta
        super().__init__(memory_size)

    def reset(self) -> None:
        """Empty the memory."""
        super().reset()
        self.logits: list[Tensor] = []  # of each task, (samples, columns that took part)
        self._drawn: tuple[Tensor, Tensor] | None = None  # for the batch that is being learned

    # --- an update -------------------------------------------------------------------------------

    def training_batch(self, host: ContinualHost, batch: Batch) -> Batch:
        """The batch as it is; the samples that are replayed next to it are drawn."""
        self._drawn = None
        if len(self.memory) and (self.alpha or self.beta):
            first, number = self.draws, batch.global_size
            whole = [self.order(host, first, number, what) for what in ("logits", "labels")]
            logits, labels = (drawn[self.own_part(batch, drawn)] for drawn in whole)
            self._drawn = logits, labels
            self.draws += number
        return batch

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """Both replays, weighted."""
        if self._drawn is None or host.phase.trains != "network":
            return {}
        terms = {}
        for_logits, for_labels = self._drawn
        if self.alpha:
            terms["der_logits"] = self.alpha * self.logit_errors(host, for_logits)
        if self.beta:
            old = self.samples(host, for_labels)
            found = host.network(old.inputs, task=old.task)
            terms["der_labels"] = self.beta * host.losses(found, old.targets, old.task)
        return terms

    def logit_errors(self, host: ContinualHost, indices: Tensor) -> Tensor:
        """The mean squared error of samples' logits to those that are stored, ``(samples,)``."""
        old = self.samples(host, indices)
        found = cast(Tensor, host.network(old.inputs, task=old.task))
        errors = found.new_zeros(len(indices), dtype=self._dtype(host))
        tasks = cast(Tensor, old.task)
        starts = self._starts()
        for task in sorted(set(tasks.tolist())):
            of_task = (tasks == task).nonzero().flatten()
            stored = self.logits[task][indices[of_task.cpu()].to(found.device) - starts[task]]
            first = host.network.columns(task)[0]
            now = found[of_task, first : first + stored.shape[1]].to(stored.dtype)
            compared = ~stored.isnan()  # nothing is known of classes that were forgotten
            squares = mse_loss(
                now.masked_fill(~compared, 0), stored.nan_to_num(0), reduction="none"
            )
            errors = errors.index_add(0, of_task, squares.sum(1) / compared.sum(1).clamp(min=1))
        return errors

    # --- the logits ------------------------------------------------------------------------------

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Let the reservoir see the task, and store the logits of the samples that it takes."""
        if not self.memory_size:
            return
        starts = self._starts()
        chosen = self.refill(host, task)
        kept = torch.split(chosen.kept, self.memory.sizes[:-1])
        old = [
            logits[(indices - start).to(logits.device)]
            for logits, indices, start in zip(self.logits, kept, starts, strict=False)
        ]
        self.logits = [*old, self._current_logits(host, task)]

    @torch.no_grad()
    def _current_logits(self, host: ContinualHost, task: Task) -> Tensor:
        """Of the task's samples in the memory, ``(samples, columns that take part)``."""
        first, stop = host.network.columns(task.id)
        rows = torch.arange(len(self.memory))[len(self.memory) - self.memory.sizes[-1] :]
        found = [torch.zeros(0, stop - first, device=host.device, dtype=self._dtype(host))]
        with evaluation_mode(host.network):
            for part in torch.split(rows, FORWARD):
                inputs = self.samples(host, part).inputs
                found.append(host.network(inputs, task=task.id)[:, first:stop].to(found[0]))
        logits = torch.cat(found)
        if host.global_rank:  # devices may round differently: the first process's are everybody's
            logits.zero_()
        logits = host.all_reduce(logits)
        return logits.masked_fill(logits.isinf(), torch.nan)  # of classes that are forgotten

    def _starts(self) -> list[int]:
        """The index in the memory of each task's first sample, and the number of samples."""
        return [0, *torch.tensor(self.memory.sizes, dtype=torch.int64).cumsum(0).tolist()]

    @staticmethod
    def _dtype(host: ContinualHost) -> torch.dtype:
        return host.network.built_head.weight.dtype

    # --- state and costs -------------------------------------------------------------------------

    def forget(self, host: ContinualHost, task: Task) -> list[str]:
        """Delete the task's samples with their logits, and its classes' logits of other samples."""
        super().forget(host, task)
        gone, logits = host.network.structure.freed_columns(task.id), []
        for other, stored in enumerate(self.logits):
            first = host.network.columns(other)[0]
            columns = slice(max(0, gone.start - first), max(0, gone.stop - first))
            kept = stored[:0].clone() if other == task.id else stored.clone()
            kept[:, columns] = torch.nan
            logits.append(kept)
        self.logits = logits
        return []

    def state_dict(self) -> dict[str, Any]:
        """The memory with its logits."""
        return {**super().state_dict(), "logits": list(self.logits)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory with its logits."""
        super().load_state_dict(state_dict)
        self.logits = list(state_dict["logits"])
        self._drawn = None

    def move_state(self, host: ContinualHost) -> None:
        """Move the memory and its logits to the host's device."""
        super().move_state(host)
        self.logits = [logits.to(host.device) for logits in self.logits]

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Of each sample its input, its label and the logits that took part; per task as the memory."""
        declared = super().declared_bytes(host)
        widths = [logits.shape[1] for logits in self.logits]
        numbers = sum(n * width for n, width in zip(self.memory.sizes, widths, strict=True))
        size, tasks = self._dtype(host).itemsize, len(host.network.tasks)
        whole = self.memory_size * max(widths, default=0) * size
        return declared._replace(
            training=declared.training + numbers * size,
            per_task=declared.per_task + whole // tasks,
        )
