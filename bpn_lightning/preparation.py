"""Preprocessing of raw inputs: plain functions, and a record of the steps of each task.

The stream calls the functions; the module keeps the record, also in checkpoints and exports. A network
loaded without its stream therefore preprocesses raw inputs itself, bit for bit the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isclose, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.random_state import seeded_generator

__all__ = [
    "Preparation",
    "Step",
    "center_crop",
    "differing_preparation",
    "find_preparation",
    "first_preparations",
    "kind_of",
    "normalize",
    "permutation",
    "permute",
    "prepare_raw",
    "read_preparations",
    "resize",
    "rotate",
    "scale_and_shift",
]

Step = list[Any]
"""A function's name in ``STEPS`` and its arguments: numbers, and lists of numbers."""

MAX_SIZE = 2**12
"""The largest image side in pixels that a record may request."""


# --- functions -----------------------------------------------------------------------------------


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear resize to float32 ``(batch, channels, size, size)``; unchanged if the size matches."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)


def center_crop(images: Tensor, size: int) -> Tensor:
    """The central ``(batch, channels, size, size)`` of square images."""
    start = (images.shape[-1] - size) // 2
    window = slice(start, start + size)
    return images[:, :, window, window]


def scale_and_shift(
    mean: Sequence[float],
    std: Sequence[float],
    unit: float,
    rank: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The arguments of :func:`normalize`, float32, with one value per entry of an input's first axis.

    Args:
        mean: of each channel of images, as a fraction of ``unit``, or of each feature.
        std: likewise.
        unit: the raw value that is scaled to 1: 255 for images, 1 for features.
        rank: number of dimensions of one input.
        device: device of the result.
    """
    first_axis = (-1, *[1] * (rank - 1))
    means, stds = (torch.tensor(one, dtype=torch.float64).view(first_axis) for one in (mean, std))
    shift = -means if unit == 1 else -means / stds
    return (1 / (unit * stds)).float().to(device), shift.float().to(device)


def normalize(inputs: Tensor, scale: Tensor, shift: Tensor, unit: float) -> Tensor:
    """``(x / unit - mean) / std`` as float32, with the result of :func:`scale_and_shift`.

    Args:
        inputs: ``(batch, *shape)``.
        scale: 1 / (unit * std).
        shift: added after scaling; for features, whose mean may be many times their deviation, before
            scaling.
        unit: 255 for images, 1 for features.
    """
    if unit == 1:
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        return ((wide + shift) * scale).float()
    return inputs.to(torch.float32, copy=True).mul_(scale).add_(shift)


def permutation(seed: int, task_id: int, pixels: int) -> Tensor:
    """``(pixels,)`` int64: the original index of each permuted pixel, from seed and task only."""
    return torch.randperm(pixels, generator=seeded_generator("permutation", seed, task_id))


def permute(images: Tensor, order: Tensor) -> Tensor:
    """Reorder the pixels of every channel of images, ``(batch, channels, height, width)``."""
    return images.flatten(2).index_select(2, order).view_as(images)


def rotate(images: Tensor, degrees: float, background: Tensor | float) -> Tensor:
    """Rotate images counterclockwise around their center, with bilinear interpolation.

    Args:
        images: ``(batch, channels, height, width)`` float32.
        degrees: 0 returns the images themselves.
        background: the value of pixels from outside the image.
    """
    if degrees == 0:
        return images
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    cos, sin = float(angle.cos()), float(angle.sin())
    # Map coordinates in the rotated image to the original, both from -1 to 1.
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=images.device)
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


def _normalize(images: Tensor, _: int, mean: list[float], std: list[float], unit: float) -> Tensor:
    affine = scale_and_shift(mean, std, unit, images.dim() - 1, images.device)
    return normalize(images, *affine, unit)


def _permute(images: Tensor, task: int, seed: int, first: bool, _: list[int]) -> Tensor:
    if task == 0 and not first:
        return images
    pixels = images.shape[-2] * images.shape[-1]
    return permute(images, permutation(seed, task, pixels).to(images.device))


def _rotate(images: Tensor, task: int, degrees: float, tasks: int, background: float) -> Tensor:
    return rotate(images, task * degrees / tasks, background)


#: Each function maps images, the task within its stream and the arguments of a record to images.
STEPS: Mapping[str, Callable[..., Tensor]] = {
    "resize": lambda images, _, size: resize(images, size),
    "center_crop": lambda images, _, size: center_crop(images, size),
    "normalize": _normalize,  # mean, std, unit
    "permute": _permute,  # seed, whether the first task is permuted too, first pixels of task 1
    "rotate": _rotate,  # degrees of the task that would follow the last, tasks, background
}
BY_TASK = ("permute", "rotate")
"""Steps that differ between the tasks of a stream."""


# --- the record ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preparation:
    """The preprocessing of some consecutive tasks; only numbers and strings.

    Args:
        tasks: number of tasks that share it.
        dtype: of raw inputs: ``uint8`` (images, 0 to 255), ``float32`` or ``float64`` (features, in the
            units of the data) or ``int64`` (tokens).
        shape: of one raw input; 0 for square images of any size.
        steps: in order; None if the stream preprocesses with custom code.
        code: the name of that code, else empty.
        offset: the number of its first task, for steps that differ between tasks, of a stream that
            continued another one.
    """

    tasks: int
    dtype: str
    shape: tuple[int, ...]
    steps: list[Step] | None
    code: str = ""
    offset: int = 0

    def record(self) -> dict[str, Any]:
        """The record as plain values, for JSON and checkpoints."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Preparation":
        """Read the result of :meth:`record`, which is untrusted.

        Raises:
            ValueError: it is not a valid record.
        """
        made = cls(**{**record, "shape": tuple(record["shape"])})
        sizes = [made.tasks, *(size or 1 for size in made.shape)]
        if not (
            all(type(size) is int and 0 < size < 2**24 for size in sizes)
            and type(made.offset) is int
            and 0 <= made.offset < 2**24
            and made.dtype in _KINDS
            and isinstance(made.code, str)
            and (made.steps is None or all(map(_is_step, made.steps)))
        ):
            raise ValueError(f"a preparation of {record!r:.200}")
        for name, *arguments in made.steps or []:
            if name == "permute":
                _check_permutation(*arguments, pixels=made.shape[-2] * made.shape[-1])
        return made

    @property
    def differs_by_task(self) -> bool:
        """Whether its tasks preprocess the same raw input differently."""
        return self.tasks > 1 and (self.steps is None or self.counts_tasks)

    @property
    def counts_tasks(self) -> bool:
        """Whether a step depends on the number of the task."""
        return any(step[0] in BY_TASK for step in self.steps or ())

    def is_one(self, inputs: object) -> bool:
        """Whether this is a single raw input."""
        return isinstance(inputs, Tensor) and self._fits(inputs.shape)

    def batch(self, inputs: object) -> Tensor:
        """Convert raw inputs to a batch of the stream's dtype and units.

        Args:
            inputs: ``(batch, *shape)``, or one input ``(*shape,)``.

        Returns:
            ``(batch, *shape)``: uint8, or floats in the stream's units (0 to 255 for images), or int64.

        Raises:
            ConfigurationError: the inputs have another type, shape or range.
        """
        if not isinstance(inputs, Tensor):
            raise ConfigurationError(
                f"Expected inputs to be a tensor, but got {type(inputs).__name__}. Pass "
                "torch.as_tensor(inputs)."
            )
        batch = inputs[None] if self.is_one(inputs) else inputs
        if not self._fits(batch.shape[1:]):
            raise ConfigurationError(
                f"Expected inputs to be of shape (batch, {self._shape}) or ({self._shape}), like the "
                f"stream's raw inputs, but got {_listed(inputs.shape)}. Reshape them; "
                "images.unsqueeze(-3) adds a channel to grayscale images."
            )
        return _KINDS[self.dtype](batch)

    def _fits(self, shape: Sequence[int]) -> bool:
        if len(shape) != len(self.shape):
            return False
        sizes = [size for size, own in zip(shape, self.shape, strict=True) if not own]
        fits = all(own in (0, size) for size, own in zip(shape, self.shape, strict=True))
        return fits and len(set(sizes)) <= 1 and all(sizes)

    @property
    def _shape(self) -> str:
        return ", ".join(str(size) if size else "size" for size in self.shape)

    def apply(self, inputs: Tensor, task: int) -> Tensor:
        """Preprocess a raw batch.

        Args:
            inputs: the result of :meth:`batch`.
            task: index within these tasks, from 0.
        """
        for name, *arguments in self.steps or []:
            inputs = STEPS[name](inputs, self.offset + task, *arguments)
        return inputs


def read_preparations(records: Sequence[Mapping[str, Any]], num_tasks: int) -> list[Preparation]:
    """Read the records of a stream with ``num_tasks`` tasks, which are untrusted.

    Raises:
        ValueError: they are not valid records.
    """
    made = [Preparation.of_record(one) for one in records]
    if sum(one.tasks for one in made) != num_tasks:
        raise ValueError(f"preparations of {sum(one.tasks for one in made)} of {num_tasks} tasks")
    return made


def kind_of(raw: Tensor) -> str:
    """The ``dtype`` of a record for raw inputs stored like this tensor."""
    if raw.dtype == torch.uint8:
        return "uint8"
    if raw.dtype == torch.float64:
        return "float64"
    return "float32" if raw.is_floating_point() else "int64"


def find_preparation(preparations: Sequence[Preparation], task: int) -> tuple[Preparation, int]:
    """The preparation of a task, and the task's index within it."""
    for one in preparations:
        if task < one.tasks:
            return one, task
        task -= one.tasks
    raise ConfigurationError(
        "Expected the module to have the preprocessing of its tasks, but it has no stream yet. "
        "Call trainer.fit(module, stream), module.attach(stream) or load a checkpoint first."
    )


def first_preparations(preparations: Sequence[Preparation], tasks: int) -> list[Preparation]:
    """Those of the first tasks of a stream; equal ones next to each other are one."""
    found: list[Preparation] = []
    for one in preparations:
        number = min(one.tasks, tasks - sum(other.tasks for other in found))
        if number and found and replace(found[-1], tasks=one.tasks) == one:
            found[-1] = replace(one, tasks=found[-1].tasks + number)
        elif number:
            found.append(replace(one, tasks=number))
    return found


def prepare_raw(preparations: Sequence[Preparation], inputs: object, task: int | Tensor) -> Tensor:
    """Preprocess raw inputs like their tasks' streams.

    Args:
        preparations: of all tasks of a stream.
        inputs: ``(batch, *shape)`` with the tasks' raw shape, or one input.
        task: the common task ID, or ``(batch,)``, one per sample.

    Returns:
        ``(batch, *input_shape)``, on the device of the inputs.

    Raises:
        ConfigurationError: the inputs have another type, shape or range, or the stream's code is needed.
    """
    if isinstance(task, int):
        own, within = find_preparation(preparations, task)
        return own.apply(own.batch(inputs), within)
    ids = sorted(set(task.tolist()))
    if len(ids) < 2 or (len(preparations) == 1 and not preparations[0].differs_by_task):
        return prepare_raw(preparations, inputs, ids[0] if ids else 0)
    found = [find_preparation(preparations, one) for one in ids]
    batch = found[0][0].batch(inputs)  # the rules of the others are checked below
    prepared = None
    for one, (own, within) in zip(ids, found, strict=True):
        rows = (task == one).to(batch.device)
        part = own.apply(own.batch(inputs[rows]), within)  # type: ignore[index]
        prepared = part.new_empty(len(batch), *part.shape[1:]) if prepared is None else prepared
        prepared[rows] = part
    assert prepared is not None
    return prepared


def differing_preparation(
    here: Sequence[Preparation], there: Sequence[Preparation]
) -> tuple[str, str] | None:
    """The first two that differ by more than rounding, in words; None if there are none."""
    for one, other in zip(here, there, strict=False):
        if not _close(one.record(), other.record()):
            return _described(one), _described(other)
    if len(here) != len(there):
        return f"{len(here)} parts", f"{len(there)}"
    return None


def _described(one: Preparation) -> str:
    steps = one.code or "; ".join(
        f"{name} {', '.join(map(_short, arguments))}" for name, *arguments in one.steps or []
    )
    return f"({one.dtype} of ({one._shape}): {steps or 'unchanged'})"


def _short(value: Any) -> str:
    if isinstance(value, list):
        listed = ", ".join(map(_short, value[:4]))
        return f"[{listed}{', ...' if len(value) > 4 else ''}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _close(one: Any, other: Any) -> bool:
    """Equal up to the rounding of sums, whose order differs between machines."""
    if isinstance(one, float) and isinstance(other, float | int):
        return isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_close, one, other))
    return bool(one == other)


