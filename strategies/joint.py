"""Joint training: every task on the data of all tasks so far."""

from collections.abc import Sequence
from typing import ClassVar

from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Task

__all__ = ["JointTraining"]


class JointTraining(ContinualStrategy):
    r"""Train on each task together with all previous tasks.

    .. math:: L_t = \frac{1}{N_1 + \dots + N_t} \sum_{k \le t} \sum_n L(x_{k,n}, y_{k,n})

    The upper baseline of every comparison: it keeps all data, which continual learning does not allow.
    Each task starts from the previous task's weights. Batches mix tasks, and the loss of each sample
    is computed over the output units of its own task. The number of epochs per task is unchanged, but
    each epoch covers all data so far.

    State: none; all training data are read again.
    """

    exclusive: ClassVar[bool] = True

    def training_tasks(self, task: Task) -> Sequence[int]:
        """All tasks so far."""
        return range(task.id + 1)
