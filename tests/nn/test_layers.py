"""Bias units, keys and switchable layers against plain arithmetic."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.nn.layers import (
    BiasUnits,
    ComplexKeys,
    ComplexLinear,
    KernelKeys,
    Keys,
    SwitchableLinear,
    effective_input,
    evaluation_mode,
)
from bpn_lightning.nn.switching import add_parts
from bpn_lightning.nn.weight_bank import WeightBank

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
        assert torch.equal(units(), torch.zeros(1, OUTPUTS))


def test_frozen_biases_are_the_products_that_they_were() -> None:
    units = BiasUnits(TASKS, RANK, OUTPUTS)
    for task in (1, 3):
        m, w = torch.randn(1, RANK), torch.randn(RANK, OUTPUTS)
        units.start(task, m, w)
        units.switch(task)
        live = units().detach()
        torch.testing.assert_close(live, m @ w)
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
        torch.testing.assert_close(other(), bias[None])
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


# --- keys ----------------------------------------------------------------------------------------

SHAPES = [(6,), (1,), (6, 2), (6, 2, 3)]


def drawn_keys(size: int = INPUTS) -> Keys:
    keys = Keys(TASKS, size)
    for task in range(TASKS):
        keys.write(task, torch.randint(2, (size,)) * 2 - 1)
    return keys


def keyed(bias: bool = True, units: BiasUnits | None = None) -> SwitchableLinear:
    layer = nn.Linear(INPUTS, OUTPUTS, bias=bias).double()
    return SwitchableLinear.convert(layer, bias_units=units, keys=drawn_keys())


def switch(layer: nn.Module, task: int | Tensor) -> None:
    for part in layer.children():
        part.switch(task)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_signs_are_exact_in_every_precision(kind: torch.dtype) -> None:
    layer = keyed().to(kind)
    assert set(layer.keys.bank.unique().tolist()) == {-1, 1}
    x = torch.randn(9, INPUTS).to(kind)
    for task in range(TASKS):
        layer.keys.switch(task)
        once = layer.effective_input(x)
        assert once.dtype == kind
        assert torch.equal(once.abs(), x.abs())
        assert torch.equal(layer.effective_input(once), x)
        weight = layer.weight * layer.keys()
        assert torch.equal(weight * layer.keys(), layer.weight)
    assert layer.keys.bank.dtype == torch.int8


def test_a_key_on_the_input_is_a_key_on_the_weights_bit_for_bit() -> None:
    layer = SwitchableLinear.convert(nn.Linear(64, 32), keys=drawn_keys(64))
    x = torch.randn(50, 64)
    for task in range(TASKS):
        layer.keys.switch(task)
        assert torch.equal(layer(x), F.linear(x, layer.weight * layer.keys(), layer.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_units", [True, False])
def test_multiplies_what_enters_by_the_key_of_the_mode(
    bias: bool, shape: tuple[int, ...], with_units: bool
) -> None:
    layer = keyed(bias, learned_units() if with_units else None)
    x = torch.randn(*shape, INPUTS, dtype=torch.float64)
    for task in range(TASKS):
        switch(layer, task)
        key = layer.keys.bank[task].double()
        wanted = torch.einsum("...i,i,oi->...o", x, key, layer.weight)
        if bias:
            wanted = wanted + layer.bias
        if with_units:
            wanted = wanted + biases(layer.bias_units)[task]
        torch.testing.assert_close(layer(x), wanted)


def test_a_key_is_on_what_enters_a_square_layer() -> None:
    """Where on what leaves it would have the right shape, too."""
    layer = SwitchableLinear.convert(nn.Linear(8, 8).double(), keys=drawn_keys(8))
    x = torch.randn(5, 8, dtype=torch.float64)
    for task in range(TASKS):
        layer.keys.switch(task)
        wanted = (x * layer.keys.bank[task]) @ layer.weight.T + layer.bias
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_units", [True, False])
def test_multiplies_each_sample_by_its_own_key(shape: tuple[int, ...], with_units: bool) -> None:
    layer = keyed(units=learned_units() if with_units else None)
    x = torch.randn(*shape, INPUTS, dtype=torch.float64)
    tasks = torch.tensor([2, 0, 3, 1, 2, 2])[: shape[0]]
    alone = []
    for sample, task in zip(x, tasks.tolist(), strict=True):
        switch(layer, task)
        alone.append(layer(sample[None])[0])
    switch(layer, tasks)
    torch.testing.assert_close(layer(x), torch.stack(alone))


@pytest.mark.parametrize("keys_first", [True, False])
def test_bias_units_and_keys_do_not_disturb_each_other(keys_first: bool) -> None:
    layer = nn.Linear(INPUTS, OUTPUTS).double()
    weight, units, keys = layer.weight, learned_units(), drawn_keys()
    for part in ({"keys": keys}, {"bias_units": units})[:: 1 if keys_first else -1]:
        layer = SwitchableLinear.convert(layer, **part)
    assert (layer.bias_units, layer.keys) == (units, keys)
    assert layer.weight is weight
    x = torch.randn(6, INPUTS, dtype=torch.float64)
    for task in range(TASKS):
        switch(layer, task)
        wanted = (x * keys.bank[task]) @ weight.T + layer.bias + biases(units)[task]
        torch.testing.assert_close(layer(x), wanted)


def test_new_keys_are_the_plain_layer_bit_for_bit() -> None:
    plain, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(9, INPUTS)
    wanted = plain(x)
    layer = SwitchableLinear.convert(plain, keys=Keys(TASKS, INPUTS))
    for task in range(TASKS):
        layer.keys.switch(task)
        assert torch.equal(layer(x), wanted)


def test_gradients_are_those_of_algorithm_4() -> None:
    """They are dW = delta (x * k)^T and dx = (W^T delta) * k, with delta of the layer's own bias."""
    layer = keyed()
    layer.keys.switch(2)
    x = torch.randn(INPUTS, dtype=torch.float64, requires_grad=True)
    layer(x[None]).tanh().square().sum().backward()
    delta, key = layer.bias.grad, layer.keys.bank[2].double()
    torch.testing.assert_close(layer.weight.grad, torch.outer(delta, x.detach() * key))
    torch.testing.assert_close(x.grad, (layer.weight.detach().T @ delta) * key)


