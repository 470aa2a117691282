"""Prompts against tokens that are concatenated by hand, on all transformers that can have them."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import Function, trainer_of
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn

from bpn_lightning import ContinualModule, export_module, load_exported
from bpn_lightning.costs import bytes_per_task
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.strategies import BitFit, PromptTuning
from bpn_lightning.tasks import Task

WIDTH, TOKENS, TASKS = 8, 3, 3
ADAM = partial(torch.optim.Adam, lr=0.01)


# --- transformers --------------------------------------------------------------------------------


def encoder(batch_first: bool = True) -> nn.Module:
    """Eight tokens of eight pixels, through two blocks."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 11, dropout=0.0, batch_first=batch_first)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for parameter in made.parameters():  # else both blocks are the same
        nn.init.normal_(parameter, std=0.3)
    axis = 1 if batch_first else 0
    return Function(
        lambda self, images: self.encoder(rows(images, batch_first)).mean(axis), encoder=made
    )


def rows(images: Tensor, batch_first: bool = True) -> Tensor:
    return images[:, 0] if batch_first else images[:, 0].transpose(0, 1)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    made = VisionTransformer(8, 4, 2, 2, WIDTH, 16)
    made.heads = nn.Identity()
    return Function(lambda self, images: self.vit(images.expand(-1, 3, -1, -1)), vit=made)


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    return timm.VisionTransformer(  # type: ignore[no-any-return]
        img_size=8, patch_size=4, in_chans=1, num_classes=0, embed_dim=WIDTH, depth=2, num_heads=2
    )


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "encoder": encoder,
    "length first": partial(encoder, batch_first=False),
    "torchvision": torchvision_vit,
    "timm": timm_vit,
}


def by_hand(name: str, net: Any, images: Tensor, prompts: list[Tensor]) -> Tensor:
    """The features of a network without prompts, whose blocks are called one by one.

    ``prompts`` are ``(p, E)``: one for each block, or one for all.
    """
    if name == "torchvision":
        vit = net.vit
        x = vit._process_input(images.expand(-1, 3, -1, -1))
        x = torch.cat([vit.class_token.expand(len(x), -1, -1), x], 1) + vit.encoder.pos_embedding
        return vit.encoder.ln(through(vit.encoder.layers, x, prompts))[:, 0]
    if name == "timm":
        x = net._pos_embed(net.patch_embed(images))
        return net.norm(through(net.blocks, x, prompts))[:, 0]
    batch_first = name == "encoder"
    x = through(net.encoder.layers, rows(images, batch_first), prompts, 1 if batch_first else 0)
    return x.mean(1 if batch_first else 0)


def through(blocks: Any, x: Tensor, prompts: list[Tensor], axis: int = 1) -> Tensor:
    length = x.shape[axis]
    for index, block in enumerate(blocks):
        if index < len(prompts):
            own = prompts[index].unsqueeze(1 - axis)
            shape = (len(x), -1, -1) if axis else (-1, x.shape[1], -1)
            x = torch.cat([x.narrow(axis, 0, length), own.expand(*shape)], axis)
        x = block(x)
    return x.narrow(axis, 0, length)


def attached(name: str, depth: str) -> tuple[ContinualNetwork, Any, list[Tensor]]:
    """A network with prompts, the backbone without, and the bank of each block."""
    torch.manual_seed(3)
    backbone = BACKBONES[name]()
    plain = deepcopy(backbone).eval()
    network = ContinualNetwork(backbone, "all")
    tasks = [Task(t, (2 * t, 2 * t + 2), ("a", "b"), 1) for t in range(TASKS)]
    network.build(tasks, 2 * TASKS, (1, 8, 8), torch.float32)
    strategy: Any = PromptTuning(TOKENS, depth)  # type: ignore[arg-type]
    parts = [strategy.attach(network, one) for one in network.layers_for("prompts", None)]
    banks = [part.prompt_bank for part in parts if part.names]
    for bank in banks:
        nn.init.normal_(bank)
    return network.eval(), plain, banks


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [False, True])
def test_prompts_are_tokens_that_are_concatenated(name: str, depth: str, training: bool) -> None:
    """Per sample and for one task; in evaluation mode torch's fused kernel would bypass them."""
    network, plain, banks = attached(name, depth)
    assert len(banks) == (2 if depth == "deep" else 1)
    network.train(training)
    images, tasks = torch.randn(6, 1, 8, 8), torch.tensor([0, 2, 1, 1, 0, 2])
    for task in range(TASKS):
        features = by_hand(name, plain, images, [bank[task] for bank in banks])
        wanted = network.built_head(features)
        with torch.no_grad():
            found = network(images, task=task)
            mixed = network(images, task=tasks)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(mixed[tasks == task], wanted[tasks == task])
    assert (by_hand(name, plain, images, []) - features).abs().max() > 1e-3


def test_a_padding_mask_is_extended_and_others_are_refused() -> None:
    network, plain, banks = attached("encoder", "deep")
    images, padding = torch.randn(2, 8, 8), torch.zeros(2, 8, dtype=torch.bool)
    padding[0, 5:] = True
    found = network.backbone.encoder(images, src_key_padding_mask=padding)  # type: ignore[operator]
    short = through(plain.encoder.layers, images[:1, :5], [bank[0] for bank in banks])
    torch.testing.assert_close(found[:1, :5], short)
    with pytest.raises(ConfigurationError, match="Expected attention without a mask in blocks"):
        network.backbone.encoder(images, torch.zeros(8, 8))  # type: ignore[operator]


