"""Tables from what the scripts in `benchmarks/` wrote, one `tabulate_*` for each script.

[`BENCHMARK_TABLES`] names them for pages and reports. Nothing here reads or writes a file.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from modeling_dclip.evaluation.reports.document import Cell, Table, Text
from modeling_dclip.evaluation.reports.metric_names import METRIC_TITLES, percent
from modeling_dclip.evaluation.reports.tables import ABSENT, show_interval
from modeling_dclip.evaluation.statistics import compare_arms

CLOCKS = {"cpu_ms": "CPU ms", "latency_ms": "ms"}


def _ms(value: float) -> str:
    """Three significant digits, or more before the point: where a ratio of two rows shows a difference, so do the
    rows.
    """
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _spread(value: Mapping[str, float] | None, digits: int | None = None) -> Cell:
    """A median with the smallest and the largest of its rounds: with `digits` decimals, or as times."""
    if value is None:
        return Cell(ABSENT)
    median, low, high = (
        _ms(value[name]) if digits is None else f"{value[name]:.{digits}f}" for name in ("median", "min", "max")
    )
    return Cell(median, f"[{low}, {high}]")


def _note(data: Mapping[str, Any], measured: str) -> Text:
    """What was measured, and on which machine with which PyTorch."""
    hardware, arguments = data["hardware"], data["arguments"]
    device = arguments.get("device", "cpu")
    where = hardware["cpu"] if device == "cpu" else ", ".join(hardware["gpus"])
    threads = f", {arguments['threads']} thread(s)" if device == "cpu" and "threads" in arguments else ""
    return Text(f"{measured} {where}{threads}, PyTorch {data['versions']['torch']}.")


def tabulate_encoders(data: Mapping[str, Any], *, cells: str = "native@1", over: str = "") -> list[Table | Text]:
    """Cost of image encoders beside each other.

    Args:
        data (`Mapping`): What `benchmarks/image_encoders.py` wrote.
        cells (`str`, *optional*, defaults to `"native@1"`): Comma-separated cells `SIZE@BATCH`, in the order to show.
        over (`str`, *optional*): Comma-separated encoders whose ratio has a column. By default all that rows are
            compared with.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.

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
    note = (
        "Medians of interleaved rounds, ratios with the smallest and largest round; GFLOP are of one batch, and like "
        "the parameters the eager float32 model's in every form."
    )
    return [Table([*header, *(f"/ {name}" for name in baselines)], lines), _note(data, note)]


def tabulate_scan(data: Mapping[str, Any]) -> list[Table | Text]:
    """Cost of the selective scan's paths against mamba-ssm's reference algorithm and a plain loop.

    Args:
        data (`Mapping`): What `benchmarks/selective_scan.py` wrote.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.
    """
    header = ["(batch, channels, length)", "forward, ms", "× mamba-ssm's algorithm", "× plain loop"]
    header += ["forward + backward, ms", "× mamba-ssm's algorithm", "× plain loop"]
    lines = []
    for row in data["rows"]:
        path = row["paths"]["torch"]
        line: list[str | Cell] = ["({}, {}, {})".format(*row["shape"])]
        for work in ("forward", "forward_backward"):
            line.append(_ms(path[f"{work}_ms"]["median"]))
            for baseline in ("mamba_ssm_reference_algorithm", "reference"):
                line.append(_spread(path.get(f"{work}_times_faster_than_{baseline}"), 1))
        lines.append(line)
    note = (
        "× is how many times faster, the median of interleaved rounds with the smallest and largest; state size 8, "
        "float32."
    )
    return [Table(header, lines), _note(data, note)]


def tabulate_student_step(data: Mapping[str, Any]) -> list[Table | Text]:
    """Time of a student's step with teacher and text tower online against one with stored targets.

    Args:
        data (`Mapping`): What `benchmarks/student_step.py` wrote.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.
    """
    header = ["Student's step", "ms", "× stored targets"]
    lines: list[list[str | Cell]] = [
        ["stored targets", _spread(data["cached_ms"]), "1"],
        ["teacher and text tower online", _spread(data["online_ms"]), _spread(data["online_over_cached"], 2)],
    ]
    note = _note(data, "Medians of interleaved rounds, with the smallest and largest.")
    return [Table(header, lines), note]


