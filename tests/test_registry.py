"""Names, entry points and class paths: whose they are, and what happens when one is wrong."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bpn_lightning import registry
from bpn_lightning.cli.command import read_command
from bpn_lightning.cli.main import main
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.host import ContinualHost
from bpn_lightning.strategies.base import ContinualStrategy
from bpn_lightning.tasks import Batch, Task

GOOD = """
from bpn_lightning.strategies.finetune import FineTuning
from bpn_lightning.datamodules.digits import SplitDigits


class Replay(FineTuning):
    def __init__(self, size: int = 10) -> None:
        self.size = size

    class Inner(FineTuning):
        pass


class MyDigits(SplitDigits):
    pass


SIZE = 3
"""

ENTRY_POINTS = """
[bpn_lightning.strategies]
replay = good_plugin:Replay
inner = good_plugin:Replay.Inner [extra]
broken = broken_plugin:Broken
leaves = leaving_plugin:Broken
misspelt = good_plugin:Repaly
number = good_plugin:SIZE
stream = good_plugin:MyDigits
my-replay = good_plugin:Replay
module = good_plugin

[bpn_lightning.datamodules]
MyDigits = good_plugin:MyDigits
OtherName = good_plugin:MyDigits
"""

BROKEN = 'raise ImportError("no GPU here.\\n\\n  Buy one.")'

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package as pip does, as far as importlib.metadata can tell."""

    def write(name: str, entry_points: str, **modules: str) -> None:
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(entry_points)
        (info / "RECORD").write_text("".join(f"{module}.py,,\n" for module in modules))
        for module, code in modules.items():
            (tmp_path / f"{module}.py").write_text(code)

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets them for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    return write


class Gone:
    """What classes of plugins derive from after their test."""


def subclasses(base: type) -> list[type]:
    """All that derive from a class."""
    return [one for child in base.__subclasses__() for one in (child, *subclasses(child))]


@pytest.fixture
def plugins(install: Install) -> Iterator[None]:
    """Entry points of every sort, good and bad."""
    modules = {
        "good_plugin": GOOD,
        "broken_plugin": BROKEN,
        "leaving_plugin": "raise SystemExit(3)",
    }
    install("plugins", ENTRY_POINTS, **modules)
    yield
    # Else a later test's parser would find subclasses that can no longer be imported: a class lives for
    # as long as anything refers to it.
    for module in modules:
        sys.modules.pop(module, None)
    for known in (ContinualStrategy, ContinualDataModule):
        for found in [one for one in subclasses(known) if one.__module__ in modules]:
            found.__bases__ = (Gone,)


def test_what_is_installed_meanwhile_is_found(install: Install) -> None:
    assert "one" not in registry.strategies()
    install("one", "[bpn_lightning.strategies]\none = one_module:One\n")
    assert registry.strategies()["one"].class_path == "one_module.One"
    install("two", "[bpn_lightning.gates]\ntwo = two_module:Two\n")
    assert "two" in registry.gates()
    assert "two" not in registry.strategies()


@pytest.mark.parametrize("name", registry.strategies())
def test_every_built_in_strategy_is_one(name: str) -> None:
    assert issubclass(registry.strategies()[name].load(), ContinualStrategy)


@pytest.mark.parametrize("name", registry.streams())
def test_every_built_in_stream_is_one_and_has_the_name_of_its_class(name: str) -> None:
    found = registry.streams()[name].load()
    assert issubclass(found, ContinualDataModule)
    assert found.__name__ == name


@pytest.mark.usefixtures("plugins")
def test_an_installed_package_adds_names() -> None:
    replay = registry.strategies()["replay"]
    assert replay.origin == "plugins 1.2"
    assert replay.load().__name__ == "Replay"
    assert registry.streams()["MyDigits"].origin == "plugins 1.2"


@pytest.mark.usefixtures("plugins")
def test_an_entry_point_may_be_nested_and_ask_for_extras() -> None:
    assert registry.strategies()["inner"].load().__qualname__ == "Replay.Inner"


