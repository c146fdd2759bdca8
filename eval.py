"""Evaluate dual encoders: DCLIP, DM-CLIP, any CLIP or SigLIP of transformers, or one of open_clip (open_clip:NAME:PRETRAINED).

    python eval.py --model outputs/demo/leak_free/seed-0/student --anchor recipes/demo_anchor --benchmark retrieval zero_shot
    python eval.py --model STUDENT --anchor recipes/demo_anchor --alphas 0.25 0.5 0.75 --benchmark retrieval zero_shot --plot curve.png
    python eval.py report results/ --output report/
    python eval.py compare a.json b.json

The results file grows by one record a model and benchmark; run again, it goes on where it was. What fails is reported at the end and does not
lose the rest. Numbers are for the PIL image processor, in float32. Benchmarks:
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

import modeling_dclip  # noqa: F401  registers the Auto classes
from modeling_dclip.evaluation.benchmarks import describe_kinds, kind_of
from modeling_dclip.evaluation.classifier_cache import ClassifierCache
from modeling_dclip.evaluation.comparison import compare_results, render_comparison
from modeling_dclip.evaluation.curves import plot_curve
from modeling_dclip.evaluation.evaluator import Candidate, evaluate
from modeling_dclip.evaluation.galleries import write_pages
from modeling_dclip.evaluation.reports import write_report
from modeling_dclip.evaluation.results import render_table
from modeling_dclip.evaluation.suite_tables import render_averages


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = f"{__doc__}\n{describe_kinds()}"
    parser = argparse.ArgumentParser(
        prog="eval.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, nargs="+", metavar="MODEL", help="folders, Hub ids or open_clip:NAME:PRETRAINED")
    add("--benchmark", required=True, nargs="+", metavar="KIND[=SPEC]", help="see above")
    add("--anchor", metavar="MODEL", help="also evaluate this; adds relative gain and retention, with intervals")
    add("--alphas", nargs="+", type=float, metavar="ALPHA", help="evaluate points between anchor (0) and model (1)")
    add("--plot", metavar="FILE.png", help="draw retrieval against zero-shot accuracy")
    add("--gallery", metavar="DIR", help="write what each model finds and misses as HTML pages, one per retrieval set")
    add("--maps", metavar="DIR", help="draw where each model's image encoder looks, one picture per retrieval set")
    add("--output", default="results.json", help="results file (default: %(default)s)")
    add("--overwrite", action="store_true", help="begin anew instead of going on with the results file")
    add("--label", nargs="+", help="names to show in tables instead of the models' paths")
    add("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--num_workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--seed", type=int, default=0, help="of the draw of @COUNT and of the bootstrap (default: %(default)s)")
    add("--class_names", metavar="FILE", help="zero_shot: class names, one a line, in the order of the labels")
    add("--templates", metavar="FILE", help="zero_shot: prompt templates, one a line, each with {}")
    add("--classifier_cache", metavar="DIR", help="zero_shot: keep classifiers here from run to run")
    add(
        "--index",
        metavar="faiss[:FACTORY]",
        help="retrieval: search a FAISS index, for sets too large to search whole",
    )
    add("--hessian", nargs="+", default=[], metavar="KEY=VALUE", help="hessian: e.g. tower=all steps=60")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    try:
        kinds = {kind_of(benchmark) for benchmark in arguments.benchmark}
    except ValueError as error:
        parser.error(str(error))
    owners = {"class_names": "zero_shot", "templates": "zero_shot", "classifier_cache": "zero_shot"}
    for name, kind in (
        owners | {"index": "retrieval", "gallery": "retrieval", "maps": "retrieval", "hessian": "hessian"}
    ).items():
        if getattr(arguments, name) and kind not in kinds:
            parser.error(f"--{name} belongs to the benchmark {kind}, which is not asked for")
    if arguments.label and len(arguments.label) != len(arguments.model):
        parser.error(f"--label: expected one name for each of {len(arguments.model)} models, got {arguments.label}")
    if arguments.alphas and arguments.anchor is None:
        parser.error("--alphas: expected an --anchor, where the line to the model begins")
    if odd := [pair for pair in arguments.hessian if "=" not in pair]:
        parser.error(f"--hessian: expected KEY=VALUE, got {odd[0]!r}")


def read_lines(path: str | None) -> list[str] | None:
    if path is None:
        return None
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def find_candidates(arguments: argparse.Namespace) -> list[Candidate]:
    """Each model, after the points between the anchor and it."""
    labels = arguments.label or [None] * len(arguments.model)
    return [
        Candidate(name, label, alpha)
        for name, label in zip(arguments.model, labels, strict=True)
        for alpha in [*(arguments.alphas or ()), None]
    ]


def run(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    set_seed(arguments.seed)
    shared = ("anchor", "batch_size", "device", "num_workers", "overwrite", "seed", "trust_remote_code")
    options = {key: getattr(arguments, key) for key in shared}
    options |= {key: read_lines(getattr(arguments, key)) for key in ("class_names", "templates")}
    options |= {"index": arguments.index, "classifiers": ClassifierCache(arguments.classifier_cache)}
    options["hessian"] = dict(pair.split("=", 1) for pair in arguments.hessian)
    command = shlex.join(["eval.py", *argv])
    done = evaluate(find_candidates(arguments), arguments.benchmark, arguments.output, command=command, **options)
    if done.records:
        print(render_table(done.records))
        if averages := render_averages(done.records):
            print(f"\n{averages}")
        if arguments.plot:
            plot_curve(done.records, arguments.plot, anchor=arguments.anchor)
            print(f"\nDrawn to {arguments.plot}")
        print(
            f"\nWritten to {arguments.output}" + f"; {done.kept} of these records were there already" * bool(done.kept)
        )
    shown = {key: options[key] for key in ("batch_size", "device", "num_workers", "seed", "trust_remote_code")}
    for page in write_pages(done.records, gallery=arguments.gallery, maps=arguments.maps, **shown):
        print(f"Written to {page}")
    for failure in done.failures:
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if done.failures else 0


def report(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="eval.py report", description="Render results files as Markdown and HTML.")
    parser.add_argument("results", nargs="+", help="results files, or folders of them")
    parser.add_argument("--output", default="report", metavar="DIR", help="where to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for path in write_report(arguments.results, arguments.output):
        print(f"Written to {path}")
    return 0


def compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="eval.py compare", description="Say what differs between two results files, and whether beyond noise."
    )
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    arguments = parser.parse_args(argv)
    print(render_comparison(compare_results(arguments.a, arguments.b)))
    return 0


COMMANDS = {"report": report, "compare": compare}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
