import csv
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGTERM

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moco_fast.cli import main
from moco_fast.encoders.formats.base import digest_of
from moco_fast.evaluation.result import read_results
from moco_fast.interrupt import StoppedError
from moco_fast.transfer.optimizing import lr_at
from moco_fast.transfer.pixel_sets import OPEN, read_pixel_sets, read_pixels, refuse_open
from moco_fast.transfer.presets import SEGMENT_PRESETS, settled
from moco_fast.transfer.segmenting import (
    SegmenterTrainings,
    TrainingCrops,
    confusion_of,
    cropped,
)
from moco_fast.transfer.training import Machine, Start
from pipelines.world import World
from tests.moco_fast.transfer.pixel_shapes import COLORS, write_cityscapes, write_voc_pixels
from tests.moco_fast.transfer.tiny import tiny_resnet, tiny_vit

CPU = torch.device("cpu")
TINY_PIXELS = replace(SEGMENT_PRESETS["voc-semantic"], batch_size=4, steps=6, lr=0.05, crop=48, scales=(0.8, 1.5))


def two_sets(folder: Path, *, train: int, test: int):
    write_voc_pixels(folder / "VOC2012", {"train_aug": train, "val": test})
    return read_pixel_sets([str(folder)], TINY_PIXELS)


def trainings(folder: Path, sets, preset=TINY_PIXELS, machine=None) -> SegmenterTrainings:
    folder.mkdir(exist_ok=True)
    machine = machine or Machine(device=CPU, threads=2)
    more = {"folder": folder, "every_steps": 500, "num_trainings": 1, "at_most_damaged": 0.1}
    return SegmenterTrainings(*sets, preset, machine, **more)


VIT_PIXELS = settled(TINY_PIXELS, {"optimizer": "adamw", "head": "deeplabv3", "lr": 1e-3, "warmup_steps": 0})


def start(build=tiny_resnet) -> Start:
    encoder = build()
    return Start(name="tiny", encoder=encoder, digest=digest_of(encoder))


def test_classes_of_voc_are_those_of_the_palette(tmp_path) -> None:
    train, test = two_sets(tmp_path, train=4, test=2)
    assert (len(train), len(test), len(train.class_names)) == (4, 2, 21)
    assert {image.classes.parent.name for image in train.images} == {"SegmentationClass", "SegmentationClassAug"}
    image, classes = read_pixels(train.images[1], train.table)
    assert set(np.unique(classes)) <= {0, 1, 2, 3, OPEN}
    pixels = np.asarray(image)
    for number, color in COLORS.items():
        if (classes == number).sum() > 50:
            assert np.abs(pixels[classes == number].mean(axis=0) - color).max() < 12


def test_classes_of_cityscapes_are_those_that_count(tmp_path) -> None:
    preset = replace(TINY_PIXELS, layout="cityscapes", train=("train",), test=("val",))
    write_cityscapes(tmp_path, {"train": 3, "val": 2})
    train, test = read_pixel_sets([str(tmp_path)], preset)
    assert (len(train), len(test)) == (3, 2)
    assert [train.class_names[number] for number in (0, 8, 10, 13)] == ["road", "vegetation", "sky", "car"]
    _, classes = read_pixels(train.images[0], train.table)
    assert set(np.unique(classes)) <= {0, 8, 10, 13, OPEN}
    (tmp_path / "gtFine" / "val" / "town" / "town_000001_000019_gtFine_labelIds.png").unlink()
    test = read_pixel_sets([str(tmp_path)], preset)[1]
    assert [(each.key, each.reason) for each in test.malformed] == [
        ("val/town_000001_000019", "has no classes of pixels")
    ]
    with pytest.raises(ValueError, match="there must be one leftImg8bit/test"):
        read_pixel_sets([str(tmp_path)], replace(preset, test=("test",)))


