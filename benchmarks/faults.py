"""Inject faults into runs, resume them, and compare the results with uninterrupted runs.

    python benchmarks/faults.py
    python benchmarks/faults.py --processes 2 --methods finetune bd+ewc ebll agem
    python benchmarks/faults.py --continued

Every run is ``bpn-fit`` on a small stream of digits, in a process forked from this one, which has
imported torch once. The uninterrupted run records its events: batches, updates, the ends of epochs and
tasks, phases, importance passes, evaluations, files being written. Faults are then sampled with the seed:
one event of each kind, and additional points in time.

    kill       SIGKILL, also in the middle of writing a file
    terminate  SIGTERM, as sent by a scheduler
    crash      user code raises an error
    full disk  no space is left for the file that is being written
    damage     SIGKILL; then the newest checkpoint is truncated or a bit is flipped

After each fault, ``bpn-fit --ckpt_path last`` resumes, until the next fault or the end of the run. Then every
tensor and number of the last checkpoint (weights, optimizer, scheduler, strategies, random states) and
every figure of metrics.csv, accuracy_matrix.csv and results.json is compared.

With ``--continued``, that run goes on, by ``--continue_from``, from one that has learned three tasks.
"""

import argparse
import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from bpn_lightning.cli import train
from bpn_lightning.cli.main import main as bpn_fit
from bpn_lightning.files import writing
from bpn_lightning.model import host, module, task_loop
from bpn_lightning.nn import MLP
from bpn_lightning.run import checkpoints, recording
from bpn_lightning.strategies import STRATEGIES
from bpn_lightning.strategies.base import ContinualStrategy

