"""Checks for options that have no effect with the other options, and for old option names. Does not import torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from moco_fast.config import Config, changes, flatten, option_name, to_dict
from pipelines.backends.registry import STREAMING, refuse_unused

__all__ = ["RENAMED", "RENAMED_OF_KNN", "refuse_meaningless", "refuse_renamed", "refuse_without_section"]

RENAMED = {
    "--moco.queue-size": "--method.queue-size (--method.num-negatives of memory-bank)",
    "--moco.momentum": "--method.momentum",
    "--moco.temperature": "--method.temperature",
    "--moco.momentum-schedule": "--method.momentum-schedule",
    "--moco.bank-momentum": "--method.momentum",
    "--moco.loss": "--method.symmetric (v3's is the loss of the presets moco-v3-*)",
    "--moco.key-encoder": "the choice between the presets moco-* and end-to-end",
    "--moco.dictionary": "the choice of a method: the presets memory-bank, end-to-end, moco-*",
    "--model.head": "--method.head (v3's is the head of the presets moco-v3-*)",
    "--model.dim": "--method.dim",
    "--model.mlp-dim": "--method.mlp-dim",
    "--log.tensorboard": "--log.trackers tensorboard",
    "--log.no-tensorboard": "--log.trackers (without a name, or with those of other trackers)",
}
"""Old option name -> what replaces it."""

RENAMED_OF_KNN = {
    "--checkpoint": "--encoder",
    "--bank-shards": "--train",
    "--query-shards": "--test",
    "--batch-size": "--encode-batch-size",
    "--json": "--out - (or --out FILE.json)",
}
"""The same for `moco-fast eval knn`."""


@dataclass(frozen=True)
class _Rule:
    """Some options, what leaves them without effect, and what gives them one."""

    options: tuple[str, ...]
    """Dotted names of fields of the configuration."""
    beside: Callable[[Config], str | None]
    """Returns the options, as on the command line, with which these have no effect; None: they have one."""
    way_out: str


def _unless(field: str, *values: str) -> Callable[[Config], str | None]:
    """Return a rule's `beside`: options have no effect unless `field` has one of these values."""

    def beside(config: Config) -> str | None:
        section, _, name = field.partition(".")
        value = getattr(getattr(config, section), name)
        return None if value in values else f"--{option_name(field)} {value}"

    return beside


def _without_second_view(config: Config) -> str | None:
    return f"{config.method.name}, which looks at one view" if config.method.num_views == 1 else None


def _other_length(config: Config) -> str | None:
    lengths = {"steps": config.run.steps, "samples": config.run.samples}
    return next((f"--run.{name} {value}" for name, value in lengths.items() if value is not None), None)


def _without_evaluation(config: Config) -> str | None:
    return "no --eval.shards" if config.eval.shards is None and not config.eval.tasks else None


def _without_probe(config: Config) -> str | None:
    return None if config.eval.online_probe else "no --eval.online-probe"


def _local_shards(config: Config) -> str | None:
    is_remote = any("://" in shards for shards in (config.data.shards, config.eval.shards or ""))
    return None if is_remote else f"--data.shards {config.data.shards}, which is on this machine"


def _streamed(config: Config) -> str | None:
    samples = config.data.stream_samples
    return None if samples is None else f"--data.stream-samples {samples}"


def _without_trackers(config: Config) -> str | None:
    return None if config.log.trackers else "no --log.trackers"


def _without_names(config: Config) -> str | None:
    return None if set(config.log.trackers) - {"tensorboard"} else "no tracker that takes it"


