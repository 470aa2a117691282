"""Image models of Hugging Face's transformers: from a local folder or a configuration, never from code of others."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, DataError, did_you_mean
from bpn_lightning.files.untrusted import read_json
from bpn_lightning.nn.pretrained import (
    Interpolation,
    Pretrained,
    cut_classifier,
    import_extra,
)
from bpn_lightning.nn.weights import other_network, read_state_dict

__all__ = ["transformers_backbone"]

#: Types whose classification model is a body and one linear classifier, and whose configuration loads nothing.
_TYPES = (
    *("beit", "convnext", "convnextv2", "deit", "dinov2", "dinov2_with_registers", "mobilenet_v1"),
    *("mobilenet_v2", "regnet", "resnet", "swin", "swinv2", "vit", "vit_msn"),
)

#: Keys of a configuration that name code, or an implementation that may be fetched.
_CODE = frozenset(
    {"auto_map", "attn_implementation", "quantization_config", "dtype", "torch_dtype"}
)

#: Of Pillow, as in preprocessor_config.json.
_RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_MAX_SHARDS = 1000


def transformers_backbone(
    folder: str | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    size: int | None = None,
) -> nn.Module:
    """An image classification model of Hugging Face's transformers without its classifier.

    Needs the extra ``transformers``. Nothing is downloaded, and no code but that of transformers runs: weights are
    read from safetensors only, and of a configuration only numbers and names of the type's own options
    are used.

    Args:
        folder: has ``config.json``, ``model.safetensors`` (or its shards and their index) and
            ``preprocessor_config.json``, as a clone of a repository of the hub or ``save_pretrained`` has
            them.
        config: instead of a folder, options of a model with random weights, with its ``model_type``, such
            as ``{"model_type": "vit", "hidden_size": 32}``.
        size: height and width in pixels that images are resized to; None: as the folder says. A model
            with position embeddings takes one size only.

    Raises:
        ConfigurationError: transformers is not installed, both or none of folder and config are given, or
            the type is not one of those that are known.
        DataError: a file is missing, damaged, or of another network.
    """
    if (folder is None) == (config is None):
        raise ConfigurationError(
            f"Expected folder or config, but got {'neither' if folder is None else 'both'}. Set one "
            "of them."
        )
    library = import_extra("transformers", "transformers", "transformers_backbone")
    if config is not None:
        built = _build(library, config, "config")
        network = _model_class(library, built)._from_config(built)
        features = _Features(network)
        return features if size is None else Pretrained(features, size=size)
    path = Path(cast(str, folder)).expanduser()
    built = _build(library, _read(path / "config.json"), str(path / "config.json"))
    features = _Features(_load(library, built, path))
    made = _preprocessed(features, built.model_type, size, path)
    return made.set_origin("transformers", built.model_type, path.resolve().name)


class _Features(nn.Module):
    """What a classification model gives to its classifier, ``(batch, features)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        cut_classifier(network)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(pixel_values=images).logits
        return features


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        return {**content}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"Expected {path} to be a JSON object, as save_pretrained writes it, but got "
            f"{type(error).__name__}: {error}. Name the folder of a model with that file."
        ) from error


def _build(library: Any, values: Mapping[str, Any], source: str) -> Any:
    """A configuration of transformers with those of some values that are the type's own options."""
    kind = values.get("model_type")
    if kind not in _TYPES:
        raise ConfigurationError(
            f"Expected model_type of {source} to be one of {', '.join(_TYPES)}, but got {kind!r:.80}."
            f"{did_you_mean(str(kind), _TYPES)} Build another model yourself, and pass it to Pretrained."
        )
    options = library.AutoConfig.for_model(kind).to_dict()
    own = {
        key: value
        for key, value in values.items()
        if key in options and key not in _CODE and not key.startswith("_") and key != "model_type"
    }
    if source == "config":
        unknown = sorted({str(key) for key in values} - {*options, "model_type"})
        if unknown:
            raise ConfigurationError(
                f"Expected config to have options of {kind}, but got {unknown[0]!r:.80}."
                f"{did_you_mean(unknown[0], options)}"
            )
    try:
        return library.AutoConfig.for_model(kind, **own)
    except Exception as error:  # strict types, checked by the class of the configuration
        raise ConfigurationError(
            f"Expected {source} to have valid options of {kind}, but got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}. Correct them."
        ) from error


