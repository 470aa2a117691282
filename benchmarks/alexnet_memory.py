"""Memory needed for AlexNet on the sequence of eight data sets: by formula, and measured.

    python benchmarks/alexnet_memory.py
    python benchmarks/alexnet_memory.py --root DIR --method bd+ewc

By formula: weights, gradients, the optimizer's momentum, the method's state, and the tensors that a forward
pass saves for the backward pass of a batch of 128 images of 224 x 224 (counted with autograd's hooks). A
run on a GPU needs that much memory, plus the workspace of its libraries and the importance pass with a
batch of 256.
Measured: the peak resident size of a separate process that learns two tasks of 256 random images on the
CPU, including the images and about 700 MiB of libraries. With --root, of one that trains for an epoch on
each of the eight data sets in that folder, in their official layouts.
"""

import argparse
import logging
import resource
import subprocess
import sys
import warnings
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from bpn_lightning import ContinualModule
from bpn_lightning.costs import bytes_held
from bpn_lightning.datamodules import (
    ClassIncrementalDataModule,
    ContinualDataModule,
    EightDatasets,
)
from bpn_lightning.datamodules.loading import Samples
from bpn_lightning.datamodules.readers import ImageData
from bpn_lightning.nn import torchvision_backbone
from bpn_lightning.strategies import (
    EWC,
    BeneficialPerturbation,
    ContinualStrategy,
    GradientEpisodicMemory,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    ParameterSuperposition,
    SynapticIntelligence,
)

GIB = 2**30
METHODS = ["finetune", "ewc", "mas", "si", "lwf", "bd+ewc", "bd+psp", "gem"]
CLASSES, IMAGES, BATCH = 20, 256, 128


def strategies(method: str) -> list[ContinualStrategy]:
    """Of the packaged config of the eight data sets; H at its largest."""
    ewc = EWC(strength=1.0, update="clamped")
    bd = BeneficialPerturbation(rank=900, epsilon=0.001)
    made: dict[str, list[ContinualStrategy]] = {
        "finetune": [],
        "ewc": [ewc],
        "mas": [MemoryAwareSynapses()],
        "si": [SynapticIntelligence()],
        "lwf": [LearningWithoutForgetting()],
        "bd+ewc": [bd, ewc],
        "bd+psp": [bd, ParameterSuperposition(first_key="ones")],
        "gem": [GradientEpisodicMemory(memory_size=BATCH)],
    }
    return made[method]


@dataclass(eq=False, repr=False)
class RandomImages(ClassIncrementalDataModule):
    """Images of the size that the cache of the eight data sets holds."""

    def read(self) -> ImageData:
        """Noise."""
        images = torch.randint(256, (2 * IMAGES, 3, 224, 224), dtype=torch.uint8)
        samples = Samples(images, torch.arange(2 * IMAGES) % (2 * CLASSES))
        return ImageData(samples, samples, [str(k) for k in range(2 * CLASSES)], "memory")


def stream_of(root: str | None) -> ContinualDataModule:
    """The eight data sets of a folder, or random images."""
    if root is not None:
        return EightDatasets(
            root=root,
            epochs_per_task=1,
            batch_size=BATCH,
            eval_batch_size=2 * BATCH,
            expect_counts=False,  # the memory does not depend on the size of a set
        )
    return RandomImages(
        num_tasks=2,
        classes_per_task=CLASSES,
        epochs_per_task=1,
        batch_size=BATCH,
        eval_batch_size=2 * BATCH,
    )


def saved_for_backward(module: ContinualModule, stream: ContinualDataModule) -> int:
    """Bytes that autograd saves in one forward pass, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    raw = next(iter(stream.train_loader(0, 0)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = module(stream.prepare(raw).inputs)
        torch.nn.functional.cross_entropy(logits, raw.targets)
    return sum(kept.values())


def learn(method: str, root: str | None) -> None:
    """The stream; prints the parts in GiB."""
    torch.set_num_threads(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    stream = stream_of(root)
    module = ContinualModule(
        torchvision_backbone("alexnet"),
        mask="task",
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
    )
    own = strategies(method)
    Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=own,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    ).fit(module, stream)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    held = bytes_held(module.host.strategies, module.host).training
    if method == "gem":  # the gradient of every past task, for a sequence of eight
        held += 7 * weights
    activations = saved_for_backward(module, stream)
    total = 3 * weights + held + activations
    cells = [weights, 3 * weights, held, activations, total, peak]
    print(f"| {method} | " + " | ".join(f"{cell / GIB:.2f}" for cell in cells) + " |", flush=True)


def main() -> None:
    """A process for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, help="this one, in this process")
    parser.add_argument(
        "--root", help="the folder of the eight data sets; without it, random images"
    )
    options = parser.parse_args()
    if options.method:
        learn(options.method, options.root)
        return
    heads = (
        "weights",
        "with gradients and momentum",
        "method",
        "activations",
        "sum",
        "measured peak",
    )
    print(f"| GiB | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for method in METHODS:
        subprocess.run([sys.executable, __file__, "--method", method, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
