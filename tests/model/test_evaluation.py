"""Evaluation against loops in numpy that are written out by hand."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.model.evaluation import evaluate, evaluate_task_agnostic, validation_scores
from bpn_lightning.strategies.bd import BeneficialPerturbation

TASKS = 3


def digits(**arguments: Any) -> SplitDigits:
    return SplitDigits(
        **{"num_tasks": TASKS, "epochs_per_task": 2, "batch_size": 64, "eval_batch_size": 50}
        | arguments
    )


@pytest.fixture
def learned(fit: Any) -> Callable[..., Any]:
    """A module that has learned three tasks, with dropout, batch normalization and bias units."""

    def make(*, modes: bool = True, mask: str = "all", **stream: Any) -> Any:
        backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.2), nn.ReLU()
        )
        strategies = [BeneficialPerturbation(8, 0.1, layers=["head"])] if modes else []
        module, _ = fit(strategies, stream=digits(**stream), backbone=backbone, mask=mask)
        return module

    return make


def samples(module: Any, task: int, split: str) -> tuple[Tensor, np.ndarray]:
    """All of a task's samples of a split at once, and their columns."""
    batches = list(module.host.stream.loader(task, split, batch_size=7))
    inputs = [module.host.stream.prepare(batch).inputs for batch in batches]
    return torch.cat(inputs), torch.cat([batch.targets for batch in batches]).numpy()


def by_hand(module: Any, inputs: Tensor, task: int) -> np.ndarray:
    """Logits of the evaluated network in a task's mode, layer by layer, without any switching."""
    features = deepcopy(module.network.backbone).eval()(inputs)
    logits = features @ module.network.head.weight.T + module.network.head.bias
    if module.network.head.bias_units is not None:
        logits = logits + module.network.head.bias_units.bank[task]
    return logits.detach().numpy()


def test_right_answers_are_counted_by_class_with_and_without_the_task_id(learned: Any) -> None:
    module = learned(validation_fraction=0.2)
    counts, tests = module.history.class_counts, [samples(module, k, "test") for k in range(TASKS)]
    answers = {
        "accuracy": [by_hand(module, x, k).argmax(1) for k, (x, _) in enumerate(tests)],
        "accuracy_task_agnostic": [
            surest([by_hand(module, x, mode) for mode in range(TASKS)]) for x, _ in tests
        ],
    }
    targets = np.concatenate([labels for _, labels in tests])
    assert counts.keys() == answers.keys()
    for key, found in answers.items():
        right = targets[np.concatenate(found) == targets]
        assert counts[key] == {
            "tasks": [len(labels) for _, labels in tests],
            "samples": np.bincount(targets, minlength=6).tolist(),
            "right": np.bincount(right, minlength=6).tolist(),
        }
    held = [samples(module, task, "val") for task in range(TASKS)]
    expected = [(by_hand(module, x, k).argmax(1) == y).mean() for k, (x, y) in enumerate(held)]
    assert module.history.validation == pytest.approx(expected)


def surest(modes: list[np.ndarray]) -> np.ndarray:
    """What the mode answers whose largest softmax is the largest."""
    softmax = [torch.from_numpy(logits).softmax(1).numpy() for logits in modes]
    best = np.argmax([p.max(1) for p in softmax], axis=0)
    return np.stack(softmax)[best, np.arange(len(best))].argmax(1)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("modes", [True, False])
def test_accuracy_is_the_share_of_right_answers(learned: Any, split: Any, modes: bool) -> None:
    module = learned(modes=modes, validation_fraction=0.2)
    wanted = []
    for task in range(TASKS):
        inputs, targets = samples(module, task, split)
        wanted.append(np.mean(by_hand(module, inputs, task).argmax(1) == targets))
    assert evaluate(module.host, split=split).tolist() == wanted
    assert evaluate(module.host, [2, 0], split=split).tolist() == [wanted[2], wanted[0]]
    assert module.evaluate([1], split).tolist() == [wanted[1]]
    assert len({*wanted}) > 1


def test_a_head_for_each_task_answers_with_its_own_columns(learned: Any) -> None:
    module = learned(modes=False, mask="task")
    wanted = []
    for task in range(TASKS):
        inputs, targets = samples(module, task, "test")
        own = by_hand(module, inputs, task)[:, 2 * task : 2 * task + 2]
        wanted.append(np.mean(own.argmax(1) + 2 * task == targets))
    assert evaluate(module.host).tolist() == wanted
    assert min(wanted) > 0.5


