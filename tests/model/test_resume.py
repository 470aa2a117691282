"""A run stopped anywhere and resumed is the run that was never stopped, bit for bit."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError
from bpn_lightning.random_state import random_state, restore_random_state
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.run.recording import Intervals, LastCheckpoint
from bpn_lightning.strategies import EWC, BeneficialPerturbation

pytestmark = pytest.mark.slow

MOMENTS = (
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
)


class SaveEverywhere(Callback):
    """A checkpoint at every moment at which anybody's callback might take one."""

    def __init__(self, folder):
        self.folder, self.paths = folder, []
        for moment in MOMENTS:
            setattr(self, moment, lambda trainer, *_, moment=moment: self.save(trainer, moment))

    def save(self, trainer, moment):
        path = self.folder / f"{len(self.paths):03d}_{moment}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append(path)


def state(module, trainer):
    """All that two runs must share."""
    strategies = [c.state_dict() for c in trainer.callbacks if isinstance(c, EWC)]
    return [module.state_dict(), strategies, module.curve, module.schedule.lengths, random_state()]


def same(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-1), two.nan_to_num(-1))
    return one == two


@pytest.mark.parametrize("early_stopping", [False, True])
def test_resuming_from_every_checkpoint_changes_nothing(fit, tmp_path, early_stopping):
    def run(*more, **options):
        stream = SplitDigits(
            num_tasks=2, epochs_per_task=3, batch_size=100, validation_fraction=0.2, seed=0
        )
        return fit(
            # At a large step of M the validation loss goes up and down.
            [BeneficialPerturbation(8, 1.0 if early_stopping else 0.05), EWC(100.0), *more],
            stream=stream,
            patience=1 if early_stopping else None,
            evaluate_every="epoch",
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
            backbone=torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Dropout(0.2)
            ),
            **options,
        )

    saves = SaveEverywhere(tmp_path)
    reference = state(*run(saves))
    if early_stopping:
        assert min(reference[3]) < 3, "the case is meant to stop early"
    assert len(saves.paths) >= 20
    different = [
        p.name for p in saves.paths if not same(reference, state(*run(seed=9, ckpt_path=p)))
    ]
    assert not different


