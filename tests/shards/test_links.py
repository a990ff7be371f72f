"""Symbolic links: what is followed by default and with --follow-links; every link is packed, rejected or counted."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.config import SourceOptions
from shards.sources.base import Aside
from shards.sources.folder import FolderSource
from tests.shards.archives import labels_of, pack_all
from tests.shards.pictures import fill, jpeg
from tests.shards.test_foreign import write
from tests.shards.test_sources import table

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def linked(tmp_path):
    """A folder with a link of every kind, beside what they lead to."""
    outside = fill(tmp_path / "outside", 3)
    write(outside / "more.tar", {"10.jpg": jpeg(10), "11.jpg": jpeg(11)})
    source = tmp_path / "in"
    (source / "cats").mkdir(parents=True)
    (source / "cats" / "20.jpg").write_bytes(jpeg(20))
    for name, target in {
        "again": "cats",
        "cats/loop": "../cats",
        "dogs": "../outside",
        "z-dogs": "../outside",
        "gone.jpg": "nowhere.jpg",
        "round.jpg": "round.jpg",
        "cats/inside.jpg": "20.jpg",
        "cats/outside.jpg": "../../outside/0000.jpg",
    }.items():
        (source / name).symlink_to(target)
    return source


def test_links_are_rejected_with_the_option_that_packs_them(tmp_path, linked, capsys):
    assert main(["pack", str(linked), "--out", str(tmp_path / "out"), "--workers", "1"]) == 3
    said = capsys.readouterr()
    assert "5 links not followed: --follow-links packs what is there" in said.out
    lines = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    reasons = {line["source"].removeprefix(f"{linked}/"): (line["reason"], line["detail"]) for line in lines}
    assert {name: reason for name, (reason, _) in reasons.items()} == {
        "again": "link to a folder",
        "cats/loop": "link to a folder",
        "dogs": "link leaves the source",
        "z-dogs": "link leaves the source",
        "gone.jpg": "unreadable",
        "round.jpg": "unreadable",
        "cats/outside.jpg": "link leaves the source",
    }
    assert reasons["dogs"][1] == f"to {tmp_path}/outside; --follow-links packs what is there"
    # The link stays inside: it is the image under another name.
    assert set(labels_of(tmp_path / "out")) == {"20.jpg", "inside.jpg"}


def test_links_are_followed_and_every_folder_is_listed_once(tmp_path, linked, capsys):
    command = ["pack", str(linked), "--out", str(tmp_path / "out"), "--workers", "1", "--follow-links"]
    assert main([*command, "--max-rejected", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "left aside 3 (link to a folder that is listed already 3)" in said
    assert "not followed" not in said
    assert "rejected 2 of 10 (unreadable 2)" in said
    # Those of the archive lie in no folder.
    assert labels_of(tmp_path / "out") == {
        **dict.fromkeys(("20.jpg", "inside.jpg", "outside.jpg"), "cats"),
        **dict.fromkeys(("0000.jpg", "0001.jpg", "0002.jpg"), "dogs"),
        **dict.fromkeys(("10.jpg", "11.jpg")),
    }
    first = json.loads((tmp_path / "out" / "left-aside.jsonl").read_text().splitlines()[0])
    assert first["first"] == f"{linked}/again"


def test_a_link_to_what_holds_the_source_ends_there(tmp_path):
    source = fill(tmp_path / "top" / "in", 1)
    fill(tmp_path / "top" / "beside", 2)
    (source / "up").symlink_to("..")
    manifest = pack_all(tmp_path, source, follow_links=True)
    assert (manifest.num_samples, manifest.left_aside) == (3, {"link to a folder that is listed already": 1})


def snapshot(hub, revision=REVISION):
    """A repository as huggingface_hub lays it out: bytes by their hash, links by name for each revision."""
    (hub / "blobs").mkdir(parents=True, exist_ok=True)
    folder = hub / "snapshots" / revision
    for i in range(6):
        name = folder / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        (hub / "blobs" / f"{i:040x}").write_bytes(jpeg(i))
        name.symlink_to(os.path.relpath(hub / "blobs" / f"{i:040x}", name.parent))
    table("parquet", hub / "blobs" / f"{6:040x}", {"image": [jpeg(6), jpeg(7)]})
    (folder / "more.parquet").symlink_to(f"../../blobs/{6:040x}")
    return folder


def test_a_snapshot_of_hugging_faces_cache_is_packed_by_default(tmp_path):
    folder = snapshot(tmp_path / "hub" / "datasets--org--name")
    (folder / "secret.jpg").symlink_to(fill(tmp_path / "outside", 1) / "0000.jpg")
    manifest = pack_all(tmp_path, folder, workers=2, shard_samples=3, max_rejected=1.0)
    assert (manifest.num_samples, manifest.rejections) == (8, {"link leaves the source": 1})
    assert manifest.class_names == ("cat", "dog")
    assert pack_all(tmp_path, folder / "train", out="part").num_samples == 6
    (tmp_path / "by-link").symlink_to(folder)
    assert pack_all(tmp_path, tmp_path / "by-link", out="by-link-out", max_rejected=1.0).num_samples == 8


@pytest.mark.parametrize("source", ["datasets--org--name", "."])
@pytest.mark.parametrize("follow", [False, True])
def test_a_whole_repository_of_the_cache_is_refused_with_its_revisions(tmp_path, source, follow):
    hub = tmp_path / "hub" / "datasets--org--name"
    for revision in (REVISION, REVISION[::-1]):
        snapshot(hub, revision)
    with pytest.raises(
        ValueError, match=rf"give one of them, .*/snapshots/{REVISION} or .*/snapshots/{REVISION[::-1]}"
    ):
        pack_all(tmp_path, tmp_path / "hub" / source, follow_links=follow)


_places = st.sampled_from(["in", "in/a", "in/a/b", "in/c", "out", "out/d", "out/d/e"])


@settings(max_examples=30, deadline=None)
@given(links=st.lists(st.tuples(_places, _places), max_size=8), files=st.lists(_places, max_size=6))
def test_listing_ends_and_reaches_every_folder_behind_links_once(tmp_path_factory, links, files):
    top = tmp_path_factory.mktemp("links")
    for folder in ("in/a/b", "in/c", "out/d/e"):
        (top / folder).mkdir(parents=True)
    for number, folder in enumerate(files):
        (top / folder / f"{number}.jpg").write_bytes(b"")
    for number, (place, target) in enumerate(links):
        (top / place / f"link{number}").symlink_to(top / target)
    found = list(FolderSource(str(top / "in"), SourceOptions(follow_links=True)).inputs(top / "spool"))
    listed = [os.path.realpath(top / "in" / os.fsdecode(item.name)) for item in found if not isinstance(item, Aside)]
    assert len(set(listed)) == len(listed)
    reached = {str(top / "in")}
    while True:
        more = {
            str(top / target)
            for place, target in links
            if any(f"{top / place}/".startswith(f"{each}/") for each in reached)
        }
        if more <= reached:
            break
        reached |= more
    expected = {
        f"{top / folder}/{number}.jpg"
        for number, folder in enumerate(files)
        if any(f"{top / folder}/".startswith(f"{each}/") for each in reached)
    }
    assert set(listed) == expected
