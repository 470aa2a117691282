"""The command in a process: batches of several tasks, tasks that come and go under load, refusals, page, stop."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

for needed in ("litserve", "prometheus_client", "python_multipart"):
    pytest.importorskip(needed)

import numpy as np
import torch
from PIL import Image
from waiting import PATIENCE

from bpn_lightning.cli import bundle, export
from bpn_lightning.cli import main as fit
from bpn_lightning.modes import load
from bpn_lightning.serve.cli import main

pytestmark = pytest.mark.slow

MAX_BYTES = 50_000


@dataclass
class Served:
    """A server, and the folder that it follows."""

    folder: Path
    port: int
    process: subprocess.Popen[str]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> tuple[int, str]:
        return self.send("GET", path)

    def ask(self, task: Any, pixels: Any) -> tuple[int, Any]:
        body = json.dumps({"task": task, "input": pixels.tolist()})
        status, text = self.send("POST", "/predict", body, {"Content-Type": "application/json"})
        return status, json.loads(text)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def counted(self, name: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Served]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "bpn_lightning.serve.cli", str(folder), "--port", str(port)]
    more = ["--every", "0.1", "--batch_wait", "0.05", "--max_bytes", str(MAX_BYTES), *flags]
    process = subprocess.Popen(
        [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    served = Served(folder, port, process)

    def ready() -> bool:
        assert process.poll() is None, process.stdout and process.stdout.read()
        try:
            return served.get("/health") == (200, "ok")
        except OSError:
            return False

    try:
        wait_for(ready)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("served") / "bundle"))
    with serving(folder, "--max_pixels", "10000", "--timeout", "5") as one:
        yield one


def pixels(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (1, 8, 8), dtype=np.uint8)


def test_requests_for_different_tasks_are_one_batch_and_equal_the_bundle(served: Served) -> None:
    net = load(served.folder)
    tasks = [["low", "middle", "high"][n % 3] for n in range(48)]
    batches = served.counted("bpn_serve_batch_inputs_count")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: served.ask(tasks[n], pixels(n)), range(48)))
    for number, (status, answer) in enumerate(found):
        (like,) = net.predict(torch.from_numpy(pixels(number)), task=tasks[number])
        assert status == 200
        assert answer == {
            "class": like.class_name,
            "task": like.task,
            "task_id": like.task_id,
            "confidence": pytest.approx(like.confidence, abs=1e-6),
            "rejected": False,
        }
    assert served.counted("bpn_serve_batch_inputs_count") - batches < 48


def test_a_task_goes_and_comes_under_load(served: Served, tmp_path: Path) -> None:
    """No request of the other tasks fails, and their answers stay what they were."""
    before = {task: served.ask(task, pixels(0)) for task in ("low", "high")}
    for _, answer in before.values():
        # Sums over batches of other sizes are rounded differently.
        answer["confidence"] = pytest.approx(answer["confidence"], abs=1e-6)
    done = threading.Event()
    failed: list[tuple[int, Any]] = []
    asked: Counter[str] = Counter()

    def load_test(task: str) -> None:
        while not done.is_set():
            asked[task] += 1
            found = served.ask(task, pixels(0))
            if found != before[task]:
                failed.append(found)

    place = served.folder / "tasks" / "middle"
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load_test, task) for task in ("low", "high") * 2]
        try:
            for _ in range(3):
                shutil.move(place, tmp_path / "middle")
                wait_for(lambda: served.ask("middle", pixels(0))[0] == 404)
                shutil.move(tmp_path / "middle", place)
                wait_for(lambda: served.ask("middle", pixels(0))[0] == 200)
        finally:
            done.set()
        for one in running:
            one.result()
    assert min(asked["low"], asked["high"]) > 20
    assert failed == []


def test_what_is_refused(served: Served) -> None:
    status, answer = served.ask("tusk", pixels(0))
    assert status == 404
    assert "one of low (0), middle (1), high (2), but got 'tusk'" in answer["detail"]
    status, answer = served.ask(None, pixels(0))
    assert status == 422
    assert "where the bundle has no gate" in answer["detail"]
    assert served.ask("low", np.full((1, 8, 8), 1.5))[0] == 422
    assert served.ask("low", np.zeros((1, 7, 8), dtype=int))[0] == 422
    json_type = {"Content-Type": "application/json"}
    assert served.send("POST", "/predict", bytes(MAX_BYTES + 1), json_type)[0] == 413
    assert served.send("POST", "/predict", "x", {"Content-Type": "text/plain"})[0] == 415
    file = BytesIO()
    Image.new("L", (101, 100)).save(file, "PNG")
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="1.png"\r\n\r\n'
    task = b'\r\n--x\r\nContent-Disposition: form-data; name="task"\r\n\r\nlow\r\n--x--\r\n'
    form_type = {"Content-Type": "multipart/form-data; boundary=x"}
    status, text = served.send("POST", "/predict", form + file.getvalue() + task, form_type)
    assert status == 413
    assert "101 x 100 pixels" in text
    status, text = served.send("POST", "/predict", form + b"no image" + task, form_type)
    assert status == 422
    assert "Expected an image" in text


def test_a_body_without_an_end(served: Served) -> None:
    def first_line(send: Callable[[socket.socket], object]) -> bytes:
        with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            with suppress(OSError):  # the server has hung up
                send(connection)
            return connection.recv(100).partition(b"\r\n")[0]

    def endless(connection: socket.socket) -> None:
        for _ in range(MAX_BYTES // 1000 + 1):
            connection.sendall(b"3e8\r\n" + bytes(1000) + b"\r\n")

    assert first_line(endless) == b"HTTP/1.1 413 Request Entity Too Large"
    assert first_line(lambda _: None).startswith(b"HTTP/1.1 408 ")
    assert served.ask("low", pixels(0))[0] == 200


def test_what_else_there_is(served: Served) -> None:
    status, text = served.get("/openapi.json")
    assert status == 200
    post = json.loads(text)["paths"]["/predict"]["post"]
    assert set(post["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"200", "404", "408", "413", "415", "422"} <= set(post["responses"])
    assert [one["name"] for one in json.loads(served.get("/tasks")[1])["tasks"]] == [
        *["low", "middle", "high"]
    ]
    assert served.get("/docs")[0] == 404  # FastAPI's page has scripts of another server
    before = served.counted('bpn_serve_answers_total{task="high"}')
    requests = served.counted('bpn_serve_requests_total{status="200"}')
    served.ask("high", pixels(0))
    assert served.counted('bpn_serve_answers_total{task="high"}') == before + 1
    assert served.counted('bpn_serve_requests_total{status="200"}') == requests + 1
    assert served.counted("bpn_serve_tasks") == 3


def test_the_page_in_chromium(served: Served, browser: Any, tmp_path: Path) -> None:
    Image.fromarray(pixels(0)[0]).save(tmp_path / "digit.png")
    (like,) = load(served.folder).predict(torch.from_numpy(pixels(0)), task="high")
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(served.url("/"))
    page.locator("#task option").nth(2).wait_for(state="attached")
    page.set_input_files("#image", tmp_path / "digit.png")
    page.select_option("#task", "high")
    page.get_by_role("button", name="Ask").click()
    assert page.locator("[data-of=class]").inner_text() == like.class_name
    assert page.locator("[data-of=task]").inner_text() == "high"
    assert page.locator("#classes").inner_text().startswith("Classes: ")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#shown").evaluate("image => image.naturalWidth") == 8
    (tmp_path / "digit.png").write_text("no image")
    page.set_input_files("#image", tmp_path / "digit.png")
    messages.clear()  # what fails from here on is the request, which Chromium notes
    page.get_by_role("button", name="Ask").click()
    assert "Expected an image" in page.locator("#answer .wrong").inner_text()
    assert all("422" in one for one in messages)
    own = tuple(served.url(path) for path in ("/", "/tasks", "/predict"))
    assert {one for one in requests if not one.startswith(("blob:", "data:"))} == set(own)
    context.close()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.matrix)]
)
def test_a_stop_answers_what_has_begun(trained: Path, number: signal.Signals) -> None:
    with serving(trained, "--batch_wait", "1") as one, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one.ask, "low", pixels(0))
        time.sleep(0.3)  # it has been sent, and waits for a batch
        one.process.send_signal(number)
        assert answer.result()[0] == 200
        assert one.process.wait(PATIENCE) == 0
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(one.url("/health"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "80"], "Expected port to be from 1024 to 65535, but got 80."),
        (["--batch_size", "0"], "Expected batch_size to be"),
        (["--timeout", "0"], "Expected timeout to be"),
        (["--batch_wait", "1", "--timeout", "0.5"], "Expected batch_wait to be below timeout"),
        (["--reject_below", "2"], "Expected reject_below to be"),
        ([], "to be a bundle of bpn-export"),
    ],
)
def test_what_the_command_refuses(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    assert main([str(tmp_path), "--port", port, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main([str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "Expected port to be free" in capsys.readouterr().err


# --- learning goes on while it serves ------------------------------------------------------------

LEARN = [
    *("--config", "digits_inc.yaml", "--method", "bd", "--gate", "ncm", "--model.mask", "task"),
    *("--model.train", "modes", "--model.train_first", "all", "--quiet"),
    *("--data.init_args.epochs_per_task", "1", "--trainer.accelerator", "cpu"),
]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings(
    "ignore:The stream has no data of tasks 1 to 3"
)  # which are in the bundle
def test_a_fourth_task_is_learned_while_three_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, export, serve, learn from the bundle into the bundle, ask: no request fails, nothing old changes."""
    old = ["low", "middle", "high"]
    images = torch.from_numpy(np.stack([pixels(n) for n in range(8)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    assert fit.main([*LEARN, "--data.init_args.num_tasks", "3"]) == 0
    past = "runs/digits_inc/bd,gate=ncm/seed_0"
    assert export.main([past, "--to", "live", "--names", *old, "--training_state"]) == 0
    shutil.rmtree(tmp_path / "runs")  # the bundle is all that there is from here on
    folder = tmp_path / "live"
    before = [load(folder)(images, task=name) for name in old]
    done = threading.Event()
    failed: list[Any] = []
    asked: Counter[str] = Counter()

    def load_test(served: Served, task: str) -> None:
        first = served.ask(task, pixels(0))
        # Sums over batches of other sizes are rounded differently.
        first[1]["confidence"] = pytest.approx(first[1]["confidence"], abs=1e-6)
        while not done.is_set():
            asked[task] += 1
            if (found := served.ask(task, pixels(0))) != first or found[0] != 200:
                failed.append(found)
            time.sleep(0.05)  # which leaves the training a share of the cores

    with serving(folder) as served, ThreadPoolExecutor(3) as pool:
        running = [pool.submit(load_test, served, task) for task in old]
        try:
            wait_for(lambda: len(asked) == 3)
            new = ["--data.init_args.class_order", "[6, 7]", "--data.init_args.num_tasks", "1"]
            both = ["--continue_from", "live", "--to", "live", "--names", "fourth"]
            assert fit.main([*LEARN, *new, *both, "--experiment", "next"]) == 0
            wait_for(lambda: served.ask("fourth", pixels(0))[0] == 200)
            (like,) = load(folder).predict(pixels(0), task="fourth")
            _, answer = served.ask("fourth", pixels(0))
            assert (answer["class"], answer["task"]) == (like.class_name, "fourth")
            assert served.ask(None, pixels(0))[0] == 200  # its gate knows all four
            wait_for(lambda: min(asked.values()) > 20)
        finally:
            done.set()
        for one in running:
            one.result()
    assert failed == []
    for one, name in zip(before, old, strict=True):
        assert torch.equal(load(folder)(images, task=name)[:, :6], one)
    assert bundle.main(["check", "live"]) == 0
