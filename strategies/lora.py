"""LoRA: an update of low rank per layer and task, trained by the optimizer."""

from collections.abc import Sequence

import torch

from bpn_lightning.checks import check_above_zero, check_positive_int
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.adapters import LowRank
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.modes import TrainedMode
from bpn_lightning.tasks import Task

__all__ = ["LoRA"]


class LoRA(TrainedMode):
    r"""An update of low rank per layer and task: :math:`y = (W + \frac{\alpha}{r} B_t A_t) x + b`.

    Hu, Shen, Wallis et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022),
    https://arxiv.org/abs/2106.09685, Eq. 3 and section 4.1. A is drawn, uniformly as in the authors' code,
    between plus and minus :math:`1 / \sqrt{n}`, and B starts at 0, so that a task starts as the network without an update.

    Differs from the paper: all linear, attention and convolutional layers of the backbone have an update by
    default, attention in all four projections. Convolutions in groups and recurrent layers can have none.

    Args:
        rank: r.
        alpha: the update is multiplied by alpha / r.
        layers: which layers of the backbone have an update: names, wildcards such as
            ``"backbone.layer4.*"``, and the kinds ``linear``, ``conv`` and ``attention``. By default all three.

    State:
        in the module, per layer of n inputs (:math:`C_{in} k_h k_w` of a convolution) and K outputs: A (r,
        n) and B (K, r), and a bank of frozen ones of T tasks; a task stores 4 r (n + K) bytes per layer,
        and for attention of width E 4 times 4 r (E + E).

    Raises:
        ConfigurationError: rank is below 1, alpha is not above 0, or a layer does not exist or can have
            no update.
    """

    part = "low_rank"

    def __init__(
        self, rank: int = 8, alpha: float = 8.0, *, layers: Sequence[str] | None = None
    ) -> None:
        check_positive_int("rank", rank, "1 to 8 are usual.")
        check_above_zero("alpha", alpha, "The update is multiplied by alpha / rank.")
        self.rank = rank
        self.alpha = alpha
        super().__init__(layers)

    def attach(self, network: ContinualNetwork, layer: str) -> LowRank:
        """A product of low rank."""
        low_rank = network.attach_low_rank(layer, self.rank)
        low_rank.scaling = self.alpha / self.rank
        return low_rank

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Draw A, identically on every process and after resuming; B is 0."""
        for name, low_rank in self.parts.items():
            assert isinstance(low_rank, LowRank)
            generator = seeded_generator("low rank", host.stream.seed, task.id, name)
            a = torch.rand(low_rank.get_parameter("A").shape, generator=generator) * 2 - 1
            low_rank.start(task.id, {"A": a / low_rank.inputs**0.5})
