"""EBLL against closed forms, principal components, and autoencoders trained by a plain loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adam

from bpn_lightning.costs import Bytes, measured_bytes, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ebll import (
    Autoencoder,
    EncoderBasedLifelongLearning,
    code_loss,
    codes,
    reconstructed,
)
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.lwf import LearningWithoutForgetting
from bpn_lightning.strategies.psp import ParameterSuperposition
from bpn_lightning.tasks import Phase

EBLL = partial(EncoderBasedLifelongLearning, autoencoder_epochs=1)


def encoder(number: int, code_size: int, features: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(number, code_size, features, dtype=torch.float64)
    return weight, torch.randn(number, code_size, dtype=torch.float64)


def noisy() -> nn.Module:
    """A backbone with everything that differs between training and evaluation, and writes in place."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(36, 12),
        nn.ReLU(inplace=True),
    )


# --- codes ---------------------------------------------------------------------------------------


def test_gradient_of_the_features_is_the_closed_form() -> None:
    (weight, bias), alpha = encoder(1, 3, 8), 0.7
    features = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    teacher = codes(torch.randn(5, 8, dtype=torch.float64), weight, bias)
    loss = code_loss(codes(features, weight, bias), teacher, alpha)
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    c = torch.sigmoid(features @ weight[0].T + bias[0])
    expected = alpha * ((c - teacher) * c * (1 - c)) @ weight[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_several_encoders_are_a_sum_over_each() -> None:
    weight, bias = encoder(4, 3, 8)
    one, other = torch.randn(2, 5, 8, dtype=torch.float64)
    whole = code_loss(codes(one, weight, bias), codes(other, weight, bias), 0.3)
    expected = torch.zeros(5, dtype=torch.float64)
    for w, b in zip(weight, bias, strict=True):
        for n in range(5):
            gap = torch.sigmoid(w @ one[n] + b) - torch.sigmoid(w @ other[n] + b)
            expected[n] += 0.15 * gap.dot(gap)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_pulls_at_the_teacher(dtype: torch.dtype) -> None:
    weight, bias = (t.to(dtype) for t in encoder(2, 3, 8))
    features = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    loss = code_loss(
        codes(features, weight, bias), codes(features.detach().clone(), weight, bias), 1.0
    )
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), features)[0].any()


def test_features_are_free_where_no_encoder_looks() -> None:
    weight, bias = encoder(2, 3, 8)
    _, _, rows = torch.linalg.svd(weight.flatten(0, 1))
    blind = rows[6:]  # two encoders of three codes see six of eight directions
    features = torch.randn(5, 8, dtype=torch.float64)
    moved = features + 10 * torch.randn(5, 2, dtype=torch.float64) @ blind
    before, after, seen = (codes(x, weight, bias) for x in (features, moved, features + rows[0]))
    assert code_loss(after, before, 1.0).max() < 1e-20
    assert code_loss(seen, before, 1.0).min() > 1e-4


def test_alpha_of_a_mean_squared_error_converts_by_twice_its_size() -> None:
    """The PyTorch port takes the mean over batch and codes."""
    one, other = torch.rand(2, 6, 10, dtype=torch.float64)
    port = 0.3 * nn.MSELoss()(one, other)
    torch.testing.assert_close(code_loss(one, other, 2 * 0.3 / 10).mean(), port)


def test_low_precision_features_are_coded_in_the_encoders_precision() -> None:
    weight, bias = (t.float() for t in encoder(1, 3, 8))
    features = torch.randn(4, 8).bfloat16()
    expected = codes(features.float(), weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes(features, weight, bias), expected)


# --- the autoencoder -----------------------------------------------------------------------------


