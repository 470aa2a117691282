"""Several processes learn what one learns, and what they must hold alike is alike or named.

The suite of promises has two processes for every built-in; here are compositions and modes, DDP's own
switches, batch normalization, and processes that are led astray on purpose.
"""

import runpy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from bpn_lightning.conformance.runs import Setting, differences, fit
from bpn_lightning.errors import ProcessesError
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ebll import EncoderBasedLifelongLearning
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.gates.ncm import NearestClassMean
from bpn_lightning.strategies.gem import AveragedGEM, GradientEpisodicMemory
from bpn_lightning.strategies.psp import ParameterSuperposition
from bpn_lightning.strategies.si import SynapticIntelligence
from bpn_lightning.trainer.processes import disagreements, fingerprints

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "processes.py"
COMPARED = [
    "bd+si", "bd+mas", "bd+gem", "ewc, sampled labels", "ewc, multi-head", "gem, multi-head",
    "imm, mean", "joint, multi-head", "ebll, multi-head",
]  # fmt: skip


# --- the short version of benchmarks/processes.py ------------------------------------------------


def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def learn_method(name: str, number: int, folder: str) -> None:
    benchmark()["_learn"](name, number, "64-true", Path(folder))


@pytest.mark.parametrize("name", COMPARED)
def test_three_processes_learn_what_one_learns(
    ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In double precision, where a sample that is dropped or counted twice has nowhere to hide."""
    learn_method(name, 1, str(tmp_path))
    ranks(learn_method, name, 3, str(tmp_path), number=3)
    benchmark()["_print_table"](tmp_path, [name], [1, 3], "64-true")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {name}")]
    _, numbers, _, relative, accuracies = row.strip("| ").split(" | ")
    assert int(numbers.replace(",", "")) > 5000
    assert float(relative) < (1e-5 if "ebll" in name else 1e-10)  # autoencoders are in float32
    assert float(accuracies) == 0


# --- two processes for everything else -----------------------------------------------------------

EVEN = {"num_tasks": 2, "batch_size": 67}  # 288 samples: shards of 33 and 34, and of 10 and 10


@contextmanager
def strict_all_reduce() -> Iterator[None]:
    """As strict as nccl, which takes no tensor with gaps and not every type."""
    all_reduce = torch.distributed.all_reduce
    names = ("uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")
    types = {getattr(torch, name) for name in names}

    def strict(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert tensor.is_contiguous(), "Tensors must be contiguous"
        assert tensor.dtype in types, tensor.dtype
        return all_reduce(tensor, *args, **kwargs)

    with patch("torch.distributed.all_reduce", strict):
        yield


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())


class WholeBatchNorm(nn.BatchNorm1d):
    """What torch.nn.SyncBatchNorm does on GPUs: statistics of the whole batch, with their gradients."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        count = all_reduce(torch.tensor(float(len(input))))
        mean = all_reduce(input.sum(0)) / count
        variance = all_reduce((input - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (input - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class Synced(LayerSync):
    def apply(self, model: nn.Module) -> nn.Module:
        for part in model.modules():
            if type(part) is nn.BatchNorm1d:
                part.__class__ = WholeBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model


@dataclass(frozen=True)
class Case:
    make: Callable[[], list[ContinualStrategy]]
    setting: Setting = field(default_factory=Setting)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    plugins: Callable[[], list[Any]] = list


def bd_ewc() -> list[ContinualStrategy]:
    return [BeneficialPerturbation(8), EWC()]


def ebll() -> list[ContinualStrategy]:
    return [EncoderBasedLifelongLearning(autoencoder_epochs=2, warm_up_epochs=1)]


def clamped_ewc() -> list[ContinualStrategy]:
    return [EWC(20.0, update="clamped")]


SWITCHES = {
    "static_graph": {},
    "gradient_as_bucket_view": {"accumulate_grad_batches": 2},
    "find_unused_parameters": {},
}
CASES = {
    **{
        f"{name} {switch}": Case(make, Setting(trainer=flags), {switch: True})
        for switch, flags in SWITCHES.items()
        for name, make in (("bd+ewc", bd_ewc), ("ebll", ebll))
    },
    # An optimizer that looks at an update several times, and a scheduler that looks at the loss.
    "bd+si lbfgs": Case(
        lambda: [BeneficialPerturbation(8), SynapticIntelligence()],
        Setting(optimizer=partial(torch.optim.LBFGS, lr=0.1, max_iter=2)),
    ),
    "plateau": Case(
        clamped_ewc,
        Setting(
            module={
                "scheduler": partial(
                    torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5
                )
            }
        ),
    ),
    "own statistics": Case(clamped_ewc, Setting(batch_norm_net)),
    "statistics together": Case(clamped_ewc, Setting(batch_norm_net), plugins=lambda: [Synced()]),
}


def learn(name: str, devices: int) -> dict[str, Any]:
    """Everything of the module and of the strategies."""
    case = CASES[name]
    flags: dict[str, Any] = {**case.setting.trainer, "devices": devices}
    if devices > 1:
        flags |= {"strategy": DDPStrategy(**case.ddp), "plugins": case.plugins()}
    with strict_all_reduce():
        run = fit(case.make(), replace(case.setting, stream=EVEN, trainer=flags))
    return run.learned()


@pytest.fixture(scope="module")
def learned(ranks: Any) -> Callable[[str], tuple[Any, Any, Any]]:
    """What one process learns, and the first and the second of two."""
    return cache(lambda name: (learn(name, 1), *ranks(learn, name, 2)))


@pytest.mark.parametrize("method", ["bd+ewc", "ebll"])
@pytest.mark.parametrize(
    "switch", ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"]
)
def test_switches_of_ddp_change_nothing(learned: Any, method: str, switch: str) -> None:
    one, first, second = learned(f"{method} {switch}")
    assert not differences(first, second)
    assert not differences(first, one, tolerance=1e-5)


@pytest.mark.parametrize("name", ["bd+si lbfgs", "plateau"])
def test_steps_that_look_more_than_once_are_those_of_one_process(learned: Any, name: str) -> None:
    one, first, second = learned(name)
    assert not differences(first, second)
    assert not differences(first, one, tolerance=1e-4)


def test_statistics_of_own_shares_are_alike_but_not_those_of_one_process(learned: Any) -> None:
    one, first, second = learned("own statistics")
    assert not differences(first, second)
    found = differences(first, one, tolerance=1e-2)
    assert any("running_mean" in place for place in found)


def test_statistics_of_whole_batches_are_those_of_one_process(learned: Any) -> None:
    """By a double: torch.nn.SyncBatchNorm needs a GPU."""
    one, first, second = learned("statistics together")
    assert not differences(first, second)
    assert not differences(first, one, tolerance=1e-5)


class Astray(ContinualStrategy):
    """Comes last, and spoils something in the second process."""

    def __init__(self, spoil: Callable[[Any], object]) -> None:
        self.spoil = spoil

    def on_task_end(self, host: Any, task: Any) -> None:
        if host.global_rank == 1 and task.id == 1:
            with torch.no_grad():
                self.spoil(host)


#: What is spoiled: the strategy, how it is done, and how it is named.
SPOILED: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], object], str]] = {
    "weights": (
        lambda: BeneficialPerturbation(8),
        lambda bd, host: host.network.head.weight[0, 0].nextafter_(torch.tensor(9.0)),
        "head.weight of the network",
    ),
    "bank": (
        lambda: BeneficialPerturbation(8),
        lambda bd, host: host.network.head.bias_units.bank[1, 3].add_(1e-3),
        "head.bias_units.bank of the network",
    ),
    "importances": (
        lambda: EWC(update="clamped"),
        lambda ewc, host: ewc.penalty.importance["head.bias"][0].mul_(1.001),
        "importance/head.bias of ewc",
    ),
    "memory": (
        lambda: GradientEpisodicMemory(7),
        lambda gem, host: gem.memory.inputs[0].add_(1),
        "inputs of gem",
    ),
    "count": (
        lambda: AveragedGEM(7),
        lambda agem, host: setattr(agem, "draws", agem.draws + 1),
        "draws of agem",
    ),
    "keys": (
        ParameterSuperposition,
        lambda psp, host: next(iter(host.network.head.keys.buffers())).neg_(),
        "head.keys.bank of the network",
    ),
    "gates": (
        lambda: [NearestClassMean(name="one"), NearestClassMean(name="other")],
        lambda gates, host: gates[0].rows["means"].add_(1.0),
        "rows/means of gate one",
    ),
}


