"""Where in a stream a module is, and what it has finished there."""

from collections.abc import Mapping
from typing import Any

from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.tasks import Phase, Position, Schedule

__all__ = ["Cursor"]


class Cursor:
    """Phase and epoch of a network that learns, and what closing its open task has finished.

    Args:
        network: knows itself which task it has opened and which it has closed, as it answers by that.

    Attributes:
        schedule: of the epochs of the stream.
        phase: the phase of the open task that runs.
        consolidated: keys of the strategies that have consolidated the open task.
        checked_epochs: epochs whose end has been handled: early stopping, schedulers, curve.
        updates: updates of the open task that trained the whole network; none that a scaler skipped.
        updates_per_epoch: of each task, as the fit that runs has counted; not state.

    State: of the above and of the network's two, plain values.
    """

    def __init__(self, network: ContinualNetwork) -> None:
        self.network = network
        self.consolidated: list[str] = []
        self.checked_epochs = 0
        self.updates = 0
        self.updates_per_epoch: list[int] = []
        self.plan(Schedule([[Phase("train", 1)]]))

    def plan(self, schedule: Schedule) -> None:
        """Take a schedule, of which no epoch has begun."""
        self.schedule = schedule
        self.phase = schedule.phases[0][0]

    @property
    def task(self) -> int:
        """The task whose mode holds outside of a fit: the open one, or the first; none that is forgotten."""
        return self.network.resting_task

    def begin_task(self, task: int) -> None:
        """Open a task, with its first phase."""
        self.network.opened, self.phase = task, self.schedule.phases[task][0]
        self.consolidated, self.updates = [], 0

    def begin_phase(self, phase: str) -> bool:
        """Begin a phase of the open task; whether it is another one than before."""
        before, self.phase = self.phase, self.schedule.phase(self.network.opened, phase)
        return before.name != phase

    def skip(self, tasks: int) -> None:
        """Stand at the end of so many tasks, which are closed, as if each had its planned length."""
        self.phase = self.schedule.phases[tasks - 1][-1]
        self.checked_epochs = self.schedule.last_epoch(tasks - 1) + 1

    def locate(self, epoch: int) -> Position:
        """Task, phase and epoch within the task of an epoch of the stream."""
        return self.schedule.locate(epoch)

    def phase_of(self, epoch: int) -> Phase:
        """The phase that an epoch of the stream belongs to."""
        task, name, _ = self.schedule.locate(epoch)
        return self.schedule.phase(task, name)

    def count_update(self) -> None:
        """Note an update that happened."""
        self.updates += self.phase.trains == "network"

    @property
    def task_progress(self) -> float:
        """The fraction of the open task's planned updates of the whole network that happened, 0 to 1."""
        task = self.network.opened
        lengths = self.schedule.lengths_of(task)
        epochs = sum(lengths[p.name] for p in self.schedule.phases[task] if p.trains == "network")
        return min(self.updates / (epochs * self.updates_per_epoch[task]), 1.0)

    def may_end_training(self, epoch: int, early: bool) -> bool:
        """Whether it may be one of the last two epochs in which its task trains the whole network.

        Args:
            epoch: of the stream.
            early: whether early stopping may end any epoch's phase.
        """
        task, name, _ = self.schedule.locate(epoch)
        phases = [phase.name for phase in self.schedule.phases[task] if phase.trains == "network"]
        late = epoch >= self.schedule.phase_epochs(epoch).stop - 2
        return phases[-1:] == [name] and (late or early)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "opened": self.network.opened,
            "closed": self.network.closed,
            "phase": self.phase.name,
            "phase_lengths": list(self.schedule.lengths),
            "consolidated": list(self.consolidated),
            "checked_epochs": self.checked_epochs,
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any], tasks: int | None = None) -> None:
        """Take over :meth:`state_dict`, of a run with the same phases.

        Args:
            state: of the run.
            tasks: how many it had, where the schedule has more.

        Raises:
            CheckpointError: it had other phases.
        """
        self.load_progress(state)
        self.schedule.load_lengths(state["phase_lengths"], tasks)
        if self.network.opened >= 0:
            self.phase = self.schedule.phase(self.network.opened, state["phase"])

    def load_progress(self, state: Mapping[str, Any]) -> None:
        """Take over what holds without the run that the state is of: all but the schedule."""
        self.network.opened, self.network.closed = state["opened"], state["closed"]
        self.consolidated = list(state["consolidated"])
        self.checked_epochs, self.updates = state["checked_epochs"], state["updates"]
