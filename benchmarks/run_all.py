"""The benchmarks that a CPU can run: those of a quarter of an hour for `make bench`, all others for `make bench-all`.

    python benchmarks/run_all.py [--photos FILE.tar] [--more] [--only NAME ...] [--python PEER=PATH ...]

Writes results/NAME.md (and .svg) for each, its claims into results/claims.json, and from those the table in the README.
What a page says below the line `<!-- by hand -->` is kept.
With the project's own README, figures in other documents become the results' as well (stated.py), and are listed.
A benchmark that fails or takes too long leaves its log in build/bench, and its claims as they were.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import stated
from alternating import Claim, claims_table, header

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- made by `make bench`: begin -->", "<!-- made by `make bench`: end -->"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A script of this folder, with what it is told here."""

    name: str
    words: str
    limit_s: float
    """Ends it; the limits add up to a quarter of an hour."""
    script: str = ""
    """Its file, if it is not called like the benchmark."""
    plot: bool = False
    """Whether it draws one."""
    runs: bool = False
    """Whether it keeps every run beside its page."""
    claims: bool = True
    """Whether it writes claims; else its page gets a line on the machine."""
    needs: tuple[str, ...] = ()
    """Modules of peers without which there is nothing to compare with."""
    interpreters: bool = False
    """Whether it takes interpreters of peers that need an environment of their own."""


BENCHMARKS = (
    Benchmark(name="order", words="", limit_s=30),
    Benchmark(name="pack", words="--photos {photos} --rounds 3", limit_s=110),
    Benchmark(name="reading", words="--shards {shards} --seconds 2 --rounds 3", limit_s=45),
    Benchmark(name="host", words="--shards {shards} --seconds 1 --rounds 3", limit_s=30),
    Benchmark(
        name="loader",
        words="--shards {shards} --seconds 2 --rounds 3 --only torch dali ffcv linear pil tv2 dali-stock",
        limit_s=185,
        plot=True,
    ),
    Benchmark(name="color", words="--shards {shards} --num 10", limit_s=30),
    Benchmark(name="step", words="--encoder resnet18 --batch 64 --rounds 4", limit_s=135, plot=True),
    Benchmark(name="momentum", words="--encoder resnet50 --rounds 20", limit_s=25, plot=True),
    Benchmark(name="exchange", script="step", words="--shuffle --batch 32", limit_s=30, plot=True),
    Benchmark(name="watching", words="--encoder resnet18 --size 64 --batch 32", limit_s=45),
    Benchmark(name="checkpoints", words="--encoder resnet50 --batch 8 --steps 6", limit_s=100),
    Benchmark(name="end_to_end", words="--shards {shards} --seconds 30", limit_s=135, plot=True),
)

MORE = (
    Benchmark(name="packers", words="--photos {photos}", limit_s=900, interpreters=True),
    Benchmark(name="elasticity", words="", limit_s=900, interpreters=True),
    Benchmark(name="view_parts", words="--shards {shards} --num 200 --rounds 4 --seconds 4", limit_s=155),
    Benchmark(name="fetching", words="", limit_s=240),
    Benchmark(name="stored_size", words="--photos {photos}", limit_s=300),
    Benchmark(name="decoded", words="--photos {photos}", limit_s=300),
    Benchmark(name="startup", words="", limit_s=400),
    Benchmark(name="embed", words="--shards {shards} --times 4", limit_s=300),
    Benchmark(name="neighbors", words="", limit_s=300),
    Benchmark(
        name="measures",
        words="--cityscapes 3 --lvis 120",
        limit_s=600,
        needs=("cityscapesscripts", "lvis", "pycocotools"),
    ),
    Benchmark(name="transfer_loader", words="--num 120 --seconds 4", limit_s=300),
    Benchmark(name="scale", words="--sizes 1e5 1e6 1e7", limit_s=400, claims=False),
    Benchmark(name="scale_manifest", words="", limit_s=300, claims=False),
)
"""What takes longer, for `make bench-all`."""

# Needs what `make bench-loaders` installs, and time of its own; run only if it is named.
PEERS = Benchmark(
    name="peers",
    script="loader",
    words="--shards {shards} --seconds 1.5 --rounds 3 --peers",
    limit_s=900,
    plot=True,
    runs=True,
)

ELSEWHERE = {
    "2026-11-26-H200": ("gpu_check",),
    "cifar10": ("cifar10",),
    "cifar10-lightly": ("cifar10",),
    "demo-seeds": ("demo_seeds",),
    "facts": ("cifar10", "facts"),
    "free_threading": ("free_threading",),
    "soak": ("soak",),
    "stored_accuracy": ("stored_accuracy",),
    "transfer": ("transfer_table", "transfer_compile"),
    "views": ("views",),
}
"""Pages of what runs for hours, with other data or interpreters, or in parts: the scripts whose commands they have."""

BY_HAND = "<!-- by hand -->"


def written_by_hand(page: Path) -> str:
    """What of a page is not made by its benchmark."""
    _, mark, kept = page.read_text().partition(BY_HAND) if page.is_file() else ("", "", "")
    return f"\n{mark}{kept}" if mark else ""


