"""What every fitted gate promises: sums, restarts, rows that stay, bytes, processes and a real fit."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import seed_everything
from torch import Tensor

from bpn_lightning.costs import measured_bytes
from bpn_lightning.datamodules.digits import SplitDigits
from bpn_lightning.model.host import Host
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.nn.backbones import MLP
from bpn_lightning.strategies.gates.features import FeatureGate
from bpn_lightning.strategies.gates.fecam import FeCAM
from bpn_lightning.strategies.gates.ncm import NearestClassMean
from bpn_lightning.strategies.gates.ppca import ProbabilisticPCA
from bpn_lightning.strategies.gates.ranpac import RanPAC
from bpn_lightning.strategies.gates.slda import SLDA
from bpn_lightning.tasks import Task

Learn = Callable[..., FeatureGate]
Digits = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

#: With everything given, so that nothing has to be held out.
GIVEN: dict[str, Callable[..., FeatureGate]] = {
    "ncm": NearestClassMean,
    "slda": lambda **more: SLDA(0.1, **more),
    "fecam": FeCAM,
    "ppca": lambda **more: ProbabilisticPCA(6, **more),
    "ranpac": lambda **more: RanPAC(80, 1.0, **more),
}
CHOSEN = GIVEN | {"slda": SLDA, "ranpac": lambda **more: RanPAC(80, **more)}
every_gate = pytest.mark.parametrize("name", GIVEN)


def assert_close(one: FeatureGate, other: FeatureGate, x: Tensor, tolerance: float = 1e-4) -> None:
    found = [gate.task_log_probabilities(x) for gate in (one, other)]
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


# --- sums ----------------------------------------------------------------------------------------


@every_gate
def test_order_and_division_of_samples_do_not_matter(
    name: str, learn: Learn, digits: Digits, task: Callable[..., Task]
) -> None:
    (x, y), (held, _) = digits
    parts = GIVEN[name](held_out=0)
    for number in range(5):
        own = task(number, (2 * number, 2 * number + 2))
        mine = (y // 2 == number).nonzero()[:, 0]
        for part in mine[torch.randperm(len(mine))].split(17):
            parts.add(own, x[part], y[part])
        parts.finish()
    assert_close(learn(GIVEN[name](held_out=0), x, y), parts, held)


@every_gate
def test_samples_that_come_twice_change_nothing(name: str, learn: Learn, digits: Digits) -> None:
    """All divide by how many samples there are; RanPAC's ridge is relative to their number."""
    (x, y), (held, _) = digits
    once = learn(GIVEN[name](held_out=0), x, y)
    twice = GIVEN[name](held_out=0)
    if isinstance(twice, RanPAC):
        twice.ridge = 2.0
    assert_close(once, learn(twice, x.repeat(2, 1), y.repeat(2)), held)