@pytest.mark.parametrize("mask", ["all", "seen"])
@pytest.mark.parametrize("modes", [True, False])
def test_without_the_oracle_the_most_confident_mode_answers(
    learned: Any, modes: bool, mask: str
) -> None:
    module = learned(modes=modes, mask=mask)

    def wanted(tasks: list[int]) -> list[float]:
        shares = []
        for task in tasks:
            inputs, targets = samples(module, task, "test")
            logits = np.stack([by_hand(module, inputs, mode).astype(np.float64) for mode in tasks])
            exponentials = np.exp(logits - logits.max(-1, keepdims=True))
            softmax = exponentials / exponentials.sum(-1, keepdims=True)
            chosen = softmax.max(-1).argmax(0)
            answers = logits.argmax(-1)[chosen, np.arange(len(targets))]
            shares.append(np.mean(answers == targets))
        return shares

    assert evaluate_task_agnostic(module.host, range(TASKS)).tolist() == wanted([0, 1, 2])
    assert evaluate_task_agnostic(module.host, [0, 1]).tolist() == wanted([0, 1])
    assert evaluate_task_agnostic(module.host, [2]).tolist() == wanted([2])
    assert module.accuracy_matrix.task_agnostic.tolist() == wanted([0, 1, 2])


def test_without_the_oracle_a_draw_of_the_samples_may_do(learned: Any) -> None:
    module = learned()
    drawn = [b.inputs for b in module.host.stream.loader(1, "test", max_samples=20)]
    whole = [b.inputs for b in module.host.stream.loader(1, "test")]
    kept = [(torch.cat(whole) == image).flatten(1).all(1).nonzero() for image in torch.cat(drawn)]
    places = torch.cat(kept).flatten()
    assert len(places) == 20
    assert (places.diff() > 0).all()  # each once, and in their order

    inputs, targets = samples(module, 1, "test")
    alone = np.stack([by_hand(module, inputs, mode)[places] for mode in range(TASKS)])
    chosen = torch.from_numpy(alone).softmax(-1).amax(-1).argmax(0)
    answers = alone.argmax(-1)[chosen, np.arange(20)]
    found = evaluate_task_agnostic(module.host, range(TASKS), max_samples=20)
    assert found[1].item() == np.mean(answers == targets[places])
    everything = evaluate_task_agnostic(module.host, range(TASKS), max_samples=10_000)
    assert torch.equal(everything, evaluate_task_agnostic(module.host, range(TASKS)))


def test_the_oracle_is_worth_something(learned: Any) -> None:
    module = learned()
    assert (
        evaluate(module.host).mean()
        > evaluate_task_agnostic(module.host, range(TASKS)).mean() + 0.1
    )


def test_without_a_split_there_is_no_accuracy(learned: Any) -> None:
    assert evaluate(learned(modes=False).host, split="val").isnan().all()


@pytest.mark.parametrize("size", [1, 33, 1000])
def test_the_batch_size_is_irrelevant(learned: Any, size: int) -> None:
    module = learned()
    before = evaluate(module.host), evaluate_task_agnostic(module.host, [0, 1, 2])
    module.host.stream.eval_batch_size = size
    torch.testing.assert_close(evaluate(module.host), before[0], rtol=0, atol=0)
    after = evaluate_task_agnostic(module.host, [0, 1, 2])
    torch.testing.assert_close(after, before[1], rtol=0, atol=0)


def test_validation_scores_are_the_mean_cross_entropy_and_the_accuracy(learned: Any) -> None:
    module = learned(validation_fraction=0.2)
    for task in range(TASKS):
        inputs, targets = samples(module, task, "val")
        logits = by_hand(module, inputs, task).astype(np.float64)
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets]
        loss, accuracy = validation_scores(module.host, task)
        assert loss == pytest.approx(losses.mean(), rel=1e-5)
        assert [accuracy] == evaluate(module.host, [task], "val").tolist()


@pytest.mark.parametrize(
    "measure",
    [
        evaluate,
        partial(evaluate_task_agnostic, tasks=range(TASKS)),
        partial(validation_scores, task=0),
    ],
    ids=["evaluate", "without oracle", "loss"],
)
def test_measuring_changes_nothing(learned: Any, measure: Callable[..., Any]) -> None:
    module = learned(validation_fraction=0.2)
    module.train()
    module.network.backbone[1].eval()  # a frozen normalization
    flags = [part.training for part in module.modules()]
    state, generator = deepcopy(module.state_dict()), torch.get_rng_state()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    with module.task_mode(1):
        inputs = samples(module, 0, "test")[0]
        module.network.backbone[3].eval()
        answers = module(inputs).detach()
        module.network.backbone[3].train()
        first = measure(module.host)
        torch.testing.assert_close(measure(module.host), first, rtol=0, atol=0)
        module.network.backbone[3].eval()
        assert torch.equal(module(inputs), answers)
        module.network.backbone[3].train()
    assert [part.training for part in module.modules()] == flags
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is gradients[name] for name, p in module.named_parameters())


def test_flags_return_after_an_error(learned: Any) -> None:
    module = learned()
    module.train()
    module.network.backbone[1].eval()
    flags = [part.training for part in module.modules()]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = module.network.head.register_forward_hook(fail)
    with module.task_mode(2):
        with pytest.raises(ZeroDivisionError):
            evaluate(module.host)
        assert module.network.head.bias_units.active == 2
    handle.remove()
    assert [part.training for part in module.modules()] == flags
