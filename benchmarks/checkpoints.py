"""Saving while training: ours beside training, ours while training waits, and torch's distributed checkpoint.

    python benchmarks/checkpoints.py --encoder resnet50 [--folder FOLDER] [--json FILE]

In each round every way takes as many steps and saves once in their midst: query and key encoder, and the optimizer's
momentum. What counts is how long training stands still, and how long the steps take while the rest is written. torch's
writes the same tensors, without digests, and does not read them back.
"""

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp
from alternating import claims_table, compare, header, write_claims
from torch import Tensor

from moco_fast import checkpoint
from moco_fast.checkpoint import Checkpoint
from moco_fast.config import CheckpointConfig, ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast
from moco_fast.saving.saver import Saver
from shards.ground.units import format_bytes


class Training:
    """Steps of an encoder on random images, with a momentum encoder beside it."""

    def __init__(self, encoder: str, device: torch.device, batch: int) -> None:
        self.query = build_encoder(ModelConfig(encoder=encoder), MomentumContrast()).to(device)
        self.key = copy_as_key_encoder(self.query)
        self._optimizer = torch.optim.SGD(self.query.parameters(), lr=1e-3, momentum=0.9)
        self._update = MomentumUpdate(self.query, self.key)
        self._images = torch.rand(batch, 3, 64, 64, device=device)
        self._device = device

    def step(self) -> None:
        """Take one step, and wait for it."""
        self.query(self._images).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._update(0.999)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def state(self, step: int) -> Checkpoint:
        """Return the state as a run has it."""
        model = {f"query.{name}": each for name, each in self.query.state_dict().items()}
        model |= {f"key.{name}": each for name, each in self.key.state_dict().items()}
        momentum = self._optimizer.state_dict()["state"]
        optimizer = {f"momentum_buffer/{index}": each["momentum_buffer"] for index, each in momentum.items()}
        sums = torch.ones(1, device=self._device)
        return Checkpoint(step=step, config={}, model=model | {"watched.sums": sums}, optimizer=optimizer, rng={})


class Ways:
    """The ways to save; each returns what waits until its file is on the disk."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._saver = Saver(folder / "ours", CheckpointConfig(keep=1), device, timeout_s=60)

    def beside(self, state: Checkpoint) -> Callable[[], object]:
        """Ours."""
        self._saver.save(state)
        return self._saver.finish

    def waiting(self, state: Checkpoint) -> Callable[[], object]:
        """Ours, while training waits."""
        checkpoint.save(self._folder / "waiting", state, keep=1)
        return lambda: None

    def torchs(self, state: Checkpoint) -> Callable[[], object]:
        """The async_save of torch."""
        folder = self._folder / "torch"
        shutil.rmtree(folder, ignore_errors=True)
        tensors: dict[str, Tensor] = {f"model.{name}": each for name, each in state.model.items()}
        tensors |= {f"optimizer.{name}": each for name, each in state.optimizer.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            future = dcp.async_save(tensors, checkpoint_id=folder)
        return future.result

    def close(self) -> None:
        """End the thread."""
        self._saver.close()


def measure(
    training: Training, save: Callable[[Checkpoint], Callable[[], object]], number: int, steps: int
) -> dict[str, float]:
    """Take steps with a save in their midst; return the figures of one round."""
    seconds, still, finish = list[float](), 0.0, list[Callable[[], object]]()
    for step in range(steps):
        began = time.perf_counter()
        training.step()
        if step == steps // 3:
            at = time.perf_counter()
            finish.append(save(training.state(number)))
            still = time.perf_counter() - at
        seconds.append(time.perf_counter() - began)
    for each in finish:
        each()
    plain = median(seconds[: steps // 3])
    return {
        "still": still,
        "step": seconds[steps // 3] / plain,
        "after": median(seconds[steps // 3 + 1 :]) / plain,
        "plain": plain,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9, help="in each round, one of them with a save")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save; unset: the folder for temporary files")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    training = Training(options.encoder, device, options.batch)
    training.step()
    state = training.state(0)
    num_bytes = sum(each.nbytes for part in (state.model, state.optimizer) for each in part.values())
    found: dict[str, list[dict[str, float]]] = {"beside": [], "waiting": [], "torchs": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ways = Ways(Path(folder), device)
        for number in range(options.rounds + 1):
            for name, rounds in found.items():
                figures = measure(training, getattr(ways, name), number, options.steps)
                if number:  # the first round allocates
                    rounds.append(figures)
        ways.close()
    still = {name: [1e3 * each["still"] for each in rounds] for name, rounds in found.items()}
    what = f"a save of {options.encoder}, {format_bytes(num_bytes)}, {device}: training stands still"
    unit = {"unit": "ms", "less_is_better": True}
    claims = [
        compare(f"{what} / written while it waits", still["beside"], still["waiting"], goal=5.0, **unit),
        compare(f"{what} / torch.distributed.checkpoint.async_save", still["beside"], still["torchs"], **unit),
    ]
    write_claims(options.json, claims)
    print(f"{header(options.device)}\n\n{claims_table(claims)}\n")
    print("| | stands still, ms | the step with the save / its neighbors | steps while it is written / before |")
    print("|---|---|---|---|")
    words = {"beside": "ours, beside training", "waiting": "ours, training waits", "torchs": "torch's async_save"}
    for name, rounds in found.items():
        step, after = (median(each[key] for each in rounds) for key in ("step", "after"))
        print(f"| {words[name]} | {median(still[name]):.0f} | {step:.2f} | {after:.2f} |")
    print(f"\nA step without a save: {1e3 * median(each['plain'] for each in found['beside']):.0f} ms.")


if __name__ == "__main__":
    main()
