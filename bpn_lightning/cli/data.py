"""The command ``bpn-data``: whether a data set can be used, one's own or the image sets of the paper."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.datamodules.image_sets import IMAGE_SETS, ImageSet, make_image_set
from bpn_lightning.errors import ConfigurationError, DataError
from bpn_lightning.terminal import printable

__all__ = ["SetReport", "check_set", "main"]

NOT_COMPLETE = 1

_MOST_NAMED = 5  # damaged images that are listed


@dataclass
class SetReport:
    """The status of one image set.

    Args:
        image_set: the set.
        state: ``absent``, ``incomplete`` or ``complete``.
        numbers: of classes, training images and test images, if they could be read.
        faults: problems, one sentence each.
    """

    image_set: ImageSet
    state: str
    numbers: tuple[int, int, int] | None = None
    faults: list[str] = field(default_factory=list)


def check_set(image_set: ImageSet, open_images: bool = False) -> SetReport:
    """Check one set: its folder, lists, files and numbers.

    Args:
        image_set: the set, with its location and options.
        open_images: also decode every image, which takes minutes.
    """
    if not image_set.is_present:
        place = image_set.root / image_set.folders[0]
        faults = [f"{place} has to hold {image_set.required_files}.", image_set.download_hint]
        return SetReport(image_set, "absent", faults=faults)
    try:
        listing = image_set.checked(expect_counts=False)
    except DataError as error:
        return SetReport(image_set, "incomplete", faults=[str(error)])
    numbers = (len(listing.class_names), len(listing.train), len(listing.test))
    faults = [f"Expected {fault}." for fault in image_set.count_faults(listing)]
    if open_images:
        faults += _damaged(image_set, [*listing.train, *listing.test])
    if faults:
        faults.append(image_set.download_hint)
    return SetReport(image_set, "incomplete" if faults else "complete", numbers, faults)


def _damaged(image_set: ImageSet, entries: Sequence[Any]) -> list[str]:
    faults = []
    for entry in entries:
        try:
            with image_set.open(entry):
                pass
        # Pillow may raise any exception here.
        except Exception as error:  # noqa: BLE001
            faults.append(f"{entry.path} is damaged: {type(error).__name__}: {error}.")
    if len(faults) > _MOST_NAMED:
        faults[_MOST_NAMED:] = [f"{len(faults) - _MOST_NAMED:,} more images are damaged."]
    return faults


@entry_point("bpn-data")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0 if all data can be used, 1 if not, 2 on a usage error, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    root = Path(arguments.root).expanduser().absolute()
    try:
        own = root.is_file() or any((root / part).is_dir() for part in ("train", "test"))
    except OSError as error:
        raise DataError(
            f"Expected {root} to be readable, but got {type(error).__name__}: {error}. Check its permissions."
        ) from error
    if own:
        return _check_own(root)
    if not root.is_dir():
        raise ConfigurationError(
            f"Expected PATH to be a data set or the folder of data sets, but there is no folder or file {root}. "
            "Create it, or name another one."
        )
    options = _options(arguments.option)
    names = arguments.sets.split(",") if arguments.sets else list(IMAGE_SETS)
    sets = [make_image_set(name.strip(), root, options.pop(name, None)) for name in names]
    if options:
        raise ConfigurationError(
            f"Expected options of {', '.join(names)}, but got one of {next(iter(options))!r}. Add "
            "it to --sets, or leave its options out."
        )
    print(f"{'set':<10}{'state':<12}{'classes':>8}{'train':>9}{'test':>9}   in the paper")
    reports: list[SetReport] = []
    for image_set in sets:
        reports.append(check_set(image_set, arguments.images))
        print(_line(reports[-1]), flush=True)
    for report in reports:
        if report.faults:
            print(f"\n{report.image_set.title} ({report.state})")
            print("\n".join(f"  {printable(fault)}" for fault in report.faults))
    missing = sum(report.state != "complete" for report in reports)
    print(f"\n{len(reports) - missing} of {len(reports)} sets are complete in {printable(root)}.")
    return NOT_COMPLETE if missing else 0


def _check_own(source: Path) -> int:
    """A data set of one's own."""
    from bpn_lightning.cli.own_data import describe, faults_of  # slow: imports torch
    from bpn_lightning.datamodules.survey import survey

    found = survey(source)
    print(printable("\n".join(describe(found))))
    faults = faults_of(found)
    if faults:
        print(f"\nNot usable as it is ({len(faults):,}):")
        print("\n".join(f"  {printable(fault)}" for fault in faults))
        return NOT_COMPLETE
    print(
        f"Next: bpn-fit --new {printable(source.stem)}.yaml --data {printable(shlex.quote(str(source)))}"
    )
    return 0


def _line(report: SetReport) -> str:
    classes, train, test = report.numbers or ("-", "-", "-")
    numbers = [f"{n:,}" if isinstance(n, int) else n for n in (classes, train, test)]
    line = f"{report.image_set.name:<10}{report.state:<12}{numbers[0]:>8}{numbers[1]:>9}"
    line += f"{numbers[2]:>9}   {report.image_set.paper_counts}"
    published = report.image_set.counts
    if report.state == "complete" and published == (None, None, None):
        line += " (no published number to compare with)"
    return line


def _options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``set.option=value`` by set; values as in YAML."""
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        place, equals, value = text.partition("=")
        name, dot, option = place.partition(".")
        if not equals or not dot:
            raise ConfigurationError(
                f"Expected --option to be SET.OPTION=VALUE, but got {text!r}. For example "
                "--option aircraft.level=variant."
            )
        try:
            options.setdefault(name, {})[option] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"Expected --option {place} to be a value as in YAML, but got {value!r}. Write it as in "
                "a config, such as true or 0.2."
            ) from error
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bpn-data",
        description="Data sets: your own, and the image sets of the eight-data-set sequence.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="say whether a data set can be used, or which of the eight are complete",
        description="Of a folder with {train,test}/<class>/ or an .npz archive: its classes, sizes, the stream "
        "that it is, and every file that cannot be used. Of another folder: which of the eight data sets are in "
        "it, and where to download the others. Exits with 0 if everything can be used, with 1 if not.",
    )
    check.add_argument("root", metavar="PATH", help="the data set, or the folder of data sets")
    check.add_argument("--sets", metavar="A,B", help=f"only these; all are {','.join(IMAGE_SETS)}")
    check.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="SET.OPTION=VALUE",
        help="an option of a set, such as aircraft.level=variant",
    )
    check.add_argument("--images", action="store_true", help="also decode every image (minutes)")
    return parser
