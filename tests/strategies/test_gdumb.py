"""GDumb against a network that is trained on its memory by a plain loop."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from bpn_lightning.costs import measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.gdumb import GDumb

STREAM = {"num_tasks": 3, "epochs_per_task": 2}

#: Long enough for a network that begins from scratch.
LONG: dict[str, Any] = {
    "backbone": lambda: MLP([32]),
    "optimizer": partial(SGD, lr=0.2),
    "stream": {**STREAM, "epochs_per_task": 20},
}


class Watched(GDumb):
    """Another strategy may look on."""

    exclusive = False

    @property
    def state_key(self) -> str:
        return "gdumb"


def by_hand(run: Any, start: dict[str, Tensor], memory: Any, task: int) -> dict[str, Tensor]:
    """A new network on the memory alone, in as many updates as the stream has batches."""
    backbone, head = MLP([16, 12]), torch.nn.Linear(12, 6)
    for part, name in ((backbone, "backbone."), (head, "head.")):
        own = {k.removeprefix(name): v for k, v in start.items() if k.startswith(name)}
        part.load_state_dict(own)
    optimizer = SGD([*backbone.parameters(), *head.parameters()], lr=0.05)
    inputs, targets = memory
    order: list[int] = []
    number = 0
    for epoch in range(2):
        for batch in run.stream.train_loader(task, epoch):
            while len(order) < len(batch.targets):
                key = ("gdumb", "samples", run.stream.seed, task, number)
                order += torch.randperm(len(targets), generator=seeded_generator(*key)).tolist()
                number += 1
            rows, order = order[: len(batch.targets)], order[len(batch.targets) :]
            optimizer.zero_grad()
            x = run.stream.normalize(inputs[rows])
            F.cross_entropy(head(backbone(x)), targets[rows]).backward()
            optimizer.step()
    return {
        **{f"backbone.{k}": v for k, v in backbone.state_dict().items()},
        **{f"head.{k}": v for k, v in head.state_dict().items()},
    }


def test_each_network_is_trained_from_scratch_on_the_memory_alone(
    prepare: Any, watch: Any, same: Any
) -> None:
    gdumb, learned, memory = Watched(31), {}, {}

    def note(host: Any, task: Any) -> None:
        learned[task.id] = run.weights()
        memory[task.id] = gdumb.memory.inputs.clone(), gdumb.memory.targets.clone()

    run = prepare(gdumb, watch(end=note), stream=STREAM, optimizer=partial(SGD, lr=0.05))
    start = run.weights()
    run.fit()
    for task in range(3):
        counts = Counter(memory[task][1].tolist())
        assert sorted(counts) == list(range(2 * task + 2))
        assert sum(counts.values()) == 31
        assert max(counts.values()) - min(counts.values()) <= 1
        same(by_hand(run, start, memory[task], task), learned[task])


def test_the_memory_has_training_images_with_their_labels(learn: Any) -> None:
    gdumb = GDumb(40)
    run = learn(gdumb, stream=STREAM)
    known = {}
    for task in range(3):
        for batch in run.stream.loader(task, "train"):
            for image, target in zip(batch.inputs, batch.targets.tolist(), strict=True):
                known[task, image.numpy().tobytes()] = target
    memory = gdumb.memory
    assert memory.inputs.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in memory.inputs}) == 40
    for image, target, task in zip(memory.inputs, memory.targets, memory.tasks(), strict=True):
        assert known[int(task), image.numpy().tobytes()] == target


def test_told_the_task_all_heads_are_trained(learn: Any) -> None:
    gdumb = GDumb(90)
    run = learn(gdumb, mask="task", **LONG)
    rows, initial = run.module.network.head.weight.detach(), gdumb.initial["head.weight"]
    assert (rows != initial).any(1).all()
    assert run.module.accuracy_matrix.accuracy[-1].min() > 0.9


def test_it_knows_all_classes_from_few_samples(learn: Any) -> None:
    run = learn(GDumb(90), **LONG)
    assert run.module.accuracy_matrix.accuracy[-1].mean() > 0.7


def test_what_is_forgotten_is_in_no_later_network(learn: Any) -> None:
    gdumb = GDumb(40)
    run = learn(gdumb, stream=STREAM)
    run.module.forget(1)
    assert set(gdumb.memory.targets.tolist()) == {0, 1, 4, 5}
    assert not gdumb.initial["head.weight"][2:4].any()
    assert gdumb.initial["head.weight"][:2].any()


def test_bytes_are_those_of_the_memory_and_of_the_initial_weights(learn: Any) -> None:
    gdumb = GDumb(40)
    run = learn(gdumb, stream=STREAM)
    weights = sum(value.numel() for value in run.weights().values())
    held = measured_bytes(gdumb, run.module.host)
    assert held == (40 * (64 + 8) + 4 * weights, 0)
    assert gdumb.declared_bytes(run.module.host).held == held
    assert gdumb.declared_bytes(run.module.host).per_task == 40 * (64 + 8) // 3


def test_a_memory_without_room_for_each_class_is_refused_before_training(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least 1 sample of each of the 6 classes"):
        learn(GDumb(5), stream=STREAM)


def test_an_optimizer_that_continues_is_refused(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match="Expected reset_optimizer to be 'always' if each"):
        learn(GDumb(20), stream={**STREAM, "reset_optimizer": "never"})
