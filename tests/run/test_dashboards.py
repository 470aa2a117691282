"""What loggers show, read back from what they wrote by their own readers."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import runpy
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from PIL import Image

from bpn_lightning.cli.main import main
from bpn_lightning.datamodules import SplitDigits
from bpn_lightning.run import dashboards, loggers
from bpn_lightning.run.dashboards import Dashboard
from bpn_lightning.strategies import (
    EWC,
    SLNID,
    AveragedGEM,
    BeneficialPerturbation,
    EncoderBasedLifelongLearning,
    FineTuning,
    GradientEpisodicMemory,
    IncrementalMomentMatching,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    SynapticIntelligence,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]

ROOT = Path(__file__).parent.parent.parent
DOCS = (ROOT / "docs" / "wandb.md").read_text(encoding="utf-8")
FOLDER = Path("runs", "digits_inc", "bd+ewc", "seed_3")
TASKS = 3

KILL = """
from lightning.pytorch import Callback


class Kill(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step >= 8:
            raise ZeroDivisionError("killed")
"""
CLOSED_PORT = "http://127.0.0.1:9"


def wandb_environment(patch: pytest.MonkeyPatch, folder: Path, **more: str) -> None:
    """No account, no mode that was chosen, nothing outside the folder; read by W&B once a session."""
    import wandb

    for name in [*os.environ]:
        if name.startswith("WANDB_") and name != "WANDB_SILENT":
            patch.delenv(name)
    patch.setenv("NETRC", str(folder / "netrc"))
    for kind in ("CACHE", "CONFIG", "DATA"):
        patch.setenv(f"WANDB_{kind}_DIR", str(folder / kind.lower()))
    for name, value in more.items():
        patch.setenv(name, value)
    wandb.teardown()


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run without account and network that was stopped in its second task and resumed, in all loggers.

    There is a checkpoint after each update. That after the eighth does not count: it is stopped before it
    is known whether the row of that update was logged.
    """
    import wandb

    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
        patch.setenv("PL_SEED_WORKERS", "0")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Path("stops_a_run.py").write_text(KILL)
        wandb_environment(patch, folder, WANDB_BASE_URL=CLOSED_PORT)
        line = [
            *[
                "--config",
                "digits_inc.yaml",
                "--trainer.accelerator",
                "cpu",
                "--seed_everything",
                "3",
            ]
        ]
        line += [
            *["--data.num_tasks", "3", "--data.epochs_per_task", "2", "--quiet", "--log_artifacts"]
        ]
        line += [*["--data.batch_size", "100", "--model.evaluate_every", "epoch"]]
        line += [*["--trainer.log_every_n_steps", "1", "--checkpoint_every_n_steps", "1"]]
        line += ["--logger", "wandb,tensorboard,csv,mlflow"]
        with pytest.raises(ZeroDivisionError):
            main([*line, "--trainer.callbacks", "stops_a_run.Kill"])
        with redirect_stdout(io.StringIO()) as out:
            assert main([*line, "--ckpt_path", "last"]) == 0
        assert out.getvalue() == ""  # --quiet
        wandb.teardown()  # as at the end of a process: its service writes what it still holds
        yield folder
    wandb.teardown()


@pytest.fixture
def run(stopped_and_resumed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(stopped_and_resumed)
    return FOLDER


def logged_rows(run: Path) -> dict[tuple[int, str], float]:
    """metrics.csv, which has every row of a resumed run once."""
    with (run / "metrics.csv").open(newline="") as file:
        return {
            (int(row["step"]), key): float(value)
            for row in csv.DictReader(file)
            for key, value in row.items()
            if key != "step" and value
        }


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def matrix(run: Path) -> list[list[float]]:
    with (run / "accuracy_matrix.csv").open(newline="") as file:
        return [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]


# --- W&B -----------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB with records in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if left < 7 or kind == 0:  # the rest of the block is padding
            place += left
            continue
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


class WandbFile:
    """What one launch wrote."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent / "files"
        found: dict[str, list[Any]] = {}
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
        (self.run,) = found["run"]
        self.config = {
            item.key: json.loads(item.value_json)
            for update in found["config"]
            for item in update.update
        }
        self.axes = {m.glob_name or m.name: m.step_metric for m in found["metric"]}
        self.rows = [
            {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
            for row in found["history"]
        ]
        self.artifacts = found.get("artifact", [])
        self.exit_code = found["exit"][0].exit_code

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        (path,) = [row[f"{key}/path"] for row in self.rows if f"{key}/path" in row]
        found = json.loads((self.folder / path).read_text())
        return found["columns"], found["data"]


@pytest.fixture
def launches(run: Path) -> list[WandbFile]:
    folders = sorted((run / "wandb").glob("offline-run-*"))
    return [WandbFile(next(folder.glob("*.wandb"))) for folder in folders]


def test_wandb_goes_on_in_the_same_run(launches: list[WandbFile]) -> None:
    first, second = launches
    assert first.run.run_id == second.run.run_id
    assert second.run.resume  # what `wandb sync` appends by
    assert (first.exit_code, second.exit_code) == (1, 0)
    steps = [[row["_step"] for row in launch.rows] for launch in launches]
    assert all(launch == list(range(launch[0], launch[-1] + 1)) for launch in steps)
    assert 0 == steps[0][0] < steps[1][0] <= steps[0][-1] + 1
    # A row is numbered by the updates before it: this is the seventh update's, logged after its checkpoint.
    (lost,) = [
        row["_step"]
        for row in first.rows
        if row["trainer/global_step"] == 6 and "train/loss" in row
    ]
    assert steps[1][0] == lost


def test_wandb_gets_every_row_of_metrics_csv(run: Path, launches: list[WandbFile]) -> None:
    found = {
        (row["trainer/global_step"], key): value
        for launch in launches
        for row in launch.rows
        for key, value in row.items()
        if not key.startswith(("_", "trainer/", "figures/", "tables/", "time/"))
    }
    assert found == pytest.approx(logged_rows(run))
    axis = [row["trainer/global_step"] for launch in launches for row in launch.rows]
    assert set(axis) == {step for step, _ in logged_rows(run)}
    timed = {r["trainer/global_step"] for x in launches for r in x.rows if "time/step" in r}
    assert timed == {step for step, key in logged_rows(run) if key == "train/loss"}
    assert all(launch.axes["*"] == "trainer/global_step" for launch in launches)
    assert all(launch.axes["bytes_held/*"] == "stream/tasks_learned" for launch in launches)


def test_wandb_groups_by_experiment_and_method(launches: list[WandbFile]) -> None:
    for launch in launches:
        run, config = launch.run, launch.config
        assert (run.project, run.run_group) == ("bpn_lightning", "digits_inc/bd+ewc")
        assert (run.job_type, run.display_name) == ("seed_3", "bd+ewc, seed 3")
        named = (config["experiment"], config["method"], config["seed"])
        assert named == ("digits_inc", "bd+ewc", 3)
        assert config["data"]["init_args"]["num_tasks"] == TASKS
        assert set(config["strategies"]) == {"bd", "ewc"}
        assert config["provenance"]["versions"]["torch"] == version("torch")
        assert "commit" in config["provenance"]


@pytest.mark.filterwarnings("ignore:The stream has no data of tasks 1 to")
def test_wandb_has_one_group_for_a_stream_of_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    wandb_environment(monkeypatch, tmp_path, WANDB_BASE_URL=CLOSED_PORT)
    flags = ["--trainer.accelerator", "cpu", "--quiet", "--data.init_args.epochs_per_task", "1"]
    flags += ["--data.init_args.batch_size", "100", "--logger", "wandb"]
    first = ["--config", "digits_inc.yaml", "--model.mask", "seen", "--data.init_args.num_tasks"]
    assert main([*first, "3", *flags]) == 0
    found, past = [], "digits_inc"
    for name, classes in {"second": "[6, 7]", "third": "[8, 9]"}.items():
        new = ["--data", "SplitDigits", "--data.init_args.class_order", classes]
        before = ["--continue_from", f"runs/{past}/bd+ewc/seed_0"]
        assert main(["--experiment", name, *before, *new, *flags]) == 0
        past = name
    for name in ("digits_inc", "second", "third"):
        (path,) = Path("runs", name).glob("bd+ewc/seed_0/wandb/offline-run-*/*.wandb")
        found.append(WandbFile(path))
    assert len({launch.run.run_id for launch in found}) == 3
    assert {(one.run.run_group, one.run.job_type) for one in found} == {
        ("digits_inc/bd+ewc", "seed_0")
    }
    assert [launch.run.display_name for launch in found] == [
        "bd+ewc, seed 0",
        "second: bd+ewc, seed 0",
        "third: bd+ewc, seed 0",
    ]
    assert "continues" not in found[0].config
    continues = [launch.config["continues"] for launch in found[1:]]
    assert [one["tasks"] for one in continues] == [3, 4]
    assert continues[1]["run"] == "second, method bd+ewc, seed 0"
    for key, numbers in (
        ("trainer/global_step", None),
        ("stream/tasks_learned", [0, 1, 2, 3, 4, 5]),
    ):
        rows = [[row[key] for row in launch.rows if key in row] for launch in found]
        joined = [value for one in rows for value in one]
        assert joined == sorted(joined)
        assert numbers is None or list(dict.fromkeys(joined)) == numbers


def test_wandb_shows_each_task_once(launches: list[WandbFile]) -> None:
    for key in ("figures/accuracy_matrix", "figures/accuracy_over_stream"):
        names = [
            (launch.folder, row[f"{key}/filenames"][0])
            for launch in launches
            for row in launch.rows
            if f"{key}/filenames" in row
        ]
        assert len(names) == TASKS
        pictures = [Image.open(folder / name) for folder, name in names]
        assert all(min(picture.size) > 300 for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == TASKS


def test_wandb_tables_are_the_run_s_results(run: Path, launches: list[WandbFile]) -> None:
    columns, rows = launches[1].table("tables/accuracy_matrix")
    assert columns == ["after_task", "task_1", "task_2", "task_3"]
    assert rows == matrix(run)
    columns, rows = launches[1].table("tables/accuracy")
    assert columns[:2] == ["task", "classes"]
    for column, values in zip(columns[2:], list(zip(*rows, strict=True))[2:], strict=True):
        assert list(values) == results(run)[column]["per_task"]


def test_wandb_keeps_results_and_checkpoint(run: Path, launches: list[WandbFile]) -> None:
    kept = {a.type: a for a in launches[1].artifacts if a.type in ("results", "checkpoint")}
    assert kept["results"].name == "digits_inc-bd-ewc-seed_3-results"
    digests = {f.path: f.digest for kind in kept.values() for f in kind.manifest.contents}
    assert set(digests) >= {"results.json", "config.yaml", "metrics.csv", "last.ckpt"}
    for name in ("results.json", "checkpoints/last.ckpt"):
        md5 = base64.b64encode(hashlib.md5((run / name).read_bytes()).digest()).decode()
        assert digests[Path(name).name] == md5


# --- TensorBoard, CSV, MLflow --------------------------------------------------------------------


def test_tensorboard_goes_on_in_the_same_folder(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / "tensorboard").iterdir()
    assert len(list(folder.glob("events.*"))) == 2
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    scalars = [tag for tag in tags["scalars"] if tag != "time/step"]
    found = {(e.step, tag): e.value for tag in scalars for e in events.Scalars(tag)}
    assert found == pytest.approx(logged_rows(run))
    for key in ("figures/accuracy_matrix", "figures/accuracy_over_stream"):
        assert len(events.Images(key)) == TASKS
    text = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]
    }
    final = results(run)["accuracy"]["per_task"]
    (line,) = [one for one in text["tables/accuracy/text_summary"].splitlines() if "| 1 |" in one]
    assert f"| {final[0]:.4f} |" in line


def test_csv_has_the_numbers_of_each_launch(run: Path) -> None:
    files = sorted((run / "csv").glob("version_*/metrics.csv"))
    found = {}
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                found |= {(step, key): float(value) for key, value in row.items() if value}
    assert len(files) == 2
    assert {k: v for k, v in found.items() if k[1] != "time/step"} == pytest.approx(
        logged_rows(run)
    )


def test_mlflow_goes_on_in_the_same_run(run: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("digits_inc")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "bd+ewc, seed 3"
    assert found.data.params["data/init_args/num_tasks"] == str(TASKS)
    history = {
        (metric.step, key): metric.value
        for key in found.data.metrics
        if key != "time/step"
        for metric in client.get_metric_history(found.info.run_id, key)
    }
    assert history == pytest.approx(logged_rows(run))
    artifacts = Path(found.info.artifact_uri.removeprefix("file://"))
    shown = Counter(path.name.partition("+")[0] for path in artifacts.glob("images/*.png"))
    assert shown == {"figures~accuracy_matrix": TASKS, "figures~accuracy_over_stream": TASKS}
    with (artifacts / "tables" / "accuracy_matrix.csv").open(newline="") as file:
        assert [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]] == matrix(run)
    kept = (artifacts / "results" / "results.json").read_bytes()
    assert kept == (run / "results.json").read_bytes()


# --- which loggers -------------------------------------------------------------------------------


def test_lightning_s_own_spelling_gets_what_it_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    wandb_environment(monkeypatch, tmp_path, WANDB_BASE_URL=CLOSED_PORT)
    line = "--config digits_inc.yaml --method finetune --data.num_tasks 1 --data.epochs_per_task 1"
    line += " --trainer.accelerator cpu --trainer.logger WandbLogger --trainer.logger.project mine"
    assert main([*line.split(), "--json"]) == 0
    out, err = capfd.readouterr()
    folder = Path("runs/digits_inc/finetune/seed_0")
    assert json.loads(out) == json.loads((folder / "results.json").read_text())
    assert err.splitlines()[-1] == (
        f"bpn-fit: W&B logs offline: {CLOSED_PORT} cannot be reached. "
        f"Upload it later: wandb sync {folder / 'wandb'}"
    )
    wandb.teardown()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    made = WandbFile(path).run
    assert (made.project, made.run_group) == ("mine", "digits_inc/finetune")
    assert "offline" not in (folder / "config.yaml").read_text().replace("offline: false", "")


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: Any) -> None:
        pass


def test_wandb_is_offline_where_it_would_ask_or_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb_environment(monkeypatch, tmp_path, WANDB_BASE_URL=CLOSED_PORT)
    assert loggers.offline_reason() == f"{CLOSED_PORT} cannot be reached"
    wandb_environment(monkeypatch, tmp_path, WANDB_BASE_URL=CLOSED_PORT, WANDB_MODE="offline")
    assert loggers.offline_reason() is None  # it is told so

    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_port}"
        wandb_environment(monkeypatch, tmp_path, WANDB_BASE_URL=there)
        assert "no API key" in str(loggers.offline_reason())
        key = {"WANDB_API_KEY": "a" * 40}
        wandb_environment(monkeypatch, tmp_path, WANDB_BASE_URL=there, **key)
        assert loggers.offline_reason() is None
        wandb_environment(monkeypatch, tmp_path, WANDB_BASE_URL=there, WANDB_API_KEY="short")
        assert "API key" in str(loggers.offline_reason())
        server.shutdown()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--logger wandbb",
            "one of wandb, tensorboard, csv, mlflow, but got 'wandbb'. Did you mean",
        ),
        ("--logger csv --trainer.logger false", "but got false and logger csv"),
    ],
)
def test_loggers_that_cannot_be(
    flags: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "digits_inc.yaml", *flags.split()]) == 2
    assert expected in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "alembic" else name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    name = loggers.RunName("e", "m", 0, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"alembic to be .*pip install 'bpn_lightning\[mlflow\]'"):
        loggers.complete_loggers(["mlflow"], None, name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a server keeps the runs
    (spec,) = loggers.complete_loggers(["mlflow"], None, name)
    assert spec.init_args.tracking_uri == "http://127.0.0.1:9"


# --- the keys ------------------------------------------------------------------------------------


class Recorder(Logger):
    """Keeps what is logged."""

    name = version = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    @property
    def keys(self) -> set[str]:
        return {key for _, row in self.rows for key in row}


def recorded(
    fit: Any, *callbacks: Callback, module: Mapping[str, Any] | None = None, **stream: Any
) -> Recorder:
    logger = Recorder()
    shape = {"num_tasks": 2, "epochs_per_task": 1, "batch_size": 100, "seed": 0, **stream}
    trainer = {"logger": logger, "log_every_n_steps": 1}
    fit([*callbacks], stream=SplitDigits(**shape), trainer=trainer, **(module or {}))
    return logger


#: What each strategy gives beside what every run has.
OWN_KEYS = {
    FineTuning: set(),
    EWC: {"penalty/ewc"},
    SynapticIntelligence: {"penalty/si"},
    MemoryAwareSynapses: {"penalty/mas"},
    SLNID: {"penalty/slnid", "loss/inhibition"},
    IncrementalMomentMatching: {"penalty/imm"},
    LearningWithoutForgetting: {"loss/lwf"},
    EncoderBasedLifelongLearning: {"loss/lwf", "loss/ebll", "loss/autoencoder"},
    GradientEpisodicMemory: {"memories/violated", "memories/lowest_cosine"},
    AveragedGEM: {"memories/violated", "memories/lowest_cosine"},
    BeneficialPerturbation: {"bias_norm/backbone.1", "bias_norm/backbone.3", "bias_norm/head"},
}


def documented() -> list[str]:
    """The keys of the table in the docs."""
    (section,) = re.findall(r"^## What is logged\n(.*?)^## ", DOCS, re.DOTALL | re.MULTILINE)
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def matches(key: str, written: str) -> bool:
    parts = re.split(r"<\w+>", written)
    return re.fullmatch(r"[\w.]+".join(map(re.escape, parts)), key) is not None


def test_what_is_logged_is_what_is_documented(fit: Any) -> None:
    common = recorded(fit, FineTuning(), Dashboard(), validation_fraction=0.2).keys
    seen = set(common) | {"trainer/global_step"}
    for strategy, own in OWN_KEYS.items():
        sized = issubclass(strategy, GradientEpisodicMemory)
        keys = recorded(fit, strategy(memory_size=10) if sized else strategy()).keys
        assert keys - common == own, strategy
        seen |= keys
    seen |= recorded(fit, FineTuning(), module={"train": "modes", "mask": "seen"}).keys
    media = {f"figures/{name}" for name in ("accuracy_matrix", "accuracy_over_stream")}
    media |= {f"tables/{name}" for name in ("accuracy_matrix", "accuracy")}
    table = documented()
    assert len(table) == len(set(table)) > 25
    unwritten = {key for key in seen if not any(matches(key, written) for written in table)}
    assert not unwritten
    never = {w for w in table if not any(matches(key, w) for key in seen | media)}
    assert not never


# Of wandb-workspaces, when it is imported.
@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_the_workspace_shows_documented_keys_only(capsys: pytest.CaptureFixture[str]) -> None:
    made = runpy.run_path(str(ROOT / "examples" / "wandb_workspace.py"))
    view = json.loads(made["specification"](made["workspace"]("somebody", "something")))
    sections = view["section"]["panelBankConfig"]["sections"]
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    written = documented()
    single = {key for panel in panels for key in panel.get("metrics", [])}
    single |= {panel["xAxis"] for panel in panels if "xAxis" in panel}
    single |= {key for panel in panels for key in panel.get("mediaKeys", [])}
    assert single <= set(written)
    patterns = {panel["metricRegex"] for panel in panels if "metricRegex" in panel}
    examples = [re.sub(r"<\w+>", "1", key) for key in written]
    found = {p: [e for e in examples if re.search(p, e)] for p in patterns}
    assert all(found.values())
    assert found["^accuracy/task_.*"] == ["accuracy/task_1"]
    shown = single | {key for keys in found.values() for key in keys}
    hidden = {e for e in examples if e not in shown and not e.startswith(("val/", "tables/"))}
    assert hidden == {"epoch", "accuracy_task_agnostic/task_1", "overtaken/average"}
    text = json.dumps(view)
    assert all(f'"{key}"' in text for key in written if key.startswith("tables/"))
    grouping = view["section"]["runSets"][0]["grouping"]
    assert [group["name"] for group in grouping] == ["experiment.value", "method.value"]


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    Path("example.py").write_text(code)
    assert len(runpy.run_path("example.py")["trainer"].callbacks) > 1


# --- the time of a step --------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_time_of_a_step_leaves_evaluation_out(
    fit: Any, accumulated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only ticks where this callback says so: 3 s in a batch, 100 s between epochs."""
    now = 0.0

    class Clock(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            nonlocal now
            now += 3

        def on_train_epoch_start(self, *args: Any) -> None:
            nonlocal now
            now += 100

        on_validation_end = on_train_epoch_start

    monkeypatch.setattr(dashboards, "perf_counter", lambda: now)
    logger = Recorder()
    stream = SplitDigits(
        num_tasks=2, epochs_per_task=2, batch_size=30, seed=0, validation_fraction=0.2
    )
    trainer = {"logger": logger, "log_every_n_steps": 4, "accumulate_grad_batches": accumulated}
    fit([Clock(), Dashboard()], stream=stream, trainer=trainer)
    timed = [(step, row["time/step"]) for step, row in logger.rows if "time/step" in row]
    trained = [step for step, row in logger.rows if "train/loss" in row]
    assert [step for step, _ in timed] == trained
    assert len(timed) > 2
    assert all(seconds == 3 * accumulated for _, seconds in timed)
