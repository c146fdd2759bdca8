"""How sure a number is, and whether one model is better than another beyond chance.

Every value comes as an [`Interval`] that says what it covers: test images, or training seeds. From top to bottom: the
interval; training seeds (Student's t); one share (Clopper and Pearson); test images (bootstrap); differences between
two models; gain and retention against an anchor; the summary of an experiment's arms.

Source: percentile bootstrap, Student's t, the exact interval of a share, and the normal approximation of a difference
of independent estimates, as in any textbook.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple, TypedDict

import torch
from scipy.special import betaincinv, stdtrit

GAIN_METRIC = "text_to_image_recall@1"
RETENTION_METRIC = "top1"
# A claim needs this many images. With five, all of them change to one side by chance one time in 16.
FEWEST_IMAGES = 6
DIFFERENCE = "_difference"  # ends the name of a metric's difference to an anchor in a record
_INDICES_AT_A_TIME = 2_000_000  # of bootstrap draws: 16 MB, and as much of weights


class IntervalDict(TypedDict):
    """An [`Interval`] as results files hold it: an end that is not finite is `None`."""

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    covers: str


class Interval(NamedTuple):
    """An estimate with its interval.

    Attributes:
        estimate (`float`): In the unit of the metric.
        low, high (`float`, *optional*): The ends; `None` where `covers` is `"nothing"`.
        confidence (`float`): In (0, 1).
        covers (`str`): What varies: `"images"`, `"seeds"`, or `"nothing"` for a single run.
    """

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    covers: str

    def to_dict(self) -> IntervalDict:
        """Make it JSON: an end that is not finite becomes `None`."""
        low, high = (None if end is None or not math.isfinite(end) else end for end in (self.low, self.high))
        return {
            "estimate": self.estimate,
            "low": low,
            "high": high,
            "confidence": self.confidence,
            "covers": self.covers,
        }


def excludes_zero(interval: IntervalDict, n: int) -> bool:
    """Say whether a difference is beyond noise.

    Args:
        interval ([`IntervalDict`]): Of the difference.
        n (`int`): Images that it is of. Fewer than [`FEWEST_IMAGES`] show nothing. Not looked at where the interval
            covers seeds; there an interval without width shows nothing.
    """
    low, high = interval["low"], interval["high"]
    if low is None or (low == high if interval["covers"] == "seeds" else n < FEWEST_IMAGES):
        return False
    return low > 0 or (high is not None and high < 0)


class ArmSummary(TypedDict, total=False):
    """One arm of a [`Summary`]. `gain` and `retention` are there where both the arm and the anchor have the metric."""

    arm: str
    seeds: list[int]
    metrics: dict[str, IntervalDict]
    gain: IntervalDict
    retention: IntervalDict


class ArmComparison(TypedDict):
    """The differences `student - baseline` of two arms, by metric."""

    student: str
    baseline: str
    metrics: dict[str, IntervalDict]


class Summary(TypedDict, total=False):
    """What [`summarise_arms`] gives; `benchmarks` and `anchor_model` are added by
    [`~modeling_dclip.evaluation.arms.evaluate_arms`].
    """

    anchor: str
    arms: list[ArmSummary]
    comparisons: list[ArmComparison]
    benchmarks: list[str]
    anchor_model: str


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence in (0, 1), got {confidence}.")


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution.

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
    return float(stdtrit(degrees, probability))  # as scipy.stats.t.ppf, whose import takes four times as long


def seed_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over runs that differ in the seed, with Student's t-interval.

    Covers training **seeds** on this test set; not other test images.

    Args:
        values (`Sequence[float]`): One for each run. A single one has no interval, and `covers` is `"nothing"`.
        confidence (`float`, *optional*, defaults to 0.95): Of the interval, in (0, 1).

    Returns:
        [`Interval`]: Around the mean.

    Raises:
        ValueError: If there is no value or one is not finite, or the confidence is out of range.
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


def exact_interval(hits: float, n: int, *, confidence: float = 0.95) -> Interval:
    """The interval of a share that is exact for few images and at its ends: 0 of 10 may well be 30 % of all.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26 (1934). The share is above a level beyond chance, by the exact binomial test of one side at
    (1 - confidence) / 2, where `low` is above that level.

    Args:
        hits (`float`): In [0, n]. Not an integer where several captions of one image are averaged.
        n (`int`): Images, >= 1.
        confidence (`float`, *optional*, defaults to 0.95): In (0, 1).

    Returns:
        [`Interval`]: Of hits / n; `covers="images"`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> [round(value, 3) for value in exact_interval(0, 10)[:3]]
        [0.0, 0.0, 0.308]
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"Expected hits in [0, n] of n >= 1 images, got {hits} of {n}.")
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return Interval(hits / n, low, high, confidence, "images")


