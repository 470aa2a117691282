"""Layers that torch has, with biases per task: which there are, how many biases each has, and where they go."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from bpn_lightning.nn.adapters import Adapter
from bpn_lightning.nn.layers import BiasUnits, Keys, SwitchableLinear, is_linear
from bpn_lightning.nn.loaded import loaded_class

__all__ = [
    "KINDS",
    "Switchable",
    "SwitchableAttention",
    "SwitchableConv",
    "SwitchableRecurrent",
    "add_parts",
    "become_switchable",
    "is_switchable",
    "kind_of",
    "number_of_biases",
    "plain_class",
    "switch_replaced",
]


class Switchable(nn.Module):
    """What a layer of torch becomes: itself, with the active task's adapters and biases on its output.

    :func:`add_parts` derives a class of this one and of the layer's own, and gives it to the layer in
    place: parameters, names and references remain valid.

    Attributes:
        bias_units: they add one number per channel or feature.
        keys: of a convolution only.
        adapters: by kind; see :mod:`.adapters`.
    """

    #: The layer's class before.
    plain: ClassVar[type[nn.Module]]
    bias_units: BiasUnits | None
    keys: Keys | None
    adapters: nn.ModuleDict | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer makes of its inputs, adapted and shifted."""
        output = super().forward(*args, **kwargs)
        if self.adapters is not None:
            output = self.adapted(args[0] if args else None, output)
        return output if self.bias_units is None else self.shifted(output, self.bias_units())

    def adapted(self, input: Any, output: Any) -> Any:
        """An output in the active task's mode, before its biases are added."""
        for adapter in {} if self.adapters is None else self.adapters.values():
            output = adapter(self, input, output)
        return output

    def aligned(self, values: Tensor, output: Tensor) -> Tensor:
        """Numbers ``(1, K)`` or ``(batch, K)`` that broadcast over an output."""
        raise NotImplementedError

    def shifted(self, output: Any, shift: Tensor) -> Any:
        """An output plus biases ``(1, K)``, or ``(batch, K)`` with one task ID per sample."""
        return output + self.aligned(shift, output)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the classes that this one is derived from, because no module has it by name."""
        bases = type(self).__bases__
        state: dict[str, Any] = super().__reduce_ex__(protocol)[2]  # type: ignore[assignment]
        return _empty, bases, state


def _empty(mixin: type[Switchable], kind: type[nn.Module]) -> nn.Module:
    derived = _derived(mixin, kind)
    return derived.__new__(derived)


_DERIVED: dict[tuple[type, type], type[Switchable]] = {}


def _derived(mixin: type[Switchable], kind: type[nn.Module]) -> type[Switchable]:
    """The class of a layer that was of a kind, the same whenever it is asked for."""
    made = _DERIVED.get((mixin, kind))
    if made is None:
        made = type(f"Switchable{kind.__name__}", (mixin, kind), {"plain": kind})
        _DERIVED[mixin, kind] = made
    return made


def _beside(shift: Tensor, output: Tensor, features: Sequence[int], after: int) -> Tensor:
    """Biases ``(1, K)`` or ``(batch, K)`` that broadcast over ``(batch, ..., *features, *after)``."""
    shape = [*features, *(1,) * after]
    if shift.shape[0] != 1:  # len() would fix the batch size when a network is exported
        shape = [shift.shape[0], *(1,) * (output.dim() - 1 - len(shape)), *shape]
    return shift.reshape(shape).to(output.dtype)


class SwitchableFeatures(Switchable):
    """A layer with one bias per feature, the last dimensions of its output: embeddings, layer norms."""

    def aligned(self, values: Tensor, output: Tensor) -> Tensor:
        """Over ``(batch, ..., *features)``."""
        features = getattr(self, "normalized_shape", values.shape[1:])
        return _beside(values, output, features, 0)


class SwitchableChannels(Switchable):
    """A layer with one bias per channel, the second dimension of its output: batch norms and the like."""

    def aligned(self, values: Tensor, output: Tensor) -> Tensor:
        """Over ``(batch, channels, ...)``; of layers that take a single sample also ``(channels, ...)``."""
        part: Any = self
        after = output.dim() - 2
        if hasattr(part, "kernel_size"):  # a transposed convolution
            after = len(part.kernel_size)
        elif hasattr(part, "_get_no_batch_dim"):  # an instance norm
            after = part._get_no_batch_dim() - 1
        return _beside(values, output, values.shape[1:], after)


class SwitchableConv(Switchable):
    r"""A convolution with keys, bias units, or both: :math:`y = (W \odot k_t) * x + b + \mathrm{BIAS}_t`.

    There is one sign per element of a patch: multiplying the weights is equivalent to multiplying every
    patch, and cheaper. There is one bias per output channel, which joins the layer's own.
    """

    weight: Tensor
    bias: Tensor | None
    groups: int
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Same shapes as those of the convolution."""
        weight, bias, units = self.weight, self.bias, self.bias_units
        if self.keys is not None:
            shape = weight.shape[1:]
            by_group = weight.view(self.groups, -1, *shape) * self.keys().view(
                self.groups, 1, *shape
            )
            weight = by_group.flatten(0, 1)
        shift: Tensor | None = None if units is None else units()
        if shift is not None and shift.shape[0] == 1 and self.adapters is None:
            shift = shift[0]
            return self._conv_forward(input, weight, shift if bias is None else bias + shift)
        output: Tensor = self.adapted(input, self._conv_forward(input, weight, bias))
        return output if shift is None else output + self.aligned(shift, output)

    def aligned(self, values: Tensor, output: Tensor) -> Tensor:
        """Over ``(batch, channels, *places)``, or ``(channels, *places)`` of a single sample."""
        part: Any = self
        return _beside(values, output, values.shape[1:], len(part.kernel_size))


