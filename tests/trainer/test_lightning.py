"""What Lightning does not document is reached through one file, and there it is what it is taken for."""

import ast
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.plugins import MixedPrecision, TorchSyncBatchNorm
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bpn_lightning.trainer import lightning as door

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("bpn_lightning", "strategies", "datamodules", "benchmarks", "examples")
DOOR = ROOT / "bpn_lightning" / "trainer" / "lightning.py"
FILES = sorted({*(path for one in FOLDERS for path in (ROOT / one).rglob("*.py"))} - {DOOR})

LOOPS = {
    *("fit_loop", "validate_loop", "test_loop", "predict_loop", "epoch_loop", "val_loop"),
    *("batch_progress", "epoch_progress", "optim_progress", "scheduler_progress"),
}
LIGHTNINGS = re.compile("trainer|pl_module|rank_zero")


# --- nobody else reaches for it ------------------------------------------------------------------


@cache
def private_names() -> frozenset[str]:
    """Of Lightning: names with an underscore that its files define or assign on self."""
    pattern = re.compile(r"(?:\bself\.|\bdef |\bclass |\btrainer\.)(_(?!_)\w+)")
    files = Path(lightning.__file__).parent.rglob("*.py")
    return frozenset(name for path in files for name in pattern.findall(path.read_text()))


def own_names(tree: ast.AST) -> Iterator[str]:
    """What a file defines, or assigns by name or on self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) == "self" else []


def has_default(call: ast.Call) -> bool:
    """Whether getattr or hasattr goes on where an attribute of an object of Lightning's is not there."""
    owner, name, *default = call.args
    named = isinstance(owner, ast.Name | ast.Attribute) and LIGHTNINGS.search(ast.unparse(owner))
    return bool(named and (default or isinstance(name, ast.Constant)))


@cache
def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def own_names_of_room(folder: Path) -> frozenset[str]:
    return frozenset(name for path in folder.glob("*.py") for name in own_names(parse(path)))


def accesses(tree: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[str]:
    """What reaches for Lightning's private names or loops, writes its state, or has a default for it."""
    private = private_names() - own
    for node in ast.walk(tree):
        found = False
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found = any(name.startswith("_") for name in names)
        elif isinstance(node, ast.Attribute):
            written = isinstance(node.ctx, ast.Store | ast.Del)
            trainer = re.search(
                r"^(self\.|cls\.|host\.|module\.)?_?trainer\b", ast.unparse(node.value)
            )
            found = node.attr in private | LOOPS or bool(written and trainer)
        elif isinstance(node, ast.Constant):
            found = node.value in private | LOOPS | {"loops"}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found = node.func.id in ("getattr", "hasattr") and has_default(node)
        if found:
            yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_other_files_keep_to_what_lightning_documents(path: Path) -> None:
    found = list(accesses(parse(path), own_names_of_room(path.parent)))
    assert not found, f"give them functions of their own in {DOOR.name}: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher",
        "trainer.fit_loop.max_epochs = 3",
        "epochs = self.trainer.fit_loop.max_epochs",
        "trainer.should_stop = True",
        "self.trainer.reload_dataloaders_every_n_epochs = 1",
        "self._trainer is None",
        "module._compiler_ctx",
        "timer._duration",
        "trainer._accelerator_connector.cluster_environment",
        "getattr(strategy, '_model_averaging_period', None)",
        "getattr(trainer, 'datamodule', None)",
        "hasattr(self.trainer, 'val_check_interval')",
        "getattr(rank_zero_only, 'rank', 0)",
        "name == '_current_fx_name'",
        "checkpoint['loops']",
    ],
)
def test_such_lines_are_found(line: str) -> None:
    assert list(accesses(ast.parse(line)))


def test_every_function_has_a_contract() -> None:
    snake = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in door.__all__}
    assert {name for name in snake if f"test_{name}" not in globals()} == set()


# --- the loops -----------------------------------------------------------------------------------


class Loader:
    """Three batches, from the one that Lightning has come to."""

    def __init__(self) -> None:
        self.first = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Tensor]:
        first, self.first = self.first, 0
        return iter([torch.full((1, 1), float(number)) for number in range(first, 3)])

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def train_dataloader(self) -> Loader:
        self.asked += 1
        return Loader()


