"""Gates of a module: what they answer, are scored by, and are saved with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, seed_everything
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bpn_lightning import ContinualModule
from bpn_lightning.costs import measured_bytes
from bpn_lightning.datamodules import SplitArrays, SplitDigits, StreamOf
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.metrics.gate_scores import auroc, calibration
from bpn_lightning.model.gating import evaluate_gates, mixed
from bpn_lightning.nn import MLP
from bpn_lightning.nn.fronts import RandomFeatures
from bpn_lightning.registry import gates as registered_gates
from bpn_lightning.strategies import BeneficialPerturbation, IndependentNetworks
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.strategies.gates.logits import Confidence, Energy
from bpn_lightning.strategies.gates.ncm import NearestClassMean
from bpn_lightning.strategies.gates.ranpac import RanPAC
from bpn_lightning.strategies.gates.slda import SLDA
from bpn_lightning.strategies.gates.supsup import SupSup

Fit = Callable[..., Any]


def small(tasks: int = 3, **options: Any) -> SplitDigits:
    return SplitDigits(num_tasks=tasks, epochs_per_task=1, batch_size=64, seed=0, **options)


def some() -> list[Any]:
    return [BeneficialPerturbation(8), SLDA(), NearestClassMean(modes=1), Confidence(), SupSup()]


def raw(stream: Any, task: int) -> Tensor:
    return torch.cat([batch.inputs for batch in stream.loader(task, "test")])


def scored(module: Any, gate: str, after: int) -> Any:
    (one,) = (s for s in module.gate_scores if (s["gate"], s["after"]) == (gate, after))
    return one


def test_slda_names_tasks_and_classes_as_scikit_learn_does(fit: Fit) -> None:
    stream = small()
    module, _ = fit([SLDA(1e-6)], stream=stream)
    parts = {}
    for split in ("train", "test"):
        batches = [b for task in range(3) for b in stream.loader(task, split)]
        inputs = torch.cat([stream.prepare(batch).inputs.flatten(1) for batch in batches])
        targets = torch.cat([batch.targets for batch in batches])
        parts[split] = inputs.double().numpy(), targets.numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-6, priors=np.full(6, 1 / 6))
    named = reference.fit(*parts["train"]).predict(parts["test"][0])
    targets = parts["test"][1]
    last = scored(module, "slda", 3)
    counts = np.array(last["samples"])
    for key, right in (
        ("own_class", named == targets),
        ("task_accuracy", named // 2 == targets // 2),
    ):
        by_task = [right[targets // 2 == task].mean() for task in range(3)]
        assert np.abs(np.array(last[key]) - by_task).max() <= 1.01 / counts.min(), key


def test_end_to_end_is_the_named_task_s_mode(fit: Fit) -> None:
    stream = small()
    module, _ = fit(some(), stream=stream)
    module.eval()
    for name in module.gates:
        last = scored(module, name, 3)
        for task in range(3):
            images, targets = raw(stream, task), next(iter(stream.loader(task, "test"))).targets
            probabilities = module.predict_tasks(images, gate=name)
            torch.testing.assert_close(probabilities.sum(1), torch.ones(len(images)))
            likeliest = probabilities.argmax(1)
            assert float((likeliest == task).double().mean()) == last["task_accuracy"][task]
            named = module.predict(images, likeliest).argmax(1)
            assert float((named == targets).double().mean()) == last["end_to_end"][task]
            m = module.gates[name].modes
            joint = torch.zeros(len(images), 6)
            for place in probabilities.topk(m).indices.T:
                weight = probabilities.gather(1, place[:, None])
                joint += weight * module.predict(images, place).softmax(1)
            assert float((joint.argmax(1) == targets).double().mean()) == last["mixture"][task]
            torch.testing.assert_close(
                module.predict(images, gate=name).softmax(1), joint / joint.sum(1, keepdim=True)
            )
    assert torch.equal(module.predict(raw(stream, 0)), module.predict(raw(stream, 0), gate="slda"))


def test_rejection_and_calibration_are_those_of_scikit_learn(fit: Fit) -> None:
    stream = small()
    module, _ = fit([SLDA()], stream=stream)
    first, last = scored(module, "slda", 2), scored(module, "slda", 3)
    assert last["rejection"] is None
    assert first["own_class"][2] is None
    assert 0.5 < first["rejection"] <= 1
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(9, (50,), generator=generator).double()
    labels = torch.randint(2, (50,), generator=generator).bool()
    expected = roc_auc_score(labels.numpy(), scores.numpy())
    assert auroc(scores[labels], scores[~labels]) == pytest.approx(expected)
    assert auroc(scores, scores[:0]) is None
    assert calibration(torch.zeros(3, 15)) is None
    assert sum(last["calibration"]["counts"]) == sum(last["samples"])
    assert 0 <= last["calibration"]["error"] < 0.1


def test_a_multi_head_has_answers_without_the_task(fit: Fit) -> None:
    stream = small()
    module, _ = fit(some(), stream=stream, mask="task")
    for name in module.gates:
        last = scored(module, name, 3)
        likeliest = module.eval().predict_tasks(raw(stream, 1), name).argmax(1)
        named = module.predict(raw(stream, 1), likeliest).argmax(1)
        targets = next(iter(stream.loader(1, "test"))).targets
        assert float((named == targets).double().mean()) == last["end_to_end"][1]
        assert last["end_to_end"][1] <= last["task_accuracy"][1]


@pytest.mark.parametrize("mode", [BeneficialPerturbation, IndependentNetworks])
def test_shuffled_ids_change_no_bit(fit: Fit, mode: Callable[[], Any]) -> None:
    """Streams that normalize differently, whose raw images say all that is known."""

    def part(offset: int, scale: float) -> SplitArrays:
        generator = np.random.default_rng(offset)
        labels = np.arange(80) % 2
        images = generator.normal(labels[:, None] + offset, 0.3, (80, 5)) * scale
        arrays = {"train_features": images, "train_labels": labels}
        arrays |= {"test_features": images[:30], "test_labels": labels[:30]}
        return SplitArrays(arrays, num_tasks=1, epochs_per_task=1)

    stream = StreamOf([part(0, 1.0), part(4, 3.0)], seed=0)
    front = RandomFeatures(20) if mode is IndependentNetworks else None
    module, _ = fit([mode(), SLDA(0.1)], stream=stream, backbone=MLP([8]), front=front)
    module.eval()
    batches = [batch for task in range(2) for batch in stream.loader(task, "test")]
    inputs = torch.cat([batch.inputs for batch in batches])
    batch = batches[0]._replace(inputs=inputs, targets=torch.cat([b.targets for b in batches]))
    ids = torch.arange(2).repeat_interleave(30)
    answers = []
    for task in (ids, ids[torch.randperm(60)], 1 - ids):
        seen = module.host.for_gates(batch._replace(task=task)).inputs
        log_probabilities = module.gates["slda"].task_log_probabilities(seen.flatten(1))
        with torch.no_grad():
            answers.append((log_probabilities, *mixed(module.host, seen, log_probabilities, 2)))
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))
    assert scored(module, "slda", 2)["task_accuracy"] == [1.0, 1.0]
    with torch.no_grad():  # what a mode sees is what it was trained on
        (own,) = module.host.batches(1, "test")
        (common,) = module.host.gate_batches(1, "test")
        torch.testing.assert_close(
            module.host.for_modes(common.inputs, 1), own.inputs, rtol=1e-4, atol=1e-5
        )
    images = raw(stream, 1).float()
    assert module.predict_tasks(images).argmax(1).tolist() == [1] * 30


def test_a_gate_sees_what_a_stream_prepares_by_code(fit: Fit) -> None:
    class Rectified(SplitDigits):
        def transform(self, images: Tensor, task: int | Tensor) -> Tensor:
            return images.relu()

    stream = StreamOf(
        [made(num_tasks=1, epochs_per_task=1, seed=0) for made in (SplitDigits, Rectified)]
    )
    module, _ = fit([SLDA()], stream=stream)
    seen = [batch.inputs for batch in module.host.gate_batches(1, "test")]
    own = [stream.prepare(batch).inputs for batch in stream.loader(1, "test")]
    torch.testing.assert_close(seen, own)
    assert all(inputs.min() == 0 for inputs in seen)


def test_checkpoint_and_export_answer_as_the_run(fit: Fit, tmp_path: Path) -> None:
    stream = small()
    module, trainer = fit([*some(), RanPAC(50)], stream=stream, front=RandomFeatures(40))
    images = raw(stream, 1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ContinualModule.load_from_checkpoint(tmp_path / "run.ckpt", backbone=MLP([16, 16]))
    exported = load_exported(export_module(module, tmp_path / "export"), MLP([16, 16]))
    assert loaded.gate_scores == module.gate_scores
    for other in (loaded, exported):
        assert list(other.gates) == list(module.gates)
        for name in module.gates:
            for ask in ("predict", "predict_tasks"):
                mine, theirs = (getattr(m.eval(), ask)(images, gate=name) for m in (module, other))
                assert torch.equal(mine, theirs), (name, ask)


def test_every_registered_gate_declares_its_bytes_and_keeps_its_arguments(fit: Fit) -> None:
    gates = [one.load()() for one in registered_gates().values()]
    module, _ = fit([BeneficialPerturbation(8), *gates], stream=small(2), front=RandomFeatures(30))
    for gate in gates:
        assert isinstance(gate, TaskGate)
        assert measured_bytes(gate, module.host) == gate.declared_bytes(module.host).held
        assert type(gate)(**gate.arguments).arguments == gate.arguments


def test_every_epoch_has_its_scores(fit: Fit) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=64, seed=0)
    module, _ = fit([BeneficialPerturbation(8), SLDA()], stream=stream, evaluate_every="epoch")
    assert [(one["epoch"], one["after"]) for one in module.gate_scores] == [(2, 1), (3, 1), (4, 2)]


class Saves(Callback):
    """A checkpoint after every update, and before a task is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, list[Path]()

    def save(self, trainer: Any) -> None:
        self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.save(trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.save(trainer)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_gates_front_and_scores(fit: Fit, tmp_path: Path) -> None:
    def run(*more: Any, **options: Any) -> Any:
        gates = [BeneficialPerturbation(8), SLDA(), Confidence()]
        module, trainer = fit([*gates, *more], stream=small(2), front=RandomFeatures(30), **options)
        own = [c.state_dict() for c in trainer.callbacks if isinstance(c, TaskGate)]
        return module, own

    saves = Saves(tmp_path)
    module, gates = run(saves)
    assert len(saves.paths) == 12
    for path in saves.paths:
        again, others = run(seed=5, ckpt_path=path)
        assert again.gate_scores == module.gate_scores
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor):
                assert torch.equal(value.nan_to_num(), again.state_dict()[name].nan_to_num()), name
        for one, other in zip(gates, others, strict=True):
            for key, value in one.get("rows", {}).items():
                assert torch.equal(value, other["rows"][key])


