"""What training several seeds as one stacked network would gain.

    python benchmarks/seeds_at_once.py

S networks of the same shape become one whose weights have a first dimension of size S, mapped over by
torch.func; each has its own initial weights and its own order of the samples. Compared with S
hand-written loops one after the other, on the same batches: the weights must agree. Turns alternate; CPU
time of one thread.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

NETWORKS = {
    "64-32-10, batches of 10": ([64, 32, 10], 10, 300),
    "784-4 x 128-10, batches of 32": ([784, 128, 128, 128, 128, 10], 32, 100),
    "784-4 x 128-10, batches of 128": ([784, 128, 128, 128, 128, 10], 128, 60),
    "784-5 x 300-10, batches of 128": ([784, 300, 300, 300, 300, 300, 10], 128, 30),
}
LR = 0.01

Weights = dict[str, Tensor]


def network(widths: list[int], seed: int) -> nn.Sequential:
    """Fully connected, ReLU."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for entering, leaving in pairwise(widths):
        layers += [nn.Linear(entering, leaving), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def one_by_one(nets: list[nn.Sequential], images: Tensor, labels: Tensor, orders: Tensor) -> None:
    """S loops by hand; ``orders`` is ``(S, steps, batch)``."""
    for net, order in zip(nets, orders, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        for chosen in order:
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def at_once(nets: list[nn.Sequential], images: Tensor, labels: Tensor, orders: Tensor) -> Weights:
    """One loop over stacked weights."""
    weights, _ = stack_module_state(list(nets))
    weights = {name: value.detach().clone() for name, value in weights.items()}
    base = nets[0]

    def loss_of(own: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, own, (inputs,)), targets)

    gradients_of = vmap(grad(loss_of))
    for step in range(orders.shape[1]):
        chosen = orders[:, step]
        gradients = gradients_of(weights, images[chosen], labels[chosen])
        torch._foreach_add_(list(weights.values()), list(gradients.values()), alpha=-LR)
    return weights


def taken(run: Callable[[], object]) -> float:
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Print, for every network, time over that of the loops, and the largest difference of weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 20])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | seeds | at once over one by one | largest difference |\n|---|---|---|---|")
    for name, (widths, batch, steps) in NETWORKS.items():
        images, labels = torch.randn(2000, widths[0]), torch.randint(10, (2000,))
        for seeds in options.seeds:
            orders = torch.randint(2000, (seeds, steps, batch))
            ratios = []
            for _ in range(options.repeats):
                nets = [network(widths, seed) for seed in range(seeds)]
                stacked: list[Weights] = []
                together = taken(lambda: stacked.append(at_once(nets, images, labels, orders)))  # noqa: B023
                ratios.append(together / taken(lambda: one_by_one(nets, images, labels, orders)))  # noqa: B023
            expected, _ = stack_module_state(list(nets))
            gap = max(float((stacked[0][n] - v.detach()).abs().max()) for n, v in expected.items())
            print(f"| {name} | {seeds} | {median(ratios):.2f} | {gap:.0e} |")


if __name__ == "__main__":
    main()
