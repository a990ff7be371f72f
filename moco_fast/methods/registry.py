"""Registry of methods. A class is imported when its method is first used."""

from importlib import import_module

from moco_fast.methods.base import Method

__all__ = ["METHODS", "method_class"]

METHODS: dict[str, str] = {
    "momentum-contrast": "moco_fast.methods.momentum_contrast:MomentumContrast",
    "momentum-contrast-v3": "moco_fast.methods.momentum_contrast:MomentumContrastV3",
    "end-to-end": "moco_fast.methods.end_to_end:EndToEnd",
    "memory-bank": "moco_fast.methods.memory_bank:MemoryBank",
    "byol": "moco_fast.methods.prediction:Byol",
    "simsiam": "moco_fast.methods.prediction:SimSiam",
}
"""Every method: `Method.name` -> module:class."""


def method_class(name: str) -> type[Method]:
    """Return the class of a method. Raises ValueError: there is no method of this name."""
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}: this version has {', '.join(METHODS)}")
    module, _, cls = METHODS[name].partition(":")
    return getattr(import_module(module), cls)
