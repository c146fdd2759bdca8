"""Three pictures: the trade-off between retrieval and zero-shot accuracy, what a teacher attends to, how costs grow.

matplotlib is imported when a picture is drawn, never before.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage

from modeling_dclip.evaluation.figures import COLOURS, GRID, INK, MARKERS, QUIET, new_figure, save_figure, style_of


def _bars(point: Mapping[str, Any], axis: str) -> np.ndarray | None:
    """Distances (2, 1) in percent from the point to the ends of its interval; `None` where there is no interval."""
    interval = point.get(f"{axis}_interval")
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return 100 * np.array([[point[axis] - interval[0]], [interval[1] - point[axis]]]).clip(min=0)


def plot_tradeoff(
    points: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    curve: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    x_label: str = "zero-shot top-1 kept (% of the anchor)",
    y_label: str = "text-to-image R@1 (%)",
    title: str | None = None,
) -> None:
    """Draw models as points: zero-shot accuracy or retention to the right, retrieval up. Up and right is better.

    Args:
        points (`Sequence[dict]`): `label`, `x`, `y` in [0, 1], and optionally `x_interval`, `y_interval` as `(low, high)`. The first
            is drawn in grey as the reference, with dashed lines through it. Points of one label are one series, in one colour.
        path (`str` or `os.PathLike`): A `.png` file, written atomically.
        curve (`Sequence[dict]`, *optional*): Points of weight interpolation (WiSE-FT), `x`, `y` and `alpha`, in the order of `alpha`. Its
            ends are not labelled: they are among the points.
        curves (`Mapping[str, Sequence[dict]]`, *optional*): By name, points on a line in the order given, as over epochs or checkpoints, each
            with `x`, `y`, a `label` written beside it, and optionally intervals.
        x_label, y_label, title (`str`, *optional*): Texts.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no point, one lacks a key or is not finite, or the file is no `.png`.
    """
    _check_points(points, ("label", "x", "y"))
    _check_points(curve, ("x", "y", "alpha"), least=0)
    for name, steps in (curves or {}).items():
        _check_points(steps, ("label", "x", "y"), where=f" of the curve {name!r}")
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    axes.axvline(100 * points[0]["x"], color=QUIET, lw=0.8, ls=(0, (4, 4)), zorder=0)
    axes.axhline(100 * points[0]["y"], color=QUIET, lw=0.8, ls=(0, (4, 4)), zorder=0)
    series = {label: index for index, label in enumerate(dict.fromkeys(point["label"] for point in points))}
    for point in points:
        index = series[point["label"]]
        _draw_point(axes, point, **style_of(index), ms=7)
    if curve:
        between = [
            {**point, "label": f"{point['alpha']:g}" if 0 < place < len(curve) - 1 else ""}
            for place, point in enumerate(curve)
        ]
        _draw_curve(axes, between, "#93a3bd", "weights between, α (WiSE-FT)")
    for index, (name, steps) in enumerate((curves or {}).items(), start=len(series)):
        _draw_curve(axes, steps, style_of(index)["color"], name)
    handles = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.margins(0.12)
    for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        middle, half = sum(limits) / 2, (limits[1] - limits[0]) / 2
        set_limits(middle - max(half, 0.25), middle + max(half, 0.25))  # a hundredth of a point is no distance
    widest = max(map(len, handles))
    axes.legend(
        handles.values(),
        handles,
        frameon=False,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=max(1, min(4, len(handles), 80 // (widest + 4))),
    )
    axes.tick_params(labelsize=8, colors=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.set_title(title or "", loc="left", color=INK, fontsize=11)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _draw_point(axes: Any, point: Mapping[str, Any], **style: Any) -> None:
    bars = {f"{axis}err": _bars(point, axis) for axis in "xy"}
    where = (100 * point["x"], 100 * point["y"])
    style = {
        "mec": "white",
        "mew": 0.8,
        "elinewidth": 1.3,
        "capsize": 3,
        "zorder": 3,
        "ls": "",
        "label": point["label"],
        **style,
    }
    axes.errorbar(*where, **bars, **style)


def _draw_curve(axes: Any, steps: Sequence[Mapping[str, Any]], colour: str, name: str) -> None:
    """A line with a dot at every point, and the point's label beside it, on the side that the line does not take."""
    xs, ys = ([100 * step[axis] for step in steps] for axis in "xy")
    axes.plot(xs, ys, color=colour, lw=1.6, marker=".", ms=6, zorder=1, label=name)
    for place, step in enumerate(steps):
        if any(step.get(f"{axis}_interval") for axis in "xy"):
            _draw_point(axes, {**step, "label": None}, color=colour, marker="", elinewidth=0.8, capsize=2, zorder=1)
        before, after = max(0, place - 1), min(len(steps) - 1, place + 1)
        falls = (xs[after] - xs[before]) * (ys[after] - ys[before]) < 0
        axes.annotate(step["label"], (xs[place], ys[place]), (-9, -9 if falls else 9), textcoords="offset points", ha="center",
                      va="center", fontsize=7, color=QUIET)  # fmt: skip


