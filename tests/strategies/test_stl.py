"""A network for every task: against loops over one task alone, and bits that must not change."""

import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bpn_lightning.costs import bytes_per_task, measured_bytes
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.accuracy_matrix import backward_transfer, forgetting
from bpn_lightning.model.evaluation import evaluate_task_agnostic
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.stl import IndependentNetworks as STL

TASKS = 3
Backbone = Callable[[], nn.Module]


def plain() -> nn.Module:
    return MLP([16, 12])


def with_everything() -> nn.Module:
    """Running statistics, a counter of batches, and dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)
    )


BACKBONES = {"plain": plain, "normalizing, dropping": with_everything}
OPTIMIZERS = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.003),
}


class Recorded(STL):
    """Notes the global generators as each task begins: nothing may stand beside STL to do so."""

    state_key = "recorded"

    def __init__(self) -> None:
        super().__init__()
        self.generators: list[Any] = []

    def on_task_start(self, host: Any, task: Any) -> None:
        super().on_task_start(host, task)
        self.generators.append(random_state())


def networks(module: Any) -> list[dict[str, Tensor]]:
    """The weights and buffers that each task is answered with, read from the network itself."""
    found = []
    for task in module.tasks:
        with module.task_mode(task.id):
            parts = {**module.network.backbone.state_dict(prefix="backbone.")}
            parts |= module.network.head.state_dict(prefix="head.")
            found.append({name: value.clone() for name, value in parts.items()})
    return found


def alone(run: Any, task_id: int, make_optimizer: Any, generators: Any, mask: str) -> Any:
    """Plain training on one task, written out, from the run's first weights."""
    network = nn.ModuleDict(
        {"backbone": run.module.network.backbone, "head": run.module.network.head}
    )
    network = deepcopy(network).train()
    optimizer = make_optimizer(network.parameters())
    task = run.stream.tasks[task_id]
    first, stop = task.columns if mask == "task" else (0, run.stream.num_classes)
    network["head"].open_outputs(stop)  # a head of fewer columns has other last bits
    torch.set_rng_state(generators["torch"])
    for epoch in range(task.epochs):
        for batch in run.stream.train_loader(task_id, epoch):
            inputs = run.stream.prepare(batch).inputs
            logits = network["head"](network["backbone"](inputs))[:, first:stop]
            optimizer.zero_grad()
            F.cross_entropy(logits, batch.targets - first).backward()
            optimizer.step()
            if mask == "task":  # momentum and decay do not move rows of other tasks
                with torch.no_grad():
                    rows = [row for row in range(run.stream.num_classes) if not first <= row < stop]
                    network["head"].weight[rows] = run.module.network.head.weight[rows]
                    network["head"].bias[rows] = run.module.network.head.bias[rows]
    return network.state_dict()


