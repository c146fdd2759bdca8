"""One report from any set of results files: Markdown with its pictures beside it, and one HTML page that needs nothing
else.

The report is a value ([`~modeling_dclip.evaluation.reports.document.Report`]): records, summaries of arms and
measurements of speed become tables, pictures and notes, and these are rendered once to each form.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from modeling_dclip.data.files import (
    find_files,
    list_folder,
    read_bytes,
    read_json,
    temporary_folder,
    write_bytes,
    write_text,
)
from modeling_dclip.evaluation.arms import tradeoff_points
from modeling_dclip.evaluation.equal_retention import RETENTION_KEYS, tabulate_at_retention
from modeling_dclip.evaluation.line import place_of_student, place_on_line
from modeling_dclip.evaluation.records import Record, arm_of, read_results
from modeling_dclip.evaluation.reports.benchmark_tables import BENCHMARK_TABLES, tabulate_encoders
from modeling_dclip.evaluation.reports.comparison import find_conflicts, measured_on
from modeling_dclip.evaluation.reports.document import (
    Block,
    Cell,
    Code,
    Findings,
    Heading,
    Links,
    Picture,
    Report,
    Table,
    Terms,
    Text,
    Warnings,
    render_html,
    render_markdown,
)
from modeling_dclip.evaluation.reports.gallery import page_name
from modeling_dclip.evaluation.reports.metric_names import METRICS, metric_of
from modeling_dclip.evaluation.reports.plots import (
    ATTENTION_STEM,
    CURVES_NAME,
    GREY,
    MARKERS,
    Bar,
    TradeoffPoint,
    plot_bars,
    plot_growth,
    plot_suite,
    plot_tradeoff,
    style_of,
)
from modeling_dclip.evaluation.reports.tables import (
    ABSENT,
    HEADLINES,
    interval_of,
    name_of,
    short_hash,
    shorten_benchmark,
    shorten_paths,
    tabulate_leakage,
    tabulate_rows,
    tabulate_summary,
)
from modeling_dclip.evaluation.reports.verdict import Verdict, advice_of, group_models, judge
from modeling_dclip.evaluation.statistics import GAIN_METRIC, RETENTION_METRIC, IntervalDict, Summary, seed_interval
from modeling_dclip.progress import count_of


def _kind_of(record: Record) -> str:
    """`retrieval` of `retrieval=coco:...`."""
    return record["benchmark"].partition("=")[0]


def benchmark_heading(benchmark: str, most: int = 64) -> str:
    """The heading of a benchmark: its source, with the last two parts of every local path; at most `most` characters.

    Example:
        >>> benchmark_heading("retrieval=coco:/data/coco/annotations/captions_val2017.json:/data/coco/val2017")
        'coco:annotations/captions_val2017.json:coco/val2017'
    """
    kind, _, spec = shorten_benchmark(benchmark).partition("=")
    text = spec or kind
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


class Row(Record, total=False):
    """A row of a table: a record, or the mean of the runs of an arm.

    Attributes:
        series (`str`): Which model it is, whatever its condition and file; a model has one colour in all pictures.
        runs (`int`): Runs of the mean; a single record has no such key.
        weights (`list[str]`): The `revision` of each run of the mean.
    """

    series: str
    runs: int
    weights: list[str]


def order_metrics(records: Sequence[Record]) -> list[str]:
    """All metrics of the records: known ones in the order of `METRICS`, the others as they come."""
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    known = list(METRICS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def merge_rows(found: Sequence[tuple[str, Record]]) -> tuple[list[Row], int]:
    """Make rows of one table: each with a label of its own, the same measurement once, runs of one arm as their mean.

    Runs belong to one arm if [`~modeling_dclip.evaluation.arms.arm_of`] names the same arm and they were measured on
    the same data. Their row has the means, intervals over seeds in place of those over images, and the number of
    `runs`.

    Args:
        found (`Sequence[tuple[str, dict]]`): Name of the file, record.

    Returns:
        `tuple[list[Row], int]`: Records with other labels, which name the file only where rows of two files would have
            one label; and how many records were left out because they repeat
            another one: the same weights, data and numbers.
    """
    unique: dict[str, tuple[Record, list[str]]] = {}
    for source, record in found:
        names = ("revision", "benchmark", "dataset_fingerprint", "condition", "settings", "seed", "metrics")
        key = repr([record.get(name) for name in names])
        unique.setdefault(key, (record, []))[1].append(source)
    arms: dict[tuple[str, ...], list[Record]] = {}
    for record, sources in unique.values():
        where = ", ".join(dict.fromkeys(sources))
        condition = f", {record['condition']}" if "condition" in record else ""
        arm = arm_of(record)
        series = name_of(record) if arm is None else arm
        label = f"{series}{condition}"
        data = (record["benchmark"], record["dataset_fingerprint"], repr(record.get("settings")))
        place = (label, where, *data, str(len(arms)) if arm is None else "")  # a record of no arm has its own row
        arms.setdefault(place, []).append({**record, "label": label, "series": series})
    # A name is followed by the files only where rows of other files have it too.
    files: dict[str, set[str]] = {}
    for label, where, *_ in arms:
        files.setdefault(label, set()).add(where)
    for (label, where, *_), runs in arms.items():
        if len(files[label]) > 1:
            runs[:] = [{**run, "label": f"{label} ({where})"} for run in runs]
    return [_average(runs) if len(runs) > 1 else runs[0] for runs in arms.values()], len(found) - len(unique)


def _average(runs: Sequence[Record]) -> Row:
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


def bars(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, list[Bar]]:
    """Make the panels of [`~modeling_dclip.evaluation.reports.plots.plot_bars`] from the rows of [`merge_rows`].

    Args:
        rows (`Sequence[Row]`): Of one benchmark.
        metrics (`Sequence[str]`): Names; a metric that no row has gets no panel.

    Returns:
        `dict[str, list[Bar]]`: By heading, in the unit of the metric.
    """
    panels = {}
    for name in (name for name in metrics if any(name in row["metrics"] for row in rows)):
        metric = metric_of(name)
        panel = panels.setdefault(f"{metric.heading}{' (%)' if metric.unit == '%' else ''}", [])
        for row in rows:
            label = f"{row['label']} ×{row['runs']}" if "runs" in row else row["label"]
            if name not in row["metrics"]:
                panel.append({"label": label, "series": row["series"], "value": None})
                continue
            interval = interval_of(row, name)
            ends = {end: None if interval[end] is None else metric.in_unit(interval[end]) for end in ("low", "high")}
            value = interval["estimate"]
            shown = {"value": metric.in_unit(value), "text": metric.show(value), **ends}
            panel.append({"label": label, "series": row["series"], **shown})
    return panels


def pair_tradeoff(
    rows: Sequence[Row], others: Sequence[Row]
) -> tuple[list[TradeoffPoint], dict[str, list[TradeoffPoint]], list[str]]:
    """Pair retrieval with zero-shot accuracy of the same weights.

    Accuracy is the mean over the zero-shot benchmarks that all these models have. If there is no such benchmark, it is
    the one that most of them have.

    Args:
        rows (`Sequence[Row]`): Of one retrieval benchmark, from [`merge_rows`].
        others (`Sequence[Row]`): Of zero-shot benchmarks, from [`merge_rows`].

    Returns:
        `tuple`: The points of [`~modeling_dclip.evaluation.reports.plots.plot_tradeoff`], the anchor first if a record
            names one; its curves by model, over the weights between the anchor and the model, with both as ends
            without a label; and the zero-shot benchmarks. With fewer than two models, all three are empty.
    """
    accuracy: dict[tuple, dict[str, IntervalDict]] = {}
    for other in others:
        if "top1" in other["metrics"]:
            accuracy.setdefault(weights_of(other), {})[other["benchmark"]] = interval_of(other, "top1")
    paired = [row for row in rows if GAIN_METRIC in row["metrics"] and weights_of(row) in accuracy]
    counts = Counter(name for row in paired for name in accuracy[weights_of(row)])
    chosen = [name for name, count in counts.items() if count == len(paired)]
    chosen = chosen or [name for name, _ in counts.most_common(1)]
    paired = [row for row in paired if set(chosen) <= set(accuracy[weights_of(row)])]
    anchors = {row["comparison"].get("anchor_revision") for row in rows if "comparison" in row}
    points: list[TradeoffPoint] = []
    starts: list[TradeoffPoint] = []
    on_line: dict[str, list[tuple[float, Row, TradeoffPoint]]] = {}
    for row in sorted(paired, key=lambda row: row["revision"] not in anchors or "condition" in row):
        point = _pair(row, [accuracy[weights_of(row)][name] for name in chosen])
        if (alpha := place_on_line(row)) is not None:
            step: TradeoffPoint = {**point, "label": f"α {alpha:g}"}
            on_line.setdefault(row["series"], []).append((alpha, row, step))
        else:
            points.append(point)
            starts += [point] if row["revision"] in anchors else []
    if not points or len(paired) < 2:
        return [], {}, []
    curves = {}
    for series, steps in on_line.items():
        student = place_of_student(row for _, row, _ in steps)
        ends = [(student, point) for point in points if point["series"] == series][:1]
        ends += [(0.0, point) for point in starts[:1]]
        placed = [(alpha, step) for alpha, _, step in steps] + [(alpha, _without_label(end)) for alpha, end in ends]
        curves[series] = [step for _, step in sorted(placed, key=lambda one: one[0])]
    return points, curves, chosen


def _without_label(point: TradeoffPoint) -> TradeoffPoint:
    """The point as an end of a curve: it is drawn and named already."""
    return {**point, "label": ""}


def _pair(row: Row, accuracy: Sequence[IntervalDict]) -> TradeoffPoint:
    """The point of a model: its retrieval, and the mean of its accuracies."""
    # The interval of a mean is not the mean of the intervals.
    alone = accuracy[0] if len(accuracy) == 1 else {"low": None, "high": None}
    retrieval = interval_of(row, GAIN_METRIC)
    return {
        "label": row["label"],
        "series": row["series"],
        "x": sum(one["estimate"] for one in accuracy) / len(accuracy),
        "x_interval": (alone["low"], alone["high"]),
        "y": retrieval["estimate"],
        "y_interval": (retrieval["low"], retrieval["high"]),
        "covers": retrieval["covers"],
    }


def weights_of(row: Row) -> tuple[tuple[str, ...], str | None]:
    """Identify the model of a row: its weights (of a mean, those of every run) and the point between two models."""
    return tuple(row.get("weights", [row["revision"]])), row.get("condition")


def _tabulate_all_encoders(data: Mapping[str, Any]) -> list[Table | Text]:
    return tabulate_encoders(data, cells=",".join(dict.fromkeys(row["cell"] for row in data["rows"])))


# What a script in `benchmarks/` wrote, by the name that its file has under "benchmark".
SPEED_TABLES: dict[str, Callable[[Mapping[str, Any]], list[Table | Text]]] = {
    "image_encoders": _tabulate_all_encoders,
    "index": BENCHMARK_TABLES["index"][0],
    "onnx_towers": BENCHMARK_TABLES["onnx_towers"][0],
    "retrieval": BENCHMARK_TABLES["retrieval"][0],
    "selective_scan": BENCHMARK_TABLES["scan"][0],
    "negatives": BENCHMARK_TABLES["negatives"][0],
    "student_step": BENCHMARK_TABLES["student_step"][0],
}
_INTERVAL_KEYS = ("estimate", "low", "high", "confidence", "covers")


class Sources(NamedTuple):
    """The content of the files of a report.

    Attributes:
        records (`list[tuple[Path, dict]]`): File and record.
        summaries (`list[tuple[Path, dict]]`): File and summary of arms.
        kept (`list[tuple[Path, list]]`): File, and the tables of arms at equal retention.
        speed (`list[tuple[Path, dict, list]]`): File, what a script in `benchmarks/` wrote, and its table.
        left_out (`list[tuple[Path, str]]`): A file that should have been shown and cannot be, and why.
        others (`list[Path]`): Files of the folders that are no results and do not look like them.
        names (`dict[Path, str]`): A short name for each file.
        pages (`dict[str, tuple[str, str]]`): By the stem of the file that `--gallery` or `--maps` writes of a record:
            the model's name, and the benchmark.
    """

    records: list[tuple[Path, Record]]
    summaries: list[tuple[Path, Summary]]
    kept: list[tuple[Path, list[Block]]]
    speed: list[tuple[Path, dict[str, Any], list[Table | Text]]]
    left_out: list[tuple[Path, str]]
    others: list[Path]
    names: dict[Path, str]
    pages: dict[str, tuple[str, str]]


def find_json(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """List JSON files: the files given, and those in the folders given and below, except in hidden folders.

    Args:
        paths (`Sequence[str | os.PathLike]`): Files and folders.

    Returns:
        `list[Path]`: Each once, in the order given; the files of a folder are sorted by name.

    Raises:
        FileNotFoundError: If a path is missing, or nothing is given.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"Expected results files or folders of them, got {path}, which does not exist.")
        files = [path]
        if path.is_dir():
            files = find_files(path, {".json"}).files
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_sources(paths: Sequence[str | os.PathLike]) -> Sources:
    """Read every file that a report can show, and note why the other files cannot be shown.

    Args:
        paths (`Sequence[str | os.PathLike]`): Results files, and folders that are searched.

    Returns:
        [`Sources`]: Records of a model that is a local path have a label, see
            [`~modeling_dclip.evaluation.reports.tables.shorten_paths`].

    Raises:
        FileNotFoundError: If a path is missing.
        ValueError: If there is nothing to show.
    """
    files = find_json(paths)
    sources = Sources([], [], [], [], [], [], _name_files(files), {})
    named = {Path(path).resolve() for path in paths}
    for file in files:
        try:
            _read_one(file, sources, is_named=file.resolve() in named)
        except (ValueError, OSError) as error:
            sources.left_out.append((file, str(error)))
        except (AttributeError, KeyError, IndexError, TypeError) as error:  # the files of benchmarks/ have no schema
            sources.left_out.append((file, f"Expected what its script writes, got another form: {error!r}."))
    if not (sources.records or sources.summaries or sources.kept or sources.speed):
        reasons = "".join(f"\n- {path}: {reason}" for path, reason in sources.left_out[:5])
        raise ValueError(
            f"Expected results files of eval.py, train.py or benchmarks/ in {', '.join(map(str, paths))}, got "
            f"{len(files)} JSON file{'s' * (len(files) != 1)} and none of these.{reasons}"
        )
    shortened = shorten_paths([record for _, record in sources.records])
    for (_, record), short in zip(sources.records, shortened, strict=True):
        stem = page_name(record) if _has_pages(record) else None
        if "label" in short:
            record["label"] = short["label"]
        if stem is not None:
            sources.pages[stem] = (name_of(record), benchmark_heading(record["benchmark"]))
    return sources


