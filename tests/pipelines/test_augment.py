import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.config import VIEWS, FixedCrop, ViewConfig, ViewSpec
from pipelines.plan.augment import KEY_VIEW, QUERY_VIEW, Stage, color_chain, color_matrix, draw_view, hue_map
from pipelines.plan.draw import draw_views
from shards.sets.record import RECORD

V2 = VIEWS["moco-v2"].query
FIELDS = ("box", "flip", "sigma", "factors", "jitter_order", "grayscale", "matrix", "solarize")


def draw(config: ViewConfig = V2, index=None, *, width=500, height=375, mean=(128.0, 128.0, 128.0), **options):
    index = np.arange(64) if index is None else np.asarray(index)
    size = len(index)
    return draw_view(
        config,
        **{"seed": 1, "epoch": 2, "view": QUERY_VIEW, **options},
        index=index,
        width=np.broadcast_to(np.asarray(width, dtype=np.int64), size),
        height=np.broadcast_to(np.asarray(height, dtype=np.int64), size),
        mean_rgb=np.broadcast_to(np.asarray(mean), (size, 3)),
    )


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(40)), st.integers(1, 40))
def test_a_samples_view_does_not_depend_on_its_neighbors(permutation, size):
    whole, part = draw(index=np.arange(40)), draw(index=permutation[:size])
    for field in FIELDS:
        assert np.array_equal(getattr(part, field), getattr(whole, field)[permutation[:size]]), field


def test_views_and_epochs_drawn_in_one_call_are_those_drawn_one_by_one():
    index = np.arange(30)
    epoch, view = np.repeat([0, 1, 2**40], 10), np.tile([QUERY_VIEW, KEY_VIEW], 15)
    together = draw(index=index, epoch=epoch, view=view)
    for row in range(30):
        alone = draw(index=index[row : row + 1], epoch=int(epoch[row]), view=int(view[row]))
        for field in FIELDS:
            assert np.array_equal(getattr(together.rows(slice(row, row + 1)), field), getattr(alone, field)), field


@pytest.mark.parametrize("recipe", VIEWS)
def test_all_views_of_several_steps_are_those_of_each_step(recipe):
    rng = np.random.default_rng(0)
    records = np.zeros(24, dtype=RECORD)
    records["width"], records["height"] = rng.integers(20, 600, (2, 24))
    records["mean_rgb"], records["flags"] = rng.integers(0, 256, (24, 3)), rng.integers(0, 2, 24)
    samples, epochs = rng.integers(0, 2**40, 24), np.repeat([3, 4, 4], 8)
    views = replace(VIEWS[recipe], color="linear")
    together = draw_views(epochs, samples, records, views=views.specs, seed=5)
    for begin in (0, 8, 16):
        step = slice(begin, begin + 8)
        for view, (spec, table) in enumerate(zip(views.specs, together, strict=True)):
            alone = draw_view(
                spec.recipe,
                seed=5,
                epoch=int(epochs[begin]),
                view=view,
                index=samples[step],
                width=records["width"][step].astype(np.int64),
                height=records["height"][step].astype(np.int64),
                mean_rgb=np.where(records["flags"][step, None] == 1, records["mean_rgb"][step], 128).astype(np.float64),
            )
            for field in FIELDS:
                assert np.array_equal(getattr(table.rows(step), field), getattr(alone, field)), field


def test_a_fixed_crop_changes_nothing_but_the_side():
    records = np.zeros(3, dtype=RECORD)
    records["width"], records["height"] = (40, 9, 9), (20, 9, 30)
    crop = FixedCrop(side=0.5, x=1.0, y=0.0, flip=True)
    [table] = draw_views(0, np.arange(3), records, views=[ViewSpec(size=8, recipe=crop)], seed=5)
    assert table.box.tolist() == [[30, 0, 10, 10], [5, 0, 4, 4], [5, 0, 4, 4]]
    assert table.flip.all()
    assert table.factors.tolist() == [[1.0, 1.0, 1.0, 0.0]] * 3
    assert table.matrix is None
    assert not np.any([table.grayscale, table.solarize, table.sigma])
    stages, _ = color_chain(table)
    assert (stages == Stage.NOTHING).all()


