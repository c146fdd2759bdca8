"""What numbers were measured on, whether two of them are comparable, and the comparison of two results files, or of
two models of one file.

They are compared metric by metric, with an interval of each difference, and with what else differs. Where both models
were measured on the same data and the outcomes of every image lie beside both files, the difference is bootstrapped in
pairs. Otherwise it comes from the intervals in the records, as if the two models had seen different images. Without
intervals in the records, the difference has none.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, TypedDict

from modeling_dclip.evaluation.records import Outcomes, Record, outcomes_path, read_outcomes, read_results, record_key
from modeling_dclip.evaluation.reports.document import Block, Code, Heading, Table, Text, render_markdown
from modeling_dclip.evaluation.reports.metric_names import metric_of
from modeling_dclip.evaluation.reports.tables import (
    COUNTED,
    interval_cell,
    kind_of_record,
    merge_repeats,
    name_of,
    row_title,
    short_hash,
    shorten_benchmark,
    shorten_paths,
)
from modeling_dclip.evaluation.reports.verdict import (
    DIRECTION_WORDS,
    OTHER_TITLES,
    Effect,
    Verdict,
    advice_of,
    chance_of,
    compose,
)
from modeling_dclip.evaluation.statistics import (
    RETENTION_METRIC,
    IntervalDict,
    bootstrap_differences,
    excludes_zero,
    unpaired_difference,
)
from modeling_dclip.progress import count_of

# Fields that hold what was measured. All other fields say on what, and are compared; so are fields of later versions.
_MEASURED = {"metrics", "intervals", "draws", "spread", "chance", "comparison", "label", "created", "format_version"}
_HASHES = {"revision", "dataset_fingerprint"}
_WORDS = {
    "dataset_fingerprint": "data",
    "n_captions": "captions",
    "revision": "weights",
    "n_trained_on": "test images trained on",
}
# Rows that differ in one of these do not answer the same question. Weights, and commands with them, may differ.
_DECISIVE = ("dataset_fingerprint", "split", "n", "n_captions", "settings")


_VERDICTS = {
    "seed": "Rows of single seeds may differ by chance:",
    "versions": "Measured with different software:",
    "hardware": "Measured on different hardware:",
}
METHODS = {
    "paired": "paired bootstrap over images",
    "unpaired": "from the two intervals, unpaired, normal approximation",
    "none": "no interval",
}


class ComparedMetric(TypedDict):
    """A metric of two models.

    Attributes:
        metric (`str`): Its name.
        a (`float`), b (`float`): Its values.
        difference (`IntervalDict`): b - a.
        method (`str`): Where the interval is from: `"paired"`, `"unpaired"` or `"none"`.
        beyond_noise (`bool`, *optional*): Whether the interval excludes 0; `None` without an interval.
    """

    metric: str
    a: float
    b: float
    difference: IntervalDict
    method: str
    beyond_noise: bool | None


class ComparedPair(TypedDict):
    """Two records of one benchmark.

    Attributes:
        benchmark (`str`): As in the records.
        a (`str`), b (`str`): Names of the two rows.
        n (`list[int]`): What was counted in each.
        chance (`dict[str, float]`): What guessing scores, by metric, as far as is known.
        trained_on (`list[int]`): How many of the test images each model learned from, as far as is known.
        same_weights (`bool`): Whether the weights are the same.
        differences (`list[list[str]]`): Field, value in A, value in B, of what else differs.
        notes (`list[str]`): What to know about the intervals.
        metrics (`list[ComparedMetric]`): The metrics that both have.
    """

    benchmark: str
    a: str
    b: str
    n: list[int]
    chance: dict[str, float]
    trained_on: list[int]
    same_weights: bool
    differences: list[list[str]]
    notes: list[str]
    metrics: list[ComparedMetric]


class Comparison(TypedDict):
    """Two results files, JSON-ready.

    Attributes:
        a (`str`), b (`str`): The files.
        confidence (`float`): Of the paired intervals, in (0, 1).
        pairs (`list[ComparedPair]`): Records of one benchmark.
        unmatched (`list[str]`): Records without a partner.
    """

    a: str
    b: str
    confidence: float
    pairs: list[ComparedPair]
    unmatched: list[str]


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """List what a record was measured on as flat entries: `versions.torch`, `hardware.cpu`, `settings.prompts`.

    Args:
        record (`Mapping`): From [`~modeling_dclip.evaluation.records.read_results`], or what a script in `benchmarks/`
            wrote.

    Returns:
        `dict[str, Any]`: Without what was measured: the metrics, their intervals, the time.
    """
    flat: dict[str, Any] = {}
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
    if isinstance(value, str) and (name in _HASHES or name.endswith("_revision")):
        return short_hash(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and name != "seed" else str(value)


def word(name: str) -> str:
    """The reader's word for a field: "data" for `dataset_fingerprint`, "torch" for `versions.torch`."""
    return _WORDS.get(name, name.removeprefix("versions.").removeprefix("hardware.").removeprefix("settings."))


