"""A forgotten task: what was stored of it is in no file, and what the others answer stays bit for bit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import trainer_of
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from bpn_lightning import ContinualModule
from bpn_lightning.conformance.runs import with_tokens
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.nn import MLP
from bpn_lightning.nn.layers import BiasUnits
from bpn_lightning.nn.losses import CrossEntropy
from bpn_lightning.strategies import (
    EWC,
    IA3,
    SLDA,
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    BitFit,
    DarkExperienceReplay,
    EncoderBasedLifelongLearning,
    ExperienceReplay,
    FeCAM,
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
    ProbabilisticPCA,
    PromptTuning,
    RanPAC,
    SynapticIntelligence,
)
from bpn_lightning.strategies.gates.generative import GenerativeClassifier
from bpn_lightning.strategies.gates.logits import Confidence, Energy, Entropy
from bpn_lightning.strategies.gates.supsup import SupSup
from bpn_lightning.strategies.table import GATES, STRATEGIES

Fit = Callable[..., Any]
GONE = 1

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is expected to forget",
    "ignore:.*GEM projects gradients",
    "ignore:GradientEpisodicMemory projects",
    "ignore:The stream stopped before its end",
)

METHODS: dict[str, Callable[[], Sequence[Callback]]] = {
    "finetune": lambda: [FineTuning()],
    "bd+ewc": lambda: [BeneficialPerturbation(4), EWC(10.0, update="clamped")],
    "bd+gem": lambda: [BeneficialPerturbation(4), GradientEpisodicMemory(8)],
    "bitfit": lambda: [BitFit()],
    "ia3": lambda: [IA3()],
    "lora": lambda: [LoRA(2)],
    "prompt": lambda: [PromptTuning(2)],
    "agem": lambda: [AveragedGEM(8)],
    "psp": lambda: [ParameterSuperposition()],
    "stl": lambda: [IndependentNetworks()],
    "si": lambda: [SynapticIntelligence()],
    "mas": lambda: [MemoryAwareSynapses()],
    "slnid": lambda: [SLNID()],
    "imm": lambda: [IncrementalMomentMatching()],
    "lwf": lambda: [LearningWithoutForgetting()],
    "bd+ebll": lambda: [
        BeneficialPerturbation(4),
        EncoderBasedLifelongLearning(code_size=3, autoencoder_epochs=1),
    ],
    "er": lambda: [ExperienceReplay(20)],
    "der": lambda: [DarkExperienceReplay(20)],
    "icarl": lambda: [ICaRL(20)],
    "gdumb": lambda: [GDumb(20)],
    "joint": lambda: [JointTraining()],
    "gates": lambda: [
        BeneficialPerturbation(4),
        NearestClassMean(),
        SLDA(),
        RanPAC(width=30),
        FeCAM(),
        ProbabilisticPCA(4),
        GenerativeClassifier((8,), updates=3, importance_samples=2),
        Confidence(),
        Entropy(),
        Energy(),
        SupSup(),
    ],
}


def digits(num_tasks: int = 4, **arguments: Any) -> SplitDigits:
    return SplitDigits(
        **{"num_tasks": num_tasks, "epochs_per_task": 1, "batch_size": 64, "seed": 0, **arguments}
    )


class StopAfter(Callback):
    """Ends a run when so many tasks are learned."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.should_stop or pl_module.closed + 1 == self.tasks

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        last = pl_module.schedule.last_epoch(self.tasks - 1)
        trainer.should_stop = trainer.should_stop or trainer.current_epoch >= last


def learn(
    fit: Fit, method: str, mask: str = "all", tasks: int = 3, **options: Any
) -> tuple[Any, Any]:
    """Three tasks of four, by plain SGD with momentum."""
    options.setdefault("stream", digits())
    if method == "prompt":
        options.setdefault("backbone", with_tokens(MLP([16, 16])))
    options.setdefault("optimizer", partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    return fit([*METHODS[method](), StopAfter(tasks)], mask=mask, **options)


INPUTS = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def own_logits(module: Any) -> dict[int, Tensor]:
    """Of each task that is not forgotten, in its own columns."""
    module.eval()
    known = module.network.structure.known(range(len(module.tasks)))
    with torch.no_grad():
        return {
            t: module(INPUTS, task=t)[:, slice(*module.tasks[t].columns)].clone()
            for t in known
            if t <= module.closed
        }


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)