def test_a_linear_autoencoder_finds_the_principal_components() -> None:
    """Its error is the sum of the squared singular values that the code leaves out."""
    features = torch.randn(60, 7, dtype=torch.float64) * torch.linspace(0.3, 2, 7).double() + 1.0
    autoencoder = Autoencoder(7, 3, seeded_generator("pca"), activation=lambda x: x).double()
    optimizer = LBFGS(
        autoencoder.parameters(),
        max_iter=500,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-14,
    )

    def error() -> Tensor:
        return (autoencoder(features) - features).square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error()
        loss.backward()
        return loss

    optimizer.step(closure)
    values = torch.linalg.svdvals(features - features.mean(0))
    torch.testing.assert_close(error(), values[3:].square().sum(), rtol=1e-6, atol=0)


def test_first_weights_follow_from_the_generator_alone(same: Any) -> None:
    torch.manual_seed(3)
    one = Autoencoder(6, 2, seeded_generator("a"))
    state = torch.get_rng_state()
    torch.manual_seed(4)
    other = Autoencoder(6, 2, seeded_generator("a"))
    same(one.state_dict(), other.state_dict())
    assert (Autoencoder(6, 2, seeded_generator("b")).weight != one.weight).any()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.weight.abs().max() <= 6**-0.5
    assert one.decoder_weight.abs().max() <= 2**-0.5


def test_an_encoder_of_alexnet_has_the_bytes_of_the_paper() -> None:
    autoencoder = Autoencoder(9216, 100)
    assert tensor_bytes([autoencoder.weight, autoencoder.bias]) == 3_686_800


class Halved(nn.Module):
    """An autoencoder whose errors are known."""

    def forward(self, features: Tensor) -> Tensor:
        return features / 2


@pytest.mark.parametrize("layer", ["backbone", "backbone.0", "backbone.1", "backbone.5"])
def test_the_rest_of_the_network_sees_the_reconstruction(prepare: Any, layer: str) -> None:
    """Where the next layer writes in place, too."""
    run = prepare(backbone=noisy)
    network, inputs = run.module.network.eval(), torch.randn(6, 1, 8, 8)
    known = reconstructed(network, layer, Halved(), inputs)  # type: ignore[arg-type]
    depth = {"backbone": 7}.get(layer) or int(layer[-1]) + 1
    features = network.backbone[:depth](inputs)
    logits = network.head(network.backbone[depth:](features / 2))
    torch.testing.assert_close(known[0], logits)
    torch.testing.assert_close(known[1], (features / 2).flatten(1).square().sum(1))


@pytest.mark.parametrize("layer", ["backbone", "backbone.2"])
def test_only_the_autoencoder_gets_gradients(prepare: Any, layer: str) -> None:
    run = prepare(backbone=noisy)
    autoencoder = Autoencoder(12 if layer == "backbone" else 36, 3, seeded_generator("x"))
    logits, errors = reconstructed(
        run.module.network.eval(), layer, autoencoder, torch.randn(6, 1, 8, 8)
    )
    (logits.sum() + errors.sum()).backward()
    assert all(p.grad is not None for p in autoencoder.parameters())
    assert all(p.grad is None for p in run.module.parameters())
    assert not run.module.network.get_submodule(layer)._forward_hooks


# --- its phase -----------------------------------------------------------------------------------


def plain_autoencoder(host: Any, task: int, epochs: range) -> dict[str, Tensor]:
    """The encoder of an autoencoder in plain torch, on a network that stays as it is."""
    stream, network = host.stream, host.network
    start = Autoencoder(12, 5, seeded_generator("autoencoder", stream.seed, task))
    encode, decode = nn.Linear(12, 5), nn.Linear(5, 12)
    with torch.no_grad():
        encode.weight.copy_(start.weight)
        decode.weight.copy_(start.decoder_weight)
        encode.bias.zero_()
        decode.bias.zero_()
    optimizer = Adadelta([*encode.parameters(), *decode.parameters()], lr=0.7)
    network.eval().requires_grad_(False)
    for epoch in epochs:
        for batch in stream.train_loader(task, epoch):
            features = network.backbone(stream.prepare(batch).inputs)
            rebuilt = decode(torch.sigmoid(encode(features)))
            loss = F.cross_entropy(network.head(rebuilt)[:, : 2 * task + 2], batch.targets)
            loss = loss + 0.05 * (rebuilt - features).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.train().requires_grad_(True)
    return {"weight": encode.weight.detach(), "bias": encode.bias.detach()}


