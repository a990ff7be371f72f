"""How a run was launched and continued, as the report shows it: command, variables, starts, hours, changes."""

from datetime import UTC, datetime
from typing import Any

from moco_fast.report.hours import name_of_hours, rank_hours
from moco_fast.report.record import RunRecord
from moco_fast.report.words import Tile
from shards.ground.units import counted

__all__ = ["StartRow", "hours_tile", "launch_table", "starts_table"]

StartRow = tuple[str, str, str, str]
"""Step that a start began with, when it was, where, and what was other than before."""


def hours_tile(record: RunRecord, price_per_hour: float | None) -> list[Tile]:
    """Return what the run took, in hours times ranks and, with a price, in money; nothing if that is not known."""
    hours = rank_hours(record)
    if hours is None:
        return []
    name = name_of_hours([record])
    cost = "" if price_per_hour is None else f"cost {price_per_hour * hours.total:,.2f}; "
    note = f"{cost}{hours.training:,.3g} of them in its steps; {counted(hours.num_starts, 'start')}"
    return [Tile(name=name[0].upper() + name[1:], value=f"{hours.total:,.3g}", note=note)]


def launch_table(record: RunRecord) -> list[tuple[str, str]]:
    """List what else decided how the run was launched."""
    launch: dict[str, Any] = record.environment.get("launch", {})
    hosts: list[str] = record.environment.get("hosts", [])
    found = {
        "Folder": launch.get("folder"),
        "Hosts": _hosts(hosts),
        "Configuration of accelerate": launch.get("config_file"),
        **launch.get("variables", {}),
    }
    return [(name, value) for name, value in found.items() if value]


def _hosts(hosts: list[str]) -> str:
    """Write the hosts of all ranks, each with the number of its ranks."""
    ranks = {host: hosts.count(host) for host in hosts}
    return ", ".join(f"{host} ({counted(num, 'rank')})" for host, num in ranks.items())


def starts_table(record: RunRecord) -> list[StartRow]:
    """List the starts of a run that was continued, and what was changed then; empty: it was not."""
    changed = list(record.changed)
    rows: list[StartRow] = []
    for start in record.starts:
        # Only starts that changed something have a line, in the order of the starts.
        changes = changed.pop(0) if changed and changed[0]["step"] == start["step"] else None
        when = datetime.fromtimestamp(start["at"], UTC).strftime("%Y-%m-%d %H:%M UTC")
        where = f"{counted(start['world_size'], 'rank')}, {start['device']}"
        rows.append((f"{start['step']:,}", when, where, _written(changes)))
    # What a version that did not note starts has left.
    rows += [(f"{each['step']:,}", "", "", _written(each)) for each in changed]
    return rows if len(rows) > 1 or changed else []


def _written(changes: dict[str, Any] | None) -> str:
    if changes is None:
        return ""
    allowed = [f"{line} (as --run.allow-changes said)" for line in changes["allowed"]]
    return "; ".join([*allowed, *changes["noted"]])
