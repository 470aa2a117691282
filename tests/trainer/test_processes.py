"""Several processes learn what one learns, and what they must hold alike is alike or named.

The suite of promises has two processes for every built-in; here are compositions and modes, DDP's own
switches, batch normalization, and processes that are led astray on purpose.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bpn_lightning.conformance.runs import differences
from bpn_lightning.trainer.processes import disagreements, fingerprints

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "processes.py"
COMPARED = [
    "bd+si", "bd+mas", "bd+gem", "ewc, sampled labels", "ewc, multi-head", "gem, multi-head",
    "imm, mean", "joint, multi-head", "ebll, multi-head",
]  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


# --- the short version of benchmarks/processes.py ------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """The table's rows by method: how many numbers, absolute, relative, accuracies."""
    text = run(str(BENCHMARK), "--processes", "1", "3", "--methods", *COMPARED)
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in cells}


@pytest.mark.parametrize("name", COMPARED)
def test_three_processes_learn_what_one_learns(rows: dict[str, list[str]], name: str) -> None:
    """In double precision, where a sample that is dropped or counted twice has nowhere to hide."""
    numbers, _, relative, accuracies = rows[name]
    assert int(numbers.replace(",", "")) > 5000
    assert float(relative) < (1e-5 if "ebll" in name else 1e-10)  # autoencoders are in float32
    assert float(accuracies) == 0


# --- two processes for everything else -----------------------------------------------------------

