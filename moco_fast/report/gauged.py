"""Charts of what a run gauges besides its method's values: speed, machine, key encoder."""

from moco_fast.methods.base import Chart

__all__ = ["HEALTH_CHARTS", "SPEED_CHARTS"]

HEALTH_CHARTS = (
    Chart(
        title="Lag of the key encoder",
        caption="Distance of its weights from the query encoder's, as a share of the latter's length.",
        curves={"key_lag": ""},
        about="health",
        percent=True,
        from_zero=True,
    ),
)
SPEED_CHARTS = (
    Chart(
        title="Samples per second",
        caption="Over all ranks, each sample with all its views. Evaluation and saving are not counted.",
        curves={"samples_per_s": ""},
        from_zero=True,
    ),
    Chart(
        title="Waiting for data",
        caption="Share of the time that the training step spent waiting for its next batch.",
        curves={"data_wait_share": ""},
        percent=True,
        from_zero=True,
    ),
    Chart(
        title="What data costs",
        caption="Share of a step that loading takes: by steps on batches that were fetched before, now and then.",
        curves={"headspace/data_cost_share": ""},
        percent=True,
    ),
    Chart(
        title="Headspace of the loader",
        caption="How many times as fast as the steps the loader is where it works alone.",
        curves={"headspace/loader_ratio": ""},
        from_zero=True,
    ),
    Chart(
        title="Seconds per step",
        caption="Of single steps of the first rank, on the device: half of them take less than the median, 5% more "
        "than the 95th percentile.",
        curves={"step_s_p50": "median", "step_s_p95": "95th percentile"},
        from_zero=True,
    ),
    Chart(
        title="Host CPU",
        caption="Share of the CPUs that the first rank may use that is busy, by whomever.",
        curves={"host_cpu_share": ""},
        percent=True,
        from_zero=True,
    ),
    Chart(
        title="Model FLOPS utilization",
        caption="The encoders' products, as a share of what the device can compute in this precision at most.",
        curves={"mfu": ""},
        percent=True,
        from_zero=True,
    ),
    Chart(
        title="GPU memory",
        caption="GiB on the first rank's GPU: all that is in use, DALI's and other processes' part too, and torch's "
        "peak since the point before.",
        curves={"gpu_memory_used_gib": "in use", "gpu_memory_peak_gib": "torch's peak"},
        from_zero=True,
    ),
)
"""A chart whose values a run does not have is left out, as all others."""
