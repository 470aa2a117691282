"""Readers, fed with what no program has written: they read it, or refuse it with an error of ours.

``BPN_FUZZ=20`` makes twenty times as many examples; ``python benchmarks/fuzz.py`` does so, and prints
how many there were; `make test` makes a quarter. The same number makes the same examples.
"""

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bpn_lightning import ContinualModule
from bpn_lightning.analysis.collection import read_collection
from bpn_lightning.analysis.comparison import compare
from bpn_lightning.bench.grid import read_grid
from bpn_lightning.cli import main as cli
from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.config_files import CONFIGS
from bpn_lightning.datamodules import SplitArrays, SplitDigits, SplitImageFolder, SplitMNIST
from bpn_lightning.datamodules.image_sets import IMAGE_SETS, make_image_set
from bpn_lightning.errors import BPNLightningError
from bpn_lightning.export.exporting import export_module, load_exported
from bpn_lightning.nn import MLP
from bpn_lightning.report.page import render
from bpn_lightning.report.reading import find_runs
from bpn_lightning.run.results import read_matrix_csv, read_results

pytestmark = pytest.mark.slow

TIMES = float(os.environ.get("BPN_FUZZ", "1"))
COUNTS: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _counted() -> Iterator[None]:
    yield
    names = sorted({name for name, _ in COUNTS})
    print(f"\n{'reader':<24}{'examples':>10}{'refused':>10}")
    for name in names:
        read, refused = COUNTS[name, "read"], COUNTS[name, "refused"]
        print(f"{name:<24}{read + refused:>10,}{refused:>10,}")
    print(f"{'in all':<24}{COUNTS.total():>10,}")


def fuzz(examples: int, **strategies: Any) -> Callable[..., Any]:
    """So many examples, the same in every run."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        bounded = settings(
            max_examples=max(1, round(examples * TIMES)),
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return bounded(given(**strategies)(test))

    return decorate


def feed(name: str, read: Callable[[], object]) -> None:
    """Let it read; every other error than ours fails the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except BPNLightningError:
        COUNTS[name, "refused"] += 1
    else:
        COUNTS[name, "read"] += 1


# --- examples ------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=6)), min_size=1, max_size=4
)


def edited(whole: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """The same with some bytes taken out, and others put there."""
    for place, taken, put in edits:
        at = int(place * len(whole))
        whole = whole[:at] + put + whole[at + taken :]
    return whole


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["ewc", "bd+ewc", "SplitDigits", "os.system", "a.B", "${x}", "..", "a/b", "all"]
    ),
)


def values(keys: list[str]) -> st.SearchStrategy[Any]:
    """Any tree of plain values, whose keys are often right."""
    key = st.one_of(st.sampled_from(keys), st.text(max_size=5))
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(key, inner, max_size=4)
        ),
        max_leaves=12,
    )


def replaced(whole: Any, choices: list[int], new: Any) -> Any:
    """The same tree with one of its values exchanged; the choices lead to it."""
    if not choices or not isinstance(whole, dict | list) or not whole:
        return new
    keys = list(whole) if isinstance(whole, dict) else range(len(whole))
    key = keys[choices[0] % len(keys)]
    changed = dict(whole) if isinstance(whole, dict) else list(whole)
    changed[key] = replaced(whole[key], choices[1:], new)
    return changed


WAY = st.lists(st.integers(0, 20), max_size=5)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all examples of a test."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("fuzz")
    os.chdir(folder)
    yield folder
    os.chdir(before)


# --- configs and grids ---------------------------------------------------------------------------

DIGITS = (CONFIGS / "digits_inc.yaml").read_bytes()
CONFIG_KEYS = ["method", "experiment", "model", "data", "trainer", "strategies", "class_path"]
CONFIG_KEYS += ["init_args", "backbone", "optimizer", "callbacks", "bd", "ewc", "mask"]


@fuzz(150, content=values(CONFIG_KEYS))
def test_configs_of_any_values(content: Any, here: Path) -> None:
    Path("x.yaml").write_text(yaml.safe_dump(content), encoding="utf-8", errors="replace")
    feed("configs", lambda: read_command(["--config", "digits_inc", "--config", "x.yaml"]))


