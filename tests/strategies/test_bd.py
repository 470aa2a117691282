"""Bias units against the layer's own bias gradient, integer lattices and the base method's bits."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from bpn_lightning.costs import bytes_per_task
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.strategies.bd import BeneficialPerturbation, perturbation
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning

LAYERS = ("backbone.1", "backbone.3", "head")  # of MLP([16, 12])
RANK = 6


def units(host: Any) -> dict[str, Any]:
    return {name: host.network.linear_layers()[name].bias_units for name in LAYERS}


def values(host: Any, which: str) -> dict[str, Tensor]:
    """M, W or the bank of every layer, copied."""
    return {name: getattr(unit, which).detach().clone() for name, unit in units(host).items()}


class Path:
    """Every value and every gradient of M, update by update, of each task."""

    def __init__(self, watch: Any) -> None:
        self.values: list[list[dict[str, Tensor]]] = []
        self.gradients: list[list[dict[str, Tensor | None]]] = []
        # Before BeneficialPerturbation it sees gradients, after it the moves.
        self.before = watch(capture=self.note_gradient)
        self.after = watch(start=self.begin, stepped=self.note_value)

    def begin(self, host: Any, task: Any) -> None:
        self.values.append([values(host, "M")])
        self.gradients.append([])

    def note_gradient(self, host: Any, parameters: Any) -> None:
        self.gradients[-1].append({n: u.M.grad.clone() for n, u in units(host).items()})

    def note_value(self, host: Any, parameters: Any) -> None:
        self.values[-1].append(values(host, "M"))


# --- the step of M -------------------------------------------------------------------------------

PATHS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": partial(SGD, lr=0.05)},
    "momentum": {"optimizer": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1)},
    "adam": {"optimizer": partial(Adam, lr=0.003, weight_decay=0.1)},
    "large rate": {"optimizer": partial(SGD, lr=0.5)},
    "clip norm": {"trainer": {"gradient_clip_val": 0.01}},
    "clip value": {"trainer": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}},
    "schedule": {"scheduler": lambda optimizer: ExponentialLR(optimizer, 0.5)},
    "accumulate": {"trainer": {"accumulate_grad_batches": 2}},
    "bf16": {"trainer": {"precision": "bf16-mixed"}},
    "never reset": {
        "optimizer": partial(SGD, lr=0.05, momentum=0.9),
        "stream": {"reset_optimizer": "never"},
    },
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("m_start", ["zero", "normal"])
def test_every_step_of_m_is_epsilon_against_the_sign(
    learn: Any, watch: Any, name: str, m_start: Any
) -> None:
    """M stays on the lattice M0 + epsilon * integers, with the parity of the steps that it took."""
    path, epsilon = Path(watch), 0.05
    strategy = BeneficialPerturbation(RANK, epsilon, m_start=m_start)
    learn(path.before, strategy, path.after, **PATHS[name])
    updates = 3 if name == "accumulate" else 5  # of 288 samples in batches of 64, the last is short
    assert [len(task) for task in path.gradients] == [updates, updates]
    for task, gradients in zip(path.values, path.gradients, strict=True):
        for layer in LAYERS:
            for (old, new), gradient in zip(pairwise(task), gradients, strict=True):
                step = (new[layer] - old[layer]) / epsilon
                torch.testing.assert_close(step, -gradient[layer].sign(), rtol=0, atol=1e-5)
            place = (task[-1][layer] - task[0][layer]) / epsilon
            stood = sum((gradient[layer] == 0).int() for gradient in gradients)
            torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-4)
            assert (place.round().abs() <= updates - stood).all()
            assert (place.round() % 2 == (updates - stood) % 2).all()
        assert any((gradient["head"] != 0).all() for gradient in gradients)


def test_gradients_follow_from_the_bias_gradient(learn: Any, watch: Any) -> None:
    """A bias and bias units are added at the same place, so they share the summed delta."""
    compared = []

    def look(host: Any, parameters: Any) -> None:
        for name, unit in units(host).items():
            delta = host.network.linear_layers()[name].bias.grad
            torch.testing.assert_close(unit.M.grad, (unit.W @ delta)[None], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(
                unit.W.grad, torch.outer(unit.M[0], delta), rtol=1e-4, atol=1e-7
            )
            compared.append(float(unit.W.grad.abs().max()))

    learn(watch(capture=look), BeneficialPerturbation(RANK))
    assert len(compared) == 2 * 5 * len(LAYERS)
    assert max(compared) > 1e-4


def test_normalized_steps_are_as_long_as_signs(learn: Any, watch: Any) -> None:
    path, epsilon = Path(watch), 0.03
    learn(path.before, BeneficialPerturbation(RANK, epsilon, direction="normalized"), path.after)
    for task, gradients in zip(path.values, path.gradients, strict=True):
        for layer in LAYERS:
            for (old, new), gradient in zip(pairwise(task), gradients, strict=True):
                step, wanted = new[layer] - old[layer], gradient[layer]
                assert step.norm() == pytest.approx(epsilon * RANK**0.5, rel=1e-4)
                assert F.cosine_similarity(step, -wanted).item() == pytest.approx(1, abs=1e-5)


def test_gradient_steps_are_epsilon_times_the_gradient(learn: Any, watch: Any) -> None:
    path = Path(watch)
    strategy = BeneficialPerturbation(RANK, 5.0, direction="gradient")
    learn(path.before, strategy, path.after, optimizer=partial(SGD, lr=0.01, momentum=0.9))
    for task, gradients in zip(path.values, path.gradients, strict=True):
        for (old, new), gradient in zip(pairwise(task), gradients, strict=True):
            for layer in LAYERS:
                wanted = old[layer] - 5.0 * gradient[layer]
                torch.testing.assert_close(new[layer], wanted, rtol=1e-6, atol=1e-6)


def test_frozen_learns_neither_m_nor_w(learn: Any, watch: Any) -> None:
    seen = []

    def note(host: Any, task: Any) -> None:
        seen.append(
            (values(host, "M"), values(host, "W"), host.network.head.weight.detach().clone())
        )

    strategy = BeneficialPerturbation(RANK, direction="frozen")
    run = learn(watch(end=note), strategy, watch(start=note), optimizer=partial(Adam, lr=0.01))
    for (m0, w0, head0), (m1, w1, head1) in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close((m0, w0), (m1, w1), rtol=0, atol=0)
        assert all(m.std() > 0.3 for m in m0.values())
        assert (head0 != head1).any()
    assert not any(p.requires_grad for unit in units(run.module).values() for p in (unit.M, unit.W))


@pytest.mark.parametrize("direction", ["sign", "gradient", "normalized", "frozen"])
def test_no_gradient_is_no_step(direction: Any) -> None:
    (step,) = perturbation([torch.zeros(1, 4)], direction, 0.1)
    assert torch.equal(step, torch.zeros(1, 4))


@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize("reset", ["always", "never"])
def test_no_optimizer_holds_m(learn: Any, watch: Any, optimizer: Any, reset: str) -> None:
    checked = []

    def look(host: Any, parameters: Any) -> None:
        held = {
            id(p) for group in host.module.optimizers(False).param_groups for p in group["params"]
        }
        for unit in units(host).values():
            assert id(unit.M) not in held
            assert id(unit.W) in held
            assert unit.M.grad is None  # nor does it count in the norm that is clipped
            checked.append(unit)

    look_on = watch(stepped=look)
    learn(
        BeneficialPerturbation(RANK),
        look_on,
        optimizer=partial(optimizer, lr=0.01),
        stream={"reset_optimizer": reset},
    )
    assert len(checked) == 2 * 5 * len(LAYERS)


def scaled_precision(scale: float) -> MixedPrecision:
    """fp16 with a scaler, on the CPU, where Lightning does not choose it by itself."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("direction", ["sign", "gradient", "normalized"])
