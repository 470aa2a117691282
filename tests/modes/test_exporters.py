"""What ONNX Runtime and peft make of a bundle is what the bundle answers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.export.exporting import export_module
from bpn_lightning.modes import Modes, load
from bpn_lightning.modes.exporters import (
    peft_base,
    write_onnx,
    write_peft,
    write_state_dict,
    write_torch_export,
)
from bpn_lightning.strategies import (
    BeneficialPerturbation,
    IndependentNetworks,
    ParameterSuperposition,
)

pytestmark = [
    pytest.mark.slow,
    # Of torch's exporter and of peft.
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
    ),
]

IDS = torch.tensor([2, 0, 1, 1, 2])
INPUTS = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Make = Callable[..., tuple[Modes, Path]]


@pytest.fixture
def made(make_in: Make, tmp_path: Path) -> Make:
    """Learns three tasks and exports them."""
    return partial(make_in, tmp_path)


@pytest.fixture
def make_in(fit: Callable[..., Any]) -> Make:
    """The same into a given folder."""

    def make(place: Path, strategies: list[Any], mask: str = "all") -> tuple[Modes, Path]:
        stream = SplitDigits(
            num_tasks=3,
            epochs_per_task=1,
            batch_size=64,
            seed=0,
            domain_incremental=mask == "shared",
        )
        module, _ = fit(strategies, stream=stream, mask=mask)
        folder = export_module(module.eval(), place / "out", names=["a", "b", "c"])
        return load(folder), folder

    return make


def close(one: Any, other: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(one), other, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mask", ["all", "seen", "task", "shared"])
def test_onnx(mask: str, made: Make) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    net, folder = made([BeneficialPerturbation(4)], mask)
    files = write_onnx(net, folder / "onnx")
    names = ["a.onnx_adapter", "b.onnx_adapter", "base.onnx", "c.onnx_adapter", "mixed.onnx"]
    assert [path.name for path in files] == names
    mixed = ort.InferenceSession(folder / "onnx" / "mixed.onnx")
    (found,) = mixed.run(None, {"inputs": INPUTS.numpy(), "tasks": IDS.numpy()})
    close(found, net.answer(INPUTS, IDS))
    (odd,) = mixed.run(None, {"inputs": INPUTS.numpy(), "tasks": IDS.sub(2).mul(7).numpy()})
    assert torch.from_numpy(odd).isnan().any(1).tolist() == [False, True, True, True, False]
    base = ort.InferenceSession(folder / "onnx" / "base.onnx")
    for name in net.tasks:
        adapter = ort.LoraAdapter()
        adapter.Load(str(folder / "onnx" / f"{name}.onnx_adapter"))
        options = ort.RunOptions()
        options.add_active_adapter(adapter)
        (found,) = base.run(None, {"inputs": INPUTS.numpy()}, options)
        close(found, net.answer(INPUTS, name))


def test_javascript_opens_the_mixed_network(made: Make) -> None:
    pytest.importorskip("onnx")
    node = shutil.which("node")
    script = Path(__file__).parents[2] / "examples" / "onnx_in_node.js"
    find = [str(node), "-e", "require('onnxruntime-node')"]
    if node is None or subprocess.run(find, check=False, capture_output=True).returncode:
        pytest.skip("needs node and NODE_PATH to a folder of npm's with onnxruntime-node")
    net, folder = made([BeneficialPerturbation(4)], "seen")
    write_onnx(net, folder / "onnx")
    asked = {
        "shape": [*INPUTS.shape],
        "inputs": INPUTS.flatten().tolist(),
        "tasks": IDS.tolist(),
    }
    line = [node, str(script), str(folder / "onnx" / "mixed.onnx")]
    done = subprocess.run(
        line, input=json.dumps(asked), check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    logits = [float("-inf") if one is None else one for one in found["logits"]]
    close(torch.tensor(logits).view(found["shape"]), net.answer(INPUTS, IDS))


def test_keys_are_in_the_mixed_network_only(made: Make) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    net, folder = made([BeneficialPerturbation(4), ParameterSuperposition()])
    assert [path.name for path in write_onnx(net, folder / "onnx")] == ["mixed.onnx"]
    session = ort.InferenceSession(folder / "onnx" / "mixed.onnx")
    (found,) = session.run(None, {"inputs": INPUTS.numpy(), "tasks": IDS.numpy()})
    close(found, net.answer(INPUTS, IDS))


def test_networks_of_their_own_are_a_file_for_each(made: Make) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    net, folder = made([IndependentNetworks()])
    files = write_onnx(net, folder / "onnx")
    assert [path.name for path in files] == ["a.onnx", "b.onnx", "c.onnx"]
    (found,) = ort.InferenceSession(files[1]).run(None, {"inputs": INPUTS.numpy()})
    close(found, net.answer(INPUTS, "b"))
    assert [path.name for path in write_torch_export(net, folder / "torch_export")] == [
        "a.pt2",
        "b.pt2",
        "c.pt2",
    ]
    with pytest.raises(ConfigurationError, match="but got weight_bank"):
        write_peft(net, folder / "peft")


IN_TORCH_ALONE = """
import sys
sys.modules["bpn_lightning"] = sys.modules["lightning"] = None
from collections import OrderedDict
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch import nn

