"""Every strategy in every precision, accumulated and clipped: what docs/precision.md says of it.

The cells of its table are the tests' parameters: ``same`` is compared with plain training in single
precision, ``refused`` has to be said before training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import SGD

from bpn_lightning.conformance.cases import Case, read_cases
from bpn_lightning.conformance.runs import PLAIN, Run, Setting, differences, fit
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional import importance
from bpn_lightning.strategies import STRATEGIES, BeneficialPerturbation

pytestmark = pytest.mark.slow

LR = 0.05
ARGUMENTS = {
    "agem": {"memory_size": 20, "sample_size": 10},
    "ebll": {"autoencoder_epochs": 2, "warm_up_epochs": 1},
    "ewc": {"update": "clamped"},  # the proximal step is taken after clipping
    "gem": {"memory_size": 20},
    "lwf": {"warm_up_epochs": 1},
}
SHORT = replace(PLAIN, stream={"num_tasks": 2})


def read_table() -> dict[tuple[str, str], str]:
    """The cells of the documented table by strategy and setting."""
    text = (Path(__file__).parent.parent.parent / "docs" / "precision.md").read_text(
        encoding="utf-8"
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    (_, *settings), *strategies = rows
    return {
        (name, setting): cell
        for name, *cells in strategies
        for setting, cell in zip(settings, cells, strict=True)
    }


TABLE = read_table()


def of(setting: str) -> Any:
    """Parametrize by the strategies and what the table says of them."""
    cells = [(name, cell) for (name, column), cell in TABLE.items() if column == setting]
    return pytest.mark.parametrize(("name", "cell"), cells)


def test_the_table_has_every_strategy_and_every_setting() -> None:
    assert {name for name, _ in TABLE} == set(STRATEGIES)
    assert len(TABLE) == 8 * len(STRATEGIES)
    assert set(TABLE.values()) == {"same", "refused"}


# --- runs ----------------------------------------------------------------------------------------


def case(name: str) -> Case:
    (found,) = read_cases([name], {name: ARGUMENTS[name]} if name in ARGUMENTS else {})
    return found


def learn(name: str, setting: Setting = SHORT, **arguments: Any) -> Run:
    return fit(case(name).make(), setting, **arguments)


def under(**trainer: Any) -> Setting:
    return replace(SHORT, trainer=trainer)


@cache
def plain(name: str) -> tuple[dict[str, Any], Tensor]:
    """What single precision learns, and the weights that it ends with less those of the start."""
    return learned_and_moved(name, SHORT)


def learned_and_moved(name: str, setting: Setting) -> tuple[dict[str, Any], Tensor]:
    start: list[Tensor] = []
    run = learn(name, setting, watch=lambda run: start.append(weights(run)))
    return run.learned(), weights(run) - start[0]


def weights(run: Run) -> Tensor:
    shared = run.module.network.shared_parameters(include_head=True).values()
    return torch.cat([value.detach().double().flatten() for value in shared])


def assert_near(name: str, setting: Setting, tolerance: float) -> dict[str, Any]:
    """The weights have gone the way that they go in single precision, but for a fraction of it."""
    learned, moved = learned_and_moved(name, setting)
    _, reference = plain(name)
    assert (moved - reference).norm() < tolerance * reference.norm()
    return learned


def dtypes(learned: dict[str, Any]) -> set[torch.dtype]:
    """Of what training measures and moves; the accuracy matrix is in double precision always."""
    return {
        value.dtype
        for path, value in learned.items()
        if isinstance(value, Tensor) and value.is_floating_point() and "accuracy" not in path
    }


def expect_refusal(name: str, setting: Setting, rule: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        learn(name, setting, at_batch=never)
    (strategy,) = case(name).make()
    assert rule in str(error.value)
    assert type(strategy).__name__ in str(error.value)


def never(run: Run, *_: Any) -> None:
    pytest.fail("training began")


# --- precision -----------------------------------------------------------------------------------


@of("64-true")
def test_double_precision(name: str, cell: str) -> None:
    assert cell == "same"
    learned = assert_near(name, under(precision="64-true"), 1e-5)
    others = {torch.float32} if name == "ebll" else set()  # its autoencoders
    assert dtypes(learned) == {torch.float64} | others


@of("bf16-mixed")
def test_mixed_bfloat16(name: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cell == "same"
    measured: list[bool] = []
    measure = importance.sample_gradient_sums

    def look(*args: Any, **kwargs: Any) -> Any:
        measured.append(torch.is_autocast_enabled("cpu"))
        return measure(*args, **kwargs)

    monkeypatch.setattr(importance, "sample_gradient_sums", look)
    learned = assert_near(name, under(precision="bf16-mixed"), 0.15)
    assert dtypes(learned) == {torch.float32}
    assert bool(measured) == (name in ("ewc", "imm", "mas", "slnid"))
    assert not any(measured), "importances are measured outside autocast"


def scaled(scale: float = 1024.0) -> MixedPrecision:
    """fp16 with torch's scaler, on the CPU, where Lightning does not choose it by itself."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


