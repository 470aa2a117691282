"""The networks of Wen et al., which map inputs to features; the head on top belongs to the module."""

from collections.abc import Sequence

from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError

__all__ = ["MLP"]


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
