"""Requests of one batch answered by a bundle, each in the mode of its own task; none fails for another one's fault."""

import sys
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch

from bpn_lightning.datamodules.limits import TooManyPixelsError, decode_image, raw_pixels
from bpn_lightning.errors import BPNLightningError, ConfigurationError
from bpn_lightning.modes import Modes, Prediction
from bpn_lightning.serve.reading import Item

__all__ = ["Asked", "Refused", "answer", "decode"]


@dataclass(frozen=True)
class Asked:
    """A raw input and its task; None: it is not given."""

    task: str | int | None
    array: Any = field(repr=False)


@dataclass(frozen=True)
class Refused:
    """The status and the message of a request that is not answered."""

    status: int
    message: str


def decode(net: Modes, item: Item, max_pixels: int) -> Asked | Refused:
    """A request's input as its task takes it."""
    task = item.task
    try:
        if isinstance(task, str) and task.isdecimal() and task not in net.tasks:
            task = int(task)
        like = net.tasks[0] if task is None else task
        shape, dtype = net.raw_shape(like), net.raw_dtype(like)
    except ConfigurationError as error:
        return Refused(404, str(error))
    if task is None and not net.gates:
        known = net.tasks
        listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        return Refused(
            422, f"Expected task to be one of {listed} where the bundle has no gate, but got none."
        )
    if item.image is None:
        return Asked(task, _numbers(item.array, dtype))
    if len(shape) != 3 or shape[0] not in (1, 3):
        return Refused(
            422,
            f"Expected numbers of the shape {shape}, but got an image. Send them as input, in JSON.",
        )
    try:
        with decode_image(BytesIO(item.image), "of the request", max_pixels) as image:
            return Asked(task, raw_pixels(image, shape))
    except TooManyPixelsError as error:
        return Refused(413, f"Expected a smaller image, but got {error}.")
    # Pillow may raise any exception here.
    except Exception as error:  # noqa: BLE001
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        return Refused(422, f"Expected an image, but got {said}.")


def _numbers(array: Any, dtype: str) -> Any:
    """Numbers of JSON, which knows no types, in the type of the task's inputs where they fit it."""
    whole = array.dtype.kind in "iu"
    if dtype == "uint8":
        if whole and array.size and array.min() >= 0 and array.max() <= 255:
            return array.astype(np.uint8)
        return array if whole else array.astype(np.float32)
    return array.astype(dtype) if dtype.startswith("float") else array


def answer(
    net: Modes, asked: Sequence[Asked | Refused], reject_below: float = 0.0
) -> list[Prediction | Refused]:
    """What is answered to each request, in their order."""
    found: list[Prediction | Refused] = [
        one if isinstance(one, Refused) else Refused(500, "") for one in asked
    ]
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, one in enumerate(asked):
        if isinstance(one, Asked):
            groups[one.array.shape, one.array.dtype, one.task is None].append(number)
    for numbers in groups.values():
        members = [one for one in (asked[n] for n in numbers) if isinstance(one, Asked)]
        for number, each in zip(numbers, _of_group(net, members, reject_below), strict=True):
            found[number] = each
    return found


def _of_group(
    net: Modes, members: Sequence[Asked], reject_below: float
) -> Sequence[Prediction | Refused]:
    """Answers to inputs of one shape and type."""
    tasks = [one.task for one in members]
    task: Any = tasks[0] if len(set(tasks)) == 1 else tasks
    try:
        batch = torch.from_numpy(np.stack([one.array for one in members]))
        return net.predict(batch, task=task, reject_below=reject_below)
    # One of them may be wrong, or its task was removed just now: the others are answered.
    except Exception as error:  # noqa: BLE001
        if len(members) > 1:
            return [_of_group(net, [one], reject_below)[0] for one in members]
        if not isinstance(error, BPNLightningError):
            traceback.print_exception(error, file=sys.stderr)
            return [Refused(500, "Expected an answer, but the network failed; the log says why.")]
        gone = task is not None and task not in (*net.tasks, *net.task_ids.values())
        return [Refused(404 if gone else 422, str(error))]
