"""Points and curves from records."""

import pytest
from PIL import Image

from modeling_dclip.evaluation import arms
from modeling_dclip.evaluation.arms import interpolation_points as tradeoff_points
from modeling_dclip.evaluation.arms import plot_curve


def records(model, retrieval, top1, condition=None, **fields):
    interval = {"top1": {"estimate": top1, "low": top1 - 0.1, "high": top1 + 0.1}}
    shared = {"model": model, **fields} | ({"condition": condition} if condition else {})
    return [
        {**shared, "benchmark": "retrieval=a", "metrics": {"text_to_image_recall@1": retrieval}},
        {**shared, "benchmark": "zero_shot=b", "metrics": {"top1": top1}, "intervals": interval},
        {**shared, "benchmark": "zero_shot=other", "metrics": {"top1": 0.0}},
    ]


def test_each_model_is_a_point_with_the_anchor_first():
    points, curves = tradeoff_points([*records("m", 0.3, 0.8, label="ours"), *records("a", 0.2, 0.9)], anchor="a")
    assert curves == {}
    assert points == [
        {"label": "a", "x": 0.9, "y": 0.2, "x_interval": (0.8, 1.0), "covers": "images"},
        {"label": "ours", "x": 0.8, "y": 0.3, "x_interval": (pytest.approx(0.7), 0.9), "covers": "images"},
    ]


def test_alphas_become_a_curve_between_anchor_and_model(tmp_path):
    found = [*records("a", 0.2, 0.9), *records("m", 0.25, 0.88, "alpha=0.75"), *records("m", 0.22, 0.9, "alpha=0.5")]
    found += records("m", 0.3, 0.8)
    points, curves = tradeoff_points(found, anchor="a")
    assert [point["label"] for point in points] == ["a", "m"]
    assert [(step["label"], step["y"]) for step in curves["m"]] == [
        ("", 0.2),
        ("α 0.5", 0.22),
        ("α 0.75", 0.25),
        ("", 0.3),
    ]
    beyond = records("m", 0.4, 0.7, "alpha=1", settings={"student_alpha": 0.6})  # the student is an average itself
    _, curves = tradeoff_points([*found, *beyond], anchor="a")
    assert [step["y"] for step in curves["m"]] == [0.2, 0.22, 0.3, 0.25, 0.4]
    plot_curve(found, tmp_path / "c.png", anchor="a")
    assert Image.open(tmp_path / "c.png").size[0] > 300


def test_records_without_a_pair_or_with_two_lines_are_refused():
    with pytest.raises(ValueError, match="got 1 records without such a pair"):
        tradeoff_points(records("m", 0.3, 0.8)[:1])
    two = [*records("m", 0.3, 0.8, "alpha=0.5"), *records("k", 0.3, 0.8, "alpha=0.5")]
    with pytest.raises(ValueError, match=r"lines to \['k', 'm'\]"):
        tradeoff_points(two)


def test_the_picture_names_models_as_tables_do_never_by_their_path(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(arms, "plot_tradeoff", lambda points, path, **options: drawn.append((points, options)))
    found = [
        *records("/data/runs/mine/student", 0.3, 0.8),
        *records("/data/runs/mine/student", 0.25, 0.8, "alpha=0.5"),
    ]
    plot_curve([*records("a", 0.2, 0.9), *found], tmp_path / "c.png", anchor="a")
    ((points, options),) = drawn
    names = [point["label"] for point in points]
    assert names[0] == "a" and list(options["curves"]) == names[1:]
    assert not any("runs" in name for name in names)