@pytest.mark.parametrize("other", [{"seed": 7}, {"epoch": 3}, {"view": KEY_VIEW}])
def test_seed_epoch_and_view_each_give_other_parameters(other):
    index = np.arange(500)
    one, two = draw(index=index), draw(index=index, **other)
    assert (one.box == two.box).all(axis=1).mean() < 0.02
    for field in ("flip", "grayscale"):
        a, b = getattr(one, field), getattr(two, field)
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
)
def test_boxes_are_never_empty_and_never_outside(width, height, scale, ratio):
    config = replace(V2, crop_scale=tuple(scale), crop_ratio=tuple(ratio))
    x, y, w, h = draw(config, np.arange(16), width=width, height=height).box.T
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + w <= width).all()
    assert (y + h <= height).all()


def torchvision_central(width, height, least, most):
    if width / height < least:
        w, h = width, round(width / least)
    elif width / height > most:
        w, h = round(height * most), height
    else:
        w, h = width, height
    return [(width - w) // 2, (height - h) // 2, w, h]


@pytest.mark.parametrize(("width", "height"), [(1000, 3), (3, 1000), (999, 100), (100, 1001)])
def test_where_no_try_fits_the_crop_is_torchvisions_central_one(width, height):
    whole = replace(V2, crop_scale=(1.0, 1.0))
    expected = torchvision_central(width, height, *whole.crop_ratio)
    assert draw(whole, np.arange(8), width=width, height=height).box.tolist() == [expected] * 8


@pytest.mark.parametrize("turned", [False, True])
def test_a_crop_may_be_as_wide_or_as_high_as_the_image(turned):
    squares = replace(V2, crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0))
    size = {"width": 20, "height": 10} if turned else {"width": 10, "height": 20}
    x, y, w, h = draw(squares, **size).box.T
    assert set(w) == set(h) == {10}
    # The largest central crop would be as large, and always in the middle.
    along, across = (x, y) if turned else (y, x)
    assert set(along) == set(range(11))
    assert set(across) == {0}


def test_a_row_is_that_of_the_other_table_and_the_table_stays_as_it_was():
    table, kept, other = draw(), draw(), draw(index=[1000])
    mixed = table.with_row(5, other)
    for name in FIELDS:
        assert np.array_equal(getattr(table, name), getattr(kept, name)), name
        assert np.array_equal(getattr(mixed, name)[5], getattr(other, name)[0]), name
        assert np.array_equal(np.delete(getattr(mixed, name), 5, 0), np.delete(getattr(table, name), 5, 0)), name
    assert mixed.grayscale_first == table.grayscale_first


def naive_hue_map(turns, mean) -> np.ndarray:
    """HSV's own shift, made linear by its slope at the mean color, mixed with a rotation about the gray axis.

    The rotation has more weight where the mean is gray, or near an edge of a sector before or after the shift.
    """

    def shift(rgb):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        return np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))

    mean = np.asarray(mean, dtype=np.float64)
    step = 1e-4
    slope = np.stack([(shift(mean + e) - shift(mean - e)) / (2 * step) for e in step * np.eye(3)], axis=1)
    axis = np.full(3, 1 / math.sqrt(3))
    angle = 2 * math.pi * turns
    rotation = np.stack(
        [
            e * math.cos(angle) + np.cross(axis, e) * math.sin(angle) + axis * (axis @ e) * (1 - math.cos(angle))
            for e in np.eye(3)
        ],
        axis=1,
    )
    sixths = [6 * colorsys.rgb_to_hsv(*mean)[0], 6 * (colorsys.rgb_to_hsv(*mean)[0] + turns)]
    from_edge = min(abs(each - round(each)) for each in sixths)
    weight = min(1.0, 4 * (mean.max() - mean.min()) / mean.max(), 20 * from_edge)
    return weight * slope + (1 - weight) * rotation