def go_astray(name: str) -> str:
    """What is raised."""
    make, spoil, _ = SPOILED[name]
    made = make()
    together = {"devices": 2, "strategy": DDPStrategy()}
    checked = Setting(stream=EVEN, module={"check_processes": True}, trainer=together)
    try:
        fit([*(made if isinstance(made, list) else [made]), Astray(partial(spoil, made))], checked)
    except ProcessesError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", SPOILED)
def test_a_process_that_goes_astray_is_named(ranks: Any, name: str) -> None:
    mine, theirs = ranks(go_astray, name)
    assert mine == theirs, "every process stops, for the same reason"
    assert mine == (
        f"Expected every process to have the same state after task 1, but some differ from process 0 in "
        f"{SPOILED[name][2]} (process 1). host.batches gives a process its shard of the samples: sum over it, then host.all_reduce; draw random numbers from random_state.seeded_generator."
    )


# --- hashes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2**-22])),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros((), dtype=torch.bfloat16), torch.zeros((), dtype=torch.float16)),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [2, 1]),
        (0.1, 0.1 + 2**-55),
    ],
)
def test_different_things_have_different_fingerprints(one: Any, other: Any) -> None:
    assert fingerprints({"x": one}) != fingerprints({"x": other})


def test_equal_things_have_equal_fingerprints() -> None:
    strided = torch.arange(12.0).view(3, 4).T
    nan = torch.tensor([float("nan")])
    assert fingerprints([strided, nan]) == fingerprints([strided.contiguous(), nan.clone()])


def test_what_only_others_have_is_a_difference() -> None:
    assert disagreements([{"a": "1"}, {"a": "1", "b": "2"}, {"a": "3"}]) == {"a": [2], "b": [1]}
