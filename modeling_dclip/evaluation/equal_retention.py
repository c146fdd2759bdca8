"""Compare arms at equal retention: the retrieval of each while it keeps so much of the anchor's zero-shot accuracy.

An arm that forgets more may retrieve better for that reason alone. So each run of each arm is measured along its line
of weights from the anchor (`eval.py --alphas`), and read off where the line crosses the wanted retention: linearly
between the last measured alpha that still keeps as much and the one after it. From there on it is a comparison of arms
as any other: means over seeds, differences to a baseline paired by seed, intervals over seeds and over test images.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch

from modeling_dclip.evaluation.line import place_of_student, place_on_line
from modeling_dclip.evaluation.records import (
    Outcomes,
    Record,
    read_outcomes,
    read_results,
    record_key,
    split_run_label,
)
from modeling_dclip.evaluation.reports.document import Cell, Code, Table, Text, render_markdown
from modeling_dclip.evaluation.reports.metric_names import METRIC_TITLES, percent
from modeling_dclip.evaluation.reports.tables import (
    ABSENT,
    INTERVAL_NOTES,
    interval_cell,
    kind_of_record,
    name_of,
    shorten_benchmark,
    shorten_paths,
)
from modeling_dclip.evaluation.statistics import (
    RETENTION_METRIC,
    IntervalDict,
    compare_arms,
    percentile_interval,
    resampled_sums,
    seed_interval,
)
from modeling_dclip.progress import count_of

READ_OFF = ("text_to_image_recall@1", "image_to_text_recall@1")
RETENTIONS = (0.95, 0.98)
_ROUNDING = 1e-9  # 0.72 is 90 % of 0.8, though its quotient in floating point is a little less


class Crossing(TypedDict):
    """One run at the wanted retention.

    Attributes:
        alpha (`float`): Where its line crosses, in [0, 1].
        is_end (`bool`): Whether all of the line keeps more, so that its last point counts.
        metrics (`dict[str, float]`): By name, in [0, 1].
    """

    alpha: float
    is_end: bool
    metrics: dict[str, float]


class ArmAtRetention(TypedDict, total=False):
    """One arm at the wanted retention.

    Attributes:
        arm (`str`): Its name.
        alphas (`list[float]`): Where its lines were measured, the anchor at 0 included.
        runs (`dict[str, Crossing]`): By seed.
        metrics (`dict[str, IntervalDict]`): Means over seeds.
        difference (`dict[str, IntervalDict]`): To the baseline, paired by seed; over seeds.
        difference_over_images (`dict[str, IntervalDict]`): The same difference of means; over the images of both test
            sets.
    """

    arm: str
    alphas: list[float]
    runs: dict[str, Crossing]
    metrics: dict[str, IntervalDict]
    difference: dict[str, IntervalDict]
    difference_over_images: dict[str, IntervalDict]


class RetentionTable(TypedDict):
    """All arms on one retrieval benchmark at one retention.

    Attributes:
        retention (`float`): Wanted share of the anchor's accuracy.
        retrieval, zero_shot (`str`): The benchmarks.
        n_retrieval, n_zero_shot (`int`): Their images.
        anchor (`str`), baseline (`str`, *optional*): Names.
        anchor_metrics (`dict[str, float]`): The anchor's, at alpha 0.
        arms (`list[ArmAtRetention]`): In the order of the records.
    """

    retention: float
    retrieval: str
    zero_shot: str
    n_retrieval: int
    n_zero_shot: int
    anchor: str
    baseline: str | None
    anchor_metrics: dict[str, float]
    arms: list[ArmAtRetention]


RETENTION_KEYS = frozenset(RetentionTable.__annotations__)  # by which a file of these tables is known


class _Point(NamedTuple):
    alpha: float
    zero_shot: Record
    retrieval: Record


@dataclass(frozen=True)
class _Lines:
    """The lines of all runs on two benchmarks, each from the anchor on."""

    anchor: _Point
    runs: dict[str, dict[int, list[_Point]]]  # by arm and seed

    def records(self, kind: str) -> dict[str, Record]:
        """All records of one kind, by key."""
        points = [point for by_seed in self.runs.values() for line in by_seed.values() for point in line]
        return {record_key(record): record for point in points for record in [getattr(point, kind)]}


def cross(kept: torch.Tensor, values: torch.Tensor, wanted: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Read values off a line where its retention crosses the wanted one.

    The crossing lies between the last point that keeps at least as much and the next one, linearly. Where the last
    point of the line keeps as much, it is this point.

    Args:
        kept (`torch.Tensor` of shape `(..., P)`): Retention of each point; the first is the anchor's, 1.
        values (`torch.Tensor` of shape `(..., P, M)`): What to read off.
        wanted (`float`): In (0, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The values `(..., M)`, and whether it is the last point `(...)`.

    Raises:
        ValueError: If `wanted` is out of range.

    Example:
        >>> kept, values = torch.tensor([1.0, 0.75, 0.5]), torch.tensor([[0.25], [0.5], [1.0]])
        >>> cross(kept, values, 0.625)[0].item(), cross(kept, values, 0.5)[1].item()
        (0.75, True)
    """
    if not 0 < wanted <= 1:
        raise ValueError(f"Expected a retention in (0, 1], got {wanted}.")
    points = kept.shape[-1]
    places = torch.arange(points).expand(kept.shape)
    last = torch.where(kept >= wanted - _ROUNDING, places, 0).amax(dim=-1, keepdim=True)
    following = (last + 1).clamp(max=points - 1)
    ends = [kept.gather(-1, place) for place in (last, following)]
    share = torch.where(following > last, ((ends[0] - wanted) / (ends[0] - ends[1])).clamp(min=0), 0.0)
    start, end = (
        values.gather(-2, place[..., None].expand(*place.shape, values.shape[-1]))[..., 0, :]
        for place in (last, following)
    )
    return start + share * (end - start), (last == points - 1)[..., 0]


