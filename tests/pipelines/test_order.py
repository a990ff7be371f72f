import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.plan.order import EpochOrder, OrderPlan, check_ranks, choose_lanes


def plan(sizes, batch_size, **options) -> OrderPlan:
    options = {"seed": 3, "lanes": 64, "window_shards": 4} | options
    return OrderPlan(shard_sizes=np.asarray(sizes, dtype=np.int64), batch_size=batch_size, **options)


def whole_epoch(plan: OrderPlan, epoch: int) -> np.ndarray:
    order = EpochOrder(plan, epoch)
    return np.stack([order.step(t) for t in range(plan.num_steps)])


@st.composite
def plans(draw) -> OrderPlan:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) > 0))
    batch_size = draw(st.integers(1, sum(sizes)))
    lanes, window = draw(st.integers(1, 80)), draw(st.integers(1, 6))
    return plan(sizes, batch_size, lanes=lanes, window_shards=window, seed=draw(st.integers(0, 2**64 - 1)))


@settings(deadline=None, max_examples=200)
@given(plans(), st.integers(0, 1000))
@example(plan([3], 2, lanes=64), 0)  # fewer samples than lanes
@example(plan([1, 0, 1, 1], 1, lanes=64, window_shards=1), 1)
@example(plan([5000, *[10] * 40], 64, window_shards=1), 2)  # one shard outweighs all others
def test_each_sample_at_most_once_and_less_than_a_batch_dropped(plan, epoch):
    samples = whole_epoch(plan, epoch).ravel()
    assert len(set(samples.tolist())) == len(samples)
    assert samples.min() >= 0
    assert samples.max() < plan.num_samples
    assert 0 <= plan.num_samples - len(samples) < plan.batch_size


@settings(deadline=None, max_examples=100)
@given(plans(), st.data())
def test_ranks_share_the_same_global_step_and_any_step_can_be_had_alone(plan, data):
    worlds = [n for n in range(1, plan.batch_size + 1) if plan.batch_size % n == 0]
    world_size = data.draw(st.sampled_from(worlds))
    step = data.draw(st.integers(0, plan.num_steps - 1))
    expected = whole_epoch(plan, 5)[step]
    orders = [EpochOrder(plan, 5) for _ in range(world_size)]
    shares = [order.rank_step(step, rank, world_size) for rank, order in enumerate(orders)]
    assert {len(share) for share in shares} == {plan.batch_size // world_size}
    assert sorted(np.concatenate(shares).tolist()) == sorted(expected.tolist())


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 200), st.integers(1, 4), st.integers(1, 24))
def test_each_node_reads_whole_lanes(num_nodes, ranks_per_node, share):
    batch_size = num_nodes * ranks_per_node * share
    lanes = choose_lanes(batch_size, num_nodes)
    chosen = plan([batch_size] * 500, batch_size, lanes=lanes, window_shards=1)
    order = EpochOrder(chosen, 0)
    for step in (0, 7):
        lane, _ = order._places(step)
        of_nodes = [set(each.tolist()) for each in np.split(lane, num_nodes)]
        assert sum(map(len, of_nodes)) == len(set(lane.tolist()))


def test_the_usual_lanes_stay_where_the_nodes_divide_them():
    assert {choose_lanes(4096, nodes) for nodes in (1, 2, 4, 8, 16, 32, 64)} == {64}
    assert choose_lanes(250, 1) == 64
    assert choose_lanes(8192, 128) == 128
    assert choose_lanes(4032, 6) == 72
    assert choose_lanes(48, 6) == 48
    assert choose_lanes(33 * 23, 33) == 33


@settings(deadline=None, max_examples=100)
@given(plans())
def test_locate_agrees_with_a_walk_through_the_shards(plan):
    walk = [(shard, local) for shard, size in enumerate(plan.shard_sizes) for local in range(size)]
    shard, local = EpochOrder(plan, 0).locate(np.arange(plan.num_samples))
    assert list(zip(shard.tolist(), local.tolist(), strict=True)) == walk


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    sizes = [100] * 20
    first = whole_epoch(plan(sizes, 64), 0)
    for other in (whole_epoch(plan(sizes, 64), 1), whole_epoch(plan(sizes, 64, seed=4), 0)):
        # A random order agrees with another in about one place in all.
        assert (first == other).sum() < 15


def test_a_ranks_share_is_permuted_in_every_step():
    lane_major = plan([1000], 64, lanes=1, window_shards=1)
    order = EpochOrder(lane_major, 0)
    places = []
    for step in range(lane_major.num_steps):
        share = order.rank_step(step, 1, 2)
        position = {int(sample): place for place, sample in enumerate(order.step(step)[32:])}
        places.append([position[int(sample)] for sample in share])
    assert all(sorted(row) == list(range(32)) for row in places)
    assert len({tuple(row) for row in places}) == len(places)


def test_the_dropped_samples_are_others_in_every_epoch():
    one_shard = plan([100], 64)
    dropped = [set(range(100)) - set(whole_epoch(one_shard, epoch).ravel().tolist()) for epoch in range(40)]
    assert set().union(*dropped) == set(range(100))


