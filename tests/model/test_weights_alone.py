"""A module from an export, or a copy, goes on as its run would, where nothing else of the past is needed."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from torch import Tensor, nn

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import BPNLightningError, CheckpointError, ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.nn import MLP
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.registry import strategies as registered_strategies
from bpn_lightning.strategies import (
    EWC,
    SLDA,
    AveragedGEM,
    BeneficialPerturbation,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    FineTuning,
    IncrementalMomentMatching,
    IndependentNetworks,
    LearningWithoutForgetting,
    NearestClassMean,
    ParameterSuperposition,
    ProbabilisticPCA,
    SynapticIntelligence,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::bpn_lightning.errors.ExpectedForgettingWarning"),
    pytest.mark.filterwarnings("ignore:The stream has no data of tasks 1 to 2"),
]

PAST, ALL = 2, 3
"""Tasks of two digits each."""

Make = Callable[[], list[ContinualStrategy]]

METHODS: Mapping[str, Make] = {
    "finetune": lambda: [FineTuning()],
    "bd": lambda: [BeneficialPerturbation(4)],
    "psp": lambda: [ParameterSuperposition()],
    "complex": lambda: [ParameterSuperposition("complex")],
    "gates": lambda: [BeneficialPerturbation(4), NearestClassMean(), ProbabilisticPCA()],
}
FROZEN = {"train": "modes", "train_first": "all"}


def stream_of(first: int, stop: int, mask: str, **arguments: Any) -> SplitDigits:
    order: list[str | int] = list(range(2 * first, 2 * stop))
    given = {"epochs_per_task": 1, "batch_size": 64, "class_order": order, **arguments}
    return SplitDigits(domain_incremental=mask == "shared", **given)


def fit(module: ContinualModule, stream: SplitDigits, strategies: Sequence[Any]) -> ContinualModule:
    trainer_of(1, list(strategies)).fit(module, stream)
    return module


def learn(
    mask: str, strategies: Sequence[Any], backbone: nn.Module | None = None, **arguments: Any
) -> ContinualModule:
    torch.manual_seed(7)
    module = ContinualModule(backbone or MLP([16, 12]), mask=mask, **arguments)
    return fit(module, stream_of(0, PAST, mask, seed=3), strategies)


def go_on(module: ContinualModule, mask: str, strategies: Sequence[Any]) -> ContinualModule:
    module.extend(new := stream_of(PAST, ALL, mask), stream_of(0, PAST, mask, seed=3))
    return fit(module, new, strategies)


def numbers(module: ContinualModule) -> dict[str, Tensor]:
    """All tensors of the network and of the gates, the matrix among them, and logits in every mode."""
    inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), evaluation_mode(module):
        logits = {f"logits {t.id}": module(inputs, task=t.id) for t in module.tasks}
    states = {name: gate.state_dict() for name, gate in module.gates.items()}
    return {**leaves(module.network.state_dict()), **leaves(states), **logits}


def leaves(tree: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Mapping):
        return {k: v for key, one in tree.items() for k, v in leaves(one, f"{path}/{key}").items()}
    return {path: tree.clone()} if isinstance(tree, Tensor) else {}


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that differ in a single bit."""
    assert one.keys() == other.keys()
    return [k for k in one if not torch.equal(one[k].nan_to_num(-1), other[k].nan_to_num(-1))]


def exported(module: ContinualModule, folder: Path, **arguments: Any) -> ContinualModule:
    backbone = arguments.pop("backbone", None) or MLP([16, 12])
    return load_exported(export_module(module, folder), backbone, **arguments)


@pytest.mark.parametrize("mask", ["seen", "task", "shared"])
@pytest.mark.parametrize("core", [{}, FROZEN], ids=["trained", "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_an_export_goes_on_as_its_run(
    method: str, core: dict[str, Any], mask: str, tmp_path: Path
) -> None:
    if core and mask == "shared" and method in ("finetune", "psp", "complex"):
        pytest.skip("nothing to train")
    strategies = METHODS[method]()
    module = learn(mask, strategies, **core)
    loaded = exported(module, tmp_path / "export", **core)
    expected = numbers(go_on(module, mask, strategies))
    assert differing(expected, numbers(go_on(loaded, mask, METHODS[method]()))) == []
    assert list(loaded.tasks) == list(module.tasks)
    assert loaded.accuracy_matrix.summary() == module.accuracy_matrix.summary()
    assert loaded.curve == module.curve


def test_reserved_classes_go_on(tmp_path: Path) -> None:
    reserved = {"reserve_classes": 2 * ALL, **FROZEN}
    module = learn("all", bd := [BeneficialPerturbation(4)], **reserved)
    loaded = exported(module, tmp_path / "export", **reserved)
    expected = numbers(go_on(module, "all", bd))
    assert differing(expected, numbers(go_on(loaded, "all", [BeneficialPerturbation(4)]))) == []
    assert loaded.overtaken == module.overtaken != []


def test_networks_of_their_own_go_on(tmp_path: Path) -> None:
    """A weight bank is a part of the network, and so of its export."""
    module = learn("task", stl := [IndependentNetworks()])
    loaded = exported(module, tmp_path / "export")
    expected = numbers(go_on(module, "task", stl))
    assert differing(expected, numbers(go_on(loaded, "task", [IndependentNetworks()]))) == []


def test_running_statistics_are_trained_again(tmp_path: Path) -> None:
    """An export is loaded in evaluation mode."""

    def normed() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())

    module = learn("seen", [FineTuning()], normed())
    loaded = exported(module, tmp_path / "export", backbone=normed())
    expected = numbers(go_on(module, "seen", [FineTuning()]))
    assert differing(expected, numbers(go_on(loaded, "seen", [FineTuning()]))) == []


