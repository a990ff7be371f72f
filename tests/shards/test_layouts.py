"""The usual data sets in their own layouts: pixels, labels and counts, by every executor."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from shards.cli import main
from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.images.libraries import decode_jpeg
from shards.packing.finish import finish
from shards.packing.pack import pack
from shards.sets import open_set
from shards.sets.local import LocalShardSet
from shards.sets.merged import MergedShardSet
from shards.tools.inspect_set import describe
from shards.tools.verify import verify
from tests.shards.benchmark_files import (
    CIFAR_FOLDERS,
    CIFAR_NAMES,
    VOC_CLASSES,
    WNIDS,
    cifar_files,
    cifar_pixels,
    devkit_files,
    tar_of,
    voc_files,
    write_coco,
    write_files,
    write_imagenet,
)
from tests.shards.pictures import contents, fill, jpeg


def packed(tmp_path, *sources, out="out", **options):
    config = PackConfig(
        sources=tuple(map(str, sources)), out=str(tmp_path / out), **{"workers": 1, "shard_samples": 5, **options}
    )
    manifest = pack(config)[""]
    assert verify(tmp_path / out) == []
    assert manifest.num_samples + manifest.num_rejected == manifest.num_inputs
    return open_set(tmp_path / out)


def samples(shards):
    """{bytes of an image: its record} of a set, and where each came from."""
    found, sources = {}, {}
    for shard in range(shards.num_shards):
        tar = Path(shards.shard_name(shard))
        lines = tar.with_name(f"{tar.stem}.sources.txt").read_text().splitlines()
        for record, source in zip(shards.index(shard), lines, strict=True):
            data = tar.read_bytes()[int(record["offset"]) :][: int(record["size"])]
            found[data], sources[data] = record, source
    return found, sources


def names_of(shards):
    return {data: shards.class_names[record["label"]] for data, record in samples(shards)[0].items()}


# ImageNet --------------------------------------------------------------------------------------------------------


def test_imagenet_s_tars_have_wordnet_ids_as_labels_in_both_sets(tmp_path, capsys):
    write_imagenet(tmp_path / "in")
    train = packed(tmp_path, tmp_path / "in" / "ILSVRC2012_img_train.tar", out="train")
    val = packed(tmp_path, tmp_path / "in" / "ILSVRC2012_img_val.tar", out="val")
    assert train.class_names == val.class_names == tuple(WNIDS)
    assert names_of(train) == {jpeg(100 * c + i): wnid for c, wnid in enumerate(WNIDS) for i in range(3)}
    # Ground truth 3, 1, 2, 3 of the devkit's own numbers.
    expected = ["n03000684", "n02119789", "n01440764", "n03000684"]
    assert names_of(val) == {jpeg(1000 + v): wnid for v, wnid in enumerate(expected)}
    _, sources = samples(train)
    assert sources[jpeg(101)].endswith("ILSVRC2012_img_train.tar/n02119789.tar/n02119789_1.JPEG")
    out = str(tmp_path / "by-command")
    assert main(["pack", str(tmp_path / "in"), "--subset", "val", "--out", out, "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert "ImageNet's val images, 4 of 3 WordNet ids by" in said.err
    assert "4 images in 1 shard," in said.out
    assert contents(tmp_path / "by-command")["shard-000000.tar"]


def test_a_tar_of_another_name_is_recognized_and_the_devkit_may_be_unpacked(tmp_path):
    write_imagenet(tmp_path / "in")
    for part in ("train", "val"):
        (tmp_path / "in" / f"ILSVRC2012_img_{part}.tar").rename(tmp_path / "in" / f"{part}.tar")
    (tmp_path / "in" / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    write_files(tmp_path / "in", devkit_files([3, 1, 2, 3]))
    assert packed(tmp_path, tmp_path / "in" / "train.tar", out="train").num_samples == 9
    assert packed(tmp_path, tmp_path / "in" / "val.tar", out="val").class_names == tuple(WNIDS)


def test_imagenet_without_what_labels_need_is_refused_before_work(tmp_path):
    write_imagenet(tmp_path / "in")
    with pytest.raises(ValueError, match=r"holds train, val: choose one with --subset train"):
        packed(tmp_path, tmp_path / "in")
    with pytest.raises(ValueError, match=r"--subset test: .* holds train, val"):
        packed(tmp_path, tmp_path / "in", subset="test")
    devkit = tmp_path / "in" / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(tar_of(devkit_files([3, 1]), "w:gz"))
    with pytest.raises(PackError, match=r"names the classes of 2 images"):
        packed(tmp_path, tmp_path / "in", subset="val")
    devkit.write_bytes(tar_of(devkit_files([3, 1, 2, 3, 1]), "w:gz"))
    with pytest.raises(PackError, match=r"holds 4 images, but .* names the classes of 5: get the whole"):
        packed(tmp_path, tmp_path / "in", subset="val")
    devkit.write_bytes(devkit.read_bytes()[:-50])
    with pytest.raises(PackError, match=r"cannot read .* to its end|or damaged"):
        packed(tmp_path, tmp_path / "in", subset="val")
    devkit.write_bytes(tar_of({"ILSVRC2012_devkit_t12/data/meta.mat": b"no matrix"}, "w:gz"))
    with pytest.raises(PackError, match=r"is not ImageNet's devkit of 2012, or damaged"):
        packed(tmp_path, tmp_path / "in", subset="val")
    devkit.unlink()
    with pytest.raises(ValueError, match=r"are in ILSVRC2012_devkit_t12.tar.gz: put it into the same folder"):
        packed(tmp_path, tmp_path / "in", subset="val")
    assert not (tmp_path / "out").exists()
    unlabeled = packed(tmp_path, tmp_path / "in", subset="val", labels="none")
    assert (unlabeled.num_samples, unlabeled.class_names) == (4, ())


def test_a_cut_tar_and_what_is_not_a_class_s_tar_are_noticed(tmp_path):
    write_imagenet(tmp_path)
    train = tmp_path / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackError, match=r"cannot be read to its end .* get the whole archive"):
        packed(tmp_path, train)
    inner = tar_of({"n01440764_0.JPEG": jpeg(0), "n01440764_1.JPEG": b"damaged"})
    train.write_bytes(tar_of({"n01440764.tar": inner, "readme.txt": b"about"}))
    shards = packed(tmp_path, train, max_rejected=1.0, labels="column")
    assert (shards.num_samples, shards.manifest.rejections) == (1, {"not an image": 2})


# CIFAR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "form"), CIFAR_FOLDERS)
@pytest.mark.parametrize("place", ["folder", "above", "archive"])
def test_cifar_s_batches_keep_pixels_and_labels(tmp_path, classes, form, place):
    files, labels = cifar_files(classes, form)
    folder = CIFAR_FOLDERS[classes, form]
    if place == "archive":
        source = tmp_path / f"cifar-{classes}-{form}.tar.gz"
        # In an order of its own, as the published archives are.
        source.write_bytes(tar_of({f"{folder}/{name}": data for name, data in reversed(files.items())}, "w:gz"))
    else:
        write_files(tmp_path / "in" / folder, files)
        source = tmp_path / "in" / folder if place == "folder" else tmp_path / "in"
    for subset, batches in (("train", list(labels)[:-1]), ("test", list(labels)[-1:])):
        shards = packed(tmp_path, source, out=subset, subset=subset, quality=100)
        assert shards.class_names == tuple(CIFAR_NAMES[classes])
        expected = {
            f"{batch}{'' if form == 'python' else '.bin'}/{row:05d}": (label, pixels)
            for batch in batches
            for row, (label, pixels) in enumerate(
                zip(labels[batch], cifar_pixels(list(labels).index(batch), 4), strict=True)
            )
        }
        found, sources = samples(shards)
        assert len(found) == len(expected) == 4 * len(batches)
        for data, record in found.items():
            label, pixels = expected["/".join(sources[data].split("/")[-2:])]
            assert record["label"] == label
            assert np.abs(decode_jpeg(data).astype(int) - pixels).max() <= 6


def test_cifar_needs_a_subset_and_all_of_its_files(tmp_path):
    files, _ = cifar_files(10, "binary")
    write_files(tmp_path / "cifar-10-batches-bin", files)
    write_files(tmp_path / "cifar-100-binary", cifar_files(100, "binary")[0])
    with pytest.raises(ValueError, match=r"holds several data sets: give .*cifar-100-binary"):
        packed(tmp_path / "unused", tmp_path)
    with pytest.raises(ValueError, match=r"holds test, train: choose one with --subset test"):
        packed(tmp_path, tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(PackError, match=r"lacks data_batch_3.bin: get all of CIFAR-10"):
        packed(tmp_path, tmp_path / "cifar-10-batches-bin", subset="train")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(files["test_batch.bin"][:-1])
    with pytest.raises(PackError, match=r"not a multiple of 3073: it is cut"):
        packed(tmp_path, tmp_path / "cifar-10-batches-bin", subset="test")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(PackError, match=r"labels that batches.meta.txt does not name"):
        packed(tmp_path, tmp_path / "cifar-10-batches-bin", subset="test")


class Evil:
    """What a pickle may ask for."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "batch",
    [
        lambda mark: Evil(os.system, f"touch {mark}"),
        lambda mark: {b"labels": [0], b"data": Evil(eval, f"open({str(mark)!r}, 'w')")},
        lambda mark: {b"labels": [0], b"data": np.array([[Evil(open, str(mark), "w")]], dtype=object)},
        lambda mark: {b"labels": [0, 1], b"data": np.zeros((1, 3072), dtype=np.uint8)},
        lambda mark: {b"labels": [0], b"data": np.zeros((1, 3072), dtype=np.int16)},
        lambda mark: {b"labels": [0, 1], b"data": np.zeros((3072, 2), dtype=np.uint8).T},
        lambda mark: {b"labels": 5, b"data": b"bytes"},
        lambda mark: [1, 2],
    ],
)
def test_a_pickle_is_only_read_as_data(tmp_path, batch):
    files, _ = cifar_files(10, "python")
    mark = tmp_path / "executed"
    write_files(tmp_path / "in", files | {"test_batch": pickle.dumps(batch(mark), protocol=2)})
    with pytest.raises(PackError, match=r"test_batch (is not a batch of CIFAR's|does not hold an image)"):
        packed(tmp_path, tmp_path / "in", subset="test")
    assert not mark.exists()


