"""Experience replay against a loop that is written out, and its memory against the stream."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import LBFGS, SGD

from bpn_lightning.costs import Bytes, measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.der import DarkExperienceReplay
from bpn_lightning.strategies.er import ExperienceReplay
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.tasks import Batch

THREE = {"num_tasks": 3, "epochs_per_task": 2}


class Batches(Callback):
    """The batches of the stream, as they are prepared, by task."""

    def __init__(self) -> None:
        self.of_task: dict[int, list[Any]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.of_task.setdefault(module.opened, []).append(batch)


def orders(size: int, seed: int, task: int, what: str = "samples", name: str = "er") -> Any:
    """Indices into the memory, one random order after the other."""
    number = 0
    while True:
        generator = seeded_generator(name, what, seed, task, number)
        yield from torch.randperm(size, generator=generator).tolist()
        number += 1


def images(module: Any, task: int) -> dict[bytes, int]:
    """The class of every training image of a task."""
    found = {}
    for batch in module.host.stream.loader(task, "train"):
        for image, target in zip(batch.inputs, batch.targets.tolist(), strict=True):
            found[image.numpy().tobytes()] = target
    return found


def by_hand(run: Any, batches: Batches, memory: Any) -> dict[str, Tensor]:
    """The paper's Algorithm 1 in plain torch, from the stream's batches and the memory of each task."""
    torch.manual_seed(0)
    backbone = MLP([16, 12])
    start = {k: v for k, v in run.start.items() if k.startswith("backbone.")}
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in start.items()})
    head = torch.nn.Linear(12, 6)
    head.load_state_dict({k: run.start[f"head.{k}"] for k in ("weight", "bias")})
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = SGD(parameters, lr=0.05)
    for task, of_task in batches.of_task.items():
        inputs, targets = memory[task]
        order = orders(len(targets), run.stream.seed, task)
        for batch in of_task:
            x, y = batch.inputs, batch.targets
            if len(targets):
                rows = [next(order) for _ in range(len(y))]
                x = torch.cat((x, run.stream.normalize(inputs[rows])))
                y = torch.cat((y, targets[rows]))
            optimizer.zero_grad()
            F.cross_entropy(head(backbone(x)), y).backward()
            optimizer.step()
    return {
        **{f"backbone.{k}": v for k, v in backbone.state_dict().items()},
        **{f"head.{k}": v for k, v in head.state_dict().items()},
    }


def test_it_is_the_papers_loop_bit_for_bit(prepare: Any, watch: Any, same: Any) -> None:
    memory: dict[int, Any] = {}
    er, batches = ExperienceReplay(24), Batches()

    def note(host: Any, task: Any) -> None:
        memory[task.id] = er.memory.inputs.clone(), er.memory.targets.clone()

    run = prepare(er, watch(start=note), batches, stream=THREE, optimizer=partial(SGD, lr=0.05))
    run.start = run.weights()
    run.fit()
    assert [len(targets) for _, targets in memory.values()] == [0, 24, 24]
    same(by_hand(run, batches, memory), run.weights())


def test_the_memory_has_training_samples_of_each_task_with_their_labels(learn: Any) -> None:
    er = ExperienceReplay(60)
    run = learn(er, stream={"num_tasks": 3})
    memory = er.memory
    assert memory.inputs.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in memory.inputs}) == len(memory) == 60
    assert er.seen == [len(images(run.module, task)) for task in range(3)]
    assert min(memory.sizes) > 5
    for image, target, task in zip(memory.inputs, memory.targets, memory.tasks(), strict=True):
        assert images(run.module, int(task))[image.numpy().tobytes()] == target


def test_two_runs_have_the_same_memory_and_other_seeds_another(learn: Any) -> None:
    one, again, other = (ExperienceReplay(20) for _ in range(3))
    learn(one, stream={"seed": 1})
    learn(FineTuning(), again, stream={"seed": 1})
    learn(other, stream={"seed": 2})
    assert torch.equal(one.memory.inputs, again.memory.inputs)
    assert not torch.equal(one.memory.inputs, other.memory.inputs)


@pytest.mark.parametrize("mask", ["all", "seen", "task", "shared"])
def test_each_sample_has_the_loss_of_its_task(prepare: Any, mask: str) -> None:
    """Where each task has its own rows of the head, old ones learn from their samples alone."""
    er = ExperienceReplay(30)
    stream = {"num_tasks": 3, "domain_incremental": mask == "shared"}
    run = prepare(er, mask=mask, stream=stream).fit()
    host, network = run.module.host, run.module.network
    batch = next(iter(host.batches(2, "train")))
    draws = er.draws
    whole = er.training_batch(host, batch)
    assert er.draws - draws == batch.global_size == len(batch.targets)
    assert whole.global_size == len(whole.targets) == 2 * batch.global_size
    assert torch.equal(whole.inputs[: len(batch.inputs)], batch.inputs)
    total = 0.0
    for x, y, task in zip(whole.inputs, whole.targets, whole.task, strict=True):
        logits = network(x[None], task=int(task))
        total += float(host.losses(logits, y[None], int(task)).sum().detach())
    er.draws = draws
    run.module.step.begin_batch()
    loss = float(run.module.step.loss(batch, 0).detach())
    assert loss == pytest.approx(total / len(whole.targets), rel=1e-5)


def test_with_heads_of_their_own_only_those_of_learned_tasks_move(prepare: Any, watch: Any) -> None:
    heads: dict[int, Tensor] = {}

    def note(host: Any, task: Any) -> None:
        heads[task.id] = host.network.head.weight.detach().clone()

    run = prepare(ExperienceReplay(30), watch(start=note), mask="task", stream={"num_tasks": 3})
    run.fit()
    assert not torch.equal(heads[1][0:2], heads[2][0:2])
    assert torch.equal(heads[1][4:6], heads[2][4:6])


def test_a_frozen_core_keeps_the_rows_of_learned_tasks(learn: Any, watch: Any) -> None:
    heads: dict[int, Tensor] = {}

    def note(host: Any, task: Any) -> None:
        heads[task.id] = host.network.head.weight.detach().clone()

    units = BeneficialPerturbation(8)
    learn(units, ExperienceReplay(30), watch(end=note), train="modes", stream={"num_tasks": 3})
    assert torch.equal(heads[1][0:2], heads[2][0:2])


def test_an_optimizer_that_asks_again_gets_the_same_samples(prepare: Any, watch: Any) -> None:
    """One draw for each batch, however often its gradients are evaluated."""
    er, asked, drawn = ExperienceReplay(30), [], {}

    def note(host: Any, task: Any) -> None:
        drawn[task.id] = er.draws

    def count(host: Any, parameters: Any) -> None:
        asked.append(host.network.opened)

    optimizer = partial(LBFGS, lr=0.1, max_iter=3)
    run = prepare(watch(end=note, project=count), er, optimizer=optimizer).fit()
    assert drawn == {0: 0, 1: len(images(run.module, 1))}
    assert asked.count(1) > 5


def test_it_remembers_what_fine_tuning_forgets(learn: Any) -> None:
    scores = {}
    for name, method in {"er": ExperienceReplay(100), "finetune": FineTuning()}.items():
        run = learn(
            method,
            backbone=lambda: MLP([32]),
            optimizer=partial(SGD, lr=0.1),
            stream={"num_tasks": 3, "epochs_per_task": 15},
        )
        scores[name] = run.module.accuracy_matrix.accuracy[-1]
    assert scores["er"].mean() > 0.8
    assert scores["finetune"][:2].max() < 0.2


def test_bytes_are_those_of_images_and_labels(learn: Any) -> None:
    er = ExperienceReplay(50)
    run = learn(er)
    assert measured_bytes(er, run.module.host) == Bytes(50 * (64 + 8), 0)
    assert er.declared_bytes(run.module.host).held == Bytes(50 * (64 + 8), 0)
    assert er.declared_bytes(run.module.host).per_task == 50 * (64 + 8) // 2


def test_a_forgotten_tasks_samples_go_and_leave_room(learn: Any) -> None:
    er = ExperienceReplay(30)
    run = learn(er, stream={"num_tasks": 3})
    before = er.memory.targets.clone()
    assert not [line for line in run.module.forget(1) if line.startswith("er:")]
    assert er.memory.targets.tolist() == before[(before < 2) | (before >= 4)].tolist()
    assert er.seen[1] == 0
    assert er.memory.sizes[1] == 0


@pytest.mark.parametrize("number", [0, 5, 13, 40])
@pytest.mark.parametrize("cuts", [[13], [6, 7], [5, 5, 3], [0, 13]])
def test_processes_share_what_is_drawn(cuts: list[int], number: int) -> None:
    """Each sample once, in order, and as evenly as the batch."""
    drawn, found, start = torch.arange(number), [], 0
    for own in cuts:
        batch = Batch(torch.empty(own), torch.empty(own), 0, sum(cuts), start=start)
        part = drawn[ExperienceReplay.own_part(batch, drawn)].tolist()
        assert abs(len(part) - own * number / sum(cuts)) < 1
        found, start = found + part, start + own
    assert found == list(range(number))


@pytest.mark.parametrize("size", [-1, 2.0, True, "many"])
def test_what_is_no_number_of_samples_is_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="Expected memory_size to be a whole number of at"):
        ExperienceReplay(size)


def test_one_memory_a_run(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match="at most one strategy that draws from a memory"):
        learn(ExperienceReplay(8), DarkExperienceReplay(8))
