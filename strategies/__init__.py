"""Continual-learning methods as Lightning callbacks: one paper, one file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bpn_lightning.strategies import table

if TYPE_CHECKING:
    from bpn_lightning.strategies.base import ContinualStrategy
    from bpn_lightning.strategies.bd import BeneficialPerturbation
    from bpn_lightning.strategies.bitfit import BitFit
    from bpn_lightning.strategies.der import DarkExperienceReplay
    from bpn_lightning.strategies.ebll import EncoderBasedLifelongLearning
    from bpn_lightning.strategies.er import ExperienceReplay
    from bpn_lightning.strategies.ewc import EWC
    from bpn_lightning.strategies.finetune import FineTuning
    from bpn_lightning.strategies.gates.base import TaskGate
    from bpn_lightning.strategies.gates.fecam import FeCAM
    from bpn_lightning.strategies.gates.ncm import NearestClassMean
    from bpn_lightning.strategies.gates.ppca import ProbabilisticPCA
    from bpn_lightning.strategies.gates.ranpac import RanPAC
    from bpn_lightning.strategies.gates.slda import SLDA
    from bpn_lightning.strategies.gdumb import GDumb
    from bpn_lightning.strategies.gem import AveragedGEM, GradientEpisodicMemory
    from bpn_lightning.strategies.ia3 import IA3
    from bpn_lightning.strategies.icarl import ICaRL
    from bpn_lightning.strategies.imm import IncrementalMomentMatching
    from bpn_lightning.strategies.joint import JointTraining
    from bpn_lightning.strategies.lora import LoRA
    from bpn_lightning.strategies.lwf import LearningWithoutForgetting
    from bpn_lightning.strategies.mas import MemoryAwareSynapses
    from bpn_lightning.strategies.prompt import PromptTuning
    from bpn_lightning.strategies.psp import ParameterSuperposition
    from bpn_lightning.strategies.si import SynapticIntelligence
    from bpn_lightning.strategies.slnid import SLNID
    from bpn_lightning.strategies.stl import IndependentNetworks

__all__ = [
    "EWC",
    "IA3",
    "SLDA",
    "SLNID",
    "STRATEGIES",
    "AveragedGEM",
    "BeneficialPerturbation",
    "BitFit",
    "ContinualStrategy",
    "DarkExperienceReplay",
    "EncoderBasedLifelongLearning",
    "ExperienceReplay",
    "FeCAM",
    "FineTuning",
    "GDumb",
    "GradientEpisodicMemory",
    "ICaRL",
    "IncrementalMomentMatching",
    "IndependentNetworks",
    "JointTraining",
    "LearningWithoutForgetting",
    "LoRA",
    "MemoryAwareSynapses",
    "NearestClassMean",
    "ParameterSuperposition",
    "ProbabilisticPCA",
    "PromptTuning",
    "RanPAC",
    "SynapticIntelligence",
    "TaskGate",
]

#: Names on the command line, in configs and in checkpoints, and the import path of each class.
STRATEGIES: dict[str, str] = table.STRATEGIES

_HOMES = {
    **{path.partition(":")[2]: path.partition(":")[0] for path in STRATEGIES.values()},
    **{
        path.partition(":")[2]: path.partition(":")[0]
        for name, path in table.GATES.items()
        if name in ("fecam", "ncm", "ppca", "ranpac", "slda")
    },
    "ContinualStrategy": "bpn_lightning.strategies.base",
    "TaskGate": "bpn_lightning.strategies.gates.base",
}


def __getattr__(name: str) -> Any:
    """Import a strategy on first access, so that listing the names does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
