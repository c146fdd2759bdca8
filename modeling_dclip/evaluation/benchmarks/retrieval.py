"""Retrieval in both directions with any number of captions per image: ranks first, every metric from them.

The definitions are those of the CLIP papers:

- Text to image asks one question per **caption**: at which rank is its one image among all images?
- Image to text asks one question per **image**: at which ranks are its captions among all captions of the set?
- Recall@k is the share of questions with **any** right answer among the first k. An image with five captions needs one
  of them, not a share of the five.
- MRR is the mean of 1 / rank of the first right answer.
- mAP is the mean over questions of the average precision over **all** right answers, without a cut-off. With one right
  image per caption, `text_to_image_map` equals `text_to_image_mrr`.
- The median rank is of the first right answer; for an even number of questions it is the mean of the two middle ranks.
- R-sum is the sum of the six recalls at 1, 5 and 10.

Ties count against the model: [`~modeling_dclip.evaluation.benchmarks.retrieval_ranks.retrieval_ranks`].
"""

from collections.abc import Hashable, Mapping, Sequence

import torch
from datasets import Dataset

from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.benchmarks.retrieval_index import NOT_FOUND, approximate_ranks, find_faiss
from modeling_dclip.evaluation.benchmarks.retrieval_ranks import (
    RetrievalRanks,
    rank_within_group,
    retrieval_ranks,
)
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset
from modeling_dclip.evaluation.records import BenchmarkResult

RSUM_AT = (1, 5, 10)


def _check_cut_offs(ks: Sequence[int], depth: int | None) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"Expected cut-offs >= 1, got {tuple(ks)}.")
    if depth is not None and max(ks) > depth:
        raise ValueError(f"Expected cut-offs of at most the depth {depth} that was searched, got {tuple(ks)}.")


def _first_ranks(ranks: RetrievalRanks) -> dict[str, torch.Tensor]:
    """Rank of the first right answer of every question: (C,) from texts, (I,) from images."""
    owners = ranks.image_of_caption
    first = torch.full((int(owners.max()) + 1,), NOT_FOUND).scatter_reduce(0, owners, ranks.image_to_text, "amin")
    return {"text_to_image": ranks.text_to_image, "image_to_text": first}


def _reciprocal(ranks: torch.Tensor) -> torch.Tensor:
    return torch.where(ranks == NOT_FOUND, 0.0, 1 / ranks.double())


