"""Order and drawn sizes of training images as pure functions of the seed. Imports no torch."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["crop_draws", "epoch_batches", "resized", "steps_per_epoch", "training_draws"]

_ORDER, _DRAWS = 0, 1


def steps_per_epoch(lies: npt.NDArray[np.bool_], *, batch_size: int, group: int) -> int:
    """Return the batches of an epoch: whole groups of images that lie or stand, in whole batches."""
    num_groups = int(lies.sum()) // group + int((~lies).sum()) // group
    return num_groups // (batch_size // group)


def epoch_batches(
    lies: npt.NDArray[np.bool_], *, seed: int, epoch: int, batch_size: int, group: int
) -> npt.NDArray[np.int64]:
    """Return the images of an epoch's batches, each image once at most.

    The images are shuffled. Walking through them, `group` that lie, or that stand, are put together as soon as there
    are so many; what is left over in the end waits for the next epoch's shuffle. Where a rank takes one group, its
    images have like shapes, which need little padding (aspect-ratio grouping).

    Args:
        lies: (N,) whether an image is wider than high.
        seed: of the run.
        epoch: from 0.
        batch_size: images of a step, over all ranks; a multiple of `group`.
        group: images that are put together.

    Returns:
        (steps, batch_size) numbers of images.
    """
    assert batch_size % group == 0
    shuffled = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(lies))
    # The walk: a group is complete at the place of its last image, so groups follow each other in that order.
    groups: list[npt.NDArray[np.int64]] = []
    ends: list[npt.NDArray[np.int64]] = []
    for side in (False, True):
        places = np.flatnonzero(lies[shuffled] == side)
        places = places[: len(places) // group * group].reshape(-1, group)
        groups.append(shuffled[places])
        ends.append(places[:, -1])
    in_turn = np.argsort(np.concatenate(ends), kind="stable")
    found = np.concatenate(groups)[in_turn]
    steps = len(found) // (batch_size // group)
    return found[: steps * (batch_size // group)].reshape(steps, batch_size)


def training_draws(
    images: npt.NDArray[np.int64], sides: Sequence[int], *, seed: int, epoch: int
) -> list[tuple[int, bool]]:
    """Return for each image the shorter side that it is resized to, and whether it is mirrored."""
    return [
        (sides[int(rng.integers(len(sides)))], bool(rng.random() < 0.5))
        for rng in (np.random.default_rng([seed, _DRAWS, epoch, int(image)]) for image in images)
    ]


def crop_draws(
    images: npt.NDArray[np.int64], scales: tuple[float, float], *, seed: int, epoch: int
) -> list[tuple[float, tuple[float, float], bool]]:
    """Return for each image its scale, where it is cut as two shares, and whether it is mirrored."""
    generators = (np.random.default_rng([seed, _DRAWS, epoch, int(image)]) for image in images)
    return [
        (float(rng.uniform(*scales)), (float(rng.random()), float(rng.random())), bool(rng.random() < 0.5))
        for rng in generators
    ]


def resized(height: int, width: int, *, side: int, longest: int) -> tuple[int, int]:
    """Return height and width of an image whose shorter side becomes `side`, or less if the other exceeds `longest`.

    As ResizeShortestEdge of detectron2: the shorter side is exact, the other is rounded.
    """
    scale = side / min(height, width)
    scale *= min(1.0, longest / max(height * scale, width * scale))
    return int(height * scale + 0.5), int(width * scale + 0.5)
