"""Biases per task on every kind of layer, against torch's own layers with other biases, and by hand."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bpn_lightning.nn.layers import BiasUnits, KernelKeys
from bpn_lightning.nn.switching import (
    KINDS,
    add_parts,
    is_switchable,
    kind_of,
    number_of_biases,
    plain_class,
)

TASKS, BATCH = 3, 4
EACH = torch.tensor([2, 0, 1, 2])


def switched(layer: nn.Module) -> tuple[Any, BiasUnits]:
    """A copy with random biases for every task, and these."""
    torch.manual_seed(3)
    layer = deepcopy(layer)
    units = BiasUnits(TASKS, 2, number_of_biases(layer)).double()
    units.bank.normal_()
    add_parts(layer, bias_units=units)
    return layer, units


def by_task(run: Callable[[], Any], units: BiasUnits) -> tuple[list[Any], Any]:
    """What a layer makes of the same inputs in each task's mode, and with one task per sample."""
    alone = []
    for task in range(TASKS):
        units.switch(task)
        alone.append(run())
    units.switch(EACH)
    return alone, run()


# --- layers that add a bias to each channel or feature ------------------------------------------

IMAGES, SIGNALS, VOLUMES = (4, 6, 5, 5), (4, 6, 5), (4, 6, 3, 4, 4)
SHIFTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # the layer, the shape of its inputs, and which dimension of its outputs has biases
    "linear": (lambda: nn.Linear(5, 3), IMAGES, -1),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), SIGNALS, 1),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), IMAGES, 1),
    "conv2d without a bias": (lambda: nn.Conv2d(6, 4, 3, bias=False), IMAGES, 1),
    "conv2d, padded by reflection": (
        lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
        IMAGES,
        1,
    ),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), VOLUMES, 1),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 4, 3), SIGNALS, 1),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 4, 3, bias=False), IMAGES, 1),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 4, 2), VOLUMES, 1),
    "batch norm": (lambda: nn.BatchNorm2d(6), IMAGES, 1),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), (4, 6), 1),
    "group norm": (lambda: nn.GroupNorm(2, 6), IMAGES, 1),
    "instance norm": (lambda: nn.InstanceNorm2d(6), IMAGES, 1),
    "layer norm": (lambda: nn.LayerNorm(5), IMAGES, -1),
    "rms norm": (lambda: nn.RMSNorm(5), IMAGES, -1),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(6, 4, 3)), IMAGES, 1),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SHIFTED)
def test_a_layer_adds_its_tasks_biases(name: str, training: bool) -> None:
    make, shape, dimension = SHIFTED[name]
    plain = make().double().train(training)
    layer, units = switched(plain)
    x = torch.randn(shape, dtype=torch.float64)
    wanted = plain(x)
    alone, mixed = by_task(lambda: layer(x), units)
    for task in range(TASKS):
        shift = units.bank[task].view(
            [-1 if d == dimension % wanted.dim() else 1 for d in range(wanted.dim())]
        )
        torch.testing.assert_close(alone[task], wanted + shift)
    torch.testing.assert_close(mixed, torch.stack([alone[t][n] for n, t in enumerate(EACH)]))


def test_a_convolutions_biases_join_its_own() -> None:
    """Bit for bit what torch computes with the sum: nothing is added to the whole output."""
    plain = nn.Conv2d(6, 4, 3)
    layer, units = switched(plain)
    units.float().switch(1)
    with torch.no_grad():
        plain.bias += units.bank[1]
    x = torch.randn(IMAGES)
    assert torch.equal(layer(x), plain(x))


def test_norms_equal_torchs_functions_with_the_sum_of_biases() -> None:
    plain = nn.LayerNorm((5, 5)).double()
    nn.init.normal_(plain.bias)
    layer, units = switched(plain)
    x = torch.randn(IMAGES).double()
    alone, mixed = by_task(lambda: layer(x), units)
    for task in range(TASKS):
        total = plain.bias + units.bank[task].view(5, 5)
        torch.testing.assert_close(alone[task], F.layer_norm(x, (5, 5), plain.weight, total))
    torch.testing.assert_close(mixed, torch.stack([alone[t][n] for n, t in enumerate(EACH)]))


def test_single_samples_without_a_batch() -> None:
    for plain, shape in (
        (nn.ConvTranspose1d(5, 5, 1), (5, 5)),
        (nn.InstanceNorm1d(5), (5, 5)),
        (nn.Conv1d(5, 5, 1), (5, 5)),
    ):
        layer, units = switched(plain.double())
        x = torch.randn(shape).double()
        torch.testing.assert_close(layer(x), plain(x) + units.bank[0][:, None])


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings(make: Any) -> None:
    plain = make(9, 6).double()
    layer, units = switched(plain)
    tokens = torch.randint(9, (BATCH, 5))
    alone, mixed = by_task(lambda: layer(tokens), units)
    for task in range(TASKS):
        torch.testing.assert_close(alone[task], plain(tokens) + units.bank[task])
    torch.testing.assert_close(mixed, torch.stack([alone[t][n] for n, t in enumerate(EACH)]))


