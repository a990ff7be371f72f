"""DALI's views on the device against those on the CPU; with DEVICE=cpu, two pipelines on the CPU."""

import resource
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.config import VIEWS, DataConfig, ViewConfig, ViewsConfig
from pipelines.loader import make_views, open_loader
from shards.sets import open_set
from tests.pipelines.central import open_central
from tests.pipelines.photos import NAMES, photo
from tests.pipelines.shard_files import jpeg, smooth_image, write_shards

pytestmark = pytest.mark.gpu

NONE = ViewConfig(jitter_p=0, grayscale_p=0, blur_p=0, flip_p=0)
STAGES = {
    "resize": NONE,
    "flip": replace(NONE, flip_p=1.0),
    "blur": replace(NONE, blur_p=0.5),
    "color": replace(NONE, jitter_p=1.0, grayscale_p=0.2),
    "solarize": replace(NONE, solarize_p=0.5),
    "moco-v1": VIEWS["moco-v1"].query,
    "moco-v2": VIEWS["moco-v2"].query,
    "moco-v3": VIEWS["moco-v3"].key,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    images = [jpeg(photo(name)) for name in NAMES] + [jpeg(photo(name)[:, :, 0]) for name in NAMES]
    return open_set(write_shards(tmp_path_factory.mktemp("photos"), images))


@pytest.fixture(scope="module")
def many_sizes(tmp_path_factory):
    """64 images, the largest 40 times the smallest."""
    rng = np.random.default_rng(0)
    images = [jpeg(smooth_image(rng, *rng.integers(60, 380, 2).tolist())) for _ in range(64)]
    return write_shards(tmp_path_factory.mktemp("sizes"), images, per_shard=16)


@pytest.mark.parametrize("stage", STAGES)
def test_pixels_are_those_of_the_cpu(device, photos, stage):
    views = ViewsConfig(size=112, query=STAGES[stage], key=NONE)
    samples = np.arange(2 * len(NAMES))
    for epoch in range(2):
        here = make_views(photos, samples, views, seed=2, epoch=epoch, device=device)
        there = make_views(photos, samples, views, seed=2, epoch=epoch, device=CPU)
        for one, two in zip(here, there, strict=True):
            assert one.device == torch.empty(0, device=device).device
            assert one.is_contiguous(memory_format=torch.channels_last)
            difference = (one.cpu().int() - two.int()).abs().float()
            # Another JPEG decoder and another order of sums; solarize turns a level across 128 into a jump.
            assert difference.mean() < 1.0
            if "solarize" not in stage and stage != "moco-v3":
                assert torch.quantile(difference.flatten()[::7], 0.999) <= 6


def open_sizes(device, shards, **options):
    data = DataConfig(shards=str(shards), batch_size=16, backend="dali", **options)
    return open_loader(data, ViewsConfig(size=64), seed=4, device=device)


def stream_of_its_own(device):
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


@pytest.mark.parametrize("stream", [lambda _: nullcontext(), stream_of_its_own], ids=["default", "own"])
def test_views_are_whole_when_kernels_that_come_late_read_them(device, on_gpu, many_sizes, stream):
    num_epochs = 5 if on_gpu else 1
    with open_sizes(device, many_sizes) as loader:
        expected = [tuple(view.sum().item() for view in batch.views) for _ in range(num_epochs) for batch in loader]
    sums = []
    with stream(device), open_sizes(device, many_sizes) as loader:
        for _ in range(num_epochs):
            for batch in loader:
                if device.type == "cuda":
                    torch.cuda._sleep(20_000_000)
                # Read on the device long after Python has dropped the batch.
                sums.append((batch.views[0].sum(), batch.views[1].sum()))
                del batch
        # Inside: on the stream that summed them.
        assert [(q.item(), k.item()) for q, k in sums] == expected


def test_a_resume_is_exact_on_the_device(device, many_sizes):
    with open_sizes(device, many_sizes) as loader:
        whole = [(*(view.cpu() for view in batch.views), batch.index) for batch in loader]
    with open_sizes(device, many_sizes) as loader:
        loader.load_state_dict({"epoch": 0, "step": 2})
        rest = [(*(view.cpu() for view in batch.views), batch.index) for batch in loader]
    for one, two in zip(rest, whole[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_evaluation_images_are_those_of_the_cpu(device, many_sizes):
    loaders = [open_central(str(many_sizes), size=48, batch_size=20, device=d) for d in (device, CPU)]
    for one, two in zip(*loaders, strict=True):
        assert torch.equal(one.index, two.index)
        assert (one.views[0].cpu().int() - two.views[0].int()).abs().float().mean() < 1.0


def memory_in_use(device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_memory_stays_flat(device, many_sizes):
    num_epochs = 200 if device.type == "cuda" else 20
    with open_sizes(device, many_sizes) as loader:
        for _ in range(num_epochs // 2):
            for batch in loader:
                del batch
        before = memory_in_use(device)
        for _ in range(num_epochs):
            for batch in loader:
                del batch
        assert memory_in_use(device) - before < 64 << 20
