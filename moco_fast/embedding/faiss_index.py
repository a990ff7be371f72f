"""Index of faiss beside written embeddings: neighbors without reading all vectors, in large sets nearly all of them.

    x.parquet.faiss         the index, as faiss.read_index takes it; of a folder: x/index.faiss
    x.parquet.faiss.json    written after it: of which vectors it is, and how it was made

Small sets are kept as they are and searched exactly. Of larger ones the vectors are divided into lists by k-means and
kept as a byte per number (IVF, SQ8 in faiss's terms): a search looks into some of the lists only, which are mapped from
the file. The metric is the cosine: vectors are scaled to length 1 on their way in.
"""

import json
import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moco_fast.embedding.index import Index
from moco_fast.embedding.search import highest
from shards.ground.files import appearing, remove, write_whole

__all__ = ["FaissIndex", "faiss_beside", "find_faiss", "needs_faiss", "write_faiss"]

_EXACT_BYTES = 256 << 20  # of float32 vectors, up to which all are compared
_TRAINING_BYTES = 1 << 30
_TRAINING_PER_LIST = (39, 64)  # vectors, the least that faiss is content with, and enough
_PROBED = 1 / 16  # of the lists: benchmarks/neighbors.py


@dataclass(frozen=True, kw_only=True)
class _IndexHeader:
    """What an index says about itself."""

    format: str = "moco-fast-faiss"
    vectors: str
    """Digest of the vectors."""
    kind: Literal["flat", "ivf"]
    num_lists: int = 0
    num_probed: int = 0
    """Lists that a search looks into."""
    num_bytes: int
    faiss: str
    """Version that wrote it."""


def needs_faiss(what: str) -> None:
    """Refuse to go on without faiss. Raises ValueError: with what is to be installed."""
    if find_spec("faiss") is None:
        raise ValueError(f"{what} needs faiss: pip install 'moco-fast[faiss]'")


def faiss_beside(out: Path) -> Path:
    """Return where the index of written embeddings is."""
    return out.with_name(f"{out.name}.faiss") if out.suffix else out / "index.faiss"


def _header_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


