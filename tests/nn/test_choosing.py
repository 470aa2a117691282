"""Which layers names, wildcards, kinds and the default stand for."""

import warnings
from typing import Any

import pytest
from networks import lstm, resnet18, small_images, vit
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.nn.network import ContinualNetwork


def network(backbone: nn.Module) -> ContinualNetwork:
    stream = small_images()
    stream.setup()
    module = ContinualModule(backbone)
    module.attach(stream)
    return module.network


def test_a_network_of_linear_layers_has_biases_on_all_of_them() -> None:
    made = network(MLP([4, 4]))
    assert made.layers_for("bias_units", None) == list(made.linear_layers())


def test_a_resnet_has_them_behind_its_batch_normalizations() -> None:
    made = network(resnet18())
    found = made.layers_for("bias_units", None)
    norms = [n for n, p in made.named_modules() if isinstance(p, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert sorted(found) == sorted([*norms, "head"])
    assert made.layers_for("bias_units", ["conv", "head"]) == found
    assert set(made.layers_for("bias_units", ["norm"])) == set(norms)


def test_a_vision_transformer_has_them_on_its_projections_and_perceptrons() -> None:
    found = network(vit(layers=1)).layers_for("bias_units", None)
    block = "backbone.encoder.layers.encoder_layer_0"
    perceptron = [f"{block}.mlp.0", f"{block}.mlp.3"]
    assert found == ["backbone.conv_proj", f"{block}.self_attention", *perceptron, "head"]


def test_wildcards_and_kinds_and_names() -> None:
    made = network(resnet18())
    last = made.layers_for("bias_units", ["backbone.layer4.1.*"])
    assert last == ["backbone.layer4.1.bn1", "backbone.layer4.1.bn2"]
    assert made.layers_for("bias_units", ["head", "linear", "*.bn1"])[:2] == [
        "head",
        "backbone.bn1",
    ]
    assert network(lstm()).layers_for("bias_units", ["recurrent"]) == ["backbone.0.recurrent"]


def test_a_named_layer_before_batch_normalization_is_taken_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"backbone\.conv1 \(by backbone\.bn1\)"):
        found = network(resnet18()).layers_for("bias_units", ["backbone.conv1"])
    assert found == ["backbone.conv1"]


@pytest.mark.parametrize("between", [nn.ReLU(inplace=True), nn.ReLU(), nn.MaxPool2d(2)])
def test_only_what_follows_directly_takes_a_bias_away(between: nn.Module) -> None:
    made = network(nn.Sequential(nn.Conv2d(1, 4, 3), between, nn.BatchNorm2d(4), nn.Flatten()))
    assert made.layers_for("bias_units", None) == ["backbone.0", "head"]


def test_nothing_follows_from_the_check_for_the_network() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).train()
    made = network(backbone)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert made.layers_for("bias_units", None) == ["backbone.1", "head"]
    assert all((value == before[name]).all() for name, value in backbone.state_dict().items())
    assert all(part.training and not part._forward_hooks for part in backbone.modules())
    assert not any(part._forward_pre_hooks for part in backbone.modules())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("backbone.conv2", "but got 'backbone.conv2'. Did you mean 'backbone.conv1'?"),
        ("backbone.layer5.*", "but got 'backbone.layer5.*'."),
        ("attention", "but got 'attention'."),
        ("convs", "but got 'convs'. Did you mean 'conv'?"),
        ("backbone.layer1", "but got 'backbone.layer1'."),
        ("backbone.conv2", "backbone.layer2.0.bn1 and 29 more."),
    ],
)
def test_what_stands_for_no_layer_is_refused(wanted: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        network(resnet18()).layers_for("bias_units", [wanted])
    assert message in str(error.value)


class Own(nn.Module):
    """A layer with a weight that nobody but its author knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)
        self.scale = nn.Parameter(self.linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scale.T


class OwnLayer(nn.Linear):
    """May compute anything."""


def test_layers_of_unknown_classes_are_named_once() -> None:
    made = network(nn.Sequential(nn.Flatten(), OwnLayer(64, 4), nn.Linear(4, 4)))
    with pytest.warns(UserWarning, match="have weights") as said:
        assert made.layers_for("bias_units", None) == ["backbone.2", "head"]
    assert len(said) == 1
    assert "The layers backbone.1 (OwnLayer) have weights" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.layers_for("bias_units", ["linear"]) == ["backbone.2", "head"]


def test_what_attention_consists_of_is_no_unknown_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(vit()).layers_for("bias_units", None)


def test_keys_have_kinds_too(fit: Any) -> None:
    from bpn_lightning.strategies.psp import ParameterSuperposition

    psp = ParameterSuperposition(layers=["conv"])
    fit([psp], backbone=vit(layers=1), stream=small_images())
    assert list(psp.keys) == ["backbone.conv_proj"]
    with pytest.raises(ConfigurationError, match="that can have keys, but got 'norm'"):
        fit(
            [ParameterSuperposition(layers=["norm"])], backbone=vit(layers=1), stream=small_images()
        )
