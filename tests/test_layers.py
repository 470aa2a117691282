"""Bias units and switchable layers against plain arithmetic."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.layers import BiasUnits, SwitchableLinear, evaluation_mode

TASKS, RANK, INPUTS, OUTPUTS = 4, 3, 5, 7


def learned_units() -> BiasUnits:
    """Tasks 0 and 1 are frozen, 2 is live, 3 has not begun; in double precision."""
    units = BiasUnits(TASKS, RANK, OUTPUTS).double()
    for task in range(3):
        m, w = torch.randn(1, RANK).double(), torch.randn(RANK, OUTPUTS).double()
        units.start(task, m, w)
        if task < 2:
            units.freeze()
    return units


def biases(units: BiasUnits) -> list[Tensor]:
    """One bias per task, by hand."""
    live = torch.einsum("r,ro->o", units.M.detach()[0], units.W.detach())
    return [units.bank[0], units.bank[1], live, torch.zeros(OUTPUTS, dtype=torch.float64)]


def switchable(bias: bool = True) -> tuple[SwitchableLinear, nn.Linear]:
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias).double()
    return SwitchableLinear.convert(deepcopy(plain), learned_units()), plain


def test_new_units_add_nothing() -> None:
    units = BiasUnits(TASKS, RANK, OUTPUTS)
    for task in range(TASKS):
        units.switch(task)
        assert torch.equal(units(), torch.zeros(OUTPUTS))


def test_frozen_biases_are_the_products_that_they_were() -> None:
    units = BiasUnits(TASKS, RANK, OUTPUTS)
    for task in (1, 3):
        m, w = torch.randn(1, RANK), torch.randn(RANK, OUTPUTS)
        units.start(task, m, w)
        units.switch(task)
        live = units().detach()
        torch.testing.assert_close(live, (m @ w)[0])
        units.freeze()
        assert torch.equal(units(), live)
        units.freeze()  # nothing is live: nothing happens
        units.start(0, torch.ones(1, RANK), torch.ones(RANK, OUTPUTS))
        assert torch.equal(units(), live)
        assert not units().requires_grad
    assert (units.bank[[0, 2]] == 0).all()


def test_starting_writes_in_place() -> None:
    units = BiasUnits(TASKS, RANK, OUTPUTS)
    before = {name: (value, value.data_ptr()) for name, value in units.named_parameters()}
    units.start(2, torch.ones(1, RANK), torch.ones(RANK, OUTPUTS))
    for name, value in units.named_parameters():
        assert value is before[name][0]
        assert value.data_ptr() == before[name][1]
        assert value.requires_grad
        assert (value == 1).all()


def test_state_says_which_task_is_live() -> None:
    units = learned_units()
    other = BiasUnits(TASKS, RANK, OUTPUTS).double()
    other.load_state_dict(units.state_dict())
    for task, bias in enumerate(biases(units)):
        other.switch(task)
        torch.testing.assert_close(other(), bias)
    units.freeze()
    other.load_state_dict(units.state_dict())
    assert other.live is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3)])
def test_adds_the_bias_of_the_mode(bias: bool, shape: tuple[int, ...]) -> None:
    layer, plain = switchable(bias)
    x = torch.randn(*shape, INPUTS, dtype=torch.float64)
    wanted = torch.einsum("...i,oi->...o", x, plain.weight)
    if bias:
        wanted = wanted + plain.bias
    for task, shift in enumerate(biases(layer.bias_units)):
        layer.bias_units.switch(task)
        torch.testing.assert_close(layer(x), wanted + shift)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1,), (6, 2), (6, 2, 3)])
@pytest.mark.parametrize("live", [True, False])
def test_adds_each_sample_its_own_bias(bias: bool, shape: tuple[int, ...], live: bool) -> None:
    layer, _ = switchable(bias)
    if not live:
        layer.bias_units.freeze()
    x = torch.randn(*shape, INPUTS, dtype=torch.float64)
    tasks = torch.tensor([2, 0, 3, 1, 2, 2])[: shape[0]]
    alone = []
    for sample, task in zip(x, tasks.tolist(), strict=True):
        layer.bias_units.switch(task)
        alone.append(layer(sample[None])[0])
    layer.bias_units.switch(tasks)
    torch.testing.assert_close(layer(x), torch.stack(alone))


def test_zero_bias_is_the_plain_layer_bit_for_bit() -> None:
    plain = nn.Linear(INPUTS, OUTPUTS)
    x = torch.randn(9, INPUTS)
    wanted = plain(x)
    layer = SwitchableLinear.convert(plain, BiasUnits(TASKS, RANK, OUTPUTS))
    layer.bias_units.start(0, torch.zeros(1, RANK), torch.randn(RANK, OUTPUTS))
    assert torch.equal(layer(x), wanted)


def test_gradients_are_those_of_the_layers_own_bias() -> None:
    layer, _ = switchable()
    layer.bias_units.switch(2)
    x = torch.randn(6, INPUTS, dtype=torch.float64)
    layer(x).tanh().square().sum().backward()
    units, delta = layer.bias_units, layer.bias.grad
    torch.testing.assert_close(units.M.grad, (units.W @ delta)[None])
    torch.testing.assert_close(units.W.grad, torch.outer(units.M[0], delta))


def test_only_samples_of_the_live_task_move_it() -> None:
    layer, _ = switchable()
    tasks = torch.tensor([0, 2, 1, 2])
    layer.bias_units.switch(tasks)
    x = torch.randn(4, INPUTS, dtype=torch.float64)
    (layer(x) ** 2).sum().backward()
    delta = 2 * layer(x).detach()[tasks == 2].sum(0)
    torch.testing.assert_close(layer.bias_units.M.grad, (layer.bias_units.W @ delta)[None])


def test_conversion_keeps_what_others_hold() -> None:
    network = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.ReLU())
    layer, weight, names = network[0], network[0].weight, set(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    converted = SwitchableLinear.convert(layer, BiasUnits(TASKS, RANK, OUTPUTS))
    assert converted is layer is network[0]
    assert layer.weight is weight is optimizer.param_groups[0]["params"][0]
    added = {"0.bias_units.M", "0.bias_units.W", "0.bias_units.bank", "0.bias_units._extra_state"}
    assert set(network.state_dict()) == names | added


@pytest.mark.parametrize("raises", [True, False])
def test_evaluation_mode_gives_every_part_its_own_flag_back(raises: bool) -> None:
    frozen = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    network = nn.ModuleDict({"frozen": frozen, "free": nn.Dropout(), "inner": nn.ReLU().eval()})
    network.train()
    frozen.eval()
    network["inner"].eval()
    flags = {name: part.training for name, part in network.named_modules()}
    assert set(flags.values()) == {True, False}
    try:
        with evaluation_mode(network):
            assert not any(part.training for part in network.modules())
            network["free"].train()
            if raises:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert {name: part.training for name, part in network.named_modules()} == flags


def test_evaluation_mode_switches_dropout_off() -> None:
    dropout, x = nn.Dropout(), torch.ones(100)
    with evaluation_mode(dropout):
        assert torch.equal(dropout(x), x)
    assert not torch.equal(F.dropout(x, training=dropout.training), x)
