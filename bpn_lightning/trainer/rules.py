"""What may run together: the Trainer's flags, the stream, the strategies.

One fit runs the whole stream, so a flag that cuts or repeats the stream would silently make another
experiment of it; ``docs/trainer_flags.md`` has the table. Strategies say what they are
(``projects``, ``needs_task_id``, ...), and what cannot be right together is refused before training.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bpn_lightning.errors import ConfigurationError, ExpectedForgettingWarning
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualHost, ContinualStream, Schedule

__all__ = [
    "check_batches",
    "check_composition",
    "check_launch",
    "check_lengths",
    "check_phases",
    "check_precision",
    "check_trainer",
]

#: Whether a rule is broken, then flag, value, rule and remedy.
Rule = tuple[bool, str, object, str, str]

PRECISIONS = ("64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


def check_trainer(trainer: Trainer, total_epochs: int) -> None:
    """Refuse, by name, every flag that contradicts the stream.

    Args:
        trainer: before its fit begins.
        total_epochs: of the stream.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    _refuse(_rules(trainer, total_epochs))
    check_launch(trainer)


def check_launch(trainer: Trainer) -> None:
    """Refuse, by name, what concerns how many processes there are and what each of them holds.

    Lightning asks no module before it starts processes of its own: whoever makes a trainer may ask here
    before that.

    Args:
        trainer: before its fit begins.

    Raises:
        ConfigurationError: names the flag, its rule, its value and the remedy.
    """
    _refuse(_launch_rules(trainer))


def _refuse(rules: Iterable[Rule]) -> None:
    for broken, flag, value, rule, remedy in rules:
        if broken:
            raise ConfigurationError(
                f"Expected trainer.{flag} to be {rule}, but got {value}. {remedy}"
            )


def _rules(trainer: Trainer, total: int) -> list[Rule]:
    flags: Any = trainer  # Lightning sets most of them elsewhere, unseen by type checkers
    epochs, several = trainer.fit_loop.max_epochs, trainer.accumulate_grad_batches
    clip, seconds = trainer.gradient_clip_val, _max_seconds(trainer)
    every, within = trainer.check_val_every_n_epoch, _val_check_interval(trainer)
    return [
        (
            bool(flags.fast_dev_run),
            "fast_dev_run",
            flags.fast_dev_run,
            "off",
            "It would end the stream inside its first task. Use epochs_per_task=1 for a short run.",
        ),
        (
            epochs not in (-1, total),
            "max_epochs",
            epochs,
            f"-1, the length of the stream ({total} epochs)",
            f"Pass max_epochs=-1 or {total} (unset, Lightning makes it 1000).",
        ),
        (
            (trainer.min_epochs or 0) > total,
            "min_epochs",
            trainer.min_epochs,
            f"at most the stream's {total} epochs",
            "The stream would end before. Leave it out, or raise epochs_per_task.",
        ),
        (
            trainer.max_steps == 0,
            "max_steps",
            0,
            "at least 1, or -1 for the whole stream",
            "Nothing would be learned. Leave it out.",
        ),
        (
            seconds is not None and seconds <= 0,
            "max_time",
            f"{seconds} seconds",
            "more than 0 seconds",
            "Nothing would be learned. Leave it out.",
        ),
        (
            bool(flags.overfit_batches),
            "overfit_batches",
            flags.overfit_batches,
            "0",
            "It would replace each task's test data by training data. Use limit_train_batches.",
        ),
        (
            flags.limit_train_batches == 0,
            "limit_train_batches",
            flags.limit_train_batches,
            "more than 0",
            "Nothing would be learned. Leave it out; trainer.test evaluates without training.",
        ),
        (
            not isinstance(several, int) or several < 1,
            "accumulate_grad_batches",
            several,
            "a whole number of at least 1",
            "1 updates after every batch.",
        ),
        (
            clip is not None and not clip >= 0,
            "gradient_clip_val",
            clip,
            "at least 0",
            "Lightning would clip nothing, or fail. Leave it out for no clipping.",
        ),
        (
            every is not None and every < 1,
            "check_val_every_n_epoch",
            every,
            "at least 1",
            "Use limit_val_batches=0 for no validation.",
        ),
        (
            isinstance(within, int) and within < 1,
            "val_check_interval",
            within,
            "at least 1 batch, a fraction of an epoch, or a time",
            "Use limit_val_batches=0 for no validation.",
        ),
        (
            flags.reload_dataloaders_every_n_epochs > 1,
            "reload_dataloaders_every_n_epochs",
            flags.reload_dataloaders_every_n_epochs,
            "0 or 1",
            "Every epoch has its own loader, in the order of its task. Leave it out.",
        ),
    ]