def _model_class(library: Any, config: Any) -> Any:
    classes = library.AutoModelForImageClassification._model_mapping[type(config)]
    return classes[0] if isinstance(classes, tuple | list) else classes


def _load(library: Any, config: Any, folder: Path) -> nn.Module:
    """A model with the weights of a folder; transformers gets tensors, and neither path nor name."""
    advice = "Name the folder of a model that save_pretrained wrote, with model.safetensors."
    index = _read(folder / _INDEX).get("weight_map") if (folder / _INDEX).exists() else None
    names = sorted(set(index.values())) if isinstance(index, dict) else [_WHOLE]
    if len(names) > _MAX_SHARDS or any(Path(str(name)).name != name for name in names):
        raise DataError(
            f"Expected {folder / _INDEX} to name files next to it, but got {names!r:.120}. {advice}"
        )
    found: dict[str, Tensor] = {}
    for name in names:
        if not name.endswith(".safetensors"):
            raise DataError(f"Expected weights in safetensors, but got {name!r:.120}. {advice}")
        found |= read_state_dict(folder / name, advice)
    before = library.utils.logging.get_verbosity()
    bar = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.set_verbosity_error()  # it reports what is checked below
    library.utils.logging.disable_progress_bar()
    try:
        network, report = _model_class(library, config).from_pretrained(
            None,
            config=config,
            state_dict=found,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        library.utils.logging.set_verbosity(before)
        if bar:
            library.utils.logging.enable_progress_bar()
    _check_report(report, network, folder, advice)
    return cast(nn.Module, network)


def _check_report(report: Mapping[str, Any], network: Any, folder: Path, advice: str) -> None:
    """Refuse what transformers only warns of, but for the classifier, and the pooler of a bare body."""
    linear = [name for name, part in network.named_modules() if type(part) is nn.Linear][-1]
    pooler = tuple(f"{prefix}pooler." for prefix in ("", f"{network.base_model_prefix}."))
    other = partial(filter, lambda key: not key.startswith((f"{linear}.", "classifier.", *pooler)))
    missing = set(other(report["missing_keys"]))
    unknown = set(other(report["unexpected_keys"]))
    mismatched = {key: (tuple(a), tuple(b)) for key, a, b in report["mismatched_keys"]}
    shapes = {key: mismatched[key] for key in other(mismatched)}
    if missing or unknown or shapes:
        what = f"{folder} to hold the weights of its config.json"
        raise other_network(what, missing, unknown, shapes, advice)


def _preprocessed(
    features: nn.Module, model_type: str, size: int | None, folder: Path
) -> Pretrained:
    """As ``preprocessor_config.json`` says."""
    file = folder / "preprocessor_config.json"
    values = {**_read(file), "model_type": model_type}
    method = _RESAMPLING.get(values.get("resample", 2))
    if method is None or not values.get("do_rescale", True):
        raise ConfigurationError(
            f"Expected {file} to resize bilinearly or bicubically and to scale pixels to 1, but got "
            f"resample {values.get('resample', 2)!r:.40} and do_rescale {values.get('do_rescale', True)!r:.40}. "
            "Pass the network to Pretrained yourself."
        )
    normalizes = values.get("do_normalize", True)
    try:
        resize, crop = _sides(values)
        return Pretrained(
            features,
            size=size or crop,
            resize=None if size else resize,
            mean=values["image_mean"] if normalizes else [0.0],
            std=values["image_std"] if normalizes else [1.0],
            interpolation=method,
        )
    except (KeyError, TypeError, ValueError) as error:  # ConfigurationError is one
        raise DataError(
            f"Expected {file} to describe how images are resized and normalized, but got "
            f"{type(error).__name__}: {error} Name the folder of a model with that file."
        ) from error


def _sides(values: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels that the shorter side is scaled to, and of the central square."""
    target = values["size"]
    shorter = target.get("shortest_edge") if isinstance(target, dict) else target
    resize = int(shorter or target["height"])
    if values.get("do_center_crop"):
        crop = values.get("crop_size", resize)
        return resize, int(crop["height"] if isinstance(crop, dict) else crop)
    if values["model_type"] in ("convnext", "convnextv2") and resize < 384:
        return int(resize / (values.get("crop_pct") or 224 / 256)), resize
    return resize, resize