def _has_pages(record: Record) -> bool:
    """Whether `--gallery` and `--maps` may have written a page of this record; it has the name of its version."""
    return _kind_of(record) == "retrieval" and "condition" not in record and "modeling_dclip" in record["versions"]


def _read_one(file: Path, sources: Sources, *, is_named: bool) -> None:
    content = read_json(file, "results file", advice="Make it again.")
    if isinstance(content, list) and content and all(RETENTION_KEYS <= set(one) for one in content):
        sources.kept.append((file, tabulate_at_retention(content)))
    elif isinstance(content, list):
        records = read_results(file)
        for index, record in enumerate(records):
            _check_intervals(record, f"record {index} of {file}")
        sources.records.extend((file, record) for record in records)
    elif isinstance(content, Mapping) and "arms" in content:
        tabulate_summary(content, where=str(file))  # raises if it is not valid
        sources.summaries.append((file, content))
    elif isinstance(content, Mapping) and content.get("benchmark") in SPEED_TABLES:
        sources.speed.append((file, content, SPEED_TABLES[content["benchmark"]](content)))
    elif isinstance(content, Mapping) and "benchmark" not in content and not is_named:
        sources.others.append(file)  # a model's configuration, a trainer's state, ...
    else:
        keys = sorted(content)[:4] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"No list of records, no summary of arms, no benchmark of {list(SPEED_TABLES)}: {keys}.")


