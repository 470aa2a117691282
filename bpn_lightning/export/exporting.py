"""Export of a trained network to a bundle: a folder of files without code, one small folder for each task.

:mod:`bpn_lightning.modes.bundle` draws the folder. A checkpoint resumes a run; a bundle is for distribution.
New tasks continue from either, but a bundle has the training state (of the optimizer, of the strategies, of
random numbers) only where that is asked for. It names its network where that is one of torch's layers or of this package; otherwise the
network is the reader's own code.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpn_lightning.errors import (
    BPNLightningError,
    CheckpointError,
    ConfigurationError,
    ResultsError,
)
from bpn_lightning.metrics.accuracy_matrix import AccuracyMatrix
from bpn_lightning.model.extending import extension_of
from bpn_lightning.model.gates import describe_gates, rebuild_gates
from bpn_lightning.model.learned_by import LearnedBy
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.modes import bundle as files
from bpn_lightning.modes.bundle import (
    Bundle,
    check_task_name,
    explained,
    progress_of,
    read_bundle,
    structure_of,
    task_records,
    write_bundle,
)
from bpn_lightning.modes.card import write_card
from bpn_lightning.modes.gates import split_gate
from bpn_lightning.modes.joining import from_backbone, gate_records, parts_of
from bpn_lightning.modes.networks import describe_network
from bpn_lightning.modes.plain_values import set_aside
from bpn_lightning.modes.splitting import ACCURACY, fill, split
from bpn_lightning.modes.training_state import (
    PREFIX,
    has_training_state,
    held_weights,
    write_training_state,
)
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.pretrained import Origin, Pretrained, with_origin
from bpn_lightning.nn.sharding import check_whole
from bpn_lightning.nn.structure import Structure
from bpn_lightning.nn.weights import hash_of
from bpn_lightning.run.dashboards import Dashboard
from bpn_lightning.run.recording import LastCheckpoint
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.tasks import Past

__all__ = [
    "bundle_of",
    "export_module",
    "load_exported",
    "past_of_export",
    "restore_exported",
    "task_names",
    "write_training_state_of",
]


def export_module(
    module: ContinualModule,
    folder: str | os.PathLike[str],
    *,
    include_pretrained: bool = False,
    names: Sequence[str] | None = None,
    network: Mapping[str, Any] | None = None,
    training_state: bool = False,
) -> Path:
    """Write a module that has learned tasks as a bundle; the folder appears only when it is complete.

    If merged weights, such as IMM's, are swapped in, they are written.

    Args:
        module: with a stream, from :class:`~lightning.Trainer` or a checkpoint.
        folder: a new folder.
        include_pretrained: whether to write pretrained weights whose license is not known, too. If not, they
            are named by their package and hash, and ``load_exported`` takes them from its backbone.
        names: of the tasks that are not forgotten, in order, which become names of folders; by default
            ``task_1`` and so on.
        network: how to make the backbone, ``{"class_path": ..., "init_args": {...}}``, for readers that
            are not given one. By default networks of torch's layers one after another are described.
        training_state: whether to write what any strategy goes on from, too: importances, memories with samples
            of the training data, teachers, the optimizer. Without it, those that need none of this go on.

    Returns:
        The folder.

    Raises:
        ConfigurationError: the folder exists, the module has no head yet or is sharded, names are too few or
            no names of folders, or pretrained weights that would be left out were trained.
        CheckpointError: there is no training state, or it still holds a task that was forgotten.
        ResultsError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise _taken(folder)
    if module.network.head is None:
        raise ConfigurationError(
            "Expected a module that has learned tasks, but it has no head yet. Export it after "
            "trainer.fit, or after load_from_checkpoint."
        )
    check_whole(module.network.backbone)
    checkpoint = extension_of(module).training_state() if training_state else None
    bundle = bundle_of(module, include_pretrained, names)
    bundle.record["network"] = describe_network(module.backbone) if network is None else network
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.export")
    try:
        temporary.mkdir(parents=True)
        write_bundle(bundle, temporary)
        if checkpoint is not None:
            write_training_state_of(module, bundle, checkpoint, temporary)
        write_card(temporary, bundle)
        temporary.rename(folder)
    except BaseException as error:  # also Ctrl-C; safetensors has its own error for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        if isinstance(error, BPNLightningError):
            raise
        if folder.exists():
            raise _taken(folder) from error  # created by another process in the meantime
        raise ResultsError(
            f"Expected to write {folder}, but got: {error}. Free some space or grant write access."
        ) from error
    return folder


