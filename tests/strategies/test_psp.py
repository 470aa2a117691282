"""Superposition against plain training in other coordinates, torch's complex numbers and z-scores."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import pi
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bpn_lightning.costs import Bytes, bytes_per_task, measured_bytes
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.nn.layers import ComplexKeys, ComplexLinear, Keys, SwitchableLinear
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.psp import (
    ParameterSuperposition,
    binary_key,
    check_elementwise,
    phase_key,
    turned,
)

LAYERS = ("backbone.1", "backbone.3", "head")  # of MLP([16, 12])
COMPLEX = {"keys": "complex"}
OPTIMIZERS = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.003, weight_decay=0.01),
}


def network_of_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
    )


CONVOLUTIONS = {
    "layers": ["backbone.0", "backbone.2", "backbone.4", "head"],
    "backbone": network_of_convolutions,
}


def banks(module: Any) -> dict[str, Tensor]:
    """Every bank of keys by the name of its layer, copied."""
    return {
        name.removesuffix(".keys"): part.bank.clone()
        for name, part in module.network.named_modules()
        if isinstance(part, Keys)
    }


def weights(run: Any) -> dict[str, Tensor]:
    """Backbone and head without anything of bias units and keys."""
    return {name: value for name, value in run.weights().items() if "keys" not in name}


def multiply(module: Any, keys: dict[str, Tensor]) -> None:
    """Turn the coordinates of every keyed layer's weights."""
    with torch.no_grad():
        for name, key in keys.items():
            weight = module.network.get_submodule(name).weight
            weight.mul_(key.view(1, *weight.shape[1:]))


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].clone())


class OneKey(ParameterSuperposition):
    """A control: the key of the first task serves all."""

    def on_stream_start(self, host: Any, stream: Any) -> None:
        super().on_stream_start(host, stream)
        for keys in self.keys.values():
            keys.bank[:] = keys.bank[0].clone()


# --- what it must be equal to --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mask", ["all", "task"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_one_key_for_all_is_plain_training_in_other_coordinates(
    prepare: Any, same: Any, optimizer: str, mask: str, convolutions: bool
) -> None:
    """Rounding knows no signs: losses and weights bit for bit, through the optimizer's state."""
    arguments: dict[str, Any] = {
        "optimizer": OPTIMIZERS[optimizer],
        "mask": mask,
        "stream": {"num_tasks": 3, "epochs_per_task": 2},
    }
    layers = None
    if convolutions:
        # One group: the key of a grouped convolution is no row that multiplies all its weights.
        layers = ["backbone.0", "backbone.2", "head"]
        arguments["backbone"] = lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
        )
    losses = Losses(), Losses()
    keyed = prepare(OneKey(layers=layers), **arguments)
    keyed.trainer.callbacks.append(losses[0])
    start = {name: value for name, value in weights(keyed).items() if name.endswith("weight")}
    keyed.fit()
    keys = {name: bank[0] for name, bank in banks(keyed.module).items()}
    assert all((key == -1).any() for key in keys.values())

    plain = prepare(FineTuning(), **arguments)
    same({name: weights(plain)[name] for name in start}, start)
    multiply(plain.module, keys)
    plain.trainer.callbacks.append(losses[1])
    plain.fit()

    assert len(losses[0].values) == 3 * 2 * 5
    assert losses[0].values == losses[1].values
    multiply(keyed.module, keys)
    same(weights(keyed), weights(plain))
    same(keyed.module.accuracy_matrix.accuracy, plain.module.accuracy_matrix.accuracy)
    assert str(keyed.random) == str(plain.random)


