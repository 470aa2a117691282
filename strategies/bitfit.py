"""BitFit: a bias per layer and task, trained by the optimizer."""

import torch

from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.layers import BiasUnits
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.strategies.modes import TrainedMode
from bpn_lightning.tasks import Task

__all__ = ["BitFit"]


class BitFit(TrainedMode):
    r"""One bias per layer and task, trained as it is: :math:`y = W x + b + b_t`.

    Ben Zaken, Ravfogel, Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models" (2022), https://arxiv.org/abs/2106.10199. On a frozen core
    (``train="modes"``) it is their method for every task by itself. Where ``bd`` factorizes the bias and
    moves one factor by the sign of its gradient, here the optimizer trains the bias.

    Differs from the paper: layers without a bias have one too, and layer norms have none by default.

    Args:
        layers: which layers have biases: names (``"head"`` and names within ``backbone``), wildcards such
            as ``"backbone.layer4.*"``, and kinds: ``linear``, ``conv``, ``attention``, ``norm``,
            ``embedding``, ``recurrent``. By default all of the first three kinds; where batch
            normalization follows directly, it has the biases in the place of the layer.

    State:
        in the module: a bias (1, K) and a bank of frozen ones (T, K) per layer of K outputs; a task
        stores 4 K bytes per layer. A task starts with biases of 0.
    """

    part = "bias_units"

    def attach(self, network: ContinualNetwork, layer: str) -> BiasUnits:
        """Bias units without a factorization."""
        units = network.attach_bias_units(layer, rank=0)
        units.M.requires_grad_(False)  # there is none; an optimizer takes no empty parameter
        return units

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Start from the network without biases of its own."""
        for units in self.parts.values():
            assert isinstance(units, BiasUnits)
            units.start(task.id, torch.zeros_like(units.M), torch.zeros_like(units.W))
