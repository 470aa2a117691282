"""What a request asks: one input and its task, from JSON or a form, read within limits."""

import asyncio
import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeGuard

import numpy as np
from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from bpn_lightning.files.untrusted import parse_json

__all__ = ["DTYPES", "Item", "Limits", "read_item"]

FIELDS = ("task", "image", "input", "dtype", "shape")
DTYPES = ("uint8", "int64", "float32", "float64")
MAX_TASK = 256
"""Characters of a task's name."""

_QUICK_BYTES = 2**16  # below which a body is parsed where other requests wait


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        max_bytes: of its body.
        max_pixels: height x width of an image.
        timeout: seconds until its body has arrived, and as many until it is its turn.
    """

    max_bytes: int = 2**24
    max_pixels: int = 2**24
    timeout: float = 30


@dataclass(frozen=True)
class Item:
    """One input.

    Args:
        task: a name or an ID; None: it is not given.
        image: the bytes of a file, not decoded.
        array: numbers in place of an image.
    """

    task: str | int | None
    # LitServe writes requests into debug messages, also where nobody reads them.
    image: bytes | None = field(default=None, repr=False)
    array: Any = field(default=None, repr=False)


async def read_item(request: Request) -> Item:
    """What a request asks.

    Raises:
        HTTPException: 408, it takes too long; 413, it is too large; 415, it is of another type; 422, it is
            malformed.
    """
    limits: Limits = request.app.state.limits
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise HTTPException(
            415,
            f"Expected Content-Type to be application/json or multipart/form-data, but got {kind!r:.80}.",
        )
    try:
        body = await asyncio.wait_for(_body(request, limits.max_bytes), limits.timeout)
    except asyncio.TimeoutError as error:
        raise HTTPException(
            408,
            f"Expected the body of the request within {limits.timeout:g} s, but it has no end yet. Send it faster.",
        ) from error
    if kind == "multipart/form-data":
        return await _of_form(request, body)
    if len(body) < _QUICK_BYTES:
        return _of_json(body)
    found: Item = await run_in_threadpool(_of_json, body)
    return found


async def _body(request: Request, most: int) -> bytes:
    """All of it, or as little as shows that it is too large."""
    declared = request.headers.get("content-length", "0")
    parts, size = [], int(declared) if declared.isdecimal() else 0
    if size <= most:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                break
    if size > most:
        raise HTTPException(
            413,
            f"Expected a request of at most {most:,} bytes, but got more. Send a smaller input.",
            {"Connection": "close"},  # nobody reads the rest
        )
    return b"".join(parts)


async def _of_form(request: Request, body: bytes) -> Item:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, receive).form(max_files=2, max_fields=4) as form:
        image, task = form.get("image"), form.get("task")
        unknown = sorted(set(form) - {"image", "task"})
        if unknown or not hasattr(image, "read") or hasattr(task, "read"):
            raise _malformed(
                "the form to have a file as image, and perhaps the text task",
                f"the fields {', '.join(sorted(form)) or 'of none'}",
            )
        content = await image.read()
    return Item(_task(task or None), image=content)


def _of_json(body: bytes) -> Item:
    try:
        record = parse_json(body.decode())
    except (ValueError, RecursionError) as error:
        raise _malformed("the body to be JSON", str(error)) from error
    if not isinstance(record, Mapping) or not set(record) <= set(FIELDS):
        got = ", ".join(map(repr, record)) if isinstance(record, Mapping) else f"{record!r}"
        raise _malformed(f"an object with some of {', '.join(FIELDS)}", f"{got:.200}")
    if ("image" in record) == ("input" in record):
        got = "both" if "image" in record else "none"
        raise _malformed("either image or input", got)
    task = _task(record.get("task"))
    if "image" in record:
        return Item(task, image=_of_base64("image", record["image"]))
    return Item(task, array=_array(record))


def _task(task: Any) -> str | int | None:
    named = isinstance(task, str) and len(task) <= MAX_TASK
    if task is None or named or type(task) is int:
        found: str | int | None = task
        return found
    raise _malformed("task to be a name or an ID", f"{task!r:.80}")


def _array(record: Mapping[str, Any]) -> Any:
    """Nested lists, or base64 of numbers with their type and shape."""
    values, dtype, shape = record["input"], record.get("dtype"), record.get("shape")
    if isinstance(values, str):
        if dtype not in DTYPES or not _is_shape(shape):
            raise _malformed(
                f"input in base64 to have a dtype, one of {', '.join(DTYPES)}, and a shape",
                f"{dtype!r:.40} and {shape!r:.80}",
            )
        content = _of_base64("input", values)
        wanted = np.dtype(dtype).newbyteorder("<")
        if len(content) != wanted.itemsize * prod(shape):
            raise _malformed(
                f"input to have {dtype} numbers of the shape {shape}", f"{len(content):,} bytes"
            )
        return np.frombuffer(content, wanted).reshape(shape).astype(dtype)
    if shape is not None or dtype is not None:
        raise _malformed("dtype and shape for base64 only", "them with a list")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise _malformed("input to be numbers in lists of equal lengths", str(error)) from error
    if array.dtype.kind not in "if" or not array.ndim:
        raise _malformed("input to be numbers in lists of equal lengths", f"{values!r:.80}")
    return array


def _is_shape(shape: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list)
        and 0 < len(shape) <= 4
        and all(type(one) is int and 0 < one < 2**24 for one in shape)
    )


def _of_base64(name: str, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise _malformed(f"{name} to be base64", f"{text!r:.40}") from error


def _malformed(rule: str, got: str) -> HTTPException:
    return HTTPException(
        422, f"Expected {rule}, but got {' '.join(got.split())[:300].rstrip('.')}."
    )
