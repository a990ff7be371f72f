"""Figures that documents and help state, compared with the results that they come from.

    python benchmarks/stated.py            # what does not agree
    python benchmarks/stated.py --write    # puts the results' figures into the documents; read the sentences then

`stated.toml` lists sentences with a hole for each figure, `{name}`, and the lines of a page of results/ that have the
same: with holes of the same names, `{name*1000}` where units differ, and `{}` for what does not matter. A figure
agrees if it is the result's, rounded to the digits that it has. Figures that do not come from results/ have a `source`
in place of a page. Where a document names a benchmark or its results, or states a speed, every figure with a unit is to
be listed.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("stated.toml")
RESULTS = Path("benchmarks/results")
PERFORMANCE = Path("docs/performance.md")
MISSED_BEGIN, MISSED_END = "<!-- made of benchmarks/results: begin -->", "<!-- made of benchmarks/results: end -->"

_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_HOLE = re.compile(r"\{(\w*)(?:\*([\d.]+))?\}")
_MADE = re.compile(r"<!-- made (?:by|of) .*?: begin -->.*?<!-- made .*?: end -->", re.DOTALL)
_UNITS = r"samples/s|images/s|MB/s|GB/s|ms\b|times\b|points\b|levels\b|[kMG]i?B\b|%|s\b|minutes?\b|hours?\b|of \d+ ms"
_FIGURE = re.compile(rf"(?<![\w.,-])[+-]?{_NUMBER}(?= ?(?:{_UNITS}))")
_NAMES_RESULTS = re.compile(r"benchmarks/(?:results/)?\w+\.(?:md|py)")
_STATES_SPEED = re.compile(
    rf"{_NUMBER} (?:samples/s|images/s|times (?:as fast|as long|faster|the rate|the images/s|PIL))"
)


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A sentence of a document, with the place that its figures come from."""

    document: str
    says: str
    page: str = ""
    """Name of a page in results/."""
    rows: tuple[str, ...] = ()
    """Lines of that page, or the beginnings of lines, in which every hole of `says` is."""
    source: str = ""
    """Where the figures come from, if not from results/."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One figure in a document: what stands there, and what the results have."""

    statement: Statement
    name: str
    start: int
    """Position of the figure in the document."""
    word: str
    found: str
    """As the result has it, times `factor`."""
    factor: float = 1.0

    @property
    def agrees(self) -> bool:
        """Whether the figure is the result's, rounded to the digits that it has."""
        allowed = 1.001 * _half_unit(self.word)
        exactness = _half_unit(self.found, rounds=False) * self.factor
        # A result that was rounded itself may lie on either side of where the document's next digit begins.
        slack = exactness if exactness < allowed / 2 else 0.0
        return exactness <= allowed and abs(_value(self.word) - _value(self.found) * self.factor) <= allowed + slack

    @property
    def wanted(self) -> str:
        """The result with as many digits as the document has."""
        unit = 2 * _half_unit(self.word)
        value = round(_value(self.found) * self.factor / unit) * unit
        decimals = len(self.word.partition(".")[2])
        return f"{value:{'+' if self.word[0] in '+-' else ''},.{decimals}f}"


def read_statements(file: Path = LIST) -> list[Statement]:
    """Return what the list has. Raises TypeError: an entry has a word that means nothing."""
    return [
        Statement(**each | {"document": document, "rows": tuple(each.get("rows", ()))})
        for document, entries in tomllib.loads(file.read_text()).items()
        for each in entries
    ]


def compare(statement: Statement, text: str, pages: Mapping[str, str]) -> tuple[list[Spot], list[str]]:
    """Return the figures of a statement, and what keeps it from being compared, a line each."""
    where = f"{statement.document}: {statement.says!r}"
    said = list(pattern(statement.says).finditer(text))
    if len(said) != 1:
        return [], [f"{where} is there {len(said)} times: write it so in benchmarks/stated.toml that it is there once"]
    if statement.page not in pages:
        return [], [] if statement.source else [f"{where}: there is no benchmarks/results/{statement.page}.md"]
    found: dict[str, tuple[str, float]] = {}
    troubles = []
    for row in statement.rows:
        hits = {match.groups() for match in pattern(row).finditer(pages[statement.page])}
        if len(hits) != 1:
            troubles.append(f"{where}: {row!r} is there {len(hits)} times in benchmarks/results/{statement.page}.md")
            continue
        holes = [(name, float(factor or 1)) for name, factor in _HOLE.findall(row) if name]
        found |= {name: (word, factor) for (name, factor), word in zip(holes, hits.pop(), strict=True)}
    names = said[0].groupdict()
    if not troubles and names.keys() != found.keys():
        troubles.append(f"{where}: holes {sorted(names.keys() ^ found.keys())} are on one side only")
    spots = []
    for name in names.keys() & found.keys():
        result, factor = found[name]
        start = said[0].start(name)
        spots.append(Spot(statement=statement, name=name, start=start, word=names[name], found=result, factor=factor))
    return spots, troubles


def pattern(text: str) -> re.Pattern[str]:
    """Turn a text with holes into an expression: lines may break anywhere, and a row of a table begins a line."""
    pieces = [r"(?m:^)" if text.startswith("| ") else ""]
    place = 0
    for hole in _HOLE.finditer(text):
        pieces.append(_literal(text[place : hole.start()]))
        pieces.append(rf"(?P<{hole[1]}>(?<![\d.])[+-]?{_NUMBER}(?![,.]?\d))" if hole[1] else r"[^\n]*?")
        place = hole.end()
    return re.compile("".join([*pieces, _literal(text[place:])]))


