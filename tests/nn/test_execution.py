"""Fused kernels, weights that are read past their layer, and what a batch's graph says of them."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import Function
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.gradients import sample_gradient_sums
from bpn_lightning.functional.segments import segment_gradients
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import execution
from bpn_lightning.nn.execution import check_layers_are_called, differentiable, graph_uses
from bpn_lightning.nn.layers import BiasUnits, SwitchableLinear, evaluation_mode
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ebll import EncoderBasedLifelongLearning
from bpn_lightning.strategies.imm import IncrementalMomentMatching
from bpn_lightning.strategies.lwf import LearningWithoutForgetting
from bpn_lightning.strategies.psp import ParameterSuperposition
from bpn_lightning.strategies.slnid import SLNID


def attached(backbone: nn.Module, *, keys: bool = True) -> ContinualModule:
    """A module on digits, every linear layer of which has random bias units, and keys."""
    stream = SplitDigits(num_tasks=3, seed=0)
    stream.setup()
    module = ContinualModule(backbone)
    module.attach(stream)
    for name in module.network.linear_layers():
        module.network.attach_bias_units(name, 2).bank.normal_()
        if keys:
            module.network.attach_keys(name, "binary").bank.random_(2).mul_(2).sub_(1)
    return module.eval()


def folded(plain: nn.Module, switchable: nn.Module, task: int) -> nn.Module:
    """A network without bias units and keys that computes what one with them should in a mode."""
    twin = deepcopy(plain)
    parts = dict(twin.named_modules())
    with torch.no_grad():
        for name, layer in switchable.named_modules():
            if isinstance(layer, SwitchableLinear):
                parts[name].weight *= layer.keys.bank[task]
                parts[name].bias += layer.bias_units.bank[task]
    return twin.eval()


# --- torch's fused transformer layers ------------------------------------------------------------


class Transformer(nn.Module):
    """An encoder over the rows of an image, of which the last two may be padding."""

    def __init__(self, padded: bool = False, layers: int = 2, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=padded)
        self.padded = padded

    def forward(self, images: Tensor) -> Tensor:
        rows = images.flatten(1).view(-1, 8, 8)
        mask = (torch.arange(8) > 5).expand(len(rows), 8) if self.padded else None
        return self.encoder(rows, src_key_padding_mask=mask)[:, :6].flatten(1)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "gelu"}, {"norm_first": True}, {"padded": True}], ids=str
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own
def test_encoders_use_bias_units_and_keys_in_evaluation(options: dict[str, Any]) -> None:
    """What torch's fused kernel makes of weights that bias units and keys are multiplied into."""
    plain = Transformer(**options)
    module = attached(deepcopy(plain))
    images = torch.randn(6, 1, 8, 8)
    tasks = torch.tensor([0, 2, 1, 1, 0, 2])
    with torch.no_grad():
        twins = [folded(plain, module.network.backbone, task) for task in range(3)]
        for task, twin in enumerate(twins):
            with module.task_mode(task):
                torch.testing.assert_close(
                    module.network.backbone(images), twin(images), rtol=1e-4, atol=1e-5
                )
        each = torch.stack([twins[t](images)[n] for n, t in enumerate(tasks)])
        with module.task_mode(tasks):
            torch.testing.assert_close(module.network.backbone(images), each, rtol=1e-4, atol=1e-5)
    check_layers_are_called(module, images)