def differences(first: Record, second: Record) -> list[tuple[str, str, str]]:
    """List in what two records differ, without what was measured.

    Args:
        first, second (`Record`): The two.

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


# Settings that say which weights a row has, a point between two models, rather than how it was measured.
_OF_WEIGHTS = ("settings.alpha", "settings.anchor_revision", "settings.student_alpha")
_OF_NAMES = ("model", "label")  # what a comparison calls the two, at the top of each table


def find_conflicts(records: Sequence[Record], *, timed: bool = False, seeds: bool = True) -> list[str]:
    """Say why records of one table are not comparable.

    Args:
        records (`Sequence[Record]`): Rows of one table.
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
        if group not in groups or name in _OF_WEIGHTS:
            continue
        rows: dict[str, list[str]] = {}
        for record, fields in zip(records, flat, strict=True):
            if name != "seed" or name in fields:  # a mean over several seeds has no seed
                rows.setdefault(_show(name, fields.get(name)), []).append(name_of(record))
        if len(rows) > 1:
            parts = "; ".join(f"{value} ({_some(labels)})" for value, labels in rows.items())
            found.append(f"{_VERDICTS.get(group, 'Not comparable: different')} {word(name)}: {parts}.")
    return found


def _some(labels: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(labels))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def measured_on(records: Sequence[Mapping[str, Any]], *, weights: bool = True) -> list[tuple[str, str]]:
    """Describe what the rows of a table were measured on.

    Args:
        records (`Sequence[Mapping]`): Records, or what a script in `benchmarks/` wrote: `n`, `arguments`, `versions`
            and `hardware`.
        weights (`bool`, *optional*, defaults to `True`): Name the weights of each row. Not needed if the table has a
            column of weights.

    Returns:
        `list[tuple[str, str]]`: Term and text: benchmark, n, split, seed, data, weights, settings, arguments,
            hardware, versions, command, date. Several values are joined by " or ". A term without a value is left out.
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


def compare_results(
    path_a: str | os.PathLike,
    path_b: str | os.PathLike | None = None,
    *,
    models: Sequence[str] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare the records of two files that are of the same benchmark and condition, or two models.

    Benchmarks are the same if their names are, or their kinds and their data.

    If each file holds one record of a benchmark, these two are compared. If there are several, those with the same
    label or model are compared; if then one record is left in each file, these two are compared too.

    Args:
        path_a, path_b (`str` or `os.PathLike`): Results files, of
            [`~modeling_dclip.evaluation.records.write_results`]. Without the second, two models of the first are
            compared.
        models (`Sequence[str]`, *optional*): Two names: a model of `path_a` and one of `path_b`, by label, by path, or
            as tables show them. Not needed for one file of two models.
        resamples, confidence, seed: Of [`~modeling_dclip.evaluation.statistics.bootstrap_differences`].

    Returns:
        [`Comparison`]: Intervals of differences are those of B - A.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not a results file, the outcomes beside it are damaged or belong to other records, the
            two files have nothing in common, or there is no such model, or not two of them.
    """
    paths = (path_a, path_a if path_b is None else path_b)
    records = _choose(paths, models, alone=path_b is None)
    outcomes = [read_outcomes(path) for path in paths]
    pairs, unmatched = _match(*records, chosen=models is not None or path_b is None)
    if not pairs:
        found = [sorted({record["benchmark"] for record in rows}) for rows in records]
        if found[0] == found[1]:
            ours, theirs = ([*dict.fromkeys(map(name_of, rows))] for rows in records)
            raise ValueError(
                f"Expected one model in each file, or a label or model that both have, got {', '.join(ours)} in "
                f"{paths[0]} and {', '.join(theirs)} in {paths[1]}. Name one of each with --models {ours[-1]} "
                f"{theirs[-1]}."
            )
        raise ValueError(
            f"Expected records of one benchmark in {paths[0]} and {paths[1]}, got {found[0]} and {found[1]} and no "
            "two records of one label or model. Evaluate both models on the same data."
        )
    compared = []
    both = [*records[0], *records[1]]
    names = {
        (own["model"], own.get("label")): name_of(shown) for own, shown in zip(both, shorten_paths(both), strict=True)
    }
    for pair in pairs:
        stored = [_outcomes_of(record, known, path) for record, known, path in zip(pair, outcomes, paths, strict=True)]
        named = [{**record, "label": names[record["model"], record.get("label")]} for record in pair]
        titles = [row_title(record) for record in named]
        compared.append(_compare(pair, titles, stored, resamples=resamples, confidence=confidence, seed=seed))
    sides = [str(path) for path in paths]
    return {"a": sides[0], "b": sides[1], "confidence": confidence, "pairs": compared, "unmatched": unmatched}


