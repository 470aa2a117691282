"""Phases of a task: what moves in them and what does not, alone, together, in parts, on two processes."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fits import trainer_of
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.optim import SGD, Adadelta, Adam

from bpn_lightning.costs import tensors_in
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies import EWC, BeneficialPerturbation, ContinualStrategy
from bpn_lightning.strategies.ebll import EncoderBasedLifelongLearning
from bpn_lightning.tasks import Phase

OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": partial(Adam, lr=0.01, weight_decay=0.1),
}


def digits(**options):
    return SplitDigits(
        **{"num_tasks": 2, "epochs_per_task": 1, "batch_size": 64, "seed": 0, **options}
    )


def noisy():
    """Everything that differs between training and evaluation."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)
    )


def tensors(module):
    return {
        n: t.clone() for n, t in module.network.state_dict().items() if isinstance(t, torch.Tensor)
    }


def changed(one, two):
    """Names of what is not equal bit for bit."""
    return {
        name for name in one if not torch.equal(one[name].nan_to_num(-1), two[name].nan_to_num(-1))
    }


class WarmUp(ContinualStrategy):
    """The head's own rows first, in every task."""

    def __init__(self, epochs=2):
        self.epochs = epochs

    def phases(self, task, phases):
        return [Phase("warm_up", self.epochs, trains="head"), *phases]


class Center(ContinualStrategy):
    """Learns where the features of a task lie, after the task: ||theta - F(x)||^2."""

    def __init__(self, epochs=2, name="center"):
        self.epochs, self.name = epochs, name
        self.theta = torch.zeros(16, requires_grad=True)

    @property
    def state_key(self):
        return self.name

    def phases(self, task, phases):
        return [*phases, Phase(self.name, self.epochs, trains="strategy")]

    def phase_optimizer(self, host, phase):
        assert phase.name == self.name
        return Adadelta([self.theta], lr=0.5)

    def phase_loss(self, host, phase, batch):
        assert (phase.name, host.phase) == (self.name, phase)
        assert not any(part.training for part in host.network.modules())
        return (self.theta - host.network.backbone(batch.inputs).detach()).square().sum(1)


class CallLog(Callback):
    """The module and the random numbers at every batch's start and end, by phase."""

    def __init__(self):
        self.pages = []

    def note(self, module, when):
        state = [tensors(module), random_state()["torch"]]
        self.pages.append((module.opened, module.host.phase.name, when, *state))

    def on_train_batch_start(self, trainer, module, *_):
        self.note(module, "start")

    def on_train_batch_end(self, trainer, module, *_):
        self.note(module, "end")

    def over(self, task, phase):
        """At the first batch's start and the last one's end."""
        pages = [page[3:] for page in self.pages if page[:2] == (task, phase)]
        return pages[0], pages[-1]


