"""Features, tokens and labels of people's own arrays, from an archive and from memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import cross_entropy

from bpn_lightning import ContinualModule
from bpn_lightning.cli.main import main
from bpn_lightning.datamodules import SplitArrays, SplitDigits, StreamOf
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.functional.importance import fisher_diagonal
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import (
    EWC,
    SLNID,
    BeneficialPerturbation,
    EncoderBasedLifelongLearning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    IndependentNetworks,
    JointTraining,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    ParameterSuperposition,
    SynapticIntelligence,
)


def iris(**changes: Any) -> dict[str, Any]:
    """Its 150 flowers, every third one to test on; labels are the species' names."""
    loaded = load_iris()
    names = loaded.target_names[loaded.target]
    test = np.arange(150) % 3 == 0
    made = {}
    for part, own in (("train", ~test), ("test", test)):
        made |= {f"{part}_features": loaded.data[own], f"{part}_labels": names[own]}
    return made | changes


def sentences(classes: int = 4, length: int = 6) -> dict[str, Any]:
    """Tokens 0 to 9, each class mostly its own two."""
    generator = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 40), ("test", 12)):
        labels = np.arange(count) % classes
        own = 2 * labels[:, None] + generator.integers(2, size=(count, length))
        other = generator.integers(10, size=(count, length))
        tokens = np.where(generator.random((count, length)) < 0.8, own, other)
        made |= {f"{part}_tokens": tokens, f"{part}_labels": labels}
    return made


def saved(folder: Path, made: dict[str, Any]) -> str:
    np.savez(folder / "a.npz", **made)
    return str(folder / "a.npz")


def inputs(stream: Any, task: int, split: Any = "train") -> torch.Tensor:
    (batch,) = stream.loader(task, split)
    return stream.prepare(batch).inputs


