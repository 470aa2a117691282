"""``bpn-fit`` once torch may be imported: parse, build, train, write the results."""

import errno
import logging
import os
import signal
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from bpn_lightning.cli.allowed import Given, canonical_names, check_given, check_places, given
from bpn_lightning.cli.command import Command
from bpn_lightning.cli.earlier_runs import refuse_earlier, refuse_other_name
from bpn_lightning.cli.includes import bounded_includes
from bpn_lightning.cli.interpolations import check_interpolations
from bpn_lightning.cli.messages import explain, shorten_help
from bpn_lightning.cli.trust import restrict_imports
from bpn_lightning.costs import bytes_held, bytes_per_task
from bpn_lightning.datamodules import DATAMODULES
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import (
    BPNLightningError,
    CheckpointError,
    ConfigurationError,
    ResultsError,
)
from bpn_lightning.files import check_name, refuse_outside, write_atomically
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.registry import CLASS_PATH
from bpn_lightning.run.checkpoints import WholeCheckpoints, callback_state, read_checkpoint
from bpn_lightning.run.console import StreamProgress, final_table
from bpn_lightning.run.dashboards import Dashboard, close_displays, keep_results
from bpn_lightning.run.folder import RunFolder, written_files
from bpn_lightning.run.identity import defining, differences, flatten, run_name, run_names
from bpn_lightning.run.loggers import RunName, SavedLogger, complete_loggers, go_offline
from bpn_lightning.run.recording import Intervals, LastCheckpoint, MetricsFile
from bpn_lightning.run.results import collect_provenance, write_results
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.terminal import INTERRUPTED, plain_warnings, printable
from bpn_lightning.trainer.lightning import is_first_process
from bpn_lightning.trainer.rules import check_launch
from bpn_lightning.untrusted import read_text

__all__ = ["ContinualCLI", "fit"]

TERMINATED = 143  # as shells say of a command that SIGTERM ended

#: Keys that say where and how a run is written, and not what it is: two runs that differ in them
#: only have the same results, config.yaml included.
PLACES = ("runs", "overwrite", "ckpt_path", "logger", "log_artifacts", "quiet", "json")

