"""Which network a file names: layers and networks that need no code of anybody else's.

A description is ``{"class_path": ..., "init_args": {...}}``, as in configs, and for ``nn.Sequential`` also
``{"class_path": "torch.nn.Sequential", "layers": {name: description}}``.
"""

from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bpn_lightning.errors import CheckpointError
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.nn.switching import plain_class

__all__ = ["build_network", "describe_network"]

#: Layers that are described by their own attributes, and which these are.
_CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("bias", "padding_mode"),
)
_POOL = ("kernel_size", "stride", "padding", "ceil_mode")
_AVERAGE = (*_POOL, "count_include_pad")
_EMBEDDING = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
LAYERS: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _BATCH_NORM),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), (*_POOL, "dilation")),
    nn.AvgPool1d: _AVERAGE,
    **dict.fromkeys((nn.AvgPool2d, nn.AvgPool3d), (*_AVERAGE, "divisor_override")),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), ("output_size",)),
    nn.Embedding: (*_EMBEDDING, "scale_grad_by_freq", "sparse"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p",),
    nn.LeakyReLU: ("negative_slope",),
    nn.GELU: ("approximate",),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity), ()),
}

#: Networks of this package that files may name; other names are someone's code.
NETWORKS = (
    *("MLP", "efficientnet_lite_backbone", "timm_backbone", "torchvision_backbone"),
    "transformers_backbone",
)
_OURS = {f"bpn_lightning.nn.{name}" for name in NETWORKS} | {"bpn_lightning.nn.backbones.MLP"}

#: Arguments that download or open something.
_FETCHING = ("weights", "weights_file")

MAX_DEPTH = 16


def describe_network(network: nn.Module) -> dict[str, Any] | None:
    """The description of a network of torch's layers one after another; None of any other.

    >>> describe_network(nn.Sequential(nn.Flatten()))["layers"]["0"]["class_path"]
    'torch.nn.Flatten'
    """
    kind = plain_class(network)
    if is_parametrized(network):
        return None
    if type(network) is MLP:
        widths = [layer.out_features for layer in network if isinstance(layer, nn.Linear)]
        return {"class_path": "bpn_lightning.nn.MLP", "init_args": {"hidden": widths}}
    if kind is nn.Sequential:
        layers = {name: describe_network(layer) for name, layer in network.named_children()}
        if None in layers.values() or len({*network.children()}) < len(network):  # type: ignore[arg-type]
            return None
        return {"class_path": "torch.nn.Sequential", "layers": layers}
    if kind not in LAYERS:
        return None
    arguments = {name: getattr(network, name) for name in LAYERS[kind]}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return {"class_path": f"torch.nn.{kind.__name__}", "init_args": arguments}


def build_network(
    description: Any, trust: Collection[str] = (), held: int | None = None
) -> nn.Module:
    """Build the network that a file names.

    Args:
        description: of :func:`describe_network`, or of a run's config.
        trust: import paths of classes and functions that may be imported and called too. ``weights`` among
            them lets a file name weights that are downloaded or opened.
        held: bytes of the file's tensors, which torch's layers are to be filled with; None: any size.

    Raises:
        CheckpointError: names a class that needs trust, or what its constructor raised.
    """
    if description is None:
        raise CheckpointError(
            "Expected a bundle that names its network, but it names none: it was exported from a module whose "
            "network is code of your own. Pass the network: load(folder, backbone=...)"
        )
    if held is not None and _is_of_layers(description):
        with torch.device("meta"):
            sized = _made(description, frozenset(trust), 0)
        needed = sum(value.nbytes for value in (*sized.parameters(), *sized.buffers()))
        if needed > held:
            raise CheckpointError(
                f"Expected a network within the {held:,} bytes of all tensors in the file, but got {needed:,} "
                "bytes. The file is damaged or made up"
            )
    made = _made(description, frozenset(trust), 0)
    if not isinstance(made, nn.Module):
        raise CheckpointError(f"Expected a bundle to name a network, but got {description!r:.120}")
    return made


def _is_of_layers(description: Any) -> bool:
    return isinstance(description, dict) and str(description.get("class_path")).startswith(
        "torch.nn."
    )


def _made(value: Any, trust: frozenset[str], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"Expected a network of at most {MAX_DEPTH} levels, but got more")
    if isinstance(value, list):
        return [_made(one, trust, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {name: _made(one, trust, depth + 1) for name, one in value.items()}
    path = value["class_path"]
    maker = _maker(path, trust)
    if maker is nn.Sequential and isinstance(value.get("layers"), dict):
        made = nn.Sequential()
        for name, layer in value["layers"].items():
            made.add_module(name, _made(layer, trust, depth + 1))
        return made
    arguments = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    for name in _FETCHING:
        if arguments.get(name) and path not in trust and name not in trust:
            raise _untrusted(f"{name}={arguments[name]!r:.80}", "weights")
    try:
        return maker(**{name: _made(one, trust, depth + 1) for name, one in arguments.items()})
    except CheckpointError:
        raise
    except Exception as error:  # a class may raise any exception here
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"Expected {path} to take the arguments that the file names, but it raised "
            f"{type(error).__name__}: {said:.300}"
        ) from error


def _maker(path: Any, trust: frozenset[str]) -> Any:
    module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    ours = path in _OURS
    layers = {f"torch.nn.{kind.__name__}" for kind in (*LAYERS, nn.Sequential)}
    for one in (*LAYERS, nn.Sequential):
        layers.add(f"{one.__module__}.{one.__name__}")
    if not (ours or path in layers or path in trust):
        raise _untrusted(f"{path!s:.120}", f"{path!s:.120}")
    return getattr(import_module(module), name)


def _untrusted(what: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"Expected a bundle to name a network that needs no trust, but got {what}. Building it runs its code, or "
        f"fetches its file: look at it, then pass trust={[name]!r}, or the network itself as backbone"
    )
