"""Dark experience replay against losses written out sample by sample, and logits taken again."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bpn_lightning.costs import Bytes, measured_bytes
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.der import DarkExperienceReplay

STREAM = {"num_tasks": 3}
MASKS = ["all", "seen", "task", "shared"]


def stream_of(mask: str) -> dict[str, Any]:
    return {**STREAM, "domain_incremental": mask == "shared"}


def active(run: Any, task: int, mask: str) -> range:
    """The columns that take part when a task's samples are stored."""
    if mask == "task":
        return range(*run.module.tasks[task].columns)
    if mask == "seen":
        return range(run.module.tasks[task].columns[1])
    return range(run.module.network.structure.num_classes)


def drawn(der: Any, run: Any, number: int, what: str) -> list[int]:
    """Indices by hand: random orders, from where the draws are."""
    size, seed, opened = len(der.memory), run.stream.seed, run.module.opened
    rounds = (der.draws + number) // size + 1
    order = [
        index
        for one in range(rounds)
        for index in torch.randperm(
            size, generator=seeded_generator("der", what, seed, opened, one)
        ).tolist()
    ]
    return order[der.draws :][:number]


def one_sample(run: Any, der: Any, row: int) -> tuple[Tensor, int, int]:
    """The logits of a sample of the memory now, unmasked, its label and its task."""
    host = run.module.host
    batch = der.samples(host, torch.tensor([row]))
    task = int(batch.task)
    with torch.no_grad(), host.network.task_mode(task):
        return host.network.open_logits(batch.inputs)[0], int(batch.targets), task


