"""Continual learning on PyTorch Lightning, around Beneficial Perturbation Networks.

A name below is imported from its home when it is first asked for, so that ``import bpn_lightning``
and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
    from bpn_lightning.model.evaluation import evaluate
    from bpn_lightning.model.module import ContinualModule
    from bpn_lightning.tasks import Task

    __version__: str

__all__ = ["AccuracyMatrix", "ContinualModule", "Task", "__version__", "evaluate"]

_HOMES = {
    "AccuracyMatrix": "bpn_lightning.metrics.accuracy_matrix",
    "ContinualModule": "bpn_lightning.model.module",
    "Task": "bpn_lightning.tasks",
    "evaluate": "bpn_lightning.model.evaluation",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version(__name__)
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return __all__
