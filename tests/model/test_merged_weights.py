"""Merged weights take the place of those of training, and give it back."""

import torch
from torch import nn

from bpn_lightning.model.merged_weights import MergedWeights


def test_merged_weights_are_swapped_in_and_out() -> None:
    layer = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    merged = MergedWeights()
    merged.swap_out(layer)  # nothing to do
    merged.swap_in(layer, {"weight": torch.ones(2, 2)})
    assert torch.equal(layer.weight, torch.ones(2, 2))
    assert torch.equal(merged.training["weight"], before["weight"])
    merged.swap_out(layer)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert merged.training == {}