@pytest.mark.parametrize("tasks", [1, torch.tensor([2, 0, 3, 1, 2, 2])])
def test_what_weights_take_is_the_keyed_input(tasks: int | Tensor) -> None:
    x = torch.randn(6, 2, INPUTS, dtype=torch.float64)
    layer = keyed()
    switch(layer, tasks)
    taken = effective_input(layer, x)
    torch.testing.assert_close(layer(x), F.linear(taken, layer.weight, layer.bias))
    assert not torch.equal(taken, x)
    for plain in (nn.Linear(INPUTS, OUTPUTS), switchable()[0]):
        assert effective_input(plain, x) is x


def test_keys_are_state_and_no_parameters() -> None:
    layer, other = keyed(), keyed()
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.keys.bank, layer.keys.bank)


# --- convolutions with keys ----------------------------------------------------------------------

CONVOLUTIONS = [
    {},
    {"groups": 2},
    {"groups": 4, "bias": False},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_keyed_convolution_multiplies_every_patch(options: dict[str, Any]) -> None:
    plain = nn.Conv2d(4, 8, 3, **options).double()
    size = 4 * 3 * 3
    keys = KernelKeys(TASKS, size)
    keys.bank.copy_(drawn_keys(size).bank)
    layer = deepcopy(plain)
    add_parts(layer, keys=keys)
    x = torch.randn(5, 4, 9, 9, dtype=torch.float64)
    for task in range(TASKS):
        switch(layer, task)
        with torch.no_grad():  # every output channel of a group sees that group's input channels
            for channel in range(8):
                group = channel // (8 // plain.groups)
                of_group = slice(group * size // plain.groups, (group + 1) * size // plain.groups)
                key = keys.bank[task, of_group].view(-1, 3, 3)
                plain.weight[channel] = layer.weight[channel] * key
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)


def test_patches_times_keys_are_what_a_keyed_convolution_sees() -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1).double()
    keys = KernelKeys(TASKS, 36)
    keys.bank.copy_(drawn_keys(36).bank)
    add_parts(layer, keys=keys)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    switch(layer, 3)
    patches = F.unfold(x, 3, padding=1) * keys.bank[3][:, None]
    wanted = layer.weight.flatten(1) @ patches + layer.bias[:, None]
    torch.testing.assert_close(layer(x).flatten(2), wanted)


def test_a_keyed_convolution_serves_a_whole_batch() -> None:
    keys = KernelKeys(TASKS, 36)
    assert not keys.per_sample
    with pytest.raises(TypeError):
        keys.switch(torch.zeros(2, dtype=torch.long))


# --- complex layers ------------------------------------------------------------------------------


def complex_layer(
    real_output: bool = False, units: BiasUnits | None = None, bias: bool = True
) -> ComplexLinear:
    layer = nn.Linear(INPUTS, OUTPUTS, bias=bias).double()
    layer = ComplexLinear.make_complex(layer, ComplexKeys(TASKS, INPUTS), real_output)
    for task in range(TASKS):
        layer.keys.write(task, (torch.rand(INPUTS) * 2 - 1) * 3.14)
    with torch.no_grad():
        layer.weight_imag.normal_()
    return SwitchableLinear.convert(layer, bias_units=units)


