"""The model card of a bundle: README.md, with the fields that Hugging Face's hub reads in front."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from bpn_lightning.files import write_atomically
from bpn_lightning.modes.bundle import ACCURACY, CARD, Bundle
from bpn_lightning.modes.training_state import FOLDER, StatePart, training_state_parts

__all__ = ["write_card"]

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
    """
    card = _model_card(bundle, training_state_parts(folder))
    write_atomically(folder / CARD, card.encode())


def _model_card(bundle: Bundle, training: list[StatePart]) -> str:
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
        *_training_state(training),
        "",
        _USE.format(folder="path/to/this/folder", task=json.dumps(first, ensure_ascii=False)),
    ]
    return "\n".join(lines)


def _accuracies(bundle: Bundle, name: str) -> Tensor | None:
    return bundle.files.get(ACCURACY, {}).get(f"accuracy_matrix.{name}")


def _last_measured(bundle: Bundle) -> list[float]:
    """Accuracy on each task, task ID given, after the last one with which it was measured."""
    matrix = _accuracies(bundle, "accuracy")
    if matrix is None or matrix.dim() != 2:
        return []
    columns = ([one for one in column if not math.isnan(one)] for column in matrix.T.tolist())
    return [column[-1] if column else math.nan for column in columns]


def _table(bundle: Bundle) -> list[str]:
    given, agnostic = _last_measured(bundle), _accuracies(bundle, "task_agnostic")
    without = [] if agnostic is None else agnostic.flatten().tolist()
    lines = [
        "| task | ID | classes | accuracy, task ID given | task ID not given | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in bundle.tasks.items():
        tensors = [*one.tensors.values(), *one.gate_tensors.values()]
        numbers = [_percent(values, one.task.id) for values in (given, without)]
        size = sum(value.nbytes for value in tensors)
        classes = one.task.name
        if len(classes) > _LONGEST:
            classes = f"{one.task.num_classes} classes"
        lines.append(
            f"| {_plain(name)} | {one.task.id} | {_plain(classes)} | {' | '.join(numbers)} | {size:,} |"
        )
    return lines


def _averages(bundle: Bundle) -> list[str]:
    learned = [t.task.id for t in bundle.tasks.values() if t.progress == "learned"]
    row = _last_measured(bundle)
    found = [row[task] for task in learned if task < len(row) and not math.isnan(row[task])]
    if not found:
        return []
    mean = sum(found) / len(found)
    return [f"- Average accuracy over {len(found)} learned tasks, task ID given: {mean:.1%}."]


def _training_state(parts: list[StatePart]) -> list[str]:
    if not parts:
        return []
    named = ", ".join(f"{_plain(name)} ({size:,} bytes)" for name, size, _ in parts)
    line = f"- `{FOLDER}/` is what learning goes on from, and not needed to answer: {named}."
    memories = [_plain(name) for name, _, names in parts if "inputs" in names]
    if memories:
        line += (
            f" **It holds samples of the training data as they are** (memory of {', '.join(memories)}): delete "
            "this folder before you share the bundle with anybody who may not see them."
        )
    return [line]


def _percent(values: Any, place: int) -> str:
    if place >= len(values) or math.isnan(values[place]):
        return ""
    return f"{values[place]:.1%}"


def _plain(text: str) -> str:
    """A text in a cell of a table."""
    return "".join(c if c.isprintable() and c not in "|`<>[]" else " " for c in text)
