import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import DataConfig, central_crop
from pipelines.loader import open_loader
from pipelines.plan.part import PartPlan
from pipelines.world import World


@st.composite
def plans(draw) -> PartPlan:
    samples = draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=80, unique=True))
    batch_size = draw(st.integers(1, len(samples)))
    return PartPlan(samples=np.array(samples), seed=draw(st.integers(0, 2**64 - 1)), batch_size=batch_size)


@given(plans(), st.integers(0, 1000))
def test_an_epoch_is_the_chosen_samples_each_at_most_once(plan, epoch):
    steps = [plan.order(epoch).rank_step(step, 0, 1).tolist() for step in range(plan.num_steps)]
    taken = [sample for step in steps for sample in step]
    assert len(set(taken)) == len(taken) == plan.num_steps * plan.batch_size
    assert set(taken) <= set(plan.samples.tolist())
    assert plan.num_samples - len(taken) < plan.batch_size


@given(plans(), st.integers(1, 4))
def test_ranks_share_the_step_of_one(plan, world_size):
    if plan.batch_size % world_size:
        return
    order = plan.order(3)
    shares = [order.rank_step(plan.num_steps - 1, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shares).tolist() == plan.order(3).rank_step(plan.num_steps - 1, 0, 1).tolist()


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed: int, epoch: int) -> list[int]:
        return PartPlan(samples=np.arange(50), seed=seed, batch_size=50).order(epoch).rank_step(0, 0, 1).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_the_golden_order_has_not_moved():
    plan = PartPlan(samples=np.arange(100, 110), seed=7, batch_size=5)
    steps = [plan.order(epoch).rank_step(step, 0, 1).tolist() for epoch in (0, 1) for step in (0, 1)]
    assert steps == [
        [104, 108, 107, 106, 102],
        [109, 101, 100, 103, 105],
        [101, 106, 104, 102, 107],
        [105, 103, 100, 109, 108],
    ]


def test_too_few_samples_for_a_batch_are_refused_with_what_would_work():
    with pytest.raises(ValueError, match=r"3 samples are chosen, less than one batch of 4: .* at most 3"):
        PartPlan(samples=np.arange(3), seed=0, batch_size=4)


CHOSEN = np.array([3, 99, 40, 7, 55, 8, 21])


def open_part(shards, *, world: World = World(), among=CHOSEN):
    data = DataConfig(shards=str(shards), batch_size=2, backend="dali", num_threads=1)
    return open_loader(data, central_crop(16), seed=5, among=among, world=world)


def test_a_loader_of_chosen_samples_makes_no_others_and_seeks(small_shards):
    with open_part(small_shards) as loader:
        assert (len(loader), loader.num_samples) == (3, 7)
        batches = [batch for _ in range(2) for batch in loader]
    expected = PartPlan(samples=CHOSEN, seed=5, batch_size=2)
    assert [batch.index.tolist() for batch in batches] == [
        expected.order(epoch).rank_step(step, 0, 1).tolist() for epoch in range(2) for step in range(3)
    ]
    with open_part(small_shards) as loader:
        loader.load_state_dict({"epoch": 1, "step": 1})
        again = list(loader)
    assert [batch.index.tolist() for batch in again] == [batch.index.tolist() for batch in batches[4:]]
    assert torch.equal(again[0].views[0], batches[4].views[0])
    assert torch.equal(again[0].label, again[0].index)


def test_ranks_of_a_loader_share_its_batches(small_shards):
    [whole] = [next(iter(loader)) for loader in [open_part(small_shards)]]
    shares = [next(iter(open_part(small_shards, world=World(rank=rank, world_size=2)))) for rank in range(2)]
    assert torch.equal(torch.cat([share.index for share in shares]), whole.index)


def test_samples_that_are_not_there_are_refused(small_shards):
    with pytest.raises(ValueError, match="beyond the 100 samples"):
        open_part(small_shards, among=np.array([3, 100]))
