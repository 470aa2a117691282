"""A frozen core: what tasks share does not move, and neither do the logits of old tasks in their columns."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.random_state import random_state
from bpn_lightning.strategies import (
    EWC,
    IA3,
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    BitFit,
    ContinualStrategy,
    EncoderBasedLifelongLearning,
    FineTuning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    IndependentNetworks,
    JointTraining,
    LearningWithoutForgetting,
    LoRA,
    MemoryAwareSynapses,
    NearestClassMean,
    ParameterSuperposition,
    SynapticIntelligence,
)

Fit = Callable[..., Any]


def network() -> nn.Module:
    """With all that may move unseen: running statistics, dropout, a weight with buffers of its own."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 12)),
        nn.ReLU(),
    )


def digits(**arguments: Any) -> SplitDigits:
    return SplitDigits(
        **{"num_tasks": 3, "epochs_per_task": 1, "batch_size": 64, "seed": 0, **arguments}
    )


class Kept(ContinualStrategy):
    """What is shared after every task, and each task's logits in its own columns from then on."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.shared: list[dict[str, Tensor]] = []
        self.optimized: list[int] = []
        self.frozen: list[list[bool]] = []
        self.inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.logits: list[list[Tensor]] = []

    def on_task_end(self, host: Any, task: Any) -> None:
        state = host.network.backbone.state_dict().items()
        self.shared.append({n: v.clone() for n, v in state if isinstance(v, Tensor)})
        names = dict(host.network.backbone.named_parameters())
        self.frozen.append([not p.requires_grad and p.grad is None for p in names.values()])
        groups = host.trainer.optimizers[0].param_groups
        self.optimized.append(sum(len(group["params"]) for group in groups))
        modes = []
        host.network.eval()
        for one in host.network.tasks[: task.id + 1]:
            with torch.no_grad(), host.network.task_mode(one.id):
                modes.append(host.network.all_logits(self.inputs)[:, slice(*one.columns)].clone())
        host.network.train()
        host.core.set_flags(training=False)
        self.logits.append(modes)


def own(name: str) -> bool:
    return ".bias_units." in name or ".adapters." in name


METHODS: dict[str, Callable[[], Sequence[Callback]]] = {
    "finetune": lambda: [FineTuning()],
    "bd": lambda: [BeneficialPerturbation(4)],
    "bd+ewc": lambda: [BeneficialPerturbation(4), EWC(10.0)],
    "bitfit": lambda: [BitFit()],
    "ia3": lambda: [IA3()],
    "lora": lambda: [LoRA(2)],
    "psp": lambda: [ParameterSuperposition()],
    "gem": lambda: [GradientEpisodicMemory(8)],
    "agem": lambda: [AveragedGEM(8)],
    "si": lambda: [SynapticIntelligence(1.0)],
    "mas": lambda: [MemoryAwareSynapses(1.0)],
    "ncm": lambda: [NearestClassMean()],
}


@pytest.mark.filterwarnings("ignore:.*is expected to forget")
@pytest.mark.filterwarnings("ignore:GradientEpisodicMemory projects")
@pytest.mark.filterwarnings("ignore:AveragedGEM projects")
@pytest.mark.parametrize("reset_optimizer", ["always", "never"])
@pytest.mark.parametrize("mask", ["all", "seen", "task"])
@pytest.mark.parametrize("method", METHODS)
def test_after_the_first_task_only_modes_move(
    method: str, mask: str, reset_optimizer: str, fit: Fit
) -> None:
    kept, made = Kept(), METHODS[method]()
    proximal = method == "bd+ewc"
    momentum = 0.0 if proximal else 0.9
    module, trainer = fit(
        [kept, *made],
        stream=digits(reset_optimizer=reset_optimizer),
        mask=mask,
        backbone=network(),
        train="modes",
        train_first="all",
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=momentum, weight_decay=0.01),
    )
    first, *later = kept.shared
    for shared in later:
        moved = [n for n, v in first.items() if not own(n) and not torch.equal(v, shared[n])]
        assert not moved
    ends = kept.logits
    for task in range(3):
        for after in range(task + 1, 3):
            # A product with more columns may round the others differently, whatever is in them.
            rounding = 0.0 if mask == "all" else 1e-6
            torch.testing.assert_close(
                ends[task][task], ends[after][task], rtol=rounding, atol=rounding
            )
    initial = network_of_seed()
    assert not torch.equal(first["1.weight"], initial["1.weight"]), "the first task learns it whole"
    module.eval()
    for task in module.tasks:  # also after the last one was merged, evaluated and logged
        assert torch.equal(
            module(kept.inputs, task=task.id)[:, slice(*task.columns)], ends[2][task.id]
        )
    shared_names = [
        f"backbone.{n}" for n, _ in module.network.backbone.named_parameters() if not own(n)
    ]
    parameters = dict(module.network.named_parameters())
    states = trainer.optimizers[0].state
    for name in shared_names:
        assert not parameters[name].requires_grad
        assert parameters[name].grad is None
        assert parameters[name] not in states
        held = [list(s.state_dict().get("importance", ())) for s in made]
        assert not any(name in names for names in held)
    assert kept.optimized[-1] < kept.optimized[0]
    assert all(part.training for part in module.network.backbone.modules()) is False  # in eval now


def network_of_seed() -> dict[str, Tensor]:
    """The weights that the fixture's fit starts from."""
    seed_everything(0, verbose=False)
    return network().state_dict()


