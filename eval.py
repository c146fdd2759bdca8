"""Evaluate a dual encoder, DCLIP's or any CLIP of transformers, on retrieval and zero-shot classification.

    python eval.py --model outputs/demo/leak_free/seed-0/student --anchor recipes/demo_anchor --benchmark retrieval=scenes:test zero_shot=scenes

Benchmarks: `retrieval=SPEC` (a caption source, e.g. karpathy:dataset_coco.json:images:test, scenes:test, parquet:GLOB) and
`zero_shot=SPEC` (scenes or parquet:GLOB with the columns image and label). Numbers are for the PIL image processor, in float32.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

import modeling_dclip  # noqa: F401  registers the Auto classes
from modeling_dclip.evaluation.benchmarks import DEFAULT_SPECS, benchmark_record, evaluate_model, load_benchmark
from modeling_dclip.evaluation.results import render_table, write_results
from modeling_dclip.evaluation.tradeoff import compare_to_anchor


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


def read_lines(path: str | None) -> list[str] | None:
    if path is None:
        return None
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    set_seed(arguments.seed)
    command = shlex.join(["eval.py", *(sys.argv[1:] if argv is None else argv)])
    options = {key: getattr(arguments, key) for key in ("batch_size", "device", "num_workers", "seed")}
    options |= {key: read_lines(getattr(arguments, key)) for key in ("class_names", "templates")}
    benchmarks = [load_benchmark(benchmark, **options) for benchmark in arguments.benchmark]
    names = [name for name in (arguments.anchor, arguments.model) if name is not None]
    evaluated = {
        name: evaluate_model(name, benchmarks, trust_remote_code=arguments.trust_remote_code) for name in names
    }
    records = []
    for name, (results, revision) in evaluated.items():
        for index, (benchmark, result) in enumerate(zip(benchmarks, results, strict=True)):
            comparison = None
            if arguments.anchor is not None and name == arguments.model:
                anchor_results, anchor_revision = evaluated[arguments.anchor]
                intervals = compare_to_anchor(result, anchor_results[index], seed=arguments.seed)
                comparison = {"anchor": arguments.anchor, "anchor_revision": anchor_revision, **intervals}
            fields = {"label": arguments.label if name == arguments.model else None, "comparison": comparison}
            fields |= {"model": name, "seed": arguments.seed, "revision": revision, "command": command}
            records.append(benchmark_record(benchmark, result, **fields))
    write_results(arguments.output, records)
    print(render_table(records))
    print(f"\nWritten to {arguments.output}")


if __name__ == "__main__":
    main()