def problems(root: Path, statements: list[Statement]) -> list[str]:
    """Return what does not agree, what is not found, and figures that are not listed: a line each."""
    pages = read_pages(root)
    lines = []
    for document, text in documents(root, statements).items():
        of_document = [each for each in statements if each.document == document]
        for each in of_document:
            spots, troubles = compare(each, text, pages)
            lines += troubles
            lines += [
                f"{document}: {spot.word} in {each.says!r} should be {spot.wanted}, by results/{each.page}.md"
                for spot in spots
                if not spot.agrees
            ]
        if document.endswith(".md"):
            lines += [
                f"{document}: {figure} is not in benchmarks/stated.toml" for figure in unlisted(text, of_document)
            ]
    return lines


def documents(root: Path, statements: list[Statement]) -> dict[str, str]:
    """Return the text of all documents, and of each file that a statement is in."""
    names = ["README.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted((root / "docs").glob("*.md")))]
    names += [each.document for each in statements]
    return {name: (root / name).read_text() for name in dict.fromkeys(names)}


def read_pages(root: Path) -> dict[str, str]:
    """Return the pages of results by name."""
    return {path.stem: path.read_text() for path in sorted((root / RESULTS).glob("*.md"))}


def unlisted(text: str, statements: list[Statement]) -> Iterator[str]:
    """Yield each figure, with its surroundings, of a paragraph about speed or results that no statement has."""
    listed = [match.span() for each in statements for match in pattern(each.says).finditer(text)]
    listed += [match.span() for match in _MADE.finditer(text)]
    for start, end in _paragraphs(text):
        if not (_NAMES_RESULTS.search(text, start, end) or _STATES_SPEED.search(text, start, end)):
            continue
        for figure in _FIGURE.finditer(text, start, end):
            if not any(begin <= figure.start() < stop for begin, stop in listed):
                shown = text[max(0, figure.start() - 30) : figure.end() + 20]
                yield f"{figure[0]} (... {' '.join(shown.split())} ...)"


def write(root: Path, statements: list[Statement]) -> list[str]:
    """Put the results' figures into the documents; return what was changed, a line each."""
    pages = read_pages(root)
    changes = []
    for document, text in documents(root, statements).items():
        spots = [spot for each in statements if each.document == document for spot in compare(each, text, pages)[0]]
        wrong = sorted((spot for spot in spots if not spot.agrees), key=lambda spot: spot.start, reverse=True)
        for spot in wrong:
            text = f"{text[: spot.start]}{spot.wanted}{text[spot.start + len(spot.word) :]}"
            changes.append(f"{document}: {spot.word} is {spot.wanted} now in {spot.statement.says!r}")
        if wrong:
            (root / document).write_text(text)
    before = (root / PERFORMANCE).read_text()
    if (after := with_missed(before, pages)) != before:
        (root / PERFORMANCE).write_text(after)
        changes.append(f"{PERFORMANCE}: the goals that are missed")
    return changes


def with_missed(text: str, pages: Mapping[str, str]) -> str:
    """Return the document with the goals that are missed between its marks."""
    before, mark, rest = text.partition(MISSED_BEGIN)
    _, mark_of_end, after = rest.partition(MISSED_END)
    assert mark, f"{PERFORMANCE} lacks {MISSED_BEGIN}"
    assert mark_of_end, f"{PERFORMANCE} lacks {MISSED_END}"
    return f"{before}{mark}\n{missed_table(pages)}\n{mark_of_end}{after}"


def missed_table(pages: Mapping[str, str]) -> str:
    """Markdown: a line for each claim of the pages whose goal is missed, the farthest from its goal first."""
    row = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \| \*\*(.+?)\*\*(.*?) \| (\S+): MISSED \|$", re.MULTILINE)
    missed = [(name, *match.groups()) for name, page in pages.items() for match in row.finditer(page)]
    missed.sort(key=lambda each: _value(each[4]) / _value(each[6]))
    lines = ["| | ours | instead | times better | goal | short of it by |", "|---|---|---|---|---|---|"]
    for name, claim, ours, theirs, ratio, spread, goal in missed:
        short = f"{100 * (1 - _value(ratio) / _value(goal)):.0f}%"
        shown = f"[{claim}](../{RESULTS}/{name}.md)"
        lines.append(f"| {shown} | {ours} | {theirs} | **{ratio}**{spread} | {goal} | {short} |")
    return "\n".join(lines)


def _literal(text: str) -> str:
    return re.sub(r"(?:\\?\s)+", lambda _: r"\s+", re.escape(text))


def _value(word: str) -> float:
    return float(word.replace(",", ""))


def _half_unit(word: str, *, rounds: bool = True) -> float:
    """Half of what the last digit counts; with `rounds`, zeros that end a whole number are none, beyond two digits."""
    whole, point, decimals = word.lstrip("+-").replace(",", "").partition(".")
    if point:
        return 0.5 * 10 ** -len(decimals)
    zeros = len(whole) - len(whole.rstrip("0"))
    return 0.5 * 10 ** (min(zeros, max(0, len(whole) - 2)) if rounds else 0)


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each paragraph or item of a list is; a table belongs to the one before it."""
    spans: list[tuple[int, int]] = []
    for match in re.finditer(r"[^\n]+(?:\n(?!- )[^\n]+)*\n?", text):
        if match[0].startswith("|") and spans:
            spans[-1] = (spans[-1][0], match.end())
        else:
            spans.append(match.span())
    yield from spans


def main() -> int:
    """Compare or write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the results' figures into the documents")
    options = parser.parse_args()
    statements = read_statements()
    if options.write:
        print("\n".join(write(ROOT, statements)) or "nothing to change")
    found = problems(ROOT, statements)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