class Module(LightningModule):
    """Lightning's own, so that none of ours stands in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class At(Callback):
    """Notes what a function gives at some hooks."""

    def __init__(self, look: Callable[[Trainer], Any], *hooks: str) -> None:
        self.seen: list[Any] = []
        for hook in hooks:
            setattr(self, hook, lambda trainer, *_, **__: self.seen.append(look(trainer)))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**flags: Any) -> Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        defaults = {
            **dict.fromkeys(quiet, False),
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
        }
        return Trainer(**{"devices": 1, "max_epochs": 1, **defaults, **flags})

    return make


def test_set_max_epochs(train: Any) -> None:
    def end(trainer: Trainer) -> None:
        door.set_max_epochs(trainer, 2)

    trainer = train(max_epochs=-1, callbacks=At(end, "on_train_start"))
    trainer.fit(Module(), Data())
    assert (trainer.current_epoch, trainer.max_epochs) == (2, 2)


def test_set_epochs_done(train: Any) -> None:
    def skip(trainer: Trainer) -> None:
        door.set_epochs_done(trainer, 2)

    note = At(lambda trainer: trainer.current_epoch, "on_train_epoch_start")
    trainer = train(max_epochs=5, callbacks=[At(skip, "setup"), note])
    trainer.fit(Module(), Data())
    assert (note.seen, trainer.current_epoch) == ([2, 3, 4], 5)


def test_reload_train_loader_every_epoch(train: Any) -> None:
    asked = []
    for hooks in ((), ("setup",)):
        data = Data()
        callback = At(door.reload_train_loader_every_epoch, *hooks)
        train(max_epochs=3, callbacks=callback).fit(Module(), data)
        asked.append(data.asked)
    assert asked == [1, 3]


def test_batches_processed(train: Any) -> None:
    at = At(door.batches_processed, "on_train_batch_start", "on_train_batch_end")
    train(callbacks=at).fit(Module(), Data())
    assert at.seen == [0, 1, 1, 2, 2, 3]
    starts = At(door.batches_processed, "on_train_epoch_start")
    train(callbacks=starts, max_epochs=2).fit(Module(), Data())
    assert starts.seen == [0, 0]


@pytest.mark.parametrize(("limit", "expected"), [(1.0, [False, False, True]), (2, [False, True])])
def test_is_last_batch(limit: float, expected: list[bool], train: Any) -> None:
    at = At(door.is_last_batch, "on_train_batch_end")
    after = At(door.is_last_batch, "on_train_epoch_end")
    train(callbacks=[at, after], limit_train_batches=limit).fit(Module(), Data())
    assert (at.seen, after.seen) == (expected, [True])


@pytest.mark.parametrize(("steps", "expected"), [(2, True), (3, False), (-1, False)])
def test_stopped_mid_epoch(steps: int, expected: bool, train: Any) -> None:
    at = At(door.stopped_mid_epoch, "on_train_epoch_end", "on_train_end")
    train(callbacks=at, max_steps=steps).fit(Module(), Data())
    assert at.seen == [expected, expected]


def test_progress_in_update(train: Any) -> None:
    at = At(door.progress_in_update, "on_train_batch_end")
    train(callbacks=at, accumulate_grad_batches=2).fit(Module(), Data())
    assert at.seen == [(1, 2), None, None]  # an epoch's last update takes what there is


def test_progress_in_update_of_a_step_that_failed(train: Any) -> None:
    class Failing(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise KeyError
            return super().training_step(batch, batch_idx)

    at = At(door.progress_in_update, "on_exception")
    with pytest.raises(KeyError):
        train(callbacks=at).fit(Failing(), Data())
    assert at.seen == [(0, 1)]


@pytest.mark.parametrize("cured", [True, False])
def test_start_next_epoch(cured: bool, train: Any, tmp_path: Path) -> None:
    def save(trainer: Trainer) -> None:
        if door.is_last_batch(trainer):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    train(callbacks=At(save, "on_train_batch_end")).fit(Module(), Data())
    starts = At(lambda trainer: trainer.current_epoch, "on_train_epoch_start")
    cure = At(door.start_next_epoch if cured else bool, "on_train_start")
    trainer = train(max_epochs=3, callbacks=[cure, starts], reload_dataloaders_every_n_epochs=1)
    trainer.fit(Module(), Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 9
    assert starts.seen == ([1, 2] if cured else [2])


@pytest.mark.parametrize(("marked", "steps"), [(True, 3), (False, 2)])
def test_mark_epoch_unfinished(marked: bool, steps: int, train: Any, tmp_path: Path) -> None:
    class Marking(Module):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if marked:
                door.mark_epoch_unfinished(checkpoint)

    def save(trainer: Trainer) -> None:
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    train(callbacks=At(save, "on_train_end"), max_steps=2).fit(Marking(), Data())
    trainer = train()
    trainer.fit(Module(), Data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == steps


@pytest.mark.parametrize(("marked", "steps"), [(True, 6), (False, 4)])
def test_mark_epoch_not_started(marked: bool, steps: int, train: Any, tmp_path: Path) -> None:
    class Marking(Module):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if marked:
                door.mark_epoch_not_started(checkpoint)

    def save(trainer: Trainer) -> None:
        trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
        trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    saves = At(save, "on_train_epoch_start")
    train(callbacks=saves, max_epochs=2).fit(Marking(), Data())
    trainer = train(max_epochs=2)
    trainer.fit(Module(), Data(), ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    assert trainer.global_step == steps


@pytest.mark.parametrize(("marked", "epochs"), [(True, [1]), (False, [0, 1])])
def test_mark_epoch_finished(marked: bool, epochs: list[int], train: Any, tmp_path: Path) -> None:
    """Whose loaders are asked for, after a checkpoint of an epoch's end."""

    class Marking(Module):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if marked:
                door.mark_epoch_finished(checkpoint)

    class Asked(Data):
        def train_dataloader(self) -> Any:
            asked.append(self.trainer.current_epoch)
            return super().train_dataloader()

    asked: list[int] = []
    saves = At(lambda trainer: trainer.save_checkpoint(tmp_path / "end.ckpt"), "on_train_epoch_end")
    train(callbacks=saves).fit(Module(), Data())
    trainer = train(max_epochs=2, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Marking(), Asked(), ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert asked == epochs
    assert trainer.global_step == 6


def test_dump_checkpoint(train: Any, tmp_path: Path) -> None:
    trainer = train()
    trainer.fit(Module(), Data())
    trainer.save_checkpoint(tmp_path / "written.ckpt")
    written = torch.load(tmp_path / "written.ckpt", weights_only=True)
    dumped = door.dump_checkpoint(trainer)
    assert dumped.keys() == written.keys()
    assert repr(dumped) == repr(written)


def test_resume_from_memory(train: Any) -> None:
    """Weights, optimizer and the number of epochs go on, in a trainer that is given no path."""
    first = train()
    first.fit(learned := Module(), Data())
    checkpoint = door.dump_checkpoint(first)
    start = learned.layer.weight.detach().clone()
    resume = At(lambda trainer: door.resume_from_memory(trainer, checkpoint), "setup")
    weights = At(lambda trainer: trainer.model.layer.weight.detach().clone(), "on_train_start")
    trainer = train(max_epochs=2, callbacks=[resume, weights])
    trainer.fit(Module(), Data())
    assert torch.equal(weights.seen[0], start)
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)