def resampled_sums(values: torch.Tensor, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """Draw images with replacement and sum their rows, some draws at a time.

    Args:
        values (`torch.Tensor` of shape `(I, ...)`): float64, on the CPU; a row for each image.
        resamples (`int`): Draws in all, >= 1.
        seed (`int`): Of the draws.

    Returns:
        `Iterator[torch.Tensor]`: Of shape `(draws, ...)`.
    """
    images, generator = len(values), torch.Generator().manual_seed(seed)
    per_chunk = max(1, _INDICES_AT_A_TIME // images)
    for start in range(0, resamples, per_chunk):
        draws = torch.randint(images, (min(per_chunk, resamples - start), images), generator=generator)
        # Count how often each image was drawn: then one product sums all metrics, and no rows are gathered.
        ones = torch.ones((), dtype=torch.double).expand(draws.shape)
        times = torch.zeros(draws.shape, dtype=torch.double).scatter_add_(1, draws, ones)
        yield (times @ values.flatten(1)).unflatten(1, values.shape[1:])


def bootstrap_outcomes(
    outcomes: Mapping[str, torch.Tensor], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Resample images, for intervals of several metrics of one evaluation at once.

    Each metric is a ratio of sums over images. All come from the same draws. For few images the percentiles are set
    apart as in [`bootstrap_differences`], so that the intervals of models, ratios and differences agree. Where every
    image scores 0, or every image 1, all draws are alike: the interval is then that of [`exact_interval`].

    Args:
        outcomes (`Mapping[str, torch.Tensor]`): Metric -> `(I, 2)`: the sum and the count of every image, e.g. the
            hits of its captions and their number. Counts are >= 0, and no sum exceeds its count. All have one length.
        resamples, confidence, seed: As in [`bootstrap_ratio`].

    Returns:
        `dict[str, Interval]`: By metric; `covers="images"`.

    Raises:
        ValueError: If shapes differ, there are fewer than two images, or the counts of a metric sum to 0.
    """
    found = _bootstrap(outcomes, resamples=resamples, confidence=confidence, seed=seed)
    for name, values in outcomes.items():
        sums, counts = values.double().cpu().unbind(dim=1)
        counted = int((counts > 0).sum())
        if torch.equal(sums, counts) or not sums.any():
            found[name] = exact_interval(counted if sums.any() else 0, counted, confidence=confidence)
    return found


def _bootstrap(
    outcomes: Mapping[str, torch.Tensor], *, resamples: int, confidence: float, seed: int
) -> dict[str, Interval]:
    """[`bootstrap_outcomes`] of any ratio, also of one that may exceed 1."""
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
    ratios = [
        torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], torch.inf)
        for sums in resampled_sums(pairs, resamples, seed)
    ]
    draws, estimates = torch.cat(ratios), (totals[:, 0] / totals[:, 1]).tolist()
    return {
        name: percentile_interval(estimates[index], draws[:, index], shape[0], confidence=confidence)
        for index, name in enumerate(outcomes)
    }


def bootstrap_ratio(
    numerators: torch.Tensor,
    denominators: torch.Tensor,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Resample images, and take the ratio of the two sums every time.

    Covers the choice of test **images** (with their captions) for fixed checkpoints. The gallery that is searched
    stays as it is, and other training runs are not covered. Both sums come from the same draw: this is the pairing.

    Args:
        numerators (`torch.Tensor` of shape `(I,)`): Per image, e.g. the student's hits.
        denominators (`torch.Tensor` of shape `(I,)`): Per image, >= 0, e.g. the anchor's hits.
        resamples (`int`, *optional*, defaults to 2000): Draws, >= 1.
        confidence (`float`, *optional*, defaults to 0.95): Of the percentile interval, in (0, 1).
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
    return _bootstrap(outcomes, resamples=resamples, confidence=confidence, seed=seed)["ratio"]


def bootstrap_differences(
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Resample images, and take second - first of every metric every time, both models on the same draw.

    Covers the choice of test **images** (with their captions) for fixed checkpoints. The gallery that is searched
    stays as it is, and other training runs are not covered. What is hard for both models cancels, so the interval of
    the difference is narrower than the two models' own intervals suggest. For few images the percentiles are set apart
    so far that the interval is right there too.

    Args:
        first, second (`Mapping[str, torch.Tensor]`): Metric -> `(I, 2)`: the sum and the count of every image, of the
            same images in the same order. Metrics that only one has are left out.
        resamples (`int`, *optional*, defaults to 2000): Draws, >= 1; the same for every metric.
        confidence (`float`, *optional*, defaults to 0.95): Of the percentile interval, in (0, 1).
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict[str, Interval]`: By metric; `covers="images"`. A draw in which a metric counts nothing is left out of
            that metric's interval.

    Raises:
        ValueError: If no metric is in both, shapes differ, there are fewer than two images, counts differ or sum to 0,
            or an argument is out of range.
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
            f"Expected sums and counts (I, 2) of the same two or more images, got shapes {sorted(shapes)}. Were both "
            "models evaluated on the same images?"
        )
    sums = torch.stack([values[name].double().cpu() for name in names for values in (first, second)], dim=1)
    sums = sums.unflatten(1, (len(names), 2))  # (I, metrics, models, sum and count)
    uneven = [name for index, name in enumerate(names) if not torch.equal(sums[:, index, 0, 1], sums[:, index, 1, 1])]
    empty = [name for index, name in enumerate(names) if sums[:, index, 0, 1].sum() <= 0]
    if uneven or empty:
        raise ValueError(
            "Expected the same counts, above 0 in all, of both models, got others for "
            f"{(uneven or empty)[0]!r}. Were both evaluated on the same images and captions?"
        )
    estimates = _difference(sums.sum(dim=0)[None])[0].tolist()
    draws = torch.cat([_difference(drawn) for drawn in resampled_sums(sums, resamples, seed)])
    return {
        name: percentile_interval(estimates[index], draws[:, index], shape[0], confidence=confidence)
        for index, name in enumerate(names)
    }


def _difference(sums: torch.Tensor) -> torch.Tensor:
    """(..., metrics, 2, 2) -> (..., metrics); NaN where nothing was counted."""
    shares = sums[..., 0] / sums[..., 1]
    return shares[..., 1] - shares[..., 0]


def _widen_for_few(confidence: float, images: int) -> float:
    """The confidence at which a percentile interval of few draws covers what it promises.

    Percentiles of a bootstrap are too narrow for few images, as a normal interval with the divisor n is. The quantile
    that makes up for it is Student's t times sqrt(n / (n - 1)).

    Source: the expanded percentile interval of T. Hesterberg, "What Teachers Should Know about the Bootstrap", The
    American Statistician 69 (2015).
    """
    quantile = t_quantile((1 + confidence) / 2, images - 1) * math.sqrt(images / (images - 1))
    return 2 * NormalDist().cdf(quantile) - 1


def percentile_interval(estimate: float, draws: torch.Tensor, images: int, *, confidence: float = 0.95) -> Interval:
    """The interval of a number that was computed from every draw of test images, set apart for few images.

    Args:
        estimate (`float`): The number for all images.
        draws (`torch.Tensor` of shape `(draws,)`): The number for each draw; NaN is left out.
        images (`int`): How many were drawn from, >= 2; of several sets the smallest.
        confidence (`float`, *optional*, defaults to 0.95): In (0, 1).

    Returns:
        [`Interval`]: `covers="images"`.

    Raises:
        ValueError: If the confidence is out of range.
    """
    _check_confidence(confidence)
    return Interval(estimate, *_percentiles(draws, _widen_for_few(confidence, images)), confidence, "images")


def _percentiles(draws: torch.Tensor, confidence: float) -> tuple[float, float]:
    ordered = draws[~draws.isnan()].sort().values
    tail = (1 - confidence) / 2 * (len(ordered) - 1)
    return float(ordered[math.floor(tail)]), float(ordered[math.ceil(len(ordered) - 1 - tail)])


def unpaired_difference(first: IntervalDict, second: IntervalDict) -> Interval | None:
    """Difference, second - first, of two independent estimates, from their intervals.

    Normal approximation: each standard error is the width of its interval over that of the standard normal's, and the
    errors add in squares. For two models on the same images the result is too wide, because what both find hard does
    not cancel: prefer [`bootstrap_differences`].

    Args:
        first, second ([`IntervalDict`]): The two estimates.

    Returns:
        [`Interval`] or `None`: `None` where an interval is open, or the two do not cover the same kind of chance with
            the same confidence.

    Example:
        >>> ends = {"confidence": 0.95, "covers": "images"}
        >>> first = {"estimate": 0.5, "low": 0.47, "high": 0.53} | ends
        >>> second = {"estimate": 0.6, "low": 0.56, "high": 0.64} | ends
        >>> [round(value, 3) for value in unpaired_difference(first, second)[:3]]
        [0.1, 0.05, 0.15]
    """
    kinds = {(interval["covers"], interval["confidence"]) for interval in (first, second)}
    widths = [
        high - low
        for low, high in ((interval["low"], interval["high"]) for interval in (first, second))
        if low is not None and high is not None
    ]
    if len(kinds) != 1 or len(widths) != 2:
        return None
    ((covers, confidence),) = kinds
    normal = NormalDist().inv_cdf((1 + confidence) / 2)
    errors = [width / (2 * normal) for width in widths]
    difference, half = second["estimate"] - first["estimate"], normal * math.hypot(*errors)
    return Interval(difference, difference - half, difference + half, confidence, covers)


def ratio_to_anchor(student: torch.Tensor, anchor: torch.Tensor, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """A metric of the student over the anchor's: 0.94 is "94 % kept", 1.2 is "20 % gained".

    Covers **images** for these two checkpoints, as [`bootstrap_ratio`] says; not training seeds.

    Args:
        student, anchor (`torch.Tensor` of shape `(I, 2)`): The sum and the count of every image (`outcomes` of an
            evaluation), on the same data.
        resamples, seed: As in [`bootstrap_ratio`].

    Returns:
        [`Interval`]: Of the ratio, 95 %.

    Raises:
        ValueError: If the two were not measured on the same images and captions, or the anchor has no hit.
    """
    if student.shape != anchor.shape or not torch.equal(student[:, 1], anchor[:, 1]):
        raise ValueError(
            f"Expected outcomes on the same images with the same captions, got {len(student)} and {len(anchor)} "
            "images or other numbers of captions. Evaluate both on one dataset."
        )
    return bootstrap_ratio(student[:, 0], anchor[:, 0], resamples=resamples, seed=seed)


def compare_to_anchor(
    student: Mapping[str, torch.Tensor],
    anchor: Mapping[str, torch.Tensor],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, IntervalDict]:
    """Compare two evaluations on the same data: gain for retrieval, retention for zero-shot. Covers **images**.

    Args:
        student, anchor (`Mapping[str, torch.Tensor]`): `outcomes` of two evaluations of one benchmark: metric ->
            `(I, 2)`.
        resamples, seed: As in [`bootstrap_ratio`].

    Returns:
        `dict[str, IntervalDict]`: `text_to_image_recall@1_gain` (student / anchor - 1) or `top1_retention` (student /
            anchor). Empty for a benchmark that has neither metric, for a single image, and where the anchor has no
            hit: a ratio to it is not defined.

    Raises:
        ValueError: If the two are on different data.
    """
    compared = {}
    for metric, name, offset in ((GAIN_METRIC, "gain", 1), (RETENTION_METRIC, "retention", 0)):
        if metric not in student or metric not in anchor:
            continue
        several = len(student[metric]) > 1 or len(anchor[metric]) > 1  # one image alone has no interval
        if several and anchor[metric][:, 0].sum() > 0:
            ratio = ratio_to_anchor(student[metric], anchor[metric], resamples=resamples, seed=seed)
            low, high = (None if end is None else end - offset for end in (ratio.low, ratio.high))
            moved = ratio._replace(estimate=ratio.estimate - offset, low=low, high=high)
            compared[f"{metric}_{name}"] = moved.to_dict()
    return compared


def differences_to_anchor(
    student: Mapping[str, torch.Tensor], anchor: Mapping[str, torch.Tensor], *, seed: int = 0
) -> dict[str, IntervalDict]:
    """Difference of every metric to an anchor on the same data, student - anchor. Covers **images**.

    Args:
        student, anchor (`Mapping[str, torch.Tensor]`): As in [`compare_to_anchor`].
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict[str, IntervalDict]`: `text_to_image_recall@1_difference` and so on, from [`bootstrap_differences`]. Empty
            for a single image and where nothing has outcomes.

    Raises:
        ValueError: If the two are on different data.
    """
    names = [name for name in student if name in anchor]
    if not names or len(student[names[0]]) < 2:
        return {}
    found = bootstrap_differences(anchor, student, seed=seed)
    return {f"{name}{DIFFERENCE}": interval.to_dict() for name, interval in found.items()}


def compare_arms(student: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = 0.95) -> Interval:
    """Difference of two arms, student - baseline, paired by seed: the same seed means the same data order and start.

    Covers training **seeds** on this test set. An interval above 0 says that the student is better beyond the noise of
    the seeds.

    Args:
        student, baseline (`Mapping[int, float]`): Metric by seed.
        confidence (`float`, *optional*, defaults to 0.95): Of the t-interval, in (0, 1).

    Returns:
        [`Interval`]: Of the mean difference, in the metric's own unit.

    Raises:
        ValueError: If the seeds differ.
    """
    if set(student) != set(baseline):
        raise ValueError(
            f"Expected both arms on the same seeds, got {sorted(student)} and {sorted(baseline)}. Run the missing "
            "ones."
        )
    return seed_interval([student[seed] - baseline[seed] for seed in sorted(student)], confidence=confidence)


def summarise_arms(
    arms: Mapping[str, Mapping[int, Mapping[str, float]]],
    *,
    anchor: str = "anchor",
    pairs: Sequence[tuple[str, str]] = (),
    confidence: float = 0.95,
) -> Summary:
    """Summarise several runs of several arms: means, gain and retention against the anchor, and paired comparisons.

    All intervals cover **seeds**. The anchor is one checkpoint (one entry, under any seed), or one for each seed of
    the other arms.

    Args:
        arms (`Mapping`): Arm -> seed -> metric -> value, with the metrics of
            [`~modeling_dclip.evaluation.benchmarks.retrieval.retrieval_metrics`] and `top1`. All runs have the same
            metrics.
        anchor (`str`, *optional*, defaults to `"anchor"`): The arm that is the reference.
        pairs (`Sequence[tuple[str, str]]`, *optional*): Arms to compare, `(student, baseline)`.
        confidence (`float`, *optional*, defaults to 0.95): Of the intervals, in (0, 1).

    Returns:
        [`Summary`]: JSON-ready. Arms in the order given; all but the anchor have `gain` and `retention`.

    Raises:
        ValueError: If the anchor or an arm is missing, metrics or seeds differ, or the anchor is at 0.
    """
    if anchor not in arms or not all(arms.values()):
        raise ValueError(f"Expected runs of every arm and of the anchor {anchor!r}, got {dict(arms)}.")
    names = sorted(next(iter(arms[anchor].values())))
    for arm, runs in arms.items():
        for seed, metrics in runs.items():
            if sorted(metrics) != names:
                raise ValueError(
                    f"Expected the metrics {names} in every run, got {sorted(metrics)} for {arm!r}, seed {seed}."
                )

    def over_seeds(values: Sequence[float]) -> IntervalDict:
        return seed_interval(values, confidence=confidence).to_dict()

    rows: list[ArmSummary] = []
    for arm, runs in arms.items():
        row: ArmSummary = {"arm": arm, "seeds": sorted(runs)}
        row["metrics"] = {name: over_seeds([metrics[name] for metrics in runs.values()]) for name in names}
        if arm != anchor and GAIN_METRIC in names:
            row["gain"] = over_seeds([ratio - 1 for ratio in _ratios(runs, arms[anchor], GAIN_METRIC)])
        if arm != anchor and RETENTION_METRIC in names:
            row["retention"] = over_seeds(_ratios(runs, arms[anchor], RETENTION_METRIC))
        rows.append(row)
    comparisons: list[ArmComparison] = []
    for pair in pairs:
        if not set(pair) <= set(arms):
            raise ValueError(f"Expected arms among {list(arms)} to compare, got {pair}.")
        differences = {}
        for name in names:
            student, baseline = ({seed: run[name] for seed, run in arms[arm].items()} for arm in pair)
            differences[name] = compare_arms(student, baseline, confidence=confidence).to_dict()
        comparisons.append({"student": pair[0], "baseline": pair[1], "metrics": differences})
    return {"anchor": anchor, "arms": rows, "comparisons": comparisons}


def _ratios(
    runs: Mapping[int, Mapping[str, float]], anchor: Mapping[int, Mapping[str, float]], metric: str
) -> list[float]:
    if len(anchor) > 1 and set(anchor) != set(runs):
        raise ValueError(f"Expected one anchor or one per seed {sorted(runs)}, got seeds {sorted(anchor)}.")
    ratios = []
    for seed, metrics in runs.items():
        reference = (anchor[seed] if len(anchor) > 1 else next(iter(anchor.values())))[metric]
        if reference <= 0:
            raise ValueError(
                f"Expected an anchor above 0 in {metric!r}, got {reference}: a ratio to it is not defined."
            )
        ratios.append(metrics[metric] / reference)
    return ratios
