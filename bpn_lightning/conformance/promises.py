"""What a strategy promises, one test each; the first line of a docstring is the promise.

A promise that a strategy does not make, by its own declarations, is not examined, and the summary says
which declaration it was.
"""

from dataclasses import replace
from pickle import UnpicklingError
from typing import Any

import pytest
import torch

from bpn_lightning.conformance.declarations import (
    acts_at_once,
    corrects_weights,
    expect_nothing,
    has_no_null,
    is_alone,
    lacks,
    needs_task_id,
    projects,
    promise,
    trains_on_other_tasks,
)
from bpn_lightning.conformance.pair import TwoProcesses
from bpn_lightning.conformance.ranks import setting
from bpn_lightning.conformance.runs import (
    BATCH_NORM_DROPOUT,
    PLAIN,
    Run,
    differences,
    fit,
    without_gates,
)
from bpn_lightning.conformance.scenarios import (
    CallLog,
    Consolidation,
    Scenario,
    fine_tuning,
    visits,
)
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.tasks import Position

# What is promised is not silence: Lightning warns of much, and regularizers of what they forget.
pytestmark = pytest.mark.filterwarnings("ignore")

#: Relative; a tenth of it absolute. For runs that add up the same numbers in another order.
TOLERANCE = 1e-5


# --- what it is when it does nothing -------------------------------------------------------------


@promise(unless=has_no_null)
def test_null_arguments_are_fine_tuning_bit_for_bit(scenario: Scenario) -> None:
    """With its null_arguments it leaves weights, optimizer and random states as fine-tuning does."""
    mine, theirs = scenario.null
    expect_nothing(
        differences(mine.end, theirs.end),
        "With its null_arguments it differs from fine-tuning",
        "Look at hooks that act whatever the strength, at draws from global generators, and at forward "
        "passes in training mode.",
    )


@promise(unless=acts_at_once)
def test_the_first_task_is_plain_training(scenario: Scenario) -> None:
    """Nothing is to be remembered yet, so the first task is trained as in fine-tuning, bit for bit."""
    expect_nothing(
        differences(scenario.call_log.first_task, fine_tuning("batch_norm_dropout").first_task),
        "The first task was not trained as in fine-tuning",
        "Look at what it does before any task has ended. If it is meant to act from the first update "
        "on, declare plain_first_task = False.",
    )


# --- looking changes nothing ---------------------------------------------------------------------


@promise()
def test_evaluating_changes_nothing(scenario: Scenario) -> None:
    """Tasks may be evaluated in any order, any number of times, in the midst of training too."""
    found: list[str] = []

    def look(run: Run, at: Position, batch: int, last: bool) -> None:
        if at.task == 1 and batch == 2:
            found.extend(visits(run))

    visited = CallLog(fit(scenario.case.make(), BATCH_NORM_DROPOUT, at_batch=look)).finish()
    found += differences(visited.learned | visited.end, _whole(scenario.undisturbed))
    found += visits(visited.run)
    expect_nothing(
        found,
        "Evaluating tasks changed something",
        "Look at your TaskModule's switch: it may select what is there, and neither count, draw nor train.",
    )


def _whole(call_log: CallLog) -> dict[str, Any]:
    return call_log.learned | call_log.end


@promise(unless=lambda case: lacks(case, "logs"))
def test_logging_changes_nothing(scenario: Scenario) -> None:
    """What it logs are scalars, and taking them changes nothing."""
    often = replace(BATCH_NORM_DROPOUT, trainer={"log_every_n_steps": 1})
    run = fit(scenario.case.make(), often)
    expect_nothing(
        differences(_whole(CallLog(run).finish()), _whole(scenario.undisturbed)),
        "A run that logs every step differs from one that does not",
        "Look at logs: it may read state and not move it.",
    )


@promise()
def test_samples_may_each_have_a_task(scenario: Scenario) -> None:
    """A batch that mixes tasks is answered as each of its tasks alone."""
    run = scenario.call_log.run
    batches = [next(iter(run.module.host.batches(task, "test"))) for task in range(3)]
    inputs = torch.cat([batch.inputs for batch in batches])
    tasks = torch.cat([torch.full_like(b.targets, task) for task, b in enumerate(batches)])
    order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), evaluation_mode(run.module):
        mixed = run.module(inputs[order], task=tasks[order])
        alone = torch.cat([run.module(b.inputs, task=t) for t, b in enumerate(batches)])[order]
    expect_nothing(
        differences({"logits": mixed}, {"logits": alone}, tolerance=TOLERANCE),
        f"With one task id per sample the answers differ by more than {TOLERANCE}",
        "Look at your TaskModule's switch and forward: task may be a tensor (batch,). Where that cannot "
        "be, declare per_sample = False in the TaskModule.",
    )