STREAM = [
    *("--config", "digits_inc.yaml"),
    *("--data.init_args.num_tasks", "3"),
    *("--data.init_args.epochs_per_task", "2"),
    *("--data.init_args.batch_size", "64"),
    *("--data.init_args.validation_fraction", "0.2"),
    *("--data.init_args.augment", "true"),
    *("--model.backbone", "faults.Network"),
    "--trust",  # for the class of this file
    *("--model.patience", "5"),
    *("--model.evaluate_every", "epoch"),
    *("--trainer.accelerator", "cpu"),
    *("--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
    *("--checkpoint_every_n_steps", "3"),
]

#: Of a run that continues from one with the flags above.
NEW_TASKS = [
    *("--experiment", "continued"),
    *("--data.init_args.num_tasks", "2"),
    *("--data.init_args.class_order", "[6, 7, 8, 9]"),
]

ADAM = ["--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr", "0.002"]
SCHEDULER = ["--model.scheduler", "torch.optim.lr_scheduler.StepLR"]
SCHEDULER += ["--model.scheduler.step_size", "3", "--model.scheduler.gamma", "0.8"]

#: Flags of a method beside those of the stream, so that there is more to lose.
FLAGS = {
    "finetune": [*ADAM, *SCHEDULER],
    "bd": SCHEDULER,
    "lwf": [*ADAM, "--strategies.lwf.warm_up_epochs", "1", "--model.mask", "task"],
    "ebll": [
        *("--strategies.ebll.warm_up_epochs", "1", "--strategies.ebll.autoencoder_epochs", "1"),
        *("--model.mask", "task"),
    ],
    "agem": ADAM,
    "gem": ["--trainer.accumulate_grad_batches", "2"],
    "bd+ewc": ["--trainer.accumulate_grad_batches", "2"],
    "bd+psp": ADAM,
}

METHODS = (*STRATEGIES, "bd+ewc", "bd+psp")

SECONDS = 300
"""After which a process is taken for stuck."""


class Network(MLP):
    """An MLP with dropout, which draws from the global generator at every step."""

    def __init__(self, hidden: Sequence[int]) -> None:
        super().__init__(hidden)
        self.append(nn.Dropout(0.2))


# --- moments, and what happens at them -----------------------------------------------------------


class Moment(NamedTuple):
    """A point of a run, the same in every run of the same configuration.

    Args:
        place: what happens there.
        step: updates before it.
        count: of the moments of this place at this step, in this process.
    """

    place: str
    step: int
    count: int


class Clock:
    """Counts the moments of the run in this process, and lets one planned fault happen.

    Args:
        plan: the kinds of faults, and when; the first that comes up happens.
        note: the file that records the fault that happened.
    """

    def __init__(self, plan: Mapping[Moment, str], note: Path) -> None:
        self.plan = dict(plan)
        self.seen: list[Moment] = []
        self.step: Callable[[], int] = lambda: 0
        self._note = note
        self._counts: Counter[tuple[str, int]] = Counter()

    def tick(self, place: str) -> None:
        """A moment passes."""
        step = self.step()
        moment = Moment(place, step, self._counts[place, step])
        self._counts[place, step] += 1
        self.seen.append(moment)
        if moment not in self.plan:
            return
        fault, self.plan = self.plan[moment], {}
        self._note.write_text(json.dumps(moment))
        if fault in ("kill", "damage"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif fault == "crash":
            raise ZeroDivisionError("user code")


def watch(clock: Clock) -> None:
    """Let everything that a run does tick: only ever in a process of its own."""
    passes = [""]  # what reads batches outside of training

    def before(owner: Any, name: str, place: str | Callable[..., str | None]) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            here = place if isinstance(place, str) else place(*args)
            if here:
                clock.tick(here)
            return inner(*args, **kwargs)

        setattr(owner, name, wrapped)

    def inside(owner: Any, name: str, place: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            passes.append(place)
            try:
                return inner(*args, **kwargs)
            finally:
                passes.pop()

        setattr(owner, name, wrapped)

    def setup(self: Any, stage: str, inner: Any = module.ContinualModule.setup) -> None:
        clock.step = lambda: self.trainer.global_step
        inner(self, stage)

    def batches(self: Any, *args: Any, inner: Any = host.Host.batches) -> Iterator[Any]:
        for batch in inner(self, *args):
            if passes[-1]:
                clock.tick(passes[-1])
            yield batch

    model: Any = module.ContinualModule
    model.setup, host.Host.batches = setup, batches
    phases = {"warm_up": "warm-up", "train": "batch"}
    before(
        model,
        "training_step",
        lambda self, *_: phases.get(self.host.phase.name, self.host.phase.name),
    )
    before(model, "on_before_optimizer_step", "update")
    before(model, "validation_step", "validation")
    before(model, "on_train_epoch_end", "epoch's end")
    before(
        task_loop.TaskLoop,
        "close",
        lambda self, task: "task's end" if task > self.network.closed else None,
    )
    for target in STRATEGIES.values():
        import_module(target.partition(":")[0])
    for strategy in _subclasses(ContinualStrategy):
        if "on_task_end" in vars(strategy):
            before(strategy, "on_task_end", "consolidation")
            inside(strategy, "on_task_end", "importance")
    for name in ("evaluate", "evaluate_task_agnostic", "validation_scores"):
        inside(task_loop, name, "evaluation")
    before(recording.MetricsFile, "log_metrics", "metrics row")
    before(recording.LastCheckpoint, "_publish", "after a batch or epoch")
    before(train, "write_results", "results")
    before(os, "replace", lambda old, new: f"renaming to {_kind(Path(new))}")
    writing.open = lambda path, mode: _Slow(path, mode, clock)  # type: ignore[attr-defined]


class _Slow:
    """A file in the middle of whose writes moments pass."""

    def __init__(self, path: Path, mode: str, clock: Clock) -> None:
        self._file = open(path, mode)  # noqa: SIM115
        self._clock = clock
        self._place = f"writing {_kind(path)}"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._clock.tick(self._place)
        self._file.write(content[half:])
        return len(content)


def _kind(path: Path) -> str:
    name = re.sub(r"^\.(.+)\.\d+\.tmp$", r"\1", path.name)
    return name if name.endswith((".ckpt", "metrics.csv", "config.yaml")) else "results"


def _subclasses(base: type) -> list[type]:
    return [one for direct in base.__subclasses__() for one in (direct, *_subclasses(direct))]


# --- processes -----------------------------------------------------------------------------------


def attempt(
    line: Sequence[str],
    folder: Path,
    clocks: Sequence[Clock],
    strike: tuple[float, int] | None = None,
) -> list[int]:
    """Run ``bpn-fit`` once, in as many processes as there are clocks.

    Args:
        line: of the command.
        folder: to run in; ``log_0`` has what was printed, ``moments`` what the first process did.
        clocks: of each process.
        strike: seconds after which to send a signal to all.

    Returns:
        The exit status of each, negative for a signal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank, clock in enumerate(clocks):
        child = os.fork()
        if child == 0:
            _run(line, folder, rank, len(clocks), port, clock)
        children[child] = rank
    return _wait(children, strike)


def _run(
    line: Sequence[str], folder: Path, rank: int, processes: int, port: int, clock: Clock
) -> None:
    """What a child does, and never returns from."""
    status = 1
    try:
        log = os.open(folder / f"log_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
        if processes > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(processes),
                "NODE_RANK": "0",
                "LOCAL_RANK": str(rank),
            }
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
        sys.modules["faults"] = sys.modules[__name__]
        watch(clock)
        try:
            status = bpn_fit(line)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        if rank == 0:
            (folder / "moments").write_text(json.dumps(clock.seen))
    except BaseException:  # noqa: BLE001  a child reports the error, and ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(children: dict[int, int], strike: tuple[float, int] | None) -> list[int]:
    """Wait for all; where one fails, the others have a while to notice, as with torchrun."""
    statuses: dict[int, int] = {}
    started, failed = time.monotonic(), 0.0
    sent = False
    while len(statuses) < len(children):
        for child, rank in children.items():
            if rank not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
                    failed = failed or (time.monotonic() if statuses[rank] else 0.0)
        alive = [child for child, rank in children.items() if rank not in statuses]
        now = time.monotonic()
        if strike and not sent and now - started > strike[0]:
            sent = True
            for child in alive:
                os.kill(child, strike[1])
        if now - started > SECONDS or (failed and now - failed > 3):
            for child in alive:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    if time.monotonic() - started > SECONDS:
        raise SystemExit(f"Stuck for {SECONDS} s: {statuses}.")
    return [statuses[rank] for rank in sorted(statuses)]


# --- one method ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A row of the table."""

    method: str
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kind and place."""
    resumes: int = 0
    fallbacks: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    different: Counter[str] = field(default_factory=Counter)
    largest: float = 0.0


def draw(moments: Sequence[Moment], rng: random.Random) -> dict[Moment, str]:
    """Faults, one at each place."""
    places = sorted({moment.place for moment in moments})
    plan = {}
    for place in places:
        moment = rng.choice([moment for moment in moments if moment.place == place])
        kinds = ["kill", "terminate", "crash", "damage"]
        if place.startswith("writing"):
            kinds = ["kill", "full disk"]
        elif place.startswith("renaming"):
            kinds = ["kill"]
        plan[moment] = rng.choice(kinds)
    return plan


def undisturbed(line: Sequence[str], folder: Path, processes: int) -> float:
    """Run without faults; the seconds that it takes."""
    started = time.monotonic()
    statuses = attempt(line, folder, [Clock({}, folder / "fault") for _ in range(processes)])
    if any(statuses):
        raise SystemExit(f"The undisturbed run failed:\n{(folder / 'log_0').read_text()[-3000:]}")
    return time.monotonic() - started


def examine(
    method: str,
    processes: int,
    seed: int,
    clock: int,
    most: int | None,
    folder: Path,
    continued: bool = False,
) -> Outcome:
    """Run a method undisturbed, with faults at drawn moments, and with faults by the clock."""
    line = [*STREAM, "--method", method, *FLAGS.get(method, [])]
    if processes > 1:
        line += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp"]
    past, whole, by_place, by_clock = (
        folder / name for name in ("past", "whole", "by_place", "by_clock")
    )
    for one in (past, whole, by_place, by_clock):
        one.mkdir()
    if continued:
        undisturbed(line, past, processes)
        (run,) = past.glob("runs/*/*/*")
        line += [*NEW_TASKS, "--continue_from", str(run.resolve()), "--past_data"]
    seconds = undisturbed(line, whole, processes)
    moments = [Moment(*entry) for entry in json.loads((whole / "moments").read_text())]

    rng = random.Random(f"{seed} {method} {processes}")
    plan = draw(moments, rng)
    if most is not None:
        plan = dict(rng.sample(list(plan.items()), min(most, len(plan))))
    outcome = Outcome(method)
    torment(line, by_place, processes, plan, [], rng, outcome)
    compare(whole, by_place, outcome)
    if clock:
        strikes = [
            (rng.uniform(0.2, 1) * seconds, rng.choice([signal.SIGKILL, signal.SIGTERM]))
            for _ in range(clock)
        ]
        torment(line, by_clock, processes, {}, strikes, rng, outcome)
        compare(whole, by_clock, outcome)
    return outcome


def torment(
    line: Sequence[str],
    folder: Path,
    processes: int,
    plan: Mapping[Moment, str],
    strikes: Sequence[tuple[float, int]],
    rng: random.Random,
    outcome: Outcome,
) -> None:
    """Run and resume into one fault after the other, until the run is done.

    Args:
        line: of the command.
        folder: to run in.
        processes: of the run.
        plan: faults at moments; one that a run resumes behind does not happen.
        strikes: seconds and signals of faults by the clock.
        rng: chooses the process that a fault hits.
        outcome: counts.
    """
    done, plan, strikes = False, dict(plan), list(strikes)
    notes = [folder / f"fault_{rank}" for rank in range(processes)]
    first_only = ("writing", "renaming", "results", "metrics")  # what only the first process does
    while not done:
        for note in notes:
            note.unlink(missing_ok=True)
        shares: list[dict[Moment, str]] = [{} for _ in notes]
        for moment, kind in plan.items():
            rank = 0 if moment.place.split()[0] in first_only else rng.randrange(processes)
            shares[rank][moment] = kind
        clocks = [Clock(share, note) for share, note in zip(shares, notes, strict=True)]
        strike = strikes.pop(0) if strikes else None
        statuses = attempt([*line, "--ckpt_path", "last"], folder, clocks, strike)
        done = not any(statuses)
        hit = [Moment(*json.loads(note.read_text())) for note in notes if note.is_file()]
        kinds = [(plan.pop(moment), moment.place) for moment in hit]
        if strike:
            kinds.append(("kill" if strike[1] == signal.SIGKILL else "terminate", "by the clock"))
        if done:
            continue
        if not kinds:
            said = "\n".join((folder / f"log_{i}").read_text() for i in range(processes))
            raise SystemExit(f"A resumed run failed:\n{said[-6000:]}")
        outcome.resumes += 1
        outcome.faults.update(kinds)
        if any(kind == "damage" for kind, _ in kinds):
            _damage(folder, rng)
    outcome.fallbacks += (folder / "log_0").read_text().count("the checkpoint before it")


def _damage(folder: Path, rng: random.Random) -> None:
    """Cut the newest of two checkpoints off, or flip a bit of it."""
    for previous in folder.glob("runs/*/*/*/checkpoints/previous.ckpt"):
        path = previous.with_name("last.ckpt")
        if not path.exists():  # killed between two renames
            continue
        content = bytearray(path.read_bytes())
        if rng.random() < 0.5:
            content = content[: rng.randrange(len(content))]
        else:
            # Of the records, which are most of a file: those of small ones have gaps of zeros.
            position = rng.choice([i for i in range(len(content) // 2) if content[i]])
            content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


# --- comparing -----------------------------------------------------------------------------------


def _checkpoint(run: Path) -> dict[str, Any]:
    return checkpoints.read_checkpoint(run / "checkpoints" / "last.ckpt")


def _figures(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    found.pop("provenance")
    for name in ("metrics.csv", "accuracy_matrix.csv"):
        with (run / name).open(newline="") as file:
            found[name] = [list(row) for row in csv.reader(file)]
    return found


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and plain value of nested containers, by its path."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {name: tree}
    found = {}
    for key, value in items:
        found |= leaves(value, f"{name}/{key}")
    return found


def compare(one: Path, other: Path, outcome: Outcome) -> None:
    """Count what the last checkpoints and the figures of two runs do not have in common."""
    one, other = (next(where.glob("runs/*/*/*")) for where in (one, other))
    for what, read in (("values", _checkpoint), ("figures", _figures)):
        here, there = leaves(read(one)), leaves(read(other))
        names = {**here, **there}
        outcome.compared[what] += len(names)
        for name in names:
            gap = _gap(here.get(name), there.get(name))
            if gap is not None:
                outcome.different[what] += 1
                outcome.largest = max(outcome.largest, gap)
                values = f"{_short(here.get(name))} and {_short(there.get(name))}"
                print(f"  {outcome.method} differs: {name}: {values}", file=sys.stderr)


def _gap(one: Any, other: Any) -> float | None:
    """The largest difference of two values; None if they are the same."""
    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    if tensors and (one.shape, one.dtype) == (other.shape, other.dtype):
        if torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)):
            return None
        return float((one.double() - other.double()).abs().nan_to_num(float("inf")).max())
    if not tensors and one == other:
        return None
    with suppress(TypeError, ValueError):
        return abs(float(one) - float(other))
    return float("inf")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 100 else f"{text[:100]} ..."


# --- the table -----------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row per method, and where the faults were."""
    rows: list[Sequence[object]] = [
        (
            *("method", "faults", "resumes", "from previous.ckpt"),
            *("tensors and values", "differing", "figures", "differing", "largest difference"),
        ),
        ("---", *["---:"] * 8),
    ]
    total = Outcome("all")
    for one in outcomes:
        total.faults += one.faults
        total.resumes += one.resumes
        total.fallbacks += one.fallbacks
        total.compared += one.compared
        total.different += one.different
        total.largest = max(total.largest, one.largest)
    for one in (*outcomes, total):
        row: list[object] = [one.method, one.faults.total(), one.resumes, one.fallbacks]
        for what in ("values", "figures"):
            row += [one.compared[what], one.different[what]]
        rows.append([*row, f"{one.largest:.3g}"])
    places: list[Sequence[object]] = [("fault", "times", "where"), ("---", "---:", "---")]
    for kind in sorted({kind for kind, _ in total.faults}):
        where = {place: n for (other, place), n in total.faults.items() if other == kind}
        listed = ", ".join(f"{place} {n}" for place, n in sorted(where.items()))
        places.append((kind, sum(where.values()), listed))
    return "\n\n".join(
        "\n".join(f"| {' | '.join(map(str, row))} |" for row in part) for part in (rows, places)
    )


def main() -> int:
    """Print the table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--processes", type=int, default=1, help="of a run, by DDP and gloo")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--clock", type=int, default=1, help="faults by the clock in each run")
    parser.add_argument("--most", type=int, help="faults in each run, if not one at each place")
    parser.add_argument("--continued", action="store_true", help="runs that continue from another")
    parser.add_argument("--keep", type=Path, help="a folder in which to keep the runs")
    given = parser.parse_args()
    torch.set_num_threads(1)  # forked children cannot use the parent's threads
    outcomes = []
    for method in given.methods:
        folder = Path(tempfile.mkdtemp(prefix="faults_")) if given.keep is None else given.keep
        folder = folder / method
        folder.mkdir(parents=True)
        outcomes.append(
            examine(
                method,
                given.processes,
                given.seed,
                given.clock,
                given.most,
                folder,
                given.continued,
            )
        )
        print(f"{method}: {outcomes[-1].faults.total()} faults", file=sys.stderr)
        if given.keep is None:
            shutil.rmtree(folder.parent)
    print(table(outcomes))
    return int(any(one.different.total() for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
