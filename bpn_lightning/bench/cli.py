"""The command ``bpn-bench``; what needs no torch is answered before it is imported."""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from bpn_lightning.bench.grid import Grid, check_key, only, packaged_grids, read_grid
from bpn_lightning.bench.runner import Executor, Runner, on_this_machine
from bpn_lightning.cli.entry_point import entry_point
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.terminal import printable

__all__ = ["main"]

HELP = """\
usage: bpn-bench GRID [--jobs N] [--executor ray] [--retry] [--only WORD ...] [--runs DIR] [--out DIR]
                 [--KEY VALUE ...]
       bpn-bench collect GRID [--runs DIR] [--out DIR] [--add]
       bpn-bench report DIR
       bpn-bench tune SEARCH [--jobs N] [--runs DIR] [--KEY VALUE ...]

Run a grid of experiments, methods and seeds, and make its tables and pictures.

  bpn-bench digits.yaml                   every method on the digits; no download
  bpn-bench incremental.yaml --data.init_args.root DIR --jobs 8
  bpn-bench permuted.yaml --only bd+psp psp seed_0
  bpn-bench report docs/results           all tables and pictures again, without training
  bpn-bench tune digits_inc_gd.yaml       search a method's values, on held-out samples of another stream

  GRID            a YAML, or a packaged grid
  --jobs N        runs at a time, one thread each (default: 2)
  --executor X    `local`: on this machine (default); `ray`: on a Ray cluster that shares --runs
  --address A     of the cluster, `auto` on one of its nodes (default: $RAY_ADDRESS, else a Ray of
                  its own on this machine)
  --gpus N        of a cell on the cluster (default: 0)
  --retry         run again what failed; without it, failed runs are reported and left alone
  --only WORD     experiments, methods, seeds (seed_0) and varied values (rank=10)
  --runs DIR      where the runs go; those finished there are not repeated (default: runs/bench/<grid>)
  --out DIR       where cells.json, tables and pictures go (default: <runs>/report)
  --add           keep the rows of the cells.json that is there, whose runs may be gone
  --KEY VALUE     goes to every `bpn-fit`; --trust lets them import what the grid and its configs name

  --list          the packaged grids and searches
  --help
"""

FAILED = 1