#: What the system says when there is no room for a file.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Parser(LightningArgumentParser):
    """Lightning's parser, with a help that can be read, reading no files but those of ``--config``."""

    whole = False
    """Whether this is the parser of a whole configuration, and not of the arguments of a class."""

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> None:
        """Let no value be the name of a file with other values."""
        super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """YAML, from which interpolations are resolved: in bounds."""
        text: str = super().dump(*args, **kwargs)
        if self.whole and "${" in text:
            check_interpolations(yaml.safe_load(text))
        return text

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Without the names of the thousand modules that a backbone might be."""
        return shorten_help(super().format_help(*args, **kwargs))

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """What Lightning 2.6 calls by a name that jsonargparse has deprecated."""
        try:
            return self.instantiate(*args, **kwargs)
        except ValueError as error:
            raise _own_error(error) or error from None


def _own_error(error: BaseException) -> BPNLightningError | None:
    """The one below an error of jsonargparse's, which takes ours for a value of another type.

    Ours are ValueErrors, and are buried in a message about the types that were tried.
    """
    said: BaseException | None = error
    while said is not None and not isinstance(said, BPNLightningError):
        said = said.__cause__ or said.__context__
    return said


class ContinualCLI(LightningCLI):
    """LightningCLI for one fit of a stream.

    The parser is made for the method: each of its strategies has typed arguments below
    ``strategies.<name>``, and there are no others.

    Args:
        command: the command line, in order of precedence.

    Raises:
        ConfigurationError: a key, a value or a class is wrong.
    """

    datamodule: ContinualDataModule
    model: ContinualModule
    trainer: Trainer
    run_folder: RunFolder

    def __init__(self, command: Command) -> None:
        self.command = command
        self._closing = ExitStack()
        restrict_imports([*command.importable, *canonical_names(command.classes)], command.trust)
        _load_streams(command)
        try:
            self._build(command.args)
        except BaseException:
            self.close()
            raise

    def _build(self, args: list[str]) -> None:
        super().__init__(
            ContinualModule,
            ContinualDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults={"max_epochs": -1, "enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # only for modules that save hyperparameters
            parser_class=_Parser,
            parser_kwargs={
                "prog": "bpn-fit",
                "description": "Train a method over a stream of tasks, in one Lightning fit.",
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
                "dump_header": None,
            },
            args=args,
            run=False,
        )

    # --- parsing ---------------------------------------------------------------------------------

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's ``seed_everything``, but always a number: it names the run's folder."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of the weights and, unless data.init_args.seed says otherwise, of the stream.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The method, its strategies, and where the run is written."""
        parser.add_argument(
            "--experiment",
            type=str,
            default=self.command.experiment,
            help="Name of the results folder; by default the first config's file name.",
        )
        parser.add_argument(
            "--method",
            type=str,
            default=self.command.method,
            help="Strategies joined by '+' (a class of your own by its path), or a method with tuned "
            "values of the experiment.",
        )
        parser.add_argument(
            "--runs",
            type=str,
            default="runs",
            help="Results go to <runs>/<experiment>/<method>/seed_<n>/.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Replace what an earlier run left in that folder.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Resume this checkpoint; 'last' is the run's own, if there is one.",
        )
        for unit, kind, what in (
            ("steps", int | None, "Updates between checkpoints inside an epoch"),
            ("epochs", int | None, "Epochs between checkpoints at an epoch's end"),
            ("tasks", int | None, "Tasks between checkpoints at a task's end"),
            ("minutes", float | None, "Minutes between checkpoints"),
        ):
            parser.add_argument(
                f"--checkpoint_every_n_{unit}",
                type=kind,
                default=getattr(Intervals, unit),
                help=f"{what}; null: none by this measure.",
            )
        parser.add_argument(
            "--logger",
            type=list[str] | str | None,
            default=None,
            help="Log to wandb, tensorboard, csv or mlflow too, or to several: wandb,tensorboard. Others "
            "go by --trainer.logger.",
        )
        for flag, text in {
            "log_artifacts": "Also keep results and the last checkpoint in W&B or MLflow.",
            "quiet": "Print nothing but errors and warnings.",
            "json": "Print results.json and nothing else.",
        }.items():
            parser.add_argument(
                f"--{flag}", type=bool, nargs="?", const=True, default=False, help=text
            )
        for name, registered in self.command.strategies.items():
            key = f"strategies.{name}"
            if registered is None:
                parser.add_lightning_class_args(ContinualStrategy, key, subclass_mode=True)
            else:
                parser.add_lightning_class_args(registered.load(), key)
        parser.add_argument("--help_all", action="help", help="Show this text.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in one line what is wrong."""
        parser.whole = True  # type: ignore[attr-defined]
        try:
            with bounded_includes():
                self.config = parser.parse_args(args)
        except ArgumentError as error:
            said = _own_error(error) or ConfigurationError(explain(str(error), parser))
            raise said from error
        except OmegaConfBaseException as error:
            key = f" in {error.full_key}" if getattr(error, "full_key", None) else ""
            raise ConfigurationError(
                f"Expected every ${{...}} to name another key, but got an error{key}: "
                f"{str(error).splitlines()[0]}. `--print_config` shows the keys."
            ) from error
        seed = self.config.seed_everything
        if not 0 <= seed < 2**32:
            raise ConfigurationError(
                f"Expected seed_everything to be a whole number from 0 to {2**32 - 1}, but got {seed}. "
                "0 is the default."
            )

    # --- building --------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where this run's results go."""
        config = self.config
        seed = f"seed_{config.seed_everything}"
        return Path(str(config.runs), str(config.experiment), str(config.method), seed)

    @property
    def resolved(self) -> Namespace:
        """The configuration without what only says where it is written."""
        config: Namespace = self.config.clone()
        for key in ("config", *PLACES):
            config.pop(key, None)
        return config

    def dump(self) -> str:
        """The resolved configuration as YAML."""
        text: str = self.parser.dump(self.resolved, skip_unset=False, skip_validation=True)
        return text

    def before_instantiate_classes(self) -> None:
        """Refuse before anything is built what would be refused after hours of training."""
        units = (field.name for field in fields(Intervals))
        self.intervals = Intervals(*(self.config[f"checkpoint_every_n_{unit}"] for unit in units))
        for key in ("experiment", "method"):
            check_name(key, self.config[key])  # again: it may have been an interpolation
        refuse_outside(Path(str(self.config.runs)), self.folder)
        if not self.command.trust:
            self._check_trust()
        self.run_folder = RunFolder(self.folder)
        if self.config.overwrite:
            self._refuse_replaced_inputs()
        if is_first_process():
            if self.run_folder.acquire():
                _tell(f"What an interrupted --overwrite had not replaced is back in {self.folder}.")
            self._closing.callback(self._give_folder_back)
        refuse_other_name(self.folder, self._names())
        self.checkpoint = self._checkpoint()
        if is_first_process() and not self.config.overwrite:
            refuse_earlier(self.folder, self._identity()["config"], self._resumes_own)

    def _refuse_replaced_inputs(self) -> None:
        """What --overwrite replaces cannot be what the run begins with."""
        if self.config.ckpt_path == "last":
            raise ConfigurationError(
                "Expected either --overwrite, which begins anew, or --ckpt_path last, which goes "
                "on, but got both. Leave one out."
            )
        named = {"ckpt_path": self.config.ckpt_path, **flatten(yaml.safe_load(self.dump()))}
        for key, value in named.items():
            for text in value if isinstance(value, list) else [value]:
                replaced = self.run_folder.replaced(text) if isinstance(text, str) else None
                if replaced is not None:
                    raise ConfigurationError(
                        f"Expected {key} to be a file that --overwrite leaves alone, but got {text}, "
                        f"which is {replaced} of the run to be replaced. Copy it to another place, or "
                        "leave --overwrite out."
                    )

    @property
    def _resumes_own(self) -> bool:
        """Whether the checkpoint is one of this run's folder, by whatever path."""
        there = self.checkpoint and self.checkpoint.resolve().parent
        return there == self.last.parent.resolve()

    def _check_trust(self) -> None:
        """Refuse what files alone may not name, and places where they may let nothing be written."""
        config, typed = self.config, self.command.typed
        values = [
            *given(config.model, "model", owner=ContinualModule),
            *given(config.data, "data"),
        ]
        for name, one in self.command.strategies.items():
            if one is not None and one.origin == CLASS_PATH:
                values.append(Given("method", one.load(), one.class_path))
            owner = None if one is None else one.load()
            key = f"strategies.{name}"  # not there where it has no arguments
            values += given(config.get(key), key, owner=owner)
        flags = list(given(config.trainer, "trainer", owner=Trainer))
        caches = [one for one in values if one.key.endswith(".cache_dir")]
        check_given([*values, *flags], typed)
        check_places([*flags, *caches], self.folder, typed)
        if not any(word.partition("=")[0] == "--runs" for word in self.command.args):
            check_places([Given("runs", config.runs)], Path.cwd())

    def instantiate_classes(self) -> None:
        """Build everything, with what loggers were not told; config.yaml keeps what was asked for."""
        asked, self.shown_config = self.config, yaml.safe_load(self.dump())
        self.config = asked.clone()
        self.config.trainer.logger = self._loggers()
        super().instantiate_classes()
        self.config = asked

    def _loggers(self) -> Any:
        """The loggers' classes and arguments, beside our metrics.csv."""
        config = self.config
        names = config.logger or []
        names = names.split(",") if isinstance(names, str) else names
        if config.trainer.logger is False and not names:
            return False
        run = RunName(
            experiment=config.experiment,
            method=config.method,
            seed=config.seed_everything,
            runs=Path(config.runs),
            folder=self.folder,
        )
        if config.quiet or config.json:
            os.environ.setdefault("WANDB_SILENT", "true")
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        saved, step = self._logged
        first = is_first_process()
        specs = complete_loggers(names, config.trainer.logger, run, saved, step, first)
        reason = go_offline(specs)
        if reason:
            _tell(
                f"W&B logs offline: {reason}. Upload it later: wandb sync {self.folder / 'wandb'}"
            )
        return specs

    @property
    def last(self) -> Path:
        """This run's own checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The one before it."""
        return self.last.with_name("previous.ckpt")

    def _checkpoint(self) -> Path | None:
        """The checkpoint to resume, after a look at whose it is."""
        self._logged: tuple[list[SavedLogger], int] = ([], 0)
        wanted = self.config.ckpt_path
        if wanted is None:
            return None
        paths = [self.last, self.previous] if wanted == "last" else [Path(wanted)]
        if not any(path.is_file() for path in paths):
            if wanted == "last":
                _tell(f"There is no {self.last} yet: this run starts afresh.")
                return None
            raise ConfigurationError(
                f"Expected ckpt_path to be 'last' or a checkpoint, but there is no file {wanted!r}. "
                f"Those of this run are in {self.folder / 'checkpoints'}."
            )
        problems = []
        for path in paths:
            if not path.is_file():
                problems.append(f"There is no {path}.")
                continue
            try:
                saved = read_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                _tell(f"warning: {problems[0]} Going on from {path}, the checkpoint before it.")
            self._check_run(path, saved)
            shown = callback_state(saved, Dashboard.__qualname__).get("loggers", [])
            self._logged = [(kind, version) for kind, version, _ in shown], saved["global_step"]
            return path
        raise CheckpointError(
            f"{' '.join(problems)} Start afresh with --overwrite in the place of --ckpt_path."
        )

    def _check_run(self, path: Path, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run, and say what it differs in."""
        here = self._identity()
        there = callback_state(saved, LastCheckpoint.__qualname__).get("run")
        if there is None:  # taken by somebody else; the module has a look at it
            return
        if not isinstance(there, Mapping) or there.keys() != here.keys():
            raise CheckpointError(
                f"Expected {path} to say which run it is of, but got {there!r:.80}. Start afresh with "
                "--overwrite in the place of --ckpt_path."
            )
        if run_name(there) != run_name(here):
            raise CheckpointError(
                f"Expected ckpt_path to be a checkpoint of {run_name(here)}, but {path} is "
                f"one of {run_name(there)}. Resume that run with its own config, method and seed."
            )
        different = differences(here["config"], there["config"])
        if different:
            raise CheckpointError(
                f"Expected ckpt_path to be a checkpoint of this configuration, but {path} differs: "
                f"{'; '.join(different)}. Resume with the configuration that wrote it (config.yaml "
                "beside it), or start a new run in another --runs folder."
            )

    def _names(self) -> dict[str, Any]:
        return run_names(self.config)

    def _identity(self) -> dict[str, Any]:
        """What a run has in common with its checkpoints."""
        return {**self._names(), "config": defining(yaml.safe_load(self.dump()))}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's, with our files, checkpoint and progress bar unless they are switched off."""
        chosen = self.config_init.trainer
        self._metrics = metrics = None
        if chosen.logger is not False:
            self._metrics = metrics = MetricsFile(self.folder / "metrics.csv")
            others = chosen.logger if isinstance(chosen.logger, list) else [chosen.logger]
            kwargs["logger"] = [metrics, *(one for one in others if one not in (None, True))]
        callbacks = chosen.callbacks if isinstance(chosen.callbacks, list) else [chosen.callbacks]
        callbacks = [callback for callback in callbacks if callback is not None]
        callbacks.insert(0, _FolderOfRun(self.prepare_folder))
        if chosen.enable_checkpointing is not False:
            callbacks.append(
                LastCheckpoint(
                    self.last,
                    self.intervals,
                    self._identity(),
                    metrics,
                    resumed=self.checkpoint,
                    on_saved=self.run_folder.settle,
                )
            )
            plugins = chosen.plugins if isinstance(chosen.plugins, list) else [chosen.plugins]
            plugins = [plugin for plugin in plugins if plugin is not None]
            if any(isinstance(plugin, AsyncCheckpointIO) for plugin in plugins):
                raise ConfigurationError(
                    "Expected trainer.plugins to be without AsyncCheckpointIO, but got it. A checkpoint "
                    "gets its name once it is on disk. Leave it out; checkpoint_every_n_steps says how "
                    "often one is taken."
                )
            if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
                plugins.append(WholeCheckpoints())
            kwargs["plugins"] = plugins
        if self.config.quiet or self.config.json:
            callbacks = [one for one in callbacks if not isinstance(one, ProgressBar)]
            kwargs["enable_progress_bar"] = False
        elif chosen.enable_progress_bar is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks.append(StreamProgress())
        callbacks.append(Dashboard({**self.shown_config, **self._names()}))
        kwargs["callbacks"] = callbacks
        if chosen.default_root_dir is None:
            kwargs["default_root_dir"] = str(self.folder)
        try:
            trainer: Trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise ConfigurationError(
                "Expected the trainer's flags to fit this machine and each other, but Lightning says: "
                f"{' '.join(str(error).split())}"
            ) from error
        if str(chosen.precision) in ("16", "16-mixed") and trainer.precision != "16-mixed":
            raise ConfigurationError(
                "Expected trainer.precision to be one that the device has, but got 16-mixed, of which "
                f"Lightning makes {trainer.precision} here. Use bf16-mixed, or a GPU."
            )
        check_launch(trainer)
        return trainer

    def prepare_folder(self) -> None:
        """Set aside what an earlier run left, unless this one resumes it, and write config.yaml."""
        if not is_first_process():
            return
        if self.config.overwrite:
            self.run_folder.set_aside()
        elif not self._resumes_own:
            (self.folder / "metrics.csv").unlink(missing_ok=True)
        (self.folder / "results.json").unlink(missing_ok=True)
        write_atomically(self.folder / "config.yaml", self.dump().encode())
        if self._metrics:
            self._metrics.begin()

    def close(self) -> None:
        """End what the run holds: the lock of its folder."""
        self._closing.close()

    def _give_folder_back(self) -> None:
        if self.run_folder.release():
            _tell(f"The run had no checkpoint yet, so what was in {self.folder} before is back.")


class _FolderOfRun(Callback):
    """Gets the folder ready when training is about to begin.

    Not before: what is wrong with data, strategies or a checkpoint must not cost an earlier run's
    results. A run that resumes need not train at all.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare: Callable[[], None] | None = prepare

    def on_train_start(self, *args: Any, **kwargs: Any) -> None:
        """Prepare, once."""
        if self._prepare is not None:
            self._prepare()
            self._prepare = None

    on_fit_end = on_train_start


def fit(command: Command) -> int:
    """Train what a command line describes, and write and show its results.

    Args:
        command: read by :func:`bpn_lightning.cli.command.read_command`.

    Returns:
        The exit status.

    Raises:
        BPNLightningError: the user can mend it.
    """
    for notice in command.notices:
        _tell(notice)
    _look_for_no_gpu()
    with _quiet():
        try:
            cli = ContinualCLI(command)
        except SystemExit as end:  # --help and --print_config
            return int(end.code or 0)
        out = sys.stdout
        # Whatever libraries and plugins print, standard output has the document only.
        try:
            with redirect_stdout(sys.stderr) if cli.config.json else nullcontext():
                return _train(cli, out)
        finally:
            cli.close()


def _look_for_no_gpu() -> None:
    """Where there is no GPU, let optimizers not look for NVIDIA's library at every update.

    Adam and others ask whether there is one; a variable that Lightning sets makes them load the library
    to find out, which takes much longer where it is missing.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def _train(cli: ContinualCLI, out: TextIO) -> int:
    started = time.perf_counter()
    status = 1
    try:
        cli.trainer.fit(
            cli.model, datamodule=cli.datamodule, ckpt_path=cli.checkpoint, weights_only=True
        )
        if cli.trainer.is_global_zero:
            _finish(cli, out, seconds=time.perf_counter() - started)
        status = 0
    except SIGTERMException:
        _tell(f"Terminated. {_how_to_go_on(cli)}")
        status = TERMINATED
    except SystemExit:
        if cli.trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        # Lightning ignores it from then on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _tell(f"Interrupted. {_how_to_go_on(cli)}")
        status = INTERRUPTED
    except KeyboardInterrupt:  # while the results are written
        _tell(f"Interrupted. {_how_to_go_on(cli)}")
        status = INTERRUPTED
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ResultsError(
            f"Expected room for the files of {cli.folder}, but got: {error}. Make some. "
            f"{_how_to_go_on(cli)}"
        ) from error
    finally:
        if cli.trainer.is_global_zero:
            close_displays(cli.trainer.loggers, status)
    return status


def _finish(cli: ContinualCLI, out: TextIO, seconds: float) -> None:
    config, module = cli.config, cli.model
    stored = bytes_per_task(module.strategies, module)
    held = bytes_held(module.strategies, module)
    results = write_results(
        cli.folder,
        experiment=config.experiment,
        method=config.method,
        seed=config.seed_everything,
        matrix=module.accuracy_matrix,
        curve=module.curve,
        tasks=module.tasks,
        bytes_per_task=stored,
        bytes_held=held,
        unsettled=module.unsettled,
        metrics=module.task_metrics,
        provenance=collect_provenance(seconds),
        extra={"curve": module.curve} if module.evaluate_every == "epoch" else {},
    )
    if module.closed + 1 == len(module.tasks):  # nothing goes on from here any more
        cli.previous.unlink(missing_ok=True)
    if config.log_artifacts:
        name = f"{config.experiment}-{config.method}-seed_{config.seed_everything}"
        try:
            keep_results(cli.trainer.loggers, name, written_files(cli.folder), cli.last)
        except Exception as error:  # a logger's client may raise any exception
            raise ResultsError(
                f"Expected the loggers to keep the run's files, but got: {error}. Its results are whole "
                f"in {cli.folder}: upload them by hand."
            ) from error
    if config.json:
        out.write(read_text(results))
    if config.quiet or config.json:
        return
    title = f"{config.experiment}, {config.method}, seed {config.seed_everything}"
    final_table(
        Console(),
        title,
        module.tasks,
        module.accuracy_matrix.summary(),
        stored,
        held,
        results.parent,
        module.unsettled,
    )


def _how_to_go_on(cli: ContinualCLI) -> str:
    if (cli.folder / "results.json").exists():
        return f"{cli.folder} has its results."
    if not any(path.exists() for path in (cli.last, cli.previous)):
        return "It had no checkpoint yet."
    place = " in the place of --overwrite" if cli.config.overwrite else ""
    return f"The same command with --ckpt_path last{place} goes on from {cli.folder}."


def _load_streams(command: Command) -> None:
    """Short names are found among the classes that are imported."""
    for target in DATAMODULES.values():
        import_module(target.partition(":")[0])
    for registered in command.plugins:
        registered.load()


def _tell(line: str) -> None:
    """One line for the user, beside what the run prints."""
    if is_first_process():
        print(f"bpn-fit: {printable(line)}", file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's hints about hardware and products off, its warnings on but for one."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(), plain_warnings("bpn-fit"):
            # Between Lightning and torch, and nothing that a user could mend.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            # Updates are counted over the whole stream: an epoch need not be as long as the interval.
            warnings.filterwarnings("ignore", ".*is smaller than the logging interval")
            # Refused in the place of it.
            warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
