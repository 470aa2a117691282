"""What a gate promises besides, one test each; the first line of a docstring is the promise.

Gates learn beside a network with bias units, so that its modes answer differently.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from bpn_lightning.conformance.declarations import expect_nothing, has_no_gate, promise
from bpn_lightning.conformance.runs import BATCH_NORM_DROPOUT, Run, differences
from bpn_lightning.conformance.scenarios import Scenario, learn_beside_modes
from bpn_lightning.costs import tensor_bytes, tensors_in
from bpn_lightning.model.gating import task_probabilities
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.tasks import Batch

pytestmark = pytest.mark.filterwarnings("ignore")

#: Absolute, of probabilities that come of the same numbers in another order.
TOLERANCE = 1e-3
TASKS = range(3)


@torch.no_grad()
def _answers(run: Run, gate: TaskGate, batches: Iterable[Batch]) -> Tensor:
    """Probabilities of tasks, ``(samples, tasks)``, of batches as gates see them."""
    host = run.module.host
    with evaluation_mode(host.network):
        return torch.cat([task_probabilities(host, gate, batch.inputs) for batch in batches])


def _tested(run: Run) -> list[Batch]:
    return [batch for task in TASKS for batch in run.module.host.gate_batches(task, "test")]


def _furthest(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where shapes differ or an answer is no number."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).abs().nan_to_num(float("inf")).max())


# --- what it answers -----------------------------------------------------------------------------


@promise(unless=has_no_gate)
def test_probabilities_are_of_the_learned_tasks_and_add_up_to_1(scenario: Scenario) -> None:
    """Each sample has one probability for each learned task; classes are columns of the right task."""
    found, run = [], scenario.gated.run
    for gate in scenario.gated.gates:
        shares = _answers(run, gate, _tested(run))
        if shares.shape[1] != len(TASKS):
            found.append(f"{gate.name} has {shares.shape[1]} probabilities for {len(TASKS)} tasks")
        if not bool(((shares >= 0) & (shares <= 1 + 1e-6)).all()):
            found.append(f"{gate.name} has probabilities from {shares.min():g} to {shares.max():g}")
        off = float((shares.double().sum(1) - 1).abs().nan_to_num(float("inf")).max())
        if not off < 1e-5:
            found.append(f"those of {gate.name} add up to something else, by up to {off:.2g}")
        found += _wrong_columns(run, gate)
    expect_nothing(
        found,
        "Answers are not what they are meant to be",
        "Look at task_scores, (n, learned tasks), and at own_columns, (n,) int64: columns of the head, "
        "those of the task where it is given.",
    )


def _wrong_columns(run: Run, gate: TaskGate) -> list[str]:
    if gate.looks_at != "features" or not gate.names_classes:
        return []
    seen = torch.cat([batch.inputs.flatten(1) for batch in _tested(run)])
    found = []
    for task in (None, *TASKS):
        columns = gate.own_columns(seen, task)
        first, stop = (
            (0, run.stream.num_classes) if task is None else run.module.tasks[task].columns
        )
        if columns is None or not bool(((columns >= first) & (columns < stop)).all()):
            where = "" if task is None else f" with task {task} given"
            found.append(f"{gate.name} names columns outside of {first} to {stop - 1}{where}")
    return found


@promise(unless=has_no_gate)
def test_samples_are_answered_each_by_itself(scenario: Scenario) -> None:
    """Which samples share a batch, and in which order, changes no answer but for rounding."""
    found, run = [], scenario.gated.run
    batches = _tested(run)
    inputs = torch.cat([batch.inputs for batch in batches])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    mixed = [batches[0]._replace(inputs=part) for part in torch.split(inputs[order], 7)]
    for gate in scenario.gated.gates:
        off = _furthest(_answers(run, gate, mixed), _answers(run, gate, batches)[order])
        if not off <= TOLERANCE:
            found.append(f"{gate.name}: by up to {off:.2g}")
    expect_nothing(
        found,
        "Probabilities change with the batch",
        "Use nothing of the other samples in task_scores: an image is asked about alone, too.",
    )


@promise(unless=has_no_gate)
def test_task_ids_change_no_answer(scenario: Scenario) -> None:
    """Other IDs of the samples, and another mode of the network, leave every bit of an answer."""
    found, run = [], scenario.gated.run
    host = run.module.host
    for gate in scenario.gated.gates:
        for raw in run.stream.loader(1, "test"):
            plain = _answers(run, gate, [host.for_gates(raw)])
            drawn = torch.arange(len(raw.targets)) % len(TASKS)
            others: list[tuple[int, int | Tensor]] = [(0, 1), (2, 2), (1, 0), (0, drawn)]
            for mode, ids in others:
                with host.network.task_mode(mode):
                    other = _answers(run, gate, [host.for_gates(raw._replace(task=ids))])
                if not torch.equal(other, plain):
                    off = _furthest(other, plain)
                    found.append(f"{gate.name}, in the mode of task {mode}: by up to {off:.2g}")
    expect_nothing(
        found,
        "Answers of a gate change with the task ID",
        "It is what the gate has to find. Use only what task_scores is given and what was fitted.",
    )


# --- how it is fitted ----------------------------------------------------------------------------


@promise(unless=has_no_gate)
def test_fitting_changes_nothing_that_is_learned(scenario: Scenario) -> None:
    """The network, its optimizer and the random numbers are those of a fit without the gate."""
    expect_nothing(
        differences(scenario.gated.run.plain(), learn_beside_modes([]).run.plain()),
        "With the gate something else was learned",
        "A gate looks on: leave hooks of an update alone, and draw from random_state.seeded_generator.",
    )


@promise(unless=has_no_gate)
def test_order_and_division_of_samples_do_not_matter(scenario: Scenario) -> None:
    """Fitted on shuffled samples in batches of other sizes it answers the same, but for rounding."""

    def watch(run: Run) -> None:
        host: Any = run.module.host
        for reading in ("batches", "gate_batches"):
            setattr(host, reading, _shuffled(getattr(host, reading)))

    other = learn_beside_modes(scenario.case.make(), watch=watch)
    found = []
    for gate, shuffled in zip(scenario.gated.gates, other.gates, strict=True):
        tested = _tested(scenario.gated.run)
        expected = _answers(scenario.gated.run, gate, tested)
        off = _furthest(_answers(scenario.gated.run, shuffled, tested), expected)
        if not off <= TOLERANCE:
            found.append(f"{gate.name}: by up to {off:.2g}")
    expect_nothing(
        found,
        "Probabilities change with the order of the training samples and with the size of batches",
        "Add up sums and counts in float64, and divide when all are there. Draw samples by "
        "Batch.samples, their places in the task, not by their order.",
    )


def _shuffled(reading: Any) -> Any:
    """The same samples of training parts, in another order and in batches of uneven sizes."""

    def read(task: int, split: str, *more: Any) -> Iterator[Batch]:
        batches = list(reading(task, split, *more))
        if split != "train":
            yield from batches
            return
        inputs, targets = (torch.cat([b[field] for b in batches]) for field in (0, 1))
        samples = torch.cat([batch.samples for batch in batches])
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(task))
        sizes = cycle((1, 40, 7, 13))
        while len(order):
            size = next(sizes)
            own, order = order[:size], order[size:]
            yield Batch(inputs[own], targets[own], task, len(own), samples=samples[own])

    return read


@promise(unless=has_no_gate)
def test_no_sample_is_kept(scenario: Scenario) -> None:
    """Its state has the same size after half as many training samples."""
    half = replace(
        BATCH_NORM_DROPOUT, stream={**BATCH_NORM_DROPOUT.stream, "validation_fraction": 0.5}
    )
    fewer = learn_beside_modes(scenario.case.make(), half)
    found = []
    for gate, other in zip(scenario.gated.gates, fewer.gates, strict=True):
        whole, part = (tensor_bytes(tensors_in(one.state_dict())) for one in (gate, other))
        if whole != part:
            found.append(f"{gate.name}: {whole:,} bytes instead of {part:,}")
    expect_nothing(
        found,
        "With twice as many training samples it holds more",
        "Keep sums and what follows from them. What has to see a sample again belongs to the task's end, "
        "and is gone after it.",
    )


# --- what it holds -------------------------------------------------------------------------------


@promise(unless=has_no_gate)
def test_bytes_per_task_are_declared(scenario: Scenario) -> None:
    """What a task adds to the bytes that it answers by is what its formula gives."""
    found = []
    sizes = scenario.gated.inference_bytes
    for name, of_gate in sizes.items():
        for task in TASKS[1:]:
            grown = of_gate[task].measured - of_gate[task - 1].measured
            if grown != of_gate[task].per_task:
                declared = of_gate[task].per_task
                found.append(f"{name}, task {task}: {grown:,} measured, {declared:,} declared")
    expect_nothing(
        found,
        "Bytes per task are not what declared_bytes says",
        "Look at per_task of declared_bytes, and at held_tensors: what is held for inference is listed there.",
    )


@promise(unless=has_no_gate)
def test_a_file_has_all_that_it_answers_by(scenario: Scenario) -> None:
    """A new gate of its arguments and of its inference_state answers the same, bit for bit."""
    found, run = [], scenario.gated.run
    for gate in scenario.gated.gates:
        made = type(gate)(**gate.arguments)
        made.load_state_dict(gate.inference_state())
        expected = _answers(run, gate, _tested(run))
        off = _furthest(_answers(run, made, _tested(run)), expected)
        if off:
            found.append(f"{gate.name}: by up to {off:.2g}")
    expect_nothing(
        found,
        "A gate that was written and read answers differently",
        "Look at inference_state, and keep each argument as an attribute of its name: a checkpoint and an "
        "export have nothing else.",
    )