def compare_at_retention(
    records: Sequence[Record],
    outcomes: Mapping[str, Outcomes] | None = None,
    *,
    baseline: str | None = None,
    retentions: Sequence[float] = RETENTIONS,
    zero_shot: str | None = None,
    resamples: int = 2000,
) -> list[RetentionTable]:
    """Compare arms at equal retention on every retrieval benchmark of the records.

    A run is a model whose label is a [`~modeling_dclip.evaluation.records.run_label`], such as `leak_free, seed 0`;
    any other model is an arm of one run. Its points are its records with an alpha, and its own.

    Args:
        records (`Sequence[Record]`): Of `eval.py --anchor ANCHOR --alphas ...`: the anchor's and those of all runs.
        outcomes (`Mapping[str, Outcomes]`, *optional*): By [`~modeling_dclip.evaluation.records.record_key`]; without
            those of all points there is no interval over images.
        baseline (`str`, *optional*): The arm that the others are compared with.
        retentions (`Sequence[float]`, *optional*, defaults to `(0.95, 0.98)`): Each in (0, 1].
        zero_shot (`str`, *optional*): Whose accuracy is kept; needed where several were measured.
        resamples (`int`, *optional*, defaults to 2000): Draws of test images, >= 1.

    Returns:
        `list[RetentionTable]`: By benchmark, then by retention. JSON-ready.

    Raises:
        ValueError: If there is not one anchor, no line, no such baseline or zero-shot benchmark, or the data or the
            seeds of runs differ.
    """
    records = [
        {**short, "benchmark": one["benchmark"]} for short, one in zip(shorten_paths(records), records, strict=True)
    ]
    kinds: dict[str, dict[str, None]] = {}
    for record in records:
        needed = {"retrieval": READ_OFF[0], "zero_shot": RETENTION_METRIC}.get(kind_of_record(record))
        if needed in record["metrics"]:
            kinds.setdefault(kind_of_record(record), {})[record["benchmark"]] = None
    accuracy = _choose_zero_shot(list(kinds.get("zero_shot", {})), zero_shot)
    if "retrieval" not in kinds:
        raise ValueError("Expected records of a retrieval benchmark to compare at equal retention, got none.")
    tables = []
    for retrieval in kinds["retrieval"]:
        lines = _find_lines(records, retrieval, accuracy)
        if baseline is not None and baseline not in lines.runs:
            raise ValueError(f"Expected a baseline among the arms {list(lines.runs)}, got {baseline!r}.")
        drawn = _draw(lines, outcomes or {}, resamples)
        tables += [_tabulate_arms(lines, drawn, wanted, baseline) for wanted in retentions]
    return tables


