"""What is found in a folder, and that nothing disappears without a word."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpn_lightning.analysis.collection import CELLS, Collection, kept, write_collection
from bpn_lightning.analysis.comparison import compare
from bpn_lightning.analysis.record import RunRecord, read_run
from bpn_lightning.errors import ResultsError
from bpn_lightning.report import reading
from bpn_lightning.report.page import render
from bpn_lightning.report.reading import Problem, find_runs
from bpn_lightning.run.moments import Moments

Make = Callable[..., Path]

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def only_problem(folder: Path) -> Problem:
    (problem,) = find_runs(folder).problems
    return problem


@pytest.mark.parametrize("up", range(4))
def test_a_run_has_one_name_from_whatever_folder_it_is_read(make_run: Make, up: int) -> None:
    folder = make_run("bd+ewc", 3)
    (run,) = find_runs([folder, *folder.parents][up]).runs
    assert run.name == "digits_inc, bd+ewc, seed 3"
    assert run.matrix == [[0.1, 0.2], [0.9, 0.3], [0.4, 0.8]]
    assert (run.learned, run.tasks) == (2, 2)
    assert run.task_names == ["task 1 (c0)", "task 2 (c1)"]
    assert run.settings == {"seed_everything": 3, "method": "bd+ewc", "model.mask": "all"}


def test_folders_above_an_experiment_set_runs_apart(make_run: Make, tmp_path: Path) -> None:
    make_run(root="runs")
    make_run(root="runs/short/rank=10,epsilon=0.1")
    make_run(root="runs/bench/digits")
    assert [(run.place, run.setup) for run in find_runs(tmp_path / "runs").runs] == [
        ("digits_inc", "ewc"),
        ("digits_inc, bench/digits", "ewc"),
        ("digits_inc, short", "ewc, rank 10, epsilon 0.1"),
    ]


@pytest.mark.parametrize("up", range(4))
def test_gates_and_front_are_part_of_the_setup_and_not_of_the_experiment(
    make_run: Make, up: int
) -> None:
    per_task = {"average": 0.5, "per_task": [0.5, 0.5]}
    gate = dict.fromkeys(("task_accuracy", "end_to_end", "mixture"), per_task)
    gate |= dict.fromkeys(("own_class", "own_class_task_given", "calibration"))
    gate |= {"modes": 2, "over_stream": [], "bytes_held": 8, "bytes_per_task": 4}
    front = {"name": "random", "bytes": 16}
    parts = ",gate=slda+ncm,front=random"
    folder = make_run("psp", parts=parts, gates={"slda": gate, "ncm": gate}, front=front)
    make_run("psp", parts=",front=random", front=front, seed=1)
    root = folder.parents[2]
    write_collection(Collection("g", "G", "", (), (), (), (), (kept(read_run(folder)),)), root)
    found = find_runs([folder, folder.parent, folder.parents[1], root][up])
    assert found.problems == []
    assert found.runs[-1].name == "digits_inc, psp, gate slda+ncm, front random, seed 0"
    assert [run.name for run in found.runs if run.seed] == (
        ["digits_inc, psp, front random, seed 1"] if up > 1 else []
    )


def test_curves_begin_where_a_task_does(make_run: Make) -> None:
    points = [
        {"epoch": 0, "task": 0, "accuracy": [0.1, 0.2]},
        {"epoch": 1, "task": 0, "accuracy": [0.8, 0.2]},
        {"epoch": 2, "task": 0, "accuracy": [0.9, 0.3]},
        {"epoch": 3, "task": 1, "accuracy": [0.5, 0.7]},
    ]
    fine = make_run(seed=0, extra={"curve": points})
    (run,) = find_runs(fine).runs
    expected = [[0.1, None], [0.8, None], [0.9, 0.3], [0.5, 0.7]]
    means = [0.9, pytest.approx(0.6)]
    assert run.moments == Moments("epochs", [0, 1, 2, 3], expected, [0, 2], [2, 3], means)
    (run,) = find_runs(make_run(seed=1)).runs
    expected = [[0.1, None], [0.9, 0.3], [0.4, 0.8]]
    assert run.moments == Moments("epochs", [0, 2, 4], expected, [0, 2], [2, 4], means)


def test_a_stream_that_ended_early(make_run: Make) -> None:
    (run,) = find_runs(make_run(matrix=[[0.1, 0.2], [0.9, 0.3], [None, None]])).runs
    assert (run.learned, run.tasks) == (1, 2)
    assert run.moments.at == [0, 2]


@pytest.mark.parametrize(
    ("files", "state", "why"),
    [
        ({"config.yaml": ""}, "not finished", "It is running, or was stopped."),
        ({"checkpoints/last.ckpt": ""}, "not finished", "It has a checkpoint to continue from."),
        ({"failed.json": "{}", "log.txt": "x"}, "failed", "Its log.txt says why."),
        ({"results.json": "{"}, "unreadable", "to be the results.json of a finished run"),
        ({"results.json": '{"schema_version": 1}'}, "unreadable", "to be 3, but got 1"),
        ({"results.json": '{"schema_version": 3}'}, "unreadable", "Expected experiment of"),
    ],
)
def test_a_run_without_results_is_named(
    files: dict[str, str], state: str, why: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        path = tmp_path / "digits_inc" / "ewc" / "seed_0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    problem = only_problem(tmp_path)
    assert (problem.where, problem.state) == ("digits_inc/ewc/seed_0", state)
    assert why.lower() in problem.why.lower()


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("accuracy_matrix.csv", None, "to be the accuracy matrix of a run"),
        ("accuracy_matrix.csv", "after_task,task_1\n1,0.5\n", "a column for each of the 2 tasks"),
        ("config.yaml", None, "settings are not known"),
        ("config.yaml", "{", "settings are not known"),
        ("config.yaml", "words", "got 'words'"),
    ],
)
def test_a_run_that_lacks_a_part_is_shown_and_named(
    make_run: Make, file: str, text: str | None, why: str
) -> None:
    folder = make_run()
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    found = find_runs(folder)
    assert found.runs[0].matrix[-1] == [0.4, 0.8]  # without the matrix, from results.json
    assert found.problems[0].state == "incomplete"
    assert why in found.problems[0].why


def test_links_are_followed_once(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    (tmp_path / "runs" / "again").symlink_to(folder)
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "runs")  # the root itself may be one
    for root in ("runs", "link"):
        assert [run.source for run in find_runs(tmp_path / root).runs] == ["again"]


def test_links_out_of_the_folder_are_named_and_not_followed(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to `/` would walk the whole disk."""
    make_run()
    outside = make_run(root="elsewhere")
    (tmp_path / "runs" / "disk").symlink_to("/")
    (tmp_path / "runs" / "other").symlink_to(outside)
    listed = []
    scandir = os.scandir

    def watch(path: str) -> object:
        listed.append(Path(path).resolve())
        return scandir(path)

    monkeypatch.setattr(os, "scandir", watch)
    found = find_runs(tmp_path / "runs")
    assert len(found.runs) == 1
    said = {problem.where: problem.why for problem in found.problems}
    assert said.keys() == {"disk", "other"}
    assert said["other"] == (
        f"It is a link that leads out of the folder, to {outside}. Name {outside}."
    )
    below = [path for path in listed if not path.is_relative_to(tmp_path / "runs")]
    assert set(below) <= {Path("/"), outside}  # looked at, and gone no further