def tabulate_negatives(data: Mapping[str, Any]) -> list[Table | Text]:
    """What banks of all captions and images cost a step, and what a large batch in micro-batches costs.

    Args:
        data (`Mapping`): What `benchmarks/negatives.py` wrote.

    Returns:
        `list[Table | Text]`: A row for each size of bank, and a line on micro-batches and on what it was measured on.
    """
    header = ["Captions", "images", "bank, MiB", "loss and gradient, ms", "% of a step", "× in one matrix"]
    header += ["memory, MiB", "in one matrix, MiB"]
    lines: list[list[str | Cell]] = []
    for row in data["rows"]:
        line: list[str | Cell] = [f"{row['captions']:,}", f"{row['images']:,}", f"{row['bank_mebibytes']:.0f}"]
        share = {name: 100 * value for name, value in row["tiles_over_step"].items()}
        line += [_spread(row["ms"]["tiles"]), _spread(share, 1), _spread(row["one_matrix_over_tiles"], 2)]
        line += [f"{row['grown_mebibytes'][way]:.0f}" for way in ("tiles", "one_matrix")]
        lines.append(line)
    given, steps = data["arguments"], data["micro_batches_over_accumulated"]
    note = (
        f"Batch {given['batch_size']}; % of a step: of ViT-B/32's forward and backward pass of that batch, in this "
        "process; × in one matrix: how many times as long the loss takes with all products in one matrix; memory: how "
        "much the peak grows. The gradient of the whole batch in micro-batches of "
        f"{given['micro_batch_size']} takes {steps['median']:.2f} times as long as accumulating over them "
        f"({steps['min']:.2f} to {steps['max']:.2f}). Medians of interleaved rounds, with the smallest and largest."
    )
    return [Table(header, lines), _note(data, note)]


_ROTARY_METRICS = ("text_to_image_recall@1", "image_to_text_recall@1", "top1")


def tabulate_rotary_positions(data: Mapping[str, Any]) -> list[Table | Text]:
    """What rotary positions leave of a trained CLIP, and what they are worth at other sizes.

    Args:
        data (`Mapping`): What `benchmarks/rotary_positions.py` wrote.

    Returns:
        `list[Table | Text]`: The variants at step 0 and the models at several sizes, each with a line on what was
            measured.
    """
    names = [METRIC_TITLES[name] for name in _ROTARY_METRICS]
    first, lines = data["start"][0]["metrics"], []
    for row in data["start"]:
        kind, metrics = "CLIP's table alone", row["metrics"]
        if row["position_embedding_type"] == "rope":
            table = "CLIP's table" if row["rotary_table"] else "the table's mean"
            kind = f"{table} and rotation, {row['rotary_scale']:g} a patch"
        shares = [percent(metrics[name] / first[name]) for name in _ROTARY_METRICS]
        lines.append([kind, *(percent(metrics[name]) for name in _ROTARY_METRICS), *shares])
    header = ["Positions", *(f"{name} %" for name in names), *(f"{name}, % kept" for name in names)]
    note = (
        f"The anchor without training, on {data['arguments']['scenes']:,} drawn scenes and single objects of the "
        "validation split. Rotation: the fastest, in radians."
    )
    return [Table(header, lines), Text(note), *_rotary_sizes(data)]