# --- phases that train the head ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("reset", ["always", "never"])
@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_a_warm_up_moves_the_tasks_own_rows_and_nothing_else(fit, mask, reset, optimizer):
    call_log = CallLog()
    fit(
        [BeneficialPerturbation(4), EWC(10.0, update="clamped"), WarmUp(), call_log],
        stream=digits(reset_optimizer=reset),
        backbone=noisy(),
        optimizer=OPTIMIZERS[optimizer],
        mask=mask,
    )
    for task in (0, 1):
        (before, _), (after, _) = call_log.over(task, "warm_up")
        assert changed(before, after) == {"head.weight", "head.bias"}
        for name in ("head.weight", "head.bias"):
            moved = (before[name] != after[name]).reshape(4, -1).any(1)
            assert moved.tolist() == [task == 0, task == 0, task == 1, task == 1]
    (before, _), (after, _) = call_log.over(1, "train")
    assert {"backbone.1.weight", "backbone.2.running_mean", "head.bias_units.W"} < changed(
        before, after
    )


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("mask", ["all", "task"])
def test_a_warm_up_is_a_regression_on_fixed_features(fit, mask, clip):
    """Written out; the other rows' gradients are not in the norm that clipping looks at."""
    call_log, stream = CallLog(), digits()
    fit(
        [WarmUp(), call_log],
        stream=stream,
        backbone=noisy(),
        optimizer=OPTIMIZERS["momentum"],
        mask=mask,
        trainer={"gradient_clip_val": clip},
    )
    (before, _), (after, _) = call_log.over(1, "warm_up")
    backbone = noisy()
    backbone.load_state_dict({n[9:]: t for n, t in before.items() if n.startswith("backbone.")})
    backbone.eval()
    rows = [before[f"head.{name}"] for name in ("weight", "bias")]
    own = [tensor[2:].clone().requires_grad_() for tensor in rows]
    optimizer = OPTIMIZERS["momentum"](own)
    for epoch in range(2):
        for batch in stream.train_loader(1, epoch):
            features = backbone(stream.prepare(batch).inputs).detach()
            weight, bias = (torch.cat([old[:2], new]) for old, new in zip(rows, own, strict=True))
            logits = (features @ weight.T + bias)[:, 2 if mask == "task" else 0 :]
            optimizer.zero_grad()
            F.cross_entropy(logits, batch.targets - 4 + logits.shape[1]).backward()
            if clip:
                nn.utils.clip_grad_norm_(own, clip)
            optimizer.step()
    torch.testing.assert_close(after["head.weight"][2:], own[0].detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after["head.bias"][2:], own[1].detach(), rtol=1e-4, atol=1e-6)


def test_strategies_see_the_head_alone_in_a_warm_up(fit):
    seen = {}

    class Watch(ContinualStrategy):
        def capture_grad(self, host, parameters):
            gradients = {
                n: p.grad for n, p in host.network.named_parameters() if p.grad is not None
            }
            rows = [
                gradients[f"head.{name}"].reshape(4, -1).any(1).tolist()
                for name in ("weight", "bias")
            ]
            seen[host.network.opened, host.phase.name] = (set(parameters), set(gradients), rows)

    fit([WarmUp(), Watch()], stream=digits(), backbone=noisy())
    head = {"head.weight", "head.bias"}
    for task in (0, 1):
        own = [task == 0, task == 0, task == 1, task == 1]
        assert seen[task, "warm_up"] == (head, head, [own, own])
        assert head < seen[task, "train"][0] == seen[task, "train"][1]


# --- phases that train a strategy ----------------------------------------------------------------


def test_a_strategys_phase_follows_its_own_loss_and_optimizer(fit):
    """Written out; and nothing of the module moves, nor does it draw random numbers."""
    center, call_log, stream = Center(), CallLog(), digits()
    fit(
        [BeneficialPerturbation(4), EWC(10.0), WarmUp(1), center, call_log],
        stream=stream,
        backbone=noisy(),
        optimizer=OPTIMIZERS["sgd"],
    )
    theta = torch.zeros(16, requires_grad=True)
    for task in (0, 1):
        (before, random_before), (after, random_after) = call_log.over(task, "center")
        assert not changed(before, after)
        assert torch.equal(random_before, random_after)
        backbone = noisy()
        weights = {n[9:]: t for n, t in before.items() if n.startswith("backbone.")}
        weights = {n: t for n, t in weights.items() if "bias_units" not in n}
        bias = before["backbone.2.bias_units.M"] @ before["backbone.2.bias_units.W"]
        weights["2.bias"] = weights["2.bias"] + bias[0]
        backbone.load_state_dict(weights)
        backbone.eval()
        optimizer = Adadelta([theta], lr=0.5)  # a fresh one
        for epoch in (2, 3):  # after a warm-up and the task's own training
            for batch in stream.train_loader(task, epoch):
                features = backbone(stream.prepare(batch).inputs).detach()
                optimizer.zero_grad()
                (theta - features).square().sum(1).mean().backward()
                optimizer.step()
    torch.testing.assert_close(center.theta, theta, rtol=1e-4, atol=1e-6)


