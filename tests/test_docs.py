"""What the README and the pages show is what happens: every block of code and every command runs.

A page is one test. Its blocks run in order, in an empty folder: Python blocks in one namespace, those
that begin with ``# name.py`` as that module, and in shell blocks every line that begins with one of our
commands. A comment above a block says what is done instead, and why::

    <!-- test: with --fronts.random.features 100; to be quick -->
    <!-- test: parsed; MNIST is not at hand -->

Runs of the digits learn one epoch of each task in place of 30.

A command that names DIR, somebody's folder of data sets, is only parsed: all of its arguments are
checked, and nothing is trained. So are bpn-report, bpn-predict, bpn-bundle and bpn-serve, bpn-export of runs that the page has not made, and every
grid and search. `--new` writes its config for a DIR that is made here.

A command that names a class of one's own is a process of its own, as it is for its reader: in here, the
tests' own ``sys.path`` would find what a console script does not.
"""

import configparser
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import run_script
from markdown_it import MarkdownIt
from PIL import Image

import bpn_lightning.report.cli as html_report
from bpn_lightning.bench.cli import _parse
from bpn_lightning.bench.grid import only, read_grid
from bpn_lightning.bench.tuning import read_tuning_file
from bpn_lightning.cli import export as export_command
from bpn_lightning.cli.config_files import CONFIGS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
)
SETUP = configparser.RawConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
SCRIPTS = SETUP["options.entry_points"]["console_scripts"].strip().split("\n")
COMMANDS = {
    name: EntryPoint(name, value, "console_scripts")
    for name, value in (line.split(" = ") for line in SCRIPTS)
}
MARKER = re.compile(
    r"<!--\s*test:\s*(?P<what>with|parsed)(?P<flags>[^;]*);\s*(?P<why>.+?)\s*-->", re.DOTALL
)
SETS_ARE_MISSING = 1  # what `bpn-data check` says of an empty folder

QUICK = ("--data.init_args.epochs_per_task", "1")  # for a run of the digits

SHOWS = {
    "--list",
    "--new",
    "--help",
    "--help_all",
    "--print_config",
    "--version",
}  # and trains nothing

#: What has to hold after a page's Python blocks.
CHECKS = {
    "README.md": lambda names: names["model"].accuracy_matrix.summary()["forgetting"] < 0.1,
}


@dataclass(frozen=True)
class Block:
    """A block of a page: Python, or the words of one command."""

    page: str
    line: int
    code: str | None = None
    words: tuple[str, ...] = ()
    marker: str = ""
    flags: tuple[str, ...] = ()


def blocks_of(page: str, text: str) -> list[Block]:
    found, marker = [], None
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "html_block" and "test:" in token.content:
            marker = MARKER.fullmatch(token.content.strip())
            assert marker, f"{page}: {token.content.strip()} is no marker that tests know"
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + 1
            what = marker["what"] if marker else ""
            flags = tuple(shlex.split(marker["flags"])) if marker else ()
            if token.info == "python":
                assert not marker, f"{page}:{line}: Python runs as it stands"
                found.append(Block(page, line, code="\n" * line + token.content))
            elif not token.info.startswith("{"):
                found += [
                    Block(page, line, None, w, what, flags) for w in commands_in(token.content)
                ]
            marker = None
        elif token.level == 0 and token.nesting >= 0:
            assert marker is None, f"{page}: a marker has to stand right above its block"
    return found


def commands_in(text: str) -> list[tuple[str, ...]]:
    lines = text.replace("\\\n", " ").splitlines()
    # ``bpn-fit: ...`` is what the command says; what follows a pipe is somebody else's.
    ours = [line.partition(" | ")[0] for line in lines if re.match(r"bpn-\w+ |pytest ", line)]
    return [tuple(shlex.split(line, comments=True)) for line in ours]


BLOCKS = {page: blocks_of(page, (ROOT / page).read_text(encoding="utf-8")) for page in PAGES}


def run_python(block: Block, names: dict[str, Any]) -> None:
    assert block.code is not None
    module = re.match(r"\s*# (\w+\.py)\n", block.code)
    if module:
        Path(module[1]).write_text(block.code, encoding="utf-8")
    else:
        exec(compile(block.code, block.page, "exec"), names)  # noqa: S102