def _choose_zero_shot(found: Sequence[str], wanted: str | None) -> str:
    """The zero-shot benchmark whose accuracy is kept."""
    chosen = [name for name in found if wanted in (None, name, name.partition("=")[2])]
    if len(chosen) != 1:
        asked = f"{wanted!r} among" if wanted else "one of"
        raise ValueError(
            f"Expected {asked} the zero-shot benchmarks of the records, whose accuracy is to be kept, got "
            f"{', '.join(found) or 'none'}. Name it with --zero_shot."
        )
    return chosen[0]


def _find_lines(records: Sequence[Record], retrieval: str, zero_shot: str) -> _Lines:
    """Sort the records of two benchmarks into the lines of runs."""
    of_anchor = {one["comparison"]["anchor_revision"] for one in records if "comparison" in one}
    if len(of_anchor) != 1:
        raise ValueError(
            f"Expected records that were compared with one anchor, got {len(of_anchor)} anchors. Measure all runs "
            "with the same --anchor."
        )
    by_kind: list[dict[str, dict[float, Record]]] = []
    anchors: list[Record] = []
    for benchmark in (zero_shot, retrieval):
        own = [one for one in records if one["benchmark"] == benchmark]
        data = {one["dataset_fingerprint"] for one in own}
        anchor = [one for one in own if one["revision"] in of_anchor and not {"condition", "comparison"} & one.keys()]
        if len(data) != 1 or not anchor:
            got = f"{len(data)} kinds of it" if anchor else "no record of the anchor"
            raise ValueError(f"Expected all runs and their anchor on the same data of {benchmark}, got {got}.")
        anchors.append(anchor[0])
        by_kind.append(_place_points([one for one in own if one not in anchor]))
    start = _Point(0.0, *anchors)
    if not start.zero_shot["metrics"][RETENTION_METRIC]:
        raise ValueError(f"Expected an anchor above 0 on {zero_shot}, got 0: what is kept of it is not defined.")
    runs: dict[str, dict[int, list[_Point]]] = {}
    for name, points in by_kind[0].items():
        others = by_kind[1].get(name, {})
        both = sorted(points.keys() & others.keys() - {0.0})
        if not both:
            raise ValueError(f"Expected {name} on {zero_shot} and on {retrieval}, got only one. Measure the other.")
        arm, seed = split_run_label(name) or (name, 0)
        runs.setdefault(arm, {})[seed] = [start, *(_Point(at, points[at], others[at]) for at in both)]
    if not runs:
        raise ValueError("Expected a model beside its anchor, got the anchor alone.")
    return _Lines(start, runs)


def _place_points(records: Sequence[Record]) -> dict[str, dict[float, Record]]:
    """The records of one benchmark by model and alpha."""
    placed: dict[str, dict[float, Record]] = {}
    for record in records:
        name = name_of(record)
        alpha = place_on_line(record)
        if alpha is None:
            if "condition" in record:
                continue  # a changed input
            alpha = place_of_student(one for one in records if name_of(one) == name)
        placed.setdefault(name, {})[alpha] = record
    return placed


_Drawn = tuple[dict[str, torch.Tensor], int]  # by key of a record: (draws, metrics); the images of the smaller set


def _draw(lines: _Lines, outcomes: Mapping[str, Outcomes], resamples: int) -> _Drawn | None:
    """Every record's shares in every draw of test images, of each benchmark on its own."""
    shares: dict[str, torch.Tensor] = {}
    fewest = []
    for seed, (kind, metrics) in enumerate({"zero_shot": (RETENTION_METRIC,), "retrieval": READ_OFF}.items()):
        keys = list(lines.records(kind))
        stored = [[outcomes.get(key, {}).get(metric) for metric in metrics] for key in keys]
        tensors = [torch.stack(own, dim=1) for own in stored if all(one is not None for one in own)]  # type: ignore
        if len(tensors) < len(keys) or len({tensor.shape for tensor in tensors}) != 1 or len(tensors[0]) < 2:
            return None
        values = torch.stack(tensors, dim=1).double().cpu()  # (I, records, metrics, sum and count)
        sums = torch.cat(list(resampled_sums(values, resamples, seed)))
        drawn = sums[..., 0] / sums[..., 1]
        shares |= {key: drawn[:, index] for index, key in enumerate(keys)}
        fewest.append(len(values))
    return shares, min(fewest)


