"""One image set as one task: crops, sizes, normalization."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bpn_lightning.datamodules.augmentation import CropAndFlip
from bpn_lightning.datamodules.image_sets import SVHN, Flowers102
from bpn_lightning.datamodules.image_stream import ImageSetStream
from bpn_lightning.errors import ConfigurationError, DataError

Trees = Callable[..., Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def stream_of(image_set: Any, **changed: Any) -> ImageSetStream:
    options: dict[str, Any] = {"image_size": 24, "resize": 32, "expect_counts": False, "seed": 0}
    made = ImageSetStream(
        image_set=image_set, cache=image_set.root / "cache", **(options | changed)
    )
    made.setup()
    return made


def test_test_images_are_those_of_torchvisions_transforms(trees: Trees) -> None:
    image_set = Flowers102(trees("flowers").root)
    stream = stream_of(image_set)
    (batch,) = stream.loader(0, "test")
    inputs = stream.prepare(batch).inputs
    transform = v2.Compose(
        [
            v2.Resize(32),
            v2.CenterCrop(24),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    entries = image_set.checked(expect_counts=False).test
    with ExitStack() as stack:
        images = [stack.enter_context(image_set.open(entry)) for entry in entries]
        wanted = torch.stack([transform(image) for image in images])
    torch.testing.assert_close(inputs, wanted)
    assert batch.targets.tolist() == [entry.label for entry in entries]
    assert stream.input_shape == (3, 24, 24)


def test_small_images_are_kept_small_and_grow_on_the_device(trees: Trees) -> None:
    image_set = SVHN(trees("svhn").root)
    stream = stream_of(image_set, image_size=56, resize=64)
    (batch,) = stream.loader(0, "test")
    assert batch.inputs.shape == (10, 3, 32, 32)
    prepared = stream.prepare(batch).inputs
    std, mean = (torch.tensor(values)[:, None, None] for values in (STD, MEAN))
    pixels = (prepared * std + mean) * 255
    entries = image_set.checked(expect_counts=False).test
    for image, entry in zip(pixels, entries, strict=True):
        with image_set.open(entry) as small:
            large = small.resize((64, 64), Image.Resampling.BILINEAR)
        wanted = torch.from_numpy(np.array(large)).permute(2, 0, 1)[:, 4:60, 4:60]
        assert (image - wanted).abs().max() < 1.01  # Pillow rounds, twice


def test_windows_are_those_that_the_numbers_say() -> None:
    images = torch.arange(2 * 3 * 5 * 6).view(2, 3, 5, 6)
    window = CropAndFlip(0, True, margin=2)
    out = window.apply(images, torch.tensor([[0, 2, 0], [1, 0, 1]]))
    assert torch.equal(out[0], images[0, :, 0:3, 2:6])
    assert torch.equal(out[1], images[1, :, 1:4, 0:4].flip(-1))


def test_windows_are_drawn_evenly_from_all_places() -> None:
    draws = CropAndFlip(0, True, margin=3).draw(4000, torch.Generator().manual_seed(0))
    counts = [draws[:, i].bincount(minlength=4) for i in range(2)]
    assert all(900 < n < 1100 for count in counts for n in count.tolist())
    assert 1900 < draws[:, 2].sum() < 2100
    assert CropAndFlip(0, False, margin=3).draw(99, torch.Generator())[:, 2].sum() == 0


def test_training_cuts_random_windows_and_testing_does_not(trees: Trees) -> None:
    stream = stream_of(Flowers102(trees("flowers").root), augment=True, batch_size=6)
    (first,), (second,) = (stream.train_loader(0, epoch) for epoch in (0, 1))
    whole = {image.sum().item(): image for image in first.inputs}
    assert {image.sum().item() for image in second.inputs} == set(whole)
    windows = [stream.prepare(batch, augment=True).inputs for batch in (first, second)]
    assert windows[0].shape == windows[1].shape == (6, 3, 24, 24)
    plain = stream.prepare(first).inputs
    assert not torch.equal(plain, windows[0])
    middle = stream.prepare(first._replace(augmentation=None), augment=True).inputs
    assert torch.equal(plain, middle)
    (again,) = stream.train_loader(0, 0)
    assert torch.equal(stream.prepare(again, augment=True).inputs, windows[0])


def test_a_corrupt_image_is_an_error_or_left_out(trees: Trees) -> None:
    tree = trees("flowers")
    damaged = Path(tree.parts["flowers"]["train"][3][0])
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(DataError, match="to be an intact image") as error:
        stream_of(Flowers102(tree.root))
    assert str(damaged) in str(error.value)
    with pytest.warns(UserWarning, match="1 of the 6 train images of Oxford Flowers are damaged"):
        stream = stream_of(Flowers102(tree.root), on_corrupt="skip")
    listing = Flowers102(tree.root).checked(expect_counts=False)
    labels = [entry.label for entry in listing.train if entry.path != damaged]
    (batch,) = stream.loader(0, "train")
    assert batch.targets.tolist() == labels


def test_a_window_larger_than_the_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="image_size to be at most resize"):
        ImageSetStream(image_set=SVHN(tmp_path), cache=tmp_path, image_size=257)
