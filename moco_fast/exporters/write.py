"""Writing a backbone for another library, checked by its features. The head is left out: pretraining alone needs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moco_fast.config import ModelConfig
from moco_fast.exporters.base import Exporter
from moco_fast.exporters.registry import find_exporter
from shards.ground.files import appearing, remove

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moco_fast.encoders.encoder import Encoder

__all__ = ["Written", "export", "load_into"]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written, a file or a folder, and how to use it."""

    path: Path
    num_parameters: int
    usage: str
    """Python lines that load it."""


def export(run: str | Path, target: str, out: str | Path) -> Written:
    """Write the backbone of a run's newest checkpoint (or of one checkpoint) so that a library can load it.

    For `timm` a folder, for `torchvision` a file. What is written has been loaded as a user loads it and gives the
    encoder's features.

        written = moco_fast.export("runs/first", "timm", "encoder")
        print(written.usage)

    Args:
        run: folder of a run, or one of its checkpoints/step-*.
        target: one of moco_fast.exporters.registry.EXPORTERS.
        out: file or folder to write; an earlier export is replaced.

    Raises:
        ValueError: no checkpoint, no place to write to, or the library has no such network; nothing is written.
    """
    from moco_fast.checkpoint import load_encoder

    exporter = find_exporter(target)
    config, encoder = load_encoder(run)
    if reason := exporter.why_not(config.model):
        raise ValueError(reason)
    out = Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    exporter.check_place(out)
    network = load_into(exporter, config.model, encoder.backbone.state_dict())
    with appearing(out, durable=False) as aside:
        exporter.write(network, config, aside)
        _compare(encoder, exporter.read_back(config.model, aside), config.views.size, target)
        remove(out)
    num_parameters = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    return Written(path=out, num_parameters=num_parameters, usage=exporter.usage(config.model, out))


def load_into(exporter: Exporter, model: ModelConfig, weights: Mapping[str, "Tensor"]) -> "nn.Module":
    """Build the library's network for a backbone and load the backbone's weights into it.

    Raises:
        ValueError: a parameter is missing, left over or of another shape.
    """
    network, name = exporter.build(model)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{type(exporter).__name__.lower()}'s {name} does not take these weights: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from None
    return network


def _compare(encoder: "Encoder", network: "nn.Module", size: int, target: str) -> None:
    """Hold the features of what was read back against the encoder's, for pixels without meaning.

    Raises:
        ValueError: they differ, so the library's network is another one with weights of the same shapes; or they are
            not finite.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = encoder.features(images, "backbone")
        found = network.eval()(encoder.normalize(images))
    if not expected.isfinite().all():
        raise ValueError("the encoder's features are not finite: it has diverged, export an earlier checkpoint")
    apart = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
    if not apart <= 1e-3 * expected.abs().max().item():
        raise ValueError(
            f"{target} builds another network for these weights: features are up to {apart:.3g} apart from the "
            "encoder's. Load the checkpoint's model.safetensors with moco_fast.checkpoint.load_encoder"
        )
