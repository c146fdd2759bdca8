"""Retrieval in both directions with any number of captions per image: exact ranks first, every metric from them.

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

The similarity matrix exists one tile at a time, in float32 whatever the type of the embeddings. Nothing else grows
faster than the number of images or captions.

Ties count **against** the model: another image or caption ranks before the relevant one if its cosine is higher,
equal, or lower by at most [`TIE_TOLERANCE`]. So a collapsed model gets the worst score, and the ranks of equal
embeddings do not depend on rounding, tiling or order. Relevant captions of one image that tie with each other rank by
index.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Four units in the last place of 1.0 in float32: a dot product of unit vectors may move by this much if it is summed
# in another order.
TIE_TOLERANCE = 4 * torch.finfo(torch.float32).eps
# Captions in a tile; it has four times as many images. A tile fits into the cache of a CPU; on a GPU it is large
# enough to make up for the launch of a kernel.
CHUNK_ON_CPU, CHUNK_ON_GPU = 512, 4096
NOT_FOUND = torch.iinfo(torch.long).max  # rank of what an approximate search did not return
RSUM_AT = (1, 5, 10)
_ROWS = 4096  # embeddings at a time outside the tiles
_WIDE = 64  # a slot with at least this many images is compared in a call of its own
_LEAST_NORM = 1e-12  # below it, `normalize` does not give a unit vector


class RetrievalRanks(NamedTuple):
    """The ranks of the relevant items, one entry per caption; 1 is first.

    Attributes:
        text_to_image (`torch.Tensor` of shape `(C,)`): int64; the rank of the caption's image among all images.
        image_to_text (`torch.Tensor` of shape `(C,)`): int64; the rank of the caption among all captions for its own
            image. The best of an image's ranks is the rank of its first hit.
        image_of_caption (`torch.Tensor` of shape `(C,)`): int64; the row of each caption's image.
    """

    text_to_image: torch.Tensor
    image_to_text: torch.Tensor
    image_of_caption: torch.Tensor


def unit_rows(embeds: torch.Tensor) -> torch.Tensor:
    """Normalise rows in float32: `(rows, D)` of any scale and float type to unit length."""
    return torch.nn.functional.normalize(embeds.float(), dim=1)


def check_rows(embeds: torch.Tensor, name: str) -> None:
    """Refuse embeddings without a direction.

    Args:
        embeds (`torch.Tensor`): Expected of shape `(rows, D)`, not empty, each row finite and not zero.
        name (`str`): For messages.

    Raises:
        ValueError: If it is something else; the message names the first bad rows.
    """
    if embeds.ndim != 2 or not embeds.numel():
        raise ValueError(f"Expected {name} of shape (rows, width), not empty, got {tuple(embeds.shape)}.")
    norms = torch.cat([rows.float().norm(dim=1) for rows in embeds.split(_ROWS)])
    bad = ~((norms >= _LEAST_NORM) & (norms < torch.inf))  # NaN is neither
    if bad.any():
        rows = bad.nonzero()[:5, 0].tolist()
        raise ValueError(
            f"Expected finite, non-zero rows in {name}, got {int(bad.sum())} bad ones, the first at {rows}. Check "
            "the model's weights."
        )


def check_embeddings(image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_of_caption: torch.Tensor) -> None:
    """Refuse embeddings that cannot be ranked.

    Args:
        image_embeds, text_embeds, image_of_caption: As in [`retrieval_ranks`].

    Raises:
        ValueError: If widths or devices differ, an input is empty, an embedding is zero or not finite, an index is out
            of range, or an image has no caption.
    """
    if image_embeds.device != text_embeds.device:
        raise ValueError(
            f"Expected embeddings on one device, got {image_embeds.device} for images and {text_embeds.device} for "
            "texts."
        )
    check_rows(image_embeds, "image_embeds")
    check_rows(text_embeds, "text_embeds")
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            f"Expected embeddings of one width, got {image_embeds.shape[1]} for images and {text_embeds.shape[1]} for "
            "texts. Do both come from one model?"
        )
    images, captions = len(image_embeds), len(text_embeds)
    if image_of_caption.shape != (captions,) or image_of_caption.is_floating_point():
        raise ValueError(
            f"Expected image_of_caption as {captions} integers, one per caption, got {image_of_caption.dtype} of "
            f"shape {tuple(image_of_caption.shape)}."
        )
    outside = (image_of_caption < 0) | (image_of_caption >= images)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"Expected image_of_caption in [0, {images}), got {int(image_of_caption[row])} for caption {row}."
        )
    lonely = (torch.bincount(image_of_caption.long(), minlength=images) == 0).nonzero()[:, 0]
    if len(lonely):
        raise ValueError(
            f"Expected at least one caption per image, got none for {len(lonely)} images, the first at "
            f"{lonely[:5].tolist()}. Remove these images."
        )


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply matrices in full float32: without autocast, and without the shorter formats that training may allow.

    Args:
        device (`torch.device`): Where the matrices are.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def retrieval_ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_of_caption: torch.Tensor,
    *,
    chunk_size: int | None = None,
) -> RetrievalRanks:
    """Rank every relevant pair in both directions.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): Any scale and float type; normalised here, computed in float32
            where it lies.
        text_embeds (`torch.Tensor` of shape `(C, D)`): Likewise, on the same device.
        image_of_caption (`torch.Tensor` of shape `(C,)`): Row in `image_embeds` of each caption's image; every image
            at least once.
        chunk_size (`int`, *optional*): Captions in a tile; it has four times as many images. Does not change the
            result. By default 512 on a CPU and 4,096 on a GPU: tiles of 8 MiB and 512 MiB, beside which only some
            vectors are held.

    Returns:
        [`RetrievalRanks`]: On the CPU. Resample by image for intervals: an image's captions are not independent.

    Raises:
        ValueError: As in [`check_embeddings`], or if `chunk_size < 1`.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"Expected chunk_size >= 1, got {chunk_size}.")
    check_embeddings(image_embeds, text_embeds, image_of_caption)
    device = image_embeds.device
    chunk_size = chunk_size or (CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ON_GPU)
    owners = image_of_caption.to(device=device, dtype=torch.long)

    # Images with the most captions first: those with a j-th caption are then a prefix, and ragged captions waste no
    # work.
    by_count = torch.argsort(torch.bincount(owners), descending=True, stable=True)
    place = torch.empty_like(by_count)
    place[by_count] = torch.arange(len(by_count), device=device)
    slot = _position_in_group(owners)
    images_with_slot = torch.bincount(slot)
    start = torch.cumsum(images_with_slot, dim=0) - images_with_slot
    own = start[slot] + place[owners]  # (C,): captions in the order of their slots, each slot an image after another

    with full_float32(device):
        relevant = torch.cat(
            [
                (unit_rows(texts) * unit_rows(image_embeds[rows])).sum(dim=1)
                for texts, rows in zip(text_embeds.split(_ROWS), owners.split(_ROWS), strict=True)
            ]
        )  # (C,)
        bar = torch.empty_like(relevant)
        bar[own] = relevant - TIE_TOLERANCE  # what a wrong caption must reach to come before
        before_image, before_caption = _count_wrong_before(
            text_embeds, image_embeds, place[owners], by_count, bar[own], bar, images_with_slot.tolist(), chunk_size
        )
    image_to_text = before_caption[own] + rank_within_group(owners, relevant)
    return RetrievalRanks((before_image + 1).cpu(), image_to_text.cpu(), image_of_caption.long().cpu())


