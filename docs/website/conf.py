"""Settings of Sphinx for the website; ``build.py`` beside this file lays out what it reads."""

import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

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

# the reference, read from the sources
autoapi_dirs = [str(ROOT / "soundscapes_utils")]
autoapi_root = "reference"
autoapi_options = ["members", "undoc-members", "show-module-summary"]
autoapi_add_toctree_entry = False
autoapi_python_class_content = "both"
autoapi_own_page_level = "module"
napoleon_google_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
add_module_names = False

html_theme, html_title = "furo", "Soundscapes"
html_extra_path = [str(ROOT / "build/website/extra")]
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
exclude_patterns = ["extra"]


def _inline(self, node):
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _display(self, node):
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Formulas as MathML, which browsers draw by themselves: no script, nothing fetched."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