# --- validation of raw inputs --------------------------------------------------------------------


def _images(inputs: Tensor) -> Tensor:
    if inputs.dtype == torch.uint8:
        return inputs
    if inputs.dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(
            "Expected images to be uint8 from 0 to 255, or float32 or float64 from 0 to 1, but got "
            f"{_dtype(inputs)}. Convert them: images.to(torch.uint8)."
        )
    low, high = (float(value) for value in inputs.aminmax()) if inputs.numel() else (0.0, 0.0)
    if not 0 <= low <= high <= 1:  # also rejects NaN
        raise ConfigurationError(
            f"Expected images of type {_dtype(inputs)} to be from 0 to 1, but got {low:g} to {high:g}. "
            "Pass images from 0 to 255 as uint8, or divided by 255; pass inputs that are already "
            "normalized to module(inputs)."
        )
    return inputs.mul(255).float()


def _floats(inputs: Tensor) -> Tensor:
    if inputs.dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(
            "Expected inputs to be float32 or float64 in the units of the stream's data, but got "
            f"{_dtype(inputs)}. Pass inputs.float()."
        )
    if not inputs.isfinite().all():
        raise ConfigurationError(
            "Expected inputs to be finite, but some are NaN or infinite. Fill them in as in the "
            "stream's data."
        )
    return inputs


