"""Writing of embeddings: parts that stay when the process is killed, shared among ranks, put together at the end.

.x.parquet.parts/                beside the file or folder that is wanted
settings.json                everything that decides the vectors, and how samples are divided into parts
lock                         held by the first rank
images/, images.json         images that had to be packed first, and where they were
parts/part-000000.parquet    a part
done/part-000000.json        written after it: the part is complete; its number of rows, its damaged samples
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from moco_fast import distributed
from moco_fast.embedding.formats import EmbeddingFormat, format_of
from moco_fast.embedding.images import are_shards, pack_images, rejected
from moco_fast.embedding.index import find_header
from moco_fast.embedding.stream import Rows, Vectors, divide, embed_parts
from shards.ground.digests import digest
from shards.ground.files import remove, write_whole
from shards.ground.locks import locked
from shards.ground.progress import ProgressBars
from shards.packing.plan import difference
from shards.sets import ShardSet, open_set

__all__ = ["Order", "WrittenEmbeddings", "write_embeddings"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is embedded, how, and where the vectors go."""

    vectors: Vectors
    encoder: str
    """Where the encoder was opened from."""
    which: str
    """Of two encoders there."""
    digest: str
    """Of the encoder."""
    images: str
    out: Path

    @cached_property
    def work(self) -> Path:
        """Return the folder of unfinished work."""
        return self.out.with_name(f".{self.out.name}.parts")


@dataclass(frozen=True, kw_only=True)
class WrittenEmbeddings:
    """Embeddings that are complete."""

    path: Path
    num_rows: int
    dim: int
    num_damaged: int
    """Samples that cannot be read, and so have no vector."""
    was_there: bool
    """Whether it was complete before."""


def write_embeddings(order: Order) -> WrittenEmbeddings:
    """Write the vectors of all images; the same order again continues what was stopped. Collective.

    Raises:
        ValueError: images that are not there or cannot be read; something else is at `out` or was begun there; vectors
            that are not finite.
        OSError: the disk is full.
    """
    format_of(order.out)
    order.vectors.dim()
    shards = _shards_there(order)
    with ExitStack() as stack:
        found = None
        if order.vectors.world.rank == 0:
            found = _complete(order, shards)
            if found is None:
                order.work.mkdir(exist_ok=True)
                stack.enter_context(locked(order.work / "lock", holder=str(order.out)))
                if shards is None:
                    _pack(order)
        found = distributed.tell_all(found)
        return found or _Writing(order, shards).run()


def _shards_there(order: Order) -> ShardSet | None:
    """Open the images if they are shards. Raises ValueError: they are not there, or hold nothing."""
    if not are_shards(order.images):
        if order.out.resolve().is_relative_to(Path(order.images).resolve()):
            raise ValueError(f"--out {order.out} lies inside {order.images}: choose a place outside of it")
        return None
    shards = open_set(order.images)
    if not shards.num_samples:
        raise ValueError(f"{order.images} holds no sample, so there is nothing to embed")
    return shards


def _complete(order: Order, shards: ShardSet | None) -> WrittenEmbeddings | None:
    """Return what is there already. Raises ValueError: it is something else."""
    if not order.out.exists():
        return None
    header = find_header(order.out)
    if header is None:
        raise ValueError(f"--out {order.out} is there already, and is something else: choose another name")
    if shards is None:
        # What was packed is gone; a folder of images counts as the one of before by its name.
        own = _of_encoder(order) | {"images": order.images}
        old = header["settings"] | {"images": header["images"]}
    else:
        own, old = _settings(order, shards), header["settings"]
    _refuse_changes(order, {name: old[name] for name in own}, own)
    remove(order.work)
    return WrittenEmbeddings(
        path=order.out,
        num_rows=header["num_rows"],
        dim=header["dim"],
        num_damaged=header["num_damaged"],
        was_there=True,
    )


def _pack(order: Order) -> None:
    """Pack images that are not shards, once; what was packed stays, whatever happens to the folder meanwhile."""
    _begun(order, {"images": str(Path(order.images).absolute())}, "images.json")
    try:
        pack_images(order.images, order.work / "images", ProgressBars())
    except ValueError:
        remove(order.work)
        raise


def _begun(order: Order, settings: dict[str, Any], name: str) -> None:
    """Note settings, or compare them with those that were noted before. Raises ValueError: they differ."""
    path = order.work / name
    if path.is_file():
        _refuse_changes(order, json.loads(path.read_text()), settings)
    else:
        write_whole(path, json.dumps(settings, indent=1), durable=True)


def _refuse_changes(order: Order, old: dict[str, Any], new: dict[str, Any]) -> None:
    if changes := difference(old, new):
        place = order.out if order.out.exists() else order.work
        raise ValueError(
            f"{order.out} was begun with other settings: {changes}. Use the settings of before, another --out, or "
            f"remove {place} to start over"
        )


def _of_encoder(order: Order) -> dict[str, Any]:
    """Return what decides the vectors, whatever the images."""
    vectors = order.vectors
    return {
        "encoder": order.digest,
        "layer": vectors.layer,
        "normalize": vectors.normalize,
        "dtype": vectors.dtype,
        "size": vectors.size,
        "crop": vectors.crop,
        "precision": vectors.precision,
        "batch_size": vectors.batch_size,
    }


