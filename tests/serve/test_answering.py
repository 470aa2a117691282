"""Requests of one batch are answered as each alone, and none fails for another one's fault."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import numpy as np
import torch
from PIL import Image

from bpn_lightning.modes import Modes, Prediction, load
from bpn_lightning.serve.answering import Asked, Refused, answer, decode
from bpn_lightning.serve.reading import Item

PIXELS = 10_000


@pytest.fixture(scope="module")
def net(trained: Path) -> Modes:
    return load(trained)


def image(number: int, side: int = 8) -> Any:
    return np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)


def png(array: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def ask(net: Modes, *items: Item) -> list[Prediction | Refused]:
    return answer(net, [decode(net, one, PIXELS) for one in items])


def test_a_batch_of_several_tasks_is_one_call_and_equals_each_alone(
    net: Modes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["high", "low", "middle", "low", "2", 1]
    wanted = [
        net.predict(torch.from_numpy(image(n))[None, None], task=t)[0]
        for n, t in enumerate(["high", "low", "middle", "low", "high", "middle"])
    ]
    calls = []
    predict = net.predict
    monkeypatch.setattr(net, "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
    found = ask(net, *(Item(task, png(image(n))) for n, task in enumerate(tasks)))
    assert len(calls) == 1
    for one, like in zip(found, wanted, strict=True):
        assert isinstance(one, Prediction)
        assert one[:4] == like[:4]
        assert one.confidence == pytest.approx(like.confidence, abs=1e-6)


def test_numbers_are_the_image_that_they_are(net: Modes) -> None:
    pixels = image(0)
    whole = Item("low", array=pixels[None].astype(np.int64))  # what lists of JSON become
    fraction = Item("low", array=pixels[None] / 255)
    first, *others = ask(net, Item("low", png(pixels)), whole, fraction)
    assert isinstance(first, Prediction)
    for other in others:
        assert isinstance(other, Prediction)
        assert other.confidence == pytest.approx(first.confidence, abs=1e-6)


def test_images_are_resized_and_in_gray(net: Modes) -> None:
    color = np.repeat(image(0, 8).repeat(4, 0).repeat(4, 1)[..., None], 3, 2)
    (found,) = ask(net, Item("low", png(color)))
    assert isinstance(found, Prediction)


def test_what_is_refused_alone_in_a_batch(net: Modes) -> None:
    good = Item("low", png(image(0)))
    large = Item("low", png(image(0, 101)))
    outside = Item("low", array=np.full((1, 8, 8), 256))
    shape = Item("low", array=np.zeros((1, 9, 9)))
    unknown, number = Item("lou", png(image(0))), Item(7, png(image(0)))
    unnamed = Item(None, png(image(0)))
    broken = Item("low", png(image(0))[:60])
    nan = Item("low", array=np.full((1, 8, 8), np.nan))
    wrong = [unknown, number, unnamed, large, broken, outside, shape, nan]
    first, *refused, last = ask(net, good, *wrong, good)
    assert isinstance(first, Prediction)
    assert first == last
    assert [one.status for one in refused if isinstance(one, Refused)] == [
        *[404, 404, 422, 413, 422, 422, 422, 422]
    ]
    texts = [one.message for one in refused if isinstance(one, Refused)]
    assert "one of low (0), middle (1), high (2), but got 'lou'. Did you mean 'low'?" in texts[0]
    assert "but got 7" in texts[1]
    assert texts[2].startswith(
        "Expected task to be one of low, middle, high where the bundle has no gate"
    )
    assert "101 x 101 pixels, more than 10,000" in texts[3]
    assert "Expected an image, but got " in texts[4]
    assert "uint8 from 0 to 255" in texts[5]
    assert "(1, 8, 8)" in texts[6]
    assert "to be from 0 to 1" in texts[7]


def test_a_task_that_goes_between_decoding_and_answering(bundle: Path) -> None:
    net = load(bundle)
    asked = [decode(net, Item(task, png(image(0))), PIXELS) for task in ("low", "middle")]
    before = answer(net, asked)
    net.remove_task("middle")
    first, second = answer(net, asked)
    assert isinstance(first, Prediction)
    assert isinstance(before[0], Prediction)
    # Alone in its batch: products of another shape are rounded differently.
    assert first.confidence == pytest.approx(before[0].confidence, abs=1e-6)
    assert first._replace(confidence=0) == before[0]._replace(confidence=0)
    assert isinstance(second, Refused)
    assert second.status == 404


def test_a_network_that_fails(net: Modes, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(net, "predict", fail)
    (found,) = answer(net, [Asked("low", image(0)[None])])
    assert found == Refused(500, "Expected an answer, but the network failed; the log says why.")
    assert "out of memory" in capsys.readouterr().err
