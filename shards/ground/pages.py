"""Style of the pages that the packages write: one look, and nothing that a page fetches from elsewhere."""

import re
from html import escape
from pathlib import Path

__all__ = ["page_style", "prose"]

_CODE = re.compile(r"`([^`\n]+)`")


def page_style() -> str:
    """Return the style sheet that all pages begin with."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Return a message as HTML: escaped, and what is between backticks as code."""
    return _CODE.sub(r"<code>\1</code>", escape(text))
