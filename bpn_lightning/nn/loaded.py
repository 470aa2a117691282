"""Parts of torch that take longer to import than the rest of it, used only where somebody has imported them."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["eagerly", "loaded_class"]


def loaded_class(module: str, name: str) -> Any:
    """A class for ``isinstance``, or ``()``, which nothing is an instance of, where its module was not imported.

    Args:
        module: such as ``torch.distributed.fsdp``.
        name: of the class.
    """
    return getattr(sys.modules.get(module), name, ())


def eagerly() -> AbstractContextManager[Any]:
    """Nothing runs compiled inside; where ``torch._dynamo`` was not imported, nothing is compiled."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
