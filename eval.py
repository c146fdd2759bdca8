"""Evaluate dual encoders: DCLIP, DM-CLIP, any CLIP or SigLIP of transformers, or one of open_clip
(open_clip:NAME:PRETRAINED).

    python eval.py --model STUDENT --anchor recipes/demo_anchor --benchmark retrieval zero_shot
    python eval.py --model STUDENT --anchor recipes/demo_anchor --benchmark retrieval zero_shot \\
        --alphas 0.25 0.5 0.75 --plot curve.png
    python eval.py --model STUDENT --anchor recipes/demo_anchor --save_alpha 0.5 --save_to outputs/half
    python eval.py report results/ --output report/
    python eval.py compare a.json b.json
    python eval.py compare a.json --models ANCHOR STUDENT
    python eval.py equal_retention lines.json --baseline ARM

Each model and benchmark adds one record to the results file. Run again, it keeps the records that are there. What
fails is reported at the end and does not lose the rest. Numbers are for the PIL image processor, in float32.
Benchmarks:
"""

from __future__ import annotations

import modeling_dclip  # noqa: F401  first: it takes Ctrl+C while the others load, and registers the Auto classes

# isort: split
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_dclip.data.failures import BENCHMARK_FAILURES, command, describe_failure, recorded_command
from modeling_dclip.data.specs import PART, CommandParser

# The rest is imported by the function that needs it: a help or a comparison need not wait for models.
if TYPE_CHECKING:
    from modeling_dclip.evaluation.evaluator import Candidate, Evaluation


def find_candidates(arguments: argparse.Namespace) -> list[Candidate]:
    """List each model, after the points between the anchor and it."""
    from modeling_dclip.evaluation.evaluator import Candidate

    labels = arguments.label or [None] * len(arguments.model)
    return [
        Candidate(name, label, alpha)
        for name, label in zip(arguments.model, labels, strict=True)
        for alpha in [*(arguments.alphas or ()), None]
    ]


def show(done: Evaluation, arguments: argparse.Namespace) -> None:
    """Print what was found and what was measured, and draw the pictures that were asked for."""
    from modeling_dclip.evaluation.arms import plot_curve
    from modeling_dclip.evaluation.reports.gallery import write_pages
    from modeling_dclip.evaluation.reports.tables import render_averages, render_table
    from modeling_dclip.evaluation.reports.verdict import show_verdicts

    if verdicts := show_verdicts(done.records):
        print(f"{verdicts}\n")
    print(render_table(done.records, widest=WIDEST))
    kept = f"; {done.kept} of these records were there already" * bool(done.kept)
    place = "" if Path(arguments.output).parent != Path() else ", in the current folder; --output names another place"
    print(f"\nWritten to {arguments.output}{place}{kept}")
    if averages := render_averages(done.records):
        print(f"\n{averages}")
    if arguments.plot:
        plot_curve(done.records, arguments.plot, anchor=arguments.anchor)
        print(f"Drawn to {arguments.plot}")
    shared = ("gallery", "maps", "batch_size", "device", "num_workers", "seed", "trust_remote_code", "on_bad_image")
    for page in write_pages(done.records, **{key: getattr(arguments, key) for key in shared}):
        print(f"Written to {page}")


def save_point(arguments: argparse.Namespace) -> None:
    """Save the weights between anchor and model that `--save_alpha` names, with processor, tokenizer and code.

    They are those that training with this `wise_ft_alpha` saves, in the type that the model's weights are stored in.
    """
    import yaml

    from modeling_dclip.data.captions.parts import write_trained_images
    from modeling_dclip.data.files import ARGUMENTS_NAME, replacing, write_text
    from modeling_dclip.distillation.trainer import find_overflows, require_fit, save_weights
    from modeling_dclip.encoders.loading import load_pair, stored_dtype
    from modeling_dclip.encoders.saving import save_processor
    from modeling_dclip.evaluation.line import find_line

    (name,), anchor, alpha, folder = arguments.model, arguments.anchor, arguments.save_alpha, Path(arguments.save_to)
    options = {"trust_remote_code": arguments.trust_remote_code}
    (model, processor), (start, _) = (load_pair(spec, **options) for spec in (name, anchor))
    dtype, line = stored_dtype(name), find_line(anchor, name, start, model)
    weights = line.weights(start, model, alpha)
    require_fit(find_overflows(weights, dtype), dtype, "student")
    with replacing(folder) as temporary:
        save_weights(model, temporary, weights, dtype)
        save_processor(model, processor, temporary)
        write_trained_images(temporary, [], [name, anchor])
        if line.arguments is not None:
            line.arguments["student"]["wise_ft_alpha"] = alpha
            line.arguments["student"].pop("wise_ft_rule", None)  # it chose another point
            write_text(temporary / ARGUMENTS_NAME, yaml.safe_dump(line.arguments, sort_keys=False))
    print(f"Saved to {folder}, in {dtype}: alpha {alpha:g}. {line.described[0].upper()}{line.described[1:]}.")
    print("If alpha was chosen by results on test images, these results are too good: report it on other images.")


def run(argv: Sequence[str]) -> int:
    """Evaluate, and save a point between anchor and model; the exit status is 1 if something failed."""
    from modeling_dclip.evaluation.command_line import parse_arguments

    arguments = parse_arguments(argv, __doc__)
    from transformers import set_seed

    set_seed(arguments.seed)
    check_models(arguments)
    status = measure(arguments, argv) if arguments.benchmark else 0
    if arguments.save_alpha is not None:
        save_point(arguments)
    return status


