"""Markdown tables from records and summaries. Pure: dicts in, text out."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.intervals import seed_interval
from modeling_dclip.evaluation.metric_names import METRIC_TITLES, Metric, comparison_title, metric_of, percent

LEAKAGE_TITLES = {
    "as_trained": "own regions, own caption",
    "regions_shuffled": "another image's regions, own caption",
    "captions_shuffled": "own regions, another image's caption",
    "text_share_0": "own regions, own caption, text share 0",
    "text_share_0_regions_shuffled": "another image's regions, own caption, text share 0",
    "whole_image": "no teacher: CLIP's embedding of the image",
    "chance": "chance",
}
SHARE = Metric("", "%", True)
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


def show_interval(interval: Mapping[str, Any], *, signed: bool = False, metric: Metric = SHARE) -> str:
    """Show `12.3 ± 0.4` where the interval is symmetric, `12.3 [11.0, 14.1]` where it is not or covers images, and `12.3` where there is none."""
    estimate, low, high = (interval[name] for name in ("estimate", "low", "high"))
    text = metric.show(estimate, signed=signed)
    if low is None and high is None:
        return text
    symmetric = low is not None and high is not None and abs((high - estimate) - (estimate - low)) < 1e-9
    if (
        symmetric and interval.get("covers") != "images"
    ):  # there it is by chance, and the notes tell the two kinds by their form
        return f"{text} ± {metric.show(high - estimate)}"
    ends = ["∞" if end is None else metric.show(end, signed=signed) for end in (low, high)]
    return f"{text} [{ends[0]}, {ends[1]}]"


def name_of(record: Mapping[str, Any]) -> str:
    """What a row is called: the record's label, or else the model."""
    return record.get("label", record["model"])


def row_title(record: Mapping[str, Any]) -> str:
    """[`name_of`] and, of a point between two models or another condition, which it is."""
    return ", ".join([name_of(record), *([record["condition"]] if "condition" in record else [])])


COLUMNS = {
    "model": ("Model", name_of),
    "benchmark": ("Benchmark", lambda record: record["benchmark"]),
    "n": ("n", lambda record: f"{record['n']:,}"),
    "runs": ("Seeds", lambda record: str(record.get("runs", 1))),
    "data": ("Data", lambda record: short_hash(record["dataset_fingerprint"])),
    "revision": ("Weights", lambda record: short_hash(record["revision"])),
}


def short_hash(text: str) -> str:
    """The first eight digits of `sha256:<hex>` or `commit:<hex>`; anything else as it is."""
    kind, _, digits = text.partition(":")
    return digits[:8] if digits and kind in ("sha256", "commit") else text


def render_table(
    records: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str] | None = None,
    best: bool = False,
    columns: Sequence[str] = ("model", "benchmark", "n"),
) -> str:
    """Show results records, one row each, one table for each kind of benchmark (records with the same metrics).

    In bold is the best *as shown*: all that show the same best number, in the metric's own direction, among several records of one
    benchmark on the same data; none where all show the same, or the metric has no better direction. Bold says nothing of noise: the
    intervals do, and [`~modeling_dclip.evaluation.comparison.compare_results`].

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.results.read_results`].
        metrics (`Sequence[str]`, *optional*): Which metrics, in this order; all if not given. Kinds without any of them are left out.
        best (`bool`, *optional*, defaults to `False`): Whether the best of several models on one benchmark is in bold.
        columns (`Sequence[str]`, *optional*): What stands before the metrics, of `COLUMNS`.

    Returns:
        `str`: Markdown. Shares in percent, other metrics in their units, with their intervals where a record holds them, and a line on
        what those are; after the metrics gain and retention, where a record holds them.

    Raises:
        ValueError: If there is no record, none has one of the metrics, or a column is unknown.
    """
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(f"Expected columns of {list(COLUMNS)}, got {unknown[0]!r}.")
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        names = tuple(name for name in metrics or record["metrics"] if name in record["metrics"])
        if names:
            kinds.setdefault(names, []).append({**record, "label": row_title(record)})
    if not kinds:
        raise ValueError(
            f"Expected records with any of the metrics {metrics or 'at all'}, got {len(records)} without."
        )
    return "\n\n".join(render_rows(kind, names, best=best, columns=columns) for names, kind in kinds.items())


def render_rows(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], *, best: bool, columns: Sequence[str]
) -> str:
    """One table of these records and metrics, for [`render_table`]; a metric that a record lacks is a dash."""
    compared = list(dict.fromkeys(key for record in records for key in record.get("comparison", {})))
    compared = [key for key in compared if comparison_title(key)]
    winners = _find_best(records, names) if best else set()
    rows = []
    for index, record in enumerate(records):
        row = [COLUMNS[name][1](record) for name in columns]
        for name in names:
            cell = _show_metric(record, name)
            value, _, rest = cell.partition(" ")
            row.append(f"**{value}** {rest}".strip() if (index, name) in winners else cell)
        for key in compared:
            interval = record.get("comparison", {}).get(key)
            row.append(show_interval(interval, signed=key.endswith("_gain")) + " %" if interval else "–")
        rows.append(row)
    header = [COLUMNS[name][0] for name in columns] + [metric_of(name).heading for name in names]
    left = next((i for i, name in enumerate(columns) if name in ("n", "runs")), len(columns))
    table = markdown_table([*header, *(comparison_title(key) for key in compared)], rows, left=left)
    kinds = {
        (interval["covers"], interval["confidence"])
        for record in records
        for name, interval in record.get("intervals", {}).items()
        if name in names and interval["low"] is not None
    }
    notes = [INTERVAL_NOTES[name].format(level) for name, level in sorted(kinds) if name in INTERVAL_NOTES]
    return "\n\n".join([table, " ".join(notes)]) if notes else table


def _show_metric(record: Mapping[str, Any], name: str) -> str:
    if name not in record["metrics"]:
        return "–"
    interval = record.get("intervals", {}).get(name, {"low": None, "high": None})
    return show_interval({**interval, "estimate": record["metrics"][name]}, metric=metric_of(name))


def _find_best(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> set[tuple[int, str]]:
    """`(row, metric)` of the cells to set in bold."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault((record["benchmark"], record["dataset_fingerprint"]), []).append(index)
    winners = set()
    for rows in groups.values():
        for name in names:
            metric = metric_of(name)
            values = {index: records[index]["metrics"][name] for index in rows if name in records[index]["metrics"]}
            shown = {index: metric.show(value) for index, value in values.items()}
            if metric.higher_is_better is None or len(set(shown.values())) < 2:
                continue
            top = metric.show((max if metric.higher_is_better else min)(values.values()))
            winners |= {(index, name) for index, text in shown.items() if text == top}
    return winners


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