def test_other_encoder_layers_keep_their_fused_kernel() -> None:
    module = ContinualModule(Transformer())
    stream = SplitDigits(num_tasks=2)
    stream.setup()
    module.attach(stream)
    module.network.attach_bias_units("backbone.encoder.layers.1.linear1", 2)
    first, second = module.network.backbone.encoder.layers  # type: ignore[union-attr]
    assert first.activation_relu_or_gelu == 1
    assert second.activation_relu_or_gelu == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_run_is_scored_as_without_the_fused_kernel(fit: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
    module, _ = fit([BeneficialPerturbation(4)], backbone=Transformer(layers=1), stream=stream)
    scored = module.accuracy_matrix.accuracy[-1]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        assert torch.equal(module.evaluate(), scored)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- weights that are read past their layer ------------------------------------------------------


def linear(**parts: Any) -> dict[str, Any]:
    return {"flat": nn.Flatten(), "fc": nn.Linear(64, 64), **parts}


def in_mode(training: bool) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.flat(x)
        return F.linear(x, m.fc.weight, m.fc.bias) if m.training == training else m.fc(x)

    return forward


def gradient_free(m: Any, x: Tensor) -> Tensor:
    """As torch's own fused paths: only where nothing is to be differentiated."""
    x = m.flat(x)
    return m.fc(x) if torch.is_grad_enabled() else F.linear(x, m.fc.weight, m.fc.bias)


READ: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Function(lambda m, x: F.linear(m.flat(x), m.fc.weight), **linear()),
    "function too": lambda: Function(
        lambda m, x: F.linear(m.fc(m.flat(x)), m.fc.weight), **linear()
    ),
    "transposed": lambda: Function(lambda m, x: m.fc(m.flat(x)) @ m.fc.weight.T, **linear()),
    "bias": lambda: Function(lambda m, x: m.fc(m.flat(x)) + m.fc.bias, **linear()),
    "in evaluation": lambda: Function(in_mode(False), **linear()),
    "in training": lambda: Function(in_mode(True), **linear()),
    "without gradients": lambda: Function(gradient_free, **linear()),
    "parametrized": lambda: Function(
        lambda m, x: F.linear(m.flat(x), m.fc.weight),
        **linear(fc=parametrizations.weight_norm(nn.Linear(64, 64))),
    ),
    "a choice": lambda: Function(
        lambda m, x: (
            torch.distributions.Normal(m.fc(m.flat(x)), m.fc.weight.norm(), validate_args=True).mean
        ),
        **linear(),
    ),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("strategy", [BeneficialPerturbation, ParameterSuperposition])
def test_reading_a_switchable_layers_weights_is_refused(fit: Any, name: str, strategy: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"reads the weights of backbone\.fc without a call"
    ):
        fit([strategy()], backbone=READ[name]())


def legacy_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(64, 64))


def tied() -> nn.Module:
    """Two layers and a function share a weight; each calls its own."""
    network = Function(
        lambda m, x: F.linear(m.other(m.fc(m.flat(x))), m.weight), **linear(other=nn.Linear(64, 64))
    )
    network.weight = network.other.weight = network.fc.weight
    return network


CALLED: dict[str, Callable[[], nn.Module]] = {
    "tied": tied,
    "twice": lambda: Function(lambda m, x: m.fc(m.fc(m.flat(x))), **linear()),
    "forward": lambda: Function(lambda m, x: m.fc.forward(m.flat(x)), **linear()),
    "only its shape": lambda: Function(
        lambda m, x: m.fc(m.flat(x)) + torch.zeros_like(m.fc.weight)[0], **linear()
    ),
    "unused": lambda: Function(lambda m, x: m.fc(m.flat(x)), **linear(aux=nn.Linear(3, 4))),
    "checkpoint": lambda: Function(
        lambda m, x: checkpoint(m.fc, m.flat(x), use_reentrant=False), **linear()
    ),
    "functional call": lambda: Function(
        lambda m, x: torch.func.functional_call(m.fc, dict(m.fc.named_parameters()), (m.flat(x),)),
        **linear(),
    ),
    "weight_norm": lambda: Function(
        lambda m, x: m.fc(m.flat(x)), **linear(fc=parametrizations.weight_norm(nn.Linear(64, 64)))
    ),
    "spectral_norm": lambda: Function(
        lambda m, x: m.fc(m.flat(x)), **linear(fc=parametrizations.spectral_norm(nn.Linear(64, 64)))
    ),
    "legacy weight_norm": lambda: Function(
        lambda m, x: m.fc(m.flat(x)), **linear(fc=legacy_weight_norm())
    ),
    "attention": lambda: Function(
        lambda m, x: m.attention(*3 * (m.fc(m.flat(x)).view(-1, 8, 8),))[0].flatten(1),
        **linear(attention=nn.MultiheadAttention(8, 2, batch_first=True)),
    ),
    "decoder": lambda: Function(
        lambda m, x: m.decoder(*2 * (m.fc(m.flat(x)).view(-1, 8, 8),)).flatten(1),
        **linear(decoder=nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)),
    ),
    "lstm": lambda: Function(
        lambda m, x: m.lstm(m.fc(m.flat(x)).view(-1, 8, 8))[0].flatten(1),
        **linear(lstm=nn.LSTM(8, 8, batch_first=True)),
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_calling_a_switchable_layer_in_any_way_is_fine(name: str) -> None:
    module = attached(CALLED[name]())
    images = torch.randn(2, 1, 8, 8)
    before = {n: (id(p), p.detach().clone()) for n, p in module.named_parameters()}
    kinds = [type(part) for part in module.modules()]
    check_layers_are_called(module, images)
    assert [type(part) for part in module.modules()] == kinds
    for n, p in module.named_parameters():
        assert id(p) == before[n][0]
        assert torch.equal(p, before[n][1])


@pytest.mark.parametrize("strategy", [BeneficialPerturbation, ParameterSuperposition])
def test_projections_of_attention_are_no_layers_to_choose(fit: Any, strategy: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"but got 'backbone\.attention\.out_proj'"):
        fit([strategy(layers=["backbone.attention.out_proj"])], backbone=CALLED["attention"]())


def test_the_check_leaves_everything_as_it_was() -> None:
    backbone = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8)
    )
    module = attached(backbone)
    backbone[3].train()
    flags = [part.training for part in module.modules()]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    images, state = torch.randn(4, 1, 8, 8), torch.get_rng_state()
    check_layers_are_called(module, images)
    assert [part.training for part in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())


