"""The site: `make docs` builds it from these pages, and from the docstrings of the names below `api/`.

Sphinx, because the docstrings are reStructuredText with formulas, which it reads as they stand; with
MyST the pages are Markdown, which reads well without a site, too. A built page asks no other server
for anything: formulas are MathML, the search and the fonts are the browser's own.
"""

import logging
import re
from importlib.metadata import version as installed

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

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

# --- the API ------------------------------------------------------------------------------------------


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
    app.connect("autodoc-skip-member", skip_members)