def test_a_copy_goes_on_and_so_does_an_export_of_what_went_on(tmp_path: Path) -> None:
    module = learn("seen", bd := [BeneficialPerturbation(4)], **FROZEN)
    copied = go_on(deepcopy(module), "seen", [BeneficialPerturbation(4)])
    go_on(module, "seen", bd)
    assert differing(numbers(module), numbers(copied)) == []
    assert copied.curve == module.curve
    loaded = exported(exported(module, tmp_path / "a"), tmp_path / "b", **FROZEN)
    for one, strategies in ((module, bd), (loaded, [BeneficialPerturbation(4)])):
        one.extend(new := stream_of(ALL, ALL + 1, "seen"))
        with pytest.warns(UserWarning, match="no data of tasks 1 to 3"):
            fit(one, new, strategies)
    assert differing(numbers(module), numbers(loaded)) == []


# --- what an export lacks ------------------------------------------------------------------------


class Undeclared(FineTuning):
    """Says that it has no training state, and has one."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": 3}

    def training_state(self) -> str:
        return ""


def refused(module: ContinualModule, strategies: Sequence[Any], **stream: Any) -> str:
    module.extend(new := stream_of(PAST, ALL, "seen", **stream))
    before = numbers(module)
    with pytest.raises(BPNLightningError) as caught:
        fit(module, new, strategies)
    assert differing(before, numbers(module)) == []
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:.*projects gradients, but SGD with weight_decay")
@pytest.mark.parametrize(
    ("make", "lacking"),
    [
        (lambda: [EWC()], "importances: EWC"),
        (lambda: [SynapticIntelligence()], "importances: SynapticIntelligence"),
        (lambda: [AveragedGEM(20)], "memory: AveragedGEM"),
        (lambda: [LearningWithoutForgetting()], "teacher: LearningWithoutForgetting"),
        (lambda: [EncoderBasedLifelongLearning()], "teacher and autoencoders: Encoder"),
        (lambda: [IncrementalMomentMatching()], "averages of weights: Incremental"),
        (lambda: [BeneficialPerturbation(4), SLDA()], "shared second moments: SLDA"),
        (lambda: [Undeclared()], "state: Undeclared"),
    ],
)
def test_a_missing_state_is_refused_by_name(make: Make, lacking: str, tmp_path: Path) -> None:
    loaded = exported(learn("seen", make()), tmp_path / "export")
    said = refused(loaded, make())
    assert f"but an export holds no {lacking}" in said
    assert said.endswith("bpn-export --training_state.")


@pytest.mark.parametrize("name", registered_strategies())
def test_what_has_a_state_says_so(name: str) -> None:
    strategy = registered_strategies()[name].load()()
    assert bool(strategy.training_state()) == bool(strategy.state_dict())


def test_what_was_refused_goes_on_when_it_is_right(tmp_path: Path) -> None:
    module = learn("seen", bd := [BeneficialPerturbation(4)])
    loaded = exported(module, tmp_path / "export")
    said = refused(loaded, [BeneficialPerturbation(4), EWC()])
    assert "they differ: strategies is ['bd', 'ewc'] here and ['bd'] there" in said
    said = refused(loaded, [BeneficialPerturbation(4)], reset_optimizer="never")
    assert "Expected reset_optimizer to be 'always' where an export goes on" in said
    expected = numbers(go_on(module, "seen", bd))
    assert differing(expected, numbers(go_on(loaded, "seen", [BeneficialPerturbation(4)]))) == []


def change(folder: Path, **fields: Any) -> None:
    record = json.loads((folder / "config.json").read_text())
    for key, value in fields.items():
        record.pop(key) if value is None else record.update({key: value})
    (folder / "config.json").write_text(json.dumps(record))


def test_an_export_that_does_not_name_its_run(tmp_path: Path) -> None:
    """It answers as ever."""
    folder = export_module(learn("seen", [FineTuning()]), tmp_path / "export")
    change(folder, seed=None, strategies=None)
    loaded = load_exported(folder, MLP([16, 12]))
    with pytest.raises(CheckpointError, match="knows the seed and the strategies of its run"):
        loaded.extend(stream_of(PAST, ALL, "seen"))


@pytest.mark.parametrize(
    "fields",
    [{"seed": True}, {"seed": "3"}, {"strategies": "bd"}, {"strategies": [["bd"]]}, {"seed": None}],
)
def test_an_export_that_somebody_made_up(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = export_module(learn("seen", [FineTuning()]), tmp_path / "export")
    change(folder, **fields)
    with pytest.raises(CheckpointError, match="Expected the seed of a run and the names of its"):
        load_exported(folder, MLP([16, 12]))


def test_another_mask_is_refused(tmp_path: Path) -> None:
    folder = export_module(learn("seen", [FineTuning()]), tmp_path / "export")
    with pytest.raises(CheckpointError, match="'seen', but got 'task'"):
        load_exported(folder, MLP([16, 12]), mask="task")


def test_a_scheduler_and_an_optimizer_are_given_anew(tmp_path: Path) -> None:
    """An export names none."""

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.01)

    module = learn("seen", bd := [BeneficialPerturbation(4)], optimizer=adam, **FROZEN)
    loaded = exported(module, tmp_path / "export", optimizer=adam, **FROZEN)
    expected = numbers(go_on(module, "seen", bd))
    assert differing(expected, numbers(go_on(loaded, "seen", [BeneficialPerturbation(4)]))) == []
    with pytest.raises(ConfigurationError):
        load_exported(tmp_path / "export", MLP([16, 12]), train="heads")
