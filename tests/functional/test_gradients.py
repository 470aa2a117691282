"""Sums of per-sample gradients, and gradients of groups, against loops of autograd over samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import Function
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.functional import gradients, records
from bpn_lightning.functional.gradients import sample_gradient_sums
from bpn_lightning.functional.records import recorded_forward
from bpn_lightning.functional.segments import segment_gradients, segments_have_closed_forms
from bpn_lightning.model.host import Host
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP, torchvision_backbone
from bpn_lightning.strategies.bd import BeneficialPerturbation

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
MEASURES = {"squares": torch.square, "absolutes": torch.abs}


def every_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """All labels with weights of their own: whatever a mode may ask for."""
    labels = torch.arange(logits.shape[1]).expand(logits.shape)
    return labels, logits.softmax(1) * (1 + labels)


def of_sample(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """By autograd; 0 for what takes no part."""
    values = list(parameters.values())
    found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def one_by_one(
    module: nn.Module,
    parameters: dict[str, Tensor],
    inputs: Tensor,
    choose: Choose,
    columns: slice,
    measure: Callable[[Tensor], Tensor] = torch.square,
) -> dict[str, Tensor]:
    """The definition: one sample, one label, one backward at a time."""
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for sample in inputs.split(1):
        logits = module(sample)[:, columns]
        labels, weights = choose(logits.detach())
        for label, weight in zip(labels[0], weights[0], strict=True):
            loss = -logits.log_softmax(1)[0, label]
            for name, gradient in of_sample(loss, parameters).items():
                sums[name] += weight * measure(gradient)
    return sums


def group_by_group(
    module: nn.Module, parameters: dict[str, Tensor], inputs: Tensor, labels: Tensor, sizes: Any
) -> Tensor:
    """The definition: the mean of one sample's gradients at a time, flattened."""
    rows = []
    for group, of_group in zip(inputs.split(sizes), labels.split(sizes), strict=True):
        total = torch.zeros(sum(value.numel() for value in parameters.values())).double()
        for sample, label in zip(group.split(1), of_group, strict=True):
            gradient = of_sample(-module(sample).log_softmax(1)[0, label], parameters)
            total += torch.cat([value.flatten() for value in gradient.values()]) / len(group)
        rows.append(total)
    return torch.stack(rows)


# --- networks ------------------------------------------------------------------------------------


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
    "parametrized": lambda: two_layers(parametrizations.weight_norm(nn.Linear(4, 5))),
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


def prepared(network: nn.Module, shape: tuple[int, ...]) -> tuple[dict[str, Any], Tensor]:
    """Parameters and inputs in double precision; statistics and weights of norms that matter."""
    network.double().eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return dict(network.named_parameters()), torch.randn(*shape, dtype=torch.float64)


def compare(
    network: nn.Module,
    shape: tuple[int, ...],
    columns: slice = slice(None),
    measure: Callable[[Tensor], Tensor] = torch.square,
) -> None:
    parameters, inputs = prepared(network, shape)
    hooks = [len(part._forward_hooks) for part in network.modules()]
    arguments = (network, parameters, inputs, every_label, columns)
    wanted = one_by_one(*arguments, measure)
    sums = sample_gradient_sums(*arguments, measure=measure)
    torch.testing.assert_close(sums, wanted, rtol=1e-9, atol=1e-15)
    assert sum(float(value.sum()) for value in wanted.values()) > 0.01
    assert [len(part._forward_hooks) for part in network.modules()] == hooks


