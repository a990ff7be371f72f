"""The suite on CIFAR-10, or any labeled set: trained, untrained, raw pixels; fast beside full linear and scikit-learn.

    python benchmarks/cifar10.py ...                  # packs CIFAR-10 and trains, or train as README.md says
    python benchmarks/suite.py --encoder RUN --data SHARDS --out build/suite
    python benchmarks/suite.py --encoder RUN --data SHARDS --out build/suite --full
    python benchmarks/suite.py --encoder RUN --data SHARDS --out build/suite --full --lr 0.1 1 10 --crop-scale 1 1

SHARDS holds the sets train and val (or test). The first takes minutes on two cores; `--full` adds the authors' linear
protocol (100 epochs of augmented images) with the options that follow it, and scikit-learn's logistic regression on the
same features. Writes suite.json and suite.md: the table, what each task took, and with `--full` how far fast, full and
scikit-learn are apart. A command that was killed goes on where it was.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from alternating import header

from moco_fast.evaluation.kept import partial_of
from moco_fast.evaluation.result import Result, read_results, table


def run_eval(*words: str) -> float:
    """Run `moco-fast eval words`; return the seconds that it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "moco_fast.cli", "eval", *words], check=True)
    return time.perf_counter() - started


def scikit_learns(cache: Path, result: Result, c: float) -> float:
    """Fit scikit-learn's logistic regression to the cached backbone features, and return its accuracy."""
    import numpy as np
    from safetensors import safe_open
    from sklearn.linear_model import LogisticRegression

    sets = {}
    for split, data in result.data.items():
        folder = f"{result.encoder['digest'][:16]}-{data['digest'][:16]}"
        [path] = [
            each
            for each in (cache / folder).glob("backbone-*.safetensors")
            if len(safe_open(each, "np").get_tensor("index")) == data["num_samples"]
        ]
        with safe_open(path, "np") as file:
            sets[split] = np.array(file.get_tensor("values")), np.array(file.get_tensor("labels"))
    return float(LogisticRegression(C=c, max_iter=1000).fit(*sets["train"]).score(*sets["test"]))


def as_markdown(results: Sequence[Result], seconds: float, apart: dict[str, float], *, resumed: bool) -> str:
    """Write the table, and what it took."""
    heading, *rows = table(results)
    lines = [heading, ["---"] * len(heading), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    took = ", ".join(f"{each.task} {each.time_s:.0f} s" for each in results if each.encoder == results[0].encoder)
    last = "its last start" if resumed else "all of it"
    text = f"{header()}\n\n{text}\n\nThe suite took {seconds:.0f} s ({last}); of the first encoder: {took}.\n"
    if apart:
        text += (
            "\nLinear, by protocol: " + ", ".join(f"{name} {100 * share:.2f}%" for name, share in apart.items()) + ".\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("build/suite"))
    parser.add_argument("--beside", nargs="*", default=["untrained", "pixels"])
    parser.add_argument("--full", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cache, suite, full = (options.out / name for name in ("cache", "suite.json", "linear-v1.json"))
    common = ["--encoder", options.encoder, "--cache", str(cache)]
    beside = ["--beside", *options.beside] if options.beside else []
    resumed = partial_of(suite).exists()
    seconds = run_eval("suite", *common, "--data", options.data, *beside, "--out", str(suite))
    results = read_results(suite)
    first = {each.task: each for each in reversed(results) if each.encoder == results[0].encoder}
    apart: dict[str, float] = {}
    if options.full is not None:
        sets = [f"--{split}={first['linear'].data[split]['where']}" for split in ("train", "test")]
        run_eval("linear", *common, *sets, "--protocol", "v1", *options.full, "--out", str(full))
        [of_full] = read_results(full)
        apart = {
            "fast": first["linear"].headline.value,
            "v1": of_full.headline.value,
            "logistic": first["logistic"].headline.value,
            "scikit-learn, same C": scikit_learns(cache, first["linear"], first["logistic"].chosen[0]["c"]),
        }
    text = as_markdown(results, seconds, apart, resumed=resumed)
    (options.out / "suite.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
