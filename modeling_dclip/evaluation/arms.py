"""Evaluate the arms of an experiment against their anchor: records, one summary, a table and a picture of the trade-off."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_dclip.evaluation.evaluator import Candidate, evaluate
from modeling_dclip.evaluation.plots import plot_tradeoff
from modeling_dclip.evaluation.results import write_json
from modeling_dclip.evaluation.tradeoff import GAIN_METRIC, RETENTION_METRIC, summarise_arms

ANCHOR = "anchor"


def evaluate_arms(
    arms: Mapping[str, Mapping[int, str]],
    anchor: str,
    benchmarks: Sequence[str],
    output_dir: str | Path,
    *,
    baseline: str | None = None,
    command: str = "",
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Evaluate every run of every arm, and the anchor, on the same data in one go.

    Args:
        arms (`Mapping[str, Mapping[int, str]]`): Arm -> seed -> folder of a dual encoder.
        anchor (`str`): Folder or Hub id of the untouched CLIP.
        benchmarks (`Sequence[str]`): Of [`~modeling_dclip.evaluation.benchmarks.load_benchmark`]; one of each kind at most.
        output_dir (`str` or `Path`): Gets `records.json` (which a killed run goes on with), `summary.json` and, with retrieval and zero-shot, `tradeoff.png`.
        baseline (`str`, *optional*): The arm that the others are compared with, paired by seed.
        command (`str`, *optional*): What the user ran, for the records.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to compute.

    Returns:
        `dict[str, Any]`: The summary, of [`~modeling_dclip.evaluation.tradeoff.summarise_arms`], with `benchmarks` and `anchor_model`.

    Raises:
        RuntimeError: If a benchmark is unknown or failed, or a model did; what had been measured stays in `records.json`.
        ValueError: If two benchmarks are of one kind, or the anchor scores 0.
    """
    kinds = [name.partition("=")[0] for name in benchmarks]
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"Expected at most one benchmark of a kind to summarise, got {list(benchmarks)}.")
    output_dir = Path(output_dir)
    runs = [(ANCHOR, 0, Candidate(str(anchor), ANCHOR, seed=0))]
    runs += [
        (arm, seed, Candidate(str(model), f"{arm}, seed {seed}", seed=seed))
        for arm, by_seed in arms.items()
        for seed, model in by_seed.items()
    ]
    candidates, records_file = [candidate for *_, candidate in runs], output_dir / "records.json"
    options = {"anchor": str(anchor), "command": command, "keep_others": False, "device": device}
    done = evaluate(candidates, benchmarks, records_file, **options)
    if done.failures:
        raise RuntimeError(f"Expected every arm evaluated, got failures: {'; '.join(done.failures)}")
    metrics: dict[str, dict[int, dict[str, float]]] = {}
    for index, (arm, seed, _) in enumerate(runs):
        own = done.records[index * len(benchmarks) : (index + 1) * len(benchmarks)]
        metrics.setdefault(arm, {})[seed] = {
            name: value for record in own for name, value in record["metrics"].items()
        }
    pairs = [(arm, baseline) for arm in arms if baseline in arms and arm != baseline]
    summary = summarise_arms(metrics, anchor=ANCHOR, pairs=pairs)
    names = [record["benchmark"] for record in done.records[: len(benchmarks)]]
    summary |= {"benchmarks": names, "anchor_model": str(anchor)}
    write_json(output_dir / "summary.json", summary)
    if {"retrieval", "zero_shot"} <= set(kinds):
        plot_tradeoff(tradeoff_points(summary), output_dir / "tradeoff.png", x_label="zero-shot top-1 (%)")
    return summary


def tradeoff_points(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of [`~modeling_dclip.evaluation.plots.plot_tradeoff`] from a summary: top-1 against text-to-image R@1.

    Args:
        summary (`dict`): From [`~modeling_dclip.evaluation.tradeoff.summarise_arms`].

    Returns:
        `list[dict]`: One an arm, intervals over seeds included where there are several.
    """
    points = []
    for row in summary["arms"]:
        point = {"label": row["arm"]}
        for axis, metric in (("x", RETENTION_METRIC), ("y", GAIN_METRIC)):
            interval = row["metrics"][metric]
            point[axis] = interval["estimate"]
            point[f"{axis}_interval"] = (interval["low"], interval["high"])
        points.append(point)
    return points