def _settings(order: Order, shards: ShardSet) -> dict[str, Any]:
    """Return everything that decides the vectors and their parts."""
    vectors = order.vectors
    row_bytes = vectors.dim() * np.dtype(vectors.dtype).itemsize
    parts = divide(shards.num_samples, row_bytes=row_bytes, batch_size=vectors.batch_size)
    return _of_encoder(order) | {
        "images": shards.manifest.identity,
        "backend": vectors.decoder(shards),
        "part_samples": len(parts[0]),
    }


class _Writing:
    """Embeddings on their way, as one rank sees them."""

    def __init__(self, order: Order, shards: ShardSet | None) -> None:
        self.order = order
        self.vectors, self.world = order.vectors, order.vectors.world
        self.format: EmbeddingFormat = format_of(order.out)
        if not order.work.is_dir():
            raise ValueError(
                f"rank {self.world.rank} does not see {order.work}, which the first rank made: --out must be in a "
                "folder that all nodes share"
            )
        self.is_packed_here = shards is None
        self.shards = open_set(order.work / "images") if shards is None else shards
        self.settings = _settings(order, self.shards)
        step, num_samples = self.settings["part_samples"], self.shards.num_samples
        self.parts = [range(at, min(at + step, num_samples)) for at in range(0, num_samples, step)]

    def run(self) -> WrittenEmbeddings:
        """Write what is missing, together with the other ranks, and put it together."""
        missing: list[int] = []
        if self.world.rank == 0:
            _begun(self.order, self.settings, "settings.json")
            for name in ("parts", "done"):
                (self.order.work / name).mkdir(exist_ok=True)
            missing = [number for number in range(len(self.parts)) if not self._record(number).is_file()]
        missing = distributed.tell_all(missing)
        # Neighboring parts to one rank: they are of the same shards.
        bounds = [len(missing) * rank // self.world.world_size for rank in (self.world.rank, self.world.rank + 1)]
        self._write(missing[slice(*bounds)], num_missing=len(missing))
        distributed.all_gather_rows(torch.zeros(1, device=self.vectors.device))  # All parts are written.
        written = self._finish() if self.world.rank == 0 else None
        written = distributed.tell_all(written)
        assert written is not None
        return written

    def _stem(self, number: int) -> Path:
        return self.order.work / "parts" / f"part-{number:06d}"

    def _record(self, number: int) -> Path:
        return self.order.work / "done" / f"part-{number:06d}.json"

    def _write(self, numbers: Sequence[int], *, num_missing: int) -> None:
        """Compute and write parts; a thread writes one while the next one is computed."""
        mine = [self.parts[number] for number in numbers]
        with self._progress(mine, num_missing) as bar, ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for number, rows in zip(
                numbers, embed_parts(self.vectors, self.shards, mine, tick=bar.update), strict=True
            ):
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write_part, number, rows)
            if writing is not None:
                writing.result()

    def _progress(self, mine: Sequence[range], num_missing: int) -> Any:
        """Show the first rank's share, which ends when those of the others do, and what was done before."""
        world = self.world
        todo = sum(map(len, mine))
        before = (self.shards.num_samples // world.world_size) * (len(self.parts) - num_missing) // len(self.parts)
        title = "embedding" if world.world_size == 1 else f"embedding (rank 1 of {world.world_size})"
        return tqdm(
            desc=title,
            total=before + todo,
            initial=before,
            unit=" images",
            unit_scale=True,
            disable=world.rank > 0,
            delay=3,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            leave=False,
        )

    def _write_part(self, number: int, rows: Rows) -> None:
        self.format.write_part(self._stem(number), rows, self.shards.class_names)
        record = {
            "num_rows": len(rows),
            "digest": digest(np.ascontiguousarray(rows.values).data),
            "damaged": [asdict(each) for each in rows.damaged],
        }
        write_whole(self._record(number), json.dumps(record), durable=True)

    def _finish(self) -> WrittenEmbeddings:
        order, numbers = self.order, range(len(self.parts))
        counts = [json.loads(self._record(number).read_text()) for number in numbers]
        num_rows = sum(count["num_rows"] for count in counts)
        damaged = list(self._damaged_lines(counts))
        header: dict[str, Any] = {
            "format": "moco-fast-embeddings",
            "version": 1,
            "num_rows": num_rows,
            "dim": self.vectors.dim(),
            "num_damaged": len(damaged),
            "vectors": digest(*(count["digest"].encode() for count in counts)),
            "encoder": order.encoder,
            "which": order.which,
            "images": order.images,
            "are_shards": not self.is_packed_here,
            "class_names": list(self.shards.class_names),
            "settings": self.settings,
        }
        self.format.finish([self._stem(number) for number in numbers], order.out, header, damaged)
        remove(order.work)
        return WrittenEmbeddings(
            path=order.out,
            num_rows=num_rows,
            dim=header["dim"],
            num_damaged=len(damaged),
            was_there=False,
        )

    def _damaged_lines(self, records: Sequence[dict[str, Any]]) -> Iterator[str]:
        """Give a line of JSON for each image without a vector: those that were not packed, and damaged samples."""
        if self.is_packed_here:
            for reason in rejected(self.order.work / "images"):
                yield json.dumps({"index": None, "key": None, "source": None, "reason": reason}) + "\n"
        for record in records:
            yield from (json.dumps(each) + "\n" for each in record["damaged"])
