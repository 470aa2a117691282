"""The model card of a bundle: README.md, with the fields that Hugging Face's hub reads in front."""

import json
import math
from typing import Any

from torch import Tensor

from bpn_lightning.modes.bundle import ACCURACY, Bundle

__all__ = ["model_card"]

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


def model_card(bundle: Bundle) -> str:
    """The text of a bundle's README.md.

    Args:
        bundle: that is to be written, or that was read.
    """
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
        "",
        _USE.format(folder="path/to/this/folder", task=json.dumps(first, ensure_ascii=False)),
    ]
    return "\n".join(lines)


def _accuracies(bundle: Bundle, name: str) -> Tensor | None:
    return bundle.files.get(ACCURACY, {}).get(f"accuracy_matrix.{name}")


def _last_row(bundle: Bundle) -> list[float]:
    """Accuracy on each task after the last one, task ID given."""
    matrix = _accuracies(bundle, "accuracy")
    if matrix is None or matrix.dim() != 2:
        return []
    measured = [row for row in matrix.tolist() if not all(map(math.isnan, row))]
    return measured[-1] if measured else []


def _table(bundle: Bundle) -> list[str]:
    given, agnostic = _last_row(bundle), _accuracies(bundle, "task_agnostic")
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
    row = _last_row(bundle)
    found = [row[task] for task in learned if task < len(row) and not math.isnan(row[task])]
    if not found:
        return []
    mean = sum(found) / len(found)
    return [f"- Average accuracy over {len(found)} learned tasks, task ID given: {mean:.1%}."]


def _percent(values: Any, place: int) -> str:
    if place >= len(values) or math.isnan(values[place]):
        return ""
    return f"{values[place]:.1%}"


def _plain(text: str) -> str:
    """A text in a cell of a table."""
    return "".join(c if c.isprintable() and c not in "|`<>[]" else " " for c in text)
