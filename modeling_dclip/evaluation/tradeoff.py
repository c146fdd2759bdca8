"""Retrieval gained against zero-shot accuracy kept, in one picture of numbers.

Every value comes as an [`~modeling_dclip.evaluation.intervals.Interval`] that says what it covers: test images, or training seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modeling_dclip.evaluation.intervals import Interval, bootstrap_ratio, seed_interval
from modeling_dclip.evaluation.retrieval import RetrievalRanks

GAIN_METRIC = "text_to_image_recall@1"
RETENTION_METRIC = "top1"


def hits_per_image(ranks: RetrievalRanks, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Count text-to-image hits by image.

    Args:
        ranks ([`~modeling_dclip.evaluation.retrieval.RetrievalRanks`]): Of one model.
        k (`int`, *optional*, defaults to 1): Cut-off.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Both of shape `(I,)`, float64: captions that find their image within `k`; captions.
    """
    owners = ranks.image_of_caption
    hits = torch.zeros(int(owners.max()) + 1, dtype=torch.double)
    return hits.index_add(0, owners, (ranks.text_to_image <= k).double()), torch.bincount(owners).double()


def retrieval_gain(student: RetrievalRanks, anchor: RetrievalRanks, *, k: int = 1, **bootstrap: Any) -> Interval:
    """Relative text-to-image recall@k gain, student / anchor - 1: 0.2 is "+20 %".

    Covers **images** for these two checkpoints, see [`bootstrap_ratio`]; not training seeds.

    Args:
        student, anchor ([`~modeling_dclip.evaluation.retrieval.RetrievalRanks`]): On the same images and captions.
        k (`int`, *optional*, defaults to 1): Cut-off.
        bootstrap: `resamples`, `confidence`, `seed` of [`bootstrap_ratio`].

    Returns:
        [`Interval`]: Of the gain.

    Raises:
        ValueError: If the two were not measured on the same captions, or the anchor has no hit.
    """
    if not torch.equal(student.image_of_caption, anchor.image_of_caption):
        raise ValueError(
            f"Expected ranks on the same captions in the same order, got {len(student.image_of_caption)} and "
            f"{len(anchor.image_of_caption)} captions with other owners. Evaluate both on one dataset."
        )
    ratio = bootstrap_ratio(hits_per_image(student, k)[0], hits_per_image(anchor, k)[0], **bootstrap)
    return ratio._replace(estimate=ratio.estimate - 1, low=ratio.low - 1, high=ratio.high - 1)


def zero_shot_retention(student_hits: torch.Tensor, anchor_hits: torch.Tensor, **bootstrap: Any) -> Interval:
    """Zero-shot accuracy kept, student / anchor: 0.94 is "94 % retained".

    Covers **images** for these two checkpoints, see [`bootstrap_ratio`]; not training seeds.

    Args:
        student_hits, anchor_hits (`torch.Tensor` of shape `(I,)`): Per image, on the same images (`top1_hits` of zero-shot results).
        bootstrap: `resamples`, `confidence`, `seed` of [`bootstrap_ratio`].

    Returns:
        [`Interval`]: Of the ratio.

    Raises:
        ValueError: If the lengths differ or the anchor has no hit.
    """
    return bootstrap_ratio(student_hits, anchor_hits, **bootstrap)


def compare_to_anchor(student: Mapping[str, Any], anchor: Mapping[str, Any], **bootstrap: Any) -> dict[str, Any]:
    """Compare two evaluations on the same data: gain for retrieval, retention for zero-shot classification. Covers **images**.

    Args:
        student, anchor (`dict`): Both from [`~modeling_dclip.evaluation.retrieval.evaluate_retrieval`], or both from
            [`~modeling_dclip.evaluation.zero_shot.evaluate_zero_shot`].
        bootstrap: `resamples`, `confidence`, `seed` of [`~modeling_dclip.evaluation.intervals.bootstrap_ratio`].

    Returns:
        `dict[str, dict]`: `text_to_image_recall@1_gain` or `top1_retention`, an [`Interval`] as a dict, JSON-ready; empty where the anchor
        has no hit, as a ratio to it is not defined.

    Raises:
        ValueError: If the two are of different kinds or on different data.
    """
    if 0 in (anchor.get(GAIN_METRIC), anchor.get(RETENTION_METRIC)):
        return {}
    if "ranks" in student and "ranks" in anchor:
        gain = retrieval_gain(student["ranks"], anchor["ranks"], **bootstrap)
        return {f"{GAIN_METRIC}_gain": gain.to_dict()}
    if "top1_hits" in student and "top1_hits" in anchor:
        retention = zero_shot_retention(student["top1_hits"], anchor["top1_hits"], **bootstrap)
        return {f"{RETENTION_METRIC}_retention": retention.to_dict()}
    raise ValueError(f"Expected two evaluations of one kind, got {sorted(student)} and {sorted(anchor)}.")