def run_command(block: Block) -> None:
    command, *arguments = block.words
    if command == "pytest" or names_own_class(arguments):
        return run_process(block)
    where = f"{block.page}:{block.line}: {shlex.join(block.words)}"
    assert command in COMMANDS, f"{where}: there is no such command"
    main = COMMANDS[command].load()
    parsed = block.marker == "parsed" or "DIR" in arguments
    if command == "bpn-bench" and arguments[0] == "tune":
        read_tuning_file(arguments[1])
    elif command == "bpn-bench" and arguments[0] not in ("--list", "--help", "report"):
        grid_of(arguments)
    elif command == "bpn-bench" and arguments[0] == "report":
        assert (ROOT / arguments[1]).is_dir(), where
    elif command == "bpn-report":  # of runs that are not there
        html_report._parse(arguments)
    elif command in ("bpn-predict", "bpn-bundle", "bpn-serve"):  # of files that are not there
        sys.modules[main.__module__]._parser().parse_args(arguments)
    elif command == "bpn-export":
        export_command._parser().parse_args(arguments)
        assert not Path(arguments[0]).is_dir() or main(arguments) == 0, where
    elif command == "bpn-data":
        Path("DIR").mkdir(exist_ok=True)
        own = Path(arguments[-1], "train").is_dir()
        assert main(arguments) == (0 if own else SETS_ARE_MISSING), where
    else:
        if "--new" in arguments and "DIR" in arguments:
            write_class_folders(Path("DIR"))
        shows = any(word in SHOWS or word.endswith(".help") for word in arguments)
        added = () if shows else ("--print_config",) if parsed else flags_of(block)
        status = main([*arguments, *added])
        assert status in (0, None), where


def write_class_folders(folder: Path) -> None:
    for part, name in product(("train", "test"), "ab"):
        place = folder / part / name
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(place / "0.png")


def flags_of(block: Block) -> tuple[str, ...]:
    """What is added to a command that trains."""
    long = "digits_inc.yaml" in block.words and QUICK[0] not in block.words + block.flags
    return block.flags + QUICK if long else block.flags


def names_own_class(arguments: list[str]) -> bool:
    """Whether an argument, or a part of a method, is a class of a module in this folder."""
    parts = [part.rpartition(".")[0] for word in arguments for part in word.split("+")]
    return any(Path(*module.split(".")).with_suffix(".py").is_file() for module in parts if module)


def run_process(block: Block) -> None:
    """Run a command as a shell does, without what the tests set for the processes that they start."""
    script = Path(sys.executable).with_name(block.words[0])
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    line = [str(script), *block.words[1:], *flags_of(block)]
    done = run_script(line, env=inherited)
    assert done.returncode == 0, f"{block.page}:{block.line}: {done.stdout}{done.stderr}"


def grid_of(arguments: list[str]) -> None:
    """Read a grid as the command does before it trains: every one is of hours."""
    options, passed_on = _parse(arguments[arguments[0] == "collect" :], known_only=False)
    grid = read_grid(options.grid, passed_on)
    if options.only:
        only(grid.cells, options.only)


# Lightning's, of an epoch that is shorter than its interval of logging, as most here are.
@pytest.mark.filterwarnings("ignore:The stream has no data of tasks")  # as the page says
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]])
def test_every_block_of_the_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_lab").mkdir()  # the reader's own package
    shutil.copy(ROOT / "examples" / "strategy_plugin" / "bpn_replay.py", "my_lab/replay.py")
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    try:
        for block in BLOCKS[page]:
            if block.code is None:
                run_command(block)
            else:
                run_python(block, vars(module))
    finally:
        for path in [*tmp_path.glob("*.py"), *tmp_path.glob("my_lab")]:
            for name in [one for one in sys.modules if one.split(".")[0] == path.stem]:
                sys.modules.pop(name)
    assert CHECKS.get(page, lambda names: True)(vars(module))


def test_every_command_of_the_package_is_shown() -> None:
    shown = {block.words[0] for blocks in BLOCKS.values() for block in blocks if block.words}
    ours = {name for name, entry in COMMANDS.items() if entry.value.startswith("bpn_lightning.")}
    assert ours <= shown


def test_every_config_that_is_named_is_packaged() -> None:
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"--config (\w+\.yaml)", text))
    named -= set(re.findall(r"--new (\w+\.yaml)", text))  # written for data of one's own
    assert named == {path.name for path in CONFIGS.glob("*.yaml")}


def test_every_picture_and_page_that_the_readme_links_is_there() -> None:
    """Links within the pages are checked where the site is built: `make docs`."""
    links = re.findall(r"\]\(([^)h][^)]*)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) >= 3
    assert all((ROOT / link.partition("#")[0]).is_file() for link in links)


def test_the_guide_names_every_package_and_only_files_that_exist() -> None:
    """Where would I change what: a file that moves takes its line in CONTRIBUTING.md along."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = {path.parent for path in (ROOT / "bpn_lightning").glob("*/__init__.py")}
    assert all(f"`{path.relative_to(ROOT)}`" in text for path in packages)
    named = set(re.findall(r"`(\.?\w[\w./]*/[\w./]*)`", text)) - {"build/", "build/roof"}  # made
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []
