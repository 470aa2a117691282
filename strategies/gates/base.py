"""What gates have in common: they name the task of an input, by scores that are larger where it is likelier."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Literal

from torch import Tensor

from bpn_lightning.checks import check_positive_int
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.table import GATES

__all__ = ["TaskGate", "check_gate_names"]


# A dataclass, because its constructor includes the arguments of all base classes: a gate declares only
# its own, and jsonargparse still finds every flag.
@dataclass(eq=False, repr=False, kw_only=True)
class TaskGate(ContinualStrategy):
    """Names the task of an input: an ordinary strategy, of which a run may have several.

    Args:
        modes: m: an answer without the task ID is :math:`p(task) p(class | task)` summed over the m
            likeliest tasks, each in its mode; 1 answers in the likeliest one's mode alone, and 0 by the
            class of the gate itself. A run whose strategies are gates of 0 modes trains no network.
        name: its column in results, and its name in checkpoints; by default its own in the table.

    Raises:
        ConfigurationError: modes is no whole number of at least 0, or is 0 though the gate knows tasks only.
    """

    #: What it looks at: features of an input, or the logits of every learned task's mode.
    looks_at: ClassVar[Literal["features", "logits"]] = "features"

    modes: int = 2
    name: str = None  # type: ignore[assignment]  # None until the class is known

    def __post_init__(self) -> None:
        if self.name is None:
            self.name = self._registered_name()
        if self.modes != 0:
            remedy = "1 answers in the likeliest task's mode alone, 0 by the gate's own class."
            check_positive_int("modes", self.modes, remedy)
        elif not self.names_classes:
            raise ConfigurationError(
                f"Expected modes of gate {self.name} to be at least 1, since it names tasks only, but got 0. "
                "Leave it out, or use a gate whose rows are classes, such as slda."
            )
        self.reset()

    def _registered_name(self) -> str:
        module, qualname = type(self).__module__, type(self).__qualname__
        registered = {target: key for key, target in GATES.items()}
        return registered.get(f"{module}:{qualname}", f"{module}.{qualname}")

    @property
    def state_key(self) -> str:
        """The name of this gate's state in checkpoints."""
        return f"gate {self.name}"

    @property
    def names_classes(self) -> bool:
        """Whether it names the class of an input too."""
        return False

    @property
    def arguments(self) -> dict[str, Any]:
        """Of its constructor, each of which is kept as an attribute of its name."""
        names = [name for name in signature(type(self).__init__).parameters if name != "self"]
        return {name: getattr(self, name) for name in names}

    def inference_state(self) -> dict[str, Any]:
        """What it answers by, of its ``state_dict``: files of a module hold it."""
        return self.state_dict()

    def training_state(self) -> str:
        """None, unless ``inference_state`` leaves a part of the state out."""
        whole = type(self).inference_state is TaskGate.inference_state
        return "" if whole else "statistics for later tasks"

    @abstractmethod
    def task_scores(self, seen: Tensor) -> Tensor:
        """Log-scores of the learned tasks, ``(n, tasks)``, up to a number of each sample's own.

        Args:
            seen: what ``looks_at`` says: features ``(n, d)``, or logits ``(tasks, n, classes)``.
        """

    def task_log_probabilities(self, seen: Tensor) -> Tensor:
        """Logs of the probabilities of the learned tasks, ``(n, tasks)``, which add up to 1."""
        return self.task_scores(seen).log_softmax(1)

    def tasks(self, seen: Tensor) -> Tensor:
        """The likeliest task of each sample, ``(n,)`` int64."""
        return self.task_scores(seen).argmax(1)

    def own_columns(self, seen: Tensor, task: int | None = None) -> Tensor | None:
        """The column of the class that the gate itself names for each sample, ``(n,)`` int64.

        Args:
            seen: as of :meth:`task_scores`.
            task: the ID of the samples' task, where it is given.

        Returns:
            None where it knows tasks only.
        """
        return None

    def own_logits(
        self, seen: Tensor, num_classes: int, task: "int | Tensor | None" = None
    ) -> Tensor:
        """Log-scores of classes, ``(n, num_classes)``, up to a number of each sample's own.

        Args:
            seen: as of :meth:`task_scores`.
            num_classes: columns of the head.
            task: the ID of the samples' task, or of each one's, ``(n,)``, where it is given.

        Returns:
            -inf for classes that are not known, or not of the task.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not implement own_logits, by which a gate of 0 modes answers."
        )


def check_gate_names(gates: Sequence[TaskGate]) -> None:
    """Refuse two gates of one name in a run.

    Raises:
        ConfigurationError: names it.
    """
    names = [gate.name for gate in gates]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(
                f"Expected the gates of a run to have names of their own, but got {names.count(name)} "
                f"of the name {name!r}. Give one of them another by its argument name."
            )
