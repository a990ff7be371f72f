import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGTERM

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moco_fast.cli import main
from moco_fast.encoders.formats.base import digest_of
from moco_fast.evaluation.published import beside_published
from moco_fast.evaluation.result import read_results
from moco_fast.interrupt import StoppedError
from moco_fast.transfer.coco import coco_precision, read_coco
from moco_fast.transfer.detecting import DetectorTrainings, find_all
from moco_fast.transfer.layouts import learned, read_sets, refuse_unmarked
from moco_fast.transfer.loader import TrainingImages, augmented
from moco_fast.transfer.metrics import OVERLAPS, Detections
from moco_fast.transfer.network import build_detector
from moco_fast.transfer.training import Machine, Start
from pipelines.world import World
from tests.moco_fast.transfer.people import CORNERS, PERSON, TINY_KEYPOINTS, a_person, narrow, write_people
from tests.moco_fast.transfer.tiny import tiny_resnet

CPU = torch.device("cpu")


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return write_people(tmp_path / "people", {"train2017": 6, "val2017": 3})


@pytest.fixture
def one_person(tmp_path: Path) -> Path:
    return write_people(tmp_path / "one", {"val2017": 1})


def sets_of(folder: Path, preset=TINY_KEYPOINTS):
    return read_sets([str(folder)], preset, class_names=None)


def read(folder: Path, part: str = "val2017", **more):
    how = {"outlines": False, "keypoints": True, "sigmas": (0.1,)} | more
    return read_coco([str(folder)], [part], option="--test", **how)


def change(folder: Path, part: str = "val2017", **fields) -> dict:
    path = folder / "annotations" / f"person_keypoints_{part}.json"
    told = json.loads(path.read_text())
    for name, values in fields.items():
        told[name] += values
    path.write_text(json.dumps(told))
    return told


def person(number: int = 999, image_id: int = 100, **more) -> dict:
    return a_person(number, image_id, (5, 5, 20, 20), CORNERS, np.random.default_rng(0)) | more


def test_keypoints_are_those_of_the_file_half_a_pixel_on(people) -> None:
    told = change(people)
    found = read(people)
    assert found.keypoints.names == tuple(CORNERS)
    assert found.keypoints.lines == ((0, 1), (0, 2))
    for image in found.images:
        objects = [each for each in told["annotations"] if each["image_id"] == image.image_id]
        wanted = np.array([each["keypoints"] for each in objects], np.float32).reshape(-1, 3, 3)
        wanted[..., :2][wanted[..., 2] > 0] += 0.5
        np.testing.assert_array_equal(image.keypoints, wanted)
        assert image.outlines is None


BROKEN = {
    "has another number of keypoints than its category": {"keypoints": [1, 2, 2]},
    "has keypoints that are not numbers": {"keypoints": ["a"] * 9},
    "has a keypoint whose visibility is not 0, 1 or 2": {"keypoints": [9, 9, 3] * 3},
    "has a box without an area in the image": {"bbox": [5, 5, 0, 9]},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_an_object_whose_keypoints_cannot_be_used_is_left_out_with_a_reason(people, reason) -> None:
    before = len(read(people).images[0].boxes)
    change(people, annotations=[person(**BROKEN[reason])])
    found = read(people)
    assert [(each.key, each.reason) for each in found.malformed_objects] == [("999", reason)]
    assert len(found.images[0].boxes) == before
    # And the test goes on; what has no area counts as in COCO's own code.
    assert set(coco_precision(all_of(found), found)) == {"keypoint", "box"}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
    max_leaves=12,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["bbox", "keypoints", "segmentation", "category_id", "area"]), ANYTHING))
def test_whatever_an_object_has_it_is_read_or_left_out_with_a_reason(one_person, fields) -> None:
    path = one_person / "annotations" / "person_keypoints_val2017.json"
    told = json.loads(path.read_text())
    told["annotations"][1:] = [person() | fields]
    path.write_text(json.dumps(told))
    data = read(one_person)
    assert len(data.images[0].boxes) + len(data.malformed_objects) == 2
    assert np.isfinite(data.images[0].keypoints).all()
    precisions = coco_precision(all_of(data), data)
    assert all(np.isfinite(each.at).all() for of_kind in precisions.values() for each in of_kind)


