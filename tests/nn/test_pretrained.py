"""Preprocessing that a network carries along, against torchvision's transforms and the pixels themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from bpn_lightning.datamodules.own_data import SplitArrays
from bpn_lightning.datamodules.stream_of import StreamOf
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import FrozenNetwork, Pretrained

MEAN, STD = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]


class Seen(nn.Module):
    """Keeps what it was given; its features are the means of the channels."""

    images: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean((2, 3))


def stream(channels: int = 3, seed: int = 0) -> SplitArrays:
    draw = torch.Generator().manual_seed(seed)
    shape = (8, 12, 12, 3) if channels == 3 else (8, 12, 12)
    images = torch.randint(0, 60 + 150 * seed, shape, generator=draw).to(torch.uint8).numpy()
    labels = torch.arange(4).repeat_interleave(2).numpy() + 4 * seed
    arrays = {"images": images, "labels": labels}
    made = SplitArrays(
        {f"{part}_{key}": value for part in ("train", "test") for key, value in arrays.items()},
        num_tasks=2,
        classes_per_task=2,
    )
    made.setup()
    return made


def expected(pixels: Tensor) -> Tensor:
    """Of pixels from 0 to 1."""
    return transforms.normalize(pixels, MEAN, STD)


def raw(module: ContinualModule, data: SplitArrays) -> tuple[Tensor, Tensor]:
    """Raw images of the first task and what the network sees of them."""
    seen = next(part for part in module.modules() if isinstance(part, Seen))
    images = next(iter(data.loader(0, "test"))).inputs
    module.backbone(data.normalize(images))
    return images, seen.images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(2, 3, 12, 12), (2, 3, 10, 17), (1, 3, 40, 21)])
def test_images_are_resized_cropped_and_normalized_as_torchvision_does_it(
    shape: tuple[int, ...], interpolation: Any
) -> None:
    network = Pretrained(
        Seen(), size=20, resize=23, mean=MEAN, std=STD, interpolation=interpolation
    )
    images = torch.rand(shape)
    mode = InterpolationMode(interpolation)
    resized = transforms.resize(images, [23], mode, antialias=True)
    theirs = expected(transforms.center_crop(resized, [20, 20]))
    torch.testing.assert_close(network.preprocess(images), theirs, atol=1e-5, rtol=0)


def test_images_of_the_right_size_are_not_resized() -> None:
    network = Pretrained(Seen(), size=12, resize=14, mean=MEAN, std=STD)
    images = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(network.preprocess(images), expected(images))


def test_a_backbone_replaces_the_normalization_of_the_stream() -> None:
    data, module = stream(), ContinualModule(Pretrained(Seen(), mean=MEAN, std=STD))
    module.attach(data)
    images, seen = raw(module, data)
    torch.testing.assert_close(seen, expected(images / 255), atol=1e-5, rtol=1e-5)


def test_gray_images_are_repeated_as_red_green_and_blue() -> None:
    data, module = stream(channels=1), ContinualModule(Pretrained(Seen(), mean=MEAN, std=STD))
    module.attach(data)
    images, seen = raw(module, data)
    rgb = (images / 255).expand(-1, 3, -1, -1)
    torch.testing.assert_close(seen, expected(rgb), atol=1e-5, rtol=1e-5)


def test_without_numbers_the_normalization_of_the_stream_stays() -> None:
    data, module = stream(), ContinualModule(Pretrained(Seen(), size=12))
    module.attach(data)
    images, seen = raw(module, data)
    assert torch.equal(seen, data.normalize(images))


def test_a_checkpoint_keeps_the_normalization_without_its_stream() -> None:
    data, module = stream(), ContinualModule(Pretrained(Seen(), mean=MEAN, std=STD))
    module.attach(data)
    again = Pretrained(Seen(), mean=MEAN, std=STD)
    again.load_state_dict(module.backbone.state_dict())
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(again(images), module.backbone(images))
    fresh = Pretrained(Seen(), mean=MEAN, std=STD)
    assert not torch.equal(fresh(images), again(images))


def different() -> StreamOf:
    """Two streams that measured different normalizations."""
    made = StreamOf([stream(), stream(seed=1)])
    made.setup()
    return made


def test_a_front_sees_all_tasks_with_the_first_ones_normalization() -> None:
    """And what it sees of each is the pixels, normalized as it was trained with."""
    data = different()
    module = ContinualModule(
        nn.Identity(), front=FrozenNetwork(Pretrained(Seen(), mean=MEAN, std=STD))
    )
    module.attach(data)
    seen = next(part for part in module.modules() if isinstance(part, Seen))
    common = module.network.structure.common_normalization
    for task in (0, len(data.tasks) - 1):
        batch = next(iter(data.loader(task, "test")))
        assert module.network.front is not None
        module.network.front.extract(common.to_first(data.prepare(batch).inputs, task))
        torch.testing.assert_close(seen.images, expected(batch.inputs / 255), atol=1e-4, rtol=1e-4)


def test_a_backbone_refuses_tasks_of_different_normalizations() -> None:
    module = ContinualModule(Pretrained(Seen(), mean=MEAN, std=STD))
    with pytest.raises(ConfigurationError, match="one normalization for all tasks"):
        module.attach(different())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 0}, "Expected size to be a whole number of at least 1, but got 0."),
        ({"resize": 5}, "Expected resize to be at least size, but got 5 and None."),
        ({"size": 8, "resize": 5}, "Expected resize to be at least size, but got 5 and 8."),
        ({"mean": [0.5]}, "Expected mean and std to have one number for each channel"),
        ({"mean": [0.5], "std": [1.0, 1.0]}, "one number for each channel"),
        ({"mean": [0.5], "std": [0.0]}, "Expected std to be above 0"),
        ({"interpolation": "area"}, "Expected interpolation to be one of bilinear, bicubic"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Pretrained(Seen(), **arguments)
    assert said in str(error.value)


def test_images_of_two_channels_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="1 or 3 channels"):
        Pretrained(Seen(), mean=MEAN, std=STD).replace_normalization([0.0] * 2, [1.0] * 2)