def test_double_precision_is_not_rounded_where_a_run_resumes(fit, tmp_path):
    """Lightning converts a module after it has loaded the checkpoint."""
    flags = {"trainer": {"precision": "64-true"}}
    saves = SaveEverywhere(tmp_path)
    reference = state(*fit([EWC(100.0), saves], **flags))
    inside = saves.paths[len(saves.paths) // 2]
    assert same(reference, state(*fit([EWC(100.0)], ckpt_path=inside, **flags)))


def test_only_checkpoints_between_updates_are_resumed(fit, tmp_path):
    """Gradients that wait for the rest of their update are in no checkpoint; the scaler's state is."""

    def run(*more, **options):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        trainer = {
            "accumulate_grad_batches": 2,
            "plugins": [MixedPrecision("16-mixed", "cpu", scaler)],  # what a GPU would have
        }
        stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
        module, made = fit([EWC(100.0), *more], stream=stream, trainer=trainer, **options)
        return [*state(module, made), scaler.state_dict()]

    saves = SaveEverywhere(tmp_path)
    reference = run(saves)
    assert reference[-1]["scale"] > 4
    batches = [path for path in saves.paths if "batch" in path.name]
    windows = [True, False, True, False, False] * 2  # of 5 batches the last is an update by itself
    assert len(batches) == len(windows)
    for path, inside in zip(batches, windows, strict=True):
        if inside:
            with pytest.raises(CheckpointError, match="after 1 of its 2 batches, whose gradients"):
                run(ckpt_path=path)
        else:
            assert same(reference, run(seed=9, ckpt_path=path)), path.name


class Stop(Callback):
    """Ends a run as max_time does, after a number of batches."""

    def __init__(self, batches):
        self.left = batches

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


@pytest.mark.parametrize(("batches", "step"), [(7, 4), (8, 4), (9, 5)])
def test_a_run_that_ends_inside_an_update_goes_on_before_it(fit, tmp_path, batches, step):
    """An epoch of five batches has updates of two, two and one."""

    def run(*more, **options):
        options["trainer"] = {"accumulate_grad_batches": 2, "enable_checkpointing": bool(more)}
        stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
        return state(*fit([EWC(100.0), *more], stream=stream, **options))

    def checkpoint(steps):
        return LastCheckpoint(tmp_path / "last.ckpt", Intervals(steps, None, None), {})

    reference = run()
    with pytest.warns(UserWarning, match="stopped before its end: tasks 2"):
        run(checkpoint(1), Stop(batches))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == step
    assert same(reference, run(checkpoint(1), seed=9, ckpt_path=tmp_path / "last.ckpt"))


def test_no_checkpoint_is_taken_inside_an_update_because_a_run_ends(fit, tmp_path):
    callbacks = [Stop(12), LastCheckpoint(tmp_path / "last.ckpt", Intervals(None, None, None), {})]
    trainer = {"accumulate_grad_batches": 4, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="stopped before its end"):
        fit([EWC(100.0), *callbacks], trainer=trainer)
    assert not (tmp_path / "last.ckpt").exists()


#: By Lightning's own callback; each file is named after the moment and the updates before it.
SAVES = {
    "after updates": {"after": {"every_n_train_steps": 1}},
    "at an epoch's end": {"end": {"save_on_train_epoch_end": True}},
    "after validation": {"validated": {"save_on_train_epoch_end": False}},
    "after updates and at an epoch's end": {
        "after": {"every_n_train_steps": 1},
        "end": {"save_on_train_epoch_end": True},
    },
    "at an epoch's end and after updates": {
        "end": {"save_on_train_epoch_end": True},
        "after": {"every_n_train_steps": 1},
    },
    "both by one": {"both": {"every_n_train_steps": 1, "save_on_train_epoch_end": True}},
}


#: What a checkpoint holds that is not the callbacks' own.
WHOLE = ("epoch", "global_step", "state_dict", "optimizer_states", "continual")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run has its own folder
@pytest.mark.parametrize("saves", SAVES.values(), ids=SAVES)
def test_a_resumed_run_saves_what_a_run_that_was_never_stopped_saves(fit, tmp_path, saves):
    """Counters included: whoever resumes a checkpoint of a resumed run does not learn an epoch twice."""

    def run(folder, **options):
        callbacks = [
            ModelCheckpoint(folder, f"{name}_{{step}}", save_top_k=-1, **when)
            for name, when in saves.items()
        ]
        stream = SplitDigits(
            num_tasks=2, epochs_per_task=2, batch_size=150, validation_fraction=0.2, seed=0
        )
        trainer = {"enable_checkpointing": True}
        _, made = fit([EWC(100.0), *callbacks], stream=stream, trainer=trainer, **options)
        assert made.global_step == 8
        return {path.name: read_checkpoint(path) for path in folder.glob("*.ckpt")}

    def counters(saved):
        loop = saved["loops"]["fit_loop"]
        shown = ("epoch_progress", "epoch_loop.batch_progress")
        return {name: loop[name] for name in shown} | {key: saved[key] for key in WHOLE}

    reference = run(tmp_path / "reference")
    assert len(reference) >= 4
    for name, start in reference.items():
        again = run(tmp_path / name, seed=9, ckpt_path=tmp_path / "reference" / name)
        for later, saved in again.items():
            # A run that continues from a step has not its epoch's end again.
            assert saved["global_step"] >= start["global_step"]
            assert same(counters(saved), counters(reference[later])), (name, later)


def test_random_states_survive_a_file_that_loads_weights_only(tmp_path):
    torch.save(random_state(), tmp_path / "random.pt")
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    restore_random_state(torch.load(tmp_path / "random.pt", weights_only=True))
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected
