"""Tables from results: records, summaries of arms, leakage.

`tabulate_*` make blocks of a report from dicts, `render_*` the same as Markdown. Nothing here reads or writes a file.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from modeling_dclip.evaluation.records import Record
from modeling_dclip.evaluation.reports.document import Cell, Code, Table, Text, render_markdown
from modeling_dclip.evaluation.reports.metric_names import METRIC_TITLES, Metric, comparison_title, metric_of, percent
from modeling_dclip.evaluation.statistics import (
    DIFFERENCE,
    IntervalDict,
    Summary,
    compare_arms,
    excludes_zero,
    seed_interval,
    unpaired_difference,
)
from modeling_dclip.progress import count_of

LEAKAGE_TITLES = {
    "as_trained": "own regions, own caption",
    "regions_shuffled": "another image's regions, own caption",
    "captions_shuffled": "own regions, another image's caption",
    "text_share_0": "own regions, own caption, text share 0",
    "text_share_0_regions_shuffled": "another image's regions, own caption, text share 0",
    "whole_image": "no teacher: CLIP's embedding of the image",
    "chance": "chance",
}
TWIN_METRICS = ("text_to_teacher_recall@1", "teacher_to_text_recall@1")
SHARE = Metric("", "%", True)
INTERVAL_NOTES = {
    "seeds": "±: {:.0%} t-interval over training seeds, on one test set.",
    "images": "In brackets: {:.0%} bootstrap interval over test images, for these checkpoints.",
}
_TRAINED_NOTE = "Images that a model was trained on are no evidence for new images."
ABSENT = "–"  # in place of a number that was not measured


def interval_cell(interval: IntervalDict, *, signed: bool = False, metric: Metric = SHARE, unit: str = "") -> Cell:
    """Show an estimate with its interval.

    It is `12.3 ± 0.4` if the interval is symmetric, `12.3 [11.0, 14.1]` if it is not, and `12.3` without an interval.
    Intervals over images always have brackets, because they are symmetric only by chance and the notes below a table
    tell the two kinds of interval by their form.

    Args:
        interval (`IntervalDict`): `estimate`, `low`, `high` (`None`: unbounded, or both `None`: no interval),
            optionally `covers`.
        signed (`bool`, *optional*, defaults to `False`): Show the sign of positive numbers too.
        metric ([`Metric`], *optional*): What the numbers are of; a share in [0, 1], shown in percent, by default.
        unit (`str`, *optional*): Stands after the interval.
    """
    estimate, low, high = (interval[name] for name in ("estimate", "low", "high"))
    value = metric.show(estimate, signed=signed)
    if low is None and high is None:
        return Cell(value, "", unit)
    symmetric = low is not None and high is not None and abs((high - estimate) - (estimate - low)) < 1e-9
    if symmetric and interval.get("covers") != "images":
        return Cell(value, f"± {metric.show(high - estimate)}", unit)
    ends = ["∞" if end is None else metric.show(end, signed=signed) for end in (low, high)]
    return Cell(value, f"[{ends[0]}, {ends[1]}]", unit)


def show_interval(interval: IntervalDict, *, signed: bool = False, metric: Metric = SHARE) -> str:
    """The text of [`interval_cell`], for a sentence."""
    return interval_cell(interval, signed=signed, metric=metric).text


def _interval_notes(kinds: Iterable[tuple[str, float]]) -> list[str]:
    """A sentence for each kind of interval, of what it `covers` and its confidence."""
    return [INTERVAL_NOTES[covers].format(level) for covers, level in sorted(kinds) if covers in INTERVAL_NOTES]


def _width_notes(shares: Iterable[IntervalDict], changes: Iterable[tuple[IntervalDict, int]]) -> list[str]:
    """What intervals over images are that the bootstrap cannot give.

    Args:
        shares (`Iterable[IntervalDict]`): Of metrics, as [`~modeling_dclip.evaluation.statistics.bootstrap_outcomes`]
            gives them: at 0 and at 1 they are exact.
        changes (`Iterable[tuple[IntervalDict, int]]`): Of differences and ratios, with the number of images.
    """
    notes = []
    if any(one["covers"] == "images" and one["estimate"] in (0, 1) and one["low"] != one["high"] for one in shares):
        notes.append("Of 0 and of 100 % it is the exact interval of Clopper and Pearson.")
    known = [(one, n) for one, n in changes if one["covers"] == "images" and one["low"] is not None]
    if unchanged := [
        n for one, n in known if one["low"] == one["high"] == one["estimate"] and one["estimate"] in (0, 1)
    ]:
        left = percent(1 - 0.05 ** (1 / min(unchanged)))
        notes.append(f"Where an interval has no width, none of the images changed; that leaves up to {left} points.")
    return notes


def name_of(record: Record) -> str:
    """The name of a row: the record's label, or else the model."""
    return record.get("label", record["model"])


