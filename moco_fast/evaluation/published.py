"""Published figures, each with its source, to stand beside ours. What was not read in its source is not here.

Sources: `paper` is the MoCo paper of the version, `authors` its code's README, the others repositories of benchmarks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from moco_fast.evaluation.result import Figure, Result, aligned
from moco_fast.transfer.presets import PRESETS, SEGMENT_PRESETS

__all__ = ["BENCHMARKS", "PUBLISHED", "Benchmark", "Published", "beside_published"]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A test set, as it can be told from a set of shards."""

    num_classes: int
    num_test: int
    num_train: int | None = None
    """Where another benchmark has the same test set."""


BENCHMARKS = {
    "ImageNet-1k": Benchmark(num_classes=1000, num_test=50_000),
    "Places205": Benchmark(num_classes=205, num_test=20_500),
    "VOC07+12": Benchmark(num_classes=20, num_test=4_952, num_train=16_551),
    "COCO": Benchmark(num_classes=80, num_test=5_000),
    "COCO keypoints": Benchmark(num_classes=1, num_test=5_000),
    "VOC12": Benchmark(num_classes=21, num_test=1_449),
    "Cityscapes": Benchmark(num_classes=19, num_test=500),
    "Cityscapes instances": Benchmark(num_classes=8, num_test=500),
    "LVIS v0.5": Benchmark(num_classes=1_230, num_test=5_000),
    "VOC07": Benchmark(num_classes=20, num_test=4_952),
    "CIFAR-10": Benchmark(num_classes=10, num_test=10_000),
    "CIFAR-100": Benchmark(num_classes=100, num_test=10_000),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure that others published."""

    benchmark: str
    task: str
    """As our task is called, with its protocol; others have names of their own."""
    figure: str
    """As our task calls it; kNN's have their k, as in `top1_k20`."""
    encoder: str
    """Architecture, ResNet-50 unless said."""
    pretraining: str
    value: float
    """In percent."""
    source: str


_SUPERVISED, _V1, _V2, _V2_800 = "supervised", "MoCo v1, 200 epochs", "MoCo v2, 200 epochs", "MoCo v2, 800 epochs"
_MMSELFSUP, _OPENSELFSUP = "open-mmlab/mmselfsup", "open-mmlab/OpenSelfSup"


def _rows(
    benchmark: str,
    task: str,
    figures: Sequence[str],
    source: str,
    *,
    encoder: str = "ResNet-50",
    **values: Sequence[float],
) -> Iterator[Published]:
    """Give the figures of some pretrainings, by the names of `_PRETRAININGS`."""
    for name, of_figures in values.items():
        for figure, value in zip(figures, of_figures, strict=True):
            yield Published(
                benchmark=benchmark,
                task=task,
                figure=figure,
                encoder=encoder,
                pretraining=_PRETRAININGS[name],
                value=value,
                source=source,
            )


_PRETRAININGS = {
    "supervised": _SUPERVISED,
    "v1": _V1,
    "v2": _V2,
    "v2_400": "MoCo v2, 400 epochs",
    "v2_800": _V2_800,
    "symmetric_200": "MoCo v2, symmetric loss, 200 epochs",
    "symmetric_400": "MoCo v2, symmetric loss, 400 epochs",
    "symmetric_800": "MoCo v2, symmetric loss, 800 epochs",
    "v3": "MoCo v3, 300 epochs",
    "v3_100": "MoCo v3, 100 epochs",
    "v3_300": "MoCo v3, 300 epochs",
    "v3_1000": "MoCo v3, 1000 epochs",
}

_OURS = "measured here"

_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
_BOXES = ("AP50", "AP", "AP75")
_STAGES = tuple(f"stage{stage}" for stage in range(1, 6))

PUBLISHED: tuple[Published, ...] = (
    *_rows("ImageNet-1k", "linear v1", ["top1"], "authors", supervised=[76.5], v1=[60.6], v2=[67.5], v2_800=[71.1]),
    *_rows("ImageNet-1k", "linear v1", ["top1"], "paper", encoder="ResNeXt-50 32x8d", v1=[63.9]),
    *_rows("ImageNet-1k", "linear v1", ["top1"], "paper", encoder="ResNet-50 w2x", v1=[65.4]),
    *_rows("ImageNet-1k", "linear v1", ["top1"], "paper", encoder="ResNet-50 w4x", v1=[68.6]),
    *_rows("ImageNet-1k", "linear v3", ["top1"], "authors", v3_100=[68.9], v3_300=[72.8], v3_1000=[74.6]),
    *_rows("ImageNet-1k", "linear v3", ["top1"], "authors", encoder="ViT-S", v3=[73.2]),
    *_rows("ImageNet-1k", "linear v3", ["top1"], "authors", encoder="ViT-B", v3=[76.7]),
    *_rows("ImageNet-1k", "knn", [f"top1_k{k}" for k in (10, 20, 100, 200)], _MMSELFSUP, v2=[55.6, 55.7, 53.7, 52.5]),
    *_rows(
        "ImageNet-1k",
        "stages",
        _STAGES,
        _OPENSELFSUP,
        v1=[15.3, 33.1, 44.7, 57.3, 60.6],
        v2=[16.0, 34.2, 45.8, 61.1, 66.2],
    ),
    *_rows("ImageNet-1k", "finetune semi-1", ["top1", "top5"], _OPENSELFSUP, v1=[33.15, 61.30], v2=[39.07, 68.31]),
    *_rows("ImageNet-1k", "finetune semi-10", ["top1", "top5"], _OPENSELFSUP, v1=[60.08, 84.02], v2=[61.80, 85.11]),
    *_rows("ImageNet-1k", "finetune full", ["top1"], "authors", encoder="ViT-S", v3=[81.4]),
    *_rows("ImageNet-1k", "finetune full", ["top1"], "authors", encoder="ViT-B", v3=[83.2]),
    *_rows("ImageNet-1k", "finetune full from scratch", ["top1"], "authors", encoder="ViT-B", supervised=[81.8]),
    *_rows("ImageNet-1k", "robustness", ["mce", "clean_error"], "hendrycks/robustness", supervised=[76.7, 23.85]),
    *_rows("VOC07", "svm voc07", ["map"], _OPENSELFSUP, v1=[79.18], v2=[84.26]),
    *_rows(
        "VOC07",
        "svm voc07",
        [f"map_{shots}_shot" for shots in _SHOTS],
        _OPENSELFSUP,
        v1=[30.0, 37.7, 47.6, 58.8, 66.0, 70.6, 74.6, 76.1],
        v2=[43.0, 52.5, 63.4, 71.7, 76.4, 78.9, 81.3, 82.5],
    ),
    *_rows("Places205", "stages", ["best stage"], _OPENSELFSUP, v1=[50.70], v2=[52.57]),
    *_rows(
        "CIFAR-10",
        "knn demo",
        ["top1"],
        "authors' notebook",
        encoder="ResNet-18",
        v2=[82.6],
        v2_400=[86.3],
        v2_800=[88.7],
        symmetric_200=[85.3],
        symmetric_400=[88.5],
        symmetric_800=[89.7],
    ),
    *_rows("CIFAR-10", "finetune transfer", ["top1"], "authors", encoder="ViT-B", v3=[98.9]),
    *_rows("CIFAR-100", "finetune transfer", ["top1"], "authors", encoder="ViT-B", v3=[90.5]),
    *_rows("Flowers-102", "finetune transfer", ["top1"], "authors", encoder="ViT-B", v3=[97.7]),
    *_rows("Pets", "finetune transfer", ["top1"], "authors", encoder="ViT-B", v3=[93.2]),
    *_rows(
        "VOC07+12",
        "detect voc-c4",
        _BOXES,
        "authors (mean of 5 runs)",
        supervised=[81.3, 53.5, 58.8],
        v1=[81.5, 55.9, 62.6],
        v2=[82.4, 57.0, 63.6],
        v2_800=[82.5, 57.4, 64.0],
    ),
    *_rows("VOC07+12", "detect voc-c5", _BOXES, "paper", supervised=[81.4, 54.0, 59.1], v1=[81.1, 54.6, 59.9]),
    *_rows("COCO", "detect coco-c4-2x", ["box AP", "mask AP"], "authors", supervised=[40.0, 34.7], v2=[41.0, 35.6]),
    *_rows("COCO", "detect coco-c4-2x", ["box AP", "mask AP"], _OPENSELFSUP, v1=[40.9, 35.5]),
    *_rows("COCO", "detect coco-fpn-1x", ["box AP", "mask AP"], _MMSELFSUP, v2=[40.2, 36.1]),
    *_rows(
        "COCO keypoints",
        "detect coco-keypoints",
        [f"keypoint {name}" for name in ("AP", "AP50", "AP75")],
        "paper",
        supervised=[65.8, 86.9, 71.9],
        v1=[66.8, 87.4, 72.5],
    ),
    *_rows("COCO", "dense pose", ["AP", "AP50", "AP75"], "paper", supervised=[48.3, 85.6, 50.6], v1=[50.1, 86.8, 53.9]),
    *_rows(
        "LVIS v0.5",
        "detect lvis-fpn-2x",
        ["mask AP", "mask AP50", "mask AP75"],
        "paper",
        supervised=[24.4, 37.8, 25.8],
        v1=[24.1, 37.4, 25.5],
    ),
    *_rows(
        "Cityscapes instances",
        "detect cityscapes-instance",
        ["AP", "AP50"],
        "paper",
        supervised=[32.9, 59.6],
        v1=[32.3, 59.3],
    ),
    *_rows("Cityscapes", "segment cityscapes-semantic", ["mIoU"], "paper", supervised=[74.6], v1=[75.3]),
    *_rows("VOC12", "segment voc-semantic", ["mIoU"], "paper", supervised=[74.4], v1=[72.5]),
)


def beside_published(results: Sequence[Result]) -> str:
    """Return a table of published figures, ours above those of the same benchmark, task and figure.

    Which benchmark a result is of is told by the number of its classes and test samples. Where settings of a transfer
    are others than its preset's, a line says which. Without results: all that is published.
    """
    lines = [["benchmark", "task", "figure", "encoder", "trained by", "figure in %", "source"]]
    unknown: list[str] = []
    others: list[str] = []
    for result in results:
        benchmark = _benchmark(result)
        if benchmark is None:
            unknown.append(f"{result.task} of {result.encoder['name']}: {_described(result)} is no published benchmark")
            continue
        num_lines = len(lines)
        for name, figure in _figures(result).items():
            same = [
                each
                for each in PUBLISHED
                if (each.benchmark, each.task, each.figure) == (benchmark, _task(result), name)
            ]
            if same or figure is result.headline:
                ours = f"{100 * figure.value:.2f}" if figure.unit == "share" else f"{figure.value:.4g}"
                lines.append([benchmark, _task(result), name, result.encoder["name"], "", ours, _OURS])
                lines += map(_line, same)
        is_compared = any(line[-1] != _OURS for line in lines[num_lines:])
        if is_compared and (settings := _other_settings(result)):
            what = f"{_task(result)} of {result.encoder['name']}"
            others.append(f"note: {what} has other settings than the published figures beside it: {settings}")
    if not results:
        lines += map(_line, PUBLISHED)
    return "\n".join([*([aligned(lines)] if len(lines) > 1 else []), *unknown, *others])


def _other_settings(result: Result) -> str:
    """Return the settings of a transfer that are not its preset's, with the preset's; empty: there are none."""
    preset = (SEGMENT_PRESETS if result.task == "segment" else PRESETS).get(result.protocol)
    if result.task not in ("detect", "segment") or preset is None:
        return ""
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(preset).items()}
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in result.settings.items()}
    return "; ".join(
        f"{name.replace('_', '-')} {_written(told[name])} in place of {_written(value)}"
        for name, value in own.items()
        if name != "title" and name in told and told[name] != value
    )


