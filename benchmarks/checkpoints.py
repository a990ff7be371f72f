"""Saving while training: ours beside training, ours while training waits, and torch's distributed checkpoint.

    python benchmarks/checkpoints.py --encoder resnet50 [--folder FOLDER] [--json FILE]

In each round every way takes as many steps and saves once in their midst: query and key encoder, and the optimizer's
momentum. What counts is how long training stands still, and how long the steps take while the rest is written. torch's
writes the same tensors, without digests, and does not read them back, in three ways: `async_save` as it is called
without options, by a thread; by a process, from a stager that keeps its shared buffers; and the same with the copy
beside the next forward and backward pass, where training stands still until the copy is done before the optimizer's
step. The latter are what its documents advise where saving has to be fast; on a GPU the buffers are pinned, too. The
process is there before the rounds that count.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from alternating import claims_table, compare, header, write_claims
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

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

    def step(self, before_update: Callable[[], object] = lambda: None) -> None:
        """Take one step, and wait for it; `before_update` is called before anything that is saved changes."""
        self.query(self._images).square().mean().backward()
        before_update()
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


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A save that has begun."""

    finish: Callable[[], object]
    """Wait until its file is on the disk."""
    copied: Callable[[], object] = lambda: None
    """Wait until nothing that is saved is read any more."""


class Ways:
    """The ways to save."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._saver = Saver(folder / "ours", CheckpointConfig(keep=1), device, timeout_s=60)
        on_gpu = device.type == "cuda"
        self._stagers = {
            beside: DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_gpu,
                    use_shared_memory=True,
                    use_async_staging=beside,
                    use_non_blocking_copy=on_gpu,
                )
            )
            for beside in (False, True)
        }

    def beside(self, state: Checkpoint) -> Saving:
        """Ours."""
        self._saver.save(state)
        return Saving(finish=self._saver.finish)

    def waiting(self, state: Checkpoint) -> Saving:
        """Ours, while training waits."""
        checkpoint.save(self._folder / "waiting", state, keep=1)
        return Saving(finish=lambda: None)

    def torchs(self, state: Checkpoint) -> Saving:
        """The async_save of torch, without options."""
        tensors, folder = self._to_torch(state)
        future = dcp.async_save(tensors, checkpoint_id=folder)
        assert isinstance(future, Future)
        return Saving(finish=future.result)

    def process(self, state: Checkpoint) -> Saving:
        """The same by a process, from shared memory that is kept."""
        found = self._by_process(state, beside=False)
        assert isinstance(found, Future)
        return Saving(finish=found.result)

    def overlapped(self, state: Checkpoint) -> Saving:
        """The same with the copy beside the next step, up to its update."""
        found = self._by_process(state, beside=True)
        assert isinstance(found, AsyncSaveResponse)
        return Saving(finish=found.upload_completion.result, copied=found.staging_completion.result)

    def close(self) -> None:
        """End the threads."""
        self._saver.close()
        for each in self._stagers.values():
            each.close()

    def _by_process(self, state: Checkpoint, *, beside: bool) -> Future[Any] | AsyncSaveResponse:
        tensors, folder = self._to_torch(state)
        kind = AsyncCheckpointerType.PROCESS
        return dcp.async_save(
            tensors, checkpoint_id=folder, async_checkpointer_type=kind, async_stager=self._stagers[beside]
        )

    def _to_torch(self, state: Checkpoint) -> tuple[dict[str, Tensor], Path]:
        folder = self._folder / "torch"
        shutil.rmtree(folder, ignore_errors=True)
        tensors: dict[str, Tensor] = {f"model.{name}": each for name, each in state.model.items()}
        return tensors | {f"optimizer.{name}": each for name, each in state.optimizer.items()}, folder


def measure(training: Training, save: Callable[[Checkpoint], Saving], number: int, steps: int) -> dict[str, float]:
    """Take steps with a save in their midst; return the figures of one round."""
    seconds, stills, saving = list[float](), list[float](), Saving(finish=lambda: None)

    def still(wait: Callable[[], object]) -> None:
        at = time.perf_counter()
        wait()
        stills.append(time.perf_counter() - at)

    for step in range(steps):
        began = time.perf_counter()
        if step == steps // 3 + 1:
            training.step(partial(still, saving.copied))
        else:
            training.step()
        if step == steps // 3:
            at = time.perf_counter()
            saving = save(training.state(number))
            stills.append(time.perf_counter() - at)
        seconds.append(time.perf_counter() - began)
    saving.finish()
    plain = median(seconds[: steps // 3])
    return {
        "still": sum(stills),
        "step": seconds[steps // 3] / plain,
        "after": median(seconds[steps // 3 + 1 :]) / plain,
        "plain": plain,
    }


WORDS = {
    "beside": "ours, beside training",
    "waiting": "ours, training waits",
    "torchs": "async_save, as it comes",
    "process": "async_save, by a process from kept memory",
    "overlapped": "async_save, by a process, copied beside the next step",
}
"""The methods of `Ways`, and what a table calls them."""


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
    # One rank: its checkpointing process finds it by an address.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WORDS}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ways = Ways(Path(folder), device)
        for number in range(options.rounds + 1):
            for name, rounds in found.items():
                figures = measure(training, getattr(ways, name), number, options.steps)
                if number:  # the first round allocates
                    rounds.append(figures)
        ways.close()
    dist.destroy_process_group()
    still = {name: [1e3 * each["still"] for each in rounds] for name, rounds in found.items()}
    what = f"a save of {options.encoder}, {format_bytes(num_bytes)}, {device}: training stands still"
    unit = {"unit": "ms", "less_is_better": True}
    claims = [
        compare(f"{what} / written while it waits", still["beside"], still["waiting"], goal=5.0, **unit),
        *(
            compare(f"{what} / torch's {WORDS[name]}", still["beside"], still[name], **unit)
            for name in ("torchs", "process", "overlapped")
        ),
    ]
    write_claims(options.json, claims)
    print(f"{header(options.device)}\n\n{claims_table(claims)}\n")
    print("| | stands still, ms | the step with the save / its neighbors | steps while it is written / before |")
    print("|---|---|---|---|")
    for name, rounds in found.items():
        step, after = (median(each[key] for each in rounds) for key in ("step", "after"))
        print(f"| {WORDS[name]} | {median(still[name]):.0f} | {step:.2f} | {after:.2f} |")
    print(f"\nA step without a save: {1e3 * median(each['plain'] for each in found['beside']):.0f} ms.")


if __name__ == "__main__":
    main()
