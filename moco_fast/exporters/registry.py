"""Registry of exporters. A new one is a file with a class, and a line here."""

from importlib import import_module

from moco_fast.exporters.base import Exporter

__all__ = ["EXPORTERS", "find_exporter"]

EXPORTERS = {
    "timm": "moco_fast.exporters.timm:TimmExporter",
    "torchvision": "moco_fast.exporters.torchvision:TorchvisionExporter",
    "huggingface": "moco_fast.exporters.huggingface:HuggingFace",
    "onnx": "moco_fast.exporters.graph:Onnx",
    "torch-export": "moco_fast.exporters.graph:TorchExport",
    "detectron2": "moco_fast.exporters.detectron2:Detectron2Exporter",
    "mmdet": "moco_fast.exporters.mmdet:MMDet",
}
"""Name -> module:class."""


def find_exporter(name: str) -> Exporter:
    """Return an exporter. Raises ValueError: there is no exporter of that name."""
    if name not in EXPORTERS:
        raise ValueError(f"there is no exporter {name!r}: choose {' or '.join(EXPORTERS)}")
    module, _, attribute = EXPORTERS[name].partition(":")
    return getattr(import_module(module), attribute)()