def row_title(record: Record) -> str:
    """[`name_of`], and the record's condition where it has one (a point between two models, a changed input)."""
    return ", ".join([name_of(record), *([record["condition"]] if "condition" in record else [])])


_LONGEST_NAME = 3  # parts of a path


def _is_local(path: str) -> bool:
    """Whether it is a local path, not a Hub id (`ORG/NAME`), a URL (`//HOST/PATH` in a spec) or `open_clip:...`."""
    if path.startswith("//") or ":" in path:
        return False
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def shorten_benchmark(benchmark: str) -> str:
    """Keep the last two parts of every local path in a benchmark's spec, without `outputs/`. Hub ids and URLs stay.

    Example:
        >>> shorten_benchmark("leakage=disk:outputs/val_yolo")
        'leakage=disk:val_yolo'
        >>> shorten_benchmark("retrieval=coco:/data/coco/annotations/captions_val2017.json:/data/coco/val2017")
        'retrieval=coco:annotations/captions_val2017.json:coco/val2017'
    """

    def shorten(match: re.Match[str]) -> str:
        return "/".join(PurePath(match[0]).parts[-2:]) if _is_local(match[0]) else match[0]

    return re.sub(r"[^:=,]*/[^:=,]*", shorten, re.sub(r"(?<=\bdisk:)outputs/", "", benchmark))


