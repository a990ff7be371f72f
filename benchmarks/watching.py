"""What watching a run adds to its steps: gauges, the record of recent steps, the key encoder's lag, a line of metrics.

    python benchmarks/watching.py --encoder resnet50 --size 64 --batch 32 [--json FILE]

Alternating, in one process: ten steps of a run, and what is done beside ten steps and one line of metrics, with a tenth
of the key encoder's lag. The claim is taken round by round: the latter against 0.5% of the former.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

from alternating import alternate, claims_table, compare, header, table, write_claims
from step import LR, MOMENTUM, Ours, setting_of, step_options

from moco_fast.training.alarms import key_lag
from moco_fast.training.capture import RecentSteps
from moco_fast.training.gauges import Gauges
from moco_fast.training.metrics import Average, MetricsFile, Pending
from moco_fast.training.trackers import Trackers

LINES_PER_LAG = 10
"""Lines of metrics for one of which the lag is computed (moco_fast/training/loop.py)."""
NUM_STEPS = 10
"""Steps between two lines of metrics, the default of --log.every-steps."""


def main() -> None:
    parser = step_options(__doc__, encoder="resnet50", batch=32, size=64)
    options = parser.parse_args()
    setting = setting_of(options)
    ours = Ours(setting, setting.views())
    watched = ours.train_step([ours.batch], lr=LR, scheduled={"momentum": MOMENTUM})
    gauges = Gauges(setting.device, num_steps=1000)
    recent = RecentSteps(
        SimpleNamespace(rank=0, device=setting.device), may_overflow=False
    )  # what it asks of a Runtime
    averages = Average(tuple(watched), setting.device)
    metrics = MetricsFile(Path(tempfile.mkdtemp()), step=0, trackers=Trackers())

    def ten_steps() -> None:
        for _ in range(NUM_STEPS):
            ours.train_step([ours.batch], lr=LR, scheduled={"momentum": MOMENTUM})

    def watch_ten_steps() -> None:
        for step in range(NUM_STEPS):
            gauges.clock.begin()
            recent.begin({"epoch": 0, "step": step})
            averages.add(watched)
            gauges.clock.end()
            recent.end(step, [ours.batch], watched)
        pending = (averages.take(), gauges.take(1))
        line: dict[str, float] = {"step": NUM_STEPS}
        for each in pending:
            line |= each.wait()
        recent.settle(NUM_STEPS)
        metrics.write(line)

    def lag() -> None:
        Pending(("key_lag",), key_lag(ours.query, ours.key)).wait()

    seconds = alternate(
        {"ten steps": ten_steps, "watching ten steps": watch_ten_steps, "lag": lag},
        rounds=options.rounds,
        device=setting.device,
        warmup=1,
    )
    title = f"{options.encoder}, {options.size} px, batch {options.batch}, {options.device}"
    beside = zip(seconds["watching ten steps"], seconds["lag"], strict=True)
    alone = [1e3 * (watching + lag / LINES_PER_LAG) for watching, lag in beside]
    allowed = [1e3 * 0.005 * each for each in seconds["ten steps"]]
    claim = f"watching a run: {title} / 0.5% of the steps"
    claims = [compare(claim, alone, allowed, unit="ms", less_is_better=True, goal=1.0)]
    write_claims(options.json, claims)
    print(f"{header(setting.device.type)}\n\n{claims_table(claims)}\n")
    print(table(seconds, base="ten steps"))


if __name__ == "__main__":
    main()