def test_other_strategies_have_no_part_in_it(fit):
    seen = set()

    class Watch(ContinualStrategy):
        def loss_terms(self, host, batch, logits):
            seen.add(("terms", host.phase.name))
            return {}

        def capture_grad(self, host, parameters):
            seen.add(("capture", host.phase.name))

        def correct_step(self, host, parameters):
            seen.add(("stepped", host.phase.name))

        def logs(self, host):
            seen.add(("logs", host.phase.name))
            return {}

    fit([Center(), Watch()], stream=digits(), backbone=noisy(), trainer={"log_every_n_steps": 1})
    assert seen == {(hook, "train") for hook in ("terms", "capture", "stepped", "logs")}


def test_every_phase_belongs_to_the_strategy_that_declared_it(fit):
    """The assertions are Center's own."""
    one, other = Center(1), Center(3, name="second")
    module, _ = fit([one, other, WarmUp(1)], stream=digits(), backbone=noisy())
    names = [[phase.name for phase in phases] for phases in module.schedule.phases]
    assert names == [["warm_up", "train", "center", "second"]] * 2
    assert one.theta.any()
    assert other.theta.any()


# --- the schedule --------------------------------------------------------------------------------


def test_patience_ends_each_phase_of_the_network_on_its_own(fit):
    """At a learning rate of 0 nothing improves after the first epoch; a strategy's phase runs through."""
    stream = digits(epochs_per_task=6, validation_fraction=0.2)
    module, trainer = fit([WarmUp(5), Center(3)], stream=stream, lr=0.0, patience=1)
    assert module.schedule.lengths == [2, 2, 3] * 2
    assert trainer.current_epoch == 14
    assert module.closed == 1


def test_a_scheduler_is_made_for_the_updates_of_its_phase(fit):
    made, phases = [], []

    def note(optimizer, num_steps):
        made.append(num_steps)
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            phases.append(
                (module.opened, module.host.phase.name, len(trainer.lr_scheduler_configs))
            )

    fit([WarmUp(3), Center(2), Watch()], stream=digits(), backbone=noisy(), scheduler=note)
    batches = [sum(p[:2] == (task, "train") for p in phases) for task in (0, 1)]
    # One more for the first task: Lightning makes an optimizer before training.
    assert made[1:] == [3 * batches[0], batches[0], 3 * batches[1], batches[1]]
    assert {(name, schedulers) for _, name, schedulers in phases} == {
        *(("warm_up", 1), ("train", 1), ("center", 0))
    }


@pytest.mark.parametrize(
    ("strategies", "stream", "message"),
    [
        (
            [WarmUp(1), WarmUp(1)],
            {},
            "Expected every strategy once, but got WarmUp 2 times.",
        ),
        (
            [WarmUp(0)],
            {},
            "Expected every phase to have at least 1 epoch, but 'warm_up' of task 0 has",
        ),
        (
            [Center()],
            {"reset_optimizer": "never"},
            "Expected reset_optimizer to be 'always' when a phase has a separate optimizer, such as 'ce",
        ),
        (
            [Center(name="train")],
            {},
            "Expected the phases of a task to have unique names, but task 0 has 'train' 2 times",
        ),
    ],
)
def test_phases_that_cannot_be_are_refused(fit, strategies, stream, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        fit(strategies, stream=digits(**stream), backbone=noisy())


# --- stopped and resumed -------------------------------------------------------------------------


class SaveEverywhere(Callback):
    """A checkpoint at every moment of a run in phases, on an epoch's end before the module's hook."""

    def __init__(self, folder, moments=("train_batch_end", "validation_end", "train_epoch_end")):
        self.folder, self.paths, self.phases = folder, [], set()
        for moment in moments:
            setattr(self, f"on_{moment}", partial(self.save, moment))

    def save(self, moment, trainer, module, *_):
        if trainer.sanity_checking:
            return
        phase = module.host.phase.name
        name = f"{len(self.paths):03d}_{module.opened}_{phase}_{moment}_{type(self).__name__}.ckpt"
        trainer.save_checkpoint(self.folder / name)
        self.paths.append(self.folder / name)
        self.phases.add((module.opened, phase))


class SaveLast(SaveEverywhere, Checkpoint):
    """The same after the module's hook, as ModelCheckpoint does."""


def state(module, trainer):
    """All that two runs must share."""
    own = [c.state_dict() for c in trainer.callbacks if isinstance(c, ContinualStrategy)]
    optimizer = trainer.optimizers[0].state_dict()
    return [tensors(module), own, optimizer, module.curve, module.schedule.lengths, random_state()]


def same(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-1), two.nan_to_num(-1))
    return one == two


