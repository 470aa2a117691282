"""Tasks that a run learns are added to a bundle: as an export of the run would have them, and nothing else changes."""

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from torch import Tensor

from bpn_lightning import ContinualModule
from bpn_lightning.cli.bundle import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import BPNLightningError
from bpn_lightning.export.adding import AddToBundle
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.modes import load
from bpn_lightning.modes.bundle import read_bundle
from bpn_lightning.modes.training_state import check_training_state
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import BeneficialPerturbation, NearestClassMean

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The stream has no data of tasks 1 to"),
]

IMAGES = torch.randint(256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
FROZEN = {"train": "modes", "train_first": "all"}
PAST, NEW = ["a", "b"], ["c", "d"]


def stream_of(first: int, stop: int, **arguments: Any) -> SplitDigits:
    order: list[str | int] = list(range(2 * first, 2 * stop))
    given = {"epochs_per_task": 1, "batch_size": 64, "class_order": order, **arguments}
    return SplitDigits(**given)


def methods() -> list[Any]:
    return [BeneficialPerturbation(4), NearestClassMean()]


def learn(strategies: Sequence[Any], **arguments: Any) -> ContinualModule:
    torch.manual_seed(7)
    module = ContinualModule(MLP([16, 12]), mask="task", **{**FROZEN, **arguments})
    trainer_of(1, list(strategies)).fit(module, stream_of(0, 2, seed=3))
    return module


def go_on(folder: Path, *callbacks: Any, stop: int = 4, **arguments: Any) -> ContinualModule:
    """Learn two tasks more, from a bundle."""
    module = load_exported(folder, MLP([16, 12]), **{**FROZEN, **arguments})
    module.extend(new := stream_of(2, stop))
    trainer_of(1, [*methods(), *callbacks]).fit(module, new)
    return module.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = learn(methods())
        folder = tmp_path_factory.mktemp("made") / "out"
        return export_module(module, folder, names=PAST, training_state=True)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def logits(folder: Path, names: Sequence[str]) -> list[Tensor]:
    net = load(folder)
    return [net(IMAGES, task=name) for name in names]


def test_they_are_what_an_export_would_have(bundle: Path, tmp_path: Path) -> None:
    before = logits(bundle, PAST)
    module = go_on(bundle, AddToBundle(bundle, NEW))
    assert load(bundle).tasks == PAST + NEW
    for old, now in zip(before, logits(bundle, PAST), strict=True):
        assert torch.equal(old, now[:, :4])
        assert now[:, 4:].eq(-torch.inf).all()
    anew = export_module(module, tmp_path / "anew", names=PAST + NEW)
    for one, other in zip(logits(bundle, NEW), logits(anew, NEW), strict=True):
        assert torch.equal(one, other)
    assert load(bundle).predict(IMAGES) == load(anew).predict(IMAGES)  # by the gate
    (row,) = (x for x in (bundle / "README.md").read_text().splitlines() if x.startswith("| d |"))
    assert f"{float(module.accuracy_matrix.accuracy[4, 3]):.1%}" in row
    assert main(["check", str(bundle)]) == 0


def test_a_training_state_becomes_that_of_all_tasks(bundle: Path) -> None:
    go_on(bundle, AddToBundle(bundle, NEW))
    check_training_state(bundle, read_bundle(bundle))
    later = load_exported(bundle, MLP([16, 12]), **FROZEN)
    later.extend(new := stream_of(4, 5))
    trainer_of(1, [*methods(), AddToBundle(bundle, ["e"])]).fit(later, new)
    assert load(bundle).tasks == [*PAST, *NEW, "e"]


def test_gates_that_learn_alone_are_added_too(tmp_path: Path) -> None:
    free = {"train": "all", "train_first": None}
    folder = export_module(learn([NearestClassMean(modes=0)], **free), tmp_path / "out", names=PAST)
    module = load_exported(folder, MLP([16, 12]))
    module.extend(new := stream_of(2, 4))
    trainer_of(1, [NearestClassMean(modes=0), AddToBundle(folder, NEW)]).fit(module, new)
    anew = export_module(module, tmp_path / "anew", names=PAST + NEW)
    assert load(folder).tasks == PAST + NEW
    assert load(folder).predict(IMAGES) == load(anew).predict(IMAGES)


def add_in_processes(made: str, folder: str, devices: int) -> dict[str, Any]:
    """Learn two tasks more, into a copy of a bundle; which files of it this process wrote, and its weights."""
    bundle, rank = Path(folder), int(os.environ.get("LOCAL_RANK", "0"))
    if rank == 0:
        shutil.copytree(made, bundle)
    written: list[str] = []
    replace = os.replace

    def noted(source: Any, target: Any) -> None:
        written.append(Path(target).name)
        replace(source, target)

    trainer = trainer_of(devices, [*methods(), AddToBundle(bundle, NEW)])
    module = load_exported(made, MLP([16, 12]), **FROZEN)
    module.extend(new := stream_of(2, 4, batch_size=50, eval_batch_size=50))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(os, "replace", noted)
        trainer.fit(module, new)
    return {"written": written, "weights": dict(module.network.state_dict())}


def names_in(written: list[str]) -> list[str]:
    """Without hashes, and without files that get another name."""
    return [name.partition("-")[0] for name in written if name[0] != "."]


def test_two_processes_add_what_one_does(made: Path, tmp_path: Path, ranks: Any) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = add_in_processes(str(made), str(one), 1)
    first, second = ranks(add_in_processes, str(made), str(two), 2)
    assert second["written"] == []
    assert first["written"].count("adapter_config.json") == len(NEW)
    assert names_in(first["written"]) == names_in(alone["written"])
    whole, parts = load(one), load(two)
    assert whole.tasks == parts.tasks == PAST + NEW
    for name in PAST:
        assert torch.equal(whole(IMAGES, task=name), parts(IMAGES, task=name))
    for name in NEW:
        torch.testing.assert_close(
            whole(IMAGES, task=name), parts(IMAGES, task=name), rtol=1e-4, atol=1e-5
        )
    check_training_state(two, read_bundle(two))
    for path in sorted(p.relative_to(one) for p in one.rglob("*") if "-" not in p.name):
        assert (two / path).exists(), path


def test_without_one_none_is_made(bundle: Path) -> None:
    shutil.rmtree(bundle / "training_state")
    go_on(bundle, AddToBundle(bundle))
    assert not (bundle / "training_state").exists()
    assert load(bundle).tasks == [*PAST, "task_3", "task_4"]


def test_what_is_there_or_was_removed_is_not_added_again(bundle: Path) -> None:
    """As after a run that was interrupted between adding a task and its checkpoint."""
    source = Path(shutil.copytree(bundle, bundle.with_name("source")))
    go_on(bundle, AddToBundle(bundle, NEW))
    before = (bundle / "tasks" / "d" / "adapter_config.json").stat().st_mtime_ns
    assert main(["remove", str(bundle), "c"]) == 0
    go_on(source, AddToBundle(bundle, NEW, training_state=True))
    assert load(bundle).tasks == [*PAST, "d"]
    assert (bundle / "tasks" / "d" / "adapter_config.json").stat().st_mtime_ns == before
    assert not (bundle / "training_state").exists()  # it would hold what was removed


def refused(folder: Path, callback: AddToBundle, **arguments: Any) -> str:
    """The error, before anything is trained and anything is written."""
    before = {path: path.stat().st_mtime_ns for path in callback.folder.rglob("*.*")}
    module = load_exported(folder, MLP([16, 12]), **{**FROZEN, **arguments})
    module.extend(new := stream_of(2, 4))
    trainer = trainer_of(1, [*methods(), callback])
    with pytest.raises(BPNLightningError) as caught:
        trainer.fit(module, new)
    assert module.closed == 1
    assert {path: path.stat().st_mtime_ns for path in callback.folder.rglob("*.*")} == before
    return str(caught.value)


def test_what_cannot_be_added_is_refused_before_training(bundle: Path, tmp_path: Path) -> None:
    other = export_module(learn(methods(), train="all", train_first=None), tmp_path / "other")
    record = json.loads((bundle / "config.json").read_text())
    for callback, given, said in [
        (
            AddToBundle(bundle),
            {"train": "all", "train_first": None},
            "Expected train to be 'modes'",
        ),
        (AddToBundle(bundle, ["c"]), {}, "Expected names to be 2 different ones"),
        (AddToBundle(bundle, ["c", "C"]), {}, "Expected names to be 2 different ones"),
        (AddToBundle(bundle, ["c", "b"]), {}, "'b' has the name 'b'"),
        (AddToBundle(bundle, ["c", "../d"]), {}, "to be the name of a folder"),
        (AddToBundle(other), {}, "to have the shared weights that the run goes on with"),
        (AddToBundle(tmp_path / "nowhere"), {}, "to be a bundle of bpn-export"),
    ]:
        assert said in refused(bundle, callback, **given)
    record["gates"][0]["together"] = True
    (bundle / "config.json").write_text(json.dumps(record))
    assert "are solved for all tasks together" in refused(bundle, AddToBundle(bundle))
