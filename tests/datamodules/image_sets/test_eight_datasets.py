"""The eight sets as one stream: order, arguments, and the whole sequence through AlexNet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bpn_lightning.cli.main import main
from bpn_lightning.datamodules.eight_datasets import EightDatasets
from bpn_lightning.datamodules.image_sets import IMAGE_SETS
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.nn import torchvision_backbone
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.psp import ParameterSuperposition

Trees = Callable[..., Any]
CLASSES = [3, 3, 3, 3, 3, 10, 3, 10]


def stream_of(root: Path, **changed: Any) -> EightDatasets:
    small = {"image_size": 64, "resize": 72, "expect_counts": False, "epochs_per_task": 1}
    stream = EightDatasets(root=str(root), seed=0, **(small | changed))
    stream.setup()
    return stream


def test_the_order_is_the_papers(trees: Trees) -> None:
    stream = stream_of(trees().root)
    assert list(IMAGE_SETS) == (
        ["flowers", "scenes", "birds", "cars", "aircraft", "actions", "letters", "svhn"]
    )
    assert [task.num_classes for task in stream.tasks] == CLASSES
    assert [task.id for task in stream.tasks] == [*range(8)]
    ends = [sum(CLASSES[: k + 1]) for k in range(8)]
    assert [task.columns[1] for task in stream.tasks] == ends
    assert stream.tasks[6].class_names == ("0", "A", "a")
    assert (stream.num_classes, stream.input_shape) == (38, (3, 64, 64))


def test_any_sets_in_any_order(trees: Trees) -> None:
    stream = stream_of(trees("svhn", "birds").root, sets=["svhn", "birds"], epochs_per_task=[2, 3])
    assert [task.columns for task in stream.tasks] == [(0, 10), (10, 13)]
    assert [task.epochs for task in stream.tasks] == [2, 3]
    (batch,) = stream.loader(1, "test")
    prepared = stream.prepare(batch)
    assert prepared.inputs.shape == (3, 3, 64, 64)
    assert sorted(prepared.targets.tolist()) == [10, 11, 12]


def test_options_reach_their_sets(trees: Trees) -> None:
    root = trees("letters", "aircraft").root
    options = {"letters": {"classes": 52}, "aircraft": {"level": "variant"}}
    stream = stream_of(root, sets=["letters", "aircraft"], options=options)
    assert [task.num_classes for task in stream.tasks] == [2, 3]


def test_characters_are_not_mirrored_unless_asked_for(trees: Trees) -> None:
    root = trees("svhn", "birds").root

    def flips(**changed: Any) -> list[bool]:
        return [one.flip for one in stream_of(root, sets=["svhn", "birds"], **changed).streams]

    assert flips() == [False, True]
    assert flips(mirror_characters=True) == [True, True]


def test_the_root_is_that_of_the_environment(
    trees: Trees, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BPN_DATA", str(trees("birds").root))
    stream = EightDatasets(
        sets=["birds"], cache_dir=str(tmp_path / "elsewhere"), expect_counts=False, resize=224
    )
    stream.setup()
    assert stream.input_shape == (3, 224, 224)
    assert len(list((tmp_path / "elsewhere").glob("birds-*"))) == 2
    assert not (tmp_path / "bpn_cache").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sets": ["bird"]}, "Did you mean 'birds'?"),
        ({"sets": ["birds", "birds"]}, "each once, but got birds, birds"),
        ({"sets": []}, "at least one set"),
        ({"sets": ["birds"], "options": {"svhn": {}}}, "but got some of 'svhn'"),
        ({"options": {"birds": {"crops": True}}}, "Did you mean 'crop'?"),
        ({"image_size": 300}, "image_size to be at most resize"),
        ({"epochs_per_task": [1, 2]}, "one entry for each of the 8 tasks"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_read(
    changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        EightDatasets(root="nowhere", **changed)
    assert said in str(error.value)


def test_the_command_line_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    line = ["--config", "eight_datasets", "--data.init_args.sets", "[bird]"]
    line += ["--model.backbone.init_args.weights", "null"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("bpn-fit: error: Expected the name of an image set, but got 'bird'.")
    assert said.count("\n") == 1


def test_a_set_with_wrong_numbers_is_refused(trees: Trees) -> None:
    with pytest.raises(DataError, match="102 classes, but got 3"):
        stream_of(trees("flowers").root, sets=["flowers"], expect_counts=True)


def test_an_absent_set_is_named_before_another_is_decoded(trees: Trees) -> None:
    root = trees("birds").root
    with pytest.raises(DataError, match="Expected Stanford Cars in"):
        stream_of(root, sets=["birds", "cars"])
    assert not (root / "bpn_cache").exists()


@pytest.mark.slow
def test_the_whole_sequence_through_alexnet(trees: Trees, fit: Any) -> None:
    """BD+PSP with the first key at ones; bias units stand on all fully connected layers."""
    stream = stream_of(trees().root, batch_size=64, eval_batch_size=64)
    strategies = [
        BeneficialPerturbation(rank=100, epsilon=0.001, layers=["linear"]),
        ParameterSuperposition(first_key="ones"),
    ]
    network = torchvision_backbone("alexnet")
    convolution = network.features[0].weight.detach().clone()  # type: ignore[union-attr]
    module, _ = fit(strategies, stream=stream, backbone=network, mask="task", lr=0.001)
    matrix = module.accuracy_matrix
    assert matrix.tasks_learned == 8
    assert not matrix.accuracy.isnan().any()
    assert not torch.equal(network.features[0].weight, convolution)  # type: ignore[union-attr]
    units = {
        name: (layer.in_features, layer.out_features)
        for name, layer in module.network.linear_layers().items()
    }
    assert sorted(units.values()) == [(4096, 38), (4096, 4096), (9216, 4096)]
    assert isinstance(network.classifier[1], nn.Linear)  # type: ignore[index]
