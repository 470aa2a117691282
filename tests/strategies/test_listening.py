"""Strategies that listen to layers hear the forward of the step, whatever others run, in any order."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.conformance.runs import PLAIN, Run, Setting, differences, fit
from bpn_lightning.host import ContinualHost
from bpn_lightning.strategies import (
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    ParameterSuperposition,
    SynapticIntelligence,
)
from bpn_lightning.tasks import Batch

pytestmark = pytest.mark.slow

SCALE = 4.0


class Rehearses(ContinualStrategy):
    """Adds a term for which the network answers in training, in every task's mode, half as many samples."""

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        half = batch.inputs[: len(batch.inputs) // 2]
        terms = torch.zeros(())
        for task in range(3):
            with host.network.task_mode(task):
                terms = terms + 1e-3 * host.network(half).square().sum()
        return {"rehearsed": terms}


class Asks(ContinualStrategy):
    """What the layers give for a step's batch, by a forward of its own and none of their hooks.

    Runs first of all, before anything of the step has moved; the networks here have no dropout.
    """

    def __init__(self) -> None:
        self.heard: list[dict[str, Tensor]] = []

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        values, outputs = batch.inputs, {}
        with torch.no_grad():
            for name, layer in host.network.get_submodule("backbone").named_children():
                values = layer.forward(values)
                outputs[f"backbone.{name}"] = values.clone()
        self.heard.append(outputs)
        return {}


class Listens(SLNID):
    """Notes the term of every step."""

    def __init__(self, discount: Any = "product") -> None:
        self.said: list[Tensor] = []
        super().__init__(0.1, 0.02, scale=SCALE, discount=discount)

    def loss_terms(self, host: ContinualHost, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        terms = super().loss_terms(host, batch, logits)
        self.said.append(terms["inhibition"].detach())
        return terms


OTHERS: dict[str, Callable[[], ContinualStrategy]] = {
    "agem": partial(AveragedGEM, 8),
    "ebll": partial(EncoderBasedLifelongLearning, alpha=1.0, autoencoder_epochs=1),
    "gem": partial(GradientEpisodicMemory, 8),
    "imm": partial(IncrementalMomentMatching, drop=0.3),
    "lwf": LearningWithoutForgetting,
    "rehearses": Rehearses,
    "si": SynapticIntelligence,
}
MODES: dict[str, list[Callable[[], ContinualStrategy]]] = {
    "no modes": [],
    "bd": [partial(BeneficialPerturbation, 8)],
    "psp": [ParameterSuperposition],
}


def pairs(h: Tensor, alpha: Tensor, discount: str) -> Tensor:
    """Of every sample, over ordered pairs of units, as the paper and the published code write it."""
    place = torch.arange(h.shape[1], dtype=torch.float64)
    near = torch.exp(-((place[:, None] - place) ** 2) / (2 * (h.shape[1] / SCALE) ** 2))
    one, other = torch.exp(-alpha)[:, None], torch.exp(-alpha)
    joint = one * other if discount == "product" else torch.minimum(one, other)
    weights = near * joint * (1 - torch.eye(len(place)))
    return torch.einsum("mi,mj,ij->m", h.double(), h.double(), weights)


def assert_inhibits(asks: Asks, slnid: Listens, alphas: Sequence[Mapping[str, Tensor]]) -> None:
    """Whether every step's term is that of the activations, discounted by the units' importances."""
    assert len(slnid.said) == len(asks.heard) == len(alphas) == 15
    for said, outputs, alpha in zip(slnid.said, asks.heard, alphas, strict=True):
        wanted = torch.zeros(len(said), dtype=torch.float64)
        for name in slnid.units:
            importance = alpha.get(name, torch.zeros(outputs[name].shape[1])).double()
            wanted += 0.02 * pairs(outputs[name], importance, slnid.discount)
        assert wanted.max() > 1e-3
        torch.testing.assert_close(said.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("first", [True, False], ids=["slnid first", "slnid last"])
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("other", ["ebll", "gem", "lwf", "rehearses"])
def test_what_slnid_inhibits_is_the_steps_own_activations(other, modes, first):
    asks, slnid = Asks(), Listens()
    between = [slnid, OTHERS[other]()]
    strategies = [asks, *(make() for make in MODES[modes]), *(between if first else between[::-1])]
    alphas: list[Mapping[str, Tensor]] = []

    def note(run: Run, at: Any, batch: int, last: bool) -> None:
        if at.phase == "train":
            alphas.append(dict(slnid.alpha))

    fit(strategies, PLAIN, at_batch=note)
    assert_inhibits(asks, slnid, alphas)


@pytest.mark.parametrize("discount", ["product", "minimum"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_term_discounts_units_that_matter_and_is_taken_in_full_precision(discount, precision):
    """In bf16-mixed of activations in bfloat16; a term that was rounded so itself would be 0.4 % off."""
    asks, slnid = Asks(), Listens(discount)
    alphas: list[Mapping[str, Tensor]] = []

    def note(run: Run, at: Any, batch: int, last: bool) -> None:
        alphas.append(dict(slnid.alpha))

    fit([asks, slnid], Setting(trainer={"precision": precision}), at_batch=note)
    assert_inhibits(asks, slnid, alphas)
    assert slnid.said[-1].dtype == torch.float32
    first, last = alphas[5], alphas[-1]
    for name, units in slnid.units.items():
        assert first[name].shape == (units,)
        assert (last[name] > first[name]).any()  # importances of tasks add up
        # Another discount would be seen.
        h = asks.heard[-1][name]
        product, minimum = (pairs(h, last[name].double(), way) for way in ("product", "minimum"))
        none = pairs(h, torch.zeros(units).double(), "product")
        assert (product < 0.99 * minimum).any()
        assert (minimum < 0.99 * none).any()


def learned(makers: Sequence[Callable[[], ContinualStrategy]]) -> dict[str, Any]:
    return fit([make() for make in makers], PLAIN).learned()


@pytest.mark.parametrize("modes", ["no modes", "bd"])
@pytest.mark.parametrize(
    "listener",
    [
        partial(SLNID, 0.1, 0.05),
        # The layer that drop-transfer is on: it calls the layer once more, and replaces its output.
        partial(EncoderBasedLifelongLearning, alpha=1.0, autoencoder_epochs=1, layer="backbone.3"),
    ],
    ids=["slnid", "ebll"],
)
def test_the_order_of_the_callbacks_does_not_matter(listener, modes):
    """Up to the order in which terms are added."""
    for name, other in OTHERS.items():
        if (name, listener.func) == ("ebll", EncoderBasedLifelongLearning):
            continue
        both = [listener, other]
        one, two = (learned([*MODES[modes], *order]) for order in (both, both[::-1]))
        assert differences(one, two, tolerance=1e-4) == [], name


def test_what_ebll_hears_of_a_layer_is_what_goes_on_from_it():
    """Beside drop-transfer, which replaces a layer's output: the dropped one reaches the next layer."""
    heard: list[tuple[Tensor, Tensor]] = []

    class Hears(EncoderBasedLifelongLearning):
        def student_outputs(self, host: Any, batch: Any, answer: Any, layer: Any = None) -> Any:
            if answer.features is not None:
                heard.append((answer.features.detach(), inputs[-1]))
            return super().student_outputs(host, batch, answer, layer)

    inputs: list[Tensor] = []

    def watch(run: Run) -> None:
        def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if layer.training:
                inputs.append(args[0].detach().clone())

        run.module.network.backbone[4].register_forward_pre_hook(note)

    hears = Hears(alpha=1.0, autoencoder_epochs=1, layer="backbone.3")
    fit([hears, IncrementalMomentMatching(drop=0.5)], PLAIN, watch=watch)
    assert len(heard) == 10
    for features, reached in heard:
        assert torch.equal(features, reached)


@pytest.mark.parametrize("others", [("proximal", "clamped"), ("clamped", "clamped")])
def test_si_walks_the_whole_update_wherever_it_stands(others):
    """Its path is minus the sum of the task's gradients times how far the weights have come, by hand."""
    mine, theirs = others
    paths = []
    for first in (True, False):
        si = SynapticIntelligence(update=theirs)
        both = [si, MemoryAwareSynapses(update=mine)]
        steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

        class Sees(ContinualStrategy):
            def loss_terms(
                self, host: Any, batch: Any, logits: Any, steps: Any = steps
            ) -> dict[str, Tensor]:
                parameters = dict(host.network.named_parameters())
                loss = nn.functional.cross_entropy(logits, batch.targets)
                found = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True)
                before = {name: p.detach().clone() for name, p in parameters.items()}
                steps.append((dict(zip(parameters, found, strict=True)), before))
                return {}

        def check(
            run: Run, at: Any, batch: int, last: bool, si: Any = si, steps: Any = steps
        ) -> None:
            if batch == 0:
                del steps[:-1]
            now = dict(run.module.network.named_parameters())
            after = [before for _, before in steps[1:]] + [now]
            for name, path in si.path.items():
                walked = [
                    g[name] * (b[name] - a[name].detach())
                    for (g, b), a in zip(steps, after, strict=True)
                ]
                torch.testing.assert_close(path, torch.stack(walked).sum(0), rtol=1e-4, atol=1e-8)

        fit([Sees(), *(both if first else both[::-1])], PLAIN, at_batch=check)
        paths.append(si.state_dict())
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-3, atol=1e-7)