@every_gate
def test_held_out_samples_are_in_the_final_rows(name: str, learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    whole, divided = learn(GIVEN[name](held_out=0), x, y), learn(GIVEN[name](), x, y)
    torch.testing.assert_close(
        whole.log_scores(held), divided.log_scores(held), rtol=1e-3, atol=1e-3
    )


# --- tasks ---------------------------------------------------------------------------------------


@every_gate
@pytest.mark.parametrize("per", ["class", "task"])
def test_rows_of_old_tasks_stay_bit_for_bit(
    name: str, learn: Learn, digits: Digits, per: Any
) -> None:
    (x, y), _ = digits
    gate = learn(CHOSEN[name](per=per), x, y, tasks=[0, 1])
    before = {key: value.clone() for key, value in gate.rows.items()}
    rows = len(gate.row_tasks)
    learn(gate, x, y, tasks=[2])
    assert len(gate.row_tasks) == (6 if per == "class" else 3)
    # What all rows share, and weights that are solved for all of them together, are of all tasks.
    shared = {"whitening", "log_determinant"} if name == "slda" else {"weights"}
    for key in before.keys() - shared:
        assert torch.equal(gate.rows[key][:rows], before[key])


def test_the_order_of_tasks_does_not_matter(learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    one, other = learn(SLDA(0.1), x, y), learn(SLDA(0.1), x, y, tasks=[3, 0, 4, 2, 1])
    scores = [gate.log_scores(held)[:, gate.class_columns.argsort()] for gate in (one, other)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-3)
    assert torch.equal(one.own_columns(held), other.own_columns(held))


def test_tasks_that_share_their_classes_have_rows_of_their_own(
    learn: Learn, digits: Digits, task: Callable[..., Task]
) -> None:
    """As permuted pixels do: the likeliest row says both which permutation and which class."""
    (x, y), (held, labels) = digits
    permutation = torch.randperm(64)
    gate = ProbabilisticPCA(8)
    for number, features in enumerate((x, x[:, permutation])):
        gate.add(task(number, (0, 10)), features, y)
        gate.finish()
    for number, features in enumerate((held, held[:, permutation])):
        assert (gate.tasks(features) == number).double().mean() > 0.95
        assert (gate.own_columns(features) == labels).double().mean() > 0.95


def test_one_task_is_the_only_one_to_name(learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    gate = learn(SLDA(), x, y, tasks=[0])
    assert gate.temperature == 1
    torch.testing.assert_close(gate.task_log_probabilities(held), torch.zeros(len(held), 1))


def test_a_class_may_have_one_sample(digits: Digits, task: Callable[..., Task]) -> None:
    (x, y), _ = digits
    for gate in (NearestClassMean(), SLDA(0.5), RanPAC(40, 1.0)):
        gate.add(task(0, (0, 10)), x, y)
        gate.finish()
        gate.add(Task(1, (10, 12), ("ten", "eleven"), 1), torch.eye(64)[:2], torch.tensor([10, 11]))
        gate.finish()
        assert gate.log_scores(x).isfinite().all()
        # One sample among 90 is little to a regression.
        if not isinstance(gate, RanPAC):
            assert gate.own_columns(torch.eye(64)[:2]).tolist() == [10, 11]


# --- projection ----------------------------------------------------------------------------------


def test_projection_is_of_the_seed_and_the_name_and_never_stored(
    learn: Learn, digits: Digits
) -> None:
    (x, y), (held, _) = digits

    def scores(seed: int, **more: Any) -> Tensor:
        gate = SLDA(0.1, project=16, **more)
        gate.seed = seed
        assert all(64 not in value.shape for value in learn(gate, x, y).rows.values())
        return gate.log_scores(held)

    assert torch.equal(scores(0), scores(0))
    assert not torch.allclose(scores(0), scores(1))
    assert not torch.allclose(scores(0), scores(0, name="another"))


def test_projection_keeps_distances(digits: Digits) -> None:
    """Johnson and Lindenstrauss: to a few percent in many dimensions."""
    (x, _), _ = digits
    gate = NearestClassMean(project=2000)
    moved = gate._projected(x[:50])
    ratio = torch.pdist(moved) / torch.pdist(x[:50])
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 0.03


@every_gate
def test_half_precision_around_it_changes_nothing(name: str, learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    gate = learn(CHOSEN[name](project=20), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gate.log_scores(held)
    assert torch.equal(inside, gate.log_scores(held))


# --- restarts and costs --------------------------------------------------------------------------


@every_gate
def test_a_restart_between_tasks_is_exact(name: str, learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    make = lambda: CHOSEN[name](project=20)
    whole = learn(make(), x, y)
    half, file = learn(make(), x, y, tasks=[0, 1]), io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.log_scores(held), half.log_scores(held))
    learn(other, x, y, tasks=[2, 3, 4])
    assert torch.equal(other.log_scores(held), whole.log_scores(held))
    assert other.temperature == whole.temperature


@every_gate
@pytest.mark.parametrize("per", ["class", "task"])
@pytest.mark.parametrize("tasks", [[], [0, 1, 2]])
def test_declared_bytes_are_those_that_it_holds(
    name: str, learn: Learn, digits: Digits, per: Any, tasks: list[int]
) -> None:
    (x, y), _ = digits
    gate = learn(CHOSEN[name](per=per, project=20), x, y, tasks=tasks)
    declared = gate.declared_bytes(None)  # type: ignore[arg-type]
    assert declared.held == measured_bytes(gate, None)
    before = sum(value.numel() * 4 for value in gate.rows.values())
    learn(gate, x, y, tasks=[3])
    after = sum(value.numel() * 4 for value in gate.rows.values())
    assert declared.per_task == (after - before if tasks else 0)


def test_reset_forgets_every_task(learn: Learn, digits: Digits) -> None:
    (x, y), (held, _) = digits
    gate = SLDA()
    first = learn(gate, x, y).log_scores(held)
    gate.reset()
    assert torch.equal(learn(gate, x, y).log_scores(held), first)


# --- in a fit ------------------------------------------------------------------------------------


def scores_after(names: list[str], devices: int) -> list[Any]:
    """Scores of test images, the temperature and what was chosen, after a fit with gates."""
    seed_everything(0, verbose=False)
    # 61 to 190 samples of a task in batches of 33: uneven shards.
    stream = SplitDigits(num_tasks=3, epochs_per_task=1, batch_size=33, eval_batch_size=101, seed=2)
    gates = [CHOSEN[name]() for name in names]
    trainer_of(devices, list(gates)).fit(ContinualModule(MLP([8])), stream)
    images = [torch.cat([b.inputs for b in stream_batches(task)]) for task in range(3)]
    x = torch.cat(images).flatten(1)
    return [[gate.log_scores(x), gate.temperature, gate.chosen or 0.0] for gate in gates]


def stream_batches(task: int) -> list[Any]:
    """A task's test images, as a single process reads them."""
    stream = SplitDigits(num_tasks=3)
    stream.setup()
    return [stream.prepare(batch) for batch in stream.loader(task, "test")]


def test_two_processes_fit_what_one_fits(ranks: Any) -> None:
    names = list(CHOSEN)
    first, second = ranks(scores_after, names, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, scores_after(names, 1), rtol=1e-5, atol=1e-3)


@every_gate
def test_a_gate_is_fitted_by_a_fit(name: str, fit: Callable[..., Any], learn: Learn) -> None:
    stream = SplitDigits(num_tasks=5, epochs_per_task=1, batch_size=64, seed=3)
    gate = CHOSEN[name]()
    module, _ = fit([gate], stream=stream)
    assert gate.row_tasks == sorted([*range(5)] * 2)
    assert gate.seed == 3
    alone = CHOSEN[name]()
    alone.seed = 3
    everything = [list(module.host.batches(task, "train")) for task in range(5)]
    x = torch.cat([batch.inputs for batches in everything for batch in batches]).flatten(1)
    y = torch.cat([batch.targets for batches in everything for batch in batches])
    learn(alone, x, y, size=2)
    scores = [one.log_scores(x[:50]) for one in (gate, alone)]
    if name not in ("slda", "ranpac"):  # those draw other samples to choose with
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-3)
    right = (gate.tasks(x) == y // 2).double().mean()
    assert right > 0.8


def test_a_task_is_read_once(fit: Callable[..., Any], monkeypatch: Any) -> None:
    """Its samples go through the front each time, which may cost more than all the rest."""
    read: list[tuple[int, str]] = []
    gate_batches = Host.gate_batches

    def counted(host: Host, task_id: int, split: Any) -> Any:
        read.append((task_id, split))
        return gate_batches(host, task_id, split)

    monkeypatch.setattr(Host, "gate_batches", counted)
    gate = SLDA()
    fit([gate], stream=SplitDigits(num_tasks=3, epochs_per_task=1))
    assert [task for task, split in read if split == "train"] == [0, 1, 2]
    assert gate.temperature != 1


def test_a_gate_changes_nothing_of_what_is_learned(fit: Callable[..., Any]) -> None:
    plain, _ = fit([])
    gated, _ = fit([SLDA(), ProbabilisticPCA(4)])
    torch.testing.assert_close(plain.state_dict(), gated.state_dict(), rtol=0, atol=0)
