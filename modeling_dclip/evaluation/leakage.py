"""How much of a teacher's retrieval is its own caption read back: one measure, with parts of the input exchanged.

A teacher embeds a *pair*: an image's regions and one of its captions. It is trained to come near the frozen CLIP's
sentence embedding of that very caption. The measure is the same task over a whole test set. A *draw* takes one caption
of each of I images, which gives I pairs and I sentences. The right answer of pair i is sentence i, whatever the pair
has read:

- `text_to_teacher_*`: the rank of pair i among the I pair embeddings, asked by sentence i (text-to-image retrieval
  with the teacher as the image encoder);
- `teacher_to_text_*`: the rank of sentence i among the I sentences, asked by pair i.

Ties count against the teacher, as in [`~modeling_dclip.encoders.retrieval_ranks.retrieval_ranks`]; equal
captions of two images are ties. Draw d takes caption `(start_i + d) mod count_i` with a random start, so as many draws
as captions use each caption once. All conditions of a draw share its captions and its shuffle. The shuffle is a random
cycle through all images, so no image keeps its own:

- `as_trained`: own regions, own caption.
- `regions_shuffled`: another image's regions, boxes and whole-image embedding; own caption. What is left was read from
  the caption.
- `captions_shuffled`: own regions; another image's caption, while the right answer stays the own one. What is left was
  read from the image.
- `text_share_0`: as trained, without the pooled tokens in the embedding. The regions have still attended to the
  tokens, and the regions' weights depend on the caption. `text_share_0_regions_shuffled` also exchanges the regions.
- `whole_image`: the frozen CLIP's embedding of the whole image, no teacher. With as many draws as captions this is
  text-to-image retrieval as [`~modeling_dclip.evaluation.benchmarks.retrieval.evaluate_retrieval`] measures it, except
  that features are rounded to float16.
- `chance`: the expectation of a random order.

    python -m modeling_dclip.evaluation.leakage --teacher [LABEL=]FOLDER ... --dataset SPEC --output FILE

Source: docs/papers.md, leakage.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from datasets import Dataset

from modeling_dclip.data.captions import load_captions, parse_caption_spec
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.failures import command, recorded_command
from modeling_dclip.data.files import check_output_folder, temporary_folder
from modeling_dclip.data.specs import BATCH, COUNT, SEED, WORKERS, CommandParser, Range, Spec
from modeling_dclip.data.teacher_targets import FeatureOptions, TeacherFeatures, compute_features, embed_pairs
from modeling_dclip.encoders.fingerprints import combine_keys, model_revision
from modeling_dclip.encoders.loading import load_checked, load_processor
from modeling_dclip.encoders.retrieval_ranks import RetrievalRanks, metrics_from_ranks, retrieval_ranks
from modeling_dclip.evaluation.command_line import check_device
from modeling_dclip.evaluation.records import Metrics, Record, environment, make_record, write_results
from modeling_dclip.evaluation.reports.metric_names import METRIC_TITLES
from modeling_dclip.evaluation.reports.tables import render_leakage
from modeling_dclip.evaluation.statistics import IntervalDict, bootstrap_ratio
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor

CUT_OFFS = (1, 5, 10)
KEPT = tuple(f"recall@{k}" for k in CUT_OFFS) + ("_mrr",)


class Exchange(NamedTuple):
    """What a condition takes from another image, and whether the embedding leaves the text out."""

    regions: bool = False
    captions: bool = False
    without_text: bool = False


EXCHANGES = {
    "as_trained": Exchange(),
    "regions_shuffled": Exchange(regions=True),
    "captions_shuffled": Exchange(captions=True),
    "text_share_0": Exchange(without_text=True),
    "text_share_0_regions_shuffled": Exchange(regions=True, without_text=True),
}


class Draw(NamedTuple):
    """One caption of each of I images, and another image for each.

    Attributes:
        captions (`np.ndarray` of shape `(I,)`): int64; the row of the drawn caption.
        others (`np.ndarray` of shape `(I,)`): int64; the row of another image.
    """

    captions: np.ndarray
    others: np.ndarray


class ConditionResult(TypedDict, total=False):
    """What a teacher scored under one condition.

    Attributes:
        metrics (`dict[str, float]`): Means over draws.
        draws (`dict[str, list[float]]`): The value of each draw; `chance` has none.
        intervals (`dict`): Of the two R@1. They cover **images** for this teacher, not trainings of it; `chance` has
            none.
    """

    metrics: dict[str, float]
    draws: dict[str, list[float]]
    intervals: dict[str, IntervalDict]


@dataclass(frozen=True)
class LeakageOptions:
    """How to measure, and how to compute the features of the frozen CLIP."""

    draws: int = field(
        default=5, metadata={"help": "Draws of captions and shuffles.", "range": Range(1, 1000, whole=True)}
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the draws, of the intervals, and of the images that @COUNT draws.", "range": SEED},
    )
    max_regions: int | None = field(
        default=None,
        metadata={"help": "Keep this many regions per image, as in training. By default all.", "range": COUNT},
    )
    batch_size: int = field(
        default=16, metadata={"help": "Images per forward pass, each with all its regions.", "range": BATCH}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that decode and crop.", "range": WORKERS})


def make_draws(offsets: np.ndarray, count: int, seed: int = 0) -> list[Draw]:
    """Draw captions and shuffles.

    Args:
        offsets (`np.ndarray` of shape `(I + 1,)`): Where each image's captions start; the last entry is the number of
            captions.
        count (`int`): Draws, >= 1.
        seed (`int`, *optional*, defaults to 0): Another seed gives another set of draws.

    Returns:
        `list[Draw]`: `count` of them.

    Raises:
        ValueError: If there are fewer than two images, an image has no caption, or `count` is below 1.
    """
    lengths = np.diff(offsets)
    if len(lengths) < 2 or lengths.min() < 1 or count < 1:
        raise ValueError(
            f"Expected two or more images with captions and one or more draws, got {len(lengths)} images with "
            f"{lengths.min(initial=0)} or more captions and {count} draws. Give more images."
        )
    generator = np.random.default_rng(seed)
    start = generator.integers(0, lengths)
    draws = []
    for index in range(count):
        cycle = generator.permutation(len(lengths))
        others = np.empty_like(cycle)
        others[cycle] = np.roll(cycle, 1)
        draws.append(Draw(offsets[:-1] + (start + index) % lengths, others))
    return draws


@torch.no_grad()
def pair_embeds(teacher: DCLIPTeacher, features: TeacherFeatures, draw: Draw, condition: str) -> torch.Tensor:
    """Embed every image as a condition says.

    Args:
        teacher ([`DCLIPTeacher`]): In eval mode, on the device to use. Its config is restored at the end.
        features ([`TeacherFeatures`]): Of I images.
        draw ([`Draw`]): Captions and shuffle.
        condition (`str`): A key of [`EXCHANGES`], or `"whole_image"`.

    Returns:
        `torch.Tensor` of shape `(I, D)`: float32, on the CPU.
    """
    if condition == "whole_image":
        return torch.from_numpy(features.image_embeds.astype(np.float32))
    exchange, text_share = EXCHANGES[condition], teacher.config.text_share
    try:
        teacher.config.text_share = 0.0 if exchange.without_text else text_share
        return embed_pairs(
            teacher,
            features,
            draw.others if exchange.regions else np.arange(len(draw.others)),
            draw.captions[draw.others] if exchange.captions else draw.captions,
        )
    finally:
        teacher.config.text_share = text_share


def _named(metrics: Metrics) -> Metrics:
    """Name retrieval's metrics for the teacher, and leave out those without a chance level.

    Mean average precision is left out too: with one right answer each, it equals the mean reciprocal rank.
    """
    return {name.replace("image", "teacher"): value for name, value in metrics.items() if name.endswith(KEPT)}


def chance_metrics(images: int) -> Metrics:
    """The metrics' expectation under a random order.

    Args:
        images (`int`): How many are ordered, >= 1; one of them is right.

    Returns:
        `dict[str, float]`: In [0, 1], by metric.

    Example:
        >>> chance_metrics(4)["text_to_teacher_recall@1"]
        0.25
    """
    recalls = {f"recall@{k}": min(k / images, 1.0) for k in CUT_OFFS}
    expected = recalls | {"mrr": float(np.mean(1 / np.arange(1, images + 1)))}
    return {
        f"{way}_{name}": value for way in ("text_to_teacher", "teacher_to_text") for name, value in expected.items()
    }


def _summarise(ranks: Sequence[RetrievalRanks], seed: int) -> ConditionResult:
    """Average over draws; the intervals are over images, of each image's mean hit over draws."""
    drawn = [_named(metrics_from_ranks(one, CUT_OFFS)) for one in ranks]
    draws = {name: [metrics[name] for metrics in drawn] for name in drawn[0]}
    intervals = {}
    for name, way in (("text_to_teacher_recall@1", "text_to_image"), ("teacher_to_text_recall@1", "image_to_text")):
        hits = torch.stack([(getattr(one, way) == 1).double() for one in ranks]).mean(dim=0)
        intervals[name] = bootstrap_ratio(hits, torch.ones_like(hits), seed=seed).to_dict()
    metrics = {name: float(np.mean(values)) for name, values in draws.items()}
    return {"metrics": metrics, "draws": draws, "intervals": intervals}


