"""Callbacks that look into the network after each task, for pictures that accuracies cannot make.

A grid's ``probes: [drift]`` adds them to every run, as ``--trainer.callbacks+=`` would; each writes
one JSON into the run's folder when the stream has been learned.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bpn_lightning.errors import ConfigurationError
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.nn.layers import BiasUnits, evaluation_mode

__all__ = ["Drift", "Moves", "Probe", "Regions"]


class Probe(Callback, ABC):
    """Calls :meth:`look` once after each task, also where a run was stopped and resumed."""

    file: str
    """Name of the JSON in the run's folder."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        """What was found after each task: numbers, texts, lists and dictionaries."""

    @abstractmethod
    def look(self, module: Any, moment: int) -> Any:
        """What is to be kept.

        Args:
            module: the ContinualModule.
            moment: id of the task that was just learned.
        """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if the epoch before was a task's last."""
        self._look(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the last time, and write the file."""
        self._look(pl_module)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / self.file
            write_atomically(path, (json.dumps(self.seen) + "\n").encode())

    def state_dict(self) -> dict[str, Any]:
        """What was found so far."""
        return {"seen": json.dumps(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self.seen = json.loads(state_dict["seen"])

    def _look(self, module: Any) -> None:
        while len(self.seen) <= module.closed:
            with torch.no_grad(), evaluation_mode(module.network):
                self.seen.append(self.look(module, len(self.seen)))


class Regions(Probe):
    """Where in the plane a network of two inputs sees the first class, in the mode of each task.

    Args:
        points: along each side of the square that is looked at.
    """

    file = "regions.json"

    def __init__(self, points: int = 60) -> None:
        super().__init__()
        self.points = points

    def look(self, module: Any, moment: int) -> Any:
        """Sides of the square, the test points of all tasks, and a map for each task learned."""
        data = [list(module.host.batches(task, "test")) for task in range(len(module.tasks))]
        inputs = [torch.cat([batch.inputs for batch in batches]) for batches in data]
        targets = [torch.cat([batch.targets for batch in batches]) for batches in data]
        if inputs[0].flatten(1).shape[1] != 2:
            raise ConfigurationError(
                "Expected the inputs to be points in a plane, but got "
                f"{inputs[0].flatten(1).shape[1]} numbers each. Leave `probes: [regions]` out."
            )
        every = torch.cat(inputs).flatten(1)
        low, high = every.amin(0) - 1, every.amax(0) + 1
        x, y = (torch.linspace(float(low[i]), float(high[i]), self.points) for i in range(2))
        grid = torch.cartesian_prod(x, y).to(every).reshape(-1, *inputs[0].shape[1:])
        maps = []
        for task in range(moment + 1):
            with module.task_mode(task):
                first = module.network(grid).softmax(1)[:, 0]
            maps.append(_rounded(first.reshape(self.points, self.points).T, 3))
        clusters = []
        for of_task, labels in zip(inputs, targets, strict=True):
            chosen = slice(None, None, max(1, len(of_task) // 200))  # from every cluster
            pairs = zip(of_task.flatten(1)[chosen], labels[chosen], strict=True)
            clusters.append([[*_rounded(point, 3), int(label)] for point, label in pairs])
        sides = [float(low[0]), float(high[0]), float(low[1]), float(high[1])]
        return {"sides": sides, "maps": maps, "points": clusters}


class Drift(Probe):
    """How far what task 1 computes has moved since it was learned, with and without its bias.

    After each task, the inputs of every linear layer's nonlinearity (its outputs, the bias of the
    task included) are compared on the same test samples of task 1 with those at the moment when task
    1 had been learned: the mean over samples of their distance, as a fraction of the mean norm
    then.

    Args:
        samples: of task 1's test set.
    """

    file = "drift.json"

    def __init__(self, samples: int = 500) -> None:
        super().__init__()
        self.samples = samples
        self._reference: dict[str, Tensor] = {}

    def look(self, module: Any, moment: int) -> Any:
        """For each layer: the drift with task 1's bias, and without any."""
        with_bias = self._activations(module)
        with _without_bias(module):
            without = self._activations(module)
        if moment == 0:
            self._reference = with_bias
        return {
            layer: {
                "with": _distance(with_bias[layer], reference),
                "without": _distance(without[layer], reference),
            }
            for layer, reference in self._reference.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, and what it is compared with."""
        return {**super().state_dict(), "reference": dict(self._reference)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        super().load_state_dict(state_dict)
        self._reference = dict(state_dict["reference"])

    def _activations(self, module: Any) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        hooks = [
            layer.register_forward_hook(
                lambda _, __, output, name=name: found.setdefault(name, []).append(output.cpu())
            )
            for name, layer in module.network.linear_layers().items()
        ]
        try:
            left = self.samples
            with module.task_mode(0):
                for batch in module.host.batches(0, "test"):
                    module.network(batch.inputs[:left])
                    left -= len(batch.inputs[:left])
                    if not left:
                        break
        finally:
            for hook in hooks:
                hook.remove()
        *layers, head = found
        parts = {name: torch.cat(found[name]) for name in layers}
        logits = torch.cat(found[head])
        own = torch.zeros(logits.shape[1], dtype=torch.bool)
        own[slice(*module.tasks[0].columns)] = True
        parts["outputs of task 1"] = logits[:, own]
        if not own.all():
            parts["other outputs"] = logits[:, ~own]
        return parts


class Moves(Probe):
    """How M moves over the updates of a task: its size, and how often its signs flip.

    After each update: the root mean square of M over all layers, and the fraction of its entries that moved
    against their last move. Of each task, means over so many stretches of equal length.

    Args:
        stretches: at most, of a task.
    """

    file = "moves.json"

    def __init__(self, stretches: int = 100) -> None:
        super().__init__()
        self.stretches = stretches
        self._size: list[float] = []
        self._flips: list[float] = []
        self._last: dict[str, Tensor] = {}  # M, and the signs of its last move

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note where M starts a task."""
        self._last = self._last or {"m": _all_m(pl_module)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Compare M with what it was before, if the batch ended an update."""
        m = _all_m(pl_module)
        signs = (m - self._last["m"]).sign()
        if not signs.any():
            return
        before = self._last.get("signs", signs)
        self._size.append(float(m.square().mean().sqrt()))
        self._flips.append(float((signs * before < 0).float().mean()))
        self._last = {"m": m, "signs": signs}

    def look(self, module: Any, moment: int) -> Any:
        """Both over the task."""
        found = {
            "size": _means(self._size, self.stretches),
            "flips": _means(self._flips, self.stretches),
        }
        self._size, self._flips, self._last = [], [], {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, also of the task that is learned."""
        of_task = {"size": list(self._size), "flips": list(self._flips), "last": dict(self._last)}
        return {**super().state_dict(), **of_task}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        super().load_state_dict(state_dict)
        self._size, self._flips = list(state_dict["size"]), list(state_dict["flips"])
        self._last = dict(state_dict["last"])


def _all_m(module: torch.nn.Module) -> Tensor:
    """M of all layers in one row, copied."""
    found = [part.M.detach().flatten() for part in module.modules() if isinstance(part, BiasUnits)]
    if not found:
        raise ConfigurationError(
            "Expected a method with bias units where probes is [moves], but got one without. Leave the probe "
            "out, or add the strategy bd."
        )
    return torch.cat(found).cpu()


def _means(values: list[float], stretches: int) -> list[float]:
    """Means over at most so many stretches of equal length, but for a last that is shorter."""
    length = max(1, -(-len(values) // stretches))
    parts = [values[start : start + length] for start in range(0, len(values), length)]
    return [round(sum(part) / len(part), 5) for part in parts]


@contextmanager
def _without_bias(module: torch.nn.Module) -> Iterator[None]:
    """Every stored bias is 0 inside."""
    units = [part for part in module.modules() if isinstance(part, BiasUnits)]
    banks = [part.bank.clone() for part in units]
    try:
        for part in units:
            part.bank.zero_()
        yield
    finally:
        for part, bank in zip(units, banks, strict=True):
            part.bank.copy_(bank)


def _distance(now: Tensor, then: Tensor) -> float:
    norm = float(then.norm(dim=1).mean())
    return round(float((now - then).norm(dim=1).mean()) / norm, 5) if norm else 0.0


def _rounded(values: Tensor, digits: int) -> Any:
    return json.loads(json.dumps(values.double().round(decimals=digits).tolist()))
