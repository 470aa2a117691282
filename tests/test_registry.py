from pathlib import Path

import pytest

from bpn_lightning import registry
from bpn_lightning.cli import main
from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.errors import ConfigurationError
from bpn_lightning.strategies.base import ContinualStrategy

GOOD = """
from bpn_lightning.strategies.finetuning import FineTuning
from bpn_lightning.datamodules.digits import SplitDigits


class Replay(FineTuning):
    def __init__(self, size: int = 10) -> None:
        self.size = size


class MyDigits(SplitDigits):
    pass
"""

ENTRY_POINTS = """
[bpn_lightning.strategies]
replay = good_plugin:Replay
broken = broken_plugin:Broken
ewc = good_plugin:Replay
no_class = good_plugin:GOOD

[bpn_lightning.datamodules]
MyDigits = good_plugin:MyDigits
OtherName = good_plugin:MyDigits
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package, as importlib.metadata sees one."""
    info = tmp_path / "plugins-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "good_plugin.py").write_text(GOOD)
    (tmp_path / "broken_plugin.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))


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
def test_a_built_in_name_stays_what_it_is() -> None:
    assert registry.strategies()["ewc"].origin == registry.BUILT_IN


@pytest.mark.usefixtures("plugins")
def test_a_plugin_that_cannot_be_imported_says_whose_it_is() -> None:
    expected = "'broken'.*ModuleNotFoundError: .*a_module_that_is_not_there.*plugins 1.2"
    with pytest.raises(ConfigurationError, match=expected):
        registry.strategies()["broken"].load()
    with pytest.raises(ConfigurationError, match="no_class"):
        registry.strategies()["no_class"].load()


@pytest.mark.usefixtures("plugins")
def test_list_shows_plugins_and_survives_broken_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "replay               good_plugin.Replay  (plugins 1.2)" in shown
    assert "broken               broken_plugin.Broken  (plugins 1.2)" in shown
    assert "MyDigits             good_plugin.MyDigits  (plugins 1.2)" in shown


@pytest.mark.usefixtures("plugins")
def test_the_command_takes_plugins_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--config digits_inc.yaml --method replay+ewc --strategies.replay.size 3 --data MyDigits"
    assert main([*line.split(), "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "  replay:\n    size: 3\n" in shown
    assert "class_path: good_plugin.MyDigits" in shown


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method broken", "Expected the strategy 'broken' to be importable"),
        ("--data OtherName", "Expected the stream 'OtherName' of plugins 1.2 to be"),
    ],
)
def test_the_command_names_a_plugin_that_is_wrong(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "digits_inc.yaml", *flags.split()]) == 2
    assert message in capsys.readouterr().err
