"""examples/strategy_plugin fits the code beside it; .ci/run installs it and runs its own tests."""

import configparser
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpn_lightning import registry
from bpn_lightning.cli.main import main

EXAMPLE = Path(__file__).parent.parent / "examples" / "strategy_plugin"
SETUP = configparser.RawConfigParser()
SETUP.read(EXAMPLE / "setup.cfg", encoding="utf-8")


@pytest.fixture(autouse=True)
def _on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    sys.modules.pop("bpn_replay", None)


def test_its_entry_point_is_a_strategy() -> None:
    lines = SETUP["options.entry_points"]["bpn_lightning.strategies"].strip().splitlines()
    assert lines == ["replay = bpn_replay:Replay"]
    assert registry.by_class_path("bpn_replay.Replay").problem() is None


@pytest.mark.slow
def test_it_remembers_in_a_run_of_the_command() -> None:
    line = "--config digits_inc.yaml --method bpn_replay.Replay --strategies.Replay.size 5"
    short = (
        "--trainer.accelerator cpu --data.init_args.num_tasks 2 --data.init_args.epochs_per_task 4"
    )
    assert main([*line.split(), *short.split()]) == 0
    path = Path("runs/digits_inc/bpn_replay.Replay/seed_0/results.json")
    found = json.loads(path.read_text())
    assert found["tasks_not_learned"] == []
    assert min(found["accuracy"]["per_task"]) > 0.5
