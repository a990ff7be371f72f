"""The DALI backend by itself. Its pixels: test_parity.py; its batches: test_loader.py; on a GPU: tests/gpu."""

import ast
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, types
from nvidia.dali.backend import TensorCPU
from nvidia.dali.pipeline import pipeline_def

from pipelines.backends.dali import _view, to_torch

ROOT = Path(__file__).parents[2]


class Recorder:
    """A DALI tensor that notes what it is asked for; its parameters are those of ToDLPack in DALI 2.4's
    dali/python/backend_impl.cc."""

    def __init__(self, tensor):
        self._tensor = tensor
        self.asked = []

    def __dlpack__(self, stream=None, dl_device=None):
        self.asked.append((stream, dl_device))
        return self._tensor.__dlpack__(stream, dl_device)


def test_no_stream_waits_for_the_next_batch_when_one_is_handed_over():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    recorder = Recorder(TensorCPU(pixels))
    shared = to_torch(recorder)
    assert recorder.asked == [(-1, None)]
    assert shared.tolist() == pixels.tolist()
    assert shared.data_ptr() == pixels.ctypes.data


def mixed_operators(tree):
    """Names of DALI operators that are called, where the call's device could be `mixed`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            devices = [keyword.value for keyword in node.keywords if keyword.arg == "device"]
            if not any(isinstance(device, ast.Constant) and device.value == "cpu" for device in devices):
                yield node.func.attr


@pytest.mark.parametrize("operator", ["image_slice", "image_crop", "image_random_crop"])
def test_no_part_of_an_image_is_decoded_on_the_gpu(operator):
    """nvImageCodec 0.9.0, which DALI 2.4 brings, fails on regions or crashes (NVIDIA/nvImageCodec issue 55).

    And JPEG engines take whole images only; two crops of MoCo need 69% of an image's pixels and 95% of its rows, so
    there is little to gain.
    """
    for folder in ("pipelines", "moco_fast", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            assert operator not in mixed_operators(ast.parse(path.read_text())), path


def test_the_search_for_such_operators_finds_them():
    found = set(mixed_operators(ast.parse("fn.decoders.image_slice(x, device='mixed'); fn.a(x, device=d)")))
    assert found == {"image_slice", "a"}
    assert not set(mixed_operators(ast.parse("fn.decoders.image_random_crop(x, device='cpu')")))


def test_the_graph_of_a_gpu_blurs_where_it_is_told_to():
    """On the CPU's operators, which have the same names: whether DALI takes the graph, and what it does with it."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 60, 60, 3), dtype=np.uint8)
    pipe = on_gpu_graph(batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    pipe.build()
    pipe.feed_input("images", pixels)
    crops = [(0, 0, 60, 60, sigma) for sigma in (0.0, 1.5, 0.0, 0.5)]
    pipe.feed_input("crop_0", np.array(crops, dtype=np.float32))
    pipe.schedule_run()
    [views] = pipe.outputs()
    left_of_noise = [views.at(row).std() / pixels[row].std() for row in range(4)]
    assert left_of_noise == pytest.approx([1.0, 0.2, 1.0, 0.6], abs=0.15)


@pipeline_def(enable_conditionals=True)
def on_gpu_graph():
    images = fn.external_source(name="images", ndim=3, dtype=types.UINT8, layout="HWC")
    return _view(images, 60, 0, blurs=True)
