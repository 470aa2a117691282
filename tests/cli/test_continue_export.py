"""New tasks for an export: `--continue_from` and `--list` take what `bpn-export` wrote."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from copies import work_in_a_copy

from bpn_lightning.cli.config_files import read_yaml
from bpn_lightning.cli.export import main as export
from bpn_lightning.cli.main import main
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.run.results import read_results

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

MODEL = [
    *("--config", "digits_inc.yaml", "--method", "bd", "--model.mask", "seen"),
    *("--model.train", "modes", "--model.train_first", "all"),
    *("--trainer.accelerator", "cpu", "--quiet", "--data.init_args.epochs_per_task", "1"),
]
NEW = [
    *("--data.init_args.class_order", "[4, 5]", "--data.init_args.num_tasks", "1"),
    *("--continue_from", "out"),
]


def folder(experiment: str) -> Path:
    return Path("runs", experiment, "bd", "seed_0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks, its export, and a run that continues from its folder."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(place)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        warnings.simplefilter("ignore")
        assert main([*MODEL, "--data.init_args.num_tasks", "2"]) == 0
        assert export([str(folder("digits_inc")), "--to", "out"]) == 0
        line = [*MODEL, *NEW[:-1], str(folder("digits_inc")), "--experiment", "of_folder"]
        assert main(line) == 0
    return place


@pytest.fixture(autouse=True)
def _a_copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in_a_copy(made, tmp_path, monkeypatch)


def state(experiment: str) -> dict[str, Any]:
    saved = read_checkpoint(folder(experiment) / "checkpoints" / "last.ckpt")
    weights: dict[str, Any] = saved["state_dict"]
    return weights


def same_weights(experiment: str) -> bool:
    one, other = state(experiment), state("of_folder")
    assert one.keys() == other.keys()
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    return all(torch.equal(one[n].nan_to_num(-1), other[n].nan_to_num(-1)) for n in tensors)


def test_it_learns_what_the_folder_would() -> None:
    assert main([*MODEL, *NEW, "--experiment", "of_export"]) == 0
    assert same_weights("of_export")
    one, other = (dict(read_results(folder(name))) for name in ("of_export", "of_folder"))
    before = {"run": "out", "tasks": 2, "date": None, "results_sha256": None}
    assert one.pop("provenance")["continues"] == before  # type: ignore[index]
    for results in (one, other):
        results.pop("provenance", None)
        results.pop("experiment")
        results["conditions"].pop("updates")  # type: ignore[attr-defined]  # an export counts none
    assert one == other
    assert one["accuracy"]["per_task"][:2] == [None, None]  # type: ignore[index]


def test_an_interrupted_one_resumes() -> None:
    line = [*MODEL, *NEW, "--experiment", "cut"]
    assert main([*line, "--trainer.max_steps", "4"]) == 0
    assert main([*line, "--ckpt_path", "last"]) == 0
    assert same_weights("cut")


def test_an_export_lists_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "out"]) == 0
    listed = capsys.readouterr().out
    assert main(["--list", str(folder("digits_inc"))]) == 0
    assert capsys.readouterr().out == listed
    assert listed.splitlines()[2].split() == ["2", "2", "to", "3", "1", "2,", "3"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "bd+ewc"], "they differ: strategies is ['bd', 'ewc'] here and ['bd'] there"),
        (["--model.mask", "task"], "'seen', but got 'task'. Set it to 'seen'."),
        (
            ["--model.backbone.init_args.hidden", "[32]"],
            "bundle of bpn-export for this network, but got",
        ),
        (["--data.init_args.class_order", "[1, 2]"], "Expected new classes after those"),
        (["--data.init_args.reset_optimizer", "never"], "Expected reset_optimizer to be 'always'"),
        (["--past_data"], "Expected past_data to find each past stream in its run's config.yaml"),
    ],
)
def test_what_cannot_go_on(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal([*MODEL, *NEW, "--experiment", "bad", *flags], capsys).find(said) >= 0


def test_a_missing_state_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    line = [*MODEL, "--method", "ewc", "--data.init_args.num_tasks", "2", "--experiment", "ewc"]
    assert main(line) == 0
    assert export(["runs/ewc/ewc/seed_0", "--to", "ewc"]) == 0
    said = refusal([*MODEL, *NEW[:-1], "ewc", "--method", "ewc", "--experiment", "bad"], capsys)
    assert "but an export holds no importances: EWC cannot continue from it." in said
    assert said.endswith("or export it with its training state: bpn-export --training_state.")


def test_with_its_training_state_any_method_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """The run's folder is gone by then, as on another machine."""
    line = [*MODEL, "--method", "bd+ewc", "--model.train", "all"]
    past = [*line, "--data.init_args.num_tasks", "2", "--experiment", "past"]
    of_folder = [*NEW[:-1], "runs/past/bd+ewc/seed_0", "--experiment", "of_folder_2"]
    assert main(past) == 0
    assert export(["runs/past/bd+ewc/seed_0", "--to", "whole", "--training_state"]) == 0
    assert main([*line, *of_folder]) == 0
    shutil.rmtree("runs/past")
    assert main([*line, *NEW[:-1], "whole", "--experiment", "of_bundle"]) == 0
    weights = [
        read_checkpoint(Path("runs", name, "bd+ewc", "seed_0", "checkpoints", "last.ckpt"))
        for name in ("of_folder_2", "of_bundle")
    ]
    for part in ("state_dict", "callbacks"):
        one, other = (leaves(each[part]) for each in weights)
        assert one.keys() == other.keys()
        assert [n for n in one if not torch.equal(one[n].nan_to_num(), other[n].nan_to_num())] == []