def compare_groups(network: nn.Module, shape: tuple[int, ...], sizes: list[int]) -> None:
    parameters, inputs = prepared(network, shape)
    labels = torch.randint(0, 3, (len(inputs),))

    def losses_of(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, labels[part], reduction="none")

    wanted = group_by_group(network, parameters, inputs, labels, sizes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = segment_gradients(network, parameters, inputs, losses_of, sizes)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)
    assert float(wanted.abs().max()) > 0.01
    assert all(value.grad is None for value in parameters.values())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def groups(number: int, equal: bool) -> list[int]:
    """Sizes of groups of so many samples."""
    if equal:
        size = max(s for s in range(1, max(2, number)) if number % s == 0)
        return [size] * (number // size)
    return [1, number - 1] if number > 1 else [1]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention
def test_sums_are_those_of_one_sample_at_a_time(name: str, measure: str) -> None:
    compare(*NETWORKS[name](), measure=MEASURES[measure])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", UNSEEN)
def test_sums_hold_where_a_layers_hook_is_not_the_whole_story(name: str, measure: str) -> None:
    compare(*UNSEEN[name](), measure=MEASURES[measure])


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", NETWORKS | UNSEEN)
def test_gradients_of_groups_are_means_of_one_sample_at_a_time(name: str, equal: bool) -> None:
    network, shape = (NETWORKS | UNSEEN)[name]()
    compare_groups(network, shape, groups(shape[0], equal))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("chunk", [1, 50, 2**24])
@pytest.mark.parametrize("name", ["convolutions", "linear on places", "own parameter"])
def test_how_much_is_held_at_a_time_is_irrelevant(
    chunk: int, name: str, measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "CHUNK", chunk)
    compare(*NETWORKS[name](), measure=MEASURES[measure])


CLOSED = ("mlp", "no biases", "convolutions", "depthwise", "in place", "residual")
CLOSED += ("norm of vectors", "norm of sequences", "linear on places", "linear on grids")


@pytest.mark.parametrize("name", CLOSED)
def test_common_layers_need_no_gradient_of_each_sample(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed form that fails silently costs ten times as much."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a gradient for every sample")

    monkeypatch.setattr(gradients, "vmap", refuse)
    compare(*(NETWORKS | UNSEEN)[name]())


@pytest.mark.parametrize("name", CLOSED)
def test_groups_of_common_layers_need_one_forward(name: str) -> None:
    """And one of the sample that tells whether they do, by autograd and in closed form."""
    network, shape = (NETWORKS | UNSEEN)[name]()
    prepared(network, shape)
    seen: list[int] = []
    handle = network.register_forward_hook(lambda m, args, output: seen.append(len(args[0])))
    compare_groups(network, shape, [1] * shape[0])
    handle.remove()
    assert seen[shape[0] :] == [1, 1, shape[0]]


def test_what_holds_need_not_be_tried_again() -> None:
    network, shape = UNSEEN["norm of vectors"]()
    parameters, inputs = prepared(network, shape)
    assert segments_have_closed_forms(network, parameters, inputs[:1])
    labels = torch.randint(0, 3, (len(inputs),))

    def losses_of(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, labels[part], reduction="none")

    seen: list[int] = []
    network.register_forward_hook(lambda m, args, output: seen.append(len(args[0])))
    arguments = (network, parameters, inputs, losses_of, [2, 4])
    closed, slow = (segment_gradients(*arguments, closed_forms=told) for told in (True, False))
    torch.testing.assert_close(closed, slow)
    assert seen == [6, 2, 4]


@pytest.mark.parametrize("name", UNSEEN)
def test_one_sample_tells_what_hooks_do_not_see(name: str) -> None:
    network, shape = UNSEEN[name]()
    parameters, inputs = prepared(network, shape)
    holds = segments_have_closed_forms(network, parameters, inputs[:1])
    # Autograd sees no more of these than the hooks do.
    assert holds == (
        name in ("norm of vectors", "features without gradient", "recomputed in backward")
    )


def test_norms_in_training_have_no_closed_form() -> None:
    network, shape = UNSEEN["norm of vectors"]()
    parameters, inputs = prepared(network, shape)
    assert recorded_forward(network, parameters, inputs) is not None
    network.train()
    assert recorded_forward(network, parameters, inputs) is None


def test_a_first_sample_that_is_certain_hides_nothing() -> None:
    """Its largest label's gradient is 0 in any layer, whatever happens to its weights."""
    network, shape = UNSEEN["weight used by a function"]()
    with torch.no_grad():
        network.out.bias[1] = 1000.0

    def other_label(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = logits.argmin(1, keepdim=True)
        return labels, torch.ones_like(labels, dtype=logits.dtype)

    parameters, inputs = prepared(network, shape)
    arguments = (network, parameters, inputs, other_label, slice(None))
    wanted = one_by_one(*arguments)
    assert wanted["a.weight"].sum() > 0.01
    torch.testing.assert_close(sample_gradient_sums(*arguments), wanted)
    assert not segments_have_closed_forms(network, parameters, inputs[:1])


@pytest.mark.parametrize("columns", [slice(1, 3), slice(0, 2)])
def test_only_the_active_columns_take_part(columns: slice) -> None:
    compare(*two_layers(), columns)


def test_a_selection_of_parameters_is_enough() -> None:
    network, shape = NETWORKS["convolutions"]()
    parameters, inputs = prepared(network, shape)
    chosen = {name: parameters[name] for name in ("3.weight", "0.bias", "1.weight")}
    for name, value in parameters.items():
        value.requires_grad_(name in chosen)
    sums = sample_gradient_sums(network, chosen, inputs, every_label, slice(None))
    wanted = one_by_one(network, chosen, inputs, every_label, slice(None))
    torch.testing.assert_close(sums, wanted, rtol=1e-9, atol=1e-15)
    labels = torch.randint(0, 3, (5,))

    def losses_of(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, labels[part], reduction="none")

    found = segment_gradients(network, chosen, inputs, losses_of, [2, 3])
    by_sample = group_by_group(network, chosen, inputs, labels, [2, 3])
    torch.testing.assert_close(found, by_sample, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name: str) -> None:
    network = torchvision_backbone(name).double().eval()
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    parameters = dict(network.named_parameters())

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = logits.argmax(1, keepdim=True)
        return labels, torch.ones_like(labels, dtype=logits.dtype)

    sums = sample_gradient_sums(network, parameters, inputs, choose, slice(0, 10))
    wanted = one_by_one(network, parameters, inputs, choose, slice(0, 10))
    torch.testing.assert_close(sums, wanted, rtol=1e-8, atol=1e-12)


def test_hooks_are_removed_also_after_an_error() -> None:
    network, _ = two_layers()
    with pytest.raises(RuntimeError):
        sample_gradient_sums(
            network, dict(network.named_parameters()), torch.zeros(3, 9), every_label, slice(None)
        )
    assert not any(part._forward_hooks for part in network.modules())


# --- in a module with modes ----------------------------------------------------------------------


def host_with_biases(mask: Any) -> tuple[Host, dict[str, Any], Tensor, Tensor, Tensor]:
    """Three tasks with biases of their own, and some samples of each, in groups of 4, 6 and 5."""
    stream = SplitDigits(num_tasks=3)
    stream.setup()
    host = ContinualModule(MLP([6, 5]), mask=mask).host
    host.attach(stream)
    bias = BeneficialPerturbation(4)
    bias.configure(host, stream)
    host.network.double().eval()
    host.network.opened = 2
    with torch.no_grad():
        for layer in host.network.linear_layers().values():
            layer.bias_units.bank.normal_()
            layer.bias_units.M.normal_()
            layer.bias_units.W.normal_()
            layer.bias_units.live = 2
    batches = [next(iter(host.batches(task, "train"))) for task in range(3)]
    sizes = [4, 6, 5]
    inputs = torch.cat([b.inputs[:n] for b, n in zip(batches, sizes, strict=True)]).double()
    targets = torch.cat([b.targets[:n] for b, n in zip(batches, sizes, strict=True)])
    tasks = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor(sizes))
    return host, host.network.shared_parameters(include_head=True), inputs, targets, tasks


@pytest.mark.parametrize("closed_forms", [None, False])
@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_every_sample_of_a_group_is_in_its_own_tasks_mode(mask: Any, closed_forms: Any) -> None:
    host, parameters, inputs, targets, tasks = host_with_biases(mask)

    def losses_of(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, targets[part], reduction="none")

    assert segments_have_closed_forms(host.network, parameters, inputs[:1], tasks=tasks[:1])
    found = segment_gradients(
        host.network,
        parameters,
        inputs,
        losses_of,
        [4, 6, 5],
        tasks=tasks,
        closed_forms=closed_forms,
    )
    for task, row in enumerate(found):
        own = tasks == task
        with host.network.task_mode(task):
            loss = F.cross_entropy(host.network(inputs[own]), targets[own])
        wanted = torch.autograd.grad(loss, list(parameters.values()))
        flat = torch.cat([value.flatten() for value in wanted])
        torch.testing.assert_close(row, flat, rtol=1e-9, atol=1e-13)


def test_weights_of_keyed_layers_see_keyed_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In y = W (k x) + b the gradient of W is the outer product of delta and k x."""
    keys = torch.tensor([1.0, -1, -1, 1]).double()
    network, shape = two_layers()

    plain = nn.Linear.forward
    first = network[0]
    first.forward = lambda input: plain(first, input * keys)
    monkeypatch.setattr(
        records, "effective_input", lambda layer, input: input * keys if layer is first else input
    )
    parameters, inputs = prepared(network, shape)
    assert segments_have_closed_forms(network, parameters, inputs[:1])
    compare(network, shape)
    compare_groups(network, shape, [2, 4])
    monkeypatch.setattr(records, "effective_input", lambda layer, input: input)
    assert not segments_have_closed_forms(network, parameters, inputs[:1])