def test_a_forward_that_fails_in_training_mode_is_refused_before_training(fit: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.training:
            raise ValueError("no such luck")
        return m.fc(m.flat(x))

    with pytest.raises(
        ConfigurationError, match="in training mode, but its forward pass raised ValueError"
    ):
        fit([BeneficialPerturbation()], backbone=Function(forward, **linear()))


# --- parametrized layers -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_get_bias_units_and_keys(norm: Any) -> None:
    plain = nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 5))).eval()
    module = attached(deepcopy(plain))
    layer = module.network.backbone[1]  # type: ignore[index]
    x = torch.randn(3, 64)
    with module.task_mode(1):
        expected = plain(x * layer.keys.bank[1]) + layer.bias_units.bank[1]
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(deepcopy(layer)(x), expected)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parametrizations.parameters())


def test_complex_keys_on_a_parametrized_layer_are_refused(fit: Any) -> None:
    backbone = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 5)))
    with pytest.raises(
        ConfigurationError, match=r"layer backbone\.1 makes its weights from others"
    ):
        fit([ParameterSuperposition("complex")], backbone=backbone)


def test_key_input_names_a_first_layer_that_is_parametrized(fit: Any) -> None:
    backbone = nn.Sequential(
        nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 5, bias=False)), nn.Linear(5, 5)
    )
    strategy = ParameterSuperposition(key_input=False)
    fit([strategy], backbone=backbone)
    assert set(strategy.keys) == {"backbone.2", "head"}


def test_drop_transfer_compares_a_parametrized_layer_with_its_past(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = []

    def noted(output: Tensor, before: Tensor, rate: float) -> Tensor:
        pairs.append((output.detach(), before.detach()))
        return output

    monkeypatch.setattr("bpn_lightning.strategies.imm.drop_transfer", noted)
    backbone = nn.Sequential(
        nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 8, bias=False)), nn.ReLU()
    )
    fit([IncrementalMomentMatching(strength=0.0, drop=0.5)], backbone=backbone, mask="task")
    first, last = pairs[0], pairs[-1]
    assert torch.equal(*first)  # nothing has moved yet
    assert not torch.allclose(*last)


# --- the graph of a batch ------------------------------------------------------------------------


def test_uses_of_parameters_are_counted() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    uses = graph_uses((a * b + a.exp()).sum())
    counts = [uses[torch.autograd.graph.get_gradient_edge(p).node] for p in (a, b, unused)]
    assert counts == [2, 1, 0]
    assert not graph_uses(torch.ones(2))


def only_in_batches(m: Any, x: Tensor) -> Tensor:
    """What the trial's one sample does not show: a batch reads the weight once more, or instead."""
    x = torch.tanh(m.a(x))
    return m.out(torch.tanh(m.b(x)) + (F.linear(x, m.b.weight) if len(x) > 1 else 0))


def instead_in_batches(m: Any, x: Tensor) -> Tensor:
    x = torch.tanh(m.a(x))
    return m.out(torch.tanh(m.b(x) if len(x) == 1 else F.linear(x, m.b.weight, m.b.bias)))