def _written(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_written, value))  # pyright: ignore[reportUnknownArgumentType] - of JSON
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(published: Published) -> list[str]:
    return [
        published.benchmark,
        published.task,
        published.figure,
        published.encoder,
        published.pretraining,
        f"{published.value:g}",
        published.source,
    ]


def _benchmark(result: Result) -> str | None:
    train, test = (result.data.get(split, {}) for split in ("train", "test"))
    for name, benchmark in BENCHMARKS.items():
        if (test.get("num_classes"), test.get("num_samples")) != (benchmark.num_classes, benchmark.num_test):
            continue
        if benchmark.num_train in (None, train.get("num_samples")):
            return name
    return None


def _described(result: Result) -> str:
    test = result.data.get("test")
    if test is None:
        return "a result without a test set"
    return f"a test set of {test['num_samples']:,} samples in {test['num_classes']} classes"


def _task(result: Result) -> str:
    # The authors' demo compares the head's output, at another temperature.
    if result.task == "knn" and (result.settings["layer"], result.settings["temperature"][0]) == ("head", 0.1):
        return "knn demo"
    if result.task in ("detect", "segment"):
        # The published rows of a preset are of its own head and optimizer.
        other = [result.settings.get(name) for name in ("head", "optimizer")]
        return " ".join([result.task, result.protocol, *(each for each in other if each in ("deeplabv3", "adamw"))])
    scratch = " from scratch" if result.settings.get("from_scratch") else ""
    # v2's linear protocol is v1's.
    return f"{result.task} {'v1' if result.protocol == 'v2' else result.protocol}".rstrip() + scratch


def _figures(result: Result) -> dict[str, Figure]:
    """Return figures by the names under which they are published: kNN's with their k."""
    if _task(result) != "knn":
        return result.figures
    figures = dict(result.figures)
    first = product(result.settings["k"], result.settings["temperature"])
    return {f"top1_k{next(first)[0]}": figures.pop("top1")} | figures