@fuzz(100, edits=EDITS)
def test_configs_of_any_bytes(edits: list[Any], here: Path) -> None:
    Path("x.yaml").write_bytes(edited(DIGITS, edits))
    feed("configs", lambda: read_command(["--config", "x.yaml"]))


@fuzz(8, way=WAY, new=values(CONFIG_KEYS))
def test_configs_are_parsed(
    way: list[int], new: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = replaced(yaml.safe_load(DIGITS), way, new)
    Path("x.yaml").write_text(yaml.safe_dump(content), encoding="utf-8", errors="replace")
    status = cli.main(["--config", "x.yaml", "--print_config"])
    COUNTS["configs, parsed", "refused" if status else "read"] += 1
    assert status in (0, 2)


GRID = {
    "seeds": [0, 1],
    "experiments": [
        {
            "config": "digits_inc",
            "methods": ["bd"],
            "set": {"model.mask": "task"},
            "vary": {"strategies.bd.rank": [1, 10]},
            "label": "short",
            "probes": ["drift"],
        }
    ],
    "compare": [],
    "report": ["accuracy"],
}
GRID_KEYS = ["title", "seeds", "experiments", "compare", "report", "config", "methods", "set"]
GRID_KEYS += ["vary", "label", "probes", "not_run"]


@fuzz(80, way=WAY, new=values(GRID_KEYS))
def test_grids(way: list[int], new: Any, here: Path) -> None:
    text = yaml.safe_dump(replaced(GRID, way, new))
    Path("g.yaml").write_text(text, encoding="utf-8", errors="replace")
    feed("grids", lambda: read_grid("g.yaml"))


# --- data ----------------------------------------------------------------------------------------


def archive() -> bytes:
    images, labels = np.zeros((4, 4, 4), np.uint8), np.arange(4) % 2
    file = BytesIO()
    np.savez(file, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return file.getvalue()


NPZ = archive()


@fuzz(80, edits=EDITS)
def test_archives_of_any_bytes(edits: list[Any], here: Path) -> None:
    Path("x.npz").write_bytes(edited(NPZ, edits))
    feed("npz", lambda: SplitArrays(path="x.npz").setup())


SHAPES = st.lists(st.integers(0, 4), max_size=5)
DTYPES = st.sampled_from(["u1", "i8", "u8", "f4", "c8", "U3", "S2", "M8[s]", "?", "u1,i2"])


@fuzz(60, arrays=st.lists(st.tuples(SHAPES, DTYPES), min_size=4, max_size=4))
def test_archives_of_any_arrays(arrays: list[tuple[list[int], str]], here: Path) -> None:
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    made = {k: np.zeros(shape, dtype) for k, (shape, dtype) in zip(keys, arrays, strict=True)}
    np.savez("x.npz", allow_pickle=True, **made)
    feed("npz", lambda: SplitArrays(path="x.npz").setup())


def picture(kind: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (5, 5)).save(file, kind)
    return file.getvalue()


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]


@fuzz(70, kind=st.sampled_from(range(len(PICTURES))), edits=EDITS)
def test_images_of_any_bytes(kind: int, edits: list[Any], here: Path) -> None:
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            place = Path("set", part, name)
            place.mkdir(parents=True, exist_ok=True)
            (place / "1.png").write_bytes(PICTURES[0])
    (place / "1.png").write_bytes(edited(PICTURES[kind], edits))
    feed("class folders", lambda: SplitImageFolder(root="set", image_size=4).setup())


PART = st.sampled_from(["train", "test", "ant", "bee", ".x", "1.png", "2.PNG", "x.txt", "..", "é"])


@fuzz(40, paths=st.lists(st.tuples(PART, PART, PART), max_size=6), links=st.integers(0, 3))
def test_folders_of_any_shape(paths: list[tuple[str, ...]], links: int, here: Path) -> None:
    shutil.rmtree("tree", ignore_errors=True)
    Path("tree").mkdir()
    for count, (part, name, file) in enumerate(paths):
        place = Path("tree", part, name, file)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if count < links:
                place.symlink_to(here)
            else:
                place.write_bytes(PICTURES[0])
        except OSError:
            continue  # not a folder, or there already
    feed("class folders", lambda: SplitImageFolder(root="tree", image_size=4).setup())


IDX = {
    "train-images-idx3-ubyte": bytes([0, 0, 8, 3, *(0, 0, 0, 2), *(0, 0, 0, 28) * 2]) + bytes(1568),
    "train-labels-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1]),
}


@fuzz(30, name=st.sampled_from(sorted(IDX)), edits=EDITS)
def test_idx_files(name: str, edits: list[Any], here: Path) -> None:
    raw = Path("MNIST/raw")
    raw.mkdir(parents=True, exist_ok=True)
    for file, content in IDX.items():
        (raw / file).write_bytes(content)
        (raw / file.replace("train", "t10k")).write_bytes(content)
    head = edited(IDX[name][:20], edits)
    (raw / name).write_bytes(head + IDX[name][20:])
    feed("idx", lambda: SplitMNIST(root=".", download=False, num_tasks=1).setup())


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eight image sets in their official layouts."""
    place = Path(__file__).parent / "datamodules" / "image_sets" / "conftest.py"
    spec = spec_from_file_location("trees_of_image_sets", place)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("trees")
    module.Trees(root).write()
    names = sorted(
        str(path.relative_to(root / "English"))[:-4] for path in (root / "English").rglob("*.png")
    )
    (root / "English" / "Fnt" / "list_English_Fnt.m").write_text(
        "list.ALLnames = [" + "\n".join(f"'{name}'" for name in names) + "];\n"
        "list.ALLlabels = [" + "\n".join("1" for _ in names) + "];\n"
        "list.TRNind = [1;2];\nlist.TSTind = [3;4];\n"
    )
    return root


PICTURE_SUFFIXES = {".jpg", ".png"}


@pytest.mark.parametrize("name", IMAGE_SETS)
@fuzz(14, which=st.integers(0, 100), edits=EDITS)
def test_lists_of_the_eight_sets(name: str, which: int, edits: list[Any], trees: Path) -> None:
    options = {"split": "lists"} if name == "letters" else {}
    image_set = make_image_set(name, trees, options)
    found = sorted(path for path in image_set.folder.rglob("*") if path.is_file())
    lists = [path for path in found if path.suffix not in PICTURE_SUFFIXES] or found
    path = lists[which % len(lists)]
    before = path.read_bytes()
    path.write_bytes(edited(before, edits))
    try:
        feed(f"lists: {name}", lambda: image_set.checked(expect_counts=False))
    finally:
        path.write_bytes(before)


# --- what runs leave -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(here: Path) -> bytes:
    """A checkpoint of a small run, and `exported` beside it."""
    from lightning.pytorch import Trainer

    from bpn_lightning.strategies import BeneficialPerturbation

    model = ContinualModule(MLP([4]))
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BeneficialPerturbation(rank=2)],
    )
    stream = SplitDigits(num_tasks=2, epochs_per_task=1, batch_size=64, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, stream)
        trainer.save_checkpoint("x.ckpt")
    export_module(model, "exported")
    return Path("x.ckpt").read_bytes()


def load() -> None:
    ContinualModule.load_from_checkpoint("y.ckpt", backbone=MLP([4]))


@fuzz(40, edits=EDITS)
def test_checkpoints_of_any_bytes(edits: list[Any], learned: bytes) -> None:
    Path("y.ckpt").write_bytes(edited(learned, edits))
    feed("checkpoints", load)


@fuzz(40, way=WAY, new=values(["id", "columns"]))
def test_checkpoints_of_any_values(way: list[int], new: Any, learned: bytes) -> None:
    saved = torch.load("x.ckpt", weights_only=True)
    saved["continual"] = replaced(saved["continual"], way, new)
    torch.save(saved, "y.ckpt")
    feed("checkpoints", load)


@fuzz(40, name=st.sampled_from(["config.json", "model.safetensors"]), edits=EDITS)
def test_exported_files_of_any_bytes(name: str, edits: list[Any], learned: bytes) -> None:
    shutil.copytree("exported", "other", dirs_exist_ok=True)
    Path("other", name).write_bytes(edited(Path("exported", name).read_bytes(), edits))
    feed("exported", lambda: load_exported("other", MLP([4])))


@fuzz(60, way=WAY, new=values(["tensor", "items", "id"]))
def test_exported_records(way: list[int], new: Any, learned: bytes) -> None:
    shutil.copytree("exported", "other", dirs_exist_ok=True)
    record = json.loads(Path("exported/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(replaced(record, way, new)))
    feed("exported", lambda: load_exported("other", MLP([4])))


KEPT = Path(__file__).parent.parent / "docs" / "results" / "toy" / "cells.json"
CELLS = json.loads(KEPT.read_text())
CELLS["cells"] = CELLS["cells"][:2]
HOST = {"name": "n", "platform": "p", "cpu": "c", "gpu": None, "threads": 1}
RESULTS = {
    "schema_version": 3,
    "experiment": "e",
    "method": "m",
    "seed": 0,
    "tasks": [{"id": 0, "classes": ["a"], "epochs": 1}],
    "tasks_learned": [0],
    "tasks_not_learned": [],
    "accuracy": dict.fromkeys(("average", "first_task", "bwt", "fwt", "forgetting"))
    | {"per_task": [0.5]},
    "accuracy_task_agnostic": None,
    "front": None,
    "gates": {},
    "accuracy_after_learning": {"average": 0.5, "per_task": [0.5]},
    "unsettled_tasks": [],
    "metrics": {},
    "bytes_per_task": {"measured": 0, "paper": None},
    "bytes_held": {"training": 0, "inference": 0},
    "extra": {},
    "provenance": {"seconds": 1.0, "date": "d", "versions": {}, "commit": None, "host": HOST},
}
RESULT_KEYS = ["average", "per_task", "id", "classes"]


@fuzz(120, way=WAY, new=values(RESULT_KEYS), edits=st.one_of(st.just([]), EDITS))
def test_results(way: list[int], new: Any, edits: list[Any], here: Path) -> None:
    text = json.dumps(replaced(RESULTS, way, new)).encode()
    Path("results.json").write_bytes(edited(text, edits))
    feed("results.json", lambda: read_results(Path("results.json")))


@fuzz(120, way=WAY, new=values(RESULT_KEYS), edits=st.one_of(st.just([]), EDITS))
def test_cells(way: list[int], new: Any, edits: list[Any], here: Path) -> None:
    text = json.dumps(replaced(CELLS, way, new)).encode()
    Path("cells.json").write_bytes(edited(text, edits))
    feed("cells.json", lambda: read_collection(Path("cells.json")))


@fuzz(20, way=WAY, new=st.one_of(values(RESULT_KEYS), st.sampled_from([10**18, -1, 1e308])))
def test_reports(way: list[int], new: Any, here: Path) -> None:
    """Whatever one run says, the page of the others is made, and nothing is lost without a word."""
    for name, content in (("good", RESULTS | {"seed": 1}), ("odd", replaced(RESULTS, way, new))):
        folder = Path("runs", name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(content))
        (folder / "accuracy_matrix.csv").write_text("after_task,task_1\n1,0.5\n")
        (folder / "config.yaml").write_text("{}")
    found = find_runs(Path("runs"))
    COUNTS["reports", "read" if len(found.runs) == 2 else "refused"] += 1
    assert any(run.source == "good" for run in found.runs)
    assert len(found.runs) == 2 or any(problem.where == "odd" for problem in found.problems)
    assert render(found, compare(found.runs, [], None), "0").endswith(b"</html>\n")


@fuzz(100, edits=EDITS)
def test_matrices(edits: list[Any], here: Path) -> None:
    whole = b"after_task,task_1,task_2\n0,0.1,0.2\n1,0.9,\n2,0.4,0.8\n"
    Path("matrix.csv").write_bytes(edited(whole, edits))
    feed("accuracy_matrix.csv", lambda: read_matrix_csv(Path("matrix.csv")))


def test_the_harness_lets_no_other_error_pass() -> None:
    with pytest.raises(KeyError):
        feed("itself", lambda: {}["key"])
    assert not COUNTS["itself", "read"] + COUNTS["itself", "refused"]
    whole = bytes(range(100))
    assert edited(whole, [(0.5, 2, b"abc")]) == whole[:50] + b"abc" + whole[52:]
    assert replaced({"a": [1, {"b": 2}]}, [0, 1, 0], 3) == {"a": [1, {"b": 3}]}
