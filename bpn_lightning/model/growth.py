"""A checkpoint of a stream that goes on, as one of the longer stream.

Whatever has the shape of a part of the network gets that part's new shape, in one place: what was learned is
its leading corner, and the rest is what the network starts from. With that, going on is resuming at the end of
a task, under a longer schedule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.model.host import Host
from bpn_lightning.model.optimization import Optimization
from bpn_lightning.nn.growing import grown
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.nn.structure import Structure
from bpn_lightning.preparation import differing_preparation, first_preparations
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.trainer.lightning import mark_epoch_finished
from bpn_lightning.trainer.schedulers import open_lengths

__all__ = ["grow_checkpoint", "grown_history", "is_continued"]

PREFIX = "network."


def is_continued(host: Host, structure: Structure) -> bool:
    """Whether the host's stream has more tasks than a checkpoint's."""
    return 0 < len(structure.tasks) < len(host.network.tasks)


def grow_checkpoint(
    host: Host,
    optimization: Optimization,
    checkpoint: dict[str, Any],
    saved: dict[str, Any],
    structure: Structure,
) -> Structure:
    """Give a checkpoint the shapes of a network that was built for a longer stream.

    Args:
        host: of the network, whose schedule is planned and whose strategies are configured.
        optimization: of the host.
        checkpoint: Lightning's; its entries are replaced, never written into.
        saved: our entry in it, likewise.
        structure: of the checkpoint.

    Returns:
        The structure that the checkpoint has by now.

    Raises:
        CheckpointError: the run stopped before its last task was learned, prepares inputs in another
            way, has another backbone or a larger head, or lacks the state of a strategy.
        ConfigurationError: a scheduler was as long as the stream that ended.
    """
    network = host.network
    _check_learned(saved["cursor"], structure)
    _check_alike(network, structure)
    _check_scheduler(host, optimization)
    learned = len(structure.tasks)
    for strategy in host.strategies:
        strategy.on_stream_growth(host, network.tasks[learned:])
    fresh = {name: value.detach() for name, value in _tensors(network.state_dict()).items()}
    weights = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}
    sizes = {name: value.shape for name, value in _tensors(weights).items()}
    _check_fixed_shapes(network, sizes, fresh)
    checkpoint["state_dict"] = {
        f"{PREFIX}{name}": value for name, value in _grown_tree(weights, fresh).items()
    }
    checkpoint["callbacks"] = {
        **checkpoint.get("callbacks", {}),
        **_grown_states(host.strategies, checkpoint.get("callbacks", {}), fresh),
    }
    if host.cursor.schedule.phase(learned - 1, saved["cursor"]["phase"]).trains != "strategy":
        checkpoint["optimizer_states"] = [
            _grown_optimizer(state, optimization, network, sizes)
            for state in checkpoint["optimizer_states"]
        ]
    mark_epoch_finished(checkpoint)
    saved["training_weights"] = _grown_tree(saved["training_weights"], fresh)
    saved["history"] = grown_history(saved["history"], learned, len(network.tasks))
    return replace(
        structure,
        tasks=list(network.tasks),
        num_classes=network.structure.num_classes,
        preparations=list(network.structure.preparations),
    )


# --- what has to be so ---------------------------------------------------------------------------


def _check_learned(cursor: Mapping[str, Any], structure: Structure) -> None:
    learned, tasks = cursor["closed"] + 1, len(structure.tasks)
    if learned < tasks:
        raise CheckpointError(
            f"Expected a run that has learned its {tasks} tasks before it continues with new ones, but got one "
            f"that stopped after {learned}. Resume it with its own stream first."
        )


def _check_alike(network: ContinualNetwork, structure: Structure) -> None:
    own = network.structure
    tasks = len(structure.tasks)
    if structure.num_classes > own.num_classes:
        raise CheckpointError(
            f"Expected a head of at least the checkpoint's {structure.num_classes} output units, but got "
            f"{own.num_classes}. Reserve as many classes as it did: reserve_classes={structure.num_classes}."
        )
    different = differing_preparation(
        first_preparations(structure.preparations, tasks),
        first_preparations(own.preparations, tasks),
    )
    if different:
        raise CheckpointError(
            f"Expected a stream that prepares the learned tasks as they were, {different[0]}, but got "
            f"{different[1]}. Give it their data and seed; module.extend takes a stream of new tasks."
        )


def _check_scheduler(host: Host, optimization: Optimization) -> None:
    make = optimization.scheduler
    names = [] if make is None else open_lengths(make)
    if names and host.stream.reset_optimizer == "never":
        raise ConfigurationError(
            f"Expected a scheduler of a length of its own where reset_optimizer is 'never' and a stream goes "
            f"on, but {names[0]} was that of the stream that has ended. Train with a scheduler whose "
            f"{names[0]} is given, or with reset_optimizer 'always'."
        )


def _check_fixed_shapes(
    network: ContinualNetwork, sizes: Mapping[str, Any], fresh: Mapping[str, Tensor]
) -> None:
    """Refuse another backbone: only what has something for each task or class may grow."""
    by_task = [
        f"{name}." for name, part in network.named_modules() if part in network.task_modules()
    ]
    growing = ("head.", "accuracy_matrix.", *by_task)
    for name, value in fresh.items():
        if name in sizes and sizes[name] != value.shape and not name.startswith(growing):
            raise CheckpointError(
                f"Expected the backbone of the run that goes on, but its {name} is of shape "
                f"{tuple(sizes[name])}, not {tuple(value.shape)}. Pass the backbone that it was made with."
            )


# --- what grows ----------------------------------------------------------------------------------


def _tensors(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in tree.items() if isinstance(value, Tensor)}


def _grown_tree(tree: Any, fresh: Mapping[str, Tensor], fill: bool = True) -> Any:
    """A copy of nested mappings in which tensors with a name of ``fresh`` have its shape.

    Args:
        tree: plain values and tensors.
        fresh: tensors of the network by name.
        fill: whether new entries are those of ``fresh``; else 0.
    """
    if not isinstance(tree, Mapping):
        return tree
    found: dict[Any, Any] = {}
    for key, value in tree.items():
        like = fresh.get(key) if isinstance(key, str) else None
        if isinstance(value, Tensor) and like is not None and value.shape != like.shape:
            larger = like if fill else like.new_zeros(like.shape)
            found[key] = grown(value, larger.to(value))
        else:
            found[key] = _grown_tree(value, fresh, fill)
    return found


def _grown_states(
    strategies: Sequence[ContinualStrategy], states: Mapping[str, Any], fresh: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The states of the strategies: weights continue with those of new rows, anything else with 0."""
    found = {}
    for strategy in strategies:
        key = strategy.state_key
        if key not in states:
            if strategy.state_dict():
                raise CheckpointError(
                    f"Expected a checkpoint with the state of {key!r}, which it needs to go on, but it has "
                    f"that of {', '.join(map(repr, states)) or 'no strategy'}. Pass a checkpoint of a run "
                    "with this strategy, with its training state."
                )
            continue
        held = strategy.weights_in_state
        found[key] = {
            name: _grown_tree({name: value}, fresh, fill=name in held)[name]
            for name, value in states[key].items()
        }
    return found


