"""A bundle at run time compared with plain networks, separate models, peft, ONNX Runtime and LitServe.

    python benchmarks/serving.py --quick
    python benchmarks/serving.py
    python benchmarks/serving.py --rows mixed separate peft
    python benchmarks/serving.py --rows adding throughput --requests 10000

The network has 5 x 300 units, 784 inputs and 10 columns that all tasks share; a batch has 128 samples of
random tasks. Ratios are of the CPU time of this process (``throughput``: of the servers' processes), with one
thread. Both sides take turns, first the one, then the other, so that a busy machine slows both; the
table has the median of the turns' ratios and a 95 % bootstrap interval of it. Where a time is on the clock, the
row says so. What a row needs and does not find is named in it.
"""

import argparse
import base64
import gc
import itertools
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from http.client import HTTPConnection, HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from bpn_lightning import ContinualModule, export_module
from bpn_lightning.datamodules import SplitArrays
from bpn_lightning.modes import Modes, load
from bpn_lightning.modes.bundle import TASKS, read_bundle, write_task
from bpn_lightning.nn import MLP
from bpn_lightning.strategies import BeneficialPerturbation

INPUTS, HIDDEN, CLASSES, BATCH = 784, 300, 10, 128
PLAIN_SERVER = Path(__file__).parent / "contestants" / "plain_server.py"
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        what: was measured.
        target: that was aimed at, if there was one.
        found: the figure.
        interval: of the figure, if there is one.
    """

    what: str
    target: str
    found: str
    interval: str = ""


# --- what is measured ----------------------------------------------------------------------------


class Bench:
    """Networks and bundles that rows share, made when a row needs them.

    Args:
        folder: an empty one, for bundles.
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.turns: int = options.turns
        torch.manual_seed(0)
        self.inputs = torch.randn(BATCH, INPUTS)

    @cached_property
    def one_task(self) -> Path:
        """The bundle of a network that has learned one task."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(CLASSES).repeat(20)
        arrays = {
            f"{part}_features": torch.randn(len(labels), INPUTS, generator=generator).numpy()
            for part in ("train", "test")
        }
        arrays |= {f"{part}_labels": labels.numpy() for part in ("train", "test")}
        stream = SplitArrays(
            num_tasks=1, classes_per_task=CLASSES, epochs_per_task=1, path=arrays, standardize=False
        )
        module = ContinualModule(MLP([HIDDEN] * 5), mask="shared")
        trainer = Trainer(
            max_epochs=-1,
            accelerator="cpu",
            callbacks=[BeneficialPerturbation(10)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, stream)
        return export_module(module.eval(), self.folder / "1", names=["t0"])

    def bundle(self, tasks: int) -> Path:
        """That network with this many tasks, whose biases are random."""
        place = self.folder / str(tasks)
        if place.exists() or tasks == 1:
            return self.one_task if tasks == 1 else place
        read = read_bundle(self.one_task)
        first = read.tasks["t0"]
        place.mkdir()
        for file in self.one_task.iterdir():
            if file.is_file():
                (place / file.name).write_bytes(file.read_bytes())
        (place / TASKS).mkdir()
        for number in range(tasks):
            tensors = {n: torch.randn_like(v).mul(0.1) for n, v in first.tensors.items()}
            one = replace(
                first, task=replace(first.task, id=number), within=number, tensors=tensors
            )
            write_task(one, place / TASKS / f"t{number}", read.record)
        return place

    def net(self, tasks: int) -> Modes:
        """That bundle, loaded."""
        return load(self.bundle(tasks))

    def ids(self, tasks: int) -> Tensor:
        """A random task for each sample."""
        return torch.randint(tasks, (BATCH,), generator=torch.Generator().manual_seed(1))

    def plain(self) -> nn.Sequential:
        """The one-task network of torch alone."""
        return plain_network()


def plain_network() -> nn.Sequential:
    """5 x 300 units for 784 inputs and 10 classes."""
    sizes = [INPUTS, *[HIDDEN] * 5]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, CLASSES)).eval().requires_grad_(False)


def ratios(of: Call, to: Call, turns: int, calls: int = 5) -> list[float]:
    """CPU time of calls over that of the same number of others, for each turn."""
    found = []
    for turn in range(turns + 1):
        first = time.process_time()
        for _ in range(calls):
            to()
        second = time.process_time()
        for _ in range(calls):
            of()
        if turn:  # the first warms up
            found.append((time.process_time() - second) / (second - first))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(1000))
    return medians[24], medians[974]


def ratio_row(what: str, target: str, values: Sequence[float]) -> Row:
    """A row of ratios."""
    low, high = interval(values)
    return Row(what, target, f"{median(values):.2f}", f"{low:.2f} to {high:.2f}")


# --- rows ----------------------------------------------------------------------------------------


def mixed(bench: Bench) -> Iterator[Row]:
    """A batch of many tasks, over the plain network."""
    plain, inputs = bench.plain(), bench.inputs
    for tasks in (10, 100):
        net, ids = bench.net(tasks), bench.ids(tasks)
        values = ratios(lambda: net.answer(inputs, ids), lambda: plain(inputs), bench.turns)  # noqa: B023
        yield ratio_row(f"mixed batch of {tasks} tasks, over the plain network", "1.10", values)


def separate(bench: Bench) -> Iterator[Row]:
    """One plain model for each task, over a bundle."""
    net, ids, inputs = bench.net(100), bench.ids(100), bench.inputs
    models = [bench.plain() for _ in range(100)]

    def ask() -> None:
        logits = inputs.new_empty(BATCH, CLASSES)
        for task in ids.unique().tolist():
            rows = (ids == task).nonzero()[:, 0]
            logits[rows] = models[task](inputs[rows])

    values = ratios(ask, lambda: net.answer(inputs, ids), bench.turns)
    yield ratio_row("100 separate models, over the mixed batch of 100 tasks", "15", values)


def peft_lora(bench: Bench) -> Iterator[Row]:
    """LoRA of rank 1 in peft with adapter_names, over a bundle."""
    import peft

    inputs = bench.inputs
    for tasks, target in ((10, ""), (100, "30")):
        net, ids = bench.net(tasks), bench.ids(tasks)
        layers = [
            f"{n}" for n, part in bench.plain().named_modules() if isinstance(part, nn.Linear)
        ]
        config = peft.LoraConfig(r=1, target_modules=layers, init_lora_weights=False)
        model: Any = peft.get_peft_model(bench.plain(), config, adapter_name="t0")
        for number in range(1, tasks):
            model.add_adapter(f"t{number}", config)
        model.eval().requires_grad_(False)
        names = [f"t{number}" for number in ids.tolist()]

        def ask(model: Any = model, names: list[str] = names) -> None:
            with torch.no_grad():
                model(inputs, adapter_names=names)

        turns = max(3, bench.turns // 4)
        values = ratios(ask, lambda: net.answer(inputs, ids), turns, calls=2)  # noqa: B023
        yield ratio_row(
            f"peft, LoRA of rank 1, adapter_names, {tasks} tasks, over ours", target, values
        )


def peft_beft(bench: Bench) -> Iterator[Row]:
    """Whether peft's bias adapters answer a mixed batch in each sample's mode."""
    import peft

    from bpn_lightning.modes.exporters import peft_base, write_peft

    net, inputs = bench.net(10), bench.inputs
    places = write_peft(net, bench.folder / "peft")[:3]
    model: Any = peft.PeftModel.from_pretrained(peft_base(net), places[0], adapter_name="t0")
    for number in (1, 2):
        model.load_adapter(places[number], adapter_name=f"t{number}")
    model.set_adapter("t0")
    ids = torch.arange(BATCH) % 3
    wanted = net.answer(inputs, ids)
    with torch.no_grad():
        try:
            found = model(inputs, adapter_names=[f"t{number}" for number in ids.tolist()])
        except Exception as error:  # noqa: BLE001 - whatever peft refuses it with
            said = f"refused: {type(error).__name__}"
        else:
            right = int((found - wanted).abs().amax(1).lt(1e-4).sum())
            said = f"{right} of {BATCH} samples right, no error"
    yield Row("peft, bias adapters (BEFT), adapter_names, 3 tasks", "", said)


def folded(bench: Bench) -> Iterator[Row]:
    """One task's folded network, over the plain network."""
    plain, inputs = bench.plain(), bench.inputs
    network = bench.net(10).fold(3)
    with torch.no_grad():
        values = ratios(lambda: network(inputs), lambda: plain(inputs), bench.turns)
    yield ratio_row("folded, over the plain network", "1.02", values)


