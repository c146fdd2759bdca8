"""Retrieval in both directions with any number of captions per image: of embeddings, and of a model on a dataset.

What the metrics mean: [`~modeling_dclip.encoders.retrieval_ranks`].
"""

from collections.abc import Hashable, Sequence

import torch
from datasets import Dataset

from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.retrieval_ranks import (
    check_cut_offs,
    metrics_from_outcomes,
    outcomes_from_ranks,
    retrieval_ranks,
)
from modeling_dclip.evaluation.benchmarks.retrieval_index import approximate_ranks, find_faiss
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset
from modeling_dclip.evaluation.records import BenchmarkResult


def _measure(
    embeddings: DatasetEmbeddings, ks: Sequence[int], index: str | None, depth: int, chunk_size: int | None = None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and their outcomes, by tiles or by an index."""
    reached = None if index is None else depth
    check_cut_offs(ks, reached)  # before the work
    index_recalls: dict[str, float] = {}
    if index is None:
        ranks = retrieval_ranks(*embeddings, chunk_size=chunk_size)
    else:
        ranks, index_recalls = approximate_ranks(*embeddings, index=index, ks=ks, depth=depth)
    outcomes = outcomes_from_ranks(ranks, ks, depth=reached)
    return metrics_from_outcomes(ranks, outcomes) | index_recalls, outcomes


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_of_caption: torch.Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int | None = None,
    index: str | None = None,
    depth: int = 100,
) -> dict[str, float]:
    """Recall@k, MRR, mAP and median rank in both directions: ranks, then the metrics of
    [`~modeling_dclip.encoders.retrieval_ranks.metrics_from_ranks`].

    Args:
        image_embeds, text_embeds, image_of_caption, chunk_size: As in
            [`~modeling_dclip.encoders.retrieval_ranks.retrieval_ranks`].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs of recall.
        index (`str`, *optional*): `"faiss"` or `"faiss:FACTORY"` searches an approximate index instead of everything,
            for sets too large for that: [`~modeling_dclip.evaluation.benchmarks.retrieval_index.approximate_ranks`].
        depth (`int`, *optional*, defaults to 100): Answers to ask the index for; ignored without one.

    Returns:
        `dict[str, float]`: Those of `metrics_from_ranks`. With an index, MRR and mAP are cut off (`mrr@100`,
            `map@100`) and `{text_to_image,image_to_text}_index_recall@k` say which share of the exact first k answers
            the index found.

    Raises:
        ImportError: If an index is asked for and `faiss-cpu` is not installed.
        ValueError: As in [`~modeling_dclip.encoders.retrieval_ranks.retrieval_ranks`],
            [`~modeling_dclip.encoders.retrieval_ranks.metrics_from_ranks`] and
            [`~modeling_dclip.evaluation.benchmarks.retrieval_index.approximate_ranks`].

    Example:
        >>> retrieval_metrics(torch.eye(3), torch.eye(3), torch.arange(3))["text_to_image_recall@1"]
        1.0
    """
    embeddings = DatasetEmbeddings(image_embeds, text_embeds, image_of_caption)
    return _measure(embeddings, ks, index, depth, chunk_size)[0]


def embeddings_of_pairs(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_ids: Sequence[Hashable]
) -> DatasetEmbeddings:
    """Separate pairs, one for each caption with its image's embedding, into images and captions.

    Args:
        image_embeds (`torch.Tensor` of shape `(C, D)`): The image of each caption; the same for captions of one image.
        text_embeds (`torch.Tensor` of shape `(C, D)`): The captions.
        image_ids (`Sequence[Hashable]` of length C): Equal for captions of one image.

    Returns:
        [`DatasetEmbeddings`]: Images in the order of their first captions. Not normalised.

    Raises:
        ValueError: If the lengths differ, or one id has two different image embeddings.

    Example:
        >>> embeddings_of_pairs(torch.eye(3)[[0, 1, 0]], torch.eye(3), ["a", "b", "a"]).image_of_caption.tolist()
        [0, 1, 0]
    """
    if not len(image_embeds) == len(text_embeds) == len(image_ids):
        raise ValueError(
            f"Expected as many image embeddings as text embeddings and ids, got {len(image_embeds)}, "
            f"{len(text_embeds)} and {len(image_ids)}."
        )
    rows: dict[Hashable, int] = {}
    owners = torch.tensor([rows.setdefault(image_id, len(rows)) for image_id in image_ids], dtype=torch.long)
    first = torch.full((len(rows),), len(owners)).scatter_reduce(0, owners, torch.arange(len(owners)), "amin")
    images = image_embeds[first]
    for start in range(0, len(owners), 4096):
        differs = (image_embeds[start : start + 4096] != images[owners[start : start + 4096]]).any(dim=1)
        if differs.any():
            row = start + int(differs.nonzero()[0])
            raise ValueError(
                f"Expected one embedding for each image, got two for {image_ids[row]!r}: rows "
                f"{int(first[owners[row]])} and {row} differ. Embed each image once, or give different images "
                "different ids."
            )
    return DatasetEmbeddings(images, text_embeds, owners)


def evaluate_retrieval(
    encoder: Encoder, dataset: Dataset, *, ks: Sequence[int] = (1, 5, 10), index: str | None = None, depth: int = 100
) -> BenchmarkResult:
    """Embed a dataset and measure retrieval on it, both on the encoder's device.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): As in [`~modeling_dclip.evaluation.embedding.embed_dataset`].
        dataset (`datasets.Dataset`): With `image`, `captions` and, for messages, `image_id`.
        ks, index, depth: As in [`retrieval_metrics`].

    Returns:
        `BenchmarkResult`: The floats of [`retrieval_metrics`], `n` images, `n_captions`, and `outcomes` for intervals
            ([`~modeling_dclip.encoders.retrieval_ranks.outcomes_from_ranks`]).

    Raises:
        ImportError: If an index is asked for and `faiss-cpu` is not installed.
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`retrieval_metrics`] and [`~modeling_dclip.evaluation.embedding.embed_dataset`].
    """
    if index is not None:
        find_faiss(index)  # before the work
    embeddings = embed_dataset(encoder, dataset)
    moved = DatasetEmbeddings(*(part.to(encoder.compute_device) for part in embeddings))
    metrics, outcomes = _measure(moved, ks, index, depth)
    return {
        **metrics,
        "n": len(embeddings.image_embeds),
        "n_captions": len(embeddings.text_embeds),
        "outcomes": outcomes,
    }
