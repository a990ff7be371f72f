"""Neighbors of written embeddings: a search by the index of faiss beside the exact one, and those of all images.

    python benchmarks/neighbors.py [--vectors FILE.npy] [--num 20000 --dim 512] [--json FILE]

`search`: queries answered by the index (divided into lists even where the set is small) beside reading all vectors,
with the recall: the share of the 10 exact neighbors that it finds. `explore`: the 10 nearest and all near-duplicates of
every image, beside the 10 nearest alone by faiss's flat index, and by scikit-learn. Without `--vectors`, which are
those of `moco-fast embed`, vectors lie around random centers as those of encoders do.
"""

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from alternating import Claim, alternate, claims_table, compare, header, write_claims
from sklearn.neighbors import NearestNeighbors

from moco_fast.embedding import faiss_index
from moco_fast.embedding.faiss_index import FaissIndex, write_faiss
from moco_fast.embedding.index import Index, open_index
from moco_fast.embedding.neighbors import all_neighbors
from moco_fast.embedding.search import nearest

CPU = torch.device("cpu")
K = 10
CHUNK = 4096


def write_vectors(out: Path, num: int, dim: int) -> Path:
    """Write vectors of length 1 as `moco-fast embed` does, without what is known of the images."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(32, dim)).astype(np.float32)
    centers = rng.normal(size=(num // 50, 32)).astype(np.float32)
    values = np.lib.format.open_memmap(out, "w+", np.float32, (num, dim))
    for begin in range(0, num, CHUNK):
        count = min(CHUNK, num - begin)
        around = centers[rng.integers(0, len(centers), count)] + 0.5 * rng.normal(size=(count, 32))
        part = np.maximum(around.astype(np.float32) @ mixing, 0)
        values[begin : begin + count] = part / np.linalg.norm(part, axis=1, keepdims=True)
    values.flush()
    known = {"format": "moco-fast-embeddings", "num_rows": num, "dim": dim, "vectors": f"{num} x {dim}"}
    out.with_name(f"{out.name}.json").write_text(json.dumps(known | {"settings": {"dtype": "float32"}}))
    return out


def searching(index: Index, queries: torch.Tensor, rounds: int) -> list[Claim]:
    """By the index beside exactly, with the recall for several numbers of lists."""
    faiss_index._EXACT_BYTES = 0
    started = time.perf_counter()
    made = write_faiss(index)[0]
    what = f"{index.num_rows:,} x {index.header['dim']:,}"
    seconds = time.perf_counter() - started
    print(f"{made.path.name} of {what}: {made.path.stat().st_size / 2**20:.0f} MiB in {seconds:.1f} s\n")
    expected = nearest(index, queries, K, device=CPU)[1].tolist()
    print("| lists looked into | recall@10 | largest error of a similarity | ms per query |\n|---|---|---|---|")
    for share in (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8):
        _print_recall(made, index, queries, expected, max(1, round(share * made._made.num_lists)))
    times = alternate(
        {
            "index": lambda: made.nearest(queries, K),
            "exact": lambda: nearest(index, queries, K, device=CPU),
        },
        rounds=rounds,
        device=CPU,
    )
    claim = f"search of {len(queries)} queries in {what}: index of faiss / all vectors"
    return [compare(claim, times["index"], times["exact"], unit="s", less_is_better=True)]


def _print_recall(made: FaissIndex, index: Index, queries: torch.Tensor, expected: Any, num_probed: int) -> None:
    tried = FaissIndex(made.path, replace(made._made, num_probed=num_probed))
    tried.nearest(queries, K)
    started = time.perf_counter()
    similarities, rows = tried.nearest(queries, K)
    took = (time.perf_counter() - started) / len(queries)
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(rows.tolist(), expected, strict=True)])
    vectors = torch.from_numpy(index.vectors(np.unique(rows.numpy()))).float()
    places = np.searchsorted(np.unique(rows.numpy()), rows.numpy())
    exact = torch.einsum("qd,qkd->qk", queries, vectors[places])
    error = (similarities - exact).abs().max()
    print(f"| {num_probed} of {made._made.num_lists} | {recall:.3f} | {error:.4f} | {1e3 * took:.2f} |")


def exploring(index: Index, rounds: int) -> list[Claim]:
    """All neighbors beside what libraries take for those alone."""
    values = np.concatenate([chunk for _, chunk in index.chunks()])

    def by_faiss() -> None:
        flat = faiss.IndexFlatIP(index.header["dim"])
        flat.add(values)
        for begin in range(0, len(values), CHUNK):
            flat.search(values[begin : begin + CHUNK], K + 1)

    def by_sklearn() -> None:
        NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(values).kneighbors(values)

    times = alternate(
        {
            "explore": lambda: all_neighbors(index, k=K, threshold=0.95, device=CPU),
            "faiss": by_faiss,
            "scikit-learn": by_sklearn,
        },
        rounds=rounds,
        device=CPU,
        warmup=0,
    )
    what = f"neighbors and near-duplicates of {index.num_rows:,} x {index.header['dim']:,}"
    return [
        compare(f"{what} / neighbors alone, {peer}", times["explore"], times[name], unit="s", less_is_better=True)
        for name, peer in (("faiss", "faiss's flat index"), ("scikit-learn", "scikit-learn"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="that `moco-fast embed` wrote")
    parser.add_argument("--num", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("search", "explore", "time"), nargs="+", default=("search", "explore"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as place:
        path = options.vectors or write_vectors(Path(place) / "x.npy", options.num, options.dim)
        index = open_index(path)
        if "search" in options.only:
            rng = np.random.default_rng(1)
            rows = np.sort(rng.choice(index.num_rows, options.queries, replace=False))
            queries = torch.from_numpy(index.vectors(rows)).float()
            noise = torch.from_numpy(rng.normal(size=queries.shape).astype(np.float32))
            queries = queries + 0.02 * noise / index.header["dim"] ** 0.5
            claims += searching(index, torch.nn.functional.normalize(queries), options.rounds)
        if "explore" in options.only:
            claims += exploring(index, options.rounds)
        if "time" in options.only:
            started = time.perf_counter()
            all_neighbors(index, k=K, threshold=0.95, device=CPU)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{index.num_rows:,} x {index.header['dim']:,}: {time.perf_counter() - started:.1f} s, {peak:.2f} GiB"
            )
    print(f"\n{header()}; {options.rounds} rounds\n\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
