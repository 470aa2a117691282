"""Fits of one strategy that several promises look at, each made once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from bpn_lightning.conformance.cases import Case
from bpn_lightning.conformance.runs import BATCH_NORM_DROPOUT, Run, Setting, differences, fit
from bpn_lightning.costs import Bytes, measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, Position

__all__ = [
    "CallLog",
    "Consolidation",
    "Scenario",
    "fine_tuning",
    "keep_call_log",
    "logits_in_mode",
    "visits",
]

#: What fine-tuning is compared in. Optimizers that keep something between updates tell more; the last
#: is for strategies that refuse momentum.
SETTINGS = {
    "batch_norm_dropout": BATCH_NORM_DROPOUT,
    "momentum": replace(
        BATCH_NORM_DROPOUT, optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
    ),
    "weight decay": replace(BATCH_NORM_DROPOUT, optimizer=partial(SGD, lr=0.05, weight_decay=0.01)),
}


#: Where columns open one task after another.
GROWING = replace(BATCH_NORM_DROPOUT, module={"mask": "seen"})


@dataclass
class Consolidation:
    """What one call of a hook between tasks found and left behind.

    Args:
        name: the strategy's class, the hook and the task.
        hook: its name.
        before: random states, training flags, gradients and shared weights at its beginning.
        after: at its end.
        seen: what it did meanwhile that a measurement must not.
    """

    name: str
    hook: str
    before: dict[str, Any]
    after: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)


@dataclass
class CallLog:
    """One fit and what happened in it.

    Args:
        run: the fit, once it is over.
        first_task: what fine-tuning has as well, when the first task had been trained on.
        bytes_held: after each task, for each strategy: its class, measured and declared bytes.
        consolidations: every call of a hook between tasks.
        corrected: the strategies that moved shared weights after the optimizer had.
        learned: all that a checkpoint holds, at the end.
        end: the random states and the optimizer's state, at the end.
    """

    run: Run
    first_task: dict[str, Any] = field(default_factory=dict)
    bytes_held: list[tuple[int, str, Bytes, Bytes]] = field(default_factory=list)
    consolidations: list[Consolidation] = field(default_factory=list)
    corrected: set[str] = field(default_factory=set)
    learned: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)

    def watch(self) -> None:
        """Begin, before the run starts."""
        run = self.run
        run.module.before_close = self._before_close
        run.module.after_close = self._after_close
        for strategy in run.strategies:
            for hook in ("on_task_end", "merged_weights"):
                setattr(strategy, hook, self._watched(strategy, hook))
            self._watch_steps(strategy)

    def finish(self) -> "CallLog":
        """Note how it ended."""
        self.learned, self.end = self.run.learned(), self.run.plain()
        return self

    def _before_close(self, task: int) -> None:
        if task == 0:
            self.first_task = self.run.plain()

    def _after_close(self, task: int) -> None:
        for strategy in self.run.strategies:
            name, host = type(strategy).__name__, self.run.module.host
            measured, declared = (
                measured_bytes(strategy, host),
                strategy.declared_bytes(host).held,
            )
            self.bytes_held.append((task, name, measured, declared))

    def _watched(self, strategy: ContinualStrategy, hook: str) -> Callable[..., Any]:
        original = getattr(strategy, hook)

        def call(host: Any, *task: Any) -> Any:
            number = task[0].id if task else host.network.opened
            name = f"{type(strategy).__name__}.{hook} of task {number}"
            note = Consolidation(name, hook, self._around())
            self.consolidations.append(note)
            with _listening(self.run, note.seen):
                result = original(host, *task)
            note.after = self._around()
            return result

        return call

    def _around(self) -> dict[str, Any]:
        plain = self.run.plain()
        weights = {path: leaf for path, leaf in plain.items() if path.startswith("weights/")}
        return self.run.surroundings() | weights

    def _watch_steps(self, strategy: ContinualStrategy) -> None:
        original = strategy.correct_step

        def call(host: Any, parameters: Any) -> None:
            before = {name: p.detach().clone() for name, p in parameters.items()}
            original(host, parameters)
            if any(not torch.equal(before[name], p) for name, p in parameters.items()):
                self.corrected.add(type(strategy).__name__)

        strategy.correct_step = call  # type: ignore[method-assign]


@contextmanager
def _listening(run: Run, seen: list[str]) -> Iterator[None]:
    """Note dropout, running statistics and augmentation at work."""
    dropout, batch_norm, prepare = F.dropout, F.batch_norm, run.stream.prepare

    def heard_dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if training:
            seen.append("dropout was on")
        return dropout(input, p, training, inplace)

    def heard_batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training:
            seen.append("batch normalization used the statistics of its batch")
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def heard_prepare(batch: Batch, augment: bool = False) -> Batch:
        if augment:
            seen.append("images were augmented")
        return prepare(batch, augment)

    with (
        patch.object(F, "dropout", heard_dropout),
        patch.object(F, "batch_norm", heard_batch_norm),
        patch.object(run.stream, "prepare", heard_prepare),
    ):
        yield


@torch.no_grad()
def logits_in_mode(run: Run, task: int) -> Tensor:
    """Logits of a task's test images in its mode."""
    with evaluation_mode(run.module), run.module.task_mode(task):
        batches = list(run.module.host.batches(task, "test"))
        return torch.cat([run.module(batch.inputs) for batch in batches])


