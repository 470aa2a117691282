"""(IA)^3: a factor per output and task, trained by the optimizer."""

from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.adapters import Adapter
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.strategies.modes import TrainedMode
from bpn_lightning.tasks import Task

__all__ = ["IA3"]


class IA3(TrainedMode):
    r"""One factor per output of a layer and task: :math:`y = l_t \odot (W x + b)`.

    Liu, Tam, Muqeeth et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning" (2022), https://arxiv.org/abs/2205.05638, section 3.3: (IA)^3. Folded into a layer,
    the factors multiply the rows of W and b.

    Differs from the paper: all layers of the backbone have factors by default, not only keys, values
    and the inner layer of a perceptron; name these in ``layers`` for the paper's. What is trained is
    :math:`l_t - 1`, so weight decay pulls to the layer as it is. Recurrent layers can have none.

    Args:
        layers: which layers of the backbone have factors: names, wildcards such as
            ``"backbone.layer4.*"``, and kinds: ``linear``, ``conv``, ``attention``, ``norm``,
            ``embedding``. By default all of the first three kinds; where batch normalization follows directly, it has the factors in
            the place of the layer.

    State:
        in the module: (K,) and a bank of frozen ones (T, K) per layer of K outputs; a task stores 4 K
        bytes per layer. A task starts with factors of 1.
    """

    part = "scales"

    def attach(self, network: ContinualNetwork, layer: str) -> Adapter:
        """Scales."""
        return network.attach_scales(layer)

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Start from the network without factors."""
        for scales in self.parts.values():
            assert isinstance(scales, Adapter)
            scales.start(task.id, {})
