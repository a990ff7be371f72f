"""Order and drawn sizes of training images as pure functions of the seed. Imports no torch."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "crop_draws",
    "epoch_batches",
    "repeat_counts",
    "repeat_factors",
    "resized",
    "steps_per_epoch",
    "training_draws",
]

_ORDER, _DRAWS, _REPEATS = 0, 1, 2
_WHOLE = 1 << 32  # Factors are whole numbers of such parts: their sums are exact in whatever order they are added.


def repeat_factors(classes: Sequence[npt.NDArray[np.int64]], *, threshold: float) -> npt.NDArray[np.float64]:
    """Return how often each image is wanted in an epoch, on average: 1 or more (Gupta et al. 2019, LVIS, appendix).

    A class that is in a share f of the images wants sqrt(threshold / f) of each, or 1 if that is less; an image follows
    the class in it that wants most.

    Args:
        classes: of each image's objects, from 0.
        threshold: share of the images below which a class is rare enough.

    Returns:
        (N,)
    """
    present = [np.unique(each) for each in classes]
    shares = np.bincount(np.concatenate([np.empty(0, np.int64), *present])) / max(len(classes), 1)
    wanted = np.sqrt(threshold / np.maximum(shares, np.finfo(np.float64).tiny))
    return np.array([wanted[each].max(initial=1.0) for each in present])


def repeat_counts(
    lies: npt.NDArray[np.bool_], factors: npt.NDArray[np.float64], *, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Return how often each image is in an epoch: its factor rounded up or down, by chance, so that the mean is right.

    The roundings of all images that lie, and of all that stand, go together (systematic sampling over a shuffle): every
    epoch has as many of them as the sum of their factors, or one more. So all epochs have the same number of steps.
    """
    rng = np.random.default_rng([seed, _REPEATS, epoch])
    counts = np.empty(len(lies), dtype=np.int64)
    for side in (False, True):
        places = rng.permutation(np.flatnonzero(lies == side))
        ends = np.cumsum(_parts(factors[places])) + rng.integers(_WHOLE)
        counts[places] = np.diff(ends // _WHOLE, prepend=0)
    return counts


def _parts(factors: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.round(factors * _WHOLE).astype(np.int64)


def steps_per_epoch(
    lies: npt.NDArray[np.bool_], *, batch_size: int, group: int, factors: npt.NDArray[np.float64] | None = None
) -> int:
    """Return the batches of an epoch: whole groups of images that lie or stand, in whole batches."""
    parts = np.full(len(lies), _WHOLE) if factors is None else _parts(factors)
    num_groups = sum(int(parts[lies == side].sum()) // _WHOLE // group for side in (False, True))
    return num_groups // (batch_size // group)


def epoch_batches(
    lies: npt.NDArray[np.bool_],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    group: int,
    factors: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """Return the images of an epoch's batches, each image once at most, or as often as `repeat_counts` says.

    The images are shuffled. Walking through them, `group` that lie, or that stand, are put together as soon as there
    are so many; what is left over in the end waits for the next epoch's shuffle. Where a rank takes one group, its
    images have like shapes, which need little padding (aspect-ratio grouping).

    Args:
        lies: (N,) whether an image is wider than high.
        seed: of the run.
        epoch: from 0.
        batch_size: images of a step, over all ranks; a multiple of `group`.
        group: images that are put together.
        factors: (N,) how often each image is wanted; None: once.

    Returns:
        (steps, batch_size) numbers of images; image i is i + N where it is repeated, i + 2 * N the next time, and so
        on, so that draws by these numbers give each a size of its own.
    """
    assert batch_size % group == 0
    steps = steps_per_epoch(lies, batch_size=batch_size, group=group, factors=factors)
    entries = np.arange(len(lies))
    if factors is not None:
        counts = repeat_counts(lies, factors, seed=seed, epoch=epoch)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        entries = np.repeat(entries, counts) + (np.arange(counts.sum()) - before) * len(lies)
    lies = lies[entries % len(lies)]
    shuffled = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(entries))
    # The walk: a group is complete at the place of its last image, so groups follow each other in that order.
    groups: list[npt.NDArray[np.int64]] = []
    ends: list[npt.NDArray[np.int64]] = []
    for side in (False, True):
        places = np.flatnonzero(lies[shuffled] == side)
        places = places[: len(places) // group * group].reshape(-1, group)
        groups.append(shuffled[places])
        ends.append(places[:, -1])
    in_turn = np.argsort(np.concatenate(ends), kind="stable")
    found = np.concatenate(groups)[in_turn][: steps * (batch_size // group)]
    return entries[found.reshape(steps, batch_size)]


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
