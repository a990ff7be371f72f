"""Loaders whose place in an epoch can be saved, one process of them: what `elasticity.py` runs.

    python benchmarks/elastic_loaders.py LOADER write --folder FOLDER --samples 2880 --per-file 60
    python benchmarks/elastic_loaders.py LOADER read --folder FOLDER --global-batch 48 --save-at 21 --states FOLDER
    python benchmarks/elastic_loaders.py LOADER read --folder FOLDER --global-batch 48 --from FILE

The rank and their number come from the environment, as launchers set it. Each loader is set up as its documents say
for a shuffled epoch that is resumed. `read` writes JSON: the sample numbers of each batch that it was given, and the
seconds from opening the loader until its first batch. Nothing of this project is imported but by `ours`, so that a peer
may have an environment of its own.
"""

import argparse
import importlib
import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SEED, SIDE, WORKERS = 0, 32, 2


class Place:
    """This process among the ranks."""

    def __init__(self, global_batch: int) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.global_batch = global_batch
        self.batch = global_batch // self.world_size

    def join(self) -> None:
        """Join the other ranks as training programs do, where a loader looks at torch.distributed."""
        import torch.distributed as dist

        if self.world_size > 1:
            dist.init_process_group("gloo")


class Opened:
    """A loader: sample numbers of its batches, and its place."""

    def __init__(
        self, batches: Callable[[], Iterator[Any]], save: Callable[[], Any], load: Callable[[Any], object]
    ) -> None:
        self.batches = batches
        self.save = save
        self.load = load


def photo() -> bytes:
    """A small JPEG, the same for all samples: what is measured is the way to it."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_tar(path: Path, numbers: range) -> None:
    data = photo()
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            info = tarfile.TarInfo(f"{number:09d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


class Ours:
    """This project."""

    package = "moco-fast"
    imports = ("pipelines.loader", "pipelines.backends.dali")
    asks_torch = False

    def write(self, folder: Path, num: int, per_file: int) -> None:
        """Pack a tar."""
        import shards

        write_tar(folder / "samples.tar", range(num))
        source = (str(folder / "samples.tar"),)
        shards.pack(shards.PackConfig(sources=source, out=str(folder / "set"), shard_samples=per_file))
        (folder / "samples.tar").unlink()

    def open(self, folder: Path, place: Place) -> Opened:
        """Open the loader of a training run: two views of each sample."""
        from pipelines.config import DataConfig, ViewsConfig
        from pipelines.loader import open_loader
        from pipelines.world import World

        world = World(rank=place.rank, world_size=place.world_size, local_world_size=place.world_size)
        data = DataConfig(shards=str(folder / "set"), batch_size=place.global_batch, num_threads=WORKERS)
        loader = open_loader(data, ViewsConfig(size=SIDE), seed=SEED, world=world)

        def batches() -> Iterator[Any]:
            for batch in loader:
                yield batch.index.numpy()
            loader.close()

        return Opened(batches, loader.state_dict, loader.load_state_dict)


def number_and_photo(number: int) -> dict[str, Any]:
    """What LitData writes of a sample."""
    return {"index": number, "image": photo()}


class LitData:
    """StreamingDataset and StreamingDataLoader of LitData."""

    package = "litdata"
    imports = ("litdata",)
    asks_torch = True

    def write(self, folder: Path, num: int, per_file: int) -> None:
        """Write its chunks."""
        import litdata

        litdata.optimize(
            number_and_photo, list(range(num)), output_dir=str(folder / "set"), chunk_size=per_file, num_workers=1
        )

    def open(self, folder: Path, place: Place) -> Opened:
        """Open it, shuffled."""
        import litdata

        dataset = litdata.StreamingDataset(str(folder / "set"), shuffle=True, drop_last=True, seed=SEED)
        loader = litdata.StreamingDataLoader(dataset, batch_size=place.batch, num_workers=WORKERS)
        return Opened(lambda: (each["index"].numpy() for each in loader), loader.state_dict, loader.load_state_dict)


class Mosaic:
    """StreamingDataset and StreamingDataLoader of MosaicML's streaming."""

    package = "mosaicml-streaming"
    imports = ("streaming",)
    asks_torch = False

    def write(self, folder: Path, num: int, per_file: int) -> None:
        """Write its shards."""
        from streaming import MDSWriter

        data = photo()
        columns = {"index": "int64", "image": "bytes"}
        size = per_file * (len(data) + 24)
        with MDSWriter(out=str(folder / "set"), columns=columns, size_limit=size) as writer:
            for number in range(num):
                writer.write({"index": np.int64(number), "image": data})

    def open(self, folder: Path, place: Place) -> Opened:
        """Open it, shuffled; its own default shuffle."""
        from streaming import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(local=str(folder / "set"), shuffle=True, shuffle_seed=SEED, batch_size=place.batch)
        loader = StreamingDataLoader(dataset, batch_size=place.batch, num_workers=WORKERS)
        return Opened(lambda: (each["index"].numpy() for each in loader), loader.state_dict, loader.load_state_dict)


def split_record(record: bytes) -> dict[str, Any]:
    """Number and JPEG of what is in an ArrayRecord."""
    return {"index": np.frombuffer(record, np.int64, 1)[0], "image": np.frombuffer(record, np.uint8, offset=8)}


