"""Backbones against their published sizes, and what a module says of those that do not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP

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