def compare_arms(student: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = 0.95) -> Interval:
    """Difference of two arms, student - baseline, paired by seed: the same seed means the same data order and start.

    Covers training **seeds** on this test set; an interval above 0 says the student wins beyond the seeds' noise.

    Args:
        student, baseline (`Mapping[int, float]`): Metric by seed.
        confidence (`float`, *optional*, defaults to 0.95): Of the t-interval.

    Returns:
        [`Interval`]: Of the mean difference, in the metric's own unit.

    Raises:
        ValueError: If the seeds differ.
    """
    if set(student) != set(baseline):
        raise ValueError(
            f"Expected both arms on the same seeds, got {sorted(student)} and {sorted(baseline)}. Run the missing ones."
        )
    return seed_interval([student[seed] - baseline[seed] for seed in sorted(student)], confidence=confidence)


def summarise_arms(
    arms: Mapping[str, Mapping[int, Mapping[str, float]]],
    *,
    anchor: str = "anchor",
    pairs: Sequence[tuple[str, str]] = (),
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Summarise several runs of several arms: means, gain and retention against the anchor, and paired comparisons.

    All intervals cover **seeds**. The anchor is one checkpoint (one entry, under any seed), or as many as the other arms have, by seed.

    Args:
        arms (`Mapping`): Arm -> seed -> metric -> value, with the metrics of [`~modeling_dclip.evaluation.retrieval.retrieval_metrics`]
            and `top1`. All runs have the same metrics.
        anchor (`str`, *optional*, defaults to `"anchor"`): The arm that is the reference.
        pairs (`Sequence[tuple[str, str]]`, *optional*): Arms to compare, `(student, baseline)`.
        confidence (`float`, *optional*, defaults to 0.95): Of the intervals.

    Returns:
        `dict[str, Any]`: JSON-ready. `anchor`; `arms`: a list, in the order given, of `arm`, `seeds`, `metrics`, and but for the anchor
        `gain` and `retention`; `comparisons`: a list of `student`, `baseline`, `metrics`. Each value is an [`Interval`] as a dict.

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

    def over_seeds(values: Sequence[float]) -> dict[str, Any]:
        return seed_interval(values, confidence=confidence).to_dict()

    rows = []
    for arm, runs in arms.items():
        row: dict[str, Any] = {"arm": arm, "seeds": sorted(runs)}
        row["metrics"] = {name: over_seeds([metrics[name] for metrics in runs.values()]) for name in names}
        if arm != anchor and GAIN_METRIC in names:
            row["gain"] = over_seeds([ratio - 1 for ratio in _ratios(runs, arms[anchor], GAIN_METRIC)])
        if arm != anchor and RETENTION_METRIC in names:
            row["retention"] = over_seeds(_ratios(runs, arms[anchor], RETENTION_METRIC))
        rows.append(row)
    comparisons = []
    for pair in pairs:
        if not set(pair) <= set(arms):
            raise ValueError(f"Expected arms among {list(arms)} to compare, got {pair}.")
        metrics = {}
        for name in names:
            student, baseline = ({seed: run[name] for seed, run in arms[arm].items()} for arm in pair)
            metrics[name] = compare_arms(student, baseline, confidence=confidence).to_dict()
        comparisons.append({"student": pair[0], "baseline": pair[1], "metrics": metrics})
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
