import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moco_fast.demo import DemoConfig, write_images


@dataclass(frozen=True)
class PackedDemo:
    """Folders of packed demo images, few of each class."""

    train: Path
    val: Path
    num_train: int
    images: Path
    """What they were packed from: folders `train` and `val`."""


@pytest.fixture(scope="session")
def packed_demo(tmp_path_factory) -> PackedDemo:
    """The demo's images as `make-shards` packs them: 18 classes, 16 training and 4 held-out images each."""
    folder = tmp_path_factory.mktemp("demo")
    write_images(DemoConfig(out=str(folder / "images"), num_train=16, num_held_out=4))
    for split in ("train", "val"):
        command = [
            "make-shards",
            "pack",
            str(folder / "images" / split),
            "--out",
            str(folder / split),
            "--workers",
            "1",
            "--mean-rgb",  # for linear colors
        ]
        subprocess.run(
            [sys.executable, "-c", "import sys; from shards.cli import main; sys.exit(main())", *command[1:]],
            check=True,
            capture_output=True,
        )
    return PackedDemo(train=folder / "train", val=folder / "val", num_train=18 * 16, images=folder / "images")


@pytest.fixture(scope="session")
def finished_run(packed_demo, tmp_path_factory) -> Path:
    """A run's folder as training leaves it: 40 steps that nobody took, and an encoder that is not the first one.

    All tests of a process read it, none may write into it: `own_run` is a copy.
    """
    import torch

    from moco_fast import checkpoint
    from moco_fast.config import Config, EvalConfig, ModelConfig, RunConfig, to_dict
    from moco_fast.encoders.encoder import build_encoder
    from moco_fast.methods.momentum_contrast import MomentumContrast
    from pipelines.config import VIEWS, DataConfig

    run = tmp_path_factory.mktemp("runs") / "finished"
    config = Config(
        data=DataConfig(shards=str(packed_demo.train), batch_size=32, lanes=8),
        views=VIEWS["cifar10"],
        model=ModelConfig(encoder="resnet18_quarter", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        method=MomentumContrast(dim=16),
        run=RunConfig(out=str(run), steps=40, seed=3),
        eval=EvalConfig(shards=str(packed_demo.val), k=5, layer="head", crop=1.0),
    )
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    command = ["/usr/bin/python", "-m", "moco_fast.train", "cifar10", "--data.shards", str(packed_demo.train)]
    environment = {"command": command, "device": "abacus", "precision": "fp32", "world_size": 1, "num_samples": 288}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "outcome.json").write_text(json.dumps({"outcome": "finished", "step": 40, "num_steps": 40}))
    lines = []
    for step in range(0, 41, 10):
        where = {"step": step, "epoch": step / 9, "samples": 32 * step, "time_s": 2.5 * step}
        if step:
            watched = {"loss": 9 - step / 20, "accuracy": step / 100, "similarity_positive": 0.5 + step / 100}
            watched |= {"similarity_negative": 0.1, "feature_std": 0.2, "grad_norm": 1.0}
            rates = {"lr": 0.03, "momentum": 0.99, "samples_per_s": 100.0 + step, "data_wait_share": 0.25}
            lines.append(where | rates | watched)
        if step % 20 == 0:
            lines.append(where | {"knn/top1": 0.25 + step / 100, "knn/num_bank": 288, "knn/num_queries": 72})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        query = build_encoder(config.model, config.method).state_dict()
    model = {f"query.{name}": tensor for name, tensor in query.items()}
    saved = checkpoint.Checkpoint(step=40, config=to_dict(config), model=model, optimizer={}, rng={})
    checkpoint.save(run / "checkpoints", saved, keep=1)
    return run


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to write into."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file below a folder."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="session")
def shared_contents(packed_demo: PackedDemo, finished_run: Path) -> dict[Path, dict[str, tuple[int, int]]]:
    return {folder: contents(folder) for folder in (packed_demo.train.parent, finished_run)}


@pytest.fixture(autouse=True)
def shared_folders_stay_as_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves in a folder that others read is what they stumble over, in some orders only."""
    shared = {"packed_demo", "finished_run"} & set(request.fixturenames)
    before = request.getfixturevalue("shared_contents") if shared else {}
    yield
    for folder, files in before.items():
        assert contents(folder) == files, f"{folder.name} is shared: copy it, as own_run does, to write into it"
