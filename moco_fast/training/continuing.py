"""What a run that continues may do otherwise than before: settings, and the samples of its sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moco_fast.config import Config, changes, may_change, option_name
from moco_fast.evaluation.base import RunSets

__all__ = ["Changes", "allowing", "compare", "identity_of"]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What differs from the last start of a run, as `--option: before -> now`."""

    refused: tuple[str, ...]
    """What decides what is trained, and is not allowed."""
    allowed: tuple[str, ...]
    """The same, as --run.allow-changes names it."""
    noted: tuple[str, ...]
    """What anyone may change, but should know of."""


def identity_of(sets: RunSets) -> dict[str, dict[str, Any]]:
    """Return what a run's sets hold, by option: where they are, how many samples, a digest; JSON can hold it."""
    found = {"data.shards": sets.training, "eval.shards": sets.held_out}
    return {
        option: {"where": shards.where, "num_samples": shards.num_samples, "digest": shards.manifest.identity}
        for option, shards in found.items()
        if shards is not None
    }


def compare(
    before: Config, now: Config, data_before: Mapping[str, Mapping[str, Any]], data: Mapping[str, Mapping[str, Any]]
) -> Changes:
    """Compare two starts of a run.

    Args:
        before: configuration of the last start.
        now: configuration of this one, whose --run.allow-changes counts.
        data_before: `identity_of` the sets of the last start; of a version that did not note it, empty.
        data: of this one.

    Raises:
        ValueError: --run.allow-changes names an option that there is not.
    """
    rules = may_change(now)
    names = [name.removeprefix("--").replace("-", "_") for name in now.run.allow_changes]
    if unknown := [name for name in names if name not in rules]:
        raise ValueError(
            f"--run.allow-changes {option_name(unknown[0])} is not an option: name some, such as run.steps data.shards"
        )
    lines: dict[str, list[str]] = {"freely": [], "with a note": [], "if allowed": [], "allowed": []}
    for name, (old, new) in changes(before, now).items():
        rule = rules.get(name, "if allowed")
        if rule == "if given":
            if new is None:
                continue
            rule = "if allowed"
        is_asked = rule == "if allowed" and name in names
        lines["allowed" if is_asked else rule].append(f"--{option_name(name)}: {old} -> {new}")
    for option in data_before.keys() & data.keys():
        if (line := _other_samples(option, data_before[option], data[option])) is None:
            continue
        # Who names another set to be evaluated on knows that it is another one.
        is_told = option == "eval.shards" and data_before[option]["where"] != data[option]["where"]
        if option == "data.shards" and now.method.needs_sample_numbers:
            raise ValueError(
                f"{line}, but {now.method.name} keeps something for each sample: train other samples in another folder"
            )
        rule = "with a note" if is_told else "allowed" if option in names else "if allowed"
        lines[rule].append(line)
    return Changes(
        refused=tuple(lines["if allowed"]), allowed=tuple(lines["allowed"]), noted=tuple(lines["with a note"])
    )


def _other_samples(option: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if before["digest"] == now["digest"]:
        return None
    old, new = (f"{each['num_samples']:,} samples, digest {each['digest'][:8]}" for each in (before, now))
    return f"--{option} {now['where']} holds other samples: {old} -> {new}"


def allowing(refused: Sequence[str]) -> str:
    """Return --run.allow-changes with the names of what was refused."""
    return f"--run.allow-changes {' '.join(line.removeprefix('--').partition(' ')[0].rstrip(':') for line in refused)}"
