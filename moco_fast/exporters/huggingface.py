"""Exporter to Hugging Face: timm's folder, ready to upload, with a model card and, if requested, the head."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moco_fast.config import ModelConfig, method_to_dict
from moco_fast.exporters.timm import TimmExporter, check_folder

if TYPE_CHECKING:
    from moco_fast.encoders.open import OpenedEncoder
    from moco_fast.exporters.base import Outputs
    from moco_fast.report.record import RunRecord

__all__ = ["HuggingFace"]

_FILES = ("README.md", "config.json", "head.safetensors", "model.safetensors")


class HuggingFace:
    """Files of a repository: timm loads the backbone from them, `moco_fast.load_encoder` also the head."""

    place: ClassVar[str] = "encoder"
    has_head: ClassVar[bool] = True

    def why_not(self, model: ModelConfig | None) -> str | None:
        """Refuse what timm's folder cannot hold."""
        reason = TimmExporter().why_not(model)
        return None if reason is None else f"a folder for Hugging Face is timm's, and {reason}"

    def check(self, out: Path) -> None:
        """Accept a new folder, or one that holds only an earlier export."""
        check_folder(out, "Hugging Face", _FILES)

    def write(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> None:
        """Write timm's files, the model card, and the head with the method that it belongs to."""
        TimmExporter().write(opened, path, head=False)
        (path / "README.md").write_text(_card(opened, head=head))
        if not head:
            return
        from safetensors.torch import save_file

        assert opened.method is not None
        weights = {
            name: tensor.contiguous()
            for name, tensor in opened.encoder.state_dict().items()
            if not name.startswith("backbone.")
        }
        save_file(weights, path / "head.safetensors", metadata={"format": "pt"})
        config = path / "config.json"
        of_head = {"method": method_to_dict(opened.method), "predictor": opened.encoder.predictor is not None}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"moco_fast": of_head}, indent=2))

    def read_back(self, opened: "OpenedEncoder", path: Path, *, head: bool) -> "Outputs":
        """Load the backbone with timm, and the head with `open_encoder`."""
        backbone = TimmExporter().read_back(opened, path, head=False)
        if not head:
            return backbone
        from moco_fast.encoders.open import open_encoder

        encoder = open_encoder(str(path)).encoder
        return lambda pixels: (*backbone(pixels), encoder.features(pixels, "head"))

    def usage(self, opened: "OpenedEncoder", out: Path) -> str:
        """Return lines for timm."""
        return TimmExporter().usage(opened, out)


def _card(opened: "OpenedEncoder", *, head: bool) -> str:
    """Return the model card: architecture, training data and method, measured results, and how to load it."""
    model, encoder = opened.model, opened.encoder
    assert model is not None
    size = encoder.image_size
    head_files = ["`head.safetensors` holds the projection head: `moco_fast.load_encoder(FOLDER)` loads it, too."]
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        f"tags: [image-feature-extraction, timm, moco-fast{', self-supervised' if opened.method else ''}]",
        "---",
        # Weights without our head may come from anywhere, including training with labels.
        f"# {model.encoder}" + (", pretrained without labels" if opened.method else ""),
        "",
        f"An image encoder: {encoder.feature_dim} features of an image of {size} x {size} pixels.",
        f"Normalize with mean {model.mean} and standard deviation {model.std}.",
        f"Take the central square, {encoder.crop:g} times the shorter side.",
        "",
        *(_of_run(opened) if opened.config is not None else _of_file(opened)),
        "",
        "## Use",
        "",
        "    import timm",
        '    model = timm.create_model("local-dir:FOLDER", pretrained=True)  # uploaded: hf-hub:OWNER/NAME',
        "    timm.data.resolve_model_data_config(model)",
        "",
        *(head_files if head else []),
        f"Digest of weights, architecture and normalization: `{opened.digest}`.",
        "",
    ]
    return "\n".join(lines)


def _of_file(opened: "OpenedEncoder") -> list[str]:
    # Only the last part of the path: the rest belongs to one machine.
    name = Path(opened.where.rpartition("@")[2]).name
    return [f"From `{name}`, which does not record its training data or results."]


def _of_run(opened: "OpenedEncoder") -> list[str]:
    """Describe the training from the run's folder, or from the configuration of a single checkpoint."""
    from moco_fast.report.record import read_run

    config, where = opened.config, Path(opened.where)
    assert config is not None
    # Only the last part of the data's path: the rest belongs to this machine.
    data = ", ".join(Path(shards).name for shards in config.data.shards.split(","))
    run = where if (where / "config.json").is_file() else where.parent.parent
    step = opened.step
    assert step is not None
    if not (run / "config.json").is_file():
        return ["## Training", "", f"- data: {data}", f"- method: {config.method.name}, step {step:,}"]
    record = read_run(run)
    samples = record.environment.get("num_samples")
    at_step = [line for line in (*record.training, *record.evaluations) if line["step"] == step]
    epochs = [f", {at_step[0]['epoch']:.4g} epochs" for _ in at_step[:1]]
    changed = [f"  - `{change}`" for change in record.changes(record.recipe)]
    return [
        "## Training",
        "",
        f"- data: {data}" + (f", {samples:,} images" if samples else ""),
        f"- recipe: `{record.recipe}` ({config.method.name})" + (", with" if changed else ""),
        *changed,
        f"- length: {step:,} steps of {config.data.batch_size:,} images{''.join(epochs)}",
        "",
        "## Figures",
        "",
        *(_figures(record, step) or [f"Nothing was measured at step {step:,}."]),
    ]


def _figures(record: "RunRecord", step: int) -> list[str]:
    lines = [line for line in record.evaluations if line["step"] == step]
    return [f"- {name}: {value:,.4g}" for line in lines for name, value in line.items() if "/" in name]