_RULES = (
    _Rule(("bn.num_groups",), _unless("bn.policy", "virtual", "auto"), "use --bn.policy virtual"),
    _Rule(("optim.momentum",), _unless("optim.name", "sgd", "lars"), "use --optim.name sgd or lars"),
    _Rule(("optim.betas",), _unless("optim.name", "adamw", "lamb"), "use --optim.name adamw or lamb"),
    _Rule(("optim.trust",), _unless("optim.name", "lars"), "use --optim.name lars"),
    _Rule(("optim.milestones",), _unless("optim.schedule", "step"), "use --optim.schedule step"),
    _Rule(
        ("optim.decay", "optim.decay_every"),
        _unless("optim.schedule", "exponential"),
        "use --optim.schedule exponential",
    ),
    _Rule(("run.epochs",), _other_length, "add --run.steps None --run.samples None"),
    _Rule(("checkpoint.failure_hours",), _unless("checkpoint.every", "auto"), "add --checkpoint.every auto"),
    _Rule(
        ("checkpoint.every_steps", "checkpoint.every_minutes"),
        _unless("checkpoint.every", "given"),
        "leave out --checkpoint.every auto",
    ),
    _Rule(("eval.probe_lr",), _without_probe, "add --eval.online-probe"),
    _Rule(("eval.every_steps", "eval.max_held_out"), _without_evaluation, "name held-out shards"),
    _Rule(("log.name", "log.tags"), _without_trackers, "name some"),
    _Rule(("log.project",), _without_names, "add --log.trackers wandb, mlflow or trackio"),
    _Rule(("data.cache", "data.cache_gib", "data.fetchers"), _local_shards, "name shards in a bucket"),
    _Rule(("data.lanes", "data.window_shards", "data.cache_decoded"), _streamed, "index the tars (make-shards index)"),
)


def _rules(config: Config) -> Iterator[_Rule]:
    yield from _RULES
    for name, view in (("query", config.views.query), ("key", config.views.key), ("small", config.views.small)):
        prefix = f"views.{name}"
        fields = tuple(f"{prefix}.{field}" for field in vars(view))
        if name == "key":
            yield _Rule(fields, _without_second_view, "train by another method")
        jitter = tuple(f"{prefix}.{field}" for field in ("brightness", "contrast", "saturation", "hue"))
        yield _view_rule(jitter, f"{prefix}.jitter_p", view.jitter_p)
        yield _view_rule((f"{prefix}.blur_sigma",), f"{prefix}.blur_p", view.blur_p)
        yield _view_rule((f"{prefix}.grayscale_first",), f"{prefix}.grayscale_p", view.grayscale_p)
        yield _view_rule((f"{prefix}.grayscale_first",), f"{prefix}.jitter_p", view.jitter_p)


def _view_rule(options: tuple[str, ...], field: str, probability: float) -> _Rule:
    option = option_name(field)
    return _Rule(options, lambda _: None if probability else f"--{option} 0", f"set --{option} above 0")


def refuse_renamed(words: Sequence[str]) -> None:
    """Refuse an option's old name. Raises ValueError: the message gives what replaces it."""
    renamed = RENAMED | (RENAMED_OF_KNN if list(words[:2]) == ["eval", "knn"] else {})
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if option in renamed:
            raise ValueError(f"{option} is now {renamed[option]}")


def refuse_without_section(words: Sequence[str], recipes: Iterable[Config]) -> None:
    """Refuse an option that is given without its section. Raises ValueError: the message has the whole name."""
    names = dict.fromkeys(option_name(name) for config in recipes for name in flatten(to_dict(config)) if "." in name)
    sections: dict[str, list[str]] = {name.rpartition(".")[2]: [] for name in names}
    for name in names:
        section, _, last = name.rpartition(".")
        sections[last].append(section)
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        bare = option.removeprefix("--").removeprefix("no-")
        if option.startswith("--") and bare in sections:
            meant = " or ".join(f"--{section}.{option.removeprefix('--')}" for section in sections[bare])
            raise ValueError(f"{option} is not an option: did you mean {meant}?")


def refuse_meaningless(config: Config, recipe: Config) -> None:
    """Refuse an option that was given, but has no effect with the others.

    Args:
        config: the configuration as given.
        recipe: the preset that it came from: options with the preset's values count as not given.

    Raises:
        ValueError: the message names the option, the options with which it has no effect, and what to do.
    """
    given = changes(recipe, config)
    for rule in _rules(config):
        for option in rule.options:
            if option in given and (beside := rule.beside(config)):
                raise ValueError(
                    f"--{option_name(option)} {given[option][1]} means nothing beside {beside}: leave it out, or "
                    f"{rule.way_out}"
                )
    is_streamed = config.data.stream_samples is not None
    # The device may be known only when the run starts: then the loader refuses the remaining options.
    refuse_unused(config.data, STREAMING if is_streamed else config.data.backend, on_gpu=config.run.device != "cpu")
