"""What a model finds: a page of queries with their first answers, right or wrong, that opens in any browser offline.

Queries are chosen and answered here; the page is made from a template. Ranks are those of
[`~modeling_dclip.encoders.retrieval_ranks.retrieval_ranks`], and answers are shown in the order of these
ranks: of equal scores the right answer comes last. The similarity matrix is never held, only the rows of the chosen
queries.

[`write_pages`] makes the pages of an evaluation: for each model and retrieval benchmark a gallery, or maps of the
image encoder.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset

from modeling_dclip.data.captions import load_captions, parse_caption_spec
from modeling_dclip.data.files import write_text
from modeling_dclip.data.images import (
    Thumbnail,
    UnreadableImageError,
    decode_image,
    make_thumbnail,
    undecoded_images,
)
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.encoders.retrieval_ranks import TIE_TOLERANCE, RetrievalRanks, metrics_from_ranks, retrieval_ranks
from modeling_dclip.evaluation.benchmarks.kinds import leave_out_unreadable
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset
from modeling_dclip.evaluation.records import Record, record_key
from modeling_dclip.evaluation.reports.document import render_page
from modeling_dclip.evaluation.reports.maps import draw_image_maps
from modeling_dclip.evaluation.reports.metric_names import percent
from modeling_dclip.evaluation.reports.tables import name_of, short_hash, shorten_paths

logger = logging.getLogger(__name__)

CHOICES = {
    "random": "Drawn at random",
    "worst": "Worst misses",
    "hits": "Hits, the surest first",
}
DIRECTIONS = ("text_to_image", "image_to_text")
LONGEST_TEXT = 600  # characters shown of a caption; a gallery is no place for a page of text


@dataclass(frozen=True)
class GalleryOptions:
    """What a gallery shows.

    Args:
        title (`str`, *optional*): Title of the page, e.g. the model's name.
        about (`Sequence[str]`, *optional*): Lines under the title, e.g. the data's spec and the model's revision.
        choices (`Sequence[str]`, *optional*): Of `"random"`, `"worst"` and `"hits"`, see [`choose_queries`]; all if
            not given.
        count (`int`, *optional*, defaults to 8): Queries of each choice and direction, at most.
        top (`int`, *optional*, defaults to 5): Answers of each query.
        seed (`int`, *optional*, defaults to 0): Of the random choice.
        thumbnail_size (`int`, *optional*, defaults to 192): Longest side of a thumbnail in pixels.

    Raises:
        ValueError: If there is no choice, a choice is unknown, or a number is below 1.
    """

    title: str = "Retrieval gallery"
    about: Sequence[str] = ()
    choices: Sequence[str] = tuple(CHOICES)
    count: int = 8
    top: int = 5
    seed: int = 0
    thumbnail_size: int = 192

    def __post_init__(self) -> None:
        unknown = [choice for choice in self.choices if choice not in CHOICES]
        if unknown or not self.choices or min(self.count, self.top, self.thumbnail_size) < 1:
            raise ValueError(
                f"Expected choices of {list(CHOICES)} and count, top and thumbnail_size >= 1, got "
                f"{list(self.choices)}, {self.count}, {self.top} and {self.thumbnail_size}."
            )


class RankedAnswer(NamedTuple):
    """One answer to a query.

    Attributes:
        item (`int`): Row of the image, or number of the caption.
        score (`float`): Cosine, in [-1, 1].
        is_right (`bool`): Whether image and caption belong together.
    """

    item: int
    score: float
    is_right: bool


class Query(NamedTuple):
    """A question and what the model answered.

    Attributes:
        item (`int`): Number of the caption, or row of the image, that asks.
        answers (`list[RankedAnswer]`): The first ones, in order.
        rank (`int`): Of the first right answer; 1 is first.
        best (`RankedAnswer`): That answer, at whatever rank.
    """

    item: int
    answers: list[RankedAnswer]
    rank: int
    best: RankedAnswer

    @property
    def is_answered(self) -> bool:
        """Whether a right answer is among the first ones."""
        return any(answer.is_right for answer in self.answers)


def choose_queries(
    ranks: torch.Tensor, scores: torch.Tensor, owners: torch.Tensor, choice: str, count: int, seed: int = 0
) -> list[int]:
    """Choose queries by how they went, at most one an image.

    Args:
        ranks (`torch.Tensor` of shape `(Q,)`): Of each query's first right answer.
        scores (`torch.Tensor` of shape `(Q,)`): Cosine of that answer.
        owners (`torch.Tensor` of shape `(Q,)`): The image of each query.
        choice (`str`): `"random"`; `"worst"`, the highest ranks, of equal ones the lowest scores, and no hits at 1;
            `"hits"`, those at 1, the highest scores first.
        count (`int`): At most so many.
        seed (`int`, *optional*, defaults to 0): Of the random choice.

    Returns:
        `list[int]`: Query numbers, in the order to show. Fewer than `count`, or none, where no more fit.

    Raises:
        ValueError: If the choice is unknown or the count is below 1.

    Example:
        >>> choose_queries(torch.tensor([1, 9, 4]), torch.zeros(3), torch.arange(3), "worst", 2)
        [1, 2]
    """
    if choice not in CHOICES or count < 1:
        raise ValueError(f"Expected one of {list(CHOICES)} and a count >= 1, got {choice!r} and {count}.")
    if choice == "random":
        order = np.random.default_rng(seed).permutation(len(ranks))
    else:
        sign = -1 if choice == "worst" else 1
        order = np.lexsort((-sign * scores.numpy(), sign * ranks.numpy()))  # the last key first
        hits = (ranks == 1).numpy()
        order = order[hits[order] == (choice == "hits")]
    chosen: list[int] = []
    seen: set[int] = set()
    for query in order.tolist():
        owner = int(owners[query])
        if owner not in seen:
            seen.add(owner)
            chosen.append(query)
        if len(chosen) == count:
            break
    return chosen


def _relevant_scores(embeddings: DatasetEmbeddings, chunk_size: int = 4096) -> torch.Tensor:
    """Cosine of every caption with its own image, `(C,)`."""
    images, texts, owners = embeddings
    return torch.cat(
        [
            (text * images[owner]).sum(dim=1)
            for text, owner in zip(texts.split(chunk_size), owners.split(chunk_size), strict=True)
        ]
    )


def _best_captions(ranks: RetrievalRanks) -> torch.Tensor:
    """Number of each image's first caption in the image's own ranking, `(I,)`."""
    order = torch.argsort(ranks.image_to_text, descending=True, stable=True)
    best = torch.empty(int(ranks.image_of_caption.max()) + 1, dtype=torch.long)
    best[ranks.image_of_caption[order]] = order  # the last caption written for an image has its smallest rank
    return best


def _first_answers(scores: torch.Tensor, right: torch.Tensor, top: int) -> list[RankedAnswer]:
    """The first answers in the order of the ranks: a wrong answer within the tolerance comes before a right one."""
    order = torch.argsort(scores - TIE_TOLERANCE * right, descending=True, stable=True)
    # Where both are equal after the tolerance is subtracted, the wrong answer comes first.
    first = sorted(
        order[: 4 * top].tolist(), key=lambda i: (-float(scores[i] - TIE_TOLERANCE * right[i]), bool(right[i]))
    )
    return [RankedAnswer(item, float(scores[item]), bool(right[item])) for item in first[:top]]


def answer_queries(
    embeddings: DatasetEmbeddings, ranks: RetrievalRanks, options: GalleryOptions
) -> dict[str, dict[str, list[Query]]]:
    """Choose queries in both directions and answer them.

    Args:
        embeddings ([`~modeling_dclip.evaluation.embedding.DatasetEmbeddings`]): Of the whole dataset.
        ranks ([`~modeling_dclip.encoders.retrieval_ranks.RetrievalRanks`]): Of these embeddings.
        options ([`GalleryOptions`]): Which queries, how many, and how many answers of each.

    Returns:
        `dict[str, dict[str, list[Query]]]`: By direction and choice.
    """
    images, texts, owners = embeddings
    own_scores, best = _relevant_scores(embeddings), _best_captions(ranks)
    asked = {
        "text_to_image": (ranks.text_to_image, own_scores, owners),
        "image_to_text": (ranks.image_to_text[best], own_scores[best], torch.arange(len(images))),
    }
    answered: dict[str, dict[str, list[Query]]] = {}
    for direction, (first_ranks, scores, askers) in asked.items():
        answered[direction] = {}
        for choice in options.choices:
            queries = []
            for item in choose_queries(first_ranks, scores, askers, choice, options.count, options.seed):
                if direction == "text_to_image":
                    found, target = images @ texts[item], owners[item]
                    right = torch.arange(len(images)) == target
                else:
                    found, right, target = texts @ images[item], owners == item, best[item]
                answers = _first_answers(found, right, options.top)
                true = RankedAnswer(int(target), float(scores[item]), True)
                queries.append(Query(item, answers, int(first_ranks[item]), true))
            answered[direction][choice] = queries
    return answered


def _make_thumbnails(
    dataset: Dataset, rows: Iterable[int], size: int
) -> tuple[dict[int, Thumbnail], dict[int, UnreadableImageError]]:
    """The thumbnails by row, and why the others cannot be shown."""
    made: dict[int, Thumbnail] = {}
    broken: dict[int, UnreadableImageError] = {}
    images = undecoded_images(dataset)
    for row in rows:
        try:
            made[row] = make_thumbnail(decode_image(images, row), size)
        except UnreadableImageError as error:
            broken[row] = error
    if broken:
        logger.warning(
            "%d pictures cannot be shown and have a placeholder, the first: %s",
            len(broken),
            next(iter(broken.values())),
        )
    return made, broken


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT].rstrip()}…"


def render_gallery(
    dataset: Dataset,
    answered: Mapping[str, Mapping[str, Sequence[Query]]],
    metrics: Mapping[str, float],
    options: GalleryOptions,
) -> str:
    """Render answered queries as a page.

    Args:
        dataset (`datasets.Dataset`): With `image` and `captions`, in the order of the queries' rows. `image_id` is
            shown; a number where there is none.
        answered (`Mapping`): By direction and choice, from [`answer_queries`].
        metrics (`Mapping[str, float]`): Shares in [0, 1]; the recalls are shown.
        options ([`GalleryOptions`]): Title, lines under it, size of thumbnails.

    Returns:
        `str`: A whole HTML document. A picture that cannot be decoded has a placeholder, and the page names it.
    """
    if "image_id" not in dataset.column_names:
        dataset = dataset.add_column("image_id", [f"row {row}" for row in range(len(dataset))])
    recalls = {
        direction: [
            (name.rpartition("@")[2], percent(value))
            for name, value in metrics.items()
            if name.startswith(f"{direction}_recall@")
        ]
        for direction in DIRECTIONS
    }
    queries = {way: [query for own in by_choice.values() for query in own] for way, by_choice in answered.items()}
    rows = [answer.item for query in queries["text_to_image"] for answer in [*query.answers, query.best]]
    rows += [query.item for query in queries["image_to_text"]]
    thumbnails, broken = _make_thumbnails(dataset, dict.fromkeys(rows), options.thumbnail_size)
    return render_page(
        "gallery.html.jinja",
        options=options,
        titles=CHOICES,
        answered=answered,
        recalls=recalls,
        ids=dataset["image_id"][:],
        captions=[_shorten(caption) for own in dataset["captions"][:] for caption in own],
        thumbnails=thumbnails,
        broken=broken,
    )


def write_gallery(
    encoder: Encoder | None,
    dataset: Dataset,
    path: str | os.PathLike,
    *,
    embeddings: DatasetEmbeddings | None = None,
    options: GalleryOptions | None = None,
) -> None:
    """Write a page of queries, what the model answered, and at which rank the right answer came.

    It is one file of about 8 KB a thumbnail: pictures are inside as data URIs, there is no script, and all text is
    escaped.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): The model with its processor; not read if `embeddings` are
            given.
        dataset (`datasets.Dataset`): As in [`~modeling_dclip.evaluation.embedding.embed_dataset`].
        path (`str` or `os.PathLike`): A `.html` file, written whole or not at all.
        embeddings ([`~modeling_dclip.evaluation.embedding.DatasetEmbeddings`], *optional*): Of this model on this
            dataset, on the CPU, if they were computed before.
        options ([`GalleryOptions`], *optional*): What the page shows.

    Raises:
        ValueError: If the file is no `.html`, there are neither encoder nor embeddings, or, without embeddings, an
            image or a caption is bad; the message names it.
    """
    options = GalleryOptions() if options is None else options
    if Path(path).suffix.lower() != ".html":
        raise ValueError(f"Expected a .html file to write to, got {str(path)!r}.")
    if embeddings is None:
        if encoder is None:
            raise ValueError("Expected an encoder or its embeddings of the dataset, got neither.")
        embeddings = embed_dataset(encoder, dataset)
    ranks = retrieval_ranks(*embeddings)
    answered = answer_queries(embeddings, ranks, options)
    write_text(path, render_gallery(dataset, answered, metrics_from_ranks(ranks), options))


def page_name(record: Record) -> str:
    """The stem of a page's file: it says model and benchmark, and differs for different weights or data.

    Args:
        record (`Record`): From [`~modeling_dclip.evaluation.evaluator.evaluate`].
    """
    [shown] = shorten_paths([record])
    words = f"{name_of(shown)} {shown['benchmark'].partition('=')[2]}"
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', words).strip('-')[-80:]}-{record_key(record)[:6]}"


def write_pages(
    records: Sequence[Record],
    *,
    gallery: str | os.PathLike | None = None,
    maps: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    on_bad_image: str = "raise",
) -> list[Path]:
    """Write the pages of every record of retrieval. Each model is loaded again, and the data is embedded again.

    Args:
        records (`Sequence[Record]`): From [`~modeling_dclip.evaluation.evaluator.evaluate`]. Other benchmarks, and
            points between two models, have no page.
        gallery (`str` or `os.PathLike`, *optional*): Folder of HTML pages, see [`write_gallery`].
        maps (`str` or `os.PathLike`, *optional*): Folder of pictures, see
            [`~modeling_dclip.evaluation.reports.maps.draw_image_maps`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code that comes with a model.
        device, batch_size, num_workers: As in [`~modeling_dclip.encoders.Encoder`].
        seed (`int`, *optional*, defaults to 0): Of the gallery's random choice.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): As in
            [`~modeling_dclip.evaluation.benchmarks.kinds.EvaluationOptions`].

    Returns:
        `list[Path]`: The files written.

    Raises:
        WrongModelError: If maps are asked of a model that is neither a CLIP or DCLIP with a ViT nor a DM-CLIP.
        ValueError: If the data or a model cannot be read; the message names it.
    """
    pages = []
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind != "retrieval" or "condition" in record or not (gallery or maps):
            continue
        model, processor, revision = load_dual_encoder(record["model"], trust_remote_code=trust_remote_code)
        encoder = Encoder(model, processor, batch_size, device, num_workers)
        dataset, stem = load_captions(spec, seed=record["seed"]), page_name(record)
        if on_bad_image == "skip":
            dataset, _ = leave_out_unreadable(record["benchmark"], parse_caption_spec(spec), dataset)
        if gallery:
            pages.append(Path(gallery) / f"{stem}.html")
            [shown] = shorten_paths([record])
            about = (shown["benchmark"], f"weights {short_hash(revision)}")
            options = GalleryOptions(title=name_of(shown), about=about, seed=seed)
            write_gallery(encoder, dataset, pages[-1], options=options)
        if maps:
            pages.append(Path(maps) / f"{stem}.png")
            draw_image_maps(encoder, dataset, pages[-1], rows=range(min(4, len(dataset))))
    return pages