def outcomes_from_ranks(
    ranks: RetrievalRanks, ks: Sequence[int] = (1, 5, 10), *, depth: int | None = None
) -> dict[str, torch.Tensor]:
    """Sum and count of every image, with its captions, for each metric.

    Args:
        ranks ([`RetrievalRanks`]): From [`retrieval_ranks`], or from an index.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs of recall, >= 1.
        depth (`int`, *optional*): How many answers were searched, where not all were. MRR and mAP are then `mrr@depth`
            and `map@depth`: right answers that were not found add nothing.

    Returns:
        `dict[str, torch.Tensor]`: `{text_to_image,image_to_text}_{recall@k,mrr,map}`, each float64 of shape `(I, 2)`.
            The metric is the sum of column 0 over the sum of column 1. Resample by image for intervals.

    Raises:
        ValueError: If there is no cut-off, or one is below 1 or above the depth.
    """
    _check_cut_offs(ks, depth)
    owners, first = ranks.image_of_caption, _first_ranks(ranks)
    count = torch.bincount(owners).double()  # (I,)
    found = rank_within_group(
        owners, -ranks.image_to_text.double()
    )  # right captions seen up to and including this one

    def by_image(per_caption: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(count).index_add(0, owners, per_caption.double())

    average_precision = by_image(found * _reciprocal(ranks.image_to_text)) / count
    outcomes, suffix = {}, "" if depth is None else f"@{depth}"
    for direction, rank in first.items():
        from_texts = direction == "text_to_image"
        questions = count if from_texts else torch.ones_like(count)
        answers = {f"recall@{k}": (rank <= k).double() for k in ks}
        answers |= {f"mrr{suffix}": _reciprocal(rank)}
        answers |= {f"map{suffix}": _reciprocal(rank) if from_texts else average_precision}
        for name, values in answers.items():
            sums = by_image(values) if from_texts else values
            outcomes[f"{direction}_{name}"] = torch.stack([sums, questions], dim=1)
    return outcomes


def _metrics(ranks: RetrievalRanks, outcomes: Mapping[str, torch.Tensor]) -> dict[str, float]:
    metrics = {name: float(pairs[:, 0].sum() / pairs[:, 1].sum()) for name, pairs in outcomes.items()}
    for direction, rank in _first_ranks(ranks).items():
        ordered = rank.sort().values
        middle = ordered[[(len(rank) - 1) // 2, len(rank) // 2]]
        if int(middle[1]) != NOT_FOUND:
            metrics[f"{direction}_median_rank"] = float(middle.double().mean())
    recalls = [f"{direction}_recall@{k}" for direction in ("text_to_image", "image_to_text") for k in RSUM_AT]
    if all(name in metrics for name in recalls):
        metrics["rsum"] = sum(metrics[name] for name in recalls)
    return metrics


def metrics_from_ranks(
    ranks: RetrievalRanks, ks: Sequence[int] = (1, 5, 10), *, depth: int | None = None
) -> dict[str, float]:
    """Turn ranks into metrics; the module's text defines them.

    Args:
        ranks, ks, depth: As in [`outcomes_from_ranks`].

    Returns:
        `dict[str, float]`: `{text_to_image,image_to_text}_{recall@k,mrr,map}`, in [0, 1];
            `{text_to_image,image_to_text}_median_rank`, >= 1 (left out if the answer was not found to at least half of
            the questions); and `rsum`, in [0, 6], if 1, 5 and 10 are among the cut-offs.

    Raises:
        ValueError: As in [`outcomes_from_ranks`].
    """
    return _metrics(ranks, outcomes_from_ranks(ranks, ks, depth=depth))


def _measure(
    embeddings: DatasetEmbeddings, ks: Sequence[int], index: str | None, depth: int, chunk_size: int | None = None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and their outcomes, by tiles or by an index."""
    reached = None if index is None else depth
    _check_cut_offs(ks, reached)  # before the work
    index_recalls: dict[str, float] = {}
    if index is None:
        ranks = retrieval_ranks(*embeddings, chunk_size=chunk_size)
    else:
        ranks, index_recalls = approximate_ranks(*embeddings, index=index, ks=ks, depth=depth)
    outcomes = outcomes_from_ranks(ranks, ks, depth=reached)
    return _metrics(ranks, outcomes) | index_recalls, outcomes


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
    """Recall@k, MRR, mAP and median rank in both directions: ranks, then [`metrics_from_ranks`].

    Args:
        image_embeds, text_embeds, image_of_caption, chunk_size: As in
            [`~modeling_dclip.evaluation.benchmarks.retrieval_ranks.retrieval_ranks`].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs of recall.
        index (`str`, *optional*): `"faiss"` or `"faiss:FACTORY"` searches an approximate index instead of everything,
            for sets too large for that: [`~modeling_dclip.evaluation.benchmarks.retrieval_index.approximate_ranks`].
        depth (`int`, *optional*, defaults to 100): Answers to ask the index for; ignored without one.

    Returns:
        `dict[str, float]`: Those of [`metrics_from_ranks`]. With an index, MRR and mAP are cut off (`mrr@100`,
            `map@100`) and `{text_to_image,image_to_text}_index_recall@k` say which share of the exact first k answers
            the index found.

    Raises:
        ImportError: If an index is asked for and `faiss-cpu` is not installed.
        ValueError: As in [`~modeling_dclip.evaluation.benchmarks.retrieval_ranks.retrieval_ranks`],
            [`metrics_from_ranks`] and [`~modeling_dclip.evaluation.benchmarks.retrieval_index.approximate_ranks`].

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
            ([`outcomes_from_ranks`]).

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