def bundle_of(
    module: ContinualModule, include_pretrained: bool = False, names: Sequence[str] | None = None
) -> Bundle:
    """What :func:`export_module` writes of a module, but for the network's description."""
    network = module.network
    structure = network.structure
    left_out = [] if include_pretrained else _left_out(network)
    parts = split(network)
    for part, pretrained, _ in left_out:
        for name in _names(part, pretrained):
            parts.shared.pop(name, None)
    known = [one for one in task_records(structure) if one.task.id in parts.tasks]
    gone = [one for one in task_records(structure) if one.task.id not in parts.tasks]
    common = {**structure.preparations[0].record(), "tasks": 1}
    described = structure.record()
    for name in ("tasks", "preparations", "forgotten"):
        del described[name]
    gates, of_tasks, gate_tensors = _gates(module)
    plain = set_aside(parts.plain, "plain", parts.shared)
    bundle = Bundle(
        {
            "network": None,
            "structure": {**described, "preparation": common},
            "spare": parts.spare
            if any("head.weight" in one for one in parts.tasks.values())
            else None,
            "forgotten": [one.record(common) for one in gone],
            **(module.host.learned_by.record() if module.host.learned_by else {}),
            "pretrained": [{"part": part, **asdict(origin)} for part, _, origin in left_out],
            "plain": plain,
            "gates": gates,
        }
    )
    front = {name: value for name, value in parts.shared.items() if name.startswith("front.")}
    model = {name: value for name, value in parts.shared.items() if name not in front}
    written = {files.MODEL: model, files.FRONT: front, files.GATE: gate_tensors}
    written[files.ACCURACY] = parts.accuracy
    bundle.files = {name: part for name, part in written.items() if part or name == files.MODEL}
    for one, name in zip(known, task_names([one.task.id for one in known], names), strict=True):
        task = one.task.id
        tensors: dict[str, Tensor] = {}
        own = {
            gate: set_aside(part, gate, tensors) for gate, part in of_tasks.get(task, {}).items()
        }
        progress = progress_of(task, network.opened, network.closed)
        bundle.tasks[name] = replace(
            one,
            name=name,
            progress=progress,
            tensors=parts.tasks[task],
            gates=own,
            gate_tensors=tensors,
        )
    return bundle


def write_training_state_of(
    module: ContinualModule, bundle: Bundle, checkpoint: Mapping[str, Any], folder: Path
) -> None:
    """Write a module's training state next to its bundle.

    Args:
        module: with whose weights the bundle was written.
        bundle: that is in the folder.
        checkpoint: of the module.
        folder: of the bundle.
    """
    parts = {record["part"] for record in bundle.record["pretrained"]}
    elsewhere = [
        f"{PREFIX}{name}"
        for part, pretrained, _ in with_origin(module.network)
        for name in (_names(part, pretrained) if part in parts else ())
    ]
    # What a run's folder and its loggers are called is not what learning goes on from.
    own = {LastCheckpoint.__qualname__, Dashboard.__qualname__}
    states = {key: one for key, one in checkpoint["callbacks"].items() if key not in own}
    held = held_weights(bundle, module.network.structure)
    write_training_state(folder, {**checkpoint, "callbacks": states}, held, elsewhere)


def task_names(numbers: Sequence[int], names: Sequence[str] | None) -> list[str]:
    """The names of tasks in a bundle: those that are given, or ``task_1`` and so on.

    Args:
        numbers: IDs of the tasks, in order.
        names: one for each; None for the usual ones.

    Raises:
        ConfigurationError: their number is another, two are alike, or one is no name of a folder.
    """
    usual = [f"task_{number + 1}" for number in numbers]
    if names is None:
        return usual
    if len(names) != len(usual) or len({name.casefold() for name in names}) < len(names):
        raise ConfigurationError(
            f"Expected names to be {len(usual)} different ones, one for each task, but got "
            f"{', '.join(names)}. Leave them out for {usual[0]} and so on."
        )
    for name in names:
        check_task_name(name)
    return [*names]


def _gates(
    module: ContinualModule,
) -> tuple[list[Any], dict[int, dict[str, Any]], dict[str, Tensor]]:
    """What gates share, what each has of each task, and the tensors of what is shared."""
    tensors: dict[str, Tensor] = {}
    records: list[Any] = []
    of_tasks: dict[int, dict[str, Any]] = {}
    gates = [*module.gates.values()]
    for gate, record in zip(gates, describe_gates(gates), strict=True):
        shared, parts = split_gate(record["state"], getattr(gate, "shared_rows", ()))
        together = getattr(gate, "second_moments", "none") == "shared"
        state = set_aside(shared, gate.name, tensors)
        known = {"together": together, "calibrated": sorted(parts), **_measured(module, gate)}
        records.append({**record, **known, "state": state})
        for task, part in parts.items():
            of_tasks.setdefault(task, {})[gate.name] = part
    return records, of_tasks, tensors


def _measured(module: ContinualModule, gate: TaskGate) -> dict[str, Any]:
    """Accuracies, by task, of the classes that a bundle answers with where a gate names the task; with test samples."""
    scores = [one for one in module.gate_scores if one["gate"] == gate.name]
    if not scores:
        return {}
    found = scores[-1]["mixture"] if gate.modes else scores[-1]["own_class"]
    return {"accuracy": found, "samples": scores[-1]["samples"]}


