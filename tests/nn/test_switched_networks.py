"""Whole networks with biases on their layers: ResNet-18, a small ViT, an LSTM, and sequences first."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, lstm, resnet18, small_images, vit
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.functional.gradients import sample_gradient_sums, sums_have_closed_forms
from bpn_lightning.functional.importance import fisher_diagonal
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.execution import check_layers_are_called, mixing_samples
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.switching import is_switchable, switch_replaced
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ewc import EWC

TASKS = 3
EACH = torch.tensor([2, 0, 1, 2, 0])


def attached(backbone: nn.Module, layers: list[str] | None = None) -> ContinualModule:
    """A module whose layers have random biases, by default all that can have some."""
    stream = small_images(TASKS)
    stream.setup()
    module = ContinualModule(backbone)
    module.attach(stream)
    for name in layers or module.network.switchable_layers():
        module.network.attach_bias_units(name, 2).bank.normal_().mul_(0.3)
    return module.eval()


def images(number: int = len(EACH)) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_task_per_sample_equals_one_task_at_a_time(name: str) -> None:
    module = attached(NETWORKS[name]())
    x = images()
    with torch.no_grad():
        alone = torch.stack([module.network(x, task=task) for task in range(TASKS)])
        assert not torch.allclose(alone[0], alone[1])
        each = alone[EACH, torch.arange(len(EACH))]
        assert module.network._kept_apart() == []
        torch.testing.assert_close(module.network(x, task=EACH), each, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.for_inference()(x, EACH), each, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.for_inference(1)(x), alone[1], rtol=1e-4, atol=1e-5)
    check_layers_are_called(module.network, x[:2])


def with_sums(plain: nn.Module, network: nn.Module, task: int) -> nn.Module:
    """A network without bias units whose own biases are the sums."""
    twin = deepcopy(plain)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if not is_switchable(layer):
                continue
            part: Any = twin.get_submodule(name)
            shift = layer.bias_units.bank[task]  # type: ignore[union-attr,index]
            if isinstance(part, nn.MultiheadAttention):
                part.in_proj_bias += shift[: len(part.in_proj_bias)]
                part.out_proj.bias += shift[len(part.in_proj_bias) :]
            elif part.bias is None:
                part.bias = nn.Parameter(shift.clone())
            else:
                part.bias += shift
    return twin.eval()


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_a_mode_is_the_network_with_other_biases(name: str) -> None:
    plain = NETWORKS[name]()
    module = attached(deepcopy(plain))
    for task in range(TASKS):
        twin = with_sums(plain, module.network.backbone, task)
        with torch.no_grad(), module.task_mode(task):
            torch.testing.assert_close(
                module.network.backbone(images()), twin(images()), rtol=1e-4, atol=1e-5
            )


def encoder(batch_first: bool) -> nn.Module:
    """Torch's encoder over the rows of an image, whose fused kernel calls no layer."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(1).view(-1, 8, 8)
            if batch_first:
                encoded: Tensor = self.layer(rows)
            else:
                encoded = self.layer(rows.transpose(0, 1)).transpose(0, 1)
            return encoded.flatten(1)

    return Encoder()


@pytest.mark.parametrize("part", ["self_attn", "norm1", "linear2"])
def test_no_part_of_a_fused_layer_is_passed_by(part: str) -> None:
    plain = encoder(batch_first=True)
    module = attached(deepcopy(plain), [f"backbone.layer.{part}"])
    for task in range(TASKS):
        twin = with_sums(plain, module.network.backbone, task)
        with torch.no_grad(), module.task_mode(task):
            torch.testing.assert_close(
                module.network.backbone(images()), twin(images()), rtol=1e-4, atol=1e-5
            )
    check_layers_are_called(module.network, images(2))


@pytest.mark.parametrize("number", [5, 8])  # 8 is also the length of the sequence
def test_batches_run_task_by_task_where_samples_are_not_first(number: int) -> None:
    module = attached(encoder(batch_first=False))
    network = module.network
    found = mixing_samples(network.backbone, images(3))
    assert sorted(found) == [
        f"backbone.layer.{one}" for one in ("linear1", "linear2", "norm1", "norm2")
    ]
    tasks = torch.arange(number) % TASKS
    with torch.no_grad():
        alone = torch.stack([network(images(number), task=task) for task in range(TASKS)])
        each = alone[tasks, torch.arange(number)]
        torch.testing.assert_close(network(images(number), task=tasks), each)
    with pytest.raises(ConfigurationError, match=r"backbone\.layer\.norm1, whose first dimension"):
        module.for_inference()


def test_attention_alone_knows_where_its_samples_are() -> None:
    module = attached(encoder(batch_first=False), ["backbone.layer.self_attn"])
    assert module.network._kept_apart() == []
    with torch.no_grad():
        alone = torch.stack([module.network(images(8), task=task) for task in range(TASKS)])
        tasks = torch.arange(8) % TASKS
        torch.testing.assert_close(
            module.network(images(8), task=tasks), alone[tasks, torch.arange(8)]
        )


def test_synchronized_batch_normalization_keeps_its_biases() -> None:
    module = attached(resnet18())
    with torch.no_grad(), module.task_mode(1):
        wanted = module.network(images())
        nn.SyncBatchNorm.convert_sync_batchnorm(module.network)
        assert not torch.allclose(module.network(images()), wanted)
        switch_replaced(module.network)
        torch.testing.assert_close(module.network(images()), wanted)
    assert isinstance(module.network.backbone.bn1, nn.SyncBatchNorm)