@pytest.mark.parametrize("forward", [only_in_batches, instead_in_batches])
def test_every_batch_is_compared_with_what_was_recorded(forward: Any) -> None:
    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "out": nn.Linear(5, 3)}
    network = Function(forward, **parts).double()
    parameters = dict(network.named_parameters())
    inputs, labels = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])

    losses = F.cross_entropy(network(inputs), labels, reduction="none")
    each = [
        torch.autograd.grad(one, list(parameters.values()), retain_graph=True) for one in losses
    ]

    found = segment_gradients(
        network,
        parameters,
        inputs,
        lambda z, part: F.cross_entropy(z, labels[part], reduction="none"),
        [4, 2],
    )
    rows = torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in each])
    torch.testing.assert_close(found, torch.stack([rows[:4].mean(0), rows[4:].mean(0)]))


# --- cuDNN ---------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Notes at each forward whether cuDNN may be used."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4, batch_first=True)
        self.relu = nn.ReLU()
        self.allowed: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.allowed.append(torch.backends.cudnn.enabled)
        return self.relu(self.lstm(images.flatten(1).view(-1, 8, 8))[0][:, -1])


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the parameters of every part lay on a GPU."""
    monkeypatch.setattr(execution, "_on_cuda", lambda part: True)


@pytest.mark.usefixtures("on_gpu")
def test_importances_of_a_recurrent_network_do_without_cudnn() -> None:
    network = nn.Sequential(Recurrent(), nn.Linear(4, 3)).double()
    parameters = dict(network.named_parameters())
    inputs = torch.randn(4, 1, 8, 8).double()
    labels = torch.tensor([0, 1, 2, 0])
    with evaluation_mode(network):
        found = sample_gradient_sums(
            network,
            parameters,
            inputs,
            lambda logits: (labels[: len(logits), None], torch.ones(len(logits), 1).double()),
            slice(0, 3),
        )
        assert network[0].allowed
        assert not any(network[0].allowed)
        assert torch.backends.cudnn.enabled
        wanted = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x, y in zip(inputs.split(1), labels.split(1), strict=True):
            loss = F.cross_entropy(network(x), y)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for total, gradient in zip(wanted.values(), gradients, strict=True):
                total += gradient.square()
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("on_gpu")
def test_cudnn_comes_back_after_an_error_and_is_left_alone_without_recurrent_layers() -> None:
    def fail() -> None:
        with differentiable(nn.LSTM(2, 2)):
            assert not torch.backends.cudnn.enabled
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.backends.cudnn.enabled
    with differentiable(nn.Linear(2, 2)):
        assert torch.backends.cudnn.enabled


WARNS_OF_SPEED = "ignore:There is a performance drop:UserWarning"  # torch.func's, of the CPU's LSTM


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.filterwarnings(WARNS_OF_SPEED)
def test_units_importances_do_without_cudnn_too(fit: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=256, seed=0)
    backbone, strategy = Recurrent(), SLNID(layers=["backbone.relu"])
    module, _ = fit([strategy], backbone=backbone, stream=stream)
    assert True in backbone.allowed  # training and scores
    backbone.allowed.clear()
    strategy._unit_importance(module.host, module.tasks[0])
    assert backbone.allowed
    assert not any(backbone.allowed)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "strategy",
    [
        LearningWithoutForgetting(warm_up_epochs=1),
        EncoderBasedLifelongLearning(layer="backbone.1", code_size=2, autoencoder_epochs=1),
    ],
)
def test_phases_that_learn_in_evaluation_mode_do_without_cudnn(fit: Any, strategy: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=256, seed=0)
    recurrent = Recurrent()
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), recurrent)
    fit([strategy], backbone=backbone, stream=stream, mask="task")
    assert set(recurrent.allowed) == {True, False}


def test_a_dry_forward_leaves_buffers_as_a_graph_has_saved_them() -> None:
    """The first batch of several tasks may come between a forward and its backward."""
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    SwitchableLinear.convert(backbone[0], BiasUnits(2, 3, 4))
    output = backbone(torch.randn(3, 4))
    execution.mixing_samples(backbone, torch.randn(3, 4))
    output.sum().backward()  # raises if running statistics were written, even with the same values
