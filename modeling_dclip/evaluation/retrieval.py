"""Retrieval in both directions with any number of captions per image: ranks first, every metric from them.

The similarity matrix exists one tile at a time. Ties count **against** the model: another image or caption whose cosine is
equal to, or less than [`TIE_TOLERANCE`] below, the relevant one's ranks before it, so a collapsed model scores at the floor and
equal embeddings do not depend on rounding, tiling or order. Relevant captions of one image that tie rank by index among themselves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from modeling_dclip.evaluation.embedding import embed_dataset

# Four units in the last place of 1.0 in float32: what a dot product of unit vectors may move by when it is summed in another order.
TIE_TOLERANCE = 4 * torch.finfo(torch.float32).eps


class RetrievalRanks(NamedTuple):
    """Where the relevant items came, one entry per caption; 1 is first.

    Attributes:
        text_to_image (`torch.Tensor` of shape `(C,)`): int64; the rank of the caption's image among all images.
        image_to_text (`torch.Tensor` of shape `(C,)`): int64; the rank of the caption among all captions for its own image. The best
            of an image's ranks is the rank of its first hit.
        image_of_caption (`torch.Tensor` of shape `(C,)`): int64.
    """

    text_to_image: torch.Tensor
    image_to_text: torch.Tensor
    image_of_caption: torch.Tensor


def _unit_rows(embeds: torch.Tensor, name: str) -> torch.Tensor:
    if embeds.ndim != 2 or not embeds.numel():
        raise ValueError(f"Expected {name} of shape (rows, width), not empty, got {tuple(embeds.shape)}.")
    embeds = embeds.float()
    bad = (~torch.isfinite(embeds).all(dim=1)) | (embeds == 0).all(dim=1)
    if bad.any():
        rows = bad.nonzero()[:5, 0].tolist()
        raise ValueError(
            f"Expected finite, non-zero rows in {name}, got {int(bad.sum())} bad ones, the first at {rows}."
        )
    return torch.nn.functional.normalize(embeds, dim=1)


def _check_owners(image_of_caption: torch.Tensor, images: int, captions: int) -> torch.Tensor:
    if image_of_caption.shape != (captions,) or image_of_caption.is_floating_point():
        raise ValueError(
            f"Expected image_of_caption as {captions} integers, one per caption, got {image_of_caption.dtype} of shape "
            f"{tuple(image_of_caption.shape)}."
        )
    outside = (image_of_caption < 0) | (image_of_caption >= images)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"Expected image_of_caption in [0, {images}), got {int(image_of_caption[row])} for caption {row}."
        )
    count = torch.bincount(image_of_caption.long(), minlength=images)
    if (count == 0).any():
        rows = (count == 0).nonzero()[:5, 0].tolist()
        raise ValueError(
            f"Expected at least one caption per image, got none for {int((count == 0).sum())} images, the first at {rows}. "
            f"Remove these images."
        )
    return count


@torch.no_grad()
def retrieval_ranks(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_of_caption: torch.Tensor, *, chunk_size: int = 1024
) -> RetrievalRanks:
    """Rank every relevant pair in both directions.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): Any scale and float type; normalised here, computed in float32.
        text_embeds (`torch.Tensor` of shape `(C, D)`): Likewise, on the same device.
        image_of_caption (`torch.Tensor` of shape `(C,)`): Row in `image_embeds` of each caption's image; every image at least once.
        chunk_size (`int`, *optional*, defaults to 1024): Captions in a tile; it has four times as many images. Does not change the result.

    Returns:
        [`RetrievalRanks`]: On the CPU. Resample by image for intervals: an image's captions are not independent.

    Raises:
        ValueError: If widths differ, something is empty, zero or not finite, an index is out of range, or an image has no caption.
    """
    if chunk_size < 1:
        raise ValueError(f"Expected chunk_size >= 1, got {chunk_size}.")
    images, texts = _unit_rows(image_embeds, "image_embeds"), _unit_rows(text_embeds, "text_embeds")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"Expected embeddings of one width, got {images.shape[1]} for images and {texts.shape[1]} for texts. Do both come "
            f"from one model?"
        )
    count = _check_owners(image_of_caption, len(images), len(texts))
    device = images.device
    owners = image_of_caption.to(device=device, dtype=torch.long)

    # Images with the most captions first: those with a j-th caption are then a prefix, and ragged captions waste no work.
    by_count = torch.argsort(count.to(device), descending=True, stable=True)
    place = torch.empty_like(by_count)
    place[by_count] = torch.arange(len(by_count), device=device)
    images, owners = images[by_count], place[owners]
    slot, slots = _position_in_group(owners), int(count.max())

    relevant = (texts * images[owners]).sum(dim=1)  # (C,)
    bar = torch.full(
        (len(images), slots), torch.inf, device=device
    )  # what a wrong caption must reach to come before slot j
    bar[owners, slot] = relevant - TIE_TOLERANCE
    before_image, before_caption = _count_wrong_before(
        texts, images, owners, relevant - TIE_TOLERANCE, bar, chunk_size
    )
    image_to_text = before_caption[owners, slot] + _rank_within_group(owners, relevant)
    return RetrievalRanks((before_image + 1).cpu(), image_to_text.cpu(), image_of_caption.long().cpu())


def _position_in_group(groups: torch.Tensor) -> torch.Tensor:
    """0, 1, 2... within each group, in the order given: [4, 7, 4, 4] -> [0, 0, 1, 2]."""
    order = torch.argsort(groups, stable=True)
    ordered = groups[order]
    index = torch.arange(len(groups), device=groups.device)
    is_start = torch.ones_like(ordered, dtype=torch.bool)
    is_start[1:] = ordered[1:] != ordered[:-1]
    start = torch.cummax(torch.where(is_start, index, 0), dim=0).values
    position = torch.empty_like(groups)
    position[order] = index - start
    return position


def _rank_within_group(groups: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """1 for the highest score of a group, 2 for the next...; ties by index."""
    order = torch.argsort(scores, descending=True, stable=True)
    rank = torch.empty_like(groups)
    rank[order] = _position_in_group(groups[order]) + 1
    return rank


def _count_wrong_before(
    texts: torch.Tensor,
    images: torch.Tensor,
    owners: torch.Tensor,
    text_bar: torch.Tensor,
    image_bar: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count, tile by tile, the wrong items that reach the bars: images per caption (C,), and captions per image and slot (I, slots)."""
    device = texts.device
    before_image = torch.zeros(len(texts), dtype=torch.long, device=device)
    before_caption = torch.zeros(image_bar.shape, dtype=torch.long, device=device)
    images_with_slot = torch.isfinite(image_bar).sum(dim=0).tolist()
    flags = torch.empty(
        min(chunk_size, len(texts)) * min(4 * chunk_size, len(images)), device=device
    )  # summing floats is fastest
    for left in range(0, len(images), 4 * chunk_size):
        image_chunk = images[left : left + 4 * chunk_size]
        for top in range(0, len(texts), chunk_size):
            tile = texts[top : top + chunk_size] @ image_chunk.T
            own = owners[top : top + chunk_size] - left
            inside = ((own >= 0) & (own < tile.shape[1])).nonzero()[:, 0]
            tile[inside, own[inside]] = -torch.inf
            reached = flags[: tile.numel()].view(tile.shape)
            torch.ge(tile, text_bar[top : top + chunk_size, None], out=reached)
            before_image[top : top + chunk_size] += reached.sum(dim=1).long()
            for slot, total in enumerate(images_with_slot):
                width = min(total - left, tile.shape[1])
                if width <= 0:
                    break
                torch.ge(tile[:, :width], image_bar[left : left + width, slot], out=reached[:, :width])
                before_caption[left : left + width, slot] += reached[:, :width].sum(dim=0).long()
    return before_image, before_caption


