"""Header of a trained network's file: all that the network is built of, beside its weights.

In safetensors' metadata, `moco_fast` is JSON with `task`, `preset`, `classes`, `keypoints` and `encoder`.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moco_fast.transfer.presets import DetectPreset

if TYPE_CHECKING:
    from moco_fast.transfer.training import Start

__all__ = ["HEADER", "described"]

HEADER = "moco_fast"


def described(
    preset: Any, class_names: tuple[str, ...], keypoint_names: tuple[str, ...], start: "Start"
) -> dict[str, str]:
    """Return what the header of a trained network's file holds."""
    encoder = start.encoder
    told = {
        "task": "detect" if isinstance(preset, DetectPreset) else "segment",
        "preset": asdict(preset),
        "classes": class_names,
        "keypoints": keypoint_names,
        "encoder": {
            "model": None if start.model is None else asdict(start.model),
            "image_size": encoder.image_size,
            "pixel_scale": encoder.pixel_scale.tolist(),
            "pixel_shift": encoder.pixel_shift.tolist(),
        },
    }
    # One entry: safetensors writes several in any order, and files of equal trainings are to be equal.
    return {HEADER: json.dumps(told)}
