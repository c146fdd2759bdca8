"""Every picture of this package as a function: values in, a PNG file out.

The trade-off between retrieval and zero-shot accuracy; bars with intervals and a suite of datasets, for reports; maps
over images and a teacher's attention over regions; growth of costs; and the losses of a training, drawn from the
`trainer_state.json` that training always writes, so that no tracker is needed.

matplotlib is imported when a picture is drawn, never before.
"""

import importlib.util
import io
import logging
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
from PIL import Image as PILImage

from modeling_dclip.data.files import MANIFEST_NAME, list_folder, read_json, write_bytes
from modeling_dclip.evaluation.benchmarks.forms import KIND_HELP
from modeling_dclip.evaluation.line import read_training
from modeling_dclip.evaluation.reports.document import PICTURE_DPI, show_text
from modeling_dclip.evaluation.reports.metric_names import metric_of

logger = logging.getLogger(__name__)

INK, QUIET, GRID = "#1f2430", "#667085", "#e3e6ec"
# Grey first: the anchor.
SERIES_COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0e7490", "#be185d", "#854d0e")
MARKERS = ("s", "^", "o", "D", "v", "P", "X")
GREY = {"color": SERIES_COLOURS[0]}
# The colour of each loss term, in every run.
TERM_COLOURS = {
    "loss": INK,
    "contrastive_loss": "#2563eb",
    "cosine_distillation_loss": "#d97706",
    "similarity_distillation_loss": "#059669",
    "cosine_preservation_loss": "#9333ea",
    "distillation_loss": "#dc2626",
    "synthetic_contrastive_loss": "#0e7490",
    "synthetic_distillation_loss": "#be185d",
}
# What a trainer logs of the retrieval of the validation part, a share in [0, 1].
RETRIEVAL_TERMS = {
    "eval_text_to_image_recall@1": "text to image",
    "eval_image_to_text_recall@1": "image to text",
}
RETRIEVAL_COLOURS = ("#0e7490", "#be185d")
# What a trainer logs of the benchmarks that it measures on its way: `probe_KIND[_NUMBER]_METRIC`, and the retention.
_PROBE = re.compile(rf"probe_({'|'.join(KIND_HELP)})(_\d+)?_(.+)")
_RETENTION, _KEPT = "probe_retention", "probe_kept_step"
VALIDATION: dict[str, Any] = {"lw": 1.6, "ls": (0, (3, 1.6)), "marker": "o", "ms": 4.5, "mfc": "white"}
# The least length of an axis in percentage points: a smaller difference is rarely more than noise.
LEAST_SPAN = 5
INTERVALS_OVER = {"images": "test images", "seeds": "training seeds"}
MANY_POINTS = 200  # more points than this get a running median
MAP_TITLES = {
    "attention_rollout": "attention rollout",
    "class_attention": "class attention, last layer",
    "text_relevance": "relevance for the text",
    "text_similarity": "similarity to the text",
}
STATE_NAME = "trainer_state.json"
CURVES_NAME = "training_curves.png"
ATTENTION_STEM = "teacher_attention"  # how pictures of a teacher's attention are called


MOST_NAMED = 9  # series with their names beside them
_LEGEND_COLUMNS = 3


class TradeoffPoint(TypedDict, total=False):
    """A model in a picture of the trade-off.

    Attributes:
        label (`str`): Stands beside the point; an empty one is not shown.
        series (`str`, *optional*): Which model it is: equal names have one colour. The label if not given.
        x (`float`), y (`float`): Zero-shot accuracy or retention, and retrieval, in [0, 1].
        x_interval, y_interval (`tuple`): Low and high end; `None` for an end that is not known.
        covers (`str`, *optional*): What the intervals cover, `"images"` or `"seeds"`; said below the picture.
    """

    label: str
    series: str
    x: float
    y: float
    x_interval: tuple[float | None, float | None]
    y_interval: tuple[float | None, float | None]
    covers: str


class Bar(TypedDict, total=False):
    """A bar of [`plot_bars`].

    Attributes:
        label (`str`): Stands at the bar's left.
        series (`str`, *optional*): Which model it is: equal names have one colour. The label if not given.
        value (`float`, *optional*): Length, as on the axis; `None` leaves the place empty.
        text (`str`): Stands at the bar's right.
        low (`float`, *optional*), high (`float`, *optional*): Ends of the interval, as on the axis.
    """

    label: str
    series: str
    value: float | None
    text: str
    low: float | None
    high: float | None


class Cost(TypedDict):
    """What several rounds of a measurement took: median, smallest and largest."""

    median: float
    min: float
    max: float


Styles = Mapping[str, Mapping[str, str]]  # by series: colour and marker, from [`style_of`]