# --- what it says of itself ----------------------------------------------------------------------


@promise(unless=needs_task_id)
def test_answers_without_the_task_id(scenario: Scenario) -> None:
    """A strategy that does not declare needs_task_id answers alike in every task's mode."""
    run, found = scenario.call_log.run, []
    batch = next(iter(run.module.host.batches(0, "test")))
    with torch.no_grad(), evaluation_mode(run.module):
        modes = [run.module(batch.inputs, task=task) for task in range(3)]
    found = [f"task {k}" for k, logits in enumerate(modes) if not torch.equal(logits, modes[0])]
    expect_nothing(
        found,
        "Its answers differ from those in task 0's mode in the mode of",
        "Declare needs_task_id = True: it cannot run where nobody tells the task at test.",
    )


@promise(unless=projects)
def test_projects_only_if_it_says_so(scenario: Scenario) -> None:
    """A strategy that replaces gradients declares it: two projections in one run are refused."""
    expect_nothing(
        [part.name for part in scenario.case.parts if part.overrides("project_grad")],
        "project_grad is overridden without projects = True by",
        "Declare projects = True, or use penalty_grad if it adds to gradients only.",
    )


@promise(unless=corrects_weights)
def test_corrects_weights_only_if_it_says_so(scenario: Scenario) -> None:
    """A strategy that moves shared weights after the optimizer declares it: no projection is beside it."""
    expect_nothing(
        sorted(scenario.call_log.corrected),
        "correct_step moved shared weights without corrects_weights, in",
        "Let the property corrects_weights be True, or add a gradient in penalty_grad instead.",
    )


@promise()
def test_twice_is_refused(scenario: Scenario) -> None:
    """The same strategy twice in one run is refused when the run is built."""
    try:
        fit([*scenario.case.make(), *scenario.case.make()], BATCH_NORM_DROPOUT)
    except ConfigurationError:
        return
    except RuntimeError as error:  # Lightning finds it first where both have state
        if "state_key" in str(error):
            return
        raise
    expect_nothing(
        [scenario.case.name],
        "A run took the same strategy twice",
        "Look at state_key: two of one class must have the same. By default it is the strategy's name.",
    )


@promise()
def test_unknown_arguments_are_refused(scenario: Scenario) -> None:
    """A misspelt argument is an error and not ignored."""
    taken = []
    for part in scenario.case.parts:
        try:
            replace(part, arguments={**part.arguments, "no_such_argument": 1}).make()
        except (TypeError, ConfigurationError):
            continue
        taken.append(part.name)
    expect_nothing(
        taken,
        "An argument that does not exist was taken by",
        "Name the constructor's arguments instead of taking **kwargs.",
    )


# --- stopping and going on -----------------------------------------------------------------------


@promise()
def test_state_loads_without_trust(scenario: Scenario) -> None:
    """Its state is plain data: a checkpoint loads with torch.load(weights_only=True)."""
    found = []
    for moment, path in scenario.checkpoints.items():
        try:
            torch.load(path, weights_only=True)
        except (UnpicklingError, RuntimeError) as error:
            found.append(f"{moment}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    expect_nothing(
        found,
        "Checkpoints do not load with weights_only=True",
        "Look at state_dict: tensors, numbers, strings, lists and dictionaries of them only.",
    )


@promise()
def test_resuming_is_bit_identical(scenario: Scenario) -> None:
    """A run that continues from a checkpoint, inside any phase or at a task's end, ends the same."""
    found: list[str] = []
    moments = list(scenario.checkpoints.items())
    used = scenario.case.make()
    for number, (moment, path) in enumerate([*moments, *moments[:1]]):
        strategies = scenario.case.make() if 0 < number < len(moments) else used
        said = f"{moment}, by objects of an earlier fit" if number == len(moments) else moment
        again = CallLog(fit(strategies, BATCH_NORM_DROPOUT, seed=9, checkpoint=path)).finish()
        found += [f"{said}: {d}" for d in differences(_whole(again), _whole(scenario.undisturbed))]
    expect_nothing(
        found,
        "Runs that were resumed ended differently. Saved in",
        "Look at state_dict and load_state_dict: everything that outlives a hook belongs there, or in "
        "the module; move_state moves its tensors to the device.",
    )


@promise()
def test_going_on_equals_knowing_all_tasks(scenario: Scenario) -> None:
    """A stream of two tasks that continues with a third learns what a stream of three does, bit for bit."""
    expect_nothing(
        differences(*scenario.going_on),
        "After two tasks and a third it differs from three at once",
        "Nothing may depend on how many tasks are to come. What it holds by parameter name grows with the "
        "network: say in weights_in_state what of it are weights; on_stream_growth is for the rest.",
    )


class _BrokenOff(Exception):
    """An end that no strategy was told of."""


