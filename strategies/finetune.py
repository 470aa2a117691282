"""Fine-tuning: no method at all, and the template of a new one."""

from bpn_lightning.strategies.base import ContinualStrategy

__all__ = ["FineTuning"]


class FineTuning(ContinualStrategy):
    """Learn each task from where the last one ended and do nothing against forgetting.

    The lower reference of every comparison. State: none.
    """
