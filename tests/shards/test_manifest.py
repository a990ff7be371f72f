"""Manifests: the table of shards holds what the entries hold, and any way of reading gives the same set."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.config import PackConfig
from shards.ground.digests import digest
from shards.packing.pack import pack
from shards.sets import manifest as manifest_module
from shards.sets import open_set
from shards.sets.manifest import Manifest, ShardEntry, ShardTable
from tests.shards.pictures import fill
from tests.shards.web import Web, serving

DIGESTS = st.integers(1, 2**128 - 1).map(lambda number: f"{number:032x}")
NUMBERS = st.integers(0, 2**32 - 2)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(
    lambda text: "/" not in text
)
TALLIES = st.dictionaries(WORDS, NUMBERS, max_size=3).map(lambda tally: dict(sorted(tally.items())))
ENTRIES = st.builds(
    ShardEntry,
    name=WORDS.map(lambda word: f"{word}.tar"),
    num_samples=NUMBERS,
    num_rejected=NUMBERS,
    num_bytes=st.integers(0, 2**60),
    digests=st.dictionaries(st.sampled_from([".tar", ".index.npy", ".labels.npy"]), DIGESTS).map(
        lambda found: {suffix: found[suffix] for suffix in (".tar", ".index.npy", ".labels.npy") if suffix in found}
    ),
    max_width=NUMBERS,
    max_height=NUMBERS,
    max_bytes=NUMBERS,
    outcomes=TALLIES,
    rejections=TALLIES,
    jpegs=TALLIES,
)


def manifest_of(entries, class_names=("a", 'b"')):
    return Manifest(
        shards=ShardTable.of(entries),
        class_names=tuple(class_names),
        num_inputs=5,
        num_samples=sum(entry.num_samples for entry in entries),
        num_rejected=1,
        max_width=3,
        max_height=2,
        max_bytes=100,
        settings={"shuffle": True, "sources": ["x"]},
    )


def as_before(manifest):
    """The text that version 1 of the format has always been."""
    values = {"format": "moco-fast-shards", "version": 1, **{f: getattr(manifest, f) for f in vars(manifest)}}
    del values["shards"], values["has_label_sets"], values["left_aside"]
    lines = ",\n".join("  " + json.dumps(dataclasses.asdict(entry), ensure_ascii=False) for entry in manifest.shards)
    return f'{json.dumps(values, indent=1, ensure_ascii=False)[:-2]},\n "shards": [\n{lines}\n ]\n}}\n'


@given(st.lists(ENTRIES, max_size=5), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_table_holds_the_entries_and_joins(entries, cut):
    table = ShardTable.of(entries)
    assert list(table) == entries
    assert [table[number] for number in range(len(entries))] == entries
    assert table[1:4] == tuple(entries[1:4])
    assert [table.name(number) for number in range(len(table))] == [entry.name for entry in entries]
    assert table.num_samples.tolist() == [entry.num_samples for entry in entries]
    assert table.num_bytes.tolist() == [entry.num_bytes for entry in entries]
    joined = ShardTable.joined([ShardTable.of(entries[:cut]), ShardTable.of(entries[cut:])])
    assert joined == table
    assert bytes(ShardTable.of(joined).npz.view) == bytes(table.npz.view)
    assert pickle.loads(pickle.dumps(table)) == table


@given(st.lists(ENTRIES, max_size=5), st.lists(WORDS, max_size=2))
@settings(max_examples=60, deadline=None)
def test_text_and_identity_are_those_of_earlier_versions(entries, class_names):
    manifest = manifest_of(entries, class_names)
    text = manifest.to_json()
    assert text == as_before(manifest)
    facts = [(entry.num_samples, entry.digests.get(".tar"), entry.digests.get(".labels.npy")) for entry in entries]
    assert manifest.identity == digest(json.dumps([facts, class_names]).encode())
    laid_out_otherwise = json.dumps(json.loads(text))
    for each in (text, text.encode(), laid_out_otherwise):
        read = Manifest.from_json(each, where="x")
        assert (read, read.identity) == (manifest, manifest.identity)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_chunks_of_any_size_give_the_same_table_and_identity(at_once, monkeypatch):
    entries = [entry_of(number) for number in range(7)]
    whole = manifest_of(entries)
    text = whole.to_json()
    assert whole.identity  # kept
    monkeypatch.setattr("shards.sets.manifest._AT_ONCE", at_once)
    monkeypatch.setattr("shards.sets.shard_table._AT_ONCE", at_once)
    monkeypatch.setattr("shards.sets.manifest_text._CHUNK_BYTES", at_once)
    read = Manifest.from_json(text, where="x")
    assert list(read.shards) == list(ShardTable.of(entries)) == entries
    assert bytes(read.shards.npz.view) == bytes(whole.shards.npz.view)
    assert read.identity == whole.identity


def entry_of(number):
    return ShardEntry(
        name=f"shard-{number:06d}.tar",
        num_samples=10 + number,
        num_rejected=0,
        num_bytes=1000,
        digests={".tar": f"{number + 1:032x}"},
        max_width=3,
        max_height=2,
        max_bytes=100,
        outcomes={"copied": number} if number % 2 else {"converted": 1},
        rejections={},
    )


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A folder whose manifest has a table beside it."""
    monkeypatch.setattr(manifest_module, "_SHORT_BYTES", 700)
    manifest = manifest_of([entry_of(number) for number in range(9)])
    write(manifest, tmp_path)
    return tmp_path, manifest


