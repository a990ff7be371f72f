"""Every script of examples/ does what its docstring says."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards
from tests.warm import WarmPython

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ of random pixels, and shards/ of them."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(160):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 64)).save(folder / "images" / f"{number:03}.jpg")
    shards.pack(shards.PackConfig(sources=(str(folder / "images"),), out=str(folder / "shards"), workers=1))
    return folder


Run = Callable[..., str]


@pytest.fixture
def run(packed: Path, warm_python: WarmPython) -> Run:
    return partial(run_example, warm_python, packed)


def run_example(python: WarmPython, folder: Path, name: str, *words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = python.run(EXAMPLES / name, *words, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if f'"{path.name}"' not in here] == []


def test_a_plain_loop_learns(run: Run) -> None:
    printed = run("plain_loop.py", "shards", "8").splitlines()
    assert len(printed) == 5  # an epoch of 160 samples has five steps of 32
    assert printed[0].startswith("step 0: loss ")


@pytest.mark.slow
def test_lightning_takes_the_loader(run: Run) -> None:
    assert "after 5 steps" in run("with_lightning.py", "shards", "5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["custom_encoder.py", "custom_views.py"])
def test_a_custom_part_trains_and_embeds(name: str, packed: Path, run: Run) -> None:
    run(name, "shards", f"run-{name}", "2")
    assert (packed / f"run-{name}" / "outcome.json").read_text().count('"finished"') == 1
    if name == "custom_views.py":
        printed = run("embed_folder.py", f"run-{name}", "images")
        assert "160 images, 256 numbers each; 0 could not be read" in printed
        assert len(printed.splitlines()) == 7
