"""Effect of common approximations on EWC's Fisher and MAS's importances, on the digits.

    python benchmarks/importance_definitions.py

A network is trained on the first two digits; then importances are computed on the same images as defined,
from per-sample gradients, and from gradients of whole batches. Prints the ratio of their sums.
"""

from collections.abc import Iterator

import lightning as L
import torch
from torch.nn import functional as F

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.functional.importance import fisher_diagonal, output_sensitivity
from bpn_lightning.nn import MLP

BATCH = 128
SEEDS = (0, 1, 2)


def main() -> None:
    """Print the mean ratios."""
    ratios = torch.tensor([_ratios(seed) for seed in SEEDS])
    fisher, sensitivity = ratios.mean(0).tolist()
    print(f"batches of {BATCH}, mean of seeds {', '.join(map(str, SEEDS))}")
    print(f"Fisher: squared gradient of a batch's mean loss: {fisher:.3f} of the Fisher")
    print(f"MAS: absolute gradient of a batch's sum: {sensitivity:.3f} of Omega")


def _ratios(seed: int) -> tuple[float, float]:
    L.seed_everything(seed, verbose=False)
    stream = SplitDigits(num_tasks=1, classes_per_task=2, epochs_per_task=30)
    module = ContinualModule(MLP([64] * 2), optimizer=_sgd)
    trainer = L.Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, stream)
    parameters = dict(module.network.named_parameters())
    defined = (
        _total(fisher_diagonal(module.host, 0, parameters)),
        _total(output_sensitivity(module.host, 0, parameters)),
    )
    squares, absolutes, count = 0.0, 0.0, 0
    for batch in stream.loader(0, "train", BATCH):
        prepared = stream.prepare(batch)
        logits = module(prepared.inputs, task=0)
        size = len(batch.targets)
        loss = F.cross_entropy(logits, batch.targets)
        of_loss = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        of_length = torch.autograd.grad(logits.square().sum(), list(parameters.values()))
        squares += size * sum(float(g.square().sum()) for g in of_loss)
        absolutes += sum(float(g.abs().sum()) for g in of_length)
        count += size
    return squares / count / defined[0], absolutes / count / defined[1]


def _sgd(params: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


def _total(importances: dict[str, torch.Tensor]) -> float:
    return sum(float(tensor.sum()) for tensor in importances.values())


if __name__ == "__main__":
    main()
