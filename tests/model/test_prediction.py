"""A loaded module prepares raw inputs as its stream did, to the same bits, or says why it cannot."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import (
    Gaussians,
    PermutedMNIST,
    RotatedMNIST,
    SplitArrays,
    SplitDigits,
    StreamOf,
)
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.model.evaluation import evaluate_task_agnostic
from bpn_lightning.nn import MLP
from bpn_lightning.preparation import Preparation, differing_preparation
from bpn_lightning.strategies import BeneficialPerturbation

Fit = Callable[..., Any]
Make = Callable[[], Any]


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Bright images, so that their measured mean is far from any that somebody might guess."""
    generator = np.random.default_rng(0)
    labels = {"train_labels": np.arange(40) % 4, "test_labels": np.arange(20) % 4}
    images = {
        name.replace("labels", "images"): generator.integers(
            100, 250, (len(of_part), 8, 8), dtype=np.uint8
        )
        for name, of_part in labels.items()
    }
    np.savez(tmp_path / "made.npz", **labels, **images)  # type: ignore[arg-type]
    return tmp_path / "made.npz"


@pytest.fixture
def mnist(tmp_path: Path) -> dict[str, Any]:
    """Arguments of streams over random images in torchvision's layout."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = generator.integers(256, size=(40, 28, 28), dtype=np.uint8)
        for name, array in {"images-idx3": images, "labels-idx1": np.arange(40) % 10}.items():
            sizes = struct.pack(f">{array.ndim}I", *array.shape)
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(content)
    return {"root": str(tmp_path), "download": False, "num_tasks": 3, "seed": 3}


def learned(fit: Fit, stream: Any, **options: Any) -> ContinualModule:
    module: ContinualModule = fit(stream=stream, backbone=MLP([8]), **options)[0]
    return module.eval()


def raw(stream: Any, task: int) -> Tensor:
    (batch,) = stream.loader(task, "test", 1000)
    inputs: Tensor = batch.inputs
    return inputs


def evaluated(module: ContinualModule, task: int) -> Tensor:
    """What the run's own evaluation sees."""
    with torch.no_grad(), module.task_mode(task):
        (batch,) = module.host.batches(task, "test")
        logits: Tensor = module(batch.inputs)
    return logits


def by_checkpoint(module: ContinualModule, folder: Path) -> ContinualModule:
    module.trainer.save_checkpoint(folder / "saved.ckpt")
    loaded: ContinualModule = ContinualModule.load_from_checkpoint(
        folder / "saved.ckpt", backbone=MLP([8]), mask=module.network.mask
    )
    return loaded


def by_export(module: ContinualModule, folder: Path) -> ContinualModule:
    return load_exported(export_module(module, folder / "exported"), MLP([8]))


LOADED = pytest.mark.parametrize("load", [by_checkpoint, by_export])


def check_answers(
    module: ContinualModule, again: ContinualModule, raw_of: dict[int, Tensor]
) -> None:
    for task, images in raw_of.items():
        wanted = evaluated(module, task)
        assert torch.equal(again.predict(images, task), wanted)
        assert torch.equal(module.predict(images, task), wanted)
        one = again.predict(images[2], task)
        torch.testing.assert_close(one, wanted[2], rtol=1e-4, atol=1e-4)  # a batch of another size
        if images.dtype == torch.uint8:
            for floats in (images / 255, images.double() / 255):
                assert torch.equal(again.predict(floats, task), wanted)


@LOADED
def test_the_measured_normalization_is_carried(
    fit: Fit, tmp_path: Path, arrays: Path, load: Any
) -> None:
    stream = SplitArrays(path=str(arrays), num_tasks=2, epochs_per_task=1)
    module = learned(fit, stream, strategies=[BeneficialPerturbation(2)])
    again = load(module, tmp_path)
    check_answers(module, again, {task: raw(stream, task) for task in (0, 1)})
    # In figures that nothing of ours computed.
    first = np.load(arrays)["train_images"][np.isin(np.load(arrays)["train_labels"], [0, 1])] / 255
    inputs = (raw(stream, 1).double() / 255 - first.mean()) / first.std()
    with torch.no_grad():
        torch.testing.assert_close(again.predict(raw(stream, 1), 1), again(inputs.float(), task=1))