# --- attention -----------------------------------------------------------------------------------

ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "without biases": ({"bias": False}, {"need_weights": False}),
    "separate": ({"kdim": 5, "vdim": 7}, {}),
    "more keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"average_attn_weights": False}),
    "masked": ({}, {"attn_mask": torch.ones(3, 3).triu(1).bool(), "need_weights": False}),
    "causal": (
        {},
        {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True, "need_weights": False},
    ),
    "padded": ({}, {"key_padding_mask": torch.arange(3).expand(BATCH, 3) > 1}),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_torchs_with_the_sums_of_biases(name: str, batch_first: bool) -> None:
    options, call = ATTENTION[name]
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).double()
    layer, units = switched(plain)
    assert units.bank.shape == (TASKS, 32)
    shape = (BATCH, 3) if batch_first else (3, BATCH)
    x = torch.randn(*shape, 8).double()
    inputs = (x, x, x)
    if name == "separate":
        inputs = (x, torch.randn(*shape, 5).double(), torch.randn(*shape, 7).double())
    alone, mixed = by_task(lambda: layer(*inputs, **call), units)
    for task in range(TASKS):
        twin = deepcopy(plain)
        into, out = units.bank[task].split([24, 8])
        zeros = torch.zeros(24).double(), torch.zeros(8).double()
        own = (twin.in_proj_bias, twin.out_proj.bias) if plain.in_proj_bias is not None else zeros
        twin.in_proj_bias = nn.Parameter(own[0] + into)
        twin.out_proj.bias = nn.Parameter(own[1] + out)
        for found, wanted in zip(alone[task], twin(*inputs, **call), strict=True):
            torch.testing.assert_close(found, wanted)
    for part, found in enumerate(mixed):
        if found is None:
            continue
        dimension = 0 if batch_first or part else 1
        each = [alone[t][part].select(dimension, n) for n, t in enumerate(EACH)]
        torch.testing.assert_close(found, torch.stack(each, dimension))


# --- recurrent layers ----------------------------------------------------------------------------

RECURRENT: dict[str, Callable[[], Any]] = {
    "rnn": lambda: nn.RNN(5, 3, batch_first=True),
    "gru": lambda: nn.GRU(5, 3, num_layers=2),
    "lstm": lambda: nn.LSTM(5, 3, batch_first=True, bidirectional=True, num_layers=2),
    "projected": lambda: nn.LSTM(5, 4, proj_size=2, bidirectional=True),
}


def hidden(found: Any) -> Tensor:
    state = found[1]
    last: Tensor = state[0] if isinstance(state, tuple) else state
    return last


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_outputs_of_recurrent_layers_and_their_last_states(name: str, packed: bool) -> None:
    plain = RECURRENT[name]().double()
    layer, units = switched(plain)
    first = plain.batch_first
    x = torch.randn(BATCH, 6, 5).double()
    x = x if first else x.transpose(0, 1)
    inputs: Any = x
    if packed:
        inputs = pack_padded_sequence(x, [3, 6, 1, 6], batch_first=first, enforce_sorted=False)

    def run(part: Any = layer) -> Any:
        found = part(inputs)
        if packed:
            return pad_packed_sequence(found[0], batch_first=first)[0], found[1]
        return found

    wanted = run(plain)
    alone, mixed = by_task(run, units)
    real = wanted[0] != 0  # not the padding
    number = 2 if plain.bidirectional else 1
    for task in range(TASKS):
        torch.testing.assert_close(alone[task][0], wanted[0] + real * units.bank[task])
        last = units.bank[task].view(number, 1, -1).expand_as(hidden(wanted)[-number:])
        torch.testing.assert_close(hidden(alone[task])[-number:], hidden(wanted)[-number:] + last)
        assert torch.equal(hidden(alone[task])[:-number], hidden(wanted)[:-number])
    for part, dimension in ((mixed[0], 0 if first else 1), (hidden(mixed), 1)):
        values = [one[0] if part is mixed[0] else hidden(one) for one in alone]
        each = [values[t].select(dimension, n) for n, t in enumerate(EACH)]
        torch.testing.assert_close(part, torch.stack(each, dimension))


