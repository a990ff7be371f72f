import dataclasses
import importlib.util
from functools import partial
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch

from pipelines.backends import registry as backends
from pipelines.backends.base import Job, Made
from pipelines.backends.registry import BACKENDS, BackendEntry, choose, refuse_unused
from pipelines.config import VIEWS, Backend, DataConfig, central_crop
from pipelines.loader import open_loader
from pipelines.plan.draw import draw_views
from pipelines.plan.steps import ListedSteps, Steps
from shards.ground.progress import ProgressBars
from shards.sets import open_set
from shards.tools.beton import write_beton

CPU, GPU = torch.device("cpu"), torch.device("cuda")

# Options that not every backend uses, and who does, by backend and whether there is a GPU.
USED = {
    ("torch", False): {"cache_decoded"},
    ("torch", True): {"cache_decoded"},
    ("ffcv", False): set[str](),
    ("ffcv", True): set[str](),
    ("dali", False): {"read_threads"},
    ("dali", True): {"read_threads", "hw_decoder_load"},
    ("auto", False): {"read_threads", "cache_decoded"},
    ("auto", True): {"read_threads", "hw_decoder_load", "cache_decoded"},
}
SOME = {"read_threads": 8, "hw_decoder_load": 0.5, "cache_decoded": 2.0}
EVERYWHERE = {"shards", "batch_size", "lanes", "window_shards", "backend", "num_threads", "on_bad_sample", "prefetch"}
# Whether they mean something is a matter of where the data lies (tests/moco_fast/test_meaning.py).
BY_PLACE = {"cache", "cache_gib", "cache_decoded_in", "fetchers", "stream_samples"}


def test_of_every_option_it_is_known_who_uses_it():
    assert {field.name for field in dataclasses.fields(DataConfig)} == EVERYWHERE | BY_PLACE | SOME.keys()
    assert {backend for backend, _ in USED} == {"auto", *BACKENDS}


@pytest.mark.parametrize(("backend", "on_gpu"), USED)
@pytest.mark.parametrize("option", SOME)
def test_an_option_that_the_backend_does_not_use_is_refused(backend, on_gpu, option):
    data = DataConfig(shards="x", **{option: SOME[option]})
    if option in USED[backend, on_gpu]:
        refuse_unused(data, backend, on_gpu=on_gpu)
    else:
        name = option.replace("_", "-")
        with pytest.raises(ValueError, match=f"--data.{name} {SOME[option]} means nothing beside .*: leave it out, or"):
            refuse_unused(data, backend, on_gpu=on_gpu)
    refuse_unused(DataConfig(shards="x"), backend, on_gpu=on_gpu)


def test_every_backend_is_registered_under_its_name():
    assert set(get_args(Backend)) == set(BACKENDS)


class Gray:
    """Views of one gray, in the order of the steps: all that a new backend has to have."""

    def __init__(self, job: Job, steps: Steps) -> None:
        self._job, self._steps = job, iter(steps)

    def get(self) -> Made:
        _, samples = next(self._steps)
        views = tuple(torch.full((len(samples), view.size, view.size, 3), 128) for view in self._job.views)
        return Made(samples=samples, labels=samples, views=tuple(view.permute(0, 3, 1, 2) for view in views))

    def close(self) -> None:
        pass


def test_a_backend_is_one_class_and_one_entry(small_shards, monkeypatch):
    monkeypatch.setitem(BACKENDS, "gray", BackendEntry(start=Gray, needs=()))
    data = DataConfig(shards=str(small_shards), batch_size=10, backend="gray")
    with open_loader(data, VIEWS["multi-crop"], seed=2, device=CPU) as loader:
        assert loader.description.startswith("gray (as asked for)")
        batches = list(loader)
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(100))
    assert [view.shape for view in batches[0].views] == [(10, 3, 224, 224)] * 2 + [(10, 3, 96, 96)] * 6
    with open_loader(data, central_crop(32), samples=np.arange(7), device=CPU) as loader:
        assert [batch.index.tolist() for batch in loader] == [list(range(7))]


