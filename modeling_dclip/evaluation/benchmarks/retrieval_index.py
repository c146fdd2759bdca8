"""Approximate ranks for sets too large to compare everything with everything: a FAISS index, and what it misses.

By default the index is an inverted file (IVF) with exact vectors: k-means sorts images or captions into cells, and a
query looks into the cells nearest to it. It is chosen over a graph (HNSW) for two reasons. It is built in a fraction
of the time. And the number of cells to look into can be set after building, up to all of them, which is exact search.
How many are needed has to be measured, because queries lie far from answers of the other modality (the modality gap).
They are measured on one part of the queries, and the share that is found is reported on another part.
"""

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import torch

from modeling_dclip.encoders.retrieval_ranks import (
    NOT_FOUND,
    TIE_TOLERANCE,
    RetrievalRanks,
    check_embeddings,
    full_float32,
    rank_within_group,
    unit_rows,
)

_QUERIES, _ROWS = 4096, 65536  # at a time
_TRAINING_ROWS = 1 << 20  # for k-means; FAISS takes 256 of them for each cell
POINTS_PER_CELL = 39  # with fewer, FAISS warns that k-means is not reliable
LEAST_CELLS = 16  # with fewer, a scan of all is as fast


class FaissIndex(Protocol):
    """What is used of an index of FAISS, which has no types of its own.

    Attributes:
        ntotal (`int`): How many vectors it holds.
        is_trained (`bool`): Whether vectors can be added.
    """

    ntotal: int
    is_trained: bool

    def train(self, vectors: np.ndarray) -> None:
        """Learn cells or codes from float32 `(N, D)`."""

    def add(self, vectors: np.ndarray) -> None:
        """Add float32 `(N, D)`."""

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities float32 and rows int64 of the answers to float32 `(Q, D)`, best first, both `(Q, count)`."""


class _Search(NamedTuple):
    """Vectors to ask with, vectors to find, and the image that each belongs to."""

    queries: torch.Tensor  # (Q, D)
    items: torch.Tensor  # (N, D)
    owner_of_query: torch.Tensor  # (Q,)
    owner_of_item: torch.Tensor  # (N,)


def find_faiss(index: str) -> ModuleType:
    """Import FAISS for an index that was asked for.

    Args:
        index (`str`): `"faiss"` or `"faiss:FACTORY"`.

    Returns:
        `ModuleType`: The module `faiss`.

    Raises:
        ImportError: If `faiss-cpu` is not installed.
        ValueError: If the index is of another kind.
    """
    kind, separator, factory = index.partition(":")
    if kind != "faiss" or bool(separator) != bool(factory):
        raise ValueError(f"Expected the index 'faiss' or 'faiss:FACTORY', such as 'faiss:HNSW32', got {index!r}.")
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"Expected faiss-cpu for the index {index!r}, got no such package. Install it with `pip install "
            "modeling_dclip[index]`, or leave the index out: exact search needs little memory, only more time."
        ) from error
    return faiss


@torch.no_grad()
def approximate_ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_of_caption: torch.Tensor,
    *,
    index: str = "faiss",
    ks: Sequence[int] = (1, 5, 10),
    depth: int = 100,
    target_recall: float = 0.99,
    sample: int = 1000,
    seed: int = 0,
) -> tuple[RetrievalRanks, dict[str, float]]:
    """Rank relevant pairs among the answers of an index, and measure the index against exact search.

    An item that the index does not return counts as not found, whatever its similarity. Ties among the returned items
    count against the model.

    Args:
        image_embeds, text_embeds, image_of_caption: As in
            [`~modeling_dclip.encoders.retrieval_ranks.retrieval_ranks`].
        index (`str`, *optional*, defaults to `"faiss"`): `"faiss"` is an inverted file of about 4 * sqrt(n) cells, or
            a scan of all if there are too few vectors. `"faiss:FACTORY"` is an index of FAISS's `index_factory`, e.g.
            `"faiss:HNSW32"`.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Where to measure the index.
        depth (`int`, *optional*, defaults to 100): Answers to ask for, at least the largest cut-off.
        target_recall (`float`, *optional*, defaults to 0.99): Share of the exact first `max(ks)` answers that is
            enough, in (0, 1]. The effort of an inverted file or a graph is doubled until a sample of queries reaches
            it.
        sample (`int`, *optional*, defaults to 1000): Queries to tune with, and as many others to report on; at most
            half of all queries each.
        seed (`int`, *optional*, defaults to 0): Of the sample, and of the vectors that cells are learned from.

    Returns:
        `tuple`: [`RetrievalRanks`] with [`NOT_FOUND`] for items that were not returned; and
            `{text_to_image,image_to_text}_index_recall@k`: the share of the exact first k answers that is among the
            index's first k, measured on queries that the effort was not tuned on. An answer as similar as the exact
            k-th counts.

    Raises:
        ImportError: If `faiss-cpu` is not installed.
        ValueError: As in [`~modeling_dclip.encoders.retrieval_ranks.check_embeddings`]; also if an
            argument is out of range, or FAISS refuses the factory.
    """
    faiss = find_faiss(index)
    check_embeddings(image_embeds, text_embeds, image_of_caption)
    if not ks or min(ks) < 1 or max(ks) > depth:
        raise ValueError(f"Expected cut-offs from 1 to the depth {depth}, got {tuple(ks)}.")
    if not 0 < target_recall <= 1 or sample < 1:
        raise ValueError(f"Expected target_recall in (0, 1] and sample >= 1, got {target_recall} and {sample}.")
    images, texts, owners = image_embeds.cpu(), text_embeds.cpu(), image_of_caption.long().cpu()
    factory = index.partition(":")[2]
    own = torch.arange(len(images))
    searches = {
        "text_to_image": _Search(texts, images, owners, own),
        "image_to_text": _Search(images, texts, own, owners),
    }
    ranks: dict[str, torch.Tensor] = {}
    recalls: dict[str, float] = {}
    for direction, search in searches.items():
        order = torch.randperm(len(search.queries), generator=torch.Generator().manual_seed(seed))
        half = max(1, min(sample, len(order) // 2))
        built = build_faiss_index(faiss, search.items, factory, seed)
        _tune(faiss, built, search, order[:half], max(ks), target_recall)
        found = _shares_found(built, search, order[-half:], ks)
        recalls |= {f"{direction}_index_recall@{k}": share for k, share in zip(ks, found, strict=True)}
        ranks[direction] = torch.full_like(owners, NOT_FOUND)
        for query, item, rank in _ranked_pairs(built, search, depth):
            ranks[direction][query if direction == "text_to_image" else item] = rank
    return RetrievalRanks(**ranks, image_of_caption=owners), recalls


def build_faiss_index(faiss: ModuleType, items: torch.Tensor, factory: str = "", seed: int = 0) -> FaissIndex:
    """Build an index of inner products over vectors, which are normalised to length 1.

    Args:
        faiss (`ModuleType`): From [`find_faiss`].
        items (`torch.Tensor` of shape `(N, D)`): What is to be found; any scale.
        factory (`str`, *optional*, defaults to `""`): For FAISS's `index_factory`. Without one, an inverted file of
            about 4 * sqrt(N) cells, or a scan of all if there are too few vectors.
        seed (`int`, *optional*, defaults to 0): Of the vectors that cells are learned from.

    Returns:
        [`FaissIndex`]: With all items.

    Raises:
        ValueError: If FAISS refuses the factory.
    """
    if not factory:
        cells = min(4 * math.isqrt(len(items)), len(items) // POINTS_PER_CELL)
        factory = f"IVF{cells},Flat" if cells >= LEAST_CELLS else "Flat"
    try:
        index = faiss.index_factory(items.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            if (inverted := faiss.try_extract_index_ivf(index)) is not None:
                inverted.cp.min_points_per_centroid = 1  # FAISS would warn on stderr; whoever builds says it
            drawn = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:_TRAINING_ROWS]
            index.train(unit_rows(items[drawn]).numpy())
        for rows in items.split(_ROWS):
            index.add(unit_rows(rows).numpy())
    except RuntimeError as error:
        reason = str(error).rpartition(" failed: ")[2] or str(error)  # what stands before is C++
        raise ValueError(
            f"Expected an index that FAISS can build over {len(items)} vectors of width {items.shape[1]}, got "
            f"{factory!r}: {reason}"
        ) from error
    return index


def _ask(index: FaissIndex, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask for similarities, best first, and rows of answers, -1 for none; both `(queries, min(count, items))`."""
    scores, rows = index.search(unit_rows(queries).numpy(), min(count, index.ntotal))
    return torch.from_numpy(scores), torch.from_numpy(rows)