def _tokens(inputs: Tensor) -> Tensor:
    if inputs.dtype == torch.bool or inputs.is_floating_point() or inputs.is_complex():
        raise ConfigurationError(
            f"Expected inputs to be tokens of an integer type, but got {_dtype(inputs)}. Pass "
            "inputs.long()."
        )
    return inputs.long()


_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "uint8": _images,
    "float32": lambda inputs: _floats(inputs).float(),
    "float64": lambda inputs: _floats(inputs).double(),
    "int64": _tokens,
}


def _dtype(inputs: Tensor) -> str:
    return str(inputs.dtype).removeprefix("torch.")


def _listed(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


# --- validation of records -----------------------------------------------------------------------


def _is_step(step: Any) -> bool:
    """Whether a step of a record is known, with arguments of the right types and ranges."""
    match step:
        case ["resize" | "center_crop", size]:
            return type(size) is int and 0 < size <= MAX_SIZE
        case ["normalize", list(mean), list(std), unit]:
            numbers = [*mean, *std, unit]
            return (
                all(isinstance(x, float | int) and isfinite(x) for x in numbers)
                and len(mean) == len(std) > 0
                and min(*std, unit) > 0
            )
        case ["permute", int(), bool(), list(probe)]:
            return all(type(place) is int for place in probe)
        case ["rotate", degrees, int(tasks), background]:
            numbers = [degrees, background]
            return tasks > 0 and all(isinstance(x, float | int) and isfinite(x) for x in numbers)
    return False


def _check_permutation(seed: int, first: bool, probe: list[int], *, pixels: int) -> None:
    """Raise an error if this version of torch derives other permutations than in training."""
    if (
        not 0 < pixels <= MAX_SIZE**2
        or permutation(seed, 1, pixels)[: len(probe)].tolist() != probe
    ):
        raise ValueError(
            "permutations that this version of torch draws differently; only the version used for "
            "training can prepare its inputs"
        )