def _read_off(line: Sequence[_Point], wanted: float, drawn: Mapping[str, torch.Tensor] | None) -> tuple[Any, Any]:
    """[`cross`] of one line, of all images or of every draw; the last value is alpha."""

    def share(record: Record, names: Sequence[str]) -> torch.Tensor:
        if drawn is not None:
            return drawn[record_key(record)]
        return torch.tensor([[record["metrics"][name] for name in names]], dtype=torch.double)

    accuracy = torch.cat([share(point.zero_shot, (RETENTION_METRIC,)) for point in line], dim=1)
    values = torch.stack([share(point.retrieval, READ_OFF) for point in line], dim=1)
    alphas = torch.tensor([[point.alpha] for point in line], dtype=torch.double).expand(len(values), -1, -1)
    return cross(accuracy / accuracy[:, :1], torch.cat([values, alphas], dim=2), wanted)


def _tabulate_arms(lines: _Lines, drawn: _Drawn | None, wanted: float, baseline: str | None) -> RetentionTable:
    arms: list[ArmAtRetention] = []
    found = {arm: dict(_cross_runs(by_seed, wanted)) for arm, by_seed in lines.runs.items()}
    means = {} if drawn is None else {arm: _mean_draws(own, wanted, drawn[0]) for arm, own in lines.runs.items()}
    for arm, runs in found.items():
        alphas = sorted({point.alpha for line in lines.runs[arm].values() for point in line})
        row: ArmAtRetention = {"arm": arm, "alphas": alphas, "runs": {str(seed): run for seed, run in runs.items()}}
        by_metric = {name: {seed: run["metrics"][name] for seed, run in runs.items()} for name in READ_OFF}
        row["metrics"] = {name: seed_interval(list(own.values())).to_dict() for name, own in by_metric.items()}
        if baseline is not None and arm != baseline:
            against = {
                name: {seed: run["metrics"][name] for seed, run in found[baseline].items()} for name in READ_OFF
            }
            row["difference"] = {name: compare_arms(by_metric[name], against[name]).to_dict() for name in READ_OFF}
            if drawn is not None:
                draws = means[arm] - means[baseline]
                row["difference_over_images"] = {
                    name: percentile_interval(row["difference"][name]["estimate"], draws[:, at], drawn[1]).to_dict()
                    for at, name in enumerate(READ_OFF)
                }
        arms.append(row)
    anchor = lines.anchor
    return {
        "retention": wanted,
        "retrieval": anchor.retrieval["benchmark"],
        "zero_shot": anchor.zero_shot["benchmark"],
        "n_retrieval": anchor.retrieval["n"],
        "n_zero_shot": anchor.zero_shot["n"],
        "anchor": name_of(anchor.retrieval),
        "baseline": baseline,
        "anchor_metrics": {name: anchor.retrieval["metrics"][name] for name in READ_OFF},
        "arms": arms,
    }


def _cross_runs(by_seed: Mapping[int, Sequence[_Point]], wanted: float) -> Iterator[tuple[int, Crossing]]:
    for seed, line in sorted(by_seed.items()):
        (values,), (is_end,) = (found.tolist() for found in _read_off(line, wanted, None))
        yield seed, {"alpha": values[-1], "is_end": is_end, "metrics": dict(zip(READ_OFF, values, strict=False))}


