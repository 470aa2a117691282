"""The work items and results of the contestants of `benchmarks/speed.py`.

A contestant is a process of its own, in an environment of its own if need be: it reads a line of JSON
for each piece of work and answers with one. Needs torch and nothing else.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

CLASSES_PER_TASK = 2


@dataclass(frozen=True)
class Work:
    """A stream of tasks of two classes each, and how to learn it.

    Attributes:
        hidden: widths of the hidden layers; ReLU between them.
        method: what is to be done against forgetting.
        tasks: tasks of the stream.
        inputs: pixels of an image.
        samples: training images of a task; as many are for the test.
        epochs: of a task; all but the first are timed.
        batch_size: of training.
        eval_batch_size: of evaluation.
        memory_size: images kept of a task by methods with memories.
        device: ``cpu`` or ``cuda``.
    """

    hidden: tuple[int, ...] = (300,) * 5
    method: str = "finetune"
    tasks: int = 5
    inputs: int = 784
    samples: int = 3072
    epochs: int = 3
    batch_size: int = 128
    eval_batch_size: int = 1000
    memory_size: int = 256
    lr: float = 0.01
    device: str = "cpu"

    @property
    def classes(self) -> int:
        """Of the whole stream."""
        return CLASSES_PER_TASK * self.tasks

    @property
    def timed_steps(self) -> int:
        """Of each task."""
        return (self.epochs - 1) * -(-self.samples // self.batch_size)


@dataclass
class Answer:
    """What a contestant measured; times are pairs of CPU seconds and seconds.

    Attributes:
        step: of one update, for every task in order.
        evaluation: of all tasks' test images.
        importance: of the pass that rates the parameters after a task, where there is one.
        forward_backward: of one epoch's forward and backward passes over a task, by hand.
        accuracy: of every task at the end, in its own mode where the method has modes.
        resident: MiB of the process after every task.
        peak: MiB of the process, or of the GPU's memory.
    """

    step: list[tuple[float, float]] = field(default_factory=list)
    evaluation: tuple[float, float] | None = None
    importance: tuple[float, float] | None = None
    forward_backward: tuple[float, float] | None = None
    accuracy: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    peak: float = 0.0


class Clock:
    """CPU seconds and seconds since the start; the GPU is synchronized before it is read."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.began = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def read(self, steps: int = 1) -> tuple[float, float]:
        """CPU seconds and seconds since the start, per step."""
        cpu, wall = self._now()
        return (cpu - self.began[0]) / steps, (wall - self.began[1]) / steps


def resident() -> float:
    """The process's current resident memory in MiB from /proc, else its peak."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return peak("cpu")


def peak(device: str) -> float:
    """MiB: of the process so far, or of the GPU's memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@dataclass
class Data:
    """Images ``(n, 1, pixels, 1)`` uint8 and labels of the whole stream, task after task."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def make_data(work: Work) -> Data:
    """Noise around a picture for each class: something that can be learned, of any size."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(work.classes, work.inputs, generator=generator)

    def draw(per_task: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(work.tasks * per_task) // (per_task // CLASSES_PER_TASK)
        labels = labels.clamp(max=work.classes - 1)
        images = torch.empty(len(labels), work.inputs, dtype=torch.uint8)
        for start in range(0, len(labels), 10_000):
            part = slice(start, start + 10_000)
            noise = torch.rand(len(labels[part]), work.inputs, generator=generator)
            images[part] = (127 * (pictures[labels[part]] + noise)).to(torch.uint8)
        return images.view(-1, 1, work.inputs, 1), labels

    return Data(draw(work.samples), draw(work.samples))


def by_task(part: tuple[Tensor, Tensor], work: Work) -> list[tuple[Tensor, Tensor]]:
    """Each task's images as normalized floats ``(n, pixels)``, and its labels."""
    images, labels = part
    size = len(labels) // work.tasks
    tasks = []
    for start in range(0, len(labels), size):
        floats = images[start : start + size].flatten(1).float().div_(255).sub_(0.5).div_(0.25)
        tasks.append((floats.to(work.device), labels[start : start + size].to(work.device)))
    return tasks


def network(work: Work) -> nn.Sequential:
    """Fully connected layers with ReLU between them; one output for every class of the stream."""
    torch.manual_seed(0)
    widths = [work.inputs, *work.hidden, work.classes]
    layers: list[nn.Module] = []
    for entering, leaving in pairwise(widths):
        layers += [nn.Linear(entering, leaving), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def serve(run: Callable[[Work], Answer]) -> None:
    """Execute every line of standard input; all other output goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for line in sys.stdin:
        asked = json.loads(line)
        answer = run(Work(**{**asked, "hidden": tuple(asked["hidden"])}))
        answer.peak = peak(asked["device"])
        out.write(json.dumps(asdict(answer)) + "\n")
        out.flush()
