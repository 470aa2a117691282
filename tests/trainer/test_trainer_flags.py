"""Every flag of Lightning's Trainer has a rule over a stream: it works, or is refused before training."""

import re
from datetime import timedelta
from inspect import signature
from pathlib import Path

import lightning.pytorch.callbacks as lightnings
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment

from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.run.recording import MetricsFile
from bpn_lightning.strategies import EWC

PAGE = Path(__file__).parent.parent.parent / "docs" / "trainer_flags.md"

NOTHING = "Nothing would be learned. Leave it out."
EARLY = "The stream would end earlier. Leave it out, or increase epochs_per_task."
#: Flag, value, and what is said. A stream of two tasks of two epochs of two batches.
REFUSED = [
    (
        "fast_dev_run",
        True,
        ("off", True, "It would end the stream inside its first task. Use epochs_per"),
    ),
    (
        "max_epochs",
        0,
        ("-1, the length of the stream (4 epochs)", 0, "Pass max_epochs=-1 or 4 (unset"),
    ),
    ("min_epochs", 5, ("at most the stream's 4 epochs", 5, EARLY)),
    ("min_steps", 9, ("at most the stream's 8 updates", 9, EARLY)),
    ("max_steps", 0, ("at least 1, or -1 for the whole stream", 0, NOTHING)),
    ("max_time", {"seconds": 0}, ("more than 0 seconds", "0.0 seconds", NOTHING)),
    ("max_time", timedelta(days=-1), ("more than 0 seconds", "-86400.0 seconds", NOTHING)),
    (
        "overfit_batches",
        2,
        ("0", 2, "It would replace each task's test data by training data. Use"),
    ),
    (
        "limit_train_batches",
        0,
        ("more than 0", 0, "Nothing would be learned. Leave it out; trainer.te"),
    ),
    (
        "limit_train_batches",
        0.0,
        ("more than 0", 0.0, "Nothing would be learned. Leave it out; train"),
    ),
    (
        "limit_train_batches",
        0.4,
        (
            "a number that leaves task 0 at least one batch",
            "0.4, which leaves none",
            "Increase it, or lower batch_size.",
        ),
    ),
    (
        "limit_val_batches",
        0.5,
        (
            "0, or a number that leaves task 0 at least one batch",
            "0.5, which leaves none",
            "Increase it, or lower eval_batch_size.",
        ),
    ),
    (
        "accumulate_grad_batches",
        0,
        ("a whole number of at least 1", 0, "1 updates after every batch."),
    ),
    (
        "accumulate_grad_batches",
        -2,
        ("a whole number of at least 1", -2, "1 updates after every bat"),
    ),
    (
        "accumulate_grad_batches",
        1.5,
        ("a whole number of at least 1", 1.5, "1 updates after every b"),
    ),
    (
        "gradient_clip_val",
        -1.0,
        ("at least 0", -1.0, "Lightning would clip nothing, or fail. Leave it"),
    ),
    (
        "gradient_clip_val",
        float("nan"),
        ("at least 0", "nan", "Lightning would clip nothing, or fail."),
    ),
    ("check_val_every_n_epoch", 0, ("at least 1", 0, "Use limit_val_batches=0 for no validation.")),
    (
        "val_check_interval",
        0,
        (
            "at least 1 batch, a fraction of an epoch, or a time",
            0,
            "Use limit_val_batches=0 for no validation.",
        ),
    ),
    (
        "val_check_interval",
        3,
        (
            "at most the 2 batches of an epoch of task 0",
            3,
            "Lower it, use a fraction, or check_val_every_n_epoch=null to count over epochs.",
        ),
    ),
    (
        "reload_dataloaders_every_n_epochs",
        2,
        ("0 or 1", 2, "Every epoch needs its own loader. Leave it out."),
    ),
]

