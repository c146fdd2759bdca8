"""Evaluate the arms of an experiment against their anchor, and draw what is gained against what is kept.

[`evaluate_arms`] gives records, one summary and a picture of the trade-off. [`plot_curve`] draws the same trade-off
from any results records: retrieval against zero-shot accuracy over models, checkpoints, or points between two models.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch

from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.benchmarks.kinds import EvaluationOptions
from modeling_dclip.evaluation.equal_retention import read_at_retention
from modeling_dclip.evaluation.evaluator import Candidate, evaluate
from modeling_dclip.evaluation.line import ALPHA, place_of_student, place_on_line
from modeling_dclip.evaluation.records import Metrics, Record, arm_of, run_label
from modeling_dclip.evaluation.reports.plots import TradeoffPoint, plot_tradeoff
from modeling_dclip.evaluation.reports.tables import name_of, shorten_paths
from modeling_dclip.evaluation.statistics import GAIN_METRIC, RETENTION_METRIC, Summary, summarise_arms

ANCHOR = "anchor"


def evaluate_run(
    model: str | None,
    anchor: str,
    benchmarks: Sequence[str],
    output_dir: str | Path,
    *,
    seed: int = 0,
    command: str = "",
    device: str | torch.device = "cpu",
) -> list[Record]:
    """Evaluate one trained model beside its anchor.

    Neither has a label, so that tables name them as [`~modeling_dclip.evaluation.reports.tables.shorten_paths`] names
    the same models of `eval.py`.

    Args:
        model (`str`, *optional*): Folder of a dual encoder; without it the anchor alone is evaluated.
        anchor, benchmarks, command, device: As in [`evaluate_arms`]; of one kind there may be several benchmarks.
        output_dir (`str` or `Path`): Where `records.json` (a killed run resumes from it) and, with retrieval and
            zero-shot, `tradeoff.png` are written.
        seed (`int`, *optional*, defaults to 0): That it was trained with.

    Returns:
        `list[Record]`: The anchor's on every benchmark, then the model's.

    Raises:
        ValueError: As in [`evaluate_arms`].
    """
    candidates = [Candidate(str(anchor), seed=0)]
    candidates += [] if model is None else [Candidate(str(model), seed=seed)]
    records = _measure(candidates, benchmarks, Path(output_dir), command, device)
    if model is not None and {"retrieval", "zero_shot"} <= {name.partition("=")[0] for name in benchmarks}:
        plot_curve(records, Path(output_dir) / "tradeoff.png", anchor=str(anchor))
    return records


def _measure(
    candidates: Sequence[Candidate],
    benchmarks: Sequence[str],
    output_dir: Path,
    command: str,
    device: str | torch.device,
) -> list[Record]:
    """The records of every candidate, the anchor first, on every benchmark."""
    done = evaluate(
        candidates,
        benchmarks,
        output_dir / "records.json",
        anchor=candidates[0].name,
        command=command,
        keep_others=False,
        options=EvaluationOptions(device=device),
    )
    if done.failures:
        raise ValueError(f"Expected every model evaluated, got failures: {'; '.join(done.failures)}")
    return done.records


def evaluate_arms(
    arms: Mapping[str, Mapping[int, str]],
    anchor: str,
    benchmarks: Sequence[str],
    output_dir: str | Path,
    *,
    baseline: str | None = None,
    alphas: Sequence[float] = (),
    command: str = "",
    device: str | torch.device = "cpu",
) -> Summary:
    """Evaluate every run of every arm, and the anchor, on the same data in one go.

    Args:
        arms (`Mapping[str, Mapping[int, str]]`): Arm -> seed -> folder of a dual encoder.
        anchor (`str`): Folder or Hub id of the untouched CLIP.
        benchmarks (`Sequence[str]`): As [`~modeling_dclip.evaluation.benchmarks.kinds.load_benchmark`] takes them; at
            most one of each kind.
        output_dir (`str` or `Path`): Where `records.json` (a killed run resumes from it), `summary.json` and, with
            retrieval and zero-shot, `tradeoff.png` and with `alphas` `equal_retention.json` are written.
        baseline (`str`, *optional*): The arm that the others are compared with, paired by seed.
        alphas (`Sequence[float]`, *optional*): Points to evaluate on each run's line of weights from the anchor (0) to
            what training reached (1). They are in the records and in the picture, as each arm's mean over its seeds,
            and arms are compared at equal retention along them; the summary is of the models alone.
        command (`str`, *optional*): What the user ran, for the records.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to compute.

    Returns:
        [`~modeling_dclip.evaluation.statistics.Summary`]: From
            [`~modeling_dclip.evaluation.statistics.summarise_arms`], with `benchmarks` and `anchor_model`.

    Raises:
        ValueError: If two benchmarks are of one kind, a benchmark is unknown, a benchmark or a model failed (what was
            measured before stays in `records.json`), or the anchor scores 0.
    """
    kinds = [name.partition("=")[0] for name in benchmarks]
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"Expected at most one benchmark of a kind to summarise, got {list(benchmarks)}.")
    output_dir = Path(output_dir)
    runs = [(ANCHOR, 0, Candidate(str(anchor), ANCHOR, seed=0))]
    runs += [
        (arm, seed, Candidate(str(model), run_label(arm, seed), seed=seed))
        for arm, by_seed in arms.items()
        for seed, model in by_seed.items()
    ]
    candidates = [candidate for *_, candidate in runs]
    points = [candidate._replace(alpha=alpha) for candidate in candidates[1:] for alpha in sorted(alphas)]
    records = _measure([*candidates, *points], benchmarks, output_dir, command, device)
    metrics: dict[str, dict[int, Metrics]] = {}
    for index, (arm, seed, _) in enumerate(runs):
        own = records[index * len(benchmarks) : (index + 1) * len(benchmarks)]
        metrics.setdefault(arm, {})[seed] = {
            name: value for record in own for name, value in record["metrics"].items()
        }
    pairs = [(arm, baseline) for arm in arms if baseline is not None and baseline in arms and arm != baseline]
    summary = summarise_arms(metrics, anchor=ANCHOR, pairs=pairs)
    names = [record["benchmark"] for record in records[: len(benchmarks)]]
    summary |= {"benchmarks": names, "anchor_model": str(anchor)}
    write_json(output_dir / "summary.json", summary)
    if {"retrieval", "zero_shot"} <= set(kinds):
        curves = mean_curves(records, tradeoff_points(summary))
        path, x_label = output_dir / "tradeoff.png", "zero-shot top-1 (%)"
        plot_tradeoff(tradeoff_points(summary), path, curves=curves, x_label=x_label)
        if alphas:
            tables = read_at_retention(output_dir / "records.json", baseline=pairs[0][1] if pairs else None)
            write_json(output_dir / "equal_retention.json", tables)
    return summary


def tradeoff_points(summary: Summary) -> list[TradeoffPoint]:
    """Take the points of [`~modeling_dclip.evaluation.reports.plots.plot_tradeoff`] from a summary.

    Args:
        summary ([`~modeling_dclip.evaluation.statistics.Summary`]): From
            [`~modeling_dclip.evaluation.statistics.summarise_arms`].

    Returns:
        `list[TradeoffPoint]`: One for each arm: `x` is top-1, `y` text-to-image R@1; with intervals over seeds where
            there are several.
    """
    points: list[TradeoffPoint] = []
    for row in summary["arms"]:
        x, y = row["metrics"][RETENTION_METRIC], row["metrics"][GAIN_METRIC]
        points.append(
            {
                "label": row["arm"],
                "x": x["estimate"],
                "x_interval": (x["low"], x["high"]),
                "y": y["estimate"],
                "y_interval": (y["low"], y["high"]),
                "covers": y["covers"],
            }
        )
    return points


def mean_curves(records: Sequence[Record], points: Sequence[TradeoffPoint]) -> dict[str, list[TradeoffPoint]]:
    """Each arm's line from the anchor, the mean over its seeds at each alpha: the curves of
    [`~modeling_dclip.evaluation.reports.plots.plot_tradeoff`].

    Args:
        records (`Sequence[Record]`): Of the runs of arms, points on their lines among them.
        points (`Sequence[TradeoffPoint]`): [`tradeoff_points`] of the same arms, the anchor first: the lines' ends.
    """
    ends = {point["label"]: point for point in points}
    values: dict[str, dict[float, dict[str, list[float]]]] = {}
    of_line: dict[str, list[Record]] = {}
    for record in records:
        arm, alpha = arm_of(record), place_on_line(record)
        if arm in ends and alpha is not None:
            of_line.setdefault(arm, []).append(record)
            at = values.setdefault(arm, {}).setdefault(alpha, {})
            for axis, metric in (("x", RETENTION_METRIC), ("y", GAIN_METRIC)):
                at.setdefault(axis, []).extend([record["metrics"][metric]] if metric in record["metrics"] else [])
    curves: dict[str, list[TradeoffPoint]] = {}
    for arm, line in values.items():
        steps: list[tuple[float, TradeoffPoint]] = [
            (alpha, {"label": f"α {alpha:g}", "x": fmean(at["x"]), "y": fmean(at["y"]), "covers": "nothing"})
            for alpha, at in line.items()
        ]
        steps += [(0.0, {**points[0], "label": ""}), (place_of_student(of_line[arm]), {**ends[arm], "label": ""})]
        curves[arm] = [step for _, step in sorted(steps, key=lambda one: one[0])]
    return curves


def _by_place(records: Sequence[Record], metric: str) -> dict[tuple[str, str | None], Record]:
    """Find the records of the first benchmark that has a metric, by model and condition."""
    benchmark = next((record["benchmark"] for record in records if metric in record["metrics"]), None)
    own = [record for record in records if record["benchmark"] == benchmark]
    return {(record["model"], record.get("condition")): record for record in own}


def _point(zero_shot: Record, retrieval: Record) -> TradeoffPoint:
    point: TradeoffPoint = {"label": name_of(retrieval), "covers": "images"}
    point["x"] = zero_shot["metrics"][RETENTION_METRIC]
    if interval := zero_shot.get("intervals", {}).get(RETENTION_METRIC):
        point["x_interval"] = interval["low"], interval["high"]
    point["y"] = retrieval["metrics"][GAIN_METRIC]
    if interval := retrieval.get("intervals", {}).get(GAIN_METRIC):
        point["y_interval"] = interval["low"], interval["high"]
    return point


def interpolation_points(
    records: Sequence[Record], anchor: str | None = None
) -> tuple[list[TradeoffPoint], dict[str, list[TradeoffPoint]]]:
    """Pair each model's retrieval with its zero-shot accuracy.

    Where there are several benchmarks of a kind, the first counts. Points on the line from an anchor to a model
    (`condition` is `alpha=...`) become the model's curve, with anchor and model in their places on it, if those were
    measured.

    Args:
        records (`Sequence[Record]`): From [`~modeling_dclip.evaluation.records.read_results`].
        anchor (`str`, *optional*): The model that is the reference; its point comes first.

    Returns:
        `tuple[list[TradeoffPoint], dict[str, list[TradeoffPoint]]]`: Points and curves of
            [`~modeling_dclip.evaluation.reports.plots.plot_tradeoff`]: `x` is top-1, `y` text-to-image R@1; with
            intervals over images where the records have them. Anchor and model have no label in it: they are points.

    Raises:
        ValueError: If no model has both, or points of several lines are in the records.
    """
    zero_shot, retrieval = _by_place(records, RETENTION_METRIC), _by_place(records, GAIN_METRIC)
    pairs = {place: _point(own, retrieval[place]) for place, own in zero_shot.items() if place in retrieval}
    if not pairs:
        raise ValueError(
            f"Expected a model with retrieval ({GAIN_METRIC}) and zero-shot classification ({RETENTION_METRIC}), got "
            f"{len(records)} records without such a pair. Evaluate both benchmarks."
        )
    lines = {model for model, condition in pairs if (condition or "").startswith(ALPHA)}
    if len(lines) > 1:
        raise ValueError(f"Expected points on one line, got lines to {sorted(lines)}. Plot one model at a time.")
    start = None if anchor is None else pairs.get((anchor, None))
    points = [pair for (_, condition), pair in pairs.items() if condition is None]
    points.sort(key=lambda point: point is not start)
    steps: dict[str, list[tuple[float, TradeoffPoint]]] = {}
    for place, pair in pairs.items():
        if (alpha := place_on_line(zero_shot[place])) is not None:
            steps.setdefault(pair["label"], []).append((alpha, {**pair, "label": f"α {alpha:g}"}))
    student = place_of_student(zero_shot.values())
    for placed in steps.values():
        ends = {0.0: start, student: pairs.get((next(iter(lines)), None))}
        placed += [(alpha, {**end, "label": ""}) for alpha, end in ends.items() if end is not None]
    ordered = {label: sorted(placed, key=lambda one: one[0]) for label, placed in steps.items()}
    return points, {label: [step for _, step in placed] for label, placed in ordered.items()}


def plot_curve(records: Sequence[Record], path: str | os.PathLike, *, anchor: str | None = None) -> None:
    """Draw [`interpolation_points`] of records, zero-shot top-1 to the right and text-to-image R@1 up.

    Args:
        records, anchor: As in [`interpolation_points`]. Models are named as in tables.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: As in [`interpolation_points`], or if the file is not a `.png`.
    """
    points, curves = interpolation_points(shorten_paths(records), anchor)
    steps = [step for own in curves.values() for step in own]
    plot_tradeoff(points or steps, path, curves=curves if points else {}, x_label="zero-shot top-1 (%)")
