"""Joint training: every task on the data of all tasks so far."""

from collections.abc import Sequence
from typing import ClassVar

from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Task

__all__ = ["JointTraining"]


class JointTraining(ContinualStrategy):
    r"""Learn each task together with all before it, as if nothing had to be forgotten.

    .. math:: L_t = \frac{1}{N_1 + \dots + N_t} \sum_{k \le t} \sum_n L(x_{k,n}, y_{k,n})

    The upper reference of every comparison: it keeps all data, which continual learning may not. The
    weights go on from task to task. Batches mix tasks, and each sample has its loss in the columns of
    its own task. A task's epochs are as many as ever, but longer: they go through all data so far.

    State: none; all training data are read again.
    """

    exclusive: ClassVar[bool] = True

    def training_tasks(self, task: Task) -> Sequence[int]:
        """All tasks so far."""
        return range(task.id + 1)
