import json
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGTERM

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from moco_fast.encoders.formats.base import digest_of
from moco_fast.interrupt import StoppedError
from moco_fast.transfer.detecting import DetectorTrainings, find_all, values
from moco_fast.transfer.loader import HeldOutImages, TrainingImages
from moco_fast.transfer.metrics import voc_precision
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.precise import set_precise_statistics
from moco_fast.transfer.training import Machine, Start
from pipelines.world import World
from tests.moco_fast.transfer.tiny import TINY, tiny_resnet, two_sets

CPU = torch.device("cpu")


def start() -> Start:
    encoder = tiny_resnet()
    return Start(name="tiny", encoder=encoder, digest=digest_of(encoder))


def trainings(folder: Path, sets, preset=TINY, *, machine=None, every_steps: int = 500) -> DetectorTrainings:
    machine = machine or Machine(device=CPU, threads=2)
    folder.mkdir(exist_ok=True)
    return DetectorTrainings(
        *sets, preset, machine, folder=folder, every_steps=every_steps, num_trainings=1, at_most_damaged=0.1
    )


def detector_file(folder: Path) -> bytes:
    [path] = (folder / "trained").iterdir()
    assert path.name.startswith("tiny-seed-3-")
    return path.read_bytes()


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, monkeypatch) -> None:
    sets = two_sets(tmp_path, train=14, test=3)
    with trainings(tmp_path / "whole", sets) as whole:
        wanted = whole.run(start(), seed=3)
    # Polls of a start until it is stopped: in step 2, with the first batch of statistics, with the second test image.
    for num_polls in (2, 4 + 1, 2 + 2):
        with trainings(tmp_path / "stopped", sets) as stopped:
            left = iter([0] * (num_polls - 1) + [SIGTERM])
            monkeypatch.setattr(stopped._stop, "poll", left.__next__)
            with pytest.raises(StoppedError):
                stopped.run(start(), seed=3)
    with trainings(tmp_path / "stopped", sets) as last:
        found = last.run(start(), seed=3)
    assert asdict(found) == asdict(wanted)
    assert detector_file(tmp_path / "stopped") == detector_file(tmp_path / "whole")
    with trainings(tmp_path / "stopped", sets) as known:
        assert asdict(known.run(start(), seed=3)) == asdict(wanted)


@pytest.mark.long
def test_a_tiny_detector_learns_shapes(tmp_path) -> None:
    preset = replace(TINY, steps=120, lr=0.05, warmup_steps=10, sides=(64,), precise_batches=8)
    sets = two_sets(tmp_path, preset, train=100, test=20)
    with trainings(tmp_path / "out", sets, preset) as learning:
        found = learning.run(start(), seed=3)
    losses = [loss for _, loss in found.curve]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    untrained = build_detector(tiny_resnet(), preset, num_classes=3, seed=3)
    chance, _ = find_all(untrained, sets[1], preset, Machine(device=CPU), stop=lambda _: None)
    assert np.mean([each.at[0] for each in voc_precision(chance, sets[1])]) < 0.05
    assert found.figures["AP50"] > 0.4


def test_a_detector_that_diverges_gives_no_figure(tmp_path) -> None:
    sets = two_sets(tmp_path, train=14, test=3)
    with (
        trainings(tmp_path / "out", sets, replace(TINY, lr=1e30, warmup_steps=0)) as training,
        pytest.raises(ValueError, match="the training diverged"),
    ):
        training.run(start(), seed=3)
    # Also where the last update was the first one that made weights of no numbers.
    with (
        trainings(tmp_path / "out", sets, replace(TINY, lr=float("inf"), warmup_steps=0, steps=1)) as training,
        pytest.raises(ValueError, match="a weight is not a number after step 1"),
    ):
        training.run(start(), seed=3)


