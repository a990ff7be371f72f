import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set
from shards.tools.verify import verify
from tests.shards.pictures import fill


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    source = fill(folder / "in", 8, classes=2)
    pack(PackConfig(sources=(str(source),), out=str(folder / "out"), shard_samples=4, workers=1))
    return folder / "out"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_found_and_its_shard_named(packed, data):
    suffix = data.draw(st.sampled_from([".tar", ".index.npy", ".sources.txt", ".idx"]))
    path = packed / f"shard-000001{suffix}"
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        problems = verify(packed)
    finally:
        path.write_bytes(whole)
    assert problems
    assert {problem.shard for problem in problems} == {"shard-000001.tar"}
    if suffix == ".tar":
        records = open_set(packed).index(1)
        inside = (records["offset"] <= at) & (at < records["offset"] + records["size"])
        if inside.any():
            key = f"{int(records['position'][np.argmax(inside)]):012d}"
            assert any(problem.sample == key and "crc32c" in problem.what for problem in problems)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_is_found(packed, data):
    path = packed / "shard-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        problems = verify(packed)
    finally:
        path.write_bytes(whole)
    assert len(problems) >= 2
    assert {problem.shard for problem in problems} == {"shard-000000.tar"}


def test_the_report_is_the_same_for_any_number_of_workers(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    for shard in (0, 1):
        path = tmp_path / "out" / f"shard-00000{shard}.tar"
        damaged = bytearray(path.read_bytes())
        for record in open_set(packed).index(shard)[1:3]:
            damaged[int(record["offset"]) + 300] ^= 1
        path.write_bytes(damaged)
    problems = verify(tmp_path / "out", decode=True)
    assert len(problems) == 2 * 3
    assert [p.shard for p in problems] == ["shard-000000.tar"] * 3 + ["shard-000001.tar"] * 3
    assert verify(tmp_path / "out", decode=True, workers=2) == problems


def test_the_command_says_so_and_fails(packed, capsys):
    assert main(["verify", str(packed), "--decode"]) == 0
    path = packed / "shard-000000.tar"
    whole = path.read_bytes()
    path.unlink()
    try:
        assert main(["verify", str(packed)]) == 1
    finally:
        path.write_bytes(whole)
    assert "shard-000000.tar cannot be read" in capsys.readouterr().out
    assert main(["verify", str(packed / "nowhere")]) == 2


def test_help_loads_nothing_heavy():
    code = """
import sys, shards.cli
try:
    shards.cli.main(["pack", "--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"numpy", "PIL", "torch", "nvidia", "obstore", "pyarrow", "cv2", "tqdm"} & set(sys.modules)
assert not heavy, heavy
from shards import Manifest, ShardSet
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--resize" in result.stdout
