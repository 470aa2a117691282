"""A stream that goes on learns, bit for bit, what it would have learned had all its tasks been known."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance_runs import stand_for_others
from fits import trainer_of
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from bpn_lightning import ContinualModule
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import (
    BPNLightningError,
    CheckpointError,
    ConfigurationError,
    DataError,
)
from bpn_lightning.functional import gradients
from bpn_lightning.model.extending import past_of
from bpn_lightning.nn import MLP
from bpn_lightning.nn.losses import CrossEntropy
from bpn_lightning.random_state import random_state
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.strategies import (
    EWC,
    IA3,
    SLDA,
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    BitFit,
    ContinualStrategy,
    DarkExperienceReplay,
    EncoderBasedLifelongLearning,
    ExperienceReplay,
    FineTuning,
    GDumb,
    GradientEpisodicMemory,
    ICaRL,
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::bpn_lightning.errors.ExpectedForgettingWarning"),
    pytest.mark.filterwarnings("ignore:.*projects gradients, but SGD with weight_decay"),
]

PAST, ALL = 3, 5
"""Tasks of two digits each."""

METHODS: Mapping[str, Callable[[], list[ContinualStrategy]]] = {
    "finetune": lambda: [FineTuning()],
    "bd": lambda: [BeneficialPerturbation(4)],
    "bd+ewc": lambda: [BeneficialPerturbation(4), EWC(100.0)],
    "bitfit": lambda: [BitFit()],
    "ia3": lambda: [IA3()],
    "lora": lambda: [LoRA(2)],
    "ewc": lambda: [EWC(100.0)],
    "online": lambda: [EWC(100.0, gamma=0.9, fisher="sampled", update="clamped")],
    "si": lambda: [SynapticIntelligence()],
    "mas": lambda: [MemoryAwareSynapses()],
    "slnid": lambda: [SLNID()],
    "mean": lambda: [IncrementalMomentMatching("mean", drop=0.2)],
    "mode": lambda: [IncrementalMomentMatching("mode")],
    "lwf": lambda: [LearningWithoutForgetting(warm_up_epochs=1)],
    "ebll": lambda: [EncoderBasedLifelongLearning(autoencoder_epochs=1)],
    "gem": lambda: [GradientEpisodicMemory(20)],
    "agem": lambda: [AveragedGEM(20, sample_size=10)],
    "er": lambda: [ExperienceReplay(30)],
    "der": lambda: [DarkExperienceReplay(30)],
    "icarl": lambda: [ICaRL(30)],
    "gdumb": lambda: [GDumb(30)],
    "psp": lambda: [ParameterSuperposition()],
    "complex": lambda: [ParameterSuperposition("complex")],
    "stl": lambda: [IndependentNetworks()],
    "joint": lambda: [JointTraining()],
    "gates": lambda: [BeneficialPerturbation(4), NearestClassMean(), SLDA()],
}
MASKS: Mapping[str, Mapping[str, Any]] = {
    "all": {"mask": "all", "reserve_classes": 2 * ALL},
    "seen": {"mask": "seen"},
    "task": {"mask": "task"},
    "shared": {"mask": "shared"},
}

sgd = partial(SGD, lr=0.05, weight_decay=0.01)


def stream_of(first: int, stop: int, mask: str, **arguments: Any) -> SplitDigits:
    """Some of the five tasks of the digits."""
    order: list[str | int] = list(range(2 * first, 2 * stop))
    given = {"epochs_per_task": 1, "batch_size": 64, "seed": 3, "class_order": order, **arguments}
    return SplitDigits(domain_incremental=mask == "shared", **given)


def module_of(mask: str, **arguments: Any) -> ContinualModule:
    torch.manual_seed(7)
    given = {"optimizer": sgd, **MASKS[mask], **arguments}
    backbone: Callable[[], nn.Module] = given.pop("backbone", lambda: MLP([16, 12]))
    return ContinualModule(backbone(), **given)


def fit(
    module: ContinualModule,
    stream: SplitDigits,
    strategies: Sequence[ContinualStrategy],
    ckpt_path: Path | None = None,
    **flags: Any,
) -> Trainer:
    trainer = trainer_of(1, list(strategies), **flags)
    torch.manual_seed(11)
    trainer.fit(module, stream, ckpt_path=ckpt_path, weights_only=False)
    return trainer


def plain(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by their paths."""
    if isinstance(tree, Mapping):
        return {k: v for key, one in tree.items() for k, v in plain(one, f"{path}/{key}").items()}
    if isinstance(tree, list | tuple):
        return plain(dict(enumerate(tree)), path)
    return {path: tree.detach().clone() if isinstance(tree, Tensor) else tree}


