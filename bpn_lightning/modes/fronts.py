"""What stands before a network, as files describe it: rebuilt from registered names, never from code."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from bpn_lightning.errors import CheckpointError
from bpn_lightning.nn.answering import AnsweringNetwork
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.structure import FrontRecord
from bpn_lightning.registry import fronts, name_of

__all__ = ["describe", "rebuild_front"]

PREFIX = "front."

MAX_DRAWN = 2**29
"""Numbers that a front may draw and no file holds: inputs times features."""


def describe(front: Front) -> FrontRecord:
    """A fitted front as a file describes it; ``front.state_dict()`` has the rest."""
    return FrontRecord(name_of(front, fronts()), front.record(), front.fingerprint())


def rebuild_front(
    network: AnsweringNetwork, record: FrontRecord | None, state: Mapping[str, Any]
) -> None:
    """Make a network's front, or fill the one that it has, with what a file holds.

    Args:
        network: whose front is another than the file's only by what is fitted.
        record: of the file; None where it has no front, or one that is not fitted.
        state: tensors by their names in ``network.state_dict()``.

    Raises:
        CheckpointError: the front is another one, has other weights, or has to be passed.
    """
    if record is None:
        if network.front is not None and network.closed >= 0:
            raise CheckpointError(
                f"Expected a file with the front {name_of(network.front, fronts())!r}, but got one "
                "without a front. Leave front out."
            )
        return
    own = {
        name.removeprefix(PREFIX): value
        for name, value in state.items()
        if name.startswith(PREFIX) and isinstance(value, Tensor)
    }
    front = network.front or _made(record)
    _check_same(front, record, own)
    _check_sizes(front, record, own)
    front.allocate(record.arguments["input_shape"])
    front.load_state_dict(own)
    if front.fingerprint() != record.fingerprint:
        raise CheckpointError(
            f"Expected the front of the file to have the hash {record.fingerprint:.32}, but got "
            f"{front.fingerprint()}. The file is damaged or made up."
        )
    network.front, network.structure.front = front, record


def _made(record: FrontRecord) -> Front:
    """A front of a registered name and of plain arguments."""
    remedy = "Pass the run's own: ContinualModule.load_from_checkpoint(path, front=...)."
    registered = fronts().get(record.kind)
    if registered is None:
        raise CheckpointError(
            f"Expected front to be passed where its class has no registered name, but the file has "
            f"{record.kind!r:.80}, and a file never says what to import. {remedy}"
        )
    arguments = {key: value for key, value in record.arguments.items() if key != "input_shape"}
    try:
        made: Front = registered.load()(**arguments)
    except TypeError as error:
        raise CheckpointError(
            f"Expected the front {record.kind!r} to be made of plain values, but got: {error}. {remedy}"
        ) from error
    return made


def _check_same(front: Front, record: FrontRecord, state: Mapping[str, Tensor]) -> None:
    here, there = {**front.arguments}, {**record.arguments}
    there.pop("input_shape", None)
    kind = name_of(front, fronts())
    if here.get("seed", 0) is None:  # of the run that the file is of
        front.arguments["seed"] = here["seed"] = there.get("seed")
    if kind != record.kind or here != there:
        raise CheckpointError(
            f"Expected the front {record.kind!r:.80} of {there!r:.200}, as in the file, but got "
            f"{kind!r} of {here!r}. Pass that one, or leave front out."
        )
    for name, value in front.given_state().items():
        saved = state.get(name)
        if saved is None or not torch.equal(value.cpu(), saved.cpu()):
            raise CheckpointError(
                f"Expected the front {record.kind!r} to have the weights of the file, with the hash "
                f"{record.fingerprint:.32}, but its weights_file has another {name!r}. Pass the file "
                "that the run was made with."
            )


def _check_sizes(front: Front, record: FrontRecord, state: Mapping[str, Tensor]) -> None:
    """Refuse what would take more memory than the file has for it, before it is taken."""
    shape = record.arguments.get("input_shape")
    sized = isinstance(shape, list | tuple) and all(type(n) is int and 0 < n < 2**24 for n in shape)
    width = front.width(shape) if sized and shape else 0
    if sized and 0 < prod(shape or ()) * width <= MAX_DRAWN:
        with torch.device("meta"):
            front.allocate(shape or ())
        wanted = {name: value.shape for name, value in front.state_dict().items()}
        if wanted == {name: value.shape for name, value in state.items()}:
            return
    raise CheckpointError(
        f"Expected a front that the {len(state)} tensors of the file fill, for inputs and features of at "
        f"most {MAX_DRAWN:,} numbers, but got inputs of {shape!r:.80}. The file is damaged or made up."
    )
