"""`moco-fast embed`."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moco_fast.commands.common import Device, given, positive
from moco_fast.commands.place import Precision, data_of, place
from moco_fast.encoders.layers import check_layer
from pipelines.config import Backend
from shards.ground.units import counted

__all__ = ["Embed"]


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write one vector per image into a file: shards or a folder of images, of any size, on any number of GPUs.

    The same command continues after a stop. Several GPUs: accelerate launch -m moco_fast.cli embed ...
    """

    encoder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ENCODER")]
    """Folder of a run (its newest checkpoint counts), one of its checkpoints/step-*, a file of weights, a folder of
    timm's or transformers', timm:NAME or torchvision:NAME."""
    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGES")]
    """Shards (a folder, an address in a bucket, a .beton, several with commas between them), or a folder of images,
    which is packed beside --out first."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """File to write: .parquet, .npy or .safetensors. A name without an ending: a folder of Parquet files, for sets
    whose vectors fill hundreds of gigabytes."""
    layer: str = "backbone"
    """Whose output the vectors are: backbone, head, stage1 to stage5 of a ResNet, or stage3/9216 for at most 9,216
    numbers of a stage."""
    normalize: bool = True
    """Scale every vector to length 1."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers in the file."""
    index: Literal["none", "faiss"] = "none"
    """`faiss`: an index beside the file, with which `moco-fast search` need not read all vectors."""
    which: Literal["query", "key"] = "query"
    """Of an encoder that was trained with its slow average, the one or the other."""
    size: int | None = None
    """Height and width of the images in pixels; unset: the encoder's."""
    crop: float | None = None
    """Central square that is used, as a share of the shorter side; unset: the encoder's."""
    backend: Literal["auto", Backend] | None = None
    """What decodes; unset: the run's --data.backend, or auto."""
    batch_size: int = 256
    """Images that each rank computes at once."""
    precision: Precision | None = None
    """Precision of the encoder. Unset: the run's --run.precision, or auto: bf16 on a GPU that has it, else fp32."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""

    def execute(self) -> int:
        """Do what the options say; return the exit code."""
        self._validate()
        from moco_fast.embedding.formats import damaged_beside, format_of
        from moco_fast.embedding.stream import Vectors
        from moco_fast.embedding.write import Order, write_embeddings
        from moco_fast.encoders.open import open_encoder

        format_of(Path(self.out))
        opened = open_encoder(self.encoder, which=self.which, image_size=self.size)
        with place(opened.config, device=self.device, precision=self.precision) as (device, world, precision):
            data = data_of(opened.config, device)
            vectors = Vectors(
                encoder=opened.encoder.to(device),
                size=opened.encoder.image_size,
                crop=given(self.crop, opened.encoder.crop),
                layer=self.layer,
                normalize=self.normalize,
                dtype=self.dtype,
                batch_size=self.batch_size,
                data=replace(data, backend=self.backend or data.backend),
                device=device,
                precision=precision,
                world=world,
            )
            order = Order(
                vectors=vectors,
                encoder=self.encoder,
                which=self.which,
                digest=opened.digest,
                images=self.images,
                out=Path(self.out),
            )
            written = write_embeddings(order)
            if world.rank > 0:
                return 0
        done = " were there already" if written.was_there else ""
        print(f"{written.path}: {counted(written.num_rows, 'vector')} of {counted(written.dim, 'number')}{done}")
        if written.num_damaged:
            listed = damaged_beside(Path(self.out))
            what = "1 image cannot be read and has" if written.num_damaged == 1 else None
            what = what or f"{written.num_damaged:,} images cannot be read and have"
            print(f"{what} no vector: {listed}", file=sys.stderr)
        if self.index == "faiss":
            from moco_fast.embedding.faiss_index import write_faiss
            from moco_fast.embedding.index import open_index

            index, done = write_faiss(open_index(self.out))
            print(f"{index.describe()} {done}")
        return 0

    def _validate(self) -> None:
        check_layer(self.layer)
        if self.index == "faiss":
            from moco_fast.embedding.faiss_index import needs_faiss

            needs_faiss("--index faiss")
        positive("batch-size", self.batch_size)
        if self.size is not None:
            positive("size", self.size)
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop is {self.crop}, but must be a share of the image: above 0, at most 1")
        if not Path(self.out).absolute().parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no such folder to write to")