def _shorten_models(parts: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Names of local folders: without the folders that all share, and of a longer rest as few of the last parts as
    tell them apart. `student` or `dmclip` alone would not tell runs apart, and takes its folder's name before it.
    """
    shared = len(os.path.commonprefix([folders[:-1] for folders in parts.values()]))
    names = {}
    for model, folders in parts.items():
        rest = folders[shared:]
        if len(rest) > _LONGEST_NAME:
            others = [own for own in parts.values() if own != folders]
            counts = range(2, len(rest))
            rest = rest[-next((n for n in counts if all(own[-n:] != rest[-n:] for own in others)), len(rest)) :]
        alone = rest in (("student",), ("dmclip",)) and len(folders) > 1 and folders[-2] not in ("..", ".", "/")
        names[model] = "/".join(folders[-2:] if alone else rest)
    return names


def shorten_paths(records: Sequence[Record]) -> list[Record]:
    """Show models and benchmarks without the folders of the machine that measured them.

    A local path in a benchmark's spec keeps its last two parts. A model that is a local path and has no label loses
    the folders that all such models share, and keeps at most as many others as tell it apart. Hub ids, URLs and labels
    stay. If two different benchmarks would look equal, all stay as they are.

    Args:
        records (`Sequence[Record]`): From [`~modeling_dclip.evaluation.records.read_results`]; not changed.

    Returns:
        `list[Record]`: Copies with other values of `benchmark` and `label`.

    Example:
        >>> [short] = shorten_paths([{"model": "/runs/student", "benchmark": "retrieval=disk:/data/flickr/test"}])
        >>> short["label"], short["benchmark"]
        ('runs/student', 'retrieval=disk:flickr/test')
    """
    benchmarks = {record["benchmark"]: shorten_benchmark(record["benchmark"]) for record in records}
    if len(set(benchmarks.values())) < len(benchmarks):
        benchmarks = dict(zip(benchmarks, benchmarks, strict=True))
    models = {record["model"] for record in records if "label" not in record and _is_local(record["model"])}
    labels = _shorten_models({model: PurePath(model).parts for model in models})
    return [
        ({"label": labels[record["model"]]} if record["model"] in labels else {})
        | dict(record)
        | {"benchmark": benchmarks[record["benchmark"]]}
        for record in records
    ]


RECORD_COLUMNS = {
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


# What a table shows of a kind of benchmark by default, the most important first; of other kinds, everything. The first
# two have their intervals beside them.
HEADLINES: dict[str, tuple[str, ...]] = {
    "retrieval": (
        "text_to_image_recall@1",
        "image_to_text_recall@1",
        "text_to_image_recall@10",
        "image_to_text_recall@10",
    ),
    "zero_shot": ("top1", "map", "mean_per_class", "top5"),
}
KIND_TITLES = {
    "retrieval": "Retrieval",
    "zero_shot": "Zero-shot classification",
    "fine_grained": "Fine-grained retrieval",
    "diagnostics": "Diagnostics",
    "hessian": "Curvature",
    "efficiency": "Efficiency",
}
COUNTED = {"fine_grained": "question", "efficiency": "round"}  # what n counts, where not images
_WITH_INTERVALS = 2


def kind_of_record(record: Record) -> str:
    """`retrieval` of `retrieval=coco:...`."""
    return record["benchmark"].partition("=")[0]


def render_table(
    records: Sequence[Record],
    *,
    metrics: Sequence[str] | None = None,
    best: bool = False,
    widest: int | None = None,
) -> str:
    """Show results records, one row each, one table for each kind of benchmark.

    Gain and retention against the anchor come first, where a record holds them, then the metrics. The line above a
    table names what it was measured on; with several benchmarks in it, columns do. Models and benchmarks are named as
    [`shorten_paths`] says.

    With `best`, the best number among several records of one benchmark on the same data is in bold if it differs from
    all others beyond noise ([`differ_beyond_noise`]). All that show the same number as the best one are in bold too.

    Args:
        records (`Sequence[Record]`): From [`~modeling_dclip.evaluation.records.read_results`].
        metrics (`Sequence[str]`, *optional*): Which metrics, in this order, all with intervals. Kinds without any of
            them are left out. By default those of [`HEADLINES`], of which the first have intervals.
        best (`bool`, *optional*, defaults to `False`): Whether the best number is in bold.
        widest (`int`, *optional*): Leave out the last columns of a table that is wider than so many characters.

    Returns:
        `str`: Markdown. Shares are in percent, other metrics in their units; the last line says what the intervals
            are.

    Raises:
        ValueError: If there is no record, or none has one of the metrics.
    """
    kinds: dict[str, list[Record]] = {}
    for record in shorten_paths(records):
        if any(name in record["metrics"] for name in metrics or record["metrics"]):
            kinds.setdefault(kind_of_record(record), []).append({**record, "label": row_title(record)})
    if not kinds:
        raise ValueError(
            f"Expected records with any of the metrics {metrics or 'at all'}, got {len(records)} without."
        )
    blocks: list[Table | Text] = []
    notes: dict[str, None] = {}
    for kind, own in kinds.items():
        title, columns = _describe_rows(kind, own)
        present = dict.fromkeys(name for record in own for name in record["metrics"])
        wanted = metrics or HEADLINES.get(kind, tuple(present))
        names = [name for name in wanted if name in present]
        table, own_notes = _tabulate(
            _name_benchmarks(own, short=widest is not None) if "benchmark" in columns else own,
            names,
            best=best,
            columns=columns,
            with_intervals=names[: None if metrics else _WITH_INTERVALS],
            widest=widest,
        )
        blocks += [title, table]
        notes |= dict.fromkeys(own_notes)
    return render_markdown([*blocks, *([Text(" ".join(notes))] if notes else [])])


# What a table of before and after has a row for, by kind: of the first metrics that a record has, as many as named.
_MAIN: dict[str, tuple[int, tuple[str, ...]]] = {
    "retrieval": (2, ("text_to_image_recall@1", "image_to_text_recall@1")),
    "zero_shot": (1, ("top1", "map")),
    "fine_grained": (1, ("group_score", "accuracy")),
}


def render_before_and_after(records: Sequence[Record], *, names: Mapping[str, str] | None = None) -> str:
    """Show what training changed: a row for each main metric of each benchmark, the anchor before the model.

    Args:
        records (`Sequence[Record]`): Of one model and of its anchor, from
            [`~modeling_dclip.evaluation.evaluator.evaluate`].
        names (`Mapping[str, str]`, *optional*): What to call a benchmark, by its name; by default its spec in short.

    Returns:
        `str`: Markdown; empty if no record has such a metric and an anchor. Shares are in percent, and the last line
            says what the intervals are. Test images that a model was trained on are counted beside `n`.
    """
    rows: list[list[str | Cell]] = []
    kinds: set[tuple[str, float]] = set()
    notes: list[str] = []
    shares: list[IntervalDict] = []
    changes: list[tuple[IntervalDict, int]] = []
    for record in records:
        anchor = next((one for one in records if _is_anchor_of(one, record)), None)
        if anchor is None:
            continue
        kind = kind_of_record(record)
        count, metrics = _MAIN.get(kind, (0, ()))
        shown = (names or {}).get(record["benchmark"]) or shorten_benchmark(record["benchmark"]).partition("=")[2]
        for name in [name for name in metrics if name in record["metrics"]][:count]:
            cells = [_metric_cell(one, name) for one in (anchor, record)]
            change = record["comparison"].get(f"{name}{DIFFERENCE}")
            cells.append(interval_cell(change, signed=True) if change else Cell(ABSENT))
            size = count_of(record["n"], COUNTED.get(kind, "image"))
            if known := max(one.get("n_trained_on", 0) for one in (anchor, record)):
                size += f", {known:,} trained on"
                notes = [_TRAINED_NOTE]
            rows.append([metric_of(name).heading, shown or kind, size, *cells])
            own = [one["intervals"][name] for one in (anchor, record) if name in one.get("intervals", {})]
            shares += own
            changes += [(change, record["n"])] if change else []
            bounds = [change, *own]
            kinds |= {(one["covers"], one["confidence"]) for one in bounds if one and one["low"] is not None}
    if not rows:
        return ""
    text = " ".join(["In percent.", *notes, *_interval_notes(kinds), *_width_notes(shares, changes)])
    header = ["", "measured on", "n", "before", "after", "change"]
    return render_markdown([Table(header, rows, 2), Text(text)])


def _is_anchor_of(one: Record, record: Record) -> bool:
    """Whether a record is what another one, of the same data, is compared with."""
    same = all(one[key] == record[key] for key in ("benchmark", "dataset_fingerprint"))
    return same and "comparison" not in one and one["revision"] == record.get("comparison", {}).get("anchor_revision")


def _describe_rows(kind: str, records: Sequence[Record]) -> tuple[Text, list[str]]:
    """The line above a table, and the columns before its metrics."""
    specs = {record["benchmark"].partition("=")[2] for record in records}
    sizes = {(record["n"], record.get("n_captions")) for record in records}
    data = {(record["benchmark"], record["dataset_fingerprint"]) for record in records}
    title = KIND_TITLES.get(kind, kind.replace("_", " ").capitalize())
    columns = ["model", *["benchmark"] * (len(specs) > 1), *["data"] * (len(data) > len(specs))]
    if len(specs) > 1:
        return Text(f"{title}, {count_of(len(specs), 'benchmark')}:"), [*columns, "n"]
    where: list[str] = [" on ", Code(spec)] if (spec := next(iter(specs))) else []
    if len(sizes) > 1:
        return Text(title, *where, ":"), [*columns, "n"]
    n, captions = next(iter(sizes))
    size = count_of(n, COUNTED.get(kind, "image")) + (f" with {count_of(captions, 'caption')}" if captions else "")
    return Text(title, *where, f", {size}:"), columns


def _name_benchmarks(records: Sequence[Record], *, short: bool) -> list[Record]:
    """Rows of one kind by benchmark, which is named by its spec; `short` leaves out the options where the rest tells
    the benchmarks apart.
    """
    specs = {record["benchmark"]: record["benchmark"].partition("=")[2] for record in records}
    plain = {benchmark: spec.partition(",")[0] for benchmark, spec in specs.items()}
    if short:
        named = list(plain.values())
        specs |= {benchmark: name for benchmark, name in plain.items() if named.count(name) == 1}
    order = list(specs)
    ordered = sorted(records, key=lambda record: order.index(record["benchmark"]))
    return [{**record, "benchmark": specs[record["benchmark"]]} for record in ordered]


def tabulate_rows(
    records: Sequence[Record], names: Sequence[str], *, best: bool, columns: Sequence[str], ratios: bool = True
) -> list[Table | Text]:
    """Make one table of records, gain and retention first, and a note on its intervals where it has any.

    A metric that repeats another one in all rows has no column: mAP where it is MRR, since each query has one right
    answer, and the mean per class where it is top-1, since the classes are of one size.

    Args:
        records (`Sequence[Record]`): The rows.
        names (`Sequence[str]`): The metrics; one that a record lacks is a dash in its row.
        best (`bool`): As in [`render_table`].
        columns (`Sequence[str]`): The columns before the metrics, of `RECORD_COLUMNS`.
        ratios (`bool`, *optional*, defaults to `True`): Whether gain and retention are shown.
    """
    records = records if ratios else [{**record, "comparison": {}} for record in records]
    table, notes = _tabulate(records, names, best=best, columns=columns, with_intervals=names)
    return [table, Text(" ".join(notes))] if notes else [table]


def _tabulate(
    records: Sequence[Record],
    names: Sequence[str],
    *,
    best: bool,
    columns: Sequence[str],
    with_intervals: Sequence[str],
    widest: int | None = None,
) -> tuple[Table, list[str]]:
    """The table, and a note on each kind of interval and on each ratio; only some metrics have their intervals."""
    headings = merge_repeats([record["metrics"] for record in records], names)
    names = list(headings)
    compared = dict.fromkeys(key for record in records for key in record.get("comparison", {}))
    ratios = [key for key in compared if comparison_title(key)]
    winners = _find_best(records, names) if best else set()
    shown = set(with_intervals)
    rows = []
    for index, record in enumerate(records):
        row: list[str | Cell] = [RECORD_COLUMNS[name][1](record) for name in columns]
        for key in ratios:
            interval = record.get("comparison", {}).get(key)
            row.append(_ratio_cell(interval, key))
        for name in names:
            cell = _metric_cell(record, name)._replace(is_best=(index, name) in winners)
            row.append(cell if name in shown else cell._replace(interval=""))
        rows.append(row)
    header = [RECORD_COLUMNS[name][0] for name in columns]
    header += [title for key in ratios if (title := comparison_title(key))] + list(headings.values())
    left = next((i for i, name in enumerate(columns) if name in ("n", "runs")), len(columns))
    table = _narrow(Table(header, rows, left), widest, least=len(columns) + len(ratios) + 1)
    kinds = {
        (interval["covers"], interval["confidence"])
        for record in records
        for name, interval in [*record.get("intervals", {}).items(), *_ratios_of(record).items()]
        if name in [*shown, *ratios] and interval["low"] is not None
    }
    own = dict.fromkeys(f"{note}." for record in records for note in record.get("notes", []))
    shares = [one for record in records for name, one in record.get("intervals", {}).items() if name in shown]
    changes = [(one, record["n"]) for record in records for one in _ratios_of(record).values()]
    widths = _width_notes(shares, changes if ratios else [])
    return table, [*own, *_interval_notes(kinds), *widths, *_ratio_notes(records, ratios)]


_NEAR_ZERO = "{}: no number where the anchor's is 0 or so near it that a difference cannot be given in percent."


def is_open(interval: IntervalDict) -> bool:
    """Whether a ratio has no upper end: in some draws of images the anchor is at 0."""
    return interval["low"] is not None and interval["high"] is None


def _ratio_cell(interval: IntervalDict | None, key: str) -> str | Cell:
    if interval is None or is_open(interval):
        return ABSENT
    return interval_cell(interval, signed=key.endswith("_gain"), unit="%")


def _ratios_of(record: Record) -> dict[str, IntervalDict]:
    return {key: value for key, value in record.get("comparison", {}).items() if comparison_title(key)}


def _ratio_notes(records: Sequence[Record], ratios: Sequence[str]) -> list[str]:
    """What gain and retention are relative to."""
    if not ratios:
        return []
    anchors = {record["comparison"].get("anchor_revision") for record in records if "comparison" in record}
    named = [name_of(record) for record in records if record["revision"] in anchors and "condition" not in record]
    against = named[0] if len(set(named)) == 1 else "the anchor"
    words = {"gain": "relative to {}.", "kept": "in percent of {}'s."}
    titles = {key: title for key in ratios if (title := comparison_title(key))}
    notes = [f"{title}: {words[title.rpartition(' ')[2]].format(against)}" for title in titles.values()]
    unknown = {key for record in records for key, ratio in _ratios_of(record).items() if is_open(ratio)}
    return notes + [_NEAR_ZERO.format(title) for key, title in titles.items() if key in unknown]


def _narrow(table: Table, widest: int | None, least: int) -> Table:
    """Leave out the last columns until a table is narrow enough; the first `least` stay."""
    while widest and len(table.header) > least and len(render_markdown([table]).partition("\n")[0]) > widest:
        table = table._replace(header=table.header[:-1], rows=[row[:-1] for row in table.rows])
    return table


# Metrics that are often the same number, and the suffix of the one whose column stays.
_REPEATS = {"_map": "_mrr", "mean_per_class": "top1"}


def merge_repeats(metrics: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, str]:
    """Leave out the metrics that repeat another one in all rows.

    Args:
        metrics (`Sequence[Mapping[str, float]]`): The values of each row.
        names (`Sequence[str]`): Which to show.

    Returns:
        `dict[str, str]`: The heading of each that stays, which names what it stands for too.
    """
    headings: dict[str, str] = {name: metric_of(name).heading for name in names}
    for name in names:
        suffix = next((end for end in _REPEATS if name.endswith(end)), None)
        other = name.removesuffix(suffix) + _REPEATS[suffix] if suffix else name
        values = [(row.get(name), row.get(other)) for row in metrics]
        if other != name and other in names and all(one is not None and one == two for one, two in values):
            headings[other] += f", {re.sub('^.→. ', '', headings.pop(name))}"
    return headings


def interval_of(record: Record, metric: str) -> IntervalDict:
    """A metric of a record with its interval; both ends are `None` where the record holds none."""
    bare: IntervalDict = {"estimate": None, "low": None, "high": None, "confidence": 0.95, "covers": "nothing"}
    return {**bare, **record.get("intervals", {}).get(metric, {}), "estimate": float(record["metrics"][metric])}


def _metric_cell(record: Record, name: str) -> Cell:
    return (
        interval_cell(interval_of(record, name), metric=metric_of(name)) if name in record["metrics"] else Cell(ABSENT)
    )


_EXACT = ("million", "GFLOP")  # units of metrics that are counted, without noise


def differ_beyond_noise(first: Record, second: Record, metric: str) -> bool:
    """Say whether two records of one benchmark on the same data differ in a metric beyond noise.

    Where one is the other's anchor, the paired difference in the record decides; else both intervals, as if the images
    were not the same. Timings differ if their ranges do not overlap, counts if they show different numbers. Without
    any of these nothing is known of the noise, and the answer is no.

    Args:
        first, second (`Record`): The two; both have the metric.
        metric (`str`): Its name.
    """
    known = metric_of(metric)
    values = [record["metrics"][metric] for record in (first, second)]
    if known.unit in _EXACT:
        return known.show(values[0]) != known.show(values[1])
    ranges = [record.get("spread", {}).get(metric) for record in (first, second)]
    if ranges[0] and ranges[1]:
        return ranges[0]["max"] < ranges[1]["min"] or ranges[1]["max"] < ranges[0]["min"]
    for one, other in ((first, second), (second, first)):
        comparison = one.get("comparison", {})
        if comparison.get("anchor_revision") == other["revision"] and "condition" not in other:
            if stored := comparison.get(f"{metric}{DIFFERENCE}"):
                return excludes_zero(stored, one["n"])
    found = unpaired_difference(interval_of(first, metric), interval_of(second, metric))
    return found is not None and excludes_zero(found.to_dict(), min(first["n"], second["n"]))


def _find_best(records: Sequence[Record], names: Sequence[str]) -> set[tuple[int, str]]:
    """`(row, metric)` of the cells to set in bold."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault((record["benchmark"], record["dataset_fingerprint"]), []).append(index)
    winners = set()
    for rows in groups.values():
        for name in names:
            metric = metric_of(name)
            values = {index: records[index]["metrics"][name] for index in rows if name in records[index]["metrics"]}
            if metric.higher_is_better is None or len(values) < 2:
                continue
            top = (max if metric.higher_is_better else min)(values, key=lambda index: values[index])
            same = [index for index in values if metric.show(values[index]) == metric.show(values[top])]
            others = [records[index] for index in values if index not in same]
            if others and all(differ_beyond_noise(records[top], other, name) for other in others):
                winners |= {(index, name) for index in same}
    return winners


def tabulate_summary(summary: Summary, *, where: str = "the summary") -> list[Table | Text]:
    """Make the table of a summary of arms: retrieval both ways, zero-shot accuracy, gain and retention.

    Args:
        summary ([`~modeling_dclip.evaluation.statistics.Summary`]): From
        [`~modeling_dclip.evaluation.statistics.summarise_arms`]; other keys are not read.
        where (`str`, *optional*): File, for messages.

    Returns:
        `list[Table | Text]`: The table, a line on the intervals, and one line for each comparison.

    Raises:
        ValueError: If the summary has no arms or an arm lacks a needed key; the key is named.
    """
    columns = ["text_to_image_recall@1", "image_to_text_recall@1", "top1"]
    if not isinstance(summary, Mapping) or not summary.get("arms"):
        raise ValueError(
            f"Expected the key 'arms' with one or more arms in {where}. Make the file with summarise_arms."
        )
    rows, kinds = [], set()
    for arm in summary["arms"]:
        missing = [name for name in columns if name not in arm.get("metrics", {})]
        if missing or "arm" not in arm or "seeds" not in arm:
            raise ValueError(f"Expected 'arm', 'seeds' and the metrics {columns} in every arm of {where}, got {arm}.")
        cells = [interval_cell(arm["metrics"][name]) for name in columns]
        cells.append(interval_cell(arm["gain"], signed=True) if "gain" in arm else Cell(ABSENT))
        cells.append(interval_cell(arm["retention"]) if "retention" in arm else Cell(ABSENT))
        rows.append([arm["arm"], f"{len(arm['seeds'])}", *cells])
        intervals = [*arm["metrics"].values(), *(arm[name] for name in ("gain", "retention") if name in arm)]
        kinds |= {(interval["covers"], interval["confidence"]) for interval in intervals}
    header = ["Model", "Seeds", "T→I R@1 %", "I→T R@1 %", "zero-shot top-1 %", "gain %", "retention %"]
    against = summary.get("anchor", "the anchor")
    notes = [
        *_interval_notes(kinds),
        f"Gain: T→I R@1 relative to {against}; retention: zero-shot top-1 relative to {against}.",
    ]
    blocks: list[Table | Text] = [Table(header, rows), Text(" ".join(notes))]
    for pair in summary.get("comparisons", []):
        shown = (f"{METRIC_TITLES[name]} {show_interval(pair['metrics'][name], signed=True)}" for name in columns)
        blocks.append(
            Text(f"{pair['student']} minus {pair['baseline']}, paired by seed, in points: {', '.join(shown)}.")
        )
    return blocks


def render_summary(summary: Summary, *, where: str = "the summary") -> str:
    """[`tabulate_summary`] as Markdown."""
    return render_markdown(tabulate_summary(summary, where=where))


def tabulate_leakage(records: Sequence[Record], *, metric: str = "text_to_teacher_recall@1") -> list[Table | Text]:
    """Make the table of what teachers reach with parts of their input exchanged: a row for each condition, a column
    for each label.

    Args:
        records (`Sequence[Record]`): From [`~modeling_dclip.evaluation.leakage.evaluate_leakage`], on one benchmark.
            Records with one label are trainings of one teacher with several seeds.
        metric (`str`, *optional*, defaults to `"text_to_teacher_recall@1"`): Which to show, in percent.

    Returns:
        `list[Table | Text]`: The table, and a line on what was measured and what the intervals are.

    Raises:
        ValueError: If a record is of another kind or lacks the metric, a cell is missing, or the benchmarks differ.
    """
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "condition" not in record or metric not in record["metrics"]:
            raise ValueError(
                f"Expected a 'condition' and the metric {metric!r} in every record, got {record.get('condition')!r} "
                f"and {sorted(record['metrics'])} for {record['model']!r}."
            )
        cells.setdefault((record["condition"], name_of(record)), []).append(record)
    conditions, labels = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    measured = {(record["benchmark"], record["dataset_fingerprint"], record["n"]) for record in records}
    if len(measured) != 1 or len(cells) != len(conditions) * len(labels):
        raise ValueError(
            f"Expected every condition for every label on one benchmark, got {sorted(cells)} on {sorted(measured)}. "
            "Measure them again."
        )
    rows, kinds = [], set()
    for condition in conditions:
        row: list[str | Cell] = [LEAKAGE_TITLES.get(condition, condition)]
        for label in labels:
            interval = _pool_trainings(cells[condition, label], metric)
            kinds.add((interval["covers"], interval["confidence"]))
            row.append(interval_cell(interval))
        rows.append(row)
    (benchmark, _, n), draws = measured.pop(), [record["draws"][metric] for record in records if "draws" in record]
    trained = {label: len(cells[conditions[0], label]) for label in labels}
    header = [f"{label} ({count} trained)" if count > 1 else label for label, count in trained.items()]
    notes = []
    if draws:
        apart = max(max(values) - min(values) for values in draws)
        notes.append(
            f"Means of {len(draws[0])} draws of captions and shuffles, which are at most {percent(apart)} apart."
        )
    notes += _interval_notes(kinds)
    title, data = METRIC_TITLES.get(metric, metric), Code(shorten_benchmark(benchmark).partition("=")[2])
    note = Text(f"{title} in percent, {n:,} images of ", data, " ".join([".", *notes]))
    return [Table(["The teacher reads", *header], rows), note]


def render_leakage(records: Sequence[Record], *, metric: str = "text_to_teacher_recall@1") -> str:
    """[`tabulate_leakage`] as Markdown."""
    return render_markdown(tabulate_leakage(records, metric=metric))


def tabulate_twins(records: Sequence[Record], twins: Sequence[Record]) -> list[Table | Text]:
    """Make the table of what regions are worth: each teacher beside its twin, which sees the whole image instead.

    Args:
        records (`Sequence[Record]`): Of teachers with regions, as for [`tabulate_leakage`].
        twins (`Sequence[Record]`): Of teachers with the whole image in the regions' place, on the same images. A pair
            has the same last three parts of its path, such as `paper/seed-0/teacher`, and learned with the same seed.

    Returns:
        `list[Table | Text]`: A row for each label, and a line on what was measured and what the intervals are.

    Raises:
        ValueError: If a teacher has no twin, or a label has no row `as_trained`.
    """
    found: dict[str, tuple[dict[str, Record], dict[str, Record]]] = {}
    for side, measured in enumerate((records, twins)):
        for record in measured:
            if record.get("condition") == "as_trained":
                sides = found.setdefault(name_of(record), ({}, {}))
                sides[side]["/".join(PurePath(record["model"]).parts[-3:])] = record
    if not found or any(mine.keys() != other.keys() for mine, other in found.values()):
        pairs = {label: (sorted(mine), sorted(other)) for label, (mine, other) in found.items()}
        raise ValueError(f"Expected for each teacher with regions a twin of the same label and path, got {pairs}.")
    metrics = [name for name in TWIN_METRICS if all(name in record["metrics"] for record in (*records, *twins))]
    header, rows, kinds = ["Teacher"], [], set()
    for name in metrics:
        header += [METRIC_TITLES[name], "whole image in place of regions", "regions minus whole image"]
    for label, sides in found.items():
        row: list[str | Cell] = [f"{label} ({len(sides[0])} trained)"]
        for name in metrics:
            mine, other = ([side[key]["metrics"][name] for key in sorted(side)] for side in sides)
            difference = compare_arms(dict(enumerate(mine)), dict(enumerate(other)))
            for interval in (seed_interval(mine), seed_interval(other), difference):
                row.append(interval_cell(interval.to_dict(), signed=interval is difference))
                kinds.add((interval.covers, interval.confidence))
        rows.append(row)
    images = next(record["n"] for record in records)
    note = f"In percent, {images:,} images; differences in points, paired by seed."
    return [Table(header, rows), Text(" ".join([note, *_interval_notes(kinds)]))]


def _pool_trainings(records: Sequence[Record], metric: str) -> IntervalDict:
    """The interval over training seeds where there are several; else over images, where the record holds it."""
    values = [record["metrics"][metric] for record in records]
    if len(values) == 1 or len(set(values)) == 1:  # a number that no training changes has no spread over trainings
        return records[0].get("intervals", {}).get(metric) or seed_interval(values[:1]).to_dict()
    return seed_interval(values).to_dict()


def render_averages(records: Sequence[Record]) -> str:
    """Show the averages of the zero-shot suite for each model, and over how many of its sets each average is.

    Args:
        records (`Sequence[Record]`): From [`~modeling_dclip.evaluation.records.read_results`]. Points between two
            models, and splits, have averages of their own.

    Returns:
        `str`: Markdown; empty where no record is of a set of the suite.

    Raises:
        ValueError: If two records of one model and split are of one set.
    """
    from modeling_dclip.evaluation.benchmarks.suite import averages_of_records, suite_name  # reads pictures too

    models: dict[tuple[str | None, ...], list[Record]] = {}
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
    return render_markdown([Table(["Model", "Average", "%", "sets"], rows, left=2)]) if rows else ""
