from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moco_fast import distributed
from moco_fast.config import BatchNormConfig, ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods import shuffle
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.methods.shuffle import Exchange, Gather, Together, VirtualGroups, build_policy, exchange_group


def labeled_images(rank, batch):
    """uint8 images whose first pixel names their rank and row."""
    images = torch.zeros(batch, 3, 2, 2, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    images[:, 0, 0, 0] = rank
    images[:, 1, 0, 0] = torch.arange(batch, dtype=torch.uint8)
    return images


def names(images):
    return [tuple(image[:2, 0, 0].tolist()) for image in images]


def identify(policy, batch):
    """What a rank's key encoder sees, and what comes back when the keys are the images' names."""
    images = labeled_images(distributed.rank(), batch)
    seen = policy.shuffle(images)
    return names(seen), policy.unshuffle(seen[:, :2, 0, 0].float()).int().tolist()


def identify_exchange(batch, local_world_size=1):
    return identify(Exchange(exchange_group(local_world_size)), batch)


def identify_gather(batch):
    return identify(Gather(), batch)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("function", [identify_exchange, identify_gather])
def test_keys_come_back_to_the_rank_and_row_of_their_images(run_ranks, function, world_size):
    seen = []
    for rank, (names_seen, keys) in enumerate(run_ranks(function, 8, world_size=world_size)):
        assert keys == [[rank, row] for row in range(8)]
        seen += names_seen
    assert sorted(seen) == [(rank, row) for rank in range(world_size) for row in range(8)]


def test_exchange_gives_every_rank_an_equal_share_of_every_ranks_images(run_ranks):
    for names_seen, _ in run_ranks(identify_exchange, 8, world_size=4):
        assert Counter(rank for rank, _ in names_seen) == {0: 2, 1: 2, 2: 2, 3: 2}


def gather_with_permutation(permutation):
    return identify(
        Gather(lambda size, device: torch.tensor(permutation)), len(permutation) // distributed.world_size()
    )


def test_gather_follows_the_authors_code_for_a_given_permutation(run_ranks):
    permutation = np.random.default_rng(0).permutation(8).tolist()
    everything = [(rank, row) for rank in range(2) for row in range(4)]
    for rank, (seen, keys) in enumerate(run_ranks(gather_with_permutation, permutation)):
        assert seen == [everything[place] for place in permutation[4 * rank : 4 * rank + 4]]
        assert keys == [[rank, row] for row in range(4)]


def groups_by_node():
    assert exchange_group(4) is None, "one node of all ranks"
    assert exchange_group(2) is None, "nodes too small to be groups"
    with pytest.raises(ValueError, match="same number of ranks on every node"):
        exchange_group(3, smallest=2)
    return identify(Exchange(exchange_group(2, smallest=2)), 4)


def test_nodes_exchange_among_their_own_ranks(run_ranks):
    for rank, (seen, keys) in enumerate(run_ranks(groups_by_node, world_size=4)):
        first = rank // 2 * 2
        assert Counter(source for source, _ in seen) == {first: 2, first + 1: 2}
        assert keys == [[rank, row] for row in range(4)]


def keys_of_world(policy_name, images):
    """Keys of this rank's images under a policy, by an encoder that is the same on all ranks."""
    torch.manual_seed(3)
    encoder = build_encoder(ModelConfig(encoder="resnet18_quarter", stem="cifar"), MomentumContrast(dim=4))
    policy = Exchange(None) if policy_name == "exchange" else Together()
    own = images[distributed.rank()]
    with torch.no_grad():
        return policy.unshuffle(encoder(policy.shuffle(own)))


def test_a_ranks_keys_meet_batch_statistics_of_other_ranks_images(run_ranks):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator) for _ in range(2)]
    changed = [images[0], 255 - images[1]]
    exchanged, of_changed = (run_ranks(keys_of_world, "exchange", each)[0] for each in (images, changed))
    # Rank 0's images are the same, yet its keys change with rank 1's.
    assert (exchanged - of_changed).abs().max() > 1e-2
    together, of_changed = (run_ranks(keys_of_world, "none", each)[0] for each in (images, changed))
    assert torch.equal(together, of_changed)


def count_bytes(batch):
    sent = []
    original = dist.all_to_all_single

    def counting(output, tensor, **options):
        own_part = tensor.numel() // distributed.world_size()
        sent.append(tensor.element_size() * (tensor.numel() - own_part))
        return original(output, tensor, **options)

    dist.all_to_all_single = counting
    try:
        Exchange(None).shuffle(torch.zeros(batch, 3, 8, 8, dtype=torch.uint8))
    finally:
        dist.all_to_all_single = original
    return sent


@pytest.mark.parametrize("world_size", [2, 4])
def test_exchange_sends_all_but_its_own_share_of_a_uint8_batch_once(run_ranks, world_size):
    expected = 8 * 3 * 8 * 8 * (world_size - 1) // world_size
    assert run_ranks(count_bytes, 8, world_size=world_size) == [[expected]] * world_size


@given(num_groups=st.integers(1, 8), group_size=st.integers(1, 9))
def test_virtual_groups_deal_each_query_group_evenly_over_the_key_groups(num_groups, group_size):
    policy, batch = VirtualGroups(num_groups), num_groups * group_size
    rows = torch.arange(batch)
    dealt = policy.shuffle(rows)
    assert torch.equal(policy.unshuffle(dealt[:, None])[:, 0], rows)
    shares = np.zeros((num_groups, num_groups), dtype=int)
    for place, row in enumerate(dealt.tolist()):
        shares[row // group_size, place // group_size] += 1
    assert shares.max() - shares.min() <= 1


def test_shuffled_images_keep_their_memory_format():
    images = labeled_images(0, 8)
    assert VirtualGroups(2).shuffle(images).is_contiguous(memory_format=torch.channels_last)


def policies(batch_size, local_world_size):
    auto = type(build_policy(BatchNormConfig(), batch_size=batch_size, local_world_size=local_world_size))
    errors = []
    for policy, size in (("exchange", 10), ("exchange", 4), ("virtual", batch_size)):
        try:
            build_policy(BatchNormConfig(policy=policy), batch_size=size, local_world_size=local_world_size)
        except ValueError as error:
            errors.append(str(error))
    return auto.__name__, errors


def test_policy_on_several_ranks(run_ranks):
    for auto, (indivisible, too_small, virtual) in run_ranks(policies, 16, 4, world_size=4):
        assert auto == "Exchange"
        assert "global batch of 40 gives each rank 10" in indivisible
        assert "multiple of 16, such as 32 or 48" in indivisible
        assert "multiple of 16, such as 32 or 48" in too_small
        assert "use exchange" in virtual


def test_policy_on_one_rank():
    assert isinstance(build_policy(BatchNormConfig(), batch_size=64, local_world_size=1), VirtualGroups)
    assert isinstance(build_policy(BatchNormConfig(policy="none"), batch_size=3, local_world_size=1), Together)
    with pytest.raises(ValueError, match="use virtual"):
        build_policy(BatchNormConfig(policy="exchange"), batch_size=64, local_world_size=1)
    with pytest.raises(
        ValueError,
        match="8 virtual groups cannot share equally by two or more: use a multiple of 8, such as 96 or 104",
    ):
        build_policy(BatchNormConfig(policy="virtual", num_groups=8), batch_size=100, local_world_size=1)


def test_resolve_policy_without_a_process_group():
    assert shuffle.resolve_policy(BatchNormConfig()) == "virtual"
    assert shuffle.resolve_policy(BatchNormConfig(policy="none")) == "none"