def onnx(bench: Bench) -> Iterator[Row]:
    """The mixed graph in ONNX Runtime, over its folded model."""
    import onnxruntime as ort

    from bpn_lightning.modes.exporters import write_onnx

    net, inputs, ids = bench.net(100), bench.inputs, bench.ids(100)
    folder = bench.folder / "onnx"
    write_onnx(net, folder)
    with torch.no_grad():
        torch.onnx.export(
            net.fold(0), (inputs,), folder / "folded.onnx", dynamo=True, input_names=["inputs"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False, external_data=False,
        )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    many, one = (
        ort.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        for name in ("mixed.onnx", "folded.onnx")
    )
    x, tasks = inputs.numpy(), ids.numpy()
    (found,) = many.run(None, {"inputs": x, "tasks": tasks})
    answered = net.answer(inputs, ids)
    difference = (torch.from_numpy(found) - answered).abs().max()
    exact = in_double_precision(net, inputs, ids)
    rounding = [(one.double() - exact).abs().max() for one in (torch.from_numpy(found), answered)]
    values = ratios(
        lambda: many.run(None, {"inputs": x, "tasks": tasks}),
        lambda: one.run(None, {"inputs": x}),
        bench.turns,
        calls=10,
    )
    yield ratio_row("onnxruntime, mixed graph of 100 tasks, over its folded model", "1.15", values)
    yield Row("onnxruntime, mixed graph, largest difference to torch", "1e-6", f"{difference:.1e}")
    for what, one in zip(("onnxruntime", "torch"), rounding, strict=True):
        yield Row(f"{what} in single, largest difference to double precision", "", f"{one:.1e}")
    largest = exact.abs().max()
    yield Row(
        f"of these logits, the largest, {largest:.2f}, times 2^-24", "", f"{largest * 2**-24:.1e}"
    )


def in_double_precision(net: Modes, inputs: Tensor, ids: Tensor) -> Tensor:
    """Logits of a mixed batch by each task's folded network in float64."""
    logits = inputs.new_zeros(BATCH, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        for task in ids.unique().tolist():
            rows = (ids == task).nonzero()[:, 0]
            logits[rows] = net.fold(task).double()(inputs[rows].double())
    return logits


def memory(bench: Bench) -> Iterator[Row]:
    """Bytes of all tensors that a loaded bundle reaches."""
    for tasks, target in ((1, 2.4), (10, 2.5), (100, 3.0), (1000, 8.4)):
        if bench.options.quick and tasks > 100:
            continue
        net = bench.net(tasks)
        net.answer(bench.inputs, bench.ids(tasks).fill_(0))  # this thread's network, too
        held = reachable_bytes(net) / 1e6
        many = "tasks" if tasks > 1 else "task"
        yield Row(f"weights in memory, {tasks:,} {many}, MB", f"{target} + 5 %", f"{held:.2f}")


def reachable_bytes(of: object) -> int:
    """Bytes of the storages of tensors that an object leads to, each counted once."""
    seen, waiting, storages = set(), [of], {}
    while waiting:
        one = waiting.pop()
        kind = type(one)
        if id(one) in seen or isinstance(one, type) or kind.__name__ in ("module", "function"):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        waiting += gc.get_referents(one)
        if isinstance(one, threading.local):
            waiting.append(vars(one))
    return sum(storages.values())


def disk(bench: Bench) -> Iterator[Row]:
    """A task's folder over what it says: its biases, in bytes."""
    folder = bench.bundle(10) / TASKS / "t3"
    size = sum(file.stat().st_size for file in folder.iterdir())
    payload = sum(v.nbytes for v in read_bundle(bench.bundle(10)).tasks["t3"].tensors.values())
    yield Row(
        f"a task on disk, {size:,} bytes, over its {payload:,} of biases",
        "1.10",
        f"{size / payload:.3f}",
    )


def adding(bench: Bench) -> Iterator[Row]:
    """Time on the clock until one more task answers, while others are asked."""
    net = load(bench.bundle(100))
    late = late_task(bench)
    inputs, ids, done = bench.inputs, bench.ids(100), threading.Event()

    def ask() -> None:
        while not done.is_set():
            net.answer(inputs, ids)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    took, cpu = [], []
    for _ in range(max(3, bench.turns // 5)):
        started, thread_time = time.perf_counter(), time.thread_time()
        net.add_task(late)
        took.append(1000 * (time.perf_counter() - started))
        cpu.append(1000 * (time.thread_time() - thread_time))
        net.remove_task("late")
    done.set()
    for thread in threads:
        thread.join()
    for what, values, target in (("clock", took, "50"), ("CPU", cpu, "")):
        low, high = interval(values)
        title = f"net.add_task to 100 tasks while two threads answer, ms on the {what}"
        yield Row(title, target, f"{median(values):.0f}", f"{low:.0f} to {high:.0f}")


def late_task(bench: Bench) -> Path:
    """A task's folder that no bundle has yet."""
    read = read_bundle(bench.bundle(100))
    first = read.tasks["t0"]
    place = bench.folder / "more" / "late"
    if not place.exists():
        place.parent.mkdir()
        more = replace(first, task=replace(first.task, id=100), within=100)
        write_task(more, place, read.record)
    return place


# --- servers -------------------------------------------------------------------------------------


class Server:
    """A server's processes on this machine, and clients of it."""

    def __init__(self, command: Sequence[str]) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        self.command = [sys.executable, *command, "--port", str(self.port)]
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)

    def wait(self) -> None:
        """Until it is ready."""
        while self.process.poll() is None:
            with suppress(OSError):
                if self.ask(HTTPConnection("127.0.0.1", self.port), "GET", "/health") == 200:
                    return
            time.sleep(0.1)
        sys.exit(f"Expected a server of {' '.join(self.command)}, but it ended. Run it manually.")

    @staticmethod
    def ask(connection: HTTPConnection, method: str, path: str, record: Any = None) -> int:
        """The status of a request."""
        body = None if record is None else json.dumps(record)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status

    def load(self, clients: int, records: Iterator[Any]) -> tuple[int, int]:
        """Requests, and how many of them failed."""
        lock, counts = threading.Lock(), [[0, 0] for _ in range(clients)]

        def client(own: list[int]) -> None:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
            while True:
                with lock:
                    record = next(records, None)
                if record is None:
                    return
                own[0] += 1
                try:
                    own[1] += self.ask(connection, "POST", "/predict", record) != 200
                except (OSError, HTTPException):
                    own[1] += 1
                    connection.close()

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, counts))
        done, failed = (sum(column) for column in zip(*counts, strict=True))
        return done, failed

    def cpu_seconds(self) -> float:
        """CPU time of all of its processes."""
        parents, times = {}, {}
        for place in Path("/proc").iterdir():
            if place.name.isdecimal():
                with suppress(OSError):
                    fields = (place / "stat").read_text().rpartition(")")[2].split()
                    parents[int(place.name)] = int(fields[1])
                    times[int(place.name)] = int(fields[11]) + int(fields[12])
        total = 0
        for one, ticks in times.items():
            above: int | None = one
            while above not in (None, self.process.pid):
                above = parents.get(above or 0)
            total += ticks if above == self.process.pid else 0
        return total / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(*commands: Sequence[str]) -> Iterator[list[Server]]:
    """Servers that are ready, and that end with the block."""
    servers = [Server(command) for command in commands]
    try:
        for one in servers:
            one.wait()
        yield servers
    finally:
        for one in servers:
            one.process.send_signal(signal.SIGINT)  # with which LitServe ends its processes, too
        for one in servers:
            one.process.wait()


PIXELS = base64.b64encode(torch.linspace(-1, 1, INPUTS).numpy().tobytes()).decode()


def records(number: int, tasks: int) -> Iterator[Any]:
    """JSON of requests, for one task after another."""
    asked: dict[str, Any] = {"input": PIXELS, "dtype": "float32", "shape": [INPUTS]}
    for n in range(number):
        yield {**asked, "task": n % tasks} if tasks else asked


def bpn_serve(bundle: Path, *flags: str) -> list[str]:
    """Its command."""
    return ["-m", "bpn_lightning.serve.cli", str(bundle), *flags]


def throughput(bench: Bench) -> Iterator[Row]:
    """Requests that bpn-serve answers, over LitServe with one plain network."""
    import litserve  # noqa: F401 - its absence is a reason not to run

    options = bench.options
    each = max(50, options.requests // 20)
    commands = [str(PLAIN_SERVER)], bpn_serve(bench.bundle(100))
    by_cpu, by_clock = [], []
    with serving(*commands) as servers:
        for turn in range(options.server_turns + 1):
            cpu, clock = [], []
            for server, tasks in zip(servers, (0, 100), strict=True):
                before, started = server.cpu_seconds(), time.perf_counter()
                _, failed = server.load(options.clients, records(each, tasks))
                clock.append(time.perf_counter() - started)
                cpu.append(server.cpu_seconds() - before)
                if failed:
                    sys.exit(f"Expected answers, but {failed} of {each} requests failed.")
            if turn:
                by_cpu.append(cpu[0] / cpu[1])
                by_clock.append(clock[0] / clock[1])
    title = "bpn-serve, 100 tasks, over LitServe with one plain network: requests per second of"
    yield ratio_row(f"{title} CPU time", "0.90", by_cpu)
    yield ratio_row(f"{title} the clock, {options.clients} clients here", "", by_clock)


def serving_adds(bench: Bench) -> Iterator[Row]:
    """A task's folder that appears while bpn-serve is asked."""
    import litserve  # noqa: F401 - its absence is a reason not to run

    options, bundle = bench.options, bench.bundle(100)
    seconds: list[float] = []
    asked = {"input": PIXELS, "dtype": "float32", "shape": [INPUTS], "task": "late"}
    with serving(bpn_serve(bundle, "--every", "0.02")) as (server,):

        def add() -> None:
            connection = HTTPConnection("127.0.0.1", server.port, timeout=600)
            started = time.perf_counter()
            late_task(bench).rename(bundle / TASKS / "late")
            while server.ask(connection, "POST", "/predict", asked) != 200:
                time.sleep(0.002)
            seconds.append(time.perf_counter() - started)

        adding_thread = threading.Thread(target=add)

        def counted() -> Iterator[Any]:
            for number, record in enumerate(records(options.requests, 100)):
                if number == options.requests // 4:
                    adding_thread.start()
                yield record

        done, failed = server.load(options.clients, counted())
        adding_thread.join()
    (bundle / TASKS / "late").rename(bench.folder / "more" / "late")
    yield Row(f"failed requests of {done:,} while a task is added", "0", str(failed))
    title = "bpn-serve --every 0.02 under load: from a task's folder to its first answer, ms on the clock"
    yield Row(title, "", f"{1000 * seconds[0]:.0f}")


ROWS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "mixed": mixed,
    "separate": separate,
    "peft": peft_lora,
    "beft": peft_beft,
    "folded": folded,
    "onnx": onnx,
    "memory": memory,
    "disk": disk,
    "adding": adding,
    "serving_adds": serving_adds,
    "throughput": throughput,
}
PEERS = ("torch", "peft", "onnxruntime", "litserve")


def versions() -> str:
    """Of what is compared with."""
    found = []
    for name in PEERS:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], help="which to measure")
    add("--quick", action="store_true", help="whether it runs at all; no measurement")
    add("--turns", type=int, default=100, help="of each ratio")
    add("--server_turns", type=int, default=15, help="of throughput")
    add(
        "--requests",
        type=int,
        default=10_000,
        help="while a task is added, and 20 turns of throughput",
    )
    add("--clients", type=int, default=16, help="threads that ask servers")
    options = parser.parse_args(argv)
    if options.quick:
        options.turns, options.server_turns = 3, 2
        options.requests = min(options.requests, 400)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of servers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"{versions()}, one thread, {options.turns} turns", flush=True)
    if options.quick:
        print("quick: no measurement", flush=True)
    print("\n| what | target | found | 95 % interval |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), options)
        for row in options.rows:
            try:
                for one in ROWS[row](bench):
                    cells = (one.what, one.target, one.found, one.interval)
                    print("| " + " | ".join(cells) + " |", flush=True)
            except ModuleNotFoundError as error:
                print(f"| {row} | | not run: needs {error.name} | |", flush=True)


if __name__ == "__main__":
    main()