def test_a_crop_is_cut_where_it_is_drawn_and_filled_beyond_the_image() -> None:
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
    classes = torch.arange(48, dtype=torch.uint8).view(6, 8)
    options = {"is_mirrored": False, "fill": (1, 2, 3)}
    pixels, target = cropped(image, classes, 4, place=(0.0, 0.999), **options)
    assert torch.equal(target, classes[:4, 4:])
    assert torch.equal(pixels, image[:, :4, 4:])
    mirrored = cropped(image, classes, 4, place=(0.0, 0.999), is_mirrored=True, fill=(1, 2, 3))
    assert torch.equal(mirrored[1], classes[:4, 4:].flip(1))
    assert torch.equal(mirrored[0], image[:, :4, 4:].flip(2))
    pixels, target = cropped(image, classes, 7, place=(0.5, 0.0), **options)
    assert torch.equal(target[:6], classes[:, :7])
    assert target[6].eq(OPEN).all()
    assert pixels[:, 6, 0].tolist() == [1, 2, 3]


def batches_of(data, world=None, *, first: int = 0, num: int = 4):
    more = {"world": world or World(), "threads": 2, "at_most_damaged": 0.2}
    with TrainingCrops(data, TINY_PIXELS, fill=(10, 20, 30), seed=1, **more) as crops:
        stream = crops.batches(first)
        found = [next(stream) for _ in range(num)]
        return torch.cat([each.images for each in found]), torch.cat([each.targets for each in found]), crops.damaged


def test_crops_do_not_depend_on_ranks_or_where_they_begin(tmp_path) -> None:
    data = two_sets(tmp_path, train=9, test=1)[0]
    images, targets, _ = batches_of(data)
    later = batches_of(data, first=2, num=2)
    assert torch.equal(later[0], images[8:])
    assert torch.equal(later[1], targets[8:])
    of_ranks = [batches_of(data, World(rank=rank, world_size=2, local_world_size=2)) for rank in range(2)]
    shared = torch.stack([each[0].view(4, 2, *images.shape[1:]) for each in of_ranks], dim=1).flatten(0, 2)
    assert torch.equal(shared, images)


def test_a_damaged_image_is_replaced_and_too_many_are_refused(tmp_path, capsys) -> None:
    data = two_sets(tmp_path, train=9, test=1)[0]
    Image.new("L", (3, 3)).save(data.images[2].classes)
    assert list(batches_of(data, num=12)[2]) == [data.images[2].key]
    assert "is of another size than its image" in capsys.readouterr().err
    for image in data.images[3:6]:
        image.image.write_bytes(b"")
    with pytest.raises(ValueError, match="more than --max-malformed allows"):
        batches_of(data, num=12)


class Fixed(nn.Module):
    """Names every pixel by its color."""

    def forward(self, images):
        colors = torch.tensor([(125, 125, 125), *COLORS.values()]).float()
        scores = -(images[:, None].float() - colors[None, :, :, None, None]).square().sum(2)
        return torch.cat([scores, scores.new_full((len(scores), 17, *scores.shape[2:]), -1e9)], dim=1)


def test_intersection_over_union_is_that_of_sets_of_pixels(tmp_path) -> None:
    sets = two_sets(tmp_path, train=1, test=3)
    data = sets[1]
    training = trainings(tmp_path / "out", sets)
    with training:
        tested = training.measure(Fixed())
    figures, rows = tested.figures, tested.by_class
    found, wanted = [], []
    for number, each in enumerate(data.images):
        image, classes = read_pixels(each, data.table)
        named = Fixed()(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0].argmax(0).numpy()
        found.append(named[classes != OPEN])
        wanted.append(classes[classes != OPEN])
        of_image = [
            ((found[-1] == label) & (wanted[-1] == label)).sum() / ((found[-1] == label) | (wanted[-1] == label)).sum()
            for label in np.union1d(found[-1], wanted[-1])
        ]
        assert tested.gallery.images[number].value == pytest.approx(np.mean(of_image))
    found, wanted = np.concatenate(found), np.concatenate(wanted)
    overlaps = {
        number: ((found == number) & (wanted == number)).sum() / ((found == number) | (wanted == number)).sum()
        for number in np.union1d(found, wanted)
    }
    assert tested.num_untested == 0
    assert figures["mIoU"] == pytest.approx(np.mean(list(overlaps.values())))
    assert figures["accuracy"] == pytest.approx((found == wanted).mean())
    assert [row["IoU"] for row in rows] == pytest.approx(list(overlaps.values()))
    assert 0.5 < figures["mIoU"] < 1


