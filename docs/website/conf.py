"""Settings of Sphinx for the website; ``build.py`` beside this file lays out what it reads."""

import re
import sys
import tomllib
from pathlib import Path

from astroid.exceptions import AstroidImportError
from astroid.manager import AstroidManager
from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project, release = "Soundscapes", PROJECT["version"]
extensions = ["myst_nb", "autoapi.extension", "sphinx.ext.napoleon", "sphinx.ext.githubpages"]

# notebooks as they are committed
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # headings of a text may skip a level

# the reference, read from the sources
autoapi_dirs = [str(ROOT / "soundscapes_utils")]
autoapi_root = "reference"
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_add_toctree_entry = False
autoapi_python_class_content = "both"
autoapi_own_page_level = "module"
# left alone, it follows imports into the sources of PyTorch and pandas, which takes minutes
_read = AstroidManager.ast_from_module_name


def _read_ours(self, modname, *given, **named):
    if modname.partition(".")[0] not in {"soundscapes_utils", *sys.stdlib_module_names}:
        raise AstroidImportError(f"{modname} is not read", modname=modname)
    return _read(self, modname, *given, **named)


AstroidManager.ast_from_module_name = _read_ours
napoleon_google_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
add_module_names = False

html_theme, html_title = "furo", "Soundscapes"
html_extra_path = [str(ROOT / "build/website/extra")]
html_static_path, html_css_files, html_js_files = ["site.css", "site.js"], ["site.css"], ["site.js"]
html_copy_source = html_show_copyright = False
html_math_renderer = "mathml"
exclude_patterns = ["extra"]


def _mathml(node, display):
    # the converter does not know the two by name behind \bigl and its like
    return convert(re.sub(r"\\[lr]Vert(?![a-zA-Z])", "‖", node.astext()), display=display)


def _inline(self, node):
    self.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _display(self, node):
    self.body.append(f'<div class="math">{_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    """Formulas as MathML, which browsers draw by themselves: no script, nothing fetched."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
