"""How wide a backbone's output is, found by one dry forward; what helps where that fails."""

import torch
from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.loaded import eagerly

__all__ = ["feature_width"]


def feature_width(
    backbone: nn.Module,
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> int:
    """Features of a backbone's output ``(batch, features)``, in evaluation mode.

    Args:
        backbone: maps ``(batch, *input_shape)`` to ``(batch, features)``.
        input_shape: of one prepared input.
        dtype: of prepared inputs.
        device: that the backbone lies on.

    Raises:
        ConfigurationError: it does not accept such inputs, or its output is no feature matrix.
    """
    inputs = torch.zeros(1, *input_shape, dtype=dtype, device=device)
    wanted = f"(batch, {', '.join(map(str, input_shape))})"
    with (
        torch.no_grad(),
        evaluation_mode(backbone),
        eagerly(),
    ):  # graphs are of before layers switch
        try:
            output = backbone(inputs)
        except Exception as error:
            kind = "inputs" if dtype.is_floating_point else f"integer tokens ({dtype})"
            raise ConfigurationError(
                f"Expected backbone to accept {kind} of shape {wanted}, but its forward "
                f"raised {type(error).__name__}: {str(error).rstrip('.')}. "
                f"{_remedy(str(error), inputs)}"
            ) from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        tensor = isinstance(output, Tensor)
        got = f"shape {tuple(output.shape)}" if tensor else f"a {type(output).__name__}"
        remedy = "Let it return a tensor with a row for each sample."
        if tensor and output.dim() > 2:
            remedy = (
                "End it with nn.Flatten(), or with a mean over what is neither sample nor feature."
            )
        raise ConfigurationError(
            f"Expected backbone to map {wanted} to (batch, features), but got {got} for a batch of "
            f"1. {remedy}"
        )
    return output.shape[1]


def _remedy(said: str, inputs: Tensor) -> str:
    """What helps against an error that a forward raised on these inputs."""
    if not inputs.is_floating_point():
        return "Begin it with nn.Embedding, which turns tokens into floats."
    if "indices" in said:  # of an embedding
        return (
            "An embedding needs a stream of integer tokens: this one's inputs are floats. Pass another "
            "network, or tokens as integers."
        )
    if "more than 1 value per channel" in said:
        return (
            "A layer that normalizes batches has no running statistics to answer a single sample with: "
            "make it with track_running_stats=True, or normalize each sample."
        )
    if "channels" in said and inputs.dim() == 4 and inputs.shape[1] in (1, 3):
        return (
            f"Set the stream's channels to {4 - inputs.shape[1]}, or pass a network for images of "
            f"{inputs.shape[1]}."
        )
    if inputs.dim() > 2 and "mat1 and mat2" in said:
        return "Begin it with nn.Flatten(), or pass a network for inputs of this shape."
    return "Pass a network for inputs of this shape."
