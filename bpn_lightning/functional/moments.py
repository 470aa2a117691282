"""Counts, sums and second moments of groups of samples: they add up over batches, processes and tasks.

A group is a class of a task, or a whole task. Everything is float64 and exact up to its rounding, in
whichever order samples come.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["GroupSums", "SecondMoments", "draw_held_out"]

SecondMoments = Literal["none", "shared", "group"]

#: Knuth's multiplier, the odd number next to 2^32 over the golden ratio.
_MULTIPLIER, _WORD = 2_654_435_761, 2**32


class GroupSums(NamedTuple):
    r"""What is summed over the samples of some groups.

    Attributes:
        counts: :math:`n_g`, ``(groups,)`` float64.
        first: :math:`\sum x`, ``(groups, d)`` float64.
        second: :math:`\sum x x^T`, float64: ``(groups, d, d)``; ``(1, d, d)`` over all groups where
            they share it; ``(0, d, d)`` where they are not needed.
    """

    counts: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def zero(
        cls, groups: int, width: int, kind: SecondMoments, device: torch.device | str = "cpu"
    ) -> "GroupSums":
        """Of no samples.

        Args:
            groups: how many.
            width: d.
            kind: whose second moments are summed: each ``group``'s, those of all (``shared``), ``none``.
            device: of the sums.
        """
        matrices = {"none": 0, "shared": 1, "group": groups}[kind]
        shapes = ((groups,), (groups, width), (matrices, width, width))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add_(self, features: Tensor, groups: Tensor) -> None:
        """Add samples in place.

        Args:
            features: ``(n, d)``, any float dtype; products are taken in float64.
            groups: ``(n,)`` int64, the group of each.
        """
        x = features.to(self.first)
        self.counts.add_(torch.bincount(groups, minlength=len(self.counts)))
        self.first.index_add_(0, groups, x)
        if len(self.second) == len(self.counts) and len(self.counts) > 1:
            for group in sorted(set(groups.tolist())):
                own = x[groups == group]
                self.second[group].addmm_(own.T, own)
        elif len(self.second):
            self.second[0].addmm_(x.T, x)

    def plus(self, other: "GroupSums") -> "GroupSums":
        """Those of the samples of both, of the same groups."""
        return GroupSums(*(one + two for one, two in zip(self, other, strict=True)))

    def append(self, other: "GroupSums") -> "GroupSums":
        """Those of the groups of both, the other's last, where all share their second moments."""
        return GroupSums(
            torch.cat((self.counts, other.counts)),
            torch.cat((self.first, other.first)),
            self.second + other.second,
        )

    def only(self, kept: Tensor, centers: Tensor | None = None) -> "GroupSums":
        r"""Those of some groups, where all share their second moments.

        The scatter of the others cannot be told from theirs, so what is left is that of all groups, with
        the weight of the samples that are left: :math:`\frac{n'}{n} S + \sum_{g} f_g f_g^T / n_g` over the
        groups that are kept; nothing of the others' means is in it.

        Args:
            kept: ``(groups,)`` bool.
            centers: as of :meth:`scatter`.
        """
        centers = self.means if centers is None else centers
        own = kept.to(self.counts.device)
        left = GroupSums(self.counts[own], self.first[own], torch.zeros_like(self.second))
        share = left.counts.sum() / self.counts.sum().clamp(min=1)
        return left._replace(second=self.scatter(centers) * share - left.scatter(centers[own]))

    def reduced(self, all_reduce: Callable[[Tensor], Tensor]) -> "GroupSums":
        """Those of the samples of all processes."""
        return GroupSums(*(all_reduce(tensor) if tensor.numel() else tensor for tensor in self))

    def to(self, device: torch.device) -> "GroupSums":
        """The same on a device."""
        return GroupSums(*(tensor.to(device) for tensor in self))

    @property
    def means(self) -> Tensor:
        """``(groups, d)`` float64; 0 of a group without samples."""
        return self.first / self.counts.clamp(min=1)[:, None]

    def scatter(self, centers: Tensor | None = None) -> Tensor:
        r"""Sums of outer products about centers.

        .. math:: \sum (x - c)(x - c)^T = \sum x x^T - c f^T - f c^T + n c c^T, \quad f = \sum x

        Args:
            centers: c of each group, ``(groups, d)`` float64; by default the means.

        Returns:
            of the shape of ``second``; shared second moments give the sum over all groups.
        """
        centers = self.means if centers is None else centers
        half = self.first - centers * (self.counts / 2)[:, None]
        if len(self.second) == len(self.counts):
            product = torch.einsum("gi,gj->gij", centers, half)
        else:
            product = (centers.T @ half)[None]
        return self.second - product - product.mT


def draw_held_out(samples: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Which samples are summed apart: a draw by a sample's own number, the same in every process.

    The numbers are multiplied by a constant modulo 2^32, so that classes that repeat with a period in
    the data are drawn alike.

    Args:
        samples: ``(n,)`` int64, the index of each in its task's data.
        fraction: of the samples, 0 to 1.
        seed: shifts the draw.

    Returns:
        ``(n,)`` bool.

    >>> draw_held_out(torch.arange(10), 0.2).nonzero().flatten().tolist()
    [4, 9]
    """
    scrambled = (samples + 1 + seed) % _WORD * _MULTIPLIER % _WORD
    return scrambled < fraction * _WORD
