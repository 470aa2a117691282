"""Imports run downhill: a file leans on what lies below it, and no two files lean on each other."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "bpn_lightning"
ROOMS = ("strategies", "datamodules", "configs")

# From the ground up. A file may import from lower layers, and from its own layer and room.
LAYERS = [
    {"terminal", "trainer.lightning"},
    {"errors", "random_state"},
    {"checks", "files", "intervals", "preparation", "tasks"},
    {"costs", "metrics"},
    {"nn"},
    {"host"},
    {"functional", "memory", "teacher"},
    set(ROOMS),
    {"registry", "trainer"},
    {"modes"},
    {"run"},
    {"model"},
    {"export"},
    {"cli"},
    {"conformance"},
    {"analysis"},
    {"paper"},
    {"bench"},
    {"report"},
    {"serve"},
    {""},  # the root: `import bpn_lightning` is for users, not for files in here
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    """The name that a file of the repository is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module: str) -> str:
    """What `LAYERS` calls a module: by its room, by its own name in the core, or by both."""
    name = module.partition(".")[2]
    return name if name in RANK else name.partition(".")[0]


FILES = {
    module_name(path): path
    for folder in (PACKAGE, *ROOMS)
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@cache
def imported(path: Path) -> set[str]:
    """What a file imports, wherever in the file, and for type checkers only as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            inner = {f"{module}.{alias.name}" for alias in node.names}
            names |= (inner & set(FILES)) or {module}
    return names


def imported_from_here(module: str) -> set[str]:
    return {name for name in imported(FILES[module]) if name.split(".")[0] == PACKAGE}


def test_every_file_has_a_layer() -> None:
    homeless = {place(module) for module in FILES} - set(RANK)
    assert not homeless, f"say in LAYERS where {sorted(homeless)} lie"


@pytest.mark.parametrize("module", FILES)
def test_imports_run_downhill(module: str) -> None:
    here = place(module)
    for name in imported_from_here(module):
        there = place(name)
        below = RANK[there] < RANK[here]
        beside = RANK[there] == RANK[here] and (here == there or not {here, there} & set(ROOMS))
        assert below or beside, f"{module} imports {name}, which does not lie below it"


RUN_TIME = [name for name in FILES if place(name) == "modes"]


@pytest.mark.parametrize("module", RUN_TIME)
def test_the_run_time_side_needs_nothing_of_training(module: str) -> None:
    needed = {place(name) for name in imported_from_here(module)}
    assert not needed & {"trainer", "trainer.lightning", "strategies", "datamodules", "metrics"}
    assert "lightning" not in {name.split(".")[0] for name in imported(FILES[module])}


def test_networks_and_the_run_time_side_bring_no_trainer_in() -> None:
    modules = ["bpn_lightning.nn.network", *RUN_TIME]
    code = f"import sys; import {', '.join(modules)}; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_no_two_files_lean_on_each_other() -> None:
    TopologicalSorter({module: imported_from_here(module) for module in FILES}).prepare()


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert not {module: length for module, length in lengths.items() if length > 500}


@pytest.mark.parametrize(
    "path", [*FILES.values(), *sorted((ROOT / "tests").rglob("*.py"))], ids=str
)
def test_imports_are_absolute_and_under_the_roof(path: Path) -> None:
    """A room imported by its bare folder name would be a second copy of every class in it."""
    bad = [name for name in imported(path) if name.startswith(".") or name.split(".")[0] in ROOMS]
    assert not bad


@pytest.mark.parametrize(
    "module",
    [
        PACKAGE,
        *(f"{PACKAGE}.{name}" for name in ("cli.main", "bench.cli", "report.cli", "serve.cli")),
    ],
)
def test_import_leaves_the_heavy_ones_alone(module: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'lightning', 'numpy', 'matplotlib', 'sklearn'}"
    code = f"import {module}, sys; print(sorted({heavy} & set(sys.modules)))"
    # Isolated and outside the checkout: what is installed answers, not the current folder.
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
