"""Data of one's own: what ``bpn-data check`` says of it, and the config that ``bpn-fit --new`` writes for it."""

import argparse
import shlex
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from math import prod
from pathlib import Path

import yaml

from bpn_lightning.cli.config_files import CONFIGS
from bpn_lightning.datamodules.survey import Survey, survey
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.files.untrusted import read_text
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.terminal import printable

__all__ = ["describe", "faults_of", "new_config"]

_PER_TASK = 2
_FEW = 3  # classes of which the last is a task by itself
_MOST_NAMED = 5
_UNEVEN = 10  # times the training samples of the smallest class
_SMALL = 64  # pixels up to which patches of the images themselves are learned


def faults_of(found: Survey) -> list[str]:
    """What keeps a run from beginning, one sentence each; every file that cannot be decoded."""
    faults = [f"{fault.path} is damaged: {fault.reason}." for fault in found.faults]
    for name in found.incomplete:
        train, test = found.classes[name]
        lacks = " and ".join(
            part for part, count in (("training", train), ("test", test)) if not count
        )
        faults.append(
            f"The class {name} has no {lacks} samples. Add some, or leave it out of class_order."
        )
    if any(0 in shape for shape in found.shapes):
        faults.append(f"Samples of {_shape(min(found.shapes, key=_area))} hold no numbers.")
    if len(found.classes) < _PER_TASK:
        faults.append(f"A stream has two or more classes, and there are {len(found.classes)}.")
    return faults


def describe(found: Survey) -> list[str]:
    """Classes, sizes, what looks odd, and the stream that it would be, line by line."""
    width = max([5, *map(len, found.classes)])
    lines = [f"{'class':<{width}}{'train':>9}{'test':>9}"]
    lines += [
        f"{name:<{width}}{train:>9,}{test:>9,}" for name, (train, test) in found.classes.items()
    ]
    lines += ["", _sizes(found), *(f"Note: {note}" for note in _notes(found))]
    if not faults_of(found):
        lines += ["", f"A stream of {_stream(found)}."]
    return lines


def _sizes(found: Survey) -> str:
    color = {"folders", "images"} & {found.kind}
    what = {"folders": "images", "images": "images"}.get(found.kind, found.kind)
    if not found.shapes:
        return f"No {what}."
    (usual, count), *_ = found.shapes.most_common(1)
    text = f"{found.shapes.total():,} {what} of {_shape(usual)}"
    if len(found.shapes) > 1:
        smallest, largest = min(found.shapes, key=_area), max(found.shapes, key=_area)
        text = (
            f"{found.shapes.total():,} {what} from {_shape(smallest)} to {_shape(largest)}; {count:,} have "
            f"{_shape(usual)}"
        )
    if color:
        text += f" pixels, {'gray' if found.gray else 'in color'}"
    return f"{text}."


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape) or "no size"


