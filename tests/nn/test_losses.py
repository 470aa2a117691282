"""A loss of one's own is the same in training, validation, memories and phases, and checked beforehand."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.evaluation import validation_scores
from bpn_lightning.nn import MLP
from bpn_lightning.nn.losses import CrossEntropy, SampleLoss
from bpn_lightning.strategies import (
    EWC,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    GradientEpisodicMemory,
)

Fit = Callable[..., Any]
WEIGHTS = [1.0, 3.0, 0.5, 2.0]


def by_hand(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    r"""-w_c log p_c, mixed with the mean of that over all classes; written out class by class."""
    scores = (logits.double() - logits.double().exp().sum(1, keepdim=True).log()) * weights.double()
    return torch.stack(
        [
            -(1 - smoothing) * row[target] - smoothing * row.mean()
            for row, target in zip(scores, targets.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("columns", [(0, 4), (2, 4), (1, 2)])
def test_weights_are_those_of_the_columns_that_take_part(columns: tuple[int, int]) -> None:
    first, stop = columns
    logits, weight = torch.randn(6, stop - first), torch.tensor(WEIGHTS)
    targets = torch.arange(6) % (stop - first)
    for loss in (
        nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2),
        nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2, reduction="none"),
        CrossEntropy(WEIGHTS, 0.2),
    ):
        found = SampleLoss(loss)(logits, targets, first)
        torch.testing.assert_close(
            found.double(), by_hand(logits, targets, weight[first:stop], 0.2), rtol=1e-5, atol=1e-6
        )
        assert loss.weight is not None
        assert loss.weight.tolist() == WEIGHTS  # the user's own stays as it is
    assert torch.equal(
        SampleLoss(None)(logits, targets, first), F.cross_entropy(logits, targets, reduction="none")
    )


class Recorder(ContinualStrategy):
    """Keeps a batch's logits and targets, and the loss that Lightning takes the gradient of."""

    def __init__(self, joint: bool = False) -> None:
        self.joint = joint
        self.batches: list[tuple[Tensor, Tensor, int]] = []
        self.losses: list[float] = []

    def training_tasks(self, task: Any) -> list[int]:
        return [*range(task.id + 1)] if self.joint else [task.id]

    def loss_terms(self, host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        assert isinstance(batch.task, Tensor) == (self.joint and host.network.opened > 0)
        self.batches.append((logits.detach(), batch.targets, host.network.opened))
        return {}

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.losses.append(loss.item())


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
@pytest.mark.parametrize("joint", [False, True], ids=["one task", "several"])
def test_training_takes_the_mean_over_samples(fit: Fit, mask: str, joint: bool) -> None:
    """With masked columns too, over which smoothing would otherwise take the mean of -inf."""
    recorder = Recorder(joint)
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=100, seed=0)
    module, _ = fit([recorder], stream=stream, mask=mask, loss=CrossEntropy(WEIGHTS, 0.1))
    seen = {"all": [(0, 4)] * 2, "seen": [(0, 2), (0, 4)], "task": [(0, 2), (2, 4)]}[mask]
    assert len(recorder.losses) == len(recorder.batches) > 4
    for (logits, targets, opened), found in zip(recorder.batches, recorder.losses, strict=True):
        total = 0.0
        for task in (0, 1):
            first, stop = seen[task if mask == "task" else opened]
            own = (targets >= 2 * task) & (targets < 2 * task + 2)
            weights = torch.tensor(WEIGHTS[first:stop])
            if own.any():
                total += by_hand(
                    logits[own][:, first:stop], targets[own] - first, weights, 0.1
                ).sum()
        assert found == pytest.approx(float(total / len(targets)), rel=1e-4)
    assert not any("loss" in name for name in module.state_dict())


def test_a_function_equals_the_module_and_plain_cross_entropy_equals_none(fit: Fit) -> None:
    def function(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)

    def weights(loss: Any) -> Tensor:
        module: ContinualModule = fit([EWC(10.0)], mask="task", loss=loss)[0]
        return torch.cat([p.flatten() for p in module.parameters()])

    assert torch.equal(weights(function), weights(nn.CrossEntropyLoss(label_smoothing=0.1)))
    plain = weights(None)
    torch.testing.assert_close(weights(nn.CrossEntropyLoss()), plain, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights(function), plain, atol=1e-3)


@pytest.mark.parametrize("mask", ["all", "task"])
def test_validation_early_stopping_and_the_logged_loss_use_it(fit: Fit, mask: str) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, validation_fraction=0.2, seed=0)
    module, trainer = fit(stream=stream, mask=mask, loss=CrossEntropy(WEIGHTS, 0.1), patience=1)
    (logged,) = trainer.validate(module, stream, verbose=False)
    loss, accuracy = validation_scores(module.host, 1)
    total, right, count = 0.0, 0, 0
    for batch in module.host.batches(1, "val"):
        with torch.no_grad(), module.task_mode(1):
            logits = module.eval()(batch.inputs)
        first = 2 if mask == "task" else 0
        weights = torch.tensor(WEIGHTS[first:])
        total += float(by_hand(logits[:, first:], batch.targets - first, weights, 0.1).sum())
        right += int((logits.argmax(1) == batch.targets).sum())
        count += len(batch.targets)
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert logged["val/loss"] == pytest.approx(total / count, rel=1e-5)
    assert accuracy == right / count


