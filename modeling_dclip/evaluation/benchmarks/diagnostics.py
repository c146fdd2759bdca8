"""How a dual encoder fills the shared space: modality gap, alignment and uniformity.

All measures are of L2-normalised embeddings, so of points on the unit sphere. With several captions an image:

- the centroid of texts, and so the gap, is over captions; the centroid of images is over images;
- alignment is over pairs of an image and one of its own captions, each pair once;
- text uniformity is over pairs of captions of **different** images, because two captions of one image are one draw.

No measure alone says that a model is good: a gap may close, and alignment fall, while retrieval gets worse. They say
where two models differ.

Sources: modality gap, "Mind the Gap", arXiv 2203.02053, section 2; alignment and uniformity, "Understanding
Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere", arXiv 2005.10242, section
4.1.
"""

import torch
from datasets import Dataset

from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.retrieval_ranks import check_rows, unit_rows
from modeling_dclip.evaluation.embedding import DatasetEmbeddings, embed_dataset
from modeling_dclip.evaluation.records import BenchmarkResult


def _unit_rows(embeds: torch.Tensor, name: str) -> torch.Tensor:
    check_rows(embeds, name)
    return unit_rows(embeds)


@torch.no_grad()
def modality_gap(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> float:
    """Distance between the centroid of images and the centroid of texts.

    Source: "Mind the Gap", arXiv 2203.02053. Deviation: none.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): Any scale; normalised here.
        text_embeds (`torch.Tensor` of shape `(C, D)`): Likewise.

    Returns:
        `float`: In [0, 2]; 0 where both centroids agree.

    Raises:
        ValueError: If an input is empty, an embedding is zero or not finite, or widths differ.

    Example:
        >>> round(modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])), 6)
        1.414214
    """
    images, texts = _unit_rows(image_embeds, "image_embeds"), _unit_rows(text_embeds, "text_embeds")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"Expected embeddings of one width, got {images.shape[1]} for images and {texts.shape[1]} for texts. Do "
            "both come from one model?"
        )
    difference = images.mean(dim=0, dtype=torch.float64) - texts.mean(dim=0, dtype=torch.float64)
    return float(difference.norm())


@torch.no_grad()
def alignment_by_image(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_of_caption: torch.Tensor, *, chunk_size: int = 4096
) -> torch.Tensor:
    """Squared distance of each image to its own captions: sum and count.

    Source: arXiv 2005.10242 with alpha = 2: alignment is the sum of the first column over that of the second.
    Deviation: none.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): Any scale; normalised here.
        text_embeds (`torch.Tensor` of shape `(C, D)`): Likewise.
        image_of_caption (`torch.Tensor` of shape `(C,)`): Row in `image_embeds` of each caption's image.
        chunk_size (`int`, *optional*, defaults to 4096): Pairs at a time. Does not change the result.

    Returns:
        `torch.Tensor` of shape `(I, 2)`: float64, on the CPU. Each distance is in [0, 4].

    Raises:
        ValueError: As in [`modality_gap`]; also if `image_of_caption` does not hold one row of `image_embeds` for each
            caption.

    Example:
        >>> alignment_by_image(torch.eye(2), torch.eye(2), torch.tensor([0, 0])).tolist()
        [[2.0, 2.0], [0.0, 0.0]]
    """
    images, texts = _unit_rows(image_embeds, "image_embeds"), _unit_rows(text_embeds, "text_embeds")
    owners = image_of_caption.to(device=images.device, dtype=torch.long)
    if owners.shape != (len(texts),) or owners.min() < 0 or owners.max() >= len(images):
        raise ValueError(
            f"Expected image_of_caption as {len(texts)} rows in [0, {len(images)}), one a caption, got shape "
            f"{tuple(owners.shape)} with values from {int(owners.min())} to {int(owners.max())}."
        )
    distances = torch.cat(
        [
            (text - images[owner]).double().square().sum(dim=1)
            for text, owner in zip(texts.split(chunk_size), owners.split(chunk_size), strict=True)
        ]
    )
    sums = torch.zeros(len(images), dtype=torch.float64, device=images.device).index_add(0, owners, distances)
    return torch.stack([sums, torch.bincount(owners, minlength=len(images)).double()], dim=1).cpu()


