"""A self-contained HTML page: one file, escaped, that loads nothing.

A page is `page.html` with `page.css`, a script and a body put in. Two locks keep it harmless
whatever a model wrote into an answer: every text goes through `html.escape`, and a content security
policy lets the browser run only the one script whose hash it names and load nothing at all.

    >>> Path("report.html").write_text(build_page("My run", body, script))

This module does not import torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def build_page(
    title: str,
    body: str,
    script: Path,
    data: Any = None,
    *,
    style: Path | None = None,
    talks: bool = False,
) -> str:
    """A whole HTML document.

    Args:
        body: HTML, its texts escaped already.
        script: File of the page's script.
        data: JSON for the script, under the id `data`.
        style: File of a style sheet to go behind the common one.
        talks: The script may talk to the server that the page came from.
    """
    sheet, code = _read(FOLDER / "page.css") + (_read(style) if style else ""), _read(script)
    connect = "connect-src 'self'; " if talks else ""
    slots = {
        "policy": (
            f"default-src 'none'; script-src '{_hash(code)}'; style-src '{_hash(sheet)}'; "
            f"{connect}img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "title": escape(title),
        "style": sheet,
        "body": body,
        "data": embed_json(data),
        "script": code,
    }
    # One pass, so that a text which happens to hold a slot's name stays as it is.
    return re.sub(r"<!--slot:(\w+)-->", lambda match: slots[match[1]], _read(FOLDER / "page.html"))


def embed_json(value: Any) -> str:
    """JSON that cannot end the script element around it."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(path: Path) -> str:
    return path.read_text("utf-8")
