"""Losses of fifty steps of every preset: recorded in one checkout, compared bit for bit in another on the same machine.

    python tests/moco_fast/golden_losses.py --write FILE     before a change of the method's code
    python tests/moco_fast/golden_losses.py --check FILE     after it

Each preset is built as a run builds it, with a small encoder, dictionary and batch, in fp32 and with one thread, and is
fed synthetic views, on one rank and on two. Bits depend on torch's version and on the CPU: the file is of one machine
and is not committed. `golden_losses.json` holds rounded losses of the first steps on one rank, for the tests:

    python tests/moco_fast/golden_losses.py --write-first tests/moco_fast/golden_losses.json     with a new preset
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from moco_fast.commandline import parse
from moco_fast.config import Config
from moco_fast.demo import DemoConfig, write_images
from moco_fast.optimizers.optim import optimizer_tensors
from moco_fast.presets import PRESETS
from moco_fast.training.build import Parts, build
from moco_fast.training.runtime import Runtime, start
from moco_fast.training.schedule import lr_at
from pipelines.batch import Batch

ROOT = Path(__file__).parent.parent.parent
NUM_STEPS = 50
NUM_FIRST = 3
NUM_SAMPLES = 288
BATCH_SIZE = 16
SMALL = {
    "--data.batch-size": BATCH_SIZE,
    "--data.backend": "torch",
    "--data.num-threads": 1,
    "--method.dim": 16,
    "--run.device": "cpu",
    "--run.precision": "fp32",
    "--run.steps": NUM_STEPS,
}
RESNET = {"--model.encoder": "resnet18_quarter", "--views.size": 32}
VIT = {"--model.encoder": "test_vit", "--views.size": 160}
SHORT_QUEUE = {"--method.queue-size": 96}
NARROW_HEAD = {"--method.mlp-dim": 32}
OWN = {
    "moco-v1": RESNET | SHORT_QUEUE,
    "moco-v1-1b": RESNET | SHORT_QUEUE,
    "moco-v2": RESNET | SHORT_QUEUE,
    "moco-v2-symmetric": RESNET | SHORT_QUEUE,
    "moco-v2-multicrop": RESNET | SHORT_QUEUE | {"--views.num-small": 3, "--views.small-size": 16},
    "moco-v3-resnet50": RESNET | NARROW_HEAD,
    "moco-v3-vit-small": VIT | NARROW_HEAD,
    "moco-v3-vit-base": VIT | NARROW_HEAD,
    "end-to-end": RESNET,
    "memory-bank": RESNET | {"--method.num-negatives": 96},
    "byol": RESNET | NARROW_HEAD,
    "simsiam": RESNET | {"--method.predictor-dim": 8},
    "cifar10": RESNET | SHORT_QUEUE,
    "demo": RESNET | SHORT_QUEUE,
}
"""What makes a preset small, beside what all have in common."""


def configuration(preset: str, shards: Path, *, calm: bool = False) -> Config:
    """A preset as the command line makes it small.

    Args:
        preset: its name.
        shards: any set of NUM_SAMPLES images.
        calm: let rounding grow slowly. In the other setting the deepest batch norms see two numbers, whose order alone
            decides on their output.
    """
    options = {"--data.shards": shards} | SMALL | OWN[preset]
    if calm and options["--views.size"] == RESNET["--views.size"]:
        options["--views.size"] = 64
        if PRESETS[preset][1].bn.policy == "auto":
            options["--bn.num-groups"] = 2
        if "--views.small-size" in options:
            options["--views.small-size"] = 64
    return parse([preset, *(str(word) for option in options.items() for word in option)])


def batches(config: Config, runtime: Runtime) -> Iterator[Batch]:
    """Synthetic batches of this rank: a pattern for each sample, and noise over it in each view."""
    generator = torch.Generator().manual_seed(0)
    size, share = config.views.size, BATCH_SIZE // runtime.world_size
    patterns = torch.randint(0, 128, (NUM_SAMPLES, 3, 4, 4), generator=generator).float()
    while True:
        index = torch.randperm(NUM_SAMPLES, generator=generator)[:BATCH_SIZE]
        noise = torch.randint(0, 128, (2, BATCH_SIZE, 3, size, size), generator=generator)
        views = F.interpolate(patterns[index], size=(size, size)) + noise
        own = slice(runtime.rank * share, (runtime.rank + 1) * share)
        small = torch.rand(config.views.num_small, BATCH_SIZE, 3, *2 * [config.views.small_size], generator=generator)
        views = [*views, *(256 * view for view in small)]
        views = tuple(view[own].to(torch.uint8).contiguous(memory_format=torch.channels_last) for view in views)
        yield Batch(views=views, index=index[own], label=torch.full((share,), -1))


def model_tensors(parts: Parts) -> dict[str, Tensor]:
    """What a checkpoint holds of the model."""
    return {f"{name}.{key}": value for name, part in parts.modules.items() for key, value in part.state_dict().items()}


def digest(tensors: dict[str, Tensor]) -> str:
    """A digest of names and values, whatever their order and memory format."""
    found = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def record(config: Config, runtime: Runtime, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Step as a run does; what each step reports as hexadecimal floats, and digests of what is left."""
    parts = build(config, runtime)
    parts.loader.close()
    watched: dict[str, list[str]] = {}
    for step, batch in zip(range(num_steps), batches(config, runtime), strict=False):
        lr, scheduled = lr_at(step, NUM_STEPS, config.optim), config.method.scheduled(step, NUM_STEPS)
        for name, value in parts.train_step([batch], lr=lr, scheduled=scheduled).items():
            watched.setdefault(name, []).append(value.item().hex())
    optimizer = optimizer_tensors(parts.optimizer, parts.query)
    return {"watched": watched, "model": digest(model_tensors(parts)), "optimizer": digest(optimizer)}


