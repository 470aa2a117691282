"""Networks for export: what torch.export and ONNX make of them is what the module answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.imm import IncrementalMomentMatching
from bpn_lightning.strategies.psp import ParameterSuperposition
from bpn_lightning.strategies.stl import IndependentNetworks

pytestmark = pytest.mark.slow

IDS = torch.tensor([0, 1, 1, 0, 1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 8))


class Transformer(nn.Module):
    """One encoder layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        encoded: Tensor = self.layer(images.flatten(1).view(-1, 8, 8))
        return encoded.flatten(1)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[ContinualStrategy]], str]] = {
    "finetune": (mlp, list, "seen"),
    "task mask": (mlp, list, "task"),
    "bd+psp": (mlp, lambda: [BeneficialPerturbation(4), ParameterSuperposition()], "all"),
    "complex": (mlp, lambda: [ParameterSuperposition("complex")], "all"),
    "transformer": (Transformer, lambda: [BeneficialPerturbation(4)], "all"),
    "imm": (mlp, lambda: [IncrementalMomentMatching()], "task"),
    "convolution": (convolution, lambda: [ParameterSuperposition(layers=["backbone.0"])], "all"),
    "stl": (mlp, lambda: [IndependentNetworks()], "all"),
}
WHOLE_BATCHES = {"convolution": "KernelKeys", "stl": "WeightBank"}


@pytest.fixture
def learned(fit: Any) -> Callable[[str], ContinualModule]:
    def make(case: str) -> ContinualModule:
        backbone, strategies, mask = CASES[case]
        stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=512, seed=0)
        module, _ = fit(strategies(), backbone=backbone(), stream=stream, mask=mask)
        return module.eval()  # type: ignore[no-any-return]

    return make


def arguments(task: int | None, times: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 1, 8, 8, generator=generator).repeat(times, 1, 1, 1)
    return (images,) if task is not None else (images, IDS.repeat(times))


@pytest.mark.parametrize("case", CASES)
def test_an_exported_network_answers_as_the_module(learned: Any, case: str) -> None:
    module = learned(case)
    with torch.no_grad():
        for task in (0, 1) if case in WHOLE_BATCHES else (0, 1, None):
            network = module.for_inference(task)
            given = arguments(task)
            expected = module(given[0], task=IDS if task is None else task)
            assert torch.equal(network(*given), expected)
            shapes = ({0: torch.export.Dim.DYNAMIC},) * len(given)
            exported = torch.export.export(network, given, dynamic_shapes=shapes)
            assert not [n for n in exported.graph.nodes if "encoder_layer_fwd" in str(n.target)]
            found = exported.module()(*arguments(task, times=3))
            torch.testing.assert_close(found, expected.repeat(3, 1))


@pytest.mark.parametrize(
    ("case", "task"), [("bd+psp", None), ("complex", 1), ("task mask", None)], ids=str
)
def test_onnx_answers_as_the_module(learned: Any, tmp_path: Any, case: str, task: Any) -> None:
    import onnxruntime

    module, given = learned(case), arguments(task)
    with torch.no_grad():
        expected = module(given[0], task=IDS if task is None else task)
    path = tmp_path / "network.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC},) * len(given)
    torch.onnx.export(
        module.for_inference(task), given, path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    feed = {
        entry.name: value.numpy()
        for entry, value in zip(session.get_inputs(), arguments(task, times=3), strict=True)
    }
    (found,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), expected.repeat(3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", WHOLE_BATCHES)
def test_networks_of_one_task_at_a_time_take_no_task_ids(learned: Any, case: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"got None, and the network has {WHOLE_BATCHES[case]}"
    ):
        learned(case).for_inference()


def test_a_copy_does_not_follow_the_module(learned: Any) -> None:
    module = learned("bd+psp")
    network, per_sample = module.for_inference(1), module.for_inference()
    images, ids = arguments(None)
    expected = network(images), per_sample(images, ids)
    with torch.no_grad(), module.task_mode(0):
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.equal(network(images), expected[0])
        assert torch.equal(per_sample(images, ids), expected[1])
    assert not any(part.training for part in network.modules())
    module.train()
    assert not any(part.training for part in network.modules())


def test_a_backbone_that_cannot_be_copied_is_refused(learned: Any) -> None:
    module = learned("finetune")
    module.network.backbone.kept = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(
        ConfigurationError, match=r"that copy\.deepcopy copies, but got: Only Tensors"
    ):
        module.for_inference(0)


@pytest.mark.parametrize("task", [2, -1])
def test_an_unknown_task_is_refused(learned: Any, task: int) -> None:
    with pytest.raises(ConfigurationError, match="Expected task to be an id from 0 to 1"):
        learned("bd+psp").for_inference(task)


def test_the_module_itself_is_exported_in_the_mode_that_holds_only(learned: Any) -> None:
    module, (images,) = learned("bd+psp"), arguments(0)
    exported = torch.export.export(module, (images,), {"task": 0})
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(images, task=0), module(images, task=0))
    with pytest.raises(ConfigurationError, match=r"Export module\.for_inference\(\)"):
        torch.export.export(module, (images,), {"task": IDS})


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("to_onnx", "torch.onnx.export"),
        ("to_torchscript", "torch.export.export"),
        ("to_tensorrt", "torch_tensorrt.compile"),
    ],
)
def test_lightnings_exports_are_refused_with_the_remedy(method: str, remedy: str) -> None:
    module = ContinualModule(mlp())
    with pytest.raises(ConfigurationError, match=rf"Use {remedy}\(module\.for_inference\(task\)"):
        getattr(module, method)("somewhere", torch.zeros(1, 1, 8, 8))
