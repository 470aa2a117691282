"""Probes look and change nothing; what they see is what it says to be."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import Gaussians, SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.paper.probes import Drift, Moves, Probe, Regions
from bpn_lightning.strategies import EWC, BeneficialPerturbation


def fit(
    folder: Path,
    stream: Any,
    probes: Sequence[L.Callback],
    *,
    callbacks: Sequence[L.Callback] = (),
    **trainer: Any,
) -> ContinualModule:
    L.seed_everything(0)
    mask = "shared" if isinstance(stream, Gaussians) else "all"
    model = ContinualModule(
        MLP([12, 12]), optimizer=lambda params: torch.optim.SGD(params, lr=0.05), mask=mask
    )
    L.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BeneficialPerturbation(8, 0.05), EWC(100.0), *callbacks, *probes],
    ).fit(model, stream, **trainer)
    return model


def digits() -> SplitDigits:
    return SplitDigits(num_tasks=3, epochs_per_task=2, batch_size=50, seed=0)


def test_drift_begins_at_zero_and_the_missing_bias_is_seen(tmp_path: Path) -> None:
    looked = fit(tmp_path, digits(), [Drift()])
    seen = json.loads((tmp_path / "drift.json").read_text())
    assert len(seen) == 3
    assert len(seen[0]) == 4  # two layers, the outputs of task 1 and the others
    assert all(part["with"] == 0 and part["without"] > 0 for part in seen[0].values())
    assert all(part["with"] > 0 for moment in seen[1:] for part in moment.values())

    alone = fit(tmp_path / "alone", digits(), [])
    for one, other in zip(looked.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(looked.accuracy_matrix.accuracy, alone.accuracy_matrix.accuracy)


def test_drift_of_the_first_layer_by_hand(tmp_path: Path) -> None:
    kept = {}

    class Weights(Probe):
        file = "weights.json"

        def look(self, module: Any, moment: int) -> Any:
            with module.task_mode(0):
                (batch,) = list(module.host.batches(0, "test"))
                layer = module.network.linear_layers()["backbone.1"]
                kept[moment] = layer(batch.inputs.flatten(1)).clone()

    fit(tmp_path, digits(), [Drift(), Weights()])
    distance = (kept[2] - kept[0]).norm(dim=1).mean() / kept[0].norm(dim=1).mean()
    seen = json.loads((tmp_path / "drift.json").read_text())
    assert seen[2]["backbone.1"]["with"] == pytest.approx(float(distance), abs=2e-5)


def test_regions_are_the_networks_answers_in_the_mode_of_each_task(tmp_path: Path) -> None:
    stream = Gaussians(epochs_per_task=3, train_samples=100, test_samples=50, seed=0)
    model = fit(tmp_path, stream, [Regions(points=5)])
    seen = json.loads((tmp_path / "regions.json").read_text())
    assert [len(moment["maps"]) for moment in seen] == [1, 2]
    left, right, bottom, top = seen[1]["sides"]
    x, y = torch.linspace(left, right, 5)[4], torch.linspace(bottom, top, 5)[1]
    for task in range(2):
        answer = model(torch.tensor([[x, y]]), task=task).softmax(1)[0, 0].detach()
        assert seen[1]["maps"][task][1][4] == pytest.approx(float(answer), abs=1e-3)
    inside = [left < px < right and bottom < py < top for p in seen[0]["points"] for px, py, _ in p]
    assert all(inside)
    assert {target for points in seen[0]["points"] for *_, target in points} == {0, 1}


def test_regions_of_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="points in a plane, but got 64 numbers each"):
        fit(tmp_path, digits(), [Regions()])


def test_a_probe_goes_on_where_a_checkpoint_left_it() -> None:
    probe, other = Drift(), Drift()
    probe.seen, probe._reference = [{"a": {"with": 0.0}}], {"a": torch.ones(2)}
    other.load_state_dict(probe.state_dict())
    assert other.seen == probe.seen
    assert torch.equal(other._reference["a"], torch.ones(2))


def test_moves_are_those_of_m_update_by_update(tmp_path: Path) -> None:
    """Three tasks of 2 epochs; sizes and flips from M as another callback has noted it."""
    noted: list[list[torch.Tensor]] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            task = pl_module.network.opened
            if task == len(noted):
                noted.append([])
            layers = pl_module.network.linear_layers().values()
            noted[task].append(torch.cat([one.bias_units.M[0].detach().clone() for one in layers]))

    fit(tmp_path, digits(), [Moves()], callbacks=[Note()])
    seen = json.loads((tmp_path / "moves.json").read_text())
    assert len(seen) == len(noted) == 3
    for task, path in zip(seen, noted, strict=True):
        steps = torch.stack(path).diff(dim=0, prepend=torch.zeros(1, 24)).sign()
        flips = (steps[1:] == -steps[:-1]) & (steps[1:] != 0)
        assert task["flips"] == pytest.approx([0.0, *flips.float().mean(1).tolist()], abs=1e-5)
        size = [float(m.norm()) / 24**0.5 for m in path]
        assert task["size"] == pytest.approx(size, abs=1e-5)
        assert max(task["flips"]) > 0


def test_moves_over_stretches_go_on_after_resuming(tmp_path: Path) -> None:
    part = tmp_path / "part"
    for name in ("whole", "rest", "part"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "whole", digits(), [Moves(stretches=4)])

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                trainer.save_checkpoint(part / "13.ckpt")

    fit(part, digits(), [Moves(stretches=4), Save()])
    fit(tmp_path / "rest", digits(), [Moves(stretches=4)], ckpt_path=part / "13.ckpt")
    whole, rest = (tmp_path / name / "moves.json" for name in ("whole", "rest"))
    assert rest.read_text() == whole.read_text()
    assert all(len(task["size"]) <= 4 for task in json.loads(whole.read_text()))


def test_moves_of_a_method_without_bias_units_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="a method with bias units"):
        Moves().on_train_batch_start(None, ContinualModule(MLP([4])))  # type: ignore[arg-type]
