"""Every backend against the float64 reference, stage by stage, and the parameters against torchvision's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F

from pipelines.backends.pixels import decode, render
from pipelines.config import VIEWS, ViewConfig, ViewsConfig
from pipelines.loader import make_views
from pipelines.plan.augment import QUERY_VIEW, draw_view
from pipelines.plan.draw import draw_views
from shards.sets import open_set
from tests.pipelines import reference
from tests.pipelines.photos import NAMES, photo
from tests.pipelines.shard_files import jpeg, write_shards

NONE = ViewConfig(jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
COLOR = replace(NONE, jitter_p=1.0, grayscale_p=0.2)
ALL = replace(VIEWS["moco-v2"].query, solarize_p=0.2)
# View, mean difference and largest difference in levels of 0..255. Rounding once costs 0.25 and 0.5.
STAGES = {
    "resize": (NONE, 0.28, 1.01),
    "enlarge": (replace(NONE, crop_scale=(0.01, 0.03)), 0.3, 1.01),
    "flip": (replace(NONE, flip_p=1.0), 0.28, 1.01),
    "blur": (replace(NONE, blur_p=1.0), 0.28, 1.01),
    "color": (COLOR, 0.9, 80),
    "linear color": (COLOR, 0.36, 3.0),
    "solarize": (replace(NONE, solarize_p=1.0), 0.28, 1.01),
    "all": (ALL, 0.9, 80),
    "all, linear": (ALL, 0.36, 3.0),
}
SIZE = 64


@pytest.fixture(scope="module")
def photo_shards(tmp_path_factory):
    images = [jpeg(photo(name)) for name in NAMES]
    return open_set(write_shards(tmp_path_factory.mktemp("photos"), images))


@pytest.fixture(scope="module")
def encoded():
    return [np.frombuffer(jpeg(photo(name)), dtype=np.uint8) for name in NAMES]


def made_by(backend, shards, encoded, views, epoch):
    samples = np.arange(len(NAMES))
    if backend == "dali":
        made = make_views(shards, samples, views, seed=1, epoch=epoch, backend="dali")[0]
        return made.permute(0, 2, 3, 1).numpy()
    table = draw_views(epoch, samples, shards.index(0), views=views.specs, seed=1)[0]
    out = np.empty((len(samples), views.size, views.size, 3), dtype=np.uint8)
    for row, image in enumerate(encoded):
        render(decode(image), table, row, out[row])
    return out


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_stage_is_what_the_reference_says(backend, stage, photo_shards, encoded):
    view, largest_mean, largest = STAGES[stage]
    views = ViewsConfig(size=SIZE, query=view, key=NONE, color="linear" if "linear" in stage else "torchvision")
    differences = []
    for epoch in range(3):
        made = made_by(backend, photo_shards, encoded, views, epoch)
        table = draw_views(epoch, np.arange(len(NAMES)), photo_shards.index(0), views=views.specs, seed=1)[0]
        for row, image in enumerate(encoded):
            # The two differ in what they read beyond the crop's border: nothing (torch), or the image (DALI).
            expected = reference.view(image, table, row, SIZE, inside=backend == "torch")
            differences.append(np.abs(made[row] - expected))
    assert np.mean(differences) < largest_mean
    assert np.max(differences) < largest


def test_beyond_the_border_backends_read_differently_and_only_there(photo_shards, encoded):
    views = ViewsConfig(size=SIZE, query=NONE, key=NONE)
    dali, workers = (made_by(name, photo_shards, encoded, views, 0).astype(int) for name in ("dali", "torch"))
    difference = np.abs(dali - workers)
    assert difference[:, 2:-2, 2:-2].max() <= 1
    assert difference.max() > 1


@pytest.mark.parametrize("image", [photo("coffee"), photo("coffee")[:, :, 0]])
def test_decoders_agree_with_pil(image):
    encoded = np.frombuffer(jpeg(image), dtype=np.uint8)
    assert np.abs(decode(encoded).astype(float) - reference.decode(encoded)).max() <= 1


def distance(one, two) -> float:
    """Two-sample Kolmogorov-Smirnov statistic times sqrt(n / 2): above 1.95 once in 1,000 for equal distributions."""
    one, two = np.sort(one), np.sort(two)
    at = np.concatenate((one, two))
    gap = np.abs(np.searchsorted(one, at, "right") / len(one) - np.searchsorted(two, at, "right") / len(two)).max()
    return gap * np.sqrt(len(one) / 2)


NUM_DRAWS = 3000


def draws(config: ViewConfig, width: int, height: int):
    size = np.full(NUM_DRAWS, 1)
    return draw_view(
        config,
        seed=11,
        epoch=0,
        view=QUERY_VIEW,
        index=np.arange(NUM_DRAWS),
        width=size * width,
        height=size * height,
        mean_rgb=np.full((NUM_DRAWS, 3), 128.0),
    )


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (32, 32), (800, 200), (60, 300)])
def test_crops_are_distributed_as_torchvisions(width, height, scale):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(NUM_DRAWS)]
    y, x, h, w = np.array(theirs).T
    ours = draws(replace(NONE, crop_scale=scale), width, height).box.T
    for one, two in zip(ours, (x, y, w, h), strict=True):
        assert distance(one, two) < 1.95
    assert distance(ours[2] / ours[3], w / h) < 1.95


@pytest.mark.parametrize("recipe", VIEWS)
def test_color_factors_are_distributed_as_torchvisions(recipe):
    config = replace(VIEWS[recipe].query, jitter_p=1.0)
    torch.manual_seed(0)
    jitter = T.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    theirs = [
        T.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(NUM_DRAWS)
    ]
    ours = draws(config, 100, 100)
    for place in range(4):
        assert distance(ours.factors[:, place], np.array([row[1 + place] for row in theirs])) < 1.95
    stage_at = np.array([row[0].tolist() for row in theirs])
    for place in range(4):
        assert distance(ours.jitter_order[:, place], stage_at[:, place]) < 1.95


def jittered_by_torchvision(image, factors, order, *, grayscale) -> np.ndarray:
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for stage in order:
        tensor = adjust[stage](tensor, float(factors[stage]))
    if grayscale:
        tensor = F.rgb_to_grayscale(tensor, num_output_channels=3)
    return tensor.permute(1, 2, 0).numpy().astype(float)


@pytest.mark.parametrize(("hue", "largest_mean"), [(0.1, 2.8), (0.0, 2.0)])
def test_the_color_map_is_near_torchvisions_color_jitter(hue, largest_mean):
    config = replace(NONE, jitter_p=1.0, grayscale_p=0.2, hue=hue)
    differences, unlike = [], []
    for name in NAMES:
        image = photo(name)[::8, ::8]
        table = draw_view(
            config,
            seed=5,
            epoch=0,
            view=QUERY_VIEW,
            index=np.arange(40),
            width=np.full(40, 100),
            height=np.full(40, 100),
            mean_rgb=np.tile(image.mean((0, 1)), (40, 1)),
        )
        for row in range(40):
            theirs = jittered_by_torchvision(
                image, table.factors[row], table.jitter_order[row], grayscale=table.grayscale[row]
            )
            matrix = table.matrix[row].astype(float)
            ours = np.clip(image @ matrix[:, :3].T + matrix[:, 3], 0, 255)
            differences.append(np.abs(ours - theirs).mean())
            unlike.append(np.abs(image - theirs).mean())
    assert np.mean(differences) < largest_mean
    # As a share of what the jitter changes at all.
    assert np.mean(differences) < 0.3 * np.mean(unlike)
