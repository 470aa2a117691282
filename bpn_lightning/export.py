"""Export of a trained network to files without code.

::

    <folder>/
    ├── model.safetensors    every tensor: weights, bias bank, keys, the accuracy matrix
    └── model.json           schema, gates, structure (tasks, mask, head, inputs, attachments), seed and
                         strategies of the run, and the position of each tensor

A checkpoint resumes a run; an export is for distribution. New tasks continue from either, but an export has no
training state: of the optimizer, of the strategies, of random numbers. The backbone is the reader's own code:
the files contain the names of its tensors, not its computation.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bpn_lightning.errors import (
    BPNLightningError,
    CheckpointError,
    ConfigurationError,
    ResultsError,
)
from bpn_lightning.files import EXPORT_FILES, write_atomically
from bpn_lightning.model.gates import describe_gates, rebuild_gates
from bpn_lightning.model.learned_by import LearnedBy
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.modes.rebuilding import rebuild
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.pretrained import Origin, Pretrained, with_origin
from bpn_lightning.nn.structure import Structure, check_schema, schema_fields
from bpn_lightning.nn.weights import hash_of
from bpn_lightning.tasks import Past
from bpn_lightning.untrusted import check_untrusted, read_json

__all__ = ["export_module", "load_exported", "past_of_export", "restore_exported"]

FORMAT = "bpn_lightning model"
_TENSORS, _RECORD = EXPORT_FILES


def export_module(
    module: ContinualModule,
    folder: str | os.PathLike[str],
    *,
    include_pretrained: bool = False,
) -> Path:
    """Write a module that has learned tasks; the folder appears only when it is complete.

    If merged weights, such as IMM's, are swapped in, they are written.

    Args:
        module: with a stream, from :class:`~lightning.Trainer` or a checkpoint.
        folder: a new folder.
        include_pretrained: whether to write pretrained weights whose license is not known, too. If not, they
            are named by their package and hash, and ``load_exported`` takes them from its backbone.

    Returns:
        The folder.

    Raises:
        ConfigurationError: the folder exists, the module has no head yet, or pretrained weights that would
            be left out were trained.
        ResultsError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise _taken(folder)
    network = module.network
    if network.head is None:
        raise ConfigurationError(
            "Expected a module that has learned tasks, but it has no head yet. Export it after "
            "trainer.fit, or after load_from_checkpoint."
        )
    left_out = [] if include_pretrained else _left_out(network)
    names = {name for part, one, _ in left_out for name in _names(part, one)}
    state = {name: value for name, value in network.state_dict().items() if name not in names}
    tensors: dict[str, Tensor] = {}
    gates = {gate["arguments"]["name"]: gate for gate in describe_gates(module.gates.values())}
    record = {
        "format": FORMAT,
        **schema_fields(),
        "structure": network.structure.record(),
        "opened": network.opened,
        "closed": network.closed,
        **(module.host.learned_by.record() if module.host.learned_by else {}),
        "pretrained": [{"part": part, **asdict(origin)} for part, _, origin in left_out],
        "state": _set_aside(state, "", tensors),
        "gates": _set_aside(gates, "gates", tensors),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.export")
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        write_atomically(temporary / _RECORD, json.dumps(record, indent=1).encode())
        temporary.rename(folder)
    except BaseException as error:  # also Ctrl-C; safetensors has its own error for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        if folder.exists():
            raise _taken(folder) from error  # created by another process in the meantime
        raise ResultsError(
            f"Expected to write {folder}, but got: {error}. Free some space or grant write access."
        ) from error
    return folder


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
    record, structure = _read(folder)
    module = ContinualModule(backbone, front=front, **{"mask": structure.mask, **arguments})
    _restore(module, folder, record, structure)
    return module.eval()


def restore_exported(module: ContinualModule, folder: str | os.PathLike[str]) -> None:
    """Give a new module all that an exported one had learned.

    Args:
        module: without a stream; its backbone has the same shapes as the exported module's.
        folder: written by :func:`export_module`.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, or does not match the module.
    """
    _restore(module, folder, *_read(folder))


def past_of_export(folder: str | os.PathLike[str]) -> Past:
    """What a stream that goes on needs to know of an exported module.

    Args:
        folder: written by :func:`export_module`.

    Raises:
        CheckpointError: its record is missing, damaged or of another kind, or says nothing of the run.
    """
    record, structure = _read(folder)
    with _explained(folder):
        run = _learned_by(record)
        if run is None:
            raise CheckpointError("none with the seed and the strategies of its run")
        return run.past(structure, _progress(record, structure)[1])


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], Structure]:
    """The record of an export, and the structure in it."""
    with _explained(folder):
        record = read_json(Path(folder) / _RECORD)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}")
        check_schema(record, "an exported module")
        check_untrusted(Path(folder) / _TENSORS)
        return record, Structure.read(record["structure"])


