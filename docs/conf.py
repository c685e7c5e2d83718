"""How the documentation is built: ``make docs``. Nothing on a page comes from another machine."""

import os
import re
from html.parser import HTMLParser
from importlib.metadata import version as installed
from itertools import pairwise
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError

import stagewise as sw

project, author = "stagewise", "the stagewise developers"
version = release = installed("stagewise")
copyright = author
html_title = f"stagewise {version}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_dark_style = "monokai"

myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"

# Tutorials are run whenever they are built, without a network: what they show is what this version says.
# One thread for each of the processes that share the cores: small tensors gain nothing from more.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
nb_execution_mode = "force"
nb_execution_timeout = 900  # a machine that has other work, too
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
add_module_names = False
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# Any other name than "Example" would be a heading of ours; the blocks are doctests.
napoleon_use_admonition_for_examples = False


def mathml(writer, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw themselves."""
    block = isinstance(node, nodes.math_block)
    writer.body.append(convert(node.astext(), display="block" if block else "inline"))
    raise nodes.SkipNode


def public_name(_app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """A name by its place in the source is that of the package: ``stagewise.task.Task`` is ``stagewise.Task``."""
    where, _, name = node["reftarget"].rpartition(".")
    if node.get("refdomain") != "py" or where.split(".")[0] not in ("", "stagewise") or name not in sw.__all__:
        return None
    if isinstance(text, nodes.literal) and not node.get("refexplicit"):
        text = nodes.literal(name, name, classes=text["classes"])
    place = env, node["refdoc"], env.app.builder, node["reftype"], f"stagewise.{name}"
    return env.get_domain("py").resolve_xref(*place, node, text)


def formulas(_app: Sphinx, _what: str, _name: str, _thing: object, _options: object, lines: list[str]) -> None:
    """What stands indented in the text of a docstring, before its first section, is a formula: as it is written."""
    end = next((k for k, line in enumerate(lines) if re.fullmatch(r"[A-Z][a-z]+:", line)), len(lines))
    text = [k for k in range(end) if lines[k] and not lines[k].startswith(" ")]
    for before, after in reversed([*pairwise([*text, end])]):
        if after > before + 2 and not lines[before + 1] and not lines[before].endswith("::"):
            lines[before + 2 : before + 2] = [".. code-block:: none", ""]


class Loaded(HTMLParser):
    """What a page loads by itself; links that a reader follows are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sources of any element, and what ``link`` fetches."""
        self.addresses += [value or "" for name, value in attrs if name == "src" or (tag == "link" and name == "href")]


def refuse_strangers(app: Sphinx, error: Exception | None) -> None:
    """No page or style sheet loads anything from another machine."""
    for path in [] if error else sorted(Path(app.outdir).rglob("*")):
        if path.suffix == ".html":
            page = Loaded()
            page.feed(path.read_text(encoding="utf-8"))
            addresses = page.addresses
        elif path.suffix == ".css":
            style = path.read_text(encoding="utf-8")
            addresses = re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", style)
        else:
            continue
        if strange := [address for address in addresses if re.match(r"(https?:)?//", address)]:
            raise ExtensionError(f"{path} loads {strange[0]} from another machine")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-docstring", formulas, priority=100)  # before sections are taken apart
    app.connect("missing-reference", public_name)
    app.connect("build-finished", refuse_strangers)