def naive_chain(factors, order, gray, mean, grayscale_first, pixel):
    """One pixel through the stages one by one, in plain floats; the mean color goes along as the pivot."""

    def luma(rgb):
        return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]

    def stages(rgb, pivot):
        brightness, contrast, saturation, turns = factors
        return {
            0: lambda: [brightness * v for v in rgb],
            1: lambda: [contrast * v + (1 - contrast) * pivot for v in rgb],
            2: lambda: [saturation * v + (1 - saturation) * luma(rgb) for v in rgb],
            3: lambda: list(naive_hue_map(turns, mean) @ np.asarray(rgb)),
        }

    if gray and grayscale_first:
        pixel, mean = [luma(pixel)] * 3, [luma(mean)] * 3
    for stage in order:
        pivot = luma(mean)
        pixel, mean = stages(pixel, pivot)[stage](), stages(mean, pivot)[stage]()
    return [luma(pixel)] * 3 if gray and not grayscale_first else list(pixel)


@pytest.mark.parametrize("grayscale_first", [False, True])
def test_the_matrix_is_the_chain_of_its_stages(grayscale_first):
    rng = np.random.default_rng(0)
    config = replace(V2, hue=0.4, grayscale_p=0.5, grayscale_first=grayscale_first)
    mean = rng.uniform(0, 255, 3)
    table = draw(config, np.arange(100), mean=mean)
    assert len({tuple(order) for order in table.jitter_order.tolist()}) > 15
    for row in range(100):
        pixel = rng.uniform(0, 255, 3)
        expected = naive_chain(
            table.factors[row], table.jitter_order[row].tolist(), table.grayscale[row], mean, grayscale_first, pixel
        )
        matrix = table.matrix[row].astype(np.float64)
        assert matrix[:, :3] @ pixel + matrix[:, 3] == pytest.approx(expected, abs=1e-3)


@settings(deadline=None)
@given(st.tuples(*[st.floats(1, 255)] * 3), st.floats(-0.5, 0.5))
def test_the_hue_of_a_saturated_mean_color_is_shifted_as_in_hsv(mean, turns):
    hue, saturation, value = colorsys.rgb_to_hsv(*mean)
    if saturation >= 0.25 and all(0.25 <= (6 * each) % 1 <= 0.75 for each in (hue, hue + turns)):
        shifted = hue_map(np.array([turns]), np.array([mean]))[0] @ np.array(mean)
        assert shifted == pytest.approx(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value), abs=1e-6)


# Ties, zeros and colors next to them are where a map that is made of pieces can break.
CHANNEL = st.one_of(
    st.sampled_from([0.0, 60.0, 85.0, 139.0, 190.0, 200.0, 255.0]),
    st.floats(0, 255),
    st.floats(-320, 0).map(lambda exponent: 10**exponent),
)
MEANS = st.one_of(st.tuples(CHANNEL, CHANNEL, CHANNEL), CHANNEL.map(lambda gray: (gray, gray, gray)))


def test_ties_of_the_mean_were_where_it_broke():
    for turns in (1e-9, -1e-9):
        assert hue_map(np.array([turns]), np.array([(139.0, 139.0, 85.0)]))[0] == pytest.approx(np.eye(3), abs=1e-6)
    before, after = hue_map(np.array([0.0199, 0.0201]), np.array([(200.0, 190.0, 60.0)] * 2))
    assert np.abs(after - before).max() < 0.1


@settings(deadline=None, max_examples=300)
@given(
    MEANS,
    st.tuples(st.just(1.0), st.just(1.0), st.just(1.0), st.just(0.0)),
    st.permutations(range(4)),
    st.booleans(),
)
def test_no_change_is_the_identity_bit_for_bit(mean, factors, order, grayscale_first):
    matrix = color_matrix(
        np.array([factors]), np.array([order]), np.array([False]), np.array([mean]), grayscale_first=grayscale_first
    )[0]
    assert np.array_equal(matrix, np.eye(3, 4))


