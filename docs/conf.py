"""The documentation site: `make docs` builds it into build/docs.

Here belongs how pages are made of what is written elsewhere: docstrings with types as their source
has them, files of the repository shown as pages, and links that leave docs/. Links to the
repository need its address, the `url` of `[repository]` in setup.cfg; while that is empty they are
plain text.
"""

import ast
import configparser
import inspect
import os
import re
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

settings = configparser.ConfigParser()
settings.read(ROOT / "setup.cfg")
REPOSITORY = settings["repository"]["url"].strip()

from sphinx.util import logging  # noqa: E402

import sn_jax  # noqa: E402  (found through the path above)

logger = logging.getLogger(__name__)

project = "sn_jax"
author = settings["metadata"]["author"]
copyright = author
version = release = sn_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
# .ipynb are committed with their outputs (`make notebooks`), and the blocks of pages run in tests.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_static", "description.md"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other libraries; see links_are_known
add_module_names = False
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_attr_annotations = False  # what aliases stand for; the signature has them
napoleon_use_rtype = False
autodoc_member_order = "bysource"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "sphinx_book_theme"
html_title = "sn_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = True
html_show_sphinx = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_navbar_depth": 1,
}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": "main",
        "path_to_docs": "docs",
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


def elsewhere(match: re.Match, folder: Path) -> str:
    """A Markdown link in a file of ``folder``, as it must read in a page of the site."""
    bang, text, target, anchor = match.groups()
    path = Path(os.path.normpath(folder / target))
    if not path.exists():
        logger.warning("%s: a link to %s, which does not exist", folder.relative_to(ROOT), target)
    if bang:
        return f"![{text}](/{os.path.relpath(path, DOCS)})"
    page = PAGES_OF_FILES.get(path, path)
    if page.is_relative_to(DOCS):
        return f"[{text}](/{page.relative_to(DOCS)}{anchor or ''})"
    if REPOSITORY:
        return f"[{text}]({REPOSITORY}/tree/main/{path.relative_to(ROOT)}{anchor or ''})"
    return text


LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#|<)([^)#\s]+)(#[^)\s]*)?\)")
FILE = re.compile(r"<!-- file: (\S+) -->")
# A page that shows a file of the repository holds the line that FILE matches.
PAGES_OF_FILES = {
    ROOT / found[1]: page for page in DOCS.rglob("*.md") if (found := FILE.search(page.read_text()))
}


def read_page(app, docname, source):
    """Files of the repository in their pages, and links of both as the site needs them."""
    page = DOCS / f"{docname}.md"
    if not page.exists():  # a notebook
        return
    found = FILE.search(source[0])
    folder, text = page.parent, source[0]
    if found:
        folder, text = (ROOT / found[1]).parent, (ROOT / found[1]).read_text()
    fences = re.split(r"(?ms)(^```.*?^```$)", text)  # links in code are code
    source[0] = "".join(
        part if part.startswith("```") else LINK.sub(lambda m: elsewhere(m, folder), part)
        for part in fences
    )


def written_signature(app, what, name, thing, options, signature, returns):
    """Arguments and types as the source has them: State and Array, not what they stand for."""
    if what not in ("class", "function", "method"):
        return None

    def plain(node):
        return re.sub(r"\b(_core|_rules|jax)\.(?=[A-Z])", "", ast.unparse(node))

    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    if isinstance(node, ast.ClassDef):
        made = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        maker = made.get("__init__") or made.get("__new__")
        if maker is None:
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return f"({', '.join(map(plain, fields))})", None
        node = maker
        node.returns = None
    if node.args.args and node.args.args[0].arg in ("self", "cls", "_cls"):
        del node.args.args[0]
    return f"({plain(node.args)})", plain(node.returns).strip("'") if node.returns else None


def marked_docstring(app, what, name, thing, options, lines):
    """Shapes and star arguments, which docstrings write as code does, as literals."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.+?``)", line)  # every second one is a literal already
        parts[::2] = [
            re.sub(r"(?<!`)(\(\*[^()`]*\)|\(\.\.\.[^()`]*\))", r"``\1``", part)
            for part in parts[::2]
        ]
        line = "".join(parts)
        lines[i] = re.sub(r"^(\s*)\*args, \*\*kwargs", r"\1\\*args, \\*\\*kwargs", line)


def links_are_known(app, env, node, contnode):
    """Roles written in pages and docstrings must resolve; types in signatures need not."""
    if node.get("refexplicit") or node.get("reftype") in ("func", "meth", "mod"):
        logger.warning("no %s %r", node["reftype"], node["reftarget"], location=node)


def setup(app):
    app.connect("source-read", read_page)
    app.connect("autodoc-process-signature", written_signature)
    app.connect("autodoc-process-docstring", marked_docstring, priority=400)  # before napoleon
    app.connect("missing-reference", links_are_known)
