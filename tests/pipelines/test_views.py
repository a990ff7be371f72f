"""Any number of views, each of its own size, from every backend: what the float64 reference says of them."""

import doctest
import io
import tarfile
import textwrap
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.backends import pixels, view_process
from pipelines.backends.layout import num_view_bytes
from pipelines.config import VIEWS, DataConfig, FixedCrop, ViewConfig, ViewSpec, central_crop, ten_crop
from pipelines.loader import make_views, open_loader
from pipelines.plan.augment import draw_view
from pipelines.plan.draw import draw_views
from pipelines.world import World
from shards.ground.progress import ProgressBars
from shards.sets import open_set
from shards.sets.record import RECORD, Flag
from shards.tools.beton import write_beton
from tests.pipelines import reference
from tests.pipelines.photos import NAMES, photo
from tests.pipelines.shard_files import jpeg, write_shards

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ALL = replace(VIEWS["moco-v2"].query, solarize_p=0.2)
FLIP = ViewConfig(jitter_p=0, grayscale_p=0, blur_p=0, flip_p=1.0)
LABELED = ViewConfig(crop_scale=(0.08, 1.0), jitter_p=0, grayscale_p=0, blur_p=0)


def linear(size, recipe):
    return ViewSpec(size=size, recipe=recipe, color="linear")


