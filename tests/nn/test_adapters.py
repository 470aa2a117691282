"""Scales and low-rank products against their closed forms: folded into a layer's own weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import small_images
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.adapters import Adapter
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.network import ContinualNetwork

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), (4, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 8, 8)),
    "conv, circular": (
        lambda: nn.Conv1d(3, 5, 3, padding=2, dilation=2, padding_mode="circular"),
        (4, 3, 8),
    ),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 8, 8)),
    "transposed conv": (lambda: nn.ConvTranspose2d(3, 5, 3), (4, 3, 8, 8)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 8, 8)),
    "layer norm": (lambda: nn.LayerNorm([3, 4]), (4, 2, 3, 4)),
}


class Only(nn.Module):
    """A layer, and whatever makes features of its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).flatten(1)  # type: ignore[no-any-return]


def made(kind: str) -> tuple[ContinualNetwork, nn.Module, Tensor]:
    """A network of 3 tasks with one layer, the same layer untouched, and inputs."""
    torch.manual_seed(0)
    layer, shape = (LAYERS | OTHERS)[kind]
    one, other = layer(), layer()
    other.load_state_dict(one.state_dict())
    inputs = torch.randn(shape)
    stream = small_images()
    stream.setup()
    network = ContinualNetwork(Only(one))
    network.build(list(stream.tasks) * 2, 4, shape[1:], torch.float32)
    network.eval()
    return network, other.eval(), inputs


def learn(adapter: Adapter, task: int) -> dict[str, Tensor]:
    """Let a task have learned random values."""
    adapter.start(task, {n: torch.randn(adapter.get_parameter(n).shape) for n in adapter.names})
    values = {n: adapter.get_parameter(n).detach().clone() for n in adapter.names}
    adapter.freeze()
    return values


def outputs(network: ContinualNetwork, inputs: Tensor, task: Any) -> Tensor:
    with torch.no_grad(), network.task_mode(task):
        return network.backbone(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [*LAYERS, *OTHERS])