def style_of(index: int) -> dict[str, str]:
    """Colour and marker of a series, as keyword arguments: grey for the first, and 56 different pairs for the next."""
    colour = SERIES_COLOURS[0] if index == 0 else SERIES_COLOURS[1 + (index - 1) % (len(SERIES_COLOURS) - 1)]
    return {"color": colour, "marker": MARKERS[index % len(MARKERS)]}


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure with the Agg backend. No global state of matplotlib is touched.

    Args:
        width, height (`float`): In inches, at [`PICTURE_DPI`] pixels an inch.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra that brings it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib for drawing, got no such package. Install it with `pip install modeling_dclip[eval]`."
        ) from error
    figure = Figure(figsize=(width, height), dpi=PICTURE_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure as PNG, whole or not at all.

    Texts are drawn as they are: nothing in them is a formula, and what cannot be drawn is written out.

    Args:
        figure (`matplotlib.figure.Figure`): From [`new_figure`].
        path (`str` or `os.PathLike`): A `.png` file.

    Raises:
        ValueError: If the file is no `.png`.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"Expected a .png file to draw to, got {str(path)!r}.")
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign in a name is no formula
        text.set_text(show_text(text.get_text()))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _series_of(value: TradeoffPoint | Bar) -> str:
    return value.get("series", value["label"])


def _style_series(names: Iterable[str], styles: Styles | None) -> dict[str, Mapping[str, str]]:
    """Each series' style: the one given, or else the next that none of these has."""
    found = dict(styles or {})
    free = (style for style in map(style_of, count()) if style not in found.values())
    for name in names:
        if name not in found:
            found[name] = next(free)
    return found


def _error_bars(point: TradeoffPoint, axis: str) -> np.ndarray | None:
    """Distances (2, 1) in percent from the point to the ends of its interval; `None` where there is no interval."""
    interval = point.get(f"{axis}_interval")
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return 100 * np.array([[point[axis] - interval[0]], [interval[1] - point[axis]]]).clip(min=0)


def plot_tradeoff(
    points: Sequence[TradeoffPoint],
    path: str | os.PathLike,
    *,
    curves: Mapping[str, Sequence[TradeoffPoint]] | None = None,
    styles: Styles | None = None,
    x_label: str = "zero-shot top-1 kept (% of the anchor)",
    y_label: str = "text-to-image R@1 (%)",
    title: str | None = None,
) -> None:
    """Draw models as points: zero-shot accuracy or retention on the x axis, retrieval on the y axis.

    Up and right is better. Each point has its name beside it; more than [`MOST_NAMED`] series are named in a legend
    below instead, and the steps of their curves are not named. Both axes hold every interval and are at least
    [`LEAST_SPAN`] points long, so that noise does not fill the picture.

    Args:
        points (`Sequence[TradeoffPoint]`): With `label`, `x`, `y` and optionally intervals. The first is the
            reference: dashed lines go through it, and it is grey if no style is given. Points of one series have one
            colour.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        curves (`Mapping[str, Sequence[TradeoffPoint]]`, *optional*): By series, points on a line in the order given,
            such as checkpoints or weights between two models (WiSE-FT), with `x`, `y`, `label`, and optionally
            intervals. A step without a label is one of the points.
        styles (`Mapping`, *optional*): By series, see [`style_of`]; for pictures that share their models.
        x_label, y_label, title (`str`, *optional*): Texts at the axes and above.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no point, one lacks a key or is not finite, or the file is no `.png`.
    """
    curves = curves or {}
    _check_points(points, ("label", "x", "y"))
    for name, steps in curves.items():
        _check_points(steps, ("label", "x", "y"), where=f" of the curve {name!r}")
    styles = _style_series([*map(_series_of, points), *curves], styles)
    names = list(dict.fromkeys(map(_series_of, points)))
    rows = math.ceil(len(names) / _LEGEND_COLUMNS) if len(names) > MOST_NAMED else 0
    # So narrow that a telephone shows its letters as large as they are.
    figure = new_figure(5.4, 4.0 + 0.22 * rows)
    axes = figure.add_subplot()
    axes.axvline(100 * points[0]["x"], color=QUIET, lw=0.8, ls=(0, (4, 4)), zorder=0)
    axes.axhline(100 * points[0]["y"], color=QUIET, lw=0.8, ls=(0, (4, 4)), zorder=0)
    for name, steps in curves.items():
        colour = styles[name]["color"]
        axes.plot([100 * step["x"] for step in steps], [100 * step["y"] for step in steps], color=colour, lw=1.4,
                  alpha=0.7, zorder=1)  # fmt: skip
        for step in steps:
            if step["label"]:
                _draw_point(axes, step, color=colour, marker="o", ms=4, elinewidth=0.7, capsize=2, alpha=0.6)
    for point in points:
        _draw_point(axes, point, **styles[_series_of(point)], ms=7.5, elinewidth=1.3, capsize=3, zorder=3)
    drawn = [*points, *(step for steps in curves.values() for step in steps if step["label"])]
    for axis, set_limits in (("x", axes.set_xlim), ("y", axes.set_ylim)):
        set_limits(_limits(drawn, axis))
    axes.tick_params(labelsize=9, colors=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.set_title(title or "", loc="left", color=INK, fontsize=11)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _explain(figure, drawn, points[0])
    if rows:
        _write_legend(figure, axes, points, styles)
    else:
        _write_labels(figure, axes, points, curves, styles)
    save_figure(figure, path)


def _write_legend(figure: Any, axes: Any, points: Sequence[TradeoffPoint], styles: Styles) -> None:
    """Name the series of the points below the picture."""
    named = {_series_of(point): point for point in reversed(points)}
    handles = [
        axes.plot(
            [], [], **{"ls": "", "mec": "white", "mew": 0.8, **styles[name]}, ms=7.5, label=_cut(point["label"])
        )[0]
        for name, point in reversed(named.items())
    ]
    options = {"ncols": _LEGEND_COLUMNS, "fontsize": 8, "frameon": False, "handletextpad": 0.2, "columnspacing": 1.0}
    options["borderaxespad"] = 1.8  # above the line that says what bars are
    figure.legend(handles=handles, loc="outside lower left", labelcolor=INK, **options)


def _draw_point(axes: Any, point: TradeoffPoint, **style: Any) -> None:
    bars = {f"{axis}err": _error_bars(point, axis) for axis in "xy"}
    style = {"mec": "white", "mew": 0.8, "zorder": 2, "ls": "", **style}
    axes.errorbar(100 * point["x"], 100 * point["y"], **bars, **style)


def _limits(points: Sequence[TradeoffPoint], axis: Literal["x", "y"]) -> tuple[float, float]:
    """The ends of an axis in percent: with room around every point and interval, and at least [`LEAST_SPAN`] apart."""
    ends = [100 * point[axis] for point in points]
    for point in points:
        if (bars := _error_bars(point, axis)) is not None:
            ends += [100 * point[axis] - bars[0, 0], 100 * point[axis] + bars[1, 0]]
    least, most = min(ends), max(ends)
    room = 0.14 * max(most - least, LEAST_SPAN)
    low, high = _widen(least, most, LEAST_SPAN)
    low = low - room if least < 0 else max(low - room, -room / 4)  # shares end at 0 and 100
    return low, high + room if most > 100 else min(high + room, 100 + room / 2)


def _explain(figure: Any, points: Sequence[TradeoffPoint], reference: TradeoffPoint) -> None:
    """Say below the picture what its lines mean."""
    covers = {point["covers"] for point in points if "covers" in point and _has_bars(point)}
    over = " or ".join(INTERVALS_OVER[name] for name in INTERVALS_OVER if name in covers)
    parts = [f"Bars: 95 % intervals over {over}."] if over else []
    parts.append(f"Dashed: {_cut(reference['label'])}.")
    figure.text(0.995, 0.005, " ".join(parts), ha="right", va="bottom", fontsize=8, color=QUIET)
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))


