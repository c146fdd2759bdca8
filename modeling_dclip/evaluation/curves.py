"""The trade-off curve from results records: retrieval against zero-shot accuracy over models, checkpoints or points between two."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.plots import plot_tradeoff
from modeling_dclip.evaluation.tradeoff import GAIN_METRIC, RETENTION_METRIC

_ALPHA = "alpha="


def tradeoff_points(
    records: Sequence[Mapping[str, Any]], anchor: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pair each model's retrieval with its zero-shot accuracy.

    Of several benchmarks of a kind the first counts. Points on the line from an anchor to a model (`condition` `alpha=...`) become the
    curve, with the anchor as its start and the model, where it was measured, as its end.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.results.read_results`].
        anchor (`str`, *optional*): The model that is the reference; its point comes first.

    Returns:
        `tuple[list[dict], list[dict]]`: Points and curve of [`~modeling_dclip.evaluation.plots.plot_tradeoff`]: `label`, `x` (top-1), `y`
        (text-to-image R@1), intervals over images where the records have them, and `alpha`.

    Raises:
        ValueError: If no model has both, or points of several lines are in the records.
    """
    pairs: dict[tuple[str, str | None], dict[str, Any]] = {}
    for axis, metric in (("x", RETENTION_METRIC), ("y", GAIN_METRIC)):
        benchmark = next((record["benchmark"] for record in records if metric in record["metrics"]), None)
        for record in records:
            if record["benchmark"] != benchmark:
                continue
            pair = pairs.setdefault((record["model"], record.get("condition")), {})
            pair |= {"label": record.get("label", record["model"]), axis: record["metrics"][metric]}
            if interval := record.get("intervals", {}).get(metric):
                pair[f"{axis}_interval"] = interval["low"], interval["high"]
    pairs = {place: pair for place, pair in pairs.items() if "x" in pair and "y" in pair}
    if not pairs:
        raise ValueError(
            f"Expected a model with retrieval ({GAIN_METRIC}) and zero-shot classification ({RETENTION_METRIC}), got "
            f"{len(records)} records without such a pair. Evaluate both benchmarks."
        )
    lines = {model for model, condition in pairs if (condition or "").startswith(_ALPHA)}
    if len(lines) > 1:
        raise ValueError(f"Expected points on one line, got lines to {sorted(lines)}. Plot one model at a time.")
    points = [pair for (model, condition), pair in pairs.items() if condition is None]
    points.sort(key=lambda point: point is not pairs.get((anchor, None)))
    curve = [
        {**pair, "alpha": float(condition.removeprefix(_ALPHA))}
        for (_, condition), pair in pairs.items()
        if (condition or "").startswith(_ALPHA)
    ]
    ends = [(anchor, 0.0), (next(iter(lines), None), 1.0)] if curve else []
    curve += [{**pairs[model, None], "alpha": alpha} for model, alpha in ends if (model, None) in pairs]
    return points, sorted(curve, key=lambda point: point["alpha"])


def plot_curve(records: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, anchor: str | None = None) -> None:
    """Draw [`tradeoff_points`] of records, zero-shot top-1 to the right and text-to-image R@1 up.

    Raises:
        ValueError: As in [`tradeoff_points`], or if the file is no `.png`.
    """
    points, curve = tradeoff_points(records, anchor)
    plot_tradeoff(points or curve, path, curve=curve, x_label="zero-shot top-1 (%)")
