"""Python API to configure, train and evaluate, like the command line but with Python values."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import tyro

from moco_fast.commandline import check
from moco_fast.commands.evaluating import EvalOptions, measure_all
from moco_fast.config import Config, option_name
from moco_fast.presets import PRESETS
from shards.ground.option_files import fitted

if TYPE_CHECKING:
    from moco_fast.evaluation.result import Result

__all__ = ["configure", "evaluate", "train"]

Section = TypeVar("Section")


def configure(recipe: str, options: Mapping[str, Any]) -> Config:
    """Make a run's configuration from a published recipe and the options that differ.

        config = moco_fast.configure("moco-v2", {"data.shards": "shards/train", "run.epochs": 100})

    Args:
        recipe: one of moco_fast.presets.PRESETS.
        options: values by the command line's option names without leading dashes (`optim.lr`, `data.batch_size`), or
            by the name of a whole section (`views`).

    Raises:
        ValueError: no such recipe or option, a value of the wrong type, or options that cannot work together.
    """
    if recipe not in PRESETS:
        raise ValueError(f"there is no recipe {recipe!r}: choose {', '.join(PRESETS)}")
    _, base = PRESETS[recipe]
    # A whole section replaces the recipe's, so its options are not compared with the recipe's.
    for name, value in options.items():
        base = _changed(base, [name], value, name) if "." not in name else base
    config = base
    for name, value in options.items():
        config = _changed(config, name.replace("-", "_").split("."), value, name)
    if config.data.shards is tyro.MISSING:
        raise ValueError("`data.shards` is not given: name the shards to train on")
    check(config, base)
    return config


def train(config: Config) -> int:
    """Start or continue a run in this process; for several processes, use `accelerate launch SCRIPT`.

        moco_fast.train(moco_fast.configure("demo", {"data.shards": "shards/train", "run.out": "runs/first"}))

    Returns:
        0 when the run is finished, 128 + signal when a signal stopped it (and it was saved).

    Raises:
        ValueError: the configuration cannot work; nothing has been trained.
        FloatingPointError: the loss is not finite.
    """
    from moco_fast.training.loop import train as run

    return run(config)


def evaluate(
    task: str,
    encoder: str | Path,
    *,
    train: str | None = None,
    test: str | None = None,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> "Result":
    """Evaluate an encoder on a task, as `moco-fast eval` does.

        result = moco_fast.evaluate("knn", "runs/first", test="shards/val", settings={"k": (20,)})
        print(result.figures["top1"].value, result.figures["top1"].interval)

    Args:
        task: one of moco_fast.evaluation.registry.TASKS.
        encoder: a value of `--encoder`: a run's folder, a file of weights, `timm:NAME`, ...
        train: labeled shards to learn from, or a folder of class folders; unset: the run's training shards.
        test: held-out ones; unset: the run's.
        settings: options of the task, by name with underscores; defaults come from the protocol or the run.
        options: options of every task, by the names of moco_fast.commands.evaluating.EvalOptions: `{"seeds": 3}`.

    Raises:
        ValueError: no such task, option or encoder, or shards without labels or with different classes.
    """
    from moco_fast.evaluation.registry import task_class

    chosen = task_class(task)()
    for name, value in (settings or {}).items():
        chosen = _changed(chosen, [name], value, name)
    of_all = EvalOptions(encoder=str(encoder))
    for name, value in (options or {}).items():
        of_all = _changed(of_all, [name], value, name)
    return measure_all(of_all, [chosen], {"train": train, "test": test})[0]


def _changed(section: Section, path: list[str], value: object, name: str) -> Section:
    """Return a copy of a section with one of its options changed."""
    assert dataclasses.is_dataclass(section)
    assert not isinstance(section, type)
    hints = get_type_hints(type(section))
    first, *rest = path
    if first not in hints:
        near = ", ".join(option_name(field) for field in hints)
        raise ValueError(f"there is no option {name!r}: {first!r} is not among {near}")
    if rest:
        if not dataclasses.is_dataclass(hints[first]):
            raise ValueError(f"there is no option {name!r}: {first!r} is a single value")
        value = _changed(getattr(section, first), rest, value, name)
    else:
        try:
            value = fitted(value, hints[first])
        except ValueError as error:
            raise ValueError(f"{name!r} is {value!r}, but must be {error}") from None
    return replace(section, **{first: value})