def _check_intervals(record: Record, where: str) -> None:
    """Check that every interval has all parts that a table needs."""
    intervals = dict(record.get("intervals", {}))
    intervals |= {name: value for name, value in record.get("comparison", {}).items() if isinstance(value, Mapping)}
    for name, interval in intervals.items():
        if not isinstance(interval, Mapping) or not all(key in interval for key in _INTERVAL_KEYS):
            raise ValueError(f"Expected an interval with {_INTERVAL_KEYS} for {name!r} of {where}, got {interval!r}.")


def _name_files(files: Sequence[Path]) -> dict[Path, str]:
    """A short name for each file: its folder if its own name says nothing, else folder and name; its path if two
    folders have that name.
    """
    folders = [file.resolve().parent.name for file in files]
    plain = {
        file: folder
        if file.stem in ("records", "results", "summary", "leakage", "equal_retention")
        else f"{folder}/{file.stem}"
        for file, folder in zip(files, folders, strict=True)
    }
    parents: dict[str, set[Path]] = {}
    for file, name in plain.items():
        parents.setdefault(name, set()).add(file.resolve().parent)
    return {file: name if len(parents[name]) == 1 else str(file) for file, name in plain.items()}


PLOTS_FOLDER = "plots"
OPEN_FINDINGS = 5  # the others fold
# The parts of a report by kind of benchmark: title, and the metrics that are drawn where they were measured.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "retrieval": ("Retrieval", ("text_to_image_recall@1", "image_to_text_recall@1")),
    "fine_grained": ("Fine-grained retrieval", ("accuracy", "text_score", "image_score", "group_score")),
    "zero_shot": ("Zero-shot classification", ("top1", "mean_per_class", "map")),
    "efficiency": ("Efficiency", ("image_latency_ms", "text_latency_ms", "peak_memory_mib")),
    "diagnostics": ("Diagnostics", ("modality_gap", "alignment", "image_uniformity", "text_uniformity")),
    "hessian": ("Curvature", ("hessian_eigenvalue_1",)),
    "leakage": ("What the teacher reads", ()),
}
BEST_NOTE = Text(
    "Numbers without a unit are in percent. Bold is a number that is better than all others on the same data, beyond "
    "noise; ",
    Code("eval.py compare"),
    " compares two models in pairs.",
)
MORE_METRICS = Text("The other metrics of the same rows, and their weights:")
LINES_NOTE = "Lines are 95 % intervals: over training seeds for a model marked ×N, otherwise over test images."


