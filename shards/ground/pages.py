"""Style of the pages that the packages write: one look, and nothing that a page fetches from elsewhere."""

from pathlib import Path

__all__ = ["page_style"]


def page_style() -> str:
    """Return the style sheet that all pages begin with."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
