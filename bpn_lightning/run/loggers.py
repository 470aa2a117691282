"""The loggers of a run: their short names, default arguments, and how they are resumed.

``bpn-fit`` uses Lightning's loggers. Arguments that are not set are filled in here, for ``--logger wandb``
as well as ``--trainer.logger WandbLogger``: a location in the run's folder, a group with experiment and
method, a name with the seed; and, when resuming, the ID of the logger's run.
"""

import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from jsonargparse import Namespace
from lightning.pytorch import loggers

from bpn_lightning.errors import ConfigurationError, did_you_mean

__all__ = ["LOGGERS", "RunName", "SavedLogger", "complete_loggers", "go_offline", "offline_reason"]

#: Lightning's classes by their short names, which are also the names of our extras.
LOGGERS = {
    "wandb": "WandbLogger",
    "tensorboard": "TensorBoardLogger",
    "csv": "CSVLogger",
    "mlflow": "MLFlowLogger",
}

#: A logger of the resumed run: the name of its class, and its version (W&B's ID, MLflow's run).
SavedLogger = tuple[str, Any]

_PACKAGE = "lightning.pytorch.loggers"
_SECONDS = 3  # to wait for a response of W&B's server


@dataclass(frozen=True)
class RunName:
    """The name and location of a run.

    Attributes:
        experiment: name of the experiment.
        method: name of the method.
        seed: the run's seed.
        runs: the folder of all runs.
        folder: the run's own.
        began_in: the experiment of the first run of the stream, in a run that continues from another.
    """

    experiment: str
    method: str
    seed: int
    runs: Path
    folder: Path
    began_in: str | None = None

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"


def complete_loggers(
    names: Sequence[str],
    spelled_out: Any,
    run: RunName,
    saved: Sequence[SavedLogger] = (),
    step: int = 0,
    first: bool = True,
) -> list[Namespace]:
    """The loggers of a run as jsonargparse's ``class_path`` and ``init_args``.

    Args:
        names: short names.
        spelled_out: the parsed ``trainer.logger``; its values are kept.
        run: name and location of the run.
        saved: the loggers of the resumed run.
        step: number of updates before resuming.
        first: whether this is the first process. The others do not create Lightning's loggers that log
            on the first process only, as creating the same database twice would fail.

    Raises:
        ConfigurationError: a name is unknown, or a logger's package is not installed.
    """
    specs = spelled_out if isinstance(spelled_out, list) else [spelled_out]
    specs = [spec for spec in specs if spec not in (None, True)]
    if names and False in specs:
        raise ConfigurationError(
            f"Expected trainer.logger not to be false when loggers are given, but got false and "
            f"logger {', '.join(names)}. Leave one of the two out."
        )
    for name in names:
        if name not in LOGGERS:
            raise ConfigurationError(
                f"Expected logger to be one of {', '.join(LOGGERS)}, but got {name!r}."
                f"{did_you_mean(name, LOGGERS)} Use --trainer.logger CLASS for other loggers."
            )
        path = f"{_PACKAGE}.{LOGGERS[name]}"
        specs.append(Namespace(class_path=path, init_args=Namespace()))  # type: ignore[no-untyped-call]
    left = list(saved)
    for spec in specs:
        if first and _of_lightning(spec):
            kind = spec.class_path.rpartition(".")[2]
            known = next((one for one in left if one[0] == kind), None)
            if known is not None:
                left.remove(known)
            _fill(spec, kind, _ARGUMENTS[kind](run, known and known[1], step))
    return [spec for spec in specs if first or not _of_lightning(spec)]


def go_offline(specs: Sequence[Namespace]) -> str | None:
    """Set W&B to offline mode if necessary, and return the reason.

    Args:
        specs: the result of :func:`complete_loggers`; those of W&B are changed.
    """
    undecided = [
        spec
        for spec in specs
        if spec.class_path == f"{_PACKAGE}.WandbLogger"
        and not spec.init_args.get("offline")
        and not spec.init_args.get("mode")
    ]
    reason = offline_reason() if undecided else None
    for spec in undecided if reason else ():
        spec.init_args["mode"] = "offline"
    return reason


