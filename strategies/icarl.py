"""iCaRL: incremental classifier and representation learning."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.functional.replay import Chosen, herding
from bpn_lightning.host import ContinualHost
from bpn_lightning.memory import TaskSlice, read_slice
from bpn_lightning.nn.head import without_rows
from bpn_lightning.nn.layers import evaluation_mode, full_precision
from bpn_lightning.strategies.replay import ReplayStrategy, check_exemplars
from bpn_lightning.tasks import Batch, Task
from bpn_lightning.teacher import Teacher

__all__ = ["ICaRL"]

FORWARD = 256
"""Exemplars of a forward pass that takes their features."""


class ICaRL(ReplayStrategy):
    r"""iCaRL: features from labels and distillation, answers by the nearest mean of exemplars.

    .. math:: -\sum_{(x, y) \in D} \Big[ \sum_{c \text{ new}} \delta_{y=c} \log g_c(x)
        + \delta_{y \ne c} \log (1 - g_c(x))
        + \sum_{c \text{ old}} q_c(x) \log g_c(x) + (1 - q_c(x)) \log (1 - g_c(x)) \Big]

    Algorithm 3 of Rebuffi et al. (2017), https://arxiv.org/abs/1611.07725: g are sigmoids of the logits and
    q those of the network before the task; D are the task's samples and all exemplars, each once in an
    epoch. At a task's end each class gets k exemplars, the memory divided by the number of classes, by
    herding (Algorithm 4); old classes keep their first k (Algorithm 5).

    An input is answered with the class whose mean of exemplars is nearest (Algorithm 1), among those
    that the mask lets compete: with ``mask="task"`` among its task's. Features and means are normalized,
    so that the nearest mean is the largest product with it: from a task's end until the next one starts,
    the rows of the head are the means. Exports, too, are such networks.

    Differs from the paper: a batch's sum is divided by its number of new samples, so that exemplars add
    to the loss instead of sharing in its mean; exemplars have a forward pass of their own; the
    optimizer is the module's, and features are of images without their mirror images, as in the paper
    but not in the authors' code. Running means of herding are not normalized, as in that code, and no
    sample is an exemplar twice. Only outputs that the mask lets compete for a sample have a loss. Where
    tasks share their classes none are old, and nothing is distilled.

    Args:
        memory_size: K, exemplars of all classes together, at least one of each class of each task.

    State:
        the exemplars as the stream stores them, images as uint8, and their labels: per sample the bytes
        of an input plus 8; from the second task on the network before the task, 4 bytes per number;
        between tasks the head's weights of training. Inference needs only the network.

    Raises:
        ConfigurationError: memory_size is too small.
    """

    exclusive: ClassVar[bool] = True
    plain_first_task: ClassVar[bool] = False
    needs_trainable_core: ClassVar[bool] = True
    weights_in_state: ClassVar[Collection[str]] = ("teacher",)

    def __init__(self, memory_size: int = 200) -> None:
        super().__init__(memory_size)

    def reset(self) -> None:
        """Start without exemplars and without a teacher."""
        super().reset()
        self.teacher = Teacher()
        self.task_samples = 0  # training samples of the open task
        self._drawn: Tensor | None = None  # exemplars next to the batch that is being learned

    def check(self, host: ContinualHost, optimizer: Optimizer) -> None:
        """Refuse a memory without room for each class."""
        check_exemplars(host, self.memory_size)

    # --- an update -------------------------------------------------------------------------------

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Take a snapshot of the network as the teacher."""
        if task.id > 0:
            self.teacher.snapshot(host)
            self.task_samples = len(read_slice(host, task.id).targets)
        self.draws = 0

    def training_batch(self, host: ContinualHost, batch: Batch) -> Batch:
        """The batch as it is; the exemplars next to it are drawn, in an epoch each of them once."""
        self._drawn = None
        if len(self.memory):
            size, samples = len(self.memory), self.task_samples
            first = self.draws * size // samples
            self.draws += batch.global_size
            drawn = self.order(host, first, self.draws * size // samples - first, "exemplars")
            self._drawn = drawn[self.own_part(batch, drawn)]
        return batch

    def task_losses(self, host: ContinualHost, batch: Batch, logits: Tensor) -> Tensor:
        """Of the task's samples, ``(batch,)``."""
        return self.losses(host, batch, logits)

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The same loss of exemplars."""
        if self._drawn is None or host.phase.trains != "network":
            return {}
        old = self.samples(host, self._drawn)
        found = cast(Tensor, host.network(old.inputs, task=old.task))
        return {"exemplars": self.losses(host, old, found)}

    def losses(self, host: ContinualHost, batch: Batch, logits: Tensor) -> Tensor:
        """Binary cross-entropies to labels of new classes and to the teacher's outputs of old ones.

        Args:
            host: the module.
            batch: prepared samples.
            logits: of the network for them, ``(batch, num_classes)``.

        Returns:
            ``(batch,)``, summed over the classes that compete and are known.
        """
        # Of the open columns: a sum over more has other last bits, although they are 0.
        logits = full_precision(logits[:, : host.network.num_open])
        tasks = torch.as_tensor(batch.task, device=logits.device).expand(len(logits))
        competes = _competing(host).to(logits.device)[tasks]
        targets = F.one_hot(batch.targets, logits.shape[1]).to(logits.dtype)
        old = _old_columns(host)
        if self.teacher and old:
            before = self.teacher.forward(host, batch.inputs).logits
            targets[:, old] = before[:, old].sigmoid().to(targets.dtype)
        losses = F.binary_cross_entropy_with_logits(
            logits.masked_fill(~competes, 0), targets, reduction="none"
        )
        return losses.masked_fill(~competes, 0).sum(1)

    # --- exemplars and their means ---------------------------------------------------------------

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Choose the exemplars of the task's classes, and reduce those of old ones."""
        self.refill(host, task)

    def choose(self, host: ContinualHost, task: Task, own: TaskSlice) -> Chosen:
        """The first k exemplars of each old class, and k of each new one by herding."""
        known = host.network.structure.known(range(task.id + 1))
        number = self.memory_size // sum(host.network.tasks[one].num_classes for one in known)
        tasks, targets = self.memory.tasks(), self.memory.targets.cpu()
        kept = [
            ((tasks == one) & (targets == column)).nonzero().flatten()[:number]
            for one in known[:-1]
            for column in range(*host.network.tasks[one].columns)
        ]
        features, drawn = self._task_features(host, task, own), []
        for column in range(*task.columns):
            members = (own.targets == column).nonzero().flatten()
            first = herding(features[members.to(features.device)], min(number, len(members)))
            drawn.append(members[first])
        none = torch.empty(0, dtype=torch.int64)
        return Chosen(torch.cat([none, *kept]), torch.cat([none, *drawn]))

    @torch.no_grad()
    def _task_features(self, host: ContinualHost, task: Task, own: TaskSlice) -> Tensor:
        """Normalized features of all of a task's samples, the same in every process."""
        head = host.network.built_head
        found = full_precision(head.weight.new_zeros(len(own.targets), head.in_features))
        with evaluation_mode(host.network):
            batches = host.batches(task.id, "train")
            for indices, batch in zip(own.indices, batches, strict=True):
                found[indices.to(found.device)] = _features(host, batch.inputs)
        return host.all_reduce(found)

    @torch.no_grad()
    def means(self, host: ContinualHost) -> tuple[Tensor, list[int]]:
        """The normalized mean of each class's exemplars by the current network.

        Returns:
            ``(classes, features)``, and the column of each class.
        """
        rows = torch.arange(len(self.memory))
        with evaluation_mode(host.network):
            found = [
                _features(host, self.samples(host, part).inputs)
                for part in torch.split(rows, FORWARD)
            ]
        features, targets = torch.cat(found), self.memory.targets
        columns = sorted(set(targets.tolist()))
        means = torch.stack([features[targets == column].mean(0) for column in columns])
        return F.normalize(means, dim=1), columns

    def merged_weights(self, host: ContinualHost) -> Mapping[str, Tensor] | None:
        """A head whose rows are the means of exemplars; classes that are not known have no chance."""
        if not len(self.memory):
            return None
        means, columns = self.means(host)
        head = host.network.built_head
        weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
        if host.network.mask != "task":  # else those to come compete with nobody
            weight.zero_()
            bias.fill_(torch.finfo(bias.dtype).min)
        weight[columns], bias[columns] = means.to(weight), 0
        return {"head.weight": weight, "head.bias": bias}

    # --- state and costs -------------------------------------------------------------------------

    def forget(self, host: ContinualHost, task: Task) -> list[str]:
        """Delete the task's exemplars, and its rows of the teacher's head; the rest is shared."""
        super().forget(host, task)
        rows = host.network.structure.freed_columns(task.id)
        self.teacher.tensors = without_rows(self.teacher.tensors, rows)
        return ["the teacher, a copy of the shared weights"] if self.teacher else []

    def training_state(self) -> str:
        """The exemplars."""
        return "memory"

    def state_dict(self) -> dict[str, Any]:
        """The exemplars, the teacher, and the size of the open task."""
        return {
            **super().state_dict(),
            "teacher": self.teacher.tensors,
            "task_samples": self.task_samples,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the exemplars and the teacher."""
        super().load_state_dict(state_dict)
        self.teacher.tensors = dict(state_dict["teacher"])
        self.task_samples = int(state_dict["task_samples"])
        self._drawn = None

    def move_state(self, host: ContinualHost) -> None:
        """Move exemplars and teacher to the host's device."""
        super().move_state(host)
        self.teacher.to(host.device)

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The exemplars, the teacher, and the head's weights of training that the module keeps."""
        return HeldTensors([*super().held_tensors(host).training, *host.training_weights.values()])

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """The exemplars; from the second task on the teacher; between tasks the head."""
        declared = super().declared_bytes(host)
        teacher = Teacher.state(host).values() if host.network.opened > 0 else ()
        copied = tensor_bytes(teacher) + tensor_bytes(host.training_weights.values())
        return declared._replace(training=declared.training + copied)


def _features(host: ContinualHost, inputs: Tensor) -> Tensor:
    """Normalized features ``(batch, features)`` of prepared inputs."""
    if inputs.is_floating_point():
        inputs = inputs.to(host.network.built_head.weight.dtype)
    features = cast(Tensor, host.network.backbone(inputs))
    return F.normalize(full_precision(features), dim=1)


def _old_columns(host: ContinualHost) -> list[int]:
    """The output units of earlier tasks that the open one does not have."""
    network = host.network
    known = network.structure.known(range(network.opened))
    old = {column for task in known for column in range(*network.tasks[task].columns)}
    return sorted(old.difference(range(*network.tasks[network.opened].columns)))


def _competing(host: ContinualHost) -> Tensor:
    """Which open output units have a loss for samples of each task, ``(tasks, open columns)`` bool.

    Those that the mask lets take part, of the tasks opened so far that are not forgotten.
    """
    network = host.network
    opened = network.structure.known(range(network.opened + 1))
    seen = {column for task in opened for column in range(*network.tasks[task].columns)}
    table = torch.zeros(len(network.tasks), network.num_open, dtype=torch.bool)
    for task in opened:
        table[task, sorted(seen.intersection(range(*network.columns(task))))] = True
    return table
