"""A second task on an encoder: features from the cache, beside computing them again, by turns.

    python benchmarks/eval_cache.py --json build/eval_cache.json

Both measure kNN of a ResNet-50 on the demo's images. "Without" is `moco-fast eval knn` with an empty cache, which is
also what the first task costs; "with" finds features that another task left there.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from alternating import alternate, claims_table, compare, header, write_claims

from moco_fast.config import ModelConfig
from moco_fast.demo import DemoConfig, write_images
from moco_fast.encoders.encoder import build_encoder
from moco_fast.encoders.formats.base import digest_of
from moco_fast.evaluation.front import Plan, evaluate
from moco_fast.evaluation.inputs import Subject
from moco_fast.evaluation.tasks.knn import Knn
from moco_fast.evaluation.tasks.linear import Linear
from moco_fast.methods.momentum_contrast import MomentumContrast
from pipelines.config import DataConfig
from shards.config import PackConfig
from shards.packing.pack import pack
from shards.sets import open_set

GOAL = 5.0


def pack_images(folder: Path, per_class: int) -> None:
    """Cut the demo's images, a quarter as many held out, and pack them into folder/train and folder/val."""
    write_images(DemoConfig(out=str(folder / "images"), num_train=per_class, num_held_out=per_class // 4))
    for split in ("train", "val"):
        pack(PackConfig(sources=(str(folder / "images" / split),), out=str(folder / split), workers=1))


def subject_of(folder: Path, encoder_name: str, size: int) -> Subject:
    """Open the sets, and build the encoder."""
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder=encoder_name), MomentumContrast(), image_size=size, crop=1.0).eval()
    return Subject(
        encoder=encoder,
        digest=digest_of(encoder),
        sets={"train": open_set(folder / "train"), "test": open_set(folder / "val")},
        size=size,
        crop=1.0,
        data=DataConfig(shards="", batch_size=64),
        device=torch.device("cpu"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--per-class", type=int, default=16, help="training images of each of 18 classes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pack_images(folder, options.per_class)
        subject = subject_of(folder, options.encoder, options.size)

        def measure(task: Knn | Linear, cache: Path) -> Callable[[], object]:
            plan = Plan(subject=subject, name=options.encoder, tasks=[task.settled(None)], cache=cache)
            return lambda: evaluate(plan)

        measure(Linear(epochs=1), folder / "filled")()
        knn = Knn(k=(20,))
        seconds = alternate(
            {
                "with": measure(knn, folder / "filled"),
                "without": lambda: (
                    shutil.rmtree(folder / "empty", ignore_errors=True),
                    measure(knn, folder / "empty")(),
                ),
            },
            rounds=options.rounds,
            device=subject.device,
        )
        num_images = sum(shards.num_samples for shards in subject.sets.values())
    claims = [
        compare(
            f"a second task on {num_images} images, {options.encoder}, {options.size} px / features computed again",
            seconds["with"],
            seconds["without"],
            unit="s",
            less_is_better=True,
            goal=GOAL,
        )
    ]
    print(f"{header()}\n\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