def _rotary_sizes(data: Mapping[str, Any]) -> list[Table | Text]:
    sides = data["arguments"]["sizes"]
    names = " / ".join(METRIC_TITLES[name] for name in _ROTARY_METRICS)
    found: dict[str, dict[tuple[int, str], dict[int, float]]] = {}  # by model; by size and metric; by seed
    for row in data["sizes"]:
        for name in _ROTARY_METRICS:
            values = found.setdefault(row["model"], {}).setdefault((row["size"], name), {})
            values[row["seed"]] = row["metrics"][name]

    def cells(show: Callable[[int, str], str]) -> list[str]:
        return [" / ".join(show(side, name) for name in _ROTARY_METRICS) for side in sides]

    def mean(values: Mapping[int, float]) -> str:
        return percent(sum(values.values()) / len(values))

    def means(of: Mapping[tuple[int, str], Mapping[int, float]]) -> list[str]:
        return cells(lambda side, name: mean(of[side, name]))

    lines = [[model, *means(of)] for model, of in found.items()]
    header = [names + ", %", *(f"{side} px" for side in sides)]
    parts: list[Table | Text] = [Table(header, lines)]
    measured = f"Means over seeds, on {data['arguments']['scenes']:,} scenes and single objects of the test split."
    if {"rope, trained", "absolute, trained"} <= set(found):
        rope, absolute = found["rope, trained"], found["absolute, trained"]

        def differ(side: int, name: str) -> str:
            interval = compare_arms(rope[side, name], absolute[side, name])
            return show_interval(interval.to_dict(), signed=True)

        parts[0] = Table(header, [*lines, ["rope - absolute, trained", *cells(differ)]])
        measured += (
            " The last row is paired by seed, in points; ±: 95% t-interval over training seeds, on one test set."
        )
    return [*parts, Text(measured)]


def tabulate_retrieval(data: Mapping[str, Any]) -> list[Table | Text]:
    """Cost of retrieval metrics against clip_benchmark's on the same embeddings, and how ours grows.

    Args:
        data (`Mapping`): What `benchmarks/retrieval.py` wrote.

    Returns:
        `list[Table | Text]`: The comparison, what it was measured on, and the growth.
    """
    costs = (("cpu_s", "times_faster", 2), ("peak_memory_mib", "times_less_memory", 0))
    header = ["Images", "captions"]
    for what in ("CPU s", "MiB"):
        header += [f"{what}, ours", f"{what}, clip_benchmark", "×"]
    lines = []
    for row in data["rows"]:
        line: list[str | Cell] = [f"{row['images']:,}", f"{row['captions']:,}"]
        for cost, ratio, digits in costs:
            line += [
                f"{row[side][cost]['median']:.{digits}f}" if side in row else ABSENT
                for side in ("ours", "clip_benchmark")
            ]
            line.append(_spread(row.get(ratio), 1))
        lines.append(line)
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
    growth = Table(["Captions", "CPU s, ours", "MiB, ours"], grown, left=0)
    return [Table(header, lines, left=0), _note(data, note), growth]


