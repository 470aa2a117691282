"""How torch runs a network: compiled or eagerly, by fused kernels or layer by layer.

Bias units, keys and hooks act where a layer is called. What runs a network without calling its layers
would leave them out, and is switched off or found here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.autograd.graph import Node

__all__ = [
    "compiled_in_place",
    "differentiable",
    "graph_uses",
]


# --- compiled networks ---------------------------------------------------------------------------


def compiled_in_place(network: nn.Module) -> nn.Module:
    """A network whose compiled parts keep their names, and run eagerly while hooks are on them.

    ``torch.compile(part)`` is a wrapper, which adds ``_orig_mod`` to every name below it;
    ``part.compile()`` is none. And a graph does not see hooks that are put on after it was compiled.

    Args:
        network: compiled as a whole, in parts, or not at all; its parts are changed in place.

    Returns:
        The network without wrappers.
    """
    if isinstance(network, OptimizedModule):
        network = _unwrapped(network)
    for part in list(network.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, OptimizedModule):
                setattr(part, name, _unwrapped(child))
    for part in network.modules():
        compiled: Any = part._compiled_call_impl
        if compiled is None and hasattr(part.forward, "_torchdynamo_orig_callable"):
            compiled = part._call_impl  # its forward is decorated with torch.compile
        if compiled is not None and not isinstance(compiled, _EagerWhereHooked):
            part._compiled_call_impl = _EagerWhereHooked(part, compiled)
    return network


def _unwrapped(wrapper: OptimizedModule) -> nn.Module:
    """The module in a wrapper, compiled as the wrapper is."""
    original: nn.Module = wrapper._orig_mod
    original._compiled_call_impl = wrapper.dynamo_ctx(original._call_impl)
    return original


class _EagerWhereHooked:
    """A compiled module's call, which a copy of the module does not take along: torch drops it.

    Args:
        module: that is called.
        compiled: its compiled call.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        self.module = module
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(part._forward_hooks or part._forward_pre_hooks for part in self.module.modules()):
            with torch.compiler.set_stance("force_eager"):
                return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self.compiled(*args, **kwargs)


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Whatever runs inside can be differentiated in evaluation mode, and its layers are seen by hooks.

    Nothing is compiled.

    Args:
        network: that is to be differentiated.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def graph_uses(tensor: Tensor) -> Counter[Node]:
    """How many edges of a tensor's graph lead to each of its nodes, itself among them.

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
