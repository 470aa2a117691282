"""Counts by class against torchmetrics and scikit-learn."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassRecall

from bpn_lightning.metrics.class_counts import CountClasses
from bpn_lightning.run.results import _by_class
from bpn_lightning.tasks import Task

TASKS = [Task(0, (0, 2), ("a", "b"), 1), Task(1, (2, 3), ("c",), 1), Task(2, (3, 5), ("d", "e"), 1)]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # which is the point
def test_recalls_are_torchmetrics_and_their_mean_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = CountClasses(len(TASKS), max(t.columns[1] for t in TASKS), 2, torch.device("cpu"))
    every = []
    for task, (first, stop) in ((0, (0, 2)), (0, (0, 2)), (1, (2, 3)), (2, (3, 5))):
        targets = torch.randint(first, stop, (20,), generator=generator)
        # Some are answered with a class of the task that is not learned, which has no samples.
        logits = torch.randn(20, 5, generator=generator) + torch.eye(5)[targets]
        counts.update(task, logits, targets)
        every.append((task, logits, targets))
    counts.update(1, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    logits, targets = (
        torch.cat([one[which] for one in every if one[0] < 2])  # type: ignore[misc]
        for which in (1, 2)
    )
    found = _by_class(counts.compute(lambda tensor: tensor), TASKS)
    assert found["samples_per_task"] == [40, 20, 0]
    assert found["classes"] == [*"abcde"]
    assert found["samples"] == targets.bincount(minlength=5).tolist()
    recall = MulticlassRecall(5, average=None)(logits, targets)
    assert found["per_class"][:3] == pytest.approx(recall[:3].tolist())
    assert found["per_class"][3:] == [None, None]
    assert found["balanced"] == pytest.approx(balanced_accuracy_score(targets, logits.argmax(1)))


def test_tasks_that_share_columns_are_pooled() -> None:
    tasks = [Task(k, (0, 2), names, 1) for k, names in enumerate((("a", "b"), ("a", "c")))]
    counts = CountClasses(len(tasks), max(t.columns[1] for t in tasks), 2, torch.device("cpu"))
    counts.update(0, torch.eye(2), torch.tensor([0, 1]))
    counts.update(1, torch.eye(2), torch.tensor([0, 0]))
    found = _by_class(counts.compute(lambda tensor: tensor), tasks)
    assert found["classes"] == ["a", "b / c"]
    assert (found["samples"], found["per_class"]) == ([3, 1], [pytest.approx(2 / 3), 1.0])
    assert found["balanced"] == pytest.approx(5 / 6)
