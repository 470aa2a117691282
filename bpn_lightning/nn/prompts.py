"""Prompt tokens that tasks have in the blocks of a transformer."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpn_lightning.checks import check_choice
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.adapters import Adapter
from bpn_lightning.nn.layers import evaluation_mode
from bpn_lightning.nn.loaded import eagerly
from bpn_lightning.nn.switching import Switchable, become_switchable, plain_class

__all__ = [
    "PLACES",
    "Prompts",
    "add_prompts",
    "block_width",
    "is_block",
    "make_prompts",
    "order_of_calls",
]


class _Kind(NamedTuple):
    """A class of blocks: the width of its tokens, and whether samples are the first dimension."""

    width: Callable[[Any], int]
    batch_first: Callable[[Any], bool]


#: Blocks that map tokens to as many tokens, whatever their number, by module and class. Only where the module is
#: imported can there be one.
BLOCKS: Mapping[tuple[str, str], _Kind] = {
    ("torch.nn.modules.transformer", "TransformerEncoderLayer"): _Kind(
        lambda block: block.self_attn.embed_dim, lambda block: block.self_attn.batch_first
    ),
    ("torchvision.models.vision_transformer", "EncoderBlock"): _Kind(
        lambda block: block.self_attention.embed_dim, lambda block: True
    ),
    ("timm.models.vision_transformer", "Block"): _Kind(
        lambda block: block.norm1.normalized_shape[0], lambda block: True
    ),
}


def _kind_of(part: nn.Module) -> _Kind | None:
    kind = plain_class(part)
    found = BLOCKS.get((kind.__module__, kind.__name__))
    known = getattr(sys.modules.get(kind.__module__), kind.__name__, None)
    return found if known is kind else None


def is_block(part: nn.Module) -> bool:
    """Whether a module is a transformer's block that can have prompts."""
    return _kind_of(part) is not None


def block_width(block: nn.Module) -> int:
    """E, the width of a block's tokens."""
    kind = _kind_of(block)
    assert kind is not None
    return kind.width(block)


PLACES = ("each", "first", "middle", "last")
"""Where prompts come from and go: of each block its own; or into the first and out of the last, through those between."""


class Prompts(Adapter):
    """Tokens that a block sees behind those of its input.

    Args:
        num_tasks: T, number of tasks of the stream.
        tokens: p, how many.
        width: E.
        place: one of :data:`PLACES`. With ``each`` the block has its own, which are left out of its output;
            with ``first`` its own stay in its output, for the ``middle`` ones, until the ``last`` leaves them out.
        batch_first: whether samples are the first dimension of a block's input; else the second.

    State:
        with ``each`` and ``first``, ``prompt`` ``(p, E)``, a parameter, and ``prompt_bank`` ``(T, p, E)``: 4 p E
        bytes per task. Those of a task that was not learned are 0.

    Raises:
        ConfigurationError: there is no such place.
    """

    def __init__(
        self, num_tasks: int, tokens: int, width: int, place: str, batch_first: bool
    ) -> None:
        check_choice("place", place, PLACES)
        own = place in ("each", "first")
        super().__init__(num_tasks, {"prompt": (tokens, width)} if own else {})
        self.tokens = tokens
        self.place = place
        self.batch_first = batch_first

    def appended(self, input: Tensor) -> Tensor:
        """An input ``(batch, length, E)``, or ``(length, batch, E)``, with the active task's tokens, if it has not."""
        if not self.names:
            return input
        own = self.current("prompt").to(input.dtype)
        if self.batch_first:
            return torch.cat([input, own.expand(input.shape[0], -1, -1)], 1)
        return torch.cat([input, own.transpose(0, 1).expand(-1, input.shape[1], -1)])

    def removed(self, output: Tensor) -> Tensor:
        """An output without them, where they leave."""
        if self.place in ("first", "middle"):
            return output
        return output[:, : -self.tokens] if self.batch_first else output[: -self.tokens]


class SwitchableBlock(Switchable):
    """A transformer's block with prompts: it attends to them, and what it makes of them is left out."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same shapes as those of the block."""
        assert self.adapters is not None
        prompts: Any = self.adapters["prompts"]
        tokens, *masks = args
        padding = kwargs.pop("src_key_padding_mask", None)
        if any(value is not None and value is not False for value in (*masks, *kwargs.values())):
            raise ConfigurationError(
                "Expected attention without a mask in blocks with prompts, but got one. Leave the mask or the "
                "strategy out; src_key_padding_mask may be given."
            )
        if padding is not None:
            kwargs["src_key_padding_mask"] = F.pad(padding, (0, prompts.tokens))
        whole = super(Switchable, self).forward(prompts.appended(tokens), **kwargs)
        return prompts.removed(whole)


def make_prompts(block: nn.Module, num_tasks: int, tokens: int, place: str) -> Prompts:
    """Prompts that fit a block; :func:`add_prompts` gives them to it."""
    kind = _kind_of(block)
    assert kind is not None
    return Prompts(num_tasks, tokens, kind.width(block), place, kind.batch_first(block))


def add_prompts(block: nn.Module, prompts: Prompts) -> None:
    """Give a block prompts, in its place."""
    become_switchable(block, SwitchableBlock)
    block.adapters = nn.ModuleDict({"prompts": prompts})


def order_of_calls(
    backbone: nn.Module, blocks: Mapping[str, nn.Module], inputs: Tensor
) -> list[str]:
    """The names of blocks in the order in which a forward pass calls them, each as often as it is called."""
    called: list[str] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, block in blocks.items()
    ]
    try:
        with torch.no_grad(), evaluation_mode(backbone), eagerly():
            backbone(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called
