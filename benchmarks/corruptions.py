"""Corrupting images: ours beside imagecorruptions, the package that one would use instead, kind by kind, by turns.

    uv pip install --no-deps imagecorruptions-imaug==1.1.5 numba llvmlite  # it asks for a second OpenCV, too
    python benchmarks/corruptions.py

Both corrupt the same photograph of 224 pixels at severity 3, in one process; ours pass through JPEG besides, as
ImageNet-C's files did. Elastic transform is left out, for which the package has a formula of its own, and frost, for
which it has pictures.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from alternating import alternate, claims_table, compare, header, write_claims
from skimage import data

from moco_fast.evaluation.corruptions import Corruption
from moco_fast.evaluation.strengths import COMMON

KINDS = [kind for kind in COMMON if kind not in ("elastic_transform", "frost")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from imagecorruptions import corrupt

    cv2.setNumThreads(1)
    image = cv2.resize(data.astronaut(), (224, 224), interpolation=cv2.INTER_AREA)

    def each_of(calls: dict[str, Callable[[], np.ndarray]]) -> Callable[[], None]:
        return lambda: [call() for call in calls.values()] and None

    ours = {
        kind: partial(Corruption(kind=kind, severity=3, strengths="imagenet"), np.asarray(image), 0) for kind in KINDS
    }
    theirs = {kind: partial(corrupt, image, severity=3, corruption_name=kind) for kind in KINDS}
    seconds = alternate(
        {"ours": each_of(ours), "theirs": each_of(theirs)}, rounds=options.rounds, device=torch.device("cpu")
    )
    claim = compare(
        f"an image of 224 pixels in {len(KINDS)} kinds of corruption / imagecorruptions 1.1.5",
        seconds["ours"],
        seconds["theirs"],
        unit="s",
        less_is_better=True,
    )
    print(f"{header()}\n\n{claims_table([claim])}")
    write_claims(options.json, [claim])


if __name__ == "__main__":
    main()
