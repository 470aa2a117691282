"""LightningCLI for one fit of a stream: checks and instantiates what a command line describes."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO

from bpn_lightning.cli.allowed import Given, canonical_names, check_given, check_places, given
from bpn_lightning.cli.command import Command
from bpn_lightning.cli.config_files import PLACES
from bpn_lightning.cli.continuing import continue_stream
from bpn_lightning.cli.earlier_runs import refuse_earlier, refuse_other_name
from bpn_lightning.cli.options import FitParser, add_options, parse_options
from bpn_lightning.cli.output import notify
from bpn_lightning.cli.past import PastRun, continues_run, find_past, first_experiment
from bpn_lightning.cli.resume import find_checkpoint, last_checkpoint
from bpn_lightning.cli.trust import restrict_imports
from bpn_lightning.datamodules import DATAMODULES
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.export.adding import AddToBundle
from bpn_lightning.files.writing import check_name, refuse_outside, write_atomically
from bpn_lightning.model.module import ContinualModule
from bpn_lightning.registry import CLASS_PATH
from bpn_lightning.run.checkpoints import AtomicCheckpointIO
from bpn_lightning.run.console import StreamProgress
from bpn_lightning.run.dashboards import Dashboard
from bpn_lightning.run.folder import RunFolder
from bpn_lightning.run.identity import defining, flatten, method_folder, run_names
from bpn_lightning.run.loggers import RunName, complete_loggers, go_offline
from bpn_lightning.run.recording import Intervals, LastCheckpoint, MetricsFile
from bpn_lightning.trainer.launch import check_launch
from bpn_lightning.trainer.lightning import is_first_process

__all__ = ["ContinualCLI"]


class ContinualCLI(LightningCLI):
    """LightningCLI for one fit of a stream.

    The parser is created for the method: each of its strategies has typed arguments below
    ``strategies.<name>``, each gate below ``gates.<name>``, the front below ``fronts.<name>``, and there
    are no others.

    Args:
        command: the command line, in order of precedence.

    Raises:
        ConfigurationError: a key, a value or a class is invalid.
    """

    datamodule: ContinualDataModule
    model: ContinualModule
    trainer: Trainer
    run_folder: RunFolder

    def __init__(self, command: Command) -> None:
        self.command = command
        self._closing = ExitStack()
        restrict_imports(command.trust, canonical_names(command.trust.classes))
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
            parser_class=FitParser,
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
        """Add Lightning's ``seed_everything``, but always a number, as the run's folder is named by it."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of the weights and, unless data.init_args.seed is set, of the stream.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the method, its strategies, and the location of the outputs."""
        add_options(parser, self.command)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, reporting errors in one line."""
        self.config = parse_options(parser, args)

    # --- building --------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The folder of this run's results."""
        config = self.config
        seed = f"seed_{config.seed_everything}"
        method = method_folder(str(config.method), config.gate, config.front)
        return Path(str(config.runs), str(config.experiment), method, seed)

    @property
    def resolved(self) -> Namespace:
        """The configuration without the keys for where and how outputs are written."""
        config: Namespace = self.config.clone()
        for key in ("config", *PLACES):
            config.pop(key, None)
        return config

    def dump(self) -> str:
        """The resolved configuration as YAML."""
        text: str = self.parser.dump(self.resolved, skip_unset=False, skip_validation=True)
        return text

    def before_instantiate_classes(self) -> None:
        """Check everything that can be checked before anything is instantiated."""
        units = (field.name for field in fields(Intervals))
        self.intervals = Intervals(*(self.config[f"checkpoint_every_n_{unit}"] for unit in units))
        for key in ("experiment", "method"):
            check_name(key, self.config[key])  # again, after resolving interpolations
        if self.command.tuned is not None:
            self.command.tuned.check(self.config.__getitem__, self.config.seed_everything)
        check_name("method, gate and front, joined,", self.folder.parent.name)
        refuse_outside(Path(str(self.config.runs)), self.folder)
        self._check_gates_alone()
        self._check_adding()
        if not self.command.trust.everything:
            self._check_trust()
        self.run_folder = RunFolder(self.folder)
        if self.config.overwrite:
            self._refuse_replaced_inputs()
        if is_first_process():
            if self.run_folder.acquire():
                notify(
                    f"The run that an interrupted --overwrite had moved aside is restored in {self.folder}."
                )
            self._closing.callback(self._release_folder)
        wanted = self.config.continue_from
        self.past = None if wanted is None else find_past(str(wanted))
        if self.config.overwrite and self.past:
            self._refuse_replaced_past(self.past)
        refuse_other_name(self.folder, self._names())
        self.resumed = find_checkpoint(self.config.ckpt_path, self.folder, self._identity())
        if is_first_process() and not self.config.overwrite:
            refuse_earlier(self.folder, self._identity()["config"], self._resumes_own)

    def _check_gates_alone(self) -> None:
        """Refuse modes where the method trains none."""
        names = self.command.gates if self.command.gates_alone else ()
        for key in (f"gates.{name}.modes" for name in names):
            if self.config[key] != 0:
                raise ConfigurationError(
                    f"Expected {key} to be 0 where the method is gates alone, but got {self.config[key]!r}. "
                    f"Leave it out, or train modes: --method psp --gate {'+'.join(names)}."
                )

    def _check_adding(self) -> None:
        """Refuse a bundle that nothing is added to."""
        config = self.config
        if config.names is not None and config.to is None:
            raise ConfigurationError(
                f"Expected --names together with --to, but got {' '.join(config.names)} alone. Name the bundle "
                "whose tasks they are to be."
            )
        if config.to is not None and config.continue_from is None:
            raise ConfigurationError(
                f"Expected --to together with --continue_from, but got {config.to} alone. Name the run or the bundle "
                "whose tasks come before; bpn-export writes a bundle of a first run."
            )

    def _refuse_replaced_inputs(self) -> None:
        """Refuse inputs of the run that --overwrite would replace."""
        if self.config.ckpt_path == "last":
            raise ConfigurationError(
                "Expected either --overwrite, which starts over, or --ckpt_path last, which "
                "resumes, but got both. Leave one out."
            )
        named = {"ckpt_path": self.config.ckpt_path, **flatten(yaml.safe_load(self.dump()))}
        for key, value in named.items():
            for text in value if isinstance(value, list) else [value]:
                replaced = self.run_folder.replaced(text) if isinstance(text, str) else None
                if replaced is not None:
                    raise ConfigurationError(
                        f"Expected {key} to be a file that --overwrite does not replace, but got {text}, "
                        f"which is {replaced} of the run to be replaced. Copy it to another folder, or "
                        "leave --overwrite out."
                    )

    def _refuse_replaced_past(self, past: PastRun) -> None:
        """Refuse to replace one of the runs that this one continues from."""
        if continues_run(past, self.folder):
            raise ConfigurationError(
                f"Expected --overwrite to replace another run than those that are continued, but got "
                f"{self.folder}. Give this run an --experiment of its own."
            )

    @property
    def checkpoint(self) -> Path | None:
        """The file to resume: the run's own, else that of the run that it continues from."""
        if self.resumed:
            return self.resumed.path
        return self.past.checkpoint if self.past else None

    @property
    def _resumes_own(self) -> bool:
        """Whether the checkpoint resolves to one in this run's folder."""
        there = self.checkpoint and self.checkpoint.resolve().parent
        return there == last_checkpoint(self.folder).parent.resolve()

    def _check_trust(self) -> None:
        """Refuse names and output paths that untrusted files may not use."""
        config, typed = self.config, self.command.trust.typed
        values = [
            *given(config.model, "model", owner=ContinualModule),
            *given(config.data, "data"),
            *given(config.past_data, "past_data"),
        ]
        for key, one in self.command.entries.items():
            if one is not None and one.origin == CLASS_PATH:
                values.append(Given("method", one.load(), one.class_path))
            owner = None if one is None else one.load()
            values += given(config.get(key), key, owner=owner)  # missing if it has no arguments
        flags = list(given(config.trainer, "trainer", owner=Trainer))
        caches = [one for one in values if one.key.endswith(".cache_dir")]
        check_given([*values, *flags], typed)
        check_places([*flags, *caches], self.folder, typed)
        flagged = {word.partition("=")[0] for word in self.command.flags}
        outputs = [Given(key, config[key]) for key in ("runs", "to") if f"--{key}" not in flagged]
        check_places(outputs, Path.cwd())

    def instantiate_classes(self) -> None:
        """Instantiate everything, completing the arguments of loggers; config.yaml keeps the given ones."""
        asked, self.shown_config = self.config, yaml.safe_load(self.dump())
        self.config = asked.clone()
        self.config.trainer.logger = self._loggers()
        super().instantiate_classes()
        self.config = asked
        self.continues = None
        if self.past:
            learned = self.config_init.past_data
            fresh = None if self.resumed else self.model
            past_tasks = self.resumed.adding.get("past_tasks") if self.resumed else None
            self.continues = continue_stream(self.datamodule, self.past, learned, fresh, past_tasks)
            self._dashboard.config["continues"] = dict(self.continues)

    def _loggers(self) -> Any:
        """The loggers' classes and arguments, and our metrics.csv."""
        config = self.config
        names = config.logger or []
        names = names.split(",") if isinstance(names, str) else names
        if config.trainer.logger is False and not names:
            return False
        run = RunName(
            experiment=config.experiment,
            method=method_folder(config.method, config.gate, config.front),
            seed=config.seed_everything,
            runs=Path(config.runs),
            folder=self.folder,
            began_in=first_experiment(self.past) if self.past else None,
        )
        if config.quiet or config.json:
            os.environ.setdefault("WANDB_SILENT", "true")
            os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        saved, step = (self.resumed.loggers, self.resumed.global_step) if self.resumed else ([], 0)
        first = is_first_process()
        specs = complete_loggers(names, config.trainer.logger, run, saved, step, first)
        reason = go_offline(specs)
        if reason:
            notify(
                f"W&B logs offline: {reason}. Upload it later: wandb sync {self.folder / 'wandb'}"
            )
        return specs

    def _names(self) -> dict[str, Any]:
        return run_names(self.config)

    def _identity(self) -> dict[str, Any]:
        """The identity that a run shares with its checkpoints."""
        return {**self._names(), "config": defining(yaml.safe_load(self.dump()))}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer, with our callbacks for files, checkpoints and progress unless disabled."""
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
                    last_checkpoint(self.folder),
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
                    "is renamed once it is on disk. Leave it out; checkpoint_every_n_steps sets the "
                    "interval."
                )
            if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
                plugins.append(AtomicCheckpointIO())
            kwargs["plugins"] = plugins
        if self.config.to is not None:
            had = self.resumed.adding.get("training_state") if self.resumed else None
            callbacks.append(AddToBundle(Path(self.config.to), self.config.names, had))
        if self.config.quiet or self.config.json:
            callbacks = [one for one in callbacks if not isinstance(one, ProgressBar)]
            kwargs["enable_progress_bar"] = False
        elif chosen.enable_progress_bar is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks.append(StreamProgress())
        self._dashboard = Dashboard({**self.shown_config, **self._names()})
        callbacks.append(self._dashboard)
        kwargs["callbacks"] = callbacks
        if chosen.default_root_dir is None:
            kwargs["default_root_dir"] = str(self.folder)
        try:
            trainer: Trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise ConfigurationError(
                "Expected the trainer's flags to be valid on this machine, but Lightning reports: "
                f"{' '.join(str(error).split())}"
            ) from error
        if str(chosen.precision) in ("16", "16-mixed") and trainer.precision != "16-mixed":
            raise ConfigurationError(
                "Expected trainer.precision to be supported by the device, but got 16-mixed, which "
                f"Lightning changes to {trainer.precision} here. Use bf16-mixed, or a GPU."
            )
        check_launch(trainer)
        return trainer

    def prepare_folder(self) -> None:
        """Move an earlier run aside, unless this one resumes it, and write config.yaml."""
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
        """Release the lock of the run's folder."""
        self._closing.close()

    def _release_folder(self) -> None:
        if self.run_folder.release():
            notify(
                f"The run had no checkpoint yet, so the earlier one in {self.folder} is restored."
            )


class _FolderOfRun(Callback):
    """Prepares the folder when training begins.

    Not earlier, so that errors in data, strategies or a checkpoint do not affect an earlier run's results,
    and because a resumed run may not train at all.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare: Callable[[], None] | None = prepare

    def on_train_start(self, *args: Any, **kwargs: Any) -> None:
        """Prepare, once."""
        if self._prepare is not None:
            self._prepare()
            self._prepare = None

    on_fit_end = on_train_start


def _load_streams(command: Command) -> None:
    """Import streams, since short names are resolved among imported classes."""
    for target in DATAMODULES.values():
        import_module(target.partition(":")[0])
    for registered in command.plugins:
        registered.load()