@LOADED
@pytest.mark.parametrize("kind", [PermutedMNIST, RotatedMNIST])
def test_each_task_has_its_own_preparation(
    fit: Fit, tmp_path: Path, mnist: dict[str, Any], load: Any, kind: Any
) -> None:
    stream = kind(**mnist, epochs_per_task=1)
    module = learned(fit, stream, mask="shared")
    again = load(module, tmp_path)
    check_answers(module, again, {task: raw(stream, task) for task in range(3)})
    images = raw(stream, 0)[:6]
    several = again.predict(images, torch.tensor([2, 0, 1, 1, 0, 2]))
    alone = [again.predict(images[k : k + 1], task) for k, task in enumerate([2, 0, 1, 1, 0, 2])]
    torch.testing.assert_close(several, torch.cat(alone))
    with pytest.raises(ConfigurationError, match="task to be given where every task prepares its"):
        again.predict(images)


@LOADED
def test_parts_of_a_stream_normalize_each_by_their_own(
    fit: Fit, tmp_path: Path, arrays: Path, load: Any
) -> None:
    parts = [SplitArrays(path=str(arrays), num_tasks=2), SplitDigits(num_tasks=2)]
    stream = StreamOf([*parts], seed=0)  # type: ignore[list-item]
    for part in parts:
        part.epochs_per_task = 1
    module = learned(fit, stream)
    again = load(module, tmp_path)
    check_answers(module, again, {task: raw(stream, task) for task in range(4)})
    images = torch.stack([raw(stream, task)[0] for task in range(4)])
    several = again.predict(images, torch.arange(4))
    alone = torch.stack([again.predict(image, task) for task, image in enumerate(images)])
    torch.testing.assert_close(several, alone)


@LOADED
def test_float_streams_take_their_own_units(fit: Fit, tmp_path: Path, load: Any) -> None:
    stream = Gaussians(train_samples=20, test_samples=10, epochs_per_task=1)
    module = learned(fit, stream, mask="shared")
    again = load(module, tmp_path)
    check_answers(module, again, {task: raw(stream, task) for task in (0, 1)})
    points = 100 * raw(stream, 0) - 50
    assert torch.equal(again.predict(points.double()), again.predict(points))
    with pytest.raises(
        ConfigurationError, match="in the units of the stream's data, but got uint8"
    ):
        again.predict(points.byte())
    with pytest.raises(ConfigurationError, match="to be finite, but some are NaN"):
        again.predict(torch.full((1, 2), float("nan")))


def measured(kind: str, **options: Any) -> SplitArrays:
    """Features far from 0, or token sequences, of four classes."""
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for part, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 4
        features = generator.normal(1e4 + labels[:, None], [0.1, 3, 50], (count, 3))
        tokens = (generator.integers(3, size=(count, 6)) + labels[:, None]) % 10
        made[f"{part}_labels"] = labels
        made[f"{part}_{kind}"] = features if kind == "features" else tokens
    return SplitArrays(path=made, num_tasks=2, epochs_per_task=1, seed=0, **options)


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(24, 8), nn.ReLU())