def counted_by_ranks(folder):
    data = read_pixel_sets([folder], TINY_PIXELS)[1]
    rank = torch.distributed.get_rank()
    machine = Machine(device=CPU, world=World(rank=rank, world_size=2, local_world_size=2), threads=1)
    return confusion_of(Fixed(), data, machine, stop=lambda _: None)


def test_ranks_share_a_test(tmp_path, run_ranks) -> None:
    data = two_sets(tmp_path, train=1, test=3)[1]
    broken = data.images[1].image
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    alone, values, num_untested = confusion_of(Fixed(), data, Machine(device=CPU), stop=lambda _: None)
    of_ranks = run_ranks(counted_by_ranks, str(tmp_path))
    assert [number for *_, number in of_ranks] == [0, 1]
    assert num_untested == 1
    assert values.isnan().tolist() == [False, True, False]
    for counts, of_images, _ in of_ranks:
        assert torch.equal(counts, alone)
        torch.testing.assert_close(of_images, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("build", "preset"), [(tiny_resnet, TINY_PIXELS), (tiny_vit, VIT_PIXELS)])
def test_a_stopped_training_of_pixels_goes_on_to_the_same_bits(tmp_path, monkeypatch, build, preset) -> None:
    sets = two_sets(tmp_path, train=9, test=2)
    with trainings(tmp_path / "whole", sets, preset) as whole:
        wanted = whole.run(start(build), seed=1)
    for num_polls in (2, 4 + 1):  # In training, and with the first test image.
        with trainings(tmp_path / "stopped", sets, preset) as stopped:
            left = iter([0] * (num_polls - 1) + [SIGTERM])
            monkeypatch.setattr(stopped._stop, "poll", left.__next__)
            with pytest.raises(StoppedError):
                stopped.run(start(build), seed=1)
    with trainings(tmp_path / "stopped", sets, preset) as last:
        assert asdict(last.run(start(build), seed=1)) == asdict(wanted)
    files = [next((tmp_path / name / "trained").iterdir()) for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("build", "given"),
    [(tiny_resnet, {}), (tiny_vit, {"optimizer": "adamw", "lr": 5e-3, "warmup_steps": 5})],
)
def test_a_tiny_network_learns_to_name_pixels(tmp_path, build, given) -> None:
    preset = settled(TINY_PIXELS, given, steps=40)
    sets = two_sets(tmp_path, train=20, test=4)
    with trainings(tmp_path / "out", sets, preset) as learning:
        found = learning.run(start(build), seed=3)
    losses = [loss for _, loss in found.curve]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    # Of four classes that are there, guessing the background alone gives less than 0.2.
    assert found.figures["mIoU"] > 0.4


def test_schedules_of_segmentation_are_those_of_the_paper() -> None:
    voc, cityscapes = SEGMENT_PRESETS["voc-semantic"], SEGMENT_PRESETS["cityscapes-semantic"]
    steps = (0, 20_999, 21_000, 26_999, 27_000)
    assert [lr_at(voc, step) for step in steps] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5])
    assert (voc.steps, voc.crop, voc.batch_size, voc.weight_decay) == (30_000, 513, 16, 1e-4)
    assert (cityscapes.steps, cityscapes.crop, cityscapes.lr) == (90_000, 769, 0.01)


