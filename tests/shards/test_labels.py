"""Labels: from folders of any depth, from columns of any type, from what lies beside an image; said, or asked about."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.cli import main
from shards.ground.errors import AmbiguousLabelsError, PackError
from shards.packing.labels import classes_of_folders
from shards.sets import open_set
from shards.sources import LabelSet
from shards.sources.values import as_label, number_or_name, text_label
from tests.shards.archives import labels_of, pack_all
from tests.shards.pictures import jpeg
from tests.shards.test_foreign import write
from tests.shards.test_sources import table

PLACES = (
    "a/airfield",
    "a/apartment_building/outdoor",
    "b/bow_window/indoor",
    "b/bow_window/outdoor",
    "h/hangar/indoor",
    "h/hangar/outdoor",
)
NAMES = (
    "airfield",
    "apartment_building/outdoor",
    "bow_window/indoor",
    "bow_window/outdoor",
    "hangar/indoor",
    "hangar/outdoor",
)


def grow(folder, folders):
    """An image in each folder, called by the folder's number."""
    for i, name in enumerate(folders):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{i}.jpg").write_bytes(jpeg(i))
    return folder


@pytest.mark.parametrize("top", ["", "train/", "data_large/train/"])
def test_places_and_sun_have_classes_of_several_names(tmp_path, capsys, top):
    folders = [top + name for name in PLACES]
    grow(tmp_path / "in", folders)
    write(tmp_path / "x.tar", {f"{name}/{i}.jpg": jpeg(i) for i, name in enumerate(folders)})
    for number, name in enumerate(("in", "x.tar")):
        out = tmp_path / f"out{number}"
        assert main(["pack", str(tmp_path / name), "--out", str(out), "--workers", "1"]) == 0
        assert labels_of(out) == {f"{i}.jpg": own for i, own in enumerate(NAMES)}
        said = capsys.readouterr()
        assert "labels: 6 classes (airfield, apartment_building/outdoor, bow_window/indoor, ...), by" in said.err
        assert f"by folders, such as {top}a" in said.err
        assert "6 classes" in said.out


def test_ambiguous_folders_are_refused_with_the_choices(tmp_path, capsys):
    source = grow(tmp_path / "in", ["train/cat", "train/dog", "val/cat", "val/dog", "val/owl"])
    command = ["pack", str(source), "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    for choice in (
        "--labels path:1 (2 classes: train, val)",
        "--labels path:2 (3 classes: cat, dog, owl)",
        "--labels folder (3 classes: cat, dog, owl)",
        "--labels path (5 classes: train/cat, train/dog, val/cat, ...)",
        "or --labels none",
    ):
        assert choice in said
    assert not (tmp_path / "out").exists()
    chosen = {"path:1": ("train", "val"), "path:2": ("cat", "dog", "owl"), "path": 5, "none": ()}
    for number, (labels, names) in enumerate(chosen.items()):
        found = pack_all(tmp_path, source, out=f"out{number}", labels=labels).class_names
        assert found == names or len(found) == names
    with pytest.raises(ValueError, match=r"--labels path:0 must be auto, none"):
        pack_all(tmp_path, source, labels="path:0")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["top/cat", "top/dog"], ["cat", "dog"]),
        (["animals/cat", "animals/dog", "car"], ["cat", "dog", "car"]),
        (["n01443537/images", "n01629819/images"], ["n01443537", "n01629819"]),
        (["/data/x/cat", "/data/x/dog"], ["cat", "dog"]),
        (["only"], ["only"]),
        (["a/apartment_building/outdoor", "a/airfield"], ["apartment_building/outdoor", "airfield"]),
        (["cat", "cat/more", "dog"], None),
        (["00/01", "01/01"], ["00", "01"]),
        (["00/01", "01/01", "01/02"], None),
        (["apartment_building/outdoor", "hangar/outdoor", "airfield"], None),
    ],
)
def test_folders_are_classes_where_that_is_clear(folders, expected):
    if expected is None:
        with pytest.raises(AmbiguousLabelsError):
            classes_of_folders(folders, "auto", "here")
    else:
        assert list(classes_of_folders(folders, "auto", "here").values()) == expected


_paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)


