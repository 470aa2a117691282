"""The command ``bpn-report``; what can be refused is refused before anything is read."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.errors import ConfigurationError, ResultsError
from bpn_lightning.files.untrusted import open_untrusted
from bpn_lightning.files.writing import write_atomically
from bpn_lightning.terminal import printable

__all__ = ["main"]

HELP = """\
usage: bpn-report RUN_OR_FOLDER [--out FILE] [--reference METHOD]

Show a run, or all runs below a folder, as one HTML page that a browser opens from disk.

  bpn-report runs/digits_inc/bd+ewc/seed_0      one run
  bpn-report runs                               all runs: methods compared over seeds
  bpn-report runs/bench/digits --reference ewc  each method tested against one
  bpn-report docs/results/digits                what bpn-bench keeps of a grid

  RUN_OR_FOLDER       the folder of a run, one above runs, or one with cells.json
  --out FILE          the page (default: report.html in that folder)
  --reference METHOD  compare each other method with this one, instead of the pairs that the grid
                      names or all pairs

  --help
  --version
"""

_PAGE = b"<!DOCTYPE html>"  # how every page begins


@entry_point("bpn-report", interrupted="No page was written.")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0, 2 on a usage error, 130 after Ctrl-C.
    """
    if argv in ([], ["--help"], ["-h"]):
        print(HELP, end="")
    elif argv == ["--version"]:
        print(f"bpn-report {_version()}")
    else:
        print(printable(_report(_parse(argv))))
    return 0


def _report(options: argparse.Namespace) -> Path:
    """Read, compare, write; the path of the page."""
    # a second, for scipy
    from bpn_lightning.analysis.comparison import compare
    from bpn_lightning.report.page import render
    from bpn_lightning.report.reading import find_runs

    folder = Path(options.folder)
    home = folder if folder.is_dir() else folder.parent
    path = Path(options.out) if options.out else home / "report.html"
    _check_out(path)
    found = find_runs(folder)
    page = render(found, compare(found.runs, found.compare, options.reference), _version())
    try:
        write_atomically(path, page)
    except OSError as error:
        raise ResultsError(
            f"Expected --out to be a file that can be written, but got {path}: {error}. Name one in "
            "a folder that exists, with write access."
        ) from error
    for problem in found.problems:
        line = f"{problem.where}: {problem.state}. {problem.why}"
        print(f"bpn-report: {printable(line)}", file=sys.stderr)
    return path


def _check_out(path: Path) -> None:
    """Refuse to put a page in the place of something else, such as a run's results."""
    if not path.exists():
        return
    is_page = False
    if path.is_file():
        try:
            with open_untrusted(path, max_bytes=None) as file:
                is_page = file.read(len(_PAGE)) == _PAGE
        except OSError:
            return  # which writing it will say
    if not is_page:
        raise ResultsError(
            f"Expected --out to be a new file or an earlier page, but got {path}, which is something "
            "else. Name another file."
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bpn-report", add_help=False, allow_abbrev=False)
    parser.exit_on_error = False
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--out")
    parser.add_argument("--reference")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"{error}. `bpn-report --help` shows how it is called.") from error
    if rest or options.folder is None:
        raise ConfigurationError(
            "Expected one RUN_OR_FOLDER and the options of `bpn-report --help`, but got "
            f"{rest[0] if rest else 'no folder'!r}."
        )
    return options


def _version() -> str:
    from importlib.metadata import version

    return version("bpn_lightning")


if __name__ == "__main__":
    sys.exit(main())
