"""Written embeddings: every format, several ranks, kills, refusals, damage."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import moco_fast
from moco_fast import distributed
from moco_fast.cli import main
from moco_fast.embedding import write
from moco_fast.embedding.index import open_index
from moco_fast.embedding.stream import Vectors, divide
from moco_fast.embedding.write import Order, write_embeddings
from moco_fast.encoders.open import open_encoder
from pipelines.config import DataConfig
from pipelines.world import World
from shards.sets import open_set
from tests.moco_fast.embedding.written import photos_of_noise
from tests.pipelines.shard_files import damaged_copy
from tests.warm import WarmPython


def order_of(run: Path | str, images: Path | str, out: Path | str, *, world: World = World(), **changes: Any) -> Order:
    opened = open_encoder(str(run))
    vectors = Vectors(
        encoder=opened.encoder,
        size=32,
        crop=1.0,
        batch_size=8,
        data=DataConfig(shards="", backend="dali", num_threads=1),
        device=torch.device("cpu"),
        world=world,
        **changes,
    )
    return Order(
        vectors=vectors, encoder=str(run), which="query", digest=opened.digest, images=str(images), out=Path(out)
    )


def command(run: Path, images: Path | str, out: Path, *more: str) -> list[str]:
    words = ["embed", str(run), str(images), "--out", str(out), "--device", "cpu", "--batch-size", "8"]
    return [*words, "--backend", "dali", *more]


def read(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Vectors and the other columns, read with the libraries that users have."""
    names = ("index", "key", "source", "label", "class_name")
    if path.suffix in (".npy", ".safetensors"):
        values = np.load(path) if path.suffix == ".npy" else load_file(path)["values"]
        with path.with_name(f"{path.name}.csv").open(newline="") as file:
            rows = [
                {
                    name: value if name not in ("index", "label") else int(value) if value else None
                    for name, value in row.items()
                }
                for row in csv.DictReader(file)
            ]
        return values, rows
    table = pq.read_table(path if path.suffix else sorted(path.glob("part-*.parquet")))
    vectors = table["vector"].combine_chunks()
    values = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return values, table.select(names).to_pylist()