def test_infinite_keypoints_are_no_numbers(people) -> None:
    path = people / "annotations" / "person_keypoints_val2017.json"
    told = change(people)
    told["annotations"].append(person(keypoints=[float("inf"), 3, 2] * 3))
    path.write_text(json.dumps(told))
    assert [each.reason for each in read(people).malformed_objects] == ["has keypoints that are not numbers"]


def test_objects_need_no_keypoints_and_those_outside_are_not_marked(people) -> None:
    bare = person()
    del bare["keypoints"], bare["num_keypoints"]
    change(people, annotations=[bare, person(998, keypoints=[9, 9, 2, -3, 9, 2, 400, 9, 1]), person(997, keypoints=[])])
    image = read(people).images[0]
    assert not image.keypoints[[-3, -1]].any()
    assert image.keypoints[-2].tolist() == [[9.5, 9.5, 2], [0, 0, 0], [0, 0, 0]]


def test_images_with_too_few_marked_keypoints_are_not_trained_on(people) -> None:
    train, _ = sets_of(people)
    marked = [int((image.keypoints[..., 2] > 0).sum()) for image in train.images]
    least = sorted(marked)[2]
    kept = learned(train, replace(TINY_KEYPOINTS, min_keypoints=least))
    assert [image.key for image in kept.images] == [
        image.key for image, count in zip(train.images, marked, strict=True) if count >= least
    ]
    with pytest.raises(ValueError, match=r"no image of .* has 999 or more marked keypoints"):
        refuse_unmarked(train, train, replace(TINY_KEYPOINTS, min_keypoints=999))


def test_sets_without_keypoints_or_with_others_are_refused(people) -> None:
    train, test = sets_of(people)
    unmarked = replace(test, images=[replace(image, keypoints=image.keypoints * 0) for image in test.images])
    with pytest.raises(ValueError, match=r"no object of .* has a marked keypoint"):
        refuse_unmarked(train, unmarked, TINY_KEYPOINTS)
    path = people / "annotations" / "person_keypoints_val2017.json"
    told = json.loads(path.read_text())
    told["categories"][0]["keypoints"][0] = "nose"
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="have other keypoints: they must be the same"):
        sets_of(people)
    with pytest.raises(ValueError, match=r"instances_val2017\.json .* is not there"):
        read(people, keypoints=False)


def test_keypoints_follow_image_and_names(people) -> None:
    """The corner of a triangle that is called left is to the left of the right one, mirrored or not."""
    data = read(people, "train2017")
    for is_mirrored in (False, True):
        for found in data.images:
            image, target = augmented(
                found, side=128, longest=192, is_mirrored=is_mirrored, partners=data.keypoints.partners
            )
            assert target["keypoints"].shape == (len(found.boxes), 3, 3)
            for corners, (left, top, right, bottom) in zip(target["keypoints"], target["boxes"].tolist(), strict=True):
                wanted = [((left + right) / 2, top), (left, bottom), (right, bottom)]
                for (x, y, mark), place in zip(corners.tolist(), wanted, strict=True):
                    assert (x, y) == (pytest.approx(place, abs=3.5) if mark else (0, 0))
            assert image.shape[1] in (128, 192)


def all_of(data, *, shift: float = 0) -> Detections:
    counts = [len(image.boxes) for image in data.images]
    keypoints = np.concatenate([image.keypoints for image in data.images])
    keypoints[..., 0] += shift
    return Detections(
        image=np.repeat(np.arange(len(data)), counts),
        boxes=np.concatenate([image.boxes for image in data.images]),
        classes=np.zeros(sum(counts), np.int64),
        scores=np.linspace(0.9, 0.1, sum(counts)).astype(np.float32),
        keypoints=keypoints,
    )


