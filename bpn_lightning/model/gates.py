"""Gates as files describe them: rebuilt from registered names and plain values, never from code."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from bpn_lightning.errors import CheckpointError
from bpn_lightning.registry import gates as registered_gates
from bpn_lightning.registry import name_of
from bpn_lightning.strategies.gates.base import TaskGate

__all__ = ["describe_gates", "rebuild_gates"]


def describe_gates(gates: Iterable[TaskGate]) -> list[dict[str, Any]]:
    """Dictionaries with ``kind``, ``arguments`` and ``state``: what each gate answers by."""
    known = registered_gates()
    return [
        {"kind": name_of(gate, known), "arguments": gate.arguments, "state": gate.inference_state()}
        for gate in gates
    ]


def rebuild_gates(records: Iterable[Mapping[str, Any]]) -> dict[str, TaskGate]:
    """The inverse of :func:`describe_gates`, by name.

    A class without a registered name is left out, with a warning: a file never says what to import.

    Raises:
        CheckpointError: a record is none, or does not fit its gate.
    """
    known, found = registered_gates(), {}
    for record in records:
        kind = record["kind"]
        if kind not in known:
            warnings.warn(
                f"The gate {kind!r:.80} of the file is left out, as its class has no registered name. "
                "Register it by an entry point in the group bpn_lightning.gates, or pass it to the "
                "trainer.",
                stacklevel=2,
            )
            continue
        try:
            gate: TaskGate = known[kind].load()(**record["arguments"])
            gate.load_state_dict(dict(record["state"]))
        # A damaged record, or one that somebody made up, may raise any exception here.
        except Exception as error:
            raise CheckpointError(
                f"Expected the gate {kind!r} of the file to be one, but got {type(error).__name__}: "
                f"{error!s:.200}. The file is damaged or made up."
            ) from error
        found[gate.name] = gate
    return found
