"""The Fisher information against closed forms in numpy and a batch-of-one loop of autograd."""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from bpn_lightning import importance
from bpn_lightning.backbones import MLP, torchvision_backbone
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import DataError
from bpn_lightning.importance import fisher_diagonal, squared_gradient_sums
from bpn_lightning.module import ContinualModule
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.beneficial import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.tasks import Batch

MODES = ("empirical", "sampled", "exact", "predicted")
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]


def every_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """All labels with weights of their own: whatever a mode may ask for."""
    labels = torch.arange(logits.shape[1]).expand(logits.shape)
    return labels, logits.softmax(1) * (1 + labels)


def one_by_one(
    module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor, choose: Choose, columns: slice
) -> dict[str, Tensor]:
    """The definition: one sample, one label, one backward at a time."""
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for sample in inputs.split(1):
        logits = module(sample)[:, columns]
        labels, weights = choose(logits.detach())
        for label, weight in zip(labels[0], weights[0], strict=True):
            loss = -logits.log_softmax(1)[0, label]
            gradients = torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += weight * gradient**2
    return sums


# --- softmax regression, in closed form ----------------------------------------------------------


def made(module: nn.Module | None = None, mask: Any = "all", **stream: Any) -> ContinualModule:
    """A module in double precision on the digits, three tasks, with weights that are not small."""
    data = SplitDigits(**{"num_tasks": 3} | stream)
    data.setup()
    host = ContinualModule(module or nn.Flatten(), mask=mask)
    host.attach(data)
    host.double()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return host


def shared(host: ContinualModule) -> dict[str, nn.Parameter]:
    return host.shared_parameters(include_head=True)


