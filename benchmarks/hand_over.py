"""Training end to end with DALI's batches handed over in two ways, by turns.

    python benchmarks/hand_over.py --shards DIR [--device cuda] [--encoder resnet50] [--batch 32] [--seconds 20]

`free`: as in a run, no stream waits (pipelines.backends.dali.to_torch). `waits`: by torch.from_dlpack alone, which
makes the stream of the thread that asks, the legacy default stream, wait for the batch after this one; `waits on it`
trains on that stream, too, as a script does that never asked for one of its own. On a CPU there are no streams, and
all are one.
"""

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args
from unittest.mock import patch

import torch
from alternating import claims_table, compare, header, write_claims

from moco_fast.bench.measure import measure
from moco_fast.config import BatchNormConfig
from moco_fast.presets import PRESETS

HandOver = Literal["free", "waits", "waits on it"]


@contextmanager
def hand_over(how: HandOver) -> Generator[None]:
    """Open loaders and start runs in here to have them hand over in this way."""
    if how == "free":
        yield
        return
    from moco_fast.training import runtime
    from pipelines.backends import dali

    with patch.object(dali, "to_torch", torch.from_dlpack):
        if how == "waits":
            yield
            return
        # This alone: torch.cuda.stream(), in which the loader's kernels run, calls set_stream too.
        with patch.object(runtime, "_leave_default_stream", lambda _device: None):
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = PRESETS["moco-v2"][1]
    config = replace(
        base,
        data=replace(base.data, shards=options.shards, batch_size=options.batch, backend="dali"),
        views=replace(base.views, size=options.size),
        model=replace(base.model, encoder=options.encoder),
        method=replace(base.method, queue_size=options.queue),
        bn=BatchNormConfig(policy="none"),
        run=replace(base.run, device=options.device),
    )
    rates: dict[HandOver, list[float]] = {how: [] for how in get_args(HandOver)}
    for _ in range(options.rounds):
        for how, found in rates.items():
            with hand_over(how):
                rate = measure(config, seconds=options.seconds, stages=("end_to_end",)).end_to_end
            assert rate is not None
            found.append(rate.median)
    claims = [
        compare(f"end to end, batch {options.batch}: {how}", rates["free"], rates[how], unit="samples/s")
        for how in ("waits", "waits on it")
    ]
    print(header(options.device))
    print(f"\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