@pytest.mark.parametrize("arguments", [{"keys": "ones"}, {"layers": ["head"], "keys": "ones"}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_keys_of_one_are_fine_tuning(
    learn: Any, same: Any, arguments: dict[str, Any], optimizer: str
) -> None:
    options = {"optimizer": OPTIMIZERS[optimizer], "stream": {"reset_optimizer": "never"}}
    keyed = learn(ParameterSuperposition(**arguments), **options)
    plain = learn(FineTuning(), **options)
    same(weights(keyed), weights(plain))
    same(keyed.optimizer_state(), plain.optimizer_state())
    same(keyed.module.accuracy_matrix.accuracy, plain.module.accuracy_matrix.accuracy)
    assert str(keyed.random) == str(plain.random)


def test_a_first_key_of_ones_is_loading_the_weights_times_a_first_key(
    prepare: Any, same: Any
) -> None:
    """So one option serves a pretrained network; with EWC and bias units, which work by element."""
    options: dict[str, Any] = {"stream": {"num_tasks": 3}}

    def beside() -> list[Any]:
        return [BeneficialPerturbation(6), EWC(100.0)]

    given = prepare(ParameterSuperposition(first_key="ones"), *beside(), **options).fit()
    turn = {
        name: binary_key(bank.shape[1], seeded_generator("turn", name))
        for name, bank in banks(given.module).items()
    }

    class Turned(ParameterSuperposition):
        def on_stream_start(self, host: Any, stream: Any) -> None:
            super().on_stream_start(host, stream)
            for name, keys in self.keys.items():
                keys.bank.mul_(turn[name])

    loaded = prepare(Turned(first_key="ones"), *beside(), **options)
    multiply(loaded.module, turn)
    loaded.fit()
    same({name: bank[0] for name, bank in banks(loaded.module).items()}, turn)
    multiply(loaded.module, turn)
    same(weights(loaded), weights(given))
    same(loaded.module.accuracy_matrix.accuracy, given.module.accuracy_matrix.accuracy)


@pytest.mark.parametrize("keys", ["binary", "complex"])
def test_a_first_key_of_ones_starts_as_the_network_that_is_given(
    prepare: Any, watch: Any, keys: Any
) -> None:
    compared = []

    def compare(host: Any, task: Any) -> None:
        inputs = next(iter(host.batches(task.id, "test"))).inputs
        with torch.no_grad():
            answer, wanted = host.network(inputs, task=task.id), before(inputs)
        compared.append(torch.allclose(answer, wanted, atol=1e-5))

    run = prepare(
        ParameterSuperposition(keys, first_key="ones"),
        watch(start=compare),
        optimizer=partial(SGD, lr=0.0),
    )
    before = nn.Sequential(deepcopy(run.module.network.backbone), deepcopy(run.module.network.head))
    run.fit()
    assert compared == [True, False]  # the second task has a random key


# --- the keys ------------------------------------------------------------------------------------


def drawn(prepare: Any, *arguments: Any, seed: int = 3, tasks: int = 5, **options: Any) -> Any:
    """The banks at the start of a stream, whatever was drawn before."""
    run = prepare(stream={"seed": seed, "num_tasks": tasks}, **options)
    strategy = ParameterSuperposition(*arguments)
    strategy.configure(run.module.host, run.stream)
    torch.rand(int(torch.randint(1, 99, ())))
    before = torch.get_rng_state()
    strategy.on_stream_start(run.module.host, run.stream)
    assert torch.equal(torch.get_rng_state(), before)
    return banks(run.module)


@pytest.mark.parametrize("kind", ["binary", "complex"])
def test_keys_follow_from_seed_task_and_layer_only(prepare: Any, same: Any, kind: str) -> None:
    draw = partial(drawn, prepare, kind, backbone=lambda: MLP([64, 64]))
    five = draw()
    torch.manual_seed(77)
    same(draw(), five)
    same(draw(tasks=2), {name: bank[:2] for name, bank in five.items()})
    other = draw(seed=4)
    rows = [row.tolist() for bank in (*five.values(), *other.values()) for row in bank]
    assert len(rows) == len({tuple(row) for row in rows}) == 2 * 3 * 5


def test_a_layers_keys_do_not_depend_on_the_other_layers(prepare: Any, same: Any) -> None:
    run = prepare(stream={"seed": 3, "num_tasks": 5})
    strategy = ParameterSuperposition(layers=["head"])
    strategy.configure(run.module.host, run.stream)
    strategy.on_stream_start(run.module.host, run.stream)
    same(banks(run.module), {"head": drawn(prepare)["head"]})


def test_signs_are_fair_and_tasks_uncorrelated(prepare: Any) -> None:
    """Mean and correlation of n random signs are within 4 standard deviations of 0."""
    bank = drawn(prepare, backbone=lambda: MLP([2000]))["head"].double()
    tasks, n = bank.shape
    assert (bank.abs() == 1).all()
    assert (bank.mean(1).abs() < 4 / n**0.5).all()
    correlations = (bank @ bank.T / n)[~torch.eye(tasks, dtype=torch.bool)]
    assert (correlations.abs() < 4 / n**0.5).all()


def test_phases_are_uniform(prepare: Any) -> None:
    bank = drawn(prepare, "complex", backbone=lambda: MLP([2000]))["head"].double()
    assert -pi <= bank.min() < -pi + 0.02
    assert pi - 0.02 < bank.max() <= pi
    for power in (1, 2, 3):  # of a uniform phase, all moments vanish
        moments = torch.exp(1j * power * bank).mean(1)
        assert (moments.abs() < 4 / 2000**0.5).all()
    between = torch.exp(1j * (bank[1:] - bank[:-1])).mean(1)
    assert (between.abs() < 4 / 2000**0.5).all()


def test_other_tasks_weights_arrive_as_noise_of_known_size() -> None:
    """In mode t the sum of W_s k_s gives W_t x and noise of mean 0, variance sum (W_s x)^2."""
    tasks, inputs, outputs = 40, 300, 50
    layer = nn.Linear(inputs, outputs, bias=False).double()
    layer = SwitchableLinear.convert(layer, keys=Keys(tasks, inputs))
    for task in range(tasks):
        layer.keys.write(task, binary_key(inputs, seeded_generator("noise", task)))
    own = torch.randn(tasks, outputs, inputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_((own * layer.keys.bank[:, None]).sum(0))
    x = torch.randn(inputs, dtype=torch.float64)
    scores = []
    for task in range(tasks):
        layer.keys.switch(task)
        noise = layer(x).detach() - own[task] @ x
        others = torch.arange(tasks) != task
        scores.append(noise / (own[others] * x).square().sum((0, 2)).sqrt())
    z = torch.cat(scores)
    assert z.mean().abs() < 4 / len(z) ** 0.5
    assert abs(z.var() - 1) < 4 * (2 / len(z)) ** 0.5


def test_keys_do_not_change_while_weights_learn(learn: Any, watch: Any, same: Any) -> None:
    seen: list[Any] = []
    note = watch(start=lambda host, task: seen.append(banks(host)))
    run = learn(ParameterSuperposition(), note, stream={"num_tasks": 3})
    seen.append(banks(run.module))
    for later in seen[1:]:
        same(later, seen[0])


def test_a_trained_network_keeps_its_keys_in_another_stream(
    learn: Any, prepare: Any, same: Any
) -> None:
    run = learn(ParameterSuperposition())
    before, state = banks(run.module), deepcopy(run.module.network.state_dict())
    other = prepare(ParameterSuperposition(), stream={"seed": 99})
    other.trainer.test(run.module, other.stream, verbose=False)
    same(banks(run.module), before)
    same(run.module.network.state_dict(), state)


# --- the network ---------------------------------------------------------------------------------


def by_hand(host: Any, inputs: Tensor, task: int) -> Tensor:
    """Alg. 3: sigma(W (V * k_t) + b + BIAS_t), layer by layer, with 64-bit sums."""
    value = inputs.flatten(1).double()
    for name in LAYERS:
        layer = host.network.get_submodule(name)
        key = layer.keys.bank[task].double()
        value = (value * key) @ layer.weight.detach().double().T + layer.bias.detach().double()
        if layer.bias_units is not None:
            value = value + layer.bias_units.bank[task].double()
        value = value if name == "head" else value.relu()
    return value


def by_complex_numbers(host: Any, inputs: Tensor, task: int) -> Tensor:
    """The same with torch's complex numbers: ReLU on both parts, real logits."""
    value = inputs.flatten(1).to(torch.complex128)
    for name in LAYERS:
        layer = host.network.get_submodule(name)
        phases = layer.keys.bank[task].double()
        key = torch.polar(torch.ones_like(phases), phases)
        weight = torch.complex(layer.weight, layer.weight_imag).detach().to(torch.complex128)
        value = (value * key) @ weight.T + layer.bias.detach()
        if layer.bias_units is not None:
            value = value + layer.bias_units.bank[task]
        value = value if name == "head" else torch.complex(value.real.relu(), value.imag.relu())
    return value.real


@pytest.mark.parametrize(("keys", "answer"), [("binary", by_hand), ("complex", by_complex_numbers)])
@pytest.mark.parametrize("beside", ["alone", "bd first", "bd last"])
@pytest.mark.parametrize("widths", [[16, 12], [12, 12]], ids=["16-12", "square"])
def test_key_and_bias_follow_the_mode(
    learn: Any, keys: Any, answer: Callable[..., Tensor], beside: str, widths: list[int]
) -> None:
    """In a square layer a key on what leaves it would have the right shape, too."""
    strategies: list[Any] = [ParameterSuperposition(keys)]
    if beside != "alone":
        strategies.append(BeneficialPerturbation(6))
    strategies = strategies[::-1] if beside == "bd first" else strategies
    run = learn(*strategies, stream={"num_tasks": 3}, backbone=lambda: MLP(widths))
    inputs = next(iter(run.module.host.batches(0, "test"))).inputs
    answers = []
    with torch.no_grad():
        for task in range(3):
            answers.append(run.module(inputs, task=task))
            wanted = answer(run.module, inputs, task).float()
            torch.testing.assert_close(answers[-1], wanted, rtol=1e-4, atol=1e-4)
    assert not any(torch.equal(answers[0], other) for other in answers[1:])
    if beside != "alone":
        assert (run.module.network.head.bias_units.bank != 0).any(1).all()


@pytest.mark.parametrize("keys", ["binary", "complex"])
def test_the_order_of_attaching_is_irrelevant(learn: Any, same: Any, keys: Any) -> None:
    both = lambda: [ParameterSuperposition(keys), BeneficialPerturbation(6)]
    one, other = learn(*both()), learn(*both()[::-1])
    same(one.module.network.state_dict(), other.module.network.state_dict())


@pytest.mark.parametrize("keys", ["binary", "complex"])
def test_importances_see_the_keyed_input(learn: Any, watch: Any, keys: Any) -> None:
    """EWC's Fisher against one backward per sample, in the task's mode."""
    ewc, wanted = EWC(), {}

    def loop(host: Any, task: Any) -> None:
        parameters = host.network.shared_parameters(include_head=True)
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        count = 0
        for batch in host.batches(task.id, "train"):
            for sample, target in zip(batch.inputs, batch.targets, strict=True):
                loss = F.cross_entropy(host.network(sample[None], task=task.id), target[None])
                gradients = torch.autograd.grad(loss, list(parameters.values()))
                for name, gradient in zip(parameters, gradients, strict=True):
                    total[name] += gradient.square()
                count += 1
        wanted.update({name: value / count for name, value in total.items()})

    learn(
        ParameterSuperposition(keys),
        BeneficialPerturbation(6),
        watch(end=loop),
        ewc,
        stream={"num_tasks": 1},
    )
    assert wanted.keys() == ewc.penalty.importance.keys()
    assert not any("keys" in name for name in wanted)
    assert ("head.weight_imag" in wanted) == (keys == "complex")
    for name, value in wanted.items():
        torch.testing.assert_close(ewc.penalty.importance[name], value, rtol=1e-3, atol=1e-7)


CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "binary": ([partial(ParameterSuperposition)], {}),
    "complex": ([partial(ParameterSuperposition, "complex")], {}),
    "bd": ([ParameterSuperposition, partial(BeneficialPerturbation, 6)], {}),
    "complex bd": (
        [partial(ParameterSuperposition, "complex"), partial(BeneficialPerturbation, 6)],
        {},
    ),
    "convolutions": (
        [partial(ParameterSuperposition, layers=CONVOLUTIONS["layers"])],
        {"backbone": CONVOLUTIONS["backbone"]},
    ),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> Any:
    """Fresh strategies and the arguments of a run of three tasks."""
    made, arguments = CASES[request.param]
    return [make() for make in made], {"stream": {"num_tasks": 3}} | arguments


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_a_task_per_sample_equals_a_forward_per_task(learn: Any, case: Any, mask: str) -> None:
    module = learn(*case[0], mask=mask, **case[1]).module
    inputs = torch.cat(
        [next(iter(module.host.batches(task, "test"))).inputs[:8] for task in range(3)]
    )
    tasks = torch.tensor([0, 1, 2, 2, 1, 0] * 4)
    with torch.no_grad():
        mixed = module(inputs, task=tasks)
        for task in range(3):
            own = module(inputs, task=task)[tasks == task]
            torch.testing.assert_close(mixed[tasks == task], own, rtol=1e-4, atol=1e-4)


def test_looking_at_modes_changes_nothing(learn: Any, case: Any, same: Any) -> None:
    module = learn(*case[0], **case[1]).module
    state, generator = deepcopy(module.network.state_dict()), torch.get_rng_state()
    inputs = next(iter(module.host.batches(0, "test"))).inputs
    with torch.no_grad():
        first = [module(inputs, task=task) for task in range(3)]
        rows = [module.evaluate([2, 0, 1]), module.evaluate()[[2, 0, 1]]]
        again = [module(inputs, task=task) for task in (2, 1, 0)][::-1]
    same(again, first)
    same(rows[1], rows[0])
    same(module.network.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.equal(first[0], first[1])


# --- restarts ------------------------------------------------------------------------------------


class Saves(Callback):
    """A checkpoint after every third batch."""

    def __init__(self, folder: Any) -> None:
        self.folder, self.paths = folder, []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % 3 == 0:
            self.paths.append(self.folder / f"{trainer.global_step}.ckpt")
            trainer.save_checkpoint(self.paths[-1])


@pytest.mark.slow
def test_resuming_changes_nothing(prepare: Any, tmp_path: Any, same: Any, request: Any) -> None:
    for name, (made, arguments) in CASES.items():
        folder = tmp_path / name
        folder.mkdir()
        options = {"optimizer": partial(Adam, lr=0.003), "stream": {"num_tasks": 2}} | arguments
        run = prepare(*(make() for make in made), **options)
        saves = Saves(folder)
        run.trainer.callbacks.append(saves)
        run.fit()
        assert len(saves.paths) == 3
        for path in saves.paths[1:]:
            again = prepare(*(make() for make in made), **options)
            torch.manual_seed(5)
            again.trainer.fit(again.module, run.stream, ckpt_path=path, weights_only=True)
            same(again.module.network.state_dict(), run.module.network.state_dict())


def test_a_checkpoint_answers_without_a_trainer(learn: Any, case: Any, tmp_path: Any) -> None:
    run = learn(*case[0], **case[1])
    path = tmp_path / "last.ckpt"
    run.trainer.save_checkpoint(path)
    backbone = case[1].get("backbone", lambda: MLP([16, 12]))()
    loaded = ContinualModule.load_from_checkpoint(path, weights_only=True, backbone=backbone)
    loaded.eval()
    run.module.eval()
    inputs = next(iter(run.module.host.batches(0, "test"))).inputs
    with torch.no_grad():
        for task in range(3):
            assert torch.equal(loaded(inputs, task=task), run.module(inputs, task=task))


def learn_keys(keys: str, devices: int) -> dict[str, torch.Tensor]:
    seed_everything(0, verbose=False)
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=33, eval_batch_size=101)
    module = ContinualModule(MLP([16, 16]))
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=devices,
        # What rank 0 has is not sent to the others: they have to draw the same.
        strategy=DDPStrategy(broadcast_buffers=False) if devices > 1 else "auto",
        callbacks=[ParameterSuperposition(keys), BeneficialPerturbation(4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(trainer.global_rank)  # keys are not from the global generator
    trainer.fit(module, stream)
    return dict(module.network.state_dict())


@pytest.mark.parametrize("keys", ["binary", "complex"])
def test_two_processes_have_the_keys_of_one(ranks: Any, same: Any, keys: str) -> None:
    one, (two, other) = learn_keys(keys, 1), ranks(learn_keys, keys, 2)
    same(two, other)
    banks = [name for name in one if "keys.bank" in name]
    assert banks
    for name in banks:
        same(two[name], one[name])
        assert len(one[name].unique()) > 1
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5, equal_nan=True)


# --- complex weights -----------------------------------------------------------------------------


def test_complex_weights_keep_their_modulus_and_get_uniform_phases(prepare: Any) -> None:
    run = prepare(backbone=lambda: MLP([200, 200]))
    before = weights(run)
    strategy = ParameterSuperposition("complex")
    strategy.configure(run.module.host, run.stream)
    global_state = torch.get_rng_state()
    strategy.on_stream_start(run.module.host, run.stream)
    assert torch.equal(torch.get_rng_state(), global_state)
    phases = []
    for name in LAYERS:
        layer = run.module.network.get_submodule(name)
        weight = torch.complex(layer.weight, layer.weight_imag).detach()
        torch.testing.assert_close(weight.abs(), before[f"{name}.weight"].abs())
        phases.append((weight / before[f"{name}.weight"]).angle().flatten())
        moment = torch.exp(1j * phases[-1]).mean()
        assert moment.abs() < 4 / len(phases[-1]) ** 0.5
    between = torch.exp(1j * (phases[0][:5000] - phases[1][:5000])).mean()
    assert between.abs() < 4 / 5000**0.5


def test_turned_weights_are_the_products_with_unit_numbers() -> None:
    weight, phases = torch.randn(50).double(), torch.randn(50).double()
    wanted = weight * torch.exp(1j * phases)
    torch.testing.assert_close(turned(weight, phases), (wanted.real, wanted.imag))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_holds_the_imaginary_parts(learn: Any, watch: Any, optimizer: str) -> None:
    before = []

    def look(host: Any, task: Any) -> None:
        before.append(
            {name: value.detach().clone() for name, value in host.network.named_parameters()}
        )

    run = learn(
        ParameterSuperposition("complex"), watch(start=look), optimizer=OPTIMIZERS[optimizer]
    )
    for name in LAYERS:
        part = f"{name}.weight_imag"
        assert run.module.network.get_parameter(part) in run.trainer.optimizers[0].state
        assert (before[0][part] != before[1][part]).any()


def test_multi_heads_keep_the_imaginary_rows_of_other_tasks(learn: Any, watch: Any) -> None:
    kept = []

    def note(host: Any, task: Any) -> None:
        kept.append(
            (
                host.network.head.weight.detach().clone(),
                host.network.head.weight_imag.detach().clone(),
            )
        )

    learn(
        ParameterSuperposition("complex"),
        watch(end=note),
        mask="task",
        optimizer=OPTIMIZERS["momentum"],
    )
    for old, new in zip(*kept, strict=True):
        assert torch.equal(old[:2], new[:2])
        assert not torch.equal(old[2:], new[2:])


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (lambda: nn.LayerNorm(16), "backbone.2 (LayerNorm)"),
        (lambda: nn.BatchNorm1d(16), "backbone.2 (BatchNorm1d)"),
        (lambda: nn.Softmax(1), "backbone.2 (Softmax)"),
        (lambda: nn.GLU(), "backbone.2 (GLU)"),
        (lambda: nn.MaxPool1d(3), "backbone.2 (MaxPool1d)"),
        (lambda: nn.PReLU(16), "backbone.2 (PReLU)"),
        (lambda: nn.Unflatten(1, (4, 4)), "backbone.2 (Unflatten)"),
    ],
)
def test_refuses_networks_that_mix_real_and_imaginary_parts(
    between: Callable[[], nn.Module], named: str
) -> None:
    layers = [nn.Linear(6, 16), nn.Linear(16, 3)]
    network = nn.Module()
    network.backbone = nn.Sequential(nn.Flatten(), layers[0], between(), layers[1])
    network.forward = network.backbone.forward
    for layer in layers:
        ComplexLinear.make_complex(layer, ComplexKeys(2, layer.in_features), layer is layers[1])
    with pytest.raises(ConfigurationError) as error:
        check_elementwise(network, torch.rand(2, 2, 3))
    assert str(error.value) == (
        f"Expected only elementwise operations between linear layers when keys are 'complex', but {named} is not. Set keys to 'binary', or use activations and dropout only."
    )
    assert not any(part._forward_pre_hooks for part in network.modules())


class Functions(nn.Module):
    """Reshapes by a function, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.layer_norm(self.first(x.flatten(1)), (16,)))


def test_refuses_networks_whose_functions_expect_real_shapes(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match="the forward pass raised RuntimeError"):
        learn(ParameterSuperposition("complex"), backbone=Functions)


@pytest.mark.parametrize(
    "between",
    [nn.ReLU, partial(nn.LeakyReLU, inplace=True), nn.Dropout, nn.Identity, nn.Tanh, nn.PReLU],
)
def test_accepts_networks_that_work_by_element(learn: Any, between: Any) -> None:
    learn(
        ParameterSuperposition("complex"),
        backbone=lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.Flatten(),  # before the first complex layer, anything goes
            nn.LayerNorm(72),
            nn.Linear(72, 16),
            between(),
            nn.Sequential(nn.Linear(16, 12), nn.ReLU()),
        ),
    )


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["binary", "complex"])
def test_remembers_what_fine_tuning_forgets(learn: Any, keys: Any) -> None:
    final = {
        type(strategy): learn(
            strategy,
            stream={"num_tasks": 5, "epochs_per_task": 4, "batch_size": 32},
            optimizer=partial(SGD, lr=0.02),
            backbone=lambda: MLP([200, 200]),
        ).module.accuracy_matrix.accuracy[-1]
        for strategy in (FineTuning(), ParameterSuperposition(keys))
    }
    assert final[ParameterSuperposition].mean() > 0.85
    assert final[FineTuning].mean() < 0.5


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("keys", ["binary", "complex"])
def test_signs_are_signs_in_every_precision(learn: Any, keys: Any, precision: str) -> None:
    # Bias units do not go with weights of half precision.
    others = [] if precision == "bf16-true" else [BeneficialPerturbation(4)]
    run = learn(ParameterSuperposition(keys), *others, trainer={"precision": precision})
    for bank in banks(run.module).values():
        assert keys == "complex" or set(bank.unique().tolist()) == {-1, 1}
    assert all(value.isfinite().all() for value in weights(run).values())


# --- where and at what cost ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keyed"),
    [
        ({}, ["backbone.1", "backbone.3", "head"]),
        ({"key_input": False}, ["backbone.3", "head"]),
        ({"key_output": False}, ["backbone.1", "backbone.3"]),
        ({"key_input": False, "key_output": False}, ["backbone.3"]),
        ({"layers": ["head"]}, ["head"]),
    ],
    ids=str,
)
def test_where_keys_are(learn: Any, arguments: dict[str, Any], keyed: list[str]) -> None:
    assert list(banks(learn(ParameterSuperposition(**arguments)).module)) == keyed


def test_pixels_that_a_convolution_takes_have_no_key(learn: Any) -> None:
    run = learn(ParameterSuperposition(key_input=False), backbone=network_of_convolutions)
    assert list(banks(run.module)) == ["backbone.4", "head"]
    assert type(run.module.network.backbone[0]) is nn.Conv2d


def test_bytes_of_the_network_of_the_paper() -> None:
    """3,072 pixels, three hidden layers of 300, 20 classes; 10 tasks."""
    sizes = {"a": 3072, "b": 300, "c": 300, "head": 300}
    network = SimpleNamespace(tasks=range(10), linear_layers=lambda: {"head": nn.Linear(300, 20)})
    host = SimpleNamespace(network=network)
    strategy = ParameterSuperposition()
    strategy.keys = {name: Keys(10, size) for name, size in sizes.items()}
    assert bytes_per_task([strategy], host) == {"measured": 3972, "paper": 15968}
    del strategy.keys["head"]
    assert strategy.declared_bytes(host).per_task_in_paper == 4 * (3072 + 300 + 300)


@pytest.mark.parametrize(
    ("arguments", "backbone", "total", "one"),
    [
        ({}, None, 2 * (64 + 16 + 12), 64 + 16 + 12),
        ({"keys": "ones"}, None, 2 * (64 + 16 + 12), 64 + 16 + 12),
        ({"layers": ["head"]}, None, 2 * 12, 12),
        (
            COMPLEX,
            None,
            4 * (2 * (64 + 16 + 12) + 64 * 16 + 16 * 12 + 12 * 4),
            4 * (64 + 16 + 12),
        ),
        (
            {"layers": CONVOLUTIONS["layers"]},
            network_of_convolutions,
            2 * (9 + 54 + 64 + 12),
            9 + 54 + 64 + 12,
        ),
    ],
)
def test_measured_bytes_are_declared_bytes(
    learn: Any, arguments: dict[str, Any], backbone: Any, total: int, one: int
) -> None:
    strategy = ParameterSuperposition(**arguments)
    module = learn(strategy, **({"backbone": backbone} if backbone else {})).module
    assert measured_bytes(strategy, module.host) == strategy.declared_bytes(module.host).held
    assert strategy.declared_bytes(module.host).held == Bytes(total, total)
    assert strategy.declared_bytes(module.host).per_task == one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"keys": "binari"},
            (
                "Expected keys to be one of binary, complex, ones, but got 'binari'. "
                "Did you mean 'binary'?"
            ),
        ),
        (
            {"first_key": "one"},
            "Expected first_key to be one of random, ones, but got 'one'. Did you mean 'ones'?",
        ),
        (
            {"layers": []},
            (
                "Expected layers to name at least one layer, but got none. Leave it out to use keys in every linear layer."
            ),
        ),
        (
            {"layers": ["head"], "key_output": False},
            (
                "Expected key_output to be true when layers are named, but got false. Leave the layer out of layers."
            ),
        ),
        (
            {"layers": ["head"], "key_input": False},
            (
                "Expected key_input to be true when layers are named, but got false. Leave the layer out of layers."
            ),
        ),
        *(
            (
                {**COMPLEX, argument: value},
                (
                    "Expected layers, key_input and key_output to have their defaults when keys are 'complex', since a layer that follows a complex one has to be complex too. Set keys to 'binary'."
                ),
            )
            for argument, value in (
                ("layers", ["head"]),
                ("key_input", False),
                ("key_output", False),
            )
        ),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        ParameterSuperposition(**arguments)
    assert str(error.value) == message


def test_names_the_layers_that_there_are(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(ParameterSuperposition(layers=["backbone.1"]), backbone=network_of_convolutions)
    assert str(error.value) == (
        "Expected layers to be layers of the network that can have keys, but got 'backbone.1'. Did you "
        "mean 'backbone.4'? It has backbone.0, backbone.2, backbone.4, head."
    )


def test_refuses_to_leave_every_layer_out(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(ParameterSuperposition(key_input=False), backbone=nn.Flatten)
    assert str(error.value) == (
        "Expected at least one layer with keys, but key_input and key_output exclude all linear layers of the network: head. Set one of them to true."
    )


@pytest.mark.parametrize(("first", "then"), [("binary", "complex"), ("complex", "binary")])
def test_refuses_keys_of_another_kind(learn: Any, prepare: Any, first: Any, then: Any) -> None:
    run = learn(ParameterSuperposition(first))
    other = prepare(ParameterSuperposition(then))
    with pytest.raises(ConfigurationError) as error:
        other.trainer.test(run.module, other.stream, verbose=False)
    assert str(error.value) == (
        f"Expected keys to be {first!r}, as those that layer backbone.1 has, but got {then!r}."
    )


def test_phase_keys_are_their_generators() -> None:
    one, other = (phase_key(50, seeded_generator("x")) for _ in range(2))
    assert torch.equal(one, other)
    assert one.abs().max() <= pi
