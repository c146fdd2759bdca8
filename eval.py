"""Evaluate a dual encoder, DCLIP's or any CLIP of transformers, on retrieval and zero-shot classification.

    python eval.py --model runs/demo/student --anchor runs/demo/anchor --benchmark retrieval=scenes:test zero_shot=scenes

Benchmarks: `retrieval=SPEC` (a caption source, e.g. karpathy:dataset_coco.json:images:test, scenes:test, parquet:GLOB) and
`zero_shot=SPEC` (scenes or parquet:GLOB with the columns image and label). Numbers are for the PIL image processor, in float32.
"""

import argparse
import inspect
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, AutoProcessor, set_seed

import modeling_dclip  # noqa: F401  registers the Auto classes
from modeling_dclip.data.captions import SOURCES as CAPTION_SOURCES
from modeling_dclip.data.captions import load_captions
from modeling_dclip.data.specs import Source, parse_spec
from modeling_dclip.evaluation.provenance import dataset_fingerprint, model_revision
from modeling_dclip.evaluation.results import make_record, render_table, write_results
from modeling_dclip.evaluation.retrieval import evaluate_retrieval
from modeling_dclip.evaluation.tradeoff import compare_to_anchor
from modeling_dclip.evaluation.zero_shot import SOURCES as LABELLED_SOURCES
from modeling_dclip.evaluation.zero_shot import evaluate_zero_shot, load_classification

DEFAULT_SPECS = {"retrieval": "scenes:test", "zero_shot": "scenes:test"}


class Benchmark(NamedTuple):
    """A loaded benchmark: `evaluate(model, processor)` gives its metrics."""

    name: str
    split: str | None
    fingerprint: str
    evaluate: Any


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="the model to evaluate, with its processor")
    add("--benchmark", required=True, nargs="+", metavar="NAME[=SPEC]", help="see above")
    add(
        "--anchor",
        metavar="DIR_OR_HUB_ID",
        help="also evaluate this model; adds relative gain and retention, with intervals",
    )
    add("--output", default="results.json", help="results file (default: %(default)s)")
    add("--label", help="name to show in tables instead of the model's path")
    add("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--num_workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--seed", type=int, default=0, help="of the draw of @COUNT and of the bootstrap (default: %(default)s)")
    add("--class_names", metavar="FILE", help="zero_shot: class names, one a line, in the order of the labels")
    add("--templates", metavar="FILE", help="zero_shot: prompt templates, one a line, each with {}")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    arguments = parser.parse_args(argv)
    for benchmark in arguments.benchmark:
        name = benchmark.partition("=")[0]
        if name not in DEFAULT_SPECS:
            known = ", ".join(f"{known}[=SPEC]" for known in DEFAULT_SPECS)
            parser.error(f"unknown benchmark {name!r}; known benchmarks: {known}")
    if (arguments.class_names or arguments.templates) and not any(
        b.startswith("zero_shot") for b in arguments.benchmark
    ):
        parser.error("--class_names and --templates belong to the benchmark zero_shot, which is not asked for")
    return arguments


def split_of(spec: str, sources: Mapping[str, Source]) -> str | None:
    """Give the split a spec names, or the default; `None` where the source has no splits."""
    source, fields, *_ = parse_spec(spec, sources, counted=True)
    bound = inspect.signature(source.build).bind(*fields)
    bound.apply_defaults()
    return bound.arguments.get("split")


def read_lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def load_benchmark(benchmark: str, arguments: argparse.Namespace) -> Benchmark:
    kind, _, spec = benchmark.partition("=")
    spec = spec or DEFAULT_SPECS[kind]
    options = {key: getattr(arguments, key) for key in ("batch_size", "device", "num_workers")}
    if kind == "retrieval":
        dataset, split = load_captions(spec, seed=arguments.seed), split_of(spec, CAPTION_SOURCES)
        evaluate = partial(evaluate_retrieval, dataset=dataset, **options)
    else:
        dataset, class_names, templates = load_classification(spec)
        split = split_of(spec, LABELLED_SOURCES)
        options["class_names"] = read_lines(arguments.class_names) if arguments.class_names else class_names
        options["templates"] = read_lines(arguments.templates) if arguments.templates else templates
        evaluate = partial(evaluate_zero_shot, dataset=dataset, **options)
    return Benchmark(f"{kind}={spec}", split, dataset_fingerprint(dataset), evaluate)


def evaluate_model(name: str, benchmarks: Sequence[Benchmark], trust: bool) -> tuple[list[dict[str, Any]], str]:
    """Give the result of every benchmark, and the model's revision."""
    model = AutoModel.from_pretrained(name, trust_remote_code=trust, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust, backend="pil")
    results = [benchmark.evaluate(model, processor) for benchmark in benchmarks]
    return results, model_revision(name, model)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    set_seed(arguments.seed)
    command = shlex.join(["eval.py", *(sys.argv[1:] if argv is None else argv)])
    benchmarks = [load_benchmark(benchmark, arguments) for benchmark in arguments.benchmark]
    names = [name for name in (arguments.anchor, arguments.model) if name is not None]
    evaluated = {name: evaluate_model(name, benchmarks, arguments.trust_remote_code) for name in names}
    records = []
    for name, (results, revision) in evaluated.items():
        for index, (benchmark, result) in enumerate(zip(benchmarks, results, strict=True)):
            comparison = None
            if arguments.anchor is not None and name == arguments.model:
                anchor_results, anchor_revision = evaluated[arguments.anchor]
                intervals = compare_to_anchor(result, anchor_results[index], seed=arguments.seed)
                comparison = {"anchor": arguments.anchor, "anchor_revision": anchor_revision, **intervals}
            records.append(
                make_record(
                    model=name,
                    label=arguments.label if name == arguments.model else None,
                    benchmark=benchmark.name,
                    metrics={key: value for key, value in result.items() if isinstance(value, float)},
                    n=result["n"],
                    n_captions=result.get("n_captions"),
                    seed=arguments.seed,
                    split=benchmark.split,
                    revision=revision,
                    dataset_fingerprint=benchmark.fingerprint,
                    command=command,
                    comparison=comparison,
                )
            )
    write_results(arguments.output, records)
    print(render_table(records))
    print(f"\nWritten to {arguments.output}")


if __name__ == "__main__":
    main()
