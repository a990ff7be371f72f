"""Shard sets as the loaders open them: remote ones with a cache, none with samples unfit for training."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.config import DataConfig, ViewConfig, ViewSpec
from pipelines.plan.order import OrderPlan
from pipelines.reading.cache import CacheFolder
from pipelines.reading.decoded import DecodedCache
from pipelines.reading.fetch import STEPS_KEPT, cached
from pipelines.world import World
from shards.ground.arrays import Indices
from shards.ground.units import gib
from shards.sets import ShardSet
from shards.sets.record import REFUSED, Flag, flag_name

__all__ = [
    "cache_for_evaluation",
    "cache_for_part",
    "cache_for_training",
    "keep_decoded",
    "refuse_unreadable",
    "refuse_without_means",
]


# The rest is for evaluation, which comes between a run's steps.
_FOR_TRAINING = 0.75
_OF_FREE_DISK = 0.8
# A request for one sample takes about as long as it takes to fetch so many bytes of a whole shard.
_BYTES_A_REQUEST = 4 << 20


def refuse_unreadable(shards: ShardSet) -> None:
    """Raise ValueError if some samples of a set cannot be read as they are.

    What `make-shards index` found out is in the manifest, so this costs no look at the samples.
    """
    found = {flag_name(flag): shards.manifest.outcomes.get(flag_name(flag), 0) for flag in REFUSED}
    if any(found.values()):
        counts = ", ".join(f"{count:,} {name}" for name, count in found.items() if count)
        raise ValueError(
            f"{shards.where} has samples that cannot be trained on as they are ({counts}): `make-shards pack "
            f"{shards.where} --out DIR` repairs what can be repaired; or put others in their "
            "place with --data.on-bad-sample skip"
        )


def refuse_without_means(shards: ShardSet, views: Sequence[ViewSpec]) -> None:
    """Raise ValueError if views are to be made with mean colors that a set does not have.

    All samples of a set have them or none, so the first shard of each merged set tells.
    """
    if not any(view.color == "linear" and isinstance(view.recipe, ViewConfig) for view in views):
        return
    seen: set[int] = set()
    for shard in range(shards.num_shards):
        part, _ = shards.part(shard)
        if id(part) in seen or not shards.shard_sizes[shard]:
            continue
        seen.add(id(part))
        if not (shards.index(shard)["flags"] & Flag.HAS_MEAN_RGB).all():
            raise ValueError(
                f"{part.where} has no mean colors, which linear colors are made of: use --views.color torchvision (the "
                f"default), or `make-shards pack {part.where} --out DIR --mean-rgb`"
            )


def cache_for_training(shards: ShardSet, data: DataConfig, plan: OrderPlan, *, world: World) -> ShardSet:
    """Give remote shards a cache, which the ranks of this machine share. A local set stays as it is.

    Raises:
        ValueError: the cache is smaller than what the ranks need at once.
    """
    opened = cached(shards, _cache(data))
    sizes = opened.copied_bytes
    if not sizes.any():
        return shards
    budget = _budget(data)
    usable = int(_FOR_TRAINING * budget)
    local_world_size = world.local_world_size
    share = usable // local_world_size
    if sizes.sum() <= usable:
        share = int(sizes.sum())
    else:
        lanes = plan.rank_lanes(world.world_size)
        a_step = plan.batch_size / plan.num_lanes / (plan.num_samples / len(plan.shard_sizes))
        num_shards, largest = plan.window_shards + 2 + int((STEPS_KEPT + 1) * a_step), int(sizes.max())
        needed = lanes * num_shards * largest
        if needed > share:
            raise ValueError(
                f"the cache in {_folder(data)} may hold {gib(budget)}, less than what training needs at once: "
                f"{local_world_size} ranks here x {lanes} lanes x {num_shards} shards of a window x {gib(largest)} = "
                f"{gib(local_world_size * needed)}, in {_FOR_TRAINING:.0%} of the cache; raise --data.cache-gib to "
                f"{local_world_size * needed / _FOR_TRAINING / (1 << 30):.3g}, or lower --data.lanes, or pack smaller "
                "shards"
            )
    return cached(shards, _cache(data, budget=budget, share=share))


def cache_for_part(shards: ShardSet, data: DataConfig, samples: Indices, *, world: World) -> ShardSet:
    """Give remote shards a cache for epochs over chosen samples, if all the shards that have some of them fit.

    Otherwise samples are fetched one by one: in an order without lanes, every step would need nearly all shards.
    """
    opened = cached(shards, _cache(data))
    sizes = opened.copied_bytes
    if not sizes.any():
        return shards
    budget, needed = _budget(data), int(sizes[_touched(shards, samples)].sum())
    if needed > int(_FOR_TRAINING * budget) // world.local_world_size:
        return shards
    return cached(shards, _cache(data, budget=budget, share=needed))


def keep_decoded(shards: ShardSet, data: DataConfig) -> DecodedCache | None:
    """Make room for decoded pixels where some are to be kept. Raises ValueError as DecodedCache.of."""
    if data.cache_decoded is None:
        return None
    folder = _cache_home() / "decoded" if data.cache_decoded_in is None else Path(data.cache_decoded_in).absolute()
    return DecodedCache.of(shards, folder, budget_bytes=int(data.cache_decoded * (1 << 30)))


def _touched(shards: ShardSet, samples: Indices) -> Indices:
    """Return the numbers of the shards that have some of the samples."""
    return np.unique(np.searchsorted(shards.shard_sizes.cumsum(), samples, side="right"))


def cache_for_evaluation(shards: ShardSet, data: DataConfig, samples: Indices, *, world: World) -> ShardSet:
    """Give remote shards a cache, if whole shards are fetched faster than the samples alone.

    Raises:
        ValueError: the cache is smaller than a few shards.
    """
    opened = cached(shards, _cache(data))
    sizes = opened.copied_bytes
    touched = _touched(shards, samples)
    if not sizes.any() or sizes[touched].sum() > len(samples) * _BYTES_A_REQUEST:
        return shards
    budget = _budget(data)
    share = int((1 - _FOR_TRAINING) * budget) // world.local_world_size
    if share < 2 * sizes.max():
        raise ValueError(
            f"the cache in {_folder(data)} may hold {gib(budget)}, too little for evaluation: "
            f"{world.local_world_size} ranks here x 2 shards x {gib(int(sizes.max()))} in {1 - _FOR_TRAINING:.0%} of "
            "it; raise --data.cache-gib"
        )
    return cached(shards, _cache(data, budget=budget, share=share))


def _cache(data: DataConfig, *, budget: int = 0, share: int = 0) -> CacheFolder:
    fetchers = {} if data.fetchers is None else {"fetchers": (data.fetchers, data.fetchers)}
    return CacheFolder(path=_folder(data), budget_bytes=budget, share_bytes=share, **fetchers)


def _folder(data: DataConfig) -> Path:
    if data.cache is not None:
        return Path(data.cache).absolute()
    return _cache_home() / "shards"


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "moco-fast"


def _budget(data: DataConfig) -> int:
    """Bytes: as asked for, else four fifths of what the disk has left, counting what is cached as left."""
    folder = _folder(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the folder {folder} for shards ({error.strerror}): name another one with --data.cache"
        ) from None
    if data.cache_gib is not None:
        return int(data.cache_gib * (1 << 30))
    in_use = sum(path.stat().st_size for path in folder.glob("*/*.tar"))
    return int(_OF_FREE_DISK * (shutil.disk_usage(folder).free + in_use))