# As exact as the backends are: with one linear map of the colors instead of torchvision's operations.
SETS = {
    "one labeled": (linear(40, LABELED),),
    "two": (linear(48, ALL), linear(48, ALL)),
    "two sizes": (linear(32, ALL), linear(64, FLIP)),
    "multi-crop": (linear(64, ALL),) * 2 + (linear(24, replace(ALL, crop_scale=(0.05, 0.14))),) * 6,
    "ten-crop": ten_crop(32),
    "mixed": (linear(16, ALL), *central_crop(56), linear(24, LABELED)),
}
# Of one view. Rounding once costs 0.25 in the mean and 0.5 at most; strong jitter multiplies what came before it.
MEAN, LARGEST = 0.45, 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_shards(folder / "shards", [jpeg(photo(name)) for name in NAMES], labels=list(range(len(NAMES))))
    write_beton(folder / "shards", folder / "photos.beton", workers=1, progress=ProgressBars(enabled=False))
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        for number, name in enumerate(NAMES):
            for suffix, content in (("jpg", jpeg(photo(name))), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def compare(views, tables, made, encoded, *, inside):
    assert [view.shape[2:] for view in made] == [(spec.size, spec.size) for spec in views]
    for spec, table, view in zip(views, tables, made, strict=True):
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
        apart = [
            np.abs(view[row].permute(1, 2, 0).numpy() - reference.view(image, table, row, spec.size, inside=inside))
            for row, image in enumerate(encoded)
        ]
        assert np.mean(apart) < MEAN
        assert np.max(apart) < LARGEST


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("backend", ["dali", "torch", "ffcv"])
def test_views_are_what_the_reference_says(backend, name, folder):
    shards = open_set(folder / ("photos.beton" if backend == "ffcv" else "shards"))
    samples, views = np.arange(len(NAMES)), SETS[name]
    made = make_views(shards, samples, views, seed=1, epoch=2, backend=backend)
    tables = draw_views(2, samples, open_set(folder / "shards").index(0), views=views, seed=1)
    compare(views, tables, made, [jpeg(photo(each)) for each in NAMES], inside=backend != "dali")


@pytest.mark.parametrize("recipe", VIEWS)
@pytest.mark.parametrize("backend", ["dali", "torch", "ffcv"])
def test_views_of_gray_images_are_gray(backend, recipe, tmp_path):
    gray = [jpeg(np.asarray(photo(name)).mean(axis=2).astype(np.uint8)) for name in NAMES[:4]]
    folder = write_shards(tmp_path / "shards", gray)
    if backend == "ffcv":
        folder = write_beton(folder, tmp_path / "set.beton", workers=1, progress=ProgressBars(enabled=False)).path
    views = tuple(replace(spec, size=32) for spec in VIEWS[recipe].specs[:3])
    for made in make_views(open_set(folder), np.arange(4), views, seed=1, epoch=0, backend=backend):
        apart = made.int() - made[:, :1].int()
        assert apart.abs().max() <= 1  # saturation rounds each channel
        assert made.float().std() > 1


@pytest.mark.parametrize("name", ["one labeled", "multi-crop"])
def test_streamed_views_are_what_the_reference_says(name, folder):
    views, num = SETS[name], len(NAMES)
    data = DataConfig(shards=str(folder / "tars"), batch_size=num, stream_samples=num, num_threads=1)
    with open_loader(data, views, seed=1) as loader:
        batch = next(iter(loader))
    encoded = [jpeg(photo(NAMES[label])) for label in batch.label.tolist()]
    records = np.zeros(num, dtype=RECORD)
    for record, image in zip(records, encoded, strict=True):
        decoded = reference.decode(image)
        record["height"], record["width"] = decoded.shape[:2]
        record["mean_rgb"], record["flags"] = np.rint(decoded.mean((0, 1))), Flag.HAS_MEAN_RGB
    compare(views, draw_views(0, np.arange(num), records, views=views, seed=1), batch.views, encoded, inside=True)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_batches_of_epochs_have_every_view_and_repeat_after_a_seek(backend, small_shards):
    views = (ViewSpec(size=32, recipe=ALL), ViewSpec(size=16, recipe=ALL), ViewSpec(size=24, recipe=FixedCrop()))
    data = DataConfig(shards=str(small_shards), batch_size=16, backend=backend, num_threads=1)
    with open_loader(data, views, seed=4) as loader:
        whole = [(*(view.clone() for view in batch.views), batch.index, batch.label) for batch in loader]
        loader.load_state_dict({"epoch": 0, "step": 4})
        rest = [(*(view.clone() for view in batch.views), batch.index, batch.label) for batch in loader]
    assert [view.shape for view in whole[0][:3]] == [(16, 3, size, size) for size in (32, 16, 24)]
    assert len(rest) == len(whole) - 4
    for one, two in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_first_views_do_not_depend_on_those_behind_them(small_shards):
    shards, samples = open_set(small_shards), np.arange(5)
    two = SETS["two"]
    alone = make_views(shards, samples, two, seed=1, epoch=0, backend="torch")
    beside = make_views(shards, samples, (*two, *SETS["ten-crop"]), seed=1, epoch=0, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(alone, beside[:2], strict=True))


def test_a_views_random_numbers_follow_from_its_place():
    records = np.zeros(20, dtype=RECORD)
    records["width"], records["height"] = 300, 200
    samples, wide = np.arange(20), np.full(20, 300)
    views = (
        ViewSpec(size=8, recipe=ALL),
        *central_crop(8),
        ViewSpec(size=9, recipe=FLIP),
        ViewSpec(size=9, recipe=ALL),
    )
    tables = draw_views(3, samples, records, views=views, seed=7)
    for number in (0, 2, 3):
        recipe = views[number].recipe
        assert isinstance(recipe, ViewConfig)
        alone = draw_view(recipe, seed=7, epoch=3, view=number, index=samples, width=wide, height=np.full(20, 200))
        assert np.array_equal(tables[number].box, alone.box)
        assert np.array_equal(tables[number].factors, alone.factors)
        assert np.array_equal(tables[number].sigma, alone.sigma)
    assert not np.array_equal(tables[0].box, tables[3].box)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (41, 77), (1, 9)])