def rows_of(tree: Any, width: int) -> set[tuple[float, ...]]:
    """All rows of so many numbers, of every tensor, that are not constant."""
    found: set[tuple[float, ...]] = set()
    for tensor in tensors(tree):
        if tensor.numel() and tensor.numel() % width == 0 and tensor.dtype != torch.bool:
            for row in tensor.detach().double().reshape(-1, width).tolist():
                if len(set(row)) > 1:
                    found.add(tuple(row))
    return found


def secrets(module: Any, trainer: Any, gone: int = GONE) -> dict[str, Tensor]:
    """What is stored of the task and of no other, by where it is."""
    network, found = module.network, {}
    for name, part in network.named_modules():
        for own, bank in part.named_buffers(recurse=False):
            if own.endswith("bank") and bank.is_floating_point():
                found[f"{name}.{own}"] = bank[gone].flatten().clone()
        if gone == module.closed and isinstance(part, BiasUnits):  # what its bias is the product of
            found |= {f"{name}.W {h}": row.detach().clone() for h, row in enumerate(part.W)}
            found[f"{name}.M"] = part.M[0].detach().clone()
    rows = slice(*module.tasks[gone].columns)
    for name, parameter in network.head.named_parameters(recurse=False):
        if parameter.dim() == 2 and network.weight_bank is None:
            for index, row in enumerate(parameter[rows].detach().clone()):
                found[f"head {name} {index}"] = row
    if network.weight_bank is not None:
        learned = network.weight_bank.learned[gone]
        found |= {f"weights {n}": v.clone().flatten() for n, v in learned.items() if v.numel() > 4}
    for callback in trainer.callbacks:
        memory = getattr(callback, "memory", None)
        if memory is not None:
            for index in (memory.tasks() == gone).nonzero().flatten().tolist():
                found[f"memory {index}"] = memory.inputs[index].flatten().clone()
        means = getattr(callback, "rows", {}).get("means")
        if means is not None:
            for index, task in enumerate(callback.row_tasks):
                if task == gone:
                    found[f"{callback.name} {index}"] = means[index].clone()
        for name in ("importance", "anchor"):
            kept = getattr(getattr(callback, "penalty", None), name, {})
            if "head.weight" in kept:
                for index, row in enumerate(kept["head.weight"][rows]):
                    found[f"{name} {index}"] = row.clone()
        encoders = getattr(callback, "encoders", {})
        if encoders:
            found["encoder"] = encoders["weight"][gone].flatten().clone()
    return {name: value for name, value in found.items() if len(set(value.tolist())) > 1}


def missing(secret: Mapping[str, Tensor], saved: Any) -> list[str]:
    widths = {value.numel() for value in secret.values()}
    rows = {width: rows_of(saved, width) for width in widths}
    return [
        name
        for name, value in secret.items()
        if tuple(value.double().tolist()) not in rows[value.numel()]
    ]