def keep_call_log(strategies: Sequence[ContinualStrategy], setting: Setting) -> CallLog:
    """Fit and watch."""
    logs: list[CallLog] = []

    def watch(run: Run) -> None:
        logs.append(CallLog(run))
        logs[0].watch()

    fit(strategies, setting, watch=watch)
    return logs[0].finish()


def visits(run: Run) -> list[str]:
    """What differs after evaluating tasks in several orders, and between the answers."""
    before = run.learned() | run.plain() | run.surroundings()
    found: list[str] = []
    first: dict[int, Tensor] = {}
    for task in [0, 1, 2, 2, 1, 0, 1, 1, 2, 0]:
        logits = logits_in_mode(run, task)
        if not torch.equal(logits, first.setdefault(task, logits)):
            found.append(f"the answers of task {task} differ from visit to visit")
    run.module.evaluate()
    after = run.learned() | run.plain() | run.surroundings()
    return found + differences(after, before)


@cache
def fine_tuning(setting: str) -> CallLog:
    """The lower reference, in a setting by its name."""
    return keep_call_log([], SETTINGS[setting])


class Scenario:
    """One case and what it did; a fit that several promises look at is made once.

    Args:
        case: whose promises are examined.
        folder: an empty one for checkpoints.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder

    @cached_property
    def call_log(self) -> CallLog:
        """Three tasks of a network with dropout and batch normalization, on augmented images."""
        return keep_call_log(self.case.make(), BATCH_NORM_DROPOUT)

    @cached_property
    def undisturbed(self) -> CallLog:
        """The same, and nobody looked while it ran."""
        return CallLog(fit(self.case.make(), BATCH_NORM_DROPOUT)).finish()

    @cached_property
    def checkpoints(self) -> dict[str, Path]:
        """Files by the moment they were saved at: inside every phase, and at a task's end."""
        saved: dict[str, Path] = {}

        def save(run: Run, at: Position, batch: int, last: bool) -> None:
            last = last and run.trainer.current_epoch == run.module.schedule.last_epoch(at.task)
            if at.task == 0 or not (last or batch == 2):
                return
            moment = f"task {at.task}, phase {at.phase}, {'last update' if last else 'inside'}"
            if moment not in saved:
                saved[moment] = self.folder / f"{len(saved)}.ckpt"
                run.trainer.save_checkpoint(saved[moment])

        fit(self.case.make(), BATCH_NORM_DROPOUT, at_batch=save)
        return saved

    @cached_property
    def going_on(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What two tasks and then a third leave behind, and three at once; without the accuracies."""
        two = replace(GROWING, stream={**GROWING.stream, "num_tasks": 2})
        path = self.folder / "two.ckpt"
        fit(self.case.make(), two).trainer.save_checkpoint(path)
        found = []
        for checkpoint in (path, None):
            log = CallLog(
                fit(self.case.make(), GROWING, seed=9 if checkpoint else 0, checkpoint=checkpoint)
            )
            whole = log.finish().learned | log.end
            found.append({k: v for k, v in whole.items() if "accuracy_matrix" not in k})
        return found[0], found[1]

    @cached_property
    def null(self) -> tuple[CallLog, CallLog]:
        """With the null arguments, and fine-tuning in the same setting."""
        name = "momentum"
        try:
            run = fit(self.case.make_null(), SETTINGS[name])
        except ConfigurationError:
            name = "weight decay"
            run = fit(self.case.make_null(), SETTINGS[name])
        return CallLog(run).finish(), fine_tuning(name)