def run(
    benchmark: Benchmark, places: dict[str, str], results: Path, build: Path, interpreters: Sequence[str] = ()
) -> list[Claim] | None:
    """Run one; write its page and return its claims, or None if it failed."""
    claims = build / f"{benchmark.name}.json"
    claims.unlink(missing_ok=True)
    script = f"benchmarks/{benchmark.script or benchmark.name}.py"
    words = [script, *benchmark.words.split()]
    if benchmark.plot:
        words += ["--plot", str(results / f"{benchmark.name}.svg")]
    if benchmark.runs:
        words += ["--runs", str(results / f"{benchmark.name}.json")]
    if benchmark.claims:
        words += ["--json", str(claims)]
    filled = [word.format_map(places) for word in words]
    if benchmark.interpreters and interpreters:
        filled += ["--python", *interpreters]
    log = build / f"{benchmark.name}.log"
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                [sys.executable, *filled],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=benchmark.limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            errors.write(f"\nended after {benchmark.limit_s:g} s\n")
            return None
        if done.returncode or benchmark.claims != claims.is_file():
            errors.write(f"{done.stdout}\nended with {done.returncode}\n")
            return None
    title = benchmark.name.replace("_", " ").capitalize()
    command = f"python {script} {benchmark.words.format(photos='PHOTOS.tar', shards='SHARDS')}".strip()
    picture = f"\n![{title}]({benchmark.name}.svg)\n" if benchmark.plot else ""
    machine = "" if benchmark.claims else f"{header()}\n\n"
    page = f"# {title}\n\n    {command}\n\n{machine}{done.stdout.strip()}\n{picture}"
    file = results / f"{benchmark.name}.md"
    page += written_by_hand(file)
    file.write_text("\n".join(line.rstrip() for line in page.splitlines()) + "\n")
    return read_claims_of(claims) if benchmark.claims else []


def write_readme(readme: Path, claims: dict[str, list[Claim]]) -> None:
    """Put the table of what is promised between the marks of the README."""
    before, mark, rest = readme.read_text().partition(BEGIN)
    assert mark, f"{readme} lacks {BEGIN}"
    _, mark, after = rest.partition(END)
    assert mark, f"{readme} lacks {END}"
    readme.write_text(f"{before}{BEGIN}\n{readme_table(claims)}\n{END}{after}")


def readme_table(claims: dict[str, list[Claim]]) -> str:
    """Markdown: the claims that have a goal."""
    return claims_table([each for of_one in claims.values() for each in of_one if each.goal is not None])


def read_claims_of(path: Path) -> list[Claim]:
    """Claims of one benchmark."""
    return [Claim(**each) for each in json.loads(path.read_text())]


def read_claims(path: Path) -> dict[str, list[Claim]]:
    """Claims by benchmark; none if there is no file."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {name: [Claim(**each) for each in of_one] for name, of_one in found.items()}


def places_of(photos: Path | None, build: Path) -> dict[str, str]:
    """What benchmarks read: a tar of photographs, and the same packed."""
    from photographs import photograph_shards

    shards = photograph_shards(build, num=600, photos=photos.resolve() if photos else None)
    if photos is None:
        photos = build / "photographs.tar"
        if not photos.is_file():
            subprocess.run(["tar", "cf", photos, "-C", build, "photographs"], check=True)
    return {"photos": str(photos.resolve()), "shards": str(shards)}


def run_all(
    chosen: Sequence[Benchmark],
    places: dict[str, str],
    results: Path,
    build: Path,
    interpreters: Sequence[str] = (),
) -> bool:
    """Run them one after the other; return whether all went well and every goal was reached."""
    file = results / "claims.json"
    well = True
    for benchmark in chosen:
        missing = [name for name in benchmark.needs if not find_spec(name)]
        if missing:
            print(f"{benchmark.name} is left out: it needs {', '.join(missing)} (benchmarks/requirements.txt)")
            continue
        started = time.monotonic()
        found = run(benchmark, places, results, build, interpreters)
        took = f"{time.monotonic() - started:.0f} s"
        if found is None:
            print(f"{benchmark.name}: FAILED after {took}, see {build / benchmark.name}.log", flush=True)
            well = False
            continue
        missed = [each.claim for each in found if each.holds is False]
        well = well and not missed
        print(f"{benchmark.name}: {took}{''.join(f'; MISSED: {claim}' for claim in missed)}", flush=True)
        if found:
            write_all_claims(file, read_claims(file) | {benchmark.name: found})
    return well


def write_all_claims(file: Path, claims: dict[str, list[Claim]]) -> None:
    """Write claims by benchmark, in the order in which they run."""
    order = [each.name for each in (*BENCHMARKS, *MORE, PEERS)]
    names = sorted(claims, key=lambda name: (order.index(name) if name in order else len(order), name))
    file.write_text(json.dumps({name: [vars(each) for each in claims[name]] for name in names}, indent=1) + "\n")


def main() -> int:
    """Run, write, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="tar of photographs instead of scikit-image's")
    every = (*BENCHMARKS, *MORE, PEERS)
    parser.add_argument("--more", action="store_true", help="also what takes longer: an hour and a half at most")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in every], help="these")
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=PATH", help="interpreters of peers")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "bench", help="for what is no result")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="where the table goes")
    options = parser.parse_args()
    build, results = options.build.resolve(), options.results.resolve()
    for folder in (build, results):
        folder.mkdir(parents=True, exist_ok=True)
    usual = (*BENCHMARKS, *MORE) if options.more else BENCHMARKS
    chosen = [each for each in every if each.name in options.only] if options.only else usual
    takes_photos = any("{" in each.words for each in chosen)
    places = places_of(options.photos, build) if takes_photos else {}
    well = run_all(chosen, places, results, build, options.python)
    write_readme(options.readme, read_claims(results / "claims.json"))
    print(f"written to {results} and {options.readme}")
    if (options.readme.resolve(), results) == (ROOT / "README.md", ROOT / stated.RESULTS):
        changes = stated.write(ROOT, stated.read_statements())
        print("\n".join([*changes, *(["read these sentences again: is what they say still so?"] if changes else [])]))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
