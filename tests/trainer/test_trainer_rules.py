"""What a stream cannot run under is refused by name, before training."""

import os
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from bpn_lightning.cli.main import main
from bpn_lightning.datamodules import SplitDigits, StreamOf
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies import EncoderBasedLifelongLearning, JointTraining
from bpn_lightning.trainer.launch import check_batches, check_launch
from bpn_lightning.trainer.sharding import ShardedCoreStrategy

LOST = "Memories, importances and accuracies would be lost when the processes end, since Lightning returns only the weights from them. Run a script with 'ddp'; in a notebook use devices=1."


def trainer(**flags):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, **{"devices": 2, **flags}
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"strategy": "ddp_spawn"},
            (
                "Expected trainer.strategy to be 'auto' or 'ddp', but got one that starts processes by "
                f"'spawn'. {LOST}"
            ),
        ),
        (
            {"strategy": "ddp_fork"},
            (
                "Expected trainer.strategy to be 'auto' or 'ddp', but got one that starts processes by "
                f"'fork'. {LOST}"
            ),
        ),
        (
            {"strategy": DDPStrategy(model_averaging_period=4)},
            (
                "Expected trainer.strategy to be one that averages gradients, but got "
                "DDPStrategy(model_averaging_period=4). Between averages, weights, memories and importances would differ between processes. Leave it out."
            ),
        ),
        (
            {"strategy": DDPStrategy(ddp_comm_hook=bf16_compress_hook)},
            (
                "Expected trainer.strategy to be one without a communication hook, but got "
                "DDPStrategy(ddp_comm_hook=bf16_compress_hook). The gradient would differ from that of a single process. Leave it out."
            ),
        ),
        (
            {"strategy": DDPStrategy(static_graph=True), "accumulate_grad_batches": 2},
            (
                "Expected trainer.strategy to be without a static graph when gradients accumulate, but got "
                "DDPStrategy(static_graph=True). torch fails with an internal assertion. Leave static_graph or accumulate_grad_batches out."
            ),
        ),
        (
            {"strategy": "ddp", "sync_batchnorm": True},
            (
                "Expected trainer.sync_batchnorm to be off on the CPU, but got True. torch.nn.SyncBatchNorm "
                "needs a GPU. Leave it out, or use layers that normalize each sample."
            ),
        ),
    ],
)
def test_ways_to_launch_that_are_refused(flags, message):
    with pytest.raises(ConfigurationError) as error:
        check_launch(trainer(**flags))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "flags",
    [
        {"devices": 1, "strategy": "auto"},
        {"strategy": "ddp"},
        {"strategy": "ddp_find_unused_parameters_true"},
        {"strategy": DDPStrategy(static_graph=True)},
        {"strategy": DDPStrategy(gradient_as_bucket_view=True), "accumulate_grad_batches": 2},
        {"devices": 1, "strategy": "auto", "sync_batchnorm": True},
        {"strategy": ShardedCoreStrategy()},
    ],
)
def test_ways_to_launch_that_are_taken(flags):
    check_launch(trainer(**flags))


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        # Neither can be made here: one wants GPUs, the other a package.
        (SimpleNamespace(), "SimpleNamespace"),
        (DeepSpeedStrategy.__new__(DeepSpeedStrategy), "DeepSpeedStrategy"),
        (ModelParallelStrategy(), "ModelParallelStrategy"),
    ],
)
def test_what_shards_parameters_is_refused(strategy, name):
    with pytest.raises(ConfigurationError) as error:
        check_launch(SimpleNamespace(strategy=strategy))
    assert str(error.value) == (
        f"Expected trainer.strategy to be 'auto' or 'ddp', but got {name}. Methods need whole parameters. Where tasks leave the core as it is (train 'modes' or 'head'), bpn_lightning.trainer.sharding.ShardedCoreStrategy shards it by FSDP2."
    )