def load_exported(
    folder: str | os.PathLike[str],
    backbone: nn.Module,
    front: Front | None = None,
    **arguments: Any,
) -> ContinualModule:
    """Load an exported module; its logits in each task's mode equal those of the original.

    Args:
        folder: written by :func:`export_module`.
        backbone: with the same shapes as the exported module's; its weights are overwritten.
        front: of the exported module, where it is none of plain arguments; else it is made anew.
        arguments: others of :class:`ContinualModule`, such as ``optimizer`` and ``train``, for a module that
            is to learn new tasks; see :meth:`ContinualModule.extend`.

    Returns:
        The module, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, or does not match the backbone.
    """
    with explained(folder):
        bundle = read_bundle(folder)
        structure = structure_of(bundle)
    module = ContinualModule(backbone, front=front, **{"mask": structure.mask, **arguments})
    _restore(module, folder, bundle, structure)
    return module.eval()


def restore_exported(module: ContinualModule, folder: str | os.PathLike[str]) -> None:
    """Give a new module all that an exported one had learned.

    Args:
        module: without a stream; its backbone has the same shapes as the exported module's.
        folder: written by :func:`export_module`.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, or does not match the module.
    """
    with explained(folder):
        bundle = read_bundle(folder)
        structure = structure_of(bundle)
    _restore(module, folder, bundle, structure)


def past_of_export(folder: str | os.PathLike[str]) -> Past:
    """What a stream that goes on needs to know of an exported module.

    Args:
        folder: written by :func:`export_module`.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, or says nothing of the run.
    """
    with explained(folder):
        bundle = read_bundle(folder)
        run = _learned_by(bundle.record)
        if run is None:
            raise CheckpointError("none with the seed and the strategies of its run")
        return run.past(structure_of(bundle), bundle.progress[1])


def _restore(
    module: ContinualModule,
    folder: str | os.PathLike[str],
    bundle: Bundle,
    structure: Structure,
) -> None:
    network = module.network
    if structure.mask != network.mask:
        raise CheckpointError(
            f"Expected mask to be that of the exported module in {folder}, {structure.mask!r}, but got "
            f"{network.mask!r}. Set it to {structure.mask!r}."
        )
    with explained(folder):
        parts = parts_of(bundle, structure)
        parts.accuracy = _accuracy(bundle, structure)
        parts.shared |= from_backbone(bundle.record.get("pretrained", []), network)
        fill(network, structure, parts)
        network.opened, network.closed = bundle.progress
        module.host.gates = rebuild_gates(gate_records(bundle))
        module.host.learned_by = _learned_by(bundle.record)
        network.switch(network.resting_task)
        if has_training_state(Path(folder)):
            extension_of(module).path = Path(folder)


def _accuracy(bundle: Bundle, structure: Structure) -> dict[str, Tensor]:
    """The accuracy matrix, NaN for tasks that came after it was written."""
    number = len(structure.tasks)
    matrix: dict[str, Tensor] = dict(AccuracyMatrix(number).state_dict(prefix=ACCURACY))
    for name, saved in bundle.files.get(files.ACCURACY, {}).items():
        whole = matrix.get(name, torch.empty(()))
        small = saved.dim() == whole.dim() > 0
        if not small or any(a > b for a, b in zip(saved.shape, whole.shape, strict=True)):
            raise ValueError(f"{name} of shape {tuple(saved.shape)} for {number} tasks")
        whole[tuple(map(slice, saved.shape))] = saved
    return matrix


def _learned_by(record: Mapping[str, Any]) -> LearnedBy | None:
    """The run; None in an export that does not say it."""
    return LearnedBy.read(record) if record.keys() & {"seed", "strategies"} else None


def _left_out(network: nn.Module) -> list[tuple[str, Pretrained, Origin]]:
    """Parts with pretrained weights that an export names instead of holding them.

    Raises:
        ConfigurationError: they were trained, so that no package has them.
    """
    found = [
        (name, part, origin) for name, part, origin in with_origin(network) if not origin.shippable
    ]
    for name, part, origin in found:
        if hash_of(part.original_state()) != origin.sha256:
            raise ConfigurationError(
                f"Expected the weights of {name} to be those of {origin.weights}, which states no license and "
                "is named in an export instead of copied, but they were trained. Set train='modes', or pass "
                "include_pretrained=True if you may share them."
            )
    return found


def _names(name: str, part: Pretrained) -> list[str]:
    return [f"{name}.{key}" for key in part.original_state()]


def _taken(folder: Path) -> ConfigurationError:
    return ConfigurationError(
        f"Expected {folder} to be a new folder, but it exists. Name another one, or remove it."
    )
