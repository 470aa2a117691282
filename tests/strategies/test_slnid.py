"""SLNID against double loops, gradients taken one sample at a time, and MAS."""

from functools import partial
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.slnid import SLNID, inhibition, inhibition_weights


def activations(batch: int = 7, units: int = 9) -> Tensor:
    return torch.randn(batch, units, dtype=torch.float64).relu()


def double_loop(h: Tensor, alpha: Tensor, sigma: float, discount: str) -> float:
    """The sum as the paper writes it: over samples, and over ordered pairs of units."""
    total = 0.0
    for sample in h.tolist():
        for i, hi in enumerate(sample):
            for j, hj in enumerate(sample):
                if i == j:
                    continue
                a, b = float(alpha[i]), float(alpha[j])
                d = exp(-(a + b)) if discount == "product" else min(exp(-a), exp(-b))
                total += exp(-((i - j) ** 2) / (2 * sigma**2)) * d * hi * hj
    return total / len(h)


@pytest.mark.parametrize("discount", ["product", "minimum"])
@pytest.mark.parametrize("sigma", [0.7, 1.5, 4.0])
def test_the_matrix_form_is_the_double_loop(discount: Any, sigma: float) -> None:
    h, alpha = activations(), torch.rand(9, dtype=torch.float64)
    found = inhibition(h, inhibition_weights(alpha, sigma, discount)).mean()
    assert float(found) == pytest.approx(double_loop(h, alpha, sigma, discount), rel=1e-12)


def test_units_that_are_never_active_together_cost_nothing() -> None:
    h = torch.eye(6).double() * torch.rand(6, 1)
    assert not inhibition(h, inhibition_weights(torch.zeros(6).double(), 2.0)).any()


def test_without_places_and_importances_it_is_the_sum_of_second_moments() -> None:
    h = activations()
    found = inhibition(h, inhibition_weights(torch.zeros(9).double(), 1e9)).mean()
    moments = h.T @ h / len(h)
    torch.testing.assert_close(found, moments.sum() - moments.trace(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("discount", ["product", "minimum"])
def test_a_unit_that_matters_is_left_alone(discount: Any) -> None:
    alpha = torch.zeros(9).double()
    alpha[4] = 1e3
    weights = inhibition_weights(alpha, 2.0, discount)
    assert not weights[4].any()
    assert not weights[:, 4].any()
    assert (weights[:4, 5:] > 0).all()


def test_a_factor_of_the_activations_counts_squared_and_copies_do_not_count() -> None:
    h, weights = activations(), inhibition_weights(torch.rand(9).double(), 2.0)
    base = inhibition(h, weights)
    torch.testing.assert_close(inhibition(3 * h, weights), 9 * base)
    torch.testing.assert_close(inhibition(torch.cat([h, h]), weights).mean(), base.mean())
    torch.testing.assert_close(inhibition(h.flip(0), weights).mean(), base.mean())


# --- in real fits --------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_no_sparsity_is_mas_bit_for_bit(learn: Any, same: Any, strength: float) -> None:
    mas = learn(MemoryAwareSynapses(strength, update="clamped"))
    slnid = learn(SLNID(strength, sparsity=0.0))
    same(slnid.weights(), mas.weights())
    assert str(slnid.random) == str(mas.random)


def test_the_term_is_of_every_layers_activations_and_reaches_its_weights(
    prepare: Any, watch: Any
) -> None:
    """One update by hand: the gradient of the mean cross-entropy and of the double loop's mean."""
    seen: dict[str, Any] = {}

    def capture(host: Any, parameters: Any) -> None:
        if not seen:
            seen.update({n: p.grad.clone() for n, p in parameters.items()})
            seen["weights"] = {n: p.detach().clone() for n, p in parameters.items()}

    strategy = SLNID(0.0, sparsity=0.02, scale=4.0)
    run = prepare(strategy, watch(capture=capture))
    stream, module = run.stream, run.module
    batch = stream.prepare(next(iter(stream.train_loader(0, 0))))
    expected = nn.functional.cross_entropy(module(batch.inputs), batch.targets)
    h = batch.inputs
    for layer in module.network.backbone:
        h = layer(h)
        if isinstance(layer, nn.ReLU):
            units = h.shape[1]
            place = torch.arange(units)
            near = torch.exp(-((place[:, None] - place) ** 2) / (2 * (units / 4.0) ** 2))
            pairs = torch.einsum("mi,mj,ij->", h, h, near - torch.eye(units))
            expected = expected + 0.02 * pairs / len(h)
    names = dict(module.network.named_parameters())
    wanted = torch.autograd.grad(expected, list(names.values()))
    run.fit()
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)
    assert not strategy._activations


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("mask", "columns"), [("all", slice(0, 4)), ("task", slice(2, 4))])
def test_units_matter_as_much_as_the_squared_output_follows_them(
    prepare: Any, inplace: bool, mask: Any, columns: slice
) -> None:
    """One sample at a time, by autograd with respect to what enters the ReLU; the task's own columns."""

    def backbone() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(inplace), nn.Dropout(0.5))

    strategy = SLNID(0.5, sparsity=1e-3, discount="minimum")
    run = prepare(strategy, backbone=backbone, stream={"num_tasks": 2}, mask=mask).fit()
    module = run.module
    with module.task_mode(1):
        own = strategy._unit_importance(module.host, module.tasks[1])
    module.eval()
    linear, total, count = module.network.backbone[1], torch.zeros(6), 0
    for batch in module.host.batches(1, "train"):
        for sample in batch.inputs:
            before = linear(sample.flatten()[None]).detach().requires_grad_()
            logits = module.network.head(before.relu())[:, columns]
            (gradient,) = torch.autograd.grad((logits**2).sum(), before)
            total += gradient[0].abs()
            count += 1
    torch.testing.assert_close(own["backbone.2"], total / count, rtol=1e-4, atol=1e-6)
    # Both tasks' are summed; the second's is what was just measured.
    assert (strategy.alpha["backbone.2"] >= own["backbone.2"] - 1e-6).all()
    assert (strategy.alpha["backbone.2"] > 1.01 * own["backbone.2"]).any()


