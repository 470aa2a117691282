"""A complete set of weights per task."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bpn_lightning.nn.growing import grown
from bpn_lightning.nn.layers import TaskModule

__all__ = ["WeightBank"]


class WeightBank(TaskModule):
    """A complete set of weights per task, of which one is loaded in the network at a time.

    Tasks that were never started use the initial weights.

    Args:
        num_tasks: number of tasks of the stream.
        network: its parameters and buffers below ``parts`` are exchanged in place.
        parts: names of its children.

    State:
        the weights of each learned task and the initial ones, as plain tensors, because DDP would
        broadcast buffers at every forward pass.
    """

    per_sample = False

    def __init__(self, num_tasks: int, network: nn.Module, parts: tuple[str, ...]) -> None:
        super().__init__(num_tasks)
        self._network = (network,)  # in a tuple, so that it is not registered as a submodule
        self.parts = parts
        self.beginning: dict[str, Tensor] = {}
        self.learned: dict[int, dict[str, Tensor]] = {}
        self.live: int | None = None
        self.inside = 0  # the task whose weights are loaded

    def begin(self) -> None:
        """Store the network's weights as the initial weights of all tasks."""
        self.beginning = self._copy()

    def start(self, task_id: int) -> None:
        """Start training a task, with the initial weights."""
        self._write(self.beginning)
        self.live = self.inside = task_id

    def freeze(self) -> None:
        """Store the weights of the task in training, and end its training."""
        if self.live is not None:
            self.learned[self.live] = self._copy()
            self.live = None

    def switch(self, task: int | Tensor) -> None:
        """Load the weights of a task into the network.

        Raises:
            TypeError: one task ID per sample is given; the network runs such batches task by task.
        """
        if isinstance(task, Tensor):
            raise TypeError("A weight bank needs one task ID for the whole batch.")
        super().switch(task)
        if task == self.inside or not self.beginning:
            return
        if self.inside == self.live:
            self.learned[self.live] = self._copy()
        self._write(self.learned.get(task, self.beginning))
        if task == self.live:
            del self.learned[task]
        self.inside = task

    def task_state(self, task_id: int) -> dict[str, Tensor]:
        """A task's weights; none of a task that was never started."""
        if task_id == self.live == self.inside:
            return self._copy()
        return self.learned.get(task_id, {})

    def forget(self, task_id: int) -> None:
        """Delete a task's weights; where they are loaded, the next :meth:`switch` loads others."""
        self.learned.pop(task_id, None)
        if self.inside == task_id:
            self.inside = -1  # those of no task

    def grow(self, num_tasks: int) -> None:
        """Make room for more tasks, and for the classes that the network has by now."""
        super().grow(num_tasks)
        larger = self._tensors()
        for weights in (self.beginning, *self.learned.values()):
            for name, value in weights.items():
                if value.shape != larger[name].shape:
                    weights[name] = grown(value, larger[name])

    def _tensors(self) -> dict[str, Tensor]:
        children = [(part, getattr(self._network[0], part)) for part in self.parts]
        return {
            f"{part}.{name}": tensor
            for part, child in children
            for name, tensor in chain(child.named_parameters(), child.named_buffers())
        }

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def _write(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(values[name])
        torch.clear_autocast_cache()  # it contains the previous weights in half precision

    def get_extra_state(self) -> dict[str, Any]:
        """All sets of weights, and the ID of the loaded one."""
        return {
            "beginning": self.beginning,
            "learned": dict(self.learned),
            "live": self.live,
            "inside": self.inside,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`get_extra_state`; the network's own weights are loaded separately."""
        for name, value in state.items():
            setattr(self, name, value)
