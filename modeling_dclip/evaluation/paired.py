"""Is one model better than another, beyond the chance of the test images? Differences with intervals.

Source: percentile bootstrap, and the normal approximation of a difference of independent estimates, as in any textbook.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import torch

from modeling_dclip.evaluation.intervals import Interval


def bootstrap_differences(
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Resample images; take second - first of every metric every time, both models on the same draw: this is the pairing.

    Covers the choice of test **images** (with their captions) for fixed checkpoints. The gallery searched stays as it is, and other
    training runs are not covered. What is hard for both models cancels, so it is narrower than the two intervals apart from each other.

    Args:
        first, second (`Mapping[str, torch.Tensor]`): Metric -> `(I, 2)`: of every image the sum and the count, of the same images in the
            same order. Metrics that only one has are left out.
        resamples (`int`, *optional*, defaults to 2000): Draws, the same ones for every metric.
        confidence (`float`, *optional*, defaults to 0.95): Of the percentile interval.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict[str, Interval]`: By metric; `covers="images"`. A draw that holds nothing to count for a metric says nothing of it and is left
        out of its interval.

    Raises:
        ValueError: If no metric is in both, shapes differ, there are fewer than two images, counts differ or sum to 0, or an argument is
            out of range.
    """
    names = [name for name in first if name in second]
    if not names:
        raise ValueError(f"Expected a metric that both models have, got {sorted(first)} and {sorted(second)}.")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"Expected resamples >= 1 and a confidence in (0, 1), got {resamples} and {confidence} to bootstrap with."
        )
    shapes = {tuple(values[name].shape) for values in (first, second) for name in names}
    if len(shapes) != 1 or (shape := next(iter(shapes)))[1:] != (2,) or shape[0] < 2:
        raise ValueError(
            f"Expected sums and counts (I, 2) of the same two or more images, got shapes {sorted(shapes)}. Were both models evaluated "
            f"on the same images?"
        )
    sums = torch.stack([values[name].double().cpu() for name in names for values in (first, second)], dim=1)
    sums = sums.unflatten(1, (len(names), 2))  # (I, metrics, models, sum and count)
    uneven = [name for index, name in enumerate(names) if not torch.equal(sums[:, index, 0, 1], sums[:, index, 1, 1])]
    empty = [name for index, name in enumerate(names) if sums[:, index, 0, 1].sum() <= 0]
    if uneven or empty:
        raise ValueError(
            f"Expected the same counts, above 0 in all, of both models, got others for {(uneven or empty)[0]!r}. Were both evaluated on "
            f"the same images and captions?"
        )
    images, generator, drawn = len(sums), torch.Generator().manual_seed(seed), []
    per_chunk = max(1, 2_000_000 // images)  # 16 MB of indices, and as much of weights, at a time
    for start in range(0, resamples, per_chunk):
        rows = torch.randint(images, (min(per_chunk, resamples - start), images), generator=generator)
        times = torch.zeros(rows.shape, dtype=torch.double).scatter_add_(1, rows, torch.ones(rows.shape).double())
        drawn.append(_difference((times @ sums.flatten(1)).unflatten(1, sums.shape[1:])))
    estimates, draws = _difference(sums.sum(dim=0)[None])[0].tolist(), torch.cat(drawn)
    return {
        name: Interval(estimates[index], *_percentiles(draws[:, index], confidence), confidence, "images")
        for index, name in enumerate(names)
    }


def _difference(sums: torch.Tensor) -> torch.Tensor:
    """(..., metrics, 2, 2) -> (..., metrics); NaN where nothing was counted."""
    shares = sums[..., 0] / sums[..., 1]
    return shares[..., 1] - shares[..., 0]


def _percentiles(draws: torch.Tensor, confidence: float) -> tuple[float, float]:
    ordered = draws[~draws.isnan()].sort().values
    tail = (1 - confidence) / 2 * (len(ordered) - 1)
    return float(ordered[math.floor(tail)]), float(ordered[math.ceil(len(ordered) - 1 - tail)])


def unpaired_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Interval | None:
    """Difference, second - first, of two estimates that know nothing of each other, from their intervals.

    Normal approximation: each standard error is the width of its interval over that of the standard normal's, and they add in squares. Of
    two models on the same images it is too wide, as what both find hard does not cancel: prefer [`bootstrap_differences`].

    Args:
        first, second (`dict`): [`~modeling_dclip.evaluation.intervals.Interval`]s as dicts.

    Returns:
        [`~modeling_dclip.evaluation.intervals.Interval`] or `None`: `None` where an interval is open, or the two do not cover the same kind
        of chance with the same confidence.

    Example:
        >>> ends = {"confidence": 0.95, "covers": "images"}
        >>> first, second = {"estimate": 0.5, "low": 0.47, "high": 0.53} | ends, {"estimate": 0.6, "low": 0.56, "high": 0.64} | ends
        >>> [round(value, 3) for value in unpaired_difference(first, second)[:3]]
        [0.1, 0.05, 0.15]
    """
    kinds = {(interval["covers"], interval["confidence"]) for interval in (first, second)}
    ends = [interval[name] for interval in (first, second) for name in ("low", "high")]
    if len(kinds) != 1 or None in ends:
        return None
    ((covers, confidence),) = kinds
    normal = NormalDist().inv_cdf((1 + confidence) / 2)
    errors = [(interval["high"] - interval["low"]) / (2 * normal) for interval in (first, second)]
    difference, half = second["estimate"] - first["estimate"], normal * math.hypot(*errors)
    return Interval(difference, difference - half, difference + half, confidence, covers)
