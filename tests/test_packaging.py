"""What pip installs is the repository under one roof, no more and no less."""

import ast
import configparser
import importlib
import re
import sys
from importlib.metadata import entry_points, packages_distributions, version
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import bpn_lightning

ROOT = Path(__file__).parent.parent
SETUP = configparser.RawConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PACKAGES = SETUP["options"]["packages"].split()
FOLDERS = dict(line.split(" = ") for line in SETUP["options"]["package_dir"].split("\n") if line)
EXTRAS = "options.extras_require"


def folders_with_python_files() -> dict[str, Path]:
    """Every folder below a mapped one that holds Python files, by the name it is installed under."""
    return {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts]): path.parent
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def test_every_folder_with_python_files_is_listed() -> None:
    found = folders_with_python_files()
    assert sorted(PACKAGES) == sorted(found), "mend `packages` in setup.cfg"
    for folder in found.values():
        assert (folder / "__init__.py").is_file(), f"{folder} needs an __init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_listed_package_imports(package: str) -> None:
    importlib.import_module(package)


def texts_by_name(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.suffix in {".yaml", ".yml"}
    }


def test_every_config_is_installed() -> None:
    """Names and contents: a wheel built before the last edit fails, too."""
    installed = files("bpn_lightning.configs")
    assert isinstance(installed, Path)
    assert texts_by_name(installed) == texts_by_name(ROOT / "configs")


def test_type_checkers_find_the_marker() -> None:
    assert files("bpn_lightning").joinpath("py.typed").is_file()


@pytest.mark.parametrize("group", ["install_requires", *SETUP[EXTRAS]])
def test_every_dependency_has_two_bounds_and_a_reason(group: str) -> None:
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    block = re.search(rf"^{group} =\n((?:[ ]+.*\n)+)", text, re.MULTILINE)
    assert block is not None
    requirements, reason = [], False
    for line in (line.strip() for line in block[1].splitlines()):
        if line.startswith("#"):
            reason = True
            continue
        assert reason, f"{line}: write the reason for its bounds above it"
        bounds, _, where = line.partition("; ")
        assert not where or where.startswith("python_version >= "), (
            f"{line}: means what by {where}?"
        )
        assert re.search(r">=[\d.]+,<[\d.]+$", bounds), f"{line}: needs a lower and an upper bound"
        requirements.append(line)
        reason = False
    section = "options" if group == "install_requires" else EXTRAS
    assert requirements == SETUP[section][group].split("\n")[1:]


def packages_imported_by(path: Path) -> set[str]:
    """The top-level names of what a file imports, without Python's own."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"bpn_lightning"}


@pytest.mark.slow
def test_every_import_is_a_declared_dependency() -> None:
    """What another dependency happens to bring along may be gone with its next release."""
    extras = [
        line
        for extra in ("conformance", "hub", "ray", "serve", "tune", "wandb")
        for line in SETUP[EXTRAS][extra].split()
    ]
    lines = [*SETUP["options"]["install_requires"].split(), *extras]
    declared = {re.split(r"[\[<>=]", line)[0] for line in lines}
    provided_by = packages_distributions()
    for path in (p for folder in folders_with_python_files().values() for p in folder.glob("*.py")):
        for name in packages_imported_by(path):
            providers = {provider.lower() for provider in provided_by.get(name, [name])}
            assert providers & declared, f"{path} imports {name}, which setup.cfg does not ask for"


def test_command_resolves() -> None:
    (command,) = entry_points(group="console_scripts", name="bpn-fit")
    assert callable(command.load())


def test_public_names_are_what_dir_shows_and_all_import() -> None:
    assert sorted(bpn_lightning.__all__) == dir(bpn_lightning)
    for name in bpn_lightning.__all__:
        assert getattr(bpn_lightning, name) is not None


def test_version_is_the_one_installed() -> None:
    assert bpn_lightning.__version__ == version("bpn_lightning") == SETUP["metadata"]["version"]


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == SETUP["metadata"]["version"]
    assert citation["license"] == SETUP["metadata"]["license"]
    assert citation["title"] == SETUP["metadata"]["name"]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Tusk'"):
        _ = bpn_lightning.Tusk  # type: ignore[attr-defined]
