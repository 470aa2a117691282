"""How many processes a run may have, what starts them, and what each of them holds."""

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

__all__ = ["Rule", "check_batches", "check_launch", "refuse"]

#: Whether a rule is broken, then flag, value, rule and remedy.
Rule = tuple[bool, str, object, str, str]

PRECISIONS = ("64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


def check_launch(trainer: Trainer) -> None:
    """Refuse, by name, what concerns how many processes there are and what each of them holds.

    Lightning asks no module before it starts processes of its own: whoever makes a trainer may ask here
    before that.

    Args:
        trainer: before its fit begins.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    refuse(_launch_rules(trainer))


def refuse(rules: Iterable[Rule]) -> None:
    """Refuse the first flag that breaks its rule.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    for broken, flag, value, rule, remedy in rules:
        if broken:
            raise ConfigurationError(
                f"Expected trainer.{flag} to be {rule}, but got {value}. {remedy}"
            )


def _launch_rules(trainer: Trainer) -> Iterator[Rule]:
    """In this order: a later one may presuppose an earlier one."""
    strategy = trainer.strategy
    yield (
        isinstance(strategy, XLAStrategy | SingleDeviceXLAStrategy),
        "strategy",
        type(strategy).__name__,
        "one for a CPU or GPUs",
        "XLA compiles whole updates, and no method was tried on it. Use accelerator 'cpu' or 'cuda'.",
    )
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    yield (
        not whole or isinstance(strategy, DeepSpeedStrategy),
        "strategy",
        type(strategy).__name__,
        "'auto' or 'ddp'",
        "Sharded parameters cannot be penalized, biased or restored one by one.",
    )
    method = start_method(trainer)
    yield (
        method is not None,
        "strategy",
        f"one that starts processes by {method!r}",
        "'auto' or 'ddp'",
        (
            "Their memories, importances and accuracies would be lost when they end: of what such processes "
            "learn, Lightning brings back the weights alone. Run a script with 'ddp'; in a notebook use "
            "devices=1."
        ),
    )
    started = _started_processes()
    yield (
        started > 1 and started != trainer.num_devices * trainer.num_nodes,
        "devices * num_nodes",
        f"{trainer.num_devices} * {trainer.num_nodes}",
        f"{started}, as many processes as were started",
        "Set devices to the processes of a machine, num_nodes to the machines, and strategy to 'ddp'.",
    )
    period = model_averaging_period(trainer)
    yield (
        period is not None,
        "strategy",
        f"DDPStrategy(model_averaging_period={period})",
        "one that averages gradients",
        (
            "Between averages every process would have weights, memories and importances of its own. "
            "Leave it out."
        ),
    )
    hook = ddp_communication_hook(trainer)
    yield (
        hook is not None,
        "strategy",
        f"DDPStrategy(ddp_comm_hook={getattr(hook, '__name__', hook)})",
        "one without a communication hook",
        "Processes would not follow the gradient that one process follows. Leave it out.",
    )
    yield (
        bool(ddp_options(trainer).get("static_graph")) and trainer.accumulate_grad_batches > 1,
        "strategy",
        "DDPStrategy(static_graph=True)",
        "without a static graph where gradients accumulate",
        "torch stops on an internal assertion. Leave static_graph or accumulate_grad_batches out.",
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
        "Others put layers of their own in the place of those that strategies know.",
    )


def _started_processes() -> int:
    """How many torchrun or srun has started; 0 where neither has, so that Lightning may start some."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "0"))


def check_batches(
    trainer: Trainer,
    network: nn.Module,
    inputs: Tensor,
    tasks: int,
    smallest_batch: Callable[[int], int],
) -> None:
    """Refuse batches of which some process could not take the statistics.

    Args:
        trainer: before its fit begins.
        network: which may normalize batches.
        inputs: ``(1, ...)``, for a dry forward.
        tasks: how many.
        smallest_batch: samples, over all processes, of the smallest batch of a task.

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
        for task in range(tasks):
            smallest = smallest_batch(task)
            if smallest // processes < needed:
                raise ConfigurationError(
                    f"Expected batch_size to leave every process {needed} or more samples of each batch "
                    f"where a layer (backbone.{name}) normalizes batches, but task {task} has one of "
                    f"{smallest} for {processes} process{'es' if processes > 1 else ''}. Choose another "
                    "batch_size, or a layer that normalizes each sample."
                )


def _values_per_channel(
    network: nn.Module, inputs: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, int]:
    """How many values each layer gets of a sample and channel: 1 of features, many of an image."""
    found = {}

    def look(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0][:, 0].numel()

    handles = [
        layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), evaluation_mode(network):
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
