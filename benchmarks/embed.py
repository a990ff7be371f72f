"""`moco-fast embed` beside the loader alone and beside what one would write instead, by turns, as ratios.

    python benchmarks/embed.py --photos FILE.tar [--json FILE]    # or --shards DIR

The encoder costs almost nothing: it looks at a pixel in 1,024. So what is measured is the way of the images to it and
of the vectors, 2,048 numbers each, to the disk. "Loader" hands the same single view of the same shards over and does
nothing with it. "torchvision" is a DataLoader with a worker per CPU that decodes with PIL, resizes and crops, and the
same encoder; its vectors are saved by numpy, without keys, sources or a way to continue.
"""

import argparse
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternating import Claim, alternate, claims_table, compare, header, write_claims
from loaders.base import EncodedPhotos
from photographs import photograph_shards
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from moco_fast.embedding.stream import Vectors
from moco_fast.embedding.write import Order, write_embeddings
from moco_fast.encoders.encoder import Encoder
from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader
from shards.ground.cpus import available_cpus
from shards.ground.files import remove
from shards.sets import open_set

GOAL = 0.9
SIZE, CROP, DIM = 224, 0.875, 2048
STRIDE = 32


class FewPixels(Encoder):
    """An encoder that looks at a pixel in 1,024."""

    def __init__(self) -> None:
        side = -(-SIZE // STRIDE)
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, DIM))
        super().__init__(backbone, nn.Identity(), feature_dim=DIM, dim=DIM, image_size=SIZE, crop=CROP)

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 to the few that count, (B, 3, h, w) float32."""
        return super().normalize(images[:, :, ::STRIDE, ::STRIDE].contiguous())


class CenterCrops(torch.utils.data.Dataset[Tensor]):
    """The central square of each photograph, as torchvision's transforms make it."""

    def __init__(self, shards: str) -> None:
        self._photos = EncodedPhotos(shards)
        self._transform = transforms.Compose(
            [transforms.Resize(round(SIZE / CROP)), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Tensor:
        return self._transform(Image.open(io.BytesIO(self._photos[index])).convert("RGB"))


def contestants(shards: str, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name; each does all samples once."""
    device, encoder = torch.device(options.device), FewPixels().eval().to(options.device)
    data = DataConfig(shards="", backend=options.backend, batch_size=options.batch_size, on_bad_sample="skip")
    opened = open_set(shards)

    def load() -> None:
        views, samples = central_crop(SIZE, side=CROP), np.arange(opened.num_samples)
        with open_loader(data, views, samples=samples, device=device, shards=opened) as loader:
            for _ in loader:
                pass

    def embed(name: str) -> None:
        vectors = Vectors(
            encoder=encoder, size=SIZE, crop=CROP, batch_size=options.batch_size, data=data, device=device
        )
        out = folder / name
        write_embeddings(Order(vectors=vectors, encoder="", which="query", digest="", images=shards, out=out))
        for path in folder.glob(f"{name}*"):
            remove(path)

    @torch.no_grad()
    def with_torchvision() -> None:
        photos = torch.utils.data.ConcatDataset([CenterCrops(each) for each in shards.split(",")])
        loader: Any = torch.utils.data.DataLoader(photos, batch_size=options.batch_size, num_workers=available_cpus())
        found = [nn.functional.normalize(encoder.features(batch.to(device), "backbone")).cpu() for batch in loader]
        np.save(folder / "alone.npy", torch.cat(found).numpy())
        os.sync()

    return {
        "loader": load,
        "npy": lambda: embed("x.npy"),
        "parquet": lambda: embed("x.parquet"),
        "torchvision": with_torchvision,
    }


def claims_of(rates: dict[str, list[float]], what: str) -> list[Claim]:
    """Each format against the loader and against torchvision."""
    return [
        compare(f"{what}: embed into {name} / {peer}", rates[name], rates[theirs], unit="images/s", goal=goal)
        for theirs, peer, goal in (("loader", "the loader alone", GOAL), ("torchvision", "torchvision", 1.0))
        for name in ("npy", "parquet")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", help="folder that make-shards wrote")
    source.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--times", type=int, default=2, help="how often the photographs are taken")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shards = options.shards or str(photograph_shards(folder, num=300, photos=options.photos))
        shards = ",".join([shards] * options.times)
        num_images = open_set(shards).num_samples
        made = contestants(shards, folder, options)
        seconds = alternate(made, rounds=options.rounds, device=torch.device(options.device))
    rates = {name: [num_images / each for each in of_one] for name, of_one in seconds.items()}
    claims = claims_of(rates, f"{num_images:,} photos, {SIZE} px, {options.backend} backend, {options.device}")
    print(f"{header(options.device)}; batch {options.batch_size}, {options.rounds} rounds\n\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
