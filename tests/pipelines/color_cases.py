"""Views and tables to try color operations on, and how far a batch's colors are from torchvision's."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from pipelines.config import VIEWS, ViewConfig
from pipelines.plan.augment import ViewTable, draw_view
from tests.pipelines import reference
from tests.pipelines.photos import NAMES, photo

__all__ = ["CASES", "differences", "images", "table_of"]

_V2 = replace(VIEWS["moco-v2"].query, jitter_p=1.0, grayscale_p=0.0)
_OFF = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
CASES = {
    "moco-v1": VIEWS["moco-v1"].query,
    "moco-v2": VIEWS["moco-v2"].query,
    "moco-v3": replace(VIEWS["moco-v3"].key, solarize_p=0.5),
    **{name: replace(_V2, **(_OFF | {name: 0.4})) for name in _OFF},
    "far beyond": replace(_V2, brightness=3.0, contrast=3.0, saturation=3.0, hue=0.5),
    "grayscale": replace(_V2, **_OFF, grayscale_p=0.5, jitter_p=0.0),
}
_NUM = 20


def images() -> np.ndarray:
    """(20, 32, 40, 3) uint8: photographs, noise, and a picture of all hues, grays and corners of the color cube."""
    rng = np.random.default_rng(0)
    pictures = [photo(name)[::8, ::8][:32, :40] for name in NAMES]
    pictures.append(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
    pictures.append(rng.choice(np.array([0, 1, 127, 128, 254, 255], dtype=np.uint8), (32, 40, 3)))
    return np.stack([pictures[number % len(pictures)] for number in range(_NUM)])


def table_of(config: ViewConfig, *, linear: bool = False) -> ViewTable:
    """Draw a view's parameters for `images()`."""
    index = np.arange(_NUM)
    mean_rgb = images().mean((1, 2)) if linear else None
    width, height = np.full(_NUM, 40), np.full(_NUM, 32)
    return draw_view(config, seed=1, epoch=0, view=0, index=index, width=width, height=height, mean_rgb=mean_rgb)


def differences(recolor: Callable[[np.ndarray, ViewTable], np.ndarray]) -> dict[str, tuple[float, float]]:
    """Mean difference from torchvision in levels, and the share of values that differ, of each case."""
    found = {}
    for name, config in CASES.items():
        table, batch = table_of(config), images()
        expected = np.stack([reference.colors(image, table, row) for row, image in enumerate(batch)])
        apart = np.abs(recolor(batch.copy(), table).astype(int) - expected)
        found[name] = (float(apart.mean()), float((apart > 0).mean()))
    return found


def by_kernels(batch: np.ndarray, table: ViewTable, *, device: torch.device) -> np.ndarray:
    """The batch, recolored by the GPU's kernels as one of two views."""
    from pipelines.backends.color_kernels import recolor_batch

    other = torch.zeros((_NUM, 5, 7, 3), dtype=torch.uint8, device=device)
    view = torch.from_numpy(batch).to(device)
    recolor_batch((other, view), (table_of(CASES["grayscale"]), table))
    assert not other.cpu().any()
    return view.cpu().numpy()


def run(device: torch.device) -> dict[str, tuple[float, float]]:
    """All cases on a device, and the linear map against its definition."""
    found = differences(partial(by_kernels, device=device))
    table, batch = table_of(CASES["moco-v3"], linear=True), images()
    assert table.matrix is not None
    matrix = table.matrix.astype(np.float64)[:, None]
    exact = batch @ matrix[..., :3].swapaxes(2, 3) + matrix[..., 3][:, :, None]
    rounded = np.rint(exact).clip(0, 255)
    solarized = np.where(table.solarize[:, None, None, None] & (rounded >= 128), 255 - rounded, rounded)
    apart = np.abs(by_kernels(batch.copy(), table, device=device) - solarized)
    found["linear"] = (float(apart.mean()), float((apart > 0).mean()))
    return found


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    json.dump(run(torch.device("cpu")), sys.stdout)
