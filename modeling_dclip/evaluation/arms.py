"""Evaluate the arms of an experiment against their anchor: records, one summary, a table and a picture of the trade-off."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeling_dclip.evaluation.benchmarks import benchmark_record, evaluate_model, load_benchmark
from modeling_dclip.evaluation.plots import plot_tradeoff
from modeling_dclip.evaluation.results import write_json, write_results
from modeling_dclip.evaluation.tradeoff import GAIN_METRIC, RETENTION_METRIC, compare_to_anchor, summarise_arms

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
        output_dir (`str` or `Path`): Gets `records.json`, `summary.json` and, with retrieval and zero-shot, `tradeoff.png`.
        baseline (`str`, *optional*): The arm that the others are compared with, paired by seed.
        command (`str`, *optional*): What the user ran, for the records.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to compute.

    Returns:
        `dict[str, Any]`: The summary, of [`~modeling_dclip.evaluation.tradeoff.summarise_arms`], with `benchmarks` and `anchor_model`.

    Raises:
        ValueError: If a benchmark is unknown, two are of one kind, or the anchor scores 0.
    """
    kinds = [name.partition("=")[0] for name in benchmarks]
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"Expected at most one benchmark of a kind to summarise, got {list(benchmarks)}.")
    output_dir = Path(output_dir)
    loaded = [load_benchmark(name, device=device) for name in benchmarks]
    metrics: dict[str, dict[int, dict[str, float]]] = {}
    records = []
    models = {ANCHOR: {0: anchor}, **arms}
    for arm, runs in models.items():
        for seed, model in runs.items():
            results, revision = evaluate_model(model, loaded)
            metrics.setdefault(arm, {})[seed] = {
                name: value for result in results for name, value in result.items() if isinstance(value, float)
            }
            fields = {
                "model": str(model),
                "label": f"{arm}, seed {seed}",
                "seed": seed,
                "revision": revision,
                "command": command,
            }
            if arm == ANCHOR:
                anchor_results, anchor_revision = results, revision
                fields["label"] = ANCHOR
            for index, (benchmark, result) in enumerate(zip(loaded, results, strict=True)):
                if arm != ANCHOR:
                    intervals = compare_to_anchor(result, anchor_results[index], seed=seed)
                    fields["comparison"] = {"anchor": str(anchor), "anchor_revision": anchor_revision, **intervals}
                records.append(benchmark_record(benchmark, result, **fields))
    pairs = [(arm, baseline) for arm in arms if baseline in arms and arm != baseline]
    summary = summarise_arms(metrics, anchor=ANCHOR, pairs=pairs)
    summary |= {"benchmarks": [benchmark.name for benchmark in loaded], "anchor_model": str(anchor)}
    write_results(output_dir / "records.json", records)
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