# --- flags ---------------------------------------------------------------------------------------


def test_max_seconds(train: Any) -> None:
    assert door.max_seconds(train()) is None
    assert door.max_seconds(train(callbacks=Timer())) is None
    assert door.max_seconds(train(callbacks=Timer(timedelta(minutes=2)))) == 120.0
    assert door.max_seconds(train(max_time={"seconds": 90})) == 90.0


def test_val_check_interval(train: Any) -> None:
    asked = (None, 2, 0.5, timedelta(minutes=1), "00:00:01:00")
    found = [door.val_check_interval(train(val_check_interval=value)) for value in asked]
    assert found == [1.0, 2, 0.5, None, None]


def test_callbacks_of(train: Any) -> None:
    first, second = At(door.callbacks_of), At(door.callbacks_of, "setup")
    train(callbacks=[first, second]).fit(Module(), Data())
    assert [one for one in second.seen[0] if isinstance(one, At)] == [first, second]


def test_datamodule_of(train: Any) -> None:
    data, at = Data(), At(door.datamodule_of, "setup")
    trainer = train(callbacks=at)
    assert door.datamodule_of(trainer) is None
    trainer.fit(Module(), data)
    assert at.seen == [data]


# --- processes -----------------------------------------------------------------------------------


def test_is_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        called = rank_zero_only(lambda: True)() or False
        assert door.is_first_process() == called == (rank == 0)


def test_cluster_environment(train: Any) -> None:
    environment = LightningEnvironment()
    assert door.cluster_environment(train(plugins=[environment])) is environment


def test_start_method(train: Any) -> None:
    asked = ("auto", "ddp", "ddp_spawn", "ddp_fork")
    found = [door.start_method(train(strategy=strategy)) for strategy in asked]
    assert found == [None, None, "spawn", "fork"]


def test_model_averaging_period(train: Any) -> None:
    asked = ("auto", "ddp", DDPStrategy(model_averaging_period=3))
    assert [door.model_averaging_period(train(strategy=one)) for one in asked] == [None, None, 3]


def test_ddp_communication_hook(train: Any) -> None:
    def hook(*_: Any) -> None: ...

    asked = ("auto", "ddp", DDPStrategy(ddp_comm_hook=hook))
    assert [door.ddp_communication_hook(train(strategy=one)) for one in asked] == [None, None, hook]