def test_gems_constraints_are_of_it(fit: Fit) -> None:
    """The gradient of the memory's mean loss, by autograd on the whole."""
    gem = GradientEpisodicMemory(memory_size=20)
    loss = CrossEntropy(WEIGHTS, 0.1)
    module, _ = fit([gem], loss=loss, mask="task")
    parameters = module.network.shared_parameters(include_head=True)
    places = (gem.memory.tasks() == 0).nonzero().flatten()
    found = gem._segments(module.host, parameters, places, torch.tensor([len(places)]))[0]
    raw, targets = gem.memory.inputs[places], gem.memory.targets[places]
    logits = module(module.host.stream.normalize(raw), task=0)
    wanted = torch.autograd.grad(
        F.cross_entropy(
            logits[:, :2], targets, weight=torch.tensor(WEIGHTS[:2]), label_smoothing=0.1,
            reduction="none",
        ).mean(),
        list(parameters.values()),
    )  # fmt: skip
    torch.testing.assert_close(
        found, torch.cat([g.flatten() for g in wanted]), rtol=1e-4, atol=1e-6
    )


def test_an_autoencoders_task_loss_is_it(fit: Fit) -> None:
    calls = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        calls.append(logits.shape[1])
        return F.cross_entropy(logits, targets, reduction="none")

    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=288, seed=0)
    ebll = EncoderBasedLifelongLearning(autoencoder_epochs=2, warm_up_epochs=0)
    fit([ebll], stream=stream, mask="task", loss=loss)
    # Once to be tried for each task; then a batch of each epoch: the first task's autoencoder has two.
    assert calls == [2, 2] + [2, 2, 2] + [2] * (len(calls) - 5)
    assert len(calls) >= 6


def test_the_fisher_is_of_the_likelihood_whatever_the_loss(fit: Fit) -> None:
    """Its definition: labels smoothed by 1 would leave a loss that no label matters to."""
    from bpn_lightning.functional.importance import fisher_diagonal

    module, _ = fit([EWC()], mask="task")
    parameters = module.network.shared_parameters(include_head=False)
    plain = fisher_diagonal(module.host, 1, parameters)
    module.host.sample_loss = SampleLoss(CrossEntropy(WEIGHTS, 0.5))
    smoothed = fisher_diagonal(module.host, 1, parameters)
    assert all(torch.equal(plain[name], smoothed[name]) for name in plain)


class Learns(nn.Module):
    """A loss with something to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(2))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - self.center).square().sum(1)


def mean(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def detached(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.detach(), targets, reduction="none")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (7, "to be a module or a function of (logits, targets), but got 7. Pass an object"),
        (nn.CrossEntropyLoss, "module or a function of (logits, targets), but got <class 'torch.nn.m"),
        (Learns(), "to have no parameters, but got Learns with center. Move the parameters into the"),
        (nn.NLLLoss(), "but got NLLLoss, which takes log-probabilities. Use torch.nn.CrossEntropyLoss."),
        (nn.CrossEntropyLoss(reduction="sum"), "to have reduction 'mean' or 'none', but got 'sum'."),
        (
            CrossEntropy([1.0, 2.0]),
            "Expected weight of loss to hold a weight for each of the 4 classes of the stream, but got",
        ),
        (mean, "to losses (batch,), but got () for 2 samples. Return one loss per sample"),
        (detached, "that are finite and have a gradient, but got tensor("),
        (nn.MSELoss(), "to losses (batch,), but it raised RuntimeError: The size of tensor a (4)"),
        (lambda logits: logits, "but it raised TypeError"),
        (nn.Sequential(nn.CrossEntropyLoss(reduction="sum")), "'mean' or 'none', but got 'sum'"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_loss_is_refused_before_training(fit: Fit, loss: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        fit(loss=loss)
    assert str(caught.value).startswith("Expected ")


@pytest.mark.parametrize("mask", ["seen", "task"])
def test_it_is_tried_on_every_set_of_columns(fit: Fit, mask: str) -> None:
    """A function that always weighs the classes of the whole stream."""

    def fixed(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, weight=torch.tensor(WEIGHTS), reduction="none")

    fit(loss=fixed, mask="all", backbone=MLP([4]))
    with pytest.raises(ConfigurationError, match=r"logits \(batch, 2\) and targets"):
        fit(loss=fixed, mask=mask)


def test_double_precision_takes_weights_along(fit: Fit) -> None:
    module, _ = fit(loss=CrossEntropy(WEIGHTS), trainer={"precision": "64-true"})
    assert module.network.head.weight.dtype == torch.float64
    module, _ = fit(loss=CrossEntropy(WEIGHTS), trainer={"precision": "bf16-mixed"})
    assert module.closed == 1
    module, _ = fit(loss=CrossEntropy(WEIGHTS), trainer={"precision": "bf16-true"})
    assert module.closed == 1


def test_an_ignored_class_is_that_of_the_stream() -> None:
    loss = SampleLoss(nn.CrossEntropyLoss(ignore_index=3))
    losses = loss(torch.zeros(2, 2), torch.tensor([0, 1]), first=2)
    assert losses.tolist() == pytest.approx([0.6931472, 0.0])
    assert (loss(torch.zeros(2, 2), torch.tensor([0, 1]), first=0) > 0).all()


def test_a_module_of_ones_own_may_hold_others(fit: Fit) -> None:
    class Focal(nn.Module):
        """(1 - p)^2 times the cross-entropy, Lin et al. (2017)."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = CrossEntropy(WEIGHTS)

        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            losses: Tensor = self.inner(logits, targets)
            chosen = logits.softmax(1).gather(1, targets[:, None])[:, 0]
            return (1 - chosen).square() * losses

    logits, targets = torch.randn(5, 2), torch.arange(5) % 2
    found = SampleLoss(Focal())(logits, targets, first=2)
    chosen = logits.double().softmax(1)[torch.arange(5), targets]
    wanted = -torch.tensor(WEIGHTS[2:]).double()[targets] * (1 - chosen) ** 2 * chosen.log()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    fit(loss=Focal(), mask="task", backbone=MLP([4]))