def answers(place):
    asked = load_file(place / "asked.safetensors")
    if (place / "torch_export/mixed.pt2").exists():
        program = torch.export.load(place / "torch_export/mixed.pt2").module()
        yield "mixed", program(asked["inputs"], asked["tasks"])
    for path in (place / "torch_export").glob("?.pt2"):
        yield path.stem, torch.export.load(path).module()(asked["inputs"])
    for path in (place / "state_dict").glob("*.safetensors"):
        layers = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
        head = nn.Linear(16, asked["wanted"].shape[1])
        net = nn.Sequential(OrderedDict(backbone=nn.Sequential(*layers), head=head))
        net.load_state_dict(load_file(path))
        yield "state_dict/" + path.stem, net(asked["inputs"])

for place in map(Path, sys.argv[1:]):
    found = {name: value.detach().contiguous() for name, value in answers(place)}
    save_file(found, place / "found.safetensors")
"""

COMPOSITIONS: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "bd+psp": (lambda: [BeneficialPerturbation(4), ParameterSuperposition()], "seen"),
    "bd": (lambda: [BeneficialPerturbation(4)], "shared"),
    "stl": (lambda: [IndependentNetworks()], "all"),
    "nothing": (list, "all"),
}


def test_torch_alone_reads_programs_and_weights(make_in: Make, tmp_path: Path) -> None:
    """One process reads those of all compositions."""
    nets = {}
    for name, (strategies, mask) in COMPOSITIONS.items():
        net, folder = make_in(tmp_path / name, strategies(), mask)
        write_torch_export(net, folder / "torch_export")
        write_state_dict(net, folder / "state_dict")
        asked = {"inputs": INPUTS, "tasks": IDS, "wanted": net.answer(INPUTS, IDS)}
        save_file(asked, folder / "asked.safetensors")
        nets[folder] = net
    line = [sys.executable, "-c", IN_TORCH_ALONE, *map(str, nets)]
    done = subprocess.run(line, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, net in nets.items():
        found = load_file(folder / "found.safetensors")
        own = [f"state_dict/{name}" for name in net.tasks]
        programs = net.tasks if net.now.has_own_weights else ["mixed"]
        assert sorted(found) == sorted([*own, *programs]), folder
        for name, value in found.items():
            like = net.answer(INPUTS, IDS if name == "mixed" else name[-1])
            seen = like.isfinite() if name in own else torch.ones_like(like, dtype=torch.bool)
            torch.testing.assert_close(value[seen], like[seen], rtol=0, atol=1e-6)


def test_what_does_not_fold_is_no_state_dict(made: Make) -> None:
    net, folder = made([ParameterSuperposition("complex")])
    with pytest.raises(ConfigurationError, match=r"but backbone\.1\.keys of this network does not"):
        write_state_dict(net, folder / "state_dict")
    assert not (folder / "state_dict").exists()


def test_peft_has_no_keys(made: Make) -> None:
    net, folder = made([ParameterSuperposition()])
    with pytest.raises(ConfigurationError, match=r"but got keys on backbone\.1\. Load the bundle"):
        write_peft(net, folder / "peft")


@pytest.mark.parametrize("mask", ["shared", "seen"])
def test_peft(mask: str, made: Make) -> None:
    peft = pytest.importorskip("peft")
    net, folder = made([BeneficialPerturbation(4)], mask)
    places = write_peft(net, folder / "peft")
    model = peft.PeftModel.from_pretrained(peft_base(net), places[0], adapter_name="a")
    for name, place in zip("bc", places[1:], strict=True):
        model.load_adapter(place, adapter_name=name)
    for name in net.tasks:
        model.set_adapter(name)
        found, wanted = model(INPUTS), net.answer(INPUTS, name)
        seen = wanted.isfinite()
        close(found[seen].detach(), wanted[seen])