@pytest.mark.parametrize("mask", ["all", "task"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_network_is_plain_training_on_its_task_alone(
    prepare: Any, same: Any, backbone: str, optimizer: str, mask: str
) -> None:
    run = prepare(
        strategy := Recorded(),
        stream={"num_tasks": TASKS, "epochs_per_task": [2, 1, 2]},
        optimizer=OPTIMIZERS[optimizer],
        backbone=BACKBONES[backbone],
        mask=mask,
    )
    untouched = deepcopy(run)
    run.fit()
    for task_id, weights in enumerate(networks(run.module)):
        generators = strategy.generators[task_id]
        same(weights, alone(untouched, task_id, OPTIMIZERS[optimizer], generators, mask))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_first_network_is_a_plain_run(learn: Any, same: Any, backbone: str) -> None:
    arguments = {"backbone": BACKBONES[backbone], "optimizer": OPTIMIZERS["momentum"]}
    several = learn(STL(), stream={"epochs_per_task": 2, "class_order": [0, 1, 2, 3]}, **arguments)
    # As many classes, and only one task to learn: the rest of the stream is cut off.
    with pytest.warns(UserWarning, match="stopped before its end"):
        first = learn(
            FineTuning(),
            stream={"epochs_per_task": 2, "class_order": [0, 1, 2, 3]},
            trainer={"max_steps": 10},
            **arguments,
        )
    assert first.module.opened == 0
    same(networks(several.module)[0], first.weights())


def test_a_network_does_not_depend_on_the_tasks_before_it(learn: Any, same: Any) -> None:
    """Dropout draws what it would have drawn if they had been longer."""
    runs = [
        learn(
            STL(), stream={"num_tasks": TASKS, "epochs_per_task": epochs}, backbone=with_everything
        )
        for epochs in ([1, 1, 2], [2, 3, 2], [1, 3, 2])
    ]
    found = [networks(run.module) for run in runs]
    same(found[0][2], found[1][2])
    same(found[0][0], found[2][0])
    same(found[1][1], found[2][1])
    assert not torch.equal(found[0][1]["head.weight"], found[1][1]["head.weight"])


def test_generators_follow_from_seed_and_task(prepare: Any) -> None:
    states = []
    for seed, draws in ((1, 0), (1, 5), (2, 0)):
        run = prepare(strategy := Recorded(), stream={"num_tasks": TASKS, "seed": seed})
        torch.rand(draws), np.random.rand(draws), [random.random() for _ in range(draws)]
        run.fit()
        states.append([str(state) for state in strategy.generators])
    assert states[0][0] != states[1][0]  # the first task continues with the global ones
    assert states[0][1:] == states[1][1:]
    assert len({*states[0], *states[2][1:]}) == 5
    for kind in ("torch", "numpy", "python"):
        of_tasks = [str(state[kind]) for state in strategy.generators]
        assert len(set(of_tasks)) == 3, kind


@pytest.mark.parametrize("backbone", BACKBONES)
def test_nothing_is_ever_forgotten(learn: Any, backbone: str) -> None:
    run = learn(
        STL(),
        stream={"num_tasks": 5, "epochs_per_task": 4},
        backbone=BACKBONES[backbone],
        optimizer=partial(SGD, lr=0.1),
    )
    matrix = run.module.accuracy_matrix.accuracy
    for task in range(5):
        assert (matrix[task + 1 :, task] == matrix[task + 1, task]).all()
        # Until it is learned a task is answered with the weights of the beginning.
        assert (matrix[: task + 1, task] == matrix[0, task]).all()
    assert backward_transfer(matrix) == 0
    assert forgetting(matrix) == 0
    assert matrix[-1].mean() > 0.8
    assert matrix[0].mean() < 0.4


# --- looking changes nothing ---------------------------------------------------------------------


@pytest.fixture
def learned(learn: Any) -> Any:
    return learn(
        STL(), stream={"num_tasks": TASKS, "epochs_per_task": 2}, backbone=with_everything
    ).module


def test_evaluating_in_any_order_changes_nothing(learned: Any, same: Any) -> None:
    learned.train()
    state, generators = deepcopy(learned.network.state_dict()), str(random_state())
    inputs = next(iter(learned.host.batches(0, "test"))).inputs
    flags = [part.training for part in learned.modules()]
    first = learned.evaluate()
    same(learned.evaluate([2, 0, 1, 2]), first[[2, 0, 1, 2]])
    learned.eval()
    answers = [learned(inputs, task=task) for task in range(TASKS)]
    for task in (1, 2, 0, 1):
        same(learned(inputs, task=task), answers[task])
    learned.train()
    evaluate_task_agnostic(learned.host, range(TASKS))
    same(learned.evaluate(), first)
    same(learned.network.state_dict(), state)
    assert str(random_state()) == generators
    assert [part.training for part in learned.modules()] == flags


def test_evaluating_while_a_task_is_learned_changes_nothing(prepare: Any, same: Any) -> None:
    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.evaluate([2, 0])
            with module.task_mode(0), module.task_mode(1):
                module.evaluate()

    arguments = {
        "stream": {"num_tasks": TASKS},
        "optimizer": OPTIMIZERS["adam"],
        "backbone": with_everything,
        "trainer": {"log_every_n_steps": 1},
    }
    runs = []
    for more in ([], [Looks()]):
        runs.append(prepare(STL(), **arguments))
        runs[-1].trainer.callbacks.extend(more)
        runs[-1].fit()
    same(networks(runs[1].module), networks(runs[0].module))
    same(runs[1].optimizer_state(), runs[0].optimizer_state())
    assert str(runs[1].random) == str(runs[0].random)


def test_evaluating_after_every_epoch_changes_nothing(learn: Any, same: Any) -> None:
    arguments = {"stream": {"epochs_per_task": 3}, "backbone": with_everything}
    rarely, often = learn(STL(), **arguments), learn(STL(), evaluate_every="epoch", **arguments)
    same(networks(often.module), networks(rarely.module))
    assert len(often.module.curve) == 7


def test_samples_of_several_tasks_are_answered_by_their_own_networks(learned: Any) -> None:
    learned.eval()
    inputs = torch.cat(
        [next(iter(learned.host.batches(task, "test"))).inputs[:8] for task in range(3)]
    )
    tasks = torch.tensor([0, 2, 1, 2, 0, 0] * 4)
    mixed = learned(inputs, task=tasks)
    for place, task in enumerate(tasks.tolist()):
        own = learned(inputs[place : place + 1], task=task)
        torch.testing.assert_close(mixed[place : place + 1], own, rtol=1e-5, atol=1e-5)


# --- the Trainer's other doors -------------------------------------------------------------------


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trainers_answer_for_every_task(learn: Any, precision: Any, inference_mode: bool) -> None:
    """Autocast keeps the weights of a block in low precision: those of one network for the next."""
    run = learn(
        STL(),
        stream={"num_tasks": TASKS, "epochs_per_task": 4, "validation_fraction": 0.2},
        optimizer=partial(SGD, lr=0.1),
    )
    module, stream = run.module, run.stream
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, precision=precision,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[STL()],
        inference_mode=inference_mode,
    )  # fmt: skip
    (tested,) = trainer.test(module, stream, verbose=False)
    found = [tested[f"test/accuracy/task_{task + 1}"] for task in range(TASKS)]
    close = {"abs": 1e-7} if precision == "32-true" else {"abs": 0.05}
    assert found == pytest.approx(module.accuracy_matrix.accuracy[-1].tolist(), **close)
    assert min(found) > 0.85
    (validated,) = trainer.validate(module, stream, verbose=False)
    wanted = float(module.evaluate([TASKS - 1], "val"))
    assert validated["val/accuracy"] == pytest.approx(wanted, **close)
    (logits,) = trainer.predict(module, stream)
    (batch,) = list(stream.test_dataloader())
    right = (logits.argmax(1) == batch.targets).double()
    shares = [float(right[batch.task == task].mean()) for task in range(TASKS)]
    assert shares == pytest.approx(found, abs=1e-7)


def test_without_the_oracle_the_surest_network_answers(learned: Any) -> None:
    learned.eval()
    wanted = []
    with torch.no_grad():
        for task in range(TASKS):
            (batch,) = list(learned.host.batches(task, "test"))
            sure = torch.stack([learned(batch.inputs, task=mode).softmax(1) for mode in range(3)])
            best = sure.amax(2).argmax(0)
            answers = sure.argmax(2)[best, torch.arange(len(best))]
            wanted.append(float((answers == batch.targets).double().mean()))
    assert learned.accuracy_matrix.task_agnostic.tolist() == wanted


def test_a_checkpoint_answers_for_every_task_without_a_trainer(
    fit: Any, same: Any, tmp_path: Any
) -> None:
    module, trainer = fit([STL()], backbone=with_everything())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = ContinualModule.load_from_checkpoint(
        tmp_path / "last.ckpt", backbone=with_everything(), weights_only=True
    )
    same(networks(loaded), networks(module))
    stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=64, seed=0)
    stream.setup()
    loaded.attach(stream)
    assert torch.equal(loaded.evaluate(), module.accuracy_matrix.accuracy[-1])
    (tested,) = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    ).test(loaded, stream, verbose=False)  # fmt: skip
    found = [tested[f"test/accuracy/task_{task + 1}"] for task in (0, 1)]
    assert found == pytest.approx(module.accuracy_matrix.accuracy[-1].tolist(), abs=1e-7)


