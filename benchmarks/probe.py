"""The online probe (--eval.online-probe): what it adds to a training step.

    python benchmarks/probe.py --encoder resnet50 --size 64 --batch 32 --classes 1000 [--json FILE]

Alternating, in one process, on one batch: the step of a run without the probe, the same with it, and what the probe
does alone. The claim is taken round by round: the probe alone against 2% of the step. Whole steps with and without it
differ by less than from round to round, so their ratio is printed beside it, as a check.
"""

from dataclasses import replace

import torch
from alternating import alternate, claims_table, compare, header, table, write_claims
from step import LR, MOMENTUM, Ours, setting_of, step_options

from moco_fast.evaluation.online import OnlineProbe


def main() -> None:
    parser = step_options(__doc__, encoder="resnet50", batch=32, size=64)
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    setting = setting_of(options)
    ours = Ours(setting, setting.views())
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(options.classes, (options.batch,), generator=generator)
    dim = ours.query.feature_dim
    features = torch.rand(options.batch, dim, generator=generator).to(setting.device)
    probe = OnlineProbe(dim, options.classes, lr=1e-3, seed=0, device=setting.device)
    batch = replace(ours.batch, label=labels)
    beside = replace(ours.train_step, probe=probe)
    scheduled = {"momentum": MOMENTUM}
    seconds = alternate(
        {
            "step": lambda: ours.train_step([batch], lr=LR, scheduled=scheduled),
            "step and probe": lambda: beside([batch], lr=LR, scheduled=scheduled),
            "probe alone": lambda: probe.step(features, labels),
        },
        rounds=options.rounds,
        device=setting.device,
        warmup=2,
    )
    title = f"{options.encoder}, {options.size} px, batch {options.batch}, {options.classes} classes, {options.device}"
    alone = [1e3 * each for each in seconds["probe alone"]]
    allowed = [1e3 * 0.02 * each for each in seconds["step"]]
    claim = f"online probe: {title} / 2% of the step"
    claims = [compare(claim, alone, allowed, unit="ms", less_is_better=True, goal=1.0)]
    write_claims(options.json, claims)
    print(f"{header(setting.device.type)}\n\n{claims_table(claims)}\n")
    print(table(seconds, base="step"))


if __name__ == "__main__":
    main()
