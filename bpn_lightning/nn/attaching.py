"""What strategies attach to a network: bias units, keys, adapters, a set of weights per task."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.adapters import Adapter, AttentionLowRank, ConvLowRank, LowRank, Scales
from bpn_lightning.nn.choosing import chosen_layers, default_layers, named_layer, undone_shifts
from bpn_lightning.nn.execution import leave_fast_paths
from bpn_lightning.nn.layers import (
    BiasUnits,
    ComplexKeys,
    ComplexLinear,
    KernelKeys,
    Keys,
    SwitchableLinear,
    TaskModule,
    is_linear,
)
from bpn_lightning.nn.prompts import (
    Prompts,
    add_prompts,
    is_block,
    make_prompts,
    order_of_calls,
)
from bpn_lightning.nn.structure import Attachment, Structure
from bpn_lightning.nn.switching import (
    SwitchableAttention,
    SwitchableConv,
    SwitchableRecurrent,
    add_parts,
    kind_of,
    number_of_biases,
)
from bpn_lightning.nn.weight_bank import WeightBank
from bpn_lightning.tasks import Task, dry_inputs

__all__ = ["PARTS", "NetworkOfLayers", "able_to_have", "make_keys", "numbers_per_task"]

#: What strategies that train modes attach to layers, and what messages call it.
PARTS: Mapping[str, str] = {
    "bias_units": "bias units",
    "scales": "scales",
    "low_rank": "low-rank products",
    "prompts": "prompts",
}


def able_to_have(part: str, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of some switchable layers that can have a part.

    Args:
        part: key of :data:`PARTS`. A head has its own rows for each task, and bias units alone. Recurrent layers
            have no scales, whose states would not be scaled; products of low rank are of weights that a
            layer multiplies whole, so not of those in groups.
        layers: by name.
    """
    if part == "bias_units":
        return dict(layers)
    return {name: layer for name, layer in layers.items() if name != "head" and _fits(part, layer)}


def _fits(part: str, layer: nn.Module) -> bool:
    kind = kind_of(layer)
    if kind is None or isinstance(layer, ComplexLinear):
        return False
    if part == "scales":
        return kind.mixin is not SwitchableRecurrent
    if kind.mixin is SwitchableAttention:
        return bool(getattr(layer, "_qkv_same_embed_dim", False))
    return is_linear(layer) or (kind.mixin is SwitchableConv and getattr(layer, "groups", 0) == 1)


def numbers_per_task(part: str, layer: Any, rank: int) -> int:
    """How many numbers a task has in a part of a layer: biases or scales, or A and B of a product."""
    if part != "low_rank":
        return number_of_biases(layer)
    kind, weight = _low_rank_of(layer)
    return rank * int(weight.shape[0] + weight[0].numel()) * (4 if kind is AttentionLowRank else 1)


def _low_rank_of(layer: Any) -> tuple[type[LowRank], Tensor]:
    """The class of a layer's product, and a weight that each has the shape of."""
    if is_linear(layer):
        return LowRank, layer.weight
    if isinstance(layer, nn.MultiheadAttention):
        return AttentionLowRank, layer.out_proj.weight
    return ConvLowRank, layer.weight


def _check_rank(layer: str, found: int, rank: int) -> None:
    if found != rank:
        raise ConfigurationError(
            f"Expected rank to be {found}, as in what layer {layer} has of another strategy, but got {rank} (of "
            "bias units, 0 is a bias without a factorization). Leave one of the two strategies out."
        )


def make_keys(name: str, layer: nn.Module, kind: str, num_tasks: int, is_head: bool) -> Keys:
    """Turn a layer, in its place, into one with keys.

    Args:
        name: of the layer, for the message.
        layer: linear, or a convolution, which takes binary keys only.
        kind: ``binary`` or ``complex``.
        num_tasks: how many keys.
        is_head: whether its outputs are logits, which stay real.

    Raises:
        ConfigurationError: a layer without weights of its own is to become complex.
    """
    weight = cast(Tensor, layer.weight)
    if kind != "complex":
        convolution = not isinstance(layer, nn.Linear)
        size = weight[0].numel() * (cast(int, layer.groups) if convolution else 1)
        keys = KernelKeys(num_tasks, size) if convolution else Keys(num_tasks, size)
        add_parts(layer, keys=keys.to(weight.device))
        return keys
    assert isinstance(layer, nn.Linear)
    if getattr(layer, "adapters", None) is not None:
        raise ConfigurationError(
            f"Expected layers without scales and low-rank products where keys are 'complex', but {name} has "
            "some. Set keys to 'binary', or leave the other strategy out."
        )
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        raise ConfigurationError(
            "Expected layers with weights of their own where keys are 'complex', but layer "
            f"{name} makes its weights from others. Set keys to 'binary', or take weight_norm "
            "and other parametrizations away."
        )
    complex_keys = ComplexKeys(num_tasks, layer.in_features)
    return ComplexLinear.make_complex(layer, complex_keys, real_output=is_head).keys


