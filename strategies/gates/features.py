"""Gates that are fitted on features: sums while a task is read, rows when it ends.

A gate keeps no sample beyond its task. What it holds of a task is written once, when the task ends, or
solved again from sums that are exact.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bpn_lightning.checks import check_choice, check_positive_int
from bpn_lightning.costs import DeclaredBytes, HeldTensors, tensors_in
from bpn_lightning.errors import CheckpointError, ConfigurationError, DataError
from bpn_lightning.functional.moments import GroupSums, SecondMoments, draw_held_out
from bpn_lightning.functional.task_scores import (
    TEMPERATURES,
    by_class,
    by_task,
    of_task,
    temperature_log_likelihoods,
)
from bpn_lightning.host import ContinualHost
from bpn_lightning.random_state import seeded_generator
from bpn_lightning.strategies.gates.base import TaskGate
from bpn_lightning.strategies.gates.checks import check_finite, check_learned, check_width
from bpn_lightning.strategies.gates.open_task import OpenTask
from bpn_lightning.tasks import Batch, ContinualStream, Task

__all__ = ["FLOAT32", "FeatureGate", "Per"]

Per = Literal["class", "task"]

FLOAT32, FLOAT64 = 4, 8

#: What is left of a sum of squares in float64 where nothing varies.
ROUNDING = 1e-12


@dataclass(eq=False, repr=False, kw_only=True)
class FeatureGate(TaskGate):
    """A gate that is fitted on features, one row for each class of each task, or for each task.

    Features are what the network's front gives; without a front, the inputs themselves, flattened and
    all under the first task's normalization.

    A task is fitted at its end: :meth:`add` sums its samples, :meth:`reduce` the processes,
    :meth:`calibrate` looks at the samples that were held out, and :meth:`finish` writes the task's
    rows from the sums of all its samples. Nothing depends on the order of samples, batches and
    processes but for the rounding of float64.

    Held-out samples are a draw of the task's own training samples, by their numbers. They choose what
    a method leaves open (:meth:`choose`) and the temperature, which is the one among 61 at which the
    tasks of all held-out samples so far were likeliest, each when its own task had just been learned.

    Args:
        project: dimensions of a random projection of the features, drawn from the stream's seed and
            the gate's name and never stored; None for none.
        per: whether a row stands for a ``class`` or for a whole ``task``.
        held_out: fraction of a task's samples to choose and to calibrate with; 0 for none.
        modes, name: see :class:`TaskGate`.

    State:
        ``rows``, what the method says of each row and of all, float32, for inference; while learning,
        float64 sums of all rows, where they share second moments (``retained``).

    Raises:
        ConfigurationError: an argument breaks a rule.
    """

    #: Whose second moments it needs.
    second_moments: ClassVar[SecondMoments] = "none"
    #: What it stores of all rows together.
    shared_rows: ClassVar[Sequence[str]] = ()
    #: Samples of a group below which it has no row.
    least: ClassVar[int] = 1

    project: int | None = None
    per: Per = "class"
    held_out: float = 0.1

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("class", "task"))
        if self.project is not None:
            check_positive_int("project", self.project, "Leave it out for no projection.")
        if not (isinstance(self.held_out, int | float) and 0 <= self.held_out < 1):
            raise ConfigurationError(
                f"Expected held_out to be a fraction from 0 to below 1, but got {self.held_out!r}. "
                "0 holds out nothing."
            )
        super().__post_init__()

    def reset(self) -> None:
        """Forget every task."""
        self.seed = 0
        self.inputs = 0  # width of the features as they come
        self.row_tasks: list[int] = []
        self.row_columns: list[int] = []
        self.rows: dict[str, Tensor] = {}
        self.chosen: float | None = None
        self.retained: tuple[GroupSums, GroupSums] | None = None
        self.likelihoods = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        self._open: OpenTask | None = None
        self._random: dict[str, Tensor] = {}

    # --- what a method says ----------------------------------------------------------------------

    @abstractmethod
    def fitted(self, moments: GroupSums) -> dict[str, Tensor]:
        """What is stored, float32: of the rows whose moments these are, rows first, or of all of them.

        With shared second moments these are all rows of all tasks, and what they share; else the rows of
        a new task, which are appended.
        """

    @abstractmethod
    def scores(self, features: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Log-scores of rows, ``(n, rows)``, of projected features ``(n, d)``."""

    @abstractmethod
    def row_bytes(self, width: int) -> int:
        """Bytes of a row at inference."""

    def shared_bytes(self, width: int) -> int:
        """Bytes of what all rows share at inference."""
        return 0

    def choose(self, fit: GroupSums, held: GroupSums) -> float:
        """What the held-out samples prefer, for a method that leaves something open.

        Args:
            fit: of the samples that are fitted; each group has as many as ``least``.
            held: of those held out, of the same groups; of some group at least one.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves nothing open.")

    @property
    def open_argument(self) -> str | None:
        """The argument that :meth:`choose` answers for; None where nothing was left open."""
        return None

    # --- fitting ---------------------------------------------------------------------------------

    def add(
        self, task: Task, features: Tensor, columns: Tensor, held_out: Tensor | None = None
    ) -> None:
        """Sum a batch of a task's samples.

        Args:
            task: which; those before it are finished.
            features: ``(n, d)``.
            columns: ``(n,)`` int64, the column of each sample's class.
            held_out: ``(n,)`` bool, which of them are held out; by default none.

        Raises:
            DataError: features are not finite, or of another width.
        """
        projected = self._projected(features)
        check_finite(self.name, projected, task.id)
        if self._open is None:
            self._open = OpenTask.zero(
                task, projected.shape[1], self.second_moments, projected.device, self.names_classes
            )
        self._open.add_(projected, columns, held_out)

    def discard(self) -> None:
        """Forget what was summed of a task that is not finished."""
        self._open = None

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum the open task over all processes."""
        self._open = self._open_task().reduced(all_reduce)
        self._open.check_counts(self.least, self.name)

    def trial_rows(self) -> dict[str, Tensor] | None:
        """All rows, those of the open task without its held-out samples; chooses what is open.

        Returns:
            None where too few samples are left for that.
        """
        part = self._open_task()
        if not part.can_choose(self.least):
            return None
        self._choose(part)
        return self._all_rows(part.fit)

    def calibrate(self, trial: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """What held-out samples of the open task say of each temperature.

        Args:
            trial: of :meth:`trial_rows`.
            features: of held-out samples, ``(n, d)``.

        Returns:
            ``(61,)`` float64, sums over the samples, for :meth:`finish`.
        """
        part = self._open_task()
        scores = self.scores(self._projected(features), trial)
        tasks = torch.tensor(self.row_tasks + part.row_tasks, device=scores.device)
        targets = tasks.new_full((len(scores),), part.task.id)
        return temperature_log_likelihoods(scores, tasks, targets)

    def finish(self, likelihoods: Tensor | None = None) -> None:
        """Write the rows of the open task, from the sums of all its samples.

        Args:
            likelihoods: sums of :meth:`calibrate`, over all processes; None leaves the temperature.

        Raises:
            DataError: a class has too few samples, or features do not vary.
            ConfigurationError: a covariance cannot be inverted, or nothing was held out to choose with.
        """
        part = self._open_task()
        part.check_counts(self.least, self.name)
        if self.chosen is None:
            self._choose(part)
        rows = self._all_rows(part.fit.plus(part.held))
        retained = self._with_retained(part.fit, part.held)
        # From here on nothing fails, so that a task is either finished or not.
        self.rows = rows
        self.retained = retained if self.second_moments == "shared" else None
        self.row_tasks += part.row_tasks
        self.row_columns += part.row_columns
        if likelihoods is not None:
            self.likelihoods = self.likelihoods.to(likelihoods.device) + likelihoods
        self._open = None

    def on_task_end(self, host: ContinualHost, task: Task) -> None:
        """Fit the task in one pass; the features of held-out samples are held until it ends."""
        self.discard()
        held = []
        for batch in host.gate_batches(task.id, "train"):
            features, chosen = batch.inputs.flatten(1), self._held_out(batch)
            self.add(task, features, batch.targets, chosen)
            held.append(features[chosen])
        self.reduce(host.all_reduce)
        likelihoods, trial = None, self.trial_rows() if self.held_out else None
        if trial is not None:
            total = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=host.device)
            for features in held:
                total += self.calibrate(trial, features)
            likelihoods = host.all_reduce(total)
        self.finish(likelihoods)

    def configure(self, host: ContinualHost, stream: ContinualStream) -> None:
        """Take the seed of the projection from the stream."""
        self.seed = stream.seed

    def _held_out(self, batch: Batch) -> Tensor:
        places = batch.samples
        if places is None:  # of another loader: number them within the batch
            places = batch.start + torch.arange(len(batch.targets))
        return draw_held_out(places.to(batch.targets.device), self.held_out, self.seed)

    def _open_task(self) -> OpenTask:
        if self._open is None:
            raise DataError(
                f"Expected samples of a task for gate {self.name}, but got none. Add them first."
            )
        return self._open

    def _choose(self, part: OpenTask) -> None:
        """Let the held-out samples of all tasks so far choose what is open."""
        argument = self.open_argument
        if argument is None:
            return
        if not part.can_choose(self.least):
            raise ConfigurationError(
                f"Expected {argument} of gate {self.name} to be a number where no samples of task "
                f"{part.task.id} can be held out to choose it, but got null. Set {argument}, or raise "
                "held_out."
            )
        fit, held = self._with_retained(part.fit, part.held)
        self._check_spread(fit)
        self.chosen = self.choose(fit, held)

    def _with_retained(self, fit: GroupSums, held: GroupSums) -> tuple[GroupSums, GroupSums]:
        """Those of earlier tasks, where they are kept, and the open task's."""
        if self.retained is None:
            return fit, held
        return self.retained[0].append(fit), self.retained[1].append(held)

    def _all_rows(self, moments: GroupSums) -> dict[str, Tensor]:
        """What is stored of all tasks, with these of the open one."""
        if self.retained is not None:
            moments = self.retained[0].plus(self.retained[1]).append(moments)
        self._check_spread(moments)
        fitted = self.fitted(moments)
        if self.second_moments != "shared" and self.rows:
            return {key: torch.cat((self.rows[key], value)) for key, value in fitted.items()}
        return fitted

    def _check_spread(self, moments: GroupSums) -> None:
        """Refuse features that are constant within every group, where covariances are needed."""
        if self.second_moments == "none":
            return
        scale = moments.second.diagonal(dim1=1, dim2=2).sum(1)
        spread = moments.scatter().diagonal(dim1=1, dim2=2).sum(1)
        if bool((spread <= scale * ROUNDING).any()):
            raise DataError(
                f"Expected the features of gate {self.name} to vary within a class, but got {self.dimensions} "
                "constant ones. Use other features, or a front that was fitted on these inputs."
            )

    def singular(self, argument: str, value: float | None, remedy: str) -> ConfigurationError:
        """The error where a covariance cannot be inverted."""
        return ConfigurationError(
            f"Expected {argument} of gate {self.name} to make the covariance of {self.dimensions} features "
            f"invertible, but got {value}. {remedy}"
        )

    def forget(self, host: ContinualHost, task: Task) -> Sequence[str]:
        """Delete the task's rows; what all tasks were pooled for stays."""
        kept = torch.tensor([one != task.id for one in self.row_tasks], dtype=torch.bool)
        self.rows = {
            key: value if key in self.shared_rows else value[kept.to(value.device)]
            for key, value in self.rows.items()
        }
        if self.retained is not None:
            fit, held = self.retained
            self.retained = fit.only(kept), held.only(kept, fit.means)
        rows = zip(self.row_tasks, self.row_columns, kept.tolist(), strict=True)
        left = [(one, column) for one, column, keep in rows if keep]
        self.row_tasks, self.row_columns = [one for one, _ in left], [column for _, column in left]
        if not left:  # nothing is pooled any more
            self.rows, self.retained = {}, None
        pooled = ["second moments of the features of all tasks together"]
        chosen = ["what held-out samples of all tasks have chosen"]
        shared = self.second_moments == "shared" and bool(left)
        measured = self.chosen is not None or bool(self.likelihoods.any())
        return [*(pooled if shared else []), *(chosen if measured else [])]

    # --- inference -------------------------------------------------------------------------------

    @property
    def class_columns(self) -> Tensor:
        """The column of each row's class, ``(rows,)`` int64; -1 where a row is a whole task."""
        return torch.tensor(self.row_columns, dtype=torch.int64)

    @property
    def temperature(self) -> float:
        """What scores are divided by; 1 until a second task was calibrated."""
        if not self.likelihoods.any():
            return 1.0
        return TEMPERATURES[int(self.likelihoods.argmax())]

    def log_scores(self, features: Tensor) -> Tensor:
        """Log-scores of all rows, ``(n, rows)``: row r is class ``row_columns[r]`` of ``row_tasks[r]``.

        Args:
            features: ``(n, d)``.

        Raises:
            ConfigurationError: no task is learned yet.
            DataError: features are of another width than those that it was fitted on.
        """
        check_learned(self.name, self.rows)
        with torch.autocast(features.device.type, enabled=False):
            return self.scores(self._projected(features), self.rows)

    def task_scores(self, seen: Tensor) -> Tensor:
        """Log-scores of tasks, ``(n, tasks)``: over rows of a task, at the temperature, summed."""
        scores = self.log_scores(seen) / self.temperature
        tasks = torch.tensor(self.row_tasks, device=scores.device)
        return by_task(scores, tasks, max(self.row_tasks) + 1)

    @property
    def names_classes(self) -> bool:
        """Where rows are classes."""
        return self.per == "class"

    def own_columns(self, features: Tensor, task: int | None = None) -> Tensor | None:
        """The column of the likeliest row's class, of all tasks' rows or of one's."""
        if not self.names_classes:
            return None
        scores = of_task(self.log_scores(features), self.row_tasks, task)
        return self.class_columns.to(scores.device)[scores.argmax(1)]

    def own_logits(
        self, seen: Tensor, num_classes: int, task: "int | Tensor | None" = None
    ) -> Tensor:
        """The score of each class's likeliest row, of all tasks' rows or of one's, at the temperature."""
        scores = of_task(self.log_scores(seen) / self.temperature, self.row_tasks, task)
        return by_class(scores, self.class_columns, num_classes)

    def _projected(self, features: Tensor) -> Tensor:
        """Features through the projection, float32."""
        if self.inputs == 0:
            self.inputs = features.shape[1]
        check_width(self.name, features, self.inputs)
        features = features.float()
        if self.project is None:
            return features
        return self._times_random("projection", features, self.project, self.project)

    def _times_random(self, what: str, features: Tensor, columns: int, divisor: int) -> Tensor:
        """Features by normal numbers of variance 1 / divisor: of the seed and the name, never stored."""
        matrix = self._random.get(what)
        if matrix is None or matrix.device != features.device:
            generator = seeded_generator(what, self.seed, self.name)
            drawn = torch.randn(features.shape[1], columns, generator=generator)
            self._random[what] = matrix = (drawn / divisor**0.5).to(features.device)
        return features @ matrix

    # --- state and costs -------------------------------------------------------------------------

    @property
    def dimensions(self) -> int:
        """Dimensions of what is summed; 0 before the first batch."""
        return self.project if self.project is not None and self.inputs else self.inputs

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restart needs."""
        retained = () if self.retained is None else self.retained
        return {
            "seed": self.seed,
            "inputs": self.inputs,
            "row_tasks": list(self.row_tasks),
            "row_columns": list(self.row_columns),
            "rows": dict(self.rows),
            "chosen": self.chosen,
            "retained": [list(moments) for moments in retained],
            "likelihoods": self.likelihoods,
        }

    def inference_state(self) -> dict[str, Any]:
        """The state without what only later tasks need."""
        return {**self.state_dict(), "retained": []}

    def training_state(self) -> str:
        """The sums of all rows, where these share second moments."""
        return "shared second moments" if self.second_moments == "shared" else ""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            CheckpointError: it is of another method's gate, or of other rows.
        """
        self.discard()
        self.seed, self.inputs = int(state_dict["seed"]), int(state_dict["inputs"])
        self.row_tasks = [int(task) for task in state_dict["row_tasks"]]
        self.row_columns = [int(column) for column in state_dict["row_columns"]]
        self.rows = dict(state_dict["rows"])
        self.chosen = state_dict["chosen"]
        retained = [GroupSums(*moments) for moments in state_dict["retained"]]
        self.retained = (retained[0], retained[1]) if retained else None
        self.likelihoods = state_dict["likelihoods"]
        self._random = {}
        if self._inference_bytes() != sum(v.numel() * FLOAT32 for v in self.rows.values()):
            raise CheckpointError(
                f"Expected the state of gate {self.name} to hold {len(self.row_tasks)} rows of width "
                f"{self.dimensions}, but got {[tuple(v.shape) for v in self.rows.values()]}. Load it into "
                "a gate with the arguments that wrote it."
            )

    def move_state(self, host: ContinualHost) -> None:
        """Move rows and sums to the host's device."""
        self.rows = {key: value.to(host.device) for key, value in self.rows.items()}
        self.likelihoods = self.likelihoods.to(host.device)
        if self.retained is not None:
            fit, held = self.retained
            self.retained = fit.to(host.device), held.to(host.device)

    def held_tensors(self, host: ContinualHost) -> HeldTensors:
        """The rows, for inference, and the sums that later tasks are added to."""
        training = tensors_in([list(moments) for moments in self.retained or ()])
        return HeldTensors(training=[*training, self.likelihoods], inference=self.rows.values())

    def declared_bytes(self, host: ContinualHost) -> DeclaredBytes:
        """Rows and what they share, at 4 bytes a number; the sums of both parts, at 8."""
        inference = self._inference_bytes()
        sums = 0
        if self.retained is not None:
            numbers = len(self.row_tasks) * (self.dimensions + 1) + self.dimensions**2
            sums = 2 * FLOAT64 * numbers
        training = inference + sums + FLOAT64 * len(TEMPERATURES)
        first = min(self.row_tasks, default=0)
        per_task = self.row_tasks.count(first) * self.row_bytes(self.dimensions)
        return DeclaredBytes(training, inference, per_task)

    def _inference_bytes(self) -> int:
        if not self.row_tasks:
            return 0
        rows = len(self.row_tasks) * self.row_bytes(self.dimensions)
        return rows + self.shared_bytes(self.dimensions)