def _area(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return prod(shape), shape


def _notes(found: Survey) -> list[str]:
    notes = []
    counts = {name: train for name, (train, _) in found.classes.items() if train}
    if counts and max(counts.values()) >= _UNEVEN * min(counts.values()):
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        notes.append(
            f"{most} has {counts[most] / counts[least]:.0f} times the training samples of {least}. Balanced "
            "accuracy weighs classes alike; it is in results.json."
        )
    if found.in_both:
        notes.append(
            f"{len(found.in_both):,} test files are training files, too, byte by byte: {_few(found.in_both)}. "
            "Accuracies would flatter."
        )
    if found.passed_over:
        notes.append(
            f"{len(found.passed_over):,} files are no images by their suffixes, and left out: "
            f"{_few(found.passed_over)}."
        )
    return notes


def _few(paths: Sequence[Path]) -> str:
    return ", ".join(
        [*map(str, islice(paths, _MOST_NAMED)), *(["..."] if paths[_MOST_NAMED:] else [])]
    )


def _stream(found: Survey) -> str:
    ends = [*accumulate(_tasks(len(found.classes)), initial=0)]
    names = [*found.classes]
    tasks = [" + ".join(names[first:stop]) for first, stop in pairwise(ends)]
    named = tasks if len(tasks) <= _MOST_NAMED else [*tasks[:2], "...", tasks[-1]]
    return f"{len(tasks)} tasks: {'; '.join(named)}"


def _tasks(count: int) -> list[int]:
    """Classes of each task: two, the odd one in the last task."""
    if count <= _FEW:
        return [count - 1, 1]
    return [_PER_TASK] * (count // _PER_TASK - 1) + [_PER_TASK + count % _PER_TASK]


# ------------------------------------------------------------------------------ bpn-fit --new

_CONFIG = """\
# bpn-fit --config {name}
#
# {described}.
# `bpn-fit --config {name} --method NAME` takes another method; `bpn-fit --list` has their names.
seed_everything: 0
{method}

trainer:
  max_epochs: -1  # the length of the stream
  accelerator: auto
  devices: 1

{model}

data:
  class_path: {stream}
  init_args:
    {place}
    classes_per_task: {per_task}  # one number for all tasks, or a list with one for each
    class_order: {classes}
    class_order_seed: null  # a number shuffles the classes; `stream` does by the seed
    validation_fraction: 0.0  # 0.1 holds out a tenth of the training samples, to choose settings by
    epochs_per_task: {epochs}
    batch_size: 32
"""

_MODELS = {
    "large": """\
# A ResNet-18 of ImageNet stands before everything and stays as it is; torchvision downloads its weights once
# (`weights: null` and `weights_file: FILE` take them from a file). A linear head is trained for each task, and a
# shared-covariance Gaussian names the task of an image. No image is kept.
{frozen}""",
    "small": """\
# Patches of the first task's images are learned once, and a Gaussian for each class stands on their features: one
# pass over the images, no image is kept, and no task ID is needed. What a network reaches is to be compared with it:
# --method bd+ewc trains one on the same features.
fronts:
  patches:
    num_patches: 200

model:
  backbone:
    class_path: bpn_lightning.nn.MLP
    init_args:
      hidden: [300]
  optimizer:
    class_path: torch.optim.SGD
    init_args:
      lr: 0.01
  mask: all  # one head over all classes""",
    "rows": """\
# BD+EWC: a stored bias for each task, told apart by the task ID. `--method slda` trains no network, needs no task
# ID, and is what a network has to beat.
strategies:
  bd:
    schedule: linear  # the step of M falls to 0 over each task
  ewc:
    strength: 2000.0

model:
  backbone:
    class_path: bpn_lightning.nn.MLP
    init_args:
      hidden: [64, 64]
  optimizer:
    class_path: torch.optim.SGD
    init_args:
      lr: 0.05
  mask: all  # one head over all classes""",
}
_METHODS = {
    "large": "method: finetune\ngate: slda\nfront: frozen",
    "small": "method: slda\nfront: patches",
    "rows": "method: bd+ewc",
}


def new_config(argv: Sequence[str]) -> str:
    """Write a config for a data set of one's own.

    Args:
        argv: ``--new FILE --data PATH``, of the command.

    Returns:
        What to say of it.

    Raises:
        ConfigurationError: there is such a file, its name is no config's, or tokens need a network that begins
            with an embedding.
        DataError: the data cannot be used as they are.
    """
    file, source = _paths(argv)
    found = survey(source)
    faults = faults_of(found)
    if faults:
        more = f" `bpn-data check {shlex.quote(str(source))}` lists {len(faults):,} of such faults."
        raise DataError(
            f"Expected {source} to be a data set that can be used, but: {faults[0]}{more if len(faults) > 1 else ''}"
        )
    if found.kind == "tokens":
        raise ConfigurationError(
            f"Expected --data to hold images or features, but {source} holds tokens, which need a network that "
            "begins with torch.nn.Embedding. docs/streams.md, `Features and tokens`, has one."
        )
    text = _config(file, found)
    try:
        write_atomically(file, text.encode())
    except OSError as error:
        raise ConfigurationError(
            f"Expected --new to be a file that can be written, but got {file}: {error.strerror}. Name another one."
        ) from error
    return f"{file}: {printable(_stream(found))}.\nNext: bpn-fit --config {shlex.quote(str(file))}"


def _paths(argv: Sequence[str]) -> tuple[Path, Path]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--new")
    parser.add_argument("--data")
    usage = ConfigurationError(
        f"Expected --new FILE and --data PATH, and nothing else, but got {' '.join(argv)}. Write other "
        "settings into FILE, or give them with it."
    )
    try:
        flags, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise usage from error
    if others or flags.data is None:
        raise usage
    file, source = Path(flags.new), Path(flags.data).expanduser().absolute()
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigurationError(
            f"Expected --new to be a file that ends in .yaml, but got {flags.new!r}. Its name is that of the "
            "experiment."
        )
    if file.exists():
        raise ConfigurationError(
            f"Expected --new to be a file that does not exist, but {file} does. Remove it, or name another one."
        )
    if not source.exists():
        raise ConfigurationError(
            f"Expected --data to be a folder of images or an .npz archive, but there is no {source}."
        )
    return file, source


def _config(file: Path, found: Survey) -> str:
    archive = found.kind != "folders"
    kind = "rows" if found.kind == "features" else _kind_of_images(found)
    place = [f"{'path' if archive else 'root'}: {_inline(str(found.source))}"]
    if not archive:
        place.append(f"image_size: {224 if kind == 'large' else max(_usual(found))}  # pixels")
        place.append(f"channels: {1 if found.gray and kind == 'small' else 3}")
    elif kind == "large":
        place.append("channels: 3")
    return _CONFIG.format(
        name=file.name,
        described=printable(" ".join(describe(found)[-1].splitlines())).rstrip("."),
        method=_METHODS[kind],
        model=_MODELS[kind].replace("{frozen}", _frozen()),
        stream="SplitArrays" if archive else "SplitImageFolder",
        place="\n    ".join(place),
        per_task=_inline(_per_task(len(found.classes))),
        classes=_inline([*found.classes]),
        epochs={"large": 5, "small": 10, "rows": 20}[kind],
    )


def _frozen() -> str:
    """Front, gate and head of the packaged config for images of one's own."""
    text = read_text(CONFIGS / "own_images_resnet18.yaml")
    return text[text.index("fronts:") : text.index("\ndata:")].rstrip()


def _per_task(count: int) -> int | list[int]:
    sizes = _tasks(count)
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _kind_of_images(found: Survey) -> str:
    return "small" if max(_usual(found)) <= _SMALL else "large"


def _usual(found: Survey) -> tuple[int, ...]:
    return found.shapes.most_common(1)[0][0]


def _inline(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