def learned(module: ContinualModule, trainer: Trainer) -> dict[str, Any]:
    """All that is learned and would be learned from, but for what only a known stream measures."""
    weights = {k: v for k, v in module.network.state_dict().items() if "accuracy_matrix" not in k}
    strategies = {s.state_key: s.state_dict() for s in module.host.strategies}
    matrix = module.accuracy_matrix.accuracy[1:].tril()
    names = [name for name, _ in module.network.named_parameters()]
    optimizer = trainer.optimizers[0].state_dict()
    inputs = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [module(inputs, task=task) for task in range(len(module.tasks))]
    return plain(
        {
            "weights": weights,
            "strategies": strategies,
            "matrix": matrix,
            "logits": logits,
            "parameters": names,
            "optimizer": optimizer,
            "random": random_state(),
            "training weights": dict(module.host.training_weights),
            "epoch": [trainer.current_epoch, trainer.global_step, *module.schedule.lengths],
        }
    )


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two differ in a single bit."""
    found = sorted(one.keys() ^ other.keys())
    for path in one.keys() & other.keys():
        a, b = one[path], other[path]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            alike = a.shape == b.shape and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        else:
            alike = repr(a) == repr(b)
        found += [] if alike else [path]
    return found


@dataclass(frozen=True)
class Setting:
    """Everything of a fit but its strategies and its mask."""

    module: Mapping[str, Any] = field(default_factory=dict)
    stream: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def fit(
        self, method: str, mask: str, first: int, stop: int, ckpt_path: Path | None = None
    ) -> tuple[ContinualModule, Trainer]:
        """Learn some of the tasks."""
        module = module_of(mask, **self.module)
        stream = stream_of(first, stop, mask, **self.stream)
        return module, fit(module, stream, METHODS[method](), ckpt_path, **self.trainer)

    def longer(self, method: str, mask: str, folder: Path) -> dict[str, Any]:
        """Learn the past, then continue from its checkpoint with a stream that begins with it."""
        self.fit(method, mask, 0, PAST)[1].save_checkpoint(folder / "past.ckpt")
        return learned(*self.fit(method, mask, 0, ALL, folder / "past.ckpt"))

    def extended(self, method: str, mask: str) -> dict[str, Any]:
        """Learn the past, then its new tasks alone, with the same module and the past's data to test on."""
        module, trainer = self.fit(method, mask, 0, PAST)
        torch.rand(3)  # whatever is drawn in the meantime
        return learned(module, self.go_on(module, trainer.callbacks, method, mask))

    def go_on(
        self, module: ContinualModule, callbacks: Sequence[Any], method: str, mask: str
    ) -> Trainer:
        """Learn the new tasks."""
        past_data = stream_of(0, PAST, mask, **self.stream)
        new = stream_of(PAST, ALL, mask, **{**self.stream, "seed": None})
        module.extend(new, past_data)
        strategies = [one for one in callbacks if isinstance(one, ContinualStrategy)]
        return fit(module, new, strategies, **self.trainer)

    def loaded(self, method: str, mask: str, folder: Path) -> dict[str, Any]:
        """The same with a module that is loaded from a file, and with new strategies."""
        self.fit(method, mask, 0, PAST)[1].save_checkpoint(folder / "past.ckpt")
        fresh = module_of(mask, **self.module)
        module = ContinualModule.load_from_checkpoint(
            folder / "past.ckpt",
            backbone=fresh.backbone,
            optimizer=fresh.optimization.optimizer,
            **{
                k: v
                for k, v in {**MASKS[mask], **self.module}.items()
                if k not in ("backbone", "optimizer")
            },
        )
        return learned(module, self.go_on(module, METHODS[method](), method, mask))


