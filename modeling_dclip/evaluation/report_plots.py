"""Pictures of reports: bars with intervals, a suite of datasets, the losses of a training.

matplotlib is imported when a picture is drawn, never before.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from modeling_dclip.evaluation.figures import COLOURS, GRID, INK, new_figure, save_figure, style_of


def _quiet_axes(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK, length=0)


def plot_bars(panels: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> None:
    """Draw values as horizontal bars from zero, with their intervals as lines; one panel for each metric, side by side.

    Args:
        panels (`Mapping[str, Sequence[dict]]`): Heading -> bars from top to bottom, the same labels in every panel: `label`, `value` as on
            the axis, `text` to write beside it, and optionally `low` and `high`. A `value` of `None` leaves the place empty.
        path (`str` or `os.PathLike`): A `.png` file, written atomically.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no bar, labels differ between panels, a value is not finite, or the file is no `.png`.
    """
    labels = [[bar["label"] for bar in bars] for bars in panels.values()]
    if not labels or not labels[0] or any(other != labels[0] for other in labels):
        raise ValueError(f"Expected one or more bars, the same labels in every panel, got {labels}.")
    for heading, bars in panels.items():
        for bar in bars:
            if bar["value"] is not None and not math.isfinite(bar["value"]):
                raise ValueError(f"Expected a finite value, got {bar['value']} for {bar['label']!r} in {heading!r}.")
    figure = new_figure(0.5 + 0.065 * max(map(len, labels[0])) + 2.4 * len(panels), 0.8 + 0.26 * len(labels[0]))
    for axes, (heading, bars) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for place, bar in enumerate(bars):
            if bar["value"] is None:
                continue
            axes.barh(place, bar["value"], height=0.62, color="#c9d6f2" if place else "#d9dbe1")
            ends = [bar.get("low"), bar.get("high")]
            if None not in ends:
                axes.plot(
                    ends, [place, place], color=COLOURS[2] if place else COLOURS[0], lw=1.6, solid_capstyle="butt"
                )
            right = max(0, bar["value"], *(end for end in ends if end is not None))
            axes.annotate(bar["text"], (right, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)  # fmt: skip
        axes.set_yticks(range(len(bars)), labels[0])
        axes.set_xlabel(heading, color=INK, fontsize=9)
        axes.margins(x=0.18, y=0.02)
        _quiet_axes(axes, "x")
    axes.invert_yaxis()
    save_figure(figure, path)


def plot_suite(
    values: Mapping[str, Mapping[str, float]], path: str | os.PathLike, *, x_label: str = "zero-shot top-1 (%)"
) -> None:
    """Draw several models on many datasets: a row for each dataset, a dot for each model, the easiest dataset on top.

    Args:
        values (`Mapping[str, Mapping[str, float]]`): Model -> dataset -> share in [0, 1]. A model may lack datasets.
        path (`str` or `os.PathLike`): A `.png` file, written atomically.
        x_label (`str`, *optional*): Of the axis.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no value, one is not finite, or the file is no `.png`.
    """
    datasets = list(dict.fromkeys(name for row in values.values() for name in row))
    if not datasets or not all(math.isfinite(value) for row in values.values() for value in row.values()):
        raise ValueError(f"Expected one or more finite values of models on datasets, got {dict(values)}.")
    datasets.sort(key=lambda name: -max(row.get(name, -math.inf) for row in values.values()))
    figure = new_figure(7.2, 1.3 + 0.26 * len(datasets) + 0.2 * math.ceil(len(values) / 3))
    axes = figure.add_subplot()
    for place, name in enumerate(datasets):
        found = [100 * row[name] for row in values.values() if name in row]
        axes.plot([min(found), max(found)], [place, place], color="#c9ced9", lw=2, zorder=1)
    for index, (model, row) in enumerate(values.items()):
        places = [place for place, name in enumerate(datasets) if name in row]
        xs = [100 * row[datasets[place]] for place in places]
        axes.plot(xs, places, ls="", marker=style_of(index)["marker"], ms=6, mec="white", mew=0.7, label=model,
                  color=style_of(index)["color"], zorder=2)  # fmt: skip
    axes.set_yticks(range(len(datasets)), datasets)
    axes.set_ylim(len(datasets) - 0.5, -0.5)
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    _quiet_axes(axes, "both")
    widest = max(map(len, values))
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=max(1, min(3, 90 // (widest + 4))))
    save_figure(figure, path)


def plot_training(
    log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str | None = None
) -> None:
    """Draw the losses of a training against the optimiser's step.

    Args:
        log_history (`Sequence[dict]`): A trainer's `state.log_history`, or that of its `trainer_state.json`: entries with `step` and losses,
            `loss`, `<what>_loss`, `eval_loss`. The last entry's `train_loss`, a mean over all steps, is no point of a curve and is left out.
        path (`str` or `os.PathLike`): A `.png` file, written atomically.
        title (`str`, *optional*): Above the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no entry has a step and a loss, a loss is not finite (the step is named), or the file is no `.png`.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if "step" not in entry or name == "train_loss" or not (name == "loss" or name.endswith("_loss")):
                continue
            if not math.isfinite(value):
                raise ValueError(f"Expected finite losses, got {name}={value} at step {entry['step']}.")
            curves.setdefault(name, []).append((entry["step"], value))
    if not curves:
        raise ValueError(f"Expected entries with 'step' and a loss, got {len(log_history)} without.")
    figure = new_figure(6.8, 4.0)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(curves.items()):
        measured = name.startswith("eval_")
        axes.plot(*zip(*points, strict=True), label=name, color=COLOURS[(1 + index) % len(COLOURS)], lw=1.4,
                  ls="--" if measured else "-", marker="o" if measured or len(points) < 3 else "", ms=4)  # fmt: skip
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.set_ylabel("loss", color=INK, fontsize=9)
    axes.set_title(title or "", loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    _quiet_axes(axes, "both")
    save_figure(figure, path)