# --- per-sample gradients ------------------------------------------------------------------------


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_fisher_information_of_switched_convolutions(transposed: bool) -> None:
    """The loop over samples; a transposed convolution has no closed form, others have."""
    backbone = convolutions()
    if transposed:
        backbone.insert(2, nn.ConvTranspose2d(4, 4, 1))  # type: ignore[operator]
    module = attached(backbone)
    host, network = module.host, module.network.double()
    parameters = network.shared_parameters(include_head=True)
    with network.task_mode(1), evaluation_mode(network):
        found = sums_have_closed_forms(network, parameters, images(1).double(), slice(0, 6))
        assert found != transposed
    fisher = fisher_diagonal(host, 1, parameters)
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    count = 0
    with network.task_mode(1), evaluation_mode(network):
        for batch in host.batches(1, "train"):
            for x, y in zip(batch.inputs.double().split(1), batch.targets.split(1), strict=True):
                loss = nn.functional.cross_entropy(network(x), y)
                gradients = torch.autograd.grad(loss, list(parameters.values()))
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    total += gradient.square()
                count += 1
    for name, total in sums.items():
        torch.testing.assert_close(fisher[name], total / count)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning"
)  # of torch.func's LSTM
def test_importances_of_an_lstm_with_biases_are_those_of_the_loop() -> None:
    module = attached(lstm())
    network, parameters = module.network, module.network.shared_parameters(include_head=True)
    x, labels = images(3), torch.tensor([0, 1, 2])
    with network.task_mode(1), evaluation_mode(network):
        found = sample_gradient_sums(
            network,
            parameters,
            x,
            lambda z: (labels[: len(z), None], torch.ones(len(z), 1)),
            slice(0, 6),
        )
        for index, label in enumerate(labels):
            loss = nn.functional.cross_entropy(network(x[index : index + 1]), label[None])
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                found[name] -= gradient.square()
    assert all(value.abs().max() < 1e-6 for value in found.values())


# --- checkpoints, exports, bytes -----------------------------------------------------------------

EVERY = ["linear", "conv", "attention", "norm"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning"
)  # of torch.func's attention
def test_checkpoints_and_exports_hold_the_biases(fit: Any, tmp_path: Path) -> None:
    bd = BeneficialPerturbation(4, layers=EVERY)
    module, trainer = fit([bd, EWC()], backbone=vit(), stream=small_images())
    network = module.network
    numbers = {name: units.bank.shape[1] for name, units in bd.units.items()}
    assert numbers["backbone.encoder.layers.encoder_layer_0.self_attention"] == 32
    assert all((units.bank != 0).any(1).all() for units in bd.units.values())
    declared = bd.declared_bytes(module.host)
    assert declared.inference == sum(units.bank.nbytes for units in bd.units.values())
    assert declared.per_task == 4 * sum(numbers.values())
    with torch.no_grad():
        wanted = [network(images(), task=task) for task in (0, 1)]
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ContinualModule.load_from_checkpoint(tmp_path / "x.ckpt", backbone=vit())
    exported = load_exported(export_module(module, tmp_path / "out"), vit())
    for again in (loaded.eval(), exported.eval()):
        with torch.no_grad():
            for task in (0, 1):
                assert torch.equal(again.network(images(), task=task), wanted[task])


@pytest.mark.slow
def test_biases_of_all_kinds_of_layers_grow_with_the_stream(fit: Any, tmp_path: Path) -> None:
    """A longer stream that continues from a checkpoint learns what it learns at once, bit for bit."""

    def learn(tasks: int, ckpt_path: Path | None = None) -> Any:
        stream = SplitDigits(
            class_order=list(range(2 * tasks)), epochs_per_task=1, batch_size=128, seed=0
        )
        torch.manual_seed(0)
        bd = BeneficialPerturbation(4, layers=EVERY)
        return fit([bd], backbone=vit(layers=1), stream=stream, mask="seen", ckpt_path=ckpt_path)

    at_once, _ = learn(3)
    _, trainer = learn(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    grown, _ = learn(3, tmp_path / "two.ckpt")
    wanted, found = at_once.network.state_dict(), grown.network.state_dict()
    assert len([name for name in wanted if name.endswith("bias_units.bank")]) == 8
    for name, value in wanted.items():
        if isinstance(value, Tensor) and name.startswith(("backbone", "head")):
            assert torch.equal(found[name], value), name
    rows = at_once.accuracy_matrix.accuracy[1:].nan_to_num()
    assert torch.equal(grown.accuracy_matrix.accuracy[1:].nan_to_num(), rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "lstm"])
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # of any recurrent layer
def test_torch_exports_a_task_per_sample(name: str) -> None:
    module = attached(NETWORKS[name]())
    network = module.for_inference()
    batch = torch.export.Dim("batch", min=2)
    sizes = {"inputs": {0: batch}, "tasks": {0: batch}}
    program = torch.export.export(network, (images(), EACH), dynamic_shapes=sizes)
    with torch.no_grad():
        found = program.module()(images(4), EACH[:4])
        torch.testing.assert_close(found, network(images(4), EACH[:4]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [vit, convolutions])
def test_compiled_networks_learn_as_eager_ones(make: Callable[[], nn.Module], fit: Any) -> None:
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        backbone = make()
        if compiled:
            backbone.compile(backend="eager")
        bd = BeneficialPerturbation(4, layers=["norm", "linear", "conv"])
        module, _ = fit([bd], backbone=backbone, stream=small_images())
        found.append(module.network.state_dict())
    torch.compiler.reset()
    for key, value in found[0].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(found[1][key], value)
