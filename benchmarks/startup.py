"""Start-up: seconds from the command to the first step of `make demo`'s recipe, and where they go.

    python benchmarks/startup.py [--rounds 3] [--json FILE]
    python benchmarks/startup.py --compile      # also with --run.compile, from an empty cache and from what it kept

A start is `accelerate launch` on the CPU with the demo's images, evaluated before the first step as in the demo, in
fresh processes with their files in page cache. Beside it, by turns, stands what any program pays that uses the same
libraries: `accelerate launch` of a script that imports torch, torchvision and timm and does nothing.

A run says itself where the seconds go; here its lines are read, and the whole is timed from outside.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from alternating import Claim, claims_table, compare, header, write_claims

# Seconds from the command to the end of the first step.
GOAL_S = 10.0
ROOT = Path(__file__).resolve().parent.parent
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "deploy/accelerate/cpu-1.yaml")
IMPORTS = "import torch, torchvision, timm\n"


def make_shards(folder: Path) -> Path:
    """Cut the demo's images and pack them."""
    shards = folder / "shards"
    pack = [sys.executable, "-c", "import sys; from shards.cli import main; sys.exit(main())", "pack"]
    for words in (
        [sys.executable, "-m", "moco_fast.demo", str(folder / "images")],
        [*pack, str(folder / "images" / "train"), "--labels", "none", "--out", str(shards)],
    ):
        subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return shards


def first_step(shards: Path, out: Path, *options: str, cache: Path) -> tuple[float, dict[str, float]]:
    """Start a run; return the seconds until it says that the first step is done, and what it says they went to."""
    words = [*LAUNCH, "-m", "moco_fast.train", "demo", "--data.shards", str(shards), "--eval.tasks", "health"]
    words += ["--run.out", str(out), "--run.steps", "1", *options]
    began = time.perf_counter()
    with subprocess.Popen(words, cwd=ROOT, env=environment(cache), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("start-up: first step"):
                took = time.perf_counter() - began
                process.stderr.read()
                return took, parts_of(line)
    raise RuntimeError(f"the run ended with {process.returncode} before its first step")


def parts_of(line: str) -> dict[str, float]:
    """Return the seconds of each part of a line that a run says about its start."""
    parts = line[line.index("(") + 1 : line.rindex(")")]
    return {what: float(spent) for what, _, spent in (part.rpartition(" ") for part in parts.split(", "))}


def imports(script: Path, cache: Path) -> float:
    """Return the seconds of a launched script that only imports."""
    script.write_text(IMPORTS)
    began = time.perf_counter()
    subprocess.run([*LAUNCH, str(script)], check=True, cwd=ROOT, env=environment(cache))
    return time.perf_counter() - began


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a start, with compiled code kept in `cache`."""
    num_cpus = str(len(os.sched_getaffinity(0)))
    caches = {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "compiled")}
    return {"OMP_NUM_THREADS": num_cpus} | os.environ | caches


def table(starts: Sequence[tuple[float, dict[str, float]]]) -> str:
    """Markdown: the parts of all starts."""
    lines = ["| seconds | median | lowest | highest |", "|---|---|---|---|"]
    found = {"**command to first step**": [took for took, _ in starts]}
    found |= {what: [parts[what] for _, parts in starts] for what in starts[0][1]}
    lines += [f"| {what} | {median(of):.1f} | {min(of):.1f} | {max(of):.1f} |" for what, of in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also with --run.compile; minutes")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, cache = make_shards(folder), folder / "cache"
        starts: list[tuple[float, dict[str, float]]] = []
        others: list[float] = []
        for number in range(asked.rounds):
            starts.append(first_step(shards, folder / f"run-{number}", cache=cache))
            others.append(imports(folder / "imports.py", cache))
            print(f"{starts[-1][0]:.1f} s to the first step; {others[-1]:.1f} s for the imports alone", flush=True)
        compiled: list[float] = []
        for number in range(2 if asked.compile else 0):
            took, _ = first_step(shards, folder / f"compiled-{number}", "--run.compile", cache=cache)
            compiled.append(took)
            print(f"{took:.1f} s with --run.compile, {'kept code' if number else 'from an empty cache'}", flush=True)
    print(f"\n{header()}; {asked.rounds} rounds\n\n{table(starts)}\n")
    took = [each for each, _ in starts]
    goal = [GOAL_S] * len(took)
    claims: list[Claim] = [
        compare("command to first step, demo / 10 s", took, goal, unit="s", less_is_better=True, goal=1.0),
        compare("command to first step, demo / the imports alone", took, others, unit="s", less_is_better=True),
    ]
    if compiled:
        what = "command to first step, compiled: from what was kept / from an empty cache"
        claims.append(compare(what, compiled[1:], compiled[:1], unit="s", less_is_better=True))
    print(claims_table(claims))
    write_claims(asked.json, claims)


if __name__ == "__main__":
    main()
