"""The run-time side of a trained network: load a bundle, and answer in the modes of its tasks.

Nothing here imports Lightning, a trainer or a strategy.
"""

from bpn_lightning.modes.net import Modes, Prediction, load

__all__ = ["Modes", "Prediction", "load"]


def __dir__() -> list[str]:
    return __all__
