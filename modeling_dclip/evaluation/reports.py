"""One report from any set of results files: Markdown with its pictures beside it, and one HTML page that needs nothing else."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from modeling_dclip.evaluation.arms import tradeoff_points
from modeling_dclip.evaluation.comparability import find_conflicts, measured_on
from modeling_dclip.evaluation.metric_names import metric_of
from modeling_dclip.evaluation.plots import plot_tradeoff
from modeling_dclip.evaluation.report_document import (
    Block,
    Heading,
    Picture,
    Table,
    Terms,
    Text,
    Warnings,
    render_html,
    render_markdown,
)
from modeling_dclip.evaluation.report_plots import plot_bars, plot_suite
from modeling_dclip.evaluation.report_series import (
    bars,
    kind_of,
    merge_rows,
    order_metrics,
    pair_tradeoff,
    shorten_benchmark,
    weights_of,
)
from modeling_dclip.evaluation.report_sources import Sources, read_sources
from modeling_dclip.evaluation.report_speed import add_speed
from modeling_dclip.evaluation.results import write_bytes, write_text
from modeling_dclip.evaluation.tables import (
    markdown_table,
    name_of,
    render_leakage,
    render_rows,
    render_summary,
    short_hash,
)
from modeling_dclip.evaluation.tradeoff import RETENTION_METRIC

PICTURES = "plots"
# Kinds of benchmark in the order of the report: title, and what is drawn of them, where it was measured.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "retrieval": ("Retrieval", ("text_to_image_recall@1", "image_to_text_recall@1")),
    "fine_grained": ("Fine-grained retrieval", ("accuracy", "text_score", "image_score", "group_score")),
    "zero_shot": ("Zero-shot classification", ("top1", "mean_per_class", "map")),
    "efficiency": ("Efficiency", ("image_latency_ms", "text_latency_ms", "peak_memory_mib")),
    "diagnostics": ("Diagnostics", ("modality_gap", "alignment", "image_uniformity", "text_uniformity")),
    "hessian": ("Curvature", ("hessian_eigenvalue_1",)),
    "leakage": ("What the teacher reads", ()),
}
BOLD = "In percent where no unit stands. Bold: the best as shown on the same data; whether it is beyond noise `eval.py compare` says."

LINES = "Lines: 95 % intervals, over training seeds where ×N stands, else over test images."


class _Report:
    """The blocks of a report as they come, and its pictures in a folder."""

    def __init__(self, sources: Sources, folder: Path):
        self.sources, self.folder = sources, folder
        self.blocks: list[Block] = []
        self.pictures: dict[str, bytes] = {}
        self.warned: list[str] = []

    def heading(self, text: str, level: int, full: str = "") -> None:
        self.blocks.append(Heading(text, level, f"part-{len(self.blocks)}", full))

    def warn(self, items: Sequence[str], where: str) -> None:
        if items:
            self.blocks.append(Warnings(list(items)))
            self.warned.append(where)

    def draw(self, plot: Any, content: Any, alt: str, **options: Any) -> None:
        name = f"{len(self.pictures) + 1:02d}_{plot.__name__.removeprefix('plot_')}.png"
        plot(content, self.folder / name, **options)
        self.pictures[name] = (self.folder / name).read_bytes()
        self.blocks.append(Picture(name, alt))

    def name(self, found: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
        """Records with the short names of their files."""
        return [(self.sources.names[path], record) for path, record in found]

    def files(self, paths: Sequence[Path]) -> tuple[str, str]:
        return "Files", ", ".join(dict.fromkeys(map(str, paths)))


def write_report(
    paths: Sequence[str | os.PathLike], output: str | os.PathLike, *, title: str = "Results"
) -> list[Path]:
    """Write `report.md` with its pictures in `plots/`, and `report.html`, which holds everything, from results files.

    Shown are records of `eval.py`, summaries of arms, and what `benchmarks/` wrote. Any other JSON in the folders is named in the report.
    Each table says what it was measured on, and whether its rows are comparable at all.

    Args:
        paths (`Sequence[str | os.PathLike]`): Results files, and folders that are searched with those below.
        output (`str` or `os.PathLike`): Folder. Files in it are replaced, each whole or not at all; others stay.
        title (`str`, *optional*, defaults to `"Results"`): Above it all.

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
    with tempfile.TemporaryDirectory() as folder:
        report = _Report(sources, Path(folder))
        _add_summaries(report)
        _add_records(report)
        add_speed(report)
        _add_left_out(report)
    intro = _introduce(report)
    for name, content in report.pictures.items():
        write_bytes(output / PICTURES / name, content)
    write_text(output / "report.md", render_markdown(title, intro, report.blocks, PICTURES))
    write_text(output / "report.html", render_html(title, intro, report.blocks, report.pictures))
    return [output / "report.html", output / "report.md", *(output / PICTURES / name for name in report.pictures)]


