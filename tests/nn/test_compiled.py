"""Compiled backbones: the same names, the same importances, the same runs as without a compiler."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional.gradients import sample_gradient_sums
from bpn_lightning.functional.records import recorded_forward
from bpn_lightning.functional.segments import segment_gradients
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn import MLP
from bpn_lightning.nn.execution import compiled_in_place, differentiable
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.strategies.bd import BeneficialPerturbation
from bpn_lightning.strategies.ebll import EncoderBasedLifelongLearning
from bpn_lightning.strategies.ewc import EWC
from bpn_lightning.strategies.gem import GradientEpisodicMemory
from bpn_lightning.strategies.imm import IncrementalMomentMatching
from bpn_lightning.strategies.lwf import LearningWithoutForgetting
from bpn_lightning.strategies.mas import MemoryAwareSynapses
from bpn_lightning.strategies.psp import ParameterSuperposition
from bpn_lightning.strategies.slnid import SLNID

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    """Start without graphs of other tests, and leave none."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Backend:
    """Runs graphs as they are, and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())


def wrapped(network: nn.Sequential, backend: Any) -> nn.Module:
    return torch.compile(network, backend=backend)  # type: ignore[return-value]


def in_place(network: nn.Sequential, backend: Any) -> nn.Module:
    network.compile(backend=backend)
    return network


def in_parts(network: nn.Sequential, backend: Any) -> nn.Module:
    part = torch.compile(nn.Sequential(*network[:3]), backend=backend)
    return nn.Sequential(part, *network[3:])  # type: ignore[arg-type]


class Decorated(nn.Module):
    """A forward that is compiled where it is defined."""

    def __init__(self, network: nn.Module, backend: Any) -> None:
        super().__init__()
        self.network = network
        self.forward = torch.compile(self.answer, backend=backend)

    def answer(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.network(inputs)
        return answer


WAYS = {"wrapped": wrapped, "in place": in_place, "in parts": in_parts, "decorated": Decorated}


# --- importances and memories' gradients ---------------------------------------------------------


def labels_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    labels = logits.argmax(1, keepdim=True)
    return labels, torch.ones_like(labels, dtype=logits.dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_of_a_graph_that_is_older_than_the_hooks(way: str, backend: str) -> None:
    plain = mlp()
    network = compiled_in_place(WAYS[way](deepcopy(plain), backend))
    inputs = torch.randn(6, 1, 8, 8)
    with evaluation_mode(network), evaluation_mode(plain):
        for size in (1, 6):  # a graph for one sample, and one for any number
            network(inputs[:size])
        for measure in (torch.square, torch.abs):
            parts = [
                sample_gradient_sums(
                    net,
                    dict(net.named_parameters()),
                    inputs,
                    labels_of,
                    slice(0, 6),
                    measure=measure,
                )
                for net in (plain, network)
            ]
            for expected, found in zip(parts[0].values(), parts[1].values(), strict=True):
                assert expected.any()
                torch.testing.assert_close(found, expected)

        def squares(logits: Tensor, part: slice) -> Tensor:
            return logits.square().sum(1)

        expected, found = (
            segment_gradients(net, dict(net.named_parameters()), inputs, squares, [2, 4])
            for net in (plain, network)
        )
        assert expected.any()
        torch.testing.assert_close(found, expected)


def test_nothing_that_is_to_be_differentiated_runs_in_a_graph() -> None:
    """Not even what is compiled where nobody sees it, which could not be run eagerly by its hooks."""
    backend, network = Backend(), mlp()
    hidden = torch.compile(lambda inputs: network(inputs), backend=backend)
    inputs = torch.randn(3, 1, 8, 8)
    with differentiable(network):
        hidden(inputs)
    assert backend.runs == 0
    hidden(inputs)
    assert backend.runs == 1


def test_records_that_a_graph_does_not_give_are_missed() -> None:
    """Whatever runs a network without its layers' hooks: a graph reaches the parameters, no record does."""
    network = mlp()
    compiled = torch.compile(network, backend="eager")
    inputs = torch.randn(3, 1, 8, 8)
    compiled(inputs)
    parameters = dict(compiled.named_parameters())  # type: ignore[attr-defined]
    assert recorded_forward(compiled, parameters, inputs) is None  # type: ignore[arg-type]
    assert recorded_forward(network, dict(network.named_parameters()), inputs) is not None


# --- whole runs ----------------------------------------------------------------------------------

