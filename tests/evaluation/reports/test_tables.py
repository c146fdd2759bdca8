"""Tables: the best is bold in the metric's own direction and on the same data only; intervals stand in the cells."""

import pytest

from modeling_dclip.evaluation.records import make_record
from modeling_dclip.evaluation.reports.tables import render_table


def record(model, metrics, **fields):
    values = {
        "benchmark": "efficiency", "n": 10, "seed": 0, "split": None, "revision": f"sha256:{model}0123456789",
        "dataset_fingerprint": "sha256:ab", "command": "eval.py",
    }  # fmt: skip
    return make_record(model=model, metrics=metrics, **{**values, **fields})


def test_the_smaller_latency_is_bold_and_all_that_show_the_same():
    rows = [record(name, {"image_latency_ms": value}) for name, value in (("a", 20.0), ("b", 13.11), ("c", 13.12))]
    text = render_table(rows, best=True)
    assert "**20" not in text and text.count("**13.1**") == 2
    assert "**" not in render_table(rows[1:], best=True)  # all show the same: bold would say nothing


def test_what_has_no_better_direction_or_other_data_is_not_bold():
    gaps = [record(name, {"modality_gap": value}) for name, value in (("a", 0.5), ("b", 0.7))]
    assert "**" not in render_table(gaps, best=True)
    rows = [record("a", {"top1": 0.5}), record("b", {"top1": 0.6}, dataset_fingerprint="sha256:cd")]
    assert "**" not in render_table(rows, best=True)


def test_intervals_stand_in_the_cells_and_below_what_they_are():
    interval = {"estimate": 0.5, "low": 0.45, "high": 0.56, "confidence": 0.95, "covers": "images"}
    rows = [record("a", {"top1": 0.5}, intervals={"top1": interval}), record("b", {"top1": 0.4})]
    text = render_table(rows, best=True)
    assert "**50.0** [45.0, 56.0]" in text
    assert text.endswith("In brackets: 95% bootstrap interval over test images, for these checkpoints.")
    assert "In brackets" not in render_table(rows[1:])


def test_columns_are_chosen_by_name():
    text = render_table([record("a", {"top1": 0.5})], columns=("model", "revision"))
    assert text.splitlines()[0].split() == "| Model | Weights | top-1 |".split() and "a0123456" in text
    with pytest.raises(ValueError, match="Expected columns of .*'hat'"):
        render_table([record("a", {"top1": 0.5})], columns=("hat",))


def test_a_point_between_two_models_says_which_it_is():
    rows = [record("m", {"top1": 0.5}), record("m", {"top1": 0.4}, condition="alpha=0.5", label="ours")]
    assert [line.split(" | ")[0].strip("| ") for line in render_table(rows).splitlines()[2:]] == [
        "m",
        "ours, alpha=0.5",
    ]
