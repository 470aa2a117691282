"""Knowledge distillation: cross-entropy between softened outputs of a student and a teacher."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from bpn_lightning.nn.layers import full_precision

__all__ = ["distillation", "distillation_of_heads"]


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    r"""Cross-entropy between softened outputs, :math:`-\sum_c q_c \log p_c`.

    .. math:: q = \mathrm{softmax}(v / T), \quad p = \mathrm{softmax}(z / T)

    Its gradient with respect to z is :math:`(p - q) / T`, without a factor of :math:`T^2`, and exactly 0
    if student and teacher agree. Computed in at least float32.

    Args:
        student: z, logits ``(..., classes)``.
        teacher: v, logits of the same shape.
        temperature: T, dimensionless.

    Returns:
        ``(...)``; the entropy of q if they agree.

    >>> distillation(torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, 5.0]]))  # log 2
    tensor([0.6931])
    """
    z, v = full_precision(student) / temperature, full_precision(teacher) / temperature
    # Written so that autograd computes p exactly like q here: equal logits cancel bit for bit.
    q = (v - v.logsumexp(-1, keepdim=True)).exp()
    return z.logsumexp(-1) - (q * z).sum(-1)


def distillation_of_heads(
    student: Tensor, teacher: Tensor, widths: Sequence[int], temperature: float
) -> Tensor:
    """The sum of :func:`distillation` over heads, each with its own softmax.

    Args:
        student: concatenated logits of the heads, ``(batch, sum of widths)``.
        teacher: the teacher's, likewise.
        widths: number of classes of each head.
        temperature: T, dimensionless.

    Returns:
        ``(batch,)``.
    """
    if len(set(widths)) == 1:  # all heads at once
        shape = (len(student), len(widths), widths[0])
        return distillation(student.reshape(shape), teacher.reshape(shape), temperature).sum(1)
    edges = [0, *accumulate(widths)]
    heads = [slice(first, stop) for first, stop in pairwise(edges)]
    terms = [distillation(student[:, head], teacher[:, head], temperature) for head in heads]
    return torch.stack(terms).sum(0)
