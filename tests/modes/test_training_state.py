"""A bundle with a training state is continued as its run is, by any method; nothing in it is code."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from safetensors.torch import load_file
from torch import Tensor, nn

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.model.extending import extension_of
from bpn_lightning.modes import load
from bpn_lightning.modes.plain_values import put_back, set_aside
from bpn_lightning.modes.training_state import (
    read_training_state,
    training_state_parts,
    write_training_state,
)
from bpn_lightning.nn import MLP
from bpn_lightning.nn.patches import Patches
from bpn_lightning.strategies import (
    EWC,
    SLDA,
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    IndependentNetworks,
    LearningWithoutForgetting,
    LoRA,
    MemoryAwareSynapses,
    NearestClassMean,
    ParameterSuperposition,
    RanPAC,
    SynapticIntelligence,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::bpn_lightning.errors.ExpectedForgettingWarning"),
    pytest.mark.filterwarnings("ignore:The stream has no data of tasks 1 to 2"),
    pytest.mark.filterwarnings("ignore:.*projects gradients, but SGD with weight_decay"),
]

PAST, ALL = 2, 3
"""Tasks of two digits each."""

Make = Callable[[], list[ContinualStrategy]]

METHODS: Mapping[str, Make] = {
    "bd+ewc": lambda: [BeneficialPerturbation(4), EWC(100.0, update="clamped")],
    "gem": lambda: [GradientEpisodicMemory(20)],
    "gates": lambda: [LoRA(2), NearestClassMean(), SLDA(), RanPAC()],
}
MORE: Mapping[str, Make] = {
    "si": lambda: [SynapticIntelligence()],
    "mas": lambda: [MemoryAwareSynapses()],
    "slnid": lambda: [SLNID()],
    "mean": lambda: [IncrementalMomentMatching("mean", drop=0.2)],
    "mode": lambda: [IncrementalMomentMatching("mode")],
    "lwf": lambda: [LearningWithoutForgetting(warm_up_epochs=1)],
    "ebll": lambda: [EncoderBasedLifelongLearning(autoencoder_epochs=1)],
    "agem": lambda: [AveragedGEM(20, sample_size=10)],
    "psp": lambda: [ParameterSuperposition()],
    "stl": lambda: [IndependentNetworks()],
}


def stream_of(first: int, stop: int, mask: str = "seen", **arguments: Any) -> SplitDigits:
    order: list[str | int] = list(range(2 * first, 2 * stop))
    given = {"epochs_per_task": 1, "batch_size": 64, "class_order": order, **arguments}
    return SplitDigits(domain_incremental=mask == "shared", **given)


sgd, adam = partial(torch.optim.SGD, lr=0.05), partial(torch.optim.Adam, lr=0.01)


def net() -> nn.Module:
    """Its dropout draws from the global generator, whose state goes on too."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)
    )


def learn(
    strategies: Sequence[Any], mask: str = "seen", optimizer: Any = sgd, **given: Any
) -> ContinualModule:
    torch.manual_seed(7)
    module = ContinualModule(net(), mask=mask, optimizer=optimizer)
    trainer_of(1, list(strategies)).fit(module, stream_of(0, PAST, mask, seed=3, **given))
    return module


def go_on(
    module: ContinualModule, strategies: Sequence[Any], mask: str = "seen", **given: Any
) -> dict[str, Tensor]:
    """All that is learned of one more task, without the data of those before."""
    module.extend(new := stream_of(PAST, ALL, mask, **given))
    trainer = trainer_of(1, list(strategies))
    trainer.fit(module, new)
    states = {one.state_key: one.state_dict() for one in strategies}
    optimizer = trainer.optimizers[0].state_dict()
    return leaves({"network": module.network.state_dict(), "own": states, "adam": optimizer})


def leaves(tree: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Mapping):
        return {k: v for key, one in tree.items() for k, v in leaves(one, f"{path}/{key}").items()}
    return {path: tree.detach().clone()} if isinstance(tree, Tensor) else {}


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [k for k in one if not torch.equal(one[k].nan_to_num(-1), other[k].nan_to_num(-1))]


def check_it_goes_on(
    make: Make, mask: str, folder: Path, optimizer: Any = sgd, **given: Any
) -> None:
    strategies = make()
    module = learn(strategies, mask, optimizer, **given)
    export_module(module, folder, training_state=True)
    torch.rand(3)  # whatever is drawn in the meantime
    expected = go_on(module, strategies, mask, **given)
    loaded = load_exported(folder, net(), optimizer=optimizer)
    assert differing(expected, go_on(loaded, make(), mask, **given)) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_bundle_goes_on_as_its_run(method: str, tmp_path: Path) -> None:
    check_it_goes_on(METHODS[method], "seen", tmp_path / "out")


@pytest.mark.matrix
@pytest.mark.parametrize("mask", ["seen", "task", "shared"])
@pytest.mark.parametrize("method", [*METHODS, *MORE])
def test_every_method_goes_on(method: str, mask: str, tmp_path: Path) -> None:
    check_it_goes_on({**METHODS, **MORE}[method], mask, tmp_path / "out")


def test_an_optimizer_goes_on(tmp_path: Path) -> None:
    check_it_goes_on(METHODS["bd+ewc"], "seen", tmp_path / "out", adam, reset_optimizer="never")


