"""Optimizers that look at an update more than once, and what each strategy then measures and moves."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies import (
    EWC,
    BeneficialPerturbation,
    FineTuning,
    GradientEpisodicMemory,
    SynapticIntelligence,
)

SGD = partial(torch.optim.SGD, lr=0.05)
LBFGS = partial(torch.optim.LBFGS, lr=0.1, max_iter=4)


class SharpnessAware(torch.optim.SGD):
    """Foret et al. (2021): the gradient of the second look, at weights uphill from the first."""

    def step(self, closure):
        loss = closure()
        weights = self.param_groups[0]["params"]
        with torch.no_grad():
            steps = [p.grad * 0.05 for p in weights]
            torch._foreach_add_(weights, steps)
        closure()
        with torch.no_grad():
            torch._foreach_sub_(weights, steps)
        super().step()  # whose hooks are this one's
        return loss


class Shrinking(torch.optim.SGD):
    """Moves the weights once more after the step that it inherits."""

    def step(self, closure):
        loss = super().step(closure)
        with torch.no_grad():
            torch._foreach_mul_(self.param_groups[0]["params"], 0.99)
        return loss


OPTIMIZERS = {
    "SGD": SGD,
    "LBFGS": LBFGS,
    "sharpness-aware": partial(SharpnessAware, lr=0.05),
    "shrinking": partial(Shrinking, lr=0.05),
}


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS)
def optimizer(request):
    return request.param


class FirstLook(Callback):
    """Autograd's gradient of each batch at the weights before its update, and how far they moved."""

    def on_train_batch_start(self, trainer, module, batch, index):
        self.before = {n: p.detach().clone() for n, p in module.network.named_parameters()}
        loss = F.cross_entropy(module(batch.inputs), batch.targets)
        found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        self.gradients = dict(zip(self.before, found, strict=True))

    def moved(self, module):
        return {n: p.detach() - self.before[n] for n, p in module.network.named_parameters()}


def test_si_walks_the_whole_way_of_each_update(fit, optimizer):
    """By its definition: minus the gradient before an update, times the movement by that update."""
    si = SynapticIntelligence(1.0)
    updates = []

    class Watch(FirstLook):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.fit_loop.epoch_loop.batch_idx == 0 and trainer.current_epoch % 2 == 0:
                self.path = {name: torch.zeros_like(p) for name, p in si.path.items()}
            for name, change in self.moved(module).items():
                self.path[name] -= self.gradients[name] * change
            for name, value in si.path.items():
                torch.testing.assert_close(value, self.path[name])
            updates.append(max(float(value.abs().max()) for value in si.path.values()))

    stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=150, seed=0)
    fit([si, Watch()], stream=stream, optimizer=optimizer)
    assert len(updates) == 8
    assert min(updates) > 1e-5


def test_m_moves_once_by_the_sign_of_the_first_gradient(fit, optimizer):
    bd = BeneficialPerturbation(4, 0.05)
    moved = []

    class Watch(FirstLook):
        def on_train_batch_end(self, trainer, module, *_):
            for name, change in self.moved(module).items():
                if name.endswith(".M"):
                    torch.testing.assert_close(change, -0.05 * self.gradients[name].sign())
                    moved.append(float(change.abs().max()))
            assert all(units.M.grad is None for units in bd.units.values())

    fit([bd, Watch()], optimizer=optimizer, lr=0.01)
    assert len(moved) > 20
    assert min(moved) > 0.04