def main() -> int:
    """Record every preset as one rank of as many as there are, or start that for one rank and for two."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="file to write")
    parser.add_argument("--check", type=Path, help="file to compare with")
    parser.add_argument("--write-first", type=Path, help="file to write the first losses to")
    parser.add_argument("--presets", nargs="*", default=[*OWN], help="only these")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--calm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        return _record_as_rank(options.rank_of, options.presets, calm=options.calm)
    assert options.check or sorted(OWN) == sorted(PRESETS), "a preset is missing above"
    with tempfile.TemporaryDirectory() as folder:
        shards = pack(Path(folder))
        found = {
            f"{preset}, {world_size} ranks": outcome
            for world_size in ((1,) if options.write_first else (1, 2))
            for preset, outcome in _record_all(
                shards, options.presets, world_size, calm=bool(options.write_first)
            ).items()
        }
    if options.write_first:
        rows = [f"{json.dumps(name)}: {json.dumps(losses)}" for name, losses in first_losses(found).items()]
        options.write_first.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    if options.write:
        options.write.write_text(json.dumps(found, indent=1))
    return _compare(json.loads(options.check.read_text()), found) if options.check else 0


def first_losses(found: dict[str, Any]) -> dict[str, list[float]]:
    """The first losses of each preset on one rank, in seven digits."""
    losses = {name.removesuffix(", 1 ranks"): each["watched"]["loss"][:NUM_FIRST] for name, each in found.items()}
    return {name: [float(f"{float.fromhex(loss):.7g}") for loss in first] for name, first in losses.items()}


def pack(folder: Path) -> Path:
    """Pack the demo's images as the tests do: the memory bank's size is that of a set."""
    write_images(DemoConfig(out=str(folder / "images"), num_train=16, num_held_out=4))
    words = ["pack", str(folder / "images" / "train"), "--out", str(folder / "train"), "--workers", "1"]
    command = [sys.executable, "-c", "import sys; from shards.cli import main; sys.exit(main())", *words]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return folder / "train"


def _record_all(shards: Path, presets: list[str], world_size: int, *, calm: bool) -> dict[str, Any]:
    out = shards / "outcome.json"
    config = ROOT / "deploy" / "accelerate" / f"cpu-{world_size}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launch, str(Path(__file__).resolve())]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    words = ["--rank-of", str(shards), *(["--calm"] if calm else []), "--presets", *presets]
    subprocess.run([*command, *words], check=True, env=env, cwd=ROOT)
    return json.loads(out.read_text())


def _record_as_rank(shards: Path, presets: list[str], *, calm: bool) -> int:
    torch.set_num_threads(1)
    runtime = start(configuration(presets[0], shards).run)
    num_steps = NUM_FIRST if calm else NUM_STEPS
    outcomes = {preset: record(configuration(preset, shards, calm=calm), runtime, num_steps) for preset in presets}
    if runtime.rank == 0:
        (shards / "outcome.json").write_text(json.dumps(outcomes))
    runtime.close()
    return 0


def _compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    new = [name for name in after if name not in before]
    differ = [name for name in after if name not in new and before[name] != after[name]]
    for name in after:
        print(f"{name:32}", "new" if name in new else "differs" if name in differ else "bit-equal")
        if name in differ:
            of_name = before[name]["watched"].items()
            print("    ", [key for key, values in of_name if values != after[name]["watched"].get(key)])
    print(f"{len(after) - len(differ) - len(new)} of {len(after) - len(new)} bit-equal")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
