"""The model card of a bundle: README.md, with the fields that Hugging Face's hub reads in front."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bpn_lightning.files.writing import write_atomically
from bpn_lightning.intervals import wilson_interval
from bpn_lightning.modes.bundle import ACCURACY, CARD, Bundle, explained
from bpn_lightning.modes.calibration import uncalibrated
from bpn_lightning.modes.training_state import FOLDER, StatePart, training_state_parts

__all__ = ["model_card", "write_card"]

_FRONT = """---
library_name: bpn_lightning
pipeline_tag: image-classification
tags:
- continual-learning
- image-classification
---
"""

_USE = """## Use

```python
from bpn_lightning.modes import load

net = load("{folder}")
logits = net(images, task={task})  # task: a name, an ID, or a tensor with an ID for each image
answers = net.predict(images)  # the task ID is not given
```
"""

_LONGEST = 60


def write_card(folder: Path, bundle: Bundle) -> None:
    """Write a bundle's README.md.

    Args:
        folder: of the bundle, whose other files are written.
        bundle: that is in it.

    Raises:
        CheckpointError: its record, which a stranger may have written, is malformed.
    """
    with explained(folder):
        card = model_card(bundle, training_state_parts(folder))
    write_atomically(folder / CARD, card.encode())


def model_card(bundle: Bundle, training: Sequence[StatePart] = ()) -> str:
    """The text of a bundle's README.md, with what is in its training state."""
    structure = bundle.record["structure"]
    strategies = "+".join(bundle.record.get("strategies", ())) or "continual learning"
    shape = " x ".join(map(str, structure["input_shape"]))
    first = next(iter(bundle.tasks), "task_1")
    lines = [
        _FRONT,
        f"# One network, {len(bundle.tasks)} tasks",
        "",
        f"Trained task after task with {strategies}; one network answers in the mode of each task.",
        "",
        *_table(bundle),
        "",
        *_averages(bundle),
        f"- Shared by all tasks: {bundle.shared_bytes:,} bytes.",
        f"- Inputs after preparation: {shape} {structure['input_dtype'].removeprefix('torch.')}.",
        f"- Classes that take part in a task's mode (mask): {structure['mask']}.",
        *_uncalibrated(bundle),
        *_training_state(training),
        "",
        _USE.format(folder="path/to/this/folder", task=json.dumps(first, ensure_ascii=False)),
    ]
    return "\n".join(lines)


class _Score(NamedTuple):
    """Accuracies of one kind, and the numbers of test samples behind them, by task ID; NaN where not known."""

    title: str
    values: list[float]
    samples: list[float]

    def of(self, task: int) -> tuple[float, float]:
        """One task's accuracy and number of test samples, NaN where not known."""
        return _at(self.values, task), _at(self.samples, task)


def _scores(bundle: Bundle) -> list[_Score]:
    given = _Score("task ID given", _last_measured(bundle), _vector(bundle, "samples"))
    for gate in bundle.record["gates"][:1]:  # it is what answers
        title = f"task ID not given, by the gate {_plain(gate['arguments']['name'])}"
        measured = (_numbers(gate.get(name, [])) for name in ("accuracy", "samples"))
        return [given, _Score(title, *measured)]
    agnostic = _vector(bundle, "task_agnostic"), _vector(bundle, "task_agnostic_samples")
    return [given, _Score("task ID not given", *agnostic)]


def _numbers(values: list[Any]) -> list[float]:
    return [float(one) if isinstance(one, int | float) else math.nan for one in values]


def _vector(bundle: Bundle, name: str) -> list[float]:
    found = bundle.files.get(ACCURACY, {}).get(f"accuracy_matrix.{name}")
    return [] if found is None else found.flatten().tolist()


def _at(values: list[float], task: int) -> float:
    return values[task] if task < len(values) else math.nan


