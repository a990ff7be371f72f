"""Export of an encoder to another library, verified by loading it again and comparing its outputs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moco_fast.exporters.registry import find_exporter
from shards.ground.files import appearing, remove

if TYPE_CHECKING:
    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs

__all__ = ["WrittenExport", "export"]


@dataclass(frozen=True, kw_only=True)
class WrittenExport:
    """File or folder that was written, and how to use it."""

    path: Path
    num_parameters: int
    usage: str
    """Python lines that load it."""


def export(
    encoder: str | Path,
    target: str,
    out: str | Path,
    *,
    head: bool = False,
    which: Literal["query", "key"] = "query",
    image_size: int | None = None,
) -> WrittenExport:
    """Write an encoder so that another library can load it.

    `timm` and `huggingface` take a folder, the others a file. Before this returns, what was written is loaded as a user
    would load it, and its features are compared with the encoder's.

        written = moco_fast.export("runs/first", "timm", "encoder")
        print(written.usage)

    Args:
        encoder: folder of a run, one of its checkpoints/step-*, or anything else that `load_encoder` accepts.
        target: one of moco_fast.exporters.registry.EXPORTERS.
        out: file or folder to write; an earlier export is replaced.
        head: also write the projection head, where the target's format can hold it.
        which: the trained encoder, or its momentum encoder if it has one.
        image_size: side of the images that it will process, in pixels; unset: as it was trained.

    Raises:
        ValueError: there is no encoder, `out` cannot be written, or the library lacks the network; nothing is written.
    """
    from moco_fast.encoders.open import open_encoder

    exporter, out = find_exporter(target), Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; create it first")
    exporter.check(out)
    if head and not exporter.has_head:
        raise ValueError(
            f"--head: {target} cannot hold a projection head; leave it out, or use --format huggingface, onnx or "
            "torch-export"
        )
    opened = open_encoder(str(encoder), which=which, image_size=image_size)
    if reason := exporter.why_not(opened.model):
        raise ValueError(reason)
    if head and opened.method is None:
        raise ValueError(f"--head: {opened.name} has no projection head; leave it out")
    with appearing(out, durable=False) as aside:
        exporter.write(opened, aside, head=head)
        _compare(opened, exporter.read_back(opened, aside, head=head), target, head=head)
        remove(out)
    parts = (opened.encoder.backbone, opened.encoder.head) if head else (opened.encoder.backbone,)
    num_parameters = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return WrittenExport(path=out, num_parameters=num_parameters, usage=exporter.usage(opened, out))


def _compare(opened: "OpenedEncoder", outputs: "Outputs", target: str, *, head: bool) -> None:
    """Compare the outputs of what was read back with the encoder's, for random pixels.

    Raises:
        ValueError: they differ, so the library builds a different network with the same weight shapes; or they are not
            finite.
    """
    import torch

    encoder, size = opened.encoder, opened.encoder.image_size
    generator = torch.Generator().manual_seed(0)
    # A different number of images than programs were traced with.
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = [encoder.features(images, "backbone"), *([encoder.features(images, "head")] if head else [])]
        if not all(each.isfinite().all() for each in expected):
            raise ValueError("the encoder's features are not finite: it has diverged; export an earlier checkpoint")
        found = list(outputs(images))
    for wanted, each in zip(expected, found, strict=True):
        apart = (each - wanted).abs().max().item() if each.shape == wanted.shape else float("inf")
        if not apart <= 1e-3 * wanted.abs().max().item():
            raise ValueError(
                f"{target} builds a different network for these weights: features differ from the encoder's by up to "
                f"{apart:.3g}. Load the encoder with moco_fast.load_encoder instead"
            )