@pytest.mark.parametrize("by", ["checkpoint", "export"])
@pytest.mark.parametrize(
    ("kind", "options", "backbone"),
    [
        ("features", {}, lambda: MLP([8])),
        ("features", {"standardize": False}, lambda: MLP([8])),
        ("tokens", {}, embedding),
    ],
    ids=["features", "features as they are", "tokens"],
)
def test_features_and_tokens_are_prepared_too(
    fit: Fit, tmp_path: Path, by: str, kind: str, options: dict[str, Any], backbone: Make
) -> None:
    stream = measured(kind, **options)
    module, run = fit(stream=stream, backbone=backbone(), lr=1e-6)
    module.eval()
    if by == "export":
        again = load_exported(export_module(module, tmp_path / "exported"), backbone())
    else:
        run.save_checkpoint(tmp_path / "saved.ckpt")
        again = ContinualModule.load_from_checkpoint(tmp_path / "saved.ckpt", backbone=backbone())
    check_answers(module, again, {task: raw(stream, task) for task in (0, 1)})
    with pytest.raises(ConfigurationError, match="Expected inputs to be "):
        again.predict(raw(stream, 0).bool(), 0)
    with pytest.raises(ConfigurationError, match=r"of shape \(batch, [36]\) or \([36]\)"):
        again.predict(raw(stream, 0)[:, :2], 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_are_made_are_those_of_raw_images(fit: Fit, channels: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, seed=0, channels=channels)
    module = learned(fit, stream)
    assert module.network.structure.preparations[0].shape == (channels, 8, 8)
    check_answers(module, module, {task: raw(stream, task) for task in (0, 1)})


def test_integer_tokens_pass_as_int64() -> None:
    one = Preparation(2, "int64", (5,), [])
    tokens = torch.arange(10).view(2, 5)
    for dtype in (torch.int16, torch.int32, torch.int64):
        found = one.apply(one.batch(tokens.to(dtype)), 0)
        assert found.dtype == torch.int64
        assert torch.equal(found, tokens)
    with pytest.raises(ConfigurationError, match="tokens of an integer type, but got float32"):
        one.batch(tokens.float())


def test_images_of_any_size_are_scaled_and_cut() -> None:
    """As torchvision's own transforms do it on tensors."""
    from torchvision.transforms.v2 import functional as reference

    steps: list[Any] = [["resize", 12], ["center_crop", 8], ["normalize", [0.5], [0.25], 255]]
    one = Preparation(1, "uint8", (1, 0, 0), steps)
    for size in (12, 7, 20):
        images = torch.randint(256, (2, 1, size, size), dtype=torch.uint8)
        scaled = reference.resize(images.float(), [12, 12], antialias=False)
        wanted = reference.normalize(reference.center_crop(scaled, [8, 8]) / 255, [0.5], [0.25])
        torch.testing.assert_close(one.apply(one.batch(images), 0), wanted)
    with pytest.raises(ConfigurationError, match=r"of shape \(batch, 1, size, size\) or \(1, size"):
        one.batch(torch.zeros(2, 1, 4, 6, dtype=torch.uint8))


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def digits(fit: Fit) -> ContinualModule:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, seed=0)
    return learned(fit, stream, strategies=[BeneficialPerturbation(2)])