def _grown_optimizer(
    state: Mapping[str, Any],
    optimization: Optimization,
    network: ContinualNetwork,
    sizes: Mapping[str, Any],
) -> dict[str, Any]:
    """An optimizer's state with 0 for new entries, as it has for them when it is new."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    parameters = optimization.parameters()
    found = dict(state["state"])
    for index, of_parameter in state["state"].items():
        if not isinstance(index, int) or index >= len(parameters):
            continue
        parameter = parameters[index]
        old, new = sizes.get(names[id(parameter)]), parameter.shape
        if old is None or old == new:
            continue
        found[index] = {key: _grown_like(value, old, new) for key, value in of_parameter.items()}
    return {**state, "state": found}


def _grown_like(value: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """A tensor of a parameter that grew, also where it has one entry for a whole row or column."""
    if not isinstance(value, Tensor) or value.dim() != len(old):
        return value
    shape = [n if s == o else s for s, o, n in zip(value.shape, old, new, strict=True)]
    return grown(value, value.new_zeros(shape))


def grown_history(history: Mapping[str, Any], learned: int, tasks: int) -> dict[str, Any]:
    """Lists with a number for each task have None for those that were not there."""
    more = [None] * (tasks - learned)

    def longer(record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: [*value, *more] if isinstance(value, list) and len(value) == learned else value
            for key, value in record.items()
        }

    names = {"accuracy", "samples", "task_accuracy", "end_to_end", "mixture"}
    names |= {"own_class", "own_class_task_given"}
    grown_records = {
        key: [
            {**one, **longer({n: one[n] for n in names if n in one})}
            for one in history.get(key, ())
        ]
        for key in ("curve", "gate_scores")
    }
    return {**history, **grown_records}
