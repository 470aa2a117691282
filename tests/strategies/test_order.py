"""The order of the trainer's callbacks does not matter: a pair of strategies learns the same either way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bpn_lightning.costs import tensors_in
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.gem import GradientEpisodicMemory
from bpn_lightning.strategies.imm import IncrementalMomentMatching
from bpn_lightning.strategies.lwf import LearningWithoutForgetting
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.psp import ParameterSuperposition
from bpn_lightning.strategies.si import SynapticIntelligence
from bpn_lightning.strategies.slnid import SLNID

Make = Callable[[], ContinualStrategy]

#: By what the two do in an update, one pair for each combination that may run.
PAIRS: dict[str, tuple[Make, Make]] = {
    "observe, correct shared weights": (
        lambda: SynapticIntelligence(0.5),
        lambda: EWC(20.0),
    ),
    "observe, correct weights of its own": (
        lambda: SynapticIntelligence(0.5),
        lambda: BeneficialPerturbation(3),
    ),
    "observe and penalize, penalize": (
        lambda: SynapticIntelligence(0.5),
        lambda: MemoryAwareSynapses(0.5),
    ),
    "capture, project": (
        lambda: SynapticIntelligence(0.5),
        lambda: GradientEpisodicMemory(16),
    ),
    "penalize, project": (
        lambda: EWC(20.0, update="clamped"),
        lambda: GradientEpisodicMemory(16),
    ),
    "consume, project": (
        lambda: BeneficialPerturbation(3),
        lambda: GradientEpisodicMemory(16),
    ),
    "consume, correct": (lambda: BeneficialPerturbation(3), lambda: EWC(20.0)),
    "add to the loss, correct": (LearningWithoutForgetting, lambda: EWC(20.0)),
    "add to the loss, observe": (LearningWithoutForgetting, lambda: SynapticIntelligence(0.5)),
    "add to the loss, add to the loss": (LearningWithoutForgetting, lambda: SLNID(0.5)),
    "change the forward, observe": (ParameterSuperposition, lambda: SynapticIntelligence(0.5)),
    "change the forward, consume": (ParameterSuperposition, lambda: BeneficialPerturbation(3)),
    "merge weights, correct": (IncrementalMomentMatching, lambda: EWC(20.0)),
    "merge weights, observe": (IncrementalMomentMatching, lambda: SynapticIntelligence(0.5)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_either_order_learns_the_same(learn: Any, pair: tuple[Make, Make]) -> None:
    """To rounding: two gradients that are added in another order may differ in the last bit."""
    first, second = learn(*(make() for make in pair)), learn(*(make() for make in pair[::-1]))
    torch.testing.assert_close(first.weights(), second.weights(), rtol=1e-4, atol=1e-5)
    others = {type(strategy): strategy for strategy in second.module.host.strategies}
    for strategy in first.module.host.strategies:
        one, other = strategy.state_dict(), others[type(strategy)].state_dict()
        torch.testing.assert_close(tensors_in(one), tensors_in(other), rtol=1e-3, atol=1e-5)