def test_the_scaler_of_half_precision_does_not_scale_the_step(
    learn: Any, watch: Any, direction: Any
) -> None:
    """M is outside the optimizer, so its gradient is not unscaled with the others."""
    single, half = Path(watch), Path(watch)
    first = {"stream": {"num_tasks": 1}}
    learn(
        single.before, BeneficialPerturbation(RANK, 0.1, direction=direction), single.after, **first
    )
    learn(
        half.before,
        BeneficialPerturbation(RANK, 0.1, direction=direction),
        half.after,
        trainer={"plugins": [scaled_precision(1024.0)]},
        **first,
    )
    for layer in LAYERS:
        steps = [task[1][layer] - task[0][layer] for path in (single, half) for task in path.values]
        torch.testing.assert_close(steps[1], steps[0], rtol=0.05, atol=1e-4)


def test_an_update_that_the_scaler_skips_moves_nothing(learn: Any, watch: Any) -> None:
    path, attempts = Path(watch), []
    learn(
        path.before,
        watch(capture=lambda host, parameters: attempts.append(1)),
        BeneficialPerturbation(RANK),
        path.after,
        stream={"num_tasks": 1, "epochs_per_task": 2},
        trainer={"plugins": [scaled_precision(2.0**20)]},  # overflows until it has been halved
    )
    assert 1 < len(path.values[0]) < 1 + len(attempts) == 11
    for old, new in pairwise(path.values[0]):
        for layer in LAYERS:
            assert (new[layer] - old[layer]).abs().max() == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize(("direction", "invariant"), [("sign", True), ("gradient", False)])