RUNS: dict[str, Callable[[], list[ContinualStrategy]]] = {
    "ewc": lambda: [EWC(strength=10.0)],
    "mas": lambda: [MemoryAwareSynapses(strength=1.0)],
    "gem": lambda: [GradientEpisodicMemory(8)],
    "bd+psp": lambda: [BeneficialPerturbation(4), ParameterSuperposition()],
    "slnid": lambda: [SLNID()],
    "ebll": lambda: [EncoderBasedLifelongLearning(code_size=3)],
    "imm": lambda: [IncrementalMomentMatching(drop=0.5)],
    "lwf": lambda: [LearningWithoutForgetting()],
}
#: Those that keep hooks on the backbone while it trains, which then runs eagerly.
LISTENING = ("slnid", "ebll", "imm")


@pytest.mark.parametrize("method", RUNS)
def test_a_run_is_the_same_with_a_compiled_backbone(fit: Any, method: str) -> None:
    backend = Backend()

    def learned(backbone: nn.Module) -> tuple[ContinualModule, dict[str, Any]]:
        stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=128, seed=0)
        strategies = RUNS[method]()
        mask = "task" if method == "ebll" else "all"
        module, _ = fit(strategies, backbone=backbone, stream=stream, mask=mask)
        return module, strategies[0].state_dict()

    plain, state = learned(mlp())
    compiled = wrapped(mlp(), backend)
    compiled(torch.randn(4, 1, 8, 8))  # a graph from before anything was attached
    module, compiled_state = learned(compiled)
    assert backend.runs > 10 or method in LISTENING
    assert torch.equal(module.accuracy_matrix.accuracy, plain.accuracy_matrix.accuracy)
    torch.testing.assert_close(dict(module.named_parameters()), dict(plain.named_parameters()))
    torch.testing.assert_close(compiled_state, state)


def test_layers_that_find_their_size_at_the_first_forward(fit: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=512, seed=0)
    compiled = torch.compile(MLP([8]), backend="eager")
    module, _ = fit([BeneficialPerturbation(4)], backbone=compiled, stream=stream)
    plain, _ = fit([BeneficialPerturbation(4)], backbone=MLP([8]), stream=stream)
    torch.testing.assert_close(module.state_dict(), plain.state_dict())


def test_a_checkpoint_of_a_compiled_network_is_one_of_the_network(fit: Any, tmp_path: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=128, seed=0)
    module, trainer = fit(
        [BeneficialPerturbation(4, layers=["backbone.1"])],
        backbone=wrapped(mlp(), "eager"),
        stream=stream,
    )
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ContinualModule.load_from_checkpoint(tmp_path / "a.ckpt", backbone=mlp()).eval()
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for task in range(2):
            found = module.eval()(images, task=task)
            torch.testing.assert_close(found, loaded(images, task=task))


# --- compiled in place ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_graphs_run_but_where_hooks_are(way: str) -> None:
    backend, seen = Backend(), []
    network = compiled_in_place(WAYS[way](mlp(), backend))
    assert not any("_orig_mod" in name for name, _ in network.named_modules())
    inputs = torch.randn(3, 1, 8, 8)
    expected = mlp()(inputs)
    torch.testing.assert_close(network(inputs), expected)
    assert backend.runs == 1
    part = next(p for p in network.modules() if isinstance(p, nn.ReLU))
    handle = part.register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(network(inputs), expected)
    assert (backend.runs, len(seen)) == (1, 1)
    handle.remove()
    torch.testing.assert_close(network(inputs), expected)
    assert (backend.runs, len(seen)) == (2, 1)


def test_a_network_that_is_not_compiled_is_left_alone() -> None:
    network = mlp()
    assert compiled_in_place(network) is network
    assert all(part._compiled_call_impl is None for part in network.modules())


def test_a_copy_of_a_compiled_network_is_independent() -> None:
    network = compiled_in_place(wrapped(mlp(), "eager"))
    inputs = torch.randn(3, 1, 8, 8)
    copied = deepcopy(network)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(inputs).any()
    assert network(inputs).any()


def test_twice_is_as_once() -> None:
    backend = Backend()
    network = wrapped(mlp(), backend)
    compiled_in_place(compiled_in_place(network))(torch.randn(2, 1, 8, 8))
    assert backend.runs == 1


def test_a_compiled_module_is_refused(fit: Any, tmp_path: Any) -> None:
    from lightning.pytorch import Trainer

    module = torch.compile(ContinualModule(mlp()), backend="eager")
    trainer = Trainer(
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    with pytest.raises(ConfigurationError, match=r"ContinualModule\(torch\.compile\(backbone\)\)"):
        trainer.fit(module, SplitDigits(num_tasks=2))