def test_trainings_with_other_options_keep_their_networks_apart(tmp_path) -> None:
    sets = two_sets(tmp_path, train=14, test=3)
    for lr in (0.01, 0.02):
        with trainings(tmp_path / "out", sets, replace(TINY, steps=1, lr=lr)) as training:
            training.run(start(), seed=3)
    folders = [{path.stem for path in (tmp_path / "out" / name).glob("*.*s*")} for name in ("trained", "trainings")]
    assert folders[0] == folders[1]
    assert len(folders[0]) == 2


def test_a_trained_detector_can_be_opened_again(tmp_path) -> None:
    sets = two_sets(tmp_path, train=14, test=3)
    with trainings(tmp_path / "out", sets, replace(TINY, steps=2)) as training:
        found = training.run(start(), seed=3)
    [path] = (tmp_path / "out" / "trained").iterdir()
    detector = build_detector(tiny_resnet(5), TINY, num_classes=3, seed=9)
    detector.load_state_dict(load_file(path))
    again, _ = find_all(detector.eval(), sets[1], TINY, Machine(device=CPU), stop=lambda _: None)
    figures = {name: np.mean([values(each)[name] for each in voc_precision(again, sets[1])]) for name in found.figures}
    assert figures == pytest.approx(found.figures)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["moco_fast"])["classes"] == ["bus", "car", "cat"]


def on_two_ranks(folder):
    sets = two_sets_of(folder)
    world = World(rank=torch.distributed.get_rank(), world_size=2, local_world_size=2)
    machine = Machine(device=CPU, world=world, threads=1)
    with trainings(Path(folder) / "out", sets, replace(TINY, steps=2), machine=machine) as training:
        found = training.run(start(), seed=3)
    detector = build_detector(tiny_resnet(), TINY, num_classes=3, seed=1)
    return found.figures, find_all(detector, sets[1], TINY, machine, stop=lambda _: None)


def two_sets_of(folder):
    from moco_fast.transfer.voc import find_parts, read_voc
    from tests.moco_fast.transfer.shapes import COLORS

    return [
        read_voc(find_parts([str(folder)], names, option=""), class_names=tuple(COLORS))
        for names in (TINY.train, TINY.test)
    ]


def test_ranks_share_training_and_test(tmp_path, run_ranks) -> None:
    sets = two_sets(tmp_path, train=14, test=5)
    (first, found), (second, again) = run_ranks(on_two_ranks, str(tmp_path))
    assert first == second
    detector = build_detector(tiny_resnet(), TINY, num_classes=3, seed=1)
    alone, num_untested = find_all(detector, sets[1], TINY, Machine(device=CPU), stop=lambda _: None)
    assert num_untested == found[1] == again[1] == 0
    order = np.argsort(found[0].image, kind="stable")
    for name in ("image", "boxes", "classes", "scores"):
        value = getattr(alone, name)
        np.testing.assert_allclose(getattr(found[0], name)[order], value, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(getattr(found[0], name), getattr(again[0], name))


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path) -> None:
    sets = two_sets(tmp_path, train=4, test=1)
    machine = Machine(device=CPU, world=World(rank=0, world_size=3, local_world_size=3))
    with pytest.raises(ValueError, match="--batch-size 4 is not a multiple of the 3 ranks"):
        trainings(tmp_path / "out", sets, machine=machine)


def batches_of(data, world=None, *, first: int = 0, num: int = 4, threads: int = 2):
    images = TrainingImages(data, TINY, seed=1, world=world or World(), threads=threads, at_most_damaged=0.2)
    with images:
        stream = images.batches(first)
        found = [next(stream) for _ in range(num)]
        return [each for batch in found for each in zip(batch.images, batch.targets, strict=True)], images.damaged


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(image, other) and all(torch.equal(target[name], others[name]) for name in target)
        for (image, target), (other, others) in zip(ours, theirs, strict=True)
    )


def test_batches_do_not_depend_on_ranks_threads_or_where_they_begin(tmp_path) -> None:
    data = two_sets(tmp_path, train=14, test=1)[0]
    whole, _ = batches_of(data)
    assert same(batches_of(data, first=2, num=2)[0], whole[8:])
    assert same(batches_of(data, threads=1)[0], whole)
    of_ranks = [batches_of(data, World(rank=rank, world_size=2, local_world_size=2))[0] for rank in range(2)]
    shared = [each for step in range(4) for of_rank in of_ranks for each in of_rank[2 * step : 2 * step + 2]]
    assert same(shared, whole)
    shapes = {image.shape for image, _ in whole}
    assert {min(shape[1:]) for shape in shapes} == set(TINY.sides)


def test_boxes_stay_on_what_they_mark(tmp_path) -> None:
    """The pixels within a box have its class's color, wherever mirroring and resizing take it."""
    from tests.moco_fast.transfer.shapes import COLORS

    data = two_sets(tmp_path, train=14, test=1)[0]
    colors = torch.tensor(list(COLORS.values())).float()
    found, _ = batches_of(data)
    for image, target in found:
        for (left, top, right, bottom), label in zip(
            target["boxes"].round().int().tolist(), target["labels"], strict=True
        ):
            # The middle of the shape, which is within an ellipse too.
            x, y = (left + right) // 2, (top + bottom) // 2
            middle = image[:, y - 2 : y + 3, x - 2 : x + 3].float().mean(dim=(1, 2))
            assert (colors - middle).norm(dim=1).argmin() == label - 1
            assert 0 <= left < right <= image.shape[2]
            assert 0 <= top < bottom <= image.shape[1]


def test_a_damaged_image_is_replaced_by_one_of_its_kind_and_counted(tmp_path, capsys) -> None:
    data = two_sets(tmp_path, train=14, test=2)[0]
    broken = data.images[3]
    broken.path.write_bytes(broken.path.read_bytes()[:200])
    found, damaged = batches_of(data, num=12)
    assert list(damaged) == [broken.key]
    assert f"{broken.key} of {data.where} cannot be decoded" in capsys.readouterr().err
    lies = [image.shape[2] > image.shape[1] for image, _ in found]
    assert lies[::2] == lies[1::2]
    for image in data.images[4:7]:
        image.path.write_bytes(b"")
    with pytest.raises(ValueError, match="more than --max-malformed allows"):
        batches_of(data, num=12)


def test_too_few_images_for_a_batch_are_refused(tmp_path) -> None:
    data = two_sets(tmp_path, train=2, test=1)[0]
    with pytest.raises(ValueError, match="too few for a batch of 4"):
        batches_of(data)


def test_a_damaged_test_image_has_no_detections(tmp_path) -> None:
    test = two_sets(tmp_path, train=2, test=3)[1]
    test.images[1].path.write_bytes(b"\xff\xd8")
    detector = build_detector(tiny_resnet(), TINY, num_classes=3, seed=1)
    found, num_untested = find_all(detector, test, TINY, Machine(device=CPU), stop=lambda _: None)
    assert num_untested == 1
    assert set(found.image) == {0, 2}


def test_test_images_are_in_the_size_of_the_test_and_say_the_way_back(tmp_path) -> None:
    test = two_sets(tmp_path, train=1, test=4)[1]
    preset = replace(TINY, test_side=80, longest=100)
    for each in HeldOutImages(test, preset, world=World(), threads=1):
        height, width = each.image.shape[1:]
        found = test.images[each.number]
        assert (width * each.scale[0], height * each.scale[1]) == pytest.approx((found.width, found.height))
        assert max(height, width) == 100


def test_precise_statistics_are_means_over_batches() -> None:
    layer = torch.nn.BatchNorm2d(3, momentum=0.2).train()
    batches = list(torch.randn(4, 5, 3, 2, 2))
    set_precise_statistics(layer, (lambda batch=batch: layer(batch) for batch in batches))
    torch.testing.assert_close(layer.running_mean, torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0))
    assert layer.momentum == 0.2