def tabulate_onnx_towers(data: Mapping[str, Any]) -> list[Table | Text]:
    """Both towers under ONNX Runtime against PyTorch: speed, and how far the outputs are from the model's.

    Args:
        data (`Mapping`): What `benchmarks/onnx_towers.py` wrote.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.
    """
    lines: list[list[str | Cell]] = [
        [
            f"{row['tower']}, {row['form']}",
            f"{row['cpu_ms']['median']:.0f}",
            _spread(row["eager_over"], 2),
            *(
                [f"{row['mebibytes']:.0f}", f"{row['max_relative_difference']:.1e}", f"{row['min_cosine']:.5f}"]
                if "mebibytes" in row
                else [ABSENT] * 3
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
    return [Table(header, lines), _note(data, note)]


def tabulate_index(data: Mapping[str, Any]) -> list[Table | Text]:
    """Build and query times of search indexes.

    Args:
        data (`Mapping`): What `benchmarks/index.py` wrote.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.
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
    return [Table(header, lines, left=2), _note(data, note)]


def tabulate_families(data: Mapping[str, Any]) -> list[Table | Text]:
    """Which command works for which family of dual encoders, and what is said where one is refused.

    Args:
        data (`Mapping`): What `benchmarks/families.py` wrote.

    Returns:
        `list[Table | Text]`: The table, the refusals by number, and a line on what it was measured on.
    """
    steps = list(dict.fromkeys(step for row in data["rows"] for step in row["cells"]))
    lines, said = [], dict[str, int]()
    for row in data["rows"]:
        cells = []
        for step in steps:
            cell = row["cells"].get(step, {"end": ABSENT, "said": ""})
            reason = _reason(cell["said"])
            number = said.setdefault(reason, len(said) + 1) if reason else None
            cells.append(cell["end"] if number is None else f"{cell['end']} ({number})")
        lines.append([row["name"], *cells])
    refusals = [Text(f"({number}) {text}") for text, number in said.items()]
    note = "Each cell is a command in a process of its own, on a random checkpoint of a few thousand weights."
    return [Table(["Start", *steps], lines), *refusals, _note({"arguments": {}, **data["environment"]}, note)]


def _reason(said: str) -> str:
    """What was expected, of a refusal's line: what came instead stands in the row, and advice names folders."""
    return re.split(r", got | at '| \(", said)[0].rstrip(".") + "." if said else ""


def tabulate_fuzz(data: Mapping[str, Any]) -> list[Table | Text]:
    """What happened to malformed inputs, by kind.

    Args:
        data (`Mapping`): What `benchmarks/fuzz.py` wrote.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.
    """
    outcomes = {
        "tried": "tried",
        "right": "read right",
        "skipped": "left out and named",
        "clear_line": "one clear line",
        "unplaced_line": "line without file or field",
        "silent": "read wrong",
        "traceback": "traceback",
        "hang": "hang",
    }
    lines = [[row["kind"], *(f"{row[name]:,}" for name in outcomes)] for row in data["rows"]]
    lines.append(["all", *(f"{sum(row[name] for row in data['rows']):,}" for name in outcomes)])
    note = f"Different changes drawn with seed {data['arguments']['seed']}."
    return [Table(["Input", *outcomes.values()], lines), _note({"arguments": {}, **data["environment"]}, note)]


def tabulate_kills(data: Mapping[str, Any]) -> list[Table | Text]:
    """What became of commands that were killed and started again.

    Args:
        data (`Mapping`): What `benchmarks/kills.py` wrote.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.
    """
    counts = {
        "runs": "runs",
        "kills": "kills",
        "resumed_equal": "ended bit-equal",
        "different": "ended otherwise",
        "errors": "ended in an error",
        "leftovers": "left files behind",
    }
    lines = [[row["command"], row["what"], *(f"{row[name]:,}" for name in counts)] for row in data["rows"]]
    lines.append(["all", "", *(f"{sum(row[name] for row in data['rows']):,}" for name in counts)])
    note = "Each run is killed by SIGKILL and started again until it ends, then compared with an undisturbed one."
    table = Table(["Command", "what", *counts.values()], lines, left=2)
    return [table, _note({"arguments": {}, **data["environment"]}, note)]


def tabulate_pictures(data: Mapping[str, Any]) -> list[Table | Text]:
    """How alike one picture's embeddings are through every door, for many pictures.

    Args:
        data (`Mapping`): What `benchmarks/pictures.py` wrote.

    Returns:
        `list[Table | Text]`: The table, and a line on what it was measured on.
    """
    doors = data["doors"]
    lines = []
    for row in data["pictures"]:
        other = ABSENT if row["outcome"] == "read" else row["outcome"]
        cosines = [f"{row['cosines'][door]:.4f}" if door in row["cosines"] else other for door in doors]
        lines.append([row["name"], row["what"], *cosines])
    note = (
        "Cosine to the embedding of the same picture in 8-bit RGB; a picture that cannot be read is refused by name."
    )
    table = Table(["Picture", "what", *doors], lines, left=2)
    return [table, _note({"arguments": {}, **data["environment"]}, note)]


# By the name of the table in a Markdown page: the function that makes it, and its options.
BENCHMARK_TABLES: dict[str, tuple[Callable[..., list[Table | Text]], set[str]]] = {
    "encoders": (tabulate_encoders, {"cells", "over"}),
    "families": (tabulate_families, set()),
    "fuzz": (tabulate_fuzz, set()),
    "index": (tabulate_index, set()),
    "kills": (tabulate_kills, set()),
    "onnx_towers": (tabulate_onnx_towers, set()),
    "pictures": (tabulate_pictures, set()),
    "retrieval": (tabulate_retrieval, set()),
    "rotary_positions": (tabulate_rotary_positions, set()),
    "scan": (tabulate_scan, set()),
    "negatives": (tabulate_negatives, set()),
    "student_step": (tabulate_student_step, set()),
}
