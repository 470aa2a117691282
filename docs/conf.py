"""The site: `make docs` builds it from these pages, and from the docstrings of every public name.

Sphinx, because the docstrings are reStructuredText with formulas, which it reads as they stand; with
MyST the pages are Markdown, which reads well without a site, too. A built page asks no other server
for anything: formulas are MathML, the search and the fonts are the browser's own.
"""

import inspect
import logging
import re
from importlib import import_module
from importlib.metadata import version as installed
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

logger = getLogger(__name__)

project = "bpn_lightning"
author = "bpn_lightning contributors"
project_copyright = f"{author}, Apache-2.0"
version = release = installed("bpn_lightning")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["results"]  # what the page of that name is made of

myst_heading_anchors = 3  # links to headings are checked as those to pages are

html_theme = "furo"
html_title = f"{project} {version}"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# A class that the root has as well has two places, and a module that must not import torch names it
# without saying which: either will do.
suppress_warnings = ["ref.python"]
toc_object_entries = False  # in the navigation of a hundred pages, they take half of the time
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_custom_sections = ["State"]
napoleon_use_ivar = True

# A page of `index.md` that ends in * comes with its feature, and may not be there.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(
    lambda record: "toctree glob pattern" not in str(record.msg)
)

# --- the pages of the API: one for every module that says in `__all__` what it promises --------------

ROOMS = {
    "bpn_lightning": "The core",
    "bpn_lightning.strategies": "Strategies",
    "bpn_lightning.datamodules": "Streams",
    "bpn_lightning.bench": "Grids of runs",
    "bpn_lightning.conformance": "The conformance suite",
    "bpn_lightning.report": "Runs as one page",
}
API = Path(__file__).parent / "api"


def public_modules() -> list[str]:
    """Every module with an ``__all__``, wherever the rooms are installed from."""
    found = set()
    for room in ROOMS:
        folder = files(room)
        for path in sorted(Path(str(folder)).rglob("*.py")):
            name = ".".join([room, *path.relative_to(str(folder)).with_suffix("").parts])
            if re.search(r"^__all__", path.read_text(encoding="utf-8"), re.MULTILINE):
                found.add(name.removesuffix(".__init__"))
    return sorted(found)


def write_api_pages(app: Sphinx) -> None:
    """A page for each module, and one above them with a line for each."""
    API.mkdir(exist_ok=True)
    pages = {f"{name}.rst": _page(name) for name in public_modules()}
    pages["index.rst"] = _heading("API reference") + "".join(
        _heading(title, "-") + _contents([name for name in public_modules() if _room(name) == room])
        for room, title in ROOMS.items()
    )
    for path in API.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():  # untouched where it is the same: nothing is built again
        path = API / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _room(module: str) -> str:
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def _heading(title: str, line: str = "=") -> str:
    return f"{title}\n{line * len(title)}\n\n"


def _page(name: str) -> str:
    """What the module promises, a line each, and then all of it."""
    module, said = import_module(name), ModuleAnalyzer.for_module(name).find_attr_docs()
    lines, constants = [], []
    for public in module.__all__:
        value = getattr(module, public)
        if _is_definition(value):
            lines.append(f"* :py:obj:`~{value.__module__}.{public}`: {_first_line(value)}\n")
            continue
        lines.append(f"* :py:obj:`~{name}.{public}`\n")
        if ("", public) not in said:  # a name that says all: automodule would leave it out
            constants.append(f".. autodata:: {public}\n")
    listed = "".join(lines) if len(lines) > 1 else ""
    parts = [f".. currentmodule:: {name}\n", listed, f".. automodule:: {name}\n", *constants]
    return _heading(name) + "\n".join(parts)


def _is_definition(value: object) -> bool:
    return inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))


def check_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Every public name has its place on a page."""
    written = env.domaindata["py"]["objects"]
    for name in public_modules():
        module = import_module(name)
        for public in module.__all__:
            value = getattr(module, public)
            home = value.__module__ if _is_definition(value) else name
            if f"{home}.{public}" not in written:
                logger.warning("%s.%s is public and on no page", home, public)


def _contents(modules: list[str]) -> str:
    rows = [f":doc:`{name}`\n    {_first_line(import_module(name))}\n" for name in modules]
    listed = "\n".join(f"   {name}" for name in modules)
    return "\n".join([*rows, "", ".. toctree::", "   :hidden:", "", listed, "", ""])


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def skip_members(app: Sphinx, kind: str, name: str, member: object, *_: object) -> bool | None:
    """Fields of named tuples say of themselves only their number; the class says what they are."""
    return True if str(member.__doc__).startswith("Alias for field number") else None


# --- formulas ---------------------------------------------------------------------------------------


def mathml(tex: str, block: bool) -> str:
    """What every browser of today draws by itself; sizes of brackets it chooses itself, too."""
    tex = re.sub(r"\\[bB]igg?(?![A-Za-z])", "", tex).replace(r"\dots", r"\ldots")
    tex = re.sub(
        r"\\tilde\s*(\\?[A-Za-z]+)", r"{\\tilde \1{}}", tex
    )  # else its index goes below it
    return str(tex2mathml(tex, as_block=block))


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    self.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula between lines, which scrolls where the screen is narrower."""
    self.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Sphinx's hook."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None)
    )
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-skip-member", skip_members)
    app.connect("env-check-consistency", check_names)
