"""The options of ``bpn-fit``: its parser and arguments, with errors in one line."""

from argparse import ArgumentError
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from bpn_lightning.cli.building import building_error, own_error
from bpn_lightning.cli.command import Command
from bpn_lightning.cli.interpolations import check_interpolations
from bpn_lightning.cli.messages import explain, shorten_help
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import BPNLightningError, ConfigurationError
from bpn_lightning.run.recording import Intervals
from bpn_lightning.strategies.base import ContinualStrategy

__all__ = ["FitParser", "add_options", "parse_options"]


class FitParser(LightningArgumentParser):
    """Lightning's parser, with a readable help text, and without reading files."""

    whole = False
    """Whether this parser is for a complete configuration rather than for the arguments of a class."""

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> None:
        """Never interpret a value as the name of a file with values."""
        super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """YAML from which interpolations are resolved, within limits."""
        text: str = super().dump(*args, **kwargs)
        if self.whole and "${" in text:
            check_interpolations(yaml.safe_load(text))
        return text

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text without the long list of modules for a backbone."""
        return shorten_help(super().format_help(*args, **kwargs))

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Replace the name that Lightning 2.6 calls and jsonargparse has deprecated."""
        try:
            return self.instantiate(cfg, **kwargs)
        except BPNLightningError:
            raise
        except Exception as error:  # a class may raise any exception here
            raise building_error(error, cfg) from error


def add_options(parser: LightningArgumentParser, command: Command) -> None:
    """Add the options that are not arguments of the trainer, the module or the stream.

    These are the method, its strategies, checkpoints, loggers, and the location of the outputs.

    Args:
        parser: the parser of the complete configuration.
        command: each argument of its strategies, gates and front becomes an option.
    """
    parser.add_argument(
        "--experiment",
        type=str,
        default=command.experiment,
        help="Name of the results folder; by default the first config's file name.",
    )
    parser.add_argument(
        "--method",
        type=str,
        default=command.method,
        help="Strategies joined by '+' (your own class by its import path), a method with tuned values of "
        "the experiment, or gates joined by '+', which learn alone: no network is trained.",
    )
    parser.add_argument(
        "--gate",
        type=str | None,
        default=None,
        help="Gates that name the task of an input, joined by '+'; `bpn-fit --list` lists them.",
    )
    parser.add_argument(
        "--front",
        type=str | None,
        default=None,
        help="A fixed feature extractor before network and gates; `bpn-fit --list` lists them.",
    )
    parser.add_argument(
        "--runs",
        type=str,
        default="runs",
        help="Results go to <runs>/<experiment>/<method>/seed_<n>/, with gate and front after the method.",
    )
    parser.add_argument(
        "--overwrite",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Replace an earlier run in that folder.",
    )
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="Resume this checkpoint; 'last' is the run's own, if there is one.",
    )
    parser.add_argument(
        "--continue_from",
        type=str | None,
        default=None,
        help="Continue from a finished run, by its folder, its checkpoint or an export, with the tasks of this stream.",
    )
    parser.add_argument(
        "--past_data",
        type=list[ContinualDataModule] | None,
        default=None,
        help="The streams that were learned, the oldest first, to measure accuracies on their tasks; the "
        "flag alone takes them from the runs' config.yaml.",
    )
    parser.add_argument(
        "--to",
        type=str | None,
        default=None,
        help="A bundle, which may be served, to which each task is added when it is learned and evaluated; with "
        "--continue_from and frozen shared weights.",
    )
    parser.add_argument(
        "--names",
        type=str,
        nargs="+",
        default=None,
        help="With --to: names of the new tasks in the bundle, in order; by default task_4 and so on.",
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
            help=f"{what}; null: disabled.",
        )
    parser.add_argument(
        "--logger",
        type=list[str] | str | None,
        default=None,
        help="Also log to wandb, tensorboard, csv or mlflow, or to several: wandb,tensorboard. For other "
        "loggers use --trainer.logger.",
    )
    for flag, text in {
        "log_artifacts": "Also upload results and the last checkpoint to W&B or MLflow.",
        "quiet": "Print only errors and warnings.",
        "json": "Print only results.json.",
    }.items():
        parser.add_argument(f"--{flag}", type=bool, nargs="?", const=True, default=False, help=text)
    for key, registered in command.entries.items():
        if registered is None:
            parser.add_lightning_class_args(ContinualStrategy, key, subclass_mode=True)
        elif registered.kind == "front":  # an argument of the module and not a callback
            parser.add_class_arguments(registered.load(), key, sub_configs=False)
            parser.link_arguments(key, "model.front", apply_on="instantiate")
        else:
            parser.add_lightning_class_args(registered.load(), key)
    parser.add_argument("--help_all", action="help", help="Show this text.")


def parse_options(parser: LightningArgumentParser, args: Any) -> Namespace:
    """The configuration that a command line describes.

    Raises:
        ConfigurationError: a one-line description of the problem.
    """
    assert isinstance(parser, FitParser)
    parser.whole = True
    try:
        config: Namespace = parser.parse_args(args)
    except ArgumentError as error:
        wrong = own_error(error) or ConfigurationError(explain(str(error), parser))
        raise wrong from error
    except OmegaConfBaseException as error:
        key = f" in {error.full_key}" if getattr(error, "full_key", None) else ""
        raise ConfigurationError(
            f"Expected every ${{...}} to name another key, but got an error{key}: "
            f"{str(error).splitlines()[0]}. `--print_config` shows all keys."
        ) from error
    seed = config.seed_everything
    if not 0 <= seed < 2**32:
        raise ConfigurationError(
            f"Expected seed_everything to be a whole number from 0 to {2**32 - 1}, but got {seed}. "
            "0 is the default."
        )
    return config
