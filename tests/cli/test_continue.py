"""New tasks for a finished run: `--continue_from`, `--past_data` and `--list RUN`."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from copies import work_in_a_copy

from bpn_lightning.cli import train
from bpn_lightning.cli.main import main
from bpn_lightning.cli.past import find_past, runs_before
from bpn_lightning.run.checkpoints import read_checkpoint
from bpn_lightning.run.results import read_matrix_csv, read_results

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

QUICK = [
    *("--trainer.accelerator", "cpu", "--quiet", "--model.mask", "seen"),
    *("--data.init_args.epochs_per_task", "1"),
]
FIRST = ["--config", "digits_inc.yaml", "--data.init_args.num_tasks", "3"]


def new(classes: list[int], name: str) -> list[str]:
    order = f"[{', '.join(map(str, classes))}]"
    stream = ["--data", "SplitDigits", "--data.init_args.class_order", order]
    return ["--experiment", name, *stream, "--data.init_args.classes_per_task", str(len(classes))]


def folder(experiment: str) -> Path:
    return Path("runs", experiment, "bd+ewc", "seed_0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three tasks, of a fourth, of a fifth with the past's data, and of all five in one."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(place)
        patch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
        patch.setenv("PL_SEED_WORKERS", "0")
        warnings.simplefilter("ignore")
        fourth = ["--continue_from", str(folder("digits_inc"))]
        fifth = ["--continue_from", str(folder("fourth")), "--past_data"]
        assert main([*FIRST, *QUICK]) == 0
        assert main([*new([6, 7], "fourth"), *QUICK, *fourth]) == 0
        assert main([*new([8, 9], "fifth"), *QUICK, *fifth]) == 0
        assert main([*FIRST[:2], *QUICK, "--experiment", "whole"]) == 0
    return place


@pytest.fixture(autouse=True)
def _a_copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in_a_copy(made, tmp_path, monkeypatch)


def state(experiment: str) -> dict[str, Any]:
    return read_checkpoint(folder(experiment) / "checkpoints" / "last.ckpt")


def differing(one: Any, other: Any, key: str = "") -> list[str]:
    """The keys of two checkpoints whose values are not bit for bit the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [d for k in keys for d in differing(one.get(k), other.get(k), f"{key}.{k}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)) else [key]
    return [] if type(one) is type(other) and one == other else [key]


def test_three_commands_learn_what_one_does() -> None:
    one, other = state("fifth"), state("whole")
    own = ("network.accuracy_matrix.",)  # rows before training, and above the diagonal
    weights, whole = (
        {n: v for n, v in s["state_dict"].items() if not n.startswith(own)} for s in (one, other)
    )
    assert differing(weights, whole) == []
    assert differing(one["callbacks"]["ewc"], other["callbacks"]["ewc"]) == []
    matrix, expected = (read_matrix_csv(folder(name)) for name in ("fifth", "whole"))
    torch.testing.assert_close(matrix[5], expected[5], rtol=0, atol=0)
    torch.testing.assert_close(matrix[1:4, :3].tril(), expected[1:4, :3].tril(), rtol=0, atol=0)


def test_without_old_data_their_accuracies_are_not_measured() -> None:
    accuracy = read_results(folder("fourth"))["accuracy"]
    assert accuracy["per_task"][:3] == [None] * 3
    assert accuracy["per_task"][3] is not None
    assert accuracy["average"] is None
    assert None not in read_results(folder("fifth"))["accuracy"]["per_task"]


def test_results_name_the_run_before() -> None:
    assert "continues" not in read_results(folder("digits_inc"))["provenance"]
    before = folder("fourth") / "results.json"
    assert read_results(folder("fifth"))["provenance"]["continues"] == {
        "run": "fourth, method bd+ewc, seed 0",
        "tasks": 4,
        "date": json.loads(before.read_text())["provenance"]["date"],
        "results_sha256": hashlib.sha256(before.read_bytes()).hexdigest(),
    }


def test_a_run_lists_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", str(folder("fourth"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        [str(t + 1), str(2 * t), "to", str(2 * t + 1), "1", f"{2 * t},", str(2 * t + 1)]
        for t in range(4)
    ]


def test_a_checkpoint_alone_needs_the_whole_configuration() -> None:
    shutil.copy(folder("digits_inc") / "checkpoints" / "last.ckpt", "alone.ckpt")
    shutil.rmtree(folder("digits_inc"))
    line = ["--config", "digits_inc.yaml", *QUICK, *new([6, 7], "again")]
    line += ["--data.init_args.num_tasks", "1"]
    assert main([*line, "--continue_from", "alone.ckpt"]) == 0
    assert differing(state("again")["state_dict"], state("fourth")["state_dict"]) == []


def test_a_class_of_its_own_a_week_later() -> None:
    line = [*new([6], "one"), *QUICK, "--continue_from", str(folder("digits_inc"))]
    assert main(line) == 0
    assert read_results(folder("one"))["tasks"][3]["classes"] == ["6"]
    assert state("one")["state_dict"]["network.head.weight"].shape[0] == 7


def test_an_interrupted_continuation_resumes() -> None:
    line = [*new([6, 7], "cut"), *QUICK, "--continue_from", str(folder("digits_inc"))]
    assert main([*line, "--trainer.max_steps", "32"]) == 0
    assert main([*line, "--ckpt_path", "last"]) == 0
    assert differing(state("cut")["state_dict"], state("fourth")["state_dict"]) == []


def test_an_order_of_the_seed_is_kept_by_what_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Of another seed, and with the past's data, whose stream is made again from its config.yaml."""
    drawn = ["--data.init_args.class_order_seed", "stream"]
    first = [*FIRST[:2], *drawn, *QUICK, "--data.init_args.class_order", "[0,1,2,3,4,5]"]
    assert main([*first, "--data.init_args.num_tasks", "3", "--seed_everything", "4"]) == 0
    run = folder("digits_inc").with_name("seed_4")
    order = [task["classes"] for task in read_results(run)["tasks"]]
    assert sorted(name for classes in order for name in classes) == [*"012345"]
    assert order != [["0", "1"], ["2", "3"], ["4", "5"]]
    line = [*new([6, 7], "more"), *drawn, *QUICK, "--continue_from", str(run), "--past_data"]
    assert main([*line, "--seed_everything", "0"]) == 0
    results = read_results(folder("more"))
    assert [task["classes"] for task in results["tasks"]][:3] == order
    assert None not in results["accuracy"]["per_task"]
    assert main(["--list", str(folder("more"))]) == 0
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:4]] == [
        [f"{a},", b] for a, b in order
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--continue_from", "nowhere"], "Expected continue_from to be the folder of a finished"),
        (["--past_data"], "Expected --past_data together with --continue_from, but got it alone"),
        (["--method", "ewc"], "they differ: strategies"),
        (["--model.mask", "task"], "they differ: mask is 'task' here and 'seen' there"),
        (["--model.backbone.init_args.hidden", "[32]"], "Expected the backbone of the run"),
        (["--data.init_args.class_order", "[1, 2]"], "Expected new classes after those"),
    ],
)
def test_what_cannot_go_on(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    going_on = ["--continue_from", str(folder("digits_inc"))]
    if flags[0] in ("--continue_from", "--past_data"):
        going_on = ["--config", "digits_inc.yaml"]
    assert main([*going_on, *new([6, 7], "bad"), *QUICK, *flags]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("bpn-fit: error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (folder("bad") / "results.json").exists()


def test_nor_a_run_that_stopped_inside_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIRST, *QUICK, "--experiment", "early", "--trainer.max_steps", "12"]) == 0
    line = [*new([6, 7], "bad"), *QUICK, "--continue_from", str(folder("early"))]
    assert main([*line, "--trainer.max_steps", "-1"]) == 2
    assert "Expected a run that has learned its 3 tasks" in capsys.readouterr().err


@pytest.mark.parametrize("replaced", ["digits_inc", "fourth"])
def test_no_run_that_is_continued_is_replaced(
    replaced: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder(replaced) / "results.json").read_bytes()
    line = [*new([8, 9], replaced), *QUICK, "--continue_from", str(folder("fourth"))]
    assert main([*line, "--overwrite"]) == 2
    assert "Expected --overwrite to replace another run than those" in capsys.readouterr().err
    assert (folder(replaced) / "results.json").read_bytes() == before


def test_a_config_of_the_past_replaces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with (folder("digits_inc") / "config.yaml").open("a") as config:
        config.write("overwrite: true\n")
    line = [*new([6, 7], "fourth"), *QUICK, "--continue_from", str(folder("digits_inc"))]
    assert main([*line, "--model.evaluate_on", "current", "--model.optimizer.init_args.lr=1"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_runs_that_go_on_from_each_other_have_no_beginning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = folder("digits_inc") / "config.yaml"
    config.write_text(f"{config.read_text()}continue_from: {folder('fourth')}\n")
    line = [*new([8, 9], "bad"), *QUICK, "--continue_from", str(folder("fourth")), "--past_data"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert f"Expected continue_from in {config.resolve()} to lead to a first run" in said


def test_runs_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in a config.yaml is one of the folder in which its command was given."""
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    runs = runs_before(find_past(str(".." / folder("fifth"))))
    names = ("digits_inc", "fourth", "fifth")
    assert [run.folder.resolve() for run in runs] == [tmp_path / folder(name) for name in names]


def test_gates_alone_go_on_with_past_data() -> None:
    gates = ["--method", "slda", "--trainer.accelerator", "cpu", "--quiet"]
    assert main([*FIRST, *gates, "--experiment", "some"]) == 0
    line = ["--continue_from", "runs/some/slda/seed_0", "--past_data", "--quiet"]
    assert main([*new([6, 7], "more"), *line]) == 0
    assert main([*FIRST[:2], *gates, "--experiment", "four", "--data.init_args.num_tasks=4"]) == 0
    more, four = (
        read_matrix_csv(Path("runs", name, "slda", "seed_0", "accuracy_matrix.csv"))[-1]
        for name in ("more", "four")
    )
    assert torch.equal(more, four)


def test_past_data_need_the_configuration_of_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    (folder("digits_inc") / "config.yaml").unlink()
    line = [*new([6, 7], "bad"), *QUICK, "--continue_from", str(folder("fourth"))]
    assert main([*line, "--past_data"]) == 2
    assert "Expected past_data to find each past stream" in capsys.readouterr().err


def test_streams_of_the_past_need_trust_too(capsys: pytest.CaptureFixture[str]) -> None:
    path = folder("digits_inc") / "config.yaml"
    text = path.read_text()
    assert "bpn_lightning.datamodules.digits.SplitDigits" in text or "SplitDigits" in text
    lines = [
        "  class_path: os.path.join" if "SplitDigits" in line else line
        for line in text.splitlines()
    ]
    path.write_text("\n".join(lines))
    line = [*new([6, 7], "bad"), *QUICK, "--continue_from", str(folder("digits_inc"))]
    assert main([*line, "--past_data"]) == 2
    assert "os.path.join" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 99}, "Expected a checkpoint of schema"),
        ({"cursor": {}}, "Expected a seed and the last task that is learned, but got (0, None)"),
        ({"cursor": 3, "seed": "0"}, "but got ('0', None)"),
        ({"structure": 1}, "Expected the structure of a module"),
    ],
)
@pytest.mark.parametrize("option", ["--continue_from", "--list"])
def test_nor_a_checkpoint_that_somebody_made_up(
    option: str, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder("digits_inc") / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["continual"] |= change
    torch.save(saved, path)
    line = [option, str(folder("digits_inc"))]
    assert main(line if option == "--list" else [*new([6, 7], "bad"), *QUICK, *line]) == 2
    assert said in capsys.readouterr().err


def test_the_past_may_be_gone_when_the_results_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish = train._finish

    def later(*args: Any, **kwargs: Any) -> None:
        shutil.rmtree(folder("digits_inc"))
        finish(*args, **kwargs)

    monkeypatch.setattr(train, "_finish", later)
    line = [*new([6, 7], "again"), *QUICK, "--continue_from", str(folder("digits_inc"))]
    assert main(line) == 0
    assert read_results(folder("again"))["provenance"]["continues"]["tasks"] == 3
