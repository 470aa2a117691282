"""A frozen core that is sharded learns, in every process, what one process learns with a whole one."""

import gc
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from fits import Function
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bpn_lightning import ContinualModule, export_module
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import CheckpointError, ConfigurationError, ProcessesError
from bpn_lightning.model.step import Step
from bpn_lightning.nn.sharding import blocks, is_sharded, shard
from bpn_lightning.strategies import (
    EWC,
    IA3,
    AveragedGEM,
    BeneficialPerturbation,
    BitFit,
    ContinualStrategy,
    FineTuning,
    GradientEpisodicMemory,
    LoRA,
    MemoryAwareSynapses,
    NearestClassMean,
    ParameterSuperposition,
    PromptTuning,
    SynapticIntelligence,
)
from bpn_lightning.trainer.sharding import ShardedCoreStrategy

FROZEN = {"train": "modes", "mask": "seen"}


# --- what learns ---------------------------------------------------------------------------------


def linear() -> nn.Module:
    """With running statistics; what a process samples at first is its own."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(64, 15), nn.BatchNorm1d(15), nn.ReLU()),
        nn.Sequential(nn.Linear(15, 12), nn.ReLU()),
    )


def transformer() -> nn.Module:
    """Eight tokens of eight pixels, through two blocks."""
    layer = nn.TransformerEncoderLayer(8, 2, 11, dropout=0.0, batch_first=True)
    return Function(
        lambda self, images: self.encoder(images.flatten(1, 2)).mean(1),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )


def residual() -> nn.Module:
    """Convolutions, whose low-rank products keep the tasks of a batch apart."""
    block = Function(
        lambda self, x: torch.relu(x + self.second(torch.relu(self.first(x)))),
        first=nn.Conv2d(3, 3, 3, padding=1),
        second=nn.Conv2d(3, 3, 3, padding=1),
    )
    return nn.Sequential(nn.Conv2d(1, 3, 3), block, nn.AdaptiveAvgPool2d(2), nn.Flatten())


BACKBONES = {"linear": linear, "transformer": transformer, "residual": residual}
METHODS: dict[str, Callable[[], list[ContinualStrategy]]] = {
    "bitfit": lambda: [BitFit()],
    "bd": lambda: [BeneficialPerturbation(4)],
    "gd": lambda: [BeneficialPerturbation(4, direction="gradient")],
    "ia3": lambda: [IA3()],
    "lora": lambda: [LoRA(2)],
    "prompt": lambda: [PromptTuning(3)],
    "finetune": lambda: [FineTuning()],
    "psp": lambda: [ParameterSuperposition()],
    "ewc": lambda: [EWC(update="clamped")],
    "si": lambda: [SynapticIntelligence()],
    "mas": lambda: [MemoryAwareSynapses()],
    "gem": lambda: [GradientEpisodicMemory(8)],
    "agem": lambda: [AveragedGEM(8)],
    "ncm": lambda: [BitFit(), NearestClassMean()],
}
FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.5},
}


def digits(**arguments: Any) -> SplitDigits:
    return SplitDigits(
        **{"num_tasks": 3, "epochs_per_task": 1, "batch_size": 33, "seed": 0, **arguments}
    )


def made(backbone: str = "linear", **arguments: Any) -> ContinualModule:
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    network = BACKBONES[backbone]()
    return ContinualModule(network, **{**FROZEN, "optimizer": optimizer, **arguments})


def trainer_of(devices: int, callbacks: Sequence[Callback], **flags: Any) -> Trainer:
    return Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=devices,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{
            "strategy": ShardedCoreStrategy() if devices > 1 else "auto",
            "precision": "64-true",
            **flags,
        },
    )


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """What was learned."""
    state = trainer.strategy.lightning_module_state_dict().items()
    return {name: value.double() for name, value in state if isinstance(value, Tensor)}


def learn(method: str, backbone: str, flags: str, devices: int) -> dict[str, Tensor]:
    module = made(backbone, check_processes=True)
    trainer = trainer_of(devices, METHODS[method](), **FLAGS[flags])
    trainer.fit(module, digits())
    assert is_sharded(module.backbone) == (devices > 1)
    return whole(trainer)


CELLS = [("bitfit", "linear", "")]
OTHERS = [
    *((name, "linear", "") for name in METHODS if name not in ("bitfit", "prompt")),
    *(
        (name, "transformer", "")
        for name in ("bitfit", "bd", "ia3", "lora", "prompt", "psp", "finetune")
    ),
    *((name, "residual", "") for name in ("bitfit", "lora", "psp")),
    *(("bd", "linear", flags) for flags in FLAGS if flags),
]


@pytest.mark.filterwarnings("ignore:(Averaged)?G(EM|radientEpisodicMemory).*projects")
@pytest.mark.parametrize(
    ("method", "backbone", "flags"),
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.matrix) for cell in OTHERS)],
)
def test_two_processes_learn_what_one_learns(
    method: str, backbone: str, flags: str, ranks: Any
) -> None:
    """In double precision; between processes bit for bit, after every task too."""
    one = learn(method, backbone, flags, 1)
    first, second = ranks(learn, method, backbone, flags, 2)
    torch.testing.assert_close(first, one, rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


# --- what each process holds ---------------------------------------------------------------------


class Held(Callback):
    """The weights as they were passed, and what of them is there while a fit runs."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        named = pl_module.backbone.named_parameters()
        self.passed = {name: weakref.ref(p) for name, p in named}
        self.full = sum(p.numel() for p in pl_module.backbone.parameters() if p.dim() > 0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        gc.collect()
        core = [n for n, p in pl_module.backbone.named_parameters() if isinstance(p, DTensor)]
        self.left = [name for name in core if self.passed[name]() is not None]


def hold(backbone: str) -> tuple[int, int, int, list[str], list[str]]:
    held, module = Held(), made(backbone)
    trainer = trainer_of(2, [BitFit(), held])
    trainer.fit(module, digits(num_tasks=2))
    named = dict(module.named_parameters())
    core = [p for p in named.values() if isinstance(p, DTensor)]
    own = [name for name, p in named.items() if not isinstance(p, DTensor)]
    largest = sum(-(-len(p) // 2) * p[0].numel() if p.dim() else 1 for p in core)
    return sum(p.to_local().numel() for p in core), largest, sum(map(Tensor.numel, core)), own, held.left  # fmt: skip


def test_a_process_holds_half_of_the_core_and_all_of_the_modes(ranks: Any) -> None:
    (mine, most, full, own, left), (theirs, *_) = ranks(hold, "linear")
    assert mine <= most
    assert mine + theirs == full == 64 * 15 + 15 + 2 * 15 + 15 * 12 + 12
    assert not left, "the whole weights are gone"
    assert {name.rpartition(".")[2] for name in own} == {"M", "W", "weight", "bias"}
    assert all("bias_units" in name or ".head." in name for name in own)


def test_blocks_are_what_containers_list() -> None:
    from torchvision.models import VisionTransformer, resnet18
    from torchvision.models.resnet import BasicBlock

    vit = VisionTransformer(8, 4, 2, 2, 8, 16)
    assert list(blocks(vit)) == [*vit.encoder.layers]
    assert [type(one) for one in blocks(resnet18())] == [BasicBlock] * 8
    assert not list(blocks(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU())))


class Different(Callback):
    """Networks of each process's own, as where nobody seeds."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        with torch.no_grad():
            for tensor in (*pl_module.parameters(), *pl_module.network.backbone.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(trainer.global_rank)


def learn_from_different() -> dict[str, Tensor]:
    module = made(check_processes=True)
    trainer = trainer_of(2, [Different(), BitFit()])
    trainer.fit(module, digits())
    return whole(trainer)


def test_all_begin_with_the_first_processs_weights(ranks: Any) -> None:
    one = learn("bitfit", "linear", "", 1)
    for found in ranks(learn_from_different):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12, equal_nan=True)


def learn_unreduced() -> str:
    with patch.object(Step, "reduce_gradients", lambda self: None):
        try:
            learn("bitfit", "linear", "", 2)
        except ProcessesError as error:
            return str(error)
    return "nothing"


@pytest.mark.matrix
def test_without_the_reduction_processes_differ(ranks: Any) -> None:
    """What the check after every task, of the tests above, sees."""
    mine, theirs = ranks(learn_unreduced)
    assert mine == theirs
    assert "some differ from process 0 in backbone.1.1.bias_units.W of the network" in mine


# --- checkpoints ---------------------------------------------------------------------------------


class SaveAt(Callback):
    """A checkpoint after so many updates, where a batch or an epoch ends or begins."""

    def __init__(self, path: str, step: int, moment: str = "on_train_batch_end") -> None:
        self.path, self.step = path, step
        setattr(self, moment, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def save(path: str) -> dict[str, Tensor]:
    trainer = trainer_of(2, [BitFit(), SaveAt(path, 25)])
    trainer.fit(made(), digits())
    trainer.save_checkpoint(f"{path}.end")
    return whole(trainer)


def go_on(path: str, devices: int) -> dict[str, Tensor]:
    trainer = trainer_of(devices, [BitFit()])
    trainer.fit(made(), digits(), ckpt_path=path, weights_only=True)
    return whole(trainer)


def test_a_checkpoint_is_whole_and_any_number_of_processes_resumes_it(
    ranks: Any, tmp_path: Path
) -> None:
    path = str(tmp_path / "a.ckpt")
    first, second = ranks(save, path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"]["network.backbone.1.0.weight"].shape == (15, 64)
    assert not any(isinstance(value, DTensor) for value in saved["state_dict"].values())
    assert saved["optimizer_states"][0]["state"], "momentum"
    for resumed in ranks(go_on, path, 2):
        torch.testing.assert_close(resumed, first, rtol=0, atol=0, equal_nan=True)
    with pytest.warns(UserWarning, match="of 2 and this run of 1 processes"):
        alone = go_on(path, 1)
    torch.testing.assert_close(alone, first, rtol=1e-9, atol=1e-12, equal_nan=True)
    loaded = ContinualModule.load_from_checkpoint(
        f"{path}.end", backbone=linear(), map_location="cpu", **FROZEN
    )
    state = {name: v for name, v in loaded.state_dict().items() if isinstance(v, Tensor)}
    rounded = {name: first[name].to(value.dtype) for name, value in state.items()}
    torch.testing.assert_close(state, rounded, rtol=0, atol=0, equal_nan=True)
    export_module(loaded, tmp_path / "exported")


def refuse_trained(path: str) -> str:
    with pytest.raises(CheckpointError) as error:
        trainer_of(2, [FineTuning()]).fit(made(), digits(), ckpt_path=path, weights_only=True)
    return str(error.value)


def test_a_checkpoint_of_a_core_that_trained_is_refused(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "trained.ckpt")
    between = SaveAt(path, 9, "on_train_epoch_start")  # a task has 9 batches
    trainer_of(1, [FineTuning(), between]).fit(made(train="all"), digits())
    assert set(ranks(refuse_trained, path)) == {
        (
            "Expected a checkpoint of a run whose shared weights were frozen with ShardedCoreStrategy, but got one "
            "whose optimizer trained them. Export it, and continue from the export."
        )
    }


# --- around the fit ------------------------------------------------------------------------------


def after_a_fit() -> list[Any]:
    """What is measured after a fit, with the same strategy, and by hand; and what is refused."""
    module, stream = made(), digits(num_tasks=2)
    trainer = trainer_of(2, [BitFit()])
    trainer.fit(module, stream)
    (tested,) = trainer.test(module, stream, verbose=False)
    refused = []
    for whole_only in (
        lambda: export_module(module, "nowhere"),
        lambda: module.for_inference(0),
        lambda: trainer_of(2, [BitFit()], strategy="ddp").test(module, stream, verbose=False),
    ):
        with pytest.raises(ConfigurationError) as error:
            whole_only()
        refused.append(str(error.value))
    return [tested["test/accuracy"], module.evaluate().tolist(), refused]


def test_what_a_sharded_module_can_do_after_a_fit(ranks: Any) -> None:
    mine, theirs = ranks(after_a_fit)
    assert mine == theirs
    tested, accuracies, refused = mine
    assert tested == pytest.approx(sum(accuracies) / 2)
    assert set(refused) == {
        (
            "Expected a module whose weights are whole, but its backbone is sharded over processes. Save a "
            "checkpoint with trainer.save_checkpoint, and load it in one process with "
            "ContinualModule.load_from_checkpoint."
        )
    }


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"train": "all"},
        {},
        (
            "Expected train to be 'modes' or 'head' with ShardedCoreStrategy, which shards weights that do not train, "
            "but got 'all', so task 0 trains them. Set train to 'modes', or use the strategy 'ddp'."
        ),
    ),
    (
        {"train_first": "all"},
        {},
        (
            "Expected train_first to be 'modes' or 'head' with ShardedCoreStrategy, which shards weights that do not "
            "train, but got 'all', so task 0 trains them. Set train_first to 'modes', or use the strategy 'ddp'."
        ),
    ),
    (
        {},
        {"sync_batchnorm": True},
        (
            "Expected trainer.sync_batchnorm to be off with ShardedCoreStrategy, but got True. A frozen core is in "
            "evaluation mode, and needs no statistics of batches. Leave it out."
        ),
    ),
]


def be_refused() -> list[str]:
    messages = []
    for arguments, flags, _ in REFUSED:
        with pytest.raises(ConfigurationError) as error:
            trainer_of(2, [FineTuning()], **flags).fit(made(**arguments), digits())
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_sharded_is_refused(ranks: Any) -> None:
    mine, theirs = ranks(be_refused)
    assert mine == theirs == [message for *_, message in REFUSED]


def test_a_single_layer_is_refused() -> None:
    with pytest.raises(ConfigurationError) as error:
        shard(nn.Linear(4, 4), cast(Any, None))
    assert str(error.value) == (
        "Expected backbone to consist of layers where it is sharded, but got Linear, which is one itself. Put it "
        "into torch.nn.Sequential."
    )