def test_sparsity_makes_fewer_units_active_together(learn: Any) -> None:
    def shared_activity(sparsity: float) -> float:
        run = learn(SLNID(0.0, sparsity), stream={"epochs_per_task": 5}, optimizer=_fast)
        batch = next(iter(run.module.host.batches(0, "test")))
        h = run.module.network.backbone(batch.inputs).detach()
        return float(inhibition(h, torch.ones(12, 12).fill_diagonal_(0)).mean())

    assert shared_activity(0.01) < 0.8 * shared_activity(0.0)


_fast = partial(SGD, lr=0.05)


def test_the_head_phase_and_evaluation_are_not_listened_to(prepare: Any) -> None:
    strategy = SLNID(0.5)
    run = prepare(strategy).fit()
    run.module.eval()
    run.module.evaluate()
    assert not strategy._activations
    assert not strategy._handles  # teardown took them away
    assert all(not part._forward_hooks for part in run.module.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": -1}, "Expected sparsity to be 0 or a positive number, but got -1"),
        ({"scale": 0}, "Expected scale to be a positive number, but got 0"),
        ({"discount": "most"}, "Expected discount to be one of product, minimum, but got 'most'"),
        ({"layers": []}, "Expected layers to name at least one module"),
        ({"strength": -1}, "Expected strength to be 0 or a positive number"),
    ],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SLNID(**arguments)


@pytest.mark.parametrize(
    ("layers", "backbone", "message"),
    [
        (
            ["backbone.22"],
            MLP,
            "Expected layers to be modules of the backbone, but got 'backbone.22'",
        ),
        (None, None, "but no ReLU is"),
        (["backbone.0"], None, r"output \(batch, units\), but 'backbone.0' is not"),
        (["backbone.1"], MLP, r"activations without weights .* but 'backbone.1' is not"),
        (["backbone.0"], MLP, r"activations .* but 'backbone.0' is not"),
    ],
)
def test_layers_that_are_not_there_are_errors(
    prepare: Any, layers: Any, backbone: Any, message: str
) -> None:
    def make() -> nn.Module:
        if backbone:
            return MLP([6])
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Tanh())

    with pytest.raises(ConfigurationError, match=message):
        prepare(SLNID(layers=layers), backbone=make).fit()
