"""`benchmarks/soak.py`: what a task costs where a stream has gone on many times."""

import os
import runpy
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_script
from fits import trainer_of
from lightning.pytorch import Callback, Trainer

import bpn_lightning
from bpn_lightning import ContinualModule, datamodules, strategies
from bpn_lightning.datamodules import PermutedMNIST
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import EWC, BeneficialPerturbation, ParameterSuperposition

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "soak.py"
UNITS, INPUTS = 32 + 10, 784 + 32


def test_sizes_of_checkpoints_are_those_of_the_formulas() -> None:
    """The benchmark compares them too, and its status says so."""
    line = [str(SCRIPT), "--methods", "bd+psp", "--tasks", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run_script([*line, "--continuations", "2"], env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    times, sizes = done.stdout.strip().split("\n\n")
    rows = [row.strip("| ").split(" | ") for row in sizes.replace(",", "").splitlines()[2:]]
    assert [[int(cell) for cell in row[1:5]] for row in rows] == [
        [tasks, 8 * ((tasks + 1) * tasks + 3 * tasks), 4 * UNITS * tasks, INPUTS * tasks]
        for tasks in (3, 6, 9)
    ]
    assert len({row[5] for row in rows}) == 1
    assert [row[-1] for row in rows] == ["0", "0", "0"]
    ratios = [row.strip("| ").split(" | ")[5:] for row in times.splitlines()[2:]]
    assert ratios[1] == ["1.00", "1.00", "1.00"]


class Lines(Callback):
    """How often each of our lines runs, from the start of a task to that of the next.

    Lines of others may depend on what ran before: on caches, and on when garbage is collected.
    """

    OURS = tuple(
        str(Path(str(room.__file__)).parent) for room in (bpn_lightning, datamodules, strategies)
    )

    def __init__(self) -> None:
        self.of_tasks: list[Counter[tuple[str, int]]] = []
        self._before: Any = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._before = self._before or sys.gettrace()
        self.of_tasks.append(Counter())
        sys.settrace(self._count)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        sys.settrace(self._before)

    def _count(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.OURS):
            return None
        if event == "line":
            self.of_tasks[-1][frame.f_code.co_filename, frame.f_lineno] += 1
        return self._count


def test_a_task_takes_no_more_steps_after_many_continuations(tmp_path: Path) -> None:
    runpy.run_path(str(SCRIPT))["write_digits"](tmp_path)
    module = ContinualModule(
        MLP([8]),
        mask="shared",
        optimizer=partial(torch.optim.SGD, lr=0.01),
        evaluate_on="current",
        task_agnostic=False,
    )
    methods = [BeneficialPerturbation(2), EWC(1.0), ParameterSuperposition()]
    counts = []
    for number in range(4):
        stream = PermutedMNIST(
            str(tmp_path),
            num_tasks=4,
            epochs_per_task=1,
            train_samples=40,
            test_samples=20,
            batch_size=20,
        )
        if number:
            module.extend(stream)
        lines = Lines()
        trainer_of(1, [*methods, lines]).fit(module, stream)
        counts.append(lines.of_tasks[1])
    assert len(module.tasks) == 16
    assert counts[1].total() > 1000
    more = {at: counts[-1][at] - number for at, number in counts[1].items()}
    assert {at: number for at, number in more.items() if number} == {}
    assert counts[-1].total() == counts[1].total()
