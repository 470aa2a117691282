"""Metrics of torchmetrics on each task: against counts that are written out, and in every result."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from bpn_lightning.cli import main as cli
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.task_metrics import TaskMetrics, named_metrics
from bpn_lightning.strategies import BeneficialPerturbation

Fit = Callable[..., Any]
CLASSES = 4


def metrics() -> dict[str, Metric]:
    return {
        "f1": MulticlassF1Score(CLASSES),
        "confusion": MulticlassConfusionMatrix(CLASSES),
        "calibration": MulticlassCalibrationError(CLASSES, n_bins=10, norm="l1"),
        "accuracy": MulticlassAccuracy(CLASSES, average="micro"),
    }


def calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Sum over ten bins of confidence of share x |accuracy - mean confidence| (Guo et al., 2017)."""
    confidence, answers = probabilities.max(1), probabilities.argmax(1)
    bins = np.minimum((confidence * 10).astype(int), 9)
    total = 0.0
    for one in range(10):
        inside = bins == one
        if inside.any():
            gap = abs((answers == targets)[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("mask", ["all", "task"])
def test_each_task_is_measured_in_its_own_mode(fit: Fit, mask: str) -> None:
    mine = metrics()
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, seed=0, eval_batch_size=30)
    module, _ = fit([BeneficialPerturbation(4)], stream=stream, mask=mask, metrics=mine)
    assert [(one["after"], one["task"]) for one in module.task_metrics] == [
        (after, task) for after in range(3) for task in range(2)
    ]
    accuracies = module.accuracy_matrix.accuracy
    for one in module.task_metrics:
        accuracy = one["values"]["accuracy"]
        assert accuracy == pytest.approx(accuracies[one["after"], one["task"]].item())
        assert ("confusion" in one["values"]) == (one["after"] == 2)  # of the newest moment only
    for one in module.task_metrics[-2:]:
        probabilities, targets = [], []
        for batch in module.host.batches(one["task"], "test"):
            with torch.no_grad():
                logits = module.eval()(batch.inputs, task=one["task"])
            probabilities.append(logits.double().softmax(1).numpy())
            targets.append(batch.targets.numpy())
        p, y = np.concatenate(probabilities), np.concatenate(targets)
        values = one["values"]
        present = sorted({*y.tolist(), *p.argmax(1).tolist()})
        wanted = f1_score(y, p.argmax(1), labels=present, average="macro")
        assert values["f1"] == pytest.approx(wanted, rel=1e-5)
        assert values["confusion"] == confusion_matrix(y, p.argmax(1), labels=range(4)).tolist()
        assert values["calibration"] == pytest.approx(calibration_error(p, y), rel=1e-4, abs=1e-5)
    assert all(metric.update_count == 0 for metric in mine.values())  # the user's own stay unused
    assert not any("metric" in name for name in module.state_dict())


def test_training_is_the_same_with_and_without(fit: Fit) -> None:
    def weights(**options: Any) -> torch.Tensor:
        module, _ = fit([BeneficialPerturbation(4)], **options)
        return torch.cat([p.flatten() for p in module.parameters()])

    assert torch.equal(weights(), weights(metrics=[*metrics().values()]))


@pytest.mark.filterwarnings("ignore:The stream stopped before its end")
def test_a_resumed_stream_keeps_its_rows(fit: Fit, tmp_path: Path) -> None:
    whole, _ = fit(metrics=metrics())
    _, trainer = fit(metrics=metrics(), trainer={"max_steps": 13})
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = fit(metrics=metrics(), ckpt_path=tmp_path / "part.ckpt")
    assert rest.task_metrics == whole.task_metrics
    assert len(whole.task_metrics) == 6


def test_tasks_that_are_not_tested_are_not_measured(fit: Fit) -> None:
    stream = SplitDigits(num_tasks=3, epochs_per_task=1, seed=0)
    module, _ = fit(stream=stream, metrics=[MulticlassF1Score(6)], evaluate_on="current")
    found = [(one["after"], one["task"]) for one in module.task_metrics]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert set(module.task_metrics[0]["values"]) == {"MulticlassF1Score"}


class Words(Metric):
    """Computes no number."""

    def update(self, probabilities: Any, targets: Any) -> None:
        pass

    def compute(self) -> Any:
        return "fine"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (MulticlassF1Score(4), "a dictionary or a list of torchmetrics' metrics, but got MulticlassF1Sc"),
        ([0.5], "to hold metrics of torchmetrics, but got 0.5. Pass an object, such as"),
        ({"f1": MulticlassF1Score}, "but got <class 'torchmetrics"),
        ([MulticlassF1Score(4), MulticlassF1Score(4)], "but got MulticlassF1Score twice. Pass a dict"),
        ({"": MulticlassF1Score(4)}, "Expected the names of metrics to be words, but got ''"),
        ({"a\nb": MulticlassF1Score(4)}, r"to be words, but got 'a\nb'"),
        ({"f1": MulticlassF1Score(3)}, "Expected metrics.f1 to take probabilities (batch, 4) and targets"),
        ({"b": BinaryF1Score()}, "Expected metrics.b to take probabilities (batch, 4) and targets (batch,)"),
        ({"e": MeanSquaredError()}, "Set num_classes=4, or use a multiclass metric."),
        ({"w": Words()}, "Expected metrics.w to return numbers, but Words returned str."),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Words")
def test_what_is_no_metric_of_the_stream_is_refused(fit: Fit, given: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        fit(metrics=given)


def test_empty_batches_count_nothing() -> None:
    """A process may have no sample of a batch."""
    logits, targets = torch.randn(7, CLASSES), torch.arange(7) % CLASSES
    whole, parts = TaskMetrics(metrics()), TaskMetrics(metrics())
    whole.update(0, logits, targets)
    for part in (slice(0, 0), slice(0, 5), slice(5, 5), slice(5, 7)):
        parts.update(0, logits[part], targets[part])
    assert parts.compute() == whole.compute()
    assert named_metrics(None) == {}


def test_a_process_without_samples_of_a_task_is_refused() -> None:
    TaskMetrics(metrics()).check(CLASSES, [3, 9], processes=3)
    with pytest.raises(ConfigurationError, match="but task 1 has none for some of the 3"):
        TaskMetrics(metrics()).check(CLASSES, [3, 2], processes=3)


CONFIG = """
model:
  metrics:
    f1:
      class_path: torchmetrics.classification.MulticlassF1Score
      init_args: {num_classes: 4}
    confusion:
      class_path: torchmetrics.classification.MulticlassConfusionMatrix
      init_args: {num_classes: 4}
  loss:
    class_path: bpn_lightning.nn.CrossEntropy
    init_args: {class_weights: [1, 2, 3, 4], label_smoothing: 0.1}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_config_names_metrics_and_a_loss_and_results_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    Path("own.yaml").write_text(CONFIG)
    flags = "--config digits_inc.yaml --config own.yaml --method finetune --trainer.accelerator cpu"
    flags += " --data.num_tasks 2 --data.epochs_per_task 1 --model.backbone.hidden [8] --quiet"
    assert cli.main(flags.split()) == 0
    (folder,) = Path("runs").glob("*/*/*")
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader((folder / "task_metrics.csv").read_text().splitlines()))
    assert [(row["after_task"], row["task"]) for row in rows] == [
        (str(after), str(task)) for after in range(3) for task in (1, 2)
    ]
    assert list(rows[0]) == ["after_task", "task", "f1"]
    assert [float(row["f1"]) for row in rows[-2:]] == results["metrics"]["f1"]
    counts = np.array(results["metrics"]["confusion"])
    assert counts.shape == (2, 4, 4)
    share = counts.trace(axis1=1, axis2=2) / counts.sum((1, 2))
    assert share.tolist() == pytest.approx(results["accuracy"]["per_task"])

    from bpn_lightning.report import cli as report

    assert report.main([str(folder), "--out", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Other metrics" in page
    assert f"{results['metrics']['f1'][1]:.3f}" in page
    assert "confusion of task 2" in page
    assert not capsys.readouterr().err