@pytest.mark.parametrize("kind", [XLAStrategy, SingleDeviceXLAStrategy])
def test_xla_is_refused(kind):
    """Neither can be made here: both want a package."""
    with pytest.raises(ConfigurationError) as error:
        check_launch(SimpleNamespace(strategy=kind.__new__(kind)))
    assert str(error.value) == (
        f"Expected trainer.strategy to be one for a CPU or GPUs, but got {kind.__name__}. XLA compiles whole updates, and no method was tested on it. Use accelerator 'cpu' or 'cuda'."
    )


def test_precisions_of_unknown_layers_are_refused():
    odd = SimpleNamespace(strategy=trainer(devices=1).strategy, precision="transformer-engine")
    odd.accumulate_grad_batches, odd.world_size, odd.num_devices, odd.num_nodes = 1, 1, 1, 1
    with pytest.raises(ConfigurationError) as error:
        check_launch(odd)
    assert str(error.value) == (
        "Expected trainer.precision to be one of 64-true, 32-true, bf16-mixed, 16-mixed, bf16-true, "
        "16-true, but got transformer-engine. Others replace layers, which strategies do not support."
    )


def test_the_command_refuses_before_it_starts_processes(tmp_path, capfd):
    runs = tmp_path / "runs"
    flags = ["--trainer.strategy", "ddp_spawn", "--trainer.accelerator", "cpu"]
    command = ["--config", "digits_inc.yaml", "--method", "ewc", "--trainer.devices", "2", *flags]
    assert main([*command, "--runs", str(runs)]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "bpn-fit: error: Expected trainer.strategy to be 'auto' or 'ddp', but got one that starts "
        f"processes by 'spawn'. {LOST}"
    )
    assert not runs.exists()


# --- the network and the batches -----------------------------------------------------------------


def one_place(channels):
    """A BatchNorm2d that gets one place of each image, as those in the depths of a ResNet do."""
    return nn.BatchNorm2d(channels)


def normalizing(kind=nn.BatchNorm1d):
    if kind in (nn.BatchNorm2d, one_place):
        size = 8 if kind is one_place else 3
        return nn.Sequential(nn.Identity(), nn.Conv2d(1, 16, size), kind(16), nn.Flatten())
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), kind(16), nn.ReLU())


@pytest.mark.parametrize(
    ("kind", "smallest", "processes", "said"),
    [
        (nn.BatchNorm1d, 4, 2, None),
        (nn.BatchNorm1d, 3, 2, "2 samples of each batch"),
        (nn.BatchNorm1d, 1, 1, "2 samples of each batch"),
        (nn.BatchNorm2d, 2, 2, None),
        (nn.BatchNorm2d, 1, 1, None),
        (nn.BatchNorm2d, 1, 2, "1 samples of each batch"),
        (one_place, 3, 2, "2 samples of each batch"),
        (one_place, 4, 2, None),
        (nn.LayerNorm, 1, 2, None),
    ],
)
def test_batches_too_small_for_their_statistics(kind, smallest, processes, said):
    driver = SimpleNamespace(strategy=None, world_size=processes)
    check = partial(
        check_batches,
        driver,
        normalizing(kind),
        torch.zeros(1, 1, 8, 8),
        [0, 1],
        lambda task: 64 - task * (64 - smallest),
    )
    if said is None:
        return check()
    with pytest.raises(ConfigurationError) as error:
        check()
    assert str(error.value) == (
        f"Expected batch_size to leave every process at least {said} when a layer (backbone.2) normalizes "
        f"batches, but task 1 has a batch of {smallest} for {processes} process{'es' if processes > 1 else ''}. Choose another "
        "batch_size, or a layer that normalizes each sample."
    )


def test_layers_that_are_frozen_take_no_statistics():
    driver = SimpleNamespace(strategy=None, world_size=2)
    check_batches(driver, normalizing().eval(), torch.zeros(1, 64), [0], lambda task: 1)


def test_a_single_sample_that_is_left_over_is_learned_with_the_batch_before(fit):
    """288 samples in batches of 41: seven, and one more. BatchNorm would have no statistics of it."""
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=41)
    module, _ = fit(stream=stream, backbone=normalizing())
    assert module.closed == 1
    assert [batch.global_size for batch in stream.train_loader(0, 0)] == [41] * 6 + [42]