# PASCAL VOC ------------------------------------------------------------------------------------------------------

PARTS = {"train": ["000001", "000003"], "val": ["000004"], "trainval": ["000001", "000003", "000004"]}
SIGNS = {"000001": (1, -1, 1), "000003": (-1, 0, -1), "000004": (-1, 1, 0)}
EXPECTED = {jpeg(0): [1, 0, 1], jpeg(1): [0, -1, 0], jpeg(2): [0, 1, -1]}


def sets_of(shards):
    found = {}
    for shard in range(shards.num_shards):
        part, inner = shards.part(shard)
        whole = Path(part.shard_name(inner)).read_bytes()
        for record, row in zip(shards.index(shard), shards.label_sets(shard), strict=True):
            assert record["label"] == -1
            found[whole[int(record["offset"]) :][: int(record["size"])]] = row.tolist()
    return found


@pytest.mark.parametrize("place", ["VOCdevkit", "VOCdevkit/VOC2007", "VOCtrainval_06-Nov-2007.tar"])
def test_voc_s_labels_are_sets_and_difficult_objects_count_neither_way(tmp_path, place, capsys):
    files = voc_files(PARTS, SIGNS)
    if place.endswith(".tar"):
        (tmp_path / place).write_bytes(tar_of(files))
    else:
        write_files(tmp_path, files)
    shards = packed(tmp_path, tmp_path / place, subset="trainval", shard_samples=2)
    assert shards.class_names == tuple(VOC_CLASSES)
    assert shards.manifest.has_label_sets
    assert sets_of(shards) == EXPECTED
    assert not [name for name in contents(tmp_path / "out") if name.endswith(".cls")]
    assert "classes: 3, of 1 to 1 samples; 1 samples have none" in list(describe(shards))
    train = packed(tmp_path, tmp_path / place, subset="train", out="train")
    assert (train.num_samples, train.class_names) == (2, tuple(VOC_CLASSES))
    with pytest.raises(ValueError, match=r"holds train, trainval, val: choose one with --subset"):
        packed(tmp_path, tmp_path / place, out="none")
    command = ["pack", str(tmp_path / place), "--subset", "val", "--out", str(tmp_path / "val"), "--workers", "1"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "PASCAL VOC, val, 1 image, each with a set of 3 classes" in said.err
    assert "sets of 3 classes" in said.out


def test_two_years_are_two_sources_and_one_set(tmp_path):
    write_files(tmp_path, voc_files(PARTS, SIGNS))
    later = {"2008_000001": (-1, 1, 1)}
    write_files(tmp_path, voc_files({"trainval": list(later)}, later, "VOC2012"))
    with pytest.raises(ValueError, match=r"VOC2007, .*VOC2012: give one of them"):
        packed(tmp_path, tmp_path / "VOCdevkit")
    years = [tmp_path / "VOCdevkit" / year for year in ("VOC2007", "VOC2012")]
    shards = packed(tmp_path, *years, subset="trainval")
    assert shards.num_samples == 4
    apart = [packed(tmp_path, year, subset="trainval", out=year.name) for year in years]
    merged = MergedShardSet(apart)
    assert merged.manifest.has_label_sets
    assert sum(row == [0, 1, 1] for row in sets_of(apart[1]).values()) == 1
    assert sets_of(merged) == {**sets_of(apart[0]), **sets_of(apart[1])}
    plain = packed(tmp_path, fill(tmp_path / "plain", 3), out="plain-out", labels="none")
    assert not MergedShardSet([*apart, plain]).manifest.has_label_sets


def test_images_that_are_missing_are_rejected_and_lists_that_disagree_refused(tmp_path):
    files = voc_files(PARTS, SIGNS)
    del files["VOCdevkit/VOC2007/JPEGImages/000003.jpg"]
    write_files(tmp_path, files)
    (tmp_path / "VOCtrainval_x.tar").write_bytes(tar_of(files))
    for number, source in enumerate((tmp_path / "VOCdevkit", tmp_path / "VOCtrainval_x.tar")):
        shards = packed(tmp_path, source, subset="trainval", out=f"out{number}", max_rejected=1.0)
        assert (shards.num_samples, shards.manifest.rejections) == (2, {"unreadable": 1})
    path = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "cat_val.txt"
    path.write_text("000009 1\n")
    with pytest.raises(PackError, match=r"000004 of ImageSets/Main/val.txt is not in the lists of all classes"):
        packed(tmp_path, tmp_path / "VOCdevkit", subset="val")
    path.write_text("000004 yes\n")
    with pytest.raises(PackError, match=r"a line is not a name and 1, 0 or -1"):
        packed(tmp_path, tmp_path / "VOCdevkit", subset="val")


def test_sets_of_labels_survive_resharding_and_their_file_is_checked(tmp_path):
    write_files(tmp_path, voc_files(PARTS, SIGNS))
    packed(tmp_path, tmp_path / "VOCdevkit", subset="trainval", shard_samples=2, out="first")
    again = packed(tmp_path, tmp_path / "first", shard_samples=3, seed=4)
    assert sets_of(again) == EXPECTED
    whole = (tmp_path / "out" / "shard-000000.labels.npy").read_bytes()
    for damaged in (b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (tmp_path / "out" / "shard-000000.labels.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-000000\.labels\.npy has changed since it was packed"):
            again.label_sets(0)
        assert ["labels.npy has changed" in str(problem) for problem in verify(tmp_path / "out")] == [True]
    (tmp_path / "out" / "shard-000000.labels.npy").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*labels.npy"):
        again.label_sets(0)
    plain = LocalShardSet.open(packed(tmp_path, fill(tmp_path / "plain", 3), out="plain-out").where)
    with pytest.raises(ValueError, match=r"has one label per sample"):
        plain.label_sets(0)


def test_one_label_and_sets_of_them_do_not_mix(tmp_path):
    write_files(tmp_path, voc_files(PARTS, SIGNS))
    classes = fill(tmp_path / "classes", 4, classes=2)
    write_files(tmp_path / "cifar-10-batches-bin", cifar_files(10, "binary")[0])
    with pytest.raises(PackError, match=r"some inputs have one label and some a set of labels"):
        packed(tmp_path, tmp_path / "VOCdevkit", tmp_path / "cifar-10-batches-bin", subset="train")
    with pytest.raises(ValueError, match=r"--subset train means nothing for .*classes, which is not in the layout"):
        packed(tmp_path, classes, subset="train")


# COCO and iNaturalist --------------------------------------------------------------------------------------------


def test_inaturalist_s_json_gives_one_label_and_every_category(tmp_path):
    labels = {f"train_val2018/Aves/{i % 2}/{i}.jpg": [i % 2] for i in range(6)}
    path = write_coco(tmp_path / "in", labels, {0: "Corvus corax", 1: "Anas acuta", 2: "Zea mays"})
    shards = packed(tmp_path, path)
    assert shards.class_names == ("Anas acuta", "Corvus corax", "Zea mays")
    assert names_of(shards) == {jpeg(i): ("Corvus corax", "Anas acuta")[i % 2] for i in range(6)}
    assert not shards.manifest.has_label_sets


def test_coco_s_json_gives_sets(tmp_path):
    labels = {"1.jpg": [18, 1, 18], "2.jpg": [], "3.jpg": [1]}
    path = write_coco(tmp_path / "in", labels, {1: "person", 18: "dog", 90: "toothbrush"}, images="val2017")
    with pytest.raises(ValueError, match=r"names 1.jpg, which is not below .*: name the folder .* --image-root"):
        packed(tmp_path, path)
    shards = packed(tmp_path, path, image_root=str(tmp_path / "in" / "val2017"))
    assert shards.class_names == ("dog", "person", "toothbrush")
    assert sets_of(shards) == {jpeg(0): [1, 1, 0], jpeg(1): [0, 0, 0], jpeg(2): [0, 1, 0]}


def test_names_that_repeat_are_told_apart_by_their_ids(tmp_path):
    path = write_coco(tmp_path / "in", {"1.jpg": [3], "2.jpg": [11]}, {3: "major", 11: "major", 2: "minor"})
    assert packed(tmp_path, path).class_names == ("11 major", "2 minor", "3 major")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is not in COCO's layout"),
        ("{", "is not in COCO's layout"),
        ('{"images": [{"id": 1}]}', "id and file_name of every image"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', "gives two images the same id"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "category_id": 7}]}',
            "an annotation names the image or category 7, not listed",
        ),
    ],
)
def test_other_json_is_refused(tmp_path, text, says):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(PackError, match=says):
        packed(tmp_path, tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"give the \.json file of the subset"):
        packed(tmp_path, tmp_path / "x.json", subset="val")