def metrics_from_ranks(ranks: RetrievalRanks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Turn ranks into metrics.

    Text to image asks one question per caption, image to text one per image. Recall@k: any relevant item among the first k. MRR: mean
    of 1 / rank of the first relevant item. mAP: mean over questions of the average precision over **all** relevant items; with one
    relevant image per caption, `text_to_image_map` equals `text_to_image_mrr`.

    Args:
        ranks ([`RetrievalRanks`]): From [`retrieval_ranks`].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs, >= 1.

    Returns:
        `dict[str, float]`: `{text_to_image,image_to_text}_{recall@k,mrr,map}`, in [0, 1].

    Raises:
        ValueError: If a cut-off is below 1 or there is none.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"Expected cut-offs >= 1, got {tuple(ks)}.")
    owners = ranks.image_of_caption
    images = int(owners.max()) + 1
    first = torch.full((images,), torch.iinfo(torch.long).max).scatter_reduce(0, owners, ranks.image_to_text, "amin")
    found = _rank_within_group(
        owners, -ranks.image_to_text.double()
    )  # relevant captions seen up to and including this one
    precision = torch.zeros(images, dtype=torch.double).index_add(0, owners, found.double() / ranks.image_to_text)
    average_precision = precision / torch.bincount(owners, minlength=images)
    metrics = {}
    for direction, rank, precisions in (
        ("text_to_image", ranks.text_to_image, 1 / ranks.text_to_image.double()),
        ("image_to_text", first, average_precision),
    ):
        metrics |= {f"{direction}_recall@{k}": float((rank <= k).double().mean()) for k in ks}
        metrics[f"{direction}_mrr"] = float((1 / rank.double()).mean())
        metrics[f"{direction}_map"] = float(precisions.mean())
    return metrics


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_of_caption: torch.Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Recall@k, MRR and mAP in both directions: [`retrieval_ranks`], then [`metrics_from_ranks`].

    Args:
        image_embeds, text_embeds, image_of_caption, chunk_size: As in [`retrieval_ranks`].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs of recall.

    Returns:
        `dict[str, float]`: `{text_to_image,image_to_text}_{recall@k,mrr,map}`, in [0, 1].

    Raises:
        ValueError: As in [`retrieval_ranks`] and [`metrics_from_ranks`].

    Example:
        >>> retrieval_metrics(torch.eye(3), torch.eye(3), torch.arange(3))["text_to_image_recall@1"]
        1.0
    """
    return metrics_from_ranks(retrieval_ranks(image_embeds, text_embeds, image_of_caption, chunk_size=chunk_size), ks)


def evaluate_retrieval(
    model: torch.nn.Module,
    processor: Any,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Any]:
    """Embed a dataset and measure retrieval on it.

    Args:
        model, processor, dataset, batch_size, device, num_workers: As in [`~modeling_dclip.evaluation.embedding.embed_dataset`].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Cut-offs of recall.

    Returns:
        `dict[str, Any]`: The floats of [`retrieval_metrics`], `n` images, `n_captions`, and `ranks` ([`RetrievalRanks`]) for intervals.

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`~modeling_dclip.evaluation.embedding.embed_dataset`] and [`retrieval_ranks`].
    """
    embeddings = embed_dataset(
        model, processor, dataset, batch_size=batch_size, device=device, num_workers=num_workers
    )
    ranks = retrieval_ranks(*embeddings)
    return {
        **metrics_from_ranks(ranks, ks),
        "n": len(embeddings.image_embeds),
        "n_captions": len(embeddings.text_embeds),
        "ranks": ranks,
    }
