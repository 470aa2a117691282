"""Networks that map inputs to features; the head on top belongs to the module."""

from collections.abc import Sequence

from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError, did_you_mean

__all__ = ["MLP", "torchvision_backbone"]


class HeLinear(nn.LazyLinear):
    """A linear layer with weights from N(0, 2 / inputs) and bias 0 (He et al., 2015).

    Its input size is found at the first forward.
    """

    def reset_parameters(self) -> None:
        """Draw the weights."""
        if self.in_features:  # 0 until the first forward
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
            if self.bias is not None:
                nn.init.zeros_(self.bias)


class MLP(nn.Sequential):
    """Fully connected ReLU layers; the paper's networks are ``[300] * 5`` and ``[128] * 4``.

    Args:
        hidden: units of each layer; the input size is found at the first forward.

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
        """``(batch, ...)`` to ``(batch, hidden[-1])``."""
        output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return output


def torchvision_backbone(name: str, weights: str | None = None) -> nn.Module:
    """A classification network of torchvision without its last linear layer.

    Args:
        name: as in ``torchvision.models.list_models()``, for example ``"resnet18"``.
        weights: a name of torchvision's weights, ``"DEFAULT"`` or None for random weights.

    Raises:
        ConfigurationError: torchvision has no such network or weights, or its classifier is no linear
            layer.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ConfigurationError(
            f"Expected name to be a classification network of torchvision, but got {name!r}."
            f"{did_you_mean(name, models.list_models(module=models))} "
            "torchvision.models.list_models() has them all."
        )
    try:
        network: nn.Module = models.get_model(name, weights=weights)
    except (KeyError, ValueError) as error:
        known = [member.name for member in models.get_model_weights(name)]
        raise ConfigurationError(
            f"Expected weights of {name} to be null, 'DEFAULT' or one of {', '.join(known)}, but got "
            f"{weights!r}.{did_you_mean(str(weights), known)}"
        ) from error
    for part in ("aux1", "aux2", "AuxLogits"):
        if hasattr(network, part):  # classifiers halfway up, for training from scratch only
            setattr(network, part, None)
            network.aux_logits = False  # type: ignore[assignment]
    linears = [key for key, part in network.named_modules() if type(part) is nn.Linear]
    if not linears:
        raise ConfigurationError(
            f"Expected name to be a network that ends in a linear layer, but got {name!r}. "
            "Cut its classifier off yourself and pass the module."
        )
    parent, _, leaf = linears[-1].rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return network