def test_a_file_of_a_run_that_is_a_link_to_elsewhere(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to("/etc/passwd")
    assert "it is a link to elsewhere" in only_problem(tmp_path / "runs").why


def test_the_walk_is_bounded(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a")
    for number in range(20):
        (tmp_path / "runs" / "z" / str(number)).mkdir(parents=True)
    monkeypatch.setattr(reading, "MAX_FOLDERS", 6)
    found = find_runs(tmp_path / "runs")
    assert [run.setup for run in found.runs] == ["a"]
    (problem,) = found.problems
    assert problem.why.startswith("More than 6 folders lie here. Name one that is further down.")
    monkeypatch.setattr(reading, "MAX_FOLDERS", 100)
    monkeypatch.setattr(reading, "MAX_DEPTH", 1)
    found = find_runs(tmp_path / "runs")
    assert found.runs == []
    assert {problem.where for problem in found.problems} == {"digits_inc", "z"}


def test_a_folder_that_cannot_be_listed_is_named(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("ewc")
    make_run("psp")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("psp"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_runs(tmp_path / "runs")
    assert [run.setup for run in found.runs] == ["ewc"]
    (problem,) = found.problems
    assert (problem.where, problem.state) == ("digits_inc/psp", "unreadable")


def test_a_config_above_runs_and_those_of_loggers_are_no_runs(
    make_run: Make, tmp_path: Path
) -> None:
    make_run()
    (tmp_path / "runs" / "config.yaml").write_text("")
    for place in ("wandb/run-1/files", "lightning_logs/version_0"):
        (tmp_path / "runs" / place).mkdir(parents=True)
        (tmp_path / "runs" / place / "config.yaml").write_text("")
    found = find_runs(tmp_path / "runs")
    assert (len(found.runs), found.problems) == (1, [])


def test_a_stream_without_tasks_is_none(make_run: Make) -> None:
    assert "a stream of tasks" in only_problem(make_run(tasks=[])).why


def test_what_is_no_number_is_named(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"average": 0.3', '"average": NaN'))
    assert "NaN is not a finite 64-bit number" in only_problem(folder).why
    (folder / "accuracy_matrix.csv").write_text("after_task,task_1,task_2\n1,inf,0\n")
    assert find_runs(folder).runs == []


def with_tasks(count: int) -> dict[str, Any]:
    return {"tasks": [{"id": k, "classes": ["a"], "epochs": 1} for k in range(count)]}


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("accuracy.average", "9" * 400, "is not a finite 64-bit number"),
        ("accuracy.average", "1e400", "is not a finite 64-bit number"),
        ("accuracy.average", "Infinity", "is not a finite 64-bit number"),
        ("accuracy.average", "1e308", "accuracy.average is 1e+308"),
        ("accuracy.forgetting", "-7", "accuracy.forgetting is -7"),
        ("accuracy_task_agnostic.average", "NaN", "is not a finite 64-bit number"),
        ("provenance.seconds", "1e300", "provenance.seconds is 1e+300"),
        ("bytes_held.inference", "-1", "bytes_held.inference is -1"),
        ("tasks", json.dumps(with_tasks(2001)["tasks"]), "2,000 at most, but got 2001"),
        ("experiment", json.dumps("x" * 10**6), "a name has 1,000,"),
        ("tasks_learned", "[5, 6, 7, 8]", "made up: IndexError"),
    ],
)
def test_a_bad_run_leaves_the_others(
    make_run: Make, tmp_path: Path, key: str, value: str, why: str
) -> None:
    """Left out with its reason; and the page of the others is the one without it."""
    for seed in range(3):
        make_run(seed=seed)
    runs = tmp_path / "runs"
    alone = find_runs(runs)
    folder = make_run("psp")
    part = whole = json.loads((folder / "results.json").read_text())
    *way, last = key.split(".")
    for name in way:
        part = part[name]
    part[last] = "HERE"
    (folder / "results.json").write_text(json.dumps(whole).replace('"HERE"', value))
    if last == "tasks_learned":
        (folder / "accuracy_matrix.csv").unlink()
    found = find_runs(runs)
    (problem, *_) = (one for one in found.problems if one.state == "unreadable")
    assert (problem.where, why in problem.why) == ("digits_inc/psp/seed_0", True)
    assert len(problem.why) < 500
    assert found.runs == alone.runs
    page = render(found, compare(found.runs, [], None), "0")
    assert why.encode() in page


def test_a_run_whose_matrix_is_missing_or_huge(make_run: Make) -> None:
    folder = make_run(**with_tasks(99))
    (folder / "accuracy_matrix.csv").unlink()
    found = find_runs(folder)
    assert render(found, compare(found.runs, [], None), "0")
    columns = ",".join(f"task_{task + 1}" for task in range(200_000))
    (folder / "accuracy_matrix.csv").write_text(f"after_task,{columns}\n")
    found = find_runs(folder)
    assert "to have at most 2,000 tasks, but got 200,000" in found.problems[0].why


@pytest.mark.parametrize(
    "curve",
    [
        [1],
        [{"epoch": 1}],
        [{"epoch": 1, "task": 0, "accuracy": [1]}],
        [{"epoch": 1, "task": 10**9, "accuracy": [1, 1]}],
        [{"epoch": 1e300, "task": 0, "accuracy": [1, 1]}],
    ],
)
def test_a_curve_that_cannot_be_read_is_not_the_end(make_run: Make, curve: object) -> None:
    folder = make_run(extra={"curve": curve})
    assert "extra.curve" in only_problem(folder).why
    assert find_runs(folder).runs[0].moments.at == [0, 2, 4]


KEPT = {
    "accuracy": {
        "average": 0.6,
        "first_task": 0.4,
        "per_task": [0.4, 0.8],
        "bwt": -0.5,
        "fwt": None,
        "forgetting": 0.5,
    },
    "accuracy_task_agnostic": None,
    "accuracy_after_learning": {"average": 0.85, "per_task": [0.9, 0.8]},
    "front": None,
    "gates": {},
    "bytes_per_task": {"measured": 552, "paper": 520},
    "bytes_held": {"training": 1104, "inference": 552},
    "classes": [1, 1],
    "epochs": [2, 2],
    "provenance": {
        "seconds": 12.5,
        "date": "2020-01-01T00:00:00+00:00",
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "commit": None,
        "host": {"platform": "p", "cpu": "c", "gpu": None, "threads": 1},
    },
}


def grid(folder: Path, *seeds: int, missing: tuple[str, ...] = ()) -> None:
    """A cells.json of `ewc` on the digits, with a varied rank."""
    records = [
        RunRecord(
            experiment="digits_inc",
            method="ewc",
            seed=seed,
            label="short",
            variant={"strategies.bd.rank": 10},
            results=KEPT,
            matrix=[[None, None], [0.9, None], [0.4, 0.8]],
            epochs=[2, 2],
        )
        for seed in seeds
    ]
    write_collection(
        Collection("g", "A grid", "Text", (("a", "b"),), (), (), missing, tuple(records)), folder
    )


def test_a_collection_repeats_no_run_that_has_a_folder(make_run: Make, tmp_path: Path) -> None:
    make_run(seed=0, root="runs/short/rank=10")
    missing = [f"digits_inc, short, ewc, seed {seed}, rank 10" for seed in (0, 7)]
    grid(tmp_path / "runs" / "report", 0, 1, missing=tuple(missing))
    found = find_runs(tmp_path / "runs")
    assert [run.source for run in found.runs] == [
        "short/rank=10/digits_inc/ewc/seed_0",
        "report/cells.json",
    ]
    assert {(run.place, run.setup) for run in found.runs} == {("digits_inc, short", "ewc, rank 10")}
    assert (found.title, found.compare) == ("A grid", [("a", "b")])
    # seed 0 was finished since
    assert [problem.where for problem in found.problems] == [missing[1]]


def test_a_collection_alone(tmp_path: Path) -> None:
    grid(tmp_path, 0)
    for path in (tmp_path, tmp_path / CELLS):
        (run,) = find_runs(path).runs
        assert run.matrix == [[None, None], [0.9, None], [0.4, 0.8]]
        assert run.moments.at == [0, 2, 4]
        assert run.at("accuracy", "average") == 0.6
        assert run.at("accuracy_task_agnostic", "average") is None
        assert run.settings is None


def test_a_damaged_collection_is_named(tmp_path: Path) -> None:
    grid(tmp_path, 0)
    whole = (tmp_path / CELLS).read_text()
    for key, value in (
        ("matrix", 5),
        ("matrix", [["x"]]),
        ("matrix", [[0.5, 0.5]]),
        ("results", {"accuracy": {"average": "x"}}),
        ("seed", "0"),
        ("variant", None),
    ):
        found = json.loads(whole)
        found["cells"][0][key] = value
        (tmp_path / CELLS).write_text(json.dumps(found))
        assert only_problem(tmp_path).state == "unreadable"
    grid(tmp_path, 0, 1)
    found = json.loads((tmp_path / CELLS).read_text())
    found["cells"][0]["curve"] = [{"epoch": 1, "task": 10**9, "accuracy": []}]
    (tmp_path / CELLS).write_text(json.dumps(found))
    assert [run.seed for run in find_runs(tmp_path).runs] == [1]
    assert "Run 1 of" in find_runs(tmp_path).problems[0].why
    (tmp_path / CELLS).write_text("{}")
    assert only_problem(tmp_path).state == "unreadable"


def test_one_run_in_two_places_counts_once(tmp_path: Path) -> None:
    grid(tmp_path, 0, 0)
    found = find_runs(tmp_path)
    assert len(found.runs) == 1
    assert found.problems[0].state == "not shown"


@pytest.mark.slow
def test_the_committed_results_are_all_there() -> None:
    lines = sum(
        line.startswith('    {"experiment"')
        for path in RESULTS.glob("*/cells.json")
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    found = find_runs(RESULTS)
    assert len(found.runs) == lines > 100
    assert {problem.state for problem in found.problems} <= {"not finished", "not run"}


def test_where_there_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="there is no such folder"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"found no results\.json and no cells\.json"):
        find_runs(tmp_path)


def test_seeds_of_other_settings_are_other_rows(make_run: Make, tmp_path: Path) -> None:
    """A row is a mean over seeds: of one stream, one network and one value of everything."""

    def data(**arguments: Any) -> dict[str, Any]:
        return {"data": {"class_path": "SplitDigits", "init_args": {"root": "x", **arguments}}}

    make_run("ewc", 0, config=data(num_tasks=5) | {"strategies": {"ewc": {"strength": 5.0}}})
    make_run("ewc", 1, config=data(num_tasks=5) | {"strategies": {"ewc": {"strength": 7.0}}})
    make_run("ewc", 2, config=data(num_tasks=2) | {"strategies": {"ewc": {"strength": 7.0}}})
    make_run("bd", 0, config=data(num_tasks=5, root="y") | {"trainer": {"accelerator": "cpu"}})
    make_run(
        "bd", 1, config=data(num_tasks=5) | {"model": {"mask": "all", "evaluate_every": "epoch"}}
    )
    comparison = compare(find_runs(tmp_path / "runs").runs)
    assert [(row.place, row.name, row.seeds) for row in comparison.rows] == [
        ("digits_inc, num_tasks 2", "ewc", [2]),
        ("digits_inc, num_tasks 5", "bd", [0, 1]),
        ("digits_inc, num_tasks 5", "ewc, strength 5.0", [0]),
        ("digits_inc, num_tasks 5", "ewc, strength 7.0", [1]),
    ]


@pytest.mark.parametrize(
    ("seeds", "methods"),
    [
        ((None, None, 7), {"ewc"}),  # three streams for three seeds
        ((7, 7, 7), {"ewc"}),  # one stream for all
        ((7, 7, None), {"ewc, seed 7", "ewc, seed 2"}),  # neither
    ],
)
def test_the_seed_of_the_stream(
    make_run: Make, tmp_path: Path, seeds: tuple[int | None, ...], methods: set[str]
) -> None:
    for seed, of_stream in enumerate(seeds):
        make_run("ewc", seed, config={"data": {"init_args": {"seed": of_stream}}})
    assert {run.setup for run in find_runs(tmp_path / "runs").runs} == methods


def test_values_that_the_folders_tell_are_told_once(make_run: Make, tmp_path: Path) -> None:
    for rank in (4, 8):
        config = {"strategies": {"bd": {"rank": rank}}}
        make_run("bd", root=f"runs/rank={rank}", config=config)
    assert [run.setup for run in find_runs(tmp_path / "runs").runs] == ["bd, rank 4", "bd, rank 8"]
