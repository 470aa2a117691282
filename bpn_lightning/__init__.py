"""Continual learning on PyTorch Lightning, around Beneficial Perturbation Networks.

The names below are imported on first access, so that ``import bpn_lightning`` and the command line
start without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpn_lightning.costs import DeclaredBytes
    from bpn_lightning.errors import (
        BPNLightningError,
        CheckpointError,
        ConfigurationError,
        DataError,
        ExpectedForgettingWarning,
        ProcessesError,
        ResultsError,
    )
    from bpn_lightning.export.exporting import export_module, load_exported
    from bpn_lightning.host import ContinualHost
    from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
    from bpn_lightning.model.evaluation import evaluate
    from bpn_lightning.model.module import ContinualModule
    from bpn_lightning.nn.network import ContinualNetwork
    from bpn_lightning.tasks import Batch, ContinualStream, Phase, Schedule, Task

    __version__: str

__all__ = [
    "AccuracyMatrix",
    "BPNLightningError",
    "Batch",
    "CheckpointError",
    "ConfigurationError",
    "ContinualHost",
    "ContinualModule",
    "ContinualNetwork",
    "ContinualStream",
    "DataError",
    "DeclaredBytes",
    "ExpectedForgettingWarning",
    "Phase",
    "ProcessesError",
    "ResultsError",
    "Schedule",
    "Task",
    "__version__",
    "evaluate",
    "export_module",
    "load_exported",
]

_FILES = {
    "AccuracyMatrix": "metrics.accuracy_matrix",
    "Batch": "tasks",
    "DeclaredBytes": "costs",
    "BPNLightningError": "errors",
    "CheckpointError": "errors",
    "ConfigurationError": "errors",
    "ContinualHost": "host",
    "ContinualModule": "model.module",
    "ContinualNetwork": "nn.network",
    "ContinualStream": "tasks",
    "DataError": "errors",
    "ExpectedForgettingWarning": "errors",
    "Phase": "tasks",
    "ProcessesError": "errors",
    "ResultsError": "errors",
    "Schedule": "tasks",
    "Task": "tasks",
    "evaluate": "model.evaluation",
    "export_module": "export.exporting",
    "load_exported": "export.exporting",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version(__name__)
    elif name in _FILES:
        value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # cached for the next access
    return value


def __dir__() -> list[str]:
    return __all__
