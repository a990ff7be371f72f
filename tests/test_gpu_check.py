"""`make gpu-check DEVICE=cpu` runs everywhere, so that the script is in order when there is a GPU."""

import argparse
import dataclasses
import inspect
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig
from shards.sets import open_set
from tests.pipelines.shard_files import jpeg, smooth_image
from tests.scripts import load

ROOT = Path(__file__).parent.parent


def check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_every_part_shows_something_on_the_cpu(tmp_path):
    out, data = tmp_path / "out", tmp_path / "data"
    # The part that was done before is not done again; the one that cannot succeed does not keep the others from it.
    out.mkdir()
    (out / "tests-step.json").write_text(json.dumps({"rows": [], "notes": ["done before"], "figures": {}, "ok": True}))
    blocked = out / "momentum.partial"
    blocked.mkdir()
    # The other kinds run in the next test.
    names = ["environment", "data", "tests-step", "end-to-end-256", "step-256-bf16", "momentum"]
    words = ("--device", "cpu", "--out", str(out), "--data", str(data), "--part", *names)
    result = check(*words)
    assert result.returncode == 1, result.stdout
    assert "momentum: failed" in result.stdout
    assert "IsADirectoryError" in (out / "momentum.log").read_text()
    blocked.rmdir()
    result = check(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("was done before") == len(names) - 1

    report = (out / "report.md").read_text()
    assert "done before" in report
    assert report in result.stdout
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert found["environment"]["figures"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    end_to_end = found["end-to-end-256"]["figures"]
    assert f"{end_to_end['end_to_end']['median']:,.0f}" in report
    assert end_to_end["parts_alone_s"].keys() >= {"query forward", "backward", "momentum update"}
    assert found["step-256-bf16"]["figures"]["samples_per_s"].keys() == {"ours", "authors'", "supervised"}
    assert found["momentum"]["figures"]["claims"][0]["ours"] > 0
    row = found["end-to-end-256"]["rows"][0]
    assert row["backend"] == "dali", "a loader's figures carry the backend that made them"
    assert (
        f"    momentum: encoder resnet18_quarter, ours, us {found['momentum']['rows'][0]['ours, us']}" in result.stdout
    )
    assert not list(out.glob("*.log"))
    assert not list(out.glob("*.partial"))


@pytest.mark.slow
def test_every_kind_of_part_runs_on_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    """The branches that only a GPU takes: streams, events, memory figures, DALI's graph for it."""
    runner = load("gpu_check")
    of_kind = {part.kind: part.name for part in reversed(runner.parts("cuda"))}
    # The GPU's tests run on it in test_fake_cuda.py.
    names = {*of_kind.values(), "end-to-end-32-ordered", "end-to-end-32-graphs"} - {of_kind["tests"]}
    chosen = [runner.smaller(part) for part in runner.parts("cuda") if part.name in names]
    # Triton's interpreter takes 50 ms for an image of any size.
    fewer = {"batch": 4, "batches": [4]}
    chosen = [
        dataclasses.replace(part, options=part.options | {name: fewer[name] for name in fewer.keys() & part.options})
        for part in chosen
    ]
    photos = tmp_path / "photos.tar"
    with tarfile.open(photos, "w") as tar:
        for number in range(40):
            member = tarfile.TarInfo(f"{number}.jpg")
            image = jpeg(smooth_image(np.random.default_rng(number), 60, 80))
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    out, data = tmp_path / "out", tmp_path / "data"
    out.mkdir()
    data.mkdir()
    # All in one process, which imports once; the test above gives each its own.
    jobs = [runner.job(part, "cuda", out, data, photos) for part in chosen]
    done = subprocess.run(
        [sys.executable, "tests/fake_gpu/gpu_parts.py", *jobs],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr(runner, "parts", lambda _: chosen)
    arguments = {"device": "cuda", "part": [], "out": out, "data": data, "photos": photos, "minutes": 30}
    assert runner.check(argparse.Namespace(**arguments)) == 0, (out / "report.md").read_text()
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert found.keys() == {part.name for part in chosen}
    assert found["environment"]["figures"]["gpu"] == "NVIDIA Imaginary"
    of_loaders = ("end-to-end-256", "loader-engines-90", "host")
    assert {row["backend"] for name in of_loaders for row in found[name]["rows"]} == {"dali"}
    profiled = found["profile-beside-the-loader"]
    assert profiled["rows"][0]["batches of"] == "dali"
    assert any("convolution" in name for name in profiled["figures"]["us_of_all_steps"])
    assert found["decode-engines-100"]["figures"]["images_per_s"][0] > 0
    kinds = {row["part"]: row for row in found["jpeg-kinds"]["rows"]}
    assert kinds.keys() >= {"4:4:4", "progressive", "CMYK", "odd size"}
    assert "CUDA, images/s" in kinds["gray"]


def test_a_figure_never_appears_under_another_backends_name(tmp_path, monkeypatch):
    parts = load("gpu_parts")
    job = parts.Job(name="loader", device="cpu", data=tmp_path, photos=None)
    monkeypatch.setattr(type(job), "shards", lambda _: tmp_path)
    setting = {"encoder": "resnet18_quarter", "size": 32, "batch": 16, "queue": 64}
    assert parts.recipe(job, **setting).data.backend == "dali"
    assert parts.recipe(job, data={"backend": "torch"}, **setting).data.backend == "torch"
    assert parts.backend_of("dali (as asked for), 2 threads per rank", "dali") == "dali"
    with pytest.raises(ValueError, match="figures of the dali backend were asked for, but the loader says: torch"):
        parts.backend_of("torch (nvidia.dali is not installed), 2 processes per rank", "dali")


def test_says_that_there_is_no_gpu(tmp_path):
    result = check("--device", "cuda", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stderr.strip() == "error: torch finds no GPU here: add DEVICE=cpu for the small version"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "says"), [("steps", "--part steps: there are environment, data,"), ("cifar10", "needs --cifar FILE")]
)
def test_says_which_parts_there_are(tmp_path, part, says):
    result = check("--device", "cpu", "--out", str(tmp_path), "--part", part)
    assert (result.returncode, says in result.stderr) == (2, True)


def test_a_part_that_takes_too_long_is_ended_with_all_its_processes(tmp_path, monkeypatch):
    runner = load("gpu_check")
    (tmp_path / "gpu_parts.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "gpu_check.py"))
    part = runner.Part(name="endless", kind="environment", limit_s=9)
    assert runner.run(part, "cpu", tmp_path, tmp_path, None, limit_s=2) == "out of time"
    child = int((tmp_path / "endless.log").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "**endless: out of time**" in runner.report([part], tmp_path, {"endless": "out of time"})


def test_parts_have_names_of_their_own_and_settings_that_exist():
    runner, parts = load("gpu_check"), load("gpu_parts")
    for device in ("cuda", "cpu"):
        names = [part.name for part in runner.parts(device)]
        assert len(set(names)) == len(names)
    for part in [*runner.parts("cuda"), *runner.parts("cpu")]:
        signature = inspect.signature(parts.KINDS[part.kind])
        accepts_more = any(each.kind == each.VAR_KEYWORD for each in signature.parameters.values())
        assert accepts_more or part.options.keys() <= signature.parameters.keys(), part.name
        DataConfig(shards="x", **part.options.get("data", {}))
        if part.kind in ("end_to_end", "memory", "profile"):
            recipe = inspect.signature(parts.recipe).parameters.keys()
            others = {"seconds", "stages", "steps", "batches", "ordered", "beside"}
            assert part.options.keys() - others <= recipe, part.name
        if part.kind == "step":
            fields = {field.name for field in dataclasses.fields(load("step").Setting)} | {"rounds", "only"}
            assert part.options.keys() <= fields, part.name


def test_every_test_for_the_gpu_belongs_to_a_part():
    of_parts = [part.options for part in load("gpu_check").parts("cuda") if part.kind == "tests"]
    files = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {path for options in of_parts for path in options["paths"]} == files
    # Tests of one file are divided by a word and its opposite.
    selects = [options["select"] for options in of_parts if options["select"]]
    assert {f"not {select}" for select in selects if not select.startswith("not ")} <= set(selects)
    assert len(selects) == 2 * len([select for select in selects if select.startswith("not ")])


def test_time_is_idle_where_no_kernel_runs():
    parts = load("gpu_profile")

    def event(name, begin, end, lane=1, category="kernel"):
        return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "tid": lane}

    events = [
        event("a", 0, 10),
        event("b", 5, 20, lane=2),
        event("a", 30, 40),
        event("other", 0, 90, category="cpu_op"),
    ]
    assert parts.busy(events, ("kernel",)) == (0.25, 40, {"a": 20, "b": 15})
    assert parts.waits(events, ("kernel",)) == {"a in lane 1": 10}
    nested = [event("outer", 0, 10), event("inner", 2, 5), event("innermost", 3, 4), event("inner", 6, 7)]
    assert parts.busy(nested, ("kernel",)) == (0, 10, {"outer": 6, "inner": 3, "innermost": 1})
    with pytest.raises(ValueError, match="no event of kernel"):
        parts.busy([], ("kernel",))


@pytest.fixture
def cifar(tmp_path):
    """An archive like CIFAR-10's: two classes, 20 images to train on and 5 to classify."""
    archive = tmp_path / "cifar.tar"
    with tarfile.open(archive, "w") as tar:
        for split, num in (("train", 10), ("test", 5)):
            for number in range(num):
                for label, gray in (("cat", 40), ("dog", 200)):
                    data = jpeg(np.full((32, 32, 3), gray + number, dtype=np.uint8))
                    member = tarfile.TarInfo(f"cifar10/{split}/{label}/{number}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return archive


def test_cifar_is_packed_by_split_and_class(tmp_path, cifar):
    parts = load("gpu_parts")
    shards = open_set(parts._pack_cifar(cifar, "train", tmp_path / "work"))
    assert shards.num_samples == 20
    with pytest.raises(ValueError, match="has no validation/"):
        parts._pack_cifar(cifar, "validation", tmp_path / "work")


@pytest.mark.slow
def test_cifar_goes_from_images_to_knn(tmp_path, cifar):
    words = ("--device", "cpu", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data"), "--part", "cifar10")
    result = check(*words, "--cifar", str(cifar))
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "out" / "cifar10.json").read_text())
    assert [line["step"] for line in found["figures"]["evaluations"]] == [0, 2]
    assert "| cifar10 | 2 of 2 |" in (tmp_path / "out" / "report.md").read_text()
