"""What may be imported, who may say so, and that nothing in the package runs what is in a file."""

import ast
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from bpn_lightning.bench.grid import read_grid
from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.main import main
from bpn_lightning.datamodules import SplitCIFAR10
from bpn_lightning.errors import ConfigurationError, DataError, needs_trust

ROOT = Path(__file__).parent.parent.parent
Said = pytest.CaptureFixture[str]

LAB = """
import sys
from os import system as run
from typing import Any
from torch import nn

print("lab_nets is imported", file=sys.stderr)


class Net(nn.Sequential):
    def __init__(self, width: int = 3, extra: Any = None) -> None:
        super().__init__(nn.Flatten(), nn.LazyLinear(width))
        assert not isinstance(extra, nn.Module), "built"


def make(width: int = 3) -> nn.Module:
    return Net(width)


def unannotated(width: int = 3):
    raise SystemExit("called")
"""
NAMES = "x.yaml names lab_nets.Net: the module lab_nets is imported."
KEY = "model.backbone.class_path"
WHERE = f"{KEY} in x.yaml"
DIGITS = ("--config", "digits_inc.yaml", "--method", "ewc", "--print_config")


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of one's own, and a config that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    Path("lab_nets.py").write_text(LAB)
    Path("x.yaml").write_text("model: {backbone: {class_path: lab_nets.Net}}\n")
    Path("net.yaml").write_text("class_path: lab_nets.Net\n")
    Path("sub.yaml").write_text("model: {backbone: net.yaml}\n")
    sys.modules.pop("lab_nets", None)
    yield
    sys.modules.pop("lab_nets", None)


def refused(case: str, name: str = "lab_nets.Net") -> str:
    return f"bpn-fit: error: {needs_trust(case, name)}"


def said(*flags: str, capsys: Said, status: int = 0) -> list[str]:
    assert main([*DIGITS, *flags]) == status
    return capsys.readouterr().err.splitlines()


def test_trust_imports_what_a_config_names_and_says_so_before(capsys: Said) -> None:
    lines = said("--config", "x.yaml", "--trust", capsys=capsys)
    assert lines == [f"bpn-fit: {NAMES}", "lab_nets is imported"]


def test_who_types_a_name_means_it(capsys: Said) -> None:
    lines = said("--model.backbone", "lab_nets.Net", "--model.backbone.width=4", capsys=capsys)
    assert lines == ["lab_nets is imported"]
    assert said("--model.backbone", "lab_nets.make", capsys=capsys) == []
    flow = "{class_path: lab_nets.Net, init_args: {width: 5}}"
    assert said("--model.backbone", flow, capsys=capsys) == []
    # What was typed is trusted in a file too, and nothing else of its module.
    typed = ["--config", "x.yaml", "--model.backbone"]
    assert said(*typed, "lab_nets.Net", capsys=capsys) == [f"bpn-fit: {NAMES}"]
    assert said(*typed, "lab_nets.make", capsys=capsys, status=2) == [refused(WHERE)]


def test_trust_ends_with_its_run(capsys: Said) -> None:
    said("--model.backbone", "lab_nets.Net", capsys=capsys)
    assert said("--config", "x.yaml", capsys=capsys, status=2) == [refused(WHERE)]


def test_a_file_that_is_named_like_a_module_is_not_a_name(capsys: Said) -> None:
    said("--config", "x.yaml", "--runs", "lab_nets.py", capsys=capsys, status=2)
    assert "lab_nets" not in sys.modules


@pytest.mark.parametrize("flags", [["--config", "sub.yaml"], ["--model.backbone", "net.yaml"]])
def test_no_config_includes_another(flags: list[str], capsys: Said) -> None:
    (line,) = said(*flags, capsys=capsys, status=2)
    assert "to be a class or its keys, but got the file 'net.yaml'; configs cannot include" in line
    assert "lab_nets" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "allowed"), [("record", False), ("lab_nets:Net", True), ("lab_nets:make", False)]
)
def test_the_class_of_a_plugin_needs_no_trust(by: str, allowed: bool, capsys: Said) -> None:
    info = Path("lab-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    if by == "record":
        (info / "RECORD").write_text("lab_nets.py,,\n")
    else:
        (info / "entry_points.txt").write_text(f"[bpn_lightning.strategies]\nlab = {by}\n")
    line = "--config digits_inc.yaml --method finetune --config x.yaml --quiet --data.num_tasks 1"
    line += " --data.epochs_per_task 1 --trainer.accelerator cpu"
    assert main(line.split()) == (0 if allowed else 2)
    lines = capsys.readouterr().err.splitlines()
    if by == "record":  # that a package is installed says nothing about who named it
        assert lines == [refused(WHERE)]
    else:
        shown = [f"bpn-fit: {NAMES}", "lab_nets is imported"]
        assert lines == shown + ([] if allowed else [refused(KEY)])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "lab_nets.run",
            "but got 'posix.system': posix runs or loads code",
        ),  # os.system under another name
        (
            "lab_nets.unannotated",
            "lab_nets.unannotated does not correspond to a subclass of Module",
        ),
        ("lab_nets.sys", "but got 'sys': sys runs or loads code"),
    ],
)
def test_what_does_not_fit_is_neither_called_nor_built(name: str, part: str, capsys: Said) -> None:
    assert part in said("--model.backbone", name, capsys=capsys, status=2)[-1]


