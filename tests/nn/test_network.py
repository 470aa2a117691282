"""A network that knows of no trainer: built by hand, copied, and learned from by plain torch."""

import copy
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning import ContinualNetwork
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.tasks import Mask, Task

TASKS = [Task(0, (0, 2), ("ant", "bee"), 1), Task(1, (2, 5), ("cat", "dog", "fox"), 1)]


def built(mask: Mask = "all") -> ContinualNetwork:
    """With bias units whose banks are not 0."""
    torch.manual_seed(0)
    network = ContinualNetwork(MLP([6]), mask)
    network.build(list(TASKS), 5, (1, 3, 3), torch.float32)
    for layer in ("backbone.1", "head"):
        torch.nn.init.normal_(network.attach_bias_units(layer, 2).bank)
    return network.eval()


def by_hand(network: ContinualNetwork, inputs: Tensor, task: int) -> Tensor:
    """Each layer with its task's bias, all columns."""
    first, head = network.linear_layers().values()
    hidden = (inputs.flatten(1) @ first.weight.T + first.bias + first.bias_units.bank[task]).relu()
    return hidden @ head.weight.T + head.bias + head.bias_units.bank[task]


@pytest.mark.parametrize("mask", [mask for mask in get_args(Mask) if mask != "shared"])
def test_it_answers_in_every_mode_as_by_hand(mask: Mask) -> None:
    network, inputs = built(mask), torch.randn(4, 1, 3, 3)
    network.opened = 0
    columns = {"all": [(0, 5)] * 2, "seen": [(0, 2)] * 2, "task": [(0, 2), (2, 5)]}[mask]
    for task, (first, stop) in enumerate(columns):
        wanted = torch.full((4, 5), float("-inf"))
        wanted[:, first:stop] = by_hand(network, inputs, task)[:, first:stop]
        torch.testing.assert_close(network(inputs, task=task), wanted)
        with network.task_mode(task):
            torch.testing.assert_close(network(inputs), wanted)


def test_a_copy_is_whole_and_its_own() -> None:
    network, inputs = built(), torch.randn(4, 1, 3, 3)
    again = copy.deepcopy(network)
    again.load_state_dict(network.state_dict())
    assert again.structure == network.structure
    for task in (0, 1):
        assert torch.equal(again(inputs, task=task), network(inputs, task=task))
    with torch.no_grad():
        again.built_head.bias.add_(1)
    assert not torch.equal(again(inputs, task=0), network(inputs, task=0))


def test_plain_torch_trains_what_tasks_share() -> None:
    network, inputs, targets = built().train(), torch.randn(9, 1, 3, 3), torch.arange(9) % 5
    shared = network.shared_parameters(include_head=True)
    assert set(shared) == {
        "backbone.1.weight", "backbone.1.bias", "head.weight", "head.bias",
    }  # fmt: skip
    banks = {n: b.clone() for n, b in network.named_buffers() if n.endswith("bank")}
    assert len(banks) == 2
    optimizer = torch.optim.SGD(shared.values(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(network(inputs, task=1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, before in banks.items():
        assert torch.equal(network.get_buffer(name), before)


def test_without_a_stream_it_has_no_head() -> None:
    with pytest.raises(ConfigurationError, match="Expected the module to know its stream"):
        ContinualNetwork(MLP([6]))(torch.randn(1, 1, 3, 3))


def test_a_head_that_grows_keeps_its_rows_and_draws_those_of_a_larger_one() -> None:
    def built(tasks: Sequence[Task], classes: int, mask: Mask = "seen") -> ContinualNetwork:
        network = ContinualNetwork(nn.Flatten(), mask)
        network.build(list(tasks), classes, (1, 3, 3), torch.float32, seed=4)
        network.attach_bias_units("head", 2)
        network.attach_keys("head", "binary")
        return network

    three = [Task(k, (2 * k, 2 * k + 2), (f"{k}a", f"{k}b"), 1) for k in range(3)]
    small, large = built(three[:2], 4), built(three, 6)
    assert torch.equal(small.built_head.weight, large.built_head.weight[:4])
    small.opened = small.closed = 1
    small.head.bias_units.bank[:] = 1.0  # type: ignore[union-attr]
    small.head.keys.bank[:] = -1  # type: ignore[union-attr]
    small.accuracy_matrix.update(2, [0.5, 0.25])
    small._grow(three, 6, seed=4)
    assert torch.equal(small.built_head.weight, large.built_head.weight)
    shapes = {
        name: value.shape for name, value in small.state_dict().items() if "extra" not in name
    }
    assert shapes == {n: v.shape for n, v in large.state_dict().items() if "extra" not in n}
    assert small.head.bias_units.bank.tolist() == [[1] * 4 + [0] * 2] * 2 + [[0] * 6]  # type: ignore[union-attr]
    assert small.head.keys.bank[:, 0].tolist() == [-1, -1, 1]  # type: ignore[union-attr]
    assert small.accuracy_matrix.accuracy[2].tolist()[:2] == [0.5, 0.25]
    assert small.accuracy_matrix.accuracy.shape == (4, 3)


@pytest.mark.parametrize(("mask", "opened", "mode", "number"), [
    ("all", 0, 0, 6), ("shared", 0, 0, 6), ("seen", -1, 0, 6), ("seen", 0, 2, 2), ("seen", 1, 0, 4),
    ("task", -1, 0, 2), ("task", 1, 0, 4), ("task", 0, 2, 6),
])  # fmt: skip
def test_open_columns_are_those_of_the_tasks_opened_so_far(
    mask: Mask, opened: int, mode: int, number: int
) -> None:
    network = ContinualNetwork(nn.Flatten(), mask)
    tasks = [Task(k, (2 * k, 2 * k + 2), (f"{k}a", f"{k}b"), 1) for k in range(3)]
    network.build(tasks, 6, (1, 3, 3), torch.float32)
    network.opened = opened
    inputs = torch.randn(5, 1, 3, 3)
    with network.task_mode(mode):
        assert network.num_open == number
        logits = network.all_logits(inputs)
    assert logits.shape == (5, 6)
    assert logits[:, :number].isfinite().all()
    assert logits[:, number:].isneginf().all()
    weight = network.built_head.weight
    assert torch.equal(network.open_part("head.weight", weight), weight[: network.num_open])
    answers = network.for_inference()(inputs, torch.full((5,), mode))
    first, stop = network.columns(mode)
    assert answers[:, first:stop].isfinite().all()
