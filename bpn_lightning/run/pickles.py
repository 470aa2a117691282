"""Check of a checkpoint's pickle before any object is created.

``torch.load(weights_only=True)`` does not run arbitrary code, but calls some classes with any arguments:
``bytearray(3 << 30)`` and ``torch.UntypedStorage(1 << 40)`` fill the memory, as do a few nested calls of
``codecs.encode``. Its instructions are therefore interpreted here with a stack of descriptions instead of
values, in linear time.
"""

import pickletools
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch

__all__ = ["check_pickle"]

#: Allowed globals besides plain values: tensors, their parts, and their dtypes.
_PARTS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "__builtin__.complex",
        "builtins.complex",
        "__builtin__.set",
        "builtins.set",
        "_codecs.encode",  # for bytes
    }
)

#: Allowed only as the type of a tensor's storage.
_STORAGES = frozenset(
    {"torch.storage.UntypedStorage", "torch.UntypedStorage"}
    | {f"torch.{one.__name__}" for one in torch._storage_classes if one.__module__ == "torch"}
)

#: The maximum number of values in a key, all of which are hashed at every lookup.
_LARGEST_KEY = 1000


class _Value(NamedTuple):
    """The description of a value on the stack."""

    size: float = 1
    """For a tuple, the number of its values, counted at each occurrence; 1 for anything else."""
    name: str = ""
    """The name of a global."""
    parts: tuple[Any, ...] = ()
    """The elements of a tuple; for a short text, the text itself."""


def check_pickle(content: bytes) -> None:
    """Refuse a pickle with calls that checkpoints do not contain.

    Classes registered by ``torch.serialization.add_safe_globals`` are allowed as well.

    Args:
        content: of the record ``data.pkl``.

    Raises:
        UnpicklingError: it has another instruction.
        ValueError: it is not a pickle.
    """
    users = {f"{one.__module__}.{one.__qualname__}" for one in _registered()}
    largest = 0.0
    stack: list[Any] = []
    memo: dict[int, _Value] = {}
    argument: Any
    for code, argument, _ in pickletools.genops(content):
        if code.name == "MARK":
            stack.append(None)
        elif code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "GLOBAL":
            name = ".".join(argument.split(" ", 1))
            dtype = isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
            if name not in _PARTS | _STORAGES | users and not (dtype and name.startswith("torch.")):
                raise UnpicklingError(f"{name} is not allowed in a checkpoint")
            stack.append(_Value(name=name))
        else:
            taken = _taken(code, stack)
            if code.name in ("SETITEM", "SETITEMS"):
                _check_keys(taken[1::2])
            if code.name == "REDUCE":
                _check_call(taken[0].name, taken[1].parts, users, largest)
            if code.name == "NEWOBJ" and taken[0].name not in users:
                raise UnpicklingError(f"{taken[0].name} is created without a call")
            if code.name.startswith("TUPLE"):
                stack.append(_Value(1 + sum(one.size for one in taken), parts=tuple(taken)))
                largest = max(largest, stack[-1].size)
            elif code.name == "BINUNICODE" and len(argument) < 10:
                stack.append(_Value(parts=(argument,)))
            elif code.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"):
                stack.append(taken[0])
            else:
                stack += [_Value()] * len(code.stack_after)


def _registered() -> list[Any]:
    found = torch.serialization.get_safe_globals()
    return [one[0] if isinstance(one, tuple) else one for one in found]


def _taken(code: pickletools.OpcodeInfo, stack: list[Any]) -> list[_Value]:
    """Pop the arguments of an instruction from the stack, in order and without the mark."""
    marked = pickletools.markobject in code.stack_before
    fixed = len(code.stack_before) - (2 if marked else 0)  # the mark, and everything above it
    taken: list[_Value] = []
    if marked:
        while (value := stack.pop()) is not None:
            taken.append(value)
    for _ in range(fixed):
        taken.append(stack.pop())
    if None in taken:
        raise ValueError("a mark in place of a value")
    return taken[::-1]


def _check_keys(keys: list[_Value]) -> None:
    if any(key.size > _LARGEST_KEY for key in keys):
        raise UnpicklingError("a key has too many values")


def _check_call(name: str, arguments: tuple[Any, ...], users: set[str], largest: float) -> None:
    """Refuse calls that create more than their arguments, or that hash them."""
    if name == "_codecs.encode":
        wrong = len(arguments) != 2 or arguments[1].parts != ("latin1",)
    elif name == "collections.OrderedDict":
        wrong = bool(arguments)
    elif name in (
        "__builtin__.set",
        "builtins.set",
    ):  # of a list, which may contain any tuple so far
        wrong = largest > _LARGEST_KEY
    else:
        wrong = not name or name in _STORAGES
    if wrong and name not in users:
        raise UnpicklingError(
            f"{name or 'a value'} is called with arguments that checkpoints do not contain"
        )