def _has_bars(point: TradeoffPoint) -> bool:
    return any(_error_bars(point, axis) is not None for axis in "xy")


def _cut(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _write_labels(
    figure: Any,
    axes: Any,
    points: Sequence[TradeoffPoint],
    curves: Mapping[str, Sequence[TradeoffPoint]],
    styles: Styles,
) -> None:
    """Write each series' name beside its first point, and each step's beside the step, where nothing else is."""
    wanted = list({_series_of(point): (point, 9.5) for point in reversed(points)}.values())[::-1]
    wanted += [({**step, "series": name}, 8.5) for name, steps in curves.items() for step in steps if step["label"]]
    figure.draw_without_rendering()  # now the axes have their place
    to_pixels = axes.transData.transform
    taken = [_around(to_pixels((100 * point["x"], 100 * point["y"])), 13, 13) for point, _ in wanted]
    left, bottom, right, top = axes.bbox.extents
    x, y = to_pixels((100 * points[0]["x"], 100 * points[0]["y"]))
    taken += [np.array([x - 1, bottom, x + 1, top]), np.array([left, y - 1, right, y + 1])]  # through the reference
    for point in [*points, *(step for steps in curves.values() for step in steps if step["label"])]:
        for axis in "xy":
            if (bars := _error_bars(point, axis)) is not None:
                ends = [[100 * point["x"], 100 * point["y"]] for _ in range(2)]
                ends[0]["xy".index(axis)] -= bars[0, 0]
                ends[1]["xy".index(axis)] += bars[1, 0]
                taken.append(np.concatenate(to_pixels(ends)) + [-2, -2, 2, 2])
    for steps in curves.values():
        places = to_pixels([[100 * step["x"], 100 * step["y"]] for step in steps])
        for start, end in zip(places, places[1:], strict=False):
            taken += [_around(start + share * (end - start), 3, 3) for share in np.linspace(0, 1, 12)]
    for point, size in wanted:
        label = textwrap.fill(_cut(point["label"], 60), 28)
        colour = styles[_series_of(point)]["color"]
        text = axes.annotate(label, (100 * point["x"], 100 * point["y"]), (0, 0), textcoords="offset pixels",
                             fontsize=size, color=colour, ha="center", va="center", zorder=5)  # fmt: skip
        taken.append(_place(text, to_pixels(text.xy), axes.bbox.extents, taken))


def _around(centre: Any, half_width: float, half_height: float) -> np.ndarray:
    """A box (4,) in pixels: left, bottom, right, top."""
    x, y = centre
    return np.array([x - half_width, y - half_height, x + half_width, y + half_height])


def _place(text: Any, point: np.ndarray, frame: np.ndarray, taken: Sequence[np.ndarray]) -> np.ndarray:
    """Move a text near its point to where it covers least of what is taken; a far one gets a thin line to the point.

    Returns:
        `np.ndarray` of shape `(4,)`: The text's box in pixels.
    """
    box = text.get_window_extent()
    half = np.array([box.width, box.height]) / 2
    others = np.array(taken)
    best: tuple[float, np.ndarray, int] = (math.inf, point, 0)
    for distance in (12, 21, 34, 52, 76, 105, 145):  # pixels
        for side in product((1, 0, -1), repeat=2):
            if side == (0, 0):
                continue
            centre = point + side * (half + distance / math.hypot(*side))
            place = _around(centre, *half)
            overlap = np.minimum(place[2:] + 2, others[:, 2:]) - np.maximum(place[:2] - 2, others[:, :2])
            covered = overlap.clip(min=0).prod(axis=1)
            outside = float((frame[:2] - place[:2]).clip(min=0).sum() + (place[2:] - frame[2:]).clip(min=0).sum())
            # A thin bar through a name covers little of it and makes it as hard to read as a wide one.
            cost = 2 * covered.sum() + 200 * (covered > 0).sum() + 100 * outside + 4 * distance
            if cost < best[0]:
                best = (cost, centre, distance)
    _, centre, distance = best
    text.set_position(centre - point)
    if distance > 21:
        start = np.clip(point, centre - half, centre + half)  # where the box is nearest
        text.axes.annotate("", text.xy, start - point, textcoords="offset pixels", zorder=4,
                           arrowprops={"arrowstyle": "-", "color": text.get_color(), "lw": 0.7, "shrinkA": 1,
                                       "shrinkB": 5})  # fmt: skip
    return _around(centre, *half)


def _check_points(points: Sequence[TradeoffPoint], keys: Sequence[str], least: int = 1, where: str = "") -> None:
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
    note: str | None = None,
) -> None:
    """Draw region boxes over an image, wider where the weight is larger, and beside it which token looks at which
    region: the colours show what is more and less than an even share, and the numbers how little or much that is.

    Args:
        image (`PIL.Image.Image`): The whole image.
        boxes (array of shape `(R, 4)`): xyxy in pixels of `image`.
        weights (array of shape `(R,)`): >= 0, e.g. the teacher's `region_weights`.
        caption (`str`): Written above.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        token_attention (array of shape `(T, R)`, *optional*): >= 0, e.g. `text_to_image_attentions` averaged over
            heads.
        tokens (`Sequence[str]`, *optional*): T labels; the caption's words where their number is T, else numbers.
        note (`str`, *optional*): Written below: what the percentages at the boxes are.

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

    height = 4.6 if attention is None else max(4.6, 1.2 + 0.2 * len(attention))
    figure = new_figure(4.4 if attention is None else 5.4 + 0.55 * regions + 1.2, height)
    if attention is None:
        axes = figure.add_subplot()
    else:
        axes, beside = figure.subplots(1, 2, width_ratios=(1, max(0.45, 0.14 * regions)))
        _draw_attention(figure, beside, attention, tokens)
    _draw_regions(axes, image, boxes, weights)
    if note is not None:
        axes.set_title(textwrap.fill(note, 56), y=-0.05, va="top", fontsize=9, color=QUIET)
    figure.suptitle(textwrap.fill(caption, 44 if attention is None else 72), fontsize=11, color=INK)
    save_figure(figure, path)


def _draw_regions(axes: Any, image: PILImage.Image, boxes: np.ndarray, weights: np.ndarray) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    axes.imshow(image.convert("RGB"), interpolation="nearest" if min(image.size) < 200 else "antialiased")
    strongest = weights.max() or 1.0
    for index in np.argsort(weights):  # the strongest on top
        x1, y1, x2, y2 = boxes[index]
        colour = SERIES_COLOURS[1 + index % (len(SERIES_COLOURS) - 1)]
        width = 1.2 + 1.8 * weights[index] / strongest
        halo = [Stroke(linewidth=width + 1.4, foreground="white"), Normal()]  # seen on any picture
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=width, path_effects=halo))
        inside = min((x2 - x1) / image.width, (y2 - y1) / image.height) > 0.25  # a small box it would cover
        above = not inside and y1 > 0.08 * image.height  # else there is no room
        axes.annotate(
            f" {index}: {100 * weights[index]:.0f}% ",
            (x1, y1 if above or inside else y2),
            (3, -3) if inside else (0, 3 if above else -3),
            textcoords="offset points",
            fontsize=9.5,
            color="white",
            weight="bold",
            ha="left",
            va="bottom" if above else "top",
            bbox={"fc": colour, "ec": "white", "lw": 0.8, "pad": 1.5},
        )
    axes.set_axis_off()


def _draw_attention(figure: Any, axes: Any, attention: np.ndarray, tokens: Sequence[str]) -> None:
    """Draw tokens by regions in colours around the even share; its numbers in percent, if there are not too many."""
    is_share = np.allclose(attention.sum(axis=1), 1, atol=0.01)
    middle = 1 / attention.shape[1] if is_share else float(attention.mean())
    reach = max(float(np.abs(attention - middle).max()), 1e-3)
    picture = axes.imshow(attention, cmap="PuOr_r", vmin=middle - reach, vmax=middle + reach, aspect="auto")
    digits = 1 if reach < 0.05 else 0
    if attention.size <= 240 and attention.shape[1] <= 12:
        for (row, column), value in np.ndenumerate(attention):
            far = abs(value - middle) > 0.7 * reach
            axes.text(column, row, f"{100 * value:.{digits}f}", fontsize=8, ha="center", va="center",
                      color="white" if far else INK)  # fmt: skip
    axes.set_xticks(range(attention.shape[1]))
    axes.set_yticks(range(len(tokens)), tokens, fontsize=9)
    axes.set_xlabel("region", color=INK)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    ends = [middle - reach, middle, middle + reach]
    label = f"attention (%), white: {'an even share' if is_share else 'the mean'}"
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, ticks=ends)
    bar.set_label(label, fontsize=9, color=INK)
    bar.set_ticklabels([f"{100 * end:.{digits}f}" for end in ends])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, length=0)


def plot_growth(
    series: Mapping[str, Sequence[tuple[float, Cost]]],
    path: str | os.PathLike,
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
) -> None:
    """Draw costs against the size of the input on logarithmic axes, where a power is a straight line.

    Args:
        series (`Mapping[str, Sequence[tuple[float, Cost]]]`): By label, sizes and their costs, all > 0.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        x_label, y_label, title (`str`, *optional*): Texts at the axes and above.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no series, one is empty or has a value that is not positive and finite, or the file is
            no `.png`.
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

    colours = SERIES_COLOURS[1:]  # grey is the anchor's
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