def _style_models(sources: Sources) -> dict[str, Mapping[str, str]]:
    """A style for each model of a report, by its series: anchors are grey."""
    records = [record for _, record in sources.records]
    anchors = {record["comparison"].get("anchor_revision") for record in records if "comparison" in record}
    grey = dict.fromkeys(str(summary["anchor"]) for _, summary in sources.summaries)
    grey |= dict.fromkeys(name_of(record) for record in records if record["revision"] in anchors)
    names = dict.fromkeys(row["arm"] for _, summary in sources.summaries for row in summary["arms"])
    names |= dict.fromkeys(arm_of(record) or name_of(record) for record in records)
    styles = {name: {**style_of(index), **GREY} for index, name in enumerate(grey)}
    return styles | {name: style_of(1 + i) for i, name in enumerate(name for name in names if name not in grey)}


class _Builder:
    """Collects the blocks of a report in order, and draws its pictures in a folder."""

    def __init__(self, sources: Sources, folder: Path):
        self.sources, self.folder = sources, folder
        self.blocks: list[Block] = []
        self.warned: list[str] = []
        self.styles = _style_models(sources)

    def heading(self, text: str, level: int, full: str = "") -> None:
        self.blocks.append(Heading(text, level, f"part-{len(self.blocks)}", full))

    def warn(self, items: Sequence[str], where: str) -> None:
        """Add warnings, if there are any; `where` stands in the introduction."""
        if items:
            self.blocks.append(Warnings(list(items)))
            self.warned.append(where)

    def draw(self, plot: Callable[..., None], content: Any, alt: str, **options: Any) -> None:
        """Draw a picture with a function of [`~modeling_dclip.evaluation.reports.plots`] and add it."""
        path = self.folder / f"{len(self.pictures) + 1:02d}_{plot.__name__.removeprefix('plot_')}.png"
        plot(content, path, **options)
        self.blocks.append(Picture(path.name, alt, read_bytes(path)))

    @property
    def pictures(self) -> list[Picture]:
        return [block for block in self.blocks if isinstance(block, Picture)]

    def name(self, found: Sequence[tuple[Path, Record]]) -> list[tuple[str, Record]]:
        """Records with the short names of their files."""
        return [(self.sources.names[path], record) for path, record in found]

    def measured(self, terms: Sequence[tuple[str, str]], paths: Sequence[Path]) -> None:
        """Say what a table was measured on, and from which files it is."""
        self.blocks.append(Terms([*terms, ("Files", ", ".join(dict.fromkeys(map(str, paths))))]))


