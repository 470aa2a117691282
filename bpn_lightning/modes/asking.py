"""Answers where the task is not given: by the bundle's first gate, or by the mode that is surest."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.functional import row_scores
from bpn_lightning.functional.task_scores import (
    TEMPERATURES,
    by_class,
    by_task,
    confidence,
    energy,
    mixed_logits,
    negative_entropy,
    of_task,
    one_step_gradient,
)
from bpn_lightning.modes.snapshot import Snapshot
from bpn_lightning.random_state import seeded_generator

__all__ = ["gate_logits", "learned_by_gates", "most_confident_mode", "task_and_logits"]


def _supsup(logits: Tensor) -> Tensor:
    tasks, samples = logits.shape[:2]
    return one_step_gradient(mixed_logits(logits), samples, tasks, logits.device)


#: Of gates that look at the logits of the learned tasks' modes.
_OF_LOGITS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "confidence": confidence,
    "energy": energy,
    "entropy": negative_entropy,
    "supsup": _supsup,
}

#: Of gates that look at features: scores of rows, given the gate's arguments.
_OF_FEATURES: Mapping[str, Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Any]], Tensor]] = {
    "ncm": lambda x, rows, _: row_scores.nearest_mean_scores(x, rows),
    "slda": lambda x, rows, _: row_scores.shared_gaussian_scores(x, rows),
    "fecam": lambda x, rows, given: row_scores.own_gaussian_scores(x, rows, given["normalize"]),
    "ppca": lambda x, rows, _: row_scores.subspace_scores(x, rows),
    "ranpac": lambda x, rows, _: row_scores.linear_scores(x, rows),
}


def _places_of_learned(now: Snapshot) -> list[int]:
    if not now.learned:
        raise ConfigurationError(
            "Expected a learned task where no task is given, but the bundle has none. Name a task."
        )
    return now.learned


def most_confident_mode(now: Snapshot, images: Tensor) -> tuple[Tensor, Tensor]:
    """The learned task in whose mode the largest softmax is the largest, and the logits there.

    Args:
        now: of a bundle whose tasks share one head.
        images: raw inputs, ``(batch, *shape)``.

    Returns:
        Places in the table of tasks ``(batch,)``, and logits ``(batch, num_classes)``.
    """
    places = _places_of_learned(now)
    _check_no_task(now)
    inputs = now.prepared(images, places[0])
    best, logits, sure = torch.zeros(len(images), dtype=torch.long), Tensor(), Tensor()
    for number, place in enumerate(places):
        found = now.logits(inputs, place)
        surer = found.softmax(1).amax(1)
        if number == 0:
            best, logits, sure = torch.full_like(surer, place, dtype=torch.long), found, surer
            continue
        better = surer > sure
        best = torch.where(better, place, best)
        logits = torch.where(better[:, None], found, logits)
        sure = torch.maximum(surer, sure)
    return best, logits


def _check_no_task(now: Snapshot) -> None:
    why = None
    if now.structure.mask == "task":
        why = "every task has a head of its own (mask 'task')"
    elif not now.one_preparation():
        why = "every task prepares its inputs in its own way"
    if why:
        raise ConfigurationError(
            f"Expected task to be given where {why}, but got None. Name a task, or one for each input."
        )


def task_and_logits(now: Snapshot, images: Tensor) -> tuple[Tensor, Tensor]:
    """The task that the first gate names, and log-probabilities of classes.

    Args:
        now: of a bundle with a gate.
        images: raw inputs, ``(batch, *shape)``.

    Returns:
        Places in the table of tasks ``(batch,)``, and logs of the mixture over the likeliest tasks, or of the
        gate's own classes, ``(batch, num_classes)``.

    Raises:
        ConfigurationError: the gate is none of this package, or tasks make their images differently.
    """
    gate = now.gates[0]
    kind, given, state = gate["kind"], gate["arguments"], gate["state"]
    learned = _places_of_learned(now)
    if len(now.common.preparations) > 1 or now.common.preparations[0].differs_by_task:
        raise ConfigurationError(
            "Expected raw inputs that all tasks prepare alike but for their normalization where a gate names the "
            "task, but every task makes its images in its own way. Name a task, or one for each input."
        )
    if kind in _OF_FEATURES:
        features, ids = now.features(images), [now.ids[p] for p in learned]
        scores = _row_scores(kind, given, state, features) / _temperature(state)
        row_tasks = torch.tensor(state["row_tasks"], device=scores.device)
        tasks = by_task(scores, row_tasks, max(now.ids) + 1)[:, ids].log_softmax(1)
        if given["modes"] == 0:
            columns = torch.tensor(state["row_columns"])
            own = by_class(scores, columns, now.structure.num_classes)
            return _place(learned, tasks.argmax(1)), own.log_softmax(1)
    elif kind in _OF_LOGITS:
        tasks = _OF_LOGITS[kind](_own_logits(now, images, learned)).log_softmax(1)
    else:
        raise ConfigurationError(
            f"Expected a gate of this package, but the bundle's is {kind!r:.80}. Name a task, or load the bundle "
            "with bpn_lightning.load_exported, which takes gates of plugins."
        )
    return _mixture(now, images, learned, tasks, given["modes"])


def learned_by_gates(now: Snapshot) -> bool:
    """Whether gates are all that learned: their own classes are the answer, and the network has none."""
    return bool(now.gates) and not any(task.epochs for task in now.structure.tasks)


def gate_logits(now: Snapshot, images: Tensor, places: "int | Tensor") -> Tensor:
    """The first gate's log-scores of the classes of given tasks, ``(batch, num_classes)``; else -inf."""
    gate = now.gates[0]
    kind, given, state = gate["kind"], gate["arguments"], gate["state"]
    if kind not in _OF_FEATURES:
        raise ConfigurationError(
            f"Expected a gate that names classes, but the bundle's is {kind!r:.80}."
        )
    scores = _row_scores(kind, given, state, now.features(images)) / _temperature(state)
    ids = torch.tensor(now.ids)[places]
    scores = of_task(scores, state["row_tasks"], ids)
    return by_class(scores, torch.tensor(state["row_columns"]), now.structure.num_classes)


