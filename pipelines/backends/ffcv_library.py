"""FFCV and numba, as the ffcv backend uses them: neither has types that say what it takes."""

from importlib import import_module
from typing import Any
from unittest.mock import patch

__all__ = ["Compiler", "Loader", "Operation", "PipelineSpec", "libffcv", "numba"]

numba: Any = import_module("numba")
# FFCV lets numba compile a dictionary of two entries when it is imported: five of its six and a half seconds.
with patch.object(import_module("numba.typed"), "Dict", dict):
    Loader: Any = import_module("ffcv.loader").Loader

Compiler: Any = import_module("ffcv.pipeline").Compiler
PipelineSpec: Any = import_module("ffcv.pipeline").PipelineSpec
Operation: Any = import_module("ffcv.pipeline.operation").Operation
libffcv: Any = import_module("ffcv.libffcv").lib
