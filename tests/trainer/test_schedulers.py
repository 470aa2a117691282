"""Schedulers over a stream do what torch's own do when somebody steps them by hand, task by task."""

import csv
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as LightningsPlateau
from torch.optim import lr_scheduler

from bpn_lightning.cli.main import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.model.evaluation import validation_scores
from bpn_lightning.run.recording import MetricsFile

EPOCHS, BATCHES = 3, 2  # of each of two tasks
PLATEAU = partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.5)


def stream(**options):
    arguments = {"epochs_per_task": EPOCHS, "batch_size": 150, "seed": 0}
    return SplitDigits(num_tasks=2, **(arguments | options))


def warm_up_then_cosine(optimizer, num_steps):
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
    rest = lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps - 2)
    return lr_scheduler.SequentialLR(optimizer, [first, rest], milestones=[2])


def chained(optimizer, num_steps):
    halves = lr_scheduler.StepLR(optimizer, num_steps // 2, gamma=0.5)
    return lr_scheduler.ChainedScheduler([halves, lr_scheduler.ExponentialLR(optimizer, 0.9)])


def by_lambda(optimizer, num_steps):
    return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (num_steps + 1))


once = partial(lr_scheduler.OneCycleLR, max_lr=0.3, cycle_momentum=False)
#: What the module gets, and the same made by hand for n steps.
SCHEDULERS = {
    "OneCycleLR": (once, lambda o, n: once(o, total_steps=n)),
    "OneCycleLR of -1": (partial(once, total_steps=-1), lambda o, n: once(o, total_steps=n)),
    "OneCycleLR of its own epochs": (
        partial(once, epochs=9, steps_per_epoch=9),
        lambda o, n: once(o, total_steps=81),
    ),
    "CosineAnnealingLR": (lr_scheduler.CosineAnnealingLR, lr_scheduler.CosineAnnealingLR),
    "CosineAnnealingLR of -1": (
        partial(lr_scheduler.CosineAnnealingLR, T_max=-1),
        lr_scheduler.CosineAnnealingLR,
    ),
    "CosineAnnealingLR of 3": (
        partial(lr_scheduler.CosineAnnealingLR, T_max=3),
        lambda o, n: lr_scheduler.CosineAnnealingLR(o, 3),
    ),
    "LinearLR": (lr_scheduler.LinearLR, lambda o, n: lr_scheduler.LinearLR(o)),  # torch's default
    "LinearLR of -1": (
        partial(lr_scheduler.LinearLR, total_iters=-1),
        lambda o, n: lr_scheduler.LinearLR(o, total_iters=n),
    ),
    "PolynomialLR of -1": (
        partial(lr_scheduler.PolynomialLR, total_iters=-1),
        lr_scheduler.PolynomialLR,
    ),
    "StepLR": (partial(lr_scheduler.StepLR, step_size=2), lambda o, n: lr_scheduler.StepLR(o, 2)),
    "SequentialLR": (warm_up_then_cosine, warm_up_then_cosine),
    "ChainedScheduler": (chained, chained),
    "LambdaLR": (by_lambda, by_lambda),
}


class Rates(Callback):
    """The learning rate of every update."""

    def __init__(self):
        self.of_task = {}

    def on_train_batch_start(self, trainer, module, *_):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.of_task.setdefault(module.opened, []).append(rate)