@cache
def whole(method: str, mask: str) -> dict[str, Any]:
    """What is learned where all tasks were known."""
    return learned(*Setting().fit(method, mask, 0, ALL))


SETTINGS = {
    "clipped": Setting(module={"backbone": lambda: MLP([203])}, trainer={"gradient_clip_val": 0.5}),
    "adam kept": Setting(
        module={"optimizer": partial(AdamW, lr=0.01)}, stream={"reset_optimizer": "never"}
    ),
    "rates kept": Setting(
        module={"optimizer": partial(AdamW, lr=0.01), "group_lr": {"head": 0.02, "modes": 0.005}},
        stream={"reset_optimizer": "never"},
    ),
    "momentum kept": Setting(
        module={"optimizer": partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.1)},
        stream={"reset_optimizer": "never"},
    ),
    "validation": Setting(
        module={"patience": 1, "evaluate_every": "epoch", "evaluate_on": "seen_and_next"},
        stream={"epochs_per_task": 3, "validation_fraction": 0.2},
    ),
    "batch norm": Setting(
        module={
            "backbone": lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)
            )
        },
        stream={"augment": True},
    ),
    "label smoothing": Setting(module={"loss": CrossEntropy(label_smoothing=0.1)}),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "joint"])
def test_a_longer_stream_goes_on_from_a_checkpoint(method: str, mask: str, tmp_path: Path) -> None:
    found = Setting().longer(method, mask, tmp_path)
    assert differing(whole(method, mask), found) == []


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "joint"])
def test_a_module_is_extended_by_new_tasks_alone(method: str, mask: str) -> None:
    found = Setting().extended(method, mask)
    assert differing(whole(method, mask), found) == []


#: One of each kind of what a method keeps: modes, importances, an older network, autoencoders, samples, samples and
#: logits, means of classes, keys, networks of their own, gates. Files and extension are asked of all methods above.
KEEPS = {"bd+ewc", "si", "lwf", "ebll", "gem", "der", "icarl", "psp", "stl", "gates"}


@pytest.mark.parametrize(
    "method", stand_for_others([name for name in METHODS if name != "joint"], KEEPS)
)
def test_a_loaded_module_is_extended(method: str, tmp_path: Path) -> None:
    found = Setting().loaded(method, "seen", tmp_path)
    assert differing(whole(method, "seen"), found) == []


