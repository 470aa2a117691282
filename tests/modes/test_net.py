"""A bundle answers as the run that wrote it, for one task, for several in a batch, and for none."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import vit
from torch import Tensor, nn

from bpn_lightning import ContinualModule, modes
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.export.exporting import export_module
from bpn_lightning.modes import bundle as files
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import (
    IA3,
    SLDA,
    BeneficialPerturbation,
    FeCAM,
    IndependentNetworks,
    LoRA,
    NearestClassMean,
    ParameterSuperposition,
    ProbabilisticPCA,
    RanPAC,
)
from bpn_lightning.strategies.gates.logits import Confidence

Fit = Callable[..., Any]
TASKS = 3
IDS = torch.tensor([2, 0, 1, 1, 2, 0, 0])


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU()
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP([16, 12]),
    "conv": conv,
    "vit": lambda: vit(1),
}
LAYERS = {
    "mlp": None,
    "conv": ["linear", "conv", "norm"],
    "vit": ["linear", "conv", "attention", "norm"],
}


def images(number: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (number, 1, 8, 8), generator=generator, dtype=torch.uint8)


def stream(mask: str = "all") -> SplitDigits:
    return SplitDigits(
        num_tasks=TASKS,
        epochs_per_task=1,
        batch_size=64,
        seed=0,
        domain_incremental=mask == "shared",
    )


def learned(
    fit: Fit, strategies: list[Any], mask: str = "all", network: str = "mlp"
) -> ContinualModule:
    module, _ = fit(strategies, stream=stream(mask), mask=mask, backbone=NETWORKS[network]())
    done: ContinualModule = module.eval()
    return done


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["all", "seen", "task", "shared"])
@pytest.mark.parametrize("network", NETWORKS)
def test_it_answers_as_the_run(network: str, mask: str, fit: Fit, tmp_path: Path) -> None:
    bd = BeneficialPerturbation(4, layers=LAYERS[network])
    module = learned(fit, [bd], mask, network)
    folder = export_module(module, tmp_path / "out")
    net = modes.load(folder, backbone=NETWORKS[network]() if network == "vit" else None)
    for task in range(TASKS):
        found = net(images(), task=task)
        close(found, module.predict(images(), task=task))
        assert torch.equal(found, net(images(), task=f"task_{task + 1}"))
        folded = net.fold(task)
        inputs = module.network.structure.preparations[0].apply(images(), task)
        close(folded(inputs), found)
        if network != "vit":
            assert all("witchable" not in type(part).__name__ for part in folded.modules())
    mixed = net(images(), task=IDS)
    alone = torch.stack(
        [net(image, task=int(task)) for image, task in zip(images(), IDS, strict=True)]
    )
    close(mixed, alone)
    close(mixed, module.predict(images(), task=IDS))
    if mask != "task":
        answers = net.predict(images())
        wanted = module.predict(images()).softmax(1).max(1)
        assert [one.column for one in answers] == wanted.indices.tolist()
        close(torch.tensor([one.confidence for one in answers]), wanted.values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [BeneficialPerturbation(4), ParameterSuperposition()],
        lambda: [ParameterSuperposition("complex")],
        lambda: [BeneficialPerturbation(4), IA3(), LoRA(2, alpha=3.0)],
        lambda: [IndependentNetworks()],
        list,
    ],
    ids=["bd+psp", "complex", "bd+ia3+lora", "stl", "nothing"],
)
def test_whatever_tasks_have(make: Callable[[], list[Any]], fit: Fit, tmp_path: Path) -> None:
    module = learned(fit, make(), "seen")
    net = modes.load(export_module(module, tmp_path / "out"))
    inputs = module.network.structure.preparations[0].apply(images(), 0)
    for task in range(TASKS):
        close(net(images(), task=task), module.predict(images(), task=task))
        close(net.fold(task)(inputs), net(images(), task=task))
    close(net(images(), task=IDS), module.predict(images(), task=IDS))


@pytest.mark.parametrize("network", ["conv"])
def test_layers_that_take_one_task_at_a_time(network: str, fit: Fit, tmp_path: Path) -> None:
    strategies = [ParameterSuperposition(layers=["backbone.0"]), LoRA(2, layers=["backbone.0"])]
    module = learned(fit, strategies, "all", network)
    net = modes.load(export_module(module, tmp_path / "out"))
    close(net(images(), task=IDS), module.predict(images(), task=IDS))
    inputs = module.network.structure.preparations[0].apply(images(), 0)
    close(net.fold(1)(inputs), net(images(), task=1))


@pytest.mark.parametrize(
    "gate",
    [
        NearestClassMean,
        SLDA,
        lambda: RanPAC(50),
        lambda: ProbabilisticPCA(rank=2, project=20, per="task"),
        lambda: FeCAM(project=10),
        Confidence,
        lambda: SLDA(modes=1),
    ],
    ids=["ncm", "slda", "ranpac", "ppca", "fecam", "confidence", "one mode"],
)
def test_a_gate_names_the_task(gate: Callable[[], Any], fit: Fit, tmp_path: Path) -> None:
    made = gate()
    module = learned(fit, [BeneficialPerturbation(4), made], "seen")
    net = modes.load(export_module(module, tmp_path / "out"))
    answers = net.predict(images())
    assert [one.column for one in answers] == module.predict(images()).argmax(1).tolist()
    tasks = module.predict_tasks(images()).argmax(1)
    assert [one.task_id for one in answers] == tasks.tolist()


def test_gates_alone_answer_by_their_own_class(fit: Fit, tmp_path: Path) -> None:
    module = learned(fit, [SLDA(modes=0)], "seen")
    net = modes.load(export_module(module, tmp_path / "out"))
    answers = net.predict(images())
    assert [one.column for one in answers] == module.predict(images()).argmax(1).tolist()
    close(net(images(), task=IDS), module.predict(images(), task=IDS))
    close(net(images(), task=1), module.predict(images(), task=1))


def test_it_imports_neither_lightning_nor_the_trainer_side(fit: Fit, tmp_path: Path) -> None:
    export_module(learned(fit, [BeneficialPerturbation(4), SLDA()]), tmp_path / "out")
    code = (
        "import sys, torch; from bpn_lightning import modes; net = modes.load('out');"
        "net.predict(torch.zeros(2, 1, 8, 8, dtype=torch.uint8));"
        "net(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), task=torch.tensor([0, 1])); net.fold(0);"
        "print([name for name in sys.modules if name.split('.')[0] in ('lightning', 'torchmetrics')"
        " or name in ('torch._dynamo', 'torch.distributed.fsdp')"  # half of the time to import it
        " or name.startswith(('bpn_lightning.trainer', 'bpn_lightning.model', 'bpn_lightning.run'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# --- inputs --------------------------------------------------------------------------------------


@pytest.fixture
def folder(fit: Fit, tmp_path: Path) -> Path:
    module = learned(fit, [BeneficialPerturbation(4)], "seen")
    return export_module(module, tmp_path / "out", names=["ants", "bees", "cats"])


def test_arrays_and_single_inputs(folder: Path) -> None:
    net = modes.load(folder)
    wanted = net(images(), task="bees")
    array = images().numpy()
    assert torch.equal(net(array, task="bees"), wanted)
    assert torch.equal(net(array.transpose(0, 2, 3, 1), task="bees"), wanted)
    assert torch.equal(net(images().double() / 255, task="bees"), wanted)
    assert torch.equal(net(array, task=["bees"] * 7), wanted)
    assert torch.equal(net(array, task=np.array(["bees"] * 7)), wanted)
    assert torch.equal(net(array, task=np.ones(7, dtype=np.int16)), wanted)
    close(net(images()[0], task="bees"), wanted[0])
    close(net(images()[0], task=torch.tensor(1)), wanted[0])
    for one in (torch.tensor(1), np.int64(1), np.array(1)):
        assert torch.equal(net(array, task=one), wanted)
    assert net(images(0), task=[]).shape == (0, 6)
    assert torch.equal(net(array[::-1], task="bees"), wanted.flip(0))
    assert torch.equal(net(list(array), task="bees"), wanted)
    array.setflags(write=False)
    assert torch.equal(net(array, task="bees"), wanted)
    (one,) = net.predict(images()[0], task="bees", reject_below=1.0)
    assert (one.task, one.task_id, one.rejected) == ("bees", 1, True)
    assert one.class_name == str(int(wanted[0].argmax()))
    assert net.predict(images(0), task="bees") == []


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("bee", "one of ants (0), bees (1), cats (2), but got 'bee'. Did you mean 'bees'?"),
        (3, "one of ants (0), bees (1), cats (2), but got 3."),
        (True, "but got True."),
        (torch.tensor([0, 1, 3, 0, 0, 0, 0]), "but got 3."),
        (torch.tensor([0, -1, 2, 0, 0, 0, 0]), "but got -1."),
        (torch.tensor([0, 1]), "one for each of the 7 inputs, but got the shape (2,)"),
        ([True, 0, 0, 0, 0, 0, 0], "but got [True, 0"),
        (torch.tensor(True), "to hold IDs, which are integers, but got torch.bool"),
        (torch.zeros(7), "to hold IDs, which are integers, but got torch.float32"),
        (["ants", "dogs"], "but got 'dogs'."),
        ([object()], "but got [<object"),
        (np.array(["ants", "dogs"] * 3 + ["ants"]), "but got 'dogs'."),
        (torch.zeros(7, dtype=torch.int64, device="meta"), "an ID for each input, but got tensor("),
    ],
)
def test_a_task_that_is_none(task: Any, said: str, folder: Path) -> None:
    net = modes.load(folder)
    with pytest.raises(ConfigurationError) as caught:
        net(images(), task=task)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(2, 3, 8, 8),
        torch.full((2, 1, 8, 8), 2.0),
        np.zeros((2, 5)),
        "x",
        None,
        torch.zeros(1, 1, 8, 8).to_sparse(),
        torch.zeros(1, 1, 8, 8, device="meta"),
        np.array([{}]),
    ],
    ids=str,
)
def test_images_that_are_none(odd: Any, folder: Path) -> None:
    with pytest.raises(ConfigurationError):
        modes.load(folder)(odd, task=0)


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:99"])
def test_a_device_that_is_none_is_not_the_bundles_fault(device: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="Expected device to be one that torch can use"):
        modes.load(folder, device=device)


def test_a_hook_of_a_layer_is_called(folder: Path) -> None:
    """Layers one after another are computed from their tensors, but not where somebody looks on."""
    backbone, calls = MLP([16, 12]), []
    backbone(torch.zeros(1, 64))  # its first layer finds its size
    backbone[1].register_forward_hook(lambda *_: calls.append(1))
    net, plain = modes.load(folder, backbone=backbone), modes.load(folder)
    calls.clear()
    close(net(images(), task=IDS), plain(images(), task=IDS))
    assert calls == [1]


# --- change --------------------------------------------------------------------------------------


def test_a_task_is_added_and_removed_as_a_folder(folder: Path, tmp_path: Path) -> None:
    net = modes.load(folder)
    before = net(images(), task="ants")
    shutil.move(folder / "tasks" / "bees", tmp_path / "bees")
    net.reload()
    assert net.tasks == ["ants", "cats"]
    assert net.task_ids == {"ants": 0, "cats": 2}
    found = net(images(), task="ants")
    assert found[:, 2:4].eq(-torch.inf).all()
    close(found[:, :2], before[:, :2])
    assert net.add_task(tmp_path / "bees", name="wasps") == "wasps"
    assert net.tasks == ["ants", "wasps", "cats"]
    close(net(images(), task="ants"), before)
    with pytest.raises(ConfigurationError, match="has the ID 1"):
        net.add_task(tmp_path / "bees")
    net.remove_task("wasps")
    net.remove_task(0)
    with pytest.raises(ConfigurationError, match="is the only one"):
        net.remove_task("cats")
    path = tmp_path / "bees" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": "0" * 32}))
    with pytest.raises(CheckpointError, match="to belong to the bundle's shared weights"):
        net.add_task(tmp_path / "bees")


def test_only_what_changed_is_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, read, names = modes.load(folder), files.read_task, []

    def counted(place: Path, *rest: Any) -> Any:
        names.append(place.name)
        return read(place, *rest)

    monkeypatch.setattr(files, "read_task", counted)
    before = net(images(), task=IDS)
    net.reload()
    assert names == []
    shutil.move(folder / "tasks" / "bees", tmp_path / "bees")
    net.reload()
    shutil.move(tmp_path / "bees", folder / "tasks" / "bees")
    (folder / "tasks" / "cats" / "adapter_config.json").touch()
    net.reload()
    assert names == ["bees", "cats"]
    assert torch.equal(net(images(), task=IDS), before)


def test_a_bundle_that_is_changed_badly_leaves_the_one_before(folder: Path) -> None:
    net = modes.load(folder)
    before = net(images(), task=1)
    path = folder / "tasks" / "bees" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or changed"):
        net.reload()
    assert torch.equal(net(images(), task=1), before)


def test_a_task_that_goes_while_the_folder_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = files._task_folders
    monkeypatch.setattr(files, "_task_folders", lambda root: [*listed(root), root / "gone"])
    assert modes.load(folder).tasks == ["ants", "bees", "cats"]
    (folder / "tasks" / "bees" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        modes.load(folder)


def test_threads_answer_while_tasks_come_and_go(folder: Path, tmp_path: Path) -> None:
    net = modes.load(folder)
    wanted = {task: net(images(), task=task) for task in ("ants", "cats")}
    shutil.copytree(folder / "tasks" / "bees", tmp_path / "bees")
    wrong: list[str] = []
    done = threading.Event()

    def ask(task: str) -> None:
        while not done.is_set():
            found = net(images(), task=task)[:, [0, 1, 4, 5]]
            if not torch.allclose(found, wanted[task][:, [0, 1, 4, 5]], atol=1e-6):
                wrong.append(task)

    threads = [threading.Thread(target=ask, args=(task,)) for task in ("ants", "cats") * 2]
    for thread in threads:
        thread.start()
    for _ in range(5):
        net.remove_task("bees")
        net.add_task(tmp_path / "bees")
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("mask", ["seen", "task", "shared"])
def test_memory_holds_every_tensor_once(mask: str, fit: Fit, tmp_path: Path) -> None:
    strategies = [BeneficialPerturbation(4), ParameterSuperposition(), IA3()]
    folder = export_module(learned(fit, strategies, mask), tmp_path / "out")
    net, read = modes.load(folder), files.read_bundle(folder)
    held = net.now.bundle
    network = {
        v.untyped_storage().data_ptr()
        for v in net.now.network.state_dict().values()
        if isinstance(v, Tensor)
    }
    for name, one in held.tasks.items():
        for key, value in one.tensors.items():
            assert torch.equal(value, read.tasks[name].tensors[key])
            assert value.untyped_storage().data_ptr() in network
    for key, value in held.files["model.safetensors"].items():
        assert torch.equal(value, read.files["model.safetensors"][key])
        assert value.untyped_storage().data_ptr() in network or key.startswith("head.")
    assert held.base == read.base


# --- networks that a file names ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["os.system", "evil.Net", "torch.hub.load", "torch.nn.Module", 3])
def test_a_network_that_needs_trust(path: Any, folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["network"] = {"class_path": path, "init_args": {"command": "touch owned"}}
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="a network that needs no trust, but got"):
        modes.load(folder)
    modes.load(folder, backbone=MLP([16, 12]))


def test_a_network_is_no_larger_than_its_weights(folder: Path) -> None:
    """It is refused before it is made."""
    record = json.loads((folder / "config.json").read_text())
    layer = {
        "class_path": "torch.nn.Linear",
        "init_args": {"in_features": 64, "out_features": 10**5},
    }
    record["network"] = {"class_path": "torch.nn.Sequential", "layers": {"0": layer}}
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(
        CheckpointError, match=r"bytes of all tensors in the file, but got 26,000,000"
    ):
        modes.load(folder)


def test_weights_are_fetched_with_trust_only(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    arguments = {"name": "resnet18", "weights": "DEFAULT"}
    record["network"] = {
        "class_path": "bpn_lightning.nn.torchvision_backbone",
        "init_args": arguments,
    }
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="weights='DEFAULT'"):
        modes.load(folder)
    record["network"] = None
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="Expected a bundle that names its network"):
        modes.load(folder)