def offline_reason() -> str | None:
    """Why W&B can only log offline; None if it can log online, or if its mode is configured.

    Without this check W&B prompts for a key, or waits 90 seconds for its server and fails.
    """
    import wandb

    settings = wandb.setup().settings
    if settings.mode != "online":
        return None
    if not _answers(settings.base_url):
        return f"{settings.base_url} cannot be reached"
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        return str(error)
    return None if known else "there is no API key (`wandb login` stores one)"


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=_SECONDS):
            return True
    except HTTPError:
        return True  # an HTTP error is also a response
    except URLError as error:
        return isinstance(
            error.reason, ssl.SSLError
        )  # also a response; W&B has its own SSL settings
    except OSError:
        return False


def _of_lightning(spec: Namespace) -> bool:
    package, _, kind = spec.class_path.rpartition(".")
    return package == _PACKAGE and kind in _ARGUMENTS


def _need(logger: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"Expected {', '.join(missing)} to be installed for logger {logger!r}, but it is not. "
            f"Install it: pip install 'bpn_lightning[{logger}]'"
        )


def _fill(spec: Namespace, kind: str, arguments: dict[str, Any]) -> None:
    """Set arguments that the user left at their defaults."""
    parameters = signature(getattr(loggers, kind)).parameters
    for name, value in arguments.items():
        default = parameters[name].default if name in parameters else None
        if spec.init_args.get(name, default) == default:
            spec.init_args[name] = value


def _of_wandb(run: RunName, version: Any, step: int) -> dict[str, Any]:
    _need("wandb", "wandb")
    goes_on = run.began_in is not None
    chosen = {
        "project": ("WANDB_PROJECT", "bpn_lightning"),
        "group": ("WANDB_RUN_GROUP", f"{run.began_in or run.experiment}/{run.method}"),
        "job_type": ("WANDB_JOB_TYPE", f"seed_{run.seed}"),
        "name": ("WANDB_NAME", f"{run.experiment}: {run}" if goes_on else str(run)),
        "save_dir": ("WANDB_DIR", str(run.folder)),
    }
    arguments = {name: os.environ.get(key, value) for name, (key, value) in chosen.items()}
    # Lightning's default is "allow", but the parser passes None, the default of wandb.init.
    return {**arguments, "version": version, "resume": "allow"}


def _of_tensorboard(run: RunName, version: Any, step: int) -> dict[str, Any]:
    if find_spec("tensorboardX") is None:  # Lightning supports either
        _need("tensorboard", "tensorboard")
    arguments = {"save_dir": str(run.folder), "name": "tensorboard", "default_hp_metric": False}
    if version is None:
        return arguments
    return {**arguments, "version": version, "purge_step": step + 1}


def _of_csv(run: RunName, version: Any, step: int) -> dict[str, Any]:
    # A new version even when resuming, because Lightning deletes the file of an old one.
    return {"save_dir": str(run.folder), "name": "csv"}


def _of_mlflow(run: RunName, version: Any, step: int) -> dict[str, Any]:
    _need("mlflow", "mlflow")
    arguments = {
        "experiment_name": run.experiment,
        "run_name": str(run),
        "tags": {"method": run.method, "seed": str(run.seed)},
        "run_id": version,
    }
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        _need("mlflow", "sqlalchemy", "alembic")
        run.runs.mkdir(parents=True, exist_ok=True)
        runs = run.runs.resolve()
        # MLflow 3 does not support a folder of files.
        uri = f"sqlite:///{runs / 'mlflow.db'}"
        arguments["artifact_location"] = (runs / "mlflow").as_uri()
    return {**arguments, "tracking_uri": uri}


_ARGUMENTS: dict[str, Callable[[RunName, Any, int], dict[str, Any]]] = {
    "WandbLogger": _of_wandb,
    "TensorBoardLogger": _of_tensorboard,
    "CSVLogger": _of_csv,
    "MLFlowLogger": _of_mlflow,
}
