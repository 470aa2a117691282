"""The conformance suite passes every built-in, and each of its promises fails on a planted fault.

One run of pytest examines them all, as an author would start it: from an empty folder, with settings of
its own that fit nothing of ours.
"""

import re
from importlib.resources import files
from pathlib import Path

import pytest
from conformance_runs import run_suite, selected, stand_for_others

from bpn_lightning.conformance.cases import read_cases
from bpn_lightning.conformance.discovery import _asks_for_the_suite
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies import STRATEGIES

pytestmark = pytest.mark.slow

ARGUMENTS = "{planted.NeedsAnArgument: {strength: 0.02}}"

COMPOSITIONS = [
    name
    for name in ("bd+ewc", "bd+gem", "bd+psp", "psp+ewc", "si+lwf")
    if set(name.split("+")) <= set(STRATEGIES)
]

PLANTED = '''
from fractions import Fraction

import torch
from bpn_lightning.costs import DeclaredBytes
from bpn_lightning.nn.layers import TaskModule, evaluation_mode
from bpn_lightning.strategies.base import ContinualStrategy


class Pull(ContinualStrategy):
    """Pulls to the last task's weights, the harder the larger its logits: keeps every promise."""

    null_arguments = {"strength": 0.0}

    def __init__(self, strength=0.01):
        self.strength = strength
        self.reset()

    def reset(self):
        self.anchor = {}
        self.size = torch.zeros(())

    def on_task_end(self, host, task):
        if self.strength == 0:
            return
        with host.network.task_mode(task.id), evaluation_mode(host.network):
            self.size = self.measure(host, task)
        parameters = host.network.shared_parameters(include_head=False)
        self.anchor = {name: p.detach().clone() for name, p in parameters.items()}

    def batches(self, host, task):
        return host.batches(task.id, "train")

    @torch.no_grad()
    def measure(self, host, task):
        sums = torch.zeros(2)
        for batch in self.batches(host, task):
            logits = host.network(batch.inputs)[:, slice(*host.network.columns(task.id))]
            sums += torch.tensor([logits.square().sum(), float(len(logits))])
        total, count = self.total(host, sums)
        return total / count

    def total(self, host, sums):
        return host.all_reduce(sums)

    def penalty_grad(self, host, parameters):
        for name, anchor in self.anchor.items():
            gap = parameters[name].detach() - anchor
            parameters[name].grad.add_(gap, alpha=2 * self.strength * float(self.size))

    def logs(self, host):
        return {"penalty/pull": self.size * self.strength}

    def state_dict(self):
        return {"anchor": self.anchor, "size": self.size}

    def load_state_dict(self, state):
        self.anchor, self.size = dict(state["anchor"]), state["size"]

    def declared_bytes(self, host):
        shared = host.network.shared_parameters(include_head=False).values()
        return DeclaredBytes(4 * sum(p.numel() for p in shared) + 4)


class Listener(TaskModule):
    """A layer that changes nothing, and passes each change of the mode on."""

    def __init__(self, num_tasks, tell):
        super().__init__(num_tasks)
        self.tell = tell

    def switch(self, task):
        super().switch(task)
        self.tell(task)

    def forward(self, inputs):
        return inputs


def listen(host, tell):
    host.network.get_submodule("backbone").listener = Listener(len(host.network.tasks), tell)


class WithoutNull(Pull):
    """Declares that no arguments make it fine-tuning, so nobody asks."""

    null_arguments = None

    def __init__(self, strength=0.01):
        super().__init__(strength + 0.01)


class NeedsAnArgument(Pull):
    def __init__(self, strength):
        super().__init__(strength)


class ActsAtStrengthZero(Pull):
    def penalty_grad(self, host, parameters):
        super().penalty_grad(host, parameters)
        if host.network.opened:
            parameters["head.bias"].grad.mul_(0.9)


class ActsAtOnce(Pull):
    def capture_grad(self, host, parameters):
        if not self.anchor and self.strength:
            parameters["head.bias"].grad.mul_(0.9)


class CountsVisits(Pull):
    def reset(self):
        super().reset()
        self.visits = 0

    def configure(self, host, stream):
        listen(host, self.count)

    def count(self, task):
        self.visits += 1

    def state_dict(self):
        return super().state_dict() | {"visits": self.visits}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.visits = state["visits"]


class DrawsToSwitch(Pull):
    """Moves random states while it answers, and nothing else."""

    def configure(self, host, stream):
        self.inside = False
        listen(host, lambda task: self.draw(host))

    def on_task_end(self, host, task):
        self.inside = True
        super().on_task_end(host, task)

    def on_task_start(self, host, task):
        self.inside = False

    def draw(self, host):
        if host.network.opened == 1 and not self.inside and self.strength:
            torch.rand(1)


class LogsMoveState(Pull):
    def logs(self, host):
        self.size = self.size * 1.01
        return super().logs(host)


class OneTaskPerBatch(Pull):
    def configure(self, host, stream):
        listen(host, int)


class HiddenModes(Pull):
    """Adds the task's number to all logits: the same probabilities, and another answer."""

    mode = 0

    def configure(self, host, stream):
        host.network.linear_layers()["head"].register_forward_hook(self.shift)
        listen(host, self.select)

    def select(self, task):
        self.mode = task

    def shift(self, layer, inputs, output):
        return output + torch.as_tensor(self.mode * self.strength).reshape(-1, 1)


class ProjectsInSecret(Pull):
    def project_grad(self, host, parameters):
        pass


class CorrectsInSecret(Pull):
    def correct_step(self, host, parameters):
        if self.anchor:
            with torch.no_grad():
                parameters["head.bias"].mul_(0.999)


class Twin(ContinualStrategy):
    """Named by its place among the callbacks, so that two never have one name."""

    place = 0

    def configure(self, host, stream):
        self.place = [part is self for part in host.trainer.callbacks].index(True)

    @property
    def state_key(self):
        return f"twin {self.place}"


class TakesAnything(Pull):
    def __init__(self, strength=0.01, **options):
        super().__init__(strength)


class KeepsObjects(Pull):
    def state_dict(self):
        return super().state_dict() | {"fraction": Fraction(1, 2)}


class ForgetsItsAnchor(Pull):
    def load_state_dict(self, state):
        self.size = state["size"]


class ForgetsWhereItWas(Pull):
    """Counts the updates of a task, and keeps the count to itself."""

    steps = 0

    def on_task_start(self, host, task):
        self.steps = 0

    def penalty_grad(self, host, parameters):
        self.steps += self.strength > 0
        for name in self.anchor:
            parameters[name].grad.mul_(1 + 0.1 * self.steps)


class KnowsTheEnd(Pull):
    """Pulls by how many tasks the stream has."""

    def penalty_grad(self, host, parameters):
        for _ in host.network.tasks:
            super().penalty_grad(host, parameters)


class RemembersAnEarlierFit(Pull):
    def __init__(self, strength=0.01):
        super().__init__(strength)
        self.reset = lambda: None


class TrainsWhileMeasuring(Pull):
    def on_task_end(self, host, task):
        if self.strength:
            self.size = self.measure(host, task)

    def declared_bytes(self, host):
        return DeclaredBytes(4)


class DrawsGlobally(Pull):
    def measure(self, host, task):
        return super().measure(host, task) + 0 * torch.rand(())


class LeavesGradients(Pull):
    def measure(self, host, task):
        for parameter in host.network.parameters():
            parameter.grad = torch.ones_like(parameter)
        return super().measure(host, task)


class MovesWeights(Pull):
    def measure(self, host, task):
        size = super().measure(host, task)
        with torch.no_grad():
            host.network.backbone[1].weight.mul_(0.999)
        return size


class MeasuresAugmented(Pull):
    def batches(self, host, task):
        for batch in host.stream.train_loader(task.id, 0):
            yield host.stream.prepare(batch, augment=True)


class MovesOtherHeads(Pull):
    def on_task_start(self, host, task):
        if host.network.mask == "task" and task.id:
            with torch.no_grad():
                host.network.head.bias[0] += 0.1


class CountsBytesWrong(Pull):
    def declared_bytes(self, host):
        return DeclaredBytes(super().declared_bytes(host).training - 4)


class Grows(Pull):
    def reset(self):
        super().reset()
        self.sizes = []

    def on_task_end(self, host, task):
        super().on_task_end(host, task)
        self.sizes.append(self.size)

    def state_dict(self):
        return super().state_dict() | {"sizes": list(self.sizes)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.sizes = list(state["sizes"])

    def declared_bytes(self, host):
        return DeclaredBytes(super().declared_bytes(host).training + 4)


class RanksOnTheirOwn(Pull):
    def total(self, host, sums):
        return sums


class DiesInCompany(Pull):
    """Ends one of two processes; those that come after it are still examined."""

    def on_task_end(self, host, task):
        super().on_task_end(host, task)
        if host.global_rank == 1:
            raise ValueError("I would rather be alone.")


class MeansOfSlices(Pull):
    def loss_terms(self, host, batch, logits):
        return {"size": self.strength * logits.square().mean()} if self.anchor else {}


class CountsBatches(Pull):
    def reset(self):
        super().reset()
        self.batches_seen = 0

    def loss_terms(self, host, batch, logits):
        self.batches_seen += 1
        return {}

    def state_dict(self):
        return super().state_dict() | {"batches": self.batches_seen}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.batches_seen = state["batches"]


class ClipsBadly(Pull):
    """Believes that what it has seen is what the optimizer takes."""

    def consume_grad(self, host, parameters):
        self.seen = parameters["head.bias"].grad.clone()

    def correct_step(self, host, parameters):
        if not torch.equal(parameters["head.bias"].grad, self.seen):
            raise ValueError("The gradient is another one.")


class AloneInSecret(Pull):
    def on_task_start(self, host, task):
        if host.network.has_modes:
            raise ValueError("What is a mode?")
'''

