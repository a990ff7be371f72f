"""Decoding for training on a device: here DALI decodes on the CPU, and all around it is as on a GPU."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from moco_fast.transfer.device_decoding import DeviceDecoder, is_plain, open_decoder
from moco_fast.transfer.layouts import read_sets
from moco_fast.transfer.loader import TrainingImages, augmented
from pipelines.world import World
from tests.moco_fast.transfer.shapes import write_year
from tests.moco_fast.transfer.test_packed import odd_images
from tests.moco_fast.transfer.tiny import TINY
from tests.shards.pictures import encoded, picture

CPU = torch.device("cpu")
WORLD = World(rank=0, world_size=1, local_world_size=1)


def test_pixels_are_close_to_those_of_pillow() -> None:
    pictures = [picture(seed, 96, 72) for seed in range(3)] + [picture(3, 60, 90).convert("L")]
    decoder = DeviceDecoder(CPU, batch_size=5)
    sizes = [(48, 64), (108, 144), (72, 96), (120, 80)]
    data = [encoded(each, quality=95) for each in pictures]
    for flips in ([False] * 4, [True, False, True, True]):
        found = decoder.resized(data, sizes, flips)
        for image, of_file, size, is_mirrored in zip(found, data, sizes, flips, strict=True):
            assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, *size))
            own = v2.resize(Image.open(io.BytesIO(of_file)).convert("RGB"), list(size))
            wanted = v2.pil_to_tensor(v2.horizontal_flip(own) if is_mirrored else own)
            difference = (image.int() - wanted.int()).abs()
            assert difference.float().mean() < 0.5
            assert difference.max() <= 3
    # A smaller batch, as of fewer plain images.
    assert len(decoder.resized(data[:1], sizes[:1], [False])) == 1


def test_only_what_every_decoder_reads_alike_is_left_to_a_device() -> None:
    image = picture(0, 64, 48)
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = encoded(image)
    kinds = {
        "plain": plain,
        "gray": encoded(image.convert("L")),
        "4:4:4": encoded(image, subsampling=0),
        "cmyk": encoded(image.convert("CMYK")),
        "progressive": encoded(image, progressive=True),
        "turned": encoded(image, exif=turned),
        "png": encoded(image, "PNG"),
        "cut": plain[: len(plain) // 2],
        "no end": plain[:-2],
        "empty": b"",
        "header alone": plain[:20],
    }
    assert {name for name, data in kinds.items() if is_plain(data, (64, 48))} == {"plain", "gray", "4:4:4"}
    assert not is_plain(plain, (48, 64))


def batches_of(data, decoder, *, steps: int = 6):
    preset = replace(TINY, batch_size=2, group=1)
    more = {"world": WORLD, "threads": 2, "at_most_damaged": 0.5}
    with TrainingImages(data, preset, seed=2, decoder=decoder, **more) as images:
        stream = images.batches(0)
        return [next(stream) for _ in range(steps)], images.damaged


@pytest.fixture
def odd_year(tmp_path):
    write_year(tmp_path / "VOC2007", {"trainval": 14, "test": 1})
    odd_images(tmp_path / "VOC2007")
    return read_sets([str(tmp_path)], TINY, class_names=None)[0].with_boxes


class Counting(DeviceDecoder):
    """Counts what it decodes; with `fails`, it decodes nothing, as a GPU with a broken driver."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(CPU, batch_size=2)
        self.num_decoded, self._fails = 0, fails

    def resized(self, encoded, sizes, mirrored):
        if self._fails:
            raise RuntimeError("Critical error when executing the operator decoders__Image")
        self.num_decoded += len(encoded)
        return super().resized(encoded, sizes, mirrored)


def test_images_order_targets_and_replacements_are_those_of_the_cpu(odd_year) -> None:
    wanted, damaged = batches_of(odd_year, None)
    decoder = Counting()
    found, also_damaged = batches_of(odd_year, decoder)
    assert list(also_damaged) == list(damaged)
    assert len(damaged) == 1
    num_alike = 0
    for one, other in zip(wanted, found, strict=True):
        for target, same in zip(one.targets, other.targets, strict=True):
            assert all(torch.equal(target[name], same[name]) for name in target)
        for image, same in zip(one.images, other.images, strict=True):
            assert image.shape == same.shape
            assert (image.int() - same.int()).abs().float().mean() < 0.6
            num_alike += torch.equal(image, same)
    # Those that are turned, progressive, CMYK or PNG were decoded by Pillow.
    assert num_alike >= 3
    assert decoder.num_decoded >= 4


def test_what_a_device_fails_at_is_decoded_on_the_cpu(odd_year) -> None:
    wanted, damaged = batches_of(odd_year, None)
    found, also_damaged = batches_of(odd_year, Counting(fails=True))
    assert damaged == also_damaged
    for one, other in zip(wanted, found, strict=True):
        assert all(torch.equal(image, same) for image, same in zip(one.images, other.images, strict=True))


def test_a_failure_of_dali_leaves_a_decoder_that_works() -> None:
    decoder = DeviceDecoder(CPU, batch_size=2)
    with pytest.raises(RuntimeError):
        decoder.resized([b"\xff\xd8\xff nothing"], [(8, 8)], [False])
    [image] = decoder.resized([encoded(picture())], [(8, 8)], [False])
    assert image.shape == (3, 8, 8)


def test_where_no_gpu_decodes_the_cpu_does(monkeypatch, capsys) -> None:
    assert open_decoder(CPU, batch_size=2) is None
    assert capsys.readouterr().err == ""

    def refuse(device):
        raise RuntimeError("the driver is too old\nand more")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    assert open_decoder(torch.device("cuda"), batch_size=2) is None
    assert "note: images are decoded on the CPU: DALI does not decode on cuda (the driver is too old)" in (
        capsys.readouterr().err
    )


def test_pixels_of_the_cpu_are_those_of_torchvisions_own_steps(odd_year) -> None:
    found = odd_year.images[-1]
    for is_mirrored in (False, True):
        image, _ = augmented(found, side=56, longest=96, is_mirrored=is_mirrored)
        resized = v2.resize(Image.open(found.path).convert("RGB"), list(image.shape[1:]))
        wanted = v2.pil_to_tensor(v2.horizontal_flip(resized) if is_mirrored else resized)
        assert torch.equal(image, wanted)
        # In the same memory format, on which the sums of convolutions depend.
        assert image.stride() == wanted.stride()
