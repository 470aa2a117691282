"""Crops and mirror images against torchvision's, one image at a time."""

import pytest
import torch
from torchvision.transforms.functional import crop, hflip
from torchvision.transforms.functional import pad as add_border

from bpn_lightning.datamodules.augmentation import CropAndFlip


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)])
def test_apply_is_torchvisions_crop_and_flip(shape: tuple[int, int, int]) -> None:
    augmentation = CropAndFlip(padding=2, flip=True)
    draws = torch.cartesian_prod(torch.arange(5), torch.arange(5), torch.arange(2))
    images = torch.randint(1, 256, (len(draws), *shape), dtype=torch.uint8)
    result = augmentation.apply(images, draws)
    for image, (top, left, mirrored), got in zip(images, draws.tolist(), result, strict=True):
        expected = crop(add_border(image, [2]), top, left, *shape[1:])
        assert torch.equal(got, hflip(expected) if mirrored else expected)


def test_draws_cover_what_is_allowed_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = CropAndFlip(padding=2, flip=True).draw(500, generator)
    assert draws.shape == (500, 3)
    assert draws.dtype == torch.int64
    assert draws[:, 0].unique().tolist() == draws[:, 1].unique().tolist() == [0, 1, 2, 3, 4]
    assert draws[:, 2].unique().tolist() == [0, 1]
    assert not CropAndFlip(padding=2, flip=False).draw(500, generator)[:, 2].any()


def test_draws_use_the_given_generator_only() -> None:
    before = torch.get_rng_state()
    draws = [CropAndFlip(4, True).draw(9, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_image_is_no_error() -> None:
    images = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    draws = torch.empty(0, 3, dtype=torch.int64)
    assert CropAndFlip(1, True).apply(images, draws).shape == images.shape