@settings(deadline=None, max_examples=500)
@given(MEANS, st.floats(-0.5, 0.5), st.floats(-1e-3, 1e-3))
@example((0.0, 0.0, 1e-7), 0.0, 1e-7)
def test_a_small_shift_of_hue_is_a_small_change(mean, turns, step):
    before, after = hue_map(np.array([turns, turns + step]), np.array([mean, mean]))
    # A sector's map moves by up to 6 per turn, its weight by up to 120; the two maps differ by up to 2.
    assert np.abs(after - before).max() <= 300 * abs(step) + 1e-9


def test_the_hue_of_a_gray_image_is_rotated():
    third = hue_map(np.array([1 / 3]), np.full((1, 3), 100.0))[0]
    assert third @ np.array([1.0, 2.0, 3.0]) == pytest.approx([3.0, 1.0, 2.0])


def test_gray_stays_gray_under_hue_and_saturation():
    factors = np.array([[1.0, 1.0, 0.3, 0.4]])
    matrix = color_matrix(factors, np.array([[0, 1, 2, 3]]), np.array([False]), np.zeros((1, 3)), grayscale_first=False)
    assert matrix[0, :, :3] @ np.full(3, 99.0) == pytest.approx([99.0] * 3)


def test_shares_of_the_flags_are_their_probabilities():
    num = 20_000
    config = replace(V2, flip_p=0.3, jitter_p=0.7, grayscale_p=0.15, blur_p=0.6, solarize_p=0.25)
    table = draw(config, np.arange(num))
    jittered = (table.factors != (1, 1, 1, 0)).any(axis=1)
    for flags, p in (
        (table.flip, 0.3),
        (jittered, 0.7),
        (table.grayscale, 0.15),
        (table.sigma > 0, 0.6),
        (table.solarize, 0.25),
    ):
        assert abs(flags.mean() - p) < 4 * math.sqrt(p * (1 - p) / num)
    counts = np.unique(table.jitter_order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom: above 58 once in 10,000.
    assert ((counts - num / 24) ** 2 / (num / 24)).sum() < 58
    blurred = table.sigma[table.sigma > 0]
    assert 0.1 <= blurred.min() < 0.11
    assert 1.99 < blurred.max() <= 2.0


def test_the_golden_table_has_not_moved():
    index = np.array([0, 1, 2**40])
    table = draw(replace(V2, solarize_p=0.5), index, seed=2**63 + 5, epoch=4, view=KEY_VIEW, mean=(90.0, 120.0, 200.0))
    assert table.box.tolist() == GOLDEN["box"]
    assert table.flip.tolist() == GOLDEN["flip"]
    assert table.solarize.tolist() == GOLDEN["solarize"]
    assert table.grayscale.tolist() == GOLDEN["grayscale"]
    assert table.jitter_order.tolist() == GOLDEN["jitter_order"]
    assert table.sigma == pytest.approx(np.array(GOLDEN["sigma"]), abs=1e-6)
    assert table.factors == pytest.approx(np.array(GOLDEN["factors"]), abs=1e-9)


GOLDEN = {
    "box": [[138, 82, 352, 279], [39, 17, 239, 300], [28, 68, 221, 198]],
    "flip": [True, True, False],
    "solarize": [True, True, True],
    "grayscale": [True, False, True],
    "jitter_order": [[1, 3, 2, 0], [0, 2, 1, 3], [0, 3, 1, 2]],
    "sigma": [0.0, 1.8121654, 0.3878337],
    "factors": [
        [1.0060988547, 0.8057069827, 0.8846744634, -0.089345816],
        [0.7980313277, 1.3318600612, 0.6986924338, -0.0841705414],
        [0.8160698363, 1.0358441868, 0.9249488811, -0.0373354487],
    ],
}
