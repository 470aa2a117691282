"""Checks of the number of processes, how they are started, and what each of them stores."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.trainer.lightning import (
    ddp_communication_hook,
    ddp_options,
    layer_sync,
    model_averaging_period,
    start_method,
)
from bpn_lightning.trainer.sharding import ShardedCoreStrategy

__all__ = ["Rule", "check_batches", "check_launch", "refuse"]

#: Whether a rule is violated, then flag, value, rule and remedy.
Rule = tuple[bool, str, object, str, str]

PRECISIONS = ("64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


def check_launch(trainer: Trainer) -> None:
    """Refuse unsupported strategies, launchers, numbers of processes and precisions.

    Lightning calls no hook of a module before it starts processes; code that creates a trainer can call
    this earlier.

    Args:
        trainer: before its fit begins.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    refuse(_launch_rules(trainer))


def refuse(rules: Iterable[Rule]) -> None:
    """Refuse the first flag that violates its rule.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    for broken, flag, value, rule, remedy in rules:
        if broken:
            raise ConfigurationError(
                f"Expected trainer.{flag} to be {rule}, but got {value}. {remedy}"
            )


def _launch_rules(trainer: Trainer) -> Iterator[Rule]:
    """The rules in order, since later ones may depend on earlier ones."""
    strategy = trainer.strategy
    yield (
        isinstance(strategy, XLAStrategy | SingleDeviceXLAStrategy),
        "strategy",
        type(strategy).__name__,
        "one for a CPU or GPUs",
        "XLA compiles whole updates, and no method was tested on it. Use accelerator 'cpu' or 'cuda'.",
    )
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    yield (
        not whole or isinstance(strategy, DeepSpeedStrategy),
        "strategy",
        type(strategy).__name__,
        "'auto' or 'ddp'",
        (
            "Methods need whole parameters. Where tasks leave the core as it is (train 'modes' or 'head'), "
            "bpn_lightning.trainer.sharding.ShardedCoreStrategy shards it by FSDP2."
        ),
    )
    method = start_method(trainer)
    yield (
        method is not None,
        "strategy",
        f"one that starts processes by {method!r}",
        "'auto' or 'ddp'",
        (
            "Memories, importances and accuracies would be lost when the processes end, since Lightning "
            "returns only the weights from them. Run a script with 'ddp'; in a notebook use "
            "devices=1."
        ),
    )
    started = _started_processes()
    yield (
        started > 1 and started != trainer.num_devices * trainer.num_nodes,
        "devices * num_nodes",
        f"{trainer.num_devices} * {trainer.num_nodes}",
        f"{started}, the number of processes that were started",
        "Set devices to the processes per machine, num_nodes to the machines, and strategy to 'ddp'.",
    )
    period = model_averaging_period(trainer)
    yield (
        period is not None,
        "strategy",
        f"DDPStrategy(model_averaging_period={period})",
        "one that averages gradients",
        (
            "Between averages, weights, memories and importances would differ between processes. "
            "Leave it out."
        ),
    )
    hook = ddp_communication_hook(trainer)
    yield (
        hook is not None,
        "strategy",
        f"DDPStrategy(ddp_comm_hook={getattr(hook, '__name__', hook)})",
        "one without a communication hook",
        "The gradient would differ from that of a single process. Leave it out.",
    )
    yield (
        bool(ddp_options(trainer).get("static_graph")) and trainer.accumulate_grad_batches > 1,
        "strategy",
        "DDPStrategy(static_graph=True)",
        "without a static graph when gradients accumulate",
        "torch fails with an internal assertion. Leave static_graph or accumulate_grad_batches out.",
    )
    yield (
        isinstance(strategy, ShardedCoreStrategy) and layer_sync(trainer) is not None,
        "sync_batchnorm",
        True,
        "off with ShardedCoreStrategy",
        "A frozen core is in evaluation mode, and needs no statistics of batches. Leave it out.",
    )
    yield (
        isinstance(layer_sync(trainer), TorchSyncBatchNorm)
        and trainer.world_size > 1
        and strategy.root_device.type == "cpu",
        "sync_batchnorm",
        True,
        "off on the CPU",
        "torch.nn.SyncBatchNorm needs a GPU. Leave it out, or use layers that normalize each sample.",
    )
    yield (
        trainer.precision not in PRECISIONS,
        "precision",
        trainer.precision,
        f"one of {', '.join(PRECISIONS)}",
        "Others replace layers, which strategies do not support.",
    )


def _started_processes() -> int:
    """The number of processes started by torchrun or srun; 0 if Lightning may start them itself."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "0"))


def check_batches(
    trainer: Trainer,
    network: nn.Module,
    inputs: Tensor,
    tasks: Iterable[int],
    smallest_batch: Callable[[int], int],
) -> None:
    """Refuse batches that are too small for batch normalization on some process.

    Args:
        trainer: before its fit begins.
        network: the network, with or without batch normalization.
        inputs: ``(1, ...)``, for a dry forward pass.
        tasks: their numbers.
        smallest_batch: maps a task to the number of samples, over all processes, in its smallest batch.

    Raises:
        ConfigurationError: names the layer, the task, its batch and the remedy.
    """
    together = layer_sync(trainer) is not None
    processes = 1 if together else trainer.world_size
    layers = {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, _BatchNorm) and part.training
    }
    if not layers:
        return
    values = _values_per_channel(network, inputs, layers)
    for name in layers:
        needed = 2 if values.get(name) == 1 else 1
        for task in tasks:
            smallest = smallest_batch(task)
            if smallest // processes < needed:
                raise ConfigurationError(
                    f"Expected batch_size to leave every process at least {needed} samples of each batch "
                    f"when a layer (backbone.{name}) normalizes batches, but task {task} has a batch of "
                    f"{smallest} for {processes} process{'es' if processes > 1 else ''}. Choose another "
                    "batch_size, or a layer that normalizes each sample."
                )


def _values_per_channel(
    network: nn.Module, inputs: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, int]:
    """The number of values per sample and channel for each layer: 1 for features, many for images."""
    found = {}

    def count(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0][:, 0].numel()

    handles = [
        layer.register_forward_pre_hook(partial(count, name)) for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), evaluation_mode(network):
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
