"""Tars without an index, streamed."""

import io
import tarfile
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import DataConfig, ViewConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.reading.reader import DamagedSampleError
from pipelines.world import World
from shards.sets.manifest import find_tars
from tests.pipelines.shard_files import jpeg, smooth_image

STILL = ViewConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_p=0.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)
VIEWS = ViewsConfig(size=24)
CPU = torch.device("cpu")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def encoded(image, kind):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars of 20 images, as people write them: in folders, with dots, JPEG and PNG, beside other members."""
    folder = tmp_path_factory.mktemp("tars")
    rng = np.random.default_rng(0)
    for shard in range(3):
        members = {}
        for number in range(20):
            image = smooth_image(rng, 60, 48)
            key, label = f"train/{shard}_{number}", str(shard * 20 + number).encode()
            suffix, data = ("0.png", encoded(image, "png")) if number % 5 == 0 else ("JPEG", jpeg(image))
            # An object whose reading as a pickle would raise.
            members |= {f"{key}.{suffix}": data, f"{key}.cls": label, f"{key}.pyd": b"cos\nabort\n(tR."}
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def open_tars(tars, *, views=VIEWS, seed=0, world=World(), num_threads=2, **options):
    data = DataConfig(shards=str(tars), batch_size=8, num_threads=num_threads, stream_samples=60, **options)
    return open_loader(data, views, seed=seed, device=CPU, world=world)


def labels(batches):
    return [label for batch in batches for label in batch.label.tolist()]


def test_batches_keep_the_contract_and_epochs_follow_each_other(tars):
    with open_tars(tars) as loader:
        assert len(loader) == 7
        first = list(loader)
        assert len(first) == 7
        assert loader.state_dict() == {"epoch": 1, "step": 0}
        following = next(iter(loader))
    for batch in (*first, following):
        for view in batch.views:
            assert view.shape == (8, 3, 24, 24)
            assert view.dtype == torch.uint8
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(*batch.views)
        assert batch.index.tolist() == [-1] * 8
    assert set(labels(first)) <= set(range(60))
    assert len(set(labels(first))) > 20
    assert "other samples" in loader.description


def first_labels(tars, *, at=None, **options):
    with open_tars(tars, **options) as loader:
        if at:
            loader.load_state_dict(at)
        return tuple(labels(islice(iter(loader), 2)))


def test_the_same_place_gives_the_same_batches_and_other_places_others(tars):
    with open_tars(tars) as one, open_tars(tars) as two:
        a, b = (list(islice(iter(each), 3)) for each in (one, two))
    assert all(torch.equal(x.views[0], y.views[0]) for x, y in zip(a, b, strict=True))
    others = {
        first_labels(tars),
        first_labels(tars, seed=1),
        first_labels(tars, at={"epoch": 1, "step": 0}),
        first_labels(tars, at={"epoch": 0, "step": 2}),
    }
    assert len(others) == 4


def test_ranks_draw_other_samples(tars):
    with (
        open_tars(tars, world=World(rank=0, world_size=2)) as one,
        open_tars(tars, world=World(rank=1, world_size=2)) as two,
    ):
        assert len(one) == len(two) == 7
        a, b = next(iter(one)), next(iter(two))
    assert len(a.label) == len(b.label) == 4
    assert a.label.tolist() != b.label.tolist()


def test_pixels_are_those_of_the_image(tmp_path):
    image = smooth_image(np.random.default_rng(0), 24, 24)
    write_tar(tmp_path / "a.tar", {"one.png": encoded(image, "png")})
    views = ViewsConfig(size=24, query=STILL, key=replace(STILL, flip_p=1.0))
    with open_tars(tmp_path, views=views, num_threads=1) as loader:
        batch = next(iter(loader))
    assert batch.label.tolist() == [-1] * 8
    assert np.array_equal(batch.views[0][0].permute(1, 2, 0).numpy(), image)
    assert np.array_equal(batch.views[1][0].permute(1, 2, 0).numpy(), image[:, ::-1])


def test_an_image_that_lies_on_its_side_is_turned(tmp_path):
    image = smooth_image(np.random.default_rng(0), 24, 24)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(buffer, "jpeg", quality=98, subsampling=0, exif=exif)
    write_tar(tmp_path / "a.tar", {"one.jpg": buffer.getvalue()})
    with open_tars(tmp_path, views=ViewsConfig(size=24, query=STILL, key=STILL), num_threads=1) as loader:
        view = next(iter(loader)).views[0][0].permute(1, 2, 0).numpy()
    upright = np.rot90(image, -1).astype(int)
    assert np.abs(view - upright).mean() < 4 < np.abs(view - image.astype(int)).mean()


def test_a_damaged_image_is_named_or_left_out(tmp_path):
    good = jpeg(smooth_image(np.random.default_rng(0), 40, 40))
    write_tar(tmp_path / "a.tar", {"good.jpg": good, "bad.jpg": good[: len(good) // 2], "worse.jpg": b"nothing"})
    with open_tars(tmp_path) as loader, pytest.raises(DamagedSampleError, match=r"a\.tar: (bad|worse)"):
        list(loader)
    with open_tars(tmp_path, on_bad_sample="skip") as loader:
        assert len(list(loader)) == 7
        assert loader.num_replaced > 0


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"this is no tar " * 100)
    with open_tars(tmp_path) as loader, pytest.raises(DamagedSampleError, match=r"a\.tar cannot be read as a tar"):
        next(iter(loader))


def test_tars_without_images_are_an_error_and_not_a_wait(tmp_path):
    write_tar(tmp_path / "a.tar", {"one.txt": b"words"})
    with open_tars(tmp_path) as loader, pytest.raises(ValueError, match="none of their members is an image"):
        next(iter(loader))


def test_nothing_runs_a_pipe(tmp_path, monkeypatch):
    # webdataset opens such names by running them; a file of that name is read as a file.
    image = smooth_image(np.random.default_rng(0), 24, 24)
    folder = tmp_path / "pipe:touch ran"
    folder.mkdir()
    write_tar(folder / "pipe:touch ran2.tar", {"one.png": encoded(image, "png")})
    monkeypatch.chdir(tmp_path)
    with open_tars("pipe:touch ran") as loader:
        assert next(iter(loader)).views[0].shape == (8, 3, 24, 24)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe:touch ran"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream_samples": None}, "make-shards index"),
        ({"backend": "dali"}, "--data.backend dali needs an index"),
        ({"read_threads": 8}, "--data.read-threads 8 means nothing beside --data.backend torch"),
        ({"stream_samples": 5}, "at least a batch of 8"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tars, options, message):
    data = DataConfig(**({"shards": str(tars), "batch_size": 8, "stream_samples": 60} | options))
    with pytest.raises(ValueError, match=message):
        open_loader(data, VIEWS, seed=0, device=CPU)


def test_a_folder_with_a_manifest_is_not_streamed(small_shards):
    assert find_tars(str(small_shards)) == ()


@pytest.mark.parametrize("shards", ["{indexed}", "s3://bucket/tars", "{tars},{tars}", "{tars}/some.beton"])
def test_what_is_not_one_folder_of_tars_is_not_counted_by_the_user(tars, small_shards, shards):
    data = DataConfig(shards=shards.format(tars=tars, indexed=small_shards), batch_size=8, stream_samples=60)
    with pytest.raises(ValueError, match=r"--data\.stream-samples 60 is for tars without an index"):
        open_loader(data, VIEWS, seed=0, device=CPU)