def test_from_the_start(fit: Fit) -> None:
    """Nothing shared is ever trained: what is learned are biases and rows of the head."""
    backbone = network()
    before = {n: v.clone() for n, v in backbone.state_dict().items() if isinstance(v, Tensor)}
    module, _ = fit(
        [BeneficialPerturbation(4)],
        stream=digits(),
        backbone=backbone,
        train="modes",
        optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    )
    after = module.network.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert float(module.accuracy_matrix.summary()["after_learning"]["average"]) > 0.5
    assert all(part.training for part in module.network.backbone.modules())


def test_a_head_that_tasks_share_is_frozen_too(fit: Fit) -> None:
    heads = []

    class Heads(ContinualStrategy):
        def on_task_end(self, host: Any, task: Any) -> None:
            heads.append(host.network.head.weight.detach().clone())

    stream = digits(domain_incremental=True)
    module, _ = fit(
        [BeneficialPerturbation(4), Heads()],
        stream=stream,
        mask="shared",
        train="modes",
        train_first="all",
    )
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
    banks = module.network.head.bias_units.bank
    assert (banks != 0).any(1).all()


def test_answers_with_newer_classes_are_counted(fit: Fit) -> None:
    stream = digits()
    module, _ = fit([FineTuning()], stream=stream, train="modes", train_first="all", lr=0.5)
    images = {t: list(stream.loader(t, "test")) for t in range(3)}
    module.eval()
    wanted = []
    for task, batches in images.items():
        answers = torch.cat([module.predict(b.inputs, task=task).argmax(1) for b in batches])
        later = [int(a) for a in answers if a > max(module.tasks[task].columns) - 1]
        wanted.append(len(later) / len(answers))
    assert module.overtaken == pytest.approx(wanted)
    assert wanted[0] > 0
    assert wanted[2] == 0
    module, _ = fit([FineTuning()], stream=digits(), mask="task", train="modes", train_first="all")
    assert module.overtaken == []


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (IndependentNetworks, "works on the shared weights"),
        (IncrementalMomentMatching, "works on the shared weights"),
        (LearningWithoutForgetting, "works on the shared weights"),
        (EncoderBasedLifelongLearning, "works on the shared weights"),
        (SLNID, "works on the shared weights"),
        (JointTraining, "trains on other tasks' data"),
    ],
)
def test_what_needs_the_core_is_refused_by_name(strategy: Any, why: str, fit: Fit) -> None:
    expected = f"Expected train to be 'all' with {strategy.__name__}, which {why}, but got 'modes'"
    with pytest.raises(ConfigurationError, match=expected):
        fit([strategy()], mask="task", train="modes", train_first="all")


def test_bad_arguments_are_refused(fit: Fit) -> None:
    with pytest.raises(
        ConfigurationError, match="Expected train to be one of all, modes, head, but got 'mod"
    ):
        ContinualModule(network(), train="mode")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Expected train_first to be 'all' where train is"):
        ContinualModule(network(), train_first="modes")
    stream = digits(domain_incremental=True)
    with pytest.raises(ConfigurationError, match="Expected something to train where train is"):
        fit([FineTuning()], stream=stream, mask="shared", train="modes")


