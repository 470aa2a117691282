"""A bundle that was read as the parts of a network and of its gates."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bpn_lightning.errors import CheckpointError
from bpn_lightning.modes.bundle import FRONT, GATE, MODEL, Bundle
from bpn_lightning.modes.gates import joined_gate
from bpn_lightning.modes.plain_values import put_back
from bpn_lightning.modes.splitting import Parts
from bpn_lightning.nn.pretrained import with_origin
from bpn_lightning.nn.structure import Structure
from bpn_lightning.nn.weights import hash_of

__all__ = ["from_backbone", "gate_records", "parts_of"]


def parts_of(bundle: Bundle, structure: Structure) -> Parts:
    """The parts of a bundle's network, without the accuracy matrix.

    Args:
        bundle: as it was read.
        structure: of it, whose known tasks are in the order of the bundle's.
    """
    known = structure.known(range(len(structure.tasks)))
    tasks = zip(known, bundle.tasks.values(), strict=True)
    shared = {**bundle.files[MODEL], **bundle.files.get(FRONT, {})}
    plain = put_back(bundle.record["plain"], shared)
    return Parts(
        shared=shared,
        tasks={task: dict(one.tensors) for task, one in tasks},
        plain=plain,
        spare=[[int(a), int(b)] for a, b in bundle.record.get("spare") or []],
    )


def gate_records(bundle: Bundle) -> list[dict[str, Any]]:
    """``kind``, ``arguments`` and ``state`` of each gate."""
    tensors = dict(bundle.files.get(GATE, {}))
    found = []
    for record in bundle.record.get("gates", []):
        name = record["arguments"]["name"]
        parts = {
            one.task.id: put_back(one.gates[name], dict(one.gate_tensors))
            for one in bundle.tasks.values()
            if name in one.gates
        }
        state = joined_gate(put_back(record["state"], tensors), parts)
        found.append({"kind": record["kind"], "arguments": record["arguments"], "state": state})
    return found


def from_backbone(records: Sequence[Mapping[str, Any]], network: nn.Module) -> dict[str, Tensor]:
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
