"""What a search index costs: building over random unit vectors, the time of a query, and what an inexact index misses.

    python benchmarks/index.py

Vectors are drawn; no model and no image is used. The time to embed images, which takes longest, is extrapolated from
the images a second that are given, and the report says so. There are two kinds of vectors. `uniform` on the sphere is
the worst case: there are no neighbourhoods that an index could use. `clustered`, a mixture around centres, is the best
case if the spread is small. Real encoders lie between the two, and texts lie apart from the images they ask for, so an
index over one's own images is tuned and measured on one's own queries. Every index gets the same vectors in the same
process; rounds of queries alternate between the indexes.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, set_seed

from modeling_dclip.data.failures import command
from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.benchmarks.retrieval_index import (
    build_faiss_index,
    effort_of,
    find_faiss,
    tune_faiss_index,
)
from modeling_dclip.evaluation.records import environment
from modeling_dclip.hub.index.build import FACTORIES


@dataclass
class BenchmarkArguments:
    """One run."""

    n: int = field(default=100_000, metadata={"help": "Vectors."})
    dim: int = field(default=512, metadata={"help": "Their width."})
    queries: int = field(default=200, metadata={"help": "Queries, asked one at a time."})
    rounds: int = field(default=3, metadata={"help": "Of all queries, alternating between the indexes."})
    top_k: int = field(default=10, metadata={"help": "Answers a query."})
    clusters: int = field(default=2000, metadata={"help": "Centres of the clustered vectors."})
    spread: float = field(
        default=1.0, metadata={"help": "Length of a vector's deviation from its centre, which has length 1."}
    )
    target_recall: float = field(default=0.95, metadata={"help": "The effort is doubled until so much is found."})
    images_per_second: float | None = field(
        default=None, metadata={"help": "Of the encoder, measured elsewhere: embedding time is extrapolated from it."}
    )
    threads: int = field(default=1, metadata={"help": "Of FAISS and torch."})
    indexes: list[str] = field(default_factory=lambda: ["exact", "ivf", "hnsw"], metadata={"help": "To compare."})
    kinds: list[str] = field(
        default_factory=lambda: ["uniform", "clustered"], metadata={"help": "Of vectors: uniform, clustered."}
    )
    output: str = field(default="benchmarks/results/index.json", metadata={"help": "Results file; replaced if there."})


def draw(kind: str, count: int, args: BenchmarkArguments, centres: torch.Tensor) -> torch.Tensor:
    """Draw unit vectors `(count, dim)`."""
    vectors = torch.randn(count, args.dim)
    if kind == "clustered":
        vectors = centres[torch.randint(len(centres), (count,))] + args.spread * vectors / args.dim**0.5
    return torch.nn.functional.normalize(vectors, dim=1)


def time_queries(index: Any, queries: torch.Tensor, top_k: int) -> list[float]:
    """Time each query alone, in milliseconds."""
    times = []
    for query in queries.numpy():
        start = time.perf_counter()
        index.search(query[None], top_k)
        times.append(1000 * (time.perf_counter() - start))
    return times


def measure(kind: str, args: BenchmarkArguments) -> dict[str, Any]:
    """Measure all indexes over vectors of one kind."""
    faiss = find_faiss("faiss")
    centres = torch.nn.functional.normalize(torch.randn(args.clusters, args.dim), dim=1)
    items, queries, tuning = (draw(kind, count, args, centres) for count in (args.n, args.queries, args.queries))
    built, results = {}, {}
    for name in args.indexes:
        start = time.perf_counter()
        built[name] = build_faiss_index(faiss, items, FACTORIES.get(name, name))
        results[name] = {"build_s": time.perf_counter() - start}
        knob = effort_of(faiss, built[name])
        found = tune_faiss_index(faiss, built[name], items, tuning, k=args.top_k, target=args.target_recall)
        results[name] |= {
            f"recall@{args.top_k}": found,
            "effort": None if knob is None else {knob[1]: getattr(knob[0], knob[1]), "most": knob[2]},
        }
        print(f"{kind}, {name}: {json.dumps(results[name])}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(args.rounds):
        for name, index in built.items():
            times[name] += time_queries(index, queries, args.top_k)
    exact = statistics.median(times["exact"]) if "exact" in times else None
    for name, own in times.items():
        deciles = statistics.quantiles(own, n=20)
        results[name] |= {"query_ms": {"median": statistics.median(own), "p95": deciles[-1], "n": len(own)}}
        if exact is not None:
            results[name]["speedup_over_exact"] = exact / statistics.median(own)
    return results


@command
def main(argv: list[str] | None = None) -> None:
    """Run, print, and write the results file."""
    (args,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)
    set_seed(0)
    torch.set_num_threads(args.threads)
    find_faiss("faiss").omp_set_num_threads(args.threads)
    record: dict[str, Any] = {"benchmark": "index", "arguments": asdict(args)}
    record["versions"], record["hardware"] = environment()
    record["versions"]["faiss"] = find_faiss("faiss").__version__
    if args.images_per_second:
        record["embedding_s_extrapolated"] = args.n / args.images_per_second
    record["results"] = {kind: measure(kind, args) for kind in args.kinds}
    for kind, results in record["results"].items():
        for name, result in results.items():
            print(
                f"{kind:9s} {name:6s} build {result['build_s']:8.2f} s, query {result['query_ms']['median']:8.3f} ms, "
                f"recall@{args.top_k} {result[f'recall@{args.top_k}']:.3f}, "
                f"{result.get('speedup_over_exact', 1):.1f}x exact"
            )
    write_json(Path(args.output), record)


if __name__ == "__main__":
    main()