def test_encoders_are_those_of_a_plain_loop(learn: Any, watch: Any) -> None:
    ebll = EBLL(
        code_size=5, autoencoder_epochs=2, autoencoder_lr=0.7, reconstruction=0.05, warm_up_epochs=1
    )
    expected = []

    def end(host: Any, task: Any) -> None:
        first = 2 if task.id else 1  # after a warm-up and the task's own training
        expected.append(plain_autoencoder(host, task.id, range(first, first + 2)))

    run = learn(watch(end=end), ebll, stream={"num_tasks": 3}, mask="seen")
    assert run.module.schedule.phases[1][-1] == Phase("autoencoder", 2, trains="strategy")
    for name in ("weight", "bias"):
        stacked = torch.stack([one[name] for one in expected])
        torch.testing.assert_close(ebll.encoders[name], stacked, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["backbone", "backbone.2"])
def test_its_phase_leaves_the_network_alone(learn: Any, watch: Any, same: Any, layer: str) -> None:
    """Weights, whatever the optimizer would do, statistics, bias units and random numbers."""
    kept: list[Any] = []

    def note(host: Any) -> list[Any]:
        tensors = {n: t.clone() for n, t in host.network.state_dict().items() if torch.is_tensor(t)}
        return [tensors, torch.get_rng_state()]

    ebll = EBLL(layer=layer, autoencoder_epochs=3)
    after = lambda host, parameters: kept.append([host.network.opened, *note(host)])

    def end(host: Any, task: Any) -> None:
        if task.id == 0:
            same(note(host), kept[-1][1:])

    run = learn(
        watch(end=end),  # before bias units are frozen
        BeneficialPerturbation(3),
        ebll,
        watch(stepped=after),  # after they have moved
        backbone=noisy,
        stream={"augment": True},
        optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    )
    assert ebll.num_encoders == 2
    assert run.module.schedule.lengths == [1, 3, 1, 3]


def test_autoencoders_learn(learn: Any, watch: Any) -> None:
    """The default settings keep most of the features and what the task needs of them."""
    ebll, found = EncoderBasedLifelongLearning(), []

    def end(host: Any, task: Any) -> None:
        if task.id == 0:
            (batch,) = host.batches(0, "train")
            host.network.eval()
            with torch.no_grad():
                logits, errors = reconstructed(
                    host.network, "backbone", ebll.autoencoder, batch.inputs
                )
                features = host.network.backbone(batch.inputs)
                spread = (features - features.mean(0)).square().sum(1).mean()
            host.network.train()
            right = (logits[:, :2].argmax(1) == batch.targets).float().mean()
            found.append((float(errors.mean() / spread), float(right)))

    learn(
        watch(end=end),
        ebll,
        stream={"epochs_per_task": 4, "batch_size": 32},
        optimizer=partial(SGD, lr=0.1),
        backbone=lambda: MLP([64]),
    )
    ((error, accuracy),) = found
    assert error < 0.6
    assert accuracy > 0.98


def test_there_is_an_encoder_for_each_task(learn: Any, watch: Any) -> None:
    ebll, before, after = EBLL(), [], []
    run = learn(
        ebll,
        watch(
            start=lambda host, task: before.append(ebll.num_encoders),
            end=lambda host, task: after.append(ebll.num_encoders),
        ),
        stream={"num_tasks": 4},
    )
    assert before == [0, 1, 2, 3]
    assert after == [1, 2, 3, 4]  # the stream may go on
    assert ebll.autoencoder is None
    names = [[phase.name for phase in phases] for phases in run.module.schedule.phases]
    assert names == [["train", "autoencoder"]] * 4


# --- the loss of later tasks ---------------------------------------------------------------------


