"""How much of a teacher's retrieval is its own caption read back: one measure, with parts of the input exchanged.

A teacher embeds a *pair*, an image's regions and one of its captions, and is trained to come near the frozen CLIP's
sentence embedding of that very caption. The measure is this task over a whole test set. A *draw* takes one caption of
each of I images, so there are I pairs and I sentences, and pair i's right answer is sentence i whatever the pair has
read:

- `text_to_teacher_*`: sentence i among the I pair embeddings (a sentence of text-to-image retrieval, with the teacher
  as image encoder);
- `teacher_to_text_*`: pair i among the I sentences.

Ties count against the teacher, as in [`~modeling_dclip.evaluation.benchmarks.retrieval_ranks.retrieval_ranks`]; equal
captions of two images are ties. Draw d takes caption `(start_i + d) mod count_i`, start random, so that as many draws
as captions use each caption once. The conditions of one draw share its captions and its shuffle, a random cycle
through all images: no image keeps what is its own.

- `as_trained`: own regions, own caption.
- `regions_shuffled`: another image's regions, boxes and whole-image embedding, own caption. What is left was read off
  the caption.
- `captions_shuffled`: own regions, another image's caption; the right answer stays the own one. What is left was read
  off the image.
- `text_share_0`: as trained, with the pooled tokens left out of the embedding. The regions have still attended to the
  tokens, and their weights ask the caption; so also `text_share_0_regions_shuffled`.
- `whole_image`: the frozen CLIP's embedding of the whole image, no teacher. With one draw a caption this is
  text-to-image retrieval as [`~modeling_dclip.evaluation.benchmarks.retrieval.evaluate_retrieval`] measures it, but
  for the rounding of features to float16.
- `chance`: the expectation of a random order.

    python -m modeling_dclip.evaluation.leakage --teacher [LABEL=]FOLDER ... --dataset SPEC --output FILE

Source: docs/papers.md, leakage.
"""

import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import HfArgumentParser

from modeling_dclip.data.captions import SOURCES, load_captions
from modeling_dclip.data.columns import row_keys
from modeling_dclip.data.failures import command
from modeling_dclip.data.teacher_targets import TeacherFeatures, compute_features, embed_pairs
from modeling_dclip.encoders.fingerprints import combine_keys, model_revision
from modeling_dclip.encoders.loading import load_checked
from modeling_dclip.evaluation.benchmarks.kinds import split_of
from modeling_dclip.evaluation.benchmarks.retrieval import metrics_from_ranks
from modeling_dclip.evaluation.benchmarks.retrieval_ranks import RetrievalRanks, retrieval_ranks
from modeling_dclip.evaluation.records import make_record, write_results
from modeling_dclip.evaluation.reports.metric_names import METRIC_TITLES
from modeling_dclip.evaluation.reports.tables import render_leakage
from modeling_dclip.evaluation.statistics import bootstrap_ratio
from modeling_dclip.modeling_dclip_teacher import DCLIPTeacher
from modeling_dclip.processing_dclip import DCLIPTeacherProcessor

CUT_OFFS = (1, 5, 10)
KEPT = tuple(f"recall@{k}" for k in CUT_OFFS) + ("_mrr",)
# (regions of another image, caption of another image, text share 0)
EXCHANGES = {
    "as_trained": (False, False, False),
    "regions_shuffled": (True, False, False),
    "captions_shuffled": (False, True, False),
    "text_share_0": (False, False, True),
    "text_share_0_regions_shuffled": (True, False, True),
}


class Draw(NamedTuple):
    """One caption of each image, and for each image another one; both `np.ndarray` of shape `(I,)`, int64."""

    captions: np.ndarray
    others: np.ndarray