@promise()
def test_a_second_fit_begins_fresh(scenario: Scenario) -> None:
    """After a fit of another stream, which broke off inside a task, it learns as a new object does."""

    def break_off(run: Run, at: Position, batch: int, last: bool) -> None:
        if at.task == 2 and batch == 2:
            raise _BrokenOff

    used = scenario.case.make()
    with pytest.raises(_BrokenOff):
        fit(
            used,
            replace(BATCH_NORM_DROPOUT, stream={"augment": True, "seed": 1}),
            at_batch=break_off,
        )
    expect_nothing(
        differences(
            _whole(CallLog(fit(used, BATCH_NORM_DROPOUT)).finish()), _whole(scenario.undisturbed)
        ),
        "In a second fit it differs from a new object",
        "Define everything that it holds in reset, and call that in the constructor: the module calls "
        "it when a fit begins.",
    )


# --- between tasks -------------------------------------------------------------------------------

BETWEEN = ("on_task_end", "merged_weights")


def _noted(scenario: Scenario, *hooks: str) -> list[Consolidation]:
    return [note for note in scenario.call_log.consolidations if note.hook in hooks]


@promise(unless=lambda case: lacks(case, *BETWEEN))
def test_consolidation_leaves_the_network_as_it_was(scenario: Scenario) -> None:
    """Weights, running statistics, gradients and training flags are the same after consolidating."""
    found = [
        f"{note.name}: {said}"
        for note in _noted(scenario, *BETWEEN)
        for said in differences(note.after, note.before)
        if not said.startswith("random/")
    ]
    expect_nothing(
        found,
        "Consolidating changed the network",
        "Measure inside `with evaluation_mode(host.network):`, use torch.autograd.grad instead of "
        "backward(), and give weights to evaluate with by merged_weights.",
    )


@promise(unless=lambda case: lacks(case, *BETWEEN))
def test_consolidation_draws_no_global_random_numbers(scenario: Scenario) -> None:
    """Consolidating does not move dropout's random numbers, nor anybody else's."""
    found = [
        f"{note.name}: {said}"
        for note in _noted(scenario, *BETWEEN)
        for said in differences(note.after, note.before)
        if said.startswith("random/")
    ]
    expect_nothing(
        found,
        "Global random states moved while consolidating",
        "Draw from random_state.seeded_generator(purpose, host.stream.seed, task.id), and measure in "
        "evaluation mode, where dropout draws nothing.",
    )


@promise(unless=lambda case: lacks(case, "on_task_end"))
def test_consolidation_measures_the_network_that_answers(scenario: Scenario) -> None:
    """A task is consolidated without dropout, without batch statistics and on unaugmented images."""
    notes = _noted(scenario, "on_task_end")
    expect_nothing(
        [f"{note.name}: {said}" for note in notes for said in sorted(set(note.seen))],
        "While consolidating",
        "Measure inside `with evaluation_mode(host.network):` on host.batches(task.id, 'train').",
    )


@promise(unless=trains_on_other_tasks)
def test_other_heads_stay_bit_identical(scenario: Scenario) -> None:
    """Where each task has its own rows of the head, learning one leaves those of the others alone."""
    found: list[str] = []
    known: dict[str, Any] = {}

    def rows(run: Run, task: int) -> dict[str, Any]:
        first, stop = run.module.tasks[task].columns
        with run.module.task_mode(task):
            head = run.module.network.linear_layers()["head"]
            return {
                f"{name} of task {task}": parameter.detach()[first:stop].clone()
                for name, parameter in head.named_parameters(recurse=False)
            }

    def begin(run: Run, at: Position, batch: int, last: bool) -> None:
        if not known:
            for task in range(1, 3):
                known.update(rows(run, task))

    def look(run: Run, just: int) -> None:
        known.update(rows(run, just))
        now = {name: value for task in range(3) for name, value in rows(run, task).items()}
        found.extend(f"after task {just}, {said}" for said in differences(now, known))

    def watch(run: Run) -> None:
        run.module.after_close = lambda just: look(run, just)

    apart = replace(BATCH_NORM_DROPOUT, module={"mask": "task"})
    fit(scenario.case.make(), apart, watch=watch, at_batch=begin)
    expect_nothing(
        found,
        "With mask='task', rows of the head moved while another task was learned",
        "Look at what it writes into host.network.linear_layers()['head'] at a task's start or end, and at "
        "merged_weights: under this mask the head is not merged.",
    )


# --- what it costs -------------------------------------------------------------------------------


@promise()
def test_measured_bytes_are_declared_bytes(scenario: Scenario) -> None:
    """After each task the bytes of its tensors are those that its formula gives; growth is declared."""
    found = [
        f"after task {task}, {name}: measured {tuple(measured)}, declared {tuple(declared)}"
        for task, name, measured, declared in scenario.call_log.bytes_held
        if measured != declared
    ]
    expect_nothing(
        found,
        "Bytes (training, inference) are not what declared_bytes says",
        "Look at declared_bytes, and at the tensors that held_tensors lists (by default those of "
        "state_dict).",
    )