def _add_summaries(report: _Builder) -> None:
    if report.sources.summaries:
        report.heading("Experiments", 2)
    for path, summary in report.sources.summaries:
        name = report.sources.names[path]
        report.heading(name, 3, str(path))
        measured = [
            record
            for file, record in report.sources.records
            if file.parent == path.parent
            and record["benchmark"] in summary.get("benchmarks", ())
            and "condition" not in record
        ]
        rows, _ = merge_rows([(name, record) for record in measured])
        by_benchmark = [[row for row in rows if row["benchmark"] == one] for one in summary.get("benchmarks", ())]
        conflicts = [text for group in by_benchmark for text in find_conflicts(group, seeds=False)]
        report.warn(conflicts, name)
        report.blocks.extend(tabulate_summary(summary, where=str(path)))
        if len(summary["arms"]) > 1:
            report.draw(
                plot_tradeoff,
                tradeoff_points(summary),
                f"{name}: retrieval against zero-shot accuracy",
                x_label="zero-shot top-1 (%)",
                styles=report.styles,
            )
        terms = measured_on(measured) if measured else [("Benchmark", " or ".join(summary.get("benchmarks", ())))]
        report.measured(terms, [path])
    if report.sources.kept:
        report.heading("At equal retention", 2)
    for path, blocks in report.sources.kept:
        report.heading(report.sources.names[path], 3, str(path))
        report.blocks.extend(blocks)


def _add_records(report: _Builder) -> None:
    groups: dict[str, dict[str, list[tuple[Path, Record]]]] = {}
    for path, record in report.sources.records:
        groups.setdefault(_kind_of(record), {}).setdefault(record["benchmark"], []).append((path, record))
    zero_shot = [row for found in groups.get("zero_shot", {}).values() for row in merge_rows(report.name(found))[0]]
    for kind in [*(kind for kind in PARTS if kind in groups), *(kind for kind in groups if kind not in PARTS)]:
        heading, drawn = PARTS.get(kind, (kind.replace("_", " ").capitalize(), ()))
        report.heading(heading, 2)
        if kind == "zero_shot" and len(groups[kind]) > 1:
            _add_suite(report, groups[kind])
        headings = [benchmark_heading(benchmark) for benchmark in groups[kind]]
        for benchmark, found in groups[kind].items():
            short = benchmark_heading(benchmark)
            short = short if headings.count(short) == 1 else benchmark
            report.heading(short, 3, benchmark)
            if kind == "leakage":
                _add_leakage(report, found)
                continue
            suite = kind == "zero_shot" and len(groups[kind]) > 4  # one picture shows them all
            _add_benchmark(report, kind, f"{heading}, {short}", found, zero_shot, () if suite else drawn)


def _add_benchmark(
    report: _Builder,
    kind: str,
    where: str,
    found: Sequence[tuple[Path, Record]],
    zero_shot: Sequence[Row],
    drawn: Sequence[str],
) -> None:
    """The table of one benchmark, its warnings, its pictures and what it was measured on."""
    rows, repeated = merge_rows(report.name(found))
    report.warn(find_conflicts(rows, timed=kind == "efficiency"), where)
    report.blocks.extend(_tabulate(rows))
    if repeated:
        report.blocks.append(
            Text(f"{repeated} records are left out because they repeat a row: the same weights, data and numbers.")
        )
    panels = bars(rows, drawn)
    if len(rows) > 1 and panels:
        report.draw(
            plot_bars,
            panels,
            f"{where}. {LINES_NOTE if any('runs' in row or 'intervals' in row for row in rows) else ''}",
            styles=report.styles,
        )
    points, curves, benchmarks = pair_tradeoff(rows, zero_shot) if kind == "retrieval" else ([], {}, [])
    if points:
        names = ", ".join(map(benchmark_heading, benchmarks))
        over = f"mean over {len(benchmarks)} benchmarks: {names}" if len(benchmarks) > 1 else names
        alt = f"Retrieval against zero-shot accuracy ({over}) of the same weights."
        report.draw(plot_tradeoff, points, alt, curves=curves, x_label="zero-shot top-1 (%)", styles=report.styles)
    terms = measured_on([record for _, record in found], weights=False)
    report.measured(terms, [path for path, _ in found])


