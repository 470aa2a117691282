"""Every packaged config is parsed, built and printed, and says by which command it runs."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from matrices import representatives

from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.config_files import methods_of, packaged_configs
from bpn_lightning.cli.fit import ContinualCLI
from bpn_lightning.cli.main import main

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parent.parent.parent / "configs"
FILES = sorted(
    p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("bench", "sweeps", "tune")
)
EXPERIMENTS = [name.removesuffix(".yaml") for name in packaged_configs()]
RUNS = [(experiment, method) for experiment in EXPERIMENTS for method in methods_of(experiment)]
ENOUGH = representatives([dict(enumerate(run)) for run in RUNS])
OTHERS = ("_frozen", "own_images")
OF_THE_PAPER = [name for name in EXPERIMENTS if not any(part in name for part in OTHERS)]
METHODS = {"finetune", "ewc", "ewc_task_mask", "bd+ewc", "gd+ewc", "gd+ewc_tuned", "frozen+ewc"}
MULTI_HEAD = {"finetune", "ewc", "bd+ewc"}


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_first_comment_is_the_command_and_the_second_what_it_gave(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    words = shlex.split(lines[0].removeprefix("# "))
    assert words[0] == "bpn-fit"
    assert lines[1].startswith("# ")
    command = read_command(words[1:])
    if path.parent == CONFIGS:
        assert command.experiment == path.stem
        assert command.method == load(path)["method"]
    elif path.parent.name == "gates":
        assert command.experiment == path.stem
    else:
        assert (command.experiment, command.method) == (path.parent.name, path.stem)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_names_its_method_and_no_strategies(experiment: str) -> None:
    content = load(CONFIGS / f"{experiment}.yaml")
    assert content["method"] in methods_of(experiment)
    assert "strategies" not in content
    if experiment in OF_THE_PAPER:
        single_head = content["model"]["mask"] == "all"
        assert set(methods_of(experiment)) >= (METHODS if single_head else MULTI_HEAD)


@pytest.mark.parametrize(
    ("experiment", "method"),
    [
        pytest.param(*run, marks=() if index in ENOUGH else pytest.mark.matrix)
        for index, run in enumerate(RUNS)
    ],
)
def test_every_method_of_every_experiment_is_built_with_its_values(
    experiment: str, method: str, tmp_path: Path
) -> None:
    line = ["--config", experiment, "--method", method, "--trainer.accelerator", "cpu"]
    content = load(CONFIGS / f"{experiment}.yaml")
    if "front" in content:
        line += ["--fronts.frozen.network.init_args.weights", "null"]  # of an optional package
    elif "weights" in content["model"]["backbone"]["init_args"]:
        line += ["--model.backbone.init_args.weights", "null"]  # torchvision would download them
    cli = ContinualCLI(read_command([*line, "--runs", str(tmp_path)]))
    wanted = load(CONFIGS / "methods" / experiment / f"{method}.yaml")
    usual = load(CONFIGS / f"{experiment}.yaml")["model"]["mask"]
    assert cli.model.network.mask == wanted.get("model", {}).get("mask", usual)
    parts = [cli.config_init.strategies[name] for name in wanted["strategies"]]
    assert [one for one in cli.trainer.callbacks if one in parts] == parts
    for part, values in zip(parts, wanted["strategies"].values(), strict=True):
        for name, value in values.items():
            assert getattr(part, name) == value


@pytest.mark.parametrize("experiment", OF_THE_PAPER)
def test_what_print_config_shows_is_a_config_of_the_same_run(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = tmp_path / "shown.yaml"
    line = ["--config", experiment, "--strategies.bd.epsilon", "0.07", "--data.init_args.seed=3"]
    assert main([*line, "--print_config"]) == 0
    shown.write_text(capsys.readouterr().out)
    assert load(shown)["strategies"]["bd"]["epsilon"] == 0.07
    assert load(shown)["experiment"] == experiment
    assert main(["--config", str(shown), "--print_config"]) == 0
    assert capsys.readouterr().out == shown.read_text()


def test_cifar100_takes_the_first_twenty_classes_of_the_alphabet() -> None:
    order = load(CONFIGS / "cifar100_inc.yaml")["data"]["init_args"]["class_order"]
    assert order == sorted(set(order))
    assert (len(order), order[0], order[-1]) == (20, "apple", "cattle")