def plot_image_maps(pictures: Any, maps: Mapping[str, Any], texts: Sequence[str], path: str | os.PathLike) -> None:
    """Draw maps over pictures: a row a picture, the bare one first; under each column the values at both ends of its
    colours, which all pictures share. A field of a map is drawn as it is, without smoothing.

    Args:
        pictures (array of shape `(B, H, W, 3)`): In [0, 1].
        maps (`Mapping[str, array]`): By name, each `(B, rows, columns)`, laid over the whole picture.
        texts (`Sequence[str]`): B, written beside the pictures.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If counts differ, there is nothing to draw, or a value is not finite.
    """
    pictures = np.asarray(pictures, dtype=float)
    maps = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    if pictures.ndim != 4 or not len(pictures) or len(texts) != len(pictures) or not maps:
        raise ValueError(
            f"Expected pictures (B, H, W, 3), B texts and one map or more, got {pictures.shape}, {len(texts)} and "
            f"{len(maps)}."
        )
    for name, values in maps.items():
        if values.ndim != 3 or len(values) != len(pictures) or not np.isfinite(values).all():
            raise ValueError(
                f"Expected finite values ({len(pictures)}, rows, columns) in the map {name!r}, got shape "
                f"{values.shape}."
            )
    columns = 1 + len(maps)
    figure = new_figure(1.9 * columns, 2.4 * len(pictures) + 0.6)
    rows = [*(1 for _ in pictures), 0.06]  # the last one for the scales
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows)
    height, width = pictures.shape[1:3]
    for row, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        axes[row, 0].imshow(picture)
        label = textwrap.fill(textwrap.shorten(text, 90, placeholder="…"), 24)
        axes[row, 0].set_xlabel(label, fontsize=9, color=INK)
    for column, (name, values) in enumerate(maps.items(), 1):
        low, high = values.min(), values.max()
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(0.25 + 0.75 * np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2))
            drawn = axes[row, column].imshow(
                values[row],
                cmap="YlOrRd",
                alpha=0.65,
                interpolation="nearest",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                vmin=low,
                vmax=high if high > low else low + 1,
            )
        axes[0, column].set_title(textwrap.fill(MAP_TITLES.get(name, name), 20), fontsize=10, color=INK)
        bar = figure.colorbar(drawn, cax=axes[-1, column], orientation="horizontal", ticks=[low, high])
        bar.set_ticklabels([f"{low:.2g}", f"{high:.2g}"], fontsize=9, color=INK)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
    axes[-1, 0].set_axis_off()
    for place in axes[:-1].flat:
        place.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        place.spines[:].set_visible(False)
    save_figure(figure, path)


