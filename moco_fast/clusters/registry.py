"""What starts jobs, by the name of its option, and which other options of `moco-fast launch` it reads."""

from collections.abc import Collection, Mapping

__all__ = ["PACKS", "TRAINS", "check_meaning"]

_IMAGE_ON_SLURM = ("image", "container", "time", "partition", "account")
_POD = ("image", "claim", "mount", "namespace", "secret")
_RANKS = ("gpus", "restarts", "interface")
_WORKERS = ("nodes", "cpus", "parts")

TRAINS: Mapping[str, tuple[str, ...]] = {
    "slurm": ("nodes", *_RANKS, *_IMAGE_ON_SLURM),
    "kubernetes": ("nodes", *_RANKS, *_POD),
    "trainjob": ("nodes", *_RANKS, *_POD),
    "sky": ("nodes", *_RANKS, "image", "claim", "mount", "gpu", "spot", "infra"),
    "compose": ("gpus", "restarts", "image", "mount"),
    "torchrun": ("nodes", *_RANKS, "first_node"),
}
"""For a recipe."""

PACKS: Mapping[str, tuple[str, ...]] = {
    "slurm": (*_WORKERS, *_IMAGE_ON_SLURM),
    "kubernetes": (*_WORKERS, *_POD),
    "ray": ("nodes", "infra", "instance", "hosts"),
}
"""For `make-shards pack`."""


def check_meaning(scheduler: str, given: Collection[str], *, packs: bool) -> None:
    """Refuse a scheduler that cannot do it, and options that it does not read.

    Args:
        scheduler: by its option.
        given: names of the other options that have a value of their own.
        packs: whether packing is started; training otherwise.

    Raises:
        ValueError: names the option, and what reads it.
    """
    mine = PACKS if packs else TRAINS
    here, elsewhere = ("`make-shards pack`", "a recipe") if packs else ("a recipe", "`make-shards pack`")
    if scheduler not in mine:
        raise ValueError(f"--{scheduler} starts {elsewhere}, not {here}: for that use {_options(mine)}")
    for name in given:
        if name in mine[scheduler]:
            continue
        readers = _options([each for each in mine if name in mine[each]])
        if not readers:
            raise ValueError(f"{_options([name])} is for {elsewhere} and does nothing with {here}: leave it out")
        raise ValueError(f"{_options([name])} is of {readers} and does nothing with --{scheduler}: leave it out")


def _options(names: Collection[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