@pytest.mark.parametrize("preset", SEGMENT_PRESETS)
def test_presets_of_segmentation_take_two_steps_and_are_tested(preset, tmp_path, capsys) -> None:
    if preset == "voc-semantic":
        write_voc_pixels(tmp_path / "data" / "VOC2012", {"train_aug": 4, "val": 2})
    else:
        write_cityscapes(tmp_path / "data", {"train": 4, "val": 2})
    words = ["--data", str(tmp_path / "data"), "--init", "random", "--network", "resnet18_quarter"]
    words += ["--preset", preset, "--out", str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]
    assert main(["transfer", "segment", *words, "--batch-size", "2", "--steps", "2", "--crop", "33"]) == 0
    assert f"segment {preset}  mIoU" in capsys.readouterr().out
    [result] = read_results(tmp_path / "out" / "results.json")
    assert list(result.figures) == ["mIoU", "accuracy"]
    rows = list(csv.DictReader((tmp_path / "out" / "per-class.csv").read_text().splitlines()))
    assert list(rows[0]) == ["preset", "init", "seed", "training", "class", "pixels", "IoU"]


def test_a_test_set_without_a_pixel_that_counts_is_refused_before_the_training(tmp_path, capsys) -> None:
    data = write_cityscapes(tmp_path / "data", {"train": 2, "test": 2})
    labels = sorted((data / "gtFine" / "test").rglob("*.png"))
    for path in labels:
        Image.new("L", (64, 48)).save(path)
    words = ["--preset", "cityscapes-semantic", "--test", "test", "--steps", "1"]
    assert pixels(tmp_path, *words) == 2
    assert "no pixel of" in (told := capsys.readouterr().err)
    assert "Cityscapes' test images" in told
    assert not (tmp_path / "out").exists()
    Image.new("L", (64, 48), 7).save(labels[1])
    refuse_open(read_pixel_sets([str(data)], replace(SEGMENT_PRESETS["cityscapes-semantic"], test=("test",)))[1])


def pixels(folder: Path, *words: str) -> int:
    given = [
        "--data",
        str(folder / "data"),
        "--init",
        "random",
        "--preset",
        "voc-semantic",
        "--out",
        str(folder / "out"),
    ]
    return main(["transfer", "segment", *given, "--device", "cpu", "--threads", "1", "--batch-size", "2", *words])


def test_a_vision_transformer_names_pixels_by_adamw_alone(tmp_path, capsys) -> None:
    write_voc_pixels(tmp_path / "data" / "VOC2012", {"train_aug": 4, "val": 2})
    vit = ["--network", "vit_tiny_patch16_224", "--steps", "2", "--crop", "40"]
    assert pixels(tmp_path, *vit) == 2
    assert "give --optimizer adamw" in capsys.readouterr().err
    assert pixels(tmp_path, *vit, "--optimizer", "adamw", "--head", "deeplabv3") == 0
    [result] = read_results(tmp_path / "out" / "results.json")
    settings = {name: result.settings[name] for name in ("optimizer", "lr", "layer_decay", "head")}
    assert settings == {"optimizer": "adamw", "lr": 1e-4 / 8, "layer_decay": 0.65, "head": "deeplabv3"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--head", "deeplabv3", "--batch-size", "1"], "normalizes one value per image"),
        (["--layer-decay", "1.5"], "--layer-decay is 1.5, so the first layers would change most"),
        (["--warmup-steps", "-1"], "--warmup-steps is -1, but must be 0 or more"),
        (["--weight-decay", "-0.5"], "--weight-decay is -0.5, but must be 0 or more"),
    ],
)
def test_how_steps_cannot_be_taken_is_said_before_any(tmp_path, capsys, words, message) -> None:
    write_voc_pixels(tmp_path / "data" / "VOC2012", {"train_aug": 2, "val": 1})
    assert pixels(tmp_path, "--network", "resnet18_quarter", *words) == 2
    assert message in capsys.readouterr().err