def naive_oks(found, told: dict, sigmas) -> float:
    """cocodataset.org/#keypoints-eval: the mean over the marked keypoints of exp(-d^2 / (2 s^2 k^2)), k = 2 sigma."""
    marked = np.array(told["keypoints"], np.float64).reshape(-1, 3)
    similar = [
        np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * told["area"] * (2 * sigma) ** 2))
        for (x, y, _), (u, v, mark), sigma in zip(found - (0.5, 0.5, 0), marked, sigmas, strict=True)
        if mark > 0
    ]
    return float(np.mean(similar))


def naive_ap(rows, objects, threshold: float) -> float:
    """Rows (image, score, keypoints), objects of the file; 101 recalls, the most similar object that is left."""
    used, hits = set(), []
    for image_id, _, keypoints in sorted(rows, key=lambda row: -row[1]):
        best, chosen = threshold, None
        for number, told in enumerate(objects):
            if told["image_id"] == image_id and number not in used:
                oks = naive_oks(keypoints, told, (0.1, 0.05, 0.2))
                if oks >= best:
                    best, chosen = oks, number
        used.add(chosen)
        hits.append(chosen is not None)
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, len(hits) + 1), found / len(objects)
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.linspace(0, 1, 101)]))


def test_average_precision_of_keypoints_is_that_of_the_rules(people) -> None:
    told = change(people)
    data = read(people, sigmas=(0.1, 0.05, 0.2))
    found = all_of(data)
    rng = np.random.default_rng(0)
    found.keypoints[..., :2] += rng.normal(0, 1.5, found.keypoints[..., :2].shape)
    [got] = coco_precision(found, data)["keypoint"]
    rows = [
        (data.images[image].image_id, score, keypoints.astype(np.float64))
        for image, score, keypoints in zip(found.image, found.scores, found.keypoints, strict=True)
    ]
    wanted = [naive_ap(rows, told["annotations"], threshold) for threshold in OVERLAPS]
    assert 0.1 < np.mean(wanted) < 0.9
    np.testing.assert_allclose(got.at, wanted, atol=1e-6)
    assert got.num_objects == len(told["annotations"])


def test_the_area_of_an_object_is_the_files_or_a_share_of_its_box(people) -> None:
    path = people / "annotations" / "person_keypoints_val2017.json"
    precisions = []
    for area in (None, "0.53", 1e5):
        told = json.loads(path.read_text())
        for each in told["annotations"]:
            each.pop("area", None)
            if area is not None:
                each["area"] = 0.53 * each["bbox"][2] * each["bbox"][3] if area == "0.53" else area
        path.write_text(json.dumps(told))
        data = read(people)
        precisions.append(coco_precision(all_of(data, shift=3), data)["keypoint"][0].at)
    assert precisions[0] == precisions[1]
    assert np.mean(precisions[0]) < 1
    assert set(precisions[2]) == {1}


def test_crowds_and_objects_without_keypoints_are_neither_found_nor_missed(people) -> None:
    bare = person(keypoints=[0] * 9, num_keypoints=0)
    crowd = person(998, iscrowd=1, segmentation={"size": [1, 1], "counts": [0, 1]}, keypoints=[0] * 9, num_keypoints=0)
    change(people, annotations=[bare, crowd])
    data = read(people)
    found = all_of(data)
    [keypoints], [boxes] = coco_precision(found, data).values()
    assert keypoints.mean == boxes.mean == 1
    assert boxes.num_objects == keypoints.num_objects + 1


def start() -> Start:
    encoder = tiny_resnet()
    return Start(name="tiny", encoder=encoder, digest=digest_of(encoder))


def trainings(folder: Path, sets, preset=TINY_KEYPOINTS, *, machine=None) -> DetectorTrainings:
    machine = machine or Machine(device=CPU, threads=1)
    folder.mkdir(exist_ok=True)
    return DetectorTrainings(
        *sets, preset, machine, folder=folder, every_steps=500, num_trainings=1, at_most_damaged=0.1
    )


