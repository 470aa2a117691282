"""Bytes of bundles on disk compared with separate networks, for two experiments and a frozen network.

    python benchmarks/bundle_sizes.py
    python benchmarks/bundle_sizes.py --rows mnist_inc

Sizes do not depend on what is learned: the tasks have made data of the experiment's shape, a few images of each class,
and one epoch. ``frozen_lite0`` is an EfficientNet-Lite0 (random weights of the same sizes) as a frozen core, whose tasks have
biases of all its layers and a head of two classes. ``shared`` is everything
but the folders of tasks, other formats and the card; ``a task`` is its folder, hashes and words included. Separate networks are
each task's folded network, as safetensors.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from safetensors.torch import save

from bpn_lightning import ContinualModule, export_module
from bpn_lightning.datamodules import SplitArrays
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.modes import Modes, load
from bpn_lightning.modes.bundle import CARD, TASKS
from bpn_lightning.modes.exporters import write_onnx
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import BeneficialPerturbation

OF_EACH_CLASS = 4


@dataclass(frozen=True)
class Setting:
    """Network, modes and tasks of an experiment.

    Args:
        tasks: their number; each has two classes.
        shape: height and width of an image, and channels where they are not one.
        make: gives the callbacks, and the arguments of ContinualModule.
        onnx: whether ONNX files are written, too; of a deep network they take minutes.
    """

    tasks: int
    shape: Sequence[int]
    make: Callable[[], tuple[list[Any], dict[str, Any]]] = field(repr=False)
    onnx: bool = True


def _biases() -> tuple[list[Any], dict[str, Any]]:
    return [BeneficialPerturbation(10)], {"backbone": MLP([300] * 5), "mask": "all"}


def _frozen() -> tuple[list[Any], dict[str, Any]]:
    from bpn_lightning.nn import efficientnet_lite_backbone

    backbone = efficientnet_lite_backbone("lite0", size=32)
    return [BeneficialPerturbation(10)], {"backbone": backbone, "mask": "task", "train": "modes"}


SETTINGS: Mapping[str, Setting] = {
    "mnist_inc": Setting(5, (28, 28), _biases),
    "cifar100_inc": Setting(10, (32, 32, 3), _biases),
    "frozen_lite0": Setting(10, (32, 32, 3), _frozen, onnx=False),
}


def made(setting: Setting, folder: Path) -> Path:
    """The bundle of a run over made data."""
    labels = np.arange(2 * setting.tasks).repeat(OF_EACH_CLASS)
    draw, shape = np.random.default_rng(0), (len(labels), *setting.shape)
    arrays = {f"{part}_labels": labels for part in ("train", "test")}
    for part in ("train", "test"):
        arrays[f"{part}_images"] = draw.integers(0, 256, shape, dtype=np.uint8)
    stream = SplitArrays(
        num_tasks=setting.tasks, classes_per_task=2, epochs_per_task=1, path=arrays
    )
    callbacks, arguments = setting.make()
    module = ContinualModule(**arguments)
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, stream)
    return export_module(module.eval(), folder, include_pretrained=True)


def sizes(name: str, folder: Path) -> Iterator[str]:
    """Cells of a row."""
    setting = SETTINGS[name]
    bundle = made(setting, folder / name)
    _, arguments = setting.make()
    net = load(bundle, backbone=arguments["backbone"])
    shared = sum(f.stat().st_size for f in bundle.iterdir() if f.is_file() and f.name != CARD)
    each = [_bytes_in(place) for place in (bundle / TASKS).iterdir()]
    separate = sum(
        len(save({n: v.contiguous() for n, v in net.fold(task).state_dict().items()}))
        for task in net.tasks
    )
    whole = shared + sum(each)
    yield from (name, f"{len(each)}", f"{shared:,}", f"{fmean(each):,.0f}", f"{whole:,}")
    yield from _onnx(net, folder / f"{name}_onnx") if setting.onnx else ("", "")
    yield from (f"{separate:,}", f"{separate / whole:.2f}")


def _onnx(net: Modes, folder: Path) -> tuple[str, str]:
    """Bytes of the mixed graph, and of an adapter."""
    try:
        files = write_onnx(net, folder)
    except (ConfigurationError, ModuleNotFoundError) as error:
        print(f"{folder.name}: none, {error}", file=sys.stderr)
        return "", ""
    adapters = [f.stat().st_size for f in files if f.suffix == ".onnx_adapter"]
    mixed = folder / "mixed.onnx"
    return (
        f"{mixed.stat().st_size:,}" if mixed.exists() else "",
        f"{fmean(adapters):,.0f}" if adapters else "",
    )


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


TITLES = (
    "network and tasks",
    "tasks",
    "shared",
    "a task",
    "bundle",
    "mixed.onnx",
    "an .onnx_adapter",
    "separate networks",
    "over the bundle",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    options = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"| {' | '.join(TITLES)} |\n{'|---' * len(TITLES)}|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.rows:
            print(f"| {' | '.join(sizes(name, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
