"""The base of modes that the optimizer trains: what tasks have of layers for themselves."""

from collections.abc import Sequence
from typing import ClassVar

from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensor_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.adapters import Adapter
from bpn_lightning.nn.layers import BiasUnits
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualStream, Task

__all__ = ["TrainedMode"]


class TrainedMode(ContinualStrategy):
    """A part of layers that each task has for itself; the optimizer trains it as it does weights.

    At the end of a task the part is frozen; the task's mode selects it.

    Args:
        layers: which layers have it: names, wildcards and kinds; None: the default.

    Raises:
        ConfigurationError: no layer is named, or one that does not exist or cannot have the part.
    """

    needs_task_id = True
    plain_first_task = False
    #: What layers are given: ``bias_units``, ``scales`` or ``low_rank``.
    part: ClassVar[str]

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        if layers is not None and not layers:
            raise ConfigurationError(
                "Expected layers to name at least one layer, but got none. Leave it out for the default."
            )
        self.layers = None if layers is None else list(layers)
        self.reset()

    def reset(self) -> None:
        """Drop the references to what the module's layers have."""
        self.parts: dict[str, BiasUnits | Adapter] = {}

    def attach(self, network: ContinualNetwork, layer: str) -> BiasUnits | Adapter:
        """Give a layer its part, or return that which it has."""
        raise NotImplementedError

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Attach the part to the selected layers."""
        names = host.network.layers_for(self.part, self.layers)
        if not names:
            raise ConfigurationError(
                f"Expected the backbone to have layers for {type(self).__name__}, but it has none that can "
                f"have {self.part.replace('_', ' ')}. Leave the strategy out, or use bitfit."
            )
        self.parts = {name: self.attach(host.network, name) for name in names}

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Freeze what the task has trained."""
        for part in self.parts.values():
            part.freeze()

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The parameters of the current task, and the banks."""
        parts = self.parts.values()
        return HeldTensors(
            training=[value for part in parts for value in part.parameters(recurse=False)],
            inference=[bank for part in parts for bank in part.buffers(recurse=False)],
        )

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """A row of each bank for every task, allocated for all; training: one more.

        The paper counts only the task's outputs of the head.
        """
        rows = {
            name: tensor_bytes(bank[0] for bank in part.buffers(recurse=False))
            for name, part in self.parts.items()
        }
        row = sum(rows.values())
        banks = len(host.network.tasks) * row
        head, classes = host.network.structure.num_classes, host.network.tasks[0].num_classes
        others = rows.get("head", 0) * (head - classes) // head
        return DeclaredBytes(banks + row, banks, row, row - others)