def _last_measured(bundle: Bundle) -> list[float]:
    """Accuracy on each task, task ID given, after the last one with which it was measured."""
    matrix = bundle.files.get(ACCURACY, {}).get("accuracy_matrix.accuracy")
    if matrix is None or matrix.dim() != 2:
        return []
    columns = ([one for one in column if not math.isnan(one)] for column in matrix.T.tolist())
    return [column[-1] if column else math.nan for column in columns]


def _table(bundle: Bundle) -> list[str]:
    scores = _scores(bundle)
    titles = ["task", "ID", "classes", *(f"accuracy, {one.title}" for one in scores), "bytes"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, one in bundle.tasks.items():
        tensors = [*one.tensors.values(), *one.gate_tensors.values()]
        size = sum(value.nbytes for value in tensors)
        classes = one.task.name
        if len(classes) > _LONGEST:
            classes = f"{one.task.num_classes} classes"
        accuracies = [_with_interval(*score.of(one.task.id)) for score in scores]
        cells = [_plain(name), str(one.task.id), _plain(classes), *accuracies, f"{size:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _averages(bundle: Bundle) -> list[str]:
    """The mean over tasks, and the accuracy on all of their test samples with its interval."""
    learned = {n: t.task.id for n, t in bundle.tasks.items() if t.progress == "learned"}
    lines, counted = [], False
    for score in _scores(bundle):
        pairs = [score.of(task) for task in learned.values()]
        known = [(value, number) for value, number in pairs if not math.isnan(value)]
        if not known:
            continue
        mean = sum(value for value, _ in known) / len(known)
        many = f"{len(known)} learned task{'s' if len(known) > 1 else ''}"
        line = f"- Average accuracy over {many}, {score.title}: {mean:.1%}"
        total = sum(number for _, number in known)
        if 0 < total < math.inf:
            right = sum(value * number for value, number in known)
            line += f"; on their {total:,.0f} test samples together {_with_interval(right / total, total)}"
            counted = True
        late = [name for name, task in learned.items() if math.isnan(score.of(task)[0])]
        if late and "not given" in score.title:
            line += f"; not measured on {_plain(', '.join(late))}"
        lines.append(f"{line}.")
    if counted:
        seed = bundle.record.get("seed")
        lines.append(
            f"- In brackets: Wilson's 95 % intervals for the choice of test samples. This is one run{_of_seed(seed)}; "
            "how much runs of other seeds differ is not in them."
        )
    return lines


def _of_seed(seed: Any) -> str:
    return f", of seed {seed}" if type(seed) is int else ""


def _uncalibrated(bundle: Bundle) -> list[str]:
    return [
        f"- The temperature of the gate {_plain(name)} was not chosen with {_plain(', '.join(late))}, added later: where the "
        "task ID is not given, tasks and confidences may be worse than in an export of a run of all tasks."
        for name, late in uncalibrated(bundle).items()
    ]


def _training_state(parts: Sequence[StatePart]) -> list[str]:
    if not parts:
        return []
    named = ", ".join(f"{_plain(name)} ({size:,} bytes)" for name, size, _ in parts)
    line = f"- `{FOLDER}/`, where it is there, is what learning goes on from, and not needed to answer: {named}."
    memories = [_plain(name) for name, _, names in parts if "inputs" in names]
    if memories:
        line += (
            f" **It holds samples of the training data as they are** (memory of {', '.join(memories)}): delete "
            "this folder before you share the bundle with anybody who may not see them."
        )
    return [line]


def _with_interval(accuracy: float, samples: float) -> str:
    if math.isnan(accuracy):
        return ""
    if not 1 <= samples < math.inf:  # NaN where not known
        return f"{accuracy:.1%}"
    low, high = wilson_interval(accuracy, int(samples))
    return f"{accuracy:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _plain(text: str) -> str:
    """A text in a cell of a table."""
    return "".join(c if c.isprintable() and c not in "|`<>[]" else " " for c in text)
