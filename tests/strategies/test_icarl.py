"""iCaRL against its loss written out, scikit-learn's nearest centroids, and exemplars by hand."""

from collections import Counter
from copy import deepcopy
from functools import partial
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import SGD

from bpn_lightning import export_module, load_exported
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.icarl import ICaRL

STREAM = {"num_tasks": 3}

#: scikit-learn's, of units that are 0 for all exemplars.
pytestmark = pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")


class Watched(ICaRL):
    """Another strategy may look on."""

    exclusive = False


def features(host: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad(), evaluation_mode(host.network):
        return normalize(host.network.backbone(inputs), dim=1)


def data_of(host: Any, task: int, split: Any = "train") -> tuple[Tensor, Tensor]:
    batches = list(host.batches(task, split))
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


# --- exemplars -----------------------------------------------------------------------------------


def nearest_running_means(found: np.ndarray[Any, Any], number: int) -> list[int]:
    """Algorithm 4, trying every sample."""
    mean = found.mean(0) / np.linalg.norm(found.mean(0))
    chosen: list[int] = []
    for k in range(1, number + 1):
        gaps = np.linalg.norm(mean - (found + found[chosen].sum(0)) / k, axis=1)
        gaps[chosen] = np.inf
        chosen.append(int(gaps.argmin()))
    return chosen


def test_exemplars_are_chosen_by_herding_and_old_ones_lose_their_last(
    prepare: Any, watch: Any
) -> None:
    icarl, memories = Watched(31), {}

    def note(host: Any, task: Any) -> None:
        """The network and the memory right after a task, when the next one starts."""
        if task.id == 0:
            return
        last, memory = task.id - 1, icarl.memory
        memories[last] = memory.inputs.clone(), memory.targets.clone(), list(memory.sizes)
        raw = torch.cat([b.inputs for b in host.stream.loader(last, "train")])
        inputs, targets = data_of(host, last)
        for column in range(*host.network.tasks[last].columns):
            members = (targets == column).nonzero().flatten()
            found = features(host, inputs[members]).double().numpy()
            number = 31 // (2 * task.id)
            wanted = raw[members[nearest_running_means(found, number)]]
            assert torch.equal(memory.inputs[memory.targets == column], wanted)

    run = prepare(icarl, watch(start=note), stream=STREAM)
    run.fit()
    assert Counter(icarl.memory.targets.tolist()) == dict.fromkeys(range(6), 31 // 6)
    (first, labels, _), number = memories[0], 31 // 6
    for column in range(2):
        now = icarl.memory.inputs[icarl.memory.targets == column]
        assert torch.equal(now, first[labels == column][:number])


# --- answers -------------------------------------------------------------------------------------


def centroids(icarl: Any, host: Any) -> NearestCentroid:
    """scikit-learn's, with the paper's normalized means."""
    every = torch.arange(len(icarl.memory))
    found = features(host, icarl.samples(host, every).inputs)
    judge = NearestCentroid().fit(found.numpy(), icarl.memory.targets.numpy())
    judge.centroids_ /= np.linalg.norm(judge.centroids_, axis=1, keepdims=True)
    return judge


@pytest.mark.parametrize("mask", ["all", "seen"])
def test_answers_are_those_of_the_nearest_mean_of_exemplars(learn: Any, mask: Any) -> None:
    icarl = ICaRL(60)
    run = learn(icarl, mask=mask, stream=STREAM)
    host, right = run.module.host, []
    judge = centroids(icarl, host)
    for task in range(3):
        inputs, targets = data_of(host, task, "test")
        known = features(host, inputs)
        wanted = judge.predict(known.numpy())
        with torch.no_grad(), evaluation_mode(host.network):
            found = host.network(inputs, task=task).argmax(1)
        told_apart = known.any(1)  # an input without features is as far from all means
        assert found[told_apart].tolist() == wanted[told_apart].tolist()
        assert told_apart.double().mean() > 0.8
        right.append(float((found == targets).double().mean()))
    assert run.module.accuracy_matrix.accuracy[-1].tolist() == pytest.approx(right)


def test_it_remembers_what_fine_tuning_forgets(learn: Any) -> None:
    run = learn(
        ICaRL(100),
        backbone=lambda: MLP([32]),
        optimizer=partial(SGD, lr=0.05),
        stream={**STREAM, "epochs_per_task": 15},
    )
    assert run.module.accuracy_matrix.accuracy[-1].mean() > 0.8


def test_told_the_task_it_chooses_among_the_tasks_classes(learn: Any) -> None:
    icarl = ICaRL(60)
    run = learn(icarl, mask="task", stream=STREAM)
    host = run.module.host
    judge = centroids(icarl, host)
    for task in range(3):
        inputs, _ = data_of(host, task, "test")
        own = judge.centroids_[2 * task : 2 * task + 2]
        known = features(host, inputs)
        gaps = np.linalg.norm(known.numpy()[:, None] - own, axis=2)
        with torch.no_grad(), evaluation_mode(host.network):
            found = host.network(inputs, task=task).argmax(1)
        told_apart = known.any(1)
        assert found[told_apart].tolist() == (2 * task + gaps.argmin(1))[told_apart].tolist()


@pytest.mark.parametrize("mask", ["all", "task"])
def test_a_class_that_is_not_learned_is_no_answer(prepare: Any, mask: Any, watch: Any) -> None:
    """Between tasks the head has the means; in training its own weights, as they were."""
    icarl, heads = Watched(30), {}

    def note(host: Any, task: Any) -> None:
        heads[f"end {task.id}"] = host.network.head.weight.detach().clone()

    def begin(host: Any, task: Any) -> None:
        heads[f"start {task.id}"] = host.network.head.weight.detach().clone()

    run = prepare(icarl, watch(start=begin, end=note), mask=mask, stream=STREAM).fit()
    rows = run.module.network.head.weight.detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    assert torch.equal(heads["start 1"], heads["end 0"])
    assert torch.equal(heads["start 2"], heads["end 1"])
    row = run.module.accuracy_matrix.accuracy[1]
    assert float(row[0]) > 0.5
    assert (float(row[1]) == float(row[2]) == 0) == (mask == "all")


def test_an_export_answers_by_the_means(learn: Any, tmp_path: Path) -> None:
    icarl = ICaRL(30)
    run = learn(icarl, stream=STREAM)
    export_module(run.module, tmp_path / "bundle")
    again = load_exported(tmp_path / "bundle", MLP([16, 12]))
    raw = torch.cat([b.inputs for b in run.stream.loader(0, "test")])
    torch.testing.assert_close(again.predict(raw, 0), run.module.predict(raw, 0), rtol=0, atol=0)
    held = b"".join(
        path.read_bytes() for path in (tmp_path / "bundle").rglob("*") if path.is_file()
    )
    assert not [image for image in icarl.memory.inputs if image.numpy().tobytes() in held]


# --- the loss ------------------------------------------------------------------------------------


def sigmoid(z: float) -> float:
    return 1 / (1 + exp(-z))


def by_hand(z: list[float], q: list[float], label: int, old: range, new: range) -> float:
    """The loss of one sample, of Algorithm 3."""
    loss = 0.0
    for c in new:
        loss -= log(sigmoid(z[c])) if c == label else log(1 - sigmoid(z[c]))
    for c in old:
        loss -= q[c] * log(sigmoid(z[c])) + (1 - q[c]) * log(1 - sigmoid(z[c]))
    return loss


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_the_loss_is_algorithm_3_sample_by_sample(prepare: Any, watch: Any, mask: Any) -> None:
    icarl, before, checked = Watched(12), {}, []

    def begin(host: Any, task: Any) -> None:
        state = host.network.state_dict()
        before.update({name: value.clone() for name, value in state.items()})

    def logits_by(host: Any, inputs: Tensor, weights: dict[str, Tensor]) -> list[list[float]]:
        other = deepcopy(host.network)
        other.load_state_dict(weights)
        with torch.no_grad(), evaluation_mode(other):
            found: list[list[float]] = other.open_logits(inputs).tolist()
        return found

    def check(host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        task = host.network.opened
        new = range(*host.network.tasks[task].columns)
        old = range(0) if mask == "task" else range(new.start)
        now = host.network.state_dict()
        z, q = logits_by(host, batch.inputs, now), logits_by(host, batch.inputs, before)
        found = icarl.task_losses(host, batch, logits).tolist()
        for i, label in enumerate(batch.targets.tolist()):
            wanted = by_hand(z[i], list(map(sigmoid, q[i])), label, old, new)
            assert found[i] == pytest.approx(wanted, rel=1e-4)
        if len(icarl.memory):
            check_exemplars(host, now)
        checked.append(task)
        return {}

    def check_exemplars(host: Any, now: dict[str, Tensor]) -> None:
        icarl._drawn = torch.arange(len(icarl.memory))
        found = icarl.loss_terms(host, None, None)["exemplars"].tolist()
        inputs = icarl.samples(host, icarl._drawn).inputs
        z, q = logits_by(host, inputs, now), logits_by(host, inputs, before)
        open_task = host.network.tasks[host.network.opened].columns
        for i, label in enumerate(icarl.memory.targets.tolist()):
            new, old = range(*open_task), range(open_task[0])
            if mask == "task":
                new, old = range(0), range(label // 2 * 2, label // 2 * 2 + 2)
            wanted = by_hand(z[i], list(map(sigmoid, q[i])), label, old, new)
            assert found[i] == pytest.approx(wanted, rel=1e-4)

    looks = watch(start=begin, terms=check)
    run = prepare(icarl, looks, mask=mask, stream={**STREAM, "batch_size": 96})
    run.fit()
    assert sorted(set(checked)) == [0, 1, 2]


def test_each_exemplar_comes_once_in_an_epoch(prepare: Any) -> None:
    class Counted(ICaRL):
        def loss_terms(self, host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
            terms = super().loss_terms(host, batch, logits)
            if terms:
                place = (host.network.opened, host.trainer.current_epoch)
                came.setdefault(place, []).extend(self._drawn.tolist())
                assert len(terms["exemplars"]) == len(self._drawn)
            return terms

    came: dict[tuple[int, int], list[int]] = {}
    prepare(Counted(50), stream={**STREAM, "epochs_per_task": 2}).fit()
    assert len(came) == 4
    for (task, _), rows in came.items():
        assert sorted(rows) == list(range(50 if task == 1 else 48))
    epochs = [rows for (task, _), rows in came.items() if task == 1]
    assert all(one != other for one, other in pairwise(epochs))


def test_a_memory_without_room_for_each_class_is_refused_before_training(learn: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least 1 sample of each of the 6 classes"):
        learn(ICaRL(5), stream=STREAM)


def test_forgetting_a_task_takes_its_exemplars_and_its_rows(learn: Any) -> None:
    icarl = ICaRL(30)
    run = learn(icarl, stream=STREAM)
    left = [line for line in run.module.forget(0) if line.startswith("icarl:")]
    assert left == ["icarl: the teacher, a copy of the shared weights"]
    assert set(icarl.memory.targets.tolist()) == {2, 3, 4, 5}
    assert not icarl.teacher.tensors["head.weight"][:2].any()
    assert not run.module.host.training_weights["head.weight"][:2].any()