@given(folders=st.lists(_paths, min_size=1, max_size=8, unique=True))
def test_different_folders_never_become_one_class_in_silence(folders):
    try:
        found = classes_of_folders(folders, "auto", "here")
    except AmbiguousLabelsError:
        assert len(folders) > 1
    else:
        assert len(set(found.values())) == len(folders)


def test_values_as_labels():
    assert [as_label(value) for value in (3, 3.0, "x", "", None, math.nan, -1, True)] == [
        3,
        3,
        "x",
        None,
        None,
        None,
        None,
        1,
    ]
    assert as_label(1, ["cat", "dog"]) == "dog"
    assert as_label(2, ["cat", "dog"]) is None
    assert as_label([1, 0, 1], ["cat", "dog"]) == LabelSet(("cat", "dog"))
    assert as_label([]) == LabelSet(())
    for value in (0.5, math.inf, {"a": 1}, [[1]]):
        with pytest.raises(ValueError, match=r"is not a (class|set of classes)"):
            as_label(value)


def test_classes_that_differ_in_the_form_of_unicode_alone_are_named(tmp_path, capsys):
    grow(tmp_path / "in", ["caf\u00e9", "cafe\u0301", "cafe"])
    assert main(["pack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "labels: 2 classes are spelled caf\u00e9, in different forms of Unicode" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "label"), [("3", 3), ("3.0", 3), ("-1", None), (" dog\n", "dog"), ("", None)])
def test_texts_as_labels(text, label):
    assert text_label(text.encode()) == label
    assert as_label(number_or_name(text)) == label


def test_columns_are_found_whatever_their_case(tmp_path):
    table("parquet", tmp_path / "x.parquet", {"Image": [jpeg(0), jpeg(1)], "Label": ["cat", "dog"]})
    pack_all(tmp_path, tmp_path / "x.parquet")
    assert labels_of(tmp_path / "out") == {"row 0": "cat", "row 1": "dog"}


@pytest.mark.parametrize("image", [[[jpeg(0), jpeg(1)]], [[[0, 1], [2, 3]]], [{"data": jpeg(0)}], [1.5]])
def test_columns_that_hold_no_encoded_images_are_refused(tmp_path, image):
    table("parquet", tmp_path / "x.parquet", {"image": image})
    with pytest.raises(ValueError, match=r"x.parquet, column image, holds .*, not encoded images or paths"):
        pack_all(tmp_path, tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_columns_of_floats_strings_and_lists_are_labels(tmp_path, capsys, kind):
    images = [jpeg(i) for i in range(4)]
    columns = {
        "floats": ([2.0, None, 0.0, math.nan], ("0", "1", "2"), ["2", None, "0", None]),
        "texts": (["b", "a", None, "a"], ("a", "b"), ["b", "a", None, "a"]),
        "numbers": ([1, 0, -1, 1], ("0", "1"), ["1", "0", None, "1"]),
    }
    for name, (values, classes, expected) in columns.items():
        path = tmp_path / f"{name}.{'parquet' if kind == 'parquet' else 'arrow'}"
        table(kind, path, {"image": images, "label": values})
        out = tmp_path / f"{name}-out"
        assert main(["pack", str(path), "--out", str(out), "--workers", "1", "--no-shuffle"]) == 0
        assert f"by column label ({sum(each is not None for each in expected)})" in capsys.readouterr().err
        assert open_set(out).class_names == classes
        assert [labels_of(out)[f"row {i}"] for i in range(4)] == expected
    table(kind, path, {"image": images, "label": [[0, 2], [], [1], [2]]}, names=["x", "y", "z"])
    pack_all(tmp_path, path, out="sets", shuffle=False)
    sets = open_set(tmp_path / "sets")
    assert sets.class_names == ("x", "y", "z")
    assert np.array_equal(sets.label_sets(0), [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]])
    table(kind, path, {"image": images, "label": [0.5, 1.0, 2.0, 3.0], "kind": list("abca")})
    with pytest.raises(ValueError, match=r"column label: 0.5 is not a class; it has columns image, label, kind: name"):
        pack_all(tmp_path, path, out="bad")
    assert pack_all(tmp_path, path, out="unlabeled", labels="none").class_names == ()
    assert pack_all(tmp_path, path, out="kind", label_column="kind").class_names == ("a", "b", "c")


def test_a_gap_in_a_list_is_no_folder_and_a_short_row_names_its_line(tmp_path):
    grow(tmp_path, ["photos"])
    path = tmp_path / "list.csv"
    path.write_text(
        "\ufefffilename,label\r\nphotos/0.jpg,cat\r\nphotos/0.jpg,\r\nphotos/0.jpg\r\n,,\r\nphotos/0.jpg,dog\r\n"
    )
    manifest = pack_all(tmp_path, path)
    assert (manifest.num_samples, manifest.class_names) == (4, ("cat", "dog"))
    path.write_text("label,filename\ncat,photos/0.jpg\ndog\n")
    with pytest.raises(PackError, match=r"list.csv, line 3: 'dog' has no path in column 2"):
        pack_all(tmp_path, path, out="short")
    lines = [{"path": "photos/0.jpg", "label": [1.0, 2]}, {"path": "photos/0.jpg", "label": 0.25}]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"list.jsonl, line 2: 0.25 is not a class; name the column of labels"):
        pack_all(tmp_path, path, out="float")
    path.write_text('{"path": null}\n')
    with pytest.raises(PackError, match=r"list.jsonl, line 1: path is 'None', not a path"):
        pack_all(tmp_path, path, out="null")


def samples(fields, more=()):
    files = {}
    for i, value in enumerate(fields):
        files |= {f"{i}.jpg": jpeg(i), f"{i}.json": json.dumps(value).encode(), f"{i}.txt": b"kind %d\n" % (i % 2)}
        files |= {f"{i}.{suffix}": data for suffix, data in more}
    return files


def test_labels_beside_images_of_a_webdataset(tmp_path, capsys):
    write(tmp_path / "x.tar", samples([{"label": "b", "caption": "?"}, {"label": "a"}, {"label": None}, {}]))
    assert main(["pack", str(tmp_path / "x.tar"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "labels: 2 classes (a, b), by key label of .json (2); 2 inputs without" in capsys.readouterr().err
    assert labels_of(tmp_path / "out") == {"0.jpg": "b", "1.jpg": "a", "2.jpg": None, "3.jpg": None}
    pack_all(tmp_path, tmp_path / "x.tar", out="txt", labels="txt")
    assert labels_of(tmp_path / "txt") == {f"{i}.jpg": f"kind {i % 2}" for i in range(4)}
    pack_all(tmp_path, tmp_path / "x.tar", out="json", labels="json:caption")
    assert labels_of(tmp_path / "json") == {"0.jpg": "?", "1.jpg": None, "2.jpg": None, "3.jpg": None}
    with pytest.raises(ValueError, match=r"no sample has the key species in its .json: there are label, caption"):
        pack_all(tmp_path, tmp_path / "x.tar", out="none", labels="json:species")


def test_keys_that_may_all_be_the_label_are_asked_about_and_cls_goes_first(tmp_path):
    fields = [{"label": i, "class_name": "ab"[i]} for i in range(2)]
    write(tmp_path / "x.tar", samples(fields))
    with pytest.raises(ValueError, match=r"choose --labels json:label or --labels json:class_name, or --labels none"):
        pack_all(tmp_path, tmp_path / "x.tar")
    assert pack_all(tmp_path, tmp_path / "x.tar", labels="json:class_name").class_names == ("a", "b")
    write(tmp_path / "y.tar", samples(fields, [("cls", b"7")]))
    pack_all(tmp_path, tmp_path / "y.tar", out="cls", labels="column")
    assert labels_of(tmp_path / "cls") == {"0.jpg": "7", "1.jpg": "7"}
    write(tmp_path / "z.tar", samples([{"label": 0.5}]))
    with pytest.raises(ValueError, match=r"0.json: label: 0.5 is not a class; choose another key"):
        pack_all(tmp_path, tmp_path / "z.tar", out="float")
    write(tmp_path / "bad.tar", {"0.jpg": jpeg(0), "0.json": b"{"})
    with pytest.raises(PackError, match=r"0.json is not JSON"):
        pack_all(tmp_path, tmp_path / "bad.tar", out="bad", labels="json:label")


def test_a_label_of_several_images_is_that_of_each(tmp_path):
    write(
        tmp_path / "x.tar",
        {"a.0.jpg": jpeg(0), "a.1.jpg": jpeg(1), "a.cls": b"cat", "b.0.jpg": jpeg(2), "b.cls": b"dog"},
    )
    assert pack_all(tmp_path, tmp_path / "x.tar").left_aside == {"cls": 2}
    assert labels_of(tmp_path / "out") == {"a.0.jpg": "cat", "a.1.jpg": "cat", "b.0.jpg": "dog"}


def test_tars_named_by_wordnet_ids_are_classes_and_shards_are_not(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "shards").mkdir()
    for i, name in enumerate(("n01440764", "n01443537", "n01484850")):
        write(tmp_path / "train" / f"{name}.tar", {f"{name}_{10 * i + k}.JPEG": jpeg(10 * i + k) for k in range(2)})
        write(tmp_path / "shards" / f"part-{i:05d}.tar", {f"{10 * i + k}.jpg": jpeg(10 * i + k) for k in range(2)})
    expected = {
        f"{name}_{10 * i + k}.JPEG": name
        for i, name in enumerate(("n01440764", "n01443537", "n01484850"))
        for k in range(2)
    }
    tars = sorted(map(str, (tmp_path / "train").iterdir()))
    for number, sources in enumerate(([str(tmp_path / "train")], tars)):
        assert main(["pack", *sources, "--out", str(tmp_path / f"out{number}"), "--workers", "1"]) == 0
        assert "labels: 3 classes (n01440764, n01443537, n01484850), by names of archives" in capsys.readouterr().err
        assert labels_of(tmp_path / f"out{number}") == expected
    assert pack_all(tmp_path, tmp_path / "shards", out="plain").class_names == ()
    assert pack_all(tmp_path, tmp_path / "shards", out="chosen", labels="archive").class_names == tuple(
        f"part-{i:05d}" for i in range(3)
    )


def test_other_archives_are_classes_if_that_is_chosen(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("cat.tar", "dog.tar")):
        write(tmp_path / "in" / name, {f"{i}.jpg": jpeg(i), f"sub/{i + 5}.jpg": jpeg(i + 5)})
    (tmp_path / "in" / "9.jpg").write_bytes(jpeg(9))
    command = ["pack", str(tmp_path / "in"), "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "labels: none found; --labels archive takes the names of archives (cat, dog)" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "chosen"), "--labels", "archive"]) == 0
    assert "(cat, dog), by names of archives; 1 input without" in capsys.readouterr().err
    names = {"0.jpg": "cat", "5.jpg": "cat", "1.jpg": "dog", "6.jpg": "dog", "9.jpg": None}
    assert labels_of(tmp_path / "chosen") == names


def test_wordnet_ids_do_not_hide_other_labels(tmp_path):
    (tmp_path / "in" / "owl").mkdir(parents=True)
    (tmp_path / "in" / "elk").mkdir()
    for i, folder in enumerate(("owl", "elk")):
        (tmp_path / "in" / folder / f"{i}.jpg").write_bytes(jpeg(i))
    write(tmp_path / "in" / "n01440764.tar", {"7.jpg": jpeg(7)})
    assert pack_all(tmp_path, tmp_path / "in").class_names == ("elk", "owl")
    assert labels_of(tmp_path / "out")["7.jpg"] is None


def test_the_answers_that_questions_print_work_as_printed(tmp_path, capsys):
    grow(tmp_path / "trees", ["2019/01", "2019/02", "2020/01"])
    write(
        tmp_path / "pairs.tar", {f"{i}.{end}": jpeg(2 * i + (end == "png")) for i in range(2) for end in ("jpg", "png")}
    )
    for source, kind in (("trees", "labels"), ("pairs.tar", "members")):
        command = ["pack", str(tmp_path / source), "--workers", "1", "--out"]
        assert main([*command, str(tmp_path / "out")]) == 2
        answers = re.findall(rf"--{kind} ([\w:]+)", capsys.readouterr().err)
        assert len(answers) >= 2
        for number, answer in enumerate(answers):
            assert main([*command, str(tmp_path / f"{source}{number}"), f"--{kind}", answer]) == 0
