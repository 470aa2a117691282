"""The outputs of a run: console, loggers, metrics.csv, checkpoints, results and figures.

The names below are imported on first access, so that results can be read without matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpn_lightning.run.console import StreamProgress
    from bpn_lightning.run.dashboards import Dashboard
    from bpn_lightning.run.figures import accuracy_curves, accuracy_heatmap
    from bpn_lightning.run.results import read_results
    from bpn_lightning.run.schema import Results

__all__ = [
    "Dashboard",
    "Results",
    "StreamProgress",
    "accuracy_curves",
    "accuracy_heatmap",
    "read_results",
]

_FILES = {
    "Dashboard": "dashboards",
    "Results": "schema",
    "StreamProgress": "console",
    "accuracy_curves": "figures",
    "accuracy_heatmap": "figures",
    "read_results": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
