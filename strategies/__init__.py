"""Continual-learning methods as Lightning callbacks: one paper, one file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpn_lightning.strategies.base import ContinualStrategy
    from bpn_lightning.strategies.beneficial import BeneficialPerturbation
    from bpn_lightning.strategies.ewc import EWC
    from bpn_lightning.strategies.finetuning import FineTuning

__all__ = ["EWC", "STRATEGIES", "BeneficialPerturbation", "ContinualStrategy", "FineTuning"]

#: Names on the command line and in configs, and where the class is.
STRATEGIES: dict[str, str] = {
    "bd": "bpn_lightning.strategies.beneficial:BeneficialPerturbation",
    "ewc": "bpn_lightning.strategies.ewc:EWC",
    "finetune": "bpn_lightning.strategies.finetuning:FineTuning",
}

_HOMES = {
    **{path.partition(":")[2]: path.partition(":")[0] for path in STRATEGIES.values()},
    "ContinualStrategy": "bpn_lightning.strategies.base",
}


def __getattr__(name: str) -> Any:
    """Import a strategy when it is asked for, so that a list of names costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
