"""The `moco-fast` command: one verb a task. Verbs import what they need when they run: `--help` never loads torch."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro

from moco_fast.bench.cli import main as bench
from moco_fast.config import Layer
from moco_fast.export.export import Format
from moco_fast.training import process

if TYPE_CHECKING:
    import torch

    from moco_fast.config import Config
    from moco_fast.evaluation.knn import KnnResult

__all__ = ["VERBS", "Verb", "main"]

Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class EvalKnn:
    """Classify held-out samples by their nearest training samples, with the trained encoder and with it untrained."""

    checkpoint: str
    """Folder of a run (its newest checkpoint counts) or one of its checkpoints/step-*."""
    bank_shards: str | None = None
    """Labeled shards whose samples serve as neighbors; unset: the run's training shards."""
    query_shards: str | None = None
    """Labeled held-out shards to classify; unset: the run's --eval.shards."""
    k: int | None = None
    """Neighbors that vote; unset: the run's --eval.k."""
    temperature: float | None = None
    """Temperature of the vote's weights; unset: the run's --eval.temperature."""
    layer: Layer | None = None
    """What neighbors are compared by: the backbone's features or the head's output; unset: the run's --eval.layer."""
    max_bank: int | None = None
    """At most this many samples serve as neighbors; unset: the run's --eval.max-bank."""
    crop: float | None = None
    """Central square that is used, as a share of the shorter side; unset: the run's --eval.crop."""
    batch_size: int = 256
    """Images computed at once."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""
    json: bool = False
    """Print one line of JSON instead."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw the two views of some samples exactly as training sees them."""

    shards: tyro.conf.Positional[str]
    """Folder that make-shards wrote."""
    out: str
    """Image to write (.png, .jpg or .webp)."""
    views: str = "moco-v2"
    """Recipe of the views: moco-v1, moco-v2, cifar10 and so on."""
    size: int | None = None
    """Height and width of a view in pixels; unset: the recipe's."""
    num: int = 12
    """Samples, evenly spread over the set."""
    seed: int = 0
    """Seed of the run."""
    epoch: int = 0
    """Epoch of the run, from 0."""
    backend: Literal["auto", "dali", "ffcv", "torch"] = "dali"
    """What makes the views."""
    compare: Literal["dali", "torch"] | None = None
    """Another backend: the sheet then shows, 16 times amplified, how far its views are from the first one's."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html into a run's folder: curves, views and neighbors on one page. The run may still go on."""

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    num_samples: int = 8
    """Training samples, and held-out samples, in the pictures."""
    max_bank: int = 2000
    """Training samples among which neighbors are looked for."""
    device: Device = "auto"
    """`auto`: a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the encoder without its head as timm or torchvision can load it."""

    run: tyro.conf.Positional[str]
    """Folder of a run (its newest checkpoint counts) or one of its checkpoints/step-*."""
    out: str
    """timm: folder to write; torchvision: file to write (.safetensors)."""
    format: Format = "timm"
    """Library that shall load it."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What `moco-fast` can do."""

    summary: str
    """For `moco-fast --help`."""
    run: Callable[[Sequence[str]], int]
    """Takes the words after the verb, returns the exit code."""


def _eval_knn(command: EvalKnn) -> int:
    import json

    from moco_fast.evaluation.untrained import untrained_twin
    from moco_fast.training.checkpoint import load_encoder

    config, encoder = load_encoder(command.checkpoint)
    device = _choose_device(command.device)
    results = {
        name: _knn(command, config, model.to(device), device)
        for name, model in (("trained", encoder), ("untrained", untrained_twin(config)))
    }
    trained, untrained = results["trained"], results["untrained"]
    layer = _given(command.layer, config.eval.layer)
    if command.json:
        facts = {"top1": trained.top1, "untrained_top1": untrained.top1, "k": trained.k, "layer": layer}
        print(json.dumps(facts | {"num_bank": trained.num_bank, "num_queries": trained.num_queries}))
        return 0
    if trained.note:
        print(f"note: {trained.note}", file=sys.stderr)
    by = f"{trained.k} of {trained.num_bank:,} neighbors ({layer} features)"
    print(f"kNN top-1 of {trained.num_queries:,} held-out samples by {by}:")
    print(f"  trained    {100 * trained.top1:5.1f}%")
    print(f"  untrained  {100 * untrained.top1:5.1f}%")
    return 0


def _knn(command: EvalKnn, config: "Config", encoder: Any, device: "torch.device") -> "KnnResult":
    from moco_fast.config import KnnConfig
    from moco_fast.evaluation.knn import evaluate_knn

    query_shards = command.query_shards or config.eval.shards
    if query_shards is None:
        raise ValueError("the run has no held-out samples: name some with --query-shards")
    knn = KnnConfig(
        k=_positive("k", _given(command.k, config.eval.k)),
        temperature=_positive("temperature", _given(command.temperature, config.eval.temperature)),
        layer=_given(command.layer, config.eval.layer),
        crop=_given(command.crop, config.eval.crop),
        max_bank=_positive("max-bank", _given(command.max_bank, config.eval.max_bank)),
    )
    return evaluate_knn(
        encoder,
        knn,
        bank_shards=command.bank_shards or config.data.shards,
        query_shards=query_shards,
        size=config.views.size,
        batch_size=command.batch_size,
        device=device,
        data=config.data,
    )


