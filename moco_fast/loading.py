"""Trained encoders, from a run or from what was exported."""

import json
from pathlib import Path

from torch import nn

from moco_fast.encoders.encoder import Encoder

__all__ = ["load_encoder"]


def load_encoder(path: str | Path) -> Encoder:
    """Load a trained encoder: pixels in, features out.

        encoder = moco_fast.load_encoder("runs/first")
        features = encoder.features(images, "backbone")  # images: (B, 3, H, W) uint8

    Args:
        path: folder of a run (its newest checkpoint counts), one of its checkpoints/step-*, or what `moco-fast export`
            wrote: timm's folder or torchvision's .safetensors. An export has no head: what stands in for it changes
            nothing.

    Returns:
        the encoder on the CPU in float32 and in eval mode. `image_size` and `crop` say what images it was evaluated
        on.

    Raises:
        ValueError: there is nothing that can be loaded, or it is damaged.
    """
    from moco_fast import checkpoint

    path = Path(path)
    if path.suffix == ".safetensors":
        return _from_torchvision(path)
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return _from_timm(path)
    return checkpoint.load_encoder(path)[1]


def _from_timm(path: Path) -> Encoder:
    import timm
    from timm.data.config import resolve_model_data_config

    backbone = timm.create_model(f"local-dir:{path}", pretrained=True)
    data = resolve_model_data_config(backbone)
    return _without_head(
        backbone, mean=data["mean"], std=data["std"], size=int(data["input_size"][-1]), crop=float(data["crop_pct"])
    )


def _from_torchvision(path: Path) -> Encoder:
    import torchvision
    from safetensors import safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a run's folder, a checkpoint, or what `moco-fast export` wrote")
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("architecture", "{}"))
    if not {"name", "mean", "std", "size", "crop"} <= facts.keys():
        raise ValueError(
            f"{path} does not say what network its weights are of: give a file that `moco-fast export --format "
            "torchvision` wrote, or the run's folder"
        )
    backbone = torchvision.models.get_model(facts["name"])
    backbone.num_features = backbone.fc.in_features  # pyright: ignore[reportAttributeAccessIssue] - a ResNet has one
    backbone.fc = nn.Identity()
    backbone.load_state_dict(load_file(path))
    return _without_head(backbone, mean=facts["mean"], std=facts["std"], size=facts["size"], crop=facts["crop"])


def _without_head(
    backbone: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], size: int, crop: float
) -> Encoder:
    dim = int(backbone.num_features)  # pyright: ignore[reportArgumentType] - neither library declares it
    (m0, m1, m2), (s0, s1, s2) = mean, std
    encoder = Encoder(
        backbone,
        nn.Identity(),
        feature_dim=dim,
        dim=dim,
        mean=(m0, m1, m2),
        std=(s0, s1, s2),
        image_size=size,
        crop=crop,
    )
    return encoder.eval()