def test_a_penalty_is_part_of_every_look(fit):
    """On one batch, LBFGS finds the least of the loss with EWC's penalty, which torch finds as well."""
    ewc = EWC(20.0, update="gradient")
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=400, seed=0)
    found = {}

    class Watch(FirstLook):
        def on_train_batch_start(self, trainer, module, batch, index):
            super().on_train_batch_start(trainer, module, batch, index)
            if module.opened == 0:
                return
            weights = {n: p.clone().requires_grad_() for n, p in self.before.items()}
            held = ewc.penalty

            def closure():
                reference.zero_grad()
                logits = torch.func.functional_call(module.network, weights, (batch.inputs,))
                pulls = [
                    (held.importance[n] * (weights[n] - held.anchor[n]).square()).sum()
                    for n in held.anchor
                ]
                loss = F.cross_entropy(logits, batch.targets) + ewc.strength * sum(pulls)
                loss.backward()
                return loss

            reference = LBFGS(list(weights.values()))
            reference.step(closure)
            found.update(weights)

    module, _ = fit([ewc, Watch()], stream=stream, optimizer=LBFGS)
    assert found
    for name, value in module.network.named_parameters():
        torch.testing.assert_close(value, found[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "trainer", "options", "beside", "why"),
    [
        (
            FineTuning(),
            {"accumulate_grad_batches": 2},
            {},
            "accumulate_grad_batches=2",
            "After the first evaluation of an update it would use only the last of its batches.",
        ),
        (
            FineTuning(),
            {"gradient_clip_val": 0.5},
            {},
            "gradient_clip_val=0.5",
            "It would estimate the curvature from clipped gradients.",
        ),
        (
            FineTuning(),
            {},
            {"stream": {"reset_optimizer": "never"}},
            "reset_optimizer='never'",
            "Its history would be from the loss of the previous task.",
        ),
        (
            GradientEpisodicMemory(8),
            {},
            {},
            "GradientEpisodicMemory",
            "Projected gradients have no curvature, and its step is not along them.",
        ),
        (
            SynapticIntelligence(1.0),
            {},
            {"optimizer": partial(LBFGS, line_search_fn="strong_wolfe")},
            "SynapticIntelligence with line_search_fn='strong_wolfe'",
            "Its line search would minimize a loss without the penalty along a gradient with the penalty.",
        ),
    ],
)
def test_what_lbfgs_cannot_stand_beside(fit, strategy, trainer, options, beside, why):
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, **options.pop("stream", {}))
    with pytest.raises(ConfigurationError) as error:
        fit([strategy], stream=stream, trainer=trainer, **{"optimizer": LBFGS, **options})
    assert str(error.value) == (
        f"Expected the optimizer not to be LBFGS with {beside}, but got LBFGS. {why} Leave one of "
        "the two out."
    )


def test_lbfgs_may_search_where_nothing_is_penalized(fit):
    module, _ = fit(
        [BeneficialPerturbation(4, 0.02)], optimizer=partial(LBFGS, line_search_fn="strong_wolfe")
    )
    assert module.closed == 1


@pytest.mark.parametrize("optimizer", [LBFGS, OPTIMIZERS["sharpness-aware"]])
def test_a_scaler_gives_no_closure(fit, optimizer):
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigurationError) as error:
        fit(optimizer=optimizer, trainer={"plugins": [scaled]})
    assert str(error.value) == (
        f"Expected the optimizer to step without a closure in 16-mixed precision, whose scaler checks the gradients once per update, but got {optimizer.func.__name__}. Use bf16-mixed."
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_path_is_one_that_was_never_left(fit, tmp_path):
    def run(folder, **options):
        si = SynapticIntelligence(1.0)
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=100, seed=0)
        flags = {"enable_checkpointing": True}
        fit([si, save], stream=stream, optimizer=LBFGS, trainer=flags, **options)
        return si.penalty.importance

    reference = run(tmp_path / "reference")
    for path in sorted((tmp_path / "reference").glob("*.ckpt")):
        again = run(tmp_path / path.name, seed=9, ckpt_path=path)
        assert all(torch.equal(again[name], value) for name, value in reference.items())


def test_an_unknown_optimizer_that_looks_twice_is_refused_where_gradients_accumulate(fit):
    with pytest.raises(ConfigurationError) as error:
        fit(optimizer=OPTIMIZERS["sharpness-aware"], trainer={"accumulate_grad_batches": 2})
    assert str(error.value) == (
        "Expected trainer.accumulate_grad_batches to be 1 with an optimizer that evaluates its closure "
        "several times, but got 2 with SharpnessAware. It would use only an update's last batch. Use a larger batch_size."
    )