REPAIR = " Repair or remove that package, or leave the name out."


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "broken",
            (
                "(broken_plugin.Broken) to be importable, but importing it raised ImportError: "
                "no GPU here. Buy one.."
            ),
        ),
        (
            "leaves",
            "(leaving_plugin.Broken) to be importable, but importing it raised SystemExit: 3.",
        ),
        (
            "misspelt",
            (
                "(good_plugin.Repaly) to be importable, but importing it raised AttributeError: "
                "module 'good_plugin' has no attribute 'Repaly'. Did you mean 'Replay'?"
            ),
        ),
        ("number", "(good_plugin.SIZE) to be a ContinualStrategy, but got no class: int."),
        (
            "stream",
            "(good_plugin.MyDigits) to be a ContinualStrategy, but got a class of SplitDigits.",
        ),
        (
            "my-replay",
            (
                "(good_plugin.Replay) to have a name of letters, digits and underscores, but got "
                "'my-replay'."
            ),
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_says_whose_it_is_and_why(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        registry.strategies()[name].load()
    expected = f"Expected the strategy {name!r} of plugins 1.2 {message}{REPAIR}"
    assert str(caught.value) == expected == registry.strategies()[name].problem()


@pytest.mark.usefixtures("plugins")
def test_a_streams_name_is_that_of_its_class() -> None:
    with pytest.raises(ConfigurationError) as caught:
        registry.streams()["OtherName"].load()
    assert str(caught.value) == (
        "Expected the stream 'OtherName' of plugins 1.2 (good_plugin.MyDigits) to have the name of "
        f"its class, but got the class MyDigits.{REPAIR}"
    )


def test_a_long_error_of_a_plugin_is_cut(install: Install) -> None:
    install("plugins", "[bpn_lightning.strategies]\nlong = m:C", m="raise OSError('word ' * 1000)")
    assert len(registry.strategies()["long"].problem() or "") < 600


# --- one name, one class -------------------------------------------------------------------------

SHADOWS = """
[bpn_lightning.strategies]
ewc = good_plugin:Replay
gd = good_plugin:Replay

[bpn_lightning.datamodules]
SplitDigits = good_plugin:MyDigits
"""
RIVAL = """
[bpn_lightning.strategies]
replay = other_plugin:Replay
"""

TWICE = (
    "Expected the {kind} name {name!r} to stand for one class, but got {one} and {other}. Rename or "
    "remove that of {plugins}, or use a full import path, such as {path}."
)
CLASHES = {
    "ewc": TWICE.format(
        kind="strategy",
        name="ewc",
        one="bpn_lightning.strategies.ewc.EWC (built in)",
        other="good_plugin.Replay (shadows 1.2)",
        plugins="shadows 1.2",
        path="good_plugin.Replay",
    ),
    "gd": TWICE.format(
        kind="strategy",
        name="gd",
        one="bpn_lightning.strategies.bd.BeneficialPerturbation (built in)",
        other="good_plugin.Replay (shadows 1.2)",
        plugins="shadows 1.2",
        path="good_plugin.Replay",
    ),
    "replay": TWICE.format(
        kind="strategy",
        name="replay",
        one="good_plugin.Replay (plugins 1.2)",
        other="other_plugin.Replay (rival 1.2)",
        plugins="plugins 1.2 or rival 1.2",
        path="other_plugin.Replay",
    ),
    "SplitDigits": TWICE.format(
        kind="stream",
        name="SplitDigits",
        one="bpn_lightning.datamodules.digits.SplitDigits (built in)",
        other="good_plugin.MyDigits (shadows 1.2)",
        plugins="shadows 1.2",
        path="good_plugin.MyDigits",
    ),
}
OWN = "--config digits_inc.yaml --data bpn_lightning.datamodules.digits.SplitDigits"


@pytest.fixture
def rivals(plugins: None, install: Install) -> None:
    """Packages that claim names of one another, of built-in classes and of an alias."""
    install("shadows", SHADOWS)
    install("rival", RIVAL)


@pytest.mark.slow
@pytest.mark.usefixtures("rivals")
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--method ewc", "ewc"),
        ("--method bd+ewc", "ewc"),  # named by a file with tuned values
        ("--method finetune+gd", "gd"),
        ("--method replay", "replay"),
        ("--method finetune --data SplitDigits", "SplitDigits"),
    ],
)
def test_a_run_that_uses_a_name_of_two_classes_is_refused(
    flags: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = OWN if name != "SplitDigits" else "--config digits_inc.yaml"
    line = [*first.split(), *flags.split(), "--print_config"]
    with pytest.raises(ConfigurationError):  # before torch is imported
        read_command(line)
    assert main(line) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"bpn-fit: error: {CLASHES[name]}"


@pytest.mark.slow
@pytest.mark.usefixtures("rivals")
@pytest.mark.parametrize(
    "flags",
    [
        "--method finetune",
        "--method bd --strategies.bd.direction gradient",
        "--method good_plugin.Replay --strategies.Replay.size 3",
        "--method bpn_lightning.strategies.ewc.EWC --strategies.EWC.strength 3",
        "--method mine --strategies.mine good_plugin.Replay",
    ],
)
def test_all_other_runs_go_on(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OWN.split(), *flags.split(), "--print_config"]) == 0
    assert "error" not in capsys.readouterr().err