class Watched(Job):
    asked: ClassVar[set[str]] = set()

    def __getattribute__(self, name):
        Watched.asked.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_asks_for_the_options_that_it_is_said_to_use(small_shards, tmp_path, backend):
    shards = open_set(small_shards)
    if backend == "ffcv":
        shards = write_beton(small_shards, tmp_path / "set.beton", workers=1, progress=ProgressBars(enabled=False))
    views = VIEWS["cifar10"]
    job = Watched(
        shards=shards,
        draw=partial(draw_views, views=views.specs, seed=0),
        views=views.specs,
        max_batch=8,
        device=CPU,
        num_threads=1,
    )
    Watched.asked.clear()
    stream = BACKENDS[backend].start(job, ListedSteps(samples=np.arange(8), batch_size=8, epoch=0))
    try:
        assert stream.get().views[0].shape[0] == 8
    finally:
        stream.close()
    assert {"num_threads", "prefetch"} <= Watched.asked
    assert ("read_threads" in Watched.asked) == ("read_threads" in USED[backend, False])


@pytest.mark.parametrize(("option", "beside"), [("read_threads", "--data.backend torch"), ("hw_decoder_load", "a CPU")])
def test_what_auto_chose_is_refused_its_unused_options(small_shards, option, beside):
    data = DataConfig(shards=str(small_shards), batch_size=8, **{option: SOME[option]})
    with pytest.raises(ValueError, match=f"means nothing beside {beside}"):
        open_loader(data, VIEWS["moco-v2"], seed=0, device=CPU)


@pytest.fixture
def without(monkeypatch):
    """Make chosen modules look as if they were not installed, and all others as if they were."""

    def hide(*names):
        spec = importlib.util.find_spec("json")
        monkeypatch.setattr(backends, "find_spec", lambda name: None if name in names else spec)

    return hide


def test_auto_takes_what_is_faster():
    assert choose("auto", device=GPU, size=224)[0] == "dali"
    assert choose("auto", device=CPU, size=224)[0] == "torch"
    assert choose("auto", device=CPU, size=32) == (
        "dali",
        "the faster one without a GPU for views below 96 pixels",
    )


def test_auto_takes_what_is_installed(without):
    without("cv2")
    assert choose("auto", device=CPU, size=224) == ("dali", "cv2 is not installed")
    with pytest.raises(ValueError, match="the torch backend needs cv2: install it"):
        choose("torch", device=CPU, size=224)
    without("nvidia.dali")
    assert choose("auto", device=GPU, size=224) == (
        "torch",
        "nvidia.dali is not installed (pip install 'moco-fast[gpu]')",
    )
    without("nvidia.dali", "simplejpeg")
    with pytest.raises(ValueError, match=r"no backend is installed: dali needs nvidia\.dali"):
        choose("auto", device=GPU, size=224)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="no backend 'tf': choose auto, dali or ffcv or torch"):
        choose("tf", device=CPU, size=32)


def test_a_beton_is_for_ffcv_unless_there_is_a_gpu_or_no_ffcv(without):
    without()
    assert choose("auto", device=CPU, size=32, kind="beton") == ("ffcv", "the data is a .beton")
    assert choose("auto", device=GPU, size=32, kind="beton")[0] == "dali"
    without("ffcv")
    assert choose("auto", device=CPU, size=224, kind="beton")[0] == "torch"
    with pytest.raises(ValueError, match=r"the ffcv backend needs ffcv: install it \(docs/data\.md says how\)"):
        choose("ffcv", device=CPU, size=224, kind="beton")


def test_ffcv_without_a_beton_tells_how_to_make_one():
    with pytest.raises(ValueError, match=r"make-shards beton SHARDS --out FILE\.beton"):
        choose("ffcv", device=CPU, size=224)


@pytest.mark.parametrize(("side", "hinted"), [(500, True), (20_000, False)])
def test_the_decoder_is_told_the_largest_size_unless_it_is_out_of_proportion(side, hinted):
    from pipelines.backends.dali import size_hints
    from shards.sets.manifest import Manifest, ShardTable

    manifest = Manifest(
        shards=ShardTable.of(()),
        num_inputs=0,
        num_samples=0,
        num_rejected=0,
        max_width=side,
        max_height=side - 1,
        max_bytes=0,
    )
    expected = {"preallocate_width_hint": side, "preallocate_height_hint": side - 1} if hinted else {}
    assert size_hints(manifest, 256) == expected