# --- the ways to train ---------------------------------------------------------------------------


@promise()
def test_two_processes_learn_what_one_does(scenario: Scenario, two_processes: TwoProcesses) -> None:
    """Two processes agree with each other bit for bit, and with one process to 1e-5."""
    run = fit(scenario.case.make(), setting())
    alone = run.learned() | run.answers()
    try:
        mine, theirs = two_processes.result(scenario.case.name)
    except RuntimeError as error:
        pytest.fail(f"Two processes could not learn it:\n{error}", pytrace=False)
    expect_nothing(
        differences(mine, theirs),
        "Two processes hold different things (the first's, not the second's)",
        "host.batches gives each process a share of the samples: sum over it, then host.all_reduce the "
        "sum and the count.",
    )
    expect_nothing(
        differences(without_gates(mine), without_gates(alone), tolerance=TOLERANCE),
        f"Two processes differ by more than {TOLERANCE} from one process, on uneven shares",
        "A loss term is per sample (batch,) or the sum over the slice, never its mean: the module "
        "divides. Divide what you measure by the all-reduced count.",
    )


@promise()
def test_two_half_batches_are_a_batch(scenario: Scenario) -> None:
    """With gradients accumulated over two batches it learns as from one batch of both, to 1e-5."""
    # 288 samples are 9 batches, the last update has one of them; 291 are 10, the last one with 3 samples.
    halves = replace(PLAIN, stream={"batch_size": 32}, trainer={"accumulate_grad_batches": 2})
    wholes = replace(PLAIN, stream={"batch_size": 64})
    mine, theirs = (fit(scenario.case.make(), way).learned() for way in (halves, wholes))
    expect_nothing(
        differences(mine, theirs, tolerance=TOLERANCE),
        "Accumulating two batches differs from one batch of both",
        "Look at what is counted or kept per batch in loss_terms: an update may have several batches. "
        "Loss terms are sums over the slice, never means.",
    )


@promise()
def test_runs_with_clipped_gradients(scenario: Scenario) -> None:
    """Clipping by norm works beside it, and a limit that is never reached changes nothing."""
    wide = replace(BATCH_NORM_DROPOUT, trainer={"gradient_clip_val": 1e9})
    close = replace(BATCH_NORM_DROPOUT, trainer={"gradient_clip_val": 0.1})
    expect_nothing(
        differences(
            _whole(CallLog(fit(scenario.case.make(), wide)).finish()), _whole(scenario.undisturbed)
        ),
        "A limit of 1e9 on the gradients' norm changed the run",
        "Gradients may be left on parameters of your own: take them in consume_grad and set them to None.",
    )
    expect_nothing(
        _unfinished(fit(scenario.case.make(), close)),
        "With gradients clipped to a norm of 0.1",
        "Hooks see gradients before they are clipped, and weights after the update.",
    )


def _unfinished(run: Run) -> list[str]:
    found = [] if run.module.closed == 2 else [f"only {run.module.closed + 1} tasks were learned"]
    weights = run.module.named_parameters()
    return found + [f"{name} is not finite" for name, p in weights if not p.isfinite().all()]


@promise(unless=is_alone)
def test_composes_with_bias_units(scenario: Scenario) -> None:
    """Beside bd it runs, and beside a bd that does not move (epsilon 0) it learns as alone, to 1e-5."""
    # Two tasks: with more, a method that treats every old mode for itself rightly differs.
    short = replace(PLAIN, stream={"num_tasks": 2})
    alone = fit(scenario.case.make(), short)
    beside = fit([BeneficialPerturbation(8, 0.0), *scenario.case.make()], short)
    own = tuple(f"state_dict of/{strategy.state_key}/" for strategy in alone.strategies)
    remedy = (
        "Ask host.network.shared_parameters for what it works on, and measure in the task's mode. If it can "
        "compose with nothing, declare exclusive = True."
    )
    expect_nothing(
        differences(_shared(beside, own), _shared(alone, own), tolerance=TOLERANCE),
        "Beside a bd with epsilon 0 it differs from what it is alone",
        remedy,
    )
    moving = fit([BeneficialPerturbation(8), *scenario.case.make()], BATCH_NORM_DROPOUT)
    expect_nothing(_unfinished(moving), "Beside bd", remedy)


def _shared(run: Run, places: tuple[str, ...]) -> dict[str, Any]:
    """What a run has in common with one that has bias units as well."""
    states = {path: leaf for path, leaf in run.learned().items() if path.startswith(places)}
    return run.plain() | states
