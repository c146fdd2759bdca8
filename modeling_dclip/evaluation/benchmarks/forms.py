"""What a help says of each kind of benchmark. It stands apart from what reads data and runs models, whose imports take
seconds: a help need not wait for PyTorch.
"""

import textwrap
from typing import NamedTuple


class KindHelp(NamedTuple):
    """A kind of benchmark, in words.

    Attributes:
        forms (`str`): The forms of its specs, as the sources state them; empty if it reads no data.
        default_spec (`str`): Its data by default; empty if it reads no data.
        measures (`str`): What it measures.
    """

    forms: str
    default_spec: str
    measures: str


_CAPTIONED = (
    "scenes:SPLIT, coco:ANNOTATIONS.json:IMAGE_FOLDER, karpathy:DATASET.json:IMAGE_FOLDER:SPLIT, "
    "flickr30k:results.csv:IMAGE_FOLDER, conceptual:FILE.tsv:IMAGE_FOLDER, csv:TABLE.csv:IMAGE_FOLDER, parquet:GLOB, "
    "hub:NAME:SPLIT, disk:FOLDER, wds:DIR_OR_URL[:SPLIT], held_out:RUN_FOLDER"
)
_LABELLED = (
    "scenes[:SPLIT], parquet:GLOB, imagefolder:DIR[:SPLIT], hub:ID[:SPLIT], wds:DIR_OR_URL[:SPLIT], suite:ROOT[:SPLIT]"
)
_QUESTIONS = (
    "scenes[:SPLIT], sugarcrepe:JSON_OR_FOLDER:IMAGE_FOLDER, winoground:EXAMPLES.jsonl:IMAGE_FOLDER, "
    "aro:FILE.json:IMAGE_FOLDER, json:FILE:IMAGE_FOLDER, parquet:GLOB, hub:NAME:SPLIT"
)
KIND_HELP = {
    "retrieval": KindHelp(_CAPTIONED, "scenes:test", "recall, MRR, mAP and ranks, both directions"),
    "diagnostics": KindHelp(_CAPTIONED, "scenes:test", "modality gap, alignment, uniformity"),
    "hessian": KindHelp(_CAPTIONED, "scenes:test", "largest Hessian eigenvalues of the contrastive loss"),
    "zero_shot": KindHelp(
        _LABELLED,
        "scenes:test",
        "top-1, top-5, mean per class; mean average precision where images have several labels",
    ),
    "fine_grained": KindHelp(_QUESTIONS, "scenes:test", "the true caption before false ones, by category"),
    "efficiency": KindHelp("", "", "latency, throughput, parameters, operations, memory"),
}


def describe_kinds() -> str:
    """Describe every kind for a command's help: what it measures and which specs it takes."""
    lines, last = [], None
    for name, kind in KIND_HELP.items():
        lines.append(f"  {name}{'[=SPEC]' * bool(kind.forms)}: {kind.measures}.")
        if kind.forms and kind.forms != last:
            specs = f"SPEC is {kind.forms}; {kind.default_spec}, drawn shapes, by default."
            lines += textwrap.wrap(specs, 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        elif kind.forms:
            lines.append("    SPEC as above.")
        last = kind.forms
    return "\n".join(lines)
