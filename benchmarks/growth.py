"""Streams that go on: five tasks of two digits, learned at once, and three of them and then two more.

    python benchmarks/growth.py
    python benchmarks/growth.py --only ewc gem

For each method and mask the number of values that differ in a single bit, of the weights, the strategies'
state, the random states and each task's logits, and the number of all values. ``longer`` resumes a
checkpoint with a stream that begins with the learned tasks, ``new`` extends the module by the new tasks
alone. With the mask ``all``, ten classes are reserved; ``all, none reserved`` is what happens without: the
softmax of the first tasks was over fewer classes, and the last column is the largest difference of a logit.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import SGD

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import random_state
from bpn_lightning.registry import strategies
from bpn_lightning.trainer.processes import leaves

PAST, ALL = 3, 5
MASKS: Mapping[str, Mapping[str, Any]] = {
    "all": {"mask": "all", "reserve_classes": 2 * ALL},
    "seen": {"mask": "seen"},
    "task": {"mask": "task"},
    "shared": {"mask": "shared"},
    "all, none reserved": {"mask": "all"},
}


def fit(module: ContinualModule, stream: SplitDigits, method: str, path: Path | None = None) -> Any:
    """Learn a stream, or what a checkpoint has not learned of it."""
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=[strategies()[name].load()() for name in method.split("+")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, stream, ckpt_path=path, weights_only=True)
    return trainer


def learned(module: ContinualModule) -> dict[str, Tensor]:
    """All that is learned, as tensors by name."""
    inputs = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = {k: v for k, v in module.state_dict().items() if "accuracy_matrix" not in k}
    with torch.no_grad():
        logits = [module(inputs, task=task) for task in range(ALL)]
    tree = {
        "logits": logits,
        "weights": weights,
        "states": [strategy.state_dict() for strategy in module.host.strategies],
        "random": random_state()["torch"],
    }
    found = dict(leaves(tree))
    return {
        path: torch.as_tensor(leaf).detach().clone()
        for path, leaf in found.items()
        if isinstance(leaf, Tensor | int | float)
    }


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
    """How many values differ, or are in one of the two only."""
    found = sum(one[k].numel() if k in one else other[k].numel() for k in one.keys() ^ other.keys())
    for path in one.keys() & other.keys():
        a, b = one[path], other[path]
        if a.shape != b.shape:
            found += a.numel()
        else:
            found += int((~((a == b) | (a.isnan() & b.isnan()))).sum())
    return found


def compare(method: str, mask: str) -> tuple[int | None, int | None, int, float]:
    """Differing values of the two ways, all values, and the largest difference of a logit."""

    def module() -> ContinualModule:
        torch.manual_seed(7)
        optimizer = partial(SGD, lr=0.05)
        return ContinualModule(MLP([32, 32]), optimizer=optimizer, **MASKS[mask])

    def stream(first: int, stop: int) -> SplitDigits:
        order: list[str | int] = list(range(2 * first, 2 * stop))
        return SplitDigits(
            class_order=order, epochs_per_task=2, seed=3, domain_incremental=mask == "shared"
        )

    whole = module()
    fit(whole, stream(0, ALL), method)
    wanted = learned(whole)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "past.ckpt"
        past = module()
        fit(past, stream(0, PAST), method).save_checkpoint(path)
        longer = module()
        fit(longer, stream(0, ALL), method, path)
    found = learned(longer)
    new: int | None = None
    if method != "joint":  # which trains on the past's data
        past.extend(rest := stream(PAST, ALL))
        fit(past, rest, method)
        new = differing(learned(past), wanted)
    gaps = [
        (found[k] - wanted[k])[found[k].isfinite()].abs().max() for k in wanted if "logits" in k
    ]
    number = sum(value.numel() for value in wanted.values())
    return differing(found, wanted), new, number, float(max(gaps))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[*strategies(), "bd+ewc"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| method | mask | longer | new | values | largest difference of a logit |")
    print("|---|---|---|---|---|---|")
    for method in arguments.only:
        for mask in MASKS:
            longer, new, number, gap = compare(method, mask)
            said = "-" if new is None else new
            print(f"| {method} | {mask} | {longer} | {said} | {number:,} | {gap:.2g} |", flush=True)


if __name__ == "__main__":
    main()
