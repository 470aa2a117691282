"""The conformance suite passes every built-in gate, and each promise of gates fails on a planted fault."""

import json
import re
from importlib.resources import files

import pytest
from conformance_runs import Outcome, run_suite, selected, stand_for_others

from bpn_lightning.strategies.table import GATES

pytestmark = pytest.mark.slow

PLANTED = '''
from dataclasses import dataclass

import torch
from bpn_lightning.costs import DeclaredBytes, HeldTensors
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.strategies import TaskGate


@dataclass(eq=False, repr=False, kw_only=True)
class Means(TaskGate):
    """The task of the nearest class mean: keeps every promise."""

    scale: float = 0.1

    @property
    def names_classes(self):
        return True

    def reset(self):
        self.means = torch.zeros(0, 64)
        self.owners, self.columns = [], []

    def on_task_end(self, host, task):
        sums = torch.zeros(task.num_classes, 65, dtype=torch.float64)
        for batch in host.gate_batches(task.id, "train"):
            inputs = self.weighted(batch.inputs.flatten(1).double())
            rows = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
            sums.index_add_(0, batch.targets - task.columns[0], rows)
        sums = self.total(host, sums)
        self.means = torch.cat([self.means, (sums[:, :64] / sums[:, 64:]).float()])
        self.owners += [task.id] * task.num_classes
        self.columns += range(*task.columns)

    def weighted(self, inputs):
        return inputs

    def total(self, host, sums):
        return host.all_reduce(sums)

    def scores(self, seen):
        return -self.scale * torch.cdist(seen, self.means)

    def task_scores(self, seen):
        scores, owners = self.scores(seen), torch.tensor(self.owners)
        tasks = range(max(self.owners) + 1)
        return torch.stack([scores[:, owners == task].amax(1) for task in tasks], 1)

    def own_columns(self, seen, task=None):
        scores = self.scores(seen)
        if task is not None:
            scores[:, torch.tensor(self.owners) != task] = -torch.inf
        return torch.tensor(self.columns)[scores.argmax(1)]

    def state_dict(self):
        return {"means": self.means, "owners": list(self.owners), "columns": list(self.columns)}

    def load_state_dict(self, state):
        self.means = state["means"]
        self.owners, self.columns = list(state["owners"]), list(state["columns"])

    def declared_bytes(self, host):
        each = 4 * 64
        return DeclaredBytes(
            each * len(self.owners), each * len(self.owners), each * self.owners.count(0)
        )

    def held_tensors(self, host):
        return HeldTensors(inference=[self.means])


class ScoresAsProbabilities(Means):
    def task_log_probabilities(self, seen):
        return self.task_scores(seen)


class ForgetsTheGivenTask(Means):
    def own_columns(self, seen, task=None):
        return super().own_columns(seen)


class StandardizesTheBatch(Means):
    def scores(self, seen):
        return super().scores(seen - seen.mean(0))


class Listener(TaskModule):
    mode = 0

    def switch(self, task):
        super().switch(task)
        self.mode = task

    def forward(self, inputs):
        return inputs


class HearsTheMode(Means):
    """Knows the task from the mode that the network happens to be in."""

    def configure(self, host, stream):
        self.listener = Listener(len(host.network.tasks))
        host.network.get_submodule("backbone").listener = self.listener

    def task_scores(self, seen):
        scores = super().task_scores(seen)
        if isinstance(getattr(self, "listener", None), Listener):
            mode = torch.as_tensor(self.listener.mode).reshape(-1)[0]
            scores[:, min(int(mode), scores.shape[1] - 1)] += 1
        return scores


class Interferes(Means):
    def penalty_grad(self, host, parameters):
        if self.owners:
            parameters["head.bias"].grad.mul_(0.9)


class WeighsByTheBatch(Means):
    def weighted(self, inputs):
        return inputs * len(inputs) / 100


class KeepsSamples(Means):
    """As many rows as it has seen samples."""

    def reset(self):
        super().reset()
        self.samples = torch.zeros(0, 64)

    def total(self, host, sums):
        sums = super().total(host, sums)
        self.samples = torch.cat([self.samples, torch.zeros(int(sums[:, 64].sum()), 64)])
        return sums

    def state_dict(self):
        return super().state_dict() | {"samples": self.samples}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.samples = state["samples"]

    def held_tensors(self, host):
        return super().held_tensors(host)._replace(training=[self.samples])

    def declared_bytes(self, host):
        whole = super().declared_bytes(host)
        return whole._replace(training=whole.training + 4 * self.samples.numel())


class SaysItIsFree(Means):
    def declared_bytes(self, host):
        return super().declared_bytes(host)._replace(per_task=0)


class LosesAnArgument(Means):
    @property
    def arguments(self):
        return {"name": self.name}


class CountsBytesWrong(Means):
    def declared_bytes(self, host):
        whole = super().declared_bytes(host)
        return whole._replace(training=whole.training + 4)


class ForgetsItsMeans(Means):
    """When a run goes on, though not when a file is read."""

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.means = self.means * (1 if "for a file" in state else 0)

    def inference_state(self):
        return super().inference_state() | {"for a file": True}


class RanksOnTheirOwn(Means):
    def total(self, host, sums):
        return sums
'''