def _max_seconds(trainer: Trainer) -> float | None:
    """The shortest time of a Timer, which is what max_time becomes."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    limits = [timer._duration for timer in timers if timer._duration is not None]
    return min(limits, default=None)


def _val_check_interval(trainer: Trainer) -> int | float | None:
    """Batches, or a fraction of an epoch; None where it is a time, which Lightning keeps elsewhere."""
    return getattr(trainer, "val_check_interval", None)


def check_lengths(
    trainer: Trainer, batches: Sequence[int], updates: int, validation_batches: int
) -> None:
    """Refuse what Lightning would find out when a later task begins, or never.

    Args:
        trainer: before its fit begins.
        batches: of an epoch of each task.
        updates: of the whole stream.
        validation_batches: of the first task; 0 where nothing is held out.

    Raises:
        ConfigurationError: names the flag, the task and the remedy.
    """
    limit, least = trainer.limit_train_batches, trainer.min_steps or 0
    shortest = min(batches)
    task, within = batches.index(shortest), _val_check_interval(trainer)
    checks = trainer.limit_val_batches and trainer.check_val_every_n_epoch is not None
    _refuse(
        [
            (
                shortest == 0,
                "limit_train_batches",
                f"{limit}, which leaves it none",
                f"a number that leaves task {task} a batch",
                "Raise it, or lower batch_size.",
            ),
            (
                0 < validation_batches * trainer.limit_val_batches < 1,
                "limit_val_batches",
                f"{trainer.limit_val_batches}, which leaves it none",
                "0, or a number that leaves task 0 a batch",
                "Raise it, or lower eval_batch_size.",
            ),
            (
                least > updates,
                "min_steps",
                least,
                f"at most the stream's {updates} updates",
                "The stream would end before. Leave it out, or raise epochs_per_task.",
            ),
            (
                bool(checks) and isinstance(within, int) and within > shortest,
                "val_check_interval",
                within,
                f"at most the {shortest} batches of an epoch of task {task}",
                "Lower it, use a fraction, or check_val_every_n_epoch=null to count over epochs.",
            ),
        ]
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
        "Sharded parameters cannot be penalised, biased or restored one by one.",
    )
    starts = isinstance(strategy.launcher, _MultiProcessingLauncher)
    name = strategy.launcher._start_method if starts else ""  # type: ignore[union-attr]
    yield (
        starts,
        "strategy",
        f"one that starts processes by {name!r}",
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
    yield (
        getattr(strategy, "_model_averaging_period", None) is not None,
        "strategy",
        f"DDPStrategy(model_averaging_period={getattr(strategy, '_model_averaging_period', None)})",
        "one that averages gradients",
        (
            "Between averages every process would have weights, memories and importances of its own. "
            "Leave it out."
        ),
    )
    hook = getattr(strategy, "_ddp_comm_hook", None)
    yield (
        hook is not None,
        "strategy",
        f"DDPStrategy(ddp_comm_hook={getattr(hook, '__name__', hook)})",
        "one without a communication hook",
        "Processes would not follow the gradient that one process follows. Leave it out.",
    )
    yield (
        bool(getattr(strategy, "_ddp_kwargs", {}).get("static_graph"))
        and trainer.accumulate_grad_batches > 1,
        "strategy",
        "DDPStrategy(static_graph=True)",
        "without a static graph where gradients accumulate",
        "torch stops on an internal assertion. Leave static_graph or accumulate_grad_batches out.",
    )
    yield (
        isinstance(getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm)
        and trainer.world_size > 1
        and strategy.root_device.type == "cpu",
        "sync_batchnorm",
        True,
        "off on the CPU",
        "torch.nn.SyncBatchNorm needs a GPU. Leave it out, or use layers that normalise each sample.",
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


def check_precision(trainer: Trainer, strategies: Sequence[ContinualStrategy]) -> None:
    """Refuse weights of half precision beside strategies that measure or add up what they lose.

    Raises:
        ConfigurationError: names the strategies and the remedy.
    """
    measuring = _names(s for s in strategies if s.needs_full_precision)
    if measuring and trainer.precision in ("bf16-true", "16-true"):
        raise ConfigurationError(
            f"Expected trainer.precision to keep weights in full precision beside "
            f"{' and '.join(measuring)}, but got {trainer.precision}: sums of small numbers would be "
            f"lost. Use {trainer.precision.replace('true', 'mixed')}."
        )


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
        network: which may normalise batches.
        inputs: ``(1, ...)``, for a dry forward.
        tasks: how many.
        smallest_batch: samples, over all processes, of the smallest batch of a task.

    Raises:
        ConfigurationError: names the layer, the task, its batch and the remedy.
    """
    together = getattr(trainer.strategy, "_layer_sync", None) is not None
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
                    f"where a layer (backbone.{name}) normalises batches, but task {task} has one of "
                    f"{smallest} for {processes} process{'es' if processes > 1 else ''}. Choose another "
                    "batch_size, or a layer that normalises each sample."
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


