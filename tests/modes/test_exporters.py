"""What ONNX Runtime and peft make of a bundle is what the bundle answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.export import export_module
from bpn_lightning.modes import Modes, load
from bpn_lightning.modes.exporters import peft_base, write_onnx, write_peft
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
def made(fit: Callable[..., Any], tmp_path: Path) -> Make:
    def make(strategies: list[Any], mask: str = "all") -> tuple[Modes, Path]:
        stream = SplitDigits(
            num_tasks=3,
            epochs_per_task=1,
            batch_size=64,
            seed=0,
            domain_incremental=mask == "shared",
        )
        module, _ = fit(strategies, stream=stream, mask=mask)
        folder = export_module(module.eval(), tmp_path / "out", names=["a", "b", "c"])
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


def test_keys_are_in_the_mixed_network_only(made: Make) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    net, folder = made([BeneficialPerturbation(4), ParameterSuperposition()])
    assert [path.name for path in write_onnx(net, folder / "onnx")] == ["mixed.onnx"]
    session = ort.InferenceSession(folder / "onnx" / "mixed.onnx")
    (found,) = session.run(None, {"inputs": INPUTS.numpy(), "tasks": IDS.numpy()})
    close(found, net.answer(INPUTS, IDS))


def test_networks_of_their_own_are_refused_with_the_remedy(made: Make) -> None:
    pytest.importorskip("onnx")
    net, folder = made([IndependentNetworks()])
    with pytest.raises(ConfigurationError, match=r"a whole network for each task\. .*net\.fold"):
        write_onnx(net, folder / "onnx")
    assert not (folder / "onnx").exists()
    with pytest.raises(ConfigurationError, match="but got weight_bank"):
        write_peft(net, folder / "peft")


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