def check_models(arguments: argparse.Namespace) -> None:
    """Say before anything is measured what is wrong with the results file, then with any of the models, of all at
    once.
    """
    from modeling_dclip.data.failures import MistakeCollector, naming
    from modeling_dclip.distillation.checks import nearest_model
    from modeling_dclip.encoders.loading import check_dual_encoder
    from modeling_dclip.evaluation.records import RecordStore

    if arguments.benchmark:
        RecordStore(arguments.output, arguments.overwrite)  # it reads what the file holds
    found = MistakeCollector()
    for option, names in (("--model", arguments.model), ("--anchor", filter(None, [arguments.anchor]))):
        for name in dict.fromkeys(names):
            with found.collecting(), naming(option):
                try:
                    check_dual_encoder(name, trust_remote_code=arguments.trust_remote_code)
                except OSError as error:
                    if not (near := nearest_model(name)):
                        raise
                    raise FileNotFoundError(f"{error} Did you mean {near!r}?") from error
    found.tell()


def measure(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Evaluate; the exit status is 1 if something failed."""
    from modeling_dclip.evaluation.benchmarks.kinds import EvaluationOptions, explain_default
    from modeling_dclip.evaluation.benchmarks.zero_shot import ClassifierCache
    from modeling_dclip.evaluation.evaluator import evaluate

    for benchmark in arguments.benchmark:
        if (note := explain_default(benchmark)) is not None:
            print(note, file=sys.stderr)
    options = EvaluationOptions(
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        device=arguments.device,
        num_workers=arguments.num_workers,
        class_names=arguments.class_names,
        templates=arguments.templates,
        classifiers=ClassifierCache(arguments.classifier_cache),
        index=arguments.index,
        on_bad_image=arguments.on_bad_image,
        hessian=dict(pair.split("=", 1) for pair in arguments.hessian),
    )
    done = evaluate(
        find_candidates(arguments),
        arguments.benchmark,
        arguments.output,
        anchor=arguments.anchor,
        command=recorded_command("eval.py", argv),
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
        options=options,
    )
    if done.records:
        try:
            show(done, arguments)
        except BrokenPipeError:
            raise  # nobody reads the table any more: `command` ends quietly
        except BENCHMARK_FAILURES as error:
            done.failures.append(describe_failure("tables and pictures", error))
    for failure in done.failures:
        print(f"Failed: {failure}", file=sys.stderr)
    return 1 if done.failures else 0


def report(argv: Sequence[str]) -> int:
    """Run `eval.py report`."""
    parser = CommandParser(prog="eval.py report", description="Render results files as Markdown and HTML.")
    parser.add_argument(
        "results", nargs="+", help="results files of eval.py, train.py or benchmarks/, or folders of them"
    )
    parser.add_argument(
        "--output",
        default="report",
        metavar="DIR",
        help="where to write report.html, report.md and plots/ (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    from modeling_dclip.evaluation.reports.report import write_report

    for path in write_report(arguments.results, arguments.output):
        print(f"Written to {path}")
    return 0


def compare(argv: Sequence[str]) -> int:
    """Run `eval.py compare`."""
    parser = CommandParser(
        prog="eval.py compare",
        description="Say what differs between two results files, or between two models of one file, and whether "
        "beyond noise.",
    )
    parser.add_argument("a", metavar="A.json", help="results file of eval.py")
    parser.add_argument(
        "b", metavar="B.json", nargs="?", help="another one; without it, two models of A.json are compared"
    )
    parser.add_argument(
        "--models",
        nargs=2,
        metavar=("A", "B"),
        help="two models, by label or path, of A.json and B.json: is B better?",
    )
    arguments = parser.parse_args(argv)
    from modeling_dclip.evaluation.reports.comparison import compare_results, render_comparison

    print(render_comparison(compare_results(arguments.a, arguments.b, models=arguments.models)))
    return 0


def compare_at_retention(argv: Sequence[str]) -> int:
    """Run `eval.py equal_retention`."""
    parser = CommandParser(
        prog="eval.py equal_retention",
        description="Compare arms while each keeps the same share of the anchor's zero-shot accuracy.\n"
        "First measure all runs with --anchor, --alphas and --label 'ARM, seed N' into one results file.",
    )
    parser.add_argument("results", metavar="RESULTS.json", help="results file of eval.py")
    parser.add_argument("--baseline", metavar="ARM", help="the arm that the others are compared with, paired by seed")
    retentions_help = "shares of the anchor's accuracy that are kept (default: 0.95 0.98)"
    parser.add_argument("--retention", nargs="+", range=PART, metavar="SHARE", help=retentions_help)
    parser.add_argument("--zero_shot", metavar="SPEC", help="whose accuracy is kept, where several were measured")
    parser.add_argument("--output", metavar="FILE.json", help="also write the tables here, for a page's results block")
    arguments = parser.parse_args(argv)
    from modeling_dclip.data.files import write_json
    from modeling_dclip.evaluation.equal_retention import RETENTIONS, read_at_retention, render_at_retention

    tables = read_at_retention(
        arguments.results,
        baseline=arguments.baseline,
        retentions=arguments.retention or RETENTIONS,
        zero_shot=arguments.zero_shot,
    )
    print(render_at_retention(tables))
    if arguments.output:
        write_json(arguments.output, tables)
        print(f"Written to {arguments.output}")
    return 0


WIDEST = 120  # characters of a table on the terminal
COMMANDS = {"report": report, "compare": compare, "equal_retention": compare_at_retention}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or evaluate."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return COMMANDS[argv[0]](argv[1:]) if argv and argv[0] in COMMANDS else run(argv)


if __name__ == "__main__":
    sys.exit(main())