# --- bpn-fit -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rivals")
def test_list_shows_everything_with_its_origin_and_survives_what_is_broken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert "  inner                good_plugin.Replay.Inner  (plugins 1.2)" in lines
    assert "  MyDigits             good_plugin.MyDigits  (plugins 1.2)" in lines
    for name, line in {
        "broken": "  broken               broken_plugin.Broken  (plugins 1.2)",
        "leaves": "  leaves               leaving_plugin.Broken  (plugins 1.2)",
        "OtherName": "  OtherName            good_plugin.MyDigits  (plugins 1.2)",
        "ewc": "  ewc                  bpn_lightning.strategies.ewc.EWC  (built in)",
        "SplitDigits": "  SplitDigits          bpn_lightning.datamodules.digits.SplitDigits  (built in)",
    }.items():
        known = {**registry.strategies(), **registry.streams()}
        assert lines[lines.index(line) + 1] == f"    not usable: {known[name].problem()}"
    assert all(f"    not usable: {clash}" in lines for clash in CLASHES.values())
    for entry in ("inner  ", "MyDigits  ", "bd  ", "SplitMNIST  "):
        index = next(i for i, line in enumerate(lines) if line.startswith(f"  {entry}"))
        assert not lines[index + 1].startswith("    ")


@pytest.mark.usefixtures("plugins")
def test_the_command_takes_plugins_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--config digits_inc.yaml --method replay+ewc --strategies.replay.size 3 --data MyDigits"
    assert main([*line.split(), "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "  replay:\n    size: 3\n" in shown
    assert "class_path: good_plugin.MyDigits" in shown


@pytest.mark.usefixtures("plugins")
def test_the_command_takes_a_stream_by_its_class_path(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--config digits_inc.yaml --data good_plugin.MyDigits --data.init_args.num_tasks 3"
    assert main([*line.split(), "--print_config"]) == 0
    assert "class_path: good_plugin.MyDigits" in capsys.readouterr().out


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method broken", "Expected the strategy 'broken' of plugins 1.2 (broken_plugin.Broken)"),
        ("--method bd+my-replay", "Expected the strategy 'my-replay' of plugins 1.2"),
        ("--data OtherName", "Expected the stream 'OtherName' of plugins 1.2"),
    ],
)
def test_the_command_names_a_plugin_that_is_wrong(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "digits_inc.yaml", *flags.split()]) == 2
    assert message in capsys.readouterr().err


# --- class paths ---------------------------------------------------------------------------------