class FaissIndex:
    """An index that is open.

    Args:
        path: of the file.
        made: what it says about itself.
    """

    def __init__(self, path: Path, made: _IndexHeader) -> None:
        faiss = _faiss()
        self.path = path
        self.is_exact = made.kind == "flat"
        self._made = made
        self._index = faiss.read_index(str(path), 0 if self.is_exact else faiss.IO_FLAG_MMAP)

    def describe(self) -> str:
        """Say in a few words how it searches."""
        how = "exact" if self.is_exact else f"{self._made.num_probed:,} of {self._made.num_lists:,} lists"
        return f"{self.path} ({how})"

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the rows with the highest cosine similarity to each query, as `search.nearest` does.

        Args:
            queries: (Q, D).
            k: how many rows; all, if there are fewer.

        Returns:
            (Q, k) float32 similarities, highest first, and (Q, k) int64 rows; of equal ones the first row first. Of an
            index that is not exact, rows may be missing, with others in their place, and similarities are off by some
            thousandths.
        """
        asked = _unit(queries)
        k = min(k, self._index.ntotal)
        found, rows = self._all_of_the_last(asked, k) if self.is_exact else self._from_lists(asked, k)
        # By row first: of equal similarities `highest` takes the first.
        rows, order = torch.from_numpy(rows).sort(dim=1)
        similarities, places = highest(torch.from_numpy(found).gather(1, order), k)
        return similarities, rows.gather(1, places)

    def _all_of_the_last(self, asked: Any, k: int) -> tuple[Any, Any]:
        """Search for k rows and all that are as near as the k-th, since faiss takes any of equal ones."""
        num_asked = k + 1
        while True:
            found, rows = self._index.search(asked, min(num_asked, self._index.ntotal))
            if num_asked >= self._index.ntotal or (found[:, -1] < found[:, k - 1]).all():
                return found, rows
            num_asked *= 2

    def _from_lists(self, asked: Any, k: int) -> tuple[Any, Any]:
        """Search in as many lists as have k rows for every query."""
        num_probed = self._made.num_probed
        while True:
            how = _faiss().SearchParametersIVF(nprobe=num_probed)
            found, rows = self._index.search(asked, k, params=how)
            if num_probed >= self._made.num_lists or (rows >= 0).all():
                return found, rows
            num_probed *= 2


def find_faiss(index: Index) -> tuple[FaissIndex | None, str]:
    """Open the index beside written embeddings; None where there is none that can be used, and why if there is one."""
    path = faiss_beside(index.path)
    made = _read(path)
    if made is None:
        return None, ""
    again = f"; `moco-fast embed ... --out {index.path} --index faiss` writes it again"
    if made.vectors != index.header.get("vectors"):
        return None, f"{path} is of other vectors than {index.path} has now, and is not used{again}"
    if find_spec("faiss") is None:
        return None, f"{path} is not used without faiss: pip install 'moco-fast[faiss]'"
    if path.stat().st_size != made.num_bytes:
        return None, f"{path} is cut off, and is not used{again}"
    return FaissIndex(path, made), ""


def write_faiss(index: Index) -> tuple[FaissIndex, str]:
    """Write the index of written embeddings, unless it is there already; chunk by chunk, and whole or not at all.

    In memory are a chunk, for the training of lists 1 GiB at most, and the index: what its file takes, and for a moment
    up to twice as much.

    Returns:
        the index, and what became of it: `was there already`, `written`, or `written again` in place of one of other
        vectors.

    Raises:
        ValueError: faiss is missing; the embeddings are from a version that kept no digest.
        OSError: the disk is full.
    """
    needs_faiss("--index faiss")
    if "vectors" not in index.header:
        raise ValueError(f"{index.path} was written by an older version, without a digest of its vectors: embed again")
    found, stale = find_faiss(index)
    if found is not None:
        return found, "was there already"
    faiss, path = _faiss(), faiss_beside(index.path)
    made, how = _trained(index)
    for _, chunk in index.chunks():
        made.add(_unit(torch.tensor(chunk)))
    remove(_header_of(path))
    with appearing(path, durable=True) as aside:
        faiss.write_index(made, str(aside))
    header = _IndexHeader(
        vectors=index.header["vectors"], num_bytes=path.stat().st_size, faiss=str(faiss.__version__), **how
    )
    write_whole(_header_of(path), json.dumps(asdict(header), indent=1), durable=True)
    return FaissIndex(path, header), "written again" if stale else "written"


def _trained(index: Index) -> tuple[Any, dict[str, Any]]:
    """Return an empty index that is ready to be filled, and what it says about itself."""
    faiss = _faiss()
    num_rows, dim = index.num_rows, index.header["dim"]
    if 4 * num_rows * dim <= _EXACT_BYTES:
        return faiss.IndexFlatIP(dim), {"kind": "flat"}
    least, enough = _TRAINING_PER_LIST
    at_most = min(num_rows, _TRAINING_BYTES // (4 * dim))
    num_lists = max(1, min(round(4 * math.sqrt(num_rows)), at_most // least))
    made = faiss.index_factory(dim, f"IVF{num_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    num_training = min(at_most, enough * num_lists)
    made.train(_unit(torch.tensor(index.vectors(np.arange(num_training) * num_rows // num_training))))
    made.nprobe = max(1, round(_PROBED * num_lists))
    return made, {"kind": "ivf", "num_lists": num_lists, "num_probed": made.nprobe}


def _read(path: Path) -> _IndexHeader | None:
    try:
        return _IndexHeader(**json.loads(_header_of(path).read_text())) if path.is_file() else None
    except (OSError, ValueError, TypeError):
        return None


def _unit(vectors: Tensor) -> Any:
    return normalize(vectors.float()).numpy()


def _faiss() -> Any:
    import faiss

    return faiss