def _mean_draws(
    by_seed: Mapping[int, Sequence[_Point]], wanted: float, drawn: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """`(draws, metrics)`: the mean over seeds in every draw of images."""
    return torch.stack([_read_off(line, wanted, drawn)[0] for line in by_seed.values()]).mean(dim=0)


def read_at_retention(path: str | os.PathLike, **options: Any) -> list[RetentionTable]:
    """[`compare_at_retention`] of a results file and the outcomes beside it.

    Args:
        path (`str` or `os.PathLike`): The results file.
        options: Of [`compare_at_retention`].

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is no results file, or as [`compare_at_retention`].
    """
    return compare_at_retention(read_results(path), read_outcomes(path), **options)


def tabulate_at_retention(tables: Sequence[RetentionTable]) -> list[Table | Text]:
    """Make a table for each benchmark and retention: a row for the anchor and for each arm.

    Args:
        tables (`Sequence[RetentionTable]`): From [`compare_at_retention`].

    Returns:
        `list[Table | Text]`: Before each table what it is of, and after the last one what its numbers are.

    Raises:
        ValueError: If it is something else.
    """
    needed = RetentionTable.__annotations__.keys()
    if (
        not isinstance(tables, list)
        or not tables
        or not all(isinstance(one, dict) and needed <= one.keys() for one in tables)
    ):
        raise ValueError(f"Expected a list of tables with {', '.join(needed)}. Write it with eval.py equal_retention.")
    blocks: list[Table | Text] = []
    for table in tables:
        at = f"{100 * table['retention']:g} %"
        retrieval, zero_shot = (shorten_benchmark(table[kind]) for kind in ("retrieval", "zero_shot"))
        sizes = [count_of(size, "image") for size in (table["n_retrieval"], table["n_zero_shot"])]
        blocks.append(
            Text(
                *(Code(retrieval), f", {sizes[0]}, at {at} of {table['anchor']}'s top-1 on "),
                *(Code(zero_shot), f", {sizes[1]}:"),
            )
        )
        blocks += [_table(table), *_tell_ends(table, at)]
    return [*blocks, Text(" ".join(_notes(tables)))]


def _table(table: RetentionTable) -> Table:
    baseline = table["baseline"]
    header = ["Model", "Seeds", "alpha"]
    for name in READ_OFF:
        header += [METRIC_TITLES[name], *([f"minus {baseline}"] if baseline else [])]
    between = [Cell(ABSENT)] if baseline else []
    first: list[str | Cell] = [table["anchor"], "1", "0"]
    for name in READ_OFF:
        first += [Cell(percent(table["anchor_metrics"][name])), *between]
    rows = [first]
    for arm in table["arms"]:
        places = [run["alpha"] for run in arm["runs"].values()]
        row: list[str | Cell] = [arm["arm"], str(len(places)), f"{sum(places) / len(places):.2f}"]
        for name in READ_OFF:
            row.append(interval_cell(arm["metrics"][name]))
            if baseline:
                row.append(_difference_cell(arm, name))
        rows.append(row)
    return Table(header, rows)


def _difference_cell(arm: ArmAtRetention, name: str) -> Cell:
    """`+1.2 ± 0.4 [+0.3, +2.1]`: the difference, its interval over seeds and the one over images."""
    if "difference" not in arm:
        return Cell(ABSENT)
    cell = interval_cell(arm["difference"][name], signed=True)
    if "difference_over_images" not in arm:
        return cell
    over_images = interval_cell(arm["difference_over_images"][name], signed=True).interval
    return cell._replace(interval=f"{cell.interval} {over_images}".strip())


def _tell_ends(table: RetentionTable, at: str) -> list[Text]:
    """Whose lines keep more than is wanted on their whole length."""
    told = []
    for arm in table["arms"]:
        ends = [run for run in arm["runs"].values() if run["is_end"]]
        if ends:
            which = "" if len(ends) == len(arm["runs"]) else f" in {len(ends)} of {count_of(len(arm['runs']), 'run')}"
            told.append(f"{arm['arm']}{which}")
    if not told:
        return []
    return [Text(f"The whole line keeps at least {at}, so that its last point counts: {'; '.join(told)}.")]


def _notes(tables: Sequence[RetentionTable]) -> list[str]:
    arms = [arm for table in tables for arm in table["arms"]]
    places = sorted({alpha for arm in arms for alpha in arm["alphas"]})
    shown = ", ".join(f"{place:g}" for place in places)
    notes = [
        f"In percent. Each run is measured at alpha {shown} on its line from the anchor, and read off linearly "
        "between the last point that keeps as much and the next one."
    ]
    intervals = [one for arm in arms for name in ("metrics", "difference") for one in arm.get(name, {}).values()]  # type: ignore[attr-defined]
    if any(one["covers"] == "seeds" for one in intervals):
        notes.append(INTERVAL_NOTES["seeds"].format(0.95))
    if any("difference" in arm for arm in arms):
        notes.append("Differences are in points, paired by seed.")
    if any("difference_over_images" in arm for arm in arms):
        notes.append(
            "In brackets: 95% bootstrap interval over the images of both test sets, for these checkpoints, the "
            "crossing found anew in every draw."
        )
    return notes


def render_at_retention(tables: Sequence[RetentionTable]) -> str:
    """[`tabulate_at_retention`] as Markdown."""
    return render_markdown(tabulate_at_retention(tables))
