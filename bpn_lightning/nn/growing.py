"""Tensors of a stream that goes on: what was is their leading corner."""

from torch import Tensor

__all__ = ["grown"]


def grown(tensor: Tensor, larger: Tensor) -> Tensor:
    """A copy of a larger tensor, with another one in its leading corner.

    Args:
        tensor: no dimension is longer than that of ``larger``.
        larger: of the same number of dimensions, with what new tasks and classes start from.

    >>> import torch
    >>> grown(torch.ones(1, 2), torch.zeros(2, 3))
    tensor([[1., 1., 0.],
            [0., 0., 0.]])
    """
    result = larger.detach().clone()
    result[tuple(map(slice, tensor.shape))] = tensor.to(result)
    return result
