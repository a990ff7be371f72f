"""Formats by name. A new one is a file with a class and a line here."""

from importlib import import_module

from moco_fast.encoders.formats.base import Format

__all__ = ["FORMATS", "formats"]

FORMATS = {
    "run": "moco_fast.encoders.formats.run:Run",
    "authors": "moco_fast.encoders.formats.authors:Authors",
    "torchvision": "moco_fast.encoders.formats.torchvision:Torchvision",
    "detectron2": "moco_fast.encoders.formats.detectron2:Detectron2",
    "timm": "moco_fast.encoders.formats.timm:Timm",
    "transformers": "moco_fast.encoders.formats.transformers:Transformers",
}
"""Name -> module:class."""


def formats() -> dict[str, Format]:
    """Return every format by its name."""
    found: dict[str, Format] = {}
    for name, where in FORMATS.items():
        module, _, attribute = where.partition(":")
        found[name] = getattr(import_module(module), attribute)()
    return found
