"""`moco-fast search`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moco_fast.commands.common import Device, choose_device, positive

__all__ = ["Search"]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the images that are most similar to some others, among what `moco-fast embed` wrote.

    By the index of faiss where `moco-fast embed --index faiss` wrote one, else by all vectors.
    """

    index: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VECTORS")]
    """File or folder that `moco-fast embed` wrote."""
    queries: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Images to look for: files."""
    k: Annotated[int, tyro.conf.arg(aliases=("-k",))] = 10
    """Images to find for each query."""
    encoder: str | None = None
    """Where the encoder is now; unset: where it was."""
    exact: bool = False
    """Look at all vectors, whether there is an index or not."""
    json: bool = False
    """Print JSON in place of a table."""
    html: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Page of pictures to write, which needs nothing else."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""

    def execute(self) -> int:
        """Do what the options say; return the exit code."""
        self._validate()
        import tempfile

        from moco_fast.embedding.faiss_index import find_faiss
        from moco_fast.embedding.images import pack_files
        from moco_fast.embedding.index import open_index
        from moco_fast.embedding.query import embed_queries
        from moco_fast.embedding.search import answers, as_json, as_table, nearest

        index, device = open_index(self.index), choose_device(self.device)
        with tempfile.TemporaryDirectory() as folder:
            queries = pack_files(self.queries, Path(folder) / "queries")
            vectors = embed_queries(index, queries, encoder=self.encoder, device=device)
            faster, note = (None, "") if self.exact else find_faiss(index)
            if faster is None:
                near = nearest(index, vectors.values, self.k, device=device)
            else:
                near = faster.nearest(vectors.values, self.k)
                note = f"searched by {faster.describe()}" + (
                    "" if faster.is_exact else "; --exact looks at all vectors"
                )
            if note:
                print(note, file=sys.stderr)
            found = answers(index, vectors.names, *near)
            print(as_json(found) if self.json else as_table(found))
            if self.html is not None:
                from moco_fast.report.search import write_page

                write_page(Path(self.html), index, queries, found)
                print(f"written to {self.html}", file=sys.stderr)
        return 0

    def _validate(self) -> None:
        positive("k", self.k)
        if not self.queries:
            raise ValueError("no QUERY: name at least one image to look for")
        for query in self.queries:
            if not Path(query).is_file():
                raise ValueError(f"there is no image {query} to look for")
        if self.html is not None and not Path(self.html).absolute().parent.is_dir():
            raise ValueError(f"--html {self.html}: there is no such folder to write to")
