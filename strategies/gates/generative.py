"""The generative classifier: a variational autoencoder for each class, which answers by its likelihood."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bpn_lightning.checks import check_above_zero, check_positive_int
from bpn_lightning.costs import DeclaredBytes, HeldTensors
from bpn_lightning.errors import CheckpointError, ConfigurationError, DataError
from bpn_lightning.functional.task_scores import by_class, by_task, of_task
from bpn_lightning.host import ContinualHost
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.strategies.gates.checks import check_finite, check_learned, check_width
from bpn_lightning.tasks import ContinualStream, Task

__all__ = ["GenerativeClassifier", "fit_autoencoder", "log_likelihood"]

FLOAT32 = 4

MIN_VARIANCE = 1e-2
"""Of the decoder's noise: below it, a feature that never varies decides alone."""

CHUNK = 2**24
"""Numbers of the largest tensor that a likelihood takes at a time."""

Weights = Mapping[str, Tensor]


def layer_sizes(width: int, hidden: Sequence[int], latent: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer, by name, in the order of a forward pass.

    >>> layer_sizes(64, [16, 8], 2)
    {'encoder0': (64, 16), 'encoder1': (16, 8), 'encoder2': (8, 4), 'decoder0': (2, 8), 'decoder1': (8, 16), 'decoder2': (16, 64)}
    """
    down = [width, *hidden, 2 * latent]
    up = [latent, *reversed(hidden), width]
    found = {f"encoder{n}": pair for n, pair in enumerate(pairwise(down))}
    return found | {f"decoder{n}": pair for n, pair in enumerate(pairwise(up))}


def through(weights: Weights, part: str, values: Tensor) -> Tensor:
    """The ``encoder`` or ``decoder``: linear layers with ReLUs between them.

    Args:
        weights: ``<part><n>.weight`` (outputs, inputs) and ``<part><n>.bias`` (outputs,) of each layer n.
        part: its name.
        values: ``(..., inputs)``.
    """
    number = sum(name.startswith(part) and name.endswith(".weight") for name in weights)
    for n in range(number):
        values = F.linear(values, weights[f"{part}{n}.weight"], weights[f"{part}{n}.bias"])
        values = values.relu() if n < number - 1 else values
    return values


def log_normal(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-density of a normal distribution with independent dimensions, summed over the last one."""
    squares = (values - mean) ** 2 * (-log_variance).exp()
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(-1)


def noise_of(weights: Weights) -> Tensor:
    """Log-variance of the decoder's noise, a scalar."""
    return weights["log_variance"].clamp(min=math.log(MIN_VARIANCE))


def joint_ratio(weights: Weights, features: Tensor, noise: Tensor) -> Tensor:
    r""":math:`\log p(x|z) + \log p(z) - \log q(z|x)` of :math:`z = \mu(x) + \sigma(x) \epsilon`.

    Args:
        weights: of one class.
        features: ``(n, d)``.
        noise: epsilon, ``(samples, n or 1, latent)``.

    Returns:
        ``(samples, n)``. Its mean over the samples is the evidence lower bound; the log of the mean of its
        exponential is the importance-sampled likelihood.
    """
    mean, log_variance = through(weights, "encoder", features).chunk(2, -1)
    latent = mean + (0.5 * log_variance).exp() * noise
    zero = torch.zeros((), device=features.device)
    decoded = through(weights, "decoder", latent)
    likelihood = log_normal(features, decoded, noise_of(weights).expand_as(decoded))
    prior = log_normal(latent, zero, zero.expand_as(latent))
    return likelihood + prior - log_normal(latent, mean, log_variance.expand_as(latent))


def log_likelihood(weights: Weights, features: Tensor, noise: Tensor) -> Tensor:
    r"""Importance-sampled log-likelihood of features.

    .. math:: \log \frac1S \sum_s \frac{p(x | z_s)\, p(z_s)}{q(z_s | x)}, \quad z_s \sim q(z | x)

    The estimator of Burda et al. (2016), https://arxiv.org/abs/1509.00519.

    Args:
        weights: of one class; see :func:`through`, and ``log_variance``, a scalar.
        features: ``(n, d)``.
        noise: standard normal, ``(samples, latent)``, the same for each of the features.

    Returns:
        ``(n,)``.
    """
    widest = max(value.shape[0] for name, value in weights.items() if name.endswith(".bias"))
    size = max(1, CHUNK // (len(noise) * widest))
    parts = [
        joint_ratio(weights, part, noise[:, None]).logsumexp(0)
        for part in torch.split(features, size)
    ]
    return torch.cat(parts) - math.log(len(noise))


def fit_autoencoder(
    features: Tensor,
    hidden: Sequence[int],
    latent: int,
    updates: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Maximize the evidence lower bound by Adam, on batches without replacement.

    Args:
        features: of one class, ``(n, d)``, in an order that does not depend on batches and processes.
        hidden: units of the encoder's hidden layers; the decoder has them in reverse.
        latent: dimensions of z.
        updates: of the weights.
        batch_size: samples of each.
        lr: of Adam.
        generator: on the CPU; draws the first weights, the order of the samples and z.

    Returns:
        The weights, detached.
    """
    device = features.device
    weights = {"log_variance": torch.zeros((), device=device)}
    for name, (inputs, outputs) in layer_sizes(features.shape[1], hidden, latent).items():
        bound = inputs**-0.5  # as torch.nn.Linear
        for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            drawn = torch.rand(shape, generator=generator) * 2 * bound - bound
            weights[f"{name}.{kind}"] = drawn.to(device)
    for value in weights.values():
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(weights.values(), lr=lr)
    order = torch.empty(0, dtype=torch.int64)
    size = min(batch_size, len(features))
    for _ in range(updates):
        if len(order) < size:
            order = torch.randperm(len(features), generator=generator)
        own, order = order[:size], order[size:]
        noise = torch.randn(1, size, latent, generator=generator).to(device)
        optimizer.zero_grad()
        loss = -joint_ratio(weights, features[own.to(device)], noise).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: value.detach() for name, value in weights.items()}


@dataclass(eq=False, repr=False)
class GenerativeClassifier(TaskGate):
    r"""The class under whose variational autoencoder an input is likeliest.

    .. math:: \hat y = \arg\max_c \log p(x | c) + \log p(c)

    van de Ven, Li and Tolias (2021), "Class-incremental learning with generative classifiers",
    https://arxiv.org/abs/2104.10093: a variational autoencoder for each class, trained on its samples alone, whose
    likelihood is estimated by importance sampling; classes are equally likely. Nothing is shared, so nothing is
    forgotten. Features are what the network's front gives; without one, the inputs, flattened.

    Differs from the paper: the decoder is normal around its output, with one variance that is learned, since
    features are no pixels from 0 to 1; the importance samples of all inputs have the same noise, so that an input is
    answered alike in any batch. Sizes, updates and samples are arguments; their defaults are ours.

    Args:
        hidden: units of the encoder's hidden layers; the decoder has them in reverse.
        latent: dimensions of the latent variable.
        updates: of each class's weights, when its task ends.
        batch_size: samples of an update.
        lr: of Adam.
        importance_samples: S, of the likelihood of an input.
        modes, name: see :class:`~bpn_lightning.strategies.gates.base.TaskGate`.

    State:
        ``rows``, the weights of each class's autoencoder, float32, for inference; nothing more to go on learning.

    Raises:
        ConfigurationError: a size is not positive.
    """

    hidden: tuple[int, ...] = (85, 85)
    latent: int = 5
    updates: int = 1000
    batch_size: int = 128
    lr: float = 0.001
    importance_samples: int = 100

    def __post_init__(self) -> None:
        self.hidden = tuple(self.hidden)
        if not self.hidden:
            raise ConfigurationError(
                "Expected hidden to have at least one layer, but got none. Write [85, 85]."
            )
        for units in self.hidden:
            check_positive_int("hidden", units)
        for name in ("latent", "updates", "batch_size", "importance_samples"):
            check_positive_int(name, getattr(self, name))
        check_above_zero("lr", self.lr, "0.001 is Adam's own.")
        super().__post_init__()

    def reset(self) -> None:
        """Forget every class."""
        self.seed = 0
        self.inputs = 0
        self.row_tasks: list[int] = []
        self.row_columns: list[int] = []
        self.rows: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Take the seed of all draws from the stream."""
        self.seed = stream.seed

    # --- fitting ---------------------------------------------------------------------------------

    @torch.enable_grad()
    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Train an autoencoder on each of the task's classes; every process trains the same ones."""
        features, columns = _gathered(host, task)
        check_finite(self.name, features, task.id)
        found: list[dict[str, Tensor]] = []
        for column in range(*task.columns):
            generator = seeded_generator("autoencoder", self.seed, self.name, task.id, column)
            own = features[columns == column]
            if not len(own):
                raise DataError(
                    f"Expected column {column} of task {task.id} to have training samples for gate {self.name}, but "
                    "got none. Add samples, or leave the gate out."
                )
            with torch.autocast(own.device.type, enabled=False):
                sizes = (self.hidden, self.latent, self.updates, self.batch_size, self.lr)
                found.append(fit_autoencoder(own, *sizes, generator))
        rows = {key: torch.stack([one[key] for one in found]) for key in found[0]}
        self.rows = {
            key: torch.cat([self.rows[key], value]) if self.rows else value
            for key, value in rows.items()
        }
        self._last = None
        self.inputs = features.shape[1]
        self.row_tasks += [task.id] * task.num_classes
        self.row_columns += range(*task.columns)

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Delete the autoencoders of the task's classes."""
        self._last = None
        kept = [place for place, one in enumerate(self.row_tasks) if one != task.id]
        self.rows = {key: value[kept] for key, value in self.rows.items()} if kept else {}
        self.row_tasks = [self.row_tasks[place] for place in kept]
        self.row_columns = [self.row_columns[place] for place in kept]
        return []

    # --- inference -------------------------------------------------------------------------------

    @property
    def names_classes(self) -> bool:
        """Always: a row is a class."""
        return True

    @torch.no_grad()
    def log_scores(self, features: Tensor) -> Tensor:
        """Log-likelihoods under each class, ``(n, rows)``, of features ``(n, d)``.

        Raises:
            ConfigurationError: no task is learned yet.
            DataError: features are of another width than those that it was fitted on.
        """
        check_learned(self.name, self.rows)
        check_width(self.name, features, self.inputs)
        last = self._last  # read once: other threads may ask, too
        if last is not None and last[0] is features:  # asked for task and class in turn
            return last[1]
        generator = seeded_generator("importance samples", self.seed, self.name)
        noise = torch.randn(self.importance_samples, self.latent, generator=generator)
        with torch.autocast(features.device.type, enabled=False):
            seen, noise = features.float(), noise.to(features.device)
            weights = [
                {key: value[row] for key, value in self.rows.items()}
                for row in range(len(self.row_tasks))
            ]
            scores = torch.stack([log_likelihood(one, seen, noise) for one in weights], 1)
        self._last = features, scores
        return scores

    def task_scores(self, seen: Tensor) -> Tensor:
        """Log-likelihoods of tasks, ``(n, tasks)``: of their classes, summed."""
        scores = self.log_scores(seen)
        tasks = torch.tensor(self.row_tasks, device=scores.device)
        return by_task(scores, tasks, max(self.row_tasks) + 1)

    def own_columns(self, seen: Tensor, task: int | None = None) -> Tensor:
        """The column of the likeliest class, of all or of one task's."""
        scores = of_task(self.log_scores(seen), self.row_tasks, task)
        return torch.tensor(self.row_columns, device=scores.device)[scores.argmax(1)]

    def own_logits(
        self, seen: Tensor, num_classes: int, task: "int | Tensor | None" = None
    ) -> Tensor:
        """The log-likelihood under each class; where tasks share a class, under its likeliest row."""
        scores = of_task(self.log_scores(seen), self.row_tasks, task)
        return by_class(scores, torch.tensor(self.row_columns), num_classes)

    # --- state and costs -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs, and an answer."""
        return {
            "seed": self.seed,
            "inputs": self.inputs,
            "row_tasks": list(self.row_tasks),
            "row_columns": list(self.row_columns),
            "rows": dict(self.rows),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            CheckpointError: it is of a gate with other sizes.
        """
        self.seed, self.inputs = int(state_dict["seed"]), int(state_dict["inputs"])
        self.row_tasks = [int(task) for task in state_dict["row_tasks"]]
        self.row_columns = [int(column) for column in state_dict["row_columns"]]
        self.rows = dict(state_dict["rows"])
        self._last = None
        if self._bytes() != sum(value.numel() * FLOAT32 for value in self.rows.values()):
            raise CheckpointError(
                f"Expected the state of gate {self.name} to hold {len(self.row_tasks)} autoencoders of {self.inputs} "
                f"features, but got {[tuple(value.shape) for value in self.rows.values()]}. Load it into a gate with the "
                "arguments that wrote it."
            )

    def move_state(self, host: ContinualHost) -> None:
        """Move the weights to the host's device."""
        self._last = None
        self.rows = {key: value.to(host.device) for key, value in self.rows.items()}

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The weights, for inference."""
        return HeldTensors(inference=self.rows.values())

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """4 bytes for each weight of each class's autoencoder."""
        first = min(self.row_tasks, default=0)
        rows = max(len(self.row_tasks), 1)
        return DeclaredBytes(
            self._bytes(), self._bytes(), self._bytes() // rows * self.row_tasks.count(first)
        )

    def _bytes(self) -> int:
        if not self.row_tasks:
            return 0
        sizes = layer_sizes(self.inputs, self.hidden, self.latent).values()
        numbers = 1 + sum(outputs * (inputs + 1) for inputs, outputs in sizes)
        return FLOAT32 * numbers * len(self.row_tasks)


@torch.no_grad()
def _gathered(host: ContinualHost, task: Task) -> tuple[Tensor, Tensor]:
    """Features ``(n, d)`` and columns ``(n,)`` of all of a task's samples, in the task's order, in every process."""
    batches = list(host.gate_batches(task.id, "train"))
    features = torch.cat([batch.inputs.flatten(1).float() for batch in batches])
    columns = torch.cat([batch.targets for batch in batches])
    places = [batch.samples for batch in batches]
    known = [place for place in places if place is not None]
    if len(known) < len(places):  # of another loader, which one process reads in order
        return features, columns
    number = int(host.all_reduce(torch.tensor(float(len(features)), device=features.device)))
    order = torch.cat(known).to(features.device)
    every = features.new_zeros(number, features.shape[1])
    labels = columns.new_zeros(number)
    every[order], labels[order] = features, columns
    return host.all_reduce(every), host.all_reduce(labels)
