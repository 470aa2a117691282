"""Split MNIST in three scenarios, compared with the table of Hsu et al. 2018 (arXiv 1810.12488).

    python benchmarks/reference_split_mnist.py --root DIR

Their settings and strengths, our implementations; percent of all seen tasks' test images after the
fifth task, each task counting the same. DIR is torchvision's root with MNIST in it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bpn_lightning.analysis.statistics import interval
from bpn_lightning.bench.cell import Cell
from bpn_lightning.bench.runner import Runner
from bpn_lightning.run.results import read_results

CONFIG = Path(__file__).with_name("split_mnist.yaml")

#: How the classes of a task and the output are put: task-, domain- and class-incremental.
SCENARIOS: dict[str, dict[str, Any]] = {
    "task": {"model.mask": "task"},
    "domain": {"model.mask": "shared", "data.init_args.domain_incremental": True},
    "class": {"model.mask": "seen"},
}


class Row(NamedTuple):
    """A method: its strength in each scenario, other settings, the table's means and deviations."""

    method: str
    strengths: tuple[float, float, float] | None
    settings: dict[str, Any]
    published: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


FISHER = {"strategies.ewc.fisher": "predicted", "strategies.ewc.update": "gradient"}
SI = {"damping": 0.1, "clamp": "none", "update": "gradient"}
GEM = {
    "model.optimizer.class_path": "torch.optim.SGD",
    "model.optimizer.init_args.lr": 0.01,
    "strategies.gem.margin": 0.5,
    "strategies.gem.memory_size": 220,
}

ROWS = {
    "fine-tuning (Adam)": Row("finetune", None, {}, ((93.46, 2.01), (55.16, 1.38), (19.71, 0.08))),
    "EWC": Row("ewc", (100, 100, 600), FISHER, ((97.70, 0.81), (58.85, 2.59), (19.80, 0.05))),
    "online EWC": Row(
        "ewc",
        (400, 700, 100),
        {**FISHER, "strategies.ewc.gamma": 1.0},
        ((98.04, 1.10), (57.33, 1.44), (19.77, 0.04)),
    ),
    "SI": Row(
        "si",
        (300, 3000, 600),
        {f"strategies.si.{key}": value for key, value in SI.items()},
        ((98.56, 0.49), (64.76, 3.09), (19.67, 0.09)),
    ),
    "MAS": Row(
        "mas",
        (1, 10000, 1),
        {"strategies.mas.update": "gradient"},
        ((99.22, 0.21), (68.57, 6.85), (19.52, 0.29)),
    ),
    "LwF": Row(
        "lwf",
        (10, 10, 10),
        {"strategies.lwf.heads": "joint"},
        ((99.60, 0.03), (71.02, 1.26), (24.17, 0.33)),
    ),
    "GEM, 220 per task": Row("gem", None, GEM, ((98.42, 0.10), (96.16, 0.35), (92.20, 0.12))),
    "joint": Row("joint", None, {}, ((99.52, 0.16), (98.59, 0.15), (97.53, 0.30))),
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="torchvision's root, with MNIST in it")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/reference")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options = parser.parse_args()

    cells = {
        (name, scenario): [_cell(name, scenario, seed) for seed in options.seeds]
        for name in options.rows
        for scenario in options.scenarios
    }
    every = [cell for of_pair in cells.values() for cell in of_pair]
    root = Path(options.runs)
    passed_on = ("--data.init_args.root", options.root)
    failures = Runner(root, options.jobs, retry=True, passed_on=passed_on).run(every)
    if failures:
        sys.exit("\n\n".join(map(str, failures)))

    seeds = ", ".join(map(str, options.seeds))
    print(f"Split MNIST, accuracy in %: ours, seeds {seeds}, mean and 95 % interval;")
    print("Hsu et al.: 10 runs, mean and 95 % interval from their standard deviation\n")
    titles = [f"{scenario}: ours | Hsu et al." for scenario in options.scenarios]
    print(f"| method | {' | '.join(titles)} |")
    print(f"|---|{'---|---|' * len(titles)}")
    for name in options.rows:
        row = []
        for scenario in options.scenarios:
            results = [read_results(cell.folder(root)) for cell in cells[name, scenario]]
            found = interval([100 * one["accuracy"]["average"] for one in results])
            mean, deviation = ROWS[name].published[list(SCENARIOS).index(scenario)]
            row += [found.text(2) if found else "-"]
            row += [f"{mean:.2f} ± {T9 * deviation / 10**0.5:.2f}"]
        print(f"| {name} | {' | '.join(row)} |")
    print(DIFFERENCES)


DIFFERENCES = """
Differences, and their causes:
- EWC, domain: ours is lower. The Fisher information (with their labels: the most likely ones), the penalty without the factor
  1/2, the penalized head, Adam without a reset and the strength all follow theirs. PyTorch's default
  initialization instead of ours gives the same result. We have no explanation.
- SI and MAS, domain: ours is higher. Their MAS importances come from gradients of whole batches, of the
  mean over outputs; ours come from per-sample gradients of the sum, so the same strength has a different
  meaning. Both vary widely over seeds, as do theirs.
- LwF: the paper's table gives no strength, and their weights 1/t and 1 - 1/t, with a factor of the squared
  temperature, depend on the task t. Ours is a constant 10, about their mean ratio. In the class-incremental scenario ours
  forgets all but the last task, also at strengths of 16 and 40. Code for the same scenarios (van de Ven's)
  assigns the new task's classes probability 0 in the teacher's targets, which suppresses them; the original
  paper does not.
- GEM: theirs shares one memory of 1,100 or 4,400 images among the tasks so far, so early tasks get
  more; the table does not say which size it shows. Ours stores 220 per task, which equals the smaller total after
  the fifth task; the larger one was not run.
- Fine-tuning and EWC, task: equal within the intervals, which are wide with three seeds."""

T9 = 2.262  # Student's t for 10 runs at 95 %


def _cell(name: str, scenario: str, seed: int) -> Cell:
    row = ROWS[name]
    settings: dict[str, Any] = {**SCENARIOS[scenario], **row.settings}
    if row.strengths is not None:
        strength = row.strengths[list(SCENARIOS).index(scenario)]
        settings[f"strategies.{row.method}.strength"] = strength
    label = f"{scenario}, {name}"
    return Cell(str(CONFIG), CONFIG.stem, row.method, seed, label, settings=tuple(settings.items()))


if __name__ == "__main__":
    main()
