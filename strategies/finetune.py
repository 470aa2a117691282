"""Fine-tuning: no continual-learning method, and the template for a new one."""

from bpn_lightning.strategies.base import ContinualStrategy

__all__ = ["FineTuning"]


class FineTuning(ContinualStrategy):
    """Train on each task starting from the previous task's weights, with nothing against forgetting.

    The lower baseline of every comparison. State: none.
    """