def measure_leakage(
    teacher: DCLIPTeacher, features: TeacherFeatures, *, draws: int = 5, seed: int = 0
) -> dict[str, ConditionResult]:
    """Measure a teacher's retrieval under every condition; the module's text says what is measured.

    Args:
        teacher ([`DCLIPTeacher`]): On the device to use.
        features ([`TeacherFeatures`]): Of the test images, from the CLIP inside this teacher.
        draws (`int`, *optional*, defaults to 5): Draws of captions and shuffles.
        seed (`int`, *optional*, defaults to 0): Of the draws and of the intervals.

    Returns:
        `dict[str, ConditionResult]`: By condition: the keys of [`EXCHANGES`], `whole_image` and `chance`.

    Raises:
        ValueError: As in [`make_draws`].
    """
    teacher.eval()
    drawn = make_draws(features.text_embeds.offsets, draws, seed)
    own = torch.arange(len(features.image_embeds))
    ranks: dict[str, list[RetrievalRanks]] = {condition: [] for condition in (*EXCHANGES, "whole_image")}
    for draw in drawn:
        texts = torch.from_numpy(features.text_embeds.values[draw.captions].astype(np.float32))
        for condition, found in ranks.items():
            found.append(retrieval_ranks(pair_embeds(teacher, features, draw, condition), texts, own))
    results = {condition: _summarise(found, seed) for condition, found in ranks.items()}
    return results | {"chance": {"metrics": chance_metrics(len(own))}}