def _introduce(report: _Report) -> list[str]:
    sources = report.sources
    records = [record for _, record in sources.records]
    parts = [
        (len(records), "records of models on benchmarks"),
        (len({record["revision"] for record in records}), "different weights"),
        (len({record["benchmark"] for record in records}), "benchmarks"),
        (len(sources.summaries), "summaries of experiments"),
        (len(sources.speed), "measurements of speed"),
    ]
    counted = ", ".join(f"{count:,} {what}" for count, what in parts if count)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    intro = [f"Made {made} from {len(sources.names) - len(sources.left_out)} files: {counted}."]
    if sources.left_out:
        intro.append(f"{len(sources.left_out)} JSON files are not shown; the last part names them.")
    if report.warned:
        intro.append(f"Rows that are not to be compared without care: {'; '.join(dict.fromkeys(report.warned))}.")
    return intro


def _add_summaries(report: _Report) -> None:
    if report.sources.summaries:
        report.heading("Experiments", 2)
    for path, summary in report.sources.summaries:
        name = report.sources.names[path]
        report.heading(name, 3, str(path))
        measured = [
            record
            for file, record in report.sources.records
            if file.parent == path.parent and record["benchmark"] in summary.get("benchmarks", ()) and "condition" not in record
        ]  # fmt: skip
        rows, _ = merge_rows([(name, record) for record in measured])
        by_benchmark = [[row for row in rows if row["benchmark"] == one] for one in summary.get("benchmarks", ())]
        conflicts = [
            text for group in by_benchmark for text in find_conflicts(group) if "seed" not in text.split(":")[0]
        ]
        report.warn(conflicts, name)
        report.blocks.append(Table(render_summary(summary, where=str(path))))
        if len(summary["arms"]) > 1:
            report.draw(plot_tradeoff, tradeoff_points(summary), f"{name}: retrieval against zero-shot accuracy", x_label="zero-shot top-1 (%)")  # fmt: skip
        terms = measured_on(measured) if measured else [("Benchmark", " or ".join(summary.get("benchmarks", ())))]
        report.blocks.append(Terms([*terms, report.files([path])]))


def _add_records(report: _Report) -> None:
    groups: dict[str, dict[str, list[tuple[Path, Mapping[str, Any]]]]] = {}
    for path, record in report.sources.records:
        groups.setdefault(kind_of(record), {}).setdefault(record["benchmark"], []).append((path, record))
    zero_shot = [row for found in groups.get("zero_shot", {}).values() for row in merge_rows(report.name(found))[0]]
    for kind in [*(kind for kind in KINDS if kind in groups), *(kind for kind in groups if kind not in KINDS)]:
        heading, drawn = KINDS.get(kind, (kind.replace("_", " ").capitalize(), ()))
        report.heading(heading, 2)
        if kind == "zero_shot" and len(groups[kind]) > 1:
            _add_suite(report, groups[kind])
        shortened = [shorten_benchmark(benchmark) for benchmark in groups[kind]]
        for benchmark, found in groups[kind].items():
            short = shorten_benchmark(benchmark)
            short = short if shortened.count(short) == 1 else benchmark
            report.heading(short, 3, benchmark)
            if kind == "leakage":
                _add_leakage(report, found)
                continue
            suite = kind == "zero_shot" and len(groups[kind]) > 4  # one picture shows them all
            _add_benchmark(report, kind, f"{heading}, {short}", found, zero_shot, () if suite else drawn)