def as_complex(x: Tensor) -> Tensor:
    return x + 0j if x.shape[-1] == INPUTS else torch.complex(*x.chunk(2, -1))


def by_complex_arithmetic(layer: ComplexLinear, x: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """What torch makes of complex numbers, for one key ``(in,)``."""
    y = (as_complex(x) * key) @ weight.T
    y = y if layer.bias is None else y + layer.bias
    return y.real if layer.real_output else torch.cat([y.real, y.imag], -1)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [INPUTS, 2 * INPUTS])
@pytest.mark.parametrize("real_output", [True, False])
@pytest.mark.parametrize("shape", [(6,), (6, 2)])
def test_a_complex_layer_is_complex_arithmetic(
    kind: torch.dtype, width: int, real_output: bool, shape: tuple[int, ...]
) -> None:
    layer = complex_layer(real_output).to(kind)
    x = torch.randn(*shape, width, dtype=kind)
    for task in range(TASKS):
        layer.keys.switch(task)
        key = torch.polar(torch.ones(INPUTS, dtype=kind), layer.keys.bank[task])
        weight = torch.complex(layer.weight, layer.weight_imag)
        torch.testing.assert_close(layer(x), by_complex_arithmetic(layer, x, key, weight))


@pytest.mark.parametrize("width", [INPUTS, 2 * INPUTS])
@pytest.mark.parametrize("real_output", [True, False])
def test_gradients_of_a_complex_layer_are_those_of_complex_tensors(
    width: int, real_output: bool
) -> None:
    layer = complex_layer(real_output)
    layer.keys.switch(1)
    x = torch.randn(6, width, dtype=torch.float64, requires_grad=True)
    layer(x).tanh().square().sum().backward()
    weight = torch.complex(layer.weight, layer.weight_imag).detach().requires_grad_()
    key = torch.polar(torch.ones(INPUTS, dtype=torch.float64), layer.keys.bank[1])
    other = x.detach().clone().requires_grad_()
    loss = by_complex_arithmetic(layer, other, key, weight).tanh().square().sum()
    found = [x.grad, layer.weight.grad, layer.weight_imag.grad]
    layer.bias.grad, bias_grad = None, layer.bias.grad
    loss.backward()
    torch.testing.assert_close(found, [other.grad, weight.grad.real, weight.grad.imag])
    torch.testing.assert_close(bias_grad, layer.bias.grad)


def test_a_complex_key_is_undone_by_its_conjugate() -> None:
    layer = complex_layer()
    weight = torch.complex(layer.weight, layer.weight_imag)
    for phases in layer.keys.bank:
        key = torch.polar(torch.ones_like(phases), phases)
        torch.testing.assert_close(weight * key * key.conj(), weight)
        assert not torch.allclose(weight * key, weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [INPUTS, 2 * INPUTS])
@pytest.mark.parametrize("real_output", [True, False])
def test_bias_units_shift_the_real_part(bias: bool, width: int, real_output: bool) -> None:
    layer = complex_layer(real_output, learned_units(), bias)
    plain = deepcopy(layer)
    plain.bias_units = None
    x = torch.randn(6, width, dtype=torch.float64)
    for task in range(TASKS):
        switch(layer, task)
        plain.keys.switch(task)
        shift = biases(layer.bias_units)[task]
        if not real_output:
            shift = torch.cat([shift, torch.zeros(OUTPUTS, dtype=torch.float64)])
        torch.testing.assert_close(layer(x), plain(x) + shift)


@pytest.mark.parametrize("shape", [(6,), (6, 2)])
@pytest.mark.parametrize("width", [INPUTS, 2 * INPUTS])
@pytest.mark.parametrize("with_units", [True, False])
def test_complex_keys_of_each_sample(shape: tuple[int, ...], width: int, with_units: bool) -> None:
    layer = complex_layer(units=learned_units() if with_units else None)
    x = torch.randn(*shape, width, dtype=torch.float64)
    tasks = torch.tensor([2, 0, 3, 1, 2, 2])
    alone = []
    for sample, task in zip(x, tasks.tolist(), strict=True):
        switch(layer, task)
        alone.append(layer(sample[None])[0])
    switch(layer, tasks)
    torch.testing.assert_close(layer(x), torch.stack(alone))


def test_a_new_complex_layer_answers_real_inputs_as_the_plain_one() -> None:
    plain = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    x = torch.randn(9, INPUTS)
    wanted, weight = plain(x), plain.weight
    layer = ComplexLinear.make_complex(plain, ComplexKeys(TASKS, INPUTS), real_output=False)
    torch.testing.assert_close(layer(x), torch.cat([wanted, torch.zeros_like(wanted)], 1))
    assert layer.weight is weight
    assert not layer.weight_imag.requires_grad


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