@pytest.mark.parametrize("mask", ["all", "seen", "task"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_stored_is_in_no_file_and_the_others_answer_as_before(
    method: str, mask: str, fit: Fit, tmp_path: Path
) -> None:
    module, trainer = learn(fit, method, mask)
    secret = secrets(module, trainer)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    before = torch.load(tmp_path / "before.ckpt", weights_only=True)
    assert secret
    assert missing(secret, before) == [], "each is found before"
    answers = own_logits(module)
    left = module.forget(GONE)
    assert module.network.structure.forgotten == [GONE]
    assert all(isinstance(line, str) for line in left)
    after = own_logits(module)
    assert list(after) == [0, 2]
    assert all(torch.equal(after[t], answers[t]) for t in after)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert missing(secret, saved) == list(secret), "none is found afterwards"
    rows = slice(*module.tasks[GONE].columns)
    for task in (0, 2):
        logits = module(INPUTS, task=task)
        assert logits[:, rows].eq(-torch.inf).all()
        assert logits.argmax(1).lt(6).all()
    again, _ = learn(fit, method, mask, tasks=4, ckpt_path=tmp_path / "after.ckpt")
    assert again.closed == 3
    assert again.network.structure.forgotten == [GONE]
    matrix = again.accuracy_matrix.accuracy
    assert matrix[4].isnan().tolist() == [False, True, False, False]
    assert not matrix[3, 0].isnan()
    assert method == "stl" or again.network.head.weight[rows].eq(0).all()
    assert missing(secret, again.state_dict()) == list(secret)


@pytest.mark.parametrize("method", ["bd+ewc", "stl", "imm", "bd+ebll", "gates", "si"])
def test_the_last_task_leaves_more_behind(method: str, fit: Fit, tmp_path: Path) -> None:
    """Factors of its bias, weights that are loaded, weights of training, and the optimizer's momentum."""
    module, trainer = learn(fit, method)
    assert module.closed == 2
    secret = secrets(module, trainer, gone=2)
    rows, training = slice(*module.tasks[2].columns), module.host.training_weights
    if training:
        secret |= {f"training {n}": r.clone() for n, r in enumerate(training["head.weight"][rows])}
    kept = trainer.optimizers[0].state.get(module.network.head.weight, {})
    for n, row in enumerate(kept["momentum_buffer"][rows] if kept else ()):  # ebll has its own last
        secret[f"momentum {n}"] = row.clone()
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    assert missing(secret, torch.load(tmp_path / "before.ckpt", weights_only=True)) == []
    answers = own_logits(module)
    module.forget(2)
    after = own_logits(module)
    assert list(after) == [0, 1]
    assert all(torch.equal(after[t], answers[t]) for t in after)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert missing(secret, saved) == list(secret)
    again, _ = learn(fit, method, tasks=4, ckpt_path=tmp_path / "after.ckpt")
    assert again.closed == 3


def test_every_strategy_and_gate_is_among_them() -> None:
    made = {f"{type(c).__module__}:{type(c).__name__}" for make in METHODS.values() for c in make()}
    assert made == {*STRATEGIES.values(), *GATES.values()}


def test_what_stays_is_listed(fit: Fit) -> None:
    module, _ = learn(fit, "bd+ewc")
    assert module.forget(0) == [
        "the shared weights and running statistics, where they were trained on it",
        "the normalization of inputs, where it was measured on its training data",
        "the names of its classes, and the accuracies measured on it",
        "ewc: importances and anchors, merged over tasks",
    ]
    module, _ = learn(fit, "stl")
    assert module.forget(1) == ["the names of its classes, and the accuracies measured on it"]
    module, _ = learn(fit, "gates")
    said = module.forget(1)
    assert "gate slda: second moments of the features of all tasks together" in said
    assert not any(line.startswith("gate ncm: second") for line in said)
    stream = digits(2, domain_incremental=True, reset_optimizer="never")
    module, _ = learn(fit, "finetune", "shared", tasks=2, stream=stream)
    said = module.forget(1)
    assert "the head, whose rows other tasks share" in said
    assert "the optimizer's state, which continues from task to task" in said
    module.eval()
    assert module(INPUTS, task=0).isfinite().all()


# --- without the task ID -------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["ncm", "slda", "ranpac", "fecam", "ppca"])
def test_not_told_the_task_only_its_own_images_change(gate: str, fit: Fit) -> None:
    """Of a gate that looks at features: which task it names, and the logits of that task's classes."""
    stream = digits()
    module, _ = learn(fit, "gates", stream=stream)
    images = torch.cat([b.inputs for t in range(3) for b in stream.loader(t, "test")])
    named = module.predict_tasks(images, gate=gate).argmax(1)
    chosen = module.gates[gate]
    chosen.modes = 1
    before = module.predict(images, gate=gate)
    module.forget(GONE)
    again = module.predict_tasks(images, gate=gate)
    assert again.shape == (len(images), 3)
    assert again[:, GONE].eq(0).all()
    others = named != GONE
    assert (~others).any()
    assert torch.equal(again.argmax(1)[others], named[others])
    after = module.predict(images, gate=gate)
    for task in (0, 2):
        columns = slice(*module.tasks[task].columns)
        own = named == task
        assert torch.equal(after[own, columns], before[own, columns])
    assert set(module.predict(images, gate="confidence").argmax(1).tolist()) <= {0, 1, 4, 5}


def test_the_surest_mode_is_none_that_is_forgotten(fit: Fit) -> None:
    module, _ = learn(fit, "bd+ewc")
    module.forget(2)
    assert module.network.mode == 1
    assert not {4, 5} & set(module.predict(torch.rand(9, 1, 8, 8)).argmax(1).tolist())
    for task in (0, 1):
        module.forget(task)
    with pytest.raises(ConfigurationError, match="Expected a learned task that is not forgotten"):
        module.predict(torch.rand(9, 1, 8, 8))


# --- refused by name -----------------------------------------------------------------------------


def test_a_forgotten_task_is_asked_for_in_vain(fit: Fit, tmp_path: Path) -> None:
    stream = digits()
    module, trainer = learn(fit, "bd+ewc", stream=stream)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    module.forget(GONE)
    expected = "Expected task to be one that is known, but got 1, which was forgotten"
    for ask in (
        lambda: module(INPUTS, task=GONE),
        lambda: module(INPUTS, task=torch.tensor([0, 1, 2, 0, 1, 2, 0])),
        lambda: module.predict(INPUTS, task=GONE),
        lambda: module.for_inference(GONE),
        lambda: module.forget(GONE),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            ask()
    assert module.evaluate([0, 1, 2]).isnan().tolist() == [False, True, False]
    (figures,) = trainer.test(module, stream, verbose=False)
    assert figures["test/accuracy/task_2"] != figures["test/accuracy/task_2"]
    assert figures["test/accuracy/task_1"] == pytest.approx(float(module.evaluate([0])))
    plain = module.for_inference()
    tasks = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    assert plain(INPUTS, tasks)[tasks == GONE].eq(-torch.inf).all()
    with pytest.raises(
        CheckpointError, match="Expected a checkpoint without task 1, which this module"
    ):
        trainer.test(
            module, stream, ckpt_path=tmp_path / "old.ckpt", weights_only=True, verbose=False
        )


def test_a_copy_forgets_by_itself(fit: Fit) -> None:
    module, _ = learn(fit, "bd+gem", stream=digits(2), tasks=2)
    copied = deepcopy(module)
    copied.forget(GONE)
    assert copied.network.structure.forgotten == [GONE]
    assert module.network.structure.forgotten == []
    module.forget(GONE)


def test_bad_tasks_are_refused(fit: Fit) -> None:
    module, _ = learn(fit, "finetune")
    for bad in (3, -1, 9, True, "1"):
        with pytest.raises(
            ConfigurationError, match="Expected task to be the id of a learned task, but"
        ):
            module.forget(bad)
    with pytest.raises(ConfigurationError, match="and the module has learned 0 tasks"):
        ContinualModule(MLP([4])).forget(0)

    class Inside(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if pl_module.closed == 0:
                pl_module.forget(0)

    with pytest.raises(
        ConfigurationError, match=r"outside of a run of the trainer, but one is running"
    ):
        fit([Inside()])
    module, _ = learn(fit, "finetune")
    torch.nn.utils.parametrizations.weight_norm(module.network.head)
    with pytest.raises(ConfigurationError, match="Expected the head to have weights of its own"):
        module.forget(0)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gates", "stl"])
def test_exports_and_loaded_modules_forget(method: str, fit: Fit, tmp_path: Path) -> None:
    module, trainer = learn(fit, method)
    secret = secrets(module, trainer)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    load = partial(ContinualModule.load_from_checkpoint, backbone=MLP([16, 16]))
    loaded = load(tmp_path / "whole.ckpt")
    answers = own_logits(loaded)
    loaded.forget(GONE)
    again = load_exported(export_module(loaded, tmp_path / "out"), MLP([16, 16]))
    assert again.network.structure.forgotten == [GONE]
    after = own_logits(again)
    assert all(torch.equal(after[t], answers[t]) for t in (0, 2))
    gates = {name: gate.state_dict() for name, gate in again.gates.items()}
    assert missing(secret, [again.state_dict(), gates]) == list(secret)
    with pytest.raises(ConfigurationError, match="which was forgotten"):
        again(INPUTS, task=GONE)


def test_a_finished_run_is_taken_from_its_file_and_saved_without_a_task(
    fit: Fit, tmp_path: Path
) -> None:
    """With the training state: a fit that has nothing left to train restores all of it."""
    stream = digits(2)
    module, trainer = learn(fit, "bd+gem", stream=stream, tasks=2)
    secret = secrets(module, trainer)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again, trainer = learn(
        fit, "bd+gem", stream=digits(2), tasks=2, ckpt_path=tmp_path / "whole.ckpt"
    )
    again.forget(GONE)
    trainer.save_checkpoint(tmp_path / "rest.ckpt")
    saved = torch.load(tmp_path / "rest.ckpt", weights_only=True)
    assert missing(secret, saved) == list(secret)
    assert len(saved["callbacks"]["gem"]["inputs"]) == 8


class Save(Callback):
    """Saves after so many updates, and ends the run where asked to."""

    def __init__(self, path: Path, updates: int, stop: bool = False) -> None:
        self.path, self.updates, self.stop = path, updates, stop

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.updates:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = trainer.should_stop or self.stop


@pytest.mark.parametrize("mask", ["all", "task"])
def test_a_run_that_goes_on_without_a_task_is_resumed_bit_for_bit(
    mask: str, fit: Fit, tmp_path: Path
) -> None:
    """Forgotten in the midst of a later task, and stopped once more in the midst of the last one."""

    def run(*more: Callback, **options: Any) -> Any:
        return fit(
            [*METHODS["bd+gem"](), SLDA(), *more],
            mask=mask,
            stream=digits(validation_fraction=0.2, reset_optimizer="never"),
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            **options,
        )

    module, trainer = run(Save(tmp_path / "inside.ckpt", 10, stop=True))  # of 4 updates a task
    assert (module.opened, module.closed) == (2, 1)
    secret = secrets(module, trainer)
    module.forget(GONE)
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    whole, _ = run(Save(tmp_path / "later.ckpt", 14), ckpt_path=tmp_path / "start.ckpt")
    rest, _ = run(seed=5, ckpt_path=tmp_path / "later.ckpt")
    assert whole.closed == rest.closed == 3
    assert whole.gate_scores == rest.gate_scores
    assert whole.gate_scores[-1]["task_accuracy"][GONE] is None
    for name, value in whole.state_dict().items():
        other = rest.state_dict()[name]
        assert not isinstance(value, Tensor) or torch.equal(
            value.nan_to_num(-1), other.nan_to_num(-1)
        )
    states = [c.state_dict() for c in whole.host.strategies]
    assert missing(secret, [whole.state_dict(), states]) == list(secret)


def forget_and_go_on(devices: int) -> dict[str, Any]:
    """Three tasks, of which one is forgotten, and then a new one."""
    seed_everything(0, verbose=False)
    module = ContinualModule(MLP([16]), mask="seen", optimizer=partial(torch.optim.SGD, lr=0.05))
    strategies = [GradientEpisodicMemory(8), EWC(10.0, update="clamped"), SLDA()]
    trainer_of(devices, strategies).fit(module, digits(3))
    left = module.forget(GONE)
    module.extend(new := digits(1, class_order=[6, 7], seed=None))
    trainer = trainer_of(devices, strategies)
    trainer.fit(module, new)
    return {
        "left": left,
        "network": module.network.state_dict(),
        "strategies": [strategy.state_dict() for strategy in strategies],
        "optimizer": trainer.optimizers[0].state_dict(),
        "forgotten": module.network.structure.forgotten,
        "logits": own_logits(module),
    }


@pytest.mark.filterwarnings("ignore:The stream has no data of tasks 1 to 3")
def test_two_processes_forget_and_go_on_as_one(ranks: Any) -> None:
    first, second = ranks(forget_and_go_on, 2)
    one = forget_and_go_on(1)
    assert first["left"] == second["left"] == one["left"]
    assert first["forgotten"] == one["forgotten"] == [GONE]
    assert sorted(first["logits"]) == [0, 2, 3]
    assert first["network"]["head.weight"][2:4].eq(0).all()
    found, again, expected = (list(tensors(of)) for of in (first, second, one))
    torch.testing.assert_close(found, again, rtol=0, atol=0, equal_nan=True)
    # But for the gate's whitening, whose rows have any sign.
    found, expected = ([x for x in some if x.shape != (64, 64)] for some in (found, expected))
    assert len(found) > 20
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


# --- the losses of later tasks -------------------------------------------------------------------


def test_forgotten_classes_take_part_in_no_loss(fit: Fit) -> None:
    """Smoothing and class weights are over the classes that are left, as torch computes them."""
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    module, _ = learn(fit, "finetune", loss=CrossEntropy(weights, 0.1))
    module.forget(GONE)
    logits = torch.randn(4, 8)
    targets = torch.tensor([0, 4, 7, 5])
    kept = [0, 1, 4, 5, 6, 7]
    found = module.host.losses(module.network.mask_forgotten(logits), targets, 3)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, kept],
        torch.tensor([kept.index(t) for t in targets.tolist()]),
        weight=torch.tensor(weights)[kept],
        label_smoothing=0.1,
        reduction="none",
    )
    torch.testing.assert_close(found, wanted)