def make_draws(offsets: np.ndarray, count: int, seed: int = 0) -> list[Draw]:
    """Draw captions and shuffles.

    Args:
        offsets (`np.ndarray` of shape `(I + 1,)`): Where each image's captions start; the last is the number of
            captions.
        count (`int`): Draws, >= 1.
        seed (`int`, *optional*, defaults to 0): Another seed is another set of draws.

    Returns:
        `list[Draw]`

    Raises:
        ValueError: If there are fewer than two images, one has no caption, or `count` is below 1.
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
def pair_embeds(teacher: Any, features: TeacherFeatures, draw: Draw, condition: str) -> torch.Tensor:
    """What stands for each image under a condition: `(I, D)`, float32.

    Args:
        teacher ([`DCLIPTeacher`]): In eval mode, on the device to use; its config is as it was afterwards.
        features ([`TeacherFeatures`]): Of I images.
        draw ([`Draw`]): Captions and shuffle.
        condition (`str`): A key of `EXCHANGES`, or `whole_image`.
    """
    if condition == "whole_image":
        return torch.from_numpy(features.image_embeds.astype(np.float32))
    regions, captions, without_text = EXCHANGES[condition]
    text_share = teacher.config.text_share
    try:
        teacher.config.text_share = 0.0 if without_text else text_share
        return embed_pairs(
            teacher,
            features,
            draw.others if regions else np.arange(len(draw.others)),
            draw.captions[draw.others] if captions else draw.captions,
        )
    finally:
        teacher.config.text_share = text_share


def _named(metrics: dict[str, float]) -> dict[str, float]:
    """Those that have a chance level; with one right answer each,
    mean average precision would repeat the mean reciprocal rank.
    """
    return {name.replace("image", "teacher"): value for name, value in metrics.items() if name.endswith(KEPT)}


def chance_metrics(images: int) -> dict[str, float]:
    """The metrics' expectation under a random order of `images`, one of which is right.

    Example:
        >>> chance_metrics(4)["text_to_teacher_recall@1"]
        0.25
    """
    recalls = {f"recall@{k}": min(k / images, 1.0) for k in CUT_OFFS}
    expected = recalls | {"mrr": float(np.mean(1 / np.arange(1, images + 1)))}
    return {
        f"{way}_{name}": value for way in ("text_to_teacher", "teacher_to_text") for name, value in expected.items()
    }


def _summarise(ranks: Sequence[RetrievalRanks], seed: int) -> dict[str, Any]:
    """Means over draws, the draws themselves, and intervals over images of each image's mean hit over draws."""
    drawn = [_named(metrics_from_ranks(one, CUT_OFFS)) for one in ranks]
    draws = {name: [metrics[name] for metrics in drawn] for name in drawn[0]}
    intervals = {}
    for name, way in (("text_to_teacher_recall@1", "text_to_image"), ("teacher_to_text_recall@1", "image_to_text")):
        hits = torch.stack([(getattr(one, way) == 1).double() for one in ranks]).mean(dim=0)
        intervals[name] = bootstrap_ratio(hits, torch.ones_like(hits), seed=seed).to_dict()
    metrics = {name: float(np.mean(values)) for name, values in draws.items()}
    return {"metrics": metrics, "draws": draws, "intervals": intervals}