def _choose(
    paths: Sequence[str | os.PathLike], models: Sequence[str] | None, *, alone: bool
) -> tuple[list[Record], list[Record]]:
    """The records of both sides: all of the two files, or those of one model each."""
    found = [read_results(path) for path in paths]
    titles = [[row_title(record) for record in shorten_paths(records)] for records in found]
    known = [list(dict.fromkeys(own)) for own in titles]
    if models is None and not alone:
        return found[0], found[1]
    if models is None and len(known[0]) != 2:
        raise ValueError(
            f"Expected two models in {paths[0]}, got {len(known[0])}: {'; '.join(known[0])}. Name two with --models, "
            "or give a second file."
        )
    chosen = known[0] if models is None else models
    if len(chosen) != 2 or (alone and chosen[0] == chosen[1]):
        raise ValueError(f"Expected two different models to compare, got {'; '.join(chosen)}.")
    sides = []
    for name, path, records, own, names in zip(chosen, paths, found, titles, known, strict=True):
        matching = [record for record, title in zip(records, own, strict=True) if name in (title, *_names_of(record))]
        if not matching:
            raise ValueError(f"Expected a model of {path}, got {name!r}. It holds: {'; '.join(names)}.")
        if len({record["revision"] for record in matching}) > 1:
            raise ValueError(
                f"Expected one model of the name {name!r} in {path}, got several. Label them when you evaluate "
                "(eval.py --label)."
            )
        sides.append(matching)
    return sides[0], sides[1]


def _names_of(record: Record) -> list[str]:
    """The names by which a user may mean the model of a record, with its condition."""
    suffix = f", {record['condition']}" if "condition" in record else ""
    return [f"{name}{suffix}" for name in (record["model"], PurePath(record["model"]).name, name_of(record))]


def _match(
    first: Sequence[Record], second: Sequence[Record], *, chosen: bool
) -> tuple[list[tuple[Record, Record]], list[str]]:
    """Pairs of records to compare, and the records without a partner as text. Models that were `chosen` may differ in
    their condition: one may be a point on the line to the other. Benchmarks of different names are one where kind and
    data are the same.
    """
    names = [{record["benchmark"] for record in records} for records in (first, second)]
    by_data = {_data_of(record): record["benchmark"] for record in first if record["benchmark"] not in names[1]}
    groups: dict[tuple[str, Any], tuple[list, list]] = {}
    for side, records in enumerate((first, second)):
        for record in records:
            name, condition = record["benchmark"], None if chosen else record.get("condition")
            if name not in names[0]:
                name = by_data.get(_data_of(record), name)
            groups.setdefault((name, condition), ([], []))[side].append(record)
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


def _data_of(record: Record) -> tuple[str, str]:
    return kind_of_record(record), record["dataset_fingerprint"]


def _outcomes_of(record: Record, known: Mapping[str, Outcomes], path: str | os.PathLike) -> Outcomes:
    """The outcomes of a record, checked against its metrics: those of an earlier evaluation would go unnoticed."""
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


def _same_images(first: Outcomes, second: Outcomes) -> bool:
    """Whether both have outcomes of a metric, and each such metric counts the same for every image."""
    counts = [(first[name][:, 1], second[name][:, 1]) for name in first if name in second]
    return bool(counts) and all(one.shape == other.shape and bool((one == other).all()) for one, other in counts)