@pytest.mark.parametrize("gigabytes", [0, 1])
def test_a_front_goes_on(tmp_path: Path, gigabytes: float) -> None:
    """A front that was fitted to the first task is the same afterwards, whether its features are cached or not."""

    def strategies() -> list[Any]:
        return [BeneficialPerturbation(4), GradientEpisodicMemory(20), SLDA()]

    torch.manual_seed(7)
    front = Patches(12, 3, samples=2000, iterations=3)
    module = ContinualModule(MLP([16]), front=front, front_cache_gb=gigabytes, mask="seen")
    trainer_of(1, own := strategies()).fit(module, stream_of(0, PAST, seed=3))
    export_module(module, tmp_path / "out", training_state=True)
    torch.rand(3)
    expected = go_on(module, own)
    loaded = load_exported(tmp_path / "out", MLP([16]), front_cache_gb=gigabytes)
    found = go_on(loaded, strategies())
    assert any("front" in name for name in found)
    assert differing(expected, found) == []


# --- what is in the folder -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = learn([GradientEpisodicMemory(20)])
        return export_module(module, tmp_path_factory.mktemp("made") / "out", training_state=True)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_weights_of_the_bundle_are_not_in_it_again(bundle: Path) -> None:
    (path,) = (bundle / "training_state").glob("*.safetensors")
    found = load_file(path)
    weights = [name for name in found if name.startswith("state_dict/network.backbone")]
    assert weights == []
    memory = [found[f"callbacks/gem/{name}"] for name in ("inputs", "targets")]
    assert [len(one) for one in memory] == [PAST * 20] * 2


def test_the_card_says_that_it_holds_samples(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    assert "gem (" in card
    assert "**It holds samples of the training data as they are** (memory of gem)" in card
    (part,) = training_state_parts(bundle)
    assert part.bytes == PAST * 20 * (64 + 8)  # pixels of a byte, and labels


def test_answering_does_not_read_it(bundle: Path) -> None:
    inputs = torch.zeros(1, 1, 8, 8)
    before = load(bundle, net()).answer(inputs, 0)
    (bundle / "training_state" / "state.json").write_text("?")
    assert torch.equal(load(bundle, net()).answer(inputs, 0), before)


def test_it_is_replaced_at_once(bundle: Path) -> None:
    before = load_exported(bundle, net())
    checkpoint = extension_of(before).training_state()
    name = "network.backbone.1.weight"
    checkpoint["state_dict"][name] = changed = torch.ones(16, 64)
    write_training_state(bundle, checkpoint, {})
    assert len([*(bundle / "training_state").iterdir()]) == 2
    assert torch.equal(read_training_state(bundle, {})["state_dict"][name], changed)


def damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def harm(folder: Path) -> None:
        record = json.loads((folder / "state.json").read_text())
        change(record)
        (folder / "state.json").write_text(json.dumps(record))

    return harm


def truncate(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


def link_out(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    shutil.move(path, folder.parent.parent / path.name)
    path.symlink_to(folder.parent.parent / path.name)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "truncated or changed"),
        (link_out, "leads out of"),
        (damaged(lambda r: r.update(schema=99)), "of schema"),
        (damaged(lambda r: r.update(format="other")), "of another format"),
        (
            damaged(lambda r: r["file"].update(name="../model.safetensors")),
            "a file '../model.safetensors' for tensors",
        ),
        (damaged(lambda r: r.update(weights="0" * 64)), "of the bundle's weights and tasks"),
        (damaged(lambda r: r.update(state={"items": [["a", {"tensor": "b"}]]})), "KeyError: 'b'"),
        (damaged(lambda r: r.update(state=3)), "TypeError"),
    ],
)
def test_what_is_damaged_or_made_up(harm: Callable[[Path], Any], said: str, bundle: Path) -> None:
    harm(bundle / "training_state")
    module = load_exported(bundle, net())
    with pytest.raises(CheckpointError, match=r"to be a bundle of bpn-export") as caught:
        module.extend(stream_of(PAST, ALL))
    assert said in str(caught.value)


def test_it_is_of_no_other_weights(bundle: Path) -> None:
    module = load_exported(bundle, net())
    with torch.no_grad():
        next(module.backbone.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="of the bundle's weights and tasks"):
        module.extend(stream_of(PAST, ALL))


def test_what_has_no_training_state_exports_none(bundle: Path, tmp_path: Path) -> None:
    shutil.rmtree(bundle / "training_state")
    loaded = load_exported(bundle, net())
    with pytest.raises(CheckpointError, match="Expected a module with a training state"):
        export_module(loaded, tmp_path / "again", training_state=True)
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match=r"bpn-export --training_state\.$"):
        go_on(loaded, [GradientEpisodicMemory(20)])


def test_plain_values_come_back_as_they_were() -> None:
    state = {"a": (1, [None, {"b": torch.arange(3)}]), 2: float("-inf"), "c": 2**80, "d/e": True}
    tensors: dict[str, Tensor] = {}
    text = json.dumps(set_aside(state, "", tensors), allow_nan=False)
    found = put_back(json.loads(text), tensors)
    assert repr(found) == repr(state)
    assert tensors == {}
    with pytest.raises(ConfigurationError, match="but x/a is of type set"):
        set_aside({"a": {1}}, "x", {})
