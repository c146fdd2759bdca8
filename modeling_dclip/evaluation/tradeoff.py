"""Retrieval gained against zero-shot accuracy kept, in one picture of numbers.

Every value comes as an [`~modeling_dclip.evaluation.intervals.Interval`] that says what it covers: test images, or training seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modeling_dclip.evaluation.intervals import Interval, bootstrap_ratio, seed_interval

GAIN_METRIC = "text_to_image_recall@1"
RETENTION_METRIC = "top1"


def ratio_to_anchor(student: torch.Tensor, anchor: torch.Tensor, **bootstrap: Any) -> Interval:
    """A metric of the student over the anchor's: 0.94 is "94 % kept", 1.2 is "20 % gained".

    Covers **images** for these two checkpoints, see [`~modeling_dclip.evaluation.intervals.bootstrap_ratio`]; not training seeds.

    Args:
        student, anchor (`torch.Tensor` of shape `(I, 2)`): Of every image the sum and the count of the metric (`outcomes` of an
            evaluation), on the same data.
        bootstrap: `resamples`, `confidence`, `seed` of [`~modeling_dclip.evaluation.intervals.bootstrap_ratio`].

    Returns:
        [`Interval`]: Of the ratio.

    Raises:
        ValueError: If the two were not measured on the same images and captions, or the anchor has no hit.
    """
    if student.shape != anchor.shape or not torch.equal(student[:, 1], anchor[:, 1]):
        raise ValueError(
            f"Expected outcomes on the same images with the same captions, got {len(student)} and {len(anchor)} images or other "
            f"numbers of captions. Evaluate both on one dataset."
        )
    return bootstrap_ratio(student[:, 0], anchor[:, 0], **bootstrap)


def compare_to_anchor(student: Mapping[str, Any], anchor: Mapping[str, Any], **bootstrap: Any) -> dict[str, Any]:
    """Compare two evaluations on the same data: gain for retrieval, retention for zero-shot classification. Covers **images**.

    Args:
        student, anchor (`dict`): `outcomes` of two evaluations of one benchmark.
        bootstrap: `resamples`, `confidence`, `seed` of [`~modeling_dclip.evaluation.intervals.bootstrap_ratio`].

    Returns:
        `dict[str, dict]`: `text_to_image_recall@1_gain` (student / anchor - 1) or `top1_retention` (student / anchor), an [`Interval`] as a
        dict, JSON-ready; empty for a benchmark that has neither metric, on a single image, or where the anchor has no hit: a ratio to it
        is not defined.

    Raises:
        ValueError: If the two are on different data.
    """
    compared = {}
    for metric, name, offset in ((GAIN_METRIC, "gain", 1), (RETENTION_METRIC, "retention", 0)):
        if metric not in student or metric not in anchor:
            continue
        several = len(student[metric]) > 1 or len(anchor[metric]) > 1  # one image alone has no interval
        if several and anchor[metric][:, 0].sum() > 0:
            ratio = ratio_to_anchor(student[metric], anchor[metric], **bootstrap)
            ends = (value - offset for value in ratio[:3])
            compared[f"{metric}_{name}"] = Interval(*ends, *ratio[3:]).to_dict()
    return compared


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