def rates(fit, **options):
    watch = Rates()
    fit([watch, *options.pop("strategies", [])], **{"stream": stream(), "lr": 0.05} | options)
    return watch.of_task


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR's own
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(("make", "by_hand"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_each_task_has_the_rates_of_torchs_own_scheduler(fit, make, by_hand, interval):
    steps = EPOCHS * BATCHES if interval == "step" else EPOCHS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler, expected = by_hand(optimizer, steps), []
    for update in range(EPOCHS * BATCHES):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if interval == "step" or update % BATCHES == BATCHES - 1:
            scheduler.step()
    found = rates(fit, scheduler=make, scheduler_interval=interval)
    assert found == {0: expected, 1: expected}


def test_a_scheduler_that_is_kept_is_made_for_the_whole_stream(fit):
    found = rates(
        fit,
        stream=stream(reset_optimizer="never", epochs_per_task=[1, 2]),
        scheduler=lr_scheduler.CosineAnnealingLR,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler, expected = lr_scheduler.CosineAnnealingLR(optimizer, 3 * BATCHES), []
    for _ in range(3 * BATCHES):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found[0] + found[1] == expected


def test_accumulated_and_left_out_batches_are_no_steps(fit):
    made = []

    def note(optimizer, total_steps):
        made.append(total_steps)
        return lr_scheduler.ConstantLR(optimizer)

    flags = {"accumulate_grad_batches": 2, "limit_train_batches": 5}
    fit(stream=stream(batch_size=40), trainer=flags, scheduler=note)
    assert set(made) == {EPOCHS * 3}


# --- a plateau -----------------------------------------------------------------------------------


class Plateau(Callback):
    """Torch's scheduler, stepped by hand on a loss that this measures; and how often it acted."""

    def __init__(self, monitor):
        self.monitor, self.acted = monitor, 0

    def on_train_epoch_start(self, trainer, module):
        self.losses, self.sizes = [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1 and (
            trainer.current_epoch % EPOCHS == 0
        ):
            self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
            self.scheduler = PLATEAU(self.optimizer)
        expected = self.optimizer.param_groups[0]["lr"]
        assert trainer.optimizers[0].param_groups[0]["lr"] == expected
        self.acted += expected < 0.05
        with torch.no_grad():
            self.losses.append(F.cross_entropy(module(batch.inputs), batch.targets))
            self.sizes.append(len(batch.targets))

    def on_train_batch_end(self, trainer, module, *_):
        if len(self.losses) < trainer.num_training_batches:
            return
        if self.monitor == "val/loss":
            self.scheduler.step(validation_scores(module.host, module.opened)[0])
        else:
            weights = torch.tensor(self.sizes, dtype=torch.float64)
            self.scheduler.step(float(torch.stack(self.losses).double() @ weights / weights.sum()))


@pytest.mark.parametrize(
    ("make", "fraction", "wanted", "monitor"),
    [
        (PLATEAU, 0.2, None, "val/loss"),
        (PLATEAU, 0.0, None, "train/loss"),
        (PLATEAU, 0.2, "train/loss", "train/loss"),
        (
            partial(LightningsPlateau, monitor="train/loss", **PLATEAU.keywords),
            0.2,
            None,
            "train/loss",
        ),
    ],
)
def test_a_plateau_is_found_in_the_open_tasks_loss(fit, make, fraction, wanted, monitor):
    """Of all samples of an epoch, whatever is logged, and of each task anew."""
    watch = Plateau(monitor)
    fit(
        [watch],
        stream=stream(validation_fraction=fraction, batch_size=100),
        scheduler=make,
        scheduler_monitor=wanted,
        lr=0.05,
        trainer={"limit_val_batches": 0, "log_every_n_steps": 0},
    )
    assert watch.acted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize(
    "make",
    [
        partial(LightningsPlateau, monitor="val/loss", **PLATEAU.keywords),
        partial(LightningsPlateau, monitor="train/loss", **PLATEAU.keywords),
        warm_up_then_cosine,
        once,
    ],
    ids=["val/loss", "train/loss", "SequentialLR", "OneCycleLR"],
)
@pytest.mark.parametrize("saved", [{"every_n_train_steps": 1}, {"save_on_train_epoch_end": True}])
def test_a_resumed_scheduler_is_one_that_was_never_left(fit, tmp_path, make, saved):
    def run(folder, **options):
        save = ModelCheckpoint(folder, "{step}", save_top_k=-1, **saved)
        module, _ = fit(
            [save],
            stream=stream(validation_fraction=0.2),
            scheduler=make,
            trainer={"enable_checkpointing": True},
            **options,
        )
        assert module.trainer.optimizers[0].param_groups[0]["lr"] < 0.05
        return module.state_dict()

    reference = run(tmp_path / "reference", lr=0.05)
    paths = sorted((tmp_path / "reference").glob("*.ckpt"))
    assert len(paths) >= 2 * EPOCHS
    for path in paths:
        again = run(tmp_path / path.name, lr=0.05, ckpt_path=path)
        assert all(
            torch.equal(again[name].nan_to_num(), v.nan_to_num()) for name, v in reference.items()
        )


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lr_scheduler.StepLR,
            {},
            (
                "Expected scheduler to take the optimizer and its arguments, but it raised TypeError: "
                "StepLR.__init__() missing 1 required positional argument: 'step_size'. Correct that argument."
            ),
        ),
        (
            partial(once, total_steps=5),
            {},
            (
                "Expected total_steps of OneCycleLR to be at least the 6 steps of a task, but got 5. Leave it out to use a cycle of the length of each task."
            ),
        ),
        (
            partial(once, total_steps=4),
            {"epochs_per_task": [1, 3]},
            (
                "Expected total_steps of OneCycleLR to be at least the 6 steps of a task, but got 4. Leave it out to use a cycle of the length of each task."
            ),
        ),
        (
            partial(LightningsPlateau, monitor="val/accuracy", mode="max"),
            {},
            (
                "Expected monitor of ReduceLROnPlateau to be one of val/loss, train/loss, of the current task, but got 'val/accuracy'. The default here is 'train/loss'."
            ),
        ),
        (
            partial(LightningsPlateau, monitor="val/loss"),
            {},
            (
                "Expected validation_fraction to be more than 0 when ReduceLROnPlateau monitors 'val/loss', but the stream has no validation split. Set it, or monitor 'train/loss'."
            ),
        ),
        (
            partial(PLATEAU, mode="max"),
            {},
            (
                "Expected mode of ReduceLROnPlateau to be 'min', but got 'max': it monitors a loss. Leave mode "
                "out."
            ),
        ),
        (
            PLATEAU,
            {"reset_optimizer": "never"},
            (
                "Expected reset_optimizer to be 'always' with ReduceLROnPlateau, but got 'never'. The loss of the next task starts higher than that of the previous one ended."
            ),
        ),
    ],
)
def test_schedulers_that_cannot_be_right_are_refused_before_training(fit, make, options, message):
    with pytest.raises(ConfigurationError) as error:
        fit(stream=stream(**options), scheduler=make)
    assert str(error.value) == message


def test_two_monitors_are_one_too_many(fit):
    make = partial(LightningsPlateau, monitor="train/loss")
    with pytest.raises(ConfigurationError) as error:
        fit(stream=stream(), scheduler=make, scheduler_monitor="val/loss")
    assert str(error.value) == (
        "Expected scheduler_monitor to equal the monitor of ReduceLROnPlateau, 'train/loss', but got 'val/loss'. "
        "Leave one of the two out."
    )
    with pytest.raises(
        ConfigurationError, match="scheduler_monitor to be one of val/loss, train/loss, b"
    ):
        fit(scheduler_monitor="val/accuracy")


@pytest.mark.parametrize(
    ("make", "interval", "logging", "refused"),
    [
        (lr_scheduler.CosineAnnealingLR, "step", None, False),
        (lr_scheduler.CosineAnnealingLR, "epoch", "step", False),
        (PLATEAU, "step", "step", False),
        (None, "step", "epoch", False),
        (lr_scheduler.CosineAnnealingLR, "epoch", None, True),
        (lr_scheduler.CosineAnnealingLR, "step", "epoch", True),
        (PLATEAU, "step", None, True),
    ],
)
def test_monitored_rates_are_those_of_the_open_task(
    fit, tmp_path, make, interval, logging, refused
):
    watch, log = Rates(), MetricsFile(tmp_path / "metrics.csv")
    learn = partial(
        fit,
        [watch, LearningRateMonitor(logging)],
        stream=stream(),
        scheduler=make,
        scheduler_interval=interval,
        trainer={"logger": log, "log_every_n_steps": 1},
    )
    if refused:
        with pytest.raises(ConfigurationError, match="to have logging_interval 'step' with a sch"):
            learn()
        return
    learn()
    with open(log.path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]]
    used = [rate for rates in watch.of_task.values() for rate in rates]
    assert logged == (used if logging != "epoch" else used[::BATCHES])


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given", "length"),
    [
        ("OneCycleLR", {"max_lr": 0.1, "cycle_momentum": False}, "total_steps"),
        ("CosineAnnealingLR", {"T_max": -1}, "T_max"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_a_config_names_a_scheduler_and_not_its_length(tmp_path, monkeypatch, name, given, length):
    steps = 3 * 9  # 288 images of a task in batches of 32
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler = getattr(lr_scheduler, name)(optimizer, **{**given, length: steps})
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    expected = optimizer.param_groups[0]["lr"]
    assert last_rate(tmp_path, monkeypatch, name, given) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_config_names_a_plateau(tmp_path, monkeypatch):
    """After the first epoch of a task, none lowers the loss by nine tenths."""
    given = {"patience": 0, "threshold": 0.9}
    more = {"model.scheduler_monitor": "train/loss", "data.init_args.validation_fraction": 0.1}
    found = last_rate(tmp_path, monkeypatch, "ReduceLROnPlateau", given, more)
    assert found == pytest.approx(0.05 * 0.1**2)


def last_rate(tmp_path, monkeypatch, name, given, more=()):
    found = []
    monkeypatch.setattr(
        "bpn_lightning.model.module.ContinualModule.on_train_end",
        lambda module: found.append(module.trainer.optimizers[0].param_groups[0]["lr"]),
    )
    arguments = {
        "model.scheduler": f"torch.optim.lr_scheduler.{name}",
        **{f"model.scheduler.init_args.{key}": value for key, value in given.items()},
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.init_args.lr": 0.05,
        "data.init_args.epochs_per_task": 3,
        "data.init_args.num_tasks": 2,
        "data.init_args.batch_size": 32,
        "runs": tmp_path,
        **dict(more),
    }
    flags = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
    command = ["--config", "digits_inc.yaml", "--method", "finetune", "--quiet"]
    assert main([*command, *flags]) == 0
    return found[-1]