class NetworkOfLayers(nn.Module):
    """A backbone and a head whose layers can be given what tasks have for themselves."""

    backbone: nn.Module
    head: SwitchableLinear | None
    structure: Structure
    weight_bank: WeightBank | None
    _mixing: list[str] | None

    def linear_layers(self) -> dict[str, nn.Linear]:
        """Every fully connected layer by name, the head among them."""
        layers = {
            name: part
            for name, part in self.backbone.named_modules(prefix="backbone")
            if is_linear(part)
        }
        return {**cast(dict[str, nn.Linear], layers), "head": self.built_head}

    def switchable_layers(self) -> dict[str, nn.Module]:
        """Every layer that can have bias units, by name, the head last: see :mod:`.switching`."""
        parts = self.backbone.named_modules(prefix="backbone")
        layers = {name: part for name, part in parts if kind_of(part) is not None}
        return {**layers, "head": self.built_head}

    def layers_for_keys(self, kind: str) -> dict[str, nn.Module]:
        """Every layer that can have keys: linear, or a convolution, whose keys are binary."""
        linear: dict[str, nn.Module] = {**self.linear_layers()}
        if kind == "complex":
            return linear
        return {
            name: part
            for name, part in self.switchable_layers().items()
            if name in linear or getattr(kind_of(part), "mixin", None) is SwitchableConv
        }

    def blocks(self) -> dict[str, nn.Module]:
        """Every block of a transformer that can have prompts, by name: see :mod:`.prompts`."""
        parts = self.backbone.named_modules(prefix="backbone")
        return {name: part for name, part in parts if is_block(part)}

    def order_of_blocks(self) -> list[str]:
        """The names of these blocks in the order in which a forward pass calls them, each as often as it does."""
        return order_of_calls(self.backbone, self.blocks(), self._dry_inputs(1))

    def layers_for(self, part: str, wanted: Sequence[str] | None) -> list[str]:
        """The names of the layers that names, wildcards and kinds stand for.

        Args:
            part: what they are to have: key of :data:`PARTS`. Prompts are of a transformer's blocks.
            wanted: None: the default.

        Raises:
            ConfigurationError: one of them stands for no layer that can have it.
        """
        if part == "prompts":
            every = self.blocks()
            return [*every] if wanted is None else chosen_layers(wanted, every, PARTS[part], {})
        known = able_to_have(part, self.switchable_layers())
        undone: dict[str, str] = {}
        if part != "low_rank":  # what is added there differs between inputs
            undone = undone_shifts(self.backbone, known, self._dry_inputs(1))
        if wanted is None:
            return default_layers(self.backbone, known, PARTS[part], undone)
        return chosen_layers(wanted, known, PARTS[part], undone)

    def _dry_inputs(self, count: int) -> Tensor:
        weight = self.built_head.weight
        inputs = dry_inputs(self.structure, count, weight.device)
        return inputs.to(weight.dtype) if inputs.is_floating_point() else inputs

    def attach_bias_units(self, layer: str, rank: int) -> BiasUnits:
        """Give a layer bias units, or return those that it has.

        Args:
            layer: its name.
            rank: of the units, H; 0: the bias itself is trained.

        Raises:
            ConfigurationError: there is no such layer, or it has units of another rank.
        """
        part = named_layer(layer, self.switchable_layers(), "bias units")
        units: BiasUnits | None = getattr(part, "bias_units", None)
        if units is None:
            units = BiasUnits(len(self.tasks), rank, number_of_biases(part))
            add_parts(part, bias_units=units.to(self.built_head.weight.device))
            self._note("bias_units", layer=layer, rank=rank)
        _check_rank(layer, units.M.shape[1], rank)
        return units

    def attach_scales(self, layer: str) -> Scales:
        """Give a layer of the backbone a factor per output and task, or return those that it has.

        Raises:
            ConfigurationError: there is no such layer, or it cannot have any.
        """
        adapters = self._adapters("scales", layer)
        if "scales" not in adapters:
            part = self.get_submodule(layer)
            self._adapt(layer, "scales", Scales(len(self.tasks), number_of_biases(part)))
            self._note("scales", layer=layer)
        return cast(Scales, self._adapters("scales", layer)["scales"])

    def attach_low_rank(self, layer: str, rank: int) -> LowRank:
        """Give a layer of the backbone a product of low rank per task, or return that which it has.

        Args:
            layer: its name: linear, attention, or a convolution without groups.
            rank: of the product, r.

        Raises:
            ConfigurationError: there is no such layer, or it has a product of another rank.
        """
        adapters = self._adapters("low_rank", layer)
        if "low_rank" not in adapters:
            kind, weight = _low_rank_of(self.get_submodule(layer))
            self._adapt(layer, "low_rank", kind(len(self.tasks), rank, weight.shape))
            self._note("low_rank", layer=layer, rank=rank)
        low_rank = cast(LowRank, self._adapters("low_rank", layer)["low_rank"])
        _check_rank(layer, low_rank.rank, rank)
        return low_rank

    def attach_prompts(self, layer: str, tokens: int, place: str = "each") -> Prompts:
        """Give a transformer's block prompts for each task, or return those that it has.

        Args:
            layer: the block's name.
            tokens: how many.
            place: see :class:`~bpn_lightning.nn.prompts.Prompts`.

        Raises:
            ConfigurationError: there is no such block, or it has others.
        """
        block = named_layer(layer, self.blocks(), PARTS["prompts"])
        adapters = getattr(block, "adapters", None)
        if adapters is None:
            prompts = make_prompts(block, len(self.tasks), tokens, place)
            add_prompts(block, prompts.to(self.built_head.weight.device))
            self._note("prompts", layer=layer, tokens=tokens, place=place)
            return prompts
        found = cast(Prompts, adapters["prompts"])
        if (found.tokens, found.place) != (tokens, place):
            raise ConfigurationError(
                f"Expected the prompts of {layer} to be those that it has ({found.tokens}, {found.place!r}), but "
                f"got {tokens}, {place!r}. Leave one of the two strategies out."
            )
        return found

    def _adapters(self, kind: str, layer: str) -> dict[str, nn.Module]:
        part = named_layer(layer, able_to_have(kind, self.switchable_layers()), PARTS[kind])
        adapters = getattr(part, "adapters", None)
        return {} if adapters is None else dict(adapters.items())

    def _adapt(self, layer: str, kind: str, adapter: Adapter) -> None:
        on = adapter.to(self.built_head.weight.device)
        add_parts(self.get_submodule(layer), adapters={kind: on})

    def attach_keys(self, layer: str, kind: str) -> Keys:
        """Give a linear layer or a convolution keys, or return those that it has.

        Args:
            layer: its name; convolutions have binary keys only.
            kind: ``binary``, or ``complex``, which makes the layer's weights complex too.

        Raises:
            ConfigurationError: there is no such layer, or it has keys of the other kind.
        """
        part = named_layer(layer, self.layers_for_keys(kind), "keys")
        keys: Keys | None = getattr(part, "keys", None)
        if keys is None:
            keys = make_keys(layer, part, kind, len(self.tasks), layer == "head")
            self._note("keys", layer=layer, kind=kind)
        if keys.kind != kind:
            raise ConfigurationError(
                f"Expected keys to be {keys.kind!r}, as those that layer {layer} has, but got {kind!r}."
            )
        return keys

    def attach_weight_bank(self) -> WeightBank:
        """Keep a whole set of weights for every task, or return the bank that does."""
        if self.weight_bank is None:
            self.weight_bank = WeightBank(len(self.tasks), self, ("backbone", "head"))
            self._note("weight_bank")
        return self.weight_bank

    def _note(self, part: str, **arguments: Any) -> None:
        self._mixing = None
        leave_fast_paths(self.backbone)
        self.structure.attached.append(Attachment(part, arguments))

    @property
    def built_head(self) -> SwitchableLinear:
        """The head, where there is one.

        Raises:
            ConfigurationError: the module knows no stream yet.
        """
        if self.head is None:
            raise ConfigurationError(
                "Expected the module to know its stream, but it has no head yet. Call "
                "trainer.fit(module, stream), module.attach(stream) or load a checkpoint first."
            )
        return self.head

    def task_modules(self) -> list[TaskModule]:
        """The parts that hold something for every task."""
        return [part for part in self.modules() if isinstance(part, TaskModule)]

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks of the stream."""
        return self.structure.tasks
