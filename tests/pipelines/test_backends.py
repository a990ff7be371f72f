import importlib.util

import pytest
import torch

from pipelines.backends import registry as backends
from pipelines.backends.registry import choose

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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
    assert choose("auto", device=GPU, size=224) == ("torch", "nvidia.dali is not installed")
    without("nvidia.dali", "simplejpeg")
    with pytest.raises(ValueError, match=r"no backend is installed: dali needs nvidia\.dali"):
        choose("auto", device=GPU, size=224)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="no backend 'tf': choose auto, dali or ffcv or torch"):
        choose("tf", device=CPU, size=32)


def test_a_beton_is_for_ffcv_unless_there_is_a_gpu_or_no_ffcv(without):
    without()
    assert choose("auto", device=CPU, size=32, is_beton=True) == ("ffcv", "the data is a .beton")
    assert choose("auto", device=GPU, size=32, is_beton=True)[0] == "dali"
    without("ffcv")
    assert choose("auto", device=CPU, size=224, is_beton=True)[0] == "torch"
    with pytest.raises(ValueError, match=r"the ffcv backend needs ffcv: install it \(docs/data\.md says how\)"):
        choose("ffcv", device=CPU, size=224, is_beton=True)


def test_ffcv_without_a_beton_tells_how_to_make_one():
    with pytest.raises(ValueError, match=r"make-shards beton SHARDS --out FILE\.beton"):
        choose("ffcv", device=CPU, size=224)


@pytest.mark.parametrize(("side", "hinted"), [(500, True), (20_000, False)])
def test_the_decoder_is_told_the_largest_size_unless_it_is_out_of_proportion(side, hinted):
    from pipelines.backends.dali import size_hints
    from shards.sets.manifest import Manifest

    manifest = Manifest(
        shards=(), num_inputs=0, num_samples=0, num_rejected=0, max_width=side, max_height=side - 1, max_bytes=0
    )
    expected = {"preallocate_width_hint": side, "preallocate_height_hint": side - 1} if hinted else {}
    assert size_hints(manifest, 256) == expected