@pytest.mark.parametrize("mask", MASKS)
def test_the_loss_is_the_papers_sample_by_sample(learn: Any, mask: str) -> None:
    der = DarkExperienceReplay(25, alpha=0.3, beta=0.7)
    run = learn(der, mask=mask, stream=stream_of(mask))
    host = run.module.host
    batch = next(iter(host.batches(2, "train")))
    number = len(batch.targets)
    rows = {what: drawn(der, run, number, what) for what in ("logits", "labels")}
    assert rows["logits"] != rows["labels"]
    before = der.draws
    der.training_batch(host, batch)
    assert der.draws == before + number
    terms = {k: v.detach() for k, v in der.loss_terms(host, batch, torch.empty(0)).items()}
    starts = [0, der.memory.sizes[0], sum(der.memory.sizes[:2])]
    for index, row in enumerate(rows["logits"]):
        now, _, task = one_sample(run, der, row)
        columns = list(active(run, task, mask))
        stored = der.logits[task][row - starts[task]]
        assert len(stored) == len(columns)
        error = sum(float(now[c] - z) ** 2 for c, z in zip(columns, stored, strict=True))
        assert float(terms["der_logits"][index]) == pytest.approx(
            0.3 * error / len(columns), rel=1e-4, abs=1e-6
        )
    for index, row in enumerate(rows["labels"]):
        now, label, task = one_sample(run, der, row)
        columns = list(range(*run.module.network.columns(task)))
        loss = F.cross_entropy(now[columns][None], torch.tensor([columns.index(label)]))
        assert float(terms["der_labels"][index]) == pytest.approx(0.7 * float(loss), rel=1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_what_is_stored_are_the_logits_at_the_end_of_a_samples_task(
    prepare: Any, watch: Any, mask: str
) -> None:
    """Those of the network that the next task starts from; kept ones stay as they are."""
    der, stored = DarkExperienceReplay(40), {}

    def note(host: Any, task: Any) -> None:
        if task.id == 0:
            return
        last = task.id - 1
        rows = (der.memory.tasks() == last).nonzero().flatten()
        columns = active(run, last, mask)
        with torch.no_grad(), evaluation_mode(host.network), host.network.task_mode(last):
            logits = host.network.open_logits(der.samples(host, rows).inputs)
        found = logits[:, columns.start : columns.stop]
        torch.testing.assert_close(der.logits[last], found, rtol=1e-5, atol=1e-6)
        for image, target, values in zip(
            der.memory.inputs[rows], der.memory.targets[rows], der.logits[last], strict=True
        ):
            stored[image.numpy().tobytes(), int(target)] = values.clone()

    run = prepare(der, watch(start=note), mask=mask, stream=stream_of(mask))
    run.fit()
    assert [len(logits) for logits in der.logits] == der.memory.sizes
    places = der.memory.tasks()
    logits = [values for of_task in der.logits for values in of_task]
    known = 0
    for image, target, task, values in zip(
        der.memory.inputs, der.memory.targets, places, logits, strict=True
    ):
        if task < 2:
            assert torch.equal(stored[image.numpy().tobytes(), int(target)], values)
            known += 1
    assert known > 10


def test_where_nothing_has_changed_yet_only_labels_have_a_loss(prepare: Any, watch: Any) -> None:
    der, terms = DarkExperienceReplay(20), []

    def note(host: Any, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        if len(der.memory) and not terms:
            terms.append(der.logit_errors(host, torch.arange(len(der.memory))).detach())
        return {}

    prepare(der, watch(terms=note)).fit()
    torch.testing.assert_close(terms[0], torch.zeros(20), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("alpha", "beta", "names"),
    [(1.0, 0.0, {"der_logits"}), (0.0, 1.0, {"der_labels"}), (0.0, 0.0, set())],
)
def test_a_weight_of_0_is_a_term_less(learn: Any, alpha: float, beta: float, names: Any) -> None:
    der = DarkExperienceReplay(20, alpha=alpha, beta=beta)
    run = learn(der)
    batch = next(iter(run.module.host.batches(1, "train")))
    der.training_batch(run.module.host, batch)
    assert set(der.loss_terms(run.module.host, batch, torch.empty(0))) == names


def test_without_weights_it_is_fine_tuning_bit_for_bit(learn: Any, same: Any) -> None:
    run, plain = (
        learn(*strategies, stream=STREAM)
        for strategies in ([DarkExperienceReplay(20, alpha=0, beta=0)], [])
    )
    same(run.weights(), plain.weights())
    assert str(run.random) == str(plain.random)


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
def test_logits_of_a_forgotten_tasks_classes_are_not_compared(learn: Any, mask: str) -> None:
    der = DarkExperienceReplay(30)
    run = learn(der, mask=mask, stream=STREAM)
    rows = (der.memory.tasks() == 2).nonzero().flatten() - der.memory.sizes[0]
    errors = der.logit_errors(run.module.host, rows + der.memory.sizes[0]).detach()
    stored = der.logits[2].clone()
    for_all = len(active(run, 2, mask))
    run.module.forget(0)
    assert der.memory.sizes[0] == len(der.logits[0]) == 0
    (rows,) = ((der.memory.tasks() == 2).nonzero().flatten(),)
    if mask != "task":
        assert der.logits[2][:, :2].isnan().all()
        assert torch.equal(der.logits[2][:, 2:], stored[:, 2:])
    der.logits[2][:, -1] += 1
    found = der.logit_errors(run.module.host, rows).detach()
    compared = for_all - (0 if mask == "task" else 2)
    torch.testing.assert_close(found, torch.full_like(found, 1 / compared), rtol=1e-3, atol=1e-5)
    assert errors.max() < 1e-6


def test_bytes_are_those_of_images_labels_and_logits(learn: Any) -> None:
    der = DarkExperienceReplay(50)
    run = learn(der, mask="seen")
    first, second = der.memory.sizes
    wanted = Bytes(50 * (64 + 8) + 4 * (2 * first + 4 * second), 0)
    assert measured_bytes(der, run.module.host) == wanted
    assert der.declared_bytes(run.module.host).held == wanted
    assert der.declared_bytes(run.module.host).per_task == 50 * (64 + 8 + 4 * 4) // 2


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Expected {name} to be 0 or a positive number"):
        DarkExperienceReplay(**{name: -1.0})
