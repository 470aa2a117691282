"""The sweep files, through wandb's own agent: what it would run is a `bpn-fit` that takes every value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb import wandb_agent

from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.config_files import packaged_configs
from bpn_lightning.cli.fit import ContinualCLI
from bpn_lightning.cli.main import main
from bpn_lightning.datamodules import SplitDigits

pytestmark = pytest.mark.slow

SWEEPS = Path(__file__).parent.parent.parent / "configs" / "sweeps"
NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))

Agent = Callable[[dict[str, Any], str, dict[str, Any]], list[str]]


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def ends(parameter: dict[str, Any]) -> tuple[Any, Any]:
    """The smallest and the largest value that a parameter can have."""
    values = parameter.get("values") or [parameter["min"], parameter["max"]]
    return values[0], values[-1]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """One agent of wandb, without a server: what it starts for a trial, and in which environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "of an earlier process")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    started: list[dict[str, Any]] = []

    class Process:
        def __init__(self, **how: Any) -> None:
            started.append(how)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    one = wandb_agent.Agent(api=None, queue=None)

    def start(sweep: dict[str, Any], run_id: str, values: dict[str, Any]) -> list[str]:
        one._sweep_command = one._sweep_command or sweep["command"]
        arguments = {key: {"value": value} for key, value in values.items()}
        one._command_run({"run_id": run_id, "program": sweep["program"], "args": arguments})
        for key, value in started[-1]["env"].items():
            monkeypatch.setenv(key, value)
        line: list[str] = started[-1]["command"]
        assert line[:2] == ["/usr/bin/env", "bpn-fit"]
        return line[2:]

    return start


def test_every_experiment_has_a_sweep() -> None:
    assert [f"{name}.yaml" for name in NAMES] == packaged_configs()


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_what_wandb_takes_and_never_looks_at_test_data(name: str) -> None:
    sweep = load(name)
    assert sweep.keys() == {
        *("name", "program", "command", "method", "metric", "run_cap", "parameters")
    }
    assert sweep["method"] in ("bayes", "random", "grid")
    assert sweep["metric"] == {"name": "val/average_accuracy", "goal": "maximize"}
    for parameter in sweep["parameters"].values():
        if "values" in parameter:
            assert parameter.keys() == {"values"}
        else:
            assert parameter.keys() == {"distribution", "min", "max"}
            assert parameter["distribution"] == "log_uniform_values"
        low, high = ends(parameter)
        assert type(low) is type(high)
        assert 0 < low < high


@pytest.mark.parametrize("name", NAMES)
def test_bpn_fit_takes_what_an_agent_passes(
    name: str, agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load(name)
    for index in (0, 1):
        values = {key: ends(parameter)[index] for key, parameter in sweep["parameters"].items()}
        line = agent(sweep, f"trial{index}", values)
        assert main([*line, "--print_config"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["runs"] == f"runs/sweeps/trial{index}"
        assert config["experiment"] == name
        assert config["data"]["init_args"]["validation_fraction"] > 0
        for key, value in values.items():
            found = config
            for part in key.split("."):
                found = found[part]
            assert found == value
            assert type(found) is type(value)


def test_numbers_in_python_s_short_form_are_numbers(
    agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    line = agent(load("digits_inc"), "trial", {"strategies.bd.epsilon": 1e-05})
    assert "--strategies.bd.epsilon=1e-05" in line
    assert main([*line, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["strategies"]["bd"]["epsilon"] == 1e-05


def test_two_trials_of_one_seed_have_a_folder_each(agent: Agent) -> None:
    sweep = load("digits_inc")
    folders = [
        ContinualCLI(read_command(agent(sweep, run_id, {}))).folder for run_id in ("one", "two")
    ]
    assert folders == [
        Path("runs/sweeps", run_id, "digits_inc", "bd+ewc", "seed_0") for run_id in ("one", "two")
    ]


def test_the_metric_is_the_mean_over_the_tasks_so_far_on_held_out_images(fit: Any) -> None:
    stream = SplitDigits(num_tasks=2, epochs_per_task=2, validation_fraction=0.2, seed=0)
    module, trainer = fit([], stream=stream)
    expected = module.evaluate(split="val").mean()
    assert 0 < expected < 1
    assert trainer.callback_metrics["val/average_accuracy"] == pytest.approx(float(expected))