def test_wrong_inputs_are_named_and_not_answered(digits: ContinualModule) -> None:
    images = raw(digits.host.stream, 0)[:3]
    normalized = digits.host.stream.prepare(next(iter(digits.host.stream.loader(0, "test")))).inputs
    for inputs, task, said in (
        (
            images.float(),
            0,
            "images of type float32 to be from 0 to 1, but got 0 to 255. Pass images",
        ),
        (normalized, 0, "float32 to be from 0 to 1, but got -0.81"),
        (images / 0.0, 0, "to be from 0 to 1, but got nan"),
        (
            images.long(),
            0,
            "images to be uint8 from 0 to 255, or float32 or float64 from 0 to 1, but got",
        ),
        (images.half() / 255, 0, "but got float16"),
        (images.numpy(), 0, "to be a tensor, but got ndarray. Pass torch.as_tensor(inputs)"),
        (
            images[:, 0],
            0,
            "(batch, 1, 8, 8) or (1, 8, 8), like the stream's raw inputs, but got (3, 8, 8)",
        ),
        (images, 2, "Expected task to be an id from 0 to 1, but got 2"),
        (images, torch.tensor([0, 1]), "one for each of the 3 inputs, but got the shape (2,)"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            digits.predict(inputs, task)
    with pytest.raises(
        ConfigurationError, match=r"but got uint8. module.predict\(images\) prepares"
    ):
        digits(images)
    with pytest.raises(ConfigurationError, match="it has no stream yet"):
        ContinualModule(MLP([8])).predict(images)
    assert digits.predict(images[:0], 0).shape == (0, 4)


def test_nothing_of_the_module_changes(digits: ContinualModule) -> None:
    digits.train()
    state = {
        name: value.clone()
        for name, value in digits.state_dict().items()
        if isinstance(value, Tensor)
    }
    images = raw(digits.host.stream, 0)[:3]
    kept = images.clone()
    with digits.task_mode(1):
        found = digits.predict(images, 0)
        assert digits.network.mode == 1
    assert digits.training
    assert not found.requires_grad
    assert torch.equal(images, kept)
    after = digits.state_dict()
    assert all(
        torch.equal(value.nan_to_num(), after[name].nan_to_num()) for name, value in state.items()
    )


# --- without a task ------------------------------------------------------------------------------


def test_without_a_task_the_most_confident_mode_answers(digits: ContinualModule) -> None:
    shares = []
    for task in (0, 1):
        (batch,) = digits.host.stream.loader(task, "test", 1000)
        logits = digits.predict(batch.inputs)
        shares.append((logits.argmax(1) == batch.targets).double().mean().item())
        modes = torch.stack([digits.predict(batch.inputs, mode) for mode in (0, 1)])
        best = modes.softmax(-1).amax(-1).argmax(0)
        assert torch.equal(logits, modes[best, torch.arange(len(best))])
    assert shares == digits.accuracy_matrix.task_agnostic.tolist()
    assert shares == evaluate_task_agnostic(digits.host, [0, 1]).tolist()


def test_without_modes_any_task_answers_alike(fit: Fit) -> None:
    module = learned(fit, SplitDigits(num_tasks=2, epochs_per_task=1, seed=0))
    images = raw(module.host.stream, 1)
    assert torch.equal(module.predict(images), module.predict(images, 0))


def test_heads_of_their_own_have_to_be_told(fit: Fit) -> None:
    module = learned(fit, SplitDigits(num_tasks=2, epochs_per_task=1, seed=0), mask="task")
    with pytest.raises(ConfigurationError, match="every task has a head of its own"):
        module.predict(raw(module.host.stream, 1))


# --- code of one's own ---------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Negatives(SplitDigits):
    """Odd tasks see the negative."""

    def transform(self, images: Tensor, task: int | Tensor) -> Tensor:
        """By code that no record knows."""
        sign = 1 - 2 * (torch.as_tensor(task, device=images.device) % 2)
        return images * sign.reshape(-1, 1, 1, 1)


@LOADED
def test_code_of_ones_own_needs_the_stream(fit: Fit, tmp_path: Path, load: Any) -> None:
    stream = Negatives(num_tasks=2, epochs_per_task=1, seed=0)
    module = learned(fit, stream)
    images = raw(stream, 1)
    assert torch.equal(module.predict(images, 1), evaluated(module, 1))
    again = load(module, tmp_path)
    with pytest.raises(ConfigurationError, match=r"go through Negatives\.prepare, which is code"):
        again.predict(images, 1)
    again.attach(stream)
    assert torch.equal(again.predict(images, 1), evaluated(module, 1))


@dataclass(eq=False, repr=False)
class Weighted(StreamOf):
    """A stream of streams that does more than its parts."""

    def prepare(self, batch: Any, augment: bool = False) -> Any:
        """By code that no record knows."""
        prepared = super().prepare(batch, augment)
        return prepared._replace(inputs=2 * prepared.inputs)


def test_a_description_that_is_not_what_happens_is_not_believed(mnist: dict[str, Any]) -> None:
    stream = Weighted([SplitDigits(num_tasks=2), SplitDigits(num_tasks=1)], seed=0)
    stream.setup()
    assert [(one.tasks, one.steps, one.code) for one in stream.preparations()] == [
        (2, None, "Weighted.prepare"),
        (1, None, "Weighted.prepare"),
    ]
    whole = PermutedMNIST(**mnist)
    whole.setup()
    assert whole.preparations()[0].steps is not None
    late = whole.permutation
    whole.permutation = lambda task: late(max(task, 1))  # type: ignore[method-assign]
    whole.permute_first_task = True
    del whole.__dict__["_used"]
    assert whole.preparations()[0].steps is None


# --- another stream than the one that was learned ------------------------------------------------


def test_a_stream_that_prepares_otherwise_is_refused(
    fit: Fit, tmp_path: Path, arrays: Path
) -> None:
    stream = SplitArrays(path=str(arrays), num_tasks=2, epochs_per_task=1)
    again = by_checkpoint(learned(fit, stream), tmp_path)
    content = dict(np.load(arrays))
    np.savez(tmp_path / "dark.npz", **{**content, "train_images": content["train_images"] // 2})
    other = SplitArrays(path=str(tmp_path / "dark.npz"), num_tasks=2, epochs_per_task=1)
    other.setup()
    with pytest.raises(
        ConfigurationError, match="prepare its inputs as the one that this module was"
    ):
        again.attach(other)
    with pytest.raises(ConfigurationError, match=r"normalize \[0\.3"):
        fit(stream=other, backbone=MLP([8]), ckpt_path=tmp_path / "saved.ckpt")


def test_rounding_is_no_difference() -> None:
    steps: list[list[Any]] = [["normalize", [0.3], [0.2], 255]]
    one = Preparation(2, "uint8", (1, 8, 8), steps)
    other = Preparation(2, "uint8", (1, 8, 8), [["normalize", [0.3 * (1 + 1e-15)], [0.2], 255]])
    assert differing_preparation([one], [other]) is None
    assert differing_preparation([one], [one, one]) == ("1 parts", "2")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [["permute", 3, True, [0] * 16]]},
        {"steps": [["import", "os"]]},
        {"steps": [["normalize", [0.1], [0.0], 255]]},
        {"steps": [["normalize", [0.1], [float("nan")], 255]]},
        {"steps": [["normalize", [0.1, 0.2], [0.1], 255]]},
        {"steps": [["resize", 10**9]]},
        {"steps": [["rotate", 1.0, 0, 0.0]]},
        {"shape": [1, -8, 8]},
        {"dtype": "object"},
        {"tasks": 0},
        {"code": 7},
    ],
)
def test_records_that_are_made_up_are_refused(
    digits: ContinualModule, tmp_path: Path, change: dict[str, Any]
) -> None:
    one = digits.network.structure.preparations[0].record()
    Preparation.of_record(one)
    with pytest.raises(ValueError, match=r"prep|permutations that this version"):
        Preparation.of_record({**one, **change})


def test_a_checkpoint_with_a_made_up_record_is_refused(
    digits: ContinualModule, tmp_path: Path
) -> None:
    digits.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    saved["continual"]["structure"]["preparations"][0]["dtype"] = "object"
    torch.save(saved, tmp_path / "saved.ckpt")
    with pytest.raises(CheckpointError, match="a preparation of"):
        ContinualModule.load_from_checkpoint(tmp_path / "saved.ckpt", backbone=MLP([8]))


# --- the trainer's own ways ----------------------------------------------------------------------


def trainer(tmp_path: Path) -> Trainer:
    return Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_trainer_predicts_raw_images_of_plain_loaders(
    digits: ContinualModule, tmp_path: Path
) -> None:
    images = raw(digits.host.stream, 1)
    wanted = digits.predict(images)
    again = by_checkpoint(digits, tmp_path)
    size = len(images)
    for data in (images, TensorDataset(images, torch.zeros(size)), TensorDataset(images / 255)):
        (found,) = trainer(tmp_path).predict(again, DataLoader(data, size)) or []  # type: ignore[arg-type]
        assert torch.equal(found, wanted)
    fresh = ContinualModule(MLP([8]))
    loader: Any = DataLoader(images, size)  # type: ignore[arg-type]
    (found,) = trainer(tmp_path).predict(
        fresh, loader, ckpt_path=tmp_path / "saved.ckpt", weights_only=True
    )  # type: ignore[misc]
    assert torch.equal(found, wanted)
    used: Any = digits.trainer  # which has had the stream
    (found,) = used.predict(digits, loader)
    assert torch.equal(found, wanted)
    with pytest.raises(ConfigurationError, match="has no stream yet"):
        trainer(tmp_path).predict(ContinualModule(MLP([8])), loader)
    with pytest.raises(ConfigurationError, match="tuples that begin with one, but got dict"):
        trainer(tmp_path).predict(again, DataLoader([{"a": 1}]))  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("verb", ["fit", "test", "validate"])
def test_plain_loaders_elsewhere_are_refused_in_plain_words(
    digits: ContinualModule, tmp_path: Path, verb: str
) -> None:
    loader: Any = DataLoader(raw(digits.host.stream, 1))  # type: ignore[arg-type]
    said = f"Expected trainer.{verb} to get a ContinualDataModule, whose batches say their task, but got"
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        getattr(trainer(tmp_path), verb)(digits, loader)
    assert "module.predict(images, task)" in str(caught.value)
    assert "TrainerFn" not in str(caught.value)


def test_a_backbone_without_images_is_asked_for_none() -> None:
    """uint8 never reaches a layer, whatever the layer is."""
    module = ContinualModule(nn.Sequential(nn.Flatten()))
    module.network.head = nn.Linear(4, 2)
    with pytest.raises(
        ConfigurationError, match="inputs that the stream has prepared, but got uint8"
    ):
        module(torch.zeros(1, 4, dtype=torch.uint8))