def test_the_last_state_of_a_recurrent_layer_is_its_last_output() -> None:
    layer, units = switched(nn.GRU(5, 3, batch_first=True).double())
    units.switch(EACH)
    outputs, states = layer(torch.randn(BATCH, 6, 5).double())
    assert torch.equal(outputs[:, -1], states[-1])


# --- what all of them have in common ------------------------------------------------------------


def made(kind: type[nn.Module]) -> nn.Module:
    if kind in (nn.Embedding, nn.EmbeddingBag, nn.Linear, nn.GroupNorm, nn.MultiheadAttention):
        return kind(4, 4)
    if kind is nn.Bilinear:
        return kind(4, 4, 4)
    if issubclass(kind, nn.RNNBase):
        return kind(4, 4)
    if kind.__name__.startswith("Conv"):
        return kind(4, 4, 1)
    return kind(4)


@pytest.mark.parametrize("kind", KINDS)
def test_switching_changes_nothing_but_the_class(kind: type[nn.Module]) -> None:
    layer = made(kind)
    before, parameters = plain_class(layer), dict(layer.named_parameters())
    assert not is_switchable(layer)
    add_parts(layer, bias_units=BiasUnits(TASKS, 2, number_of_biases(layer)))
    assert is_switchable(layer)
    assert plain_class(layer) is before is kind
    assert isinstance(layer, kind)
    assert kind_of(layer) is KINDS[kind]
    after = dict(layer.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert set(after) - set(parameters) == {"bias_units.M", "bias_units.W"}
    for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copy) is type(layer)
        assert all(torch.equal(copy.state_dict()[n], p) for n, p in after.items())


def test_layers_of_other_classes_are_not_known() -> None:
    class Own(nn.Conv2d):
        """May compute anything."""

    layer = Own(1, 1, 1)
    parametrized = parametrizations.weight_norm(Own(1, 1, 1))
    out_proj = nn.MultiheadAttention(4, 2).out_proj  # attention reads its weights itself
    for part in (layer, parametrized, out_proj, nn.LSTMCell(2, 2), nn.ReLU()):
        assert kind_of(part) is None


def test_layers_that_are_parametrized_before_or_after() -> None:
    first = parametrizations.weight_norm(nn.Conv2d(2, 3, 1))
    add_parts(first, bias_units=BiasUnits(TASKS, 2, 3))
    then = nn.Conv2d(2, 3, 1)
    add_parts(then, bias_units=BiasUnits(TASKS, 2, 3))
    parametrizations.weight_norm(then)
    for layer in (first, then, deepcopy(first)):
        assert plain_class(layer) is nn.Conv2d
        with torch.no_grad():
            layer.bias_units.bank.fill_(2)
            bare = F.conv2d(torch.ones(1, 2, 1, 1), layer.weight, layer.bias)
            torch.testing.assert_close(layer(torch.ones(1, 2, 1, 1)), bare + 2)


def test_tied_weights_have_their_own_biases() -> None:
    first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    for layer in network:
        units = BiasUnits(TASKS, 2, 2)
        units.bank.normal_()
        add_parts(layer, bias_units=units)
    assert first.weight is second.weight
    assert len([n for n, _ in network.named_parameters() if n.endswith("weight")]) == 1
    x = torch.randn(BATCH, 2, 3, 3)
    wanted = x
    for layer in network:
        bias = layer.bias + layer.bias_units.bank[0]  # type: ignore[union-attr,index,operator]
        wanted = F.conv2d(wanted, first.weight, bias)
    torch.testing.assert_close(network(x), wanted)


@pytest.mark.parametrize("keys_first", [True, False])
def test_a_convolution_with_keys_and_biases(keys_first: bool) -> None:
    plain = nn.Conv3d(4, 6, 2, groups=2).double()
    keys = KernelKeys(TASKS, 4 * 8)
    keys.bank.random_(2).mul_(2).sub_(1)
    layer, units = deepcopy(plain), BiasUnits(TASKS, 2, 6).double()
    units.bank.normal_()
    parts: list[dict[str, Any]] = [{"keys": keys}, {"bias_units": units}]
    for part in parts[:: 1 if keys_first else -1]:
        add_parts(layer, **part)
    x = torch.randn(BATCH, 4, 3, 3, 3).double()
    for task in range(TASKS):
        keys.switch(task)
        units.switch(task)
        signs = (
            keys.bank[task].view(2, 1, 2, 2, 2, 2).expand(2, 3, 2, 2, 2, 2).reshape(6, 2, 2, 2, 2)
        )
        wanted = F.conv3d(x, plain.weight * signs, plain.bias + units.bank[task], groups=2)
        torch.testing.assert_close(layer(x), wanted)