class SwitchableAttention(Switchable):
    """Attention with biases and adapters of the projections of queries, keys and values, and of the output.

    There are 4 E biases: those of ``in_proj`` in its order, then those of ``out_proj``. A bias of the
    keys cancels in the softmax; torch has one too. Adapters are called projection by projection.
    """

    embed_dim: int

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same shapes as those of ``nn.MultiheadAttention``."""
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        part: Any = self
        if self.bias_units is None and self.adapters is None:
            found: tuple[Tensor, Tensor | None] = super().forward(query, key, value, **options)
            return found
        transposed = part.batch_first and query.dim() == 3
        if transposed:
            # Torch projects queries, keys and values at once where they are the same object.
            once = {id(one): one.transpose(0, 1) for one in (query, key, value)}
            query, key, value = once[id(query)], once[id(key)], once[id(value)]
        shift: Tensor | None = None if self.bias_units is None else self.bias_units()
        if shift is not None and shift.shape[0] == 1 and self.adapters is None:
            output, weights = self._folded(query, key, value, shift, options)
        else:
            output, weights = self._by_projection((query, key, value), shift, options)
        return (output.transpose(0, 1) if transposed else output), weights

    def _folded(
        self, query: Tensor, key: Tensor, value: Tensor, shift: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Torch's own function, with other biases."""
        part: Any = self
        into, out = shift[0].tensor_split([3 * self.embed_dim])
        if part.in_proj_bias is not None:
            into = into + part.in_proj_bias
        if part.out_proj.bias is not None:
            out = out + part.out_proj.bias
        if part._qkv_same_embed_dim:
            weights: dict[str, Any] = {}
        else:
            weights = {f"{one}_proj_weight": getattr(part, f"{one}_proj_weight") for one in "qkv"}
        inputs, out_weight = (query, key, value), part.out_proj.weight
        return self._attend(inputs, part.in_proj_weight, into, out_weight, out, weights, options)

    def _by_projection(
        self, inputs: Sequence[Tensor], shift: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The same with projections of our own; torch's are the identity then."""
        part: Any = self
        if part._qkv_same_embed_dim:
            weights = part.in_proj_weight.chunk(3)
        else:
            weights = (part.q_proj_weight, part.k_proj_weight, part.v_proj_weight)
        own = (None,) * 3 if part.in_proj_bias is None else part.in_proj_bias.chunk(3)
        shifts = (
            (None,) * 4 if shift is None else shift.chunk(4, 1)
        )  # (batch, E) beside (length, batch, E)
        projected = [
            self._projected(index, x, weights[index], own[index], shifts[index])
            for index, x in enumerate(inputs)
        ]
        identity = torch.eye(self.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
        same = {f"{one}_proj_weight": identity for one in "qkv"}
        mixed, found = self._attend(projected, None, None, identity, None, same, options)
        return self._projected(3, mixed, part.out_proj.weight, part.out_proj.bias, shifts[3]), found

    def _projected(
        self, index: int, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        """One of the four projections: of queries, keys, values or the output."""
        output = F.linear(x, weight, bias)
        for adapter in {} if self.adapters is None else self.adapters.values():
            output = adapter.project(index, x, output)  # type: ignore[operator]
        return output if shift is None else output + shift.to(output.dtype)

    def _attend(
        self,
        inputs: Any,
        in_weight: Tensor | None,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        weights: Mapping[str, Tensor],
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        part: Any = self
        attend: Any = F.multi_head_attention_forward
        found: tuple[Tensor, Tensor | None] = attend(
            *inputs,
            self.embed_dim,
            part.num_heads,
            in_weight,
            in_bias,
            part.bias_k,
            part.bias_v,
            part.add_zero_attn,
            part.dropout,
            out_weight,
            out_bias,
            training=self.training,
            use_separate_proj_weight=bool(weights),
            **weights,
            **options,
        )
        return found


class SwitchableRecurrent(Switchable):
    """A recurrent layer with one bias per feature of its output, and of the last states that equal it.

    Not within the recurrence, as a bias of the gates would be: that could not differ between the samples
    of a batch, nor exist in layers without biases. States that are passed back in are shifted ones.
    """

    def shifted(self, output: Any, shift: Tensor) -> Any:
        """The pair of outputs and states that torch's layers return."""
        part: Any = self
        sequence, states = output
        if isinstance(sequence, PackedSequence):
            data = sequence.data + self._packed(shift, sequence).to(sequence.data.dtype)
            sequence = sequence._replace(data=data)
        else:
            alike = shift[:, None] if part.batch_first and sequence.dim() == 3 else shift
            sequence = sequence + alike.to(sequence.dtype)
        hidden = states[0] if isinstance(states, tuple) else states
        directions = 2 if part.bidirectional else 1
        last = shift.view(shift.shape[0], directions, -1).transpose(0, 1)  # (directions, batch, K)
        last = last.to(hidden.dtype) if hidden.dim() == 3 else last[:, 0].to(hidden.dtype)
        hidden = torch.cat([hidden[:-directions], hidden[-directions:] + last])
        return sequence, (hidden, *states[1:]) if isinstance(states, tuple) else hidden

    @staticmethod
    def _packed(shift: Tensor, sequence: PackedSequence) -> Tensor:
        """Each row's shift: rows are samples, longest first, step by step."""
        if shift.shape[0] == 1:
            return shift
        if sequence.sorted_indices is not None:
            shift = shift[sequence.sorted_indices]
        return torch.cat([shift[:number] for number in sequence.batch_sizes.tolist()])


# --- which layers there are ----------------------------------------------------------------------


class LayerKind(NamedTuple):
    """A kind of layer that task-dependent parts can be given to.

    Attributes:
        name: in the argument ``layers`` of strategies.
        biases: how many a layer has.
        mixin: what makes it switchable; None: :class:`SwitchableLinear`.
    """

    name: str
    biases: Callable[[Any], int]
    mixin: type[Switchable] | None


def _recurrent_width(layer: nn.RNNBase) -> int:
    return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)


_CONV = LayerKind("conv", lambda layer: layer.out_channels, SwitchableConv)
_TRANSPOSED = LayerKind("conv", lambda layer: layer.out_channels, SwitchableChannels)
_CHANNEL_NORM = LayerKind("norm", lambda layer: layer.num_features, SwitchableChannels)
_FEATURE_NORM = LayerKind("norm", lambda layer: prod(layer.normalized_shape), SwitchableFeatures)
_EMBEDDING = LayerKind("embedding", lambda layer: layer.embedding_dim, SwitchableFeatures)
_RECURRENT = LayerKind("recurrent", _recurrent_width, SwitchableRecurrent)

#: By exact class: a subclass may compute something else.
KINDS: Mapping[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind("linear", lambda layer: layer.out_features, None),
    nn.Bilinear: LayerKind("linear", lambda layer: layer.out_features, SwitchableFeatures),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
    nn.MultiheadAttention: LayerKind(
        "attention", lambda layer: 4 * layer.embed_dim, SwitchableAttention
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _CHANNEL_NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _CHANNEL_NORM),
    nn.SyncBatchNorm: _CHANNEL_NORM,
    nn.GroupNorm: LayerKind("norm", lambda layer: layer.num_channels, SwitchableChannels),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _FEATURE_NORM),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), _EMBEDDING),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), _RECURRENT),
}


