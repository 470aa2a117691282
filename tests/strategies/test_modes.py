"""Modes that the optimizer trains, against plain loops of torch, against peft, and their bytes by formula."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.costs import bytes_per_task
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.strategies import IA3, BeneficialPerturbation, BitFit, ContinualStrategy, LoRA

ADAM = partial(torch.optim.Adam, lr=0.01)
LAYERS = ["backbone.1", "backbone.3"]  # of MLP([16, 12])
SIZES = [(64, 16), (16, 12)]
CLASSES = 10


class Record(ContinualStrategy):
    """The batches of every task, and what it started from."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.batches: list[list[tuple[Tensor, Tensor]]] = []
        self.heads: list[nn.Module] = []

    def on_task_start(self, host: Any, task: Any) -> None:
        self.batches.append([])
        self.heads.append(deepcopy(host.network.head))

    def loss_terms(self, host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        self.batches[-1].append((batch.inputs.clone(), batch.targets.clone()))
        return {}


class Plain(nn.Module):
    """MLP([16, 12]) and a head, with one parameter per layer and kind of mode, written out."""

    def __init__(self, kind: str, core: nn.Module, head: Any, starts: list[Tensor]) -> None:
        super().__init__()
        self.kind, self.core = kind, deepcopy(core).requires_grad_(False)
        self.weight, self.bias = nn.Parameter(head.weight.clone()), nn.Parameter(head.bias.clone())
        if kind == "lora":
            self.a = nn.ParameterList([start.clone() for start in starts])
            self.b = nn.ParameterList([torch.zeros(out, 2) for _, out in SIZES])
        else:
            value = torch.ones if kind == "ia3" else torch.zeros
            self.own = nn.ParameterList([value(out) for _, out in SIZES])

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for place in range(2):
            layer: Any = self.core[2 * place + 1]  # type: ignore[index]
            y = x @ layer.weight.T + layer.bias
            if self.kind == "bitfit":
                y = y + self.own[place]
            elif self.kind == "ia3":
                y = y * self.own[place]
            else:
                y = y + 4 / 2 * x @ self.a[place].T @ self.b[place].T
            x = y.relu()
        return x @ self.weight.T + self.bias


MADE: dict[str, Callable[[], Any]] = {
    "bitfit": lambda: BitFit(LAYERS),
    "ia3": lambda: IA3(LAYERS),
    "lora": lambda: LoRA(2, alpha=4.0, layers=LAYERS),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_task_on_a_frozen_core_is_a_plain_loop_with_adam(kind: str, fit: Any) -> None:
    record, strategy = Record(), MADE[kind]()
    stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=64, seed=0)
    module, _ = fit(
        [record, strategy],
        stream=stream,
        mask="task",
        train="modes",
        optimizer=ADAM,
        backbone=MLP([16, 12]),
    )
    banks = {name: dict(part.named_buffers()) for name, part in strategy.parts.items()}
    for task in range(2):
        starts = [banks[name]["A_bank"][task] for name in LAYERS] if kind == "lora" else []
        if kind == "lora":  # A moves: take what was drawn
            starts = [drawn(strategy, module, task, name) for name in LAYERS]
        plain = Plain(kind, module.backbone, record.heads[task], starts)
        optimizer = ADAM([p for p in plain.parameters() if p.requires_grad])
        columns = slice(*module.tasks[task].columns)
        for images, targets in record.batches[task]:
            optimizer.zero_grad()
            logits = plain(images)[:, columns]
            F.cross_entropy(logits, targets - columns.start).backward()
            optimizer.step()
        for place, name in enumerate(LAYERS):
            if kind == "lora":
                found, wanted = banks[name]["A_bank"][task], plain.a[place]
                torch.testing.assert_close(
                    banks[name]["B_bank"][task], plain.b[place], rtol=1e-3, atol=1e-5
                )
            elif kind == "ia3":
                found, wanted = 1 + banks[name]["scale_bank"][task], plain.own[place]
            else:
                found, wanted = banks[name]["bank"][task], plain.own[place]
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-5)
            assert wanted.grad is not None


def drawn(strategy: LoRA, module: Any, task: int, name: str) -> Tensor:
    """A as it is at a task's start, in a module that learns no further."""
    part = deepcopy(strategy.parts[name])
    before = strategy.parts
    strategy.parts = {name: part}
    strategy.on_task_start(module.host, module.tasks[task])
    strategy.parts = before
    return part.get_parameter("A").detach()


