"""Markdown tables from what the scripts in `benchmarks/` wrote. Pure: dicts in, text out."""

from collections.abc import Callable, Mapping
from typing import Any

from modeling_dclip.evaluation.tables import markdown_table

CLOCKS = {"cpu_ms": "CPU ms", "latency_ms": "ms"}


def _ms(value: float) -> str:
    """Three digits that count, or more before the point: two rows whose ratio shows a difference show it themselves."""
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
        over (`str`, *optional*): Comma-separated encoders whose ratio has a column. By default all that rows are compared with.

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
        "Medians of interleaved rounds, ratios with the smallest and largest round; GFLOP are of one batch, and like the "
        "parameters the eager float32 model's in every form."
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
    note = "× is how many times faster, the median of interleaved rounds with the smallest and largest; state size 8, float32."
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
    return f"{markdown_table(header, lines)}\n\n{_note(data, 'Medians of interleaved rounds, with the smallest and largest.')}"


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
        f"× is how many times less ours takes, the median of interleaved rounds ({', '.join(str(row['rounds']) for row in data['rows'])}) "
        f"with the smallest and largest; memory is what the process holds at most beyond its start, the {data['arguments']['width']}-wide "
        f"float32 embeddings it collects included; clip_benchmark {data['versions']['clip_benchmark']}."
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
        f"Random weights of ViT-B/16's size, batch {data['arguments']['batch_size']}; × is how many times faster than eager PyTorch, the median "
        "of interleaved rounds with the smallest and largest; differences relative to the largest output."
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
    note = f"{asked['n']:,} random unit vectors of {asked['dim']}; embedding pictures is not part of it. Recall of the exact answers."
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
