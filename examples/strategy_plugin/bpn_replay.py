"""Experience replay, a strategy of its own package for bpn_lightning."""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from bpn_lightning.costs import Bytes
from bpn_lightning.datamodules.loading import ALONE, Share
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies import ContinualStrategy
from bpn_lightning.tasks import Batch, ContinualHost, ContinualStream, Task

__all__ = ["Replay"]


class Replay(ContinualStrategy):
    r"""Experience replay: some samples of every past class are trained on beside each batch.

    .. math:: \frac{1}{|B|} \sum_{i \in B} \ell_i + \frac{1}{|B|} \sum_{j \in R} \ell_j, \qquad |R| = |B|

    B is the batch, R as many samples of the memory, each answered in its own task's mode. ER of
    Chaudhry et al. (2019), https://arxiv.org/abs/1902.10486.

    Differs from the paper: the memory is drawn when a task ends and not while it is learned; replay goes
    through the memory in random order, all of it before any sample comes again.

    Several processes: each holds the whole memory, since a checkpoint has the state of only one of them,
    and answers its own share of R. What it returns is the sum over that share, and the module divides the
    sum over all processes by \|B\|: any number of them learns what one does.

    Args:
        size: samples of each class; 0 is fine-tuning.

    State:
        memory: inputs ``(samples, *input_shape)`` as the stream stores them, images as uint8, targets
        and tasks ``(samples,)`` int64: the bytes of an input plus 16 for each sample; nothing that is needed after training.

    Raises:
        ConfigurationError: size is negative, or a class has fewer training samples.
    """

    null_arguments: ClassVar[Mapping[str, Any] | None] = {"size": 0}

    def __init__(self, size: int = 10) -> None:
        if size < 0:
            raise ConfigurationError(
                f"Expected size to be 0 or a number of samples per class, but got {size}. "
                "0 is fine-tuning."
            )
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Empty the memory: a fit that begins has replayed nothing."""
        self.memory: dict[str, Tensor] = {}
        self.replayed = 0  # samples since the memory last grew, over all processes
        self.share = ALONE

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's hook, as of any callback: which part of a batch is this process's."""
        self.share = Share(trainer.global_rank, trainer.world_size)

    def on_stream_start(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Refuse before training what a later task could not give."""
        for task in stream.tasks if self.size else []:
            counts = torch.zeros(stream.num_classes, dtype=torch.int64)
            for batch in stream.loader(task.id, "train"):
                counts += batch.targets.bincount(minlength=stream.num_classes)
            fewest = int(host.all_reduce(counts.to(host.device))[slice(*task.columns)].min())
            if fewest < self.size:
                raise ConfigurationError(
                    f"Expected size to be at most {fewest}, the training samples of the smallest class "
                    f"of task {task.id}, but got {self.size}. Choose a smaller size."
                )

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Keep samples of each class, drawn by a generator of its own."""
        if not self.size:
            return
        images, targets = self._read(host, task)
        kept = []
        for column in range(*task.columns):
            places = (targets == column).nonzero().flatten()
            generator = seeded_generator("replay memory", host.stream.seed, task.id, column)
            kept.append(places[torch.randperm(len(places), generator=generator)[: self.size]])
        rows = torch.cat(kept)
        new = {"images": images[rows], "targets": targets[rows]}
        new["tasks"] = torch.full_like(new["targets"], task.id)
        new = {name: value.to(host.device) for name, value in new.items()}
        old = self.memory or {name: value[:0] for name, value in new.items()}
        self.memory = {name: torch.cat([old[name], value]) for name, value in new.items()}
        self.replayed = 0

    def _read(self, host: ContinualHost, task: Task) -> tuple[Tensor, Tensor]:
        """A task's raw images and its targets, in one order, the same in every process."""
        images: list[Tensor] = []
        targets: list[Tensor] = []
        for batch in host.stream.loader(task.id, "train"):
            for mine, whole in ((batch.inputs, images), (batch.targets, targets)):
                of_all = mine.new_zeros(batch.global_size, *mine.shape[1:], device=host.device)
                of_all[self.share.of(0, batch.global_size)] = mine.to(host.device)
                whole.append(host.all_reduce(of_all).cpu())
        return torch.cat(images), torch.cat(targets)

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The loss of this process's share of R, each sample in its task's mode."""
        if not self.memory or host.phase.trains != "network":
            return {}
        rows = self._next(host, batch.global_size)[self.share.of(0, batch.global_size)]
        images, targets, tasks = (self.memory[n][rows] for n in ("images", "targets", "tasks"))
        old = host.stream.prepare(Batch(images, targets, tasks, batch.global_size))
        answers = host.network()(old.inputs, task=tasks)
        return {"replay": host.losses(answers, targets, tasks)}

    def _next(self, host: ContinualHost, number: int) -> Tensor:
        """The next rows of an endless sequence of random orders, however it is cut into batches."""
        size, first = len(self.memory["targets"]), self.replayed
        self.replayed += number
        rounds = range(first // size, (self.replayed - 1) // size + 1)
        key = ("replay order", host.stream.seed, host.opened)
        orders = [torch.randperm(size, generator=seeded_generator(*key, one)) for one in rounds]
        return torch.cat(orders)[first % size :][:number].to(host.device)

    def declared_bytes(self, host: ContinualHost) -> Bytes:
        """The memory after the task that was opened last, by its shape and the type of what is stored."""
        classes = sum(task.num_classes for task in host.tasks[: host.opened + 1])
        sample = next(iter(host.stream.loader(0, "train", at_most=1))).inputs
        of_input = prod(host.stream.input_shape) * sample.element_size()
        return Bytes(classes * self.size * (of_input + 16), inference=0)

    def state_dict(self) -> dict[str, Any]:
        """The memory, and how far replay has come."""
        return {"memory": self.memory, "replayed": self.replayed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.memory, self.replayed = dict(state_dict["memory"]), state_dict["replayed"]

    def move_state(self, host: ContinualHost) -> None:
        """Move the memory to the host's device."""
        self.memory = {name: value.to(host.device) for name, value in self.memory.items()}
