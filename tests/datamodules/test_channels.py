"""Gray images as color ones and back, against Pillow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bpn_lightning.datamodules import (
    Gaussians,
    PermutedMNIST,
    RotatedMNIST,
    SplitArrays,
    SplitCIFAR10,
    SplitDigits,
    SplitImageFolder,
    SplitMNIST,
    StreamOf,
)
from bpn_lightning.datamodules.pixels import luma, with_channels
from bpn_lightning.errors import ConfigurationError

Write = Callable[..., dict[str, np.ndarray]]


def test_luma_is_pillows() -> None:
    """On every gap of 5 of the cube of colors."""
    shades = torch.arange(0, 256, 5, dtype=torch.uint8)
    cube = torch.cartesian_prod(shades, shades, shades).T.reshape(1, 3, 52, -1)
    wanted = np.asarray(Image.fromarray(cube[0].permute(1, 2, 0).numpy()).convert("L"))
    assert torch.equal(luma(cube)[0, 0], torch.tensor(wanted))
    many = torch.randint(256, (5000, 3, 2, 2), dtype=torch.uint8)
    assert torch.equal(luma(many), torch.cat([luma(one) for one in many.split(7)]))


def test_gray_becomes_color_without_a_copy() -> None:
    gray = torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8)
    color = with_channels(gray, 3)
    assert torch.equal(color, gray.repeat(1, 3, 1, 1))
    assert color.untyped_storage().data_ptr() == gray.untyped_storage().data_ptr()
    assert torch.equal(luma(color), gray)
    assert with_channels(gray, None) is with_channels(gray, 1) is gray


def color_arrays() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for part, count in (("train", 12), ("test", 6)):
        pixels = generator.integers(40, 200, size=(count, 9, 7, 3))
        made[f"{part}_images"] = (pixels * [1.0, 0.5, 0.25]).astype(np.uint8)
        made[f"{part}_labels"] = np.arange(count) % 4
    return made


def inputs(stream: Any, task: int = 0) -> Tensor:
    (batch,) = stream.loader(task, "train")
    return stream.prepare(batch).inputs


def test_images_converted_to_gray_are_normalized_by_measured_statistics() -> None:
    made = color_arrays()
    stream = SplitArrays(made, channels=1)
    stream.setup()
    gray = torch.tensor(
        np.stack([Image.fromarray(one).convert("L") for one in made["train_images"]])
    )
    own = gray[torch.tensor(made["train_labels"] < 2)].double() / 255
    assert stream.input_shape == (1, 9, 7)
    assert stream.normalization.mean == pytest.approx([own.mean().item()])
    assert stream.normalization.std == pytest.approx([own.std(correction=0).item()])
    wanted = ((own - own.mean()) / own.std(correction=0)).float()
    torch.testing.assert_close(inputs(stream)[:, 0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("augment", [False, True])
def test_gray_made_color_is_three_times_the_gray_stream(augment: bool) -> None:
    gray, color = (SplitDigits(channels=channels, augment=augment) for channels in (None, 3))
    for stream in (gray, color):
        stream.setup()
    assert color.input_shape == (3, 8, 8)
    assert color.normalization == (gray.normalization.mean * 3, gray.normalization.std * 3)
    for one, other in zip(gray.train_loader(0, 0), color.train_loader(0, 0), strict=True):
        wanted = gray.prepare(one, augment=True).inputs
        assert torch.equal(color.prepare(other, augment=True).inputs, wanted.expand(-1, 3, -1, -1))


def test_known_constants_are_not_used_for_images_converted_to_gray(
    tmp_path: Path, write_tree: Write
) -> None:
    """CIFAR's mean and deviation are of its colors."""
    write_tree(tmp_path / "cifar10", ("ant", "bee"), count=4)
    own, gray = (SplitCIFAR10(str(tmp_path), channels=channels) for channels in (3, 1))
    for stream in (own, gray):
        stream.setup()
    assert own.normalization == SplitCIFAR10.constants
    values = luma(own._parts["train"].samples.images).double() / 255
    assert gray.normalization.mean == pytest.approx([values.mean().item()])
    assert gray.normalization.std == pytest.approx([values.std(correction=0).item()])


@pytest.mark.parametrize("kind", [PermutedMNIST, RotatedMNIST])
def test_transforms_treat_all_channels_equally(
    kind: Any, tmp_path: Path, write_tree: Write
) -> None:
    write_tree(tmp_path / "mnist", tuple("0123456789"), (28, 28), count=1)
    gray, color = (kind(str(tmp_path), num_tasks=3, channels=channels) for channels in (1, 3))
    for stream in (gray, color):
        stream.setup()
    torch.testing.assert_close(inputs(color, 2), inputs(gray, 2).expand(-1, 3, -1, -1))


def test_gray_folders_are_read_in_color_and_back(tmp_path: Path, write_tree: Write) -> None:
    write_tree(tmp_path, ("a", "b"), (8, 8), count=2)
    color, gray = (
        SplitImageFolder(str(tmp_path), image_size=8, channels=channels) for channels in (3, 1)
    )
    for stream in (color, gray):
        stream.setup()
    assert (color.input_shape, gray.input_shape) == ((3, 8, 8), (1, 8, 8))
    assert torch.equal(inputs(color), inputs(gray).expand(-1, 3, -1, -1))


def test_streams_of_different_channels_join(tmp_path: Path, write_tree: Write) -> None:
    write_tree(tmp_path, ("a", "b"), (8, 8, 3), count=2)
    color = SplitImageFolder(str(tmp_path), image_size=8)
    StreamOf([SplitDigits(channels=3), color]).setup()
    with pytest.raises(ConfigurationError, match=r"padding, image_size or channels, to make"):
        StreamOf([SplitDigits(), color]).setup()


def test_what_has_no_channels_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Expected channels to be 1, 3 or null, but got 2"):
        SplitDigits(channels=2)  # type: ignore[arg-type]
    made = color_arrays()
    for part in ("train", "test"):
        made[f"{part}_images"] = made[f"{part}_images"].repeat(2, axis=3)[..., :4]
    with pytest.raises(ConfigurationError, match=r"but got 3 for \(4, 9, 7\)"):
        SplitArrays(made, channels=3).setup()
    made = {f"{part}_features": np.eye(4) for part in ("train", "test")}
    made |= {f"{part}_labels": np.arange(4) for part in ("train", "test")}
    with pytest.raises(ConfigurationError, match="but got 1 for no images"):
        SplitArrays(made, channels=1).setup()
    with pytest.raises(ConfigurationError, match="these inputs are not images"):
        Gaussians(augment=True).setup()


def test_mnist_fits_a_network_for_colors(tmp_path: Path, write_tree: Write, fit: Any) -> None:
    write_tree(tmp_path / "mnist", tuple("0123"), (28, 28), count=2)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 9, 9), torch.nn.Flatten())
    stream = SplitMNIST(str(tmp_path), epochs_per_task=1)
    with pytest.raises(ConfigurationError, match=r"Set the stream's channels to 3, or pass"):
        fit(stream=stream, backbone=backbone)
    module, _ = fit(
        stream=SplitMNIST(str(tmp_path), epochs_per_task=1, channels=3), backbone=backbone
    )
    assert module.closed == 1
