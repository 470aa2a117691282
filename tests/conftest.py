"""What every test stands on: one thread, no screen, no network, no data of the user's, one seed."""

import os
import random
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from matrices import representatives
from pictures import left_blank
from ranks import Ranks

# Set before anything imports torch or matplotlib, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order; and two ranks share a small machine
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("BPN_DATA", None)  # a test makes its data, or finds none

#: The files that take longest, half a minute or more on one core.
LONGEST = [
    "test_docs.py",
    "run/test_faults.py",
    "cli/test_cli.py",
    "test_conformance.py",
    "bench/test_warm.py",
    "modes/test_exporters.py",
    "serve/test_server.py",
    "cli/test_continue.py",
    "cli/test_bad_input.py",
    "model/test_growth.py",
    "run/test_dashboards.py",
    "test_gate_conformance.py",
    "report/test_browser.py",
    "test_notebook.py",
]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs several processes as slow, and most cells of matrices; begin with the longest files.

    Workers take one file after another (`--dist loadfile`): what is long must not come last.
    """
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    for _, cells in groupby(items, key=lambda item: (item.path, getattr(item, "function", item))):
        _mark_cells([cell for cell in cells if hasattr(cell, "callspec")])
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    longest = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in longest), "Correct LONGEST: a file of it has moved."
    items.sort(key=lambda item: (longest.get(item.path, len(longest)), item.path not in slow))


@pytest.fixture(autouse=True)
def _loaders_as_torch_has_them() -> Iterator[None]:
    """Lightning 2.6.6 replaces methods of loaders while it asks for them, and leaves them so where that raises."""
    data = sys.modules.get("torch.utils.data")
    classes = [] if data is None else [data.DataLoader, data.BatchSampler]
    names = ("__init__", "__setattr__", "__delattr__")
    before = {cls: {name: vars(cls).get(name) for name in names} for cls in classes}
    yield
    for cls, methods in before.items():
        for name, method in methods.items():
            if vars(cls).get(name) is method:
                continue
            if method is None:
                delattr(cls, name)
            else:
                setattr(cls, name, method)
            if f"__old{name}" in vars(cls):
                delattr(cls, f"__old{name}")


_entry_points = cache(entry_points)


def _mark_cells(cells: list[pytest.Item]) -> None:
    """Mark as `matrix` what `make test` does not need: its parameters' values are in other cells too.

    A slow cell stands for others only where no quick one can.
    """
    cells = [cell for cell in cells if not cell.get_closest_marker("matrix")]
    cells.sort(key=lambda cell: cell.get_closest_marker("slow") is not None)
    chosen = representatives([_rows(cell) for cell in cells])
    for index, cell in enumerate(cells):
        if index not in chosen:
            cell.add_marker("matrix")


def _rows(cell: pytest.Item) -> dict[object, tuple[int, ...]]:
    """Which row of each list of parameters a test has: a list may give values to several names."""
    lists = [mark.args[0] for mark in cell.iter_markers("parametrize")]
    split = [names.split(",") if isinstance(names, str) else names for names in lists]
    list_of = {name.strip(): index for index, names in enumerate(split) for name in names}
    rows: dict[object, tuple[int, ...]] = {}
    for name, value in cell.callspec.params.items():
        side = list_of.get(name, name)  # a fixture's parameters are a list of their own
        rows[side] = (*rows.get(side, ()), id(value))
    return rows


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stand in an empty folder: a process started here imports what is installed, not a folder of its name."""
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(here)


@pytest.fixture(autouse=True)
def _installed_packages_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning 2.6.6 reads the metadata of all installed packages for every Trainer, a third of a short fit."""
    registry = sys.modules.get("lightning.fabric.utilities.registry")
    if registry is not None:
        monkeypatch.setattr(registry, "entry_points", _entry_points)


@pytest.fixture(autouse=True)
def _only_what_is_there_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a device that may come, torch formats the stack at every seed, and keeps it for good."""
    for device in _missing_devices() if "torch" in sys.modules else ():
        monkeypatch.setattr(device, "manual_seed_all", lambda seed: None)


@cache
def _missing_devices() -> list[Any]:
    import torch

    return [device for device in (torch.cuda, torch.xpu) if not device.is_available()]


@pytest.fixture(autouse=True)
def _seeded(_only_what_is_there_is_seeded: None) -> None:
    """Start each test from one seed, whichever tests ran before; torch only where it is in use."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # seed_everything sets it, and streams read it
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Runs a function of a test file in processes that the whole session shares."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, without a window and without any way out."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: `make browser` installs Debian's")
    from playwright.sync_api import sync_playwright

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield running
        running.close()


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """For files that do not look at pictures of runs."""
    with left_blank():
        yield


@pytest.fixture
def fit(tmp_path):
    """Fit a small stream: ``fit([EWC()], stream=..., trainer={...}, mask="task")``.

    Returns the module and its trainer. The stream is two tasks of digits, two epochs each, unless one
    is given.
    """
    import torch
    from lightning.pytorch import Trainer, seed_everything

    from bpn_lightning import ContinualModule
    from bpn_lightning.datamodules import SplitDigits
    from bpn_lightning.nn import MLP

    def run(strategies=(), *, stream=None, seed=0, lr=0.05, ckpt_path=None, trainer=None, **module):
        seed_everything(seed, verbose=False)
        if stream is None:
            stream = SplitDigits(num_tasks=2, epochs_per_task=2, batch_size=64, seed=0)
        module.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=lr))
        module.setdefault("backbone", MLP([16, 16]))
        model = ContinualModule(**module)
        flags = {
            "max_epochs": -1,
            "callbacks": list(strategies),
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
            **(trainer or {}),
        }
        made = Trainer(**flags)
        made.fit(model, stream, ckpt_path=ckpt_path, weights_only=ckpt_path and True)
        return model, made

    return run
