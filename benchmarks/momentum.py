"""The momentum update of an encoder: ours against the authors' loop and the limit of memory.

    python benchmarks/momentum.py --encoder resnet50 [--json FILE] [--plot FILE]

Alternating, in one process; the ratio is taken round by round. The limit is one `lerp_` over one flat buffer.
"""

import argparse
from pathlib import Path

import torch
from alternating import alternate, bars, claims_table, compare, header, table, write_claims

from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.momentum import MomentumUpdate, copy_as_key_encoder
from moco_fast.methods.momentum_contrast import MomentumContrast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where to write the claims")
    parser.add_argument("--plot", type=Path, help="where to draw the times")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    query = build_encoder(ModelConfig(encoder=options.encoder), MomentumContrast()).to(
        device, memory_format=torch.channels_last
    )
    key = copy_as_key_encoder(query)
    update = MomentumUpdate(query, key)
    pairs = list(zip(query.parameters(), key.parameters(), strict=True))
    flat_query, flat_key = (torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (query, key))

    @torch.no_grad()
    def as_in_the_authors_code() -> None:
        for q, k in pairs:
            k.data = k.data * 0.999 + q.data * (1 - 0.999)

    @torch.no_grad()
    def in_place_loop() -> None:
        for q, k in pairs:
            k.mul_(0.999).add_(q, alpha=1 - 0.999)

    def flat() -> None:
        flat_key.lerp_(flat_query, 1 - 0.999)

    # Ours first: the authors' loop gives the key encoder new storage each time.
    alternatives = {
        "one flat buffer": flat,
        "ours (foreach lerp)": lambda: update(0.999),
        "loop, in place": in_place_loop,
        "authors' loop": as_in_the_authors_code,
    }
    seconds = alternate(alternatives, rounds=options.rounds, device=device, warmup=3)
    result = table(seconds, base="one flat buffer")
    millions = flat_key.numel() / 1e6
    title = f"Momentum update, {options.encoder}, {millions:.1f}M parameters, {device}, {options.threads} thread(s)"
    millis = {name: [1e3 * each for each in values] for name, values in seconds.items()}
    what = f"momentum update, {options.encoder}, {options.threads} thread(s)"
    unit = {"unit": "ms", "less_is_better": True}
    claims = [
        compare(f"{what} / authors' loop", millis["ours (foreach lerp)"], millis["authors' loop"], goal=2.0, **unit),
        # At most 1.2 times the time of the limit.
        compare(
            f"{what} / one flat buffer", millis["ours (foreach lerp)"], millis["one flat buffer"], goal=1 / 1.2, **unit
        ),
    ]
    write_claims(options.json, claims)
    print(f"{header(options.device)}\n\n{claims_table(claims)}\n\n{title}, {options.rounds} rounds\n\n{result}")
    bars(options.plot, {title: seconds})


if __name__ == "__main__":
    main()