def test_a_small_set_is_shuffled_perfectly():
    small = plan([250] * 4, 100)
    assert small.num_lanes == 1
    counts = np.zeros((1000, 10), dtype=int)
    for epoch in range(400):
        for step, samples in enumerate(whole_epoch(small, epoch)):
            counts[samples, step] += 1
    # Every sample in every step 40 times of 400; the spread of a fair draw is sqrt(36) = 6.
    assert abs(counts.mean() - 40) < 1e-9
    assert 5.5 < counts.std() < 6.5
    # Several windows would have the same counts, for epochs begin anywhere; but a batch would miss whole shards.
    assert all(len(set(step // 250)) == 4 for epoch in range(20) for step in whole_epoch(small, epoch))


def test_batches_of_class_sorted_shards_hold_almost_as_many_classes_as_a_perfect_shuffle():
    num_classes, shards = 500, 500
    sorted_set = plan([256] * shards, 256, window_shards=2)
    classes = np.arange(sorted_set.num_samples) * num_classes // sorted_set.num_samples
    held = [len(set(classes[EpochOrder(sorted_set, epoch).step(100)].tolist())) for epoch in range(20)]
    perfect = num_classes * (1 - (1 - 1 / num_classes) ** 256)
    # Two shards a window and 64 lanes put 128 to 192 classes within reach of a step.
    assert sorted_set.num_lanes == 64
    assert np.mean(held) > 0.55 * perfect


def test_uneven_shards_mix_as_well_as_even_ones():
    # Class-sorted, shards of 16 to 2048 samples; a step should draw on every lane's windows all the same.
    sizes = np.random.default_rng(0).permutation(np.repeat([16, 64, 256, 2048], [400, 200, 100, 40]))
    uneven, even = (
        plan(sizes, 256, window_shards=2),
        plan([sizes.sum() // len(sizes)] * len(sizes), 256, window_shards=2),
    )

    def classes_in_a_step(plan: OrderPlan) -> float:
        classes = np.arange(plan.num_samples) * 500 // plan.num_samples
        return float(np.mean([len(set(classes[EpochOrder(plan, e).step(100)].tolist())) for e in range(20)]))

    assert classes_in_a_step(uneven) > 0.7 * classes_in_a_step(even)


@pytest.mark.parametrize(("lanes", "world_size", "batch_size"), [(64, 1, 256), (64, 8, 256), (8, 3, 96), (4, 1, 4096)])
def test_shards_in_use_are_as_many_as_steps_need(lanes, world_size, batch_size):
    per_shard = 50
    order = EpochOrder(plan([per_shard] * 2000, batch_size, lanes=lanes, window_shards=4), 1)
    stated = order.plan.shards_in_use(world_size)
    for rank in range(world_size):
        steps = [set((order.rank_step(step, rank, world_size) // per_shard).tolist()) for step in range(24)]
        kept = LeastRecent(stated)
        opened = [{shard for shard in sorted(shards) if kept.opens(shard)} for shards in steps]
        # What a step and the next one both read stays open in between.
        assert not any(before & now for before, now in zip(steps, opened[1:], strict=False))
    assert stated <= 3 * max(len(shards) for shards in steps)


class LeastRecent:
    """Shards that stay open."""

    def __init__(self, size):
        self._size = size
        self._kept = {}

    def opens(self, shard):
        is_new = shard not in self._kept
        self._kept[shard] = self._kept.pop(shard, None)
        if len(self._kept) > self._size:
            del self._kept[next(iter(self._kept))]
        return is_new


def test_several_sets_are_ordered_as_one_with_all_their_shards():
    # Windows are of the rank's lanes in one ring: a small set's samples come among the large one's.
    merged = plan([100] * 90 + [20] * 50, 100, window_shards=2)
    small = [np.flatnonzero(row >= 9000) for row in whole_epoch(merged, 3)]
    share = np.array([len(row) for row in small])
    assert share.sum() == 1000
    assert (share > 0).mean() > 0.9


def test_a_node_holds_whole_lanes_where_the_numbers_divide():
    big = plan([50] * 400, 64, lanes=16, window_shards=2)
    order = EpochOrder(big, 2)
    seen = [set(), set()]
    for step in range(big.num_steps):
        for rank in range(4):
            shards, _ = order.locate(order.rank_step(step, rank, 4))
            seen[rank // 2] |= set(shards.tolist())
    # Only shards cut by the border of two lanes are read by both.
    assert len(seen[0] & seen[1]) <= 2


def test_the_golden_order_has_not_moved():
    golden = plan([5, 0, 7, 4], 3, lanes=2, window_shards=1, seed=42)
    assert golden.num_lanes == 2
    assert whole_epoch(golden, 7).tolist() == GOLDEN


GOLDEN = [[9, 10, 0], [7, 15, 1], [8, 12, 2], [14, 3, 4], [11, 13, 5]]


def test_a_billion_samples_cost_no_more_than_their_windows():
    huge = plan([10_000] * 100_000, 4096)
    order = EpochOrder(huge, 3)
    share = order.rank_step(huge.num_steps // 2, 5, 64)
    assert len(set(share.tolist())) == 64
    assert len(order._shuffled) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 300}, "holds 200 samples, less than one batch of 300"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 4, "lanes": 0}, "lanes is 0"),
        ({"batch_size": 4, "seed": -1}, "seed is -1"),
        ({"batch_size": 4, "seed": 2**64}, "seed is 18446744073709551616"),
        ({"batch_size": 4, "window_shards": 0}, "window_shards is 0"),
    ],
)
def test_what_cannot_work_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        plan([100, 100], **options)


def test_the_error_lists_what_would_work():
    with pytest.raises(
        ValueError,
        match="250 cannot be split evenly over 8 ranks: choose a batch size of 248 or 256, or one of 1, 2, 5, 10, 25",
    ):
        check_ranks(250, 8)
    with pytest.raises(ValueError, match=r"choose a batch size of 4, or one of 1, 3 ranks"):
        check_ranks(3, 4)


def test_a_step_beyond_the_epoch_is_refused():
    with pytest.raises(ValueError, match="step 3 is not in this epoch of 3 steps"):
        EpochOrder(plan([100], 30), 0).step(3)
