"""Networks that map inputs to features; the head on top belongs to the module."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, DataError, did_you_mean
from bpn_lightning.files import why_unreadable
from bpn_lightning.untrusted import open_untrusted, refuse_deflated

__all__ = ["MLP", "read_state_dict", "torchvision_backbone"]


#: Auxiliary classifiers, for training from scratch only.
_HALFWAY = ("aux1", "aux2", "AuxLogits")


class HeLinear(nn.LazyLinear):
    """A linear layer with weights from N(0, 2 / inputs) and bias 0 (He et al., 2015).

    Its input size is inferred at the first forward pass.
    """

    def reset_parameters(self) -> None:
        """Initialize the weights."""
        if self.in_features:  # 0 until the first forward pass
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
            if self.bias is not None:
                nn.init.zeros_(self.bias)


class MLP(nn.Sequential):
    """Fully connected ReLU layers; the paper's networks are ``[300] * 5`` and ``[128] * 4``.

    Args:
        hidden: units of each layer; the input size is inferred at the first forward pass.

    Raises:
        ConfigurationError: a width is not positive, or there is none.
    """

    def __init__(self, hidden: Sequence[int]) -> None:
        if (
            not isinstance(hidden, Sequence)
            or not hidden
            or any(type(width) is not int or width < 1 for width in hidden)
        ):
            raise ConfigurationError(
                f"Expected hidden to be one or more positive widths, but got {hidden}. "
                "The paper's network is hidden=[300, 300, 300, 300, 300]."
            )
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [HeLinear(width), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """The features of a batch, ``(batch, hidden[-1])``."""
        output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return output


def torchvision_backbone(
    name: str, weights: str | None = None, weights_file: str | None = None
) -> nn.Module:
    """A classification network of torchvision without its last linear layer.

    Other fully connected layers are kept: AlexNet has two, of 4096 units each.

    Args:
        name: as in ``torchvision.models.list_models()``, for example ``"resnet18"``.
        weights: a name of torchvision's weights, ``"DEFAULT"`` or None for random weights.
        weights_file: a file with the network's ``state_dict``, such as the one that torchvision
            downloads; only tensors are loaded from it, and its last layer may have any size.

    Raises:
        ConfigurationError: torchvision has no such network or weights, its classifier is not a linear
            layer, or both kinds of weights are given.
        DataError: the file is missing, damaged, or of another network, or a download failed.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigurationError(
            f"Expected name to be a classification network of torchvision, but got {name!r}."
            f"{did_you_mean(name, models.list_models(module=models))} "
            "torchvision.models.list_models() lists them."
        )
    if weights is not None and weights_file is not None:
        raise ConfigurationError(
            f"Expected weights or weights_file, but got both ({weights!r} and {weights_file!r}). Set "
            "one of them to null."
        )
    try:
        with _nothing_but_tensors():
            network: nn.Module = models.get_model(name, weights=weights)
    except (KeyError, ValueError) as error:
        known = [member.name for member in models.get_model_weights(name)]
        raise ConfigurationError(
            f"Expected weights of {name} to be null, 'DEFAULT' or one of {', '.join(known)}, but got "
            f"{weights!r}.{did_you_mean(str(weights), known)}"
        ) from error
    except (OSError, RuntimeError, UnpicklingError) as error:  # includes URLError
        address = getattr(models.get_model_weights(name), str(weights)).url
        raise DataError(
            f"Expected to download the weights of {name} from {address}, but got "
            f"{type(error).__name__}: {why_unreadable(error)}. Download them by other means and set "
            "weights_file to the file, or set weights to null for random ones."
        ) from error
    for part in _HALFWAY:
        if hasattr(network, part):
            setattr(network, part, None)
            network.aux_logits = False  # type: ignore[assignment]
    linears = [key for key, part in network.named_modules() if type(part) is nn.Linear]
    if not linears:
        raise ConfigurationError(
            f"Expected name to be a network that ends in a linear layer, but got {name!r}. "
            "Remove its classifier yourself and pass the module."
        )
    parent, _, leaf = linears[-1].rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    if weights_file is not None:
        _load_weights(network, name, Path(weights_file).expanduser(), linears[-1])
    return network


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


def read_state_dict(path: Path, advice: str) -> dict[str, Tensor]:
    """Weights from a file that may come from anywhere; nothing but tensors is loaded from it.

    Args:
        path: where it lies.
        advice: what to do instead, for the message.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    try:
        with open_untrusted(path, max_bytes=None) as file:
            if is_zipfile(file):  # torch had another format once, which many weights still have
                with ZipFile(file) as archive:
                    refuse_deflated(file, archive)
            file.seek(0)
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    # Missing, not readable, damaged, or with code in it: OSError, RuntimeError, UnpicklingError ...
    except Exception as error:
        raise DataError(
            f"Expected weights_file to be a file of weights, but reading {path} failed with "
            f"{type(error).__name__}: {why_unreadable(error)}. {advice}"
        ) from error
    return dict(state) if isinstance(state, dict) else {}


def _load_weights(network: nn.Module, name: str, path: Path, cut_off: str) -> None:
    """Load the weights of a complete network into one without its classifier."""
    advice = f"Name a file that torch.save(torchvision.models.{name}().state_dict(), ...) wrote."
    found = read_state_dict(path, advice)
    kept = network.state_dict()
    for left_out in [key for key in found if key not in kept]:
        if left_out.startswith(f"{cut_off}.") or left_out.partition(".")[0] in _HALFWAY:
            del found[left_out]
    wrong = sorted(kept.keys() ^ found.keys())
    wrong += [key for key in kept if key in found and kept[key].shape != found[key].shape]
    if wrong:
        raise DataError(
            f"Expected {path} to hold the weights of {name}, but got those of another network: "
            f"{wrong[0]!r} is missing, unknown or of another shape. {advice}"
        )
    network.load_state_dict(found)