def measure_leakage(
    teacher: Any, features: TeacherFeatures, *, draws: int = 5, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """A teacher's retrieval under every condition; see the module's text for what is measured.

    Args:
        teacher ([`DCLIPTeacher`]): On the device to use.
        features ([`TeacherFeatures`]): Of the test images, from the CLIP inside this teacher.
        draws (`int`, *optional*, defaults to 5): Draws of captions and shuffles.
        seed (`int`, *optional*, defaults to 0): Of the draws and of the intervals.

    Returns:
        `dict[str, dict]`: By condition, `metrics` (means over draws), and but for `chance` `draws` (each metric's
            values) and `intervals` of the two R@1, which cover **images** for this teacher, not trainings of it.

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
    spec: str,
    output: str | Path,
    *,
    cache_dir: str | Path,
    draws: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    command: str = "",
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure trained teachers and write a results file: one record for each teacher and condition.

    Args:
        teachers (`Sequence[tuple[str, str or Path]]`): Label and folder. One label on several: trainings with several
            seeds.
        dataset (`datasets.Dataset`): With `image_id`, `image`, `captions`, and where it has them `boxes`,
            `box_scores`; without, the whole image is the one region.
        spec (`str`): What the dataset was loaded from, for the records.
        output (`str` or `Path`): A `.json` file.
        cache_dir (`str` or `Path`): Where the frozen CLIP's features are kept; teachers around one CLIP share them.
        draws, seed: As in [`measure_leakage`].
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where to compute.
        command (`str`, *optional*): What the user ran, for the records.
        options: `max_regions`, `batch_size`, `num_workers` of
            [`~modeling_dclip.data.teacher_targets.compute_features`].

    Returns:
        `list[dict]`: The records, for [`~modeling_dclip.evaluation.reports.tables.render_leakage`].

    Raises:
        ValueError: As in [`measure_leakage`], or if an image, a caption or a box is bad.
    """
    keys = row_keys(dataset)
    shared = {
        "benchmark": f"leakage={spec}",
        "split": split_of(spec, SOURCES),
        "dataset_fingerprint": f"sha256:{combine_keys(keys)}",  # boxes decide too
        "n": len(dataset),
        "n_captions": sum(map(len, dataset["captions"][:])),
        "seed": seed,
        "command": command,
    }
    records = []
    for label, folder in teachers:
        teacher = load_checked(DCLIPTeacher, folder).to(device)
        processor = DCLIPTeacherProcessor.from_pretrained(folder)
        paths = compute_features(
            dataset, teacher, processor, keys=keys, cache_dir=Path(cache_dir), alone=True, **options
        )
        measured = measure_leakage(teacher, TeacherFeatures.load(paths), draws=draws, seed=seed)
        about = {"model": str(folder), "label": label, "revision": model_revision(folder, teacher)}
        records += [make_record(**shared, **about, condition=name, **result) for name, result in measured.items()]
    write_results(output, records)
    return records


@dataclass
class LeakageArguments:
    """One run of the command line."""

    teacher: list[str] = field(
        metadata={"help": "Folders of teachers, each as [LABEL=]FOLDER; one label for trainings with several seeds."}
    )
    dataset: str = field(
        default="scenes:test,n=1000", metadata={"help": "Spec of the captions; regions come from its boxes."}
    )
    output: str = field(default="leakage.json", metadata={"help": "Results file."})
    draws: int = field(default=5, metadata={"help": "Draws of captions and shuffles."})
    seed: int = field(default=0, metadata={"help": "Of the draws, the intervals, and where the spec ends in @COUNT."})
    max_regions: int | None = field(default=None, metadata={"help": "Best-scored regions kept, as in training."})
    batch_size: int = field(default=16, metadata={"help": "Images a forward pass, each with all its regions."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode and crop."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compute."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where features are kept; by default nowhere after the run."}
    )


def _labelled(name: str) -> tuple[str, str]:
    """Label and folder; a folder's own name may hold `=`, and a Hub id is its own label too."""
    return (name, name) if "=" not in name or Path(name).is_dir() else name.partition("=")[::2]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    words = sys.argv[1:] if argv is None else list(argv)
    (arguments,) = HfArgumentParser(LeakageArguments).parse_args_into_dataclasses(words)
    teachers = [_labelled(name) for name in arguments.teacher]
    options = {
        name: getattr(arguments, name) for name in ("draws", "seed", "max_regions", "batch_size", "num_workers")
    }
    dataset = load_captions(arguments.dataset, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        records = evaluate_leakage(
            teachers,
            dataset,
            arguments.dataset,
            arguments.output,
            cache_dir=arguments.cache_dir or temporary,
            device=arguments.device,
            command=shlex.join(["python", "-m", "modeling_dclip.evaluation.leakage", *words]),
            **options,
        )
    tables = [render_leakage(records, metric=name) for name in METRIC_TITLES if "teacher" in name]
    sys.stdout.write("\n\n".join([*tables, f"Written to {arguments.output}\n"]))


if __name__ == "__main__":
    main()
