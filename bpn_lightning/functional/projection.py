"""GEM's projection: the nearest gradient that increases no memory's loss, by the dual quadratic program."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor

__all__ = [
    "MARGIN_MODES",
    "RIDGE",
    "MarginMode",
    "combined",
    "inner_products",
    "multipliers",
    "project",
    "violated",
]

MarginMode = Literal["constraint", "additive"]

MARGIN_MODES = ("constraint", "additive")
RIDGE = 1e-6

#: Elements of gradients converted to float64 at a time: 2 MB on the CPU, which fits into its cache, and
#: 128 MB on other devices.
CHUNK, GPU_CHUNK = 2**18, 2**24


def project(
    gradient: Tensor,
    memory_gradients: Tensor,
    margin: float = 0.5,
    margin_mode: MarginMode = "constraint",
    ridge: float = RIDGE,
) -> Tensor:
    r"""The vector nearest to a gradient that increases no memory's loss, to first order.

    .. math:: \tilde g = g + G^T v, \qquad v = \arg\min_{v \ge \gamma}
        \tfrac12 v^T (G G^T + R) v + (G g)^T v

    if any :math:`\langle g, g_k \rangle` is negative, else g itself; see :func:`multipliers`.

    Args:
        gradient: g, ``(parameters,)``.
        memory_gradients: G, ``(memories, parameters)``.
        margin: gamma, in units of v.
        margin_mode: see :func:`multipliers`.
        ridge: R as a fraction of the squared norms of the memories' gradients.

    Returns:
        ``(parameters,)``; the argument itself if no constraint is violated.

    >>> project(torch.tensor([-1.0, 2.0]), torch.tensor([[1.0, 0.0]]), margin=0, ridge=0)
    tensor([0., 2.])
    """
    products, gram = inner_products(gradient, memory_gradients)
    if not violated(products):
        return gradient
    v = multipliers(products, gram, margin, margin_mode, ridge)
    return combined(gradient, memory_gradients, v.to(gradient.device))


def violated(products: Tensor) -> bool:
    """Whether a gradient step would increase a memory's loss.

    Args:
        products: inner products of the gradient with every memory's, ``(memories,)``. False if they are
            not finite: the gradient scaler will skip the update, or training has diverged.
    """
    return bool(products.isfinite().all() and (products < 0).any())


def multipliers(
    products: Tensor,
    gram: Tensor,
    margin: float = 0.5,
    margin_mode: MarginMode = "constraint",
    ridge: float = RIDGE,
) -> Tensor:
    r"""The solution v of the dual problem, from inner products only.

    With D the norms of the memories' gradients, C = D^-1 G G^T D^-1 their cosines and
    C + ridge I = L L^T, the quadratic program in w = D v >= D gamma is the non-negative least squares
    problem :math:`\min_{u \ge 0} |L^T u + L^{-1} (D^{-1} G g + (C + ridge I) D \gamma)|` with
    u = w - D gamma. In these units nothing depends on the norms of gradients.

    Args:
        products: G g, ``(memories,)`` float64.
        gram: G G^T, ``(memories, memories)`` float64.
        margin: gamma.
        margin_mode: ``constraint`` solves with v >= gamma; ``additive`` solves with v >= 0 and then
            adds gamma.
        ridge: added to the diagonal of the cosines, which is 1; it makes the solution unique if gradients
            are linearly dependent.

    Returns:
        v, ``(memories,)`` float64 on the CPU.
    """
    floor = margin if margin_mode == "constraint" else 0.0
    norms = gram.diagonal().sqrt().cpu().numpy()
    live = norms > 0  # a zero gradient is no constraint
    norms = norms[live]
    cosines = gram.cpu().numpy()[np.ix_(live, live)] / np.outer(norms, norms)
    cosines += ridge * np.eye(len(norms))
    factor = np.linalg.cholesky(cosines)
    linear = products.cpu().numpy()[live] / norms + cosines @ (floor * norms)
    target = -solve_triangular(factor, linear, lower=True)
    # The solver uses absolute tolerances, and the problem is homogeneous: rescale it.
    scale = np.abs(target).max(initial=0) or 1.0
    solution, _ = nnls(factor.T, target / scale, maxiter=100 * len(norms))
    v = np.full(len(live), floor, dtype=np.float64)
    v[live] += solution * scale / norms
    if margin_mode == "additive":
        v += margin
    return torch.from_numpy(v)


def inner_products(gradient: Tensor, memory_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of a gradient with every memory's, and between those, in float64.

    Args:
        gradient: g, ``(parameters,)``.
        memory_gradients: G, ``(memories, parameters)``.

    Returns:
        G g, ``(memories,)``, and G G^T, ``(memories, memories)``.
    """
    size = len(memory_gradients) + 1
    total = torch.zeros(size, size, dtype=torch.float64, device=gradient.device)
    for part, of_memories in _pieces(gradient, memory_gradients):
        rows = torch.cat((part[None], of_memories)).double()
        total.addmm_(rows, rows.T)
    return total[0, 1:], total[1:, 1:]


def combined(gradient: Tensor, memory_gradients: Tensor, v: Tensor) -> Tensor:
    """The sum g + G^T v, computed in float64 because large multiples of gradients may cancel.

    Args:
        gradient: g, ``(parameters,)``.
        memory_gradients: G, ``(memories, parameters)``.
        v: ``(memories,)`` float64.

    Returns:
        ``(parameters,)``, in the gradient's dtype.
    """
    sums = [
        torch.addmv(part.double(), of_memories.double().T, v).to(gradient.dtype)
        for part, of_memories in _pieces(gradient, memory_gradients)
    ]
    return torch.cat(sums)


def _pieces(gradient: Tensor, memory_gradients: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Convert to float64 in chunks of parameters, to save memory."""
    elements = CHUNK if gradient.device.type == "cpu" else GPU_CHUNK
    step = max(1, elements // (len(memory_gradients) + 1))
    return zip(torch.split(gradient, step), torch.split(memory_gradients, step, 1), strict=True)
