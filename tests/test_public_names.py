"""What users may rely on: the names and signatures in public_names.txt, and nothing else.

``python tests/test_public_names.py --write`` renews that file. A line that goes or changes there is a
change that CHANGELOG.md has to name.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
WRITTEN = Path(__file__).with_name("public_names.txt")

#: Where users import from. Any other module may change without a word.
PUBLIC_MODULES = (
    "bpn_lightning",
    "bpn_lightning.datamodules",
    "bpn_lightning.modes",
    "bpn_lightning.nn",
    "bpn_lightning.run",
    "bpn_lightning.strategies",
)


def public_names(module: ModuleType) -> list[str]:
    """What can be imported from a module without an underscore; modules below it are none."""
    names = [name for name in dir(module) if not name.startswith("_")]
    return [name for name in names if not isinstance(getattr(module, name), ModuleType)]


def signature(value: Any) -> str:
    """Parameters and annotations; what has no signature has none."""
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"ForwardRef\('([^']+)'\)", r"'\1'", text).replace("(*args, **kwargs)", "")
    text = re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", text)
    return re.sub(
        r"\b(?:typing|collections\.abc|[a-z_]\w*(?:\.[a-z_]\w*)*)\.([A-Za-z]\w*)", r"\1", text
    )


def members(one: type) -> Iterator[str]:
    """A line for each public method and property that no other package defines."""
    ours = [base for base in one.__mro__ if base.__module__.startswith("bpn_lightning")]
    elsewhere = {name for base in one.__mro__ if base not in ours for name in vars(base)}
    own = {name for base in ours for name in vars(base)} - elsewhere
    for name in sorted(name for name in own if not name.startswith("_")):
        value = inspect.getattr_static(one, name)
        if isinstance(value, property):
            yield f"    {name}"
        elif isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
            yield f"    {name}{signature(getattr(one, name))}"


def written_out() -> str:
    """A line for each public name, and for each member of a class that derives from no other public one."""
    modules = [import_module(name) for name in PUBLIC_MODULES]
    values = {(m.__name__, name): getattr(m, name) for m in modules for name in public_names(m)}
    classes = {value for value in values.values() if is_class(value)}
    lines = []
    for (module, name), value in values.items():
        lines.append(f"{module}.{name}{signature(value) if is_called(value) else ''}")
        if is_called(value) and not classes & set(getattr(value, "__mro__", ())[1:]):
            lines += members(value) if is_class(value) else []
    return "\n".join(lines) + "\n"


def is_class(value: Any) -> bool:
    """Whether it is a class; Python 3.10 takes ``list[int]`` for one too."""
    return isinstance(value, type) and not isinstance(value, GenericAlias)


def is_called(value: Any) -> bool:
    """Whether users make or call it: exceptions are caught, and protocols implemented."""
    if is_class(value):
        return not issubclass(value, BaseException | dict)
    return inspect.isfunction(value)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_nothing_else_can_be_imported(name: str) -> None:
    module = import_module(name)
    assert sorted(public_names(module)) == sorted(set(module.__all__) - {"__version__"})
    assert len(set(module.__all__)) == len(module.__all__)


def test_a_name_has_one_place() -> None:
    names = [name for module in PUBLIC_MODULES for name in public_names(import_module(module))]
    assert len(set(names)) == len(names)
    assert len(names) <= 87


def test_names_and_signatures_are_those_written_down() -> None:
    written = WRITTEN.read_text(encoding="utf-8").splitlines()
    found = written_out().splitlines()
    gone = [line for line in written if line not in found]
    new = [line for line in found if line not in written]
    assert (gone, new) == ([], []), "python tests/test_public_names.py --write, and CHANGELOG.md"


def test_docs_list_the_public_names_and_nothing_else() -> None:
    pages = {
        path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.rst")
    }
    assert set(pages) == set(PUBLIC_MODULES)
    for name, page in pages.items():
        listed = re.findall(
            r"^\.\. auto(?:class|exception|function|data):: (\w+)$", page, re.MULTILINE
        )
        assert sorted(listed) == sorted(public_names(import_module(name)))


#: Pages and examples for users: they import what is public.
FOR_USERS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "examples").rglob("*.ipynb")),
]


@pytest.mark.parametrize("path", FOR_USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_import_what_is_public(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imports = re.findall(r"from (bpn_lightning[\w.]*) import \(?([^\n\")\\]+)", text)
    named = [(module, name.strip()) for module, names in imports for name in names.split(",")]
    named += re.findall(r"class_path: (bpn_lightning[\w.]*)\.(\w+)", text)
    for module, name in named:
        assert module in PUBLIC_MODULES, f"{path}: {module}.{name}"
        assert name in public_names(import_module(module)), f"{path}: {module}.{name}"


if __name__ == "__main__" and "--write" in sys.argv:
    WRITTEN.write_text(written_out(), encoding="utf-8")