def write(manifest, folder):
    files = list(manifest.files())
    assert [name for name, _ in files] == ["manifest.npz", "manifest.json"]
    for name, data in files:
        (folder / name).write_bytes(data)


@pytest.fixture
def parsed(monkeypatch):
    """Notes whenever a list of shards is parsed as JSON."""
    found = []

    def noting(text, parse=manifest_module.parse):
        found.append(1)
        return parse(text)

    monkeypatch.setattr(manifest_module, "parse", noting)
    return found


def test_a_long_manifest_is_read_from_its_table(long, parsed):
    folder, manifest = long
    read = Manifest.read(folder)
    assert (read, read.identity, parsed) == (manifest, manifest.identity, [])
    assert Manifest.from_json((folder / "manifest.json").read_bytes(), where="x") == manifest
    # Anyone's numpy reads it.
    with np.load(folder / "manifest.npz") as columns:
        assert columns["num_samples"].tolist() == list(range(10, 19))


def absent(folder, manifest):
    (folder / "manifest.npz").unlink()


def another(folder, manifest):
    table = ShardTable.of([entry_of(number + 100) for number in range(9)])
    (folder / "manifest.npz").write_bytes(table.npz.view)


def cut(folder, manifest):
    path = folder / "manifest.npz"
    path.write_bytes(path.read_bytes()[:-7])


def by_an_earlier_version(folder, manifest):
    (folder / "manifest.json").write_text(as_before(manifest))


def without_a_line(folder, manifest):
    path = folder / "manifest.json"
    lines = path.read_text().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if "shard-000004" in line)
    left = manifest.num_samples - manifest.shards[4].num_samples
    text = "".join(lines[:at] + lines[at + 1 :])
    path.write_text(text.replace(f' "num_samples": {manifest.num_samples}', f' "num_samples": {left}', 1))


@pytest.mark.parametrize(
    ("change", "is_told"),
    [(absent, True), (another, True), (cut, True), (by_an_earlier_version, False), (without_a_line, True)],
)
def test_manifest_json_is_what_counts(long, parsed, change, is_told):
    folder, manifest = long
    change(folder, manifest)
    read = Manifest.read(folder)
    expected = [entry for entry in manifest.shards if change is not without_a_line or entry.name != "shard-000004.tar"]
    assert list(read.shards) == expected
    assert parsed == [1]
    assert bool(Manifest.compared(str(folder))[1]) == is_told


def without_a_shard(values):
    del values["shards"][1]


def with_a_shard_twice(values):
    values["shards"].append(values["shards"][0])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_a_shard, "num_samples is 9, but the shards that it lists have 6"),
        (with_a_shard_twice, "num_samples is 9, but the shards that it lists have 12"),
        (lambda values: values.update(num_samples=8), "num_samples is 8, but"),
        (lambda values: values.update(num_samples="9"), "num_samples is '9'"),
        (lambda values: values.update(class_names="ab"), "class_names is 'ab'"),
        (lambda values: values.update(settings=[]), r"settings is \[\]"),
        (
            lambda values: values["shards"][1].update(name="../other/shard-000001.tar"),
            "the shard '../other/shard-000001.tar' has no name of a file",
        ),
        (lambda values: values["shards"][1].update(name=""), "the shard '' has no name of a file"),
    ],
)
def test_an_edited_manifest_is_refused(edit, message, tmp_path):
    pack(PackConfig(sources=(str(fill(tmp_path / "in", 9)),), out=str(tmp_path / "out"), shard_samples=3, workers=1))
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \(.*{message}"):
        Manifest.read(path.parent)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"max_bytes": 5}, "manifest.json: has changed since it was packed: max_bytes is 5, but"),
        ({"class_names": ["a"]}, "has the label 1, but manifest.json names 1 classes"),
    ],
)
def test_verify_names_what_was_edited(edit, message, tmp_path, capsys):
    source, out = fill(tmp_path / "in", 9, classes=2), tmp_path / "out"
    pack(PackConfig(sources=(str(source),), out=str(out), shard_samples=3, workers=1))
    values = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(values | edit))
    assert main(["verify", str(out), "--workers", "1"]) == 1
    assert message in capsys.readouterr().out