def in_numpy(host: ContinualModule, task: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, softmax and one-hot labels of a task, (samples, ...) each."""
    batches = list(host.batches(task, "train"))
    x = torch.cat([batch.inputs for batch in batches]).flatten(1).double().numpy()
    y = torch.cat([batch.targets for batch in batches]).numpy()
    assert host.head is not None
    logits = x @ host.head.weight.detach().numpy().T + host.head.bias.detach().numpy()
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return x, exponentials / exponentials.sum(1, keepdims=True), np.eye(logits.shape[1])[y]


@pytest.mark.parametrize("mode", ["empirical", "exact", "predicted"])
@pytest.mark.parametrize("task", [0, 2])
def test_softmax_regression_has_a_closed_form(mode: Any, task: int) -> None:
    host = made()
    x, p, y = in_numpy(host, task)
    residual = {
        "empirical": (p - y) ** 2,
        "exact": p * (1 - p),  # the expectation of (p - y)^2 over y ~ p
        "predicted": (p - np.eye(p.shape[1])[p.argmax(1)]) ** 2,
    }[mode]
    fisher = fisher_diagonal(host, task, shared(host), mode)
    assert set(fisher) == {"head.weight", "head.bias"}
    np.testing.assert_allclose(fisher["head.weight"], residual.T @ x**2 / len(x), rtol=1e-6)
    np.testing.assert_allclose(fisher["head.bias"], residual.mean(0), rtol=1e-6)


def test_drawn_labels_have_the_exact_expectation() -> None:
    """Five standard errors, which are known too: a label is k with probability p_k."""
    host, draws = made(classes_per_task=1), 150
    _, p, _ = in_numpy(host, 1)
    drawn = [
        fisher_diagonal(host, 1, shared(host), "sampled", seeded_generator(draw))["head.bias"]
        for draw in range(draws)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    variance = (p * (1 - p) * ((1 - p) ** 2 - p**2) ** 2).mean(0) / len(p) / draws
    error = torch.stack(drawn).mean(0).numpy() - (p * (1 - p)).mean(0)
    assert (np.abs(error) < 5 * np.sqrt(variance)).all()
    again = fisher_diagonal(host, 1, shared(host), "sampled", seeded_generator(0))
    assert torch.equal(again["head.bias"], drawn[0])


def test_trace_of_the_biases_is_what_is_left_of_certainty() -> None:
    """Sum of p (1 - p) = 1 - |p|^2, for any network."""
    host = made(MLP([12, 9]))
    fisher = fisher_diagonal(host, 1, shared(host), "exact")
    with torch.no_grad():
        inputs = torch.cat([batch.inputs for batch in host.batches(1, "train")])
        squares = host(inputs).softmax(1).square().sum(1)
    torch.testing.assert_close(fisher["head.bias"].sum(), 1 - squares.mean())


# --- what must not matter ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["empirical", "exact", "predicted"])
@pytest.mark.parametrize("size", [1, 7, 96, 1000])
def test_batch_size_is_irrelevant(mode: Any, size: int) -> None:
    host = made(MLP([6]))
    whole = fisher_diagonal(host, 0, shared(host), mode)
    host.stream.eval_batch_size = size
    torch.testing.assert_close(fisher_diagonal(host, 0, shared(host), mode), whole)


@pytest.mark.parametrize("mode", ["empirical", "exact", "predicted"])
def test_order_and_copies_of_samples_are_irrelevant(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = made(MLP([6]))
    whole = fisher_diagonal(host, 0, shared(host), mode)
    (batch,) = host.batches(0, "train")
    for indices in (torch.randperm(len(batch.targets)), torch.arange(len(batch.targets)).repeat(3)):
        changed = batch._replace(inputs=batch.inputs[indices], targets=batch.targets[indices])
        monkeypatch.setattr(host, "batches", lambda *_, changed=changed: iter([changed]))
        torch.testing.assert_close(fisher_diagonal(host, 0, shared(host), mode), whole)


def test_squares_samples_and_not_their_mean() -> None:
    """The usual mistake, squaring a batch's gradient, is far off: more than half."""
    host = made(MLP([6]))
    fisher = fisher_diagonal(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    loss = F.cross_entropy(host(batch.inputs), batch.targets)
    (gradient,) = torch.autograd.grad(loss, [host.head.weight])
    assert gradient.square().sum() < 0.5 * fisher["head.weight"].sum()


@pytest.mark.parametrize("chunk", [1, 50, 2**24])
@pytest.mark.parametrize("name", ["convolutions", "linear on places", "own parameter"])
def test_how_much_is_held_at_a_time_is_irrelevant(
    chunk: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "CHUNK", chunk)
    compare(*NETWORKS[name]())


# --- networks against the loop -------------------------------------------------------------------


class Function(nn.Module):
    """A network whose forward is a function of its parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


class OwnLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight**3, self.bias)


def tied() -> nn.Module:
    network = Function(
        lambda m, x: m.out(m.b(torch.tanh(m.a(x)))),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        out=nn.Linear(4, 3),
    )
    network.b.weight = network.a.weight
    return network


def residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.norm1(m.conv1(x)), inplace=True)
        h = m.norm2(m.conv2(h))
        h += x  # as in torchvision's ResNet
        return m.out(F.relu(h, inplace=True).mean((2, 3)))

    return Function(
        forward,
        conv1=nn.Conv2d(2, 2, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(2),
        conv2=nn.Conv2d(2, 2, 3, padding=1),
        norm2=nn.BatchNorm2d(2),
        out=nn.Linear(2, 3),
    )


def sequence(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


def folded() -> nn.Module:
    """Every place of every sample is a row of its own, as in many transformers."""
    return Function(
        lambda m, x: m.out(torch.tanh(m.a(x.reshape(-1, 4))).reshape(len(x), -1)),
        a=nn.Linear(4, 5),
        out=nn.Linear(15, 3),
    )


def places_first() -> nn.Module:
    """As in recurrent networks; here there are as many places as samples."""
    return Function(
        lambda m, x: m.out(torch.tanh(m.a(x.transpose(0, 1))).transpose(0, 1).flatten(1)),
        a=nn.Linear(4, 5),
        out=nn.Linear(15, 3),
    )


def two_layers(first: nn.Module | None = None, rows: tuple[int, ...] = (6, 4)) -> Any:
    return sequence(first or nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), rows


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = m.a(x)
    return m.out(torch.tanh(features))


def pruned() -> nn.Module:
    layer = nn.Linear(4, 5)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


def doubled() -> nn.Module:
    layer = nn.Linear(4, 5)
    layer.register_forward_hook(lambda layer, inputs, output: 2 * output)
    return layer


IMAGES = (5, 2, 6, 6)
NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": lambda: (sequence(nn.Linear(4, 6), nn.ReLU(), *two_layers(nn.Linear(6, 5))[0]), (6, 4)),
    "no biases": lambda: (
        sequence(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        (6, 4),
    ),
    "convolutions": lambda: (
        sequence(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * 2 * 2, 3),
        ),
        IMAGES,
    ),
    "depthwise": lambda: (
        sequence(nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(64, 3)),
        IMAGES,
    ),
    "circular": lambda: (
        sequence(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.Flatten(),
            nn.Linear(108, 3),
        ),
        IMAGES,
    ),
    "same padding": lambda: (
        sequence(nn.Conv2d(2, 3, 3, padding="same"), nn.Flatten(), nn.Linear(108, 3)),
        IMAGES,
    ),
    "in place": lambda: (
        sequence(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3)),
        IMAGES,
    ),
    "residual": lambda: (residual(), IMAGES),
    "norm of sequences": lambda: (
        sequence(nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 3)),
        (6, 4, 3),
    ),
    "norm without weights": lambda: (
        sequence(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)),
        (6, 4),
    ),
    "linear on places": lambda: (
        sequence(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        (6, 3, 4),
    ),
    "linear on grids": lambda: (
        sequence(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)),
        (6, 3, 2, 4),
    ),
    "own parameter": lambda: (
        Function(
            lambda m, x: m.out(m.a(x) * m.gain + (x @ m.mix).tanh()),
            a=nn.Linear(4, 5),
            out=nn.Linear(5, 3),
            gain=nn.Parameter(torch.randn(5)),
            mix=nn.Parameter(torch.randn(4, 5)),
        ),
        (6, 4),
    ),
    "own subclass": lambda: two_layers(OwnLinear(4, 5)),
    "other layers": lambda: (
        sequence(
            nn.Conv1d(4, 6, 2),
            nn.GroupNorm(2, 6),
            nn.Flatten(),
            nn.LayerNorm(12),
            nn.Linear(12, 3),
        ),
        (6, 4, 3),
    ),
    "attention": lambda: (
        Function(
            lambda m, x: m.out(m.attend(x, x, x, need_weights=False)[0].flatten(1)),
            attend=nn.MultiheadAttention(4, 2, batch_first=True),
            out=nn.Linear(12, 3),
        ),
        (5, 3, 4),
    ),
    "tied": lambda: (tied(), (6, 4)),
    "runs twice": lambda: (
        Function(
            lambda m, x: m.out(m.a(torch.tanh(m.a(x)))), a=nn.Linear(4, 4), out=nn.Linear(4, 3)
        ),
        (6, 4),
    ),
    "runs on halves": lambda: (
        Function(
            lambda m, x: m.out(torch.cat([m.a(half) for half in x.chunk(2)])),
            a=nn.Linear(4, 5),
            out=nn.Linear(5, 3),
        ),
        (6, 4),
    ),
    "never runs": lambda: (
        Function(lambda m, x: m.out(x), spare=nn.Linear(2, 2), out=nn.Linear(4, 3)),
        (6, 4),
    ),
    "parametrised": lambda: two_layers(parametrizations.weight_norm(nn.Linear(4, 5))),
}

# Here a layer's hook does not see all that happens to its parameters.
UNSEEN: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "weight used by a function": lambda: (
        Function(
            lambda m, x: m.out(F.linear(x, m.a.weight, m.a.bias)),
            a=nn.Linear(4, 5),
            out=nn.Linear(5, 3),
        ),
        (6, 4),
    ),
    "weight tied by a function": lambda: (
        Function(
            lambda m, x: m.out(F.linear(torch.tanh(m.a(x)), m.a.weight.T)),
            a=nn.Linear(4, 5),
            out=nn.Linear(4, 3),
        ),
        (6, 4),
    ),
    "places folded into the batch": lambda: (folded(), (6, 12)),
    "places folded, one sample": lambda: (folded(), (1, 12)),
    "places first": lambda: (places_first(), (5, 3, 4)),
    "as many places as samples": lambda: (places_first(), (3, 3, 4)),
    "pruned": lambda: two_layers(pruned()),
    "spectral norm": lambda: two_layers(nn.utils.spectral_norm(nn.Linear(4, 5))),
    "features without gradient": lambda: (
        Function(without_gradient, a=nn.Linear(4, 5), out=nn.Linear(5, 3)),
        (6, 4),
    ),
    "recomputed in backward": lambda: (
        Function(
            lambda m, x: m.out(checkpoint(m.parts, x.requires_grad_(), use_reentrant=False)),
            parts=nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
            out=nn.Linear(5, 3),
        ),
        (6, 4),
    ),
    "a hook of one's own": lambda: two_layers(doubled()),
    "prelu": lambda: (sequence(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)), (6, 4)),
    "norm of vectors": lambda: (
        sequence(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        (6, 4),
    ),
}


def compare(network: nn.Module, shape: tuple[int, ...], columns: slice = slice(None)) -> None:
    network.double().eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    inputs = torch.randn(*shape, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    hooks = [len(part._forward_hooks) for part in network.modules()]
    wanted = one_by_one(network, parameters, inputs, every_label, columns)
    sums = squared_gradient_sums(network, parameters, inputs, every_label, columns)
    torch.testing.assert_close(sums, wanted, rtol=1e-9, atol=1e-15)
    assert sum(float(value.sum()) for value in wanted.values()) > 0.01
    assert [len(part._forward_hooks) for part in network.modules()] == hooks


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention
def test_sums_are_those_of_one_sample_at_a_time(name: str) -> None:
    compare(*NETWORKS[name]())


@pytest.mark.parametrize("name", UNSEEN)
def test_sums_hold_where_a_layers_hook_is_not_the_whole_story(name: str) -> None:
    compare(*UNSEEN[name]())


CLOSED = ("mlp", "no biases", "convolutions", "depthwise", "in place", "residual")
CLOSED += ("norm of vectors", "norm of sequences", "linear on places", "linear on grids")


@pytest.mark.parametrize("name", CLOSED)
def test_common_layers_need_no_gradient_of_each_sample(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed form that fails silently costs ten times as much."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient for every sample")

    monkeypatch.setattr(importance, "vmap", refuse)
    compare(*(NETWORKS | UNSEEN)[name]())


def test_a_first_sample_that_is_certain_hides_nothing() -> None:
    """Its largest label's gradient is 0 in any layer, whatever happens to its weights."""
    network, shape = UNSEEN["weight used by a function"]()
    with torch.no_grad():
        network.out.bias[1] = 1000.0

    def other_label(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = logits.argmin(1, keepdim=True)
        return labels, torch.ones_like(labels, dtype=logits.dtype)

    network.double().eval()
    parameters = dict(network.named_parameters())
    inputs = torch.randn(*shape, dtype=torch.float64)
    arguments = (network, parameters, inputs, other_label, slice(None))
    wanted = one_by_one(*arguments)
    assert wanted["a.weight"].sum() > 0.01
    torch.testing.assert_close(squared_gradient_sums(*arguments), wanted)


@pytest.mark.parametrize("columns", [slice(1, 3), slice(0, 2)])
def test_only_the_active_columns_take_part(columns: slice) -> None:
    compare(*two_layers(), columns)


def test_a_selection_of_parameters_is_enough() -> None:
    network, shape = NETWORKS["convolutions"]()
    network.double().eval()
    inputs = torch.randn(*shape, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    chosen = {name: parameters[name] for name in ("0.bias", "1.weight", "3.weight")}
    for name, value in parameters.items():
        value.requires_grad_(name in chosen)
    sums = squared_gradient_sums(network, chosen, inputs, every_label, slice(None))
    wanted = one_by_one(network, chosen, inputs, every_label, slice(None))
    torch.testing.assert_close(sums, wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name: str) -> None:
    network = torchvision_backbone(name).double().eval()
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    parameters = dict(network.named_parameters())

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = logits.argmax(1, keepdim=True)
        return labels, torch.ones_like(labels, dtype=logits.dtype)

    sums = squared_gradient_sums(network, parameters, inputs, choose, slice(0, 10))
    wanted = one_by_one(network, parameters, inputs, choose, slice(0, 10))
    torch.testing.assert_close(sums, wanted, rtol=1e-8, atol=1e-12)


def test_hooks_are_removed_also_after_an_error() -> None:
    network, _ = two_layers()
    with pytest.raises(RuntimeError):
        squared_gradient_sums(
            network, dict(network.named_parameters()), torch.zeros(3, 9), every_label, slice(None)
        )
    assert not any(part._forward_hooks for part in network.modules())


# --- in a module ---------------------------------------------------------------------------------


def loop_over_task(host: ContinualModule, task: int) -> dict[str, Tensor]:
    """Empirical Fisher by the definition, through the module's own forward."""
    first, stop = host.columns(task)
    sums = {name: torch.zeros_like(value) for name, value in shared(host).items()}
    host.eval()
    count = 0
    for batch in host.batches(task, "train"):
        for x, y in zip(batch.inputs.split(1), batch.targets.split(1), strict=True):
            loss = F.cross_entropy(host(x, task=task)[:, first:stop], y - first)
            gradients = torch.autograd.grad(loss, list(shared(host).values()))
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += gradient**2
            count += 1
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("mask", ["all", "task", "seen"])
@pytest.mark.parametrize("bias_units", [True, False])
def test_columns_and_biases_of_the_task_are_active(mask: Any, bias_units: bool) -> None:
    host = made(MLP([6]), mask=mask)
    host.opened = 1
    if bias_units:
        strategy = BeneficialPerturbation(4, m_start="normal")
        strategy.configure(host, host.stream)
        host.double()
        strategy.on_task_start(host, host.tasks[0])
        strategy.on_task_end(host, host.tasks[0])
        strategy.on_task_start(host, host.tasks[1])  # live
    own = {task: fisher_diagonal(host, task, shared(host)) for task in (0, 1)}
    for task, fisher in own.items():
        torch.testing.assert_close(fisher, loop_over_task(host, task), rtol=1e-6, atol=1e-12)
        first, stop = host.columns(task)
        rows = fisher["head.weight"].sum(1) > 0
        assert rows[first:stop].all()
        assert not rows[:first].any()
        assert not rows[stop:].any()
    if bias_units:
        with host.task_mode(1), torch.no_grad():
            for layer in host.linear_layers().values():
                layer.bias_units.bank[0] = 0  # the other task's mode, with its bias gone
        changed = fisher_diagonal(host, 0, shared(host))
        assert not torch.allclose(changed["head.weight"], own[0]["head.weight"], rtol=1e-3)


def test_counts_all_processes_before_it_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with uneven shares: what they add up is the sum, never the mean of means."""
    host = made(MLP([6]))
    whole = fisher_diagonal(host, 0, shared(host))
    (batch,) = host.batches(0, "train")
    shares = [slice(0, 30), slice(30, None)]
    reduced: list[list[Tensor]] = [[], []]

    def share(own: slice) -> Iterator[Batch]:
        yield batch._replace(inputs=batch.inputs[own], targets=batch.targets[own])

    for rank, own in enumerate(shares):
        monkeypatch.setattr(host, "batches", lambda *_, own=own: share(own))
        notes = reduced[rank]
        monkeypatch.setattr(host, "all_reduce", lambda t, notes=notes: notes.append(t.clone()) or t)
        fisher_diagonal(host, 0, shared(host))
    totals = iter([a + b for a, b in zip(*reduced, strict=True)])
    monkeypatch.setattr(host, "all_reduce", lambda tensor: next(totals))
    torch.testing.assert_close(fisher_diagonal(host, 0, shared(host)), whole)


def test_no_samples_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    host = made()
    monkeypatch.setattr(host, "batches", lambda *_: iter(()))
    with pytest.raises(DataError) as error:
        fisher_diagonal(host, 1, shared(host))
    assert str(error.value) == "Expected task 1 to have training samples, but it has none."


def everything(host: Any) -> Any:
    """All that an importance pass must leave as it is."""
    return deepcopy(
        {
            "state": host.state_dict(),
            "gradients": {n: p.grad for n, p in host.named_parameters() if p.grad is not None},
            "flags": [part.training for part in host.modules()],
            "needs": [p.requires_grad for p in host.parameters()],
            "mode": host.head.bias_units.active,
            "optimizer": host.trainer.optimizers[0].state_dict(),
            "torch": torch.get_rng_state(),
        }
    ), (random.getstate(), str(np.random.get_state()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("closed_form", [True, False])
def test_the_pass_changes_nothing(fit: Any, mode: Any, closed_form: bool) -> None:
    compared = []

    class Watched(EWC):
        def on_task_end(self, host: Any, task: Any) -> None:
            host.backbone[1].eval()  # frozen by its user, with the rest in training
            for parameter in host.parameters():
                parameter.grad = torch.randn_like(parameter)
            before = everything(host)
            super().on_task_end(host, task)
            after = everything(host)
            torch.testing.assert_close(after[0], before[0], rtol=0, atol=0, equal_nan=True)
            assert after[1] == before[1]
            compared.append(before)

    last = nn.ReLU(inplace=True) if closed_form else nn.LayerNorm(8)
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(144, 8),
        last,
    )
    fit(
        [BeneficialPerturbation(4), Watched(1.0, fisher=mode, update="gradient")],
        backbone=backbone,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    assert len(compared) == 2
    state = compared[0][0]
    assert set(state["flags"]) == {True, False}
    assert state["gradients"]
    assert state["optimizer"]["state"]