PROBABILITIES = "probabilities_are_of_the_learned_tasks_and_add_up_to_1"
ALONE = "samples_are_answered_each_by_itself"
IDS = "task_ids_change_no_answer"
FITTING = "fitting_changes_nothing_that_is_learned"
ORDER = "order_and_division_of_samples_do_not_matter"
SAMPLES = "no_sample_is_kept"
PER_TASK = "bytes_per_task_are_declared"
FILE = "a_file_has_all_that_it_answers_by"

#: Of all strategies.
RANKS = "two_processes_learn_what_one_does"
RESUMING = "resuming_is_bit_identical"
GOING_ON = "going_on_equals_knowing_all_tasks"
BYTES = "measured_bytes_are_declared_bytes"

#: What each planted fault breaks; nothing else may fail.
FAULTS: dict[str, set[str]] = {
    "Means": set(),
    "ScoresAsProbabilities": {PROBABILITIES},
    "ForgetsTheGivenTask": {PROBABILITIES},
    "StandardizesTheBatch": {ALONE},
    "HearsTheMode": {IDS, FILE},  # a new gate does not
    "Interferes": {FITTING},
    "WeighsByTheBatch": {ORDER, RANKS},
    "KeepsSamples": {SAMPLES},
    "SaysItIsFree": {PER_TASK},
    "LosesAnArgument": {FILE},
    "CountsBytesWrong": {BYTES},
    "ForgetsItsMeans": {RESUMING, GOING_ON},
    "RanksOnTheirOwn": {RANKS},
}
ARGUMENTS = {
    "ranpac": {"width": 80},
    "generative": {"hidden": [16], "updates": 20, "importance_samples": 8},
    "planted.LosesAnArgument": {"scale": 0.3},
}


#: One of each kind: rows, rows that share moments, rows that are trained, and another network's logits.
KINDS = {"confidence", "generative", "ppca", "slda"}


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    wanted: dict[str, set[str] | None]
    wanted = dict.fromkeys(selected(request, "test_built_in_gate_keeps_its_promises"))
    whole = {name for name, broken in FAULTS.items() if not broken}
    whole |= selected(request, "test_a_planted_fault_breaks_nothing_else")
    for name, broken in FAULTS.items():
        wanted[f"planted.{name}"] = None if name in whole else broken
    flags = [flag for name in wanted for flag in ("--gate", name)]
    given = {name: value for name, value in ARGUMENTS.items() if name in wanted}
    flags += ["--strategy-arguments", json.dumps(given)]
    return run_suite(tmp_path_factory.mktemp("author"), PLANTED, wanted, flags)


@pytest.mark.parametrize("name", stand_for_others(GATES, KINDS))
def test_built_in_gate_keeps_its_promises(outcome: Outcome, name: str) -> None:
    assert len(outcome.examined[name]) >= 20
    assert not outcome.failed[name], "\n\n".join(outcome.failed[name].values())


@pytest.mark.parametrize("name", FAULTS)
def test_each_promise_fails_on_a_planted_fault(outcome: Outcome, name: str) -> None:
    found = outcome.failed[f"planted.{name}"]
    assert set(found) == FAULTS[name], "\n\n".join(found.values())


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_breaks_nothing_else(outcome: Outcome, name: str) -> None:
    assert len(outcome.examined[f"planted.{name}"]) >= 20
    assert set(outcome.failed[f"planted.{name}"]) == FAULTS[name]


def test_every_promise_has_a_fault() -> None:
    text = files("bpn_lightning.conformance").joinpath("gate_promises.py").read_text()
    promises = set(re.findall(r"^def test_(\w+)", text, re.MULTILINE))
    assert promises <= set().union(*FAULTS.values())


def test_a_failure_says_what_to_look_at(outcome: Outcome) -> None:
    said = outcome.failed["planted.KeepsSamples"][SAMPLES]
    assert "With twice as many training samples it holds more" in said
    assert "Keep sums" in said