@entry_point("bpn-bench", interrupted="The same command continues from there.")
def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0, 1 where runs failed, 2 on a usage error, 130 after Ctrl-C.
    """
    if argv in ([], ["--help"], ["-h"]):
        print(HELP, end="")
        return 0
    if argv == ["--list"]:
        from bpn_lightning.bench.tuning import packaged_tunings

        print("\n".join([*packaged_grids(), *packaged_tunings()]))
        return 0
    commands = {"report": _report, "collect": _collect, "tune": _tune}
    return commands[argv[0]](argv[1:]) if argv[0] in commands else _run(argv)


def _run(argv: Sequence[str]) -> int:
    options, passed_on = _parse(argv, known_only=False)
    grid = read_grid(options.grid, passed_on)
    cells = only(grid.cells, options.only) if options.only else list(grid.cells)
    root = Path(options.runs or Path("runs", "bench", grid.name))
    if options.out and Path(options.out).is_dir():
        from bpn_lightning.bench.collect import check_kept

        check_kept(grid.name, None, Path(options.out))
    with _executor(options, root) as executor:
        # Ends the runs as Ctrl-C does; Ray has a handler of its own.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            runner = Runner(root, options.jobs, options.retry, passed_on, executor=executor)
            failures = runner.run(cells)
        finally:
            signal.signal(signal.SIGTERM, before)
    _finish(grid, root, options.out, options.add)
    for failure in failures:
        print(f"\nbpn-bench: {printable(failure)}", file=sys.stderr)
    return FAILED if failures else 0


def _tune(argv: Sequence[str]) -> int:
    from bpn_lightning.bench.tuning import read_tuning_file

    options, passed_on = _parse(argv, known_only=False)
    unused = {"--only": options.only, "--out": options.out, "--add": options.add}
    for name, value in {**unused, "--retry": options.retry}.items():
        if value:
            raise ConfigurationError(
                f"Expected {name} to be left out of bpn-bench tune, but got it. A search lies below --runs as a whole; what failed "
                "runs again once tuning.json is removed."
            )
    tuning = read_tuning_file(options.grid, passed_on)
    root = Path(options.runs or Path("runs", "tune", tuning.name))
    from bpn_lightning.bench.tune import RECORD, tune

    with _executor(options, root) as executor:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            record, failures = tune(tuning, root, options.jobs, passed_on, executor)
        finally:
            signal.signal(signal.SIGTERM, before)
    for trial in record["trials"]:
        value = trial["state"] if trial["value"] is None else f"{trial['value']:.4f}"
        print(printable(f"trial {trial['number']:3d}  {value:>8}  {_settings(trial['values'])}"))
    for failure in failures:
        print(f"\nbpn-bench: {printable(failure)}", file=sys.stderr)
    if record["best"] is None:
        return FAILED
    print(printable(f"best: {_settings(record['best']['values'])}"))
    use = f"bpn-fit --config {tuning.config} --method {tuning.method} --tuned {root / RECORD}"
    print(f"bpn-bench: {printable(use)}", file=sys.stderr)
    return 0


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _executor(options: argparse.Namespace, root: Path) -> AbstractContextManager[Executor]:
    if options.executor == "local":
        from bpn_lightning.bench.warm import WarmProcesses

        # Elsewhere a process that has loaded torch's libraries cannot be forked safely.
        return WarmProcesses() if sys.platform == "linux" else nullcontext(on_this_machine)
    from bpn_lightning.bench.ray_executor import on_ray

    return on_ray(root, options.address, options.gpus)


def _collect(argv: Sequence[str]) -> int:
    options, _ = _parse(argv, known_only=True)
    grid = read_grid(options.grid, ["--trust"])  # nothing is imported to collect
    root = Path(options.runs or Path("runs", "bench", grid.name))
    _finish(grid, root, options.out, options.add)
    return 0


def _finish(grid: Grid, root: Path, out: str | None, add: bool) -> None:
    """Keep what is finished, make the report, and print its tables."""
    from bpn_lightning.analysis.collection import write_collection
    from bpn_lightning.bench.collect import add_to_kept, check_kept, collect
    from bpn_lightning.bench.report import REPORT, write_report

    folder = Path(out) if out else root / "report"
    collection = collect(grid, root)
    if add:
        collection = add_to_kept(collection, grid.cells, folder)
    if out:  # beside its runs it can be made again
        check_kept(grid.name, collection.records, folder)
    write_collection(collection, folder)
    for artifact in write_report(collection, folder):
        print(f"{printable(artifact.markdown())}\n")
    print(f"bpn-bench: {printable(folder / REPORT)}", file=sys.stderr)


def _report(argv: Sequence[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ConfigurationError(
            f"Expected report to be followed by one folder, but got {' '.join(argv) or 'nothing'}. "
            "Name one that has a cells.json, or folders with one."
        )
    from bpn_lightning.bench.report import report_all

    for path in report_all(Path(argv[0])):
        print(printable(path))
    return 0


def _parse(argv: Sequence[str], known_only: bool) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="bpn-bench", add_help=False, allow_abbrev=False)
    parser.exit_on_error = False
    parser.add_argument("grid")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--address")
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--runs")
    parser.add_argument("--out")
    parser.add_argument("--add", action="store_true")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"{error}. `bpn-bench --help` shows how it is called.") from error
    if options.jobs < 1:
        raise ConfigurationError(
            f"Expected --jobs to be at least 1, but got {options.jobs}. Leave it out for 2."
        )
    if options.executor == "local" and (options.address or options.gpus):
        raise ConfigurationError(
            "Expected --address and --gpus to be given with --executor ray, but it is local. "
            "Add --executor ray, or leave them out."
        )
    if options.gpus < 0:
        raise ConfigurationError(
            f"Expected --gpus to be at least 0, but got {options.gpus:g}. Leave it out for none."
        )
    if rest and (known_only or not rest[0].startswith("--")):
        raise ConfigurationError(
            f"Expected the options of `bpn-bench --help`, but got {rest[0]!r}."
        )
    for word in rest:
        key = word[2:].partition("=")[0]
        if word.startswith("--") and key != "trust":  # which no grid may say
            check_key(key, "the options")
    return options, rest


if __name__ == "__main__":
    sys.exit(main())