#: With these, the weights are what they are without any.
WITHOUT_EFFECT = {
    "accelerator": ["auto"],
    "strategy": ["auto"],
    "devices": [1],
    "num_nodes": [1],
    "precision": ["32-true"],
    "logger": ["a file"],
    "callbacks": [[Timer()]],
    "fast_dev_run": [False],
    "max_epochs": [4],
    "min_epochs": [4],
    "max_steps": [8],
    "min_steps": [8],
    "max_time": [{"hours": 1}],
    "limit_train_batches": [2, 1.0],
    "limit_val_batches": [0, 1],
    "limit_test_batches": [0],
    "limit_predict_batches": [0],
    "overfit_batches": [0.0],
    "val_check_interval": [0.5, 1, 2, "00:00:00:01"],
    "check_val_every_n_epoch": [2],
    "num_sanity_val_steps": [2, -1],
    "log_every_n_steps": [0, 1],
    "enable_checkpointing": [True],
    "enable_progress_bar": [True],
    "enable_model_summary": [True],
    "accumulate_grad_batches": [1],
    "gradient_clip_val": [0, 1e6],
    "gradient_clip_algorithm": ["norm"],
    "deterministic": [True, "warn"],
    "benchmark": [True],
    "inference_mode": [False],
    "use_distributed_sampler": [False],
    "profiler": ["simple"],
    "detect_anomaly": [True],
    "barebones": [True],
    "plugins": [[TorchCheckpointIO(), LightningEnvironment()]],
    "sync_batchnorm": [True],
    "reload_dataloaders_every_n_epochs": [1],
    "enable_autolog_hparams": [False],
    "model_registry": ["somebody/model"],
    "default_root_dir": ["."],
}


def test_no_flag_of_lightning_is_forgotten():
    """A new one in Lightning is to be walked, here and in the table."""
    assert {*WITHOUT_EFFECT} == set(signature(Trainer).parameters)


def test_the_page_has_every_flag_and_every_callback():
    rows = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row.split(" | ")[0])}
    missing = {*signature(Trainer).parameters, *lightnings.__all__} - named
    assert not missing


def stream():
    return SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=150, validation_fraction=0.2, seed=0
    )


@pytest.mark.parametrize(("flag", "value", "said"), REFUSED)
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_what_contradicts_the_stream_is_refused_by_name(fit, flag, value, said):
    with pytest.raises(ConfigurationError) as error:
        fit([EWC(100.0)], stream=stream(), trainer={flag: value})
    rule, got, remedy = said
    assert str(error.value).startswith(
        f"Expected trainer.{flag} to be {rule}, but got {got}. {remedy}"
    )


@pytest.fixture(scope="module")
def plain():
    """The weights of a run without flags, once it is there."""
    return {}


@pytest.fixture
def deterministic():
    """Lightning sets it for good."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
@pytest.mark.filterwarnings("ignore:.*barebones=True")
@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag, values in WITHOUT_EFFECT.items() for value in values],
)
def test_what_only_shows_or_measures_changes_nothing(
    fit, plain, tmp_path, monkeypatch, flag, value
):
    monkeypatch.chdir(tmp_path)
    if not plain:
        module, _ = fit([EWC(100.0)], stream=stream())
        plain.update(module.state_dict())
    flags = {flag: MetricsFile(tmp_path / "m.csv") if value == "a file" else value}
    if flag == "callbacks":
        flags = {flag: [EWC(100.0), *value]}
    if flag == "logger":
        flags["log_every_n_steps"] = 1
    if flag == "barebones":  # it switches these off by itself
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        flags |= dict.fromkeys((*off, "num_sanity_val_steps"))
    module, trainer = fit([EWC(100.0)], stream=stream(), trainer=flags)
    assert (trainer.global_step, module.closed) == (8, 1)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), plain[name].nan_to_num()), name


@pytest.mark.parametrize("flags", [{"max_steps": 3}, {"max_steps": 3, "min_steps": 8}])
def test_a_stream_that_ends_early_says_what_it_has_not_learned(fit, flags):
    with pytest.warns(UserWarning, match="tasks 1, 2 of 2 are not learned"):
        _, trainer = fit(stream=stream(), trainer=flags)
    assert trainer.global_step == 3


def test_lightning_says_what_it_makes_of_16_mixed_on_a_cpu():
    with pytest.warns(UserWarning, match=r"16-mixed.*not supported on CPU. Using .*bf16-mixed"):
        trainer = Trainer(accelerator="cpu", precision="16-mixed", logger=False)
    assert trainer.precision == "bf16-mixed"
