"""What pytest loads wherever this package is installed: adds nothing until the suite is asked for.

pytest does not look for a ``conftest.py`` behind ``--pyargs``, so the suite's options can only be known
in time through an entry point. Imports nothing heavy, for it takes part in every run of pytest.
"""

from pathlib import Path

import pytest

__all__ = ["pytest_load_initial_conftests"]

PACKAGE = "bpn_lightning.conformance"


def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Bring in the options where an argument names the suite, by module or by folder."""
    if any(_asks_for_the_suite(argument) for argument in args):
        early_config.pluginmanager.import_plugin(f"{PACKAGE}.plugin")


def _asks_for_the_suite(argument: str) -> bool:
    place = argument.partition("::")[0]
    here = Path(__file__).resolve().parent
    by_name = place == PACKAGE or place.startswith(f"{PACKAGE}.")
    return by_name or (here.name in place and here in [p := Path(place).resolve(), *p.parents])
