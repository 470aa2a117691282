"""What learning goes on from, next to a bundle: a run's checkpoint without the weights that the bundle holds.

::

    <folder>/training_state/
    ├── state.json               plain values, and the name, size and hash of the file of tensors
    └── tensors-<hash>.safetensors importances, memories, teachers, weights that only training has, ...

Answering does not read it. ``state.json`` is replaced at once, and names the other file by its hash, so that
a state that is replaced is the old one or the new one at any time.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bpn_lightning.errors import CheckpointError, ResultsError
from bpn_lightning.files.untrusted import MAX_TEXT_BYTES, read_json
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.modes.bundle import Bundle, structure_of
from bpn_lightning.modes.hashed import read_named, write_named
from bpn_lightning.modes.joining import parts_of
from bpn_lightning.modes.plain_values import put_back, set_aside
from bpn_lightning.modes.splitting import assembled
from bpn_lightning.nn.structure import Structure, check_schema, schema_fields
from bpn_lightning.nn.weights import digest_tensors

__all__ = [
    "FOLDER",
    "PREFIX",
    "RECORD",
    "StatePart",
    "check_training_state",
    "has_training_state",
    "held_weights",
    "read_training_state",
    "remove_training_state",
    "training_state_parts",
    "write_training_state",
]

FOLDER, RECORD, TENSORS = "training_state", "state.json", "tensors.safetensors"
FORMAT = "bpn_lightning training state"
PREFIX = "network."


class StatePart(NamedTuple):
    """A part of a training state.

    Attributes:
        name: of the strategy, the gate or the callback; ``optimizer``.
        bytes: of its tensors.
        names: the last words of their names.
    """

    name: str
    bytes: int
    names: set[str]


def has_training_state(folder: Path) -> bool:
    """Whether a bundle has one."""
    return (folder / FOLDER / RECORD).is_file()


def held_weights(bundle: Bundle, structure: Structure) -> dict[str, Any]:
    """The weights that the files of a bundle hold, by their names in a module's ``state_dict``.

    Args:
        bundle: as it was read, or is to be written.
        structure: of it, with the IDs of its tasks.

    Raises:
        ValueError: its parts do not belong together.
    """
    parts = parts_of(bundle, structure)
    return {f"{PREFIX}{name}": value for name, value in assembled(structure, parts).items()}


def write_training_state(
    folder: Path,
    checkpoint: Mapping[str, Any],
    held: Mapping[str, Any],
    elsewhere: Collection[str] = (),
) -> None:
    """Write a checkpoint next to a bundle, in place of an earlier one.

    Args:
        folder: of the bundle.
        checkpoint: Lightning's, of a ContinualModule.
        held: weights that the bundle holds, which are not written again where they are the same bit for bit.
        elsewhere: names of weights that the bundle names instead of holding them.

    Raises:
        ConfigurationError: a state has values of another kind than tensors and plain ones.
        ResultsError: its plain values are larger than what is read again.
    """
    weights = {n: v for n, v in checkpoint["state_dict"].items() if n not in elsewhere}
    own = {name: value for name, value in weights.items() if not _same(value, held.get(name))}
    tensors: dict[str, Tensor] = {}
    state = set_aside({**checkpoint, "state_dict": own}, "", tensors)
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    file = write_named(place, TENSORS, tensors)
    record = {
        "format": FORMAT,
        **schema_fields(),
        "weights": _hash(weights, elsewhere),
        "elsewhere": sorted(elsewhere),
        "file": file,
        "state": state,
    }
    content = json.dumps(record, separators=(",", ":")).encode()
    if len(content) > MAX_TEXT_BYTES:
        raise ResultsError(
            f"Expected the plain values of a training state to take at most {MAX_TEXT_BYTES:,} bytes, but got "
            f"{len(content):,}. Keep what is large in tensors."
        )
    write_atomically(place / RECORD, content)
    for other in place.iterdir():
        if other.name not in (RECORD, file["name"]):
            other.unlink()


def read_training_state(folder: Path, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint that a bundle goes on from.

    Args:
        folder: of the bundle.
        weights: of a module that was loaded from it, or what :func:`held_weights` gives.

    Raises:
        OSError: a file is missing, or leads out of the folder.
        ValueError: a file is damaged, or not the one that its hash says.
        CheckpointError: it is of another schema, or of other weights.
    """
    record = _record(folder)
    state = put_back(record["state"], read_named(folder / FOLDER, TENSORS, record["file"]))
    elsewhere = [str(name) for name in record["elsewhere"]]
    whole = {**weights, **state["state_dict"]}
    if _hash(whole, elsewhere) != record["weights"]:
        raise CheckpointError(
            f"Expected the training state in {FOLDER} to be of the bundle's weights and tasks, but it is of "
            "others. Export the run again, or delete it to go on without"
        )
    return {**state, "state_dict": whole}


def check_training_state(folder: Path, bundle: Bundle) -> None:
    """Read the training state of a bundle, if there is one, and compare it with the bundle.

    Args:
        folder: of the bundle.
        bundle: as it was read.

    Raises:
        OSError: as :func:`read_training_state`.
        ValueError: as there.
        CheckpointError: as there.
    """
    if has_training_state(folder):
        read_training_state(folder, held_weights(bundle, structure_of(bundle)))


def training_state_parts(folder: Path) -> list[StatePart]:
    """What a training state holds, without weights of the network; empty where a bundle has none.

    Raises:
        OSError: as :func:`read_training_state`.
        ValueError: as there.
    """
    if not has_training_state(folder):
        return []
    record, found = _record(folder), []
    tensors = read_named(folder / FOLDER, TENSORS, record["file"])
    state = dict(record["state"]["items"])
    for name, part in [*state["callbacks"]["items"], ["optimizer", state["optimizer_states"]]]:
        names = [*_tensor_names(part)]
        size = sum(tensors[one].nbytes for one in names)
        found.append(StatePart(str(name), size, {one.rpartition("/")[2] for one in names}))
    return [one for one in found if one.bytes]


def remove_training_state(folder: Path) -> bool:
    """Remove it, as it is not of the tasks that a bundle is going to have; whether there was one."""
    if not (folder / FOLDER).is_dir():
        return False
    (folder / FOLDER / RECORD).unlink(missing_ok=True)  # without it there is none
    shutil.rmtree(folder / FOLDER)
    return True


def _record(folder: Path) -> Any:
    record = read_json(folder / FOLDER / RECORD, within=folder)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{RECORD} of {FOLDER} of another format")
    check_schema(record, "a training state")
    return record


def _hash(weights: Mapping[str, Any], elsewhere: Collection[str]) -> str:
    digest, left_out = sha256(), {*elsewhere}
    found = {n: v for n, v in weights.items() if isinstance(v, Tensor) and n not in left_out}
    digest_tensors(digest.update, found)
    return digest.hexdigest()


def _same(value: Any, other: Any) -> bool:
    """Whether two tensors are the same bit for bit; other values are never left out."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return False
    if (value.dtype, value.shape) != (other.dtype, other.shape):
        return False
    one, two = (v.detach().cpu().contiguous().flatten().view(torch.uint8) for v in (value, other))
    return torch.equal(one, two)


def _tensor_names(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _tensor_names(part)
    elif isinstance(value, dict):
        if "tensor" in value:
            yield value["tensor"]
        else:
            for part in value.values():
                yield from _tensor_names(part)
