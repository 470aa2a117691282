"""A front's features computed once: the run is the same, and no image goes through the front twice."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits, StreamOf
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.nn.fronts import Front
from bpn_lightning.nn.patches import Patches
from bpn_lightning.strategies import (
    SLDA,
    BeneficialPerturbation,
    GradientEpisodicMemory,
    JointTraining,
    LearningWithoutForgetting,
    NearestClassMean,
)
from bpn_lightning.trainer.processes import leaves

Fit = Callable[..., Any]


class Squares(Front):
    """Each feature is of one pixel: not a bit depends on the batch. Counts the images that it is given."""

    images = 0

    def width(self, input_shape: Sequence[int]) -> int:
        return torch.Size(input_shape).numel()

    def extract(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1).square()

    def forward(self, inputs: Tensor) -> Tensor:
        self.images += len(inputs)
        return super().forward(inputs)


class Watch(Callback):
    """Notes the most bytes that the cache held, and a checkpoint inside the second task."""

    def __init__(self, path: Path | None = None) -> None:
        self.most, self.path = 0, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.most = max(self.most, pl_module.host.front_cache.bytes_held)
        if self.path is not None and pl_module.opened == 1 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def digits(**options: Any) -> SplitDigits:
    given = {"num_tasks": 3, "epochs_per_task": 2, "batch_size": 64, "eval_batch_size": 100}
    return SplitDigits(**{**given, "seed": 0, **options})


def rows_of_several_streams() -> StreamOf:
    return StreamOf([digits(num_tasks=2), digits(num_tasks=1, batch_size=31, seed=1)])


def everything(module: Any) -> dict[str, Any]:
    """All that was learned and measured."""
    return dict(
        leaves(
            {
                "weights": module.state_dict(),
                "gates": [repr(scores) for scores in module.gate_scores],
                "gate states": {n: g.state_dict() for n, g in module.gates.items()},
            }
        )
    )


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert value == other[name], name


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "gates": lambda: {"strategies": [BeneficialPerturbation(4), SLDA(), NearestClassMean()]},
    "joint": lambda: {"strategies": [JointTraining()], "stream": digits(validation_fraction=0.2)},
    "validation": lambda: {
        "strategies": [LearningWithoutForgetting()],
        "stream": digits(validation_fraction=0.2),
        "patience": 1,
    },
    "memory": lambda: {"strategies": [GradientEpisodicMemory(memory_size=30)]},
    "augmented": lambda: {"strategies": [SLDA()], "stream": digits(augment=True)},
    "streams": lambda: {
        "strategies": [JointTraining(), SLDA()],
        "stream": rows_of_several_streams(),
    },
    "part of the tests": lambda: {"task_agnostic": 20, "evaluate_on": "current"},
    "part of an epoch": lambda: {"strategies": [SLDA()], "trainer": {"limit_train_batches": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_with_a_cache_and_without(fit: Fit, case: str) -> None:
    def run(front_cache_gb: float, stream: Any = None, **options: Any) -> dict[str, Any]:
        stream = digits() if stream is None else stream
        module, _ = fit(stream=stream, front=Squares(), front_cache_gb=front_cache_gb, **options)
        return everything(module)

    plain = run(0, **CASES[case]())
    assert_same(run(2, **CASES[case]()), plain)
    largest_test_part = 1.7e-4 if case != "streams" else 1.8e-4
    assert_same(run(largest_test_part, **CASES[case]()), plain)


def test_every_image_goes_through_the_front_once(fit: Fit) -> None:
    stream, front = digits(validation_fraction=0.2), Squares()
    gates = [SLDA(), NearestClassMean()]
    fit(gates, stream=stream, front=front, evaluate_every="epoch")
    images = [
        len(stream.members(task, split)) for task in range(3) for split in ("train", "val", "test")
    ]
    assert front.images == sum(images)


def test_augmented_images_go_through_the_front_each_time(fit: Fit) -> None:
    stream, front = digits(augment=True), Squares()
    fit(stream=stream, front=front)
    trained, tested = (
        sum(len(stream.members(task, split)) for task in range(3)) for split in ("train", "test")
    )
    assert front.images == 2 * trained + tested


@pytest.mark.parametrize("gigabytes", [1e-5, 1e-4, 2e-4, 1])
def test_no_more_bytes_are_held_than_allowed(fit: Fit, gigabytes: float) -> None:
    watch = Watch()
    module, _ = fit([watch, SLDA()], stream=digits(), front=Squares(), front_cache_gb=gigabytes)
    assert watch.most <= gigabytes * 1e9
    assert (watch.most > 0) == (gigabytes > 1e-5)
    assert module.host.front_cache.bytes_held == 0


def test_no_checkpoint_has_features(fit: Fit, tmp_path: Path) -> None:
    for name, size in (("with", 1), ("without", 0)):
        fit([Watch(tmp_path / name)], stream=digits(), front=Squares(), front_cache_gb=size)
    saved = [
        dict(leaves(torch.load(tmp_path / name, weights_only=True)["state_dict"]))
        for name in ("with", "without")
    ]
    assert_same(*saved)
    sizes = [(tmp_path / name).stat().st_size for name in ("with", "without")]
    assert abs(sizes[0] - sizes[1]) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [1, 2e-4])
@pytest.mark.parametrize("strategy", [JointTraining, BeneficialPerturbation])
def test_a_resumed_run_is_bit_for_bit_the_same(
    fit: Fit, tmp_path: Path, gigabytes: float, strategy: Any
) -> None:
    """On features that do depend on the batch in their last bits."""

    def run(watch: Watch | None = None, **options: Any) -> dict[str, Any]:
        front = Patches(12, 3, samples=2000, iterations=3)
        strategies = [strategy(), SLDA(), *([] if watch is None else [watch])]
        module, _ = fit(
            strategies, stream=digits(), front=front, front_cache_gb=gigabytes, **options
        )
        return everything(module)

    path = tmp_path / "inside.ckpt"
    whole = run(Watch(path))
    assert_same(run(ckpt_path=str(path)), whole)


def test_a_size_below_0_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"front_cache_gb to be .* but got -1"):
        ContinualModule(MLP([8]), front_cache_gb=-1)


def learn(devices: int) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    module = ContinualModule(MLP([8]), front=Squares(), front_cache_gb=1)
    stream = digits(validation_fraction=0.2, batch_size=33, eval_batch_size=101)
    trainer_of(devices, [JointTraining(), NearestClassMean()]).fit(module, stream)
    return {**module.state_dict(), "matrix": module.accuracy_matrix.accuracy.nan_to_num()}


def test_two_processes_learn_what_one_does(ranks: Any) -> None:
    (first, second), alone = ranks(learn, 2), learn(1)
    for name in alone:
        if isinstance(alone[name], Tensor):
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6)
