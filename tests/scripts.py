"""The scripts in benchmarks/ and deploy/, which are no part of a package, for tests of what is in them."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
DEPLOY = ROOT / "deploy"


def load(name: str, folder: Path = BENCHMARKS) -> ModuleType:
    """Import a script of a folder as a module."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