def test_a_batch_that_cannot_be_avoided_is_refused_and_may_be_left_out(fit):
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=1)
    with pytest.raises(ConfigurationError, match=r"task 0 has a batch of 1 for 1 process\."):
        fit(stream=stream, backbone=normalizing())


@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 3}])
def test_batches_of_a_stream_of_streams_are_counted(fit, flags):
    """BatchNorm asks for the smallest, accumulation for those of an update."""
    parts = [
        SplitDigits(num_tasks=1, epochs_per_task=1, batch_size=size, class_order=order)
        for size, order in ((16, [0, 1]), (41, [2, 3]))
    ]
    module, _ = fit(stream=StreamOf(parts), backbone=normalizing(), trainer=flags)
    assert module.closed == 1


@pytest.fixture
def group_of_its_own():
    """DDP leaves its process group and its rank in the environment behind, for later tests to find."""
    with mock.patch.dict(os.environ):
        yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_its_own")
def test_unused_parameters_are_not_looked_for_where_a_strategys_phase_accumulates(fit):
    with pytest.raises(ConfigurationError) as error:
        fit(
            [EncoderBasedLifelongLearning()],
            mask="task",
            trainer={
                "strategy": DDPStrategy(find_unused_parameters=True, process_group_backend="gloo"),
                "devices": 1,
                "accumulate_grad_batches": 2,
            },
        )
    assert str(error.value) == (
        "Expected trainer.strategy to be without find_unused_parameters when gradients accumulate and a phase trains a strategy, such as 'autoencoder' of task 0: torch would mark every parameter as unused twice. Use 'ddp'."
    )


# --- fused optimizers ----------------------------------------------------------------------------


def test_a_fused_optimizer_is_not_clipped_in_half_precision(fit):
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigurationError) as error:
        fit(
            optimizer=partial(torch.optim.SGD, lr=0.05, fused=True),
            trainer={"plugins": [scaled], "gradient_clip_val": 1.0},
        )
    assert str(error.value) == (
        "Expected an optimizer without fused=True when gradients are clipped in 16-mixed precision, but got a fused SGD. Set fused to False, or use bf16-mixed."
    )


# --- tasks of one class --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "stream", "said"),
    [
        ("task", {"classes_per_task": 1, "num_tasks": 2}, "2 of 2 tasks, such as '0'"),
        ("task", {"classes_per_task": [2, 1]}, "1 of 2 tasks, such as '2'"),
        (
            "shared",
            {"classes_per_task": 1, "num_tasks": 2, "domain_incremental": True},
            "2 of 2 tasks",
        ),
        ("all", {"classes_per_task": 1, "num_tasks": 1}, "1 of 1 tasks"),
    ],
)
def test_a_class_with_nothing_beside_it_is_warned_of(fit, mask, stream, said):
    with pytest.warns(UserWarning, match=f"With mask='{mask}', {said}, .*accuracy always 1.0"):
        module, _ = fit(stream=SplitDigits(epochs_per_task=1, **stream), mask=mask)
    alone = [k for k, task in enumerate(module.tasks) if task.num_classes == 1]
    assert module.accuracy_matrix.accuracy[0, alone].tolist() == [1.0] * len(alone)


@pytest.mark.parametrize("mask", ["all", "seen"])
def test_one_class_at_a_time_is_learned_among_the_others(fit, mask):
    """Without a warning, and not by having no choice: joint training learns to tell them apart."""
    stream = SplitDigits(classes_per_task=1, num_tasks=3, epochs_per_task=4, seed=0)
    module, _ = fit([JointTraining()], stream=stream, mask=mask)
    assert module.accuracy_matrix.accuracy[-1].min() > 0.8
    module, _ = fit(stream=stream, mask=mask)
    assert module.accuracy_matrix.accuracy[-1, :2].max() < 0.5, "fine-tuning forgets"