def check_composition(host: ContinualHost, strategies: Sequence[ContinualStrategy]) -> None:
    """Refuse strategies that contradict each other or the stream, by what they declare.

    Raises:
        ConfigurationError: names them, the rule and the remedy.
    """
    keys = Counter(strategy.state_key for strategy in strategies)
    twice = [type(s).__name__ for s in strategies if keys[s.state_key] > 1]
    if twice:
        raise ConfigurationError(
            f"Expected every strategy once, but got {twice[0]} {len(twice)} times. "
            "Remove all but one."
        )
    alone = _names(s for s in strategies if s.exclusive)
    if alone and len(strategies) > 1:
        raise ConfigurationError(
            f"Expected {alone[0]} to be the only strategy, but got {' and '.join(_names(strategies))}. "
            f"Remove {alone[0]}, or all the others."
        )
    for what, several in (
        ("projects gradients", _names(s for s in strategies if s.projects)),
        ("merges weights", _names(s for s in strategies if _overrides(s, "merged_weights"))),
    ):
        if len(several) > 1:
            raise ConfigurationError(
                f"Expected at most one strategy that {what}, but got {' and '.join(several)}. "
                "Remove all but one."
            )
    projecting = _names(s for s in strategies if s.projects)
    correcting = _names(s for s in strategies if s.corrects_weights)
    if projecting and correcting:
        raise ConfigurationError(
            f"Expected no strategy to move weights after the step beside {projecting[0]}, which makes "
            f"sure of the step's direction, but got {correcting[0]} with update 'proximal'. "
            "Set its update to 'clamped' or 'gradient'."
        )
    if len(correcting) > 1:
        raise ConfigurationError(
            "Expected at most one strategy to move shared weights after the step, as each would undo part "
            f"of the other's, but got {' and '.join(correcting)} with update 'proximal'. "
            "Set the update of all but one to 'clamped' or 'gradient'."
        )
    needing = _names(s for s in strategies if s.needs_task_id)
    if not host.stream.task_id_at_test and (needing or host.mask == "task"):
        raise ConfigurationError(
            "Expected no need of the task's id at test in a stream with task_id_at_test=False, but "
            f"{' and '.join(needing) or 'mask=' + repr(host.mask)} answers in the mode of a task. "
            "Set task_id_at_test to True, or choose another method."
        )
    _warn_of_forgetting(host, strategies)
    _warn_of_lone_classes(host)


def _warn_of_forgetting(host: ContinualHost, strategies: Sequence[ContinualStrategy]) -> None:
    number = len(host.tasks)
    single_head = host.mask in ("all", "seen") and number > 1
    if single_head and any(s.regulariser for s in strategies):
        if not all(s.regulariser for s in strategies):
            return
        warnings.warn(
            f"{' and '.join(_names(strategies))} with one head over the classes of all tasks and no "
            f"task id is expected to forget all but the last task, and to end near 1/{number} = "
            f"{1 / number:.2f} of accuracy. mask='task' or --method bd+... use the task's id.",
            ExpectedForgettingWarning,
            stacklevel=2,
        )


def _warn_of_lone_classes(host: ContinualHost) -> None:
    """Where only one class can be the answer, it is always right."""
    one = [
        task.name
        for task in host.tasks
        if (task.num_classes if host.mask == "task" else host.stream.num_classes) == 1
    ]
    if one:
        remedy = "mask='all' or 'seen' choose among the classes of several tasks"
        if host.mask != "task":
            remedy = "Add classes"
        warnings.warn(
            f"With mask={host.mask!r}, {len(one)} of {len(host.tasks)} tasks, such as {one[0]!r}, have one "
            f"class to choose from: their loss is 0 and their accuracy 1.0 before and after any training, "
            f"and mean nothing. {remedy}, or give each task two or more classes.",
            stacklevel=2,
        )


def check_phases(schedule: Schedule, stream: ContinualStream, trainer: Trainer) -> None:
    """Refuse a schedule whose phases cannot be told apart, have no updates, or do not suit the trainer.

    Raises:
        ConfigurationError: names the phase, the rule and the remedy.
    """
    for task, phases in enumerate(schedule.phases):
        names = Counter(phase.name for phase in phases)
        for phase in phases:
            if names[phase.name] > 1:
                raise ConfigurationError(
                    f"Expected the phases of a task to have names of their own, but task {task} has "
                    f"{phase.name!r} {names[phase.name]} times. Remove one of the strategies."
                )
            if phase.epochs < 1:
                raise ConfigurationError(
                    f"Expected every phase to have at least 1 epoch, but {phase.name!r} of task {task} "
                    f"has {phase.epochs}. Leave the phase out, or give it epochs."
                )
            if phase.trains == "strategy" and stream.reset_optimizer == "never":
                raise ConfigurationError(
                    "Expected reset_optimizer to be 'always' where a phase has an optimizer of its own, "
                    f"as {phase.name!r} of task {task} has, but got 'never'. "
                    "Set it to 'always'."
                )
            if (
                phase.trains == "strategy"
                and trainer.accumulate_grad_batches > 1
                and getattr(trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters")
            ):
                raise ConfigurationError(
                    "Expected trainer.strategy to be without find_unused_parameters where gradients "
                    f"accumulate and a phase trains a strategy, as {phase.name!r} of task {task} does: "
                    "torch would take every parameter as unused, twice. Use 'ddp'."
                )


def _names(strategies: Iterable[ContinualStrategy]) -> list[str]:
    return [type(strategy).__name__ for strategy in strategies]


def _overrides(strategy: ContinualStrategy, hook: str) -> bool:
    return getattr(type(strategy), hook) is not getattr(ContinualStrategy, hook)