@torch.no_grad()
def uniformity(
    embeds: torch.Tensor, groups: torch.Tensor | None = None, *, t: float = 2.0, tile_size: int = 2048
) -> float | None:
    """Logarithm of the mean Gaussian potential of all pairs: how far from spread evenly over the sphere.

    Exact, one tile of similarities at a time: `4 * tile_size ** 2` bytes beyond the embeddings, summed in float64.

    Source: arXiv 2005.10242, t = 2. Deviation: pairs inside a group are left out.

    Args:
        embeds (`torch.Tensor` of shape `(N, D)`): Any scale; normalised here.
        groups (`torch.Tensor` of shape `(N,)`, *optional*): Integers; pairs inside a group do not count. By default
            each row is a group of its own.
        t (`float`, *optional*, defaults to 2.0): Sharpness of the Gaussian, > 0.
        tile_size (`int`, *optional*, defaults to 2048): Rows of a tile. Does not change the result but for rounding.

    Returns:
        `float` or `None`: In [-4 t, 0]; lower is more even, 0 is collapsed. `None` if all rows are of one group.

    Raises:
        ValueError: If there is no row, a row is zero or not finite, `groups` does not fit, or `t` or `tile_size` is
            not positive.

    Example:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 6)
        -8.0
    """
    rows = _unit_rows(embeds, "embeds")
    if t <= 0 or tile_size < 1:
        raise ValueError(f"Expected t > 0 and tile_size >= 1, got {t} and {tile_size}.")
    if groups is None:
        groups = torch.arange(len(rows))
    if groups.shape != (len(rows),) or groups.is_floating_point():
        raise ValueError(
            f"Expected groups as {len(rows)} integers, got {groups.dtype} of shape {tuple(groups.shape)}."
        )
    groups, order = groups.to(rows.device).sort(stable=True)  # pairs inside a group now lie near the diagonal
    rows = rows[order]
    counts = torch.unique_consecutive(groups, return_counts=True)[1].double()
    pairs = float(len(rows) ** 2 - counts.square().sum())
    if not pairs:
        return None
    # Nothing overflows: every term is between exp(-4 t) and exp(0).
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for top in range(0, len(rows), tile_size):
        above, own = rows[top : top + tile_size], groups[top : top + tile_size]
        for left in range(top, len(rows), tile_size):
            beside, other = rows[left : left + tile_size], groups[left : left + tile_size]
            potential = (above @ beside.T).sub_(1).mul_(2 * t).exp_()  # |a - b|^2 = 2 - 2 a.b
            if other[0] <= own[-1]:
                potential.masked_fill_(own[:, None] == other, 0)
            total += potential.sum(dtype=torch.float64) * (1 if left == top else 2)
    return min(float((total / pairs).log()), 0.0)


def embedding_diagnostics(embeddings: DatasetEmbeddings, *, t: float = 2.0) -> BenchmarkResult:
    """Measure a dataset's embeddings; the module's text says how several captions of one image count.

    Args:
        embeddings ([`~modeling_dclip.evaluation.embedding.DatasetEmbeddings`]): On the device to compute on.
        t (`float`, *optional*, defaults to 2.0): As in [`uniformity`].

    Returns:
        `BenchmarkResult`: `modality_gap`, `alignment`, and `image_uniformity` and `text_uniformity` where there are
            two images or more; `n` images, `n_captions`; under `outcomes`, each image's sum and count of `alignment`,
            `(I, 2)` float64.

    Raises:
        ValueError: As in [`modality_gap`], [`alignment_by_image`] and [`uniformity`].
    """
    images, texts, owners = embeddings
    outcomes = alignment_by_image(images, texts, owners)
    total, count = outcomes.sum(dim=0).tolist()
    metrics = {
        "modality_gap": modality_gap(images, texts),
        "alignment": total / count,
        "image_uniformity": uniformity(images, t=t),
        "text_uniformity": uniformity(texts, owners, t=t),
    }
    metrics = {name: value for name, value in metrics.items() if value is not None}
    return {**metrics, "n": len(images), "n_captions": len(texts), "outcomes": {"alignment": outcomes}}


def evaluate_diagnostics(encoder: Encoder, dataset: Dataset, *, t: float = 2.0) -> BenchmarkResult:
    """Embed a dataset and measure its modality gap, alignment and uniformity.

    Source: docs/papers.md, evaluation. Deviation: the module's text says how several captions of one image count.

    Args:
        encoder ([`~modeling_dclip.encoders.Encoder`]): As in [`~modeling_dclip.evaluation.embedding.embed_dataset`].
            The measures are computed on its `device` where it names one, else on the CPU.
        dataset (`datasets.Dataset`): With `image`, `captions` and, for messages, `image_id`.
        t (`float`, *optional*, defaults to 2.0): As in [`uniformity`].

    Returns:
        `BenchmarkResult`: As [`embedding_diagnostics`].

    Raises:
        TypeError: If the model is not a dual encoder.
        ValueError: As in [`~modeling_dclip.evaluation.embedding.embed_dataset`].
    """
    embeddings = embed_dataset(encoder, dataset)
    if encoder.device is not None:
        embeddings = DatasetEmbeddings(*(tensor.to(encoder.device) for tensor in embeddings))
    return embedding_diagnostics(embeddings, t=t)