BROKEN = {
    "is of another size than its classes of pixels": lambda image, classes: Image.new("L", (3, 3)).save(classes),
    "has classes of pixels in mode RGB, where numbers have P or L": lambda image, classes: Image.new(
        "RGB", (64, 48)
    ).save(classes),
    "has classes of pixels that are no image": lambda image, classes: classes.write_bytes(b""),
    "has no classes of pixels": lambda image, classes: classes.unlink(),
    "is no image": lambda image, classes: image.write_bytes(b""),
    "has more than 8 bits per channel: convert it to 8": lambda image, classes: Image.new("I;16", (64, 48)).save(
        image, format="PNG"
    ),
    "has no image": lambda image, classes: image.unlink(),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_what_cannot_be_used_is_found_before_the_training(tmp_path, reason) -> None:
    found = two_sets(tmp_path, train=2, test=3)[1].images[1]
    BROKEN[reason](found.image, found.classes)
    again = read_pixel_sets([str(tmp_path)], TINY_PIXELS)[1]
    assert [(each.key, each.reason) for each in again.malformed] == [(found.key, reason)]
    assert len(again) == 2


@pytest.mark.parametrize(("number", "is_known"), [(20, True), (21, False), (254, False), (255, True)])
def test_classes_that_voc_does_not_have_are_not_passed_over(tmp_path, number, is_known) -> None:
    data = two_sets(tmp_path, train=2, test=1)[1]
    Image.fromarray(np.full((48, 64), number, np.uint8)).save(data.images[0].classes)
    if is_known:
        assert set(read_pixels(data.images[0], data.table)[1].ravel()) == {number}
        return
    with pytest.raises(OSError, match=rf"has pixels of class {number}, which its layout does not have"):
        read_pixels(data.images[0], data.table)


def test_lists_of_deeplab_have_paths(tmp_path) -> None:
    before = two_sets(tmp_path, train=3, test=1)[0]
    path = tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / "train_aug.txt"
    names = path.read_text().split()
    path.write_text("".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names))
    assert read_pixel_sets([str(tmp_path)], TINY_PIXELS)[0].images == before.images


def test_a_part_without_images_is_refused(tmp_path) -> None:
    preset = replace(TINY_PIXELS, layout="cityscapes", train=("train",), test=("val",))
    write_cityscapes(tmp_path, {"train": 1})
    (tmp_path / "leftImg8bit" / "val").mkdir()
    with pytest.raises(ValueError, match=r"--test val: .* has no"):
        read_pixel_sets([str(tmp_path)], preset)
    write_voc_pixels(tmp_path / "VOC2012", {"train_aug": 1, "val": 0})
    with pytest.raises(ValueError, match=r"val\.txt names no image"):
        read_pixel_sets([str(tmp_path)], TINY_PIXELS)


def test_a_test_of_damaged_images_gives_no_figure(tmp_path) -> None:
    sets = two_sets(tmp_path, train=9, test=4)
    broken = sets[1].images[1].image
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with (
        trainings(tmp_path / "out", sets, replace(TINY_PIXELS, steps=1)) as training,
        pytest.raises(ValueError, match=r"1 of 4 images of .* cannot be decoded, more than --max-malformed"),
    ):
        training.run(start(), seed=1)
    assert not (tmp_path / "out" / "trained").exists()
    for each in sets[1].images:
        Image.new("L", (64, 48), OPEN).save(each.classes)
    with (
        trainings(tmp_path / "open", sets, replace(TINY_PIXELS, steps=1)) as training,
        pytest.raises(ValueError, match="nothing to measure"),
    ):
        training.run(start(), seed=1)


def test_a_training_that_diverges_gives_no_figure_and_keeps_no_state(tmp_path) -> None:
    sets = two_sets(tmp_path, train=9, test=1)
    with (
        trainings(tmp_path / "out", sets, replace(TINY_PIXELS, lr=1e30)) as training,
        pytest.raises(ValueError, match=r"not a number after step .*: the training diverged.* --lr than 1e\+30"),
    ):
        training.run(start(), seed=1)
    assert list((tmp_path / "out").rglob("step-*")) == []


def test_scales_that_cannot_be_are_refused(tmp_path, capsys) -> None:
    words = ["--data", str(tmp_path), "--init", "random", "--out", str(tmp_path / "out"), "--scales", "2", "1"]
    assert main(["transfer", "segment", *words]) == 2
    assert "--scales 2 1: give two above 0" in capsys.readouterr().err
