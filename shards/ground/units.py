"""Units for people: counts, sizes and durations in words."""

__all__ = ["counted", "format_bytes", "format_duration", "gib"]


def counted(num: int, noun: str, *, plural: str | None = None) -> str:
    """Write a number of things, such as `1 shard` or `2,000 shards`."""
    return f"{num:,} {noun if num == 1 else plural or f'{noun}s'}"


def format_bytes(num_bytes: float) -> str:
    """Write a size on disk or in memory in powers of 1,000 and three digits, such as `1.23 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        # From here on three digits are those of the next unit.
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB" if num_bytes < 999.5 else f"{num_bytes:,.0f} TB"


def gib(num_bytes: float) -> str:
    """Write a size in GiB: beside options that are given in GiB."""
    return f"{num_bytes / (1 << 30):.3g} GiB"


def format_duration(seconds: float) -> str:
    """Write a time in two units at most, such as `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
