"""What may run together: the Trainer's flags, the stream, the strategies.

One fit runs the whole stream, so a flag that cuts or repeats the stream would silently make another
experiment of it; ``docs/trainer_flags.md`` has the table. Strategies say what they are
(``projects``, ``needs_task_id``, ...), and what cannot be right together is refused before training.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, Optimizer

from bpn_lightning.errors import ConfigurationError, ExpectedForgettingWarning
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import ContinualHost, ContinualStream, Schedule

__all__ = [
    "check_batches",
    "check_composition",
    "check_launch",
    "check_optimizer",
    "check_phases",
    "check_precision",
    "check_repeated_evaluation",
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
    epochs = trainer.fit_loop.max_epochs
    refused = [
        type(callback).__name__
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping | StochasticWeightAveraging)
    ]
    return [
        (
            bool(trainer.fast_dev_run),  # type: ignore[attr-defined]
            "fast_dev_run",
            trainer.fast_dev_run,  # type: ignore[attr-defined]
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
            bool(trainer.overfit_batches),  # type: ignore[attr-defined]
            "overfit_batches",
            trainer.overfit_batches,  # type: ignore[attr-defined]
            "0",
            "It would replace each task's test data by training data. Use limit_train_batches.",
        ),
        (
            bool(refused),
            "callbacks",
            ", ".join(refused),
            "without EarlyStopping and StochasticWeightAveraging, which act on the whole stream",
            "ContinualModule(patience=...) stops each task early on the validation split.",
        ),
    ]


def _launch_rules(trainer: Trainer) -> Iterator[Rule]:
    """In this order: a later one may presuppose an earlier one."""
    strategy = trainer.strategy
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


def check_optimizer(
    trainer: Trainer,
    optimizer: Optimizer,
    strategies: Sequence[ContinualStrategy],
    stream: ContinualStream,
) -> None:
    """Refuse an optimizer that would do something else than it says beside these flags and strategies.

    Raises:
        ConfigurationError: names the optimizer, the rule and the remedy.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if scaled and fused and trainer.gradient_clip_val:
        raise ConfigurationError(
            "Expected the optimizer not to be fused where gradients are clipped in 16-mixed precision, "
            f"but got a fused {type(optimizer).__name__}. Set fused to False, or use bf16-mixed."
        )
    if isinstance(optimizer, LBFGS):
        _check_lbfgs(trainer, optimizer, strategies, stream)


def _check_lbfgs(
    trainer: Trainer,
    optimizer: Optimizer,
    strategies: Sequence[ContinualStrategy],
    stream: ContinualStream,
) -> None:
    """LBFGS compares gradients, and losses where it searches a line, from one point to the next."""
    search = optimizer.param_groups[0]["line_search_fn"]
    projecting = _names(s for s in strategies if s.projects)
    penalising = _names(s for s in strategies if _overrides(s, "penalty_grad"))
    for broken, what, why in (
        (
            trainer.accumulate_grad_batches > 1,
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}",
            "After its first look at an update's batches it would see the last of them only.",
        ),
        (
            getattr(trainer.precision_plugin, "scaler", None) is not None,
            f"precision={trainer.precision}",
            "A scaler takes one look at the gradients per update.",
        ),
        (
            bool(trainer.gradient_clip_val),
            f"gradient_clip_val={trainer.gradient_clip_val}",
            "It would take the curvature from clipped gradients.",
        ),
        (
            stream.reset_optimizer == "never",
            "reset_optimizer='never'",
            "What it remembers of the loss is of the task before.",
        ),
        (
            bool(projecting),
            " and ".join(projecting),
            "Projected gradients have no curvature, and its step is not along them.",
        ),
        (
            bool(search and penalising),
            f"{' and '.join(penalising)} with line_search_fn={search!r}",
            "It would search along a penalised gradient for the least of a loss without the penalty.",
        ),
    ):
        if broken:
            raise ConfigurationError(
                f"Expected the optimizer not to be LBFGS beside {what}, but got LBFGS. {why} "
                "Leave one of the two out."
            )


def check_repeated_evaluation(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse an optimizer that asks for an update's gradients again where they accumulate.

    Only LBFGS can be told before its first update; nothing is learned by then.

    Raises:
        ConfigurationError: names the optimizer, the flag and the remedy.
    """
    if trainer.accumulate_grad_batches > 1:
        raise ConfigurationError(
            "Expected trainer.accumulate_grad_batches to be 1 beside an optimizer that evaluates its "
            f"closure several times, but got {trainer.accumulate_grad_batches} beside "
            f"{type(optimizer).__name__}. It would see an update's last batch only. Use a larger "
            "batch_size."
        )


def check_batches(
    trainer: Trainer, network: nn.Module, tasks: int, smallest_batch: Callable[[int], int]
) -> None:
    """Refuse batches of which some process could not take the statistics.

    Args:
        trainer: before its fit begins.
        network: which may normalise batches.
        tasks: how many.
        smallest_batch: samples, over all processes, of the smallest batch of a task.

    Raises:
        ConfigurationError: names the layer, the task, its batch and the remedy.
    """
    together = getattr(trainer.strategy, "_layer_sync", None) is not None
    processes = 1 if together else trainer.world_size
    layers = [(n, part) for n, part in network.named_modules() if isinstance(part, _BatchNorm)]
    for name, layer in layers:
        # Features have one place per sample and channel; an image has many.
        needed = 2 if isinstance(layer, nn.BatchNorm1d) else 1
        for task in range(tasks if layer.training else 0):
            smallest = smallest_batch(task)
            if smallest // processes < needed:
                raise ConfigurationError(
                    f"Expected batch_size to leave every process {needed} or more samples of each batch "
                    f"where a layer (backbone.{name}) normalises batches, but task {task} has one of "
                    f"{smallest} for {processes} process{'es' if processes > 1 else ''}. Choose another "
                    "batch_size, or a layer that normalises each sample."
                )


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
    needing = _names(s for s in strategies if s.needs_task_id)
    if not host.stream.task_id_at_test and (needing or host.mask == "task"):
        raise ConfigurationError(
            "Expected no need of the task's id at test in a stream with task_id_at_test=False, but "
            f"{' and '.join(needing) or 'mask=' + repr(host.mask)} answers in the mode of a task. "
            "Set task_id_at_test to True, or choose another method."
        )
    _warn_of_forgetting(host, strategies)


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