def test_a_training_state_that_still_holds_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(folder("digits_inc")), "--to", "gone", "--forget", "1", "--training_state"]
    assert export(line) == 2
    assert "it still holds what was stored of task 0" in capsys.readouterr().err
    assert not Path("gone").exists()


def leaves(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, dict):
        return {k: v for key, one in tree.items() for k, v in leaves(one, f"{path}/{key}").items()}
    return {path: tree} if isinstance(tree, torch.Tensor) else {}


# --- adding to a bundle --------------------------------------------------------------------------

TWO = [
    *("--data.init_args.class_order", "[4, 5, 6, 7]", "--data.init_args.num_tasks", "2"),
    *("--continue_from", "out", "--to", "out", "--names", "third", "fourth"),
]


def test_tasks_are_added_to_the_bundle_that_is_continued(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also by a run that is interrupted when the bundle has one of its two tasks, and resumed."""
    shutil.copytree("out", "copy")
    assert main([*MODEL, *TWO, "--experiment", "whole"]) == 0
    line = [*MODEL, *TWO, "--to", "copy", "--continue_from", "copy", "--experiment", "cut"]
    steps = read_checkpoint(folder("whole") / "checkpoints" / "last.ckpt")["global_step"]
    assert main([*line, "--trainer.max_steps", str(steps - 2)]) == 0
    names = sorted(path.name for path in Path("copy/tasks").iterdir())
    assert names == ["task_1", "task_2", "third"]
    assert main([*line, "--ckpt_path", "last"]) == 0
    files = [path for path in Path("out").rglob("*") if path.is_file()]
    assert any("fourth" in path.parts for path in files)
    for path in files:
        assert Path("copy", *path.parts[1:]).read_bytes() == path.read_bytes()
    capsys.readouterr()
    assert main(["--list", "out"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list("1234")
    assert "to" not in read_yaml(folder("whole") / "config.yaml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*NEW, "--names", "third"], "Expected --names together with --to, but got third alone."),
        (["--to", "out"], "Expected --to together with --continue_from, but got out alone."),
        ([*NEW, "--to", "nowhere"], "Expected nowhere to be a bundle of bpn-export"),
        ([*NEW, "--to", "out", "--model.train", "all"], "Expected train to be 'modes' or 'head'"),
    ],
)
def test_what_cannot_be_added(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal([*MODEL, *flags, "--experiment", "bad"], capsys)
    assert {path.name for path in Path("out/tasks").iterdir()} == {"task_1", "task_2"}


def test_a_config_adds_to_no_bundle_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs.yaml").write_text(f"to: {tmp_path.parent / 'elsewhere'}\n")
    line = [*MODEL, *NEW, "--experiment", "bad", "--config", "theirs.yaml"]
    assert "the only folder where a config may let a run write" in refusal(line, capsys)


def refusal(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(line) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("bpn-fit: error: ")]
    assert len(lines) == 1
    assert not Path("runs", "bad").exists() or not any(Path("runs", "bad").rglob("results.json"))
    return lines[0]


class Payload:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("owned"),)


TENSORS, RECORD = Path("out", "model.safetensors"), Path("out", "config.json")


def record(**fields: Any) -> Callable[[], Any]:
    return lambda: RECORD.write_text(json.dumps(json.loads(RECORD.read_text()) | fields))


@pytest.mark.parametrize(
    "harm",
    [
        lambda: TENSORS.write_bytes(TENSORS.read_bytes()[:-100]),
        lambda: TENSORS.write_bytes(pickle.dumps(Payload())),
        TENSORS.unlink,
        lambda: RECORD.write_text(RECORD.read_text()[:-100]),
        RECORD.unlink,
        record(schema=99),
        record(format="other"),
        record(structure=[1]),
        record(forgotten=[{}]),
        record(files=3),
        record(seed="0"),
        record(strategies=3),
        record(plain={"tensor": "nowhere"}),
        record(gates=3),
    ],
)
def test_an_export_that_is_damaged_or_made_up(
    harm: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    harm()
    said = refusal([*MODEL, *NEW, "--experiment", "bad"], capsys)
    assert "Expected out to be a bundle of bpn-export for this network" in said
    assert not Path("owned").exists()
