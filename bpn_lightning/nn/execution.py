"""How torch runs a network: compiled or eager, with fused kernels or layer by layer.

Bias units, keys and hooks take effect when a layer is called. Code that runs a network without calling
its layers would bypass them; it is disabled or detected here.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.nn.layers import TaskModule
from bpn_lightning.nn.loaded import eagerly, loaded_class
from bpn_lightning.nn.switching import SwitchableAttention, SwitchableRecurrent, is_switchable

__all__ = [
    "check_layers_are_called",
    "compiled_in_place",
    "differentiable",
    "graph_uses",
    "leave_fast_paths",
    "mixing_samples",
]


# --- compiled networks ---------------------------------------------------------------------------


def compiled_in_place(network: nn.Module) -> nn.Module:
    """Compile parts of a network in place: names do not change, and parts with hooks run eagerly.

    ``torch.compile(part)`` is a wrapper, which adds ``_orig_mod`` to all names below it;
    ``part.compile()`` is not. And a graph ignores hooks that are registered after compilation.

    Args:
        network: compiled completely, partly, or not at all; its parts are changed in place.

    Returns:
        The network without wrappers.
    """
    if _is_wrapper(network):
        network = _unwrapped(network)
    for part in list(network.modules()):
        for name, child in list(part.named_children()):
            if _is_wrapper(child):
                setattr(part, name, _unwrapped(child))
    for part in network.modules():
        compiled: Any = part._compiled_call_impl
        if compiled is None and hasattr(part.forward, "_torchdynamo_orig_callable"):
            compiled = part._call_impl  # its forward is decorated with torch.compile
        if compiled is not None and not isinstance(compiled, _EagerWhereHooked):
            part._compiled_call_impl = _EagerWhereHooked(part, compiled)
    return network


def _is_wrapper(part: nn.Module) -> bool:
    """Whether it is what torch.compile returns for a module."""
    return isinstance(part, loaded_class("torch._dynamo", "OptimizedModule"))


def _unwrapped(wrapper: Any) -> nn.Module:
    """The module inside a wrapper, compiled like the wrapper."""
    original: nn.Module = wrapper._orig_mod
    original._compiled_call_impl = wrapper.dynamo_ctx(original._call_impl)
    return original


class _EagerWhereHooked:
    """A compiled module's call, which runs eagerly if there are hooks; torch drops it in copies.

    Args:
        module: the module.
        compiled: its compiled call.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self.module = module
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(part._forward_hooks or part._forward_pre_hooks for part in self.module.modules()):
            with eagerly():
                return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self.compiled(*args, **kwargs)


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Allow differentiation in evaluation mode, with hooks on all layers.

    Nothing runs compiled. cuDNN's recurrent layers support backpropagation in training mode only, so a
    network with such layers on a GPU uses torch's own kernels.

    Args:
        network: the network to differentiate.
    """
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        if any(isinstance(part, nn.RNNBase) and _on_cuda(part) for part in network.modules()):
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        yield


def _on_cuda(part: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in part.parameters())


def graph_uses(tensor: Tensor) -> Counter[Node]:
    """The number of edges to each node of a tensor's graph, including its own.

    A parameter's node is that of ``torch.autograd.graph.get_gradient_edge``: its edges are its uses.
    """
    if tensor.grad_fn is None:
        return Counter()
    uses, ahead = Counter([tensor.grad_fn]), [tensor.grad_fn]
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is None:
                continue
            if node not in uses:
                ahead.append(node)
            uses[node] += 1
    return uses


# --- layers whose weights are read instead of being called -------------------------------------


def leave_fast_paths(network: nn.Module) -> None:
    """Make torch's transformer layers call their switchable layers in evaluation mode too.

    Their fused kernel reads the weights of all their layers directly. Other layers keep it.
    """
    for part in network.modules():
        if isinstance(part, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            if not any(map(is_switchable, part.modules())):
                continue
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False  # supported by the fused kernel only
            else:
                part.activation_relu_or_gelu = 0  # 0 disables the fused kernel


def check_layers_are_called(network: nn.Module, inputs: Tensor) -> None:
    """Refuse a network that reads the weights of a switchable layer directly, bypassing bias units and keys.

    Runs dry forward passes in evaluation and in training mode, in which a layer's parameters are NaN
    except during its own calls. Buffers and random states are restored.

    Args:
        network: in any mode; unused layers are ignored.
        inputs: ``(samples, ...)``, preprocessed, at least two samples.

    Raises:
        ConfigurationError: names the layers; or the forward pass raises an error in training mode.
    """
    layers = {name: part for name, part in network.named_modules() if is_switchable(part)}
    read = []
    for training in (False, True) if layers else ():
        try:
            plain = _dry_forward(network, inputs, training)
        except Exception as error:
            raise ConfigurationError(
                f"Expected backbone to accept {len(inputs)} samples in "
                f"{'training' if training else 'evaluation'} mode, but its forward pass raised "
                f"{type(error).__name__}: {error}. Correct its forward."
            ) from error
        if _reaches_output(network, layers, inputs, plain, training):
            read += [
                name
                for name, part in layers.items()
                if _reaches_output(network, {name: part}, inputs, plain, training)
            ]
    if read:
        first, *rest = dict.fromkeys(read)
        others = f" (and of {', '.join(rest)})" if rest else ""
        raise ConfigurationError(
            "Expected the network to call every layer that has bias units or keys, but it reads the "
            f"weights of {first}{others} without a call, which would bypass them. Choose other layers, or call the layer in your forward."
        )


def mixing_samples(backbone: nn.Module, inputs: Tensor) -> list[str]:
    """Switchable layers whose first dimension is not that of the samples, such as of sequences (length, batch).

    They cannot tell which sample's biases belong where. Attention and recurrent layers can.

    Args:
        backbone: the network below the head.
        inputs: ``(3, ...)``, for dry forward passes.
    """
    found: dict[str, None] = {}
    size = 0

    def compare(name: str, output: Tensor) -> None:
        if output.shape[:1] != (size,):
            found[name] = None

    layers = {
        name: part
        for name, part in backbone.named_modules(prefix="backbone")
        if is_switchable(part) and not isinstance(part, SwitchableAttention | SwitchableRecurrent)
    }
    with ExitStack() as stack:
        for name, part in layers.items():
            hook = part.register_forward_hook(
                lambda _, __, output, name=name: compare(name, output)
            )
            stack.callback(hook.remove)
        for size in (2, 3) if layers else ():
            _dry_forward(backbone, inputs[:size], training=False)
    return list(found)


def _reaches_output(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Tensor,
    plain: Tensor,
    training: bool,
) -> bool:
    """Whether parameters of some layers affect the output other than through the layers' calls."""
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(_hidden_parameters(layer))
        try:
            output = _dry_forward(network, inputs, training)
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError):
            return True  # it rejects NaN
    return bool((output.isnan() & ~plain.isnan()).any())


