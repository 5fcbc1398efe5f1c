"""How Sphinx builds the site. `make docs` takes warnings, dead links and anchors for errors."""

from __future__ import annotations

import builtins
import os
import pkgutil
import sys
from typing import Any

from sphinx.util.nodes import make_refnode

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks for an accelerator when imported.

project = "tp_embed"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["README.md"]  # index.rst includes it.
nitpicky = True  # A role has to name something that exists: see `_resolve`.

autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "inherited-members": "Module,ABC,BaseModel,BaseException,Enum,Optimizer,tuple",
    # For `torch.compile`; users call none of them.
    "exclude-members": "rows_in_graph,gradient_in_graph,without_pad_row",
}
autodoc_inherit_docstrings = False  # Else torch.nn.Module's docstrings appear.
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

myst_heading_anchors = 4

html_theme = "furo"
html_title = "tp_embed"
html_show_copyright = False


def _resolve(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Links a short name to the one page that has it, and shows other names as plain code.

    A docstring of ``tp_embed.nn.init`` says ``fill`` for its neighbour, but is shown on the page of
    ``tp_embed``. Names of other packages and of internals have no page, but internals must exist.
    """
    if node["refdomain"] != "py":
        return None
    target = node["reftarget"].lstrip(".")
    domain = env.domains["py"]
    found = domain.find_obj(env, "", node.get("py:class", ""), target, None, 1)
    names = {entry.node_id: (entry.docname, name) for name, entry in found}
    if len(names) == 1:
        ((node_id, (docname, name)),) = names.items()
        return make_refnode(app.builder, node["refdoc"], docname, node_id, text, name)
    package, _, rest = target.partition(".")
    if package == "tp_embed":
        is_known = _exists(target)
    else:
        is_others = rest or package in sys.stdlib_module_names or hasattr(builtins, package)
        is_known = is_others or _is_in_ours(target)
    return text if is_known else None


def _exists(name: str) -> bool:
    """Whether ``name`` is a module, or an attribute of a module or class."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _is_in_ours(name: str) -> bool:
    """Whether a module of tp_embed has this name, or something of it."""
    modules = {key: module for key, module in sys.modules.items() if key.startswith("tp_embed.")}
    return any(key.endswith(f".{name}") or name in vars(m) for key, m in modules.items())


def setup(app: Any) -> None:
    """Is called by Sphinx."""
    app.connect("missing-reference", _resolve)
