"""Page of `make-shards summary`: facts in, HTML out, with everything in it and no script."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from shards.ground.pages import page_style, prose
from shards.ground.units import counted, format_bytes
from shards.sets.manifest import Manifest
from shards.storage.file_kinds import ASIDE_NAME, REJECTED_NAME
from shards.tools.figures import Histogram

__all__ = ["CaptionedPicture", "ClassShare", "DuplicateGroup", "RejectedGroup", "SummaryFacts", "page_of"]

_STYLE = """
.bars { display: grid; grid-template-columns: minmax(0, max-content) minmax(2rem, 1fr) max-content; gap: 0.3rem 0.7rem;
  align-items: center; margin: 0.8rem 0 0; font-size: 0.875rem; }
.bars dt, .found > div { overflow-wrap: anywhere; }
.bars dd { margin: 0; text-align: right; }
.bars i { display: block; height: 0.7rem; min-width: 2px; background: var(--key); border-radius: 2px; }
.found b { overflow: hidden; overflow-wrap: anywhere; font-weight: 600;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; }
.found .none { font-size: 0.8rem; color: var(--muted); padding: 0.5rem; text-align: center; }
"""


@dataclass(frozen=True, kw_only=True)
class CaptionedPicture:
    """An image with words."""

    url: str | None
    """Data URL; None: it cannot be shown."""
    title: str
    below: str


@dataclass(frozen=True, kw_only=True)
class RejectedGroup:
    """Inputs that were rejected for one reason."""

    reason: str
    count: int
    examples: Sequence[CaptionedPicture]


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Images that are almost the same."""

    count: int
    pictures: Sequence[CaptionedPicture]


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """How many samples a class has."""

    name: str
    num_samples: int
    rank: int
    """Among the classes by size, from 1."""


@dataclass(frozen=True, kw_only=True)
class SummaryFacts:
    """What the page shows."""

    where: str
    manifest: Manifest
    histograms: Sequence[Histogram]
    classes: Sequence[ClassShare]
    """By size; of many classes the largest and the smallest."""
    num_unlabeled: int
    samples: Sequence[CaptionedPicture]
    rejected: Sequence[RejectedGroup]
    duplicates: Sequence[DuplicateGroup] | None
    """The largest groups; None: they were not looked for."""
    num_duplicate_groups: int
    num_in_groups: int


def page_of(facts: SummaryFacts) -> str:
    """Return the page."""
    parts = "\n".join((_head(facts), *_sections(facts)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(facts.where)}</title>
<style>
{page_style()}{_STYLE}</style>
</head>
<body>
<main>
{parts}
<footer>Written by <code>make-shards summary</code>.</footer>
</main>
</body>
</html>
"""


def _head(facts: SummaryFacts) -> str:
    manifest = facts.manifest
    num_bytes = int(manifest.shards.num_bytes.sum())
    share = manifest.num_rejected / max(1, manifest.num_inputs)
    tiles = [
        ("Samples", f"{manifest.num_samples:,}", f"of {counted(manifest.num_inputs, 'input')}"),
        ("Size", format_bytes(num_bytes), f"in {counted(len(manifest.shards), 'shard')}"),
        ("Rejected", f"{manifest.num_rejected:,}", f"{share:.2%} of the inputs"),
        ("Left aside", f"{sum(manifest.left_aside.values()):,}", "files that are no inputs"),
        ("Classes", f"{len(manifest.class_names):,}", f"{facts.num_unlabeled:,} samples have none")
        if manifest.class_names
        else ("Classes", "none", "no sample has a label"),
    ]
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="by">{escape(by)}</dd></div>'
        for name, value, by in tiles
    )
    return f'<p class="over">A set of shards</p>\n<h1>{escape(facts.where)}</h1>\n<dl class="tiles">{cells}</dl>'


def _sections(facts: SummaryFacts) -> Iterator[str]:
    manifest = facts.manifest
    if facts.samples:
        yield "<h2>Samples</h2><p>Evenly spread over the set.</p>" + _pictures(facts.samples)
    if facts.histograms:
        charts = [_chart(_title(each), dict(each.bins)) for each in facts.histograms]
        yield f'<h2>Sizes and shapes</h2><div class="charts">{"".join(charts)}</div>'
    charts = [
        _chart(title, tally)
        for title, tally in (
            ("What was done to the inputs", manifest.outcomes),
            (_kinds_title(manifest), manifest.jpegs),
            (f"Left aside, listed in {ASIDE_NAME}", manifest.left_aside),
        )
        if tally
    ]
    if charts:
        yield f'<h2>Formats</h2><div class="charts">{"".join(charts)}</div>'
    if facts.classes:
        yield _labels(facts)
    if facts.rejected:
        yield (f"<h2>Rejected</h2><p>Each is a line of <code>{REJECTED_NAME}</code>; the first of each reason:</p>")
        yield from (
            f'<h3 class="below">{escape(group.reason)}: {group.count:,}</h3>{_pictures(group.examples)}'
            for group in facts.rejected
        )
    if facts.duplicates is not None:
        yield _near_duplicates(facts)


def _kinds_title(manifest: Manifest) -> str:
    share = manifest.engine_share
    return "Kinds of JPEG" if share is None else f"Kinds of JPEG ({share:.1%} are for a GPU's JPEG engines)"


def _title(histogram: Histogram) -> str:
    return f"{histogram.title[0].upper()}{histogram.title[1:]} (median {histogram.median:,.4g})"


def _labels(facts: SummaryFacts) -> str:
    num_classes = len(facts.manifest.class_names)
    note = f"{counted(num_classes, 'class', plural='classes')}; {counted(facts.num_unlabeled, 'sample')} without one."
    if len(facts.classes) < num_classes:
        half = len(facts.classes) // 2
        note += f" The {half} largest and the {half} smallest:"
    bars = {f"{each.rank}. {each.name}": each.num_samples for each in facts.classes}
    return f"<h2>Labels</h2><p>{escape(note)}</p>{_chart('Samples of a class', bars)}"


def _near_duplicates(facts: SummaryFacts) -> str:
    groups = facts.duplicates or ()
    if not groups:
        return "<h2>Near-duplicates</h2><p>None were found.</p>"
    note = (
        f"{counted(facts.num_in_groups, 'image')} in {counted(facts.num_duplicate_groups, 'group')} look almost the "
        "same at 9 x 8 pixels. Look before you remove any."
    )
    shown = "".join(f'<h3 class="below">{group.count:,} images</h3>{_pictures(group.pictures)}' for group in groups)
    return f"<h2>Near-duplicates</h2><p>{note}</p>{shown}"


def _chart(title: str, counts: Mapping[str, int]) -> str:
    most = max(counts.values(), default=0)
    bars = "".join(
        f'<dt>{escape(name)}</dt><dd><i style="width: {100 * count / max(1, most):.1f}%"></i></dd><dd>{count:,}</dd>'
        for name, count in counts.items()
    )
    return f'<figure><h3>{escape(title)}</h3><dl class="bars">{bars}</dl></figure>'


def _pictures(pictures: Sequence[CaptionedPicture]) -> str:
    def cell(picture: CaptionedPicture) -> str:
        inner = (
            '<span class="none">no picture</span>'
            if picture.url is None
            else f'<img src="{escape(picture.url)}" alt="{escape(picture.title)}">'
        )
        title, below = escape(picture.title), prose(picture.below)
        return f'<div><div class="frame">{inner}</div><b title="{title}">{title}</b>{below}</div>'

    return f'<div class="found">{"".join(map(cell, pictures))}</div>'