def _check_points(points: Sequence[Mapping[str, Any]], keys: Sequence[str], least: int = 1, where: str = "") -> None:
    if len(points) < least:
        raise ValueError(f"Expected at least {least} point to draw{where}, got none.")
    for index, point in enumerate(points):
        missing = [key for key in keys if key not in point]
        if missing:
            raise ValueError(
                f"Expected the keys {list(keys)} in every point, got {sorted(point)} in point {index}{where}."
            )
        if not np.isfinite([point["x"], point["y"]]).all():
            raise ValueError(f"Expected finite numbers, got x={point['x']}, y={point['y']} in point {index}{where}.")


def plot_region_attention(
    image: PILImage.Image,
    boxes: Any,
    weights: Any,
    caption: str,
    path: str | os.PathLike,
    token_attention: Any = None,
    *,
    tokens: Sequence[str] | None = None,
) -> None:
    """Draw region boxes over an image, stronger where the weight is larger, and beside it which token looks at which region.

    Args:
        image (`PIL.Image.Image`): The whole image.
        boxes (array of shape `(R, 4)`): xyxy in pixels of `image`.
        weights (array of shape `(R,)`): >= 0, e.g. the teacher's `region_weights`.
        caption (`str`): Written above.
        path (`str` or `os.PathLike`): A `.png` file, written atomically.
        token_attention (array of shape `(T, R)`, *optional*): >= 0, e.g. `text_to_image_attentions` averaged over heads.
        tokens (`Sequence[str]`, *optional*): T labels; the caption's words where their number is T, else numbers.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If shapes do not fit, there is no region, or a weight is negative or not finite.
    """
    boxes, weights = np.asarray(boxes, dtype=float), np.asarray(weights, dtype=float)
    regions = len(weights)
    if weights.ndim != 1 or not regions or boxes.shape != (regions, 4):
        raise ValueError(f"Expected boxes (R, 4) and weights (R,), R >= 1, got {boxes.shape} and {weights.shape}.")
    attention = None if token_attention is None else np.asarray(token_attention, dtype=float)
    if attention is not None and (attention.ndim != 2 or attention.shape[1] != regions or not len(attention)):
        raise ValueError(f"Expected token_attention of shape (T, {regions}), T >= 1, got {attention.shape}.")
    for name, values in (("weights", weights), ("boxes", boxes), ("token_attention", attention)):
        if values is not None and not (np.isfinite(values).all() and (name == "boxes" or (values >= 0).all())):
            raise ValueError(
                f"Expected finite{'' if name == 'boxes' else ', non-negative'} {name}, got {values.tolist()}."
            )
    if attention is not None and tokens is None:
        words = caption.split()
        tokens = words if len(words) == len(attention) else [str(index) for index in range(len(attention))]
    if attention is not None and len(tokens) != len(attention):
        raise ValueError(f"Expected {len(attention)} tokens, one per row of token_attention, got {len(tokens)}.")

    figure = new_figure(4.6 if attention is None else 5.2 + 0.45 * regions + 1.2, 4.9)
    if attention is None:
        axes = figure.add_subplot()
    else:
        axes, beside = figure.subplots(1, 2, width_ratios=(1, max(0.45, 0.12 * regions)))
        _draw_attention(figure, beside, attention, tokens)
    _draw_regions(axes, image, boxes, weights)
    figure.suptitle(textwrap.fill(caption, 48 if attention is None else 80), fontsize=10, color=INK)
    save_figure(figure, path)


