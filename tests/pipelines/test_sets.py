import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import DataConfig, ViewsConfig, central_crop
from pipelines.loader import make_views, open_loader
from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from shards.sets.record import Flag
from shards.tools.index import index_folder
from tests.pipelines.central import open_central
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards
from tests.shards.pictures import encoded, fill

CPU = torch.device("cpu")
UNFIT = {3: "needs orientation", 4: "not rgb", 9: "not jpeg", 10: "damaged", 19: "not jpeg"}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """20 samples that others packed, described by make-shards index; five of them are not fit for training."""
    folder = tmp_path_factory.mktemp("foreign")
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(20):
            image = Image.fromarray(smooth_image(rng, 40, 40))
            data = {
                3: lambda image: encoded(image, exif=exif),
                4: lambda image: encoded(image.convert("CMYK")),
                9: lambda image: encoded(image, "PNG"),
                10: lambda image: encoded(image)[:-200],
                19: lambda image: encoded(image, "PNG"),
            }.get(number, encoded)(image)
            info = tarfile.TarInfo(f"{number:03d}.{'png' if UNFIT.get(number) == 'not jpeg' else 'jpg'}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_folder(str(folder), workers=1)
    return folder


def open_foreign(folder, **options):
    data = DataConfig(shards=str(folder), batch_size=10, num_threads=1, **options)
    return open_loader(data, ViewsConfig(size=16), seed=1, device=CPU)


def test_the_manifest_counts_what_was_found(foreign):
    shards = open_set(foreign)
    assert shards.manifest.outcomes == {
        "indexed": 20,
        "needs orientation": 1,
        "not rgb": 1,
        "not jpeg": 2,
        "damaged": 1,
    }
    flags = shards.index(0)["flags"]
    assert np.flatnonzero(flags & ~np.uint8(Flag.HAS_MEAN_RGB)).tolist() == sorted(UNFIT)


def test_unfit_samples_are_refused_before_anything_starts(foreign):
    for opening in (
        lambda: open_foreign(foreign),
        lambda: open_central(str(foreign), size=16, batch_size=4),
    ):
        with pytest.raises(
            ValueError, match=r"\(1 needs orientation, 1 not rgb, 2 not jpeg, 1 damaged\): `make-shards"
        ):
            opening()


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_or_others_take_their_place(foreign, backend):
    with open_foreign(foreign, on_bad_sample="skip", backend=backend) as loader:
        seen = sorted(torch.cat([batch.index for batch in loader]).tolist())
        assert loader.num_replaced == len(UNFIT)
    fit = sorted(set(range(20)) - set(UNFIT))
    assert seen == sorted([*fit, 5, 5, 11, 11, 0])


def test_sets_with_commas_between_them_train_as_one(tmp_path, small_shards):
    rng = np.random.default_rng(0)
    other = write_shards(tmp_path / "other", [jpeg(smooth_image(rng, 30, 30)) for _ in range(11)], per_shard=4)
    data = DataConfig(shards=f"{small_shards},{other}", batch_size=37, num_threads=1, backend="dali")
    with open_loader(data, ViewsConfig(size=16), seed=1, device=CPU) as loader:
        assert (loader.num_samples, len(loader)) == (111, 3)
        batches = list(loader)
    # Only the first set has labels: they mean nothing for both.
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(111))


def test_linear_colors_are_refused_without_mean_colors(tmp_path):
    source = fill(tmp_path / "in", 6)
    without, having = str(tmp_path / "without"), str(tmp_path / "with")
    pack(PackConfig(sources=(str(source),), out=without, workers=1))
    pack(PackConfig(sources=(without,), out=having, workers=1, mean_rgb=True))
    linear, views = ViewsConfig(size=16, color="linear"), ViewsConfig(size=16)

    def opened(shards: str, views: ViewsConfig):
        data = DataConfig(shards=shards, batch_size=2, num_threads=1, backend="dali")
        return open_loader(data, views, seed=1, device=CPU)

    for refused in (without, f"{having},{without}"):
        with pytest.raises(ValueError, match=rf"{without} has no mean colors.*torchvision.*--mean-rgb"):
            opened(refused, linear)
    with pytest.raises(ValueError, match="has no mean colors"):
        make_views(open_set(without), np.arange(2), linear, seed=1, epoch=0)
    # Crops for evaluation have no colors to compute, whatever they say.
    crop = tuple(replace(view, color="linear") for view in central_crop(16))
    for shards, wanted in ((having, linear), (f"{without},{having}", views), (without, crop)):
        opened(shards, wanted).close()