# --- a run ---------------------------------------------------------------------------------------


def digits(**arguments: Any) -> SplitDigits:
    return SplitDigits(
        **{
            "num_tasks": 3,
            "class_order": [*range(6)],
            "epochs_per_task": 1,
            "batch_size": 67,
            "seed": 0,
            **arguments,
        }
    )


def made(**arguments: Any) -> ContinualModule:
    seed_everything(0, verbose=False)
    return ContinualModule(encoder(), train="modes", mask="seen", optimizer=ADAM, **arguments)


class SaveAt(Callback):
    """A checkpoint after an update in the second task."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


def tensors(module: Any) -> dict[str, Tensor]:
    return {name: one for name, one in module.state_dict().items() if isinstance(one, Tensor)}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The stream has no data of tasks 1 to 2")
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_a_run_resumes_exports_grows_and_forgets(depth: Any, tmp_path: Path) -> None:
    def strategies() -> list[Any]:
        return [PromptTuning(TOKENS, depth), BitFit()]

    module, path = made(), tmp_path / "a.ckpt"
    trainer = trainer_of(1, [*strategies(), SaveAt(path)])
    trainer.fit(module, digits())
    learned = tensors(module)

    resumed = made()
    trainer_of(1, strategies()).fit(resumed, digits(), ckpt_path=path, weights_only=True)
    assert_same(tensors(resumed), learned)

    images = torch.randn(5, 1, 8, 8)
    again = load_exported(export_module(module, tmp_path / "exported"), encoder())
    module.eval()
    for task in range(3):
        with torch.no_grad():
            answers = module(images, task)
            assert_same(again(images, task), answers)
            assert_same(module.for_inference(task)(images), answers)

    grown = made()
    for part in (
        {"class_order": [*range(4)], "num_tasks": 2},
        {"class_order": [4, 5], "num_tasks": 1},
    ):
        stream = digits(**part)
        if grown.opened >= 0:
            grown.extend(stream)
        trainer_of(1, strategies()).fit(grown, stream)
    found = tensors(grown)
    for name, value in learned.items():
        if "accuracy_matrix" not in name:
            assert_same(found[name], value)

    names = [name for name in learned if name.endswith("prompt_bank")]
    assert len(names) == (2 if depth == "deep" else 1)
    assert all(learned[name].abs().flatten(1).sum(1).min() > 0 for name in names)
    module.forget(1)
    for name in names:
        assert not tensors(module)[name][1].any()
        assert tensors(module)[name][2].any()


def test_bytes_are_those_of_the_formula(fit: Any) -> None:
    for strategy, blocks in ((PromptTuning(5), 2), (PromptTuning(5, "shallow"), 1)):
        module, _ = fit([strategy], backbone=encoder(), train="modes", mask="task")
        assert bytes_per_task([strategy], module.host)["measured"] == 4 * 5 * WIDTH * blocks


def test_tokens_are_drawn_as_the_authors_do(fit: Any) -> None:
    """Between plus and minus sqrt(6 / (2 E)), others for each task and block."""
    strategy = PromptTuning(200)
    module, _ = fit([strategy], backbone=encoder())
    drawn = []
    for task in module.tasks[:2]:
        strategy.on_task_start(module.host, task)
        drawn += [part.get_parameter("prompt").detach().clone() for part in strategy.parts.values()]
    bound = (6 / (2 * WIDTH)) ** 0.5
    for one in drawn:
        assert 0.98 * bound < one.abs().max() <= bound
        assert one.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert len({one.sum().item() for one in drawn}) == 4


def two_tasks(devices: int) -> dict[str, Tensor]:
    module = made(check_processes=True)
    trainer_of(devices, [PromptTuning(2)], precision="64-true").fit(module, digits(batch_size=33))
    return tensors(module)


def test_two_processes_learn_what_one_learns(ranks: Any) -> None:
    first, second = ranks(two_tasks, 2)
    assert_same(first, second)
    torch.testing.assert_close(first, two_tasks(1), rtol=1e-9, atol=1e-12, equal_nan=True)


class Backwards(nn.Module):
    """Blocks that run in another order than they are listed in."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = (
            nn.TransformerEncoderLayer(WIDTH, 2, 11, batch_first=True) for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.late(self.early(images[:, 0])).mean(1)  # type: ignore[no-any-return]


def test_invalid_arguments_are_refused(fit: Any) -> None:
    with pytest.raises(ConfigurationError, match="Expected tokens to be"):
        PromptTuning(0)
    with pytest.raises(ConfigurationError, match="Expected depth to be"):
        PromptTuning(depth="flat")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Expected layers to be None where depth is 'sha"):
        PromptTuning(depth="shallow", layers=["backbone.*"])
    with pytest.raises(ConfigurationError) as error:
        fit([PromptTuning()])
    assert str(error.value) == (
        "Expected the backbone to have layers for PromptTuning, but it has none that can have prompts. Leave the "
        "strategy out, or use bitfit."
    )
    with pytest.raises(
        ConfigurationError, match="run each block once, in their order, where depth"
    ):
        fit([PromptTuning(depth="shallow")], backbone=Backwards())
    with pytest.raises(
        ConfigurationError, match=r"Expected the prompts of backbone\.encoder\.layers\.0"
    ):
        fit([PromptTuning(3), PromptTuning(4)], backbone=encoder())