@pytest.mark.slow
def test_nothing_is_built_where_any_value_will_do(capsys: Said) -> None:
    spec = "{class_path: torch.nn.Linear, init_args: {in_features: 1, out_features: 1}}"
    line = ["--config", "digits_inc.yaml", "--method", "finetune", "--trainer.accelerator", "cpu"]
    line += ["--data.num_tasks", "1", "--data.epochs_per_task", "1"]
    net = ["--model.backbone", "lab_nets.Net", f"--model.backbone.extra={spec}"]
    assert main([*line, *net]) == 0  # Net asserts that it got no module


def test_a_method_file_and_a_grid_are_files_too() -> None:
    Path("methods/mine").mkdir(parents=True)
    Path("methods/mine/m.yaml").write_text("model: {backbone: lab_nets.Net}\nstrategies: {ewc: {}}")
    Path("mine.yaml").write_text("method: m")
    with pytest.raises(ConfigurationError, match=r"model\.backbone in methods/mine/m\.yaml"):
        read_command(["--config", "mine.yaml"])
    assert read_command(["--config", "mine.yaml", "--trust"]).trust
    Path("g.yaml").write_text(
        "experiments: [{config: digits_inc, methods: [ewc], set: {model.backbone: lab_nets.Net}}]"
    )
    with pytest.raises(ConfigurationError, match=r"In experiment 1 of g\.yaml: Expected model"):
        read_grid("g.yaml")
    (cell,) = read_grid("g.yaml", ["--trust"]).cells
    line = [*cell.flags, "--trust"]
    assert read_command(line).trust  # the last one wins
    with pytest.raises(ConfigurationError):
        read_command(cell.flags)
    assert "lab_nets" not in sys.modules


def test_an_archive_that_is_not_the_published_one_is_not_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torchvision unpacks without a filter, but nothing whose MD5 sum it does not know."""
    with tarfile.open("cifar-10-python.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../owned"), BytesIO())

    def fetch(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    with pytest.raises(DataError, match="did not find them"):
        SplitCIFAR10(root=".").prepare_data()
    assert not Path("../owned").exists()
    assert [path.name for path in Path().glob("cifar*")] == ["cifar-10-python.tar.gz"]


# --- the package itself --------------------------------------------------------------------------

SOURCES = sorted(
    path
    for folder in (
        "bpn_lightning",
        "strategies",
        "datamodules",
        "configs",
        "examples",
        "benchmarks",
    )
    for path in (ROOT / folder).rglob("*.py")
    if "tests" not in path.parts
    # Compares what strategies hold, plain or not, in files that its own processes have just written.
    and "conformance" not in path.parts
)
BANNED = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "pickle.Unpickler"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "np.fromfile"),
}
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "dbm"}
NEEDS = {  # a call, and what it has to say
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "extractall": ("filter", "data"),
    "extract": ("filter", "data"),
}


def faults(source: str) -> list[str]:
    """What a module would run, or unpickle, of what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in MODULES | {"pickle"}]
        if isinstance(node, ast.ImportFrom) and node.module in MODULES | {"pickle"}:
            found += [alias.name for alias in node.names if alias.name != "UnpicklingError"]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if name in BANNED or said.get("shell"):
            found.append(ast.unparse(node))
        if name.startswith("self."):  # a method of its own, and not one of an archive
            continue
        for call, (word, value) in NEEDS.items():
            if (name == call or name.endswith(f".{call}")) and said.get(word) != value:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_run_or_unpickled(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "import pickle",
        "from pickle import loads",
        "import shelve",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p)",
        "yaml.load(t, Loader)",
        "subprocess.run(x, shell=True)",
        "archive.extractall(p)",
    ],
)
def test_the_guard_sees(source: str) -> None:
    assert faults(source)


def test_the_guard_lets_pass_what_is_right() -> None:
    right = "torch.load(p, weights_only=True); np.load(p, allow_pickle=False); yaml.safe_load(t)"
    assert faults(right + "\nfrom pickle import UnpicklingError\nre.compile(x)") == []
