"""The command ``bpn-fit``: everything that does not need torch; the rest is :mod:`bpn_lightning.cli.train`."""

import os
import sys
from collections.abc import Sequence

from bpn_lightning import registry
from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.config_files import methods_of, packaged_configs
from bpn_lightning.cli.entry_point import INTERRUPTED, USAGE_ERROR, entry_point
from bpn_lightning.cli.past import find_past
from bpn_lightning.errors import BPNLightningError, ConfigurationError, ProcessesError

__all__ = ["main"]

HELP = """\
usage: bpn-fit --config NAME [--config NAME ...] [--method METHOD] [--KEY VALUE ...]

Train a method over a stream of tasks, in one Lightning fit.

  bpn-fit --config digits_inc.yaml                       under a minute, no download
  bpn-fit --config cifar100_inc.yaml --method ewc        another method
  bpn-fit --config digits_inc.yaml --strategies.bd.epsilon 0.1 --trainer.accelerator cpu
  bpn-fit --config digits_inc.yaml --ckpt_path last      resume an interrupted run
  bpn-fit --config next.yaml --continue_from runs/digits_inc/bd+ewc/seed_0      learn new tasks

  --config NAME       a file, or a packaged experiment; later ones override earlier ones
  --method METHOD     strategies joined by +, or a method with tuned values of the experiment;
                      your own class by its import path, such as bd+my_lab.replay.Replay
  --gate NAMES        gates that name the task of an input, joined by +, such as slda+ppca
  --front NAME        a fixed feature extractor before network and gates, such as patches
  --seed_everything N the run's seed; part of the path of its results
  --ckpt_path PATH    resume a checkpoint; `last` is the run's own, if there is one
  --continue_from RUN continue from a finished run with new tasks, those of the stream given here
  --past_data         with it: also measure accuracies on the learned tasks, whose data are read again
  --to BUNDLE         with it: add each new task to a bundle, while it is served too; --names names them
  --tuned FILE        the best values of a search, as `bpn-bench tune` has recorded them in its tuning.json
  --runs DIR          where results go: DIR/<experiment>/<method>/seed_<n>/   (default: runs)
  --trust             let configs name any class or function, and run its code (docs/safety.md)
  --overwrite         replace the results of an earlier run
  --logger NAME       also log to wandb, tensorboard, csv or mlflow, or to several: wandb,tensorboard
  --quiet, --json     print nothing, or only the run's results.json, on standard output
  --trainer.FLAG, --model.ARGUMENT, --data.init_args.ARGUMENT, --strategies.NAME.ARGUMENT,
  --gates.NAME.ARGUMENT, --fronts.NAME.ARGUMENT
                      any flag of the Trainer, the module, the stream, the strategies, the gates
                      and the front

  --new FILE --data PATH
                      write a commented config for a folder with {train,test}/<class>/ or an .npz
                      archive, and exit
  --list              list configs, methods, strategies, streams, gates and fronts, including plugins
  --list RUN          list the tasks that a run has learned, by its folder, its checkpoint or an export
  --print_config      print the resolved configuration, and exit
  --data.help CLASS, --model.backbone.help CLASS, --model.optimizer.help CLASS
                      the arguments of a class
  --help, --help_all  this text; every option
  --version
"""

#: Errors that are the same in every process.
SAID_ONCE = (ConfigurationError, ProcessesError)


@entry_point("bpn-fit")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0, 2 on a usage error, 130 after Ctrl-C, 143 after SIGTERM; a bug keeps its
        traceback.
    """
    try:
        if argv in ([], ["--help"], ["-h"]):
            print(HELP, end="")
        elif argv == ["--version"]:
            print(f"bpn-fit {_version()}")
        elif argv == ["--list"]:
            print(_list())
        elif argv[0] == "--list" and len(argv) == 2:
            print(_list_tasks(argv[1]))
        elif "--new" in argv:
            print(_new(argv))
        elif argv == ["--help_all"]:
            return _fit([*argv, "--method", "bd+ewc"])  # to include the options of a method
        else:
            return _fit(argv)
    except BPNLightningError as error:
        process = _later_process()
        if not process:
            raise
        if not isinstance(error, SAID_ONCE):
            print(f"bpn-fit: error in process {process}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:  # before or after training
        if not _later_process():
            raise
        return INTERRUPTED
    return 0


def _later_process() -> str:
    """The rank of this process, in words; empty for the first.

    torchrun and SLURM set global ranks; Lightning sets local ranks and node ranks.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name].lstrip("0")
    here, machine = (os.environ.get(name, "0") for name in ("LOCAL_RANK", "NODE_RANK"))
    return here.lstrip("0") if machine == "0" else f"{here} of machine {machine}"


def _fit(argv: Sequence[str]) -> int:
    read = read_command(argv)
    from bpn_lightning.cli.train import fit  # slow: imports torch and lightning

    return fit(read)


def _list_tasks(run: str) -> str:
    past = find_past(run, "--list")
    from bpn_lightning.cli.continuing import list_tasks  # slow: imports torch

    return list_tasks(past)


def _new(argv: Sequence[str]) -> str:
    from bpn_lightning.cli.own_data import new_config  # slow: imports torch

    return new_config(argv)


def _version() -> str:
    from importlib.metadata import version

    return version("bpn_lightning")


def _list() -> str:
    lines = ["configs, and their methods with tuned values"]
    configs = packaged_configs()
    for config in configs:
        methods = methods_of(config.removesuffix(".yaml"))
        lines.append(f"  {config:<20} {', '.join(methods)}")
    for kind, title in (
        ("strategy", "strategies, joined by + in --method"),
        ("stream", "streams, for data.class_path"),
        ("gate", "gates, joined by + in --gate"),
        ("front", "fronts, for --front"),
    ):
        lines += ["", title]
        for entry in registry.registered(kind).values():
            lines.append(f"  {entry.name:<20} {entry.class_path}  ({entry.origin})")
            problem = entry.problem()
            if problem is not None:
                lines.append(f"    not usable: {problem}")
        if kind == "strategy":
            lines += [
                f"  {alias:<20} {name} with {_arguments(arguments)}"
                for alias, (name, arguments) in registry.ALIASES.items()
            ]
    return "\n".join(lines)


def _arguments(arguments: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())


if __name__ == "__main__":
    sys.exit(main())
