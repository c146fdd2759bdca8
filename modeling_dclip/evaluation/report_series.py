"""From records to what a picture shows: rows with names of their own, runs of several seeds as one series, pairs for the trade-off."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.intervals import seed_interval
from modeling_dclip.evaluation.metric_names import METRICS, metric_of
from modeling_dclip.evaluation.tables import name_of
from modeling_dclip.evaluation.tradeoff import GAIN_METRIC

ALPHA = "alpha="
_SEED = re.compile(r"^(.*), seed \d+$")  # how the arms of an experiment are labelled, one run each
Record = Mapping[str, Any]


def kind_of(record: Record) -> str:
    """`retrieval` of `retrieval=coco:...`."""
    return record["benchmark"].partition("=")[0]


def shorten_benchmark(benchmark: str, most: int = 64) -> str:
    """What a heading says of a benchmark: its source, of every path the last two parts.

    Example:
        >>> shorten_benchmark("retrieval=coco:/data/coco/annotations/captions_val2017.json:/data/coco/val2017")
        'coco:annotations/captions_val2017.json:coco/val2017'
    """
    kind, _, spec = benchmark.partition("=")
    text = re.sub(r"[^:,=]*/([^:,=/]+/[^:,=/]+)", r"\1", spec or kind)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


def order_metrics(records: Sequence[Record]) -> list[str]:
    """All metrics of the records: known ones in the order of `METRICS`, the others as they come."""
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    known = list(METRICS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def merge_rows(found: Sequence[tuple[str, Record]]) -> tuple[list[dict[str, Any]], int]:
    """Make rows of one table: each with a label of its own, the same measurement once, runs of one arm as their mean.

    Runs are an arm's where they differ in the label's `, seed N`, as [`~modeling_dclip.evaluation.arms.evaluate_arms`] writes it, and are of
    the same data. Their row has the means, intervals over seeds in place of those over images, and the number of `runs`.

    Args:
        found (`Sequence[tuple[str, dict]]`): Name of the file, record.

    Returns:
        `tuple[list[dict], int]`: Records with other labels; and how many records were left out since they repeat another: the same weights,
        data and numbers.
    """
    unique: dict[str, tuple[Record, list[str]]] = {}
    for source, record in found:
        names = ("revision", "benchmark", "dataset_fingerprint", "condition", "settings", "seed", "metrics")
        key = repr([record.get(name) for name in names])
        unique.setdefault(key, (record, []))[1].append(source)
    several = len({source for source, _ in found}) > 1
    arms: dict[tuple[str, ...], list[Record]] = {}
    for record, sources in unique.values():
        where = f" ({', '.join(dict.fromkeys(sources))})" if several else ""
        condition = f", {record['condition']}" if "condition" in record else ""
        run = _SEED.match(name_of(record))
        label = f"{run[1] if run else name_of(record)}{condition}{where}"
        data = (record["benchmark"], record["dataset_fingerprint"], repr(record.get("settings")))
        place = (label, *data, "" if run else str(len(arms)))  # only runs that say so are one arm's
        arms.setdefault(place, []).append({**record, "label": label})
    return [_average(runs) if len(runs) > 1 else runs[0] for runs in arms.values()], len(found) - len(unique)


def _average(runs: Sequence[Record]) -> dict[str, Any]:
    """One row for the runs of an arm."""
    row = {name: value for name, value in runs[0].items() if name not in ("seed", "comparison", "draws")}
    names = [name for name in runs[0]["metrics"] if all(name in run["metrics"] for run in runs)]
    row["intervals"] = {name: seed_interval([float(run["metrics"][name]) for run in runs]).to_dict() for name in names}
    row["metrics"] = {name: row["intervals"][name]["estimate"] for name in names}
    ratios = [run.get("comparison", {}) for run in runs]
    row["comparison"] = {
        name: seed_interval([ratio[name]["estimate"] for ratio in ratios]).to_dict()
        for name, value in ratios[0].items()
        if isinstance(value, Mapping) and all(name in ratio for ratio in ratios)
    }
    if anchor := ratios[0].get("anchor_revision"):
        row["comparison"]["anchor_revision"] = anchor
    weights = list(dict.fromkeys(run["revision"] for run in runs))
    return {
        **row,
        "runs": len(runs),
        "revision": f"{len(weights)} trained" if len(weights) > 1 else weights[0],
        "weights": weights,
    }


def _interval(row: Record, metric: str) -> dict[str, Any]:
    bare = {"low": None, "high": None, "covers": "nothing"}
    return {**row.get("intervals", {}).get(metric, bare), "estimate": float(row["metrics"][metric])}


def bars(rows: Sequence[Record], metrics: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Panels of [`~modeling_dclip.evaluation.report_plots.plot_bars`] from [`merge_rows`]' rows, one for each metric that a row has."""
    panels = {}
    for name in (name for name in metrics if any(name in row["metrics"] for row in rows)):
        metric = metric_of(name)
        panel = panels.setdefault(f"{metric.heading}{' (%)' if metric.unit == '%' else ''}", [])
        for row in rows:
            label = f"{row['label']} ×{row['runs']}" if "runs" in row else row["label"]
            if name not in row["metrics"]:
                panel.append({"label": label, "value": None})
                continue
            interval = _interval(row, name)
            ends = {end: None if interval[end] is None else metric.in_unit(interval[end]) for end in ("low", "high")}
            value = interval["estimate"]
            panel.append({"label": label, "value": metric.in_unit(value), "text": metric.show(value), **ends})
    return panels


