"""Exporter to timm: a folder whose config.json tells `timm.create_model` what to build."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from moco_fast.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs

__all__ = ["TimmExporter", "check_folder"]

_FILES = ("config.json", "model.safetensors")


class TimmExporter:
    """Folder for timm. It names the network, since a transformer's weights also fit other numbers of heads."""

    place: ClassVar[str] = "encoder"
    has_head: ClassVar[bool] = False

    def why_not(self, model: ModelConfig | None) -> str | None:
        """Refuse networks with a stem that timm lacks, and those that timm does not build."""
        if model is None:
            return "timm cannot take a network that only its own library builds: export it with --format onnx"
        if model.channels != 3:
            return "its folder is read with three channels: export this one with --format onnx or torch-export"
        if model.stem == "imagenet":
            return None
        return (
            f"timm has no {model.encoder} with a {model.stem} stem: export it with --format onnx or torch-export, "
            "which take every network"
        )

    def check(self, out: Path) -> None:
        """Accept a new folder, or one that holds only an earlier export."""
        check_folder(out, "timm", _FILES)

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write config.json and model.safetensors."""
        from timm.models import save_for_hf

        from moco_fast.encoders.weights import load_exactly

        assert not head
        model = opened.model
        assert model is not None
        network, name, options = _build(model, opened.encoder.image_size)
        load_exactly(network, opened.encoder.backbone.state_dict(), f"timm's {name} does not take these weights")
        # timm's metadata about its own weights does not apply to these.
        about_its_own = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes")
        told = cast("dict[str, Any]", network.pretrained_cfg)
        cast("Any", network).pretrained_cfg = {key: told[key] for key in told.keys() - about_its_own}
        size, crop = opened.encoder.image_size, opened.encoder.crop
        images = {"mean": model.mean, "std": model.std, "input_size": (3, size, size), "crop_pct": crop}
        save_for_hf(
            network,
            str(path),
            model_args=options,
            safe_serialization=True,
            data_config=images | {"interpolation": "bilinear"},
        )

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load the folder with timm."""
        import timm

        assert not head
        network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        return lambda pixels: (network(opened.encoder.normalize(pixels)),)

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return lines for timm."""
        del opened
        lines = [
            "import timm",
            f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True)",
            "# mean and std of its pixels: timm.data.resolve_model_data_config(model)",
        ]
        return "\n".join(lines)


def check_folder(out: Path, library: str, files: tuple[str, ...]) -> None:
    """Accept a new folder, or one without other files. Raises ValueError: it is a file, or has other contents."""
    if out.suffix == ".safetensors" or out.is_file():
        raise ValueError(
            f"--out {out}: {library} loads a folder that holds the network's description and its weights: name a folder"
        )
    if out.is_dir() and {path.name for path in out.iterdir()} - set(files):
        raise ValueError(f"--out {out} is a folder with other contents: choose another path")


def _build(model: ModelConfig, size: int) -> tuple["nn.Module", str, dict[str, Any]]:
    """Build timm's network for one of its names or ours; return it with timm's name and options."""
    import timm

    from moco_fast.encoders.encoder import TIMM_NETWORKS

    name, options = TIMM_NETWORKS.get(model.encoder, (model.encoder, {}))
    network: Any = timm.create_model(name, num_classes=0, **options)
    if getattr(getattr(network, "patch_embed", None), "img_size", None) not in (None, (size, size)):
        network = timm.create_model(name, num_classes=0, **options, img_size=size)
        options = options | {"img_size": size}
    return network, name, options
