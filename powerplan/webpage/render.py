"""The HTML of a page: one file with its style, its data, and the library that draws its charts."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from powerplan.errors import MachineError
from powerplan.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

INSTALL = "pip install jinja2 vl-convert-python"


def check_libraries() -> None:
    """Raise MachineError where the libraries that make a page are missing, or do not load."""
    _libraries()


def render(page: dict[str, Any]) -> str:
    """Return the HTML of a page. The same data makes the same bytes.

    page: what the template page.html.j2 shows. Every text of it is escaped.

    Raises:
        MachineError: a library that makes the page is missing.
    """
    environment, library = _libraries()
    scripts = [_inline(library), _inline(_own("page.js"))]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    template = environment.from_string(_own("page.html.j2"))
    own = {"style": _own("style.css"), "scripts": scripts, "policy": policy, "version": __version__}
    return template.render(**page, **own).strip() + "\n"


def _libraries() -> tuple[Environment, str]:
    """Return the environment of templates, and the script of Vega-Lite with all that it needs."""
    try:
        from jinja2 import Environment, StrictUndefined
        from vl_convert import javascript_bundle
    except ImportError as error:
        missing = {"jinja2": "jinja2", "vl_convert": "vl-convert-python"}.get(error.name or "")
        if missing is None:
            raise MachineError(f"report: its libraries do not load: {error}") from None
        raise MachineError(f"report needs {missing}, and it is not installed: {INSTALL}") from None
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    bundle: Any = javascript_bundle  # Its annotation asks for an argument that it does not need.
    return environment, bundle()


def _own(name: str) -> str:
    return files("powerplan.webpage").joinpath(name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """Return a script that can stand in a page: nothing in it ends its element, and line ends are those of browsers."""
    whole = script.replace("\r\n", "\n").replace("\r", "\n").strip()
    return re.sub(r"<(?=/script|!--)", r"\\x3c", whole, flags=re.IGNORECASE)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