def _position_in_group(groups: torch.Tensor) -> torch.Tensor:
    """Number the members of each group 0, 1, 2... in the order given: [4, 7, 4, 4] -> [0, 0, 1, 2]."""
    order = torch.argsort(groups, stable=True)
    ordered = groups[order]
    index = torch.arange(len(groups), device=groups.device)
    is_start = torch.ones_like(ordered, dtype=torch.bool)
    is_start[1:] = ordered[1:] != ordered[:-1]
    start = torch.cummax(torch.where(is_start, index, 0), dim=0).values
    position = torch.empty_like(groups)
    position[order] = index - start
    return position


def rank_within_group(groups: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Rank scores within each group; 1 is the highest, ties rank by index.

    Args:
        groups (`torch.Tensor` of shape `(N,)`): int64; the group of each entry.
        scores (`torch.Tensor` of shape `(N,)`): Of any float type.

    Returns:
        `torch.Tensor` of shape `(N,)`: int64, >= 1.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    rank = torch.empty_like(groups)
    rank[order] = _position_in_group(groups[order]) + 1
    return rank


def _count_wrong_before(
    texts: torch.Tensor,
    images: torch.Tensor,
    places: torch.Tensor,
    by_count: torch.Tensor,
    text_bar: torch.Tensor,
    image_bar: torch.Tensor,
    images_with_slot: list[int],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count, tile by tile, the wrong items that reach the bars, both (C,).

    The first result counts images for each caption, the second one captions in the order of `image_bar`.
    """
    device = texts.device
    before_image = torch.zeros(len(texts), dtype=torch.long, device=device)
    before_caption = torch.zeros(len(texts), dtype=torch.long, device=device)
    flags = torch.empty(
        min(chunk_size, len(texts)) * min(4 * chunk_size, len(images)), device=device
    )  # summing floats is fastest
    for left in range(0, len(images), 4 * chunk_size):
        image_chunk = unit_rows(images[by_count[left : left + 4 * chunk_size]])
        wide, narrow = _bars_of_images(images_with_slot, left, len(image_chunk), device)
        for top in range(0, len(texts), chunk_size):
            tile = unit_rows(texts[top : top + chunk_size]) @ image_chunk.T
            own = places[top : top + chunk_size] - left
            inside = ((own >= 0) & (own < tile.shape[1])).nonzero()[:, 0]
            tile[inside, own[inside]] = -torch.inf
            reached = flags[: tile.numel()].view(tile.shape)
            torch.ge(tile, text_bar[top : top + chunk_size, None], out=reached)
            before_image[top : top + chunk_size] += reached.sum(dim=1).long()
            for start, width in wide:
                torch.ge(tile[:, :width], image_bar[start : start + width], out=reached[:, :width])
                before_caption[start : start + width] += reached[:, :width].sum(dim=0).long()
            for bars, columns in narrow:
                before_caption[bars] += (tile[:, columns] >= image_bar[bars]).sum(dim=0)
    return before_image, before_caption


def _bars_of_images(
    images_with_slot: list[int], left: int, images: int, device: torch.device
) -> tuple[list[tuple[int, int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Find the bars of consecutive images.

    Slots that many of the images have come as `(start, width)`, all other slots as positions and columns.
    """
    wide, positions, columns, start = [], [], [], left
    for total in images_with_slot:
        width = min(total - left, images)
        if width <= 0:
            break
        if width >= _WIDE:
            wide.append((start, width))
        else:  # an image may have hundreds of captions: one call for each of them would be slow
            columns.append(torch.arange(width, device=device))
            positions.append(columns[-1] + start)
        start += total
    if not columns:
        return wide, []
    return wide, list(zip(torch.cat(positions).split(images), torch.cat(columns).split(images), strict=True))


def check_cut_offs(ks: Sequence[int], depth: int | None) -> None:
    """Refuse cut-offs that no rank can be held against.

    Args:
        ks (`Sequence[int]`): Cut-offs of recall.
        depth (`int`, *optional*): How many answers are searched, where not all are.

    Raises:
        ValueError: If there is no cut-off, or one is below 1 or above the depth.
    """
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
    check_cut_offs(ks, depth)
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


def metrics_from_outcomes(ranks: RetrievalRanks, outcomes: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The metrics of [`metrics_from_ranks`], from what [`outcomes_from_ranks`] gave for these ranks."""
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
    return metrics_from_outcomes(ranks, outcomes_from_ranks(ranks, ks, depth=depth))