def _tabulate(rows: Sequence[Row]) -> list[Table | Text]:
    several = len({row["dataset_fingerprint"] for row in rows}) > 1
    columns = ["model", *(["data"] if several else [])]
    runs = ["runs"] if any("runs" in row for row in rows) else []
    names = order_metrics(rows)
    first = [name for name in HEADLINES.get(_kind_of(rows[0]), ()) if name in names]
    rest = [name for name in names if name not in first]
    if len(first) < 2 or not rest:
        tables = [tabulate_rows(rows, names, best=True, columns=[*columns, "revision", *runs])]
    else:
        wide = tabulate_rows(rows, rest, best=True, columns=[*columns, "revision"], ratios=False)
        tables = [tabulate_rows(rows, first, best=True, columns=[*columns, *runs]), [MORE_METRICS, *wide[:1]]]
    blocks = [block for own in tables for block in own]
    cells = (cell for block in blocks if isinstance(block, Table) for row in block.rows for cell in row)
    has_best = any(isinstance(cell, Cell) and cell.is_best for cell in cells)
    return [*blocks, *([BEST_NOTE] if has_best else [])]


def _add_suite(report: _Builder, groups: Mapping[str, Sequence[tuple[Path, Record]]]) -> None:
    """Models that were measured on several zero-shot benchmarks, side by side,
    with the mean of those that have all.
    """
    found_values: dict[tuple, tuple[str, dict[str, float]]] = {}
    series_of: dict[tuple, str] = {}
    titles = {benchmark: benchmark_heading(benchmark) for benchmark in groups}
    for benchmark, found in groups.items():
        rows, _ = merge_rows(report.name(found))
        metric = next((name for name in ("top1", "map") if any(name in row["metrics"] for row in rows)), None)
        for row in rows:
            if metric in row["metrics"]:
                _, model = found_values.setdefault(weights_of(row), (name_of(row), {}))
                model[benchmark] = row["metrics"][metric]
                series_of[weights_of(row)] = row["series"]
    labels = [label for label, row in found_values.values() if len(row) > 1]
    names = {
        weights: label if labels.count(label) == 1 else f"{label} {short_hash(weights[0][0])}"
        for weights, (label, row) in found_values.items()
        if len(row) > 1
    }
    values = {name: found_values[weights][1] for weights, name in names.items()}
    if not values:
        return
    shown = [benchmark for benchmark in groups if any(benchmark in row for row in values.values())]
    share = metric_of(RETENTION_METRIC)
    table = []
    for series, row in values.items():
        mean = share.show(sum(row.values()) / len(row)) if set(shown) <= set(row) else ABSENT
        table.append([series, *(share.show(row[name]) if name in row else ABSENT for name in shown), mean])
    header = ["Model", *(titles[name] for name in shown), f"mean of {len(shown)}"]
    report.heading("All datasets", 3)
    report.blocks.append(Table(header, table))
    report.blocks.append(
        Text(
            "Top-1 in percent; mAP where images have several labels. Shown are the models measured on two or more "
            "datasets; a model trained with several seeds shows their mean."
        )
    )
    report.draw(
        plot_suite,
        {series: {titles[name]: value for name, value in row.items()} for series, row in values.items()},
        "Zero-shot accuracy by dataset.",
        styles=_tell_apart({name: report.styles[series_of[weights]] for weights, name in names.items()}),
    )
    report.blocks.append(Text("The section of each dataset below says what its numbers were measured on."))


