"""Visual prompt tuning: tokens per task in the blocks of a transformer, trained by the optimizer."""

from collections.abc import Sequence
from typing import Literal

import torch

from bpn_lightning.checks import check_choice, check_positive_int
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.nn.network import ContinualNetwork
from bpn_lightning.nn.prompts import Prompts
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.modes import TrainedMode
from bpn_lightning.tasks import Task

__all__ = ["PromptTuning"]


class PromptTuning(TrainedMode):
    r"""Tokens per block and task beside those of the input: :math:`[x_i, \_, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])`.

    Jia, Tang, Chen et al., "Visual Prompt Tuning" (2022), https://arxiv.org/abs/2203.12119: VPT-deep, Eqs. 6
    and 7, where every block L has prompts P of its own, which are left out of its output; or VPT-shallow,
    Eqs. 4 and 5, where those of the first block go through all. Drawn, uniformly as in the authors' code,
    between plus and minus :math:`\sqrt{6 / (n + E)}`.

    Differs from the paper: the tokens come last, not behind the class token, which makes no difference to
    attention; n is the width E, not the numbers of a patch (768 both, for ViT-B/16); none are dropped out.
    Unlike other modes, a task does not start as the network without: it attends to its tokens at once.

    Args:
        tokens: p, per block and task.
        depth: ``deep`` or ``shallow``.
        layers: which blocks have tokens, of ``deep``: names, and wildcards such as ``"backbone.encoder.*"``; by default all
            blocks of torch's ``TransformerEncoder`` and of torchvision's and timm's ``VisionTransformer``.

    State:
        in the module, per block of width E: (p, E) and a bank of frozen ones (T, p, E); a task stores 4 p E
        bytes per block, or of the first one only.

    Raises:
        ConfigurationError: tokens is below 1, depth is unknown, layers are named for ``shallow``, the backbone has no such
            blocks, or runs them in another order than ``shallow`` needs.
    """

    part = "prompts"
    needs_tokens = True

    def __init__(
        self,
        tokens: int = 10,
        depth: Literal["deep", "shallow"] = "deep",
        *,
        layers: Sequence[str] | None = None,
    ) -> None:
        check_positive_int("tokens", tokens, "The paper has 1 to 200.")
        check_choice("depth", depth, ("deep", "shallow"))
        if depth == "shallow" and layers is not None:
            raise ConfigurationError(
                f"Expected layers to be None where depth is 'shallow', whose tokens go through all blocks, but got "
                f"{list(layers)}. Leave it out, or set depth to 'deep'."
            )
        self.tokens = tokens
        self.depth = depth
        super().__init__(layers)

    def attach(self, network: ContinualNetwork, layer: str) -> Prompts:
        """Prompts of its own, or what the first block's need."""
        if self.depth == "deep":
            return network.attach_prompts(layer, self.tokens)
        order, named = network.order_of_blocks(), [*network.blocks()]
        if order != named:
            raise ConfigurationError(
                f"Expected the backbone to run each block once, in their order, where depth is 'shallow', but it runs "
                f"{', '.join(order)}. Set depth to 'deep'."
            )
        ends = (layer == named[0], layer == named[-1])
        places = {(True, True): "each", (True, False): "first", (False, True): "last"}
        return network.attach_prompts(layer, self.tokens, places.get(ends, "middle"))

    def on_task_start(self, host: ContinualHost, task: Task) -> None:
        """Draw the tokens, identically on every process and after resuming."""
        for name, prompts in self.parts.items():
            assert isinstance(prompts, Prompts)
            values = {}
            for own in prompts.names:
                shape = prompts.get_parameter(own).shape
                generator = seeded_generator("prompts", host.stream.seed, task.id, name)
                drawn = torch.rand(shape, generator=generator) * 2 - 1
                values[own] = drawn * (6 / (2 * shape[1])) ** 0.5
            prompts.start(task.id, values)