PATH = (
    "Expected {} in --method to be importable, but importing it raised {} Check its spelling; its "
)
PATH += "module has to be installed, in this folder or on PYTHONPATH."
BASE = "Expected {} in --method to be a ContinualStrategy, but got {}. Derive it from "
BASE += "bpn_lightning.strategies.ContinualStrategy."


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "god_plugin.Replay",
            PATH.format("god_plugin.Replay", "ModuleNotFoundError: No module named 'god_plugin'."),
        ),
        (
            "good_plugin.Repaly",
            PATH.format(
                "good_plugin.Repaly",
                (
                    "AttributeError: module 'good_plugin' has no attribute 'Repaly'. "
                    "Did you mean 'Replay'?"
                ),
            ),
        ),
        ("good_plugin.SIZE", BASE.format("good_plugin.SIZE", "no class: int")),
        ("good_plugin.MyDigits", BASE.format("good_plugin.MyDigits", "a class of SplitDigits")),
    ],
)
def test_a_class_path_that_is_no_strategy_is_named(
    path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "digits_inc.yaml", "--method", f"bd+{path}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"bpn-fit: error: {message}"


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--strategies.Replay.siz 3",
            (
                "There is no option --strategies.Replay.siz. Did you mean "
                "'--strategies.Replay.size'? `bpn-fit --help_all` shows all."
            ),
        ),
        ("--strategies.Replay.size x", "Expected strategies.Replay.size to be int, but got x."),
    ],
)
def test_arguments_of_a_class_path_are_checked(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--config", "digits_inc.yaml", "--method", "bd+good_plugin.Replay", *flags.split()]
    assert main(line) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"bpn-fit: error: {message}"


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_by_class_path_is_named_by_it_and_its_config_runs_again(install: Install) -> None:
    code = (
        "from bpn_lightning.strategies.base import ContinualStrategy\n\n\n"
        "class Notes(ContinualStrategy):\n"  # without arguments: there is nothing of it in a config
        "    def on_task_end(self, host, task):\n"
        "        with open('notes.txt', 'a') as file:\n"
        "            print(task.id, file=file)\n"
    )
    install("lab", "", my_lab=code)
    short = (
        "--trainer.accelerator cpu --data.init_args.num_tasks 2 --data.init_args.epochs_per_task 1"
    )
    line = f"--config digits_inc.yaml --method bd+my_lab.Notes {short} --strategies.bd.rank 7"
    assert main(line.split()) == 0
    config = Path("runs/digits_inc/bd+my_lab.Notes/seed_0/config.yaml")
    assert main(["--config", str(config), "--runs", "again", "--trust"]) == 0
    assert Path("notes.txt").read_text() == "0\n1\n" * 2
    assert Path("again", *config.parts[1:]).read_bytes() == config.read_bytes()


def test_a_class_that_nobody_registered_works_as_a_callback(fit: Callable[..., Any]) -> None:
    seen = []

    class Mine(ContinualStrategy):
        def on_task_end(self, host: ContinualHost, task: Task) -> None:
            seen.append((task.id, host.network.opened))

        def loss_terms(
            self, host: ContinualHost, batch: Batch, logits: Tensor
        ) -> dict[str, Tensor]:
            return {"size": logits.square().sum()}

    with_it, _ = fit([Mine()])
    assert seen == [(0, 0), (1, 1)]
    without, _ = fit([])
    assert with_it.network.head.weight.norm() < without.network.head.weight.norm()
    assert [type(one) for one in with_it.host.strategies] == [Mine]


# --- gates and fronts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registered", "names"),
    [
        (
            registry.gates,
            "confidence energy entropy fecam generative ncm ppca ranpac slda supsup",
        ),
        (registry.fronts, "frozen patches random"),
    ],
)
def test_gates_and_fronts_have_names_that_load(
    registered: Callable[[], dict[str, registry.Registered]], names: str
) -> None:
    assert sorted(registered()) == names.split()
    for name, one in registered().items():
        assert one.problem() is None
        assert issubclass(one.load(), registry.Registered(one.kind, name, one.target, "x").load())


def test_a_gate_is_named_as_in_the_table() -> None:
    for name, one in registry.gates().items():
        gate = one.load()()
        assert (gate.name, gate.state_key) == (name, f"gate {name}")
