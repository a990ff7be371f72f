"""Public API: pretraining of image encoders by momentum contrast, and what to do with them.

Dependencies are imported when they are used:

    encoder = moco_fast.load_encoder("runs/first")
    found = moco_fast.embed(encoder, "photos")
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moco_fast.api import configure, evaluate, train
    from moco_fast.embedding.api import Embeddings, embed
    from moco_fast.exporters.write import export
    from moco_fast.loading import load_encoder
    from moco_fast.transfer.opening import load_trained
    from pipelines.loader import open_loader

__version__ = "0.1.0"

__all__ = [
    "Embeddings",
    "__version__",
    "configure",
    "embed",
    "evaluate",
    "export",
    "load_encoder",
    "load_trained",
    "open_loader",
    "train",
]

_MODULES = {
    "Embeddings": "moco_fast.embedding.api",
    "configure": "moco_fast.api",
    "embed": "moco_fast.embedding.api",
    "evaluate": "moco_fast.api",
    "export": "moco_fast.exporters.write",
    "load_encoder": "moco_fast.loading",
    "load_trained": "moco_fast.transfer.opening",
    "open_loader": "pipelines.loader",
    "train": "moco_fast.api",
}


def _refuse_hidden() -> None:
    """Name what hides a package of ours: `python -m` looks into the current folder first.

    Raises:
        ImportError: another package of that name would be imported.
    """
    for name in ("pipelines", "shards"):
        found = find_spec(name)
        origin = None if found is None else found.origin
        if origin is not None and Path(origin).resolve().parent != Path(__file__).resolve().parents[1] / name:
            raise ImportError(
                f"{origin} hides the package {name!r} that moco_fast needs: rename it, start from another "
                "folder, or set PYTHONSAFEPATH=1"
            )


_refuse_hidden()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