def test_refusals(fit: Fit) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SLDA`"):
        fit([SLDA(), SLDA(0.5)], stream=small(2))  # by Lightning itself
    module = ContinualModule(MLP([8]))
    module.attach(stream := _ready(small(2)))
    module.host.gates = {"slda": SLDA()}
    with pytest.raises(ConfigurationError, match="asked after a task was learned"):
        module.predict_tasks(raw(stream, 0))
    with pytest.raises(
        ConfigurationError,
        match="Expected gate to be one of the module's gates, slda, but got 'sdla'",
    ):
        module.predict_tasks(raw(stream, 0), gate="sdla")
    with pytest.raises(ConfigurationError, match="modes to be a whole number of at least 1"):
        Energy(modes=-1)


def _ready(stream: Any) -> Any:
    stream.setup()
    return stream


def learn(devices: int) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    module = ContinualModule(MLP([8]), front=RandomFeatures(16))
    gates = [SLDA(), NearestClassMean(), Energy(), RanPAC(30)]
    trainer_of(devices, [BeneficialPerturbation(4), *gates]).fit(module, small(2))
    scores = evaluate_gates(module.host, range(2), 1, 9)
    return {
        "rows": [getattr(g, "rows", {}) for g in gates],
        "scores": [*module.gate_scores, *scores],
    }


def test_two_processes_have_the_gates_of_one(ranks: Any) -> None:
    (first, second), alone = ranks(learn, 2), learn(1)
    assert first["scores"] == second["scores"]
    for one, two, only in zip(first["rows"], second["rows"], alone["rows"], strict=True):
        for key, value in one.items():
            assert torch.equal(value, two[key])
            torch.testing.assert_close(value, only[key], rtol=1e-4, atol=1e-6)
    for one, only in zip(first["scores"], alone["scores"], strict=True):
        assert one["samples"] == only["samples"]
        for key in ("task_accuracy", "end_to_end", "own_class"):
            if one[key] is not None:
                for a, b in zip(one[key], only[key], strict=True):
                    assert a == b or abs(a - b) < 0.02, key
        if one["rejection"] is not None:
            assert one["rejection"] == pytest.approx(only["rejection"], abs=1e-3)
