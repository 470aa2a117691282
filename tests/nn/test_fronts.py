"""Fixed feature extractors: closed forms, what is fitted over any division of images, and records."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.nn import frozen_network
from bpn_lightning.nn.fronts import Front, RandomFeatures
from bpn_lightning.nn.frozen_network import FrozenNetwork
from bpn_lightning.nn.patches import Patches

SHAPE = (3, 9, 8)


def images(count: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=generator) * torch.linspace(0.2, 1, 8)


def network() -> nn.Module:
    torch.manual_seed(7)
    parts = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(*parts, nn.Flatten())


FRONTS: dict[str, Callable[..., Front]] = {
    "patches": lambda **_: Patches(5, 3, samples=200, iterations=3),
    "cosine": lambda **_: RandomFeatures(30),
    "relu": lambda **_: RandomFeatures(30, "relu"),
    "frozen": lambda **_: FrozenNetwork(network()),
}
every_front = pytest.mark.parametrize("name", FRONTS)


def fitted(name: str, parts: list[int] | None = None) -> Front:
    front = FRONTS[name]()
    front.fit(lambda: images().split(parts or 24))
    return front


# --- what all of them promise --------------------------------------------------------------------


@every_front
def test_features_are_standardized_over_the_images_of_the_fit(name: str) -> None:
    front = fitted(name)
    features = front(images())
    assert features.shape == (24, front.width(SHAPE))
    raw = front.extract(images()).double().numpy()
    expected = StandardScaler().fit_transform(raw)
    if front.one_deviation:
        expected = (raw - raw.mean(0)) / np.sqrt(raw.var(0).mean())
    np.testing.assert_allclose(features, expected, atol=1e-3)


def test_a_unit_that_is_almost_silent_on_the_first_task_is_not_amplified() -> None:
    front = FrozenNetwork(nn.Flatten())
    first = torch.cat([torch.randn(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1)], 3)
    first[0, 0, 0, 1] = 1e-3
    front.fit(lambda: [first])
    assert front(torch.ones(1, 1, 1, 2)).abs().max() < 3


@every_front
def test_how_images_come_does_not_matter(name: str) -> None:
    front, other = FRONTS[name](), fitted(name, [1, 7, 0, 16])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    front.fit(lambda: [images()[order]])
    torch.testing.assert_close(front(images()), other(images()), rtol=1e-3, atol=1e-3)


def fit_a_share(name: str) -> dict[str, Tensor]:
    """The state of a front that each process fits on images of its own."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def all_reduce(sums: Tensor) -> Tensor:
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
        return sums

    front = FRONTS[name]()
    front.fit(lambda: [images()[rank::size]], all_reduce)
    return dict(front.state_dict())


@every_front
def test_two_processes_fit_what_one_fits(ranks: Any, name: str) -> None:
    first, second = ranks(fit_a_share, name)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, dict(fitted(name).state_dict()), rtol=1e-4, atol=1e-4)


@every_front
def test_a_front_stays_in_evaluation_and_out_of_gradients(name: str) -> None:
    front = fitted(name).train()
    assert not any(part.training for part in front.modules())
    assert not any(parameter.requires_grad for parameter in front.parameters())
    inputs = images().requires_grad_()
    before = {key: value.clone() for key, value in front.state_dict().items()}
    assert not front(inputs).requires_grad
    torch.testing.assert_close(dict(front.state_dict()), before, rtol=0, atol=0)


@every_front
def test_half_precision_around_it_changes_nothing(name: str) -> None:
    front = fitted(name)
    with torch.autocast("cpu", torch.bfloat16):
        inside = front(images())
    assert torch.equal(inside, front(images()))


@every_front
def test_the_features_of_an_image_do_not_depend_on_its_batch(name: str) -> None:
    front = fitted(name)
    torch.testing.assert_close(front(images())[3:5], front(images()[3:5]), rtol=1e-4, atol=1e-4)
    assert front(images()[:0]).shape == (0, front.width(SHAPE))