@pytest.mark.parametrize("mask", ["seen", "task"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_it_goes_on_under_any_trainer_and_optimizer(
    setting: str, mask: str, tmp_path: Path
) -> None:
    one = SETTINGS[setting]
    found = one.longer("bd", mask, tmp_path)
    assert differing(learned(*one.fit("bd", mask, 0, ALL)), found) == []


def test_new_tasks_alone_have_a_validation_split() -> None:
    found = SETTINGS["validation"].extended("bd", "seen")
    assert differing(learned(*SETTINGS["validation"].fit("bd", "seen", 0, ALL)), found) == []


# --- what else may happen on the way -------------------------------------------------------------


class Save(Callback):
    """A checkpoint after a number of updates of the stream."""

    def __init__(self, updates: int, path: Path) -> None:
        self.updates, self.path = updates, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.updates:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("method", ["bd+ewc", "gem", "ebll"])
def test_a_continuation_is_resumed_inside_a_task(method: str, tmp_path: Path) -> None:
    past, middle = tmp_path / "past.ckpt", tmp_path / "middle.ckpt"
    module, trainer = Setting().fit(method, "seen", 0, PAST)
    trainer.save_checkpoint(past)
    updates = trainer.global_step
    module.extend(stream := stream_of(PAST, ALL, "seen"), stream_of(0, PAST, "seen"))
    trainer = fit(module, stream, [*METHODS[method](), Save(updates + 3, middle)])
    whole = learned(module, trainer)
    killed = ContinualModule.load_from_checkpoint(
        past, backbone=MLP([16, 12]), optimizer=sgd, mask="seen"
    )
    killed.extend(stream := stream_of(PAST, ALL, "seen"), stream_of(0, PAST, "seen"))
    trainer = fit(killed, stream, METHODS[method](), middle)
    assert differing(whole, learned(killed, trainer)) == []
    assert differing(learned(*Setting().fit(method, "seen", 0, ALL, middle)), whole) == []


def test_a_module_is_extended_after_other_trainers_have_tested_it() -> None:
    """Without its strategies, on another stream of the same tasks; and a copy has no trainer."""
    module, trainer = Setting().fit("bd+ewc", "seen", 0, PAST)
    trainer_of(1, []).test(module, stream_of(0, PAST, "seen", seed=9), verbose=False)
    copied = deepcopy(module)
    found = learned(module, Setting().go_on(module, trainer.callbacks, "bd+ewc", "seen"))
    assert differing(learned(*Setting().fit("bd+ewc", "seen", 0, ALL)), found) == []
    copied.extend(new := stream_of(PAST, ALL, "seen"))
    with pytest.raises(CheckpointError, match="holds no importances: EWC cannot continue from it"):
        fit(copied, new, METHODS["bd+ewc"]())


def test_the_trainer_of_the_past_may_go_on() -> None:
    module, trainer = Setting().fit("bd+ewc", "seen", 0, PAST)
    module.extend(new := stream_of(PAST, ALL, "seen"), stream_of(0, PAST, "seen"))
    torch.manual_seed(11)
    trainer.fit(module, new)
    found = learned(module, trainer)
    assert differing(learned(*Setting().fit("bd+ewc", "seen", 0, ALL)), found) == []


def test_a_new_module_goes_on_from_a_file_with_new_tasks_alone(tmp_path: Path) -> None:
    """As a command does: the file says what the past was, and is then resumed."""
    path = tmp_path / "past.ckpt"
    Setting().fit("bd+ewc", "seen", 0, PAST)[1].save_checkpoint(path)
    new = stream_of(PAST, ALL, "seen", seed=None)
    new.continue_from(past_of(read_checkpoint(path)), stream_of(0, PAST, "seen"))
    module = module_of("seen")
    found = learned(module, fit(module, new, METHODS["bd+ewc"](), path))
    assert differing(learned(*Setting().fit("bd+ewc", "seen", 0, ALL)), found) == []


def test_a_stream_goes_on_again_and_again() -> None:
    """Three tasks, then one, then one more."""
    module, trainer = Setting().fit("bd+ewc", "seen", 0, PAST)
    strategies = [one for one in trainer.callbacks if isinstance(one, ContinualStrategy)]
    known = stream_of(0, PAST, "seen")
    for first in range(PAST, ALL):
        module.extend(stream := stream_of(first, first + 1, "seen"), known)
        trainer, known = fit(module, stream, strategies), stream
    assert (
        differing(learned(*Setting().fit("bd+ewc", "seen", 0, ALL)), learned(module, trainer)) == []
    )


@pytest.mark.parametrize("method", ["finetune", "ewc", "lwf", "gem", "gates"])
def test_a_task_may_be_one_class(method: str) -> None:
    arguments = {"classes_per_task": [2, 2, 2, 1, 1], "class_order": [*range(8)]}
    whole, trainer = Setting(stream=arguments).fit(method, "seen", 0, ALL)
    expected = learned(whole, trainer)
    module, trainer = Setting().fit(method, "seen", 0, PAST)
    new = stream_of(0, 0, "seen", classes_per_task=1, class_order=[6, 7])
    module.extend(new, stream_of(0, PAST, "seen"))
    strategies = [one for one in trainer.callbacks if isinstance(one, ContinualStrategy)]
    assert differing(expected, learned(module, fit(module, new, strategies))) == []


def normed() -> nn.Module:
    """A layer without a closed form of its gradients per sample."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.LayerNorm(40), nn.ReLU())


@pytest.mark.parametrize("method", ["ewc", "mas", "gem"])
def test_gradients_per_sample_go_on_without_closed_forms(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gradients, "CHUNK", 2**17)  # some tens of samples at a time
    one = Setting(module={"backbone": normed})
    found = one.longer(method, "seen", tmp_path)
    assert differing(learned(*one.fit(method, "seen", 0, ALL)), found) == []


def test_classes_beyond_those_reserved_take_part_late() -> None:
    """With ``all`` and nothing reserved the head grows too, but its softmax was smaller before."""
    found = Setting(module={"reserve_classes": None}).extended("finetune", "all")
    different = differing(learned(*Setting().fit("finetune", "all", 0, ALL)), found)
    assert "/weights/head.weight" in different
    assert found["/weights/head.weight"].shape == (10, 12)


def test_the_matrix_says_what_is_not_measured() -> None:
    module, trainer = Setting().fit("gates", "task", 0, PAST)
    strategies = [one for one in trainer.callbacks if isinstance(one, ContinualStrategy)]
    module.extend(new := stream_of(PAST, ALL, "task"))
    with pytest.warns(UserWarning, match="has no data of tasks 1 to 3, learned before"):
        fit(module, new, strategies)
    matrix = module.accuracy_matrix.accuracy
    assert matrix.shape == (ALL + 1, ALL)
    assert not matrix[: PAST + 1, :PAST].isnan().any()
    assert matrix[: PAST + 1, PAST:].isnan().all()
    assert matrix[PAST + 1 :, :PAST].isnan().all()
    assert not matrix[PAST + 1 :, PAST:].isnan().any()
    assert module.accuracy_matrix.summary()["average"] is None
    assert [point["accuracy"].count(None) for point in module.curve] == [2, 2, 2, 2, 3, 3]
    last = module.gate_scores[-1]
    assert last["after"] == ALL
    assert last["samples"][:PAST] == [None] * PAST
    assert None not in last["samples"][PAST:]


def in_two_processes(rank_file: str) -> dict[str, Any]:
    """A continuation, and all at once, under DDP."""
    found = []
    for first, stops in ((0, (PAST, ALL)), (0, (ALL,))):
        module = module_of("seen")
        for stop in stops:
            strategies = METHODS["bd+ewc"]()
            stream = stream_of(first, stop, "seen")
            if module.closed >= 0:
                strategies = list(module.host.strategies)
                module.extend(stream := stream_of(PAST, stop, "seen"), stream_of(0, PAST, "seen"))
            trainer = trainer_of(2, strategies)
            torch.manual_seed(11)
            trainer.fit(module, stream)
        found.append(learned(module, trainer))
    return {"differing": differing(*found), "weights": found[0]}


def test_two_processes_go_on_as_one(ranks: Any) -> None:
    one, two = ranks(in_two_processes, "")
    assert one["differing"] == two["differing"] == []
    assert [p for p in differing(one["weights"], two["weights"]) if "/random" not in p] == []
    whole = learned(*Setting().fit("bd+ewc", "seen", 0, ALL))
    for name in ("/weights/head.weight", "/weights/backbone.1.weight"):
        torch.testing.assert_close(one["weights"][name], whole[name], rtol=1e-4, atol=1e-5)


# --- refusals ------------------------------------------------------------------------------------


def past() -> tuple[ContinualModule, Trainer]:
    return Setting().fit("ewc", "seen", 0, PAST)


def refuse_longer(folder: Path, says: str, mask: str = "seen", **changes: Any) -> None:
    past()[1].save_checkpoint(folder / "past.ckpt")
    stream = stream_of(0, ALL, mask, **changes.pop("stream", {}))
    method = changes.pop("method", "ewc")
    with pytest.raises(BPNLightningError, match=re.escape(says)):
        fit(module_of(mask, **changes), stream, METHODS[method](), folder / "past.ckpt")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask": "task"}, "mask is 'task' here and 'seen' there"),
        (
            {"backbone": lambda: MLP([20, 12])},
            (
                "Expected the backbone of the run that goes on, but its backbone.1.weight is of shape (16, 64), "
                "not (20, 64)."
            ),
        ),
        (
            {"stream": {"class_order": [1, 0, *range(2, 10)]}},
            "they differ: task 0.class_names is ('1', '0') here and ('0', '1') there",
        ),
        ({"stream": {"epochs_per_task": 2}}, "task 0.epochs is 2 here and 1 there"),
        ({"method": "si"}, "strategies is ['si'] here and ['ewc'] there"),
    ],
)
def test_another_past_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    refuse_longer(tmp_path, says, **changes)


def test_a_past_that_stopped_inside_a_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    fit(module_of("seen"), stream_of(0, PAST, "seen"), [*METHODS["ewc"](), Save(8, path)])
    says = "Expected a run that has learned its 3 tasks before it continues with new ones, but got one that stopped after 1."
    with pytest.raises(CheckpointError, match=re.escape(says)):
        fit(module_of("seen"), stream_of(0, ALL, "seen"), METHODS["ewc"](), path)
    loaded = ContinualModule.load_from_checkpoint(path, backbone=MLP([16, 12]), mask="seen")
    with pytest.raises(ConfigurationError, match="but it has learned 1 of 3"):
        loaded.extend(stream_of(PAST, ALL, "seen"))


def test_strategies_that_learned_with_another_module_are_refused() -> None:
    """They hold the other's importances: what would be learned is silently another network."""
    module, trainer = past()
    fit(module_of("seen"), stream_of(0, PAST, "seen"), trainer.callbacks)
    for ask in (lambda: module.extend(stream_of(PAST, ALL, "seen")), lambda: module.forget(0)):
        with pytest.raises(ConfigurationError, match="but ewc has learned with another module"):
            ask()


def test_what_is_no_stream_of_new_tasks_is_refused() -> None:
    module, trainer = past()
    learned_stream = trainer.datamodule
    for arguments, says in (
        ((learned_stream,), "but got the one that the module has learned"),
        (([stream_of(PAST, ALL, "seen")],), "Expected stream to be a ContinualDataModule, but got"),
        ((stream_of(PAST, ALL, "seen"), 3), "Expected past_data to be a ContinualDataModule"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            module.extend(*arguments)
    module.extend(stream_of(PAST, ALL, "seen"), learned_stream)  # nothing of it was touched


def test_a_file_of_before_tasks_were_forgotten_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "past.ckpt"
    past()[1].save_checkpoint(path)
    loaded = ContinualModule.load_from_checkpoint(path, backbone=MLP([16, 12]), mask="seen")
    loaded.forget(1)
    with pytest.raises(CheckpointError, match="it still holds what was stored of task 1"):
        loaded.extend(stream_of(PAST, ALL, "seen"))


def test_a_past_without_its_training_state_is_refused(tmp_path: Path) -> None:
    _, trainer = past()
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = ContinualModule.load_from_checkpoint(
        tmp_path / "weights.ckpt", backbone=MLP([16, 12]), mask="seen"
    )
    with pytest.raises(
        CheckpointError, match="to have the training state of a run, but it has the weights"
    ):
        loaded.extend(stream_of(PAST, ALL, "seen"))


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "past.ckpt"
    past()[1].save_checkpoint(path)
    loaded = ContinualModule.load_from_checkpoint(path, backbone=MLP([16, 12]), mask="seen")
    Setting(stream={"seed": 8}).fit("ewc", "seen", 0, PAST)[1].save_checkpoint(path)
    with pytest.raises(CheckpointError, match="to have the weights that were loaded from it"):
        loaded.extend(stream_of(PAST, ALL, "seen"))


def test_a_missing_state_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "past.ckpt"
    past()[1].save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["callbacks"]["ewc"]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="Expected a checkpoint with the state of 'ewc'"):
        fit(module_of("seen"), stream_of(0, ALL, "seen"), METHODS["ewc"](), path)


def test_known_classes_are_refused() -> None:
    module, trainer = past()
    module.extend(stream := stream_of(PAST - 1, ALL, "seen"))
    says = "but '4' is one of task 2 already. Leave it out with class_order. More data of known classes are"
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        fit(module, stream, trainer.callbacks)


def test_more_classes_than_reserved_are_refused() -> None:
    module, trainer = Setting(module={"reserve_classes": 8}).fit("ewc", "all", 0, PAST)
    module.extend(stream := stream_of(PAST, ALL, "all"))
    says = "Expected reserve_classes to be at least the 10 classes of the stream, but got 8."
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        fit(module, stream, trainer.callbacks)
    with pytest.raises(
        ConfigurationError, match="Expected reserve_classes to be left out with mask"
    ):
        module_of("seen", reserve_classes=8)
    with pytest.raises(ConfigurationError, match="Expected reserve_classes to be at most"):
        module_of("all", reserve_classes=10**12)


def test_joint_training_needs_the_past_data(tmp_path: Path) -> None:
    whole = learned(*Setting().fit("joint", "seen", 0, ALL))
    assert differing(Setting().longer("joint", "seen", tmp_path), whole) == []
    module, trainer = Setting().fit("joint", "seen", 0, PAST)
    module.extend(stream := stream_of(PAST, ALL, "seen"))
    with pytest.raises(
        DataError, match=re.escape("Expected data of task 0 (0, 1), but this stream")
    ):
        fit(module, stream, trainer.callbacks)


def test_a_scheduler_over_the_whole_stream_is_refused(tmp_path: Path) -> None:
    """One of each task goes on, and so does one with a length of its own."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    own, whole = partial(cosine, T_max=50), partial(cosine)
    for scheduler, reset in ((whole, "always"), (own, "never")):
        one = Setting(module={"scheduler": scheduler}, stream={"reset_optimizer": reset})
        found = one.longer("finetune", "seen", tmp_path)
        assert differing(learned(*one.fit("finetune", "seen", 0, ALL)), found) == []
    with pytest.raises(ConfigurationError, match="but T_max was that of the stream that has ended"):
        Setting(module={"scheduler": whole}, stream={"reset_optimizer": "never"}).longer(
            "finetune", "seen", tmp_path
        )


def test_weights_of_tasks_are_refused(tmp_path: Path) -> None:
    """IMM's, without one for each new task."""
    strategy = IncrementalMomentMatching(weights=[1, 2, 3])
    fit(module_of("seen"), stream_of(0, PAST, "seen"), [strategy]).save_checkpoint(
        tmp_path / "past.ckpt"
    )
    with pytest.raises(ConfigurationError, match="one number for each of the 5 tasks, but got 3"):
        fit(module_of("seen"), stream_of(0, ALL, "seen"), [strategy], tmp_path / "past.ckpt")


def test_a_fit_without_a_past_is_refused() -> None:
    module, trainer = past()
    with pytest.raises(ConfigurationError, match="continue with ckpt_path, or call"):
        fit(module, stream_of(0, ALL, "seen"), trainer.callbacks)
