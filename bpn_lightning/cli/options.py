"""The options of ``bpn-fit``: its parser, its own arguments, and one line on what is wrong with them."""

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
from bpn_lightning.errors import BPNLightningError, ConfigurationError
from bpn_lightning.run.recording import Intervals
from bpn_lightning.strategies.base import ContinualStrategy

__all__ = ["FitParser", "add_options", "parse_options"]


class FitParser(LightningArgumentParser):
    """Lightning's parser, with a help that can be read, reading no files."""

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

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """What Lightning 2.6 calls by a name that jsonargparse has deprecated."""
        try:
            return self.instantiate(cfg, **kwargs)
        except BPNLightningError:
            raise
        except Exception as error:  # classes raise whatever their arguments lead to
            raise building_error(error, cfg) from error


def add_options(parser: LightningArgumentParser, command: Command) -> None:
    """Add what is no argument of the trainer, the module or the stream.

    The method, its strategies, checkpoints, loggers, and where the run is written.

    Args:
        parser: of the whole configuration.
        command: whose strategies get an option for each of their arguments.
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
        parser.add_argument(f"--{flag}", type=bool, nargs="?", const=True, default=False, help=text)
    for name, registered in command.strategies.items():
        key = f"strategies.{name}"
        if registered is None:
            parser.add_lightning_class_args(ContinualStrategy, key, subclass_mode=True)
        else:
            parser.add_lightning_class_args(registered.load(), key)
    parser.add_argument("--help_all", action="help", help="Show this text.")


def parse_options(parser: LightningArgumentParser, args: Any) -> Namespace:
    """The configuration that a command line describes.

    Raises:
        ConfigurationError: in one line, what is wrong with it.
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
            f"{str(error).splitlines()[0]}. `--print_config` shows the keys."
        ) from error
    seed = config.seed_everything
    if not 0 <= seed < 2**32:
        raise ConfigurationError(
            f"Expected seed_everything to be a whole number from 0 to {2**32 - 1}, but got {seed}. "
            "0 is the default."
        )
    return config
