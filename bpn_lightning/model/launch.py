"""What is refused before a stream is learned, and the schedule of its phases."""

from contextlib import nullcontext
from typing import Any, cast

from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.metrics.task_metrics import TaskMetrics
from bpn_lightning.model.host import Host
from bpn_lightning.model.optimization import Optimization
from bpn_lightning.model.task_loop import TaskLoop
from bpn_lightning.nn.execution import check_layers_are_called
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.sharding import check_whole, is_sharded
from bpn_lightning.nn.switching import switch_replaced
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.gates.base import TaskGate, check_gate_names
from bpn_lightning.tasks import Phase, Schedule, dry_inputs
from bpn_lightning.trainer.callbacks import check_callbacks, check_rate_monitor
from bpn_lightning.trainer.composition import check_composition, check_phases, check_precision
from bpn_lightning.trainer.flags import check_lengths, check_trainer
from bpn_lightning.trainer.launch import check_batches
from bpn_lightning.trainer.lightning import (
    callbacks_of,
    datamodule_of,
    is_compiled,
    reload_train_loader_every_epoch,
    set_max_epochs,
)
from bpn_lightning.trainer.optimizers import check_optimizer
from bpn_lightning.trainer.sharding import ShardedCoreStrategy

__all__ = [
    "check_fit",
    "check_strategies",
    "configure",
    "find_stream",
    "plan_schedule",
    "shard_core",
]


def find_stream(host: Host, stage: str) -> ContinualDataModule | None:
    """The trainer's stream; None where raw inputs are answered, which needs none.

    Args:
        host: whose trainer is asked.
        stage: of Lightning's ``setup``.

    Raises:
        ConfigurationError: the trainer has no stream, or a compiled module.
    """
    trainer = host.trainer
    if is_compiled(host.module):
        raise ConfigurationError(
            f"Expected trainer.{trainer.state.fn} to get the module itself, but got "
            "torch.compile(module), which is compiled again at every update. Compile its backbone: "
            "ContinualModule(torch.compile(backbone))."
        )
    stream: Any = datamodule_of(trainer)
    if stream is not None and hasattr(stream, "tasks"):
        return cast(ContinualDataModule, stream)
    if stage == "predict":
        return None
    verb = getattr(stage, "value", stage)  # Lightning's own are of an enumeration
    raise ConfigurationError(
        f"Expected trainer.{verb} to get a ContinualDataModule, whose batches say their task, but "
        f"got {'dataloaders alone' if stream is None else type(stream).__name__}. Pass a "
        "stream of bpn_lightning.datamodules; module.predict(images, task) answers other images."
    )


def configure(host: Host, stream: ContinualDataModule, stage: str) -> None:
    """Find the strategies, and build the network's structure with what they attach.

    Args:
        host: has a trainer, whose callbacks the strategies are.
        stream: that it will learn, or has learned.
        stage: of Lightning's ``setup``. Strategies forget earlier fits where one begins, and keep what
            they have where it goes on.

    Raises:
        ConfigurationError: network, stream and strategies do not fit together.
    """
    callbacks = callbacks_of(host.trainer)
    host.strategies = [c for c in callbacks if isinstance(c, ContinualStrategy)]
    gates = [strategy for strategy in host.strategies if isinstance(strategy, TaskGate)]
    check_gate_names(gates)
    if gates or stage == "fit":  # others answer by those that the module was loaded with
        host.gates = {gate.name: gate for gate in gates}
    host.attach(stream, grow=stage == "fit")
    if stage == "fit" and gates and all(_learns_alone(one) for one in host.strategies):
        host.plan_no_training()
    if stage != "fit" and host.classifier is not None:
        verb = getattr(stage, "value", stage)
        raise ConfigurationError(
            f"Expected trainer.{verb} to get a network that was trained, but gates are all that this module "
            "has learned. Call module.evaluate(), or module.predict(images)."
        )
    stream.follow(host.training_epoch)
    if stage == "fit":
        for strategy in host.strategies:
            strategy._token = host.token
            if host.network.opened < 0:
                strategy.reset()
    frozen = host.core.freezes(host.cursor.task)
    # A glance at a weight with spectral norm moves that norm's buffers in training mode.
    with evaluation_mode(host.network.backbone) if frozen else nullcontext():
        for strategy in host.strategies:
            strategy.configure(host, stream)
    host.network.switch(host.cursor.task)
    if stage == "fit":  # before processes share gradients, and optimizers are made
        host.core.begin_task(host.cursor.task)
    if not is_sharded(host.network.backbone):  # checked when it was not
        check_layers_are_called(host.network, dry_inputs(host.network.structure, 2, host.device))