def pair_tradeoff(
    rows: Sequence[Record], others: Sequence[Record]
) -> tuple[list[dict[str, Any]], dict[str, list], list[str]]:
    """Pair retrieval with zero-shot accuracy of the same weights.

    Accuracy is the mean over the zero-shot benchmarks that all these models have; if there is none, the one that most of them have.

    Args:
        rows (`Sequence[dict]`): Of one retrieval benchmark, from [`merge_rows`].
        others (`Sequence[dict]`): Of zero-shot benchmarks, from [`merge_rows`].

    Returns:
        `tuple`: Points (the anchor first, if records name one) and curves (by model, over the weights between it and its anchor) of
        [`~modeling_dclip.evaluation.plots.plot_tradeoff`], and the zero-shot benchmarks. Without two points, all three are empty.
    """
    accuracy: dict[tuple, dict[str, dict[str, Any]]] = {}
    for other in others:
        if "top1" in other["metrics"]:
            accuracy.setdefault(weights_of(other), {})[other["benchmark"]] = _interval(other, "top1")
    paired = [row for row in rows if GAIN_METRIC in row["metrics"] and weights_of(row) in accuracy]
    counts = Counter(name for row in paired for name in accuracy[weights_of(row)])
    chosen = [name for name, count in counts.items() if count == len(paired)]
    chosen = chosen or [name for name, _ in counts.most_common(1)]
    paired = [row for row in paired if set(chosen) <= set(accuracy[weights_of(row)])]
    anchors = {row["comparison"].get("anchor_revision") for row in rows if "comparison" in row}
    points, curves = [], {}
    for row in sorted(paired, key=lambda row: row["revision"] not in anchors or "condition" in row):
        found = [accuracy[weights_of(row)][name] for name in chosen]
        alone = (
            found[0] if len(found) == 1 else {"low": None, "high": None}
        )  # a mean's interval is not the intervals' mean
        retrieval = _interval(row, GAIN_METRIC)
        point = {
            "label": row["label"],
            "x": sum(one["estimate"] for one in found) / len(found),
            "y": retrieval["estimate"],
        }
        point |= {"x_interval": (alone["low"], alone["high"]), "y_interval": (retrieval["low"], retrieval["high"])}
        if row.get("condition", "").startswith(ALPHA):
            curves.setdefault(f"{row['model']}, α", []).append(
                {**point, "label": row["condition"].removeprefix(ALPHA)}
            )
        else:
            points.append(point)
    for steps in curves.values():
        steps.sort(key=lambda step: float(step["label"]))
    return (points, curves, chosen) if points and len(paired) > 1 else ([], {}, [])


def weights_of(record: Record) -> tuple:
    """What identifies a row's model: its weights, of a mean those of every run, and the point between two models."""
    return tuple(record.get("weights", [record["revision"]])), record.get("condition")
