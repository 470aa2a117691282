"""One run of the conformance suite, as an author would start it: from a folder with settings of its own."""

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
from commands import run_script

__all__ = ["Outcome", "run_suite", "selected", "stand_for_others"]

#: Settings of an author that fit nothing of ours.
PYTEST_INI = """
[pytest]
python_files = check_*.py
python_functions = check_*
filterwarnings = error
addopts = --strict-markers --strict-config
"""


#: A plugin of the run: leaves out what nobody asks about, and reads what is installed once for all Trainers.
ONLY = """
import json
from functools import cache
from pathlib import Path

import pytest
from lightning.fabric.utilities import registry

registry.entry_points = cache(registry.entry_points)
WANTED = json.loads(Path(__file__).with_name("wanted.json").read_text())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if wanted(*item.name.removesuffix("]").split("[", 1))]


def wanted(promise, name):
    return WANTED[name] is None or promise.removeprefix("test_") in WANTED[name]
"""


class Outcome(NamedTuple):
    """What one run of pytest said, by the name of the strategy and of the promise."""

    failed: Mapping[str, Mapping[str, str]]
    examined: Mapping[str, set[str]]
    text: str


def stand_for_others(names: Iterable[str], chosen: Collection[str]) -> list[Any]:
    """Parameters: those that are chosen, and the others as cells of the matrix."""
    return [
        pytest.param(name, marks=() if name in chosen else pytest.mark.matrix) for name in names
    ]


def selected(request: pytest.FixtureRequest, *tests: str) -> set[str]:
    """The names that this run of pytest has cells of some tests for."""
    cells = [item for item in request.session.items if item.path == request.path]
    return {
        item.callspec.params["name"]
        for item in cells
        if isinstance(item, pytest.Function) and item.originalname in tests
    }


def run_suite(
    folder: Path, planted: str, wanted: Mapping[str, Collection[str] | None], flags: Sequence[str]
) -> Outcome:
    """Examine strategies some of which break their promises.

    Args:
        folder: an empty one.
        planted: the code of the module ``planted``, which names may be of.
        wanted: promises to examine, by the name of the strategy; None for all that it makes.
        flags: of pytest, which name the strategies.
    """
    (folder / "planted.py").write_text(planted)
    (folder / "pytest.ini").write_text(PYTEST_INI)
    (folder / "only.py").write_text(ONLY)
    chosen = {name: None if which is None else sorted(which) for name, which in wanted.items()}
    (folder / "wanted.json").write_text(json.dumps(chosen))
    flags = ["-p", "only", *flags]
    command = ["-m", "pytest", "--pyargs", "bpn_lightning.conformance", *flags]
    done = run_script(
        [*command, "-q", "--tb=short", "--junitxml=report.xml", "-p", "no:cacheprovider"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    failed: dict[str, dict[str, str]] = defaultdict(dict)
    examined: dict[str, set[str]] = defaultdict(set)
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        promise, _, name = str(case.get("name")).removesuffix("]").partition("[")
        promise = promise.removeprefix("test_")
        examined[name].add(promise)
        for said in [*case.iter("failure"), *case.iter("error"), *case.iter("skipped")]:
            failed[name][promise] = said.text or str(said.get("message"))
    return Outcome(failed, examined, done.stdout)
