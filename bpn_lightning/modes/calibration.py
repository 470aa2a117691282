"""With which tasks' held-out samples the temperatures of gates were chosen, which is what gates share over tasks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bpn_lightning.modes.bundle import Bundle
from bpn_lightning.modes.joining import gate_records

__all__ = ["has_newer_temperatures", "uncalibrated"]


def uncalibrated(bundle: Bundle) -> dict[str, list[str]]:
    """The tasks, by the gate's name, that its temperature was not chosen with, as they were added later.

    Gates without a temperature, which divide their scores by 1, are left out.
    """
    found = {}
    for record, gate in zip(bundle.record.get("gates", []), gate_records(bundle), strict=True):
        known, name = {*record["calibrated"]}, gate["arguments"]["name"]
        late = [key for key, one in bundle.tasks.items() if one.gates and one.task.id not in known]
        if late and _is_calibrated(gate["state"]):
            found[name] = late
    return found


def _is_calibrated(state: Mapping[str, Any]) -> bool:
    likelihoods = state.get("likelihoods")
    return isinstance(likelihoods, Tensor) and bool(likelihoods.any())


def has_newer_temperatures(other: Bundle, bundle: Bundle) -> bool:
    """Whether another bundle's gates are those of a bundle, and were calibrated with all of its tasks.

    Args:
        other: as it was read.
        bundle: with the task that is added to it.
    """
    if not bundle.record["gates"] or other.base != bundle.base:
        return False
    own, new = (
        [(g["kind"], g["arguments"], _apart_from_samples(g["state"])) for g in gate_records(one)]
        for one in (bundle, other)
    )
    ids = {one.task.id for one in bundle.tasks.values() if one.gates}
    return own == new and all(ids <= {*record["calibrated"]} for record in other.record["gates"])


def _apart_from_samples(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a gate's state its rows depend on."""
    return {name: state.get(name) for name in ("seed", "inputs", "chosen")}