def test_lora_draws_as_its_authors_do(fit: Any) -> None:
    """Uniform between plus and minus 1 / sqrt(n): kaiming_uniform with a = sqrt(5)."""
    strategy = LoRA(8, layers=["backbone.1"])
    module, _ = fit([strategy])
    a = drawn(strategy, module, 0, "backbone.1")
    assert a.shape == (8, 64)
    assert 0.9 / 8 < a.abs().max() <= 1 / 8
    assert a.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert not torch.equal(a, drawn(strategy, module, 1, "backbone.1"))


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (lambda: BitFit(), 4 * (16 + 12 + CLASSES)),
        (lambda: IA3(), 4 * (16 + 12)),
        (lambda: LoRA(3), 4 * 3 * (64 + 16 + 16 + 12)),
        (lambda: BeneficialPerturbation(5), 4 * (16 + 12 + CLASSES)),
    ],
    ids=["bitfit", "ia3", "lora", "bd"],
)
def test_bytes_of_a_task_by_formula(make: Callable[[], Any], row: int, fit: Any) -> None:
    strategy = make()
    module, _ = fit(
        [strategy],
        stream=SplitDigits(num_tasks=5, epochs_per_task=1, batch_size=200, seed=0),
        backbone=MLP([16, 12]),
        train="modes",
    )
    assert bytes_per_task([strategy], module.host)["measured"] == row
    if isinstance(strategy, BitFit):
        paper = row - 4 * (CLASSES - 2)  # of the head, only the task's outputs
        assert bytes_per_task([strategy], module.host)["paper"] == paper


def test_invalid_arguments_are_refused(fit: Any) -> None:
    with pytest.raises(
        ConfigurationError, match="Expected rank to be a whole number of at least 1"
    ):
        LoRA(0)
    with pytest.raises(ConfigurationError, match="Expected alpha to be a positive number"):
        LoRA(alpha=0.0)
    with pytest.raises(ConfigurationError, match="Expected layers to name at least one layer"):
        IA3([])
    with pytest.raises(
        ConfigurationError, match=r"Expected rank to be 7, as in what layer backbone\.1"
    ):
        fit([BeneficialPerturbation(7), BitFit()])
    with pytest.raises(ConfigurationError, match="but it has none that can have low rank"):
        fit([LoRA()], backbone=nn.Flatten())


# --- peft ----------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.inner = nn.Linear(64, 10)
        self.outer = nn.Linear(10, 6)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images).relu().flatten(1)
        return self.outer(self.inner(hidden).tanh())  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_outputs_and_gradients_are_those_of_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    core, images = Small(), torch.randn(5, 1, 8, 8)
    names = ["conv", "inner", "outer"]
    config = (
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=names)
        if kind == "lora"
        else peft.IA3Config(target_modules=names, feedforward_modules=[])
    )
    reference = peft.get_peft_model(deepcopy(core), config)
    theirs = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for value in theirs.values():
            value.copy_(torch.randn(value.shape))
    stream = SplitDigits(num_tasks=2)
    stream.setup()
    network = ContinualNetwork(core)
    network.build_for(stream, torch.device("cpu"))
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in names:
        if kind == "lora":
            part: Any = network.attach_low_rank(f"backbone.{name}", 2)
            part.scaling = 3 / 2
        else:
            part = network.attach_scales(f"backbone.{name}")
        ours = ["A", "B"] if kind == "lora" else ["scale"]
        suffixes = ["lora_A", "lora_B"] if kind == "lora" else ["ia3_l"]
        found = [next(p for n, p in theirs.items() if f".{name}.{s}" in n) for s in suffixes]
        shift = 1 if kind == "ia3" else 0
        values = {
            own: value.detach().reshape(part.get_parameter(own).shape) - shift
            for own, value in zip(ours, found, strict=True)
        }
        part.start(0, values)
        pairs += [(part.get_parameter(o), value) for o, value in zip(ours, found, strict=True)]
    network.switch(0)
    got, expected = network.backbone(images), reference(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    expected.square().sum().backward()
    for mine, value in pairs:
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, value.grad.reshape(mine.shape), rtol=1e-3, atol=1e-3)
