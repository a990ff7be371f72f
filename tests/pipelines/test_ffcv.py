"""FFCV reads what `make-shards beton` writes, and the ffcv backend keeps the contract of the others."""

import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pipelines.backends.base import Job
from pipelines.backends.pixels import decode, render
from pipelines.config import VIEWS, DataConfig, ViewConfig, ViewsConfig, central_crop
from pipelines.loader import make_views, open_loader
from pipelines.plan.augment import color_chain
from pipelines.plan.draw import draw_views
from pipelines.plan.steps import ListedSteps
from shards.ground.progress import ProgressBars
from shards.sets import open_set
from shards.sets.beton import METADATA, BetonSet
from shards.tools.beton import write_beton
from tests.pipelines import reference
from tests.pipelines.central import open_central
from tests.pipelines.color_cases import differences
from tests.pipelines.photos import NAMES, photo
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards

CPU = torch.device("cpu")
VIEWS_24 = ViewsConfig(size=24, query=ViewConfig(), key=ViewConfig(solarize_p=0.5))
ODD = 7
# numba trips over itself when what it compiled is collected.
KEPT = []


def beton_of(folder, out) -> BetonSet:
    return write_beton(folder, out, workers=1, progress=ProgressBars(enabled=False))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_shards(folder / "shards", [jpeg(photo(name)) for name in NAMES])
    return beton_of(folder / "shards", folder / "photos.beton")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """60 images in 3 shards, one of which FFCV's library alone could not decode; the folder of shards is beside it."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    images = [jpeg(smooth_image(rng, width, height)) for width, height in rng.integers(40, 90, (60, 2)).tolist()]
    # Stray bytes before the end marker: libjpeg-turbo complains, and everyone shows the image.
    images[ODD] = images[ODD][:-2] + b"\x00\x11\x22" + images[ODD][-2:]
    write_shards(folder / "shards", images, per_shard=20, labels=list(range(60)))
    beton_of(folder / "shards", folder / "small.beton")
    return folder / "small.beton"


def open_small(shards, **options):
    data = DataConfig(**{"shards": str(shards), "batch_size": 16, "num_threads": 1, "backend": "ffcv", **options})
    return open_loader(data, VIEWS_24, seed=3, device=CPU)


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("ffcv-views", "read-shards"))]


def same(one, two) -> bool:
    of_one, of_two = ((*batch.views, batch.index, batch.label) for batch in (one, two))
    return all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcvs_own_loader_reads_the_file(photos, tmp_path, os_cache):
    # First of all, for it makes FFCV's import faster.
    from pipelines.backends.ffcv_library import Loader  # isort: skip
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.transforms import ToTensor
    from ffcv.types import get_metadata_type

    threads = torch.get_num_threads()
    decoder = CenterCropRGBImageDecoder((200, 200), 1.0)
    images = [jpeg(photo(name)[:200, :200]) for name in NAMES]
    write_shards(tmp_path / "shards", images, per_shard=2, labels=[3, 1, 2, 0])
    path = tmp_path / "square.beton"
    beton_of(tmp_path / "shards", path)
    loader = Loader(
        str(path), batch_size=4, num_workers=1, seed=0, os_cache=os_cache, pipelines={"image": [decoder, ToTensor()]}
    )
    torch.set_num_threads(threads)
    KEPT.append(loader)
    assert get_metadata_type(list(loader.reader.handlers.values())) == METADATA
    batches = iter(loader)
    found, labels, index = next(batches)
    assert next(batches, None) is None
    batches.join()
    assert index.flatten().tolist() == [0, 1, 2, 3]
    assert labels.flatten().tolist() == [3, 1, 2, 0]
    for pixels, image in zip(found.numpy(), images, strict=True):
        # FFCV decodes with a fast, inexact DCT.
        assert np.abs(pixels - reference.decode(image)).mean() < 2


NONE = ViewConfig(jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
STAGES = {
    "resize": NONE,
    "enlarge": replace(NONE, crop_scale=(0.01, 0.03)),
    "flip": replace(NONE, flip_p=1.0),
    "blur": replace(NONE, blur_p=1.0),
    "color": replace(NONE, jitter_p=1.0, grayscale_p=0.2),
    "solarize": replace(NONE, solarize_p=1.0),
    "all": replace(VIEWS["moco-v2"].query, solarize_p=0.2),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_what_the_reference_says(stage, photos):
    views = ViewsConfig(size=64, query=STAGES[stage], key=NONE, color="linear")
    samples, differences = np.arange(len(NAMES)), []
    for epoch in range(3):
        made = make_views(photos, samples, views, seed=1, epoch=epoch, backend="ffcv")[0].permute(0, 2, 3, 1).numpy()
        table = draw_views(epoch, samples, photos.records, views=views.specs, seed=1)[0]
        for row, name in enumerate(NAMES):
            differences.append(np.abs(made[row] - reference.view(jpeg(photo(name)), table, row, 64, inside=True)))
    # Rounding once costs 0.25 in the mean and 0.5 at most.
    assert np.mean(differences) < 0.26
    assert np.max(differences) < 0.52


def test_colors_are_torchvisions():
    from pipelines.backends.ffcv_kernels import apply_chain

    def by_numba(batch, table):
        stages, factors = color_chain(table)
        for row, image in enumerate(batch):
            planes = np.ascontiguousarray(image.reshape(-1, 3).T.astype(np.float32))
            apply_chain(planes, stages[row], factors[row])
            batch[row] = planes.T.reshape(image.shape)
        return batch

    for name, (mean, share) in differences(by_numba).items():
        # Where a product of floats falls on the edge of an integer; a step of hue is some levels.
        assert mean < 0.02, name
        assert share < 0.02, name


@pytest.mark.parametrize("recipe", ["moco-v1", "moco-v2", "moco-v3"])
def test_whole_views_are_near_the_reference(recipe, photos):
    views, samples = replace(VIEWS[recipe], size=64), np.arange(len(NAMES))
    made = make_views(photos, samples, views, seed=1, epoch=0, backend="ffcv")
    apart = []
    for view, table in zip(made, draw_views(0, samples, photos.records, views=views.specs, seed=1), strict=True):
        for row, name in enumerate(NAMES):
            expected = reference.view(jpeg(photo(name)), table, row, 64, inside=True)
            apart.append(np.abs(view[row].permute(1, 2, 0).numpy() - expected))
    # Rounding before the colors costs 0 here and there, and what follows from it.
    assert np.mean(apart) < 0.1


def test_batches_are_those_of_the_shards_whichever_backend_reads_what(small):
    with open_small(small) as ours, open_small(small.parent / "shards", backend="dali") as theirs:
        assert "ffcv (as asked for), 1 threads" in ours.description
        assert len(ours) == len(theirs) == 3
        for _ in range(2):
            for one, two in zip(ours, theirs, strict=True):
                assert torch.equal(one.index, two.index)
                assert torch.equal(one.label, one.index)
                for view in one.views:
                    assert view.shape == (16, 3, 24, 24)
                    assert view.dtype == torch.uint8
                    assert view.is_contiguous(memory_format=torch.channels_last)
                assert (one.views[0].float() - two.views[0].float()).abs().mean() < 2
    with open_small(small, backend="auto") as loader:
        assert "ffcv (the data is a .beton)" in loader.description


def test_other_backends_read_a_beton_as_they_read_its_shards(small):
    samples = np.arange(50)
    beton, shards = open_set(small), open_set(small.parent / "shards")
    one, two = (make_views(data, samples, VIEWS_24, seed=1, epoch=0, backend="dali") for data in (beton, shards))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_resume_and_a_left_loop_go_on_to_the_bit(small):
    numpys_state, torchs_threads = np.random.get_state()[1].copy(), torch.get_num_threads()  # noqa: NPY002 - the state that FFCV would seed
    with open_small(small) as loader:
        whole = [batch for _ in range(2) for batch in loader]
        kept = [(batch.views[0].clone(), batch.views[1].clone()) for batch in whole]
        loader.load_state_dict({"epoch": 0, "step": 1})
        parts = []
        for batch in loader:
            parts.append(batch)
            break
        parts += [*loader, *loader]
    assert all(same(a, b) for a, b in zip(parts, whole[1:], strict=True))
    # What was handed over stayed as it was, however many batches came after it.
    assert all(
        torch.equal(batch.views[0], q) and torch.equal(batch.views[1], k)
        for batch, (q, k) in zip(whole, kept, strict=True)
    )
    assert not any(torch.equal(a.views[0], b.views[0]) for a in whole[:3] for b in whole[3:])
    assert np.array_equal(np.random.get_state()[1], numpys_state)  # noqa: NPY002 - the state that FFCV would seed
    assert torch.get_num_threads() == torchs_threads


def test_pixels_do_not_depend_on_the_number_of_threads(small):
    with open_small(small) as one, open_small(small, num_threads=2) as two:
        assert all(same(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_leaves_no_thread_at_any_time(small, taken):
    loader = open_small(small)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    loader.close()
    loader.close()
    assert our_threads() == []


def test_what_libjpeg_turbo_complains_of_is_decoded_as_elsewhere(small):
    shards, samples = BetonSet.open(small), np.array([ODD])
    record = shards.records[ODD]
    encoded = np.frombuffer(small.read_bytes(), np.uint8)[int(record["offset"]) :][: int(record["size"])]
    expected = np.empty((24, 24, 3), dtype=np.uint8)
    tables = draw_views(0, samples, shards.records[samples], views=VIEWS_24.specs, seed=1)
    for table, view in zip(tables, make_views(shards, samples, VIEWS_24, seed=1, epoch=0, backend="ffcv"), strict=True):
        render(decode(encoded), table, 0, expected)
        assert np.array_equal(view[0].permute(1, 2, 0).numpy(), expected)


@pytest.fixture(scope="module")
def damaged(small):
    """The file with a flipped byte inside sample 33."""
    whole = bytearray(small.read_bytes())
    whole[int(BetonSet.open(small).records[33]["offset"]) + 100] ^= 1
    path = small.with_name("damaged.beton")
    path.write_bytes(whole)
    return path


def test_a_damaged_sample_ends_the_run_with_its_name_and_never_gives_stale_pixels(damaged):
    with open_small(damaged) as loader, pytest.raises(ValueError, match=r"damaged\.beton: sample 33 .*crc32c"):
        list(loader)
    assert our_threads() == []


def test_a_damaged_sample_is_replaced_by_the_same_one_as_elsewhere(damaged, caplog):
    with (
        open_small(damaged, on_bad_sample="skip") as ours,
        open_small(damaged, on_bad_sample="skip", backend="dali") as theirs,
    ):
        for epoch in range(2):
            one, two = torch.cat([b.index for b in ours]), torch.cat([b.index for b in theirs])
            assert torch.equal(one, two), epoch
            assert 33 not in one
        assert ours.num_replaced == theirs.num_replaced > 0
    assert "sample 33" in caplog.text


def raise_in_draw(_epoch, _samples, _records):
    raise ArithmeticError("no parameters")


@pytest.mark.parametrize("fault", ["draw", "steps", "operation"])
def test_an_exception_reaches_the_consumer(small, fault, monkeypatch):
    from pipelines.backends import ffcv

    def steps():
        raise ArithmeticError("no order")
        yield

    job = Job(
        shards=open_set(small),
        draw=raise_in_draw if fault == "draw" else partial(draw_views, views=VIEWS_24.specs, seed=1),
        views=VIEWS_24.specs,
        max_batch=4,
        device=CPU,
        num_threads=1,
    )
    if fault == "operation":
        monkeypatch.setattr(ffcv, "_rows", lambda *_: np.zeros(4, dtype=[("f0", "<i8")]))
    stream = ffcv.FfcvViews(
        job, steps() if fault == "steps" else ListedSteps(samples=np.arange(8), batch_size=4, epoch=0)
    )
    expected = Exception if fault == "operation" else ArithmeticError
    for _ in range(2):
        with pytest.raises(expected):
            stream.get()
    stream.close()
    assert our_threads() == []


def test_evaluation_sees_each_sample_once_as_a_central_crop(small):
    loader = open_central(str(small), size=20, batch_size=25, backend="ffcv")
    shards = BetonSet.open(small)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.index) for batch in batches] == [25, 25, 10]
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(60))
        assert all(torch.equal(batch.label, batch.index) for batch in batches)
    assert our_threads() == []
    [table] = draw_views(0, np.arange(60), shards.records, views=central_crop(8, side=0.875), seed=0)
    data = small.read_bytes()
    for number, image in enumerate(torch.cat([batch.views[0] for batch in batches]).permute(0, 2, 3, 1).numpy()):
        record = shards.records[number]
        encoded = data[int(record["offset"]) : int(record["offset"]) + int(record["size"])]
        expected = reference.view(encoded, table, number, 20, inside=True)
        # Both are rounded.
        assert np.abs(image - expected).max() <= 1
        assert np.abs(image - expected).mean() < (0.5 if number == ODD else 0.05)


SCRIPT = """
import sys, torch
from pipelines.config import DataConfig, ViewsConfig
from pipelines.loader import open_loader
assert not {"ffcv", "numba"} & set(sys.modules), "only when chosen"
loader = open_loader(DataConfig(shards=sys.argv[1], batch_size=4, backend="ffcv", num_threads=1), ViewsConfig(size=16),
                     seed=0, device=torch.device("cpu"))
for batch in loader:
    break
print("reached", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_never_closes_its_loader_still_ends(photos):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(photos.path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "reached\n", "")


def test_nothing_that_is_kept_on_disk_takes_a_record():
    """Their names repeat between processes: one that reads two of them back runs one for the other."""
    from numba import types

    from pipelines.backends import ffcv_kernels

    kept = [each for each in vars(ffcv_kernels).values() if getattr(each, "_cache", None) and each._cache.cache_path]
    taken = [taken for function in kept for signature in function.signatures for taken in signature]
    assert ffcv_kernels.render in kept
    assert ffcv_kernels.render.signatures
    assert not any(isinstance(getattr(each, "dtype", each), types.Record) for each in taken)
