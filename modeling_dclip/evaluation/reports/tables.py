"""Markdown tables from what the scripts in `benchmarks/` wrote. Pure: dicts in, text out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.benchmarks.suite import averages_of_records, suite_name
from modeling_dclip.evaluation.reports.metric_names import METRIC_TITLES, Metric, comparison_title, metric_of, percent
from modeling_dclip.evaluation.statistics import seed_interval

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
    """Lay out a table: the first `left` columns to the left, the others to the right; all lines equally wide;
    pipes escaped.
    """
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
    """Show `12.3 ± 0.4` where the interval is symmetric, `12.3 [11.0, 14.1]` where it is not or covers images,
    and `12.3` where there is none.
    """
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

    In bold is the best *as shown*: all that show the same best number, in the metric's own direction, among several
    records of one benchmark on the same data; none where all show the same, or the metric has no better direction.
    Bold says nothing of noise: the intervals do, and
    [`~modeling_dclip.evaluation.reports.comparison.compare_results`].

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.records.read_results`].
        metrics (`Sequence[str]`, *optional*): Which metrics, in this order; all if not given. Kinds without any of
            them are left out.
        best (`bool`, *optional*, defaults to `False`): Whether the best of several models on one benchmark is in bold.
        columns (`Sequence[str]`, *optional*): What stands before the metrics, of `COLUMNS`.

    Returns:
        `str`: Markdown. Shares in percent, other metrics in their units, with their intervals where a record holds
            them, and a line on what those are; after the metrics gain and retention, where a record holds them.

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
        summary (`dict`): From [`~modeling_dclip.evaluation.statistics.summarise_arms`]; more keys do no harm.
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
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.leakage.evaluate_leakage`], on one benchmark.
            Those with one label are trainings of one teacher with several seeds.
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
                f"Expected a 'condition' and the metric {metric!r} in every record, got {record.get('condition')!r} "
                f"and {sorted(record['metrics'])} for {record['model']!r}."
            )
        cells.setdefault((record["condition"], record.get("label", record["model"])), []).append(record)
    conditions, labels = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    measured = {(record["benchmark"], record["dataset_fingerprint"], record["n"]) for record in records}
    if len(measured) != 1 or len(cells) != len(conditions) * len(labels):
        raise ValueError(
            f"Expected every condition for every label on one benchmark, got {sorted(cells)} on {sorted(measured)}. "
            "Measure them again."
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


# The averages of the zero-shot suite as a table, for every model that was measured on sets of it.


def render_averages(records: Sequence[Mapping[str, Any]]) -> str:
    """Show each model's averages over the sets it was measured on, and over how many they are.

    Args:
        records (`Sequence[dict]`): From [`~modeling_dclip.evaluation.records.read_results`]. Points between two models
            and splits are averaged apart.

    Returns:
        `str`: Markdown; empty where no record is of a set of the suite.

    Raises:
        ValueError: If two records of one model and split are of one set.
    """
    models: dict[tuple[str | None, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        kind, _, spec = record["benchmark"].partition("=")
        if kind == "zero_shot" and suite_name(spec) is not None:
            key = record["model"], record.get("condition"), record.get("split")
            models.setdefault(key, []).append(record)
    rows, several = [], len({split for *_, split in models}) > 1
    for (_, _, split), own in models.items():
        label = row_title(own[0]) + (f", {split}" if several else "")
        for title, average in averages_of_records(own).items():
            if average.value is not None:
                rows.append([label, title, percent(average.value), f"{average.n_measured} of {average.n_defined}"])
    return markdown_table(["Model", "Average", "%", "sets"], rows, left=2) if rows else ""


CLOCKS = {"cpu_ms": "CPU ms", "latency_ms": "ms"}


def _ms(value: float) -> str:
    """Three digits that count, or more before the point: two rows whose
    ratio shows a difference show it themselves.
    """
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _spread(value: Mapping[str, float] | None, digits: int | None = None) -> str:
    """A median with the smallest and the largest of its rounds: of so many decimals, or as times."""
    if value is None:
        return "–"
    median, low, high = (
        _ms(value[name]) if digits is None else f"{value[name]:.{digits}f}" for name in ("median", "min", "max")
    )
    return f"{median} [{low}, {high}]"


def _note(data: Mapping[str, Any], measured: str) -> str:
    hardware, arguments = data["hardware"], data["arguments"]
    device = arguments.get("device", "cpu")
    where = hardware["cpu"] if device == "cpu" else ", ".join(hardware["gpus"])
    threads = f", {arguments['threads']} thread(s)" if device == "cpu" and "threads" in arguments else ""
    return f"{measured} {where}{threads}, PyTorch {data['versions']['torch']}."


def render_encoders(data: Mapping[str, Any], *, cells: str = "native@1", over: str = "") -> str:
    """Cost of image encoders beside each other.

    Args:
        data (`Mapping`): What `benchmarks/image_encoders.py` wrote.
        cells (`str`, *optional*, defaults to `"native@1"`): Comma-separated cells `SIZE@BATCH`, in the order to show.
        over (`str`, *optional*): Comma-separated encoders whose ratio has a column. By default all that rows are
            compared with.

    Returns:
        `str`: Markdown.

    Raises:
        ValueError: If a cell was not measured.
    """
    measured = {row["cell"] for row in data["rows"]}
    chosen = cells.split(",")
    if missing := [cell for cell in chosen if cell not in measured]:
        raise ValueError(f"Expected cells of {sorted(measured)}, got {missing[0]!r}.")
    rows = [row for cell in chosen for row in data["rows"] if row["cell"] == cell]
    baselines = over.split(",") if over else list(dict.fromkeys(name for row in rows for name in row["time_over"]))
    clock = data["clock_of_ratios"]
    header = ["Image encoder", "px", "batch", "parameters, M", "GFLOP", CLOCKS[clock]]
    lines = []
    for row in rows:
        line = [row["encoder"], str(row["image_size"]), str(row["batch_size"]), f"{row['eager_parameters'] / 1e6:.1f}"]
        line += [f"{row['eager_gflops']:.1f}", _ms(row[clock]["median"])]
        lines.append(line + [_spread(row["time_over"].get(name), 2) for name in baselines])
    table = markdown_table([*header, *(f"/ {name}" for name in baselines)], lines)
    note = (
        "Medians of interleaved rounds, ratios with the smallest and largest round; GFLOP are of one batch, and like "
        "the parameters the eager float32 model's in every form."
    )
    return f"{table}\n\n{_note(data, note)}"


def render_scan(data: Mapping[str, Any]) -> str:
    """Cost of the selective scan's paths against mamba-ssm's reference algorithm and a plain loop.

    Args:
        data (`Mapping`): What `benchmarks/selective_scan.py` wrote.

    Returns:
        `str`: Markdown.
    """
    header = ["(batch, channels, length)", "forward, ms", "× mamba-ssm's algorithm", "× plain loop"]
    header += ["forward + backward, ms", "× mamba-ssm's algorithm", "× plain loop"]
    lines = []
    for row in data["rows"]:
        path, line = row["paths"]["torch"], ["({}, {}, {})".format(*row["shape"])]
        for work in ("forward", "forward_backward"):
            line.append(_ms(path[f"{work}_ms"]["median"]))
            for baseline in ("mamba_ssm_reference_algorithm", "reference"):
                line.append(_spread(path.get(f"{work}_times_faster_than_{baseline}"), 1))
        lines.append(line)
    note = (
        "× is how many times faster, the median of interleaved rounds with the smallest and largest; state size 8, "
        "float32."
    )
    return f"{markdown_table(header, lines)}\n\n{_note(data, note)}"


def render_student_step(data: Mapping[str, Any]) -> str:
    """Time of a student's step with teacher and text tower online against one with stored targets.

    Args:
        data (`Mapping`): What `benchmarks/student_step.py` wrote.

    Returns:
        `str`: Markdown.
    """
    header = ["Student's step", "ms", "× stored targets"]
    lines = [
        ["stored targets", _spread(data["cached_ms"]), "1"],
        ["teacher and text tower online", _spread(data["online_ms"]), _spread(data["online_over_cached"], 2)],
    ]
    note = _note(data, "Medians of interleaved rounds, with the smallest and largest.")
    return f"{markdown_table(header, lines)}\n\n{note}"


def render_retrieval(data: Mapping[str, Any]) -> str:
    """Cost of retrieval metrics against clip_benchmark's on the same embeddings, and how ours grows.

    Args:
        data (`Mapping`): What `benchmarks/retrieval.py` wrote.

    Returns:
        `str`: Markdown, two tables.
    """
    costs = (("cpu_s", "times_faster", 2), ("peak_memory_mib", "times_less_memory", 0))
    header = ["Images", "captions"]
    for what in ("CPU s", "MiB"):
        header += [f"{what}, ours", f"{what}, clip_benchmark", "×"]
    lines = []
    for row in data["rows"]:
        line = [f"{row['images']:,}", f"{row['captions']:,}"]
        for cost, ratio, digits in costs:
            line += [
                f"{row[side][cost]['median']:.{digits}f}" if side in row else "–"
                for side in ("ours", "clip_benchmark")
            ]
            line.append(_spread(row.get(ratio), 1))
        lines.append(line)
    table = markdown_table(header, lines, left=0)
    note = (
        "× is how many times less ours takes, the median of interleaved rounds "
        f"({', '.join(str(row['rounds']) for row in data['rows'])}) with the smallest and largest; memory is what the "
        f"process holds at most beyond its start, the {data['arguments']['width']}-wide float32 embeddings it "
        f"collects included; clip_benchmark {data['versions']['clip_benchmark']}."
    )
    note += "".join(f" At {row['images']:,} images: {row['not_run']}." for row in data["rows"] if "not_run" in row)
    grown = [
        [f"{row['captions']:,}", f"{row['cpu_s']:.1f}", f"{row['peak_memory_mib']:.0f}"] for row in data["growth"]
    ]
    growth = markdown_table(["Captions", "CPU s, ours", "MiB, ours"], grown, left=0)
    return f"{table}\n\n{_note(data, note)}\n\n{growth}"


def render_onnx_towers(data: Mapping[str, Any]) -> str:
    """Both towers under ONNX Runtime against PyTorch: speed, and how far the outputs are from the model's.

    Args:
        data (`Mapping`): What `benchmarks/onnx_towers.py` wrote.

    Returns:
        `str`: Markdown.
    """
    lines = [
        [
            f"{row['tower']}, {row['form']}",
            f"{row['cpu_ms']['median']:.0f}",
            _spread(row["eager_over"], 2),
            *(
                [f"{row['mebibytes']:.0f}", f"{row['max_relative_difference']:.1e}", f"{row['min_cosine']:.5f}"]
                if "mebibytes" in row
                else ["–"] * 3
            ),
        ]
        for row in data["rows"]
    ]
    header = ["Tower", "CPU ms", "× eager", "MiB", "largest difference", "smallest cosine"]
    note = (
        f"Random weights of ViT-B/16's size, batch {data['arguments']['batch_size']}; × is how many times faster than "
        "eager PyTorch, the median of interleaved rounds with the smallest and largest; differences relative to the "
        "largest output."
    )
    return f"{markdown_table(header, lines)}\n\n{_note(data, note)}"


def render_index(data: Mapping[str, Any]) -> str:
    """Build and query times of search indexes.

    Args:
        data (`Mapping`): What `benchmarks/index.py` wrote.

    Returns:
        `str`: Markdown.
    """
    asked = data["arguments"]
    recall = f"recall@{asked['top_k']}"
    lines = [
        [
            kind if kind == "uniform" else f"{kind}, spread {asked['spread']:g}",
            index,
            f"{row['build_s']:.1f}",
            f"{row['query_ms']['median']:.2f}",
            f"{row['query_ms']['p95']:.2f}",
            f"{row[recall]:.3f}",
        ]
        for kind, indexes in data["results"].items()
        for index, row in indexes.items()
    ]
    header = ["Vectors", "index", "build, s", "query, ms", "95 % below, ms", recall]
    note = (
        f"{asked['n']:,} random unit vectors of {asked['dim']}; embedding pictures is not part of it. Recall of the "
        "exact answers."
    )
    return f"{markdown_table(header, lines, left=2)}\n\n{_note(data, note)}"


# By the name of the table in Markdown: what renders it, and its options.
BENCHMARK_TABLES: dict[str, tuple[Callable[..., str], set[str]]] = {
    "encoders": (render_encoders, {"cells", "over"}),
    "index": (render_index, set()),
    "onnx_towers": (render_onnx_towers, set()),
    "retrieval": (render_retrieval, set()),
    "scan": (render_scan, set()),
    "student_step": (render_student_step, set()),
}