def test_a_stopped_training_of_keypoints_goes_on_to_the_same_bits(people, tmp_path, monkeypatch) -> None:
    narrow(monkeypatch)
    sets = sets_of(people)
    with trainings(tmp_path / "whole", sets) as whole:
        wanted = whole.run(start(), seed=3)
    assert list(wanted.figures)[:3] == ["keypoint AP", "keypoint AP50", "keypoint AP75"]
    with trainings(tmp_path / "stopped", sets) as stopped:
        polls = iter([0, SIGTERM])
        monkeypatch.setattr(stopped._stop, "poll", polls.__next__)
        with pytest.raises(StoppedError):
            stopped.run(start(), seed=3)
    with trainings(tmp_path / "stopped", sets) as last:
        assert asdict(last.run(start(), seed=3)) == asdict(wanted)
    both = [next((tmp_path / name / "trained").iterdir()).read_bytes() for name in ("whole", "stopped")]
    assert both[0] == both[1]


def on_two_ranks(folder: str):
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch)
        sets = sets_of(Path(folder))
        world = World(rank=torch.distributed.get_rank(), world_size=2, local_world_size=2)
        machine = Machine(device=CPU, world=world, threads=1)
        with trainings(Path(folder) / "out", sets, machine=machine) as training:
            figures = training.run(start(), seed=3).figures
        detector = build_detector(tiny_resnet(), TINY_KEYPOINTS, num_classes=1, seed=1, num_keypoints=3)
        return figures, find_all(detector, sets[1], TINY_KEYPOINTS, machine, stop=lambda _: None)[0]


def test_ranks_share_training_and_test_of_keypoints(people, run_ranks, monkeypatch) -> None:
    narrow(monkeypatch)
    (first, found), (second, again) = run_ranks(on_two_ranks, str(people))
    assert first == second
    detector = build_detector(tiny_resnet(), TINY_KEYPOINTS, num_classes=1, seed=1, num_keypoints=3)
    alone, _ = find_all(detector, sets_of(people)[1], TINY_KEYPOINTS, Machine(device=CPU), stop=lambda _: None)
    order = np.argsort(found.image, kind="stable")
    np.testing.assert_array_equal(found.keypoints, again.keypoints)
    np.testing.assert_allclose(found.keypoints[order], alone.keypoints, rtol=1e-4, atol=1e-3)
    assert alone.keypoints.shape == (len(alone), 3, 3)
    assert len(alone) > 0


def test_batches_of_keypoints_are_of_the_sets_partners(people) -> None:
    train, _ = sets_of(people)
    with TrainingImages(train, TINY_KEYPOINTS, seed=1, world=World(), threads=1, at_most_damaged=0.0) as images:
        stream = images.batches(0)
        targets = [target for _ in range(3) for target in next(stream).targets]
    feet = torch.cat([target["keypoints"][:, 1:] for target in targets])
    both = feet[(feet[..., 2] > 0).all(1)]
    assert len(both) > 5
    assert (both[:, 0, 0] < both[:, 1, 0]).all()


PLAIN = (
    *("--batch-size", "2", "--group", "1", "--steps", "2", "--sides", "32", "--test-side", "32", "--longest", "48"),
    *("--regions", "4", "--precise-batches", "1", "--threads", "1", "--device", "cpu"),
    *("--init", "random", "--network", "resnet18_quarter", "--preset", "coco-keypoints"),
)