def test_ddp_options(train: Any) -> None:
    asked = ("auto", "ddp", DDPStrategy(static_graph=True))
    assert [dict(door.ddp_options(train(strategy=one))) for one in asked] == [
        {},
        {},
        {"static_graph": True},
    ]


def test_layer_sync(train: Any) -> None:
    assert door.layer_sync(train(sync_batchnorm=True)) is None  # on one device there is none
    assert door.layer_sync(train(strategy="ddp")) is None
    found = door.layer_sync(train(strategy="ddp", sync_batchnorm=True))
    assert isinstance(found, TorchSyncBatchNorm)


def test_wrap_again(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrapped is the module itself; tests/model/test_frozen_core.py does so in two processes."""
    module = LightningModule()
    for strategy, wrapped in (("auto", []), ("ddp", [module])):
        trainer, found = train(strategy=strategy), []
        trainer.strategy.connect(module)
        trainer.strategy.model = torch.nn.Sequential(module)
        monkeypatch.setattr(
            DDPStrategy, "configure_ddp", lambda self, found=found: found.append(self.model)
        )
        door.wrap_again(trainer)
        assert found == wrapped


class WithTest(Module):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        assert self.trainer.strategy.model is self or self.trainer.state.fn == "fit"


def models_of(strategy: str) -> tuple[str, float]:
    """What a fit trains, and the rank's own weight after a test."""
    at, module = At(lambda trainer: trainer.strategy.model, "on_train_start"), WithTest()
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=2,
        strategy=door.UnwrappedDDPStrategy() if strategy == "unwrapped" else strategy,
        callbacks=[at],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    data = DataLoader(torch.ones(2, 1))
    trainer.fit(module, data)
    torch.nn.init.constant_(module.layer.weight, trainer.global_rank)
    trainer.test(module, data, verbose=False)
    return type(at.seen[0]).__name__, module.layer.weight.item()


def test_unwrapped_ddpstrategy(ranks: Any) -> None:
    """Nothing wraps the module in a fit, and nothing sends weights in a test."""
    assert ranks(models_of, "ddp") == [("DistributedDataParallel", 0.0)] * 2
    assert ranks(models_of, "unwrapped") == [("WithTest", 0.0), ("WithTest", 1.0)]


# --- precision -----------------------------------------------------------------------------------


def test_grad_scaler(train: Any) -> None:
    plugin = MixedPrecision("16-mixed", "cpu")
    found = door.grad_scaler(train(plugins=[plugin]))
    assert isinstance(found, torch.amp.GradScaler)
    assert [door.grad_scaler(train(precision=p)) for p in ("32-true", "bf16-mixed")] == [None, None]


@pytest.mark.parametrize("fused", [True, False])
def test_handles_unscaling(fused: bool) -> None:
    """As the scaler finds out itself: it leaves the gradients to such an optimizer's step."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    weight.grad = torch.ones(1)
    before: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: before.append(float(weight.grad)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(1))  # which makes the scale
    scaler.step(optimizer)
    assert before == [1.0 if fused else 0.25]
    assert door.handles_unscaling(optimizer) == fused
    assert float(weight.detach()) == -0.25  # either way the step is along the unscaled gradient


# --- the module ----------------------------------------------------------------------------------


def test_is_attached(train: Any) -> None:
    module = Module()
    assert not door.is_attached(module)
    train().fit(module, Data())
    assert door.is_attached(module)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_is_compiled(compiled: bool, train: Any) -> None:
    class Look(Module):
        def setup(self, stage: str) -> None:
            raise InterruptedError(door.is_compiled(self))

    module = torch.compile(Look()) if compiled else Look()
    with pytest.raises(InterruptedError, match=str(compiled)):
        train().fit(module, Data())


def test_hook_name_as_plain_attribute(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(door.HookNameAsPlainAttribute, Module):
        pass

    names: list[str] = []
    original = nn.Module.__setattr__

    def look(self: nn.Module, name: str, value: Any) -> None:
        names.append(name)
        original(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", look)
    counts = []
    for kind in (Module, Plain):
        names.clear()
        module, at = (
            kind(),
            At(lambda trainer: trainer.lightning_module._current_fx_name, "on_after_backward"),
        )
        train(callbacks=at).fit(module, Data())
        assert at.seen == ["on_after_backward"] * 3
        counts.append(names.count("_current_fx_name"))
        assert [name for name, _ in module.named_parameters()] == ["layer.weight", "layer.bias"]
    assert counts[0] > 3 * 20
    assert counts[1] == 0
