"""What a model finds: a page of queries with their first answers, hit or miss, that opens in any browser without a network.

Two files do the work: here queries are chosen and answered, [`~modeling_dclip.evaluation.gallery_page`] draws them. Ranks are those of
[`~modeling_dclip.evaluation.retrieval.retrieval_ranks`], and answers are shown in the order those ranks mean: of equal scores the right
answer comes last. The similarity matrix is never held, only the rows of the chosen queries.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from modeling_dclip.data.files import replacing
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset
from modeling_dclip.evaluation.gallery_page import render_page
from modeling_dclip.evaluation.retrieval import TIE_TOLERANCE, RetrievalRanks, metrics_from_ranks, retrieval_ranks

CHOICES = {
    "random": "Drawn at random",
    "worst": "Worst misses",
    "hits": "Hits, the surest first",
}
DIRECTIONS = ("text_to_image", "image_to_text")


class Answer(NamedTuple):
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
    """A question and what the model said.

    Attributes:
        item (`int`): Number of the caption, or row of the image, that asks.
        answers (`list[Answer]`): The first ones, in order.
        rank (`int`): Of the first right answer; 1 is first.
        best (`Answer`): That answer, wherever it came.
    """

    item: int
    answers: list[Answer]
    rank: int
    best: Answer


def choose_queries(
    ranks: torch.Tensor, scores: torch.Tensor, owners: torch.Tensor, choice: str, count: int, seed: int = 0
) -> list[int]:
    """Choose queries by how they went, at most one an image.

    Args:
        ranks (`torch.Tensor` of shape `(Q,)`): Of each query's first right answer.
        scores (`torch.Tensor` of shape `(Q,)`): Cosine of that answer.
        owners (`torch.Tensor` of shape `(Q,)`): The image of each query.
        choice (`str`): `"random"`; `"worst"`, the highest ranks, of equal ones the lowest scores, and no hits at 1; `"hits"`, those at 1, the
            highest scores first.
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
    best[ranks.image_of_caption[order]] = order  # of an image's captions the last written has the smallest rank
    return best


def _first_answers(scores: torch.Tensor, right: torch.Tensor, top: int) -> list[Answer]:
    """In the order that ranks mean: another answer within the tolerance comes before a right one."""
    order = torch.argsort(scores - TIE_TOLERANCE * right, descending=True, stable=True)
    # Equal after the tolerance's subtraction: the wrong one first.
    first = sorted(
        order[: 4 * top].tolist(), key=lambda i: (-float(scores[i] - TIE_TOLERANCE * right[i]), bool(right[i]))
    )
    return [Answer(item, float(scores[item]), bool(right[item])) for item in first[:top]]


def answer_queries(
    embeddings: DatasetEmbeddings,
    ranks: RetrievalRanks,
    *,
    choices: Sequence[str] = tuple(CHOICES),
    count: int = 8,
    top: int = 5,
    seed: int = 0,
) -> dict[str, dict[str, list[Query]]]:
    """Choose queries in both directions and answer them.

    Args:
        embeddings ([`~modeling_dclip.evaluation.embedding.DatasetEmbeddings`]): Of the whole dataset.
        ranks ([`RetrievalRanks`]): Of these.
        choices (`Sequence[str]`, *optional*): Of `CHOICES`; all if not given.
        count (`int`, *optional*, defaults to 8): Queries of each choice and direction, at most.
        top (`int`, *optional*, defaults to 5): Answers of each.
        seed (`int`, *optional*, defaults to 0): Of the random choice.

    Returns:
        `dict[str, dict[str, list[Query]]]`: By direction and choice.

    Raises:
        ValueError: As in [`choose_queries`], or if `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"Expected one answer or more, got top={top}.")
    images, texts, owners = embeddings
    own_scores, best = _relevant_scores(embeddings), _best_captions(ranks)
    asked = {
        "text_to_image": (ranks.text_to_image, own_scores, owners),
        "image_to_text": (ranks.image_to_text[best], own_scores[best], torch.arange(len(images))),
    }
    answered: dict[str, dict[str, list[Query]]] = {}
    for direction, (first_ranks, scores, askers) in asked.items():
        answered[direction] = {}
        for choice in choices:
            queries = []
            for item in choose_queries(first_ranks, scores, askers, choice, count, seed):
                if direction == "text_to_image":
                    found, right, target = (
                        images @ texts[item],
                        torch.arange(len(images)) == owners[item],
                        owners[item],
                    )
                else:
                    found, right, target = texts @ images[item], owners == item, best[item]
                true = Answer(int(target), float(scores[item]), True)
                queries.append(Query(item, _first_answers(found, right, top), int(first_ranks[item]), true))
            answered[direction][choice] = queries
    return answered


def write_gallery(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    path: str | os.PathLike,
    *,
    title: str = "Retrieval gallery",
    about: Sequence[str] = (),
    choices: Sequence[str] = tuple(CHOICES),
    count: int = 8,
    top: int = 5,
    seed: int = 0,
    thumbnail_size: int = 192,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    embeddings: DatasetEmbeddings | None = None,
) -> None:
    """Write a page of queries, what the model answered, and where the right answer came.

    One file, about 8 KB a thumbnail: pictures are inside as data URIs, there is no script, and all text is escaped.

    Args:
        model, processor, dataset, batch_size, device, num_workers: As in [`~modeling_dclip.evaluation.embedding.embed_dataset`].
        path (`str` or `os.PathLike`): A `.html` file, written whole or not at all.
        title (`str`, *optional*): Of the page, e.g. the model's name.
        about (`Sequence[str]`, *optional*): Lines under it, e.g. the data's spec and the model's revision.
        choices (`Sequence[str]`, *optional*): Of `"random"`, `"worst"` and `"hits"`; all if not given. See [`choose_queries`].
        count (`int`, *optional*, defaults to 8): Queries of each choice and direction.
        top (`int`, *optional*, defaults to 5): Answers of each query.
        seed (`int`, *optional*, defaults to 0): Of the random choice.
        thumbnail_size (`int`, *optional*, defaults to 192): Longest side of a thumbnail in pixels.
        embeddings ([`~modeling_dclip.evaluation.embedding.DatasetEmbeddings`], *optional*): Of this model on this dataset, on the CPU, where
            they are there already.

    Raises:
        ValueError: If the file is no `.html`, a choice is unknown, a number is below 1, or an image or a caption is bad, naming it.
    """
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"Expected a .html file to write to, got {str(path)!r}.")
    unknown = [choice for choice in choices if choice not in CHOICES]
    if unknown or not choices or min(count, top, thumbnail_size) < 1:
        raise ValueError(
            f"Expected choices of {list(CHOICES)} and count, top and thumbnail_size >= 1, got {list(choices)}, {count}, {top} and "
            f"{thumbnail_size}."
        )
    if embeddings is None:
        options = {"batch_size": batch_size, "device": device, "num_workers": num_workers}
        embeddings = embed_dataset(model, processor, dataset, **options)
    ranks = retrieval_ranks(*embeddings)
    answered = answer_queries(embeddings, ranks, choices=choices, count=count, top=top, seed=seed)
    page = render_page(
        dataset,
        embeddings.image_of_caption.tolist(),
        answered,
        titles=CHOICES,
        title=title,
        about=about,
        metrics=metrics_from_ranks(ranks),
        thumbnail_size=thumbnail_size,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