def _compare(
    pair: tuple[Record, Record], titles: Sequence[str], stored: Sequence[Outcomes], **bootstrap: Any
) -> ComparedPair:
    first, second = pair
    notes, paired = [], {}
    if first["dataset_fingerprint"] != second["dataset_fingerprint"]:
        notes.append("The data differ, so the difference is not due to the models alone, and images cannot be paired.")
    elif not any("intervals" in record for record in pair) and not any(stored):
        pass  # what was measured has no outcomes of images, such as times
    elif all(stored):
        if _same_images(*stored):
            paired = bootstrap_differences(*stored, **bootstrap)
        else:
            notes.append("Not paired: the outcomes are not of the same images with the same captions.")
    else:
        sides = [side for side, outcomes in zip("AB", stored, strict=True) if not outcomes]
        notes.append(f"Not paired: no outcomes of the images beside {' and '.join(sides)}. eval.py writes them.")
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
        beyond = None if interval is None else excludes_zero(interval.to_dict(), min(one["n"] for one in pair))
        rows.append({"metric": name, "a": values[0], "b": values[1], "difference": shown, "method": method,
                     "beyond_noise": beyond})  # fmt: skip
    return {
        "benchmark": first["benchmark"],
        "a": titles[0],
        "b": titles[1],
        "n": [first["n"], second["n"]],
        "chance": {name: level for name in first["metrics"] if (level := chance_of(first, name)) is not None},
        "trained_on": [record.get("n_trained_on", 0) for record in pair],
        "same_weights": first["revision"] == second["revision"] and first.get("condition") == second.get("condition"),
        "differences": [list(row) for row in differences(first, second) if row[0] != "command"],
        "notes": notes,
        "metrics": rows,
    }


def render_comparison(comparison: Comparison) -> str:
    """Show a comparison.

    Args:
        comparison ([`Comparison`]): From [`compare_results`].

    Returns:
        `str`: Markdown: first the verdict on B; for each pair a table and what else differs; at the end, how far to
            trust many comparisons at once.
    """
    found = judge_comparison(comparison)
    verdicts = [
        "\n- ".join(render_markdown([Text(text)]) for text in (verdict.headline, *verdict.details))
        for verdict in found
    ]
    verdicts += [render_markdown([Text(line)]) for line in advice_of(found)]
    files = [render_markdown([_name_side(comparison, side)]) for side in ("a", "b")]
    blocks = [block for pair in comparison["pairs"] for block in _tabulate_pair(pair)]
    if comparison["unmatched"]:
        blocks.append(Text(f"Not compared: {'; '.join(comparison['unmatched'])}."))
    blocks.append(Text(_count(comparison)))
    return "\n\n".join([*verdicts, "  \n".join(files), render_markdown(blocks)])


def _name_side(comparison: Comparison, side: Literal["a", "b"]) -> Text:
    """Name one side: by the model where both are of one file, and else by the file."""
    models = dict.fromkeys(pair[side] for pair in comparison["pairs"])
    if comparison["a"] != comparison["b"] or len(models) != 1:
        return Text(f"{side.upper()}: ", Code(comparison[side]))
    return Text(f"{side.upper()}: {next(iter(models))}, of ", Code(comparison[side]))


def judge_comparison(comparison: Comparison) -> list[Verdict]:
    """Say of each two models that were compared whether B is better, and at what cost.

    Args:
        comparison ([`Comparison`]): From [`compare_results`].

    Returns:
        `list[Verdict]`: One for each two models and retrieval benchmark. Two records of the same weights have none.
    """
    models: dict[tuple[str, str], list[ComparedPair]] = {}
    for pair in comparison["pairs"]:
        if not pair["same_weights"]:
            models.setdefault((pair["a"], pair["b"]), []).append(pair)
    verdicts = []
    for (a, b), pairs in models.items():
        names = (b, a) if a != b else ("B", "A")
        retrieval = [pair for pair in pairs if pair["benchmark"].startswith("retrieval")]
        zero_shot = _judged(pairs, "zero_shot", (RETENTION_METRIC,))
        rest = _judged(pairs, "zero_shot", ("map",)) + _judged(pairs, "fine_grained", tuple(OTHER_TITLES))
        if not (retrieval or zero_shot or rest):
            continue
        shown = [
            (_effects_of(one, DIRECTION_WORDS), f"{count_of(one['n'][0], 'image')} of {_spec_of(one)}")
            for one in retrieval
        ]
        for effects, where in shown or [({}, "")]:
            other = any("The data differ" in note for pair in pairs for note in pair["notes"])
            verdict = compose(*names, effects, zero_shot, rest, where)
            warning = " The data differ, so this is not due to the models alone." * other
            verdicts.append(verdict._replace(headline=verdict.headline + warning))
    return verdicts