def test_a_larger_loss_has_the_same_signs(
    learn: Any, watch: Any, same: Any, direction: Any, invariant: bool
) -> None:
    def hold(host: Any, parameters: Any) -> None:
        for value in (*parameters.values(), *(unit.W for unit in units(host).values())):
            value.grad = None

    def six_times(host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        return {"more": 6 * F.cross_entropy(logits, batch.targets, reduction="none")}

    paths = [Path(watch), Path(watch)]
    for path, terms in zip(paths, ({}, {"terms": six_times}), strict=True):
        strategy = BeneficialPerturbation(RANK, direction=direction)
        learn(watch(project=hold, **terms), strategy, path.after)
    once, seven = (path.values for path in paths)
    if invariant:
        same(seven, once)
        assert (once[0][-1]["head"] != once[0][0]["head"]).any()
    else:
        moves = [(path.values[0][1]["head"] - path.values[0][0]["head"]).norm() for path in paths]
        assert moves[1] / moves[0] == pytest.approx(7, rel=1e-3)


# --- beside another method -----------------------------------------------------------------------


@pytest.mark.parametrize("base", [FineTuning, EWC, partial(EWC, update="clamped")])
@pytest.mark.parametrize("mask", ["all", "task"])
def test_without_a_step_it_is_the_base_method(
    learn: Any, same: Any, base: Callable[[], Any], mask: str
) -> None:
    momentum = 0.0 if base is EWC else 0.9
    arguments = {
        "stream": {"num_tasks": 3, "reset_optimizer": "never"},
        "optimizer": partial(SGD, lr=0.05, momentum=momentum, weight_decay=0.01),
        "mask": mask,
    }
    alone = base()
    beside = base()
    one = learn(alone, **arguments)
    both = learn(BeneficialPerturbation(RANK, epsilon=0), beside, **arguments)
    same(both.weights(), one.weights())
    same(both.optimizer_state(), one.optimizer_state())
    same(beside.state_dict(), alone.state_dict())
    assert str(both.random) == str(one.random)
    same(both.module.accuracy_matrix.accuracy, one.module.accuracy_matrix.accuracy)


@pytest.mark.parametrize("bd_first", [True, False])
def test_importances_see_the_bias_whichever_comes_first(
    learn: Any, same: Any, bd_first: bool
) -> None:
    ewc = EWC()
    both = [BeneficialPerturbation(RANK), ewc]
    learn(*(both if bd_first else both[::-1]), stream={"num_tasks": 1})
    reference = EWC()
    learn(BeneficialPerturbation(RANK), reference, stream={"num_tasks": 1})
    same(ewc.state_dict(), reference.state_dict())
    assert not any("bias_units" in name for name in ewc.penalty.importance)


@pytest.mark.slow
def test_keeps_tasks_apart_that_ewc_alone_confuses(learn: Any) -> None:
    """What the method is for; the matrix's last row, each task in its own mode."""
    final = {
        len(both): learn(
            *both,
            stream={"num_tasks": 5, "epochs_per_task": 3, "batch_size": 32},
            optimizer=partial(SGD, lr=0.05),
            backbone=lambda: MLP([32, 32]),
        ).module.accuracy_matrix.accuracy[-1]
        for both in ((EWC(),), (BeneficialPerturbation(50), EWC()))
    }
    assert final[2].mean() > 0.8
    assert final[1].mean() < 0.5


# --- the life of a task --------------------------------------------------------------------------


def test_freezing_leaves_logits_as_they_were(learn: Any, watch: Any) -> None:
    answers: list[Tensor] = []

    def answer(host: Any, task: Any) -> None:
        host.network.eval()
        with torch.no_grad():
            answers.append(
                host.network(next(iter(host.batches(task.id, "test"))).inputs, task=task.id)
            )
        host.network.train()

    learn(watch(end=answer), BeneficialPerturbation(RANK), watch(end=answer))
    for live, frozen in zip(answers[::2], answers[1::2], strict=True):
        assert torch.equal(live, frozen)


def test_biases_of_learned_tasks_never_change(learn: Any, watch: Any) -> None:
    banks: list[dict[str, Tensor]] = []
    learn(
        BeneficialPerturbation(RANK),
        watch(end=lambda host, task: banks.append(values(host, "bank"))),
        stream={"num_tasks": 3},
    )
    for task, bank in enumerate(banks):
        for layer in LAYERS:
            assert (bank[layer][: task + 1] != 0).any(1).all()
            assert (bank[layer][task + 1 :] == 0).all()
            assert torch.equal(banks[-1][layer][: task + 1], bank[layer][: task + 1])


def test_a_task_starts_as_the_network_without_bias_units(learn: Any, watch: Any) -> None:
    def compare(host: Any, task: Any) -> None:
        with torch.no_grad(), host.network.task_mode(task.id):
            batch = next(iter(host.batches(task.id, "test")))
            plain = batch.inputs
            for layer in (*host.network.backbone, host.network.head):
                known = isinstance(layer, nn.Linear)
                plain = F.linear(plain, layer.weight, layer.bias) if known else layer(plain)
            assert torch.equal(host.network(batch.inputs), plain)

    learn(BeneficialPerturbation(RANK), watch(start=compare), stream={"num_tasks": 3})


def started(prepare: Any, layers: list[str] | None = None, seed: int = 3, task: int = 1) -> Any:
    """W of every layer at a task's start, whatever was drawn before."""
    run = prepare(stream={"seed": seed})
    strategy = BeneficialPerturbation(RANK, layers=layers, m_start="normal")
    strategy.configure(run.module.host, run.stream)
    torch.rand(int(torch.randint(1, 99, ())))
    before = torch.get_rng_state()
    strategy.on_task_start(run.module.host, run.stream.tasks[task])
    assert torch.equal(torch.get_rng_state(), before)
    return {name: (unit.W.detach(), unit.M.detach()) for name, unit in strategy.units.items()}


def test_draws_follow_from_seed_task_and_layer(prepare: Any, same: Any) -> None:
    drawn = started(prepare)
    torch.manual_seed(77)
    same(started(prepare), drawn)
    for other in (started(prepare, seed=4), started(prepare, task=0)):
        assert not any(torch.equal(other[name][0], drawn[name][0]) for name in LAYERS)
    assert not torch.equal(drawn["backbone.3"][0].flatten()[:12], drawn["head"][0].flatten()[:12])


def test_layers_of_one_shape_start_differently(prepare: Any) -> None:
    run = prepare(backbone=lambda: MLP([12, 12]))
    strategy = BeneficialPerturbation(RANK, m_start="normal")
    strategy.configure(run.module.host, run.stream)
    strategy.on_task_start(run.module.host, run.stream.tasks[0])
    one, other = strategy.units["backbone.1"], strategy.units["backbone.3"]
    assert one.W.shape == other.W.shape
    assert not torch.equal(one.W, other.W)
    assert not torch.equal(one.M, other.M)


def test_a_gradient_that_overflowed_behind_the_scale_moves_no_m() -> None:
    """M is outside the optimizer: no scaler looks at it, and the others may be finite."""
    strategy = BeneficialPerturbation(3, 0.1)
    host: Any = SimpleNamespace(loss_scale=1024.0)
    strategy._all_m = [nn.Parameter(torch.zeros(1, 3)) for _ in range(2)]
    strategy._all_m[0].grad = torch.tensor([[1.0, float("inf"), -1.0]])
    strategy._all_m[1].grad = torch.tensor([[1.0, -2.0, 0.0]])
    strategy.consume_grad(host, {})
    strategy.correct_step(host, {})
    assert not strategy._all_m[0].any()
    torch.testing.assert_close(strategy._all_m[1].data, torch.tensor([[-0.1, 0.1, 0.0]]))


@pytest.mark.parametrize("layers", [["head"], ["head", "backbone.3"]])
def test_draws_of_a_layer_do_not_depend_on_the_others(
    prepare: Any, same: Any, layers: list[str]
) -> None:
    everywhere = started(prepare)
    same(started(prepare, layers), {name: everywhere[name] for name in layers})


@pytest.mark.parametrize("w_scale", [1.0, 3.0])
def test_w_has_variance_one_over_rank(prepare: Any, w_scale: float) -> None:
    run = prepare(backbone=lambda: MLP([200]))
    strategy = BeneficialPerturbation(50, w_scale=w_scale)
    strategy.configure(run.module.host, run.stream)
    strategy.on_task_start(run.module.host, run.stream.tasks[0])
    w = strategy.units["backbone.1"].W.detach()
    assert w.std() * 50**0.5 == pytest.approx(w_scale, rel=0.03)  # of 10,000 draws: 4 sigma
    assert w.mean() * 50**0.5 == pytest.approx(0, abs=0.04 * w_scale)


def test_w_starts_with_clean_optimizer_state(learn: Any, watch: Any) -> None:
    """Also where the optimizer itself goes on: the first momentum is the first gradient."""
    first: dict[int, bool] = {}

    def look(host: Any, parameters: Any) -> None:
        if host.network.opened not in first:
            state = host.module.optimizers(False).state
            first[host.network.opened] = all(
                torch.equal(state[unit.W]["momentum_buffer"], unit.W.grad)
                for unit in units(host).values()
            )

    learn(
        BeneficialPerturbation(RANK, m_start="normal"),
        watch(stepped=look),
        optimizer=partial(SGD, lr=0.01, momentum=0.9),
        stream={"reset_optimizer": "never", "num_tasks": 3},
    )
    assert first == {0: True, 1: True, 2: True}


def test_shapes_are_fixed_from_the_first_step(learn: Any, watch: Any) -> None:
    shapes = []

    def note(host: Any, task: Any) -> None:
        shapes.append(
            [(n, tuple(p.shape), p.data_ptr()) for n, p in host.network.named_parameters()]
        )

    learn(BeneficialPerturbation(RANK), watch(start=note, end=note), stream={"num_tasks": 3})
    assert all(shape == shapes[0] for shape in shapes)


# --- modes ---------------------------------------------------------------------------------------


def half_way(learn: Any, watch: Any, look: Callable[[Any], None]) -> None:
    """Look at a module that has learned task 0, is learning 1, and does not know task 2."""

    def at(host: Any, parameters: Any) -> None:
        if host.network.opened == 1:
            host.network.eval()
            look(host)
            host.network.train()

    learn(BeneficialPerturbation(RANK), watch(stepped=at), stream={"num_tasks": 3})


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
@pytest.mark.parametrize("live", [True, False])
def test_a_task_per_sample_equals_a_forward_per_task(
    learn: Any, watch: Any, mask: str, live: bool
) -> None:
    compared = []

    def look(host: Any, *_: Any) -> None:
        if live and host.network.opened != 1:
            return
        inputs = torch.cat([next(iter(host.batches(task, "test"))).inputs[:8] for task in range(3)])
        tasks = torch.tensor([0, 1, 2, 2, 1, 0] * 4)
        with torch.no_grad():
            mixed = host.network(inputs, task=tasks)
            for task in range(3):
                own = host.network(inputs, task=task)[tasks == task]
                torch.testing.assert_close(mixed[tasks == task], own, rtol=1e-5, atol=1e-5)
                compared.append(own)
            alone = host.network(inputs[:1], task=tasks[:1])
            torch.testing.assert_close(alone, mixed[:1], rtol=1e-5, atol=1e-5)

    # Live: task 1 is being learned and has M and W; task 0 has its frozen bias, task 2 none.
    when = {"stepped": look} if live else {"end": look}
    strategies = BeneficialPerturbation(RANK), watch(**when)
    learn(*strategies, stream={"num_tasks": 3}, mask=mask)
    assert len(compared) == (15 if live else 9)


def test_modes_nest_and_return_on_errors(learn: Any, watch: Any) -> None:
    def look(host: Any) -> None:
        inputs = next(iter(host.batches(0, "test"))).inputs

        def answer() -> Tensor:
            with torch.no_grad():
                return host.network(inputs)

        live = answer()
        modes = [host.network(inputs, task=task) for task in range(3)]
        assert torch.equal(live, modes[1])
        assert not torch.equal(modes[0], modes[1])
        assert not torch.equal(modes[1], modes[2])
        with host.network.task_mode(0):
            assert torch.equal(answer(), modes[0])
            with host.network.task_mode(2):
                assert torch.equal(answer(), modes[2])
                with host.network.task_mode(torch.zeros(len(inputs), dtype=torch.long)):
                    torch.testing.assert_close(answer(), modes[0])
                assert torch.equal(answer(), modes[2])
                with pytest.raises(ZeroDivisionError), host.network.task_mode(1):
                    raise ZeroDivisionError
                assert torch.equal(answer(), modes[2])
            assert torch.equal(answer(), modes[0])
        assert torch.equal(answer(), live)
        for unknown in (3, -1):
            with pytest.raises(ConfigurationError) as error, host.network.task_mode(unknown):
                pass
            assert str(error.value) == (
                f"Expected task to be an id from 0 to 2, but got {unknown}."
            )
        assert torch.equal(answer(), live)

    with torch.no_grad():
        half_way(learn, watch, look)


def test_looking_at_modes_changes_nothing(learn: Any, watch: Any, same: Any) -> None:
    def look(host: Any) -> None:
        state = deepcopy(host.network.state_dict())
        gradients = {n: p.grad for n, p in host.network.named_parameters()}
        generator = torch.get_rng_state()
        inputs = next(iter(host.batches(0, "test"))).inputs
        with torch.no_grad():
            first = [host.network(inputs, task=task) for task in range(3)]
            rows = [
                host.module.evaluate([2, 0, 1]),
                host.module.evaluate([2, 0, 1]),
                host.module.evaluate()[[2, 0, 1]],
            ]
            again = [host.network(inputs, task=task) for task in (2, 1, 0)][::-1]
        same(again, first)
        same(rows[1], rows[0])
        same(rows[2], rows[0])
        same(host.network.state_dict(), state)
        same({n: p.grad for n, p in host.network.named_parameters()}, gradients)
        assert torch.equal(torch.get_rng_state(), generator)

    half_way(learn, watch, look)


# --- where and at what cost ----------------------------------------------------------------------


def test_only_the_chosen_layers_get_bias_units(learn: Any) -> None:
    run = learn(BeneficialPerturbation(RANK, layers=["backbone.3"]))
    with_units = {name for name, _ in run.module.network.named_parameters() if "bias_units" in name}
    assert with_units == {"backbone.3.bias_units.M", "backbone.3.bias_units.W"}


def test_no_layers_are_refused(learn: Any) -> None:
    with pytest.raises(ConfigurationError):
        learn(BeneficialPerturbation(RANK, layers=[]))


def test_a_backbone_may_be_a_linear_layer(learn: Any) -> None:
    run = learn(
        BeneficialPerturbation(RANK),
        EWC(),
        backbone=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.Tanh()),
    )
    assert (run.module.network.backbone[1].bias_units.bank != 0).any(1).all()


