"""The command ``bpn-export``: export the trained network of a run to files without code."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.cli.trust import decide_trust, named_classes, restrict_imports, words
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.terminal import printable

__all__ = ["main"]


@entry_point("bpn-export", interrupted="Nothing was written.")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0, 2 on a usage error, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    folder = _export(arguments)
    print(printable(folder))
    return 0


def _export(arguments: argparse.Namespace) -> Path:
    run, forget = Path(arguments.run), arguments.forget
    if not run.is_dir():
        raise ConfigurationError(
            f"Expected RUN to be the folder of a run of bpn-fit, but there is none at {run}. Name another."
        )
    described, backbone, mask = _configured(run / "config.yaml", arguments.trust)
    from bpn_lightning.export.exporting import export_module  # slow: imports torch and lightning
    from bpn_lightning.model.module import ContinualModule

    checkpoint = run / "checkpoints" / "last.ckpt"
    module = ContinualModule.load_from_checkpoint(
        checkpoint, map_location="cpu", backbone=backbone, mask=mask
    )
    odd = [one for one in forget if not 1 <= one <= module.closed + 1 or forget.count(one) > 1]
    if odd:
        raise ConfigurationError(
            f"Expected --forget to be numbers of tasks that the run has learned, from 1 to "
            f"{module.closed + 1}, each once, but got {odd[0]}."
        )
    for number in forget:
        for line in module.forget(number - 1):
            note = printable(f"task {number} is forgotten, but for {line}")
            print(f"bpn-export: {note}", file=sys.stderr)
    folder = export_module(
        module,
        Path(arguments.to),
        include_pretrained=arguments.include_pretrained,
        names=arguments.names,
        network=described,
        training_state=arguments.training_state,
    )
    formats = [name for name in _FORMATS if getattr(arguments, name)]
    if formats:
        from bpn_lightning.modes import load
        from bpn_lightning.modes.changing import changing
        from bpn_lightning.modes.exporters import WRITERS

        # What the run's config names was trusted above.
        try:
            with changing(folder):
                net = load(folder, trust=["weights", "weights_file", *words(described)])
                for name in formats:
                    WRITERS[name](net, folder / name)
        except BaseException:  # all that was asked for, or nothing
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


#: Of ``modes.exporters.WRITERS``, with what they write.
_FORMATS = {
    "onnx": "onnx/mixed.onnx, with a task for each sample, and, where tasks have biases alone, onnx/base.onnx with "
    "an adapter of ONNX Runtime for each task; where a batch can only have one task, a network for each",
    "peft": "peft/, a BEFT adapter for each task, where tasks have biases of linear layers alone",
    "state_dict": "state_dict/, the weights of a plain network for each task",
    "torch_export": "torch_export/mixed.pt2, a program of torch.export with a task for each sample; where a batch can "
    "only have one task, a program for each",
}


def _configured(path: Path, trust: bool) -> tuple[Any, Any, Any]:
    """The backbone's description, the backbone and the mask from a run's config.yaml."""
    model = read_yaml(path).get("model")
    if not isinstance(model, dict) or not {"backbone", "mask"} <= model.keys():
        raise ConfigurationError(
            f"Expected {path} to be the config.yaml of a run, with model.backbone and model.mask, but "
            f"got {model!r:.80}. Name the folder of a run."
        )
    named = list(named_classes(path.name, {"model": {"backbone": model["backbone"]}}))
    trusted = decide_trust(named, in_files=words(model["backbone"]), everything=trust)

    from jsonargparse import ArgumentError, ArgumentParser
    from torch import nn

    from bpn_lightning.cli.allowed import canonical_names, check_given, given
    from bpn_lightning.cli.building import building_error
    from bpn_lightning.cli.messages import explain

    restrict_imports(trusted, canonical_names())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=nn.Module)
    try:
        parsed = parser.parse_object({"backbone": model["backbone"]})
        if not trust:
            check_given(given(parsed.backbone, "model.backbone"))
    except ConfigurationError:
        raise
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(explain(str(error), parser)) from error
    described = parsed.backbone.as_dict() if hasattr(parsed.backbone, "as_dict") else None
    try:
        return described, parser.instantiate(parsed).backbone, model["mask"]
    except Exception as error:  # a class may raise any exception here
        raise building_error(error, parsed, "model.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bpn-export",
        description="Export the trained network of a run to a new folder without code, with one small folder "
        "for each task; bpn_lightning.modes.load and bpn_lightning.load_exported read it.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run of bpn-fit")
    parser.add_argument(
        "--to",
        metavar="DIR",
        required=True,
        help="the folder to write; it must not exist yet",
    )
    parser.add_argument(
        "--names",
        metavar="NAME",
        nargs="+",
        help="names of the tasks that are exported, in order; by default task_1 and so on",
    )
    parser.add_argument(
        "--forget",
        metavar="TASK",
        type=int,
        nargs="+",
        default=[],
        help="numbers of tasks, from 1, whose mode, rows of the head and statistics of gates are left "
        "out; prints what of them cannot be taken out",
    )
    parser.add_argument(
        "--include_pretrained",
        action="store_true",
        help="write pretrained weights whose license is not known, too, instead of naming their package and "
        "hash",
    )
    parser.add_argument(
        "--training_state",
        action="store_true",
        help="also write what any method continues from (bpn-fit --continue_from DIR): importances, memories "
        "with samples of the training data, teachers, the optimizer",
    )
    for name, help in _FORMATS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"also write {help}")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import and instantiate any class that the run's config names as its backbone",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