SCRIPT = '''
import json, sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.nn.functional import all_reduce

from bpn_lightning.conformance.runs import Setting, fit
from bpn_lightning.errors import ProcessesError
from bpn_lightning.strategies import (
    EWC, AveragedGEM, BeneficialPerturbation, EncoderBasedLifelongLearning, GradientEpisodicMemory,
    ParameterSuperposition, SynapticIntelligence,
)
from bpn_lightning.strategies.base import ContinualStrategy

folder = Path(sys.argv[1])

# --- as strict as nccl, which takes no tensor with gaps and not every type

plain_all_reduce = torch.distributed.all_reduce
TYPES = {
    getattr(torch, name)
    for name in ("uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")
}


def strict_all_reduce(tensor, *args, **kwargs):
    assert tensor.is_contiguous(), "Tensors must be contiguous"
    assert tensor.dtype in TYPES, tensor.dtype
    return plain_all_reduce(tensor, *args, **kwargs)


torch.distributed.all_reduce = strict_all_reduce

EVEN = {"num_tasks": 2, "batch_size": 67}  # 288 samples: shares of 33 and 34, and of 10 and 10


def setting(together, backbone=None, optimizer=None, module=(), trainer=(), **ddp):
    flags = {"devices": 1, **dict(trainer)}
    if together:
        flags |= {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo", **ddp)}
    else:
        flags.pop("plugins", None)
    kinds = {"backbone": backbone, "optimizer": optimizer}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    return Setting(stream=EVEN, module=dict(module), trainer=flags, **kinds)


def compare(name, make, **options):
    """Two processes, then one in the first of them."""
    run = fit(make(), setting(True, **options))
    torch.save(run.learned(), folder / f"{name}_2_{run.trainer.global_rank}.pt")
    if run.trainer.global_rank == 0:
        for flag in ("static_graph", "gradient_as_bucket_view", "find_unused_parameters"):
            options.pop(flag, None)
        torch.save(fit(make(), setting(False, **options)).learned(), folder / f"{name}_1_0.pt")
    torch.distributed.barrier()


# --- DDP's switches

several = {"accumulate_grad_batches": 2}
for switch, flags in (
    ("static_graph", {}), ("gradient_as_bucket_view", several), ("find_unused_parameters", {}),
):
    compare(f"bd+ewc {switch}", lambda: [BeneficialPerturbation(8), EWC()], trainer=flags, **{switch: True})
    compare(
        f"ebll {switch}",
        lambda: [EncoderBasedLifelongLearning(autoencoder_epochs=2, warm_up_epochs=1)],
        trainer=flags, **{switch: True},
    )

# --- an optimizer that looks at an update several times, and a scheduler that looks at the training loss

twice = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
compare("bd+si lbfgs", lambda: [BeneficialPerturbation(8), SynapticIntelligence()], optimizer=twice)
plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)
compare("plateau", lambda: [EWC(20.0, update="clamped")], module={"scheduler": plateau})

# --- batch normalization


def normalizing():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())


class Together(nn.BatchNorm1d):
    """What torch.nn.SyncBatchNorm does on GPUs: statistics of the whole batch, with their gradients."""

    def forward(self, input):
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
    def apply(self, model):
        for part in model.modules():
            if type(part) is nn.BatchNorm1d:
                part.__class__ = Together
        return model

    def revert(self, model):
        return model


ewc = lambda: [EWC(20.0, update="clamped")]
compare("own statistics", ewc, backbone=normalizing)
compare("statistics together", ewc, backbone=normalizing, trainer={"plugins": [Synced()]})

# --- led astray


class Astray(ContinualStrategy):
    """Comes last, and spoils something in the second process."""

    def __init__(self, spoil):
        self.spoil = spoil

    def on_task_end(self, host, task):
        if host.global_rank == 1 and task.id == 1:
            with torch.no_grad():
                self.spoil(host)


said = {}
bd, ewc, gem, agem, psp = (
    BeneficialPerturbation(8), EWC(update="clamped"), GradientEpisodicMemory(7), AveragedGEM(7),
    ParameterSuperposition(),
)
for name, strategy, spoil in (
    ("weights", bd, lambda host: host.head.weight[0, 0].nextafter_(torch.tensor(9.0))),
    ("bank", bd, lambda host: host.head.bias_units.bank[1, 3].add_(1e-3)),
    ("importances", ewc, lambda host: ewc.penalty.importance["head.bias"][0].mul_(1.001)),
    ("memory", gem, lambda host: gem.memory.inputs[0].add_(1)),
    ("count", agem, lambda host: setattr(agem, "draws", agem.draws + 1)),
    ("keys", psp, lambda host: next(iter(host.head.keys.buffers())).neg_()),
):
    checked = setting(True, module={"check_processes": True})
    try:
        run = fit([strategy, Astray(spoil)], checked)
        said[name] = "nothing"
    except ProcessesError as error:
        said[name] = str(error)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
(folder / f"said_{sys.argv[2:] or rank}.json").write_text(json.dumps(said))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    run(str(folder / "script.py"), str(folder))
    return folder


def learned(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """By one process, and by the first and the second of two."""
    found = [
        torch.load(folder / f"{name}_{which}.pt", weights_only=True)
        for which in ("1_0", "2_0", "2_1")
    ]
    return found[0], found[1], found[2]


@pytest.mark.parametrize("method", ["bd+ewc", "ebll"])
@pytest.mark.parametrize(
    "switch", ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"]
)
def test_switches_of_ddp_change_nothing(folder: Path, method: str, switch: str) -> None:
    one, first, second = learned(folder, f"{method} {switch}")
    assert not differences(first, second)
    assert not differences(first, one, tolerance=1e-5)


@pytest.mark.parametrize("name", ["bd+si lbfgs", "plateau"])
def test_steps_that_look_more_than_once_are_those_of_one_process(folder: Path, name: str) -> None:
    one, first, second = learned(folder, name)
    assert not differences(first, second)
    assert not differences(first, one, tolerance=1e-4)


def test_statistics_of_own_shares_are_alike_but_not_those_of_one_process(folder: Path) -> None:
    one, first, second = learned(folder, "own statistics")
    assert not differences(first, second)
    found = differences(first, one, tolerance=1e-2)
    assert any("running_mean" in place for place in found)


def test_statistics_of_whole_batches_are_those_of_one_process(folder: Path) -> None:
    """By a double: torch.nn.SyncBatchNorm needs a GPU."""
    one, first, second = learned(folder, "statistics together")
    assert not differences(first, second)
    assert not differences(first, one, tolerance=1e-5)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("weights", "head.weight of the network"),
        ("bank", "head.bias_units.bank of the network"),
        ("importances", "importance/head.bias of EWC"),
        ("memory", "inputs of GradientEpisodicMemory"),
        ("count", "draws of AveragedGEM"),
        ("keys", "head.keys.bank of the network"),
    ],
)
def test_a_process_that_goes_astray_is_named(folder: Path, name: str, place: str) -> None:
    mine, theirs = (json.loads(path.read_text())[name] for path in sorted(folder.glob("said_*")))
    assert mine == theirs, "every process stops, for the same reason"
    assert mine == (
        f"Expected every process to hold the same after task 1, but some differ from process 0 in "
        f"{place} (process 1). host.batches gives a process its share of the samples: sum over it, then "
        "host.all_reduce; draw random numbers from random_state.seeded_generator."
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
