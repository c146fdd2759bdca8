"""Pictures are whole PNG files that hold what they were given; bad input is named; matplotlib is asked for late."""

import ast
import builtins
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_dclip.distillation import losses
from modeling_dclip.evaluation.reports import plots
from modeling_dclip.evaluation.reports import plots as figures_module
from modeling_dclip.evaluation.reports import plots as report_plots
from modeling_dclip.evaluation.reports.plots import plot_growth, plot_region_attention, plot_tradeoff

POINTS = [
    {"label": "anchor", "x": 1.0, "y": 0.19},
    {
        "label": "student",
        "x": 0.95,
        "y": 0.23,
        "x_interval": (0.93, 0.97),
        "y_interval": (0.22, 0.24),
        "covers": "images",
    },
]
CURVE = [
    {"label": "α 0.5" if alpha == 0.5 else "", "x": 1 - 0.05 * alpha, "y": 0.19 + 0.04 * alpha}
    for alpha in (0, 0.5, 1)
]
PICTURE = Image.new("RGB", (60, 40), "white")
BOXES = [[5, 5, 25, 30], [30, 10, 55, 35]]


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, in order."""
    drawn = []
    original = plots.save_figure

    def save(figure, path):
        drawn.append(figure)
        original(figure, path)

    for module in (plots, report_plots):
        monkeypatch.setattr(module, "save_figure", save)
    return drawn


def is_not_blank(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5


def names_in(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def test_tradeoff_shows_points_with_their_names_bars_and_the_curve(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_tradeoff(POINTS, tmp_path / "new" / "tradeoff.png", curves={"student": CURVE}, title="Title")
    assert is_not_blank(tmp_path / "new" / "tradeoff.png")
    axes = figures[0].axes[0]
    assert names_in(axes) == ["anchor", "student", "α 0.5"] and axes.get_legend() is None
    colour = plots.style_of(1)["color"]
    assert [text.get_color() for text in axes.texts if text.get_text()] == [plots.SERIES_COLOURS[0], colour, colour]
    line = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    assert np.allclose(line.get_xydata(), [[100, 19], [97.5, 21], [95, 23]]) and line.get_color() == colour
    bars = {
        tuple(np.round(segment.flatten(), 6))
        for c in axes.containers
        if c.has_xerr
        for b in c[2]
        for segment in b.get_segments()
    }
    assert bars == {(93, 23, 97, 23), (95, 22, 95, 24)}
    low, high = axes.get_xlim()
    assert low < 93 and high > 100
    assert [text.get_text() for text in figures[0].texts] == ["Bars: 95 % intervals over test images. Dashed: anchor."]


def test_noise_does_not_fill_the_picture(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    near = [{"label": name, "x": 0.2 + 0.001 * i, "y": 0.017 + 0.0001 * i} for i, name in enumerate("abc")]
    plot_tradeoff(near, tmp_path / "a.png")
    for low, high in (figures[0].axes[0].get_xlim(), figures[0].axes[0].get_ylim()):
        assert high - low >= plots.LEAST_SPAN
    assert -0.5 < figures[0].axes[0].get_ylim()[0] < 0  # no share is negative


def boxes_of(axes):
    return [text.get_window_extent() for text in axes.texts if text.get_text()]


def test_no_name_lies_on_an_interval_of_any_point(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    points = [
        {"label": f"model {name}", "series": series, "x": x, "y": y, "x_interval": (x - 0.02, x + 0.02),
         "y_interval": (y - 0.02, y + 0.02)}
        for name, series, x, y in (("a", "a", 0.927, 0.31), ("b", "b", 0.942, 0.309), ("c", "c", 0.926, 0.31),
                                   ("d", "c", 0.921, 0.329), ("e", "c", 0.905, 0.313))
    ]  # fmt: skip
    plot_tradeoff(points, tmp_path / "a.png")
    axes = figures[0].axes[0]
    ends = [
        [(x - 0.02, y), (x + 0.02, y), (x, y - 0.02), (x, y + 0.02)] for x, y in ((p["x"], p["y"]) for p in points)
    ]
    for point in ends:
        left, right, bottom, top = axes.transData.transform(100 * np.array(point))
        for box in boxes_of(axes):
            assert not (box.y0 < left[1] < box.y1 and box.x0 < right[0] and box.x1 > left[0])
            assert not (box.x0 < bottom[0] < box.x1 and box.y0 < top[1] and box.y1 > bottom[1])


def test_names_do_not_overlap_even_where_points_do(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    points = [
        {"label": f"model number {i}", "x": 0.9 + 0.002 * (i % 3), "y": 0.3, "x_interval": (0.89, 0.91)}
        for i in range(8)
    ]
    plot_tradeoff(points, tmp_path / "a.png")
    axes = figures[0].axes[0]
    boxes = boxes_of(axes)
    assert len(boxes) == 8
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    frame = axes.get_window_extent()
    assert all(box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


def test_a_given_style_is_kept_and_no_other_series_takes_it(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    styles = {"student": plots.style_of(3)}
    plot_tradeoff([*POINTS, {"label": "x", "x": 0.9, "y": 0.2}], tmp_path / "a.png", styles=styles)
    panels = {"T→I": [bar("student, alpha=0.5", 20.0, series="student"), bar("x", 30.0)]}
    report_plots.plot_bars(panels, tmp_path / "b.png", styles=styles)
    report_plots.plot_suite({"student": {"easy": 0.9}}, tmp_path / "c.png", styles=styles)
    tradeoff, bars, suite = (figure.axes[0] for figure in figures)
    colours = [container[0].get_color() for container in tradeoff.containers]
    assert colours[1] == plots.style_of(3)["color"] and len(set(colours)) == 3
    assert matplotlib_colour(bars.patches[0]) == plots.style_of(3)["color"] != matplotlib_colour(bars.patches[1])
    assert suite.lines[-1].get_color() == plots.style_of(3)["color"]


def matplotlib_colour(patch):
    from matplotlib.colors import to_hex

    return to_hex(patch.get_facecolor())


def test_points_without_intervals_are_drawn_without_bars(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_tradeoff([POINTS[0], {**POINTS[1], "x_interval": (None, None), "y_interval": None}], tmp_path / "a.png")
    assert not any(container.has_xerr or container.has_yerr for container in figures[0].axes[0].containers)


def test_regions_are_drawn_where_they_are_with_their_weights(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    attention = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    plot_region_attention(PICTURE, BOXES, [0.25, 0.75], "two red dogs", tmp_path / "a.png", attention)
    assert is_not_blank(tmp_path / "a.png")
    axes, beside = figures[0].axes[:2]
    assert [patch.get_bbox().extents.tolist() for patch in axes.patches] == BOXES
    assert [text.get_text().strip() for text in axes.texts] == ["0: 25%", "1: 75%"]
    assert all(text.get_fontsize() >= 9 and text.get_position()[1] in (3, -3) for text in axes.texts)
    assert axes.patches[1].get_linewidth() > axes.patches[0].get_linewidth()
    assert [label.get_text() for label in beside.get_yticklabels()] == ["two", "red", "dogs"]
    assert np.array_equal(beside.images[0].get_array(), attention)
    assert [text.get_text() for text in beside.texts] == ["90", "10", "20", "80", "50", "50"]


def test_the_scale_of_attention_is_around_an_even_share_and_stated(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    attention = np.array([[0.52, 0.48], [0.49, 0.51]])
    plot_region_attention(PICTURE, BOXES, [0.25, 0.75], "red dogs", tmp_path / "a.png", attention, note="What it is.")
    axes, beside, bar = figures[0].axes
    assert beside.images[0].get_clim() == pytest.approx((0.48, 0.52))
    assert [label.get_text() for label in bar.get_yticklabels()] == ["48.0", "50.0", "52.0"]
    assert bar.get_ylabel() == "attention (%), white: an even share" and axes.get_title() == "What it is."
    assert [text.get_text() for text in beside.texts] == ["52.0", "48.0", "49.0", "51.0"]
    plot_region_attention(PICTURE, BOXES, [0.25, 0.75], "red dogs", tmp_path / "b.png", attention / 2)
    assert figures[1].axes[2].get_ylabel() == "attention (%), white: the mean"  # rows are no shares


def test_boxes_and_their_labels_are_seen_on_any_picture(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    width, height = PICTURE.size
    small = [[5, 0, 5 + width / 5, 9], [30, 20, 30 + width / 5, 29]]  # it would cover them: beside them
    large = [width / 3, height / 3, 2 * width / 3, 2 * height / 3]  # as of a grid: in its upper left corner
    plot_region_attention(PICTURE, [*small, large], [0.01, 0.49, 0.5], "dogs", tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert all(patch.get_path_effects() and patch.get_alpha() is None for patch in axes.patches)
    below, above, inside = sorted(axes.texts, key=lambda text: text.get_text())
    assert (below.xy, below.get_va(), above.xy, above.get_va()) == ((5, 9), "top", (30, 20), "bottom")
    assert (inside.xy, inside.get_va(), inside.get_position()) == ((width / 3, height / 3), "top", (3, -3))


def test_tokens_are_numbered_where_the_words_do_not_match(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_region_attention(PICTURE, BOXES[:1], [1.0], "two red dogs", tmp_path / "a.png", [[1.0], [0.0]])
    assert [label.get_text() for label in figures[0].axes[1].get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize(
    ("points", "steps", "message"),
    [
        ([], CURVE, "at least 1 point"),
        ([{"label": "a", "x": 1}], CURVE, r"keys .* in every point, got \['label', 'x'\] in point 0"),
        ([{"label": "a", "x": math.nan, "y": 1}], CURVE, "finite numbers, got x=nan"),
        (POINTS, [{"x": 1, "y": 1}], "'label'.* in point 0 of the curve 'student'"),
        (POINTS, [], "at least 1 point to draw of the curve 'student', got none"),
    ],
)
def test_bad_points_are_named(tmp_path, points, steps, message):
    with pytest.raises(ValueError, match=message):
        plot_tradeoff(points, tmp_path / "a.png", curves={"student": steps})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("boxes", "weights", "attention", "tokens", "message"),
    [
        (BOXES, [1.0], None, None, r"got \(2, 4\) and \(1,\)"),
        ([], [], None, None, "R >= 1"),
        (BOXES, [0.5, -0.5], None, None, "non-negative weights"),
        (BOXES, [0.5, math.nan], None, None, "finite, non-negative weights"),
        ([[0, 0, 1, math.inf], BOXES[0]], [0.5, 0.5], None, None, "finite boxes"),
        (BOXES, [0.5, 0.5], [[1.0, 0, 0]], None, r"of shape \(T, 2\), T >= 1, got \(1, 3\)"),
        (BOXES, [0.5, 0.5], [[1.0, 0]], ["a", "b"], "1 tokens, one per row of token_attention, got 2"),
    ],
)
def test_bad_regions_are_named(tmp_path, boxes, weights, attention, tokens, message):
    with pytest.raises(ValueError, match=message):
        plot_region_attention(PICTURE, boxes, weights, "a", tmp_path / "a.png", attention, tokens=tokens)


def test_only_png_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.raises(ValueError, match=r"a \.png file.*a\.pdf"):
        plot_tradeoff(POINTS, tmp_path / "a.pdf")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"modeling_dclip\[eval\]"):
        plot_tradeoff(POINTS, tmp_path / "a.png")


@pytest.mark.parametrize("module", [plots, report_plots, figures_module], ids=lambda module: module.__name__)
def test_matplotlib_is_imported_only_to_draw(module):
    body = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports and not any("matplotlib" in ast.unparse(node) for node in imports)


def cost(median):
    return {"median": median, "min": 0.9 * median, "max": 1.2 * median}


def test_growth_shows_every_series_on_logarithmic_axes(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    series = {"linear": [(224, cost(1.0)), (448, cost(4.0))], "worse": [(224, cost(2.0)), (448, cost(32.0))]}
    plot_growth(series, tmp_path / "growth.png", x_label="pixels a side", y_label="ms")
    assert is_not_blank(tmp_path / "growth.png")
    axes = figures[0].axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["linear", "worse"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["224", "448"]


@pytest.mark.parametrize(
    "series, message",
    [({}, "one or more series"), ({"a": []}, "series 'a'"), ({"a": [(1, cost(0.0))]}, "Expected positive, finite")],
)
def test_growth_refuses_what_logarithms_cannot_show(tmp_path, series, message):
    with pytest.raises(ValueError, match=message):
        plot_growth(series, tmp_path / "growth.png", x_label="", y_label="")


def test_a_curve_has_its_labels_beside_its_points(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    steps = [
        {"label": f"epoch {e}", "x": 1 - 0.02 * e, "y": 0.2 + 0.01 * e, "y_interval": (0.1, 0.4)} for e in (1, 2, 3)
    ]
    plot_tradeoff(POINTS, tmp_path / "a.png", curves={"student": steps, "other": steps[:2]})
    assert is_not_blank(tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert names_in(axes) == ["anchor", "student", "epoch 1", "epoch 2", "epoch 3", "epoch 1", "epoch 2"]


def test_points_of_one_label_are_one_series(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_tradeoff([*POINTS, {"label": "student", "x": 0.9, "y": 0.25}], tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert names_in(axes) == ["anchor", "student"]
    assert len({container[0].get_color() for container in axes.containers}) == 2


def test_many_series_differ_in_colour_or_marker():
    assert len({tuple(figures_module.style_of(index).values()) for index in range(57)}) == 57


def bar(label, value, **ends):
    return {"label": label, "value": value, "text": f"{value}", **ends}


def test_bars_start_at_zero_and_show_intervals(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    panels = {
        "T→I": [bar("a", 20.0), bar("b", 30.0, low=28.0, high=33.0)],
        "I→T": [bar("a", 1.0), {"label": "b", "value": None}],
    }
    report_plots.plot_bars(panels, tmp_path / "a.png")
    assert is_not_blank(tmp_path / "a.png")
    first, second = figures[0].axes
    assert [(patch.get_x(), patch.get_width()) for patch in first.patches] == [(0, 20.0), (0, 30.0)]
    assert [list(line.get_xdata()) for line in first.lines] == [[28.0, 33.0]]
    assert len(second.patches) == 1 and [text.get_text() for text in first.texts] == ["20.0", "30.0"]


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ({}, "one or more bars"),
        ({"x": []}, "one or more bars"),
        ({"x": [bar("a", 1.0)], "y": [bar("b", 1.0)]}, "same labels"),
        ({"x": [bar("a", math.nan)]}, "finite value, got nan for 'a' in 'x'"),
    ],
)
def test_bad_bars_are_named(tmp_path, panels, message):
    with pytest.raises(ValueError, match=message):
        report_plots.plot_bars(panels, tmp_path / "a.png")


def test_a_suite_has_a_row_a_dataset_the_easiest_on_top(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report_plots.plot_suite({"a": {"hard": 0.1, "easy": 0.9}, "b": {"hard": 0.2}}, tmp_path / "a.png")
    assert is_not_blank(tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["easy", "hard"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="finite values of models"):
        report_plots.plot_suite({}, tmp_path / "a.png")


LOSSES = [
    {"step": 10, "epoch": 1.0, "loss": 2.0, "contrastive_loss": 1.5, "cosine_distillation_loss": 0.5},
    {"step": 20, "epoch": 2.0, "loss": 1.0, "contrastive_loss": 0.6, "cosine_distillation_loss": 0.4},
    {"step": 20, "eval_loss": 1.2, "eval_contrastive_loss": 0.7, "eval_text_to_image_recall@1": 0.25},
    {"step": 20, "train_loss": 1.5, "train_runtime": 3.0},
]


def lines_of(axes, colour):
    return [line.get_xydata().tolist() for line in axes.lines if line.get_color() == colour]


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_term_has_one_colour_in_training_and_validation(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report_plots.plot_training(LOSSES, tmp_path / "a.png", title="Title", best_step=10)
    assert is_not_blank(tmp_path / "a.png")
    colours = report_plots.TERM_COLOURS
    first, second, third = figures[0].axes
    assert lines_of(first, colours["contrastive_loss"]) == [[[10, 1.5], [20, 0.6]], [[20, 0.7]]]
    assert [[10, 2.0], [20, 1.0]] in lines_of(first, colours["loss"]) and legend_of(first) == ["total", "contrastive"]
    assert lines_of(second, colours["cosine_distillation_loss"]) == [[[10, 0.5], [20, 0.4]]]
    assert legend_of(second) == ["cosine distillation"] and legend_of(third) == ["text to image"]
    assert lines_of(third, report_plots.RETRIEVAL_COLOURS[0]) == [[[20, 25.0]]]
    low, high = third.get_ylim()
    assert high - low >= 10 > 0  # a step of one point does not fill the panel
    assert third.get_xlabel() == "step (20 in 2 epochs)"
    keys = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert keys == ["training", "validation", "kept: step 10"]


def test_legends_lie_outside_the_panels(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report_plots.plot_training(LOSSES, tmp_path / "a.png")
    for axes in figures[0].axes:
        assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1


def test_a_total_that_is_its_only_term_is_one_line(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    log = [{"step": step, "loss": 1 / step, "contrastive_loss": 1 / step} for step in (1, 2)]
    report_plots.plot_training(log, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert legend_of(axes) == ["total = contrastive"] and len(axes.lines) == 1


def test_of_many_points_all_are_drawn_and_the_median_is_named(tmp_path, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    log = [{"step": step, "loss": 1.0 + step % 7, "contrastive_loss": 1.0} for step in range(1, 2001)]
    report_plots.plot_training(log, tmp_path / "a.png")
    every, median = lines_of(figures[0].axes[0], report_plots.TERM_COLOURS["loss"])
    assert len(every) == 2000 and {value for _, value in median} == {4.0}
    (key,) = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert key == "training (thin: every point; thick: median of 51)"


def test_every_loss_term_has_a_colour_of_its_own():
    colours = report_plots.TERM_COLOURS
    terms = {name for name in vars(losses) if name.endswith("_loss")}
    assert terms - {"sigmoid_contrastive_loss"} <= set(colours)  # that one is logged as contrastive_loss
    assert len(set(colours.values())) == len(colours)


def test_numbers_that_no_curve_can_show_are_named(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.raises(ValueError, match="'step' and a loss, got 1 without"):
        report_plots.plot_training([{"step": 1, "epoch": 1.0}], tmp_path / "a.png")
    with pytest.raises(ValueError, match="loss=nan at step 3"):
        report_plots.plot_training([{"step": 3, "loss": math.nan}], tmp_path / "a.png")
    with pytest.raises(ValueError, match="numbers, got eval_text_to_image_recall@1=nan at step 3"):
        report_plots.plot_training([{"step": 3, "eval_text_to_image_recall@1": math.nan}], tmp_path / "a.png")


def test_many_models_are_named_in_a_legend_and_their_steps_are_not(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    points = [{"label": f"model {i}", "x": 0.5 + i / 100, "y": 0.3} for i in range(plots.MOST_NAMED + 1)]
    curves = {"model 1": [{"label": "α 0.5", "x": 0.4, "y": 0.2}, {**points[1], "label": ""}]}
    for shown in (points, points[:-1]):
        plots.plot_tradeoff(shown, tmp_path / "picture.png", curves=curves)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [point["label"] for point in points]
    assert not drawn[0].axes[0].texts and not drawn[1].legends
    written = {text.get_text() for text in drawn[1].axes[0].texts} - {""}
    assert written == {*(point["label"] for point in points[:-1]), "α 0.5"}
