"""What a request asks is read within limits, and what is wrong with it is said with its status."""

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

import numpy as np
from fastapi import HTTPException, Request

from bpn_lightning.serve.reading import Item, Limits, read_item

LIMITS = Limits(max_bytes=2000, max_pixels=100, timeout=0.2)
JSON = "application/json"
FORM = "multipart/form-data; boundary=x"


def read(parts: Iterator[bytes] | list[bytes], kind: str = JSON, **headers: str) -> Item:
    given = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        "app": SimpleNamespace(state=SimpleNamespace(limits=LIMITS)),
    }
    coming = iter(parts)

    async def receive() -> dict[str, Any]:
        try:
            return {"type": "http.request", "body": next(coming), "more_body": True}
        except StopIteration:
            return {"type": "http.request", "body": b"", "more_body": False}
        except TimeoutError:  # a client that sends nothing more
            await asyncio.Event().wait()
            raise

    with ThreadPoolExecutor(1) as other:  # in this thread a browser's loop may be running
        return other.submit(asyncio.run, read_item(Request(scope, receive))).result()


def of(record: Any) -> list[bytes]:
    return [json.dumps(record).encode()]


def form(**fields: str) -> list[bytes]:
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{text}\r\n'
        for name, text in fields.items()
        for file in ['; filename="1.png"' if name.startswith("image") else ""]
    ]
    return ["".join([*parts, "--x--\r\n"]).encode()]


def test_json_with_numbers_or_base64() -> None:
    item = read(of({"task": "low", "input": [[1, 2], [3, 4]]}))
    assert (item.task, item.image, item.array.tolist()) == ("low", None, [[1, 2], [3, 4]])
    item = read(of({"task": 3, "image": base64.b64encode(b"a file").decode()}))
    assert (item.task, item.image) == (3, b"a file")
    array = np.array([[0.5, -2.0]], dtype="<f4")
    raw = {"input": base64.b64encode(array.tobytes()).decode(), "dtype": "float32", "shape": [1, 2]}
    item = read(of(raw))
    assert item.task is None
    assert item.array.dtype == np.float32
    assert (item.array == array).all()


def test_a_form_with_a_file() -> None:
    item = read(form(image="a file", task="low"), FORM)
    assert (item.task, item.image) == ("low", b"a file")
    assert read(form(image="a file"), FORM).task is None
    assert read(form(image="a file", task=""), FORM).task is None  # the page's first choice


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([1], "an object with some of task, image, input"),
        ({"input": [1], "tusk": 1}, "but got 'input', 'tusk'"),
        ({"task": 1}, "either image or input, but got none"),
        ({"input": [1], "image": ""}, "but got both"),
        ({"input": [1], "task": 1.5}, "task to be a name or an ID, but got 1.5"),
        ({"input": [1], "task": True}, "task to be a name or an ID, but got True"),
        ({"input": [1], "task": "x" * 300}, "task to be a name or an ID"),
        ({"input": [[1], [1, 2]]}, "numbers in lists of equal lengths"),
        ({"input": ["a"]}, "numbers in lists of equal lengths"),
        ({"input": [True]}, "numbers in lists of equal lengths"),
        ({"input": 1}, "numbers in lists of equal lengths"),
        ({"input": None}, "numbers in lists of equal lengths"),
        ({"input": [1], "dtype": "uint8"}, "dtype and shape for base64 only"),
        ({"image": "no base64"}, "image to be base64"),
        ({"image": 3}, "image to be base64"),
        ({"input": "AAAA"}, "to have a dtype, one of uint8, int64, float32, float64"),
        ({"input": "AAAA", "dtype": "object", "shape": [3]}, "but got 'object'"),
        ({"input": "AAAA", "dtype": "uint8", "shape": [2**23] * 4}, "but got 3 bytes"),
        ({"input": "AAAA", "dtype": "uint8", "shape": [-3]}, "and a shape"),
    ],
)
def test_json_that_asks_nothing(record: Any, said: str) -> None:
    with pytest.raises(HTTPException) as caught:
        read(of(record))
    assert caught.value.status_code == 422
    assert said in caught.value.detail


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 1900, b'{"input": [1e999]}', b"NaN"])
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(HTTPException, match=r"422.*Expected the body to be JSON"):
        read([body])


@pytest.mark.parametrize(
    "body", [form(task="low"), form(image="a", other="b"), form(image="a", image2="b"), [b""]]
)
def test_forms_that_ask_nothing(body: list[bytes]) -> None:
    with pytest.raises(HTTPException, match=r"422.*Expected the form to have a file as image"):
        read(body, FORM)


def test_another_type() -> None:
    with pytest.raises(HTTPException, match=r"415.*but got 'text/plain'"):
        read([b"low"], "text/plain; charset=utf-8")


def test_a_body_without_an_end_is_read_no_further_than_the_limit() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 500
            yield bytes(500)

    with pytest.raises(HTTPException, match=r"413.*at most 2,000 bytes"):
        read(endless())
    assert sent == 2500


def test_a_body_that_says_that_it_is_too_large_is_not_read() -> None:
    def unread() -> Iterator[bytes]:
        raise AssertionError
        yield b""

    with pytest.raises(HTTPException, match=r"413"):
        read(unread(), content_length="2001")


def test_a_body_that_stops_coming() -> None:
    def stalled() -> Iterator[bytes]:
        yield b"{"
        raise TimeoutError

    with pytest.raises(HTTPException, match=r"408.*within 0.2 s"):
        read(stalled())