def _preview(command: Preview) -> int:
    from dataclasses import replace

    from pipelines.config import VIEWS

    if command.views not in VIEWS:
        raise ValueError(f"--views {command.views} is no recipe: take one of {', '.join(VIEWS)}")
    out = Path(command.out)
    if out.suffix not in (".png", ".jpg", ".jpeg", ".webp") or not out.parent.is_dir():
        raise ValueError(f"--out {out}: name a .png, .jpg or .webp file in a folder that exists")
    views = VIEWS[command.views]
    if command.size is not None:
        views = replace(views, size=_positive("size", command.size))
    import numpy as np

    from pipelines.preview import differences, draw, sheet
    from shards.sets import open_set

    num_samples = open_set(command.shards).num_samples
    chosen = np.linspace(0, num_samples - 1, min(_positive("num", command.num), num_samples)).round().astype(int)
    previews, others = (
        draw(command.shards, views, seed=command.seed, epoch=command.epoch, indices=chosen.tolist(), backend=backend)
        if backend
        else []
        for backend in (command.backend, command.compare)
    )
    sheet(previews, others, columns=2 if others else 3).save(out)
    print(f"{out}: {len(chosen)} samples as a run with seed {command.seed} sees them in epoch {command.epoch}")
    if others:
        apart = np.concatenate([of_view.ravel() for of_view in differences(previews, others)])
        print(
            f"{command.backend} and {command.compare} are {apart.mean():.2f} levels of 255 apart on average, "
            f"{apart.max()} at most (docs/data.md says where)"
        )
    return 0


def _report(command: Report) -> int:
    from moco_fast.report.commands import next_commands
    from moco_fast.report.record import read_run
    from moco_fast.report.report import write_report

    page = write_report(
        command.run,
        device=_choose_device(command.device),
        num_samples=_positive("num-samples", command.num_samples),
        max_bank=_positive("max-bank", command.max_bank),
    )
    print("Next:")
    for proposal in next_commands(read_run(command.run)):
        print(f"  # {proposal.purpose}\n  {proposal.line}")
    print(f"\nReport: {page}")
    return 0


def _export(command: Export) -> int:
    from moco_fast.export.export import export

    written = export(command.run, command.format, command.out)
    print(f"{written.path}: {written.num_parameters:,} parameters. To load them:\n\n{written.usage}")
    return 0


def _choose_device(device: Device) -> "torch.device":
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; take --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def _positive(option: str, value: Number) -> Number:
    if not value > 0:
        raise ValueError(f"--{option} is {value}, but must be above 0")
    return value


def _verb(config: type[T], name: str, run: Callable[[T], int]) -> Verb:
    """Make a verb of a dataclass of options; the first sentence of its docstring is its summary."""

    def parse_and_run(argv: Sequence[str]) -> int:
        return run(tyro.cli(config, prog=f"moco-fast {name}", args=argv))

    return Verb(summary=(config.__doc__ or "").partition(":")[0].partition(". ")[0].rstrip("."), run=parse_and_run)


VERBS: dict[str, Verb] = {
    "eval knn": _verb(EvalKnn, "eval knn", _eval_knn),
    "preview": _verb(Preview, "preview", _preview),
    "report": _verb(Report, "report", _report),
    "export": _verb(Export, "export", _export),
    "bench": Verb(summary="Measure what limits a run on this machine", run=bench),
}
"""Every verb, in the order of the help; a name may have two words."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moco-fast`.

    Returns:
        the exit code: 0 done, 2 when the command cannot work as given (said in one line on stderr), 130 interrupted.
    """
    process.prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    for name, verb in VERBS.items():
        length = len(name.split())
        if words[:length] == name.split():
            return _guarded(verb, words[length:])
    asked = [word for word in words if not word.startswith("-")]
    group = {name: verb for name, verb in VERBS.items() if asked and name.startswith(f"{asked[0]} ")}
    if asked and not (group and asked == asked[:1]):
        print(f"error: there is no `{' '.join(asked[:2])}`: moco-fast knows {', '.join(VERBS)}", file=sys.stderr)
        return 2
    wants_help = "-h" in words or "--help" in words
    print(_help(group or VERBS), file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


def _guarded(verb: Verb, words: Sequence[str]) -> int:
    try:
        return verb.run(words)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _help(verbs: dict[str, Verb]) -> str:
    width = max(map(len, verbs))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in verbs.items()]
    return "\n".join(["usage: moco-fast VERB [options]; moco-fast VERB --help tells its options", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