def _exact_scores(search: _Search, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Find the highest similarities of each query, best first, by looking at all items."""
    queries = unit_rows(search.queries[rows])
    best = queries.new_empty(len(queries), 0)
    with full_float32(queries.device):
        for items in search.items.split(_ROWS // 8):
            both = torch.cat([best, queries @ unit_rows(items).T], dim=1)
            best = both.topk(min(count, both.shape[1]), dim=1).values
    return best


def _shares_found(
    index: FaissIndex, search: _Search, rows: torch.Tensor, ks: Sequence[int], exact: torch.Tensor | None = None
) -> list[float]:
    """For each k, measure how much of the exact first k is among the first k answers of the index."""
    exact = _exact_scores(search, rows, max(ks)) if exact is None else exact
    _, answers = _ask(index, search.queries[rows], max(ks))
    # The index's own similarities may be those of compressed vectors.
    scores = torch.stack(
        [unit_rows(search.items[own.clamp(min=0)]) @ unit_rows(search.queries[row : row + 1])[0]
         for row, own in zip(rows.tolist(), answers, strict=True)]
    ).masked_fill(answers < 0, -torch.inf)  # fmt: skip
    cut = [min(k, exact.shape[1]) for k in ks]
    return [float((scores[:, :k] >= exact[:, k - 1 : k] - TIE_TOLERANCE).double().mean()) for k in cut]


class Effort(NamedTuple):
    """Where the effort of an index is set.

    Attributes:
        holder (`object`): An object of FAISS.
        name (`str`): Its attribute: `nprobe` of an inverted file, `efSearch` of a graph.
        most (`int`): The highest value.
    """

    holder: object
    name: str
    most: int


def effort_of(faiss: ModuleType, index: FaissIndex) -> Effort | None:
    """Find where the effort of an index is set.

    Args:
        faiss (`ModuleType`): From [`find_faiss`].
        index ([`FaissIndex`]): From [`build_faiss_index`].

    Returns:
        [`Effort`] or `None`: `None` for an index without such a setting.
    """
    bare = faiss.downcast_index(index)
    if isinstance(bare, faiss.IndexIVF):
        return Effort(bare, "nprobe", bare.nlist)
    if isinstance(bare, faiss.IndexHNSW):
        return Effort(bare.hnsw, "efSearch", index.ntotal)
    return None


def tune_faiss_index(
    faiss: ModuleType,
    index: FaissIndex,
    items: torch.Tensor,
    queries: torch.Tensor,
    *,
    k: int = 10,
    target: float = 0.99,
) -> float:
    """Double an index's effort until it finds enough on one half of the queries, and measure it on the other.

    Args:
        faiss (`ModuleType`): From [`find_faiss`].
        index ([`FaissIndex`]): From [`build_faiss_index`]. Its effort is set to the value that was enough.
        items (`torch.Tensor` of shape `(N, D)`): What the index holds.
        queries (`torch.Tensor` of shape `(Q, D)`): Q >= 2, of the kind that will be asked.
        k (`int`, *optional*, defaults to 10): Answers that count.
        target (`float`, *optional*, defaults to 0.99): Share of the exact first k that is enough.

    Returns:
        `float`: The share of the exact first k answers that is among the index's first k, measured on the second half
            of the queries.

    Raises:
        ValueError: If there are fewer than two queries.
    """
    if len(queries) < 2:
        raise ValueError(f"Expected two or more queries, half to tune with and half to measure, got {len(queries)}.")
    search = _Search(queries, items, torch.arange(len(queries)), torch.arange(len(items)))
    rows = torch.arange(len(queries))
    _tune(faiss, index, search, rows[::2], k, target)
    return _shares_found(index, search, rows[1::2], [k])[0]


def _tune(faiss: ModuleType, index: FaissIndex, search: _Search, rows: torch.Tensor, k: int, target: float) -> None:
    """Double an index's effort until it finds enough or looks at everything."""
    knob = effort_of(faiss, index)
    if knob is None:
        return
    holder, effort, most = knob
    exact, value = _exact_scores(search, rows, k), 1
    while True:
        setattr(holder, effort, value)
        if value >= most or _shares_found(index, search, rows, [k], exact)[0] >= target:
            return
        value = min(2 * value, most)


def _ranked_pairs(
    index: FaissIndex, search: _Search, depth: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Give query, item and rank of every relevant pair among the answers; ties count against the model."""
    for top in range(0, len(search.queries), _QUERIES):
        scores, items = _ask(index, search.queries[top : top + _QUERIES], depth)
        is_own = search.owner_of_item[items.clamp(min=0)] == search.owner_of_query[top : top + _QUERIES, None]
        is_own &= items >= 0
        query, answer = is_own.nonzero(as_tuple=True)  # (pairs,)
        by_item = items[query, answer].argsort(stable=True)  # equal captions of one image rank by index
        query, answer = query[by_item], answer[by_item]
        scores_of_own = scores[query, answer]
        wrong = torch.where(is_own | (items < 0), -torch.inf, scores)
        before = (wrong[query] >= scores_of_own[:, None] - TIE_TOLERANCE).sum(dim=1)
        yield top + query, items[query, answer], before + rank_within_group(query, scores_of_own)
