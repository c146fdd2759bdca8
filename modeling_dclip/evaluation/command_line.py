"""The arguments of `eval.py`, checked before anything is loaded."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modeling_dclip.data.files import check_new_folder, check_output_folder
from modeling_dclip.data.specs import BATCH, PART, SEED, WORKERS, CommandParser
from modeling_dclip.evaluation.benchmarks.forms import describe_kinds

# What takes seconds to import is imported where it is needed: a help need not wait for PyTorch.

# Each of these arguments needs a benchmark of this kind.
_OWNERS = {
    "class_names": "zero_shot",
    "templates": "zero_shot",
    "classifier_cache": "zero_shot",
    "index": "retrieval",
    "gallery": "retrieval",
    "maps": "retrieval",
    "hessian": "hessian",
}
_FOLDERS = ("gallery", "maps", "classifier_cache")


def parse_arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Parse the words after `eval.py`.

    Args:
        argv (`Sequence[str]`, *optional*): The words; by default those of the process.
        description (`str`): The text above the help.

    Returns:
        `argparse.Namespace`: `class_names` and `templates` are the lines of their files, `None` where not given.

    Raises:
        SystemExit: After `--help`.
        ValueError: If an argument is wrong.
    """
    parser = CommandParser(
        prog="eval.py",
        description=f"{description}\n{describe_kinds()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    arguments = parser.parse_args(argv)
    import torch

    from modeling_dclip.data.labels.prompts import read_lines

    try:
        if arguments.device is None:
            arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
        _check_option("--device", check_device, arguments.device)
        _check_arguments(arguments)
        for name in ("class_names", "templates"):
            if (path := getattr(arguments, name)) is not None:
                setattr(arguments, name, read_lines(path))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return arguments


def check_device(name: str) -> None:
    """Say early that a device is not there.

    Args:
        name (`str`): As torch names it.

    Raises:
        ValueError: If torch cannot use it; the message has torch's reason.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch says either of a device that it lacks
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected a device of this machine, got {name!r}: {reason}") from error


def _add_arguments(parser: CommandParser) -> None:
    add = parser.add_argument
    model_help = "what to measure: folders, Hub ids or open_clip:NAME:PRETRAINED"
    add("--model", required=True, nargs="+", metavar="MODEL", help=model_help)
    benchmark_help = "what to measure it by: one or several of the kinds above; not needed with --save_alpha"
    add("--benchmark", default=[], nargs="+", metavar="KIND[=SPEC]", help=benchmark_help)
    anchor_help = "the CLIP that training started from: it is measured too, and a verdict says whether MODEL is better"
    add("--anchor", metavar="MODEL", help=anchor_help)
    alphas_help = "also measure these points on the line from the anchor (0) to the weights that training reached (1)"
    add("--alphas", nargs="+", range=PART, metavar="ALPHA", help=alphas_help)
    save_help = "save this point on the line of --alphas as a model, in the folder of --save_to"
    add("--save_alpha", range=PART, metavar="ALPHA", help=save_help)
    add("--save_to", metavar="DIR", help="the new folder that --save_alpha writes")
    plot_help = "draw retrieval against zero-shot accuracy; needs both benchmarks"
    add("--plot", metavar="FILE.png", help=plot_help)
    gallery_help = "retrieval: write what each model finds and misses as HTML pages, one for each set"
    add("--gallery", metavar="DIR", help=gallery_help)
    maps_help = "retrieval: draw where each model's image encoder looks, one picture for each set"
    add("--maps", metavar="DIR", help=maps_help)
    output_help = "results file; records that are there are kept (default: %(default)s)"
    add("--output", default="results.json", metavar="FILE.json", help=output_help)
    add("--overwrite", action="store_true", help="replace the results file instead of adding to it")
    label_help = "names to show in tables instead of the models' paths, one for each --model"
    add("--label", nargs="+", metavar="NAME", help=label_help)
    batch_help = "images or texts at a time; no metric depends on it, memory does (default: %(default)s)"
    add("--batch_size", range=BATCH, default=64, metavar="N", help=batch_help)
    add("--num_workers", range=WORKERS, default=0, metavar="N", help="processes that decode images (default: 0, none)")
    bad_help = "what to do with a picture that cannot be read. skip: leave it out and name it (default: raise)"
    add("--on_bad_image", choices=("raise", "skip"), default="raise", help=bad_help)
    device_help = "where models run, as PyTorch names it: cpu, cuda, cuda:1, mps (default: cuda if there is one)"
    add("--device", metavar="DEVICE", help=device_help)
    seed_help = "of every draw, such as the images of @COUNT and those of intervals (default: 0)"
    add("--seed", range=SEED, default=0, metavar="N", help=seed_help)
    add("--class_names", metavar="FILE", help="zero_shot: class names, one a line, in the order of the labels")
    add("--templates", metavar="FILE", help="zero_shot: prompt templates, one a line, each with {} for the name")
    cache_help = "zero_shot: keep the embeddings of class names here from run to run"
    add("--classifier_cache", metavar="DIR", help=cache_help)
    index_help = "retrieval: search a FAISS index, for sets too large to search whole; FACTORY as FAISS names it"
    add("--index", metavar="faiss[:FACTORY]", help=index_help)
    hessian_help = "hessian: its options, such as tower=all steps=60"
    add("--hessian", nargs="+", default=[], metavar="KEY=VALUE", help=hessian_help)
    add("--trust_remote_code", action="store_true", help="run code that comes with a model from the Hub")


def _check_arguments(arguments: argparse.Namespace) -> None:
    if not arguments.benchmark and arguments.save_alpha is None:
        raise ValueError("--benchmark: expected what to measure, such as retrieval=csv:captions.csv:photos, got none")
    from modeling_dclip.evaluation.benchmarks.kinds import kind_of

    kinds = {kind_of(benchmark) for benchmark in arguments.benchmark}
    for name, kind in _OWNERS.items():
        if getattr(arguments, name) and kind not in kinds:
            raise ValueError(f"--{name} belongs to the benchmark {kind}, which is not asked for")
    if arguments.label and len(arguments.label) != len(arguments.model):
        raise ValueError(
            f"--label: expected one name for each of {len(arguments.model)} models, got {arguments.label}"
        )
    if arguments.alphas and arguments.anchor is None:
        raise ValueError("--alphas: expected an --anchor, where the line to the model begins")
    if odd := [pair for pair in arguments.hessian if not pair.partition("=")[0] or "=" not in pair]:
        raise ValueError(f"--hessian: expected KEY=VALUE, got {odd[0]!r}")
    if arguments.plot:
        _check_plot(arguments, kinds)
    _check_point(arguments)
    for name in _FOLDERS:
        if folder := getattr(arguments, name):
            _check_option(f"--{name}", check_output_folder, folder)
    if arguments.plot:
        _check_option("--plot", check_output_folder, Path(arguments.plot).parent)


def _check_point(arguments: argparse.Namespace) -> None:
    """Check what saves a point between anchor and model."""
    if (arguments.save_alpha is None) != (arguments.save_to is None):
        raise ValueError("--save_alpha and --save_to: expected both, the point and the folder to write")
    if arguments.save_to is None:
        return
    if arguments.anchor is None:
        raise ValueError("--save_alpha: expected an --anchor, where the line to the model begins")
    if len(arguments.model) > 1:
        raise ValueError(f"--save_alpha: expected one --model, got {len(arguments.model)}; save one at a time")
    from modeling_dclip.encoders.open_clip import OPEN_CLIP_PREFIX

    if named := [name for name in (arguments.anchor, *arguments.model) if name.startswith(OPEN_CLIP_PREFIX)]:
        raise ValueError(f"--save_alpha: expected models of transformers or of this package, got {named[0]}")
    _check_option("--save_to", check_new_folder, arguments.save_to)


def _check_option(option: str, check: Callable[[Any], object], value: Any) -> None:
    try:
        check(value)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from error


def _check_plot(arguments: argparse.Namespace, kinds: set[str]) -> None:
    if Path(arguments.plot).suffix != ".png":
        raise ValueError(f"--plot: expected a .png file, got {arguments.plot}")
    if not {"retrieval", "zero_shot"} <= kinds:
        raise ValueError(f"--plot: expected the benchmarks retrieval and zero_shot, got {', '.join(sorted(kinds))}")
    if arguments.alphas and len(set(arguments.model)) > 1:
        raise ValueError(f"--plot: expected one --model with --alphas, got {len(arguments.model)}; plot one at a time")
