"""What a module counts, weighs and measures in two processes is what it is in one."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import seed_everything
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.metrics import settling
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.nn.losses import CrossEntropy


def learn(devices: int) -> tuple[dict[str, Any], list[Any], list[Any], dict[str, Any]]:
    """The parameters, the tasks that lost accuracy at their end, the metrics, and counts by class."""
    seed_everything(0, verbose=False)
    # 288 and 290 images in batches of 41: one process has no sample of a last one.
    stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=41, eval_batch_size=71, seed=0)
    module = ContinualModule(
        MLP([16]),
        loss=CrossEntropy([1, 2, 3, 4], 0.1),
        metrics={"f1": MulticlassF1Score(4), "calibration": MulticlassCalibrationError(4)},
    )
    trainer = trainer_of(devices, [], precision="64-true", accumulate_grad_batches=3)
    with patch.object(settling, "MAX_FALL", -2.0):
        trainer.fit(module, stream)
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    counts = {**module.history.class_counts}
    return weights, list(module.unsettled), list(module.task_metrics), counts


@pytest.mark.filterwarnings("ignore:Task .* lost accuracy")
def test_two_processes_count_what_one_counts(ranks: Any) -> None:
    """With gradients that accumulate: of answers, of a loss of one's own, and of torchmetrics' metrics, lists among them."""
    (weights, unsettled, metrics, counts), ((others, of_two, metrics_of_two, counts_of_two), _) = (
        learn(1),
        ranks(learn, 2),
    )
    torch.testing.assert_close(others, weights, rtol=1e-9, atol=1e-12)
    assert of_two == unsettled
    assert counts_of_two == counts
    assert sum(counts["accuracy"]["samples"]) == sum(counts["accuracy"]["tasks"]) > 140
    assert len(unsettled) == 2
    assert len(metrics) == len(metrics_of_two) == 6
    for one, other in zip(metrics, metrics_of_two, strict=True):
        assert other["values"] == pytest.approx(one["values"], rel=1e-5)
