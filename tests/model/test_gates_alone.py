"""Gates of 0 modes, alone in a run: no network is trained, and their own class is the answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, seed_everything
from torchmetrics.classification import MulticlassAccuracy

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.nn import MLP
from bpn_lightning.nn.fronts import RandomFeatures
from bpn_lightning.strategies import FineTuning
from bpn_lightning.strategies.gates.logits import Confidence
from bpn_lightning.strategies.gates.ncm import NearestClassMean
from bpn_lightning.strategies.gates.slda import SLDA

Fit = Callable[..., Any]


def small(**options: Any) -> SplitDigits:
    return SplitDigits(num_tasks=3, epochs_per_task=2, batch_size=64, seed=0, **options)


def test_the_matrix_is_the_own_class_of_that_gate_beside_a_trained_network(fit: Fit) -> None:
    alone, _ = fit([SLDA(modes=0)], stream=small(), front=RandomFeatures(50))
    beside, _ = fit([FineTuning(), SLDA()], stream=small(), front=RandomFeatures(50))
    for own, other in zip(alone.gate_scores, beside.gate_scores, strict=True):
        after = own["after"]
        for key in ("task_accuracy", "own_class", "own_class_task_given", "rejection"):
            assert own[key] == other[key], key
        assert own["mixture"] == own["end_to_end"] == [None] * 3
        row = alone.accuracy_matrix.accuracy[after, :after].tolist()
        assert row == own["own_class_task_given"][:after]
    for score, row in (
        ("accuracy", alone.accuracy_matrix.accuracy[3]),
        ("accuracy_task_agnostic", alone.accuracy_matrix.task_agnostic),
    ):
        counts = alone.history.class_counts[score]
        right = torch.tensor(counts["right"]).view(3, 2).sum(1)  # two classes of each task
        torch.testing.assert_close(right.double() / torch.tensor(counts["tasks"]), row)
    assert alone.accuracy_matrix.accuracy[0].isnan().all()
    assert alone.accuracy_matrix.task_agnostic.tolist() == beside.gate_scores[-1]["own_class"]
    assert [task.epochs for task in alone.tasks] == [0, 0, 0]
    assert alone.trainer.global_step == 0


class Weights(Callback):
    """Of a module when its fit starts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = {name: value.clone() for name, value in pl_module.network.named_parameters()}


def test_no_weight_moves(fit: Fit) -> None:
    weights = Weights()
    module, _ = fit([NearestClassMean(modes=0), weights], stream=small(), mask="task")
    for name, value in module.network.named_parameters():
        assert torch.equal(value, weights.before[name]), name
    assert module.closed == 2
    assert not module.accuracy_matrix.task_agnostic.isnan().any()  # whatever the mask


def learn(devices: int) -> Any:
    seed_everything(0, verbose=False)
    module = ContinualModule(MLP([8]))
    trainer_of(devices, [SLDA(modes=0)]).fit(module, small())
    return module.accuracy_matrix.accuracy, module.gate_scores


@pytest.mark.slow
def test_two_processes_have_the_matrix_of_one(ranks: Any) -> None:
    (first, second), (matrix, scores) = ranks(learn, 2), learn(1)
    assert torch.equal(first[0].nan_to_num(), second[0].nan_to_num())
    torch.testing.assert_close(first[0], matrix, equal_nan=True, rtol=0, atol=1e-6)
    assert [one["own_class"] for one in first[1]] == [one["own_class"] for one in scores]


@pytest.mark.parametrize("saved", ["checkpoint", "export"])
def test_a_file_of_gates_answers_as_the_module(fit: Fit, tmp_path: Path, saved: str) -> None:
    stream = small()
    module, trainer = fit([SLDA(modes=0), NearestClassMean(modes=0)], stream=stream)
    batch = next(iter(stream.loader(1, "test")))
    if saved == "export":
        loaded = load_exported(export_module(module, tmp_path / "file"), MLP([16, 16]))
    else:
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = ContinualModule.load_from_checkpoint(tmp_path / "a.ckpt", backbone=MLP([16, 16]))
    tasks = torch.ones(len(batch.targets), dtype=torch.int64)
    for given in (None, 1, tasks):
        expected = module.predict(batch.inputs, given)
        assert torch.equal(loaded.predict(batch.inputs, given), expected)
        right = (expected.argmax(1) == batch.targets).double().mean()
        key = "own_class" if given is None else "own_class_task_given"
        scores = next(one for one in reversed(module.gate_scores) if one["gate"] == "slda")
        assert float(right) == scores[key][1]
    assert module.predict(batch.inputs, 1).isinf().sum() == 4 * len(batch.targets)
    loaded.attach(stream)
    assert torch.equal(loaded.evaluate(), module.accuracy_matrix.accuracy[3])


def test_a_gate_with_modes_trains_them(fit: Fit) -> None:
    module, _ = fit([SLDA(modes=0), NearestClassMean()], stream=small())
    assert module.tasks[0].epochs == 2
    assert module.trainer.global_step > 0
    assert module.accuracy_matrix.accuracy[0].isfinite().all()


def test_what_cannot_be_is_refused(fit: Fit) -> None:
    for make in (Confidence, lambda modes: NearestClassMean(per="task", modes=modes)):
        with pytest.raises(ConfigurationError, match="since it names tasks only, but got 0"):
            make(modes=0)
    with pytest.raises(ConfigurationError, match="whole number of at least 1, but got -1"):
        SLDA(modes=-1)
    with pytest.raises(ConfigurationError, match="Expected metrics to be None where gates"):
        fit([SLDA(modes=0)], stream=small(), metrics=[MulticlassAccuracy(6)])
    module, _ = fit([SLDA(modes=0)], stream=small())
    with pytest.raises(ConfigurationError, match="to get a network that was trained"):
        trainer_of(1, [SLDA(modes=0)]).test(module, small())
