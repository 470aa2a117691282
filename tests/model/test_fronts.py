"""A front before the network: fitted once, seen by all, saved with the rest, and equal to features by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.nn import MLP
from bpn_lightning.nn.fronts import Front, RandomFeatures
from bpn_lightning.nn.frozen_network import FrozenNetwork
from bpn_lightning.nn.patches import Patches
from bpn_lightning.strategies import BeneficialPerturbation, GradientEpisodicMemory

Fit = Callable[..., Any]


def patches() -> Front:
    return Patches(12, 3, samples=2000, iterations=3)


def small(**options: Any) -> SplitDigits:
    return SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0, **options)


def raw(stream: Any, task: int, split: str = "test") -> Tensor:
    return torch.cat([batch.inputs for batch in stream.loader(task, split)])


def test_features_are_those_of_the_first_task_fitted_by_hand(fit: Fit) -> None:
    stream = small(validation_fraction=0.2, augment=True)
    module, _ = fit(stream=stream, front=patches())
    batches = [stream.prepare(batch).inputs for batch in stream.loader(0, "train")]
    by_hand = patches()
    by_hand.fit(lambda: batches)
    assert by_hand.fingerprint() == module.network.front.fingerprint()
    (batch,) = module.host.batches(1, "test")
    (plain,) = (stream.prepare(batch) for batch in stream.loader(1, "test"))
    assert torch.equal(batch.inputs, by_hand(plain.inputs))
    assert module.network.structure.input_shape == (48,)
    assert not any("front" in name for name in module.network.shared_parameters(True))


def test_a_front_is_the_backbone_s_first_frozen_part(fit: Fit) -> None:
    """Training on features is training on a stream whose inputs are these features."""
    stream = small()
    front = RandomFeatures(32, "relu")
    module, _ = fit(stream=stream, front=front)

    class AsBackbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest, self.front = MLP([16, 16]), [front]

        def forward(self, inputs: Tensor) -> Tensor:
            features: Tensor = self.rest(self.front[0](inputs))
            return features

    other, _ = fit(stream=small(), backbone=AsBackbone())
    for name, value in module.network.head.state_dict().items():
        assert torch.equal(value, other.network.head.state_dict()[name])
    assert torch.equal(
        module.accuracy_matrix.accuracy.nan_to_num(), other.accuracy_matrix.accuracy.nan_to_num()
    )


@pytest.mark.parametrize("strategy", [BeneficialPerturbation, GradientEpisodicMemory])
def test_checkpoint_and_export_answer_as_the_run(
    fit: Fit, tmp_path: Path, strategy: Callable[[], Any]
) -> None:
    stream = small()
    made = strategy() if strategy is BeneficialPerturbation else strategy(memory_size=16)  # type: ignore[call-arg]
    module, trainer = fit([made], stream=stream, front=patches())
    images = raw(stream, 1)
    answers = module.eval().predict(images, task=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ContinualModule.load_from_checkpoint(tmp_path / "run.ckpt", backbone=MLP([16, 16]))
    assert torch.equal(loaded.predict(images, task=1), answers)
    exported = load_exported(export_module(module, tmp_path / "export"), MLP([16, 16]))
    assert torch.equal(exported.predict(images, task=1), answers)
    prepared = stream.prepare(next(iter(stream.loader(1, "test")))).inputs
    torch.testing.assert_close(module.for_inference(1)(prepared), answers)
    program = torch.export.export(
        module.for_inference(1), (prepared,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
    )
    torch.testing.assert_close(program.module()(prepared[:7]), answers[:7])


def test_a_front_with_other_weights_is_refused(fit: Fit, tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())

    for name in ("run", "other"):
        torch.save(network().state_dict(), tmp_path / f"{name}.pt")
    front = FrozenNetwork(network(), str(tmp_path / "run.pt"))
    module, trainer = fit(stream=small(), front=front)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    load = ContinualModule.load_from_checkpoint

    same = FrozenNetwork(network(), str(tmp_path / "run.pt"))
    images = raw(small_stream := module.host.stream, 0)
    loaded = load(tmp_path / "run.ckpt", backbone=MLP([16, 16]), front=same)
    assert torch.equal(loaded.predict(images, 0), module.eval().predict(images, 0))
    assert small_stream is module.host.stream
    other = FrozenNetwork(network(), str(tmp_path / "other.pt"))
    with pytest.raises(
        CheckpointError, match=r"weights of the file, with the hash .* another 'network"
    ):
        load(tmp_path / "run.ckpt", backbone=MLP([16, 16]), front=other)
    with pytest.raises(CheckpointError, match="front 'frozen' to be made of plain values"):
        load(tmp_path / "run.ckpt", backbone=MLP([16, 16]))
    with pytest.raises(CheckpointError, match="Expected the front 'frozen' of"):
        load(tmp_path / "run.ckpt", backbone=MLP([16, 16]), front=patches())


def test_a_changed_bit_of_a_front_is_refused(fit: Fit, tmp_path: Path) -> None:
    _, trainer = fit(stream=small(), front=patches())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    saved["state_dict"]["network.front.mean"][0] += 1
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(CheckpointError, match="to have the hash"):
        ContinualModule.load_from_checkpoint(tmp_path / "damaged.ckpt", backbone=MLP([16, 16]))


def test_a_front_without_vectors_is_refused(fit: Fit) -> None:
    front = FrozenNetwork(nn.Conv2d(1, 2, 3))
    with pytest.raises(ConfigurationError, match=r"to \(n, features\), but got \(1, 2, 6, 6\)"):
        fit(stream=small(), front=front)


def test_the_trainer_s_sanity_check_does_not_need_a_fitted_front(fit: Fit) -> None:
    module, _ = fit(
        stream=small(validation_fraction=0.2),
        front=RandomFeatures(8),
        trainer={"num_sanity_val_steps": 2},
    )
    assert module.closed == 1


def learn(devices: int) -> dict[str, Tensor]:
    seed_everything(0, verbose=False)
    front = RandomFeatures(16)
    module = ContinualModule(MLP([8]), front=front)
    trainer_of(devices, [BeneficialPerturbation(4)]).fit(module, small(augment=False))
    return {**module.state_dict(), "matrix": module.accuracy_matrix.accuracy.nan_to_num()}


def test_two_processes_fit_and_learn_as_one(ranks: Any) -> None:
    (first, second), alone = ranks(learn, 2), learn(1)
    for name in alone:
        if not isinstance(alone[name], Tensor):
            continue
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [RandomFeatures, lambda **more: Patches(5, 3, samples=200, **more)]
)
def test_a_front_is_drawn_from_the_seed_of_the_run_and_loaded_with_it(
    fit: Fit, kind: Callable[..., Front], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fitted(run: int = 0, **more: Any) -> Any:
        module, trainer = fit(stream=small(), front=kind(**more), seed=run)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return module.network

    given, other = (fitted(seed=seed).front.fingerprint() for seed in (5, 6))
    network = fitted(run=5)
    assert network.front.fingerprint() == given != other
    assert network.structure.front.arguments["seed"] == 5
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    load = ContinualModule.load_from_checkpoint
    loaded = load(tmp_path / "run.ckpt", backbone=MLP([16, 16]), front=kind())
    assert loaded.network.front.fingerprint() == given
    with pytest.raises(CheckpointError, match=r"Expected the front .* as in the file"):
        load(tmp_path / "run.ckpt", backbone=MLP([16, 16]), front=kind(seed=6))