class Grain:
    """grain's ElasticIterator over a shuffled ArrayRecord."""

    package = "grain"
    imports = ("grain", "grain.experimental", "array_record.python.array_record_data_source")
    asks_torch = False

    def write(self, folder: Path, num: int, per_file: int) -> None:
        """Write ArrayRecords."""
        from array_record.python.array_record_module import ArrayRecordWriter

        data = photo()
        (folder / "set").mkdir(parents=True)
        for begin in range(0, num, per_file):
            writer = ArrayRecordWriter(str(folder / "set" / f"{begin:09d}.array_record"), "group_size:1")
            for number in range(begin, min(num, begin + per_file)):
                writer.write(np.int64(number).tobytes() + data)
            writer.close()

    def open(self, folder: Path, place: Place) -> Opened:
        """Open it; threads read ahead, as by default."""
        import grain
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from grain.experimental import ElasticIterator
        from grain.sharding import ShardOptions

        source = ArrayRecordDataSource([str(path) for path in sorted((folder / "set").iterdir())])
        dataset = grain.MapDataset.source(source).seed(SEED).shuffle().map(split_record)
        shard = ShardOptions(shard_index=place.rank, shard_count=place.world_size)
        iterator = iter(ElasticIterator(dataset, place.global_batch, shard))
        return Opened(lambda: (each["index"] for each in iterator), iterator.get_state, iterator.set_state)


class Records:
    """A map-style dataset: records of one size in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 8 + len(photo())

    def __len__(self) -> int:
        return self._path.stat().st_size // self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(index * self._size)
            return {name: each.copy() for name, each in split_record(file.read(self._size)).items()}


class TorchData:
    """torchdata's StatefulDataLoader and StatefulDistributedSampler, on a map-style dataset."""

    package = "torchdata"
    imports = ("torchdata.stateful_dataloader.sampler",)
    asks_torch = True

    def write(self, folder: Path, num: int, per_file: int) -> None:  # noqa: ARG002 - as the others take it
        """Write one file."""
        data = photo()
        (folder / "set").mkdir(parents=True)
        with (folder / "set" / "records").open("wb") as file:
            file.writelines(np.int64(number).tobytes() + data for number in range(num))

    def open(self, folder: Path, place: Place) -> Opened:
        """Open it, shuffled."""
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        dataset = Records(folder / "set" / "records")
        sampler = StatefulDistributedSampler(dataset, place.world_size, place.rank, shuffle=True, seed=SEED)
        loader = StatefulDataLoader(dataset, batch_size=place.batch, sampler=sampler, num_workers=WORKERS)
        return Opened(lambda: (each["index"].numpy() for each in loader), loader.state_dict, loader.load_state_dict)


def key_of(sample: dict[str, Any]) -> int:
    """The number of a sample of webdataset."""
    return int(sample["__key__"])


class WebDataset:
    """webdataset in torchdata's StatefulDataLoader, with its shuffles that repeat themselves."""

    package = "webdataset"
    imports = ("webdataset", "torchdata.stateful_dataloader")
    asks_torch = True

    def write(self, folder: Path, num: int, per_file: int) -> None:
        """Write tars."""
        (folder / "set").mkdir(parents=True)
        for begin in range(0, num, per_file):
            write_tar(folder / "set" / f"{begin:09d}.tar", range(begin, min(num, begin + per_file)))

    def open(self, folder: Path, place: Place) -> Opened:
        """Open it: shards go to ranks, then to workers, then samples are shuffled in a buffer."""
        import webdataset as wds
        from torchdata.stateful_dataloader import StatefulDataLoader
        from webdataset.filters import detshuffle

        urls = [str(path) for path in sorted((folder / "set").iterdir())]
        dataset = wds.WebDataset(urls, shardshuffle=100, detshuffle=True, seed=SEED, nodesplitter=wds.split_by_node)
        dataset = dataset.compose(detshuffle(1000, seed=SEED)).map(key_of)
        loader = StatefulDataLoader(dataset, batch_size=place.batch, num_workers=WORKERS)
        return Opened(lambda: (each.numpy() for each in loader), loader.state_dict, loader.load_state_dict)


LOADERS = {
    "ours": Ours(),
    "litdata": LitData(),
    "mosaic": Mosaic(),
    "grain": Grain(),
    "torchdata": TorchData(),
    "webdataset": WebDataset(),
}


def read(loader: str, options: argparse.Namespace) -> dict[str, Any]:
    """Take batches to the end of the epoch, or as many as were asked for."""
    # What is imported, and how ranks find each other, is no part of a seek.
    for name in LOADERS[loader].imports:
        importlib.import_module(name)
    place = Place(options.global_batch)
    if LOADERS[loader].asks_torch:
        place.join()
    begin, first_s, batches = time.perf_counter(), 0.0, list[list[int]]()
    opened = LOADERS[loader].open(options.folder, place)
    if options.state is not None:
        opened.load(pickle.loads(options.state.read_bytes()))
    for step, numbers in enumerate(opened.batches(), 1):
        first_s = first_s or time.perf_counter() - begin
        batches.append([int(each) for each in numbers])
        if step in options.save_at:
            path = options.states / f"step-{step}" / f"rank-{place.rank}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps(opened.save()))
        if step == options.stop:
            break
    return {"first_s": first_s, "batches": batches, "version": metadata.version(LOADERS[loader].package)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", choices=list(LOADERS))
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("--folder", type=Path, required=True, help="of the loader's set")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--per-file", type=int)
    parser.add_argument("--global-batch", type=int)
    parser.add_argument("--from", dest="state", type=Path, help="state to go on from")
    parser.add_argument("--save-at", type=int, nargs="*", default=[], help="batches after which states are saved")
    parser.add_argument("--states", type=Path, help="where")
    parser.add_argument("--stop", type=int, help="batches after which to stop")
    parser.add_argument("--out", type=Path, help="where `read` writes what it found")
    options = parser.parse_args()
    if options.what == "write":
        LOADERS[options.loader].write(options.folder, options.samples, options.per_file)
    else:
        options.out.write_text(json.dumps(read(options.loader, options)))


if __name__ == "__main__":
    main()