class ScaledSingle(MixedPrecision):
    """The scaler without autocast: a factor of two to the tenth rounds nothing."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


@of("16-mixed")
def test_mixed_half_precision(name: str, cell: str) -> None:
    assert cell == "same"
    # M moves by the sign of its gradient, which near 0 is a matter of rounding.
    learned = assert_near(name, under(plugins=[scaled()]), 0.1 if name == "bd" else 0.05)
    assert dtypes(learned) == {torch.float32}


@of("16-mixed")
def test_a_scaled_run_is_the_plain_run_bit_for_bit(name: str, cell: str) -> None:
    found = learn(name, under(plugins=[ScaledSingle()])).learned()
    assert not differences(found, plain(name)[0])


class Overflow(Callback):
    """Lets one attempt at an update of the second task have a gradient that is not finite."""

    def __init__(self) -> None:
        self.happened = False

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        at = (pl_module.opened, pl_module.host.phase.name, trainer.fit_loop.epoch_loop.batch_idx)
        if at == (1, "train", 2):
            pl_module.network.head.bias.grad[2] = float("inf")
            self.happened = True


@of("16-mixed")
def test_an_update_that_is_skipped_changes_nothing(name: str, cell: str) -> None:
    overflow, noted = Overflow(), {}

    def note(run: Run, at: Any, batch: int, last: bool) -> None:
        if (at.task, at.phase) == (1, "train") and batch in (1, 2, 3):
            noted[batch] = run.learned()

    fit([*case(name).make(), overflow], under(plugins=[ScaledSingle()]), at_batch=note)
    before, after, later = (
        {path: value for path, value in noted[k].items() if not path.endswith("/draws")}
        for k in (1, 2, 3)
    )
    assert overflow.happened
    assert not differences(after, before)
    assert differences(later, after), "and the next one changes something"
    assert later["module/network.head.bias"].isfinite().all()


@pytest.mark.parametrize("direction", ["sign", "gradient", "normalized"])
def test_an_m_whose_own_gradient_overflowed_rests(direction: Any) -> None:
    """It is outside the optimizer: the scaler does not look at it, and takes the update of the rest."""
    noted: list[dict[str, Any]] = []

    class OverflowOfM(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx == 2:
                pl_module.network.head.bias_units.M.grad[0, 1] = float("inf")

    fit(
        [BeneficialPerturbation(8, direction=direction), OverflowOfM()],
        under(plugins=[ScaledSingle()]),
        at_batch=lambda run, at, batch, last: noted.append(run.learned()),
    )
    before, after, later = (
        (one["module/network.head.bias_units.M"], one["module/network.head.bias_units.W"])
        for one in noted[1:4]
    )
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert not torch.equal(later[0], after[0])
    assert later[0].isfinite().all()


@of("fused, 16-mixed")
def test_fused_optimizers_in_half_precision(name: str, cell: str) -> None:
    fused = replace(
        SHORT, optimizer=partial(SGD, lr=LR, fused=True), trainer={"plugins": [ScaledSingle()]}
    )
    if cell == "refused":
        return expect_refusal(name, fused, "an optimizer without fused=True")
    found = learn(name, fused).learned()
    assert not differences(found, plain(name)[0], tolerance=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@of("bf16-true, 16-true")
def test_weights_in_half_precision(name: str, cell: str, precision: str) -> None:
    if cell == "refused":
        rule = f"weights in full precision with {type(case(name).make()[0]).__name__}, but got"
        return expect_refusal(name, under(precision=precision), rule)
    learned = assert_near(name, under(precision=precision), 0.25)
    assert torch.float32 not in dtypes(learned) or name == "ebll"


# --- updates -------------------------------------------------------------------------------------


@of("accumulated")
def test_accumulated_batches_are_one_batch(name: str, cell: str) -> None:
    """288 samples are 8 batches of 40, the last of 8: updates of 120, 120 and 48 samples."""
    assert cell == "same"
    thirds = replace(
        SHORT, stream={"num_tasks": 2, "batch_size": 40}, trainer={"accumulate_grad_batches": 3}
    )
    whole = replace(SHORT, stream={"num_tasks": 2, "batch_size": 120})
    assert not differences(
        learn(name, thirds).learned(), learn(name, whole).learned(), tolerance=1e-5
    )


@of("clipped by norm")
def test_gradients_clipped_by_norm(name: str, cell: str) -> None:
    assert cell == "same"
    bounds(name, {"gradient_clip_val": 0.05}, torch.Tensor.norm)


@of("clipped by value")
def test_gradients_clipped_by_value(name: str, cell: str) -> None:
    flags = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    if cell == "refused":
        return expect_refusal(name, under(**flags), "gradient_clip_algorithm to be 'norm' with")
    bounds(name, flags, lambda moved: moved.abs().max())


def bounds(name: str, flags: dict[str, Any], size: Callable[[Tensor], Tensor]) -> None:
    """No update of plain SGD moves what it optimizes by more than the learning rate times the limit.

    And a limit that is never reached is none.
    """
    last: dict[str, Tensor] = {}
    sizes: list[float] = []

    def look(run: Run, at: Any, batch: int, _: bool) -> None:
        if run.module.host.phase.trains == "strategy":
            return
        groups = run.trainer.optimizers[0].param_groups
        now = torch.cat([p.detach().double().flatten() for g in groups for p in g["params"]])
        if batch > 0:  # a task's start may draw anew
            sizes.append(float(size(now - last["weights"])))
        last["weights"] = now

    learn(name, under(**flags), at_batch=look)
    assert LR * 0.05 * 0.99 < max(sizes) < LR * 0.05 * 1.01
    wide = learn(name, under(**{**flags, "gradient_clip_val": 1e9}))
    assert not differences(wide.learned(), plain(name)[0])