@pytest.mark.slow
# With early stopping, phases end early and others run through; without it, all of them run through.
@pytest.mark.parametrize("early_stopping", [pytest.param(False, marks=pytest.mark.matrix), True])
def test_resuming_from_every_checkpoint_changes_nothing(fit, tmp_path, early_stopping):
    """In a warm-up, in an autoencoder's phase, at their last batches, and between phases."""
    options = {"optimizer": OPTIMIZERS["sgd"], "update": "proximal"}
    if early_stopping:  # at a large learning rate the validation loss goes up and down
        options = {"optimizer": partial(SGD, lr=2.0, momentum=0.9), "update": "clamped"}

    def run(*more, **others):
        ebll = EncoderBasedLifelongLearning(alpha=3.0, autoencoder_epochs=2, warm_up_epochs=2)
        # The proximal update insists on the optimizer that the run has outside a strategy's phase.
        ewc = EWC(10.0, update=options["update"])
        return fit(
            # At a large step of M the validation loss goes up and down.
            [BeneficialPerturbation(4, 3.0 if early_stopping else 0.05), ebll, ewc, *more],
            stream=digits(
                epochs_per_task=[1, 3], batch_size=150, validation_fraction=0.2, augment=True
            ),
            backbone=noisy(),
            patience=1 if early_stopping else None,
            evaluate_every="epoch",
            optimizer=options["optimizer"],
            **others,
        )

    saves = [SaveEverywhere(tmp_path), SaveLast(tmp_path, ["train_epoch_end"])]
    module, trainer = run(*saves, trainer={"enable_checkpointing": True})
    reference, paths = state(module, trainer), [path for save in saves for path in save.paths]
    assert (sum(module.schedule.lengths) < 10) == early_stopping
    names = [(0, "train"), (0, "autoencoder"), (1, "warm_up"), (1, "train"), (1, "autoencoder")]
    assert saves[0].phases == {*names}
    assert len(paths) >= 20
    different = [p.name for p in paths if not same(reference, state(*run(seed=9, ckpt_path=p)))]
    assert not different


# --- several processes ---------------------------------------------------------------------------


def learn_in_phases(devices):
    seed_everything(0, verbose=False)
    # 287 samples in batches of 41: shards of 21 and 20; two batches to an update, one in the last.
    stream = SplitDigits(num_tasks=3, epochs_per_task=1, batch_size=41, augment=True)
    module = ContinualModule(
        MLP([16, 16]), mask="task", optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)
    )
    # A linear reconstruction of large features: a gradient that is not reduced shows.
    ebll = EncoderBasedLifelongLearning(alpha=3.0, autoencoder_epochs=2, warm_up_epochs=1)
    trainer = trainer_of(devices, [BeneficialPerturbation(8), ebll], accumulate_grad_batches=2)
    trainer.fit(module, stream)
    return [dict(module.network.state_dict()), list(tensors_in(ebll.state_dict()))]


def test_two_processes_equal_one(ranks):
    one, (two, other) = learn_in_phases(1), ranks(learn_in_phases, 2)
    torch.testing.assert_close(two, other, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5, equal_nan=True)
