"""Would torch.compile help `moco-fast transfer segment`: a training step of its network, compiled and not.

    python benchmarks/transfer_compile.py --encoder resnet50 --head fcn --crop 257 --batch 4 [--json FILE]

On a CPU it does not, so there is no option for it (results/transfer.md). Alternating, in one process, with the same
weights and crops: forward and backward pass. What the compilation takes, once for each training, is printed beside it.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from alternating import alternate, claims_table, compare, header, synchronize, table, write_claims

from moco_fast.encoders.encoder import build_backbone, width_of
from moco_fast.encoders.formats.base import without_head
from moco_fast.transfer.pixel_network import PixelNetwork
from moco_fast.transfer.presets import SEGMENT_PRESETS

_CLASSES = 21


def main() -> None:
    """Compile, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--head", choices=("fcn", "deeplabv3"), default="fcn")
    parser.add_argument("--crop", type=int, default=513)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    backbone = build_backbone(options.encoder)
    preset = replace(SEGMENT_PRESETS["voc-semantic"], head=options.head)
    network = PixelNetwork(without_head(backbone, width_of(backbone)), preset, num_classes=_CLASSES, seed=0).train()
    network.to(options.device, memory_format=torch.channels_last)
    size = (options.batch, options.crop, options.crop)
    images = torch.randint(256, (size[0], 3, *size[1:]), dtype=torch.uint8, device=options.device)
    targets = torch.randint(_CLASSES, size, dtype=torch.uint8, device=options.device)

    def step(run: Callable[..., dict[str, torch.Tensor]]) -> None:
        run(images, targets)["loss_pixels"].backward()
        network.zero_grad()

    compiled = torch.compile(network)
    begin = time.perf_counter()
    step(compiled)
    synchronize(options.device)
    compile_s = time.perf_counter() - begin
    runs = {"compiled": lambda: step(compiled), "not compiled": lambda: step(network)}
    seconds = alternate(runs, rounds=options.rounds, device=options.device)
    title = f"{options.encoder}, {options.head}, {options.batch} crops of {options.crop} pixels, {options.device}"
    ours, theirs = ([1e3 * each for each in seconds[name]] for name in runs)
    claims = [compare(f"step of segmentation, compiled: {title}", ours, theirs, unit="ms", less_is_better=True)]
    write_claims(options.json, claims)
    print(f"{header(options.device.type)}\n\n{claims_table(claims)}\n")
    print(f"{table(seconds, base='not compiled')}\n\nThe first step, with the compilation: {compile_s:.0f} s")


if __name__ == "__main__":
    main()