def _tell_apart(styles: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    """Give rows of one model, such as points between it and its anchor, markers of their own in its colour."""
    found: dict[str, Mapping[str, str]] = {}
    for name, style in styles.items():
        own = (style, *({**style, "marker": style_of(index)["marker"]} for index in range(len(MARKERS))))
        found[name] = next((one for one in own if one not in found.values()), style)
    return found


def _add_leakage(report: _Builder, found: Sequence[tuple[Path, Record]]) -> None:
    by_file: dict[Path, list[Record]] = {}
    for path, record in found:
        by_file.setdefault(path, []).append(record)
    for path, records in by_file.items():
        try:
            report.blocks.extend(tabulate_leakage(records))
        except ValueError as error:
            report.warn([f"{path}: {error}"], f"leakage in {report.sources.names[path]}")
        report.measured(measured_on(records), [path])


def _add_speed(report: _Builder) -> None:
    """Add a table for each file of `benchmarks/`, pictures for those of image encoders, and what was measured on."""
    if report.sources.speed:
        report.heading("Speed", 2)
    for path, data, table in report.sources.speed:
        report.heading(report.sources.names[path], 3, str(path))
        report.blocks.extend(table)
        if data["benchmark"] == "image_encoders":
            _draw_encoders(report, data)
        shown = {key: value for key, value in data.items() if key in ("n", "versions", "hardware")}
        settings = {
            key: value
            for key, value in data.get("arguments", {}).items()
            if not isinstance(value, list) and value != ""
        }
        report.measured(measured_on([{**shown, "arguments": settings}]), [path])


def _draw_encoders(report: _Builder, data: Mapping[str, Any]) -> None:
    """Draw the times of the first cell as bars, and the growth of encoders that were measured at three sizes or
    more.
    """
    clock = data["clock_of_ratios"]
    cell = data["rows"][0]["cell"]
    panel = [
        {
            "label": row["encoder"],
            "value": row[clock]["median"],
            "text": metric_of("image_latency_ms").show(row[clock]["median"]),
            "low": row[clock]["min"],
            "high": row[clock]["max"],
        }
        for row in data["rows"]
        if row["cell"] == cell
    ]
    report.draw(plot_bars, {f"ms, {cell}": panel}, f"Time of a batch, {cell}. Lines: smallest and largest round.")
    series: dict[str, list] = {}
    for row in data["rows"]:
        if row["batch_size"] == 1 and row["image_size"] not in [size for size, _ in series.get(row["encoder"], ())]:
            series.setdefault(row["encoder"], []).append((row["image_size"], row[clock]))
    series = {name: sorted(points, key=lambda point: point[0]) for name, points in series.items() if len(points) > 2}
    if series:
        report.draw(plot_growth, series, "Time of one image against its size.", x_label="pixels a side", y_label="ms")


def _add_left_out(report: _Builder, most: int = 30) -> None:
    left_out, others = report.sources.left_out, report.sources.others
    if left_out:
        report.heading("Files that are not shown", 2)
        rows = [[str(path), " ".join(reason.split())] for path, reason in left_out[:most]]
        report.blocks.append(Table(["File", "Why"], rows, left=2))
        if len(left_out) > most:
            report.blocks.append(Text(f"And {len(left_out) - most} more."))
    if others:
        counts = Counter(path.name for path in others)
        named = ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in sorted(counts.items()))
        report.blocks.append(
            Terms([("Passed over", f"{count_of(len(others), 'JSON file')} without results: {named}")])
        )


class _Model(NamedTuple):
    """What all files say of one model: the same weights at the same point, beside the same anchor."""

    files: dict[Path, list[Record]]

    def newest(self) -> list[Record]:
        """One record for each measurement, the newest; all with the name of the newest."""
        records = sorted((one for own in self.files.values() for one in own), key=lambda one: one["created"])
        labels = {one["revision"]: name_of(one) for one in records}
        kept = {_measurement_of(one): one for one in records}
        return [{**one, "label": labels[one["revision"]]} for one in kept.values()]

    def disagreements(self, names: Mapping[Path, str]) -> list[str]:
        """A sentence for each measurement that two files have with other numbers."""
        found: dict[tuple, dict[str, Record]] = {}
        for file, own in self.files.items():
            for one in own:
                found.setdefault(_measurement_of(one), {}).setdefault(names[file], one)
        return [
            f"{' and '.join(own)} have different numbers on "
            f"{benchmark_heading(next(iter(own.values()))['benchmark'])}: the newest are shown."
            for own in found.values()
            if len({repr(sorted(one["metrics"].items())) for one in own.values()}) > 1
        ]


def _measurement_of(record: Record) -> tuple:
    """What was measured of a model: the kind of benchmark, the data, and how."""
    data = (_kind_of(record), record["dataset_fingerprint"], record["n"], record["seed"])
    return (record["revision"], *data, repr(sorted(record.get("settings", {}).items())))


def _judge_all(sources: Sources) -> list[Block]:
    """What the files say of each model, once: trained models first, then points between them and their anchors."""
    by_file: dict[Path, list[Record]] = {}
    for file, record in sources.records:
        by_file.setdefault(file, []).append(record)
    models: dict[tuple, _Model] = {}
    for file, records in by_file.items():
        for own in group_models(records):
            identity = (frozenset(one["revision"] for one in own), own[0].get("condition"))
            against = own[0]["comparison"]["anchor_revision"]
            models.setdefault((*identity, against), _Model({})).files[file] = own
    found: list[tuple[Verdict, str, bool]] = []
    for model in models.values():
        anchors = [one for file in model.files for one in by_file[file] if "comparison" not in one]
        anchors.sort(key=lambda one: one["created"], reverse=True)
        conflicts = tuple(model.disagreements(sources.names))
        where = ", ".join(sources.names[file] for file in model.files)
        found += [
            (one._replace(details=one.details + conflicts), where, "condition" in next(iter(model.files.values()))[0])
            for one in judge([*model.newest(), *anchors])
        ]
    places = {one.model: {where for other, where, _ in found if other.model == one.model} for one, *_ in found}
    lines = [
        (f"{where}: {one.headline}" if len(places[one.model]) > 1 else one.headline, one.details, is_between)
        for one, where, is_between in found
    ]
    first = [(headline, details) for headline, details, is_between in lines if not is_between]
    rest = [(headline, details) for headline, details, is_between in lines if is_between]
    if not found:
        return []
    advice = [Text(line) for line in advice_of([one for one, *_ in found])]
    return [Findings(first[:OPEN_FINDINGS], [*first[OPEN_FINDINGS:], *rest]), *advice]