def _add_benchmark(
    report: _Report,
    kind: str,
    where: str,
    found: Sequence[tuple[Path, Mapping[str, Any]]],
    zero_shot: Sequence[Mapping[str, Any]],
    drawn: Sequence[str],
) -> None:
    """The table of one benchmark, its warnings, its pictures and what it was measured on."""
    rows, repeated = merge_rows(report.name(found))
    report.warn(find_conflicts(rows, timed=kind == "efficiency"), where)
    report.blocks.append(Table(_render(rows)))
    if repeated:
        report.blocks.append(
            Text(f"Left out: {repeated} records that repeat a row: the same weights, data and numbers.")
        )
    panels = bars(rows, drawn)
    if len(rows) > 1 and panels:
        report.draw(
            plot_bars, panels, f"{where}. {LINES if any('runs' in row or 'intervals' in row for row in rows) else ''}"
        )
    points, curves, benchmarks = pair_tradeoff(rows, zero_shot) if kind == "retrieval" else ([], {}, [])
    if points:
        names = ", ".join(map(shorten_benchmark, benchmarks))
        over = f"mean over {len(benchmarks)} benchmarks: {names}" if len(benchmarks) > 1 else names
        alt = f"Retrieval against zero-shot accuracy ({over}) of the same weights."
        report.draw(plot_tradeoff, points, alt, curves=curves, x_label="zero-shot top-1 (%)")
    terms = measured_on([record for _, record in found], weights=False)
    report.blocks.append(Terms([*terms, report.files([path for path, _ in found])]))


def _render(rows: Sequence[Mapping[str, Any]]) -> str:
    several = len({row["dataset_fingerprint"] for row in rows}) > 1
    columns = [
        "model",
        *(["data"] if several else []),
        "revision",
        *(["runs"] if any("runs" in row for row in rows) else []),
    ]
    table = render_rows(rows, order_metrics(rows), best=True, columns=columns)
    return f"{table}\n\n{BOLD}" if "**" in table else table


def _add_suite(report: _Report, groups: Mapping[str, Sequence[tuple[Path, Mapping[str, Any]]]]) -> None:
    """Models that were measured on several zero-shot benchmarks, side by side, with the mean of those that have all."""
    found_values: dict[tuple, tuple[str, dict[str, float]]] = {}
    titles = {benchmark: shorten_benchmark(benchmark) for benchmark in groups}
    for benchmark, found in groups.items():
        rows, _ = merge_rows(report.name(found))
        metric = next((name for name in ("top1", "map") if any(name in row["metrics"] for row in rows)), None)
        for row in rows:
            if metric in row["metrics"]:
                _, model = found_values.setdefault(weights_of(row), (name_of(row), {}))
                model[benchmark] = row["metrics"][metric]
    labels = [label for label, row in found_values.values() if len(row) > 1]
    values = {
        label if labels.count(label) == 1 else f"{label} {short_hash(weights[0][0])}": row
        for weights, (label, row) in found_values.items()
        if len(row) > 1
    }
    if not values:
        return
    shown = [benchmark for benchmark in groups if any(benchmark in row for row in values.values())]
    share = metric_of(RETENTION_METRIC)
    table = []
    for series, row in values.items():
        mean = share.show(sum(row.values()) / len(row)) if set(shown) <= set(row) else "–"
        table.append([series, *(share.show(row[name]) if name in row else "–" for name in shown), mean])
    header = ["Model", *(titles[name] for name in shown), f"mean of {len(shown)}"]
    report.heading("All datasets", 3)
    report.blocks.append(Table(markdown_table(header, table)))
    report.blocks.append(Text("Top-1 in percent, mAP of data with several labels an image; models on two or more of them. Means over seeds where there are several."))  # fmt: skip
    report.draw(plot_suite, {series: {titles[name]: value for name, value in row.items()} for series, row in values.items()}, "Zero-shot accuracy by dataset.")  # fmt: skip
    report.blocks.append(Text("What each was measured on stands below, at the dataset."))


def _add_leakage(report: _Report, found: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    by_file: dict[Path, list[Mapping[str, Any]]] = {}
    for path, record in found:
        by_file.setdefault(path, []).append(record)
    for path, records in by_file.items():
        try:
            report.blocks.append(Table(render_leakage(records)))
        except ValueError as error:
            report.warn([f"{path}: {error}"], f"leakage in {report.sources.names[path]}")
        report.blocks.append(Terms([*measured_on(records), report.files([path])]))


def _add_left_out(report: _Report, most: int = 30) -> None:
    left_out = report.sources.left_out
    if left_out:
        report.heading("Files that are not shown", 2)
        rows = [[str(path), " ".join(reason.split())] for path, reason in left_out[:most]]
        report.blocks.append(Table(markdown_table(["File", "Why"], rows, left=2)))
        if len(left_out) > most:
            report.blocks.append(Text(f"And {len(left_out) - most} more."))