def _spec_of(pair: ComparedPair) -> str:
    return shorten_benchmark(pair["benchmark"]).partition("=")[2]


def _effects_of(pair: ComparedPair, metrics: Iterable[str]) -> dict[str, Effect]:
    """The effects of B against A in these metrics, as far as the pair has them."""
    kind = pair["benchmark"].partition("=")[0]
    effects = {}
    for row in pair["metrics"]:
        if row["metric"] in metrics:
            interval = None if row["method"] == "none" else row["difference"]
            method = "unpaired" if row["method"] == "none" else row["method"]
            noun = COUNTED.get(kind, "image")
            effect = Effect(row["metric"], row["a"], row["b"], interval, method, min(pair["n"]), noun)
            images = min(pair["n"]) if noun == "image" else 0
            effects[row["metric"]] = effect._replace(
                trained_on=(*pair["trained_on"],),
                images=images,
                chance=pair["chance"].get(row["metric"]),
                counted=min(pair["n"]),
            )
    return effects


def _judged(pairs: Sequence[ComparedPair], kind: str, metrics: Sequence[str]) -> list[tuple[str, Effect]]:
    """The effect in the first of these metrics that each pair of a kind has, by benchmark."""
    found = [(_spec_of(pair), _effects_of(pair, metrics)) for pair in pairs if pair["benchmark"].startswith(kind)]
    return [(spec, next(effects[name] for name in metrics if name in effects)) for spec, effects in found if effects]


def _tabulate_pair(pair: ComparedPair) -> list[Block]:
    """A heading, the table, and what else to know of two records."""
    rows = []
    values = [{row["metric"]: row[side] for row in pair["metrics"]} for side in ("a", "b")]
    titles = merge_repeats(values, list(values[0]))
    for row in (row for row in pair["metrics"] if row["metric"] in titles):
        metric, beyond = metric_of(row["metric"]), row["beyond_noise"]
        verdict = "no interval" if beyond is None else "within noise"
        if beyond:
            verdict = "beyond noise"
            if metric.higher_is_better is not None:
                better = (row["difference"]["estimate"] > 0) == metric.higher_is_better
                verdict = f"B is {'better' if better else 'worse'}, beyond noise"
        difference = interval_cell(row["difference"], signed=True, metric=metric)
        rows.append([titles[row["metric"]], verdict, metric.show(row["a"]), metric.show(row["b"]), difference])
    methods = dict.fromkeys(METHODS[row["method"]] for row in pair["metrics"] if row["method"] != "none")
    blocks: list[Block] = [
        Heading(pair["benchmark"], 3, ""),
        Text(f"A is {pair['a']}, B is {pair['b']}."),
        Table(["Metric", "Verdict", "A", "B", "B − A"], rows, left=2),
    ]
    if methods:
        blocks.append(Text(f"Intervals: {'; '.join(methods)}."))
    if pair["same_weights"]:
        blocks.append(Text("The weights are the same."))
    if any(name not in _OF_NAMES for name, *_ in pair["differences"]):
        changed = (f"{word(name)} {a} → {b}" for name, a, b in pair["differences"] if name not in _OF_NAMES)
        blocks.append(Text(f"Also different: {'; '.join(changed)}."))
    return blocks + [Text(note) for note in pair["notes"]]


def _count(comparison: Comparison) -> str:
    """How many differences are beyond noise, and how many would be by chance."""
    rows = [row for pair in comparison["pairs"] if not pair["same_weights"] for row in pair["metrics"]]
    judged = [row for row in rows if row["beyond_noise"] is not None]
    if comparison["pairs"] and not rows:
        return "All weights that were compared are the same, so a difference says nothing about a model."
    if not judged:
        return "No difference has an interval, so nothing can be said about noise."
    chance = len(judged) * (1 - comparison["confidence"])
    beyond = sum(row["beyond_noise"] for row in judged)
    return (
        f"{count_of(len(judged), 'metric')} of different weights compared, each with a {comparison['confidence']:.0%} "
        f"interval; {beyond} beyond noise. If the models were alike, about {chance:.1f} would differ by chance, and "
        "metrics of one benchmark mostly together."
    )
