import subprocess
import sys
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
        ]
        subprocess.run(
            [sys.executable, "-c", "import sys; from shards.cli import main; sys.exit(main())", *command[1:]],
            check=True,
            capture_output=True,
        )
    return PackedDemo(train=folder / "train", val=folder / "val", num_train=18 * 16)