def plain_class(part: nn.Module) -> type[nn.Module]:
    """The class of a module before it was parametrized or made switchable."""
    if is_linear(part):
        return nn.Linear
    kind = type(part)
    if issubclass(kind, loaded_class("torch.distributed.fsdp", "FSDPModule")):
        kind = kind.__mro__[2]  # its class before it was sharded
    kind = _unswitched(kind)
    if is_parametrized(part):
        kind = _unswitched(kind.__bases__[0])
    return kind


def _unswitched(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.plain if issubclass(kind, Switchable) and "plain" in vars(kind) else kind


def kind_of(part: nn.Module) -> LayerKind | None:
    """What is known of a module's class; None: nothing, and it cannot be made switchable."""
    return KINDS.get(plain_class(part))


def number_of_biases(layer: nn.Module) -> int:
    """How many biases each task of a layer of :data:`KINDS` has."""
    kind = kind_of(layer)
    assert kind is not None
    return kind.biases(layer)


def is_switchable(part: nn.Module) -> bool:
    """Whether a module is a layer that has bias units, keys or adapters."""
    if not isinstance(part, SwitchableLinear | Switchable):
        return False
    return any(own is not None for own in (part.bias_units, part.keys, part.adapters))


def become_switchable(layer: nn.Module, mixin: type[Switchable]) -> None:
    """Give a module a class of a mixin and of its own, with room for parts."""
    layer.__class__ = _derived(mixin, type(layer))
    for part in ("bias_units", "keys", "adapters"):
        layer.register_module(part, None)


def add_parts(
    layer: nn.Module,
    bias_units: BiasUnits | None = None,
    keys: Keys | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> None:
    """Add what tasks have to a layer of :data:`KINDS` in place, keeping what it has.

    Args:
        layer: linear layers and convolutions have keys.
        bias_units: of :func:`number_of_biases`, on the layer's device.
        keys: on the layer's device.
        adapters: by kind, on the layer's device.
    """
    if isinstance(layer, nn.Linear):
        layer = SwitchableLinear.convert(layer, bias_units=bias_units, keys=keys)
    elif not isinstance(layer, Switchable):
        kind = kind_of(layer)
        assert kind is not None
        assert kind.mixin is not None
        become_switchable(layer, kind.mixin)
    assert isinstance(layer, SwitchableLinear | Switchable)
    if adapters:
        before = {} if layer.adapters is None else dict(layer.adapters.items())
        layer.adapters = nn.ModuleDict({**before, **adapters})
    if isinstance(layer, SwitchableLinear):
        return
    if bias_units is not None:
        layer.bias_units = bias_units
    if keys is not None:
        layer.keys = keys


def switch_replaced(network: nn.Module) -> None:
    """Make layers switchable that took the place of some that were, and have their parts.

    ``nn.SyncBatchNorm.convert_sync_batchnorm``, behind Lightning's ``sync_batchnorm``, makes such layers.
    """
    for part in list(network.modules()):
        if isinstance(part, SwitchableLinear | Switchable):
            continue
        children = dict(part.named_children())
        units, held = (
            children.get("bias_units"),
            children.get("adapters", nn.Module()).named_children(),
        )
        adapters = {kind: one for kind, one in held if isinstance(one, Adapter)}
        if isinstance(units, BiasUnits) or adapters:
            add_parts(part, units if isinstance(units, BiasUnits) else None, adapters=adapters)
