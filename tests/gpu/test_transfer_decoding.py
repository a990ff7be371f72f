"""Training images of detectors, decoded and resized on the device, against Pillow's."""

import pytest
import torch

from moco_fast.transfer.device_decoding import DeviceDecoder, open_decoder
from moco_fast.transfer.layouts import read_sets
from moco_fast.transfer.loader import TrainingImages
from pipelines.world import World
from tests.moco_fast.transfer.shapes import write_year
from tests.moco_fast.transfer.tiny import TINY

pytestmark = pytest.mark.gpu


def batches_of(data, decoder, device):
    world = World(rank=0, world_size=1, local_world_size=1)
    more = {"world": world, "threads": 2, "at_most_damaged": 0.0}
    with TrainingImages(data, TINY, seed=2, decoder=decoder, **more) as images:
        stream = images.batches(0)
        return [next(stream).to(device) for _ in range(8)]


def test_images_are_those_of_the_cpu_but_for_rounding(device, tmp_path):
    write_year(tmp_path / "VOC2007", {"trainval": 14, "test": 1})
    data = read_sets([str(tmp_path)], TINY, class_names=None)[0]
    decoder = open_decoder(device, batch_size=TINY.batch_size) or DeviceDecoder(device, batch_size=TINY.batch_size)
    found, wanted = batches_of(data, decoder, device), batches_of(data, None, device)
    for one, other in zip(found, wanted, strict=True):
        for target, same in zip(one.targets, other.targets, strict=True):
            assert all(torch.equal(target[name], same[name]) for name in target)
        for image, same in zip(one.images, other.images, strict=True):
            assert image.device.type == same.device.type
            difference = (image.int() - same.int()).abs().float()
            assert difference.mean() < 1
            assert difference.max() <= 24


def test_a_device_gives_a_decoder(device):
    assert (open_decoder(device, batch_size=2) is not None) == (device.type == "cuda")
