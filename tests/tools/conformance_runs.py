"""One run of the conformance suite, as an author would start it: from a folder with settings of its own."""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from waiting import PATIENCE

__all__ = ["Outcome", "run_suite"]

#: Settings of an author that fit nothing of ours.
PYTEST_INI = """
[pytest]
python_files = check_*.py
python_functions = check_*
filterwarnings = error
addopts = --strict-markers --strict-config
"""


class Outcome(NamedTuple):
    """What one run of pytest said, by the name of the strategy and of the promise."""

    failed: Mapping[str, Mapping[str, str]]
    examined: Mapping[str, set[str]]
    text: str


def run_suite(folder: Path, planted: str, flags: Sequence[str]) -> Outcome:
    """Examine strategies some of which break their promises.

    Args:
        folder: an empty one.
        planted: the code of the module ``planted``, which flags may name.
        flags: of pytest.
    """
    (folder / "planted.py").write_text(planted)
    (folder / "pytest.ini").write_text(PYTEST_INI)
    command = [sys.executable, "-m", "pytest", "--pyargs", "bpn_lightning.conformance", *flags]
    done = subprocess.run(
        [*command, "-q", "--tb=short", "--junitxml=report.xml", "-p", "no:cacheprovider"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    failed: dict[str, dict[str, str]] = defaultdict(dict)
    examined: dict[str, set[str]] = defaultdict(set)
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        promise, _, name = str(case.get("name")).removesuffix("]").partition("[")
        promise = promise.removeprefix("test_")
        examined[name].add(promise)
        for said in [*case.iter("failure"), *case.iter("error"), *case.iter("skipped")]:
            failed[name][promise] = said.text or str(said.get("message"))
    return Outcome(failed, examined, done.stdout)
