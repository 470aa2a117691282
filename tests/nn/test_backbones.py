"""Backbones against their published sizes, and what a module says of those that do not fit."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP, torchvision_backbone

# --- the paper's networks ------------------------------------------------------------------------


def test_mlp_of_the_paper_has_its_parameters() -> None:
    """784 * 300 + 300 for MNIST, and 300 * 300 + 300 for each layer above."""
    network = MLP([300] * 5)
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 300)
    assert sum(p.numel() for p in network.parameters()) == 235_500 + 4 * 90_300
    assert [type(part) for part in network] == [nn.Flatten] + 5 * [nn.Linear, nn.ReLU]


def test_mlp_keeps_the_size_of_signals() -> None:
    """What He's initialization is for: mean squares stay, through any number of layers."""
    network = MLP([1000] * 4)
    outputs = [torch.randn(200, 500)]
    for part in network:
        outputs.append(part(outputs[-1]).detach())
    before_relu = [o.square().mean().item() for o in outputs[2::2]]
    assert before_relu == pytest.approx([2, 2, 2, 2], rel=0.25)
    for part in network:
        if isinstance(part, nn.Linear):
            assert (part.bias == 0).all()
            assert part.weight.detach().std() == pytest.approx(
                (2 / part.in_features) ** 0.5, rel=0.02
            )


def test_mlp_is_the_same_for_the_same_seed() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(5)
        network = MLP([4, 3])
        network(torch.zeros(1, 6))
        networks.append(network.state_dict())
    torch.testing.assert_close(networks[0], networks[1], rtol=0, atol=0)


@pytest.mark.parametrize("hidden", [[], [3, 0], [-1]])
def test_mlp_refuses_no_widths(hidden: list[int]) -> None:
    with pytest.raises(ConfigurationError) as error:
        MLP(hidden)
    assert str(error.value) == (
        f"Expected hidden to be one or more positive widths, but got {hidden}. "
        "The paper's network is hidden=[300, 300, 300, 300, 300]."
    )


@pytest.mark.parametrize("hidden", [300, [1.5], [True]])
def test_mlp_refuses_what_is_no_list_of_widths(hidden: Any) -> None:
    with pytest.raises(ConfigurationError):
        MLP(hidden)


# --- torchvision's -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("resnet18", 32, 512),
        ("alexnet", 64, 4096),
        ("mobilenet_v3_small", 32, 1024),
        ("densenet121", 32, 1024),
        ("vit_b_32", 224, 768),
    ],
)
def test_torchvision_networks_lose_their_classifier(name: str, size: int, features: int) -> None:
    network = torchvision_backbone(name).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, size, size)).shape == (2, features)
    last = [part for part in network.modules() if type(part) in (nn.Linear, nn.Identity)][-1]
    assert isinstance(last, nn.Identity)


def test_only_the_last_layer_is_cut_off() -> None:
    """Its two other fully connected layers stay: the paper gives them bias units."""
    network = torchvision_backbone("alexnet")
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    assert [layer.out_features for layer in linear] == [4096, 4096]


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_every_backbone_gives_features_in_training_too() -> None:
    network = torchvision_backbone("googlenet").train()
    assert isinstance(network(torch.zeros(2, 3, 64, 64)), Tensor)


def test_refuses_a_network_without_a_linear_layer() -> None:
    with pytest.raises(ConfigurationError) as error:
        torchvision_backbone("squeezenet1_0")
    assert str(error.value) == (
        "Expected name to be a network that ends in a linear layer, but got 'squeezenet1_0'. Remove its classifier yourself and pass the module."
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet81", " Did you mean 'resnet18'?"), ("raft_large", ""), ("lenet", None)],
)
def test_refuses_what_torchvision_does_not_classify_with(name: str, hint: str | None) -> None:
    with pytest.raises(ConfigurationError) as error:
        torchvision_backbone(name)
    message = str(error.value)
    assert message.startswith(
        f"Expected name to be a classification network of torchvision, but got {name!r}."
    )
    assert message.endswith(" torchvision.models.list_models() lists them.")
    assert hint is None or hint in message


def test_refuses_unknown_weights() -> None:
    with pytest.raises(ConfigurationError):
        torchvision_backbone("resnet18", weights="IMAGENET")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_a_local_file_gives_the_weights(name: str, tmp_path: Path) -> None:
    """Of any number of classes, as the last layer is cut off."""
    from torchvision import models

    whole = models.get_model(name, num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    network = torchvision_backbone(name, weights_file=str(tmp_path / "weights.pth"))
    left = network.state_dict()
    assert len(whole.state_dict()) - len(left) == 2
    for key, value in left.items():
        assert torch.equal(value, whole.state_dict()[key])


class Code:
    def __reduce__(self) -> Any:
        return exit, ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "FileNotFoundError"),
        (Code(), "UnpicklingError"),
        ({"a": torch.ones(1)}, "those of another network: 'a' is missing"),
        ([1], "another network"),
    ],
    ids=["missing", "code", "keys", "list"],
)
def test_a_file_without_its_weights_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(DataError) as error:
        torchvision_backbone("resnet18", weights_file=str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "torch.save(torchvision.models.resnet18().state_dict(), ...)" in str(error.value)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    state = torchvision_backbone("resnet18").state_dict()
    state["conv1.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"'conv1\.weight' is missing, unknown or of another shape"):
        torchvision_backbone("resnet18", weights_file=str(tmp_path / "weights.pth"))


def test_weights_that_cannot_be_downloaded_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", refuse)
    with pytest.raises(DataError) as error:
        torchvision_backbone("alexnet", weights="IMAGENET1K_V1")
    assert "https://download.pytorch.org/models/alexnet-" in str(error.value)
    assert "no network" in str(error.value)
    assert "weights_file" in str(error.value)


def test_two_kinds_of_weights_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="weights or weights_file, but got both"):
        torchvision_backbone("resnet18", weights="DEFAULT", weights_file="weights.pth")


# --- inside a module -----------------------------------------------------------------------------


class Raising(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        raise ValueError("no such thing")


class Pair(nn.Module):
    def forward(self, inputs: Tensor) -> Any:
        return inputs.flatten(1), inputs


TO_FEATURES = "Expected backbone to map (batch, 1, 8, 8) to (batch, features), but got "


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            nn.Conv2d(1, 3, 2),
            TO_FEATURES
            + "shape (1, 3, 7, 7) for a batch of 1. End it with nn.Flatten(), or with a mean "
            "over what is neither sample nor feature.",
        ),
        (
            Pair(),
            TO_FEATURES
            + "a tuple for a batch of 1. Let it return a tensor with a row for each sample.",
        ),
        (
            Raising(),
            (
                "Expected backbone to accept inputs of shape (batch, 1, 8, 8), but its forward raised ValueError: no such thing. Pass a network for inputs of this shape."
            ),
        ),
    ],
    ids=["images", "tuple", "raises"],
)
def test_a_backbone_that_does_not_fit_is_refused(backbone: nn.Module, message: str) -> None:
    stream = SplitDigits(num_tasks=2)
    stream.setup()
    with pytest.raises(ConfigurationError) as error:
        ContinualModule(backbone).attach(stream)
    assert str(error.value) == message


def test_looking_for_the_width_changes_nothing() -> None:
    frozen, norm = nn.BatchNorm2d(1).eval(), nn.BatchNorm2d(1)
    network = nn.Sequential(norm, nn.Flatten(), nn.Dropout(0.9))
    network.insert(0, frozen)
    stream = SplitDigits(num_tasks=2)
    stream.setup()
    module = ContinualModule(network)
    module.attach(stream)
    assert module.network.head is not None
    assert (module.network.head.in_features, module.network.head.out_features) == (64, 4)
    assert norm.num_batches_tracked == 0
    assert [part.training for part in network] == [False, True, True, True]
