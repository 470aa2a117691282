"""Every callback of Lightning either works over a stream, or is refused before training."""

from datetime import timedelta

import lightning.pytorch.callbacks as lightnings
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner

from bpn_lightning import ContinualModule
from bpn_lightning.cli.main import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError
from bpn_lightning.nn import MLP
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.run.recording import MetricsFile
from bpn_lightning.strategies import EWC
from bpn_lightning.trainer.callbacks import REFUSED


class Freezing(BaseFinetuning):
    """Somebody's own."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        """Nothing: it may stay frozen."""


class Writer(BasePredictionWriter):
    """Keeps what it is given in the place of writing it."""

    def write_on_batch_end(self, trainer, pl_module, prediction, indices, batch, *_):
        self.predictions = [*getattr(self, "predictions", []), prediction]


class Saver(Checkpoint):
    """Somebody's own, at the end of each epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/own.ckpt")


class Bar(ProgressBar):
    """Somebody's own."""

    def disable(self):
        """It shows nothing."""


#: What is refused, an instance each.
BAD = {
    "BackboneFinetuning": lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "BaseFinetuning": Freezing,
    "BatchSizeFinder": BatchSizeFinder,
    "EarlyStopping": lambda: EarlyStopping("val/loss"),
    "EMAWeightAveraging": EMAWeightAveraging,
    "GradientAccumulationScheduler": lambda: GradientAccumulationScheduler({0: 2, 2: 4}),
    "LearningRateFinder": LearningRateFinder,
    "ModelPruning": lambda: ModelPruning("l1_unstructured", amount=0.5),
    "SpikeDetection": SpikeDetection,
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.01),
    "WeightAveraging": WeightAveraging,
}

#: What works: an instance each, and the trainer's flags that it wants.
GOOD = {
    "BasePredictionWriter": (Writer, {}),
    "Callback": (Callback, {}),
    "Checkpoint": (Saver, {"enable_checkpointing": True}),
    "DeviceStatsMonitor": (lambda: DeviceStatsMonitor(cpu_stats=False), {"logger": True}),
    "LambdaCallback": (lambda: LambdaCallback(on_train_epoch_end=lambda *_: None), {}),
    "LearningRateMonitor": (LearningRateMonitor, {"logger": True}),
    "ModelCheckpoint": (ModelCheckpoint, {"enable_checkpointing": True}),
    "ModelSummary": (ModelSummary, {"enable_model_summary": True}),
    "OnExceptionCheckpoint": (None, {"enable_checkpointing": True}),
    "ProgressBar": (Bar, {"enable_progress_bar": True}),
    "RichModelSummary": (RichModelSummary, {"enable_model_summary": True}),
    "RichProgressBar": (RichProgressBar, {"enable_progress_bar": True}),
    "ThroughputMonitor": (
        lambda: ThroughputMonitor(lambda batch: len(batch.targets)),
        {"logger": True},
    ),
    "Timer": (lambda: Timer(timedelta(hours=1)), {}),
    "TQDMProgressBar": (TQDMProgressBar, {"enable_progress_bar": True}),
}


def test_no_callback_of_lightning_is_forgotten():
    """A new one in Lightning is to be walked, and gets a line in the table of docs/trainer_flags.md."""
    assert {*BAD, *GOOD} == set(lightnings.__all__)
    assert not BAD.keys() & GOOD.keys()


def learn(fit, *callbacks, **options):
    stream = SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=150, validation_fraction=0.2, seed=0
    )
    return fit([EWC(100.0), *callbacks], stream=stream, **options)


def weights(module):
    return torch.cat([value.flatten() for value in module.state_dict().values()]).nan_to_num(-1)


@pytest.mark.parametrize("name", BAD)
def test_what_acts_on_the_whole_stream_is_refused_by_name(fit, name):
    callback = BAD[name]()
    kind = next(kind for kind in REFUSED if isinstance(callback, kind))
    why, remedy = REFUSED[kind]
    with pytest.raises(ConfigurationError) as error:
        learn(fit, callback)
    assert str(error.value) == (
        f"Expected trainer.callbacks to be without {kind.__name__}, but got {type(callback).__name__}. "
        f"{why} {remedy}"
    )