def test_the_preset_takes_two_steps_and_measures_keypoints_and_boxes(tmp_path, capsys, monkeypatch) -> None:
    narrow(monkeypatch)
    data = write_people(tmp_path / "people", {"train2017": 4, "val2017": 1}, places=PERSON)
    out = tmp_path / "out"
    assert main(["transfer", "detect", "--data", str(data), "--out", str(out), *PLAIN]) == 0
    printed = capsys.readouterr()
    assert "detect coco-keypoints  keypoint AP75" in printed.out
    assert "note" not in printed.err
    [result] = read_results(out / "results.json")
    names = ("AP", "AP50", "AP75")
    assert list(result.figures) == [f"{kind} {name}" for kind in ("keypoint", "box") for name in names]
    rows = list(csv.DictReader((out / "per-class.csv").read_text().splitlines()))
    assert [(row["of"], row["class"]) for row in rows] == [("keypoint", "person"), ("box", "person")]
    # Of the benchmark itself, what the paper has stands beside it.
    told = json.loads((out / "results.json").read_text())
    told["results"][0]["data"]["test"] |= {"num_samples": 5_000, "num_classes": 1}
    (out / "results.json").write_text(json.dumps(told))
    shown = beside_published(read_results(out / "results.json"))
    assert "COCO keypoints  detect coco-keypoints  keypoint AP75" in shown
    assert "72.5" in shown


def test_other_keypoints_need_sigmas_and_are_noted_where_none_has_a_side(tmp_path, capsys, monkeypatch) -> None:
    narrow(monkeypatch)
    data = write_people(tmp_path / "people", {"train2017": 4, "val2017": 1}, places={"a": (0, 0), "b": (1, 1)})
    given = ["transfer", "detect", "--data", str(data), "--out", str(tmp_path / "out"), *PLAIN]
    assert main(given) == 2
    assert "how exactly each can be marked is not known: give --keypoint-sigmas" in capsys.readouterr().err
    given += ["--keypoint-sigmas", "0.1"]
    assert main([*given, "--keypoint-pairs", "a:c"]) == 2
    assert "--keypoint-pairs a:c: give two keypoints" in capsys.readouterr().err
    assert main([*given, "--init", "nowhere"]) == 2
    assert "named left or right" in capsys.readouterr().err
    assert main([*given, "--keypoint-pairs"]) == 0
    assert "named left or right" not in capsys.readouterr().err


IDLE = {
    "--min-keypoints means nothing for --preset voc-c4, which has no keypoints": ("voc-c4", "--min-keypoints", "1"),
    "--keypoint-sigmas means nothing for --preset coco-c4-1x": ("coco-c4-1x", "--keypoint-sigmas", "1"),
    "--keypoint-pairs means nothing for --preset lvis-fpn-2x": ("lvis-fpn-2x", "--keypoint-pairs"),
    "--masks means nothing for --preset coco-keypoints, which has no masks": ("coco-keypoints", "--masks", "True"),
    "--masks means nothing for --preset voc-c4": ("voc-c4", "--masks", "False"),
    "cityscapes-instance, whose figures are all of masks": ("cityscapes-instance", "--masks", "False"),
    "--keypoint-sigmas is 0": ("coco-keypoints", "--keypoint-sigmas", "0"),
    "--min-keypoints is 0": ("coco-keypoints", "--min-keypoints", "0"),
}


@pytest.mark.parametrize("reason", IDLE)
def test_options_that_mean_nothing_or_cannot_be_are_refused(reason, tmp_path, capsys) -> None:
    given = ["transfer", "detect", "--init", "random", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    preset, *words = IDLE[reason]
    assert main([*given, "--preset", preset, *words]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_a_tiny_network_learns_keypoints(tmp_path, monkeypatch) -> None:
    narrow(monkeypatch)
    preset = replace(
        TINY_KEYPOINTS,
        steps=60,
        lr=0.05,
        warmup_steps=10,
        sides=(64,),
        test_side=64,
        longest=96,
        precise_batches=8,
        regions=16,
        train_proposals=(100, 30),
    )
    sets = sets_of(write_people(tmp_path / "people", {"train2017": 60, "val2017": 8}), preset)
    with trainings(tmp_path / "out", sets, preset) as learning:
        found = learning.run(start(), seed=3)
    untrained = build_detector(tiny_resnet(), preset, num_classes=1, seed=3, num_keypoints=3)
    chance, _ = find_all(untrained, sets[1], preset, Machine(device=CPU), stop=lambda _: None)
    assert coco_precision(chance, sets[1])["keypoint"][0].at[0] < 0.05
    assert found.figures["keypoint AP50"] > 0.2