def _restore(
    module: ContinualModule,
    folder: str | os.PathLike[str],
    record: Mapping[str, Any],
    structure: Structure,
) -> None:
    network = module.network
    if structure.mask != network.mask:
        raise CheckpointError(
            f"Expected mask to be that of the exported module in {folder}, {structure.mask!r}, but got "
            f"{network.mask!r}. Set it to {structure.mask!r}."
        )
    with _explained(folder):
        opened, closed = _progress(record, structure)
        tensors = load_file(check_untrusted(Path(folder) / _TENSORS))
        state = _put_back(record["state"], tensors)
        state |= _from_backbone(record.get("pretrained", []), network)
        rebuild(network, structure, state)
        network.opened, network.closed = opened, closed
        network.load_state_dict(state)
        gates = _put_back(record.get("gates", {"items": []}), tensors)
        module.host.gates = rebuild_gates(gates.values())
        module.host.learned_by = _learned_by(record)
        network.switch(network.resting_task)


@contextmanager
def _explained(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one way what is wrong with an export."""
    try:
        yield
    # A damaged or malicious file may raise any exception here.
    except Exception as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        kind = "" if isinstance(error, BPNLightningError) else f"{type(error).__name__}: "
        raise CheckpointError(
            f"Expected {folder} to hold {_TENSORS} and {_RECORD} of a module with this backbone, but "
            f"got {kind}{said}. Export the module again, or pass its original backbone."
        ) from error


def _progress(record: Mapping[str, Any], structure: Structure) -> tuple[int, int]:
    """The tasks that were opened and closed last."""
    opened, closed = record["opened"], record["closed"]
    numbers = type(opened) is int and type(closed) is int
    if not numbers or not -1 <= closed <= opened < len(structure.tasks):
        raise ValueError(f"opened {opened!r} and closed {closed!r}")
    return opened, closed


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


def _from_backbone(records: Sequence[Mapping[str, Any]], network: nn.Module) -> dict[str, Tensor]:
    """The tensors that a file names instead of holding them, from the network that is to be filled."""
    parts = {name: (part, origin) for name, part, origin in with_origin(network)}
    state: dict[str, Tensor] = {}
    for record in records:
        name, wanted = record["part"], record["sha256"]
        part, origin = parts.get(name, (None, None))
        if part is None or hash_of(part.original_state()) != wanted:
            got = "none" if origin is None else f"{origin.weights} with {origin.sha256}"
            raise CheckpointError(
                f"Expected {name} to be the network {record['name']} of {record['library']} with the weights "
                f"{record['weights']} and the hash {wanted}, but got {got}. Pass that backbone"
            )
        state |= {f"{name}.{key}": value for key, value in part.original_state().items()}
    return state


def _taken(folder: Path) -> ConfigurationError:
    return ConfigurationError(
        f"Expected {folder} to be a new folder, but it exists. Name another one, or remove it."
    )


def _set_aside(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a state to JSON values; its tensors are moved to ``tensors``, by name."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        parts = [(key, f"{name}/{key}" if name else str(key), part) for key, part in value.items()]
        return {"items": [[key, _set_aside(part, place, tensors)] for key, place, part in parts]}
    return value


def _put_back(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Rebuild the state; each tensor is used once, so that the state is no larger than its file."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors.pop(value["tensor"])
    return {key: _put_back(part, tensors) for key, part in value["items"]}
