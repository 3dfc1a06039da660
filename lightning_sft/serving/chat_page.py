"""The page at `/` of `serve`: ask, watch the answer come, compare two models.

One self-contained document: `chat_page.html` with the reports' style sheet, one of its own and one
script. It holds no data of the server; what it needs to know it asks `/v1/models`, with the token
that its user typed, where one is wanted.

This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path

from lightning_sft.common.pages import build_page

FOLDER = Path(__file__).parent


def build_chat_page() -> str:
    """The HTML document."""
    body = (FOLDER / "chat_page.html").read_text("utf-8")
    return build_page(
        "Talk to a model",
        body,
        FOLDER / "chat_page.js",
        style=FOLDER / "chat_page.css",
        talks=True,
    )