@every_front
def test_record_and_state_are_the_whole_front(name: str) -> None:
    front, file = fitted(name), io.BytesIO()
    torch.save({"record": front.record(), "state": front.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    more = {"network": network()} if name == "frozen" else {}
    arguments = dict(saved["record"])
    shape = arguments.pop("input_shape")
    other = type(front)(**arguments, **more)
    other.allocate(shape)
    other.load_state_dict(saved["state"])
    assert torch.equal(other(images()), front(images()))
    assert other.fingerprint() == front.fingerprint()
    assert other.record() == saved["record"]


@every_front
def test_a_fingerprint_is_of_every_bit(name: str) -> None:
    front = fitted(name)
    before = front.fingerprint()
    for value in front.state_dict().values():
        if value.is_floating_point():
            value.view(-1)[0] += 1
            assert front.fingerprint() != before
            value.view(-1)[0] -= 1
    assert fitted(name).fingerprint() == before
    if name in ("cosine", "relu"):
        other = RandomFeatures(30, name, seed=1)  # type: ignore[arg-type]
        other.fit(lambda: [images()])
        assert other.fingerprint() != before


# --- random features -----------------------------------------------------------------------------


def test_products_of_cosines_are_the_gaussian_kernel() -> None:
    front = RandomFeatures(60_000, length=1.5)
    front.fit(lambda: [images()])
    waves, x = front.extract(images()), images().flatten(1).double()
    length = 1.5 * x.var(0, correction=0).sum().sqrt()
    kernel = (-torch.cdist(x, x).square() / (2 * length**2)).exp()
    torch.testing.assert_close(waves @ waves.T, kernel.float(), rtol=0, atol=0.02)


def test_products_of_rectified_features_are_the_arc_cosine_kernel() -> None:
    """Cho and Saul (2009), of degree 1: |x| |y| (sin t + (pi - t) cos t) / 2 pi, over d."""
    front = RandomFeatures(60_000, "relu")
    front.fit(lambda: [images()])
    x = images().flatten(1)
    found = front.extract(images()) @ front.extract(images()).T / 60_000
    norms = x.norm(dim=1)
    outer = torch.outer(norms, norms)
    angle = (x @ x.T / outer).clamp(-1, 1).acos()
    expected = outer * (angle.sin() + (torch.pi - angle) * angle.cos()) / (2 * torch.pi)
    torch.testing.assert_close(found, expected / x.shape[1], rtol=0.03, atol=0)


# --- frozen networks -----------------------------------------------------------------------------


def test_weights_come_from_a_file(tmp_path: Any) -> None:
    other = network()
    nn.init.normal_(other[0].weight)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    front = FrozenNetwork(network(), str(tmp_path / "weights.pt"))
    assert torch.equal(front.network[0].weight, other[0].weight)  # type: ignore[index]
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        DataError, match="hold the weights of the front's network, but got weights of another"
    ):
        FrozenNetwork(network(), str(tmp_path / "weights.pt"))
    with pytest.raises(
        DataError, match="Expected weights_file to be a file of weights, but reading"
    ):
        FrozenNetwork(network(), str(tmp_path / "none.pt"))


def test_layers_give_the_means_of_their_maps_before_the_networks_own() -> None:
    front = FrozenNetwork(network(), layers=["0", "4"])
    x = images()
    maps = front.network[0](x)  # type: ignore[index]
    own = front.network(x)
    assert front.width(SHAPE) == 5 + 20 + 20
    expected = torch.cat([maps.mean((2, 3)), own, own], 1)
    torch.testing.assert_close(front.extract(x), expected)
    assert front.record()["layers"] == ["0", "4"]


def test_a_large_batch_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    front = FrozenNetwork(network(), layers=["0"])
    whole = front.extract(images())
    sizes: list[int] = []
    front.network.register_forward_hook(lambda net, given, output: sizes.append(len(output)))
    monkeypatch.setattr(frozen_network, "CHUNK", 10)
    torch.testing.assert_close(front.extract(images()), whole)
    assert sizes == [10, 10, 4]


class Counted(nn.Module):
    """Means over places, of what it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.samples = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.samples += len(inputs)
        return inputs.mean((2, 3)) * self.scale


def test_a_batch_that_a_file_has_is_not_computed_again(tmp_path: Path) -> None:
    first = FrozenNetwork(Counted(), cache_dir=str(tmp_path / "features"))
    first.fit(lambda: images().split(8))
    plain = FrozenNetwork(Counted())
    plain.fit(lambda: images().split(8))
    assert torch.equal(first(images()[:8]), plain(images()[:8]))
    assert first.fingerprint() == plain.fingerprint()
    again = FrozenNetwork(Counted(), cache_dir=str(tmp_path / "features"))
    again.fit(lambda: images().split(8))
    assert again.fingerprint() == plain.fingerprint()
    assert again.network.samples == 2  # zeros for the width, noise for the hash
    assert torch.equal(again(images()[:8]), plain(images()[:8]))
    assert torch.equal(again(images()[:7]), plain(images()[:7]))  # another batch
    assert again.network.samples == 2 + 7


def test_files_are_of_one_network_and_its_weights(tmp_path: Path) -> None:
    front = FrozenNetwork(Counted(), cache_dir=str(tmp_path))
    before = front.extract(images())
    assert torch.equal(front.extract(images()), before)
    other = FrozenNetwork(nn.Sequential(Counted(), nn.ReLU6()), cache_dir=str(tmp_path))
    torch.testing.assert_close(other.extract(images() * 9), (9 * before).clamp(max=6))
    front.load_state_dict({"network.scale": torch.full((3,), 2.0)})
    torch.testing.assert_close(front.extract(images()), 2 * before)


def test_a_damaged_file_is_written_again_and_a_full_folder_gets_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = FrozenNetwork(Counted(), cache_dir=str(tmp_path))
    expected = front.extract(images())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(front.extract(images()), expected)
    assert file.stat().st_size == expected.nbytes
    monkeypatch.setattr(frozen_network, "MAX_BYTES", 2 * expected.nbytes - 1)
    assert torch.equal(front.extract(images() * 2), expected * 2)
    assert [*tmp_path.iterdir()] == [file]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    front = FrozenNetwork(Counted(), cache_dir=str(tmp_path / "file" / "features"))
    with pytest.raises(DataError, match="Expected cache_dir to be a folder that can be written"):
        front.extract(images())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patches(0), "Expected num_patches of a front to be a whole number of at least 1, but got 0."),
        (lambda: Patches(stride=1.5), "Expected stride of a front to be a whole number"),  # type: ignore[arg-type]
        (lambda: Patches(contrast=0), "Expected contrast of a front to be a positive number, but got 0."),
        (lambda: RandomFeatures(-3), "Expected features of a front to be a whole number"),
        (lambda: RandomFeatures(3, "cosin"), "Expected kind of a front to be one of cosine, relu, but got 'cosin'. Did you mean 'cosine'?"),  # type: ignore[arg-type]
        (lambda: RandomFeatures(3, length=0), "Expected length of a front to be a positive number"),
        (lambda: Patches(5, 10).width(SHAPE), "Expected inputs of the front Patches to be images of at least 10 x 10 pixels, (channels, height, width), but got (3, 9, 8)."),
        (lambda: Patches(5).width((64,)), "Expected inputs of the front Patches to be images of at least 6 x 6"),
        (lambda: Patches(5)(images()), "Expected the front Patches to be fitted before it is used."),
        (lambda: fitted("relu")(images()[:, :, 1:]), "Expected inputs of shape (n, 3, 9, 8) for the front RandomFeatures, but got (24, 3, 8, 8)."),
        (lambda: FrozenNetwork(nn.Conv2d(3, 1, 1)).width(SHAPE), "Expected the front's network to map (n, 3, 9, 8) to (n, features), but got (1, 1, 9, 8) for one input."),
        (lambda: FrozenNetwork(network(), layers=["00"]), "Expected layers of the front to name modules of its network, but got '00'. Did you mean '0'?"),
        (lambda: FrozenNetwork(nn.Linear(3, 1)).width(SHAPE), "Expected the front's network to map (n, 3, 9, 8) to (n, features), but its forward raised RuntimeError"),
    ],
)  # fmt: skip
def test_arguments_and_shapes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        make()
    assert str(error.value).startswith(message)


@every_front
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_images_that_are_constant_or_not_finite(name: str, value: float) -> None:
    flat = torch.full((6, *SHAPE), value)
    with pytest.raises(DataError, match="finite and to vary"):
        FRONTS[name]().fit(lambda: [flat])


@every_front
def test_no_images(name: str) -> None:
    with pytest.raises(DataError, match=r"Expected images to fit the front .* on, but got none"):
        FRONTS[name]().fit(list)