# Lightning's, of modules that do not say how many operations a batch takes.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`, you need to define")
@pytest.mark.parametrize("name", [name for name, (make, _) in GOOD.items() if make])
def test_what_works_changes_nothing_that_is_learned(fit, tmp_path, name):
    make, flags = GOOD[name]
    if "logger" in flags:
        log = MetricsFile(tmp_path / "metrics.csv")
        flags = flags | {"logger": log, "log_every_n_steps": 2}
    module, trainer = learn(fit, make(), trainer=flags)
    plain, _ = learn(fit)
    assert torch.equal(weights(module), weights(plain))
    assert (trainer.global_step, module.closed) == (8, 1)
    assert "logger" not in flags or trainer.logger.rows


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # they are in order
def test_a_prediction_writer_gets_every_sample(fit):
    module, _trainer = learn(fit)
    writer = Writer("batch")
    stream = SplitDigits(num_tasks=2, seed=0)
    predictions = Trainer(logger=False, callbacks=[writer], enable_progress_bar=False).predict(
        module, stream
    )
    assert torch.equal(torch.cat(writer.predictions), torch.cat(predictions))


def test_lightnings_tuner_is_refused_as_well(tmp_path):
    for search in ("lr_find", "scale_batch_size"):
        trainer = Trainer(max_epochs=-1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
        module = ContinualModule(MLP([8]))
        module.lr = 0.1
        with pytest.raises(ConfigurationError, match=r"trainer\.callbacks to be without"):
            getattr(Tuner(trainer), search)(module, datamodule=SplitDigits(num_tasks=2))


# --- checkpoints by others -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "monitor", ["val/average_accuracy", "val/loss", "val/accuracy", "train/loss", "penalty/ewc"]
)
def test_no_checkpoint_is_best_by_what_one_task_has(fit, tmp_path, monitor):
    save = ModelCheckpoint(tmp_path, monitor=monitor, mode="max", save_top_k=2)
    with pytest.raises(ConfigurationError) as error:
        learn(fit, save, trainer={"enable_checkpointing": True})
    assert str(error.value) == (
        "Expected ModelCheckpoint not to monitor a metric of the current task, but got "
        f"{monitor!r}. Its best model would be that of an easy or early task, which has not learned later ones. Leave monitor out: the newest checkpoint has learned most tasks."
    )


@pytest.mark.parametrize("monitor", [None, "step", "stream/task"])
def test_the_best_checkpoint_is_the_last(fit, tmp_path, monitor):
    save = ModelCheckpoint(tmp_path, monitor=monitor, mode="max")
    _module, _ = learn(fit, save, trainer={"enable_checkpointing": True, "log_every_n_steps": 1})
    saved = read_checkpoint(tmp_path / save.best_model_path)
    assert saved["continual"]["cursor"]["opened"] == 1
    if monitor != "stream/task":  # ties keep the first of a task
        assert saved["global_step"] == 8


def test_a_checkpoint_on_an_exception_goes_on(fit, tmp_path):
    def fail(trainer, *_):
        if trainer.global_step == 5:
            raise RuntimeError("a plug was pulled")

    flags = {"trainer": {"enable_checkpointing": True}}
    save = OnExceptionCheckpoint(tmp_path)
    with (
        pytest.warns(UserWarning, match="was called without a model|no last checkpoint"),
        pytest.raises(RuntimeError, match="a plug was pulled"),
    ):
        learn(fit, save, LambdaCallback(on_train_batch_end=fail), **flags)
    resumed, _ = learn(fit, seed=9, ckpt_path=save.ckpt_path, **flags)
    plain, _ = learn(fit)
    assert torch.equal(weights(resumed), weights(plain))


def test_weights_alone_cannot_go_on(fit, tmp_path):
    save = ModelCheckpoint(tmp_path, "weights", save_weights_only=True)
    learn(fit, save, trainer={"enable_checkpointing": True})
    with pytest.raises(CheckpointError, match="this one has the weights alone"):
        learn(fit, ckpt_path=tmp_path / "weights.ckpt")


def test_checkpoints_may_be_written_while_training_goes_on(fit, tmp_path):
    def run(folder, *plugins):
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        learn(fit, save, trainer={"enable_checkpointing": True, "plugins": list(plugins)})
        return {path.name: read_checkpoint(path) for path in sorted(folder.glob("*.ckpt"))}

    plain, beside = run(tmp_path / "plain"), run(tmp_path / "beside", AsyncCheckpointIO())
    assert len(plain) == 8
    assert beside.keys() == plain.keys()
    for name, saved in plain.items():
        for key, value in saved["state_dict"].items():
            assert torch.equal(beside[name]["state_dict"][key].nan_to_num(), value.nan_to_num())


def test_the_commands_own_checkpoints_are_not_written_beside(tmp_path, capsys):
    command = ["--config", "digits_inc.yaml", "--method", "finetune", "--runs", str(tmp_path)]
    plugin = "lightning.pytorch.plugins.AsyncCheckpointIO"
    assert main([*command, "--trainer.plugins", plugin]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bpn-fit: error: Expected trainer.plugins to be without AsyncCheckpointIO, but got it. A checkpoint is renamed once it is on disk. Leave it out; checkpoint_every_n_steps sets the interval."
    )