NULL = "null_arguments_are_fine_tuning_bit_for_bit"
FIRST = "the_first_task_is_plain_training"
EVALUATING = "evaluating_changes_nothing"
RESUMING = "resuming_is_bit_identical"
GOING_ON = "going_on_equals_knowing_all_tasks"
SECOND = "a_second_fit_begins_fresh"
LEFT_ALONE = "consolidation_leaves_the_network_as_it_was"
RANDOM = "consolidation_draws_no_global_random_numbers"
MEASURED = "consolidation_measures_the_network_that_answers"
BYTES = "measured_bytes_are_declared_bytes"
RANKS = "two_processes_learn_what_one_does"
HALVES = "two_half_batches_are_a_batch"

#: What each planted fault breaks; nothing else may fail.
FAULTS = {
    "Pull": set(),
    "WithoutNull": set(),
    "NeedsAnArgument": set(),
    "ActsAtStrengthZero": {NULL},
    "ActsAtOnce": {FIRST},
    "CountsVisits": {EVALUATING, GOING_ON},
    "DrawsToSwitch": {EVALUATING},
    "LogsMoveState": {"logging_changes_nothing"},
    "OneTaskPerBatch": {"samples_may_each_have_a_task"},
    "HiddenModes": {"answers_without_the_task_id"},
    "ProjectsInSecret": {"projects_only_if_it_says_so"},
    "CorrectsInSecret": {"corrects_weights_only_if_it_says_so"},
    "Twin": {"twice_is_refused"},
    "TakesAnything": {"unknown_arguments_are_refused"},
    "KeepsObjects": {"state_loads_without_trust"},
    "ForgetsItsAnchor": {RESUMING, GOING_ON},
    "ForgetsWhereItWas": {RESUMING},
    "KnowsTheEnd": {GOING_ON},
    "RemembersAnEarlierFit": {SECOND},
    "TrainsWhileMeasuring": {LEFT_ALONE, RANDOM, MEASURED},
    "DrawsGlobally": {RANDOM},
    "LeavesGradients": {LEFT_ALONE},
    "MovesWeights": {LEFT_ALONE},
    "MeasuresAugmented": {MEASURED},
    "MovesOtherHeads": {"other_heads_stay_bit_identical"},
    "CountsBytesWrong": {BYTES},
    "Grows": {BYTES},
    "RanksOnTheirOwn": {RANKS},
    "DiesInCompany": {RANKS},
    "MeansOfSlices": {RANKS, HALVES, GOING_ON},
    "CountsBatches": {HALVES},
    "ClipsBadly": {"runs_with_clipped_gradients"},
    "AloneInSecret": {"composes_with_bias_units"},
}


#: One of each kind: of what is kept of a task, and of when it acts.
KINDS = {"gem", "imm", "lwf", "psp", "si", "stl", "bd+ewc"}


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory):
    wanted = dict.fromkeys(selected(request, "test_built_in_keeps_its_promises"))
    whole = {name for name, broken in FAULTS.items() if not broken}
    whole |= selected(request, "test_a_planted_fault_breaks_nothing_else")
    for name, broken in FAULTS.items():
        wanted[f"planted.{name}"] = None if name in whole else broken
    flags = [flag for name in wanted for flag in ("--strategy", name)]
    flags += ["--strategy-arguments", ARGUMENTS]
    return run_suite(tmp_path_factory.mktemp("author"), PLANTED, wanted, flags)


@pytest.mark.parametrize("name", stand_for_others([*STRATEGIES, *COMPOSITIONS], KINDS))
def test_built_in_keeps_its_promises(outcome, name):
    assert len(outcome.examined[name]) >= 12
    assert not outcome.failed[name], "\n\n".join(outcome.failed[name].values())


@pytest.mark.parametrize("name", FAULTS)
def test_each_promise_fails_on_a_planted_fault(outcome, name):
    found = outcome.failed[f"planted.{name}"]
    assert set(found) == FAULTS[name], "\n\n".join(found.values())


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_breaks_nothing_else(outcome, name):
    assert len(outcome.examined[f"planted.{name}"]) >= 12
    assert set(outcome.failed[f"planted.{name}"]) == FAULTS[name]


def test_every_promise_has_a_fault():
    text = files("bpn_lightning.conformance").joinpath("promises.py").read_text()
    promises = set(re.findall(r"^def test_(\w+)", text, re.MULTILINE))
    assert set.union(*FAULTS.values()) == promises


def test_a_promise_that_is_not_made_is_not_examined_and_said_so(outcome):
    assert NULL in outcome.examined["planted.Pull"]
    assert NULL not in outcome.examined["planted.WithoutNull"]
    assert (
        f"test_{NULL}[planted.WithoutNull]: null_arguments of planted.WithoutNull is None"
        in outcome.text
    )
    assert "skipped" not in outcome.text.splitlines()[-1]


def test_a_failure_says_what_to_look_at(outcome):
    said = outcome.failed["planted.CountsBytesWrong"][BYTES]
    assert "after task 2, CountsBytesWrong: measured (" in said
    assert "Look at declared_bytes" in said


def test_a_process_that_fails_is_quoted(outcome):
    assert "I would rather be alone." in outcome.failed["planted.DiesInCompany"][RANKS]


@pytest.mark.parametrize(
    ("argument", "asked"),
    [
        ("bpn_lightning.conformance", True),
        ("bpn_lightning.conformance.promises::test_twice_is_refused", True),
        (str(Path(str(files("bpn_lightning.conformance")))), True),
        ("bpn_lightning.conformances", False),
        ("tests/test_conformance.py", False),
        ("--strategy", False),
        ("x" * 5000, False),
    ],
)
def test_other_runs_of_pytest_do_not_meet_the_options(argument, asked):
    assert _asks_for_the_suite(argument) == asked


@pytest.mark.parametrize(
    ("names", "arguments", "said"),
    [
        ([], {}, "Expected --strategy to be a strategy to examine, but got none."),
        (["sldaa"], {}, "but got 'sldaa'. Did you mean 'slda'?"),
        (
            ["ewx"],
            {},
            "Expected --strategy to name strategies or gates, but got 'ewx'. Did you mean 'ewc'?",
        ),
        (
            ["nobodys_lab.Missing"],
            {},
            "in --strategy to be importable, but importing it raised ModuleNotFoundError",
        ),
        (["torch.nn.Linear"], {}, "in --strategy to be a ContinualStrategy, but got"),
        (["ewc"], {"ewx": {}}, "to be for a strategy of --strategy, but got 'ewx'. Did you mean"),
        (["ewc"], {"ewc": 3}, "to have a mapping of arguments for 'ewc', but got 3."),
        (["bd+ewc"], {"ewc": {"strength": -1}}, "Expected ewc to be made with the arguments"),
    ],
)
def test_bad_input(names, arguments, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        read_cases(names, arguments)


def test_composition_and_arguments():
    (case,) = read_cases(["bd+ewc"], {"ewc": {"strength": 3.0}})
    bd, ewc = case.make()
    assert (type(bd).__name__, type(ewc).__name__, ewc.strength) == (
        "BeneficialPerturbation",
        "EWC",
        3.0,
    )
    assert case.which(lambda part: part.strategy.needs_task_id) == "bd"


def test_aliases_are_strategies_with_arguments():
    (case,) = read_cases(["gd"], {})
    assert case.make()[0].direction == "gradient"