def noted(watch: Any, ebll: EncoderBasedLifelongLearning, modes: bool, found: list[Any]) -> Any:
    """Notes the features of every old mode before a task begins; compares each term with them."""
    features: list[list[Tensor]] = []
    steps: list[int] = []

    def of(host: Any, inputs: Tensor) -> list[Tensor]:
        answers = []
        for k in range(host.network.opened):
            with host.network.task_mode(k if modes else host.network.opened), torch.no_grad():
                answers.append(host.network.backbone(inputs))
        return answers

    def start(host: Any, task: Any) -> None:
        steps.clear()
        loader = host.stream.train_loader(task.id, 0)
        features[:] = [of(host, host.stream.prepare(batch).inputs) for batch in loader]

    def terms(host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        expected = torch.zeros(len(batch.targets))
        now, then = of(host, batch.inputs), features[len(steps)]
        steps.append(1)
        for k, (new, old) in enumerate(zip(now, then, strict=True)):
            w, b = (ebll.encoders[name][k] for name in ("weight", "bias"))
            gap = torch.sigmoid(new @ w.T + b) - torch.sigmoid(old @ w.T + b)
            expected += ebll.alpha / 2 * gap.square().sum(1)
        term = ebll.loss_terms(host, batch, logits)
        found.append((host.network.opened, term.get("ebll"), expected))
        return {}

    return watch(start=start, terms=terms)


@pytest.mark.parametrize("mode", [None, BeneficialPerturbation, ParameterSuperposition])
@pytest.mark.parametrize("mask", ["task", "shared"])
def test_codes_are_compared_in_the_mode_of_each_old_task(
    learn: Any, watch: Any, mode: Callable[[], Any] | None, mask: str
) -> None:
    ebll, found = EBLL(alpha=3.0, code_size=4), []
    learn(
        noted(watch, ebll, mode is not None, found),
        *([mode()] if mode else []),
        ebll,
        stream={"num_tasks": 3, "domain_incremental": mask == "shared"},
        optimizer=partial(SGD, lr=0.1),
        mask=mask,
    )
    assert {task for task, _, _ in found} == {0, 1, 2}
    for task, term, expected in found:
        if task == 0:
            assert term is None
        else:
            torch.testing.assert_close(term, expected, rtol=1e-3, atol=1e-6)
    assert max(float(term.detach().max()) for _, term, _ in found if term is not None) > 1e-3


def test_features_are_those_of_the_step_whoever_else_runs_the_network(
    learn: Any, watch: Any, same: Any
) -> None:
    def others(host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        host.network.backbone(torch.randn_like(batch.inputs))  # as a replay in training mode would
        return {}

    def after(host: Any, parameters: Any) -> None:
        host.network.backbone(torch.randn(3, 1, 8, 8))

    disturbed, alone = (
        learn(*more, EBLL(alpha=3.0), mask="task", optimizer=partial(SGD, lr=0.1))
        for more in ([watch(terms=others, stepped=after)], [])
    )
    same(disturbed.weights(), alone.weights())


@pytest.mark.parametrize("modes", [False, True])
def test_features_are_those_before_the_next_layer_writes_into_them(
    learn: Any, same: Any, modes: bool
) -> None:
    def after(inplace: bool) -> dict[str, Tensor]:
        relu = partial(nn.ReLU, inplace=inplace)
        backbone = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), relu(), nn.Linear(12, 8))
        more = [BeneficialPerturbation(4)] if modes else []
        strategies = [*more, EBLL(alpha=3.0, layer="backbone.1")]
        return learn(*strategies, backbone=backbone, optimizer=partial(SGD, lr=0.1)).weights()

    same(after(inplace=True), after(inplace=False))


