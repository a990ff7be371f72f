"""Exporter to timm: a folder whose config.json says what `timm.create_model` has to build."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moco_fast.config import Config, ModelConfig
from moco_fast.encoders.encoder import TIMM_NETWORKS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Timm"]

_FILES = ("config.json", "model.safetensors")


class Timm:
    """timm's folder: the weights of a transformer fit networks with other numbers of heads, so its name goes along."""

    def why_not(self, model: ModelConfig) -> str | None:
        """It has every encoder of ours but those with another stem."""
        if model.stem == "imagenet":
            return None
        return f"timm has no {model.encoder} with a {model.stem} stem: load the checkpoint's model.safetensors itself"

    def check_place(self, out: Path) -> None:
        """Take a new folder, or one that holds nothing but an earlier export."""
        if out.suffix == ".safetensors" or out.is_file():
            raise ValueError(
                f"--out {out}: timm loads a folder, which says beside the weights what network they are of: name a "
                "folder"
            )
        if out.is_dir() and {path.name for path in out.iterdir()} - set(_FILES):
            raise ValueError(f"--out {out} is a folder that holds something else: name another place")

    def build(self, model: ModelConfig) -> tuple["nn.Module", str]:
        """Build timm's network by its own name, or by the one of ours."""
        import timm

        name, options = TIMM_NETWORKS.get(model.encoder, (model.encoder, {}))
        return timm.create_model(name, num_classes=0, **options), name

    def write(self, network: "nn.Module", config: Config, path: Path) -> None:
        """Write config.json and model.safetensors."""
        from timm.models import save_for_hf

        # What timm says of weights of its own is not true of these.
        about_its_own = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes")
        told = cast("dict[str, Any]", network.pretrained_cfg)
        cast("Any", network).pretrained_cfg = {key: told[key] for key in told.keys() - about_its_own}
        size, crop = config.views.size, config.eval.crop
        images = {"mean": config.model.mean, "std": config.model.std, "input_size": (3, size, size), "crop_pct": crop}
        _, options = TIMM_NETWORKS.get(config.model.encoder, (config.model.encoder, {}))
        save_for_hf(
            network,
            str(path),
            model_args=options,
            safe_serialization=True,
            data_config=images | {"interpolation": "bilinear"},
        )

    def read_back(self, model: ModelConfig, path: Path) -> "nn.Module":
        """Let timm read its folder."""
        import timm

        del model
        return timm.create_model(f"local-dir:{path}", pretrained=True)

    def usage(self, model: ModelConfig, out: Path) -> str:
        """Lines for timm."""
        del model
        lines = [
            "import timm",
            f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True)",
            "# mean and std of its pixels: timm.data.resolve_model_data_config(model)",
        ]
        return "\n".join(lines)