class SaveEverywhere(Callback):
    """A checkpoint wherever a callback may take one."""

    def __init__(self, folder: Any) -> None:
        self.folder, self.paths = folder, []

    def save(self, trainer: Any) -> None:
        self.paths.append(self.folder / f"{len(self.paths):02d}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.save(trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer)


@pytest.mark.slow
def test_resuming_from_every_checkpoint_changes_nothing(fit: Any, same: Any, tmp_path: Any) -> None:
    def run(*more: Any, **options: Any) -> Any:
        module, _ = fit(
            [STL(), *more],
            stream=SplitDigits(
                num_tasks=2, epochs_per_task=2, batch_size=150, validation_fraction=0.2, seed=0
            ),
            backbone=with_everything(),
            optimizer=partial(SGD, lr=0.05, momentum=0.9),
            **options,
        )
        return [module.network.state_dict(), networks(module), module.curve], str(random_state())

    saves = SaveEverywhere(tmp_path)
    reference, generators = run(saves)
    assert len(saves.paths) == 4 * (2 + 1 + 1)
    for path in saves.paths:
        resumed, resumed_generators = run(seed=9, ckpt_path=path)
        same(resumed, reference)
        assert resumed_generators == generators


# --- what it costs, what it refuses --------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_bytes(learn: Any, tasks: int) -> None:
    run = learn(strategy := STL(), stream={"num_tasks": tasks}, backbone=with_everything)
    floats = (64 * 16 + 16) + 2 * 16 + 2 * 16 + (16 * 2 * tasks + 2 * tasks)
    one = 4 * floats + 8  # and the counter of batches
    assert strategy.declared_bytes(run.module.host).held == ((tasks + 1) * one, tasks * one)
    assert (
        measured_bytes(strategy, run.module.host) == strategy.declared_bytes(run.module.host).held
    )
    assert bytes_per_task([strategy], run.module) == {"measured": one, "paper": one}


def test_refuses_an_optimizer_that_goes_on(learn: Any) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(STL(), stream={"reset_optimizer": "never"})
    assert str(error.value) == (
        "Expected reset_optimizer to be 'always' if each task has its own network, but got "
        "'never'. Set it to 'always'."
    )