def _find_beside(paths: Sequence[str | os.PathLike], sources: Sources, output: Path) -> list[Links]:
    """Link the galleries, maps and curves that lie in the folders of the results, at most three folders down."""
    files = dict.fromkeys(file for file, _ in [*sources.records, *sources.summaries])
    roots = dict.fromkeys(path if path.is_dir() else path.parent for path in [*map(Path, paths), *files])
    groups: dict[str, dict[Path, str]] = {"Gallery": {}, "Training curves": {}, "Teacher's attention": {}, "Maps": {}}
    several = len({benchmark for _, benchmark in sources.pages.values()}) > 1
    for root in roots:
        for pattern in (f"{'*/' * depth}*{suffix}" for depth in range(4) for suffix in (".html", ".png")):
            for file in list_folder(root, pattern):
                place = ", ".join(file.parent.relative_to(root).parts) or root.resolve().name
                if file.name == CURVES_NAME:
                    groups["Training curves"].setdefault(file.resolve(), place)
                elif file.stem.startswith(ATTENTION_STEM) and file.suffix == ".png":
                    rest = file.stem.removeprefix(ATTENTION_STEM).strip("_").replace("_", " ")
                    groups["Teacher's attention"].setdefault(file.resolve(), rest or place)
                elif file.stem in sources.pages:
                    name, benchmark = sources.pages[file.stem]
                    what = "Gallery" if file.suffix == ".html" else "Maps"
                    groups[what].setdefault(file.resolve(), f"{name}, {benchmark}" if several else name)
    linked = [
        (what, [(text, Path(os.path.relpath(file, output.resolve())).as_posix()) for file, text in found.items()])
        for what, found in groups.items()
        if found
    ]
    return [Links(linked)] if linked else []


def _introduce(report: _Builder) -> list[Block]:
    sources = report.sources
    records = [record for _, record in sources.records]
    parts = [
        (len(records), "record"),
        (len({record["revision"] for record in records}), "model"),
        (len({record["benchmark"] for record in records}), "benchmark"),
        (len(sources.summaries), "experiment"),
        (len(sources.speed), "speed measurement"),
    ]
    counted = ", ".join(count_of(count, what) for count, what in parts if count)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    read = len(sources.names) - len(sources.left_out) - len(sources.others)
    intro = [f"Made {made} from {count_of(read, 'file')}: {counted}."]
    if left_out := len(sources.left_out):
        intro.append(f"{count_of(left_out, 'file')} {'is' if left_out == 1 else 'are'} not shown; see the last part.")
    if report.warned:
        intro.append(f"Compare rows with care in: {'; '.join(dict.fromkeys(report.warned))}.")
    return [Text(paragraph) for paragraph in intro]


def write_report(
    paths: Sequence[str | os.PathLike], output: str | os.PathLike, *, title: str = "Results"
) -> list[Path]:
    """Write `report.md` with its pictures in `plots/`, and `report.html`, which holds everything, from results files.

    Shown are records of `eval.py`, summaries of arms, and what `benchmarks/` wrote. First comes whether each model is
    better than its anchor, then links to galleries, maps and training curves that lie in the same folders. Each table
    says what it was measured on, and whether its rows are comparable. Files that are damaged or were named and hold
    no results are listed with the reason; other JSON files of the folders are counted by name.

    Args:
        paths (`Sequence[str | os.PathLike]`): Results files, and folders that are searched with those below.
        output (`str` or `os.PathLike`): Folder. Files in it are replaced, each whole or not at all; others stay.
        title (`str`, *optional*, defaults to `"Results"`): Title of the report.

    Returns:
        `list[Path]`: What was written: the HTML page, the Markdown file, the pictures.

    Raises:
        FileNotFoundError: If a path is missing.
        ImportError: If matplotlib is not installed.
        NotADirectoryError: If `output` is a file.
        ValueError: If none of the files can be shown.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"Expected a folder to write the report to, got the file {output}.")
    sources = read_sources(paths)
    with temporary_folder() as folder:
        builder = _Builder(sources, folder)
        _add_summaries(builder)
        _add_records(builder)
        _add_speed(builder)
        _add_left_out(builder)
    intro = [*_judge_all(sources), *_find_beside(paths, sources, output), *_introduce(builder)]
    report = Report(title, intro, builder.blocks)
    pictures = {output / PLOTS_FOLDER / picture.name: picture.content for picture in builder.pictures}
    for path, content in pictures.items():
        write_bytes(path, content)
    write_text(output / "report.md", render_markdown(report.all_blocks, PLOTS_FOLDER) + "\n")
    write_text(output / "report.html", render_html(report))
    return [output / "report.html", output / "report.md", *pictures]