def test_index_writes_a_table_that_is_missing(long, parsed, capsys):
    folder, manifest = long
    manifest = dataclasses.replace(manifest, jpegs={"4:2:0": manifest.num_samples})
    write(manifest, folder)
    complete = {path.name: path.read_bytes() for path in folder.iterdir()}
    for change in (by_an_earlier_version, absent, another):
        change(folder, manifest)
        assert main(["index", str(folder)]) == 0
        assert "wrote manifest.npz" in capsys.readouterr().out
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == complete
    # There is nothing more to do.
    assert main(["index", str(folder)]) == 2


def test_verify_names_a_table_that_is_not_the_manifest_s(long, capsys):
    folder, _ = long
    (folder / "manifest.npz").unlink()
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    assert "manifest.npz: is absent, or not the one that manifest.json names" in capsys.readouterr().out


class Counting(Web):
    """Notes what is read, and how much."""

    reads: list[tuple[str, str | None]]

    def do_GET(self):  # noqa: N802 - the name that http.server calls
        self.reads.append((self.path.rpartition("/")[2], self.headers.get("Range")))
        super().do_GET()


def test_a_long_manifest_is_fetched_once(long, parsed):
    folder, manifest = long
    files = {f"set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with serving(Counting, files) as (address, handler):
        handler.reads = []
        opened = open_set(f"{address}/set")
        assert (opened.manifest, parsed) == (manifest, [])
        assert opened.shard_sizes.tolist() == list(range(10, 19))
        assert handler.reads == [("manifest.json", "bytes=0-699"), ("manifest.npz", None)]
        copy = pickle.loads(pickle.dumps(opened))
        assert (copy.manifest, copy.digest) == (manifest, opened.digest)
        assert len(handler.reads) == 2
        # Another manifest has copies of its own.
        entries = [*manifest.shards[:8], dataclasses.replace(manifest.shards[8], num_bytes=999)]
        handler.files |= {f"set/{name}": data for name, data in manifest_of(entries).files()}
        assert open_set(f"{address}/set").digest != opened.digest


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"format": "moco-fast-shards", "version": 1', "is not JSON"),
        ("[1]", "was not written by make-shards"),
        ('{"format": "moco-fast-shards", "version": 1, "shards": []}', "lacks 'class_names'"),
        ('{"format": "moco-fast-shards", "version": 1}', "lacks 'shards'"),
        ('{"format": "moco-fast-shards", "version": 1, "shards": [3]}', "lacks|damaged"),
    ],
)
def test_what_is_no_manifest_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(broken, where="x")


@pytest.mark.parametrize("values", [{"digests": {".tar": "12"}}, {"digests": {".tar": "zz" * 16}}, {"num_bytes": -1}])
def test_a_shard_with_impossible_values_is_damage(values):
    text = json.loads(manifest_of([entry_of(1)]).to_json())
    text["shards"][0] |= values
    with pytest.raises(ValueError, match=r"^x is damaged \(.*restore it, or pack again"):
        Manifest.from_json(json.dumps(text), where="x")


def test_a_large_table_is_pickled_as_a_path_that_others_map():
    table = ShardTable.of(entry_of(number) for number in range(2000))
    pickled = pickle.dumps(table)
    assert len(pickled) < 400
    code = "import pickle, sys; t = pickle.loads(bytes.fromhex(sys.argv[1])); print(len(t), t[1234].name)"
    command = [sys.executable, "-c", code, pickled.hex()]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert found.stdout.split() == ["2000", "shard-001234.tar"]
    del table
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)


def test_a_file_that_was_replaced_is_not_taken_for_the_one_that_was_shared(long):
    folder, _ = long
    large = manifest_of([entry_of(number) for number in range(2000)])
    write(large, folder)
    pickled = pickle.dumps(Manifest.read(folder))
    assert str(folder).encode() in pickled
    (folder / "new").write_bytes(bytes(large.shards.npz.view))
    (folder / "new").replace(folder / "manifest.npz")
    with pytest.raises(FileNotFoundError, match="another"):
        pickle.loads(pickled)
