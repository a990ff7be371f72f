"""Command `moco-fast preview`."""

from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moco_fast.commandline import config_from_file
from moco_fast.commands.common import positive
from moco_fast.presets import PRESETS
from pipelines.config import VIEWS, Backend, Color, ViewSpec

__all__ = ["Preview"]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw the views of some samples exactly as training sees them."""

    shards: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SHARDS")]
    """Folder that `make-shards pack` wrote."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Image to write (.png, .jpg or .webp)."""
    views: Annotated[str | None, tyro.conf.arg(metavar="RECIPE")] = None
    """Recipe of training (moco-v1, byol, demo, ...), or of views (multi-crop, dino, ...); unset: moco-v2."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """The views of a run instead: its config.json, or the file of options that `train --config` takes."""
    size: int | None = None
    """Height and width of a view in pixels (of a large one, with multi-crop); unset: the recipe's."""
    color: Color | None = None
    """How colors are augmented, as with --views.color in training; unset: the recipe's."""
    num: int = 12
    """Number of samples, evenly spread over the set."""
    seed: int | None = None
    """Seed of the run; unset: that of --config, or 0."""
    epoch: int = 0
    """Epoch of the run, from 0."""
    backend: Literal["auto", Backend] = "dali"
    """Backend that makes the views."""
    compare: Backend | None = None
    """Second backend: the image then also shows how its views differ from the first one's, amplified 16 times."""

    def execute(self) -> int:
        """Draw the views; return the exit code."""
        specs, seed = self._specs_and_seed()
        out = Path(self.out)
        if out.suffix not in (".png", ".jpg", ".jpeg", ".webp") or not out.parent.is_dir():
            raise ValueError(f"--out {out}: name a .png, .jpg or .webp file in a folder that exists")
        import numpy as np

        from pipelines.preview import differences, draw, sheet
        from shards.sets import open_set

        shards = open_set(self.shards)
        num_samples = shards.num_samples
        chosen = np.linspace(0, num_samples - 1, min(positive("num", self.num), num_samples)).round().astype(int)
        previews, others = (
            draw(shards, specs, seed=seed, epoch=self.epoch, indices=chosen.tolist(), backend=backend)
            if backend
            else []
            for backend in (self.backend, self.compare)
        )
        sheet(previews, others, columns=2 if others else 3).save(out)
        print(f"{out}: {len(chosen)} samples as a run with seed {seed} sees them in epoch {self.epoch}")
        if others:
            apart = np.concatenate([of_view.ravel() for of_view in differences(previews, others)])
            print(
                f"{self.backend} and {self.compare} differ by {apart.mean():.2f} of 255 levels on average, "
                f"by {apart.max()} at most (docs/data.md explains where)"
            )
        return 0

    def _specs_and_seed(self) -> tuple[tuple[ViewSpec, ...], int]:
        """Return the views to draw, and the seed."""
        if self.config is not None:
            if self.views is not None:
                raise ValueError(
                    f"--views {self.views} means nothing beside --config {self.config}, which has views: give one"
                )
            config = config_from_file(self.config)
            # Those that the run's method uses.
            specs_of, views, seed = config.method.views_of, config.views, config.run.seed
        else:
            recipes = VIEWS | {name: config.views for name, (_, config) in PRESETS.items()}
            name = self.views or "moco-v2"
            if name not in recipes:
                raise ValueError(f"--views {name} is not a recipe: choose one of {', '.join(recipes)}")
            specs_of, views, seed = attrgetter("specs"), recipes[name], 0
        if self.color is not None:
            views = replace(views, color=self.color)
        if self.size is not None:
            views = replace(views, size=positive("size", self.size))
        return specs_of(views), seed if self.seed is None else self.seed
