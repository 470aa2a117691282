"""Lightning's strategy for a frozen core whose weights are spread over processes."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh

from bpn_lightning.nn.sharding import full_state, shard, sharded_state
from bpn_lightning.trainer.lightning import UnwrappedDDPStrategy

__all__ = ["ShardedCoreStrategy"]


class ShardedCoreStrategy(UnwrappedDDPStrategy):
    """Spread a frozen core over processes, by torch's FSDP2; modes, head and gates stay whole in each.

    For networks whose weights do not fit into one device; for tasks that train ``modes`` or the ``head``
    alone. Each process holds a slice of the core's weights, of blocks and of what is left of the
    backbone, gathered where they are used. A batch is shared out as by DDP; results are those of one
    process. Checkpoints have whole tensors, and are those of any strategy.

    Lightning's ``ModelParallelStrategy`` is not used: to save an optimizer without a state, such as a fresh Adam, it
    takes a step with it (torch's ``get_optimizer_state_dict``), which changes the training; and only its first
    process has a checkpoint's weights.

    Args:
        process_group_backend: ``nccl`` or ``gloo``; None: what the device needs.
        timeout: of an operation between processes.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta = default_pg_timeout
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    def shard(self, network: nn.Module, backbone: nn.Module) -> None:
        """Shard a frozen backbone, of the first process's weights.

        Args:
            network: that the backbone is part of; all of it is the same on every process afterwards.
            backbone: changed in place.

        Raises:
            ConfigurationError: the backbone is a single layer.
        """
        device = self.root_device
        for tensor in (*network.parameters(), *network.buffers()):
            own = tensor.detach().to(device)
            torch.distributed.broadcast(own, 0)
            tensor.detach().copy_(own)
        shard(backbone, init_device_mesh(device.type, (self.world_size,)))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state with whole tensors, on every process."""
        return full_state(super().lightning_module_state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load a state with whole tensors, of which each process takes its slices."""
        module = self.lightning_module
        assert module is not None
        state = sharded_state(module, checkpoint["state_dict"])
        super().load_model_state_dict({**checkpoint, "state_dict": state}, strict)