def evaluate_leakage(
    teachers: Sequence[tuple[str, str | Path]],
    dataset: Dataset,
    spec: str | Spec,
    output: str | Path,
    *,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    command: str = "",
    options: LeakageOptions | None = None,
) -> list[Record]:
    """Measure trained teachers and write a results file: one record for each teacher and condition.

    Args:
        teachers (`Sequence[tuple[str, str or Path]]`): Label and folder. Several trainings with different seeds share
            one label.
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`, and optionally `boxes` and `box_scores`.
            Without boxes the whole image is the one region.
        spec (`str` or [`~modeling_dclip.data.specs.Spec`]): What the dataset was loaded from, for the records.
        output (`str` or `Path`): A `.json` file.
        cache_dir (`str` or `Path`): Where the frozen CLIP's features are kept. Teachers around one CLIP share them.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where to compute.
        command (`str`, *optional*): What the user ran, for the records.
        options ([`LeakageOptions`], *optional*): By default its defaults.

    Returns:
        `list[Record]`: The records, for [`~modeling_dclip.evaluation.reports.tables.render_leakage`].

    Raises:
        ValueError: As in [`measure_leakage`]; also if an image, a caption or a box is bad.
    """
    options, measured_in = options or LeakageOptions(), environment()
    spec = parse_caption_spec(spec)
    keys = row_keys(dataset)
    shared = {
        "benchmark": f"leakage={spec}",
        "split": spec.split,
        "dataset_fingerprint": f"sha256:{combine_keys(keys)}",  # boxes decide too
        "n": len(dataset),
        "n_captions": sum(map(len, dataset["captions"][:])),
        "seed": options.seed,
        "command": command,
    }
    records = []
    for label, folder in teachers:
        teacher = load_checked(DCLIPTeacher, folder).to(device)
        processor = load_processor(folder, DCLIPTeacherProcessor)
        paths = compute_features(
            dataset,
            teacher,
            processor,
            FeatureOptions(Path(cache_dir), options.max_regions, options.batch_size, num_workers=options.num_workers),
            keys=keys,
            alone=True,
        )
        measured = measure_leakage(teacher, TeacherFeatures.load(paths), draws=options.draws, seed=options.seed)
        about = shared | {"model": str(folder), "label": label, "revision": model_revision(folder, teacher)}
        records += [make_record(measured_in, **about, condition=name, **found) for name, found in measured.items()]
    write_results(output, records)
    return records


@dataclass
class LeakageArguments:
    """What to measure, and where."""

    teacher: list[str] = field(
        metadata={"help": "Folders of teachers, each as [LABEL=]FOLDER; one label for trainings with several seeds."}
    )
    dataset: str = field(
        default="scenes:test,n=1000", metadata={"help": "Spec of the captions; regions come from its boxes."}
    )
    output: str = field(default="leakage.json", metadata={"help": "Results file."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compute."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder where features are kept for later runs. By default they are deleted."}
    )


def _labelled(name: str) -> tuple[str, str]:
    """Split `LABEL=FOLDER`. A folder's name may contain `=` itself; a name without a label is its own label."""
    return (name, name) if "=" not in name or Path(name).is_dir() else name.partition("=")[::2]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = CommandParser(
        (LeakageArguments, LeakageOptions),
        prog="python -m modeling_dclip.evaluation.leakage",
        description="Measure what a teacher's embeddings take from the caption instead of the image.",
    )
    arguments, options = parser.parse(words)
    check_device(arguments.device)
    check_output_folder(Path(arguments.output).parent)
    if arguments.cache_dir is not None:
        check_output_folder(arguments.cache_dir)
    teachers = [_labelled(name) for name in arguments.teacher]
    spec = parse_caption_spec(arguments.dataset)
    dataset = load_captions(spec, seed=options.seed)
    with temporary_folder() as temporary:
        records = evaluate_leakage(
            teachers,
            dataset,
            spec,
            arguments.output,
            cache_dir=arguments.cache_dir or temporary,
            device=arguments.device,
            command=recorded_command("python -m modeling_dclip.evaluation.leakage", words),
            options=options,
        )
    tables = [render_leakage(records, metric=name) for name in METRIC_TITLES if "teacher" in name]
    sys.stdout.write("\n\n".join([*tables, f"Written to {arguments.output}\n"]))


if __name__ == "__main__":
    main()
