"""Writing an encoder for another library, checked by what it computes when it is loaded again."""

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
    """What was written, a file or a folder, and how to use it."""

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
    """Write an encoder so that a library can load it.

    For `timm` and `huggingface` a folder, for the others a file. What is written has been loaded as a user loads it
    and gives the encoder's features.

        written = moco_fast.export("runs/first", "timm", "encoder")
        print(written.usage)

    Args:
        encoder: folder of a run, one of its checkpoints/step-*, or anything else that `load_encoder` takes.
        target: one of moco_fast.exporters.registry.EXPORTERS.
        out: file or folder to write; an earlier export is replaced.
        head: write the projection head, too, where the target has a place for it.
        which: of an encoder that was trained with its slow average, the one or the other.
        image_size: side of the images that it is for, in pixels; unset: as it was trained.

    Raises:
        ValueError: no encoder, no place to write to, or the library has no such network; nothing is written.
    """
    from moco_fast.encoders.open import open_encoder

    exporter, out = find_exporter(target), Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    exporter.check(out)
    if head and not exporter.has_head:
        raise ValueError(
            f"--head: {target} has no place for a projection head; leave it out, or use --format huggingface, onnx or "
            "torch-export"
        )
    opened = open_encoder(str(encoder), which=which, image_size=image_size)
    if reason := exporter.why_not(opened.model):
        raise ValueError(reason)
    if head and opened.method is None:
        raise ValueError(f"--head: {opened.name} comes without a projection head; leave it out")
    with appearing(out, durable=False) as aside:
        exporter.write(opened, aside, head=head)
        _compare(opened, exporter.read_back(opened, aside, head=head), target, head=head)
        remove(out)
    parts = (opened.encoder.backbone, opened.encoder.head) if head else (opened.encoder.backbone,)
    num_parameters = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return WrittenExport(path=out, num_parameters=num_parameters, usage=exporter.usage(opened, out))


def _compare(opened: "OpenedEncoder", outputs: "Outputs", target: str, *, head: bool) -> None:
    """Hold the outputs of what was read back against the encoder's, for pixels without meaning.

    Raises:
        ValueError: they differ, so the library's network is another one with weights of the same shapes; or they are
            not finite.
    """
    import torch

    encoder, size = opened.encoder, opened.encoder.image_size
    generator = torch.Generator().manual_seed(0)
    # Another number of images than programs were traced with.
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = [encoder.features(images, "backbone"), *([encoder.features(images, "head")] if head else [])]
        if not all(each.isfinite().all() for each in expected):
            raise ValueError("the encoder's features are not finite: it has diverged, export an earlier checkpoint")
        found = list(outputs(images))
    for wanted, each in zip(expected, found, strict=True):
        apart = (each - wanted).abs().max().item() if each.shape == wanted.shape else float("inf")
        if not apart <= 1e-3 * wanted.abs().max().item():
            raise ValueError(
                f"{target} builds another network for these weights: features are up to {apart:.3g} apart from the "
                "encoder's. Load the encoder itself with moco_fast.load_encoder"
            )