@pytest.mark.parametrize(
    ("hidden", "tasks", "measured", "paper"),
    [
        # One float for each hidden unit and output: 4 (4 * 300 + 10), and so on by hand.
        (4, 5, 4840, 4808),  # 4,808 bytes: Table I of the paper
        (5, 5, 6040, 6008),
        (4, 3, 4824, 4808),
        (5, 1, 6008, 6008),
    ],
)
def test_bytes_of_the_networks_of_the_paper(
    prepare: Any, hidden: int, tasks: int, measured: int, paper: int
) -> None:
    run = prepare(backbone=lambda: MLP([300] * hidden), stream={"num_tasks": tasks})
    strategies = [BeneficialPerturbation(100), EWC()]
    for strategy in strategies:
        strategy.configure(run.module.host, run.stream)
    assert bytes_per_task(strategies, run.module.host) == {"measured": measured, "paper": paper}


@pytest.mark.parametrize(("hidden", "measured"), [(4, 4880), (5, 6080)])
def test_bytes_with_twenty_outputs(prepare: Any, hidden: int, measured: int) -> None:
    run = prepare(backbone=lambda: MLP([300] * hidden))
    run.module.network.head = nn.Linear(300, 20)  # as 10 tasks of 2 classes need it
    strategy = BeneficialPerturbation(100)
    strategy.configure(run.module.host, run.stream)
    assert strategy.declared_bytes(run.module.host).per_task == measured
    assert strategy.declared_bytes(run.module.host).per_task_in_paper == 4 * (hidden * 300 + 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rank": 0},
            "Expected rank to be a whole number of at least 1, but got 0. The paper's networks use 25 to 900.",
        ),
        (
            {"epsilon": -0.1},
            (
                "Expected epsilon to be 0 or a positive number, but got -0.1. "
                "It is the step of M per update: 0.03 to 0.1 with direction 'sign'."
            ),
        ),
        (
            {"direction": "signs"},
            (
                "Expected direction to be one of sign, gradient, normalized, frozen, but got "
                "'signs'. Did you mean 'sign'?"
            ),
        ),
        ({"m_start": "ones"}, "Expected m_start to be one of zero, normal, but got 'ones'."),
        (
            {"direction": "frozen", "m_start": "zero"},
            (
                "Expected m_start to be 'normal' when direction is 'frozen', but got 'zero'. A frozen M of 0 is a network without bias units: leave the strategy out instead."
            ),
        ),
        (
            {"w_scale": 0},
            "Expected w_scale to be a positive number, but got 0. M and W both at 0 never move.",
        ),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        BeneficialPerturbation(**arguments)
    assert str(error.value) == message


def test_names_the_layers_that_there_are(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(BeneficialPerturbation(layers=["backbone.2"]))
    assert str(error.value) == (
        "Expected layers to be layers of the network that can have bias units, but got 'backbone.2'. Did you mean "
        "'backbone.3'? It has backbone.1, backbone.3, head."
    )


def test_two_instances_do_not_hide_one_another(learn: Any) -> None:
    """Either both see the end of every task or the run is refused."""
    ended = []

    class Ends(FineTuning):
        def on_task_end(self, host: Any, task: Any) -> None:
            ended.append(task.id)

    try:
        learn(Ends(), Ends())
    except ConfigurationError:
        return
    assert ended == [0, 0, 1, 1]


def test_a_task_starts_in_its_own_mode(learn: Any, watch: Any) -> None:
    modes = []

    def note(host: Any, task: Any) -> None:
        modes.append((task.id, host.network.head.bias_units.active))

    learn(BeneficialPerturbation(RANK), watch(start=note, end=note))
    assert modes == [(0, 0), (0, 0), (1, 1), (1, 1)]