def _draw_regions(axes: Any, image: PILImage.Image, boxes: np.ndarray, weights: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(image.convert("RGB"), interpolation="nearest" if min(image.size) < 200 else "antialiased")
    strongest = weights.max() or 1.0
    for index in np.argsort(weights):  # the strongest on top
        x1, y1, x2, y2 = boxes[index]
        strength = weights[index] / strongest
        colour = COLOURS[1 + index % (len(COLOURS) - 1)]
        axes.add_patch(
            Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=1 + 2.5 * strength, alpha=0.5 + 0.5 * strength
            )
        )
        axes.text(x1, y1, f" {index}: {100 * weights[index]:.0f}% ", fontsize=8, color="white", ha="left", va="bottom",
                  clip_on=False, bbox={"fc": colour, "ec": "none", "pad": 1, "alpha": 0.6 + 0.4 * strength})  # fmt: skip
    axes.set_axis_off()


def _draw_attention(figure: Any, axes: Any, attention: np.ndarray, tokens: Sequence[str]) -> None:
    picture = axes.imshow(attention, cmap="Blues", vmin=0, vmax=attention.max() or 1.0, aspect="auto")
    axes.set_xticks(range(attention.shape[1]))
    size = 8 if len(tokens) <= 24 else max(4, 190 / len(tokens))
    axes.set_yticks(range(len(tokens)), tokens, fontsize=size)
    axes.set_xlabel("region", color=INK)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.6, label="attention")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)


def plot_growth(
    series: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]],
    path: str | os.PathLike,
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
) -> None:
    """Draw costs against the size of the input on logarithmic axes, where a power is a straight line.

    Args:
        series (`Mapping[str, Sequence]`): By label, points of a size and a cost with `median`, `min` and `max`, all > 0.
        path (`str` or `os.PathLike`): A `.png` file, written atomically.
        x_label, y_label, title (`str`, *optional*): Texts.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no series, one is empty or has a value that is not positive and finite, or the file is no `.png`.
    """
    if not series:
        raise ValueError("Expected one or more series to draw, got none.")
    for label, points in series.items():
        values = np.array([[size, cost["median"], cost["min"], cost["max"]] for size, cost in points], dtype=float)
        if not len(values) or not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(
                f"Expected positive, finite sizes and costs in the series {label!r}, got {values.tolist()}."
            )
    figure = new_figure(6.8, 4.8)
    from matplotlib.ticker import FuncFormatter, LogLocator

    colours = COLOURS[1:]  # grey is the anchor's
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(series.items()):
        sizes, costs = [size for size, _ in points], [cost for _, cost in points]
        medians = np.array([cost["median"] for cost in costs])
        bars = np.abs([medians - [cost["min"] for cost in costs], [cost["max"] for cost in costs] - medians])
        axes.errorbar(
            sizes, medians, yerr=bars, label=label, color=colours[index % len(colours)], lw=1.4, capsize=2, ms=5,
            marker=MARKERS[index % len(MARKERS)], ls="-" if index < len(colours) else "--",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({size for points in series.values() for size, _ in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    if title:
        axes.set_title(title, fontsize=11, color=INK)
    save_figure(figure, path)
