import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.transfer.order import (
    epoch_batches,
    repeat_counts,
    repeat_factors,
    resized,
    steps_per_epoch,
    training_draws,
)

LIES = st.lists(st.booleans(), min_size=1, max_size=60).map(np.array)


@given(LIES, st.integers(0, 9), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_has_each_image_once_in_groups_that_lie_or_stand(lies, seed, epoch, group, num_groups) -> None:
    batch_size = group * num_groups
    batches = epoch_batches(lies, seed=seed, epoch=epoch, batch_size=batch_size, group=group)
    assert batches.shape == (steps_per_epoch(lies, batch_size=batch_size, group=group), batch_size)
    assert len(np.unique(batches)) == batches.size
    of_groups = lies[batches.reshape(-1, group)]
    assert (of_groups == of_groups[:, :1]).all()
    # What is left over is less than a batch and a group of each kind.
    assert len(lies) - batches.size < batch_size + 2 * group


def test_groups_are_those_of_a_walk_through_the_shuffled_images() -> None:
    lies = np.random.default_rng(0).random(50) < 0.7
    waiting, groups = {True: [], False: []}, []
    for image in np.random.default_rng([3, 0, 2]).permutation(50):
        side = bool(lies[image])
        waiting[side].append(int(image))
        if len(waiting[side]) == 2:
            groups.append(waiting[side])
            waiting[side] = []
    batches = epoch_batches(lies, seed=3, epoch=2, batch_size=4, group=2)
    assert batches.reshape(-1, 2).tolist() == groups[: len(groups) // 2 * 2]


def test_epochs_and_seeds_differ() -> None:
    lies = np.zeros(40, bool)
    orders = [epoch_batches(lies, seed=seed, epoch=epoch, batch_size=4, group=2) for seed in (0, 1) for epoch in (0, 1)]
    assert all((orders[i] != orders[j]).any() for i in range(4) for j in range(i))


def test_a_draw_depends_on_seed_epoch_and_image_alone() -> None:
    images, sides = np.arange(500), (480, 512, 800)
    draws = training_draws(images, sides, seed=1, epoch=2)
    assert training_draws(images[7:9], sides, seed=1, epoch=2) == draws[7:9]
    assert training_draws(images, sides, seed=1, epoch=3) != draws
    assert {side for side, _ in draws} == set(sides)
    assert 200 < sum(is_mirrored for _, is_mirrored in draws) < 300


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(32, 1000), st.integers(1000, 2000))
def test_the_shorter_side_is_exact_unless_the_longer_one_would_exceed(height, width, side, longest) -> None:
    found = resized(height, width, side=side, longest=longest)
    if max(height, width) / min(height, width) * side <= longest - 1:
        assert min(found) == side
    assert max(found) <= longest
    assert abs(found[0] * width - found[1] * height) <= max(height, width)


def test_an_image_of_voc_is_resized_as_by_detectron2() -> None:
    assert resized(375, 500, side=800, longest=1333) == (800, 1067)
    assert resized(500, 333, side=480, longest=1333) == (721, 480)
    assert resized(200, 500, side=800, longest=1333) == (533, 1333)


CLASSES = st.lists(st.lists(st.integers(0, 4), max_size=4).map(lambda each: np.array(each, np.int64)), min_size=1)


@given(CLASSES, st.floats(0.01, 1))
def test_an_image_is_wanted_as_often_as_its_rarest_class(classes, threshold) -> None:
    factors = repeat_factors(classes, threshold=threshold)
    for image, factor in zip(classes, factors, strict=True):
        wanted = 1.0
        for label in image:
            share = sum(label in other for other in classes) / len(classes)
            wanted = max(wanted, (threshold / share) ** 0.5)
        np.testing.assert_allclose(factor, wanted)


FACTORS = st.lists(st.tuples(st.booleans(), st.floats(1, 5)), min_size=1, max_size=60)


@given(FACTORS, st.integers(0, 9), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3))
def test_repeated_images_are_rounded_factors_in_groups_that_lie_or_stand(drawn, seed, epoch, group, num_groups) -> None:
    lies, factors = np.array([lies for lies, _ in drawn]), np.array([factor for _, factor in drawn])
    batch_size, steps_of = group * num_groups, {"batch_size": group * num_groups, "group": group, "factors": factors}
    counts = repeat_counts(lies, factors, seed=seed, epoch=epoch)
    assert ((counts == np.floor(factors)) | (counts == np.ceil(factors))).all()
    batches = epoch_batches(lies, seed=seed, epoch=epoch, **steps_of)
    # The same number of steps in every epoch: a step's place is a division, so a resume is a seek.
    assert batches.shape == (steps_per_epoch(lies, **steps_of), batch_size)
    copies, images = np.divmod(batches, len(lies))
    # Each copy once; those that are left over wait for the next epoch.
    assert len(np.unique(batches)) == batches.size
    assert (copies < counts[images]).all()
    of_groups = lies[images.reshape(-1, group)]
    assert (of_groups == of_groups[:, :1]).all()
    assert counts.sum() - batches.size < 2 * batch_size + 2 * group


def test_over_epochs_an_image_comes_as_often_as_its_factor_says() -> None:
    lies = np.arange(60) % 3 > 0
    factors = np.random.default_rng(0).uniform(1, 4, 60)
    counts = np.array([repeat_counts(lies, factors, seed=1, epoch=epoch) for epoch in range(400)])
    # Means of 400 draws of a share have a standard error of 0.025 at most.
    np.testing.assert_allclose(counts.mean(axis=0), factors, atol=0.1)
    for side in (False, True):
        totals = counts[:, lies == side].sum(axis=1)
        assert set(totals) <= {np.floor(factors[lies == side].sum()), np.ceil(factors[lies == side].sum())}


def test_factors_of_one_are_the_order_without_factors() -> None:
    lies = np.random.default_rng(0).random(50) < 0.7
    plain, ones = (
        epoch_batches(lies, seed=3, epoch=2, batch_size=4, group=2, factors=factors) for factors in (None, np.ones(50))
    )
    np.testing.assert_array_equal(plain, ones)


def test_copies_of_an_image_are_drawn_apart() -> None:
    copies = np.arange(40) * 7 + 3  # Of image 3 of 7.
    draws = training_draws(copies, (480, 512, 800), seed=1, epoch=2)
    assert len(set(draws)) == 6
