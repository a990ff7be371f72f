"""Draws of an evaluation: which samples keep their label, and which get a wrong one. Pure functions of a seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from moco_fast.embedding.images import Origins
from shards.sets import ShardSet

__all__ = ["all_labels", "asymmetric_targets", "draw_share", "flip_labels", "listed_labels", "masked"]

# Of DivideMix (dataloader_cifar.py of LiJunnan1992/DivideMix), after Patrini et al. 2017, section 5.
_CIFAR10_TARGETS = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
_CIFAR10 = {*_CIFAR10_TARGETS, "automobile", "airplane", "horse", "frog", "ship"}


def all_labels(shards: ShardSet) -> Tensor:
    """Return the label of every sample of a set, (N,) int64; -1 where there is none."""
    labels = [shards.index(shard)["label"].astype(np.int64) for shard in range(shards.num_shards)]
    return torch.from_numpy(np.concatenate(labels) if labels else np.empty(0, dtype=np.int64))


def masked(labels: Tensor, rows: Tensor) -> Tensor:
    """Return labels of which only those of the rows are left; the others are -1."""
    left = torch.full_like(labels, -1)
    left[rows] = labels[rows]
    return left


def draw_share(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """Draw the samples that keep their label: the same share of every class, one sample at least.

    Args:
        labels: (N,) int64; those with -1 are not drawn.
        share: above 0, at most 1.
        seed: of the draw.

    Returns:
        (N,) the labels, -1 for samples that were not drawn.
    """
    rng = np.random.default_rng(seed)
    numbers = labels.numpy()
    drawn: list[np.ndarray] = []
    for label in np.unique(numbers[numbers >= 0]):
        rows = np.flatnonzero(numbers == label)
        drawn.append(rng.permutation(rows)[: max(1, round(share * len(rows)))])
    rows = np.sort(np.concatenate(drawn)) if drawn else np.empty(0, dtype=np.int64)
    return masked(labels, torch.from_numpy(rows))


def listed_labels(shards: ShardSet, labels: Tensor, path: str) -> Tensor:
    """Keep the labels of samples that a file lists, such as SimCLR's lists of 1% and 10% of ImageNet.

    A line names one sample: by its key, a number, or by the file that it was packed from, with as many of its folders
    as it takes to tell it from others. What follows the name after a space, such as a label, is not looked at.

    Args:
        shards: the set.
        labels: (N,) int64, of all its samples.
        path: of the file.

    Returns:
        (N,) the labels, -1 for samples that are not listed.

    Raises:
        ValueError: there is no such file, or a line names no sample, several, or one without a label.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--labels-file {path} cannot be read: {error}") from None
    origins, everything = Origins(shards), range(shards.num_samples)
    keys = {str(key): [row] for row, key in enumerate(origins.keys(everything).tolist())}
    by_name: dict[str, list[int]] = {}
    sources = origins.sources(everything)
    for row, source in enumerate(sources):
        if source is not None:
            by_name.setdefault(PurePosixPath(source).name, []).append(row)
    rows = [_row_of(line, keys, by_name, sources, path) for line in lines]
    kept = torch.tensor(sorted(set(rows)), dtype=torch.int64)
    if not len(kept) or (labels[kept] < 0).any():
        raise ValueError(f"--labels-file {path} lists no sample, or some without a label")
    return masked(labels, kept)


def _row_of(
    line: str,
    keys: Mapping[str, list[int]],
    by_name: Mapping[str, list[int]],
    sources: Sequence[str | None],
    path: str,
) -> int:
    """Return the number of the sample that a line names."""
    for text in dict.fromkeys((line, line.rpartition(" ")[0].strip() or line)):
        found = keys.get(text.lstrip("0") or "0", []) if text.isdigit() else by_name.get(PurePosixPath(text).name, [])
        if len(found) > 1:
            found = [row for row in found if f"/{sources[row]}".endswith(f"/{text}")]
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"--labels-file {path}: {line!r} is not one sample of the training set: give its key, or the file that it was "
        "packed from, as in shard-*.sources.txt"
    )


def flip_labels(
    labels: Tensor, share: float, *, num_classes: int, seed: int, targets: Sequence[int] | None = None
) -> Tensor:
    """Give a share of the samples another label.

    Args:
        labels: (N,) int64; -1 stays.
        share: of the labeled samples whose label is drawn again, 0 to 1.
        num_classes: C.
        seed: of the draw.
        targets: (C,) what each class becomes (asymmetric noise). None: any class, its own too (symmetric noise, as in
            DivideMix), so that share * (1 - 1 / C) of the labels end up wrong.

    Returns:
        (N,) labels.
    """
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(labels.numpy() >= 0)
    chosen = torch.from_numpy(np.sort(rng.permutation(rows)[: int(share * len(rows))]))
    flipped = labels.clone()
    if targets is None:
        flipped[chosen] = torch.from_numpy(rng.integers(num_classes, size=len(chosen)))
    else:
        flipped[chosen] = torch.tensor(targets, dtype=torch.int64)[labels[chosen]]
    return flipped


def asymmetric_targets(class_names: Sequence[str], num_classes: int) -> list[int]:
    """Return what each class is mistaken for: CIFAR-10's published pairs, or else the next class."""
    if set(class_names) == _CIFAR10:
        return [class_names.index(_CIFAR10_TARGETS.get(name, name)) for name in class_names]
    return [(label + 1) % num_classes for label in range(num_classes)]