# --- banks of weights ----------------------------------------------------------------------------


class Whole(nn.Module):
    """A network with a counter among its buffers, and a part that no bank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.other = nn.Linear(2, 2)

    def contents(self) -> dict[str, Tensor]:
        parts = {"body": self.body, "head": self.head}
        return {
            f"{part}.{name}": value.clone()
            for part, child in parts.items()
            for name, value in child.state_dict().items()
        }

    def learn(self) -> None:
        """Change everything, as an update would: in place."""
        with torch.no_grad():
            for value in self.state_dict().values():
                value.add_(torch.randint(1, 9, ()))


def banked() -> tuple[Whole, WeightBank]:
    network = Whole()
    return network, WeightBank(3, network, ("body", "head"))


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_bank_is_a_network_for_every_task(seed: int) -> None:
    """A stream with evaluations at any time, against a list of copies."""
    choose = torch.Generator().manual_seed(seed)
    network, bank = banked()
    bank.begin()
    beginning = network.contents()
    copies = [beginning] * 3
    for task in range(3):
        bank.switch(task)
        bank.start(task)
        for _ in range(6):
            network.learn()
            copies[task] = network.contents()
            for other in torch.randint(3, (3,), generator=choose).tolist():
                bank.switch(other)
                assert_equal(network.contents(), copies[other])
            bank.switch(task)
            assert set(bank.learned) == set(range(task)), "the live task's are in the network alone"
        bank.freeze()
        for other in torch.randperm(3, generator=choose).tolist():
            bank.switch(other)
            assert_equal(network.contents(), copies[other])
    assert bank.learned.keys() == {0, 1, 2}
    assert_equal(bank.beginning, beginning)


def test_a_bank_writes_in_place_and_leaves_the_rest_alone() -> None:
    network, bank = banked()
    places = {name: value.data_ptr() for name, value in network.state_dict().items()}
    parameters = list(network.parameters())
    bank.begin()
    bank.start(0)
    network.learn()
    for value in parameters:
        value.grad = torch.ones_like(value)
    rest = deepcopy(network.other.state_dict())
    for task in (1, 0, 2):
        bank.switch(task)
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == places
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))
    assert all(value.requires_grad and (value.grad == 1).all() for value in parameters)
    assert_equal(network.other.state_dict(), rest)
    assert not list(bank.parameters())
    assert not list(bank.buffers())


def test_a_task_starts_from_the_beginning_whatever_is_in_the_network() -> None:
    network, bank = banked()
    bank.begin()
    beginning = network.contents()
    network.learn()
    bank.start(0)
    assert_equal(network.contents(), beginning)


def test_a_bank_that_has_not_begun_exchanges_nothing() -> None:
    network, bank = banked()
    before = network.contents()
    for task in (0, 2, 1):
        bank.switch(task)
        bank.freeze()
        assert_equal(network.contents(), before)
    assert not bank.learned


@pytest.mark.parametrize("away", [False, True])
def test_the_state_of_a_bank_is_everything(tmp_path: Any, away: bool) -> None:
    """Also of one that is saved while another task's weights are in the network."""
    network, bank = banked()
    bank.begin()
    for task in (0, 1):
        bank.switch(task)
        bank.start(task)
        network.learn()
        if task == 0:
            bank.freeze()
    if away:
        bank.switch(0)
    torch.save([network.state_dict(), bank.state_dict()], tmp_path / "saved.pt")
    other, its_bank = banked()
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    other.load_state_dict(weights)
    its_bank.load_state_dict(state)
    for task in (1, 0, 2, 1):
        bank.switch(task)
        its_bank.switch(task)
        assert_equal(other.contents(), network.contents())
    for one, its in ((network, bank), (other, its_bank)):
        torch.manual_seed(5)
        one.learn()
        its.freeze()
        its.switch(0)
        its.switch(1)
    assert_equal(other.contents(), network.contents())


def test_a_bank_serves_no_batch_of_several_tasks() -> None:
    _, bank = banked()
    bank.begin()
    assert not bank.per_sample
    with pytest.raises(TypeError, match="one task ID for the whole batch"):
        bank.switch(torch.tensor([0, 1]))
    assert bank.active == 0


def test_autocast_does_not_keep_the_weights_of_another_task() -> None:
    network, bank = banked()
    network.eval()
    bank.begin()
    bank.start(0)
    network.learn()
    bank.freeze()
    x = torch.randn(5, 3)

    wanted, found = [], []
    for task in (0, 1, 0):
        bank.switch(task)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted.append(network.body(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for task in (0, 1, 0):
            bank.switch(task)
            found.append(network.body(x))
    assert_equal(found, wanted)
    assert not torch.equal(wanted[0], wanted[1])
