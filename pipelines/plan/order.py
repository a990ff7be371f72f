"""Order of the samples: a pure function of (shard sizes, seed, epoch, batch size, lanes). No I/O.

An epoch's order is made in four moves, each of which can be computed at any place without what comes before it:

1. The shards are permuted; their concatenation is read as a ring that starts at a random sample, so that the few
   samples which fill no batch are other ones in every epoch.
2. The ring is cut into lanes, equal ranges of samples that are read side by side. Lanes cut through shards.
3. A lane is cut into windows of a few shards, and the samples of a window are shuffled.
4. Place g of the epoch takes the next sample of lane g modulo the number of lanes; `batch_size` places make a step.

So a step takes an equal slice of every lane, every rank takes equally many steps, less than one batch is dropped per
epoch, and a seek costs as much as a step: one shuffled window per lane.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.plan.philox import stream_words
from shards.ground.arrays import Indices

__all__ = ["EpochOrder", "OrderPlan", "check_ranks", "choose_lanes"]


# Second word of the Philox key: what a stream of random words is for.
_START, _SHARDS, _WINDOW, _RANK = 1, 2, 3, 4


_LANES = 64


def choose_lanes(batch_size: int, num_nodes: int) -> int:
    """Return how many lanes let each of some nodes read whole ones, so that no shard is fetched by two.

    64 on one node, and on as many as divide 64 if 64 divides the batch: runs on all these have the same samples. Else
    the number nearest to 64, as a ratio, of those that are a multiple of the nodes and divide the batch.

    Args:
        batch_size: samples in a global step, a multiple of `num_nodes`.
        num_nodes: machines with equally many ranks.
    """
    if num_nodes == 1:
        return _LANES
    fitting = [num_nodes * factor for factor in _divisors(batch_size // num_nodes)]
    return min(fitting, key=lambda lanes: max(lanes / _LANES, _LANES / lanes), default=_LANES)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


@dataclass(frozen=True, kw_only=True)
class OrderPlan:
    """What all epochs of a run have in common.

    Raises ValueError when the set cannot fill one batch, or a number makes no sense.
    """

    shard_sizes: Indices
    """(num_shards,) samples per shard."""
    seed: int
    """0 to 2**64 - 1."""
    batch_size: int
    """Samples in a global step."""
    lanes: int
    """Upper limit for the lanes; `num_lanes` says how many there are."""
    window_shards: int
    """Samples are shuffled among about so many shards of a lane."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "lanes", "window_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}: it must lie in 0 .. 2**64 - 1")
        if self.num_samples < self.batch_size:
            raise ValueError(
                f"the set holds {self.num_samples} samples, less than one batch of {self.batch_size}: an epoch would "
                f"have no step; choose a batch size of at most {self.num_samples}, or pack more samples"
            )

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return int(self.shard_sizes.sum())

    @property
    def num_steps(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.num_samples // self.batch_size

    @property
    def window_samples(self) -> int:
        """Samples in `window_shards` shards of mean size."""
        return -(-self.num_samples * self.window_shards // len(self.shard_sizes))

    @property
    def num_lanes(self) -> int:
        """Lanes in use: as many as are allowed, but none shorter than a window.

        A set of no more than two windows is thus one lane, and one of no more than a window is shuffled perfectly.
        """
        return max(1, min(self.lanes, self.num_steps * self.batch_size // self.window_samples))

    @property
    def num_windows(self) -> int:
        """Windows that a lane is cut into."""
        return max(1, round(self._longest_lane / self.window_samples))

    @property
    def window(self) -> int:
        """Samples in a window: a lane is cut evenly."""
        return -(-self._longest_lane // self.num_windows)

    @property
    def _longest_lane(self) -> int:
        return -(-self.num_steps * self.batch_size // self.num_lanes)

    def rank_lanes(self, world_size: int) -> int:
        """Lanes that a rank takes samples of, at most: where the numbers do not divide, one at each end is shared."""
        return -(-self.num_lanes // world_size) + (self.num_lanes % world_size > 0)

    def shards_in_use(self, world_size: int) -> int:
        """Shards that a rank reads side by side, if all are of mean size: in each lane those of a window and a step."""
        lanes = self.rank_lanes(world_size)
        of_step = -(-self.batch_size // self.num_lanes)
        # A step begins and ends within windows.
        samples = of_step + self.window + min(of_step, self.window)
        return lanes * (-(-samples * len(self.shard_sizes) // self.num_samples) + 2)

    def order(self, epoch: int) -> "EpochOrder":
        """Return the order of an epoch."""
        return EpochOrder(self, epoch)


class EpochOrder:
    """The order of one epoch. Calls may come in any order; one after the other they are cheapest.

    Keeps one shuffled window a lane. Not for use by several threads at once.
    """

    def __init__(self, plan: OrderPlan, epoch: int) -> None:
        self.plan = plan
        self.epoch = epoch
        sizes = np.asarray(plan.shard_sizes, dtype=np.int64)
        self._shard_starts = np.cumsum(sizes) - sizes
        self._permuted = self._shuffle(len(sizes), _SHARDS, 0, 0)
        self._permuted_ends = np.cumsum(sizes[self._permuted])
        start_word = int(stream_words(1, counter=(epoch, 0, 0), key=(plan.seed, _START))[0])
        self._start = start_word * plan.num_samples >> 64

        num_lanes, used = plan.num_lanes, plan.num_steps * plan.batch_size
        # Places g = lane, lane + num_lanes, ... below `used`: the first lanes may be one sample longer.
        self._lane_sizes = (used - np.arange(num_lanes) + num_lanes - 1) // num_lanes
        self._lane_starts = np.cumsum(self._lane_sizes) - self._lane_sizes
        self._window = plan.window
        # Windows begin at different steps in different lanes, so that new shards are needed one by one.
        self._phases = (
            np.arange(num_lanes) * self._window // num_lanes if plan.num_windows > 1 else np.zeros(num_lanes, np.int64)
        )
        self._shuffled: dict[int, tuple[int, Indices]] = {}

    def step(self, step: int) -> Indices:
        """Dense sample numbers of a global step, lane after lane: (batch_size,) int64."""
        return self._samples(*self._places(step))

    def rank_step(self, step: int, rank: int, world_size: int) -> Indices:
        """Dense sample numbers of one rank's share of a step: (batch_size / world_size,) int64.

        Neighboring ranks take neighboring lanes, so a node holds whole lanes where the numbers divide. The share is
        permuted again in every step: shuffling BN relies on that.
        """
        check_ranks(self.plan.batch_size, world_size)
        share = self.plan.batch_size // world_size
        lane, offset = self._places(step)
        mine = slice(rank * share, (rank + 1) * share)
        samples = self._samples(lane[mine], offset[mine])
        return samples[self._shuffle(share, _RANK, step, rank)]

    def locate(self, samples: Indices) -> tuple[Indices, Indices]:
        """Turn dense sample numbers into (shard, number within the shard), both (n,) int64."""
        shard = np.searchsorted(self._shard_starts, samples, side="right") - 1
        return shard, samples - self._shard_starts[shard]

    def _places(self, step: int) -> tuple[Indices, Indices]:
        """Lane and offset in the lane of a step's samples, lane after lane."""
        if not 0 <= step < self.plan.num_steps:
            raise ValueError(f"step {step} is not in this epoch of {self.plan.num_steps} steps")
        place = step * self.plan.batch_size + np.arange(self.plan.batch_size)
        lane = place % self.plan.num_lanes
        by_lane = np.argsort(lane, kind="stable")
        return lane[by_lane], place[by_lane] // self.plan.num_lanes

    def _samples(self, lane: Indices, offset: Indices) -> Indices:
        ring = (self._start + self._lane_starts[lane] + self._shuffled_offsets(lane, offset)) % self.plan.num_samples
        slot = np.searchsorted(self._permuted_ends, ring, side="right")
        shard = self._permuted[slot]
        # Counted from the shard's end, since only the ends are kept.
        return self._shard_starts[shard] + self.plan.shard_sizes[shard] - (self._permuted_ends[slot] - ring)

    def _shuffled_offsets(self, lane: Indices, offset: Indices) -> Indices:
        """Send every offset in a lane to the one that takes its place within the same window. `lane` is sorted."""
        shifted = offset + self._phases[lane]
        window = shifted // self._window
        change = np.flatnonzero((np.diff(lane) != 0) | (np.diff(window) != 0)) + 1
        bounds = [0, *change.tolist(), len(lane)]
        result = np.empty_like(offset)
        for begin, end in pairwise(bounds):
            first, table = self._window_of(int(lane[begin]), int(window[begin]))
            result[begin:end] = table[offset[begin:end] - first] + first
        return result

    def _window_of(self, lane: int, window: int) -> tuple[int, Indices]:
        """First offset of a window, and its permutation."""
        begin = max(0, window * self._window - int(self._phases[lane]))
        kept = self._shuffled.get(lane)
        if kept is None or kept[0] != window:
            end = min(int(self._lane_sizes[lane]), (window + 1) * self._window - int(self._phases[lane]))
            kept = (window, self._shuffle(end - begin, _WINDOW, lane, window))
            self._shuffled[lane] = kept
        return begin, kept[1]

    def _shuffle(self, size: int, purpose: int, major: int, minor: int) -> Indices:
        """Permute 0 .. size - 1 by sorting raw random words: no library's way of shuffling has a part in it."""
        words = stream_words(size, counter=(self.epoch, major, minor), key=(self.plan.seed, purpose))
        return np.argsort(words, kind="stable")


def check_ranks(batch_size: int, world_size: int) -> None:
    """Raise ValueError, with numbers that would work, unless every rank gets an equal share of a batch."""
    if batch_size % world_size == 0:
        return
    below, above = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
    sizes = " or ".join(str(size) for size in (below, above) if size)
    worlds = ", ".join(str(n) for n in range(1, min(batch_size, 4 * world_size) + 1) if batch_size % n == 0)
    raise ValueError(
        f"a batch of {batch_size} cannot be split evenly over {world_size} ranks: "
        f"choose a batch size of {sizes}, or one of {worlds} ranks"
    )