def shard_core(host: Host) -> None:
    """Spread a frozen core over processes, where the trainer's strategy does so.

    Args:
        host: of a network that is built, before optimizers are made.

    Raises:
        ConfigurationError: tasks train the core, or it is sharded already and the strategy is another one.
    """
    if not host.has_trainer:  # of a module that is loaded
        return
    network, strategy = host.network, host.trainer.strategy
    if not isinstance(strategy, ShardedCoreStrategy):
        check_whole(network.backbone)
        return
    if is_sharded(network.backbone):
        return
    first = getattr(host.stream, "first_task", 0) if host.has_stream else 0
    trained = [task.id for task in network.tasks[first:] if not host.core.freezes(task.id)]
    if trained:
        choice = "train_first" if host.core.train != "all" else "train"
        raise ConfigurationError(
            f"Expected {choice} to be 'modes' or 'head' with ShardedCoreStrategy, which shards weights that "
            f"do not train, but got 'all', so task {trained[0]} trains them. Set {choice} to 'modes', or use the "
            "strategy 'ddp'."
        )
    host.core.keep_frozen()
    strategy.shard(network, network.backbone)


def _learns_alone(strategy: ContinualStrategy) -> bool:
    """Whether it needs no network that learns."""
    return isinstance(strategy, TaskGate) and strategy.modes == 0


def check_strategies(host: Host, optimization: Optimization) -> None:
    """Let strategies and the optimizer refuse each other, when the optimizer is there.

    Raises:
        ConfigurationError: names what does not fit.
    """
    trainer = host.trainer
    # A run that resumes in a strategy's own phase has that strategy's optimizer now.
    own = host.phase.trains == "strategy"
    optimizer = optimization.network_optimizer() if own else trainer.optimizers[0]
    check_optimizer(trainer, optimizer, host.strategies, host.stream)
    check_rate_monitor(trainer)
    for strategy in host.strategies:
        strategy.check(host, optimizer)


def plan_schedule(host: Host) -> None:
    """Lay out the phases of every task, as the strategies want them, of a network that learned nothing.

    Raises:
        ConfigurationError: the phases cannot be.
    """
    phases = []
    owners: dict[tuple[int, str], ContinualStrategy] = {}
    for task in host.network.tasks:
        of_task = [Phase("train", task.epochs)]
        for strategy in host.strategies:
            before = of_task
            of_task = strategy.phases(task, of_task)
            new = [phase.name for phase in of_task if phase not in before]
            owners |= {(task.id, name): strategy for name in new}
        phases.append(of_task)
    schedule = Schedule(phases)
    if host.classifier is None:
        check_phases(schedule, host.stream, host.trainer)
    host.cursor.plan(schedule)
    host.phase_owners = owners


def check_fit(host: Host, loop: TaskLoop, stream: ContinualDataModule) -> None:
    """Refuse what cannot be right, before training starts; plan what is not planned yet.

    Args:
        host: with its stream and its configured strategies.
        loop: of the host.
        stream: of the host.

    Raises:
        ConfigurationError: names what does not fit, and the remedy.
    """
    trainer, tasks, structure = host.trainer, host.network.tasks, host.network.structure
    host.sample_loss.without = structure.forgotten_columns
    host.sample_loss.check(structure.num_classes, structure.column_sets())
    if loop.metrics:
        processes = trainer.world_size
        several = [t for t in tasks if stream.has_data(t.id)] if processes > 1 else []
        firsts = (next(iter(stream.loader(task.id, "test"))).global_size for task in several)
        TaskMetrics(loop.metrics).check(structure.num_classes, firsts, processes)
    methods = [one for one in host.strategies if not isinstance(one, TaskGate)]
    check_composition(host, methods)  # gates look on, whatever trains
    host.core.check(host.strategies)
    planned = len(host.cursor.schedule.phases) == len(tasks)
    if host.network.opened < 0 or not planned:  # one that learned before keeps its schedule
        plan_schedule(host)
    patience = loop.early_stopping.patience
    if patience and not stream.has_validation:
        raise ConfigurationError(
            f"Expected validation_fraction to be more than 0 when patience is set, but "
            f"patience is {patience} and the stream has no validation split."
        )
    total = host.cursor.schedule.total
    check_trainer(trainer, total)
    check_callbacks(trainer)
    check_precision(trainer, host.strategies)
    if host.classifier is not None:
        if loop.metrics:
            raise ConfigurationError(
                "Expected metrics to be None where gates are all that learns, since they give no "
                f"probabilities of all classes, but got {', '.join(loop.metrics)}. Leave metrics out."
            )
        set_max_epochs(trainer, -1)  # the task loop ends it; Lightning skips a fit of 0 epochs
        return
    first = stream.first_task
    held_out = len(stream.loader(first, "val")) if stream.has_validation else 0
    optimization = loop.optimization
    check_lengths(trainer, *optimization.count_updates(), held_out)
    switch_replaced(host.network)  # the trainer may have synchronized batch normalization
    inputs = dry_inputs(structure, 1, host.device)
    ahead = [task.id for task in tasks[first:]]
    check_batches(trainer, host.network.backbone, inputs, ahead, optimization.smallest_batch)
    set_max_epochs(trainer, total)
    reload_train_loader_every_epoch(trainer)
