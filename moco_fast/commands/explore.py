"""`moco-fast explore`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from moco_fast.commands.common import Device, choose_device, positive
from moco_fast.commands.embed import Embed

if TYPE_CHECKING:
    from tqdm import tqdm

    from moco_fast.embedding.explore import Explored

__all__ = ["Explore"]


@dataclass(frozen=True, kw_only=True)
class Explore:
    """Look for near-duplicates, outliers and suspicious labels in a set of images: a page of pictures, and lists."""

    vectors: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VECTORS|RUN")]
    """File or folder that `moco-fast embed` wrote. Or the folder of a run: its training images are embedded first, into
    OUT/vectors.npy."""
    out: str
    """Folder to write: explore.html, and the lists duplicates, outliers, labels and keep."""
    threshold: float = 0.95
    """Cosine similarity from which on two images are near-duplicates. Encoders differ: look at the page's chart."""
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 10
    """Nearest neighbors of each image that are looked at."""
    show: int = 24
    """Groups, outliers and labels on the page, each."""
    outliers: int = 1000
    """Images in the list of outliers."""
    exact: bool = False
    """Compare all pairs, even where `moco-fast embed --index faiss` wrote an index that is faster and not exact."""
    format: Literal["csv", "jsonl", "parquet"] = "csv"
    """Format of the lists."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""

    def execute(self) -> int:
        """Do what the options say; return the exit code."""
        self._validate()
        from moco_fast.embedding.explore import explore
        from moco_fast.embedding.faiss_index import find_faiss
        from moco_fast.embedding.index import open_index
        from moco_fast.embedding.lists import KEEP_NAME, write_lists
        from moco_fast.report.explore import write_page

        folder = Path(self.out)
        index = open_index(self._vectors(folder))
        # An exact one is no faster than we are, and finds pairs among the k nearest alone.
        faster, note = (None, "") if self.exact else find_faiss(index)
        faster = None if faster is None or faster.is_exact else faster
        note = f"neighbors by {faster.describe()}; --exact compares all pairs" if faster else note
        if note:
            print(note, file=sys.stderr)
        num_pairs = index.num_rows * (index.num_rows + 1) // 2
        with _progress(num_pairs) as bar:
            found = explore(
                index,
                k=self.k,
                threshold=self.threshold,
                device=choose_device(self.device),
                faster=faster,
                tick=bar.update,
            )
        folder.mkdir(exist_ok=True)
        keep = write_lists(folder, index, found, suffix=self.format, num_outliers=self.outliers)
        lists = sorted(path.name for path in folder.iterdir() if path.stem in ("duplicates", "outliers", "labels"))
        lists += [] if keep else [KEEP_NAME]
        page = folder / "explore.html"
        write_page(page, index, found, num_shown=self.show, lists=lists, keep=keep, note=note)
        print(_summary(found))
        print(f"written to {page}, beside {', '.join(lists)}", file=sys.stderr)
        return 0

    def _vectors(self, folder: Path) -> Path:
        """Return where the vectors are; those of a run are computed first."""
        path = Path(self.vectors)
        if not (path / "config.json").is_file():
            return path
        from moco_fast.report.record import read_run

        images = read_run(path).config.data.shards
        folder.mkdir(exist_ok=True)
        vectors = folder / "vectors.npy"
        Embed(encoder=self.vectors, images=images, out=str(vectors), device=self.device).execute()
        return vectors

    def _validate(self) -> None:
        for name in ("k", "show", "outliers"):
            positive(name, getattr(self, name))
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold is {self.threshold}, but must be a cosine above 0, at most 1")
        if not Path(self.out).absolute().parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no such folder to write to")
        if Path(self.out).is_file():
            raise ValueError(f"--out {self.out} is a file: give the name of a folder")


def _progress(num_pairs: int) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(
        desc="comparing",
        total=num_pairs,
        unit=" pairs",
        unit_scale=True,
        delay=3,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        leave=False,
    )


def _summary(found: "Explored") -> str:
    members, groups, drop = len(found.duplicates), len(found.groups), len(found.dropped)
    lines = [
        f"near-duplicates: {members:,} images in {groups:,} groups; {drop:,} of {len(found):,} could be dropped",
        f"outliers: the most isolated image has a mean similarity of {found.likeness.min():.3f} to its neighbors",
    ]
    if (found.labels >= 0).any():
        lines.append(f"suspicious labels: {len(found.suspicious):,}")
    if 2 * drop > len(found):
        lines.append("more than half of all images count as near-duplicates: raise --threshold (the page has a chart)")
    return "\n".join(lines)
