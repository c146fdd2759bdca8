"""Markdown tables from records and summaries. Pure: dicts in, text out."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.intervals import seed_interval

METRIC_TITLES = {
    "text_to_image_recall@1": "T→I R@1",
    "text_to_image_recall@5": "T→I R@5",
    "text_to_image_recall@10": "T→I R@10",
    "text_to_image_mrr": "T→I MRR",
    "text_to_image_map": "T→I mAP",
    "image_to_text_recall@1": "I→T R@1",
    "image_to_text_recall@5": "I→T R@5",
    "image_to_text_recall@10": "I→T R@10",
    "image_to_text_mrr": "I→T MRR",
    "image_to_text_map": "I→T mAP",
    "top1": "top-1",
    "top5": "top-5",
    "text_to_teacher_recall@1": "sentence→teacher R@1",
    "teacher_to_text_recall@1": "teacher→sentence R@1",
}
LEAKAGE_TITLES = {
    "as_trained": "own regions, own caption",
    "regions_shuffled": "another image's regions, own caption",
    "captions_shuffled": "own regions, another image's caption",
    "text_share_0": "own regions, own caption, text share 0",
    "text_share_0_regions_shuffled": "another image's regions, own caption, text share 0",
    "whole_image": "no teacher: CLIP's embedding of the image",
    "chance": "chance",
}
COMPARISON_TITLES = {"text_to_image_recall@1_gain": "T→I R@1 gain", "top1_retention": "top-1 kept"}
INTERVAL_NOTES = {
    "seeds": "±: {:.0%} t-interval over training seeds, on one test set.",
    "images": "In brackets: {:.0%} bootstrap interval over test images, for these checkpoints.",
}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lay out a table: the first `left` columns to the left, the others to the right; all lines equally wide; pipes escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]

    def line(row: Sequence[str]) -> str:
        padded = (
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(row) for row in (cells[0], rule, *cells[1:]))


def percent(value: float, *, signed: bool = False) -> str:
    """Show a share as a percentage with one decimal: 0.1234 -> "12.3"."""
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return "0.0" if float(text) == 0 else text


def show_interval(interval: Mapping[str, Any], *, signed: bool = False) -> str:
    """Show `12.3 ± 0.4` where the interval is symmetric, `12.3 [11.0, 14.1]` where it is not or covers images, and `12.3` where there is none."""
    estimate, low, high = (interval[name] for name in ("estimate", "low", "high"))
    text = percent(estimate, signed=signed)
    if low is None and high is None:
        return text
    symmetric = low is not None and high is not None and abs((high - estimate) - (estimate - low)) < 1e-9
    if (
        symmetric and interval.get("covers") != "images"
    ):  # there it is by chance, and the notes tell the two kinds by their form
        return f"{text} ± {percent(high - estimate)}"
    ends = ["∞" if end is None else percent(end, signed=signed) for end in (low, high)]
    return f"{text} [{ends[0]}, {ends[1]}]"


def render_table(
    records: Sequence[Mapping[str, Any]], *, metrics: Sequence[str] | None = None, best: bool = False
) -> str:
    """Show results records, one row each, one table for each kind of benchmark (records with the same metrics).

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.results.read_results`].
        metrics (`Sequence[str]`, *optional*): Which metrics, in this order; all if not given. Kinds without any of them are left out.
        best (`bool`, *optional*, defaults to `False`): Whether the best of several models on one benchmark is in bold.

    Returns:
        `str`: Markdown. Metrics in percent; after them gain and retention with their intervals, where a record holds them.

    Raises:
        ValueError: If there is no record, or none has one of the metrics.
    """
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        names = tuple(name for name in metrics or record["metrics"] if name in record["metrics"])
        if names:
            kinds.setdefault(names, []).append(record)
    if not kinds:
        raise ValueError(
            f"Expected records with any of the metrics {metrics or 'at all'}, got {len(records)} without."
        )
    return "\n\n".join(_render_kind(names, kind, best) for names, kind in kinds.items())


def _render_kind(names: Sequence[str], records: Sequence[Mapping[str, Any]], best: bool) -> str:
    compared = [key for key in COMPARISON_TITLES if any(key in record.get("comparison", {}) for record in records)]
    header = ["Model", "Benchmark", "n", *(METRIC_TITLES.get(name, name) for name in names)]
    rows = []
    for record in records:
        rivals = [other["metrics"] for other in records if other["benchmark"] == record["benchmark"]]
        row = [record.get("label", record["model"]), record["benchmark"], f"{record['n']:,}"]
        for name in names:
            value = record["metrics"][name]
            wins = best and len(rivals) > 1 and value == max(rival[name] for rival in rivals)
            row.append(f"**{percent(value)}**" if wins else percent(value))
        for key in compared:
            interval = record.get("comparison", {}).get(key)
            row.append(show_interval(interval, signed=key.endswith("_gain")) + " %" if interval else "–")
        rows.append(row)
    return markdown_table([*header, *(COMPARISON_TITLES[key] for key in compared)], rows, left=2)


def render_summary(summary: Mapping[str, Any], *, where: str = "the summary") -> str:
    """Show a summary of arms: retrieval both ways, zero-shot accuracy, gain and retention, and what the intervals are.

    Args:
        summary (`dict`): From [`~modeling_dclip.evaluation.tradeoff.summarise_arms`]; more keys do no harm.
        where (`str`, *optional*): File, for messages.

    Returns:
        `str`: Markdown: a table, a line on the intervals, and one line per comparison.

    Raises:
        ValueError: If the summary is without arms or an arm is without a needed key; it is named.
    """
    columns = ["text_to_image_recall@1", "image_to_text_recall@1", "top1"]
    if not isinstance(summary, Mapping) or not summary.get("arms"):
        raise ValueError(
            f"Expected the key 'arms' with one or more arms in {where}. Make the file with summarise_arms."
        )
    rows, covers = [], set()
    for row in summary["arms"]:
        missing = [name for name in columns if name not in row.get("metrics", {})]
        if missing or "arm" not in row or "seeds" not in row:
            raise ValueError(f"Expected 'arm', 'seeds' and the metrics {columns} in every arm of {where}, got {row}.")
        cells = [show_interval(row["metrics"][name]) for name in columns]
        cells.append(show_interval(row["gain"], signed=True) if "gain" in row else "–")
        cells.append(show_interval(row["retention"]) if "retention" in row else "–")
        rows.append([row["arm"], f"{len(row['seeds'])}", *cells])
        intervals = [*row["metrics"].values(), *(row[name] for name in ("gain", "retention") if name in row)]
        covers |= {(interval["covers"], interval["confidence"]) for interval in intervals}
    header = ["Model", "Seeds", "T→I R@1 %", "I→T R@1 %", "zero-shot top-1 %", "gain %", "retention %"]
    against = summary.get("anchor", "the anchor")
    notes = [INTERVAL_NOTES[name].format(level) for name, level in sorted(covers) if name in INTERVAL_NOTES]
    notes.append(f"Gain: T→I R@1 relative to {against}; retention: zero-shot top-1 relative to {against}.")
    lines = [markdown_table(header, rows), "", " ".join(notes)]
    for pair in summary.get("comparisons", []):
        shown = (f"{METRIC_TITLES[name]} {show_interval(pair['metrics'][name], signed=True)}" for name in columns)
        lines += ["", f"{pair['student']} minus {pair['baseline']}, paired by seed, in points: {', '.join(shown)}."]
    return "\n".join(lines)


def render_leakage(records: Sequence[Mapping[str, Any]], *, metric: str = "text_to_teacher_recall@1") -> str:
    """Show what teachers reach with parts of their input exchanged: a row for each condition, a column for each label.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.leakage.evaluate_leakage`], on one benchmark. Those with one label
            are trainings of one teacher with several seeds.
        metric (`str`, *optional*, defaults to `"text_to_teacher_recall@1"`): Which to show, in percent.

    Returns:
        `str`: Markdown: a table, and a line on what was measured and what the intervals are.

    Raises:
        ValueError: If a record is of another kind or lacks the metric, a cell is missing, or the benchmarks differ.
    """
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if "condition" not in record or metric not in record["metrics"]:
            raise ValueError(
                f"Expected a 'condition' and the metric {metric!r} in every record, got {record.get('condition')!r} and "
                f"{sorted(record['metrics'])} for {record['model']!r}."
            )
        cells.setdefault((record["condition"], record.get("label", record["model"])), []).append(record)
    conditions, labels = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    measured = {(record["benchmark"], record["dataset_fingerprint"], record["n"]) for record in records}
    if len(measured) != 1 or len(cells) != len(conditions) * len(labels):
        raise ValueError(
            f"Expected every condition for every label on one benchmark, got {sorted(cells)} on {sorted(measured)}. Measure them again."
        )
    rows, covers = [], set()
    for condition in conditions:
        row = [LEAKAGE_TITLES.get(condition, condition)]
        for label in labels:
            interval = _pool_trainings(cells[condition, label], metric)
            covers.add((interval["covers"], interval["confidence"]))
            row.append(show_interval(interval))
        rows.append(row)
    (benchmark, _, n), draws = measured.pop(), [record["draws"][metric] for record in records if "draws" in record]
    trained = {label: len(cells[conditions[0], label]) for label in labels}
    header = [f"{label} ({count} trained)" if count > 1 else label for label, count in trained.items()]
    notes = [f"{METRIC_TITLES.get(metric, metric)} in percent, {n:,} images of `{benchmark.partition('=')[2]}`."]
    if draws:
        apart = max(max(values) - min(values) for values in draws)
        notes.append(
            f"Means of {len(draws[0])} draws of captions and shuffles, which are at most {percent(apart)} apart."
        )
    notes += [INTERVAL_NOTES[name].format(level) for name, level in sorted(covers) if name in INTERVAL_NOTES]
    return "\n".join([markdown_table(["The teacher reads", *header], rows), "", " ".join(notes)])


def _pool_trainings(records: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    """Over training seeds where there are several; else over images, where the record holds it."""
    values = [record["metrics"][metric] for record in records]
    if len(values) == 1 or len(set(values)) == 1:  # what no training moves has no spread over trainings
        return records[0].get("intervals", {}).get(metric) or seed_interval(values[:1]).to_dict()
    return seed_interval(values).to_dict()
