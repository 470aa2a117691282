"""A frozen core: tasks that train their modes and their rows of the head, and nothing that tasks share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bpn_lightning.checks import check_choice
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Task

__all__ = ["FrozenCore", "Overtaken", "Trains"]

Trains = Literal["all", "modes", "head"]
"""What a task trains: everything, its mode and its own rows of the head, or these rows alone."""

CHOICES: tuple[Trains, ...] = ("all", "modes", "head")


class FrozenCore:
    """Freezes what tasks share: the backbone with its running statistics, and a head that all tasks share.

    A frozen parameter has ``requires_grad=False``, so it is in no optimizer and no importance. Parts of
    the backbone with buffers of their own, such as batch normalization, are in evaluation mode.

    Args:
        network: whose parameters they are.
        train: what tasks train.
        train_first: what the stream's first task trains; None: the same.

    Attributes:
        frozen: whether they are frozen now.
        frozen_in_open_task: whether the open task, whose optimizer is the current one, began so.

    Raises:
        ConfigurationError: a choice is unknown, or only the first task would train modes alone.
    """

    def __init__(
        self, network: ContinualNetwork, train: Trains, train_first: Trains | None
    ) -> None:
        check_choice("train", train, CHOICES)
        check_choice("train_first", train_first, (None, *CHOICES))
        if train_first not in (None, "all", train):
            raise ConfigurationError(
                f"Expected train_first to be 'all' where train is {train!r}, but got {train_first!r}. Set "
                f"train to {train_first!r}, or leave train_first out."
            )
        self.network = network
        self.train = train
        self.train_first = train if train_first is None else train_first
        self.frozen = self.frozen_in_open_task = False
        self._parameters: list[nn.Parameter] = []  # frozen here, and not by the user

    @property
    def may_be_overtaken(self) -> bool:
        """Whether answers with an old class change only where a newer class gets a larger logit."""
        return self.frozen and self.network.mask in ("all", "seen")

    def freezes(self, task: int) -> bool:
        """Whether a task leaves what tasks share as it is."""
        return (self.train_first if task == 0 else self.train) != "all"

    def begin_task(self, task: int) -> bool:
        """Freeze what a task that opens leaves as it is; whether that changed anything."""
        changed = self.set_frozen(self.freezes(task))
        self.frozen_in_open_task = self.frozen
        return changed

    def set_frozen(self, frozen: bool) -> bool:
        """Freeze what tasks share, or let it train again; whether that changed anything."""
        if frozen == self.frozen:
            return False
        if frozen:
            shared = self.network.shared_parameters(include_head=self.network.mask == "shared")
            self._parameters = list(shared.values())
        for parameter in self._parameters:
            parameter.requires_grad_(not frozen)
            parameter.grad = None
        self.frozen = frozen
        return True

    def keep_frozen(self) -> None:
        """Freeze what tasks share for good: its weights are sharded next, and other objects take their place."""
        self.set_frozen(True)
        self._parameters = []

    def set_flags(self, training: bool) -> None:
        """Set the training flags of frozen parts that have buffers, such as running statistics."""
        for part in self._parts_with_buffers() if self.frozen else ():
            part.training = training

    def _parts_with_buffers(self) -> Iterator[nn.Module]:
        for part in self.network.backbone.modules():
            if not isinstance(part, TaskModule) and any(True for _ in part.buffers(recurse=False)):
                yield part

    def check(self, strategies: Sequence[ContinualStrategy]) -> None:
        """Refuse strategies that act on frozen weights only, and tasks that would train nothing.

        Raises:
            ConfigurationError: names the strategy, or says what is missing.
        """
        if self.train == "all":
            return
        network = self.network
        for strategy in strategies:
            mixes = any(list(strategy.training_tasks(t)) != [t.id] for t in network.tasks)
            if strategy.needs_trainable_core or mixes:
                why = "trains on other tasks' data" if mixes else "works on the shared weights"
                raise ConfigurationError(
                    f"Expected train to be 'all' with {type(strategy).__name__}, which {why}, but got "
                    f"{self.train!r}, which freezes all but a task's {self._trained}. Set train to 'all', or "
                    "leave the strategy out."
                )
        own = [p for part in network.task_modules() for p in part.parameters() if p.requires_grad]
        if self.train == "head" and own:
            raise ConfigurationError(
                "Expected train to be 'modes' with strategies that train a mode, but got 'head', which trains "
                "a task's rows of the head alone. Set train to 'modes', or leave these strategies out."
            )
        if network.mask == "shared" and not own:
            raise ConfigurationError(
                f"Expected something to train where train is {self.train!r} and all tasks share the head, but "
                "the network has no modes. Set train to 'modes' and add a strategy with modes (bitfit, ia3, lora, "
                "bd), or set train to 'all'."
            )

    @property
    def _trained(self) -> str:
        mode = "" if self.train == "head" else "mode and its "
        return f"{mode}own rows of the head"


class Overtaken:
    """Counts the samples of a task that are answered with a class of a later task.

    With one head for all tasks, the logits of old classes do not change where the core is frozen, but
    those of newer ones may be larger.

    Args:
        tasks: of the stream.
        device: of the logits.

    State: ``(2, tasks)`` float64, samples answered so and all, of this process.
    """

    def __init__(self, tasks: Sequence[Task], device: torch.device) -> None:
        self.tasks = tasks
        self._counts = torch.zeros(2, len(tasks), dtype=torch.float64, device=device)

    def update(self, task: int, logits: Tensor, targets: Tensor) -> None:
        """Count a batch of a task's samples, of logits ``(batch, num_classes)``."""
        later = logits.argmax(1) >= self.tasks[task].columns[1]
        self._counts[0, task] += later.sum()
        self._counts[1, task] += len(targets)

    def compute(self, all_reduce: Callable[[Tensor], Tensor]) -> list[float | None]:
        """Fractions of the samples of each task; None where none was tested."""
        later, total = all_reduce(self._counts).tolist()
        return [n / of if of else None for n, of in zip(later, total, strict=True)]
