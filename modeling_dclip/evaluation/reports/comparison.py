"""Compare two results files: metric by metric, with the difference's interval, and what else differs.

On the same data with the outcomes of every image beside both files, the difference is bootstrapped in pairs; else it
comes from the records' own intervals, as if the two had seen other images; else there is none.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.records import outcomes_path, read_outcomes, read_results, record_key
from modeling_dclip.evaluation.reports.document import Table, render_markdown
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.evaluation.reports.tables import interval_cell, name_of, short_hash
from modeling_dclip.evaluation.statistics import bootstrap_differences, unpaired_difference

# Fields that say what was measured rather than on what; all others are compared, also those that a later version adds.
_MEASURED = {"metrics", "intervals", "draws", "comparison", "label", "created", "format_version"}
_HASHES = {"revision", "dataset_fingerprint"}
_WORDS = {"dataset_fingerprint": "data", "n_captions": "captions", "revision": "weights"}
# Rows that differ in one of these do not answer one question. Other weights are the question; commands differ with
# them.
_DECISIVE = ("dataset_fingerprint", "split", "n", "n_captions", "settings")


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record was measured on, one entry each: versions, hardware and settings become `versions.torch` and so
    on.

    Args:
        record (`dict`): From [`~modeling_dclip.evaluation.records.read_results`], or any JSON of a benchmark.

    Returns:
        `dict[str, Any]`: Without what was measured: metrics, their intervals, the time.
    """
    flat = {}
    for name, value in record.items():
        if name in _MEASURED:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _show(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name in _HASHES and isinstance(value, str):
        return short_hash(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and name != "seed" else str(value)


def word(name: str) -> str:
    """A field as a reader calls it: `dataset_fingerprint` -> "data", `versions.torch` -> "torch"."""
    return _WORDS.get(name, name.removeprefix("versions.").removeprefix("hardware.").removeprefix("settings."))


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """In what two records differ but for what was measured.

    Args:
        first, second (`dict`): Records.

    Returns:
        `list[tuple[str, str, str]]`: Field and the two values as text; "none" for a field that is missing.
    """
    one, other = flatten(first), flatten(second)
    names = list(dict.fromkeys([*one, *other]))
    return [
        (name, _show(name, one.get(name)), _show(name, other.get(name)))
        for name in names
        if one.get(name) != other.get(name)
    ]


def find_conflicts(records: Sequence[Mapping[str, Any]], *, timed: bool = False, seeds: bool = True) -> list[str]:
    """Say why records of one table are not comparable.

    Args:
        records (`Sequence[dict]`): Rows of one table.
        timed (`bool`, *optional*, defaults to `False`): Whether times or memory are compared, so that hardware matters
            too.
        seeds (`bool`, *optional*, defaults to `True`): Whether rows of different seeds are a conflict.

    Returns:
        `list[str]`: One sentence for each field that differs: the data, split, number of images or captions, settings,
            seeds, versions of packages.
    """
    flat = [flatten(record) for record in records]
    names = list(dict.fromkeys(name for fields in flat for name in fields))
    groups = {*_DECISIVE, "versions"} | ({"seed"} if seeds else set()) | ({"hardware"} if timed else set())
    found = []
    for name in names:
        group, _, _ = name.partition(".")
        if group not in groups or name == "settings.alpha":
            continue
        rows: dict[str, list[str]] = {}
        for record, fields in zip(records, flat, strict=True):
            if name != "seed" or name in fields:  # the mean of several seeds has none
                rows.setdefault(_show(name, fields.get(name)), []).append(name_of(record))
        if len(rows) > 1:
            parts = "; ".join(f"{value} ({_some(labels)})" for value, labels in rows.items())
            found.append(f"{_VERDICTS.get(group, 'Not comparable: different')} {word(name)}: {parts}.")
    return found


_VERDICTS = {
    "seed": "Rows of single seeds may differ by chance:",
    "versions": "Measured with different software:",
    "hardware": "Measured on different hardware:",
}


def _some(labels: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(labels))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def measured_on(records: Sequence[Mapping[str, Any]], *, weights: bool = True) -> list[tuple[str, str]]:
    """What the rows of a table were measured on.

    Args:
        records (`Sequence[dict]`): Records, or JSON of a benchmark with `n`, `arguments`, `versions` and `hardware`.
        weights (`bool`, *optional*, defaults to `True`): Name each row's weights; not needed where a column does.

    Returns:
        `list[tuple[str, str]]`: Term and text: benchmark, n, split, seed, data, weights, settings, hardware, versions,
            command, date. Several values are joined by " or "; terms of which nothing is known are left out.
    """
    flat = [flatten(record) for record in records]

    def values(name: str) -> str:
        shown = dict.fromkeys(_show(name, fields[name]) for fields in flat if fields.get(name) not in (None, ""))
        return " or ".join(shown)

    def group(prefix: str) -> str:
        names = dict.fromkeys(name for fields in flat for name in fields if name.startswith(f"{prefix}."))
        shown = ((word(name).removeprefix(f"{prefix}."), values(name)) for name in names)
        return ", ".join(f"{name} {text}" for name, text in shown if text)

    named = dict.fromkeys(
        f"{name_of(record)} {short_hash(record['revision'])}" for record in records if "revision" in record
    )
    dates = sorted({record["created"][:10] for record in records if "created" in record})
    full = dict.fromkeys(record["dataset_fingerprint"] for record in records if "dataset_fingerprint" in record)
    terms = {
        "Benchmark": values("benchmark"),
        "n": values("n") + (f" images, {captions} captions" if (captions := values("n_captions")) else ""),
        "Split": values("split"),
        "Seed": values("seed").replace(" or ", ", "),
        "Data": " or ".join(full),
        "Weights": ", ".join(named) if weights else "",
        "Settings": group("settings"),
        "Arguments": group("arguments"),
        "Hardware": group("hardware"),
        "Versions": group("versions"),
        "Command": values("command"),
        "Date": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
    }
    return [(term, text) for term, text in terms.items() if text]


METHODS = {
    "paired": "paired bootstrap over images",
    "unpaired": "from the two intervals, unpaired, normal approximation",
    "none": "no interval",
}


def compare_results(
    path_a: str | os.PathLike,
    path_b: str | os.PathLike,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the records of two files that are of one benchmark.

    On a benchmark (and condition) of which each file holds one record, these are compared. Where there are several,
    those of one label or model are; if then one is left in each file, these two are too.

    Args:
        path_a, path_b (`str` or `os.PathLike`): Results files, of
            [`~modeling_dclip.evaluation.records.write_results`].
        resamples, confidence, seed: Of [`~modeling_dclip.evaluation.statistics.bootstrap_differences`].

    Returns:
        `dict[str, Any]`: JSON-ready. `a`, `b`: the files; `confidence`; `unmatched`: what is in one file only;
            `pairs`: a list of `benchmark`, `a`, `b` (names of the rows), `same_weights`, `differences` (field, value
            in A, value in B), `notes`, and `metrics`: a list of `metric`, `a`, `b`, `difference` (B - A, an interval
            as a dict), `method` (`"paired"`, `"unpaired"` or `"none"`) and `beyond_noise` (`None` without an
            interval).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is no results file, the outcomes beside it are damaged or of other records, or the two
            have nothing in common.
    """
    paths = (path_a, path_b)
    records = [read_results(path) for path in paths]
    outcomes = [read_outcomes(path) for path in paths]
    pairs, unmatched = _match(*records)
    if not pairs:
        found = [sorted({record["benchmark"] for record in rows}) for rows in records]
        raise ValueError(
            f"Expected records of one benchmark in {path_a} and {path_b}, got {found[0]} and {found[1]} and no two "
            "records of one label or model. Evaluate both models on the same data."
        )
    compared = []
    for pair in pairs:
        stored = [_outcomes_of(record, known, path) for record, known, path in zip(pair, outcomes, paths, strict=True)]
        compared.append(_compare(pair, stored, resamples=resamples, confidence=confidence, seed=seed))
    return {"a": str(path_a), "b": str(path_b), "confidence": confidence, "pairs": compared, "unmatched": unmatched}


def _match(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[Mapping[str, Any], Mapping[str, Any]]], list[str]]:
    groups: dict[tuple[str, Any], tuple[list, list]] = {}
    for side, records in enumerate((first, second)):
        for record in records:
            groups.setdefault((record["benchmark"], record.get("condition")), ([], []))[side].append(record)
    pairs, unmatched = [], []
    for (benchmark, condition), (ours, theirs) in groups.items():
        rest = list(theirs)
        left = []
        for record in ours:
            same = [one for one in rest if name_of(one) == name_of(record)] if len(ours) + len(theirs) > 2 else rest
            if same:
                pairs.append((record, same[0]))
                rest.remove(same[0])
            else:
                left.append(record)
        if len(left) == len(rest) == 1:
            pairs.append((left[0], rest[0]))
            left, rest = [], []
        what = benchmark if condition is None else f"{benchmark}, {condition}"
        unmatched += [
            f"{name_of(one)} on {what} (only in {side})"
            for side, some in zip("AB", (left, rest), strict=True)
            for one in some
        ]
    return pairs, unmatched


def _outcomes_of(record: Mapping[str, Any], known: Mapping[str, Any], path: str | os.PathLike) -> Mapping[str, Any]:
    """The record's outcomes, checked against its metrics: those of an earlier
    evaluation would be compared unnoticed.
    """
    outcomes = known.get(record_key(record), {})
    for name, values in outcomes.items():
        total, count = values.double().sum(dim=0).tolist()
        share = total / count if count else math.nan
        if not abs(share - record["metrics"].get(name, math.nan)) < 1e-6:
            raise ValueError(
                f"Expected outcomes of {name!r} that make {record['metrics'].get(name)} for {name_of(record)!r} in "
                f"{outcomes_path(path)}, got {share}. The two files are of different evaluations: evaluate again."
            )
    return outcomes


def _same_images(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether both have outcomes of a metric, and of every such metric as many images that count as much."""
    counts = [(first[name][:, 1], second[name][:, 1]) for name in first if name in second]
    return bool(counts) and all(one.shape == other.shape and bool((one == other).all()) for one, other in counts)


def _compare(
    pair: tuple[Mapping[str, Any], Mapping[str, Any]], stored: Sequence[Mapping[str, Any]], **bootstrap: Any
) -> dict[str, Any]:
    first, second = pair
    notes, paired = [], {}
    if first["dataset_fingerprint"] != second["dataset_fingerprint"]:
        notes.append("Other data: the difference is not the models' alone, and images cannot be paired.")
    elif all(stored):
        if _same_images(*stored):
            paired = bootstrap_differences(*stored, **bootstrap)
        else:
            notes.append("The outcomes are not of the same images with the same captions: they cannot be paired.")
    else:
        sides = [side for side, outcomes in zip("AB", stored, strict=True) if not outcomes]
        notes.append(f"No outcomes of every image beside {' and '.join(sides)}: not paired. `eval.py` writes them.")
    rows = []
    for name in (name for name in first["metrics"] if name in second["metrics"]):
        values = [float(record["metrics"][name]) for record in pair]
        intervals = [record.get("intervals", {}).get(name) for record in pair]
        interval, method = paired.get(name), "paired"
        if interval is None:
            interval, method = unpaired_difference(*intervals) if all(intervals) else None, "unpaired"
        if interval is None:
            method, shown = "none", {"estimate": values[1] - values[0], "low": None, "high": None, "covers": "nothing"}
        else:
            shown = interval.to_dict()
        beyond = None if interval is None else interval.low > 0 or interval.high < 0
        rows.append({"metric": name, "a": values[0], "b": values[1], "difference": shown, "method": method,
                     "beyond_noise": beyond})  # fmt: skip
    return {
        "benchmark": first["benchmark"],
        "a": name_of(first),
        "b": name_of(second),
        "same_weights": first["revision"] == second["revision"],
        "differences": [list(row) for row in differences(first, second) if row[0] != "command"],
        "notes": notes,
        "metrics": rows,
    }


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """Show a comparison.

    Args:
        comparison (`dict`): From [`compare_results`].

    Returns:
        `str`: Markdown: for each pair a table, what else differs, and how far to trust many comparisons at once.
    """
    lines = [f"A: `{comparison['a']}`  ", f"B: `{comparison['b']}`"]
    for pair in comparison["pairs"]:
        lines += ["", f"### {pair['benchmark']}", "", f"A is {pair['a']}, B is {pair['b']}.", "", _render_pair(pair)]
        if pair["same_weights"]:
            lines += ["", "The weights are the same."]
        if pair["differences"]:
            changed = (f"{word(name)} {a} → {b}" for name, a, b in pair["differences"])
            lines += ["", f"Also different: {'; '.join(changed)}."]
        for note in pair["notes"]:
            lines += ["", note]
    if comparison["unmatched"]:
        lines += ["", f"Not compared: {'; '.join(comparison['unmatched'])}."]
    return "\n".join([*lines, "", _count(comparison)])


def _render_pair(pair: Mapping[str, Any]) -> str:
    rows = []
    for row in pair["metrics"]:
        metric, beyond = metric_of(row["metric"]), row["beyond_noise"]
        verdict = "no interval" if beyond is None else "within noise"
        if beyond:
            verdict = "beyond noise"
            if metric.higher_is_better is not None:
                better = (row["difference"]["estimate"] > 0) == metric.higher_is_better
                verdict = f"B is {'better' if better else 'worse'}, beyond noise"
        difference = interval_cell(row["difference"], signed=True, metric=metric)
        rows.append([metric.heading, verdict, metric.show(row["a"]), metric.show(row["b"]), difference])
    methods = dict.fromkeys(METHODS[row["method"]] for row in pair["metrics"] if row["method"] != "none")
    table = render_markdown([Table(["Metric", "Verdict", "A", "B", "B − A"], rows, left=2)])
    return f"{table}\n\nIntervals: {'; '.join(methods)}." if methods else table


def _count(comparison: Mapping[str, Any]) -> str:
    rows = [row for pair in comparison["pairs"] if not pair["same_weights"] for row in pair["metrics"]]
    judged = [row for row in rows if row["beyond_noise"] is not None]
    if not judged:
        return "No difference here has an interval: nothing is said of noise."
    chance = len(judged) * (1 - comparison["confidence"])
    beyond = sum(row["beyond_noise"] for row in judged)
    return (
        f"{len(judged)} metrics of different weights were compared with a {comparison['confidence']:.0%} interval, "
        f"{beyond} differ beyond noise. Of models that are alike about {chance:.1f} would by chance, and metrics of "
        "one benchmark mostly together."
    )