def test_a_list_s_images_may_be_elsewhere(tmp_path):
    # mini-ImageNet's lists: `filename,label`, with all images in one folder.
    fill(tmp_path / "images", 4)
    (tmp_path / "train.csv").write_text("filename,label\n" + "".join(f"{i:04d}.jpg,n{i % 2:08d}\n" for i in range(4)))
    shards = packed(tmp_path, tmp_path / "train.csv", image_root=str(tmp_path / "images"))
    assert names_of(shards) == {jpeg(i): f"n{i % 2:08d}" for i in range(4)}
    with pytest.raises(ValueError, match=r"--image-root x means nothing for .*images, which is not a list"):
        packed(tmp_path, tmp_path / "images", image_root="x", out="other")


# Executors -------------------------------------------------------------------------------------------------------


def imagenet(folder):
    write_imagenet(folder, per_class=4)
    return folder / "ILSVRC2012_img_train.tar", None


def cifar(folder):
    write_files(folder / "cifar-10-batches-py", cifar_files(10, "python")[0])
    return folder, "train"


def voc(folder):
    (folder / "VOCtrainval_06-Nov-2007.tar").parent.mkdir()
    (folder / "VOCtrainval_06-Nov-2007.tar").write_bytes(tar_of(voc_files(PARTS, SIGNS)))
    return folder / "VOCtrainval_06-Nov-2007.tar", "trainval"


def coco(folder):
    return write_coco(folder, {f"{i}.jpg": [1] * (i > 0) + [2] * (i > 2) for i in range(5)}, {1: "a", 2: "b"}), None


@pytest.mark.parametrize("layout", [imagenet, cifar, voc, coco])
@pytest.mark.parametrize("dedup", [False, True])
def test_parts_and_workers_give_the_same_bytes(tmp_path, layout, dedup):
    source, subset = layout(tmp_path / "in")
    options = {"sources": (str(source),), "subset": subset, "shard_samples": 2, "dedup": dedup}
    pack(PackConfig(out=str(tmp_path / "whole"), workers=1, **options))
    for part in (1, 0):
        pack(PackConfig(out=str(tmp_path / "parts"), workers=1, part=f"{part}/2", **options))
    finish(str(tmp_path / "parts"))
    expected = contents(tmp_path / "whole")
    assert contents(tmp_path / "parts") == expected
    assert verify(tmp_path / "whole") == []