def _quiet_axes(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK, length=0)


def plot_bars(panels: Mapping[str, Sequence[Bar]], path: str | os.PathLike, *, styles: Styles | None = None) -> None:
    """Draw values as horizontal bars from zero, with their intervals as lines; one panel for each metric, side by
    side.

    Args:
        panels (`Mapping[str, Sequence[Bar]]`): By heading, the bars from top to bottom, with the same labels in every
            panel.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        styles (`Mapping`, *optional*): By series, as in [`plot_tradeoff`].

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
    styles = _style_series((_series_of(bar) for bar in next(iter(panels.values()))), styles)
    names = [textwrap.fill(_cut(label, 72), 36) for label in labels[0]]
    width = max(len(line) for name in names for line in name.splitlines())
    lines = sum(max(1.25, 0.75 * len(name.splitlines())) for name in names)
    figure = new_figure(0.5 + 0.075 * width + 2.4 * len(panels), 0.8 + 0.22 * lines)
    for axes, (heading, bars) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for place, bar in enumerate(bars):
            if bar["value"] is None:
                continue
            colour = styles[_series_of(bar)]["color"]
            axes.barh(place, bar["value"], height=0.62, color=colour, alpha=0.28)
            ends = [bar.get("low"), bar.get("high")]
            if None not in ends:
                axes.plot(ends, [place, place], color=colour, lw=1.8, solid_capstyle="butt")
            right = max(0, bar["value"], *(end for end in ends if end is not None))
            axes.annotate(
                bar["text"], (right, place), (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK
            )
        axes.set_yticks(range(len(bars)), names)
        axes.set_xlabel(heading, color=INK, fontsize=9)
        axes.margins(x=0.2, y=0.02)
        _quiet_axes(axes, "x")
    axes.invert_yaxis()
    save_figure(figure, path)


def plot_suite(
    values: Mapping[str, Mapping[str, float]],
    path: str | os.PathLike,
    *,
    styles: Styles | None = None,
    x_label: str = "zero-shot top-1 (%)",
) -> None:
    """Draw several models on many datasets: a row for each dataset, a dot for each model, the easiest dataset on top.

    Args:
        values (`Mapping[str, Mapping[str, float]]`): Model -> dataset -> share in [0, 1]. A model may lack datasets.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        styles (`Mapping`, *optional*): By model, as in [`plot_tradeoff`].
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
    styles = _style_series(values, styles)
    for model, row in values.items():
        places = [place for place, name in enumerate(datasets) if name in row]
        xs = [100 * row[datasets[place]] for place in places]
        axes.plot(xs, places, ls="", ms=6.5, mec="white", mew=0.7, label=model, zorder=2, **styles[model])
    axes.set_yticks(range(len(datasets)), datasets)
    axes.set_ylim(len(datasets) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(_widen(low, high, 2 * LEAST_SPAN))
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    _quiet_axes(axes, "both")
    widest = max(map(len, values))
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=max(1, min(3, 90 // (widest + 4))))
    save_figure(figure, path)


class _Curve(NamedTuple):
    """Points of one logged number: the optimiser's steps, and the values."""

    steps: list[float]
    values: list[float]


def _read_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, _Curve]:
    """The curves of a log by name: losses, and the retrieval of the validation part."""
    curves: dict[str, _Curve] = {}
    for entry in log_history:
        for name, value in entry.items():
            is_loss = name != "train_loss" and (name == "loss" or name.endswith("_loss"))
            is_share = name in RETRIEVAL_TERMS or _name_probe(name) is not None
            if "step" not in entry or not (is_loss or is_share):
                continue
            if not math.isfinite(value):
                what = "losses" if is_loss else "numbers"
                raise ValueError(f"Expected finite {what}, got {name}={value} at step {entry['step']}.")
            curve = curves.setdefault(name, _Curve([], []))
            curve.steps.append(entry["step"])
            curve.values.append(100 * value if is_share else value)
    return curves


def _name_probe(name: str) -> str | None:
    """A number of a probe as words: `probe_zero_shot_top1` is "zero-shot top-1"; `None` of what is no share in [0, 1],
    and so has no place on an axis in percent.
    """
    if name == _RETENTION:
        return "retention"
    match = _PROBE.fullmatch(name)
    if match is None or metric_of(match[3]).unit != "%":
        return None
    return f"{match[1].replace('_', '-')}{(match[2] or '').replace('_', ' ')} {metric_of(match[3]).title}"


def _name_term(term: str) -> str:
    """A term as words: `cosine_distillation_loss` is "cosine distillation"."""
    return "total" if term == "loss" else term.removesuffix("_loss").replace("_", " ")


def _split_terms(curves: Mapping[str, _Curve]) -> tuple[dict[str, str], dict[str, str]]:
    """The terms of the first panel (total and contrastive losses) and of the second, each with its name."""
    names = {
        name.removeprefix("eval_"): "" for name in curves if name not in RETRIEVAL_TERMS and _name_probe(name) is None
    }
    terms = {term: _name_term(term) for term in sorted(names, key=lambda term: (term != "loss", term))}
    others = [term for term in terms if term != "loss"]
    if "loss" in terms and len(others) == 1:
        pairs = [(curves.get(f"{part}loss"), curves.get(f"{part}{others[0]}")) for part in ("", "eval_")]
        if all((one is None) == (two is None) for one, two in pairs) and all(
            one.steps == two.steps and np.allclose(one.values, two.values, rtol=1e-4)
            for one, two in pairs
            if one is not None and two is not None
        ):  # the total is this term: one line, not two on top of each other
            del terms["loss"]
            terms[others[0]] = f"total = {terms[others[0]]}"
            return terms, {}
    first = {term: name for term, name in terms.items() if term == "loss" or term.endswith("contrastive_loss")}
    rest = {term: name for term, name in terms.items() if term not in first}
    return (first, rest) if first else (rest, {})


def _draw_term(axes: Any, curve: _Curve, colour: str, measured: bool) -> int:
    """Draw a term: validation dashed, training solid. Of many training points, all are drawn thin, and their running
    median thick.

    Returns:
        `int`: Points of the running median; 0 if there is none.
    """
    count = len(curve.steps)
    if measured:
        axes.plot(*curve, color=colour, **(VALIDATION if count <= 60 else {**VALIDATION, "marker": ""}))
        return 0
    if count <= MANY_POINTS:
        axes.plot(*curve, color=colour, lw=1.6, marker="o" if count <= 12 else "", ms=3)
        return 0
    width = count // 40 | 1  # odd
    axes.plot(*curve, color=colour, lw=0.6, alpha=0.4)
    middles = np.median(np.lib.stride_tricks.sliding_window_view(np.array(curve.values), width), axis=1)
    axes.plot(curve.steps[width // 2 : count - width // 2], middles, color=colour, lw=1.8)
    return width


def _draw_terms(axes: Any, curves: Mapping[str, _Curve], terms: Mapping[str, str]) -> int:
    """Draw the terms of a panel with their legend at the right.

    Returns:
        `int`: As [`_draw_term`].
    """
    from matplotlib.lines import Line2D

    colours = dict(TERM_COLOURS)
    spare = [colour for colour in SERIES_COLOURS if colour not in colours.values()]
    for index, term in enumerate(term for term in terms if term not in colours):
        colours[term] = spare[index % len(spare)]
    width = 0
    for term in terms:
        for name in (term, f"eval_{term}"):
            if name in curves:
                width = max(width, _draw_term(axes, curves[name], colours[term], name != term))
    lines = [Line2D([], [], color=colours[term], lw=2, label=name) for term, name in terms.items()]
    _legend_at_right(axes, lines)
    return width


def _legend_at_right(axes: Any, lines: Sequence[Any]) -> None:
    axes.legend(
        handles=lines, loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=9, labelcolor=INK,
        borderaxespad=0, handlelength=2.2,
    )  # fmt: skip


def _draw_retrieval(axes: Any, curves: Mapping[str, _Curve], images: int | None) -> None:
    """Draw the retrieval of the validation part, on an axis of ten points or more: less is noise; and what a guess of
    one of its images finds.
    """
    from matplotlib.lines import Line2D

    lines = []
    for index, (name, title) in enumerate(RETRIEVAL_TERMS.items()):
        if name in curves:
            _draw_term(axes, curves[name], RETRIEVAL_COLOURS[index], True)
            lines.append(Line2D([], [], color=RETRIEVAL_COLOURS[index], lw=2, label=title))
    if images:
        axes.axhline(100 / images, color=QUIET, lw=1, ls="--", zorder=1)
        lines.append(Line2D([], [], color=QUIET, lw=1, ls="--", label=f"chance: 1 of {images:,}"))
    low, high = axes.get_ylim()
    axes.set_ylim(_widen(low, high, 10))
    axes.set_ylabel("validation R@1 (%)", color=INK, fontsize=9)
    _legend_at_right(axes, lines)


def _draw_probe(axes: Any, curves: Mapping[str, _Curve]) -> None:
    """Draw what benchmarks measured while training, on an axis of ten points or more."""
    from matplotlib.lines import Line2D

    lines = []
    for index, (name, curve) in enumerate(curves.items()):
        style = {
            "color": SERIES_COLOURS[1 + index % (len(SERIES_COLOURS) - 1)],
            "marker": MARKERS[index % len(MARKERS)],
        }
        axes.plot(*curve, lw=1.6, ms=4.5, **style)
        lines.append(Line2D([], [], lw=2, ms=4.5, label=_name_probe(name), **style))
    low, high = axes.get_ylim()
    axes.set_ylim(_widen(low, high, 10))
    axes.set_ylabel("probe (%)", color=INK, fontsize=9)
    _legend_at_right(axes, lines)


def _draw_retention(axes: Any, curve: _Curve, least: float | None) -> None:
    """Draw the share of zero-shot accuracy that is left, in percent, and the least share that training may leave."""
    from matplotlib.lines import Line2D

    axes.plot(*curve, color=INK, lw=1.6, marker="o", ms=4.5)
    lines = [Line2D([], [], color=INK, lw=2, marker="o", ms=4.5, label="retention")]
    if least is not None:
        axes.axhline(100 * least, color=QUIET, lw=1, ls="--", zorder=1)
        lines.append(Line2D([], [], color=QUIET, lw=1, ls="--", label=f"keep_retention: {100 * least:g} %"))
    low, high = axes.get_ylim()
    axes.set_ylim(_widen(low, high, 10))
    axes.set_ylabel("retention (%)", color=INK, fontsize=9)
    _legend_at_right(axes, lines)


def _widen(low: float, high: float, least: float) -> tuple[float, float]:
    """Limits in percent at least so far apart; not below zero if the values are not."""
    middle, half = (low + high) / 2, max(high - low, least) / 2
    shift = max(0.0, half - middle) if low >= 0 else 0.0
    return middle - half + shift, middle + half + shift


def plot_training(
    log_history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    title: str | None = None,
    best_step: int | None = None,
    validation_images: int | None = None,
    keep_retention: float | None = None,
) -> None:
    """Draw what a training logged against the optimiser's step, one panel below the other.

    The first panel has the total and the contrastive loss, the second the other terms, the third the retrieval of the
    validation part, the fourth the benchmarks that were measured on the way (shares in [0, 1] alone), the fifth what
    is left of their zero-shot accuracy; a panel without numbers is left out. A term has the same colour in every
    picture: solid in training, dashed in validation. Of more than [`MANY_POINTS`] training points a running median is
    drawn over them, which the legend says.

    Args:
        log_history (`Sequence[dict]`): A trainer's `state.log_history`, or that of its `trainer_state.json`: entries
            with `step` and losses, `loss`, `<what>_loss`, `eval_loss`, numbers of [`RETRIEVAL_TERMS`], and of
            benchmarks `probe_KIND_METRIC` and `probe_retention`. The last entry's `train_loss`, a mean over all steps,
            is no point of a curve and is left out.
        path (`str` or `os.PathLike`): A `.png` file, written whole or not at all.
        title (`str`, *optional*): Above the picture.
        best_step (`int`, *optional*): The step whose weights were kept; marked in every panel.
        validation_images (`int`, *optional*): Of the validation part; chance is drawn beside its retrieval.
        keep_retention (`float`, *optional*): The retention below which the training ends, in (0, 1].

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If no entry has a step and a loss, a number is not finite (the step is named), or the file is no
            `.png`.
    """
    curves = _read_curves(log_history)
    parts = [terms for terms in _split_terms(curves) if terms]
    if not parts:
        raise ValueError(f"Expected entries with 'step' and a loss, got {len(log_history)} without.")
    draws = _plan_measured(curves, validation_images, keep_retention)
    heights = [*(2.7 if index == 0 else 1.9 for index in range(len(parts))), *(1.6 for _ in draws)]
    figure = new_figure(8.0, 0.7 + sum(heights))
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    width = 0
    for index, (axes, terms) in enumerate(zip(panels, parts, strict=False)):
        width = max(width, _draw_terms(axes, curves, terms))
        axes.set_ylabel("loss" if index == 0 else "other terms", color=INK, fontsize=9)
    for axes, draw in zip(panels[len(parts) :], draws, strict=True):
        draw(axes)
    thick = f" (thin: every point; thick: median of {width})" if width else ""
    keys = [Line2D([], [], color=QUIET, lw=1.6, label=f"training{thick}")]
    if any(name.startswith("eval_") for name in curves):
        keys.append(Line2D([], [], color=QUIET, label="validation", **VALIDATION))
    if best_step is not None:
        for axes in panels:
            axes.axvline(best_step, color=INK, lw=1, ls=":", zorder=1)
        keys.append(Line2D([], [], color=INK, lw=1, ls=":", label=f"kept: step {best_step:,}"))
    for axes in panels:
        _quiet_axes(axes, "both")
    panels[-1].set_xlabel(_name_steps(log_history), color=INK, fontsize=9)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panels[0].set_title(title or "", loc="left", color=INK, fontsize=11)
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, path)


def _plan_measured(
    curves: Mapping[str, _Curve], images: int | None, least: float | None
) -> list[Callable[[Any], None]]:
    """What draws each panel below the losses, where there is something to draw."""
    draws: list[Callable[[Any], None]] = []
    if any(name in curves for name in RETRIEVAL_TERMS):
        draws.append(lambda axes: _draw_retrieval(axes, curves, images))
    probed = {name: curve for name, curve in curves.items() if name != _RETENTION and _name_probe(name) is not None}
    if probed:
        draws.append(lambda axes: _draw_probe(axes, probed))
    if _RETENTION in curves:
        draws.append(lambda axes: _draw_retention(axes, curves[_RETENTION], least))
    return draws


def _name_steps(log_history: Sequence[Mapping[str, Any]]) -> str:
    """The title of the axis of steps: it says how many there were, and epochs."""
    steps = max(entry["step"] for entry in log_history if "step" in entry)
    epochs = max((entry["epoch"] for entry in log_history if "epoch" in entry), default=None)
    if epochs is None:
        return f"step ({steps:,})"
    shown = f"{epochs:,.1f}".removesuffix(".0")
    return f"step ({steps:,} in {shown} epoch{'s' * (shown != '1')})"


def draw_training_curves(folder: str | os.PathLike) -> list[Path]:
    """Draw what each training stage logged into `training_curves.png` in the stage's folder.

    The step whose weights the stage kept is marked if the trainer's state names it: `probe_kept_step` of the last
    entry of its log, or else `best_global_step`. A picture that is newer than its numbers stays.

    Args:
        folder (`str` or `os.PathLike`): Of a run, with a folder for each stage, or for each arm, seed and stage.

    Returns:
        `list[Path]`: The pictures drawn now: none without matplotlib, which a log line says, and none for a stage that
            logged no loss.

    Raises:
        ValueError: If a number is not finite, or a trainer's state is not valid JSON.
    """
    found = [path for depth in ("*", "*/seed-*/*") for path in list_folder(folder, f"{depth}/{STATE_NAME}")]
    states = [path for path in found if _is_stale(path)]
    if states and importlib.util.find_spec("matplotlib") is None:
        logger.info("Training curves are not drawn: matplotlib is not installed.")
        return []
    drawn = []
    for path in states:
        state = read_json(path, "trainer's state", ["log_history"])
        log_history = state["log_history"]
        if not any("loss" in entry or "eval_loss" in entry for entry in log_history):
            continue
        drawn.append(path.with_name(CURVES_NAME))
        title = ", ".join(path.parent.relative_to(folder).parts)
        kept = next((log[_KEPT] for log in log_history if _KEPT in log), state.get("best_global_step"))
        options = {"best_step": kept, "validation_images": _count_validated(path.parent)}
        trained = (read_training(path.parent) or {}).get("student", {})
        options |= {name: trained[name] for name in ("keep_retention",) if name in trained}
        plot_training(log_history, drawn[-1], title=title, **options)
    return drawn


def _count_validated(folder: Path) -> int | None:
    """The images of the validation part, as the manifest of a finished stage says; `None` where it does not."""
    path = folder / MANIFEST_NAME
    told = read_json(path, "manifest", []).get("counts", {}) if path.is_file() else {}
    return told.get("validation", {}).get("images")


def _is_stale(state: Path) -> bool:
    picture = state.with_name(CURVES_NAME)
    return not picture.exists() or picture.stat().st_mtime_ns < state.stat().st_mtime_ns
