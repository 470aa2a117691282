"""One object in fit after fit: a fit that begins knows nothing of those before; one that goes on, all."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.conformance.runs import PLAIN, Run, Setting, differences, fit, flatten
from bpn_lightning.registry import strategies
from bpn_lightning.strategies import (
    EWC,
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    ParameterSuperposition,
    SynapticIntelligence,
)

pytestmark = pytest.mark.slow

Maker = Callable[[], ContinualStrategy]

#: Of each, the conformance suite compares a second fit and a resumed one with what a new object learns.
DEFAULTS: dict[str, Maker] = {
    name: lambda found=found: found.load()() for name, found in strategies().items()
}
#: With other arguments they hold other things.
VARIANTS: dict[str, Maker] = {
    "ewc, online, sampled": partial(EWC, gamma=0.5, fisher="sampled"),
    "ewc, clamped": partial(EWC, update="clamped"),
    "mas, proximal": partial(MemoryAwareSynapses, update="proximal"),
    "si, proximal": partial(SynapticIntelligence, update="proximal"),
    "slnid, minimum": partial(SLNID, 1.0, 0.1, discount="minimum"),
    "imm, mean": partial(IncrementalMomentMatching, "mean", weights=[1.0, 2.0, 3.0]),
    "imm, drop": partial(IncrementalMomentMatching, drop=0.3),
    "lwf, warm-up": partial(LearningWithoutForgetting, warm_up_epochs=1),
    "ebll, warm-up": partial(
        EncoderBasedLifelongLearning, warm_up_epochs=1, autoencoder_epochs=1, alpha=1.0
    ),
    "gem": partial(GradientEpisodicMemory, 8, margin=0.0),
    "gem, per class": partial(GradientEpisodicMemory, 3, memory_per="class"),
    "agem": partial(AveragedGEM, 8, sample_size=5),
    "psp, complex": partial(ParameterSuperposition, "complex"),
    "bd, normal": partial(BeneficialPerturbation, 8, m_start="normal", direction="gradient"),
}

MAKERS = DEFAULTS | VARIANTS

#: Two epochs, so that something is recorded of a task.
RECORDED = Setting(stream={"epochs_per_task": 2})


class BrokenOff(Exception):
    pass


def break_off(run: Run, at: Any, batch: int, last: bool) -> None:
    last_epoch = run.module.schedule.last_epoch(1)  # what was recorded is held, or an autoencoder
    if (run.trainer.current_epoch, batch) == (last_epoch, 2):
        raise BrokenOff


def begun(strategy: ContinualStrategy) -> Run:
    """A fit of another stream that broke off inside its second task."""
    runs: list[Run] = []
    with pytest.raises(BrokenOff):
        fit(
            [strategy],
            Setting(stream={**RECORDED.stream, "seed": 1}),
            at_batch=break_off,
            watch=runs.append,
        )
    return runs[0]


def held(value: Any) -> Any:
    """Everything that an object holds, as leaves by path."""
    if isinstance(value, nn.Module):
        return held(value.state_dict())
    if isinstance(value, dict):
        return {str(key): held(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [held(part) for part in value]
    if hasattr(value, "__dict__") and not isinstance(value, Tensor):
        return held(vars(value))
    return value


def differ(used: ContinualStrategy, new: ContinualStrategy) -> list[str]:
    """In what they hold; Lightning's own hooks, which the module hides where they are empty, aside.

    And aside from which module it served last, which is no state: that is looked at when a module goes on.
    """
    mine, theirs = (
        {n: held(v) for n, v in vars(one).items() if not n.startswith("on_") and n != "_token"}
        for one in (used, new)
    )
    return differences(flatten(mine), flatten(theirs))


@pytest.mark.parametrize("name", MAKERS)
def test_reset_leaves_an_object_as_its_constructor_did(name):
    used = MAKERS[name]()
    begun(used)
    if name not in ("finetune", "joint"):  # they hold nothing
        assert differ(used, MAKERS[name]())
    used.reset()
    assert differ(used, MAKERS[name]()) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_a_second_fit_and_a_resumed_one_equal_that_of_a_new_object_bit_for_bit(name, tmp_path):
    def save(run: Run, at: Any, batch: int, last: bool) -> None:
        if (at.task, batch) == (1, 2):
            run.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    new = fit([VARIANTS[name]()], PLAIN, at_batch=save)
    used = VARIANTS[name]()
    begun(used)
    again = fit([used], PLAIN)
    assert differences(again.learned() | again.plain(), new.learned() | new.plain()) == []
    said = [run.strategies[0].logs(run.module.host) for run in (again, new)]
    assert differences(flatten(said[0]), flatten(said[1])) == []
    resumed = fit([used], PLAIN, seed=7, checkpoint=tmp_path / "inside.ckpt")
    assert differences(resumed.learned(), new.learned()) == []


@pytest.mark.parametrize(
    "make",
    [MAKERS["slnid"], MAKERS["imm, drop"], MAKERS["ebll, warm-up"]],
    ids=["slnid", "imm", "ebll"],
)
def test_a_network_whose_fit_broke_off_is_not_listened_to_any_more(make):
    """Lightning calls no teardown there, and the object is about to listen to another network."""
    used = make()
    left = begun(used)
    assert hooks(left.module)
    fit([used], PLAIN)
    assert hooks(left.module) == []


def hooks(module: nn.Module) -> Sequence[Any]:
    return [hook for part in module.modules() for hook in part._forward_hooks.values()]


@pytest.mark.filterwarnings("ignore:The stream stopped before its end")
@pytest.mark.parametrize("name", DEFAULTS)
def test_a_fit_that_goes_on_with_its_module_keeps_what_was_learned(name):
    """Also where it was tested, validated and asked to predict in between."""
    ends = []

    def stop(run: Run, at: Any, batch: int, last: bool) -> None:
        if at.task == 1 and last and not ends:
            ends.append(at)
            run.trainer.should_stop = True

    setting = Setting(stream={**RECORDED.stream, "validation_fraction": 0.1})
    whole = fit([DEFAULTS[name]()], setting)
    run = fit([DEFAULTS[name]()], setting, at_batch=stop)
    assert run.module.closed == 0
    trainer, (strategy,) = run.trainer, run.strategies
    before = flatten(strategy.state_dict())
    trainer.test(run.module, run.stream, verbose=False)
    trainer.validate(run.module, run.stream, verbose=False)
    trainer.predict(run.module, run.stream)
    assert differences(flatten(strategy.state_dict()), before) == []
    trainer.should_stop = False
    trainer.fit(run.module, run.stream)
    assert differences(run.learned(), whole.learned()) == []


@pytest.mark.parametrize("composition", [("bd", "slnid"), ("psp", "lwf"), ("si", "ebll")])
def test_compositions_begin_fresh_too(composition):
    used, new = ([DEFAULTS[name]() for name in composition] for _ in range(2))
    fit(used, Setting(stream={"seed": 1}))
    mine, theirs = (fit(strategies, RECORDED) for strategies in (used, new))
    assert differences(mine.learned(), theirs.learned()) == []


def test_a_loop_over_seeds_gives_what_single_runs_do():
    """As people write it: one object, a new module for every seed."""
    ewc = EWC()
    looped = [fit([ewc], PLAIN, seed=seed).module for seed in range(3)]
    single = [fit([EWC()], PLAIN, seed=seed).module for seed in range(3)]
    for one, other in zip(looped, single, strict=True):
        torch.testing.assert_close(
            one.state_dict(), other.state_dict(), rtol=0, atol=0, equal_nan=True
        )