def test_a_layer_that_is_kept_in_evaluation_mode_is_asked_again(learn: Any, watch: Any) -> None:
    ebll, terms = EBLL(), []

    def note(host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        terms.append(ebll.loss_terms(host, batch, logits))
        return {}

    class Frozen(MLP):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    learn(watch(terms=note), ebll, backbone=lambda: Frozen([16, 12]))
    assert "ebll" in terms[-1]


def test_the_first_update_of_a_task_is_lwfs(learn: Any, watch: Any, same: Any) -> None:
    def gradients(strategy: Any) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []

        def note(host: Any, parameters: Any) -> None:
            if host.network.opened == 1:
                found.append({name: p.grad.clone() for name, p in parameters.items()})

        learn(watch(capture=note), strategy, mask="task", optimizer=partial(SGD, lr=0.1))
        return found

    held, lwf = gradients(EBLL(alpha=10.0)), gradients(LearningWithoutForgetting())
    same(held[0], lwf[0])
    assert any((held[-1][name] != lwf[-1][name]).any() for name in lwf[-1])


@pytest.mark.parametrize("warm_up", [0, 1])
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_alpha_zero_is_lwf_bit_for_bit(
    learn: Any, same: Any, strength: float, warm_up: int
) -> None:
    runs = [
        learn(
            strategy,
            backbone=noisy,
            stream={"num_tasks": 3},
            optimizer=partial(Adam, lr=0.01, weight_decay=0.01),
            trainer={"gradient_clip_val": 0.5},
        )
        for strategy in (
            EBLL(strength, 0.0, warm_up_epochs=warm_up),
            LearningWithoutForgetting(strength, warm_up_epochs=warm_up),
        )
    ]
    same(runs[0].weights(), runs[1].weights())
    same(runs[0].optimizer_state(), runs[1].optimizer_state())
    assert str(runs[0].random) == str(runs[1].random)


def test_codes_alone_hold_without_lwf(learn: Any, watch: Any) -> None:
    ebll, names = EBLL(0.0, 1.0), set()

    def note(host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        names.update(ebll.loss_terms(host, batch, logits))
        return {}

    learn(watch(terms=note), ebll)
    assert names == {"ebll"}


def test_draws_nothing_from_global_generators(learn: Any) -> None:
    assert str(learn(EBLL()).random) == str(learn().random)


def test_strong_codes_keep_features_from_moving(learn: Any, watch: Any) -> None:
    def moved(alpha: float) -> float:
        ebll = EBLL(0.0, alpha, code_size=11, autoencoder_epochs=5)
        kept: list[Tensor] = []

        def start(host: Any, task: Any) -> None:
            (batch,) = host.batches(1, "train")
            kept[:] = [host.network.backbone(batch.inputs).detach()] if task.id else []

        run = learn(watch(start=start), ebll, mask="task", optimizer=partial(SGD, lr=0.1))
        (batch,) = run.module.host.batches(1, "train")
        weight, bias = (ebll.encoders[name][:1] for name in ("weight", "bias"))
        now, then = (
            codes(x, weight, bias) for x in (run.module.network.backbone(batch.inputs), kept[0])
        )
        return float((now - then).detach().norm())

    assert moved(30.0) < 0.5 * moved(1e-9)


def test_listens_only_while_a_fit_lasts(learn: Any) -> None:
    run = learn(EBLL())
    assert not any(part._forward_hooks for part in run.module.modules())


# --- bytes ---------------------------------------------------------------------------------------


def test_holds_the_teacher_and_the_encoders_while_training(learn: Any, watch: Any) -> None:
    ebll, held = EBLL(code_size=5), []

    def note(host: Any, *_: Any) -> None:
        assert ebll.declared_bytes(host).held == measured_bytes(ebll, host)
        held.append(ebll.declared_bytes(host).held)

    run = learn(watch(stepped=note), ebll, watch(end=note), stream={"num_tasks": 3})
    network = tensor_bytes(run.module.network.shared_parameters(include_head=True).values())
    one = 4 * (5 * 12 + 5)
    expected = [0, one, network + one, network + 2 * one, network + 3 * one]
    assert list(dict.fromkeys(held)) == [Bytes(n, 0) for n in dict.fromkeys(expected)]


def test_the_autoencoder_that_trains_counts(prepare: Any) -> None:
    run = prepare(ebll := EBLL(code_size=5))
    ebll.autoencoder = Autoencoder(12, 5)
    assert ebll.declared_bytes(run.module.host).held == measured_bytes(ebll, run.module.host)
    assert ebll.declared_bytes(run.module.host).training == 4 * (2 * 5 * 12 + 5 + 12)


# --- composition ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        lambda: [BeneficialPerturbation(4), EWC(10.0)],
        lambda: [ParameterSuperposition(), EWC(10.0)],
        lambda: [ParameterSuperposition("complex")],
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_composes(learn: Any, others: Callable[[], list[Any]], after: bool) -> None:
    ebll = EBLL(warm_up_epochs=1)
    strategies = [ebll, *others()] if after else [*others(), ebll]
    run = learn(*strategies, stream={"num_tasks": 3})
    assert run.module.closed == 2
    assert ebll.num_encoders == 3


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_runs(learn: Any, precision: str) -> None:
    run = learn(ebll := EBLL(), trainer={"precision": precision})
    assert run.module.closed == 1
    assert ebll.encoders["weight"].dtype == torch.float32


@pytest.mark.parametrize("layer", ["backbone.0", "backbone.1", "backbone.5"])
def test_any_layer_of_the_backbone_can_be_held(learn: Any, layer: str) -> None:
    run = learn(ebll := EBLL(layer=layer), backbone=noisy)
    assert ebll.encoders["weight"].shape[2] == (12 if layer == "backbone.5" else 36)
    assert run.module.closed == 1


@pytest.mark.parametrize(("width", "expected"), [(12, 6), (300, 100)])
def test_the_code_is_a_hundred_units_or_half_of_the_features(
    learn: Any, width: int, expected: int
) -> None:
    learn(ebll := EBLL(), backbone=lambda: MLP([width]))
    assert ebll.encoders["weight"].shape == (2, expected, width)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"alpha": -1},
            "Expected alpha to be 0 or a positive number, but got -1. 0 is LwF.",
        ),
        ({"alpha": float("nan")}, "Expected alpha to be 0 or a positive number, but got nan."),
        ({"reconstruction": -1}, "Expected reconstruction to be 0 or a positive number, but got"),
        (
            {"code_size": 0},
            "Expected code_size to be a whole number of at least 1, but got 0. Leave it out for",
        ),
        ({"code_size": 2.5}, "Expected code_size to be a whole number of at least 1, but got 2.5."),
        (
            {"autoencoder_epochs": 0},
            "Expected autoencoder_epochs to be a whole number of at least 1, but got 0. Without auto",
        ),
        (
            {"autoencoder_lr": 0},
            "Expected autoencoder_lr to be a positive number, but got 0. It scales",
        ),
        ({"strength": -1}, "Expected strength to be 0 or a positive number, but got -1."),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        EncoderBasedLifelongLearning(**arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"code_size": 12},
            "Expected code_size to be below the 12 features of layer 'backbone', but got 12. Leave",
        ),
        (
            {"layer": "backbone.l"},
            "Expected layer to be 'backbone' or a part of it, but got 'backbone.l'. Did you mean 'b",
        ),
        ({"layer": "head"}, "Expected layer to be 'backbone' or a part of it, but got 'head'."),
    ],
)
def test_refuses_what_does_not_fit_the_network(
    learn: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(EBLL(**arguments))
    assert str(error.value).startswith(message)


def test_refuses_a_layer_that_is_used_twice(learn: Any) -> None:
    relu = nn.ReLU()
    twice = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), relu, nn.Linear(8, 8), relu)
    with pytest.raises(ConfigurationError, match=r"but got 2 outputs from 'backbone\.2'"):
        learn(EBLL(layer="backbone.2"), backbone=twice)


def test_names_a_diverged_autoencoder(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match="encoder of task 0 to be finite, but its weight"):
        learn(EBLL(reconstruction=1e300))