def _mixture(
    now: Snapshot, images: Tensor, learned: list[int], tasks: Tensor, modes: int
) -> tuple[Tensor, Tensor]:
    weights, chosen = tasks.topk(min(modes, len(learned)), 1)
    joint = []
    for weight, column in zip(weights.unbind(1), chosen.unbind(1), strict=True):
        places = _place(learned, column)
        logits = now.logits(now.prepared(images, places), places)
        joint.append(weight[:, None] + logits.log_softmax(1))
    mixture = torch.stack(joint).logsumexp(0)
    return _place(learned, chosen[:, 0]), joint[0] if modes == 1 else mixture


def _place(learned: list[int], numbers: Tensor) -> Tensor:
    return torch.tensor(learned, device=numbers.device)[numbers]


def _own_logits(now: Snapshot, images: Tensor, learned: list[int]) -> Tensor:
    """Each mode's logits at the columns that take part there, ``(tasks, batch, columns)``."""
    found = []
    for place in learned:
        logits = now.logits(now.prepared(images, place), place)
        found.append(logits[:, logits[0].isfinite()] if len(logits) else logits)
    widest = max(logits.shape[1] for logits in found)
    return torch.stack([F.pad(one, (0, widest - one.shape[1]), value=-torch.inf) for one in found])


def _temperature(state: Mapping[str, Any]) -> float:
    likelihoods = state["likelihoods"]
    return TEMPERATURES[int(likelihoods.argmax())] if likelihoods.any() else 1.0


def _row_scores(
    kind: str, given: Mapping[str, Any], state: Mapping[str, Any], features: Tensor
) -> Tensor:
    """Log-scores of all rows, as the gate of a run gives them."""
    if features.shape[1] != state["inputs"]:
        raise ConfigurationError(
            f"Expected features of width {state['inputs']} for the bundle's gate, but got {features.shape[1]}."
        )
    features = features.float()
    if kind == "fecam" and given["tukey"] != 1:
        features = features ** given["tukey"]
    if given["project"] is not None:
        size = given["project"]
        drawn = _random("projection", features.shape[1], size, size, state["seed"], given["name"])
        features = features @ drawn.to(features.device)
    if kind == "ranpac":
        width, size = given["width"], features.shape[1]
        drawn = _random("random features", size, width, size, state["seed"], given["name"])
        features = (features @ drawn.to(features.device)).relu()
    rows = {name: value.to(features.device) for name, value in state["rows"].items()}
    with torch.autocast(features.device.type, enabled=False):
        return _OF_FEATURES[kind](features, rows, given)


@lru_cache(maxsize=2)  # a gate's projection and its random features: each batch needs the same
def _random(what: str, rows: int, columns: int, divisor: int, seed: int, name: str) -> Tensor:
    """Normal numbers of variance 1 / divisor, ``(rows, columns)``, of the gate's seed and name."""
    generator = seeded_generator(what, seed, name)
    return torch.randn(rows, columns, generator=generator).div(divisor**0.5)
