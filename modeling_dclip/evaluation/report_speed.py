"""The part of a report on speed: what the scripts in `benchmarks/` wrote."""

from collections.abc import Mapping
from typing import Any

from modeling_dclip.evaluation.comparability import measured_on
from modeling_dclip.evaluation.metric_names import metric_of
from modeling_dclip.evaluation.plots import plot_growth
from modeling_dclip.evaluation.report_document import Table, Terms
from modeling_dclip.evaluation.report_plots import plot_bars


def add_speed(report: Any) -> None:
    """Add a table for each file of `benchmarks/`, pictures of those of image encoders, and what they were measured on.

    Args:
        report: As [`~modeling_dclip.evaluation.reports.write_report`] makes it, with its `sources` read.
    """
    if report.sources.speed:
        report.heading("Speed", 2)
    for path, data, table in report.sources.speed:
        report.heading(report.sources.names[path], 3, str(path))
        report.blocks.append(Table(table))
        if data["benchmark"] == "image_encoders":
            _draw_encoders(report, data)
        shown = {key: value for key, value in data.items() if key in ("n", "versions", "hardware")}
        settings = {key: value for key, value in data.get("arguments", {}).items() if not isinstance(value, list) and value != ""}  # fmt: skip
        report.blocks.append(Terms([*measured_on([{**shown, "arguments": settings}]), report.files([path])]))


def _draw_encoders(report: Any, data: Mapping[str, Any]) -> None:
    """Times of the first cell as bars; where encoders were measured at three sizes or more, the growth too."""
    clock = data["clock_of_ratios"]
    cell = data["rows"][0]["cell"]
    panel = [
        {"label": row["encoder"], "value": row[clock]["median"], "text": metric_of("image_latency_ms").show(row[clock]["median"]),
         "low": row[clock]["min"], "high": row[clock]["max"]}
        for row in data["rows"] if row["cell"] == cell
    ]  # fmt: skip
    report.draw(plot_bars, {f"ms, {cell}": panel}, f"Time of a batch, {cell}. Lines: smallest and largest round.")
    series: dict[str, list] = {}
    for row in data["rows"]:
        if row["batch_size"] == 1 and row["image_size"] not in [size for size, _ in series.get(row["encoder"], ())]:
            series.setdefault(row["encoder"], []).append((row["image_size"], row[clock]))
    series = {name: sorted(points, key=lambda point: point[0]) for name, points in series.items() if len(points) > 2}
    if series:
        report.draw(plot_growth, series, "Time of one image against its size.", x_label="pixels a side", y_label="ms")
