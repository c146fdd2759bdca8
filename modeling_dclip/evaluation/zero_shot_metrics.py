"""Metrics of zero-shot classification from embeddings: ranks of the right class, accuracies, mean average precision.

As in retrieval, a class that scores as the right one does, or less than
[`~modeling_dclip.evaluation.retrieval_ranks.TIE_TOLERANCE`] below, ranks before it: a collapsed model never hits. Classes that have one name are the exception:
their scores are the same by construction, and the first of them ranks first, which is what `argmax` makes of them elsewhere.

Source: accuracies and mean per class recall as `clip-benchmark` and DataComp report them; average precision as in scikit-learn.
"""

from collections.abc import Sequence

import torch

from modeling_dclip.evaluation.retrieval_ranks import TIE_TOLERANCE

_ROWS_AT_A_TIME = 4096  # of scores against all classes: 16 MiB for 1,000


def label_ranks(
    image_embeds: torch.Tensor,
    classifier: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str] | None = None,
) -> torch.Tensor:
    """Rank the right class of every image; 1 is first, ties count against the model.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): L2-normalised.
        classifier (`torch.Tensor` of shape `(K, D)`): Of [`~modeling_dclip.evaluation.zero_shot.build_classifier`].
        labels (`torch.Tensor` of shape `(I,)`): Integers in [0, K).
        class_names (`Sequence[str]`, *optional*): K names. A class does not rank before an earlier one of its name.

    Returns:
        `torch.Tensor` of shape `(I,)`: int64.

    Raises:
        ValueError: If shapes do not fit or a label is out of range, naming its row.
    """
    if image_embeds.shape[-1] != classifier.shape[-1] or labels.shape != image_embeds.shape[:1]:
        raise ValueError(
            f"Expected image_embeds (I, D), classifier (K, D) and labels (I,), got {tuple(image_embeds.shape)}, "
            f"{tuple(classifier.shape)} and {tuple(labels.shape)}."
        )
    outside = (labels < 0) | (labels >= len(classifier))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"Expected labels in [0, {len(classifier)}), got {int(labels[row])} in row {row}.")
    numbers: dict[str, int] = {}
    names = range(len(classifier)) if class_names is None else class_names
    alike = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
    ranks = []
    for embeds, own in zip(image_embeds.split(_ROWS_AT_A_TIME), labels.split(_ROWS_AT_A_TIME), strict=True):
        scores = embeds @ classifier.T
        bar = scores.gather(1, own[:, None]) - TIE_TOLERANCE
        later = (alike[None] == alike[own][:, None]) & (torch.arange(len(alike))[None] >= own[:, None])
        ranks.append((scores.masked_fill(later, -torch.inf) >= bar).sum(dim=1) + 1)
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.long)


def accuracy_outcomes(ranks: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
    """Per image what the accuracies are made of: a metric is the sum of its first column over the sum of its second.

    Args:
        ranks (`torch.Tensor` of shape `(I,)`): Of [`label_ranks`].
        labels (`torch.Tensor` of shape `(I,)`): Integers in [0, K).
        classes (`int`): K.

    Returns:
        `dict[str, torch.Tensor]`: float64 `(I, 2)` under `top1`, with five classes or more `top5`, and `mean_per_class`, the mean of the
        accuracies of the classes that have an image: there an image weighs one over the number of images of its class.
    """
    ones = torch.ones(len(ranks), dtype=torch.float64)
    hits = {"top1": (ranks <= 1).double()}
    if classes >= 5:
        hits["top5"] = (ranks <= 5).double()
    outcomes = {name: torch.stack([hit, ones], dim=1) for name, hit in hits.items()}
    weights = 1 / torch.bincount(labels, minlength=classes).double()[labels]
    return {**outcomes, "mean_per_class": torch.stack([hits["top1"] * weights, weights], dim=1)}


def average_precision(scores: torch.Tensor, relevant: torch.Tensor) -> float:
    """Area under precision over recall, as a sum over the thresholds, without interpolation.

    Ties: images of one score are found together, so the order among them does not matter; each counts the precision after the last
    of them, as in scikit-learn.

    Args:
        scores (`torch.Tensor` of shape `(I,)`): Higher is more relevant.
        relevant (`torch.Tensor` of shape `(I,)`): 1 or True where relevant, at least once.

    Returns:
        `float`: In (0, 1].

    Raises:
        ValueError: If the shapes differ or nothing is relevant.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 1]))
        0.8333333333333333
    """
    if scores.ndim != 1 or scores.shape != relevant.shape or not relevant.any():
        raise ValueError(
            f"Expected two vectors of one length with something relevant, got {tuple(scores.shape)} and {tuple(relevant.shape)} with "
            f"{int(relevant.sum())} relevant."
        )
    ordered, order = scores.sort(descending=True, stable=True)
    found = relevant[order].double().cumsum(dim=0)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])  # of its score
    found, seen = found[last], (last.nonzero()[:, 0] + 1).double()
    new = torch.diff(found, prepend=found.new_zeros(1))
    return float((new * found / seen).sum() / found[-1])


def mean_average_precision(image_embeds: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes of [`average_precision`] among all images. A class that no image has is left out: its precision is undefined.

    Args:
        image_embeds (`torch.Tensor` of shape `(I, D)`): L2-normalised.
        classifier (`torch.Tensor` of shape `(K, D)`): As in [`label_ranks`].
        labels (`torch.Tensor` of shape `(I, K)`): 1 where the image is of the class, else 0.

    Returns:
        `float`: In (0, 1].

    Raises:
        ValueError: If shapes do not fit, a label is neither 0 nor 1, or no image has a class.
    """
    if image_embeds.shape[-1] != classifier.shape[-1] or labels.shape != (len(image_embeds), len(classifier)):
        raise ValueError(
            f"Expected image_embeds (I, D), classifier (K, D) and labels (I, K), got {tuple(image_embeds.shape)}, "
            f"{tuple(classifier.shape)} and {tuple(labels.shape)}."
        )
    if ((labels != 0) & (labels != 1)).any() or not labels.any():
        raise ValueError(
            "Expected labels 0 and 1, and at least one image of a class, got others or none. Repair the labels."
        )
    present = labels.any(dim=0).nonzero()[:, 0].tolist()
    # One class at a time: float32 scores, as everywhere here, and one column of them in memory.
    found = [average_precision(image_embeds @ classifier[column], labels[:, column]) for column in present]
    return sum(found) / len(found)
