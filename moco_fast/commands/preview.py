"""Command `moco-fast preview`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moco_fast.commands.common import positive
from moco_fast.presets import PRESETS
from pipelines.config import VIEWS, Backend, Color

__all__ = ["Preview"]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw the views of some samples exactly as training sees them."""

    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Folder that `make-shards pack` wrote."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Image to write (.png, .jpg or .webp)."""
    views: Annotated[str, tyro.conf.arg(metavar="RECIPE")] = "moco-v2"
    """Recipe of training (moco-v1, byol, demo, ...), or of views (moco-v3-vit, multi-crop, ...)."""
    size: int | None = None
    """Height and width of a view in pixels; unset: the recipe's."""
    color: Color = "torchvision"
    """How colors are augmented, as with --views.color in training."""
    num: int = 12
    """Number of samples, evenly spread over the set."""
    seed: int = 0
    """Seed of the run."""
    epoch: int = 0
    """Epoch of the run, from 0."""
    backend: Literal["auto", Backend] = "dali"
    """Backend that makes the views."""
    compare: Backend | None = None
    """Second backend: the image then also shows how its views differ from the first one's, amplified 16 times."""

    def execute(self) -> int:
        """Draw the views; return the exit code."""
        recipes = VIEWS | {name: config.views for name, (_, config) in PRESETS.items()}
        if self.views not in recipes:
            raise ValueError(f"--views {self.views} is not a recipe: choose one of {', '.join(recipes)}")
        out = Path(self.out)
        if out.suffix not in (".png", ".jpg", ".jpeg", ".webp") or not out.parent.is_dir():
            raise ValueError(f"--out {out}: name a .png, .jpg or .webp file in a folder that exists")
        views = replace(recipes[self.views], color=self.color)
        if self.size is not None:
            views = replace(views, size=positive("size", self.size))
        import numpy as np

        from pipelines.preview import differences, draw, sheet
        from shards.sets import open_set

        shards = open_set(self.shards)
        num_samples = shards.num_samples
        chosen = np.linspace(0, num_samples - 1, min(positive("num", self.num), num_samples)).round().astype(int)
        previews, others = (
            draw(shards, views, seed=self.seed, epoch=self.epoch, indices=chosen.tolist(), backend=backend)
            if backend
            else []
            for backend in (self.backend, self.compare)
        )
        sheet(previews, others, columns=2 if others else 3).save(out)
        print(f"{out}: {len(chosen)} samples as a run with seed {self.seed} sees them in epoch {self.epoch}")
        if others:
            apart = np.concatenate([of_view.ravel() for of_view in differences(previews, others)])
            print(
                f"{self.backend} and {self.compare} differ by {apart.mean():.2f} of 255 levels on average, "
                f"by {apart.max()} at most (docs/data.md explains where)"
            )
        return 0