def test_scales_are_factors_of_the_output(kind: str) -> None:
    network, plain, inputs = made(kind)
    scales = network.attach_scales("backbone.layer")
    factors = 1 + learn(scales, 1)["scale"]
    expected = plain(inputs)
    if kind == "layer norm":
        factors = factors.view(3, 4)
    elif kind.endswith(("norm", "conv", "circular", "groups")) and kind != "weight norm":
        factors = factors.view(-1, *(1,) * (inputs.dim() - 2))
    torch.testing.assert_close(outputs(network, inputs, 1), (expected * factors).flatten(1))
    for task in (0, 2):
        assert torch.equal(outputs(network, inputs, task), expected.flatten(1))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_scales_fold_into_weight_and_bias(kind: str) -> None:
    network, plain, inputs = made(kind)
    factors = 1 + learn(network.attach_scales("backbone.layer"), 1)["scale"]
    with torch.no_grad():
        layer: Any = plain
        layer.weight *= factors.view(-1, *(1,) * (layer.weight.dim() - 1))
        layer.bias *= factors
    torch.testing.assert_close(outputs(network, inputs, 1), plain(inputs).flatten(1))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_low_rank_product_folds_into_the_weight(kind: str) -> None:
    network, plain, inputs = made(kind)
    low_rank = network.attach_low_rank("backbone.layer", 2)
    low_rank.scaling = 0.25
    values = learn(low_rank, 1)
    layer: Any = plain
    product = (values["B"] @ values["A"].flatten(1)).view(layer.weight.shape)
    expected = plain(inputs)
    for task in (0, 2):
        assert torch.equal(outputs(network, inputs, task), expected.flatten(1))
    with torch.no_grad():
        layer.weight = layer.weight + 0.25 * product if kind == "weight norm" else layer.weight
        if kind != "weight norm":
            layer.weight += 0.25 * product
    torch.testing.assert_close(
        outputs(network, inputs, 1), plain(inputs).flatten(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", [*LAYERS, *OTHERS])
def test_samples_may_each_have_a_task(kind: str) -> None:
    network, _, inputs = made(kind)
    parts: list[Adapter] = [network.attach_scales("backbone.layer")]
    if kind in LAYERS:
        parts.append(network.attach_low_rank("backbone.layer", 2))
    for part in parts:
        learn(part, 0)
        part.start(1, {name: torch.randn(part.get_parameter(name).shape) for name in part.names})
    tasks = torch.tensor([1, 2, 0, 1])
    with torch.no_grad():
        mixed = network(inputs, task=tasks)
        alone = [
            network(one[None], task=int(task)) for one, task in zip(inputs, tasks, strict=True)
        ]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_what_is_stored_grows_and_is_forgotten() -> None:
    network, plain, inputs = made("linear")
    low_rank = network.attach_low_rank("backbone.layer", 2)
    learn(low_rank, 1)
    learned = outputs(network, inputs, 1)
    low_rank.grow(6)
    assert low_rank.A_bank.shape == (6, 2, 6)
    low_rank.switch(1)
    assert torch.equal(network.backbone(inputs), learned)
    low_rank.forget(1)
    assert not any(
        value.any() for value in low_rank.state_dict().values() if torch.is_tensor(value)
    )
    assert torch.equal(network.backbone(inputs), plain(inputs))


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    network, *_ = made("conv in groups")
    with pytest.raises(ConfigurationError, match=r"low-rank products, but got 'backbone\.layer'"):
        network.attach_low_rank("backbone.layer", 2)
    with pytest.raises(ConfigurationError, match="that can have scales, but got 'head'"):
        network.attach_scales("head")
    network.attach_bias_units("backbone.layer", 0)
    with pytest.raises(
        ConfigurationError, match="Expected rank to be 0, as in what layer backbone"
    ):
        network.attach_bias_units("backbone.layer", 3)


def test_the_default_names_what_it_leaves_out() -> None:
    network, *_ = made("conv in groups")
    with pytest.warns(
        UserWarning, match=r"backbone\.layer \(Conv2d\) have weights, but no low-rank"
    ):
        assert network.layers_for("low_rank", None) == []


class Attending(nn.Module):
    """Attention of tokens to themselves, or in the other layout."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs if self.layer.batch_first else inputs.transpose(0, 1)
        mixed: Tensor = self.layer(tokens, tokens, tokens)[0]
        return (mixed if self.layer.batch_first else mixed.transpose(0, 1)).flatten(1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("part", ["scales", "low_rank", "both"])
def test_attention_folds_them_into_its_projections(part: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    one, inputs = Attending(batch_first), torch.randn(4, 3, 8)
    nn.init.normal_(one.layer.in_proj_bias)
    nn.init.normal_(one.layer.out_proj.bias)
    plain = Attending(batch_first)
    plain.load_state_dict(one.state_dict())
    stream = small_images()
    stream.setup()
    network = ContinualNetwork(one)
    network.build(list(stream.tasks) * 2, 4, (3, 8), torch.float32)
    network.eval()
    scale, product = torch.ones(4, 8), torch.zeros(4, 8, 8)
    if part != "low_rank":
        scale = 1 + learn(network.attach_scales("backbone.layer"), 1)["scale"].view(4, 8)
    if part != "scales":
        low_rank = network.attach_low_rank("backbone.layer", 2)
        low_rank.scaling = 0.5
        values = learn(low_rank, 1)
        product = 0.5 * values["B"] @ values["A"]
    layer = plain.layer
    before = plain(inputs)
    with torch.no_grad():
        for weight, bias, own in (
            (layer.in_proj_weight, layer.in_proj_bias, slice(3)),
            (layer.out_proj.weight, layer.out_proj.bias, slice(3, 4)),
        ):
            weight.copy_(weight * scale[own].reshape(-1, 1) + product[own].reshape(-1, 8))
            bias *= scale[own].flatten()
        torch.testing.assert_close(outputs(network, inputs, 1), plain(inputs))
        torch.testing.assert_close(outputs(network, inputs, 0), before)
        tasks = torch.tensor([1, 0, 2, 1])
        mixed = network(inputs, task=tasks)
        alone = [network(x[None], task=int(t)) for x, t in zip(inputs, tasks, strict=True)]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_copy_that_only_answers_has_them() -> None:
    network, _, inputs = made("linear")
    for part in (
        network.attach_scales("backbone.layer"),
        network.attach_low_rank("backbone.layer", 2),
    ):
        learn(part, 0)
        learn(part, 2)
    tasks = torch.tensor([0, 2, 1, 0])
    with torch.no_grad(), evaluation_mode(network):
        expected = network(inputs, task=tasks)
        torch.testing.assert_close(network.for_inference()(inputs, tasks), expected)
        fixed = network.for_inference(2)(inputs[1:2])
        torch.testing.assert_close(fixed, expected[1:2])
        exported = torch.export.export(network.for_inference(), (inputs, tasks)).module()
        torch.testing.assert_close(exported(inputs, tasks), expected)