def test_ten_crops_are_the_corners_and_the_center_twice(width, height):
    records = np.zeros(1, dtype=RECORD)
    records["width"], records["height"] = width, height
    tables = draw_views(0, np.zeros(1, np.int64), records, views=ten_crop(8, side=0.5), seed=0)
    side = max(1, round(0.5 * min(width, height)))
    right, lower = width - side, height - side
    corners = [(0, 0), (right, 0), (0, lower), (right, lower), (right // 2, lower // 2)]
    assert [tuple(table.box[0].tolist()) for table in tables] == [(x, y, side, side) for x, y in corners] * 2
    assert [bool(table.flip[0]) for table in tables] == [False] * 5 + [True] * 5


def filled_by_a_worker(shards, views, samples):
    """A slot that a worker process's code has filled with the views of samples."""
    spec = view_process.WorkerSpec(
        shards=shards,
        shards_in_use=1,
        draw=lambda epoch, samples, records: draw_views(epoch, samples, records, views=views, seed=0),
        sizes=tuple(view.size for view in views),
        skip=False,
    )
    num = len(samples)
    arrays = view_process.SlotArrays(np.zeros(16 * num + num_view_bytes(spec.sizes, num), dtype=np.uint8), spec, num)
    slot = view_process.ViewSlot(path="", number=0, capacity=num)
    task = view_process.ViewTask(slot=slot, begin=0, epoch=0, samples=samples)
    reader = view_process.Reader(spec.shards, num_threads=1)
    try:
        view_process._fill(view_process._BegunViews(task, reader), spec, arrays)
    finally:
        reader.close()
    return arrays


def test_a_sample_is_decoded_once_for_all_its_views(small_shards, monkeypatch):
    num_decoded = 0

    def counting(encoded, decode=pixels.decode):
        nonlocal num_decoded
        num_decoded += 1
        return decode(encoded)

    monkeypatch.setattr(pixels, "decode", counting)
    filled_by_a_worker(open_set(small_shards), SETS["multi-crop"], np.arange(4))
    assert num_decoded == 4


@pytest.mark.parametrize("together", [1, 3, 8])
def test_views_that_are_finished_together_are_those_that_are_made_one_by_one(together, small_shards, monkeypatch):
    # Eleven: the last go is never a whole one but for `together` 1.
    shards, views, samples = open_set(small_shards), SETS["two sizes"], np.arange(11)
    monkeypatch.setattr(view_process, "FINISHED_TOGETHER", together)
    arrays = filled_by_a_worker(shards, views, samples)
    tables = draw_views(0, samples, shards.index(0)[:11], views=views, seed=0)
    reader = view_process.Reader(shards, num_threads=1)
    for row, encoded in enumerate(reader.submit(samples, reader.records(samples)).result()):
        for table, made in zip(tables, arrays.views, strict=True):
            alone = np.empty_like(made[row])
            pixels.render(pixels.decode(encoded), table, row, alone)
            assert np.array_equal(made[row], alone)
    reader.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ViewSpec(size=0, recipe=FixedCrop()), "size is 0: a view has at least one pixel"),
        (lambda: FixedCrop(side=0), "crop is 0: it must lie above 0"),
        (lambda: FixedCrop(x=1.5), r"place is \(1.5, 0.5\)"),
        (lambda: replace(VIEWS["moco-v2"], num_small=-1), "num_small is -1"),
        (lambda: replace(VIEWS["moco-v2"], small_size=48), "mean nothing without small views: give --views.num-small"),
        (lambda: replace(VIEWS["multi-crop"], small_size=4), "small_size is 4"),
        (lambda: World(rank=2, world_size=2), "rank is 2"),
        (lambda: World(world_size=2, local_world_size=4), "local_world_size is 4"),
        (lambda: open_loader(DataConfig(shards="x"), ()), "no view is wanted"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_tars_without_an_index_have_no_sample_numbers(folder):
    data = DataConfig(shards=str(folder / "tars"), stream_samples=10)
    with pytest.raises(ValueError, match="its samples have no numbers: `make-shards index"):
        open_loader(data, central_crop(16), samples=np.arange(3))


def test_the_example_of_open_loader_runs(small_shards, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train").symlink_to(small_shards)
    monkeypatch.chdir(tmp_path)
    [example] = doctest.DocTestFinder().find(open_loader, "open_loader", globs={})
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_documented_multi_crop_loader_runs(small_shards, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train").symlink_to(small_shards)
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "docs" / "data.md").read_text().split("holds the large ones first):\n\n")[1].splitlines()
    code = "\n".join(takewhile(lambda line: not line or line.startswith("    "), lines))
    found = {}
    # Views of DALI, for they need no worker process.
    exec(textwrap.dedent(code).replace('"shards/train"', '"shards/train", backend="dali"'), found)
    assert [each.shape for each in (found["first"], found["second"])] == [(64, 3, 224, 224)] * 2
    assert [each.shape for each in found["small"]] == [(64, 3, 96, 96)] * 6
