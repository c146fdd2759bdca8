"""Intervals that say what they cover.

Two kinds of chance, two kinds of interval, never mixed:

- **images**: would another test set of the same kind say the same of *these checkpoints*? Paired bootstrap over images.
- **seeds**: would training again with another seed say the same *on this test set*? Student's t over runs.

Source: percentile bootstrap and t-interval as in any textbook.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Interval(NamedTuple):
    """An estimate and its interval; `covers` is `"images"`, `"seeds"` or `"nothing"` (one run: `low` and `high` are `None`)."""

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    covers: str

    def to_dict(self) -> dict[str, Any]:
        """Make it JSON: an unbounded end becomes `None`."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self._asdict().items()
        }


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence in (0, 1), got {confidence}.")


def bootstrap_ratio(
    numerators: torch.Tensor,
    denominators: torch.Tensor,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Resample images; take the ratio of the sums every time.

    Covers the choice of test **images** (with their captions) for fixed checkpoints. The gallery searched stays as it is, and other
    training runs are not covered. Both sums come from the same draw: this is the pairing.

    Args:
        numerators (`torch.Tensor` of shape `(I,)`): Per image, e.g. the student's hits.
        denominators (`torch.Tensor` of shape `(I,)`): Per image, >= 0, e.g. the anchor's hits.
        resamples (`int`, *optional*, defaults to 2000): Draws.
        confidence (`float`, *optional*, defaults to 0.95): Of the percentile interval.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        [`Interval`]: `covers="images"`. A draw with a denominator of 0 counts as infinite; `high` may be `inf`.

    Raises:
        ValueError: If the shapes differ, there are fewer than two images, or the denominators sum to 0.
    """
    if numerators.ndim != 1 or numerators.shape != denominators.shape or len(numerators) < 2:
        raise ValueError(
            f"Expected two vectors of one length >= 2, one entry per image, got {tuple(numerators.shape)} and "
            f"{tuple(denominators.shape)}. Were both models evaluated on the same images?"
        )
    outcomes = {"ratio": torch.stack([numerators, denominators], dim=1)}
    return bootstrap_outcomes(outcomes, resamples=resamples, confidence=confidence, seed=seed)["ratio"]


def bootstrap_outcomes(
    outcomes: Mapping[str, torch.Tensor], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of several metrics of one evaluation at once, each a ratio of sums over images; all from the same draws.

    Args:
        outcomes (`Mapping[str, torch.Tensor]`): Metric -> `(I, 2)`: of every image the sum and the count, e.g. the hits of its captions
            and their number. Counts are >= 0. All of one length.
        resamples, confidence, seed: As in [`bootstrap_ratio`].

    Returns:
        `dict[str, Interval]`: By metric.

    Raises:
        ValueError: If shapes differ, there are fewer than two images, or the counts of a metric sum to 0.
    """
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"Expected resamples >= 1, got {resamples}.")
    shapes = {tuple(values.shape) for values in outcomes.values()}
    if len(shapes) != 1 or (shape := next(iter(shapes)))[1:] != (2,) or shape[0] < 2:
        raise ValueError(
            f"Expected sums and counts (I, 2) of the same two or more images, got shapes {sorted(shapes)}."
        )
    pairs = torch.stack([values.double().cpu() for values in outcomes.values()], dim=1)  # (I, metrics, 2)
    totals = pairs.sum(dim=0)
    for name, (_, count) in zip(outcomes, totals.tolist(), strict=True):
        if count <= 0:
            raise ValueError(
                f"Expected a reference with at least one hit, got none ({name}): a ratio to it is not defined."
            )
    images, generator, ratios = len(pairs), torch.Generator().manual_seed(seed), []
    per_chunk = max(1, 2_000_000 // images)  # 16 MB of indices at a time
    for start in range(0, resamples, per_chunk):
        draws = torch.randint(images, (min(per_chunk, resamples - start), images), generator=generator)
        # How often each image was drawn: then all metrics are one product, and no metric's rows are gathered.
        times = torch.zeros(draws.shape, dtype=torch.double).scatter_add_(
            1, draws, torch.ones((), dtype=torch.double).expand(draws.shape)
        )
        sums = (times @ pairs.flatten(1)).view(len(draws), len(outcomes), 2)
        ratios.append(torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], torch.inf))
    ordered = torch.cat(ratios).sort(dim=0).values
    tail = (1 - confidence) / 2 * (resamples - 1)
    lows, highs = ordered[math.floor(tail)].tolist(), ordered[math.ceil(resamples - 1 - tail)].tolist()
    estimates = (totals[:, 0] / totals[:, 1]).tolist()
    return {
        name: Interval(estimate, low, high, confidence, "images")
        for name, estimate, low, high in zip(outcomes, estimates, lows, highs, strict=True)
    }


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t by bisection over its distribution function (Simpson's rule); error below 1e-6 of the quantile.

    Args:
        probability (`float`): In (0.5, 1).
        degrees (`int`): Degrees of freedom, >= 1.

    Returns:
        `float`: > 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(t_quantile(0.975, 2), 3)
        4.303
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"Expected a probability in (0.5, 1) and degrees >= 1, got {probability} and {degrees}.")
    # With x = sqrt(degrees) * tan(angle) the density becomes c * cos(angle) ** (degrees - 1) on a finite range.
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)

    def mass(angle: float, steps: int = 400) -> float:
        width = angle / steps
        weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
        return scale * width / 3 * sum(w * math.cos(i * width) ** (degrees - 1) for i, w in enumerate(weights))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def seed_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over runs that differ in the seed, with Student's t-interval.

    Covers training **seeds** on this test set; not other test images.

    Args:
        values (`Sequence[float]`): One per run. With one, the interval is empty and `covers` is `"nothing"`.
        confidence (`float`, *optional*, defaults to 0.95): Of the interval.

    Returns:
        [`Interval`]: Around the mean.

    Raises:
        ValueError: If there is no value or one is not finite.
    """
    _check_confidence(confidence)
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"Expected one or more finite values, one per run, got {list(values)}.")
    runs = len(values)
    mean = math.fsum(values) / runs
    if runs == 1:
        return Interval(mean, None, None, confidence, "nothing")
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (runs - 1))
    half = t_quantile((1 + confidence) / 2, runs - 1) * deviation / math.sqrt(runs)
    return Interval(mean, mean - half, mean + half, confidence, "seeds")