class Sentences(nn.Sequential):
    """An embedding, a layer over all places, and one more."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__(
            *(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(24, hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.ReLU()),
        )


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("archive", [True, False])
def test_features_are_standardized_as_scikit_learn_does_by_the_first_task(
    tmp_path: Path, archive: bool
) -> None:
    made = iris()
    order = ["virginica", "setosa", "versicolor"]
    source = saved(tmp_path, made) if archive else made
    stream = SplitArrays(source, classes_per_task=[1, 2], class_order=order)
    stream.setup()
    assert [task.class_names for task in stream.tasks] == [("virginica",), ("setosa", "versicolor")]
    assert (stream.input_shape, stream.input_dtype) == ((4,), torch.float32)
    scaler = StandardScaler().fit(made["train_features"][made["train_labels"] == "virginica"])
    for task, names in enumerate([order[:1], order[1:]]):
        for split in ("train", "test"):
            own = np.isin(made[f"{split}_labels"], names)
            wanted = torch.tensor(scaler.transform(made[f"{split}_features"][own])).float()
            torch.testing.assert_close(inputs(stream, task, split), wanted, rtol=0, atol=1e-5)


def test_features_may_stay_as_they_are() -> None:
    stream = SplitArrays(iris(), classes_per_task=3, standardize=False)
    stream.setup()
    assert torch.equal(inputs(stream, 0), torch.tensor(iris()["train_features"]).float())
    assert stream.normalization == ((0.0,), (1.0,))


def test_a_feature_of_one_value_becomes_nought() -> None:
    """A tenth has no exact binary form: its deviation in floats is not exactly 0."""
    made = iris()
    for part in ("train", "test"):
        made[f"{part}_features"][:, 1] = 0.1
    stream = SplitArrays(made, classes_per_task=3)
    stream.setup()
    torch.testing.assert_close(inputs(stream, 0)[:, 1], torch.zeros(100))


def test_features_far_from_nought_keep_their_digits() -> None:
    """The form x * scale + shift would lose them; (x - mean) / std does not."""
    made = iris()
    for part in ("train", "test"):
        made[f"{part}_features"][:, 0] = np.round(8 * made[f"{part}_features"][:, 0]) / 8 + 2.0**18
    stream = SplitArrays(made, classes_per_task=3)
    stream.setup()
    wanted = StandardScaler().fit_transform(made["train_features"])[:, 0]
    torch.testing.assert_close(
        inputs(stream, 0)[:, 0], torch.tensor(wanted).float(), rtol=0, atol=1e-2
    )


def test_series_are_standardized_by_the_first_axis() -> None:
    generator = np.random.default_rng(0)
    scale = np.array([1.0, 5.0, 0.2])[:, None]
    made = {f"{p}_features": generator.normal(3, scale, (40, 3, 7)) for p in ("train", "test")}
    made |= {f"{part}_labels": np.arange(40) % 2 for part in ("train", "test")}
    stream = SplitArrays(made)
    stream.setup()
    found = inputs(stream, 0).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std(1, correction=0), torch.ones(3))


def test_preparing_changes_nothing_in_the_store() -> None:
    """GEM prepares its memory again and again."""
    stream = SplitArrays(iris(), classes_per_task=3)
    stream.setup()
    (batch,) = stream.loader(0, "train")
    before = batch.inputs.clone()
    first, second = (stream.prepare(batch).inputs for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(batch.inputs, before)


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_tokens_are_whole_numbers_all_the_way(tmp_path: Path, kind: Any) -> None:
    made = sentences()
    for part in ("train", "test"):
        made[f"{part}_tokens"] = made[f"{part}_tokens"].astype(kind)
    stream = SplitArrays(saved(tmp_path, made))
    stream.setup()
    assert (stream.input_shape, stream.input_dtype) == ((6,), torch.int64)
    for task in range(2):
        own = np.isin(made["train_labels"], [2 * task, 2 * task + 1])
        assert torch.equal(inputs(stream, task), torch.tensor(made["train_tokens"][own]).long())


KINDS = {
    "features": lambda: (iris(), MLP([12, 12]), {"classes_per_task": [2, 1]}),
    "tokens": lambda: (sentences(), Sentences(), {}),
}
STRATEGIES: list[Any] = [
    list,
    lambda: [EWC(strength=1.0)],
    lambda: [BeneficialPerturbation(), EWC(strength=1.0)],
    lambda: [SLNID(sparsity=0.1)],
    lambda: [MemoryAwareSynapses(strength=1.0)],
    lambda: [SynapticIntelligence(strength=1.0)],
    lambda: [IncrementalMomentMatching()],
    lambda: [LearningWithoutForgetting()],
    lambda: [EncoderBasedLifelongLearning(code_size=3)],
    lambda: [GradientEpisodicMemory(memory_size=6)],
    lambda: [ParameterSuperposition()],
    lambda: [ParameterSuperposition(keys="complex")],
    lambda: [IndependentNetworks()],
    lambda: [JointTraining()],
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "made", STRATEGIES, ids=lambda made: "+".join(type(one).__name__ for one in made())
)
def test_every_strategy_learns_them(fit: Any, kind: str, made: Any) -> None:
    arrays, backbone, arguments = KINDS[kind]()
    strategies = made()
    stream = SplitArrays(arrays, epochs_per_task=2, batch_size=8, **arguments)
    module, _ = fit(strategies, stream=stream, backbone=backbone)
    assert module.closed == 1
    for strategy in strategies:
        if isinstance(strategy, GradientEpisodicMemory):
            stored = strategy.memory.inputs
            assert stored.dtype == stream._parts["train"].samples.images.dtype
            store = {tuple(one) for one in stream._parts["train"].samples.images.tolist()}
            assert {tuple(one) for one in stored.tolist()} <= store


def test_importances_of_an_embedding_are_those_of_one_sample_at_a_time() -> None:
    stream = SplitArrays(sentences(), seed=0)
    stream.setup()
    host = ContinualModule(Sentences()).host
    host.attach(stream)
    parameters = host.network.shared_parameters(include_head=True)
    found = fisher_diagonal(host, 1, parameters, "empirical")
    wanted = {name: torch.zeros_like(value) for name, value in parameters.items()}
    (batch,) = host.batches(1, "train")
    for tokens, target in zip(batch.inputs.split(1), batch.targets.split(1), strict=True):
        loss = cross_entropy(host.network(tokens), target)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            wanted[name] += gradient.square() / len(batch.targets)
    torch.testing.assert_close(dict(found), wanted)


def test_tokens_are_learned(fit: Any) -> None:
    stream = SplitArrays(sentences(), epochs_per_task=15, batch_size=8)
    module, _ = fit(stream=stream, backbone=Sentences(), mask="task", lr=0.2)
    assert module.accuracy_matrix.summary()["after_learning"]["average"] > 0.8


def test_a_module_of_tokens_is_loaded_without_its_stream(fit: Any, tmp_path: Path) -> None:
    """Its head is made by a dry forward, which an embedding takes whole numbers for."""
    stream = SplitArrays(sentences(), epochs_per_task=1)
    module, trainer = fit(stream=stream, backbone=Sentences())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    tokens = inputs(stream, 1, "test")
    loaded = ContinualModule.load_from_checkpoint(tmp_path / "a.ckpt", backbone=Sentences())
    exported = load_exported(export_module(module, tmp_path / "out"), Sentences())
    for other in (loaded.eval(), exported):
        assert torch.equal(other(tokens, task=1), module.eval()(tokens, task=1))


def test_another_kind_of_stream_is_refused_by_a_built_module(fit: Any) -> None:
    module, _ = fit(stream=SplitArrays(sentences(), epochs_per_task=1), backbone=Sentences())
    made = sentences()
    made |= {f"{part}_features": made.pop(f"{part}_tokens") for part in ("train", "test")}
    other = SplitArrays(made)
    other.setup()
    with pytest.raises(ConfigurationError, match=r"torch.int64\), but got .*torch.float32"):
        module.attach(other)


def test_floats_and_tokens_do_not_join() -> None:
    made = sentences()
    features = {key.replace("tokens", "features"): value for key, value in made.items()}
    with pytest.raises(
        ConfigurationError, match="all streams to give floats, or all of them tokens"
    ):
        StreamOf([SplitArrays(made), SplitArrays(features)]).setup()
    both = StreamOf([SplitArrays(made), SplitArrays(made)])
    both.setup()
    assert both.input_dtype == torch.int64


@pytest.mark.parametrize(
    ("backbone", "stream", "said"),
    [
        (
            nn.Linear(6, 3),
            sentences,
            r"integer tokens \(torch.int64\) .* Begin it with nn.Embedding",
        ),
        (
            Sentences(),
            iris,
            "An embedding needs a stream of integer tokens: this one's inputs are floats",
        ),
        (nn.Linear(5, 3), iris, r"Pass a network for inputs of this shape\.$"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
            iris,
            "has no running statistics .* make it with track_running_stats=True",
        ),
        (
            nn.Embedding(10, 3),
            sentences,
            r"got shape \(1, 6, 3\) .* End it with nn.Flatten\(\), or",
        ),
        (nn.LSTM(4, 3), iris, "got a tuple for a batch of 1. Let it return a tensor with a row"),
    ],
)
def test_a_network_for_other_inputs_is_told_what_helps(
    backbone: Any, stream: Any, said: str
) -> None:
    made = SplitArrays(stream())
    made.setup()
    with pytest.raises(ConfigurationError, match=said):
        ContinualModule(backbone).attach(made)


def test_a_network_of_vectors_is_told_to_begin_flat() -> None:
    stream = SplitDigits()
    stream.setup()
    with pytest.raises(
        ConfigurationError, match=r"Begin it with nn.Flatten\(\), or pass a network"
    ):
        ContinualModule(nn.Linear(64, 3)).attach(stream)


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.str_, np.bytes_])
@pytest.mark.parametrize("column", [False, True])
def test_strings_are_classes_in_order(tmp_path: Path, kind: Any, column: bool) -> None:
    made = iris()
    for part in ("train", "test"):
        labels = made[f"{part}_labels"].astype(kind)
        made[f"{part}_labels"] = labels[:, None] if column else labels
    stream = SplitArrays(saved(tmp_path, made), classes_per_task=3)
    stream.setup()
    assert stream.tasks[0].class_names == ("setosa", "versicolor", "virginica")
    (batch,) = stream.loader(0, "test")
    assert batch.targets.tolist() == load_iris().target[::3].tolist()


def test_whole_numbers_of_two_widths_and_truth_values_are_classes() -> None:
    made = sentences(classes=2)
    truth = {key: value.astype(bool) for key, value in made.items() if "labels" in key}
    widths = {"train_labels": made["train_labels"].astype(np.uint8)}
    for labels, names in ((truth, ("False", "True")), (widths, ("0", "1"))):
        stream = SplitArrays(made | labels)
        stream.setup()
        assert stream.tasks[0].class_names == names
        (batch,) = stream.loader(0, "train")
        assert batch.targets.tolist() == [0, 1] * 20


def test_deep_images_are_read_by_their_upper_bits(tmp_path: Path) -> None:
    made: dict[str, Any] = {
        f"{p}_images": np.arange(0, 2**16, 64, dtype=np.uint16).reshape(16, 8, 8)
        for p in ("train", "test")
    }
    made |= {f"{part}_labels": np.arange(16) % 2 for part in ("train", "test")}
    stream = SplitArrays(saved(tmp_path, made))
    stream.setup()
    (batch,) = stream.loader(0, "train")
    assert torch.equal(
        batch.inputs.flatten(), torch.arange(1024).div(4, rounding_mode="floor").byte()
    )
    made["train_images"] //= 16
    with pytest.warns(UserWarning, match="train_images in .* is 4,092 of 65,535"):
        SplitArrays(saved(tmp_path, made)).setup()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            iris(train_features=np.full((100, 4), np.nan)),
            "finite in 32 bits, but 100 of 100 rows are not",
        ),
        (iris(train_features=np.full((100, 4), 1e300)), "finite in 32 bits, but 100 of 100"),
        (
            iris(train_features=1.6e9 + np.random.default_rng(0).random((100, 4))),
            r"feature 0 is 1.6e\+09 \+- 0.\d+. Subtract its mean",
        ),
        (iris(train_features=np.array([["x"] * 4] * 100)), "<U1 .* Turn categories into numbers"),
        (
            iris(train_features=np.array([[None] * 4] * 100)),
            r"object .* strings, .* by .astype\(str\)",
        ),
        (
            iris(train_features=np.zeros(100)),
            r"shape \(n, features\), but got float64 of shape \(100,\)",
        ),
        (iris(test_features=np.zeros((50, 3))), r"of one size, but got \(4,\) and \(3,\)\. Bring"),
        (iris(train_labels=load_iris().data[:100, 0]), "discretize them, .* numpy.digitize"),
        (iris(train_labels=np.array([None] * 100)), r"train_labels .* object .* by .astype\(str\)"),
        (
            iris(train_tokens=np.zeros((100, 4))),
            "to hold images, features or tokens, but got features and",
        ),
        (
            {"train_labels": np.zeros(3), "x": 1},
            "but got train_labels, x. Add train_images, test_images, test_labels. For features or tokens",
        ),
        (
            sentences() | {"train_tokens": np.zeros((40, 6))},
            r"integers of shape \(n, length\), .* Pad",
        ),
        (
            sentences() | {"train_tokens": np.full((40, 6), -1)},
            "0 or more, .* but got -1. Number the",
        ),
        (
            {f"{p}_{w}": np.zeros((4, 3)) for p in ("train", "test") for w in ("images", "labels")},
            "train_labels .* with several labels",
        ),
        (
            {f"{p}_images": np.zeros((4, 3)) for p in ("train", "test")}
            | {f"{p}_labels": np.arange(4) for p in ("train", "test")},
            "Name rows of numbers train_features",
        ),
    ],
)
def test_arrays_that_hold_something_else_are_refused(made: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        SplitArrays(made, classes_per_task=3).setup()


def medmnist(**changes: Any) -> dict[str, Any]:
    """Ten images of each of four classes for training, two for validation, three for the test."""
    made: dict[str, Any] = {}
    for part, count in (("train", 10), ("val", 2), ("test", 3)):
        made[f"{part}_labels"] = np.tile(np.arange(4), count)[:, None]
        shades = 10 * made[f"{part}_labels"] + {"train": 0, "val": 100, "test": 200}[part]
        made[f"{part}_images"] = np.broadcast_to(shades[:, :, None], (4 * count, 3, 3)).astype(
            "uint8"
        )
    return {**made, **changes}


@pytest.mark.parametrize("kind", ["archive", "mapping"])
def test_the_archives_own_validation_part_is_held_out(tmp_path: Path, kind: str) -> None:
    made: Any = medmnist() if kind == "mapping" else saved(tmp_path, medmnist())
    stream = SplitArrays(made, own_validation=True, batch_size=4, evaluation_split="val")
    stream.setup()
    plain = SplitArrays(made, batch_size=4)
    plain.setup()
    assert stream.has_validation
    assert stream.normalization == plain.normalization  # by training samples alone
    for task in (0, 1):
        of_task = [20 * task, 20 * task + 10]
        for split, shade, count in (("train", 0, 10), ("val", 100, 2), ("test", 100, 2)):
            found = torch.cat([batch.inputs[:, 0, 0, 0] for batch in stream.loader(task, split)])
            assert sorted(found.tolist()) == sorted([shade + one for one in of_task] * count)
        assert torch.equal(stream.members(task, "train"), plain.members(task, "train"))


@pytest.mark.parametrize(
    ("made", "arguments", "said"),
    [
        (medmnist(), {"validation_fraction": 0.1}, "validation_fraction to be 0 .* but got 0.1"),
        (
            {key: one for key, one in medmnist().items() if key != "val_labels"},
            {},
            "but got .*val_images.* Add val_labels",
        ),
        (medmnist(val_images=np.zeros((8, 3, 4), "uint8")), {}, "train_images and val_images"),
        (medmnist(val_labels=np.array(list("abcdefgh"))), {}, "train_labels and val_labels"),
        (medmnist(val_labels=np.zeros(8, int)), {}, "validation"),
    ],
)
def test_an_own_validation_part_that_cannot_be_is_refused(
    made: dict[str, Any], arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigurationError, DataError), match=said):
        SplitArrays(made, own_validation=True, **arguments).setup()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_they_are_learned_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    path = saved(tmp_path, iris())
    line = (
        "--config digits_inc.yaml --experiment iris --method ewc --quiet --trainer.accelerator cpu"
    )
    data = (
        f"--data.class_path SplitArrays --data.init_args.path {path} --data.init_args.num_tasks 2"
    )
    sizes = "--data.init_args.classes_per_task [1,2] --data.init_args.epochs_per_task 1"
    assert main([*line.split(), *data.split(), *sizes.split()]) == 0