def stop_before_the_end(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed until all parts are there; then the disk is full."""

    def stop(*_: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(write._Writing, "_finish", stop)
        assert main(words) == 2


def contents(path: Path) -> dict[str, bytes]:
    """Every file that belongs to written embeddings, by its name."""
    files = sorted(path.rglob("*")) if path.is_dir() else sorted(path.parent.glob(f"{path.stem}.*"))
    return {file.name: file.read_bytes() for file in files}


@given(num_samples=st.integers(1, 10**9), row_bytes=st.integers(2, 1 << 24), batch_size=st.integers(1, 4096))
def test_parts_cover_the_set_in_whole_batches(num_samples: int, row_bytes: int, batch_size: int) -> None:
    if num_samples * row_bytes > 1 << 40:
        num_samples = (1 << 40) // row_bytes
    parts = divide(num_samples, row_bytes=row_bytes, batch_size=batch_size)
    assert (parts[0].start, parts[-1].stop) == (0, num_samples)
    assert all(before.stop == after.start for before, after in pairwise(parts))
    assert all(len(part) % batch_size == 0 for part in parts[:-1])
    assert len(parts[0]) * row_bytes <= (128 << 20) + batch_size * row_bytes


@pytest.mark.parametrize(
    ("name", "dtype", "normalize"),
    [
        ("x.parquet", "float16", True),
        ("x", "float32", False),
        ("x.npy", "float32", True),
        ("x.safetensors", "float16", False),
    ],
)
def test_every_format_holds_the_encoders_vectors(
    name: str, dtype: str, normalize: bool, finished_run: Path, packed_demo: Any, tmp_path: Path
) -> None:
    out, shards = tmp_path / name, open_set(packed_demo.val)
    flags = [] if normalize else ["--no-normalize"]
    assert main(command(finished_run, packed_demo.val, out, "--dtype", dtype, *flags)) == 0
    values, rows = read(out)
    encoder = moco_fast.load_encoder(finished_run)
    found = moco_fast.embed(encoder, packed_demo.val, normalize=normalize, device="cpu")
    np.testing.assert_allclose(values, found.values, atol=1e-2 if dtype == "float16" else 1e-4)
    assert (values.dtype, values.shape) == (np.dtype(dtype), (72, 128))
    assert [row["index"] for row in rows] == list(range(72))
    assert [row["key"] for row in rows] == [f"{key:012d}" for key in shards.index(0)["position"].tolist()]
    assert [row["label"] for row in rows] == shards.index(0)["label"].tolist()
    assert [row["class_name"] for row in rows] == [shards.class_names[label] for label in shards.index(0)["label"]]
    assert [row["source"] for row in rows] == (packed_demo.val / "shard-000000.sources.txt").read_text().splitlines()
    assert not list(tmp_path.glob(".*")), "work is left behind"
    assert open_index(out).header["num_rows"] == 72


def test_safetensors_hold_labels_too(finished_run: Path, packed_demo: Any, tmp_path: Path) -> None:
    assert main(command(finished_run, packed_demo.val, tmp_path / "x.safetensors", "--layer", "head")) == 0
    found = load_file(tmp_path / "x.safetensors")
    assert found["values"].shape == (72, 16)
    assert found["label"].tolist() == open_set(packed_demo.val).index(0)["label"].tolist()
    assert found["index"].tolist() == list(range(72))


def write_on_this_rank(run: str, images: str, out: str) -> tuple[int, int]:
    world = World(rank=distributed.rank(), world_size=distributed.world_size(), local_world_size=1)
    written = write_embeddings(order_of(run, images, out, world=world))
    return written.num_rows, written.num_damaged


@pytest.mark.parametrize("name", ["x.parquet", "x.npy"])
def test_two_ranks_write_what_one_writes(
    name: str, run_ranks: Callable[..., Any], finished_run: Path, packed_demo: Any, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    places = (str(finished_run), str(packed_demo.train))
    assert run_ranks(write_on_this_rank, *places, str(tmp_path / "one" / name), world_size=1) == [(288, 0)]
    assert run_ranks(write_on_this_rank, *places, str(tmp_path / "two" / name)) == [(288, 0)] * 2
    assert contents(tmp_path / "one" / name) == contents(tmp_path / "two" / name)


@pytest.mark.slow
def test_ranks_that_a_launcher_starts_pack_a_folder_once(finished_run: Path, packed_demo: Any, tmp_path: Path) -> None:
    images = packed_demo.val.parent / "images" / "val" / "coffee"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines"]
    launch += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = command(finished_run, images, tmp_path / "x.npy")
    done = subprocess.run(
        [*launch, "-m", "moco_fast.cli", *words], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "4 vectors of 128 numbers" in done.stdout
    expected = moco_fast.embed(moco_fast.load_encoder(finished_run), images, device="cpu")
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected.values, atol=1e-4)


KILLED = """
import os, signal, sys
from moco_fast.embedding import formats, write

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[1]
part, record = write._Writing._write_part, write.write_whole
if where == "before a part":
    write._Writing._write_part = lambda self, number, rows: die() if number == 3 else part(self, number, rows)
elif where == "before a part's record":
    write.write_whole = lambda path, *a, **k: die() if path.name == "part-000003.json" else record(path, *a, **k)
elif where == "while parts are put together":
    formats._write_damaged = die
elif where == "before work is cleared away":
    write.remove = die
from moco_fast.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("where", "name", "computed"),
    [
        ("before a part", "x.parquet", [3, 4, 5, 6, 7, 8]),
        ("before a part's record", "x.npy", [3, 4, 5, 6, 7, 8]),
        ("while parts are put together", "x", []),
        ("before work is cleared away", "x.safetensors", None),
    ],
)
def test_after_a_kill_the_same_command_writes_the_same_files(
    where: str,
    name: str,
    computed: list[int] | None,
    warm_python: WarmPython,
    finished_run: Path,
    packed_demo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert main(command(finished_run, packed_demo.val, tmp_path / "whole" / name)) == 0
    words = command(finished_run, packed_demo.val, tmp_path / "killed" / name)
    killed = warm_python.run("-c", KILLED, where, *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "killed" / name).exists() == (computed is None)
    written: list[int] = []
    write_part = write._Writing._write_part

    def note(self: Any, number: int, rows: Any) -> None:
        written.append(number)
        write_part(self, number, rows)

    monkeypatch.setattr(write._Writing, "_write_part", note)
    capsys.readouterr()
    assert main(words) == 0
    assert written == (computed or [])
    assert ("were there already" in capsys.readouterr().out) == (computed is None)
    assert contents(tmp_path / "whole" / name) == contents(tmp_path / "killed" / name)
    assert not list((tmp_path / "killed").glob(".*"))


def test_what_was_begun_otherwise_is_refused_with_the_difference(
    finished_run: Path,
    packed_demo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.npy"

    stop_before_the_end(command(finished_run, packed_demo.val, out), monkeypatch)
    changes = {
        "--layer was backbone, is head": ["--layer", "head"],
        "--normalize was True, is False": ["--no-normalize"],
        "--dtype was float32, is float16": ["--dtype", "float16"],
        "--crop was 1.0, is 0.5": ["--crop", "0.5"],
        "--precision was fp32, is bf16": ["--precision", "bf16"],
    }
    for says, more in changes.items():
        assert main(command(finished_run, packed_demo.val, out, *more)) == 2
        assert says in capsys.readouterr().err
    assert main(command(finished_run, packed_demo.train, out)) == 2
    assert "--images was" in capsys.readouterr().err
    assert main(command(finished_run, packed_demo.val, out)) == 0
    before = contents(out)
    assert main(command(finished_run, packed_demo.val, out, "--layer", "head")) == 2
    assert f"remove {out} to start over" in capsys.readouterr().err
    assert main([*command(finished_run, packed_demo.val, out), "--which", "query"]) == 0
    assert "were there already" in capsys.readouterr().out
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "images", "more", "says"),
    [
        ("x.zip", "{val}", [], "end the name with .parquet, .npy or .safetensors"),
        ("no/x.npy", "{val}", [], "there is no such folder to write to"),
        ("x.npy", "{val}", ["--layer", "patches"], "vectors per image, and one is wanted"),
        ("x.npy", "{val}", ["--layer", "stage9"], "there is no layer 'stage9'"),
        ("x.npy", "{val}", ["--crop", "2"], "--crop is 2.0"),
        ("x.npy", "{val}", ["--batch-size", "0"], "--batch-size is 0"),
        ("x.npy", "{val}", ["--precision", "fp16"], "--precision fp16 needs a GPU"),
        ("x.npy", "{there}/nothing", [], "nothing"),
        ("photos/x.npy", "{there}/photos", [], "lies inside"),
        ("x.npy", "{there}/photos", [], "no image"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    name: str,
    images: str,
    more: list[str],
    says: str,
    finished_run: Path,
    packed_demo: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    where = images.format(val=packed_demo.val, there=tmp_path)
    words = ["embed", str(finished_run), where, "--out", str(tmp_path / name), "--device", "cpu", *more]
    assert main(words) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "broken.jpg"]


def test_parquet_without_its_package_says_what_to_install(
    finished_run: Path,
    packed_demo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("moco_fast.embedding.formats.find_spec", lambda name: None)
    assert main(command(finished_run, packed_demo.val, tmp_path / "x.parquet")) == 2
    assert "pip install 'moco-fast[parquet]'" in capsys.readouterr().err
    assert main(command(finished_run, packed_demo.val, tmp_path / "x.npy")) == 0


def test_something_else_is_not_overwritten(
    finished_run: Path, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    before = (tmp_path / "x.npy").read_bytes()
    assert main(command(finished_run, packed_demo.val, tmp_path / "x.npy")) == 2
    assert "is something else" in capsys.readouterr().err
    assert (tmp_path / "x.npy").read_bytes() == before


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_damaged_samples_have_no_vector_and_are_listed(
    backend: str, finished_run: Path, packed_demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = damaged_copy(packed_demo.val, tmp_path / "damaged", shard=0, sample=20)
    for images, name in ((packed_demo.val, "sound.parquet"), (damaged, "damaged.parquet")):
        assert main(command(finished_run, images, tmp_path / name, "--backend", backend)) == 0
    assert "1 image cannot be read and has no vector" in capsys.readouterr().err
    sound, rows = read(tmp_path / "sound.parquet")
    values, left = read(tmp_path / "damaged.parquet")
    keep = np.arange(72) != 20
    assert [row["index"] for row in left] == np.flatnonzero(keep).tolist()
    assert [row["label"] for row in left] == [row["label"] for row in rows if row["index"] != 20]
    np.testing.assert_array_equal(values, sound[keep])
    [line] = (tmp_path / "damaged.parquet.damaged.jsonl").read_text().splitlines()
    listed = json.loads(line)
    assert (listed["index"], listed["key"], listed["source"]) == (20, int(rows[20]["key"]), rows[20]["source"])
    assert "do not match their crc32c" in listed["reason"]
    assert not (tmp_path / "sound.parquet.damaged.jsonl").exists()
    found = moco_fast.embed(moco_fast.load_encoder(finished_run), damaged, device="cpu")
    assert (len(found), len(found.names), len(found.rejected)) == (71, 71, 1)


def test_a_folder_is_packed_on_the_fly_and_only_once(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = photos_of_noise(tmp_path / "photos", num=9)
    out = tmp_path / "x.parquet"

    stop_before_the_end(command(finished_run, images, out), monkeypatch)
    shutil.rmtree(images)
    assert main(command(finished_run, tmp_path / "others", out)) == 2
    assert "--images was" in capsys.readouterr().err
    assert main(command(finished_run, images, out)) == 0
    values, rows = read(out)
    assert [Path(row["source"]).name for row in rows] == [f"{number}.png" for number in range(9)]
    assert [row["label"] for row in rows] == [None] * 9
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
    [line] = (tmp_path / "x.parquet.damaged.jsonl").read_text().splitlines()
    assert "broken.jpg: damaged" in json.loads(line)["reason"]
    assert main(command(finished_run, images, out)) == 0
    assert "were there already" in capsys.readouterr().out


def test_vectors_that_are_not_finite_are_refused(finished_run: Path, packed_demo: Any, tmp_path: Path) -> None:
    order = order_of(finished_run, packed_demo.val, tmp_path / "x.npy", dtype="float16", normalize=False)
    last = order.vectors.encoder.backbone
    handle = last.register_forward_hook(lambda _module, _inputs, output: output * 1e6)
    with pytest.raises(ValueError, match="take --normalize or --dtype float32"):
        write_embeddings(order)
    handle.remove()
    last.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    with pytest.raises(ValueError, match="the encoder's output is not finite: it has diverged"):
        write_embeddings(replace(order, vectors=replace(order.vectors, normalize=True), out=tmp_path / "y.npy"))
    assert not list(tmp_path.glob("*.npy"))


def test_embeddings_of_one_name_and_other_formats_do_not_touch_each_other(
    finished_run: Path, packed_demo: Any, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text("a user's own")
    assert main(command(finished_run, packed_demo.val, tmp_path / "x.npy")) == 0
    before = contents(tmp_path / "x.npy")
    assert main(command(finished_run, packed_demo.val, tmp_path / "x.safetensors", "--layer", "head")) == 0
    assert before.items() <= contents(tmp_path / "x.npy").items()
    assert open_index(tmp_path / "x.npy").header["dim"] == 128
    assert open_index(tmp_path / "x.safetensors").header["dim"] == 16
