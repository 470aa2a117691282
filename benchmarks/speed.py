"""Speed compared with a hand-written loop, a bare Lightning Trainer and Avalanche.

    python benchmarks/speed.py --quick
    python benchmarks/speed.py --out docs/speed --avalanche avalanche/bin/python
    python benchmarks/speed.py --growth --out docs/speed --avalanche avalanche/bin/python
    python benchmarks/speed.py --memory
    python benchmarks/speed.py --start-up
    python benchmarks/speed.py --device cuda

Every contestant is a process of its own. All take turns, and before each of them comes the
hand-written loop, so that a machine that slows down slows both. Ratios are of CPU time (of time on a
GPU) to that loop's; the table has their medians, and in brackets the smallest and the largest.
Avalanche runs in an environment of its own, whose Python is given:

    python -m venv avalanche && avalanche/bin/pip install torch torchvision avalanche-lib==0.6.0

An update is timed in the last task, over all its epochs but the first, so without what happens
between tasks. The evaluation is of all tasks, and an importance pass is compared with one epoch's
forward and backward passes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bpn_lightning.run.drawing import save_figure

CONTESTANTS = Path(__file__).parent / "contestants"
sys.path.insert(0, str(CONTESTANTS))
from work import Work

NETWORKS = {
    "5 x 300": Work(hidden=(300,) * 5),
    "4 x 128": Work(hidden=(128,) * 4),
    "tiny": Work(hidden=(32,), inputs=64, samples=1000, batch_size=10, eval_batch_size=100),
}
METHODS = ["finetune", "ewc", "mas", "si", "bd+ewc", "psp", "bd+psp", "lwf", "gem"]
PEERS = ["finetune", "ewc", "mas", "si", "lwf", "gem"]
RATED = ["ewc", "mas"]

#: What was aimed at; by network, then by method or "evaluation".
TARGETS: dict[str, dict[str, float]] = {
    "5 x 300": {
        **dict.fromkeys(["ewc", "mas", "bd+ewc", "psp", "bd+psp"], 1.2),
        "finetune": 1.05,
        "si": 1.25,
        "lwf": 1.4,
        "gem": 2.5,
        "evaluation": 1.15,
        "importance": 1.1,
    },
    "4 x 128": {
        **dict.fromkeys(["ewc", "mas", "bd+ewc", "psp", "bd+psp"], 1.4),
        "finetune": 1.2,
        "si": 1.45,
        "lwf": 1.6,
        "gem": 2.0,
        "evaluation": 1.3,
        "importance": 1.1,
    },
    "tiny": {"finetune": 1.6},
}


class Contestant:
    """A process that executes work items in sequence."""

    def __init__(self, script: str, python: str, threads: int) -> None:
        self.command = [python, str(CONTESTANTS / script)]
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(CONTESTANTS),  # also where Python does not look beside the script
        }
        self.process: subprocess.Popen[str] | None = None

    def ask(self, work: Work) -> dict[str, Any]:
        """Send a work item and return its result; the process starts at the first one."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self.environment,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(work)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(
                f"Expected a result of {' '.join(self.command)}, but it ended. Run it manually."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def leave(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate()
            self.process = None


def contestants(options: argparse.Namespace) -> dict[str, Contestant]:
    """By name; Avalanche only where it is installed somewhere."""
    scripts = {
        "by hand": ("by_hand.py", sys.executable),
        "bare Lightning": ("bare_lightning.py", sys.executable),
        "bpn_lightning": ("framework.py", sys.executable),
    }
    if options.avalanche:
        scripts["Avalanche"] = ("avalanche_peer.py", options.avalanche)
    return {n: Contestant(*script, options.threads) for n, script in scripts.items()}


# --- ratios --------------------------------------------------------------------------------------

#: A result, and the result of the hand-written loop just before it.
Pair = tuple[dict[str, Any], dict[str, Any]]


def turns(
    everyone: Mapping[str, Contestant], work: Work, methods: Sequence[str], repeats: int
) -> dict[str, list[Pair]]:
    """Pairs by contestant and method, one for each turn."""
    pairs: dict[str, list[Pair]] = {}
    for turn in range(repeats):
        for method in methods:
            for name, contestant in everyone.items():
                if not _takes_part(name, method):
                    continue
                _tell(f"turn {turn + 1} of {repeats}: {method}, {name}")
                floor = everyone["by hand"].ask(replace(work, method="finetune"))
                answer = contestant.ask(replace(work, method=method))
                pairs.setdefault(f"{name} / {method}", []).append((answer, floor))
    return pairs


def _takes_part(name: str, method: str) -> bool:
    known = {"by hand": ["gem"], "bare Lightning": ["finetune"], "Avalanche": PEERS}
    return method in known.get(name, METHODS)


def _tell(what: str) -> None:
    print(f"{what:60}", end="\r", file=sys.stderr, flush=True)


def rows_of(network: str, pairs: Mapping[str, list[Pair]], clock: int) -> list[list[str]]:
    """A row for each method, and for the evaluation and the importance passes."""

    def step(answer: Mapping[str, Any]) -> float:
        return float(answer["step"][-1][clock])

    def part(name: str) -> Callable[[Mapping[str, Any]], float]:
        return lambda answer: float(answer[name][clock]) if answer[name] else nan

    def cell(who: str, method: str, of: Any, to: Any) -> str:
        values = [of(answer) / to(floor) for answer, floor in pairs.get(f"{who} / {method}", [])]
        if not values or isnan(values[0]):
            return "-"
        return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    def row(title: str, target: str, method: str, of: Any, to: Any) -> list[str]:
        aim = TARGETS[network].get(target)
        others = "bare Lightning" if method == "finetune" else "by hand"
        cells = [cell(who, method, of, to) for who in ("bpn_lightning", others, "Avalanche")]
        return [network, title, "-" if aim is None else f"{aim:.2f}", *cells]

    methods = [key.partition(" / ")[2] for key in pairs if key.startswith("bpn_lightning")]
    rows = [row(method, method, method, step, step) for method in methods]
    tested = part("evaluation")
    rows.append(row("evaluation of all tasks", "evaluation", "finetune", tested, tested))
    for method in RATED:
        if method in methods:
            of, to = part("importance"), part("forward_backward")
            rows.append(row(f"importance pass of {method}", "importance", method, of, to))
    return rows


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The table of ratios, printed; returns what it was made of."""
    everyone = contestants(options)
    kept: dict[str, Any] = {}
    rows: list[list[str]] = []
    for name, work in NETWORKS.items():
        if options.only and name not in options.only:
            continue
        methods = METHODS if name != "tiny" else [m for m in METHODS if m not in ("lwf", "gem")]
        if options.quick:
            methods = [m for m in ("finetune", "ewc", "bd+psp") if m in methods]
            work = replace(work, tasks=2)
        pairs = turns(everyone, replace(work, device=options.device), methods, options.repeats)
        rows += rows_of(name, pairs, clock_of(options))
        kept[name] = {
            key: [[brief(one) for one in pair] for pair in found] for key, found in pairs.items()
        }
    for contestant in everyone.values():
        contestant.leave()
    heads = [
        "network",
        "what",
        "target",
        "bpn_lightning",
        "bare Lightning, or by hand",
        "Avalanche",
    ]
    print(f"{machine(options)}\n\n{markdown(heads, rows)}")
    return kept


def brief(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the table is made of, to a microsecond."""

    def rounded(times: Sequence[float] | None) -> list[float] | None:
        return None if times is None else [round(one, 6) for one in times]

    parts = ("evaluation", "importance", "forward_backward")
    return {"last_step": rounded(answer["step"][-1]), **{p: rounded(answer[p]) for p in parts}}


def clock_of(options: argparse.Namespace) -> int:
    """Which of a pair of times counts: the processor's, or on a GPU the clock's."""
    return 1 if options.device == "cuda" else 0


def machine(options: argparse.Namespace, which: str = "median (smallest to largest)") -> str:
    """What the ratios are of."""
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    kind = "time" if options.device == "cuda" else "CPU time"
    return (
        f"{where}, {options.threads} thread(s), torch {torch.__version__}: ratios of {kind} to the "
        f"hand-written loop, {which} of {options.repeats} turns"
    )


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# --- start-up ------------------------------------------------------------------------------------


def start_up(options: argparse.Namespace) -> None:
    """CPU seconds of short commands, and whether they import torch."""
    command = str(Path(sys.executable).with_name("bpn-fit"))
    rows = []
    for flag in ("--list", "--version", "--help", "--help_all"):
        times = []
        for _ in range(options.repeats):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([command, flag], check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        look = [sys.executable, "-X", "importtime", command, flag]
        imported = subprocess.run(look, capture_output=True, check=True, text=True).stderr
        torch_too = any(line.split("|")[-1].strip() == "torch" for line in imported.splitlines())
        rows.append([f"bpn-fit {flag}", f"{median(times):.2f}", "yes" if torch_too else "no"])
    print(markdown(["command", "CPU seconds", "imports torch"], rows))


# --- growth --------------------------------------------------------------------------------------


def grow(options: argparse.Namespace) -> dict[str, Any]:
    """Time of an update and memory, from the first task to the last; printed and returned.

    In updates of the hand-written loop, which takes the same for every task: its median over tasks.
    """
    everyone = contestants(options)
    clock = clock_of(options)
    base = replace(NETWORKS["4 x 128"], samples=1280, device=options.device)
    plans = [("bpn_lightning", m, 20 if m == "gem" else 100) for m in METHODS]
    plans += [("by hand", "gem", 20)]
    plans += [("Avalanche", m, 20) for m in PEERS if "Avalanche" in everyone]
    kept: dict[str, Any] = {}
    rows = []
    for name, method, tasks in plans:
        work = replace(base, tasks=tasks)
        both = {"by hand": everyone["by hand"], name: everyone[name]}
        pairs = turns(both, work, [method], options.repeats)[f"{name} / {method}"]
        # Whatever else the machine does makes a task slower and never faster.
        own, by_hand = (
            [min(pair[which]["step"][k][clock] for pair in pairs) for k in range(tasks)]
            for which in (0, 1)
        )
        steps = [one / median(by_hand) for one in own]
        resident = pairs[0][0]["resident"]
        kept[f"{name} / {method}"] = {
            "ratio": [round(step, 3) for step in steps],
            "resident": [round(mebibytes, 3) for mebibytes in resident],
        }
        spans = [steps[1:6], steps[15:20], steps[-5:] if tasks > 20 else []]
        cells = [f"{median(span):.2f}" if span else "-" for span in spans]
        grown = f"{(resident[-1] - resident[4]) / (tasks - 5):.3f}"
        rows.append(
            [name, method, *cells, f"{median(steps[15:20]) / median(steps[1:6]):.2f}", grown]
        )
    for contestant in everyone.values():
        contestant.leave()
    heads = [
        "who",
        "method",
        "tasks 2 to 6",
        "16 to 20",
        "96 to 100",
        "16 to 20 over 2 to 6",
        "MiB per task",
    ]
    print(f"{machine(options, 'the fastest')}\n\n{markdown(heads, rows)}")
    return kept


def draw_growth(kept: Mapping[str, Any]) -> Figure:
    """Time of an update over the tasks, in updates of the hand-written loop."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, found in kept.items():
        name, _, method = key.partition(" / ")
        axes = left if name == "bpn_lightning" and method != "gem" else right
        if axes is right and method not in ("ewc", "gem", "mas", "si"):
            continue
        # Medians over neighbors: the updates of a task take a tenth of a second.
        ratio = found["ratio"]
        width = 2 if axes is left else 0
        smooth = [median(ratio[max(0, k - width) : k + width + 1]) for k in range(len(ratio))]
        label = method if axes is left else f"{name}, {method}"
        axes.plot(range(1, len(ratio) + 1), smooth, label=label, linewidth=1.2)
    flat = kept.get("bpn_lightning / ewc")
    if flat:
        right.plot(
            range(1, 21), flat["ratio"][:20], label="bpn_lightning, ewc", linewidth=2, color="black"
        )
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(
        xlabel="task",
        ylabel="time of an update, hand-written loop = 1",
        ylim=(0, None),
        title="bpn_lightning",
    )
    right.set(xlabel="task", ylim=(0, None), title="twenty tasks: what grows")
    for axes in (left, right):
        axes.legend(fontsize=7, ncols=2, frameon=False)
        axes.grid(alpha=0.3)
    return figure


# --- memory --------------------------------------------------------------------------------------


def weigh(options: argparse.Namespace) -> None:
    """Peak memory, each in a process of its own."""
    rows = []
    for name, work in NETWORKS.items():
        if name == "tiny" or (options.only and name not in options.only):
            continue
        plans = [("by hand", "finetune"), ("bare Lightning", "finetune")]
        plans += [("bpn_lightning", method) for method in METHODS]
        plans += [("Avalanche", method) for method in PEERS if options.avalanche]
        floor = None
        for who, method in plans:
            _tell(f"{method}, {who}")
            contestant = contestants(options)[who]
            work = replace(work, epochs=2, device=options.device, method=method)
            found = contestant.ask(work)["peak"]
            contestant.leave()
            floor = found if floor is None else floor
            rows.append([name, who, method, f"{found:.0f}", f"{found - floor:+.0f}"])
    print(markdown(["network", "who", "method", "peak MiB", "more than by hand"], rows))


def main() -> None:
    """Ask everyone, print the tables, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three methods, short: a minute")
    parser.add_argument("--growth", action="store_true", help="over 100 tasks, GEM over 20")
    parser.add_argument("--memory", action="store_true", help="peak memory of each method")
    parser.add_argument("--start-up", action="store_true", help="CPU time of short commands")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, help="some of the networks")
    parser.add_argument("--repeats", type=int, help="turns (default: 5; --growth 2, --quick 1)")
    parser.add_argument("--threads", type=int, default=1, help="of each contestant")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--avalanche", help="a Python that has Avalanche")
    parser.add_argument("--out", type=Path, help="folder for speed.json or growth.json")
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.quick else 2 if options.growth else 5)
    if options.memory or options.start_up:
        (weigh if options.memory else start_up)(options)
        return
    kept = grow(options) if options.growth else compare(options)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = "growth" if options.growth else "speed"
        (options.out / f"{name}.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
        if options.growth:
            save_figure(draw_growth(kept), options.out / name)


if __name__ == "__main__":
    main()