# --- the head alone, and learning rates of their own -----------------------------------------------


def test_the_head_alone_is_what_modes_are_without_modes(fit: Fit) -> None:
    core, found = network(), []
    for train in ("head", "modes"):
        module, trainer = fit(
            [FineTuning()], stream=digits(), mask="task", backbone=deepcopy(core), train=train
        )
        found.append({n: v for n, v in module.state_dict().items() if isinstance(v, Tensor)})
        trained = [p.shape for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert trained == [(6, 12), (6,)]  # of three tasks of two classes
    assert same(*found)
    assert same({n: found[0][f"network.backbone.{n}"] for n in tensors(core)}, tensors(core))


def tensors(part: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in part.state_dict().items() if isinstance(value, Tensor)}


def test_modes_are_refused_where_the_head_alone_trains(fit: Fit) -> None:
    with pytest.raises(
        ConfigurationError, match="Expected train to be 'modes' with strategies that"
    ):
        fit([BitFit()], train="head")
    with pytest.raises(
        ConfigurationError, match="Expected something to train where train is 'head'"
    ):
        fit([FineTuning()], stream=digits(domain_incremental=True), mask="shared", train="head")
    with pytest.raises(
        ConfigurationError, match="Expected train_first to be 'all' where train is 'mo"
    ):
        ContinualModule(network(), train="modes", train_first="head")


def end(fit: Fit, **options: Any) -> dict[str, Tensor]:
    """What BitFit learns from the first task of digits, by SGD with rate 0.1."""
    module, trainer = fit(
        [BitFit()], stream=digits(num_tasks=2), backbone=MLP([16]), mask="task", lr=0.1, **options
    )
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    return {**dict(module.network.named_parameters()), "rates": torch.tensor(rates)}


def test_groups_of_one_rate_are_no_groups(fit: Fit) -> None:
    alike = end(fit, group_lr={"core": 0.1, "modes": 0.1, "head": 0.1})
    plain = end(fit)
    assert plain.pop("rates").tolist() == pytest.approx([0.1])
    assert alike.pop("rates").tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert same(alike, plain)


def test_a_group_moves_by_its_rate(fit: Fit) -> None:
    start = end(fit, group_lr={"core": 0.0, "modes": 0.0, "head": 0.0})
    still = end(fit, group_lr={"core": 0.0, "modes": 0.0})
    moved = [n for n, value in start.items() if n != "rates" and not torch.equal(value, still[n])]
    assert moved == ["head.weight", "head.bias"]
    only = end(fit, group_lr={"modes": 0.5, "head": 0.0}, train="modes")
    moved = [n for n, value in start.items() if n != "rates" and not torch.equal(value, only[n])]
    assert moved == ["backbone.1.bias_units.W", "head.bias_units.W"]
    assert only["rates"].tolist() == [0.5, 0.0]


@pytest.mark.parametrize("reset_optimizer", ["always", "never"])
def test_lightning_logs_rates_by_the_names_of_groups(reset_optimizer: str, fit: Fit) -> None:
    """Also where the first task has a group that later tasks have not."""
    rates: dict[str, list[float]] = {}

    class Log(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            for name, value in metrics.items():
                if name.startswith("lr-"):
                    rates.setdefault(name, []).append(value)

    fit(
        [BitFit(), LearningRateMonitor(logging_interval="step")],
        stream=digits(num_tasks=2, reset_optimizer=reset_optimizer),
        backbone=MLP([16]),
        train="modes",
        train_first="all",
        group_lr={"modes": 0.5},
        trainer={"logger": Log("."), "log_every_n_steps": 1},
    )
    assert {name: set(values) for name, values in rates.items()} == {
        "lr-SGD/core": {0.05},
        "lr-SGD/modes": {0.5},
        "lr-SGD/head": {0.05},
    }
    if reset_optimizer == "always":
        assert len(rates["lr-SGD/core"]) < len(rates["lr-SGD/head"])


def test_rates_of_nothing_are_refused(fit: Fit) -> None:
    with pytest.raises(
        ConfigurationError, match="a name in group_lr to be one of core, modes, head"
    ):
        ContinualModule(network(), group_lr={"mode": 0.1})
    with pytest.raises(
        ConfigurationError, match=r"Expected group_lr\['head'\] to be 0 or a positive"
    ):
        ContinualModule(network(), group_lr={"head": -1.0})
    with pytest.raises(ConfigurationError, match="but got 'modes', and the network has no modes"):
        fit([FineTuning()], group_lr={"modes": 0.1})


# --- resuming, and several processes --------------------------------------------------------------


class SaveEverywhere(Callback):
    """A checkpoint after every update, and at the edges of epochs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, []
        for moment in ("on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end"):
            setattr(self, moment, lambda trainer, *_, at=moment: self.save(trainer, at))

    def save(self, trainer: Any, moment: str) -> None:
        path = self.folder / f"{len(self.paths):03d}_{moment}.ckpt"
        self.paths.append(path)
        trainer.save_checkpoint(path)


def learned(module: Any, trainer: Any) -> list[Any]:
    states = [c.state_dict() for c in trainer.callbacks if isinstance(c, ContinualStrategy)]
    return [module.state_dict(), states, module.curve, module.overtaken, random_state()]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(-1), two.nan_to_num(-1))
    return bool(one == two)


@pytest.mark.slow
@pytest.mark.parametrize("reset_optimizer", ["always", "never"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_goes_on_wherever_it_stopped(
    accumulate: int, reset_optimizer: str, fit: Fit, tmp_path: Path
) -> None:
    def run(*more: Any, **options: Any) -> list[Any]:
        stream = digits(
            num_tasks=2,
            epochs_per_task=3,
            batch_size=150,
            validation_fraction=0.2,
            reset_optimizer=reset_optimizer,
        )
        return learned(
            *fit(
                [BeneficialPerturbation(4, 0.5), EWC(10.0, update="clamped"), *more],
                stream=stream,
                backbone=network(),
                train="modes",
                train_first="all",
                patience=1,
                optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9),
                trainer={"accumulate_grad_batches": accumulate},
                **options,
            )
        )

    saves = SaveEverywhere(tmp_path)
    reference = run(saves)
    different = []
    for path in saves.paths:
        inside = torch.load(path, weights_only=True)["continual"]["unfinished"]
        if not inside and not same(reference, run(seed=9, ckpt_path=path)):
            different.append(path.name)
    assert not different


def test_what_a_task_was_begun_with_holds_to_its_end(fit: Fit, tmp_path: Path) -> None:
    """Between tasks a run may continue with another choice; inside one it may not."""
    saves = SaveEverywhere(tmp_path)

    def stream() -> SplitDigits:
        return digits(num_tasks=2)

    fit([FineTuning(), saves], stream=stream())
    inside, between = saves.paths[2], saves.paths[7]
    with pytest.raises(CheckpointError, match="Expected train and train_first to be what task 0"):
        fit([FineTuning()], stream=stream(), train="modes", ckpt_path=inside)
    whole, _ = fit([FineTuning()], stream=stream(), ckpt_path=between)
    frozen, _ = fit([FineTuning()], stream=stream(), train="modes", ckpt_path=between)
    saved = torch.load(between, weights_only=True)["state_dict"]
    name = "network.backbone.1.weight"
    assert torch.equal(frozen.state_dict()[name], saved[name])
    assert not torch.equal(whole.state_dict()[name], saved[name])


def two_tasks(devices: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """What is learned of digits by one or more processes."""
    seed_everything(0, verbose=False)
    module = ContinualModule(
        MLP([16, 12]),  # drawn when the head is: Lightning seeds again where it has processes
        train="modes",
        train_first="all",
        mask="seen",
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        check_processes=True,
    )
    strategies = [BeneficialPerturbation(4, direction="gradient"), GradientEpisodicMemory(8)]
    trainer = trainer_of(devices, strategies, precision="64-true", **options)
    trainer.fit(module, digits(batch_size=33))
    return {
        name: value.double()
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


@pytest.mark.filterwarnings("ignore:GradientEpisodicMemory projects")
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
def test_two_processes_learn_what_one_learns(options: dict[str, Any], ranks: Any) -> None:
    """DDP waits for no gradient of what is frozen."""
    alone, (first, second) = two_tasks(1, options), ranks(two_tasks, 2, options)
    torch.testing.assert_close(first, alone, rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
