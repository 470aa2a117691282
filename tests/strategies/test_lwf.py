"""LwF against closed forms, a loop that is written out, and answers noted before a task began."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bpn_lightning.costs import Bytes, measured_bytes, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.distillation import distillation, distillation_of_heads
from bpn_lightning.nn import MLP
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ebll import EncoderBasedLifelongLearning
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.lwf import LearningWithoutForgetting
from bpn_lightning.strategies.psp import ParameterSuperposition
from bpn_lightning.tasks import Phase
from bpn_lightning.teacher import Teacher, concatenated_heads

SHARED = {"num_tasks": 3, "domain_incremental": True}
sgd = partial(SGD, lr=0.1)


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (4 * torch.randn(*shape, dtype=dtype)).requires_grad_()


def softened(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """The loss as torch has it: a divergence and the entropy of the targets."""
    q = (teacher / temperature).softmax(1)
    log_p = (student / temperature).log_softmax(1)
    divergence = F.kl_div(log_p, q, reduction="none").sum(1)
    return divergence + torch.special.entr(q).sum(1)


def noisy() -> nn.Module:
    """A backbone with everything that differs between training and evaluation."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(16, 12),
        nn.ReLU(),
    )


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_gradient_is_the_closed_form(temperature: float) -> None:
    z, v = logits(6, 5), logits(6, 5)
    loss = 3.0 * distillation(z, v, temperature).mean()
    (gradient,) = torch.autograd.grad(loss, z)
    p, q = (z / temperature).softmax(1), (v / temperature).softmax(1)
    torch.testing.assert_close(gradient, 3.0 * (p - q) / (temperature * 6), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_is_divergence_plus_entropy(temperature: float) -> None:
    z, v = logits(8, 4), logits(8, 4)
    torch.testing.assert_close(distillation(z, v, temperature), softened(z, v, temperature))


def test_softened_outputs_are_powers_of_probabilities() -> None:
    """As the paper writes it: p^(1/T), normalized."""
    z, v = logits(5, 3), logits(5, 3)
    y, target = (x.softmax(1) ** 0.5 for x in (z, v))
    y, target = y / y.sum(1, keepdim=True), target / target.sum(1, keepdim=True)
    torch.testing.assert_close(distillation(z, v, 2.0), -(target * y.log()).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_pulls_at_the_teacher(dtype: torch.dtype) -> None:
    z = logits(50, 10, dtype=dtype)
    loss = distillation(z, z.detach().clone())
    assert not torch.autograd.grad(loss.sum(), z)[0].any()
    torch.testing.assert_close(loss, torch.special.entr((z / 2).softmax(1)).sum(1))


def test_at_high_temperature_logits_are_matched() -> None:
    z, v = logits(1, 6), logits(1, 6)
    temperature = 1e5
    (gradient,) = torch.autograd.grad(distillation(z, v, temperature).sum(), z)
    gap = (z - z.mean()) - (v - v.mean())
    torch.testing.assert_close(gradient * temperature**2 * 6, gap.detach(), rtol=1e-3, atol=1e-3)


def test_a_constant_in_a_row_of_logits_says_nothing() -> None:
    z, v, shift = logits(7, 4), logits(7, 4), logits(7, 1)
    expected = distillation(z, v)
    torch.testing.assert_close(distillation(z, v + shift), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(distillation(z + shift, v), expected, rtol=1e-10, atol=1e-10)


def test_low_precision_is_raised_to_float32() -> None:
    z, v = logits(9, 4), logits(9, 4)
    z, v = z.bfloat16(), v.bfloat16()
    assert distillation(z, v).dtype == torch.float32
    torch.testing.assert_close(distillation(z, v), distillation(z.float(), v.float()))


@pytest.mark.parametrize("widths", [[2, 2, 2], [3, 1, 2], [6]])
def test_every_head_has_a_softmax_of_its_own(widths: list[int]) -> None:
    z, v = logits(4, 6), logits(4, 6)
    heads = zip(z.split(widths, 1), v.split(widths, 1), strict=True)
    expected = sum(softened(student, teacher) for student, teacher in heads)
    torch.testing.assert_close(distillation_of_heads(z, v, widths, 2.0), expected)
    assert distillation_of_heads(z[:0], v[:0], widths, 2.0).shape == (0,)


# --- in a stream ---------------------------------------------------------------------------------


def written_out(run: Any, mask: str, heads: str, strength: float, epochs: int) -> nn.Module:
    """Plain torch: a copied network teaches, and every old head is distilled."""
    network = nn.ModuleDict(
        {"backbone": run.module.network.backbone, "head": run.module.network.head}
    )
    network = deepcopy(network)

    def answer(net: Any, inputs: Tensor) -> Tensor:
        return net["head"](net["backbone"](inputs))

    for task in run.stream.tasks:
        teacher = deepcopy(network).eval()
        old = list(dict.fromkeys(other.columns for other in run.stream.tasks[: task.id]))
        if heads == "joint" and old:
            old = [(0, max(stop for _, stop in old))]
        active = {
            "all": slice(None),
            "shared": slice(None),
            "task": slice(*task.columns),
            "seen": slice(0, task.columns[1]),
        }[mask]
        optimizer = SGD(network.parameters(), lr=0.1)
        for epoch in range(epochs):
            for batch in run.stream.train_loader(task.id, epoch):
                inputs = run.stream.prepare(batch).inputs
                z = answer(network, inputs)
                loss = F.cross_entropy(z[:, active], batch.targets - (active.start or 0))
                with torch.no_grad():
                    v = answer(teacher, inputs)
                for first, stop in old:
                    term = softened(z[:, first:stop], v[:, first:stop]).mean()
                    loss = loss + strength * term
                optimizer.zero_grad()
                loss.backward()
                if mask == "task":  # rows of other tasks do not move, whatever asks them to
                    for parameter in network["head"].parameters():
                        parameter.grad[: active.start] = parameter.grad[active.stop :] = 0
                optimizer.step()
    return network


@pytest.mark.parametrize("heads", ["per_task", "joint"])
@pytest.mark.parametrize("mask", ["all", "seen", "task", "shared"])
def test_equals_a_loop_that_is_written_out(prepare: Any, mask: str, heads: Any) -> None:
    run = prepare(
        LearningWithoutForgetting(3.0, heads=heads),
        stream={"num_tasks": 3, "epochs_per_task": 2, "domain_incremental": mask == "shared"},
        optimizer=partial(SGD, lr=0.1),
        mask=mask,
    )
    expected = written_out(run, mask, heads, 3.0, epochs=2)
    run.fit()
    torch.testing.assert_close(run.weights(), dict(expected.state_dict()), rtol=1e-4, atol=1e-6)


def noted(watch: Any, lwf: LearningWithoutForgetting, found: list[Any]) -> Any:
    """Notes what every old mode says before a task begins, and compares each term with that."""
    answers: dict[int, list[Tensor]] = {}

    def start(host: Any, task: Any) -> None:
        host.network.eval()
        loader = host.stream.train_loader(task.id, 0)
        batches = [host.stream.prepare(batch).inputs for batch in loader]
        answers.clear()
        with torch.no_grad():
            for k in range(task.id):
                answers[k] = [host.network(inputs, task=k) for inputs in batches]
        host.network.train()
        steps.clear()

    steps: list[int] = []

    def terms(host: Any, batch: Any, _: Tensor) -> dict[str, Tensor]:
        index = len(steps)
        steps.append(1)
        expected = torch.zeros(len(batch.targets))
        with torch.no_grad():
            for k, said in answers.items():
                own = slice(*host.network.tasks[k].columns)
                z = host.network(batch.inputs, task=k)
                expected += softened(z[:, own], said[index][:, own])
            term = lwf.loss_terms(host, batch, host.network.all_logits(batch.inputs))
        found.append((host.network.opened, term.get("lwf"), lwf.strength * expected))
        return {}

    return watch(start=start, terms=terms)


@pytest.mark.parametrize("mode", [BeneficialPerturbation, ParameterSuperposition])
@pytest.mark.parametrize("mask", ["all", "task", "shared"])
def test_student_and_teacher_answer_in_the_mode_of_each_old_task(
    learn: Any, watch: Any, mode: Callable[[], Any], mask: str
) -> None:
    lwf, found = LearningWithoutForgetting(2.0), []
    learn(
        noted(watch, lwf, found),
        mode(),
        lwf,
        stream=SHARED if mask == "shared" else {"num_tasks": 3},
        optimizer=partial(SGD, lr=0.1),
        mask=mask,
    )
    assert {task for task, _, _ in found} == {0, 1, 2}
    for task, term, expected in found:
        if task == 0:
            assert term is None
        else:
            torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-6)


def test_one_shared_head_is_distilled_once(learn: Any, watch: Any) -> None:
    """The third task's term is that of one head, as the second's."""
    entropies: dict[int, Tensor] = {}
    lwf = LearningWithoutForgetting()

    def terms(host: Any, batch: Any, z: Tensor) -> dict[str, Tensor]:
        if (
            host.network.opened and host.network.opened not in entropies
        ):  # at the teacher the loss is its entropy
            term = lwf.loss_terms(host, batch, z)["lwf"]
            entropy = torch.special.entr((z / 2).softmax(1)).sum(1)
            torch.testing.assert_close(term, entropy)
            entropies[host.network.opened] = term.detach()
        return {}

    learn(watch(terms=terms), lwf, stream=SHARED, mask="shared")
    assert list(entropies) == [1, 2]


def test_the_first_update_of_a_task_is_fine_tunings(learn: Any, watch: Any, same: Any) -> None:
    """The network is still its own teacher, so nothing pulls, to the last bit."""

    def gradients(strategy: Any) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []

        def note(host: Any, parameters: Any) -> None:
            if host.network.opened == 1:
                found.append({name: p.grad.clone() for name, p in parameters.items()})

        # Both learn the first task alike, without a teacher.
        learn(watch(capture=note), strategy, mask="task", optimizer=partial(SGD, lr=0.1))
        return found

    pulled, free = gradients(LearningWithoutForgetting(100.0)), gradients(FineTuning())
    same(pulled[0], free[0])
    assert any((pulled[-1][name] != free[-1][name]).any() for name in free[-1])


def test_the_teacher_does_not_learn(learn: Any, watch: Any, same: Any) -> None:
    lwf, kept = LearningWithoutForgetting(), []

    def start(host: Any, task: Any) -> None:
        kept.append(
            {n: t.clone() for n, t in host.network.state_dict().items() if torch.is_tensor(t)}
        )

    def end(host: Any, task: Any) -> None:
        if task.id:
            same(lwf.teacher.tensors, {n: kept[-1][n] for n in lwf.teacher.tensors})
            assert any(
                (t != host.network.state_dict()[n]).any() for n, t in lwf.teacher.tensors.items()
            )
        else:
            assert not lwf.teacher

    run = learn(watch(start=start, end=end), lwf, backbone=noisy, stream={"num_tasks": 3})
    assert set(lwf.teacher.tensors) == {n for n in run.weights() if "num_batches" not in n}


def test_the_teacher_has_no_dropout_and_its_own_statistics(learn: Any, watch: Any) -> None:
    lwf, checked = LearningWithoutForgetting(), []
    said: list[Tensor] = []

    def start(host: Any, task: Any) -> None:
        host.network.eval()
        with torch.no_grad():
            said[:] = [host.network(torch.ones(3, 1, 8, 8))]
        host.network.train()

    def after(host: Any, parameters: Any) -> None:
        if host.network.opened == 1:
            before = torch.get_rng_state()
            for _ in range(2):
                answer = lwf.teacher.forward(host, torch.ones(3, 1, 8, 8)).logits
                assert torch.equal(answer, said[0])
            assert not answer.requires_grad
            assert torch.equal(torch.get_rng_state(), before)
            assert all(part.training for part in host.network.backbone.modules())
            checked.append(1)

    learn(watch(start=start, stepped=after), lwf, backbone=noisy)
    assert len(checked) > 2


@pytest.mark.parametrize("modes", [False, True])
def test_running_statistics_see_every_batch_once(learn: Any, watch: Any, modes: bool) -> None:
    """Not the teacher's forward, nor the student's in the modes of old tasks."""
    steps: list[int] = []
    run = learn(
        *([BeneficialPerturbation(4)] if modes else []),
        LearningWithoutForgetting(),
        watch(stepped=lambda *_: steps.append(1)),
        backbone=noisy,
        stream={"num_tasks": 3},
    )
    assert run.module.network.backbone[2].num_batches_tracked == len(steps) > 10


def test_a_layer_that_was_frozen_is_taught_too(learn: Any, watch: Any) -> None:
    lwf = LearningWithoutForgetting()

    def freeze(host: Any, task: Any) -> None:
        host.network.backbone[1].requires_grad_(task.id > 1)

    # The teacher of the third task learns while the layer is frozen, and is asked when it is not.
    run = learn(lwf, watch(start=freeze), stream={"num_tasks": 3})
    weight = run.module.network.backbone[1].weight
    assert (lwf.teacher.tensors["backbone.1.weight"] != weight).any()


@pytest.mark.slow
def test_remembers_what_fine_tuning_forgets(learn: Any) -> None:
    accuracies = [
        learn(
            strategy,
            stream={"num_tasks": 5, "epochs_per_task": 5, "batch_size": 32},
            optimizer=partial(SGD, lr=0.05, momentum=0.9),
            backbone=lambda: MLP([64, 64]),
            mask="task",
        ).module.accuracy_matrix.accuracy
        for strategy in (LearningWithoutForgetting(), FineTuning())
    ]
    kept, lost = (float(accuracy[-1].mean()) for accuracy in accuracies)
    assert kept > 0.95
    assert kept > lost + 0.03


# --- nothing of it is fine-tuning ----------------------------------------------------------------


class WarmUp(FineTuning):
    """Fine-tuning with LwF's phases."""

    def phases(self, task: Any, phases: list[Phase]) -> list[Phase]:
        return [Phase("warm_up", 2, trains="head"), *phases] if task.id else phases


@pytest.mark.parametrize("warm_up", [0, 2])
@pytest.mark.parametrize("mask", ["all", "task"])
def test_strength_zero_is_fine_tuning_bit_for_bit(
    learn: Any, same: Any, warm_up: int, mask: str
) -> None:
    reset = "always" if warm_up else "never"
    runs = [
        learn(
            strategy,
            backbone=noisy,
            stream={"num_tasks": 3, "reset_optimizer": reset},
            optimizer=partial(Adam, lr=0.01, weight_decay=0.01),
            trainer={"gradient_clip_val": 0.5},
            mask=mask,
        )
        for strategy in (
            LearningWithoutForgetting(0, warm_up_epochs=warm_up),
            WarmUp() if warm_up else FineTuning(),
        )
    ]
    same(runs[0].weights(), runs[1].weights())
    same(runs[0].optimizer_state(), runs[1].optimizer_state())
    assert str(runs[0].random) == str(runs[1].random)


def test_draws_nothing_from_global_generators(learn: Any) -> None:
    assert str(learn(LearningWithoutForgetting()).random) == str(learn().random)


# --- the warm-up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["all", "seen", "task", "shared"])
def test_later_tasks_with_rows_of_their_own_are_warmed_up(learn: Any, mask: str) -> None:
    stream = {"num_tasks": 3, "domain_incremental": mask == "shared"}
    run = learn(LearningWithoutForgetting(warm_up_epochs=2), stream=stream, mask=mask)
    train, warm_up = Phase("train", 1), Phase("warm_up", 2, trains="head")
    later = [train] if mask == "shared" else [warm_up, train]
    assert run.module.schedule.phases == [[train], later, later]


def test_a_warm_up_asks_no_teacher(learn: Any, watch: Any) -> None:
    """Old rows and the features stay as they are, so what it says has no gradient there."""
    lwf, asked = LearningWithoutForgetting(warm_up_epochs=1), []

    def terms(host: Any, batch: Any, z: Tensor) -> dict[str, Tensor]:
        asked.append((host.phase.name, "lwf" in lwf.loss_terms(host, batch, z)))
        return {}

    learn(watch(terms=terms), lwf)
    assert set(asked) == {("train", False), ("warm_up", False), ("train", True)}


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_holds_the_network_once_more_while_training(
    learn: Any, watch: Any, strength: float
) -> None:
    lwf, held = LearningWithoutForgetting(strength), []

    def note(host: Any, task: Any) -> None:
        assert lwf.declared_bytes(host).held == measured_bytes(lwf, host)
        held.append(measured_bytes(lwf, host))

    run = learn(watch(end=note), BeneficialPerturbation(3), lwf, stream={"num_tasks": 3})
    parameters = tensor_bytes(run.module.network.shared_parameters(include_head=True).values())
    assert parameters == 4 * ((64 + 1) * 16 + (16 + 1) * 12 + (12 + 1) * 6)
    once = Bytes(parameters if strength else 0, 0)
    assert held == [Bytes(0, 0), once, once]


def test_running_statistics_count(learn: Any) -> None:
    run = learn(lwf := LearningWithoutForgetting(), backbone=noisy)
    parameters = tensor_bytes(run.module.network.shared_parameters(include_head=True).values())
    assert lwf.declared_bytes(run.module.host).held == measured_bytes(lwf, run.module.host)
    assert lwf.declared_bytes(run.module.host).held == Bytes(parameters + 2 * 4 * 16, 0)


# --- composition ---------------------------------------------------------------------------------


def test_adds_to_other_penalties(learn: Any) -> None:
    learn(EWC(10.0), BeneficialPerturbation(4), LearningWithoutForgetting(warm_up_epochs=1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_runs(learn: Any, precision: str) -> None:
    run = learn(LearningWithoutForgetting(), trainer={"precision": precision})
    assert run.module.closed == 1


# --- what is recorded ----------------------------------------------------------------------------

TWICE = {"num_tasks": 3, "epochs_per_task": 2}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples a teacher is asked about, call by call."""
    sizes: list[int] = []
    forward = Teacher.forward

    def counting(teacher: Teacher, host: Any, inputs: Tensor, *layer: Any) -> Any:
        sizes.append(len(inputs))
        return forward(teacher, host, inputs, *layer)

    monkeypatch.setattr(Teacher, "forward", counting)
    return sizes


@pytest.mark.parametrize("mode", [None, BeneficialPerturbation])
@pytest.mark.parametrize("mask", ["all", "task", "shared"])
def test_what_is_recorded_is_what_the_teacher_would_say(
    learn: Any, watch: Any, mode: Callable[[], Any] | None, mask: str
) -> None:
    lwf, checked = LearningWithoutForgetting(2.0), []

    def terms(host: Any, batch: Any, _: Tensor) -> dict[str, Tensor]:
        if host.network.opened:
            said = concatenated_heads(lwf.teacher_outputs(host, batch.inputs), lwf.old_heads(host))
            torch.testing.assert_close(lwf.recorded(host, batch), said, rtol=1e-5, atol=1e-6)
            checked.append(host.network.opened)
        return {}

    stream = {**TWICE, "domain_incremental": mask == "shared", "eval_batch_size": 50}
    modes = [mode()] if mode else []
    learn(watch(terms=terms), *modes, lwf, stream=stream, mask=mask, optimizer=sgd)
    assert set(checked) == {1, 2}


def test_each_sample_is_asked_about_once(learn: Any, asked: list[int]) -> None:
    run = learn(LearningWithoutForgetting(), stream=TWICE)
    assert sum(asked) == sum(len(run.stream.members(task, "train")) for task in (1, 2))


@pytest.mark.parametrize(
    ("lwf", "stream", "trainer"),
    [
        ({"record": False}, TWICE, {}),
        ({}, {**TWICE, "augment": True}, {}),
        ({}, {"num_tasks": 3}, {}),
        ({}, TWICE, {"limit_train_batches": 1}),
        ({}, TWICE, {"limit_train_batches": 0.5}),
    ],
    ids=["not wanted", "augmented", "one epoch", "one batch", "half of the batches"],
)
def test_the_teacher_is_asked_at_every_update_instead(
    learn: Any, asked: list[int], lwf: Any, stream: Any, trainer: Any
) -> None:
    run = learn(LearningWithoutForgetting(**lwf), stream=stream, trainer=trainer)
    in_first_task = run.trainer.global_step // 3
    assert len(asked) == run.trainer.global_step - in_first_task


def test_asking_at_every_update_learns_the_same(learn: Any) -> None:
    arguments: dict[str, Any] = {"stream": TWICE, "optimizer": sgd}
    recorded = learn(LearningWithoutForgetting(3.0), **arguments)
    asked = learn(LearningWithoutForgetting(3.0, record=False), **arguments)
    torch.testing.assert_close(recorded.weights(), asked.weights(), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_records_the_same_again(prepare: Any, same: Any, tmp_path: Path) -> None:
    class Saving(Callback):
        """In the second epoch of the second task."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 3 and trainer.fit_loop.epoch_loop.batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    whole = prepare(LearningWithoutForgetting(3.0), stream=TWICE, optimizer=sgd)
    whole.trainer.callbacks.append(Saving())
    whole.fit()
    resumed = prepare(LearningWithoutForgetting(3.0), stream=TWICE, optimizer=sgd)
    resumed.trainer.fit(resumed.module, resumed.stream, ckpt_path=tmp_path / "inside.ckpt")
    same(resumed.weights(), whole.weights())


# --- refusals ------------------------------------------------------------------------------------

STRENGTH = " 0 is fine-tuning; 1 gives each old task the weight of the new one."
TEMPERATURE = " The paper uses 2; 1 leaves the softmax unchanged."


def test_no_teacher_before_a_task_is_learned(prepare: Any) -> None:
    run = prepare(lwf := LearningWithoutForgetting())
    with pytest.raises(ConfigurationError) as error:
        lwf.teacher.forward(run.module, torch.zeros(1, 1, 8, 8))
    assert str(error.value) == (
        "Expected a snapshot before the teacher is run, but none was taken. Call snapshot at the start of the second task; in the first task there is nothing to distill."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"strength": -1},
            "Expected strength to be 0 or a positive number, but got -1." + STRENGTH,
        ),
        (
            {"temperature": 0},
            "Expected temperature to be a positive number, but got 0." + TEMPERATURE,
        ),
        ({"temperature": float("nan")}, None),
        ({"strength": float("inf")}, None),
        (
            {"heads": "joined"},
            "Expected heads to be one of per_task, joint, but got 'joined'. Did you mean 'joint'?",
        ),
        (
            {"warm_up_epochs": -1},
            "Expected warm_up_epochs to be a whole number of at least 0, but got -1. 0 is no warm-up.",
        ),
        ({"warm_up_epochs": 0.5}, None),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ConfigurationError) as error:
        LearningWithoutForgetting(**arguments)
    assert message is None or str(error.value) == message


# --- tasks of one class --------------------------------------------------------------------------

ONE_EACH = {"num_tasks": 4, "classes_per_task": 1, "batch_size": 16}


def test_of_one_class_each_all_old_ones_are_distilled_together(prepare: Any, watch: Any) -> None:
    """The gradient of a batch's cross-entropy and of one softmax over all old classes, by torch."""
    noted: list[dict[str, Tensor]] = []
    teachers: dict[int, nn.Module] = {}

    def start(host: Any, task: Any) -> None:
        teachers[task.id] = deepcopy(nn.Sequential(host.network.backbone, host.network.head)).eval()

    def terms(host: Any, batch: Any, _: Tensor) -> dict[str, Tensor]:
        first, stop = host.network.columns(host.network.opened)
        logits = host.network.head(host.network.backbone(batch.inputs))
        loss = F.cross_entropy(logits[:, first:stop], batch.targets - first)
        if host.network.opened > 1:  # one old class says nothing
            old = slice(0, host.network.opened)
            with torch.no_grad():
                said = teachers[host.network.opened](batch.inputs)
            loss = loss + 2.0 * softened(logits[:, old], said[:, old]).mean()
        parameters = dict(host.network.named_parameters())
        found = torch.autograd.grad(loss, list(parameters.values()))
        noted.append(dict(zip(parameters, found, strict=True)))
        return {}

    def capture(host: Any, parameters: Any) -> None:
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, noted[-1][name], rtol=1e-4, atol=1e-6)

    lwf = LearningWithoutForgetting(2.0, heads="joint")
    seen = watch(start=start, terms=terms, capture=capture)
    prepare(seen, lwf, stream=ONE_EACH, mask="seen", optimizer=sgd).fit()
    assert len(noted) > 20


@pytest.mark.filterwarnings("ignore:With mask=.*one class to choose from")
@pytest.mark.parametrize("make", [LearningWithoutForgetting, EncoderBasedLifelongLearning])
@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_a_softmax_over_one_class_is_refused(prepare: Any, make: Any, mask: Any) -> None:
    """With it the run would be fine-tuning bit for bit."""
    said = "Expected heads to be 'joint' when every old task has one class, but got 'per_task'"
    with pytest.raises(ConfigurationError, match=said):
        prepare(make(), stream=ONE_EACH, mask=mask).fit()


@pytest.mark.parametrize("heads", ["per_task", "joint"])
def test_one_old_class_is_refused(prepare: Any, heads: Any) -> None:
    said = "Expected the tasks before the last to have at least two classes in total .* but got one"
    with pytest.raises(ConfigurationError, match=said):
        prepare(LearningWithoutForgetting(heads=heads), stream={**ONE_EACH, "num_tasks": 2}).fit()


@pytest.mark.filterwarnings("ignore:With mask=.*one class to choose from")
@pytest.mark.parametrize(
    ("strategy", "stream"),
    [
        (LearningWithoutForgetting(0.0), ONE_EACH),
        (EncoderBasedLifelongLearning(0.0, autoencoder_epochs=1), ONE_EACH),
        (LearningWithoutForgetting(), {**ONE_EACH, "num_tasks": 1}),
        (LearningWithoutForgetting(), {"num_tasks": 1}),
        (LearningWithoutForgetting(heads="joint"), {"num_tasks": 2}),
    ],
)
def test_what_distills_nothing_or_more_than_one_class_runs(
    learn: Any, strategy: Any, stream: Any
) -> None:
    run = learn(strategy, stream=stream)
    assert run.module.closed == stream["num_tasks"] - 1
