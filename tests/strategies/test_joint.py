"""Joint training against loops over all data that are written out, sample by sample."""

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bpn_lightning.costs import bytes_per_task, measured_bytes
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.strategies.joint import JointTraining
from bpn_lightning.tasks import Phase

TASKS = 3
OPTIMIZERS = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(Adam, lr=0.003),
}


class Seen(Callback):
    """The batches that are trained on, and the weights and losses around them."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.losses: list[Tensor] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.append((trainer.current_epoch, batch))
        parts = module.network.state_dict()
        self.weights.append(
            {k: v.clone() for k, v in parts.items() if k.startswith(("backbone", "head"))}
        )

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])

    def epochs(self) -> list[list[Any]]:
        """The batches of each epoch."""
        last = self.batches[-1][0]
        return [[b for number, b in self.batches if number == epoch] for epoch in range(last + 1)]


@pytest.fixture
def fitted(prepare: Any) -> Any:
    """A run with a callback that saw all of it."""

    def make(*callbacks: Any, **arguments: Any) -> Any:
        run = prepare(JointTraining(), **arguments)
        seen = Seen()
        run.trainer.callbacks.extend([seen, *callbacks])
        before = deepcopy(run.module)
        return run.fit(), seen, before

    return make


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_every_epoch_has_each_sample_so_far_once_with_its_task(fitted: Any, mask: str) -> None:
    run, seen, _ = fitted(
        stream={"num_tasks": TASKS, "epochs_per_task": [1, 2, 1], "batch_size": 100}, mask=mask
    )
    epochs = seen.epochs()
    assert len(epochs) == 4
    for number, learned in enumerate((1, 2, 2, 3)):
        found, wanted = [], []
        for batch in epochs[number]:
            assert batch.global_size == len(batch.targets)
            tasks = torch.as_tensor(batch.task).expand(len(batch.targets))
            assert torch.equal(batch.targets // 2, tasks)  # two classes each, in order
            found += [tuple(image.flatten().tolist()) for image in batch.inputs]
        for task in range(learned):
            for batch in run.module.host.batches(task, "train"):
                wanted += [tuple(image.flatten().tolist()) for image in batch.inputs]
        assert sorted(found) == sorted(wanted)
        assert found != wanted
        mixed = [
            len(set(torch.as_tensor(batch.task).flatten().tolist())) for batch in epochs[number]
        ]
        assert max(mixed) == learned
    orders = [[tuple(b.targets.tolist()) for b in epochs[number]] for number in (1, 2)]
    assert orders[0] != orders[1]


def loss_of_samples(weights: dict[str, Tensor], batch: Any, mask: str, learned: int) -> float:
    """The mean over samples, each with its own columns, one after the other."""
    total = 0.0
    tasks = torch.as_tensor(batch.task).expand(len(batch.targets))
    for image, target, task in zip(batch.inputs, batch.targets, tasks, strict=True):
        hidden = image.flatten().double()
        for layer in ("backbone.1", "backbone.3"):
            weight, bias = weights[f"{layer}.weight"].double(), weights[f"{layer}.bias"].double()
            hidden = (weight @ hidden + bias).clamp(min=0)
        logits = weights["head.weight"].double() @ hidden + weights["head.bias"].double()
        columns = {"all": range(2 * TASKS), "seen": range(2 * learned)}
        own = list(columns.get(mask, range(2 * int(task), 2 * int(task) + 2)))
        total += float(logits[own].logsumexp(0) - logits[target])
    return total / len(batch.targets)


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_the_loss_is_the_mean_of_each_samples_own(fitted: Any, mask: str) -> None:
    _, seen, _ = fitted(stream={"num_tasks": TASKS, "batch_size": 150}, mask=mask)
    # Batches of 288, 576 and 864 samples' epochs, as the last column of each row says.
    checked = set()
    for (epoch, batch), weights, loss in zip(seen.batches, seen.weights, seen.losses, strict=True):
        checked.add(epoch)
        assert float(loss) == pytest.approx(
            loss_of_samples(weights, batch, mask, epoch + 1), rel=1e-5
        )
    assert checked == {0, 1, 2}


def train(module: Any, stream: Any, make_optimizer: Any, mask: str) -> nn.Module:
    """Every task in turn on all data so far; losses from the columns that are gathered by hand."""
    network = nn.ModuleDict(
        {"backbone": module.network.backbone, "head": module.network.head}
    ).train()
    for task in stream.tasks:
        optimizer = make_optimizer(network.parameters())
        frozen = deepcopy(network["head"])
        closed = range(2 * task.id + 2, stream.num_classes)  # weight decay leaves them alone
        rest = list(closed) if mask in ("task", "seen") else []
        for epoch in range(task.epochs):
            for batch in stream.train_loader(task.id, epoch, range(task.id + 1)):
                logits = network["head"](network["backbone"](stream.prepare(batch).inputs))
                targets = batch.targets
                if mask == "seen":
                    logits = logits[:, : 2 * task.id + 2]
                if mask == "task":  # two columns for each sample, from its label's pair
                    first = targets // 2 * 2
                    logits = logits.gather(1, torch.stack([first, first + 1], 1))
                    targets = targets % 2
                optimizer.zero_grad()
                F.cross_entropy(logits, targets).backward()
                optimizer.step()
                with torch.no_grad():
                    network["head"].weight[rest] = frozen.weight[rest]
                    network["head"].bias[rest] = frozen.bias[rest]
    return network


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mask", ["all", "seen", "task", "shared"])
def test_equals_a_plain_loop(fitted: Any, mask: str, optimizer: str) -> None:
    stream = {"num_tasks": TASKS, "epochs_per_task": [2, 1, 2]}
    run, _, before = fitted(
        stream=stream | ({"domain_incremental": True} if mask == "shared" else {}),
        optimizer=OPTIMIZERS[optimizer],
        mask=mask,
    )
    network = train(before, run.stream, OPTIMIZERS[optimizer], mask)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(run.weights()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", ["all", "task"])
def test_the_first_task_is_plain_training(learn: Any, same: Any, mask: str) -> None:
    arguments = {
        "stream": {"num_tasks": 1, "epochs_per_task": 3},
        "optimizer": OPTIMIZERS["momentum"],
        "mask": mask,
    }
    runs = [learn(strategy, **arguments) for strategy in (JointTraining(), FineTuning())]
    same(runs[0].weights(), runs[1].weights())
    same(runs[0].optimizer_state(), runs[1].optimizer_state())
    assert str(runs[0].random) == str(runs[1].random)


@pytest.mark.parametrize("reset", ["always", "never"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_heads_of_tasks_to_come_do_not_move(fitted: Any, optimizer: str, reset: str) -> None:
    run, seen, before = fitted(
        stream={"num_tasks": TASKS, "reset_optimizer": reset},
        optimizer=OPTIMIZERS[optimizer],
        mask="task",
    )
    start = before.network.head.weight
    for (epoch, _), weights in zip(seen.batches, seen.weights, strict=True):
        assert torch.equal(weights["head.weight"][2 * epoch + 2 :], start[2 * epoch + 2 :])
    updates = zip(seen.batches, seen.weights, strict=True)
    of_epoch = {epoch: weights["head.weight"] for (epoch, _), weights in updates}
    assert (of_epoch[2][:2] != of_epoch[1][:2]).any()  # old heads go on learning
    assert (run.module.network.head.weight[4:] != start[4:]).any()


def test_the_scheduler_knows_how_many_updates_there_are(fitted: Any) -> None:
    counts = []

    def constant(optimizer: Any, num_steps: int) -> Any:
        counts.append(num_steps)
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    _, seen, _ = fitted(stream={"num_tasks": TASKS, "epochs_per_task": 2}, scheduler=constant)
    updates = [0] * TASKS
    for epoch, _ in seen.batches:
        updates[epoch // 2] += 1
    assert sorted(set(counts)) == updates
    assert updates[2] > updates[1] > updates[0]


@pytest.mark.slow
def test_knows_what_one_training_on_all_data_knows(learn: Any) -> None:
    """The first stream ends as the second begins: with all ten digits at once."""
    arguments = {"optimizer": partial(SGD, lr=0.1), "backbone": lambda: MLP([32, 32])}
    joint = learn(
        JointTraining(),
        stream={"num_tasks": 5, "epochs_per_task": 3, "batch_size": 32},
        **arguments,
    )
    at_once = learn(
        FineTuning(),
        stream={"num_tasks": 1, "classes_per_task": 10, "epochs_per_task": 9, "batch_size": 32},
        **arguments,
    )
    accuracy = float(joint.module.accuracy_matrix.accuracy[-1].mean())
    assert accuracy == pytest.approx(
        float(at_once.module.accuracy_matrix.accuracy[-1, 0]), abs=0.04
    )
    assert accuracy > 0.9
    assert torch.equal(
        joint.module.accuracy_matrix.task_agnostic, joint.module.accuracy_matrix.accuracy[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["all", "task"])
def test_resuming_anywhere_changes_nothing(fit: Any, same: Any, tmp_path: Any, mask: str) -> None:
    """Also where an epoch is followed by one with more batches."""

    def run(*more: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        module, trainer = fit(
            [JointTraining(), *more],
            stream=SplitDigits(
                num_tasks=2, epochs_per_task=2, batch_size=150, validation_fraction=0.2, seed=0
            ),
            backbone=nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)
            ),
            optimizer=partial(SGD, lr=0.05, momentum=0.9),
            mask=mask,
            **options,
        )
        optimizer = [list(s.values()) for s in trainer.optimizers[0].state.values()]
        return [module.network.state_dict(), module.curve, optimizer], str(random_state())

    paths: list[Any] = []

    class Saves(Callback):
        def save(self, trainer: Any, *_: Any) -> None:
            paths.append(tmp_path / f"{len(paths):02d}.ckpt")
            trainer.save_checkpoint(paths[-1])

        on_train_batch_end = on_validation_batch_end = on_validation_end = save
        on_train_epoch_end = save

    reference, generators = run(Saves())
    assert len(paths) == (2 * 2 + 2 * 4) + 4 + 4 + 4
    for path in paths:
        resumed, resumed_generators = run(seed=9, ckpt_path=path)
        same(resumed, reference)
        assert resumed_generators == generators


class WarmedUp(JointTraining):
    """A first epoch for the head alone, on the data of all tasks so far."""

    exclusive = False

    def phases(self, task: Any, phases: list[Phase]) -> list[Phase]:
        return [Phase("warm_up", 1, "head"), *phases]


def test_a_warm_up_of_the_head_leaves_the_rest_alone_in_mixed_batches_too(prepare: Any) -> None:
    run = prepare(
        WarmedUp(),
        stream={"num_tasks": TASKS},
        backbone=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 8)),
        optimizer=OPTIMIZERS["momentum"],
    )
    run.trainer.callbacks.append(seen := Seen())
    run.fit()
    for (epoch, _), now, later in zip(
        seen.batches[:-1], seen.weights[:-1], seen.weights[1:], strict=True
    ):
        body = [name for name in now if name.startswith("backbone")]
        same = [torch.equal(now[name], later[name]) for name in body]
        assert all(same) if epoch % 2 == 0 else not any(same)
        moved = (now["head.weight"] != later["head.weight"]).any(1).tolist()
        learned = 2 * (epoch // 2 + 1)
        assert moved == ([True] * learned + [False] * (2 * TASKS - learned) if epoch % 2 == 0
                         else [True] * 2 * TASKS)  # fmt: skip


def test_holds_nothing(learn: Any) -> None:
    run = learn(strategy := JointTraining())
    assert (
        measured_bytes(strategy, run.module.host)
        == strategy.declared_bytes(run.module.host).held
        == (0, 0)
    )
    assert bytes_per_task([strategy], run.module) == {"measured": 0, "paper": 0}