def _dry_forward(network: nn.Module, inputs: Tensor, training: bool) -> Tensor:
    """The output in a mode; flags and random states are restored, buffers are never written."""
    flags = [(part, part.training) for part in network.modules()]
    with ExitStack() as stack:
        stack.enter_context(_copied_buffers(network))
        stack.enter_context(torch.random.fork_rng([inputs.device] if inputs.is_cuda else []))
        stack.enter_context(torch.set_grad_enabled(training))  # as in actual use
        stack.enter_context(eagerly())
        network.train(training)
        try:
            output: Tensor = network(inputs)
        finally:
            for part, flag in flags:
                part.training = flag
    return output.detach()


@contextmanager
def _copied_buffers(network: nn.Module) -> Iterator[None]:
    """Let a network write into copies: a graph may have saved its buffers as they are."""
    real = [
        (owner, name, buffer)
        for owner in network.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    copies = {buffer: buffer.clone() for *_, buffer in real}  # one of a buffer of two owners
    for owner, name, buffer in real:
        setattr(owner, name, copies[buffer])
    try:
        yield
    finally:
        for owner, name, buffer in real:
            setattr(owner, name, buffer)


@contextmanager
def _hidden_parameters(layer: nn.Module) -> Iterator[None]:
    """Replace a layer's parameters by NaN, except while the layer itself runs."""
    owners = [part for part in layer.modules() if not isinstance(part, TaskModule)]
    real = [
        (owner, name, parameter)
        for owner in owners
        for name, parameter in owner.named_parameters(recurse=False)
    ]
    nothing = [p.detach().new_full((), float("nan")).expand_as(p) for *_, p in real]
    decoys = [
        nn.Parameter(value, p.requires_grad) for value, (*_, p) in zip(nothing, real, strict=True)
    ]

    def exchange(old: list[nn.Parameter], new: list[nn.Parameter]) -> None:
        for (owner, name, _), this, other in zip(real, old, new, strict=True):
            if getattr(owner, name) is this:  # else functional_call has replaced it
                setattr(owner, name, other)

    parameters = [parameter for *_, parameter in real]
    kind: Any = type(layer)
    running = 0

    def with_real_parameters(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            running += 1
            exchange(decoys, parameters)
            try:
                return method(*args, **kwargs)
            finally:
                running -= 1
                if not running:
                    exchange(parameters, decoys)

        return run

    # Not with hooks, which would disable fused kernels.
    methods = {name: with_real_parameters(getattr(kind, name)) for name in ("__call__", "forward")}
    layer.__class__ = type(kind.__name__, (kind,), methods)
    exchange(parameters, decoys)
    try:
        yield
    finally:
        layer.__class__ = kind
        exchange(decoys, parameters)
