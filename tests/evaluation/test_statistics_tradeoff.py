"""Gain, retention and arms."""

import json

import pytest
import torch

from modeling_dclip.evaluation.statistics import (
    GAIN_METRIC,
    compare_arms,
    compare_to_anchor,
    ratio_to_anchor,
    summarise_arms,
)


def outcomes(share, seed, images=40, captions=5):
    """Hits and captions of every image, by chance."""
    hits = torch.rand(images, captions, generator=torch.Generator().manual_seed(seed)) < share
    return torch.stack([hits.sum(dim=1), torch.full((images,), captions)], dim=1).double()


def test_a_ratio_to_the_anchor_has_a_bracket_around_it():
    student, anchor = outcomes(0.5, seed=0), outcomes(0.3, seed=1)
    ratio = ratio_to_anchor(student, anchor)
    assert ratio.estimate == pytest.approx(float(student[:, 0].sum() / anchor[:, 0].sum()))
    assert ratio.low < ratio.estimate < ratio.high
    assert ratio.covers == "images"
    assert ratio_to_anchor(anchor, anchor)[:3] == (1, 1, 1)


def test_a_ratio_needs_the_same_images_and_captions():
    for other in (outcomes(0.5, 0, images=39), outcomes(0.5, 0, captions=4)):
        with pytest.raises(ValueError, match="same images with the same captions"):
            ratio_to_anchor(outcomes(0.5, 0), other)


def test_a_ratio_to_an_anchor_without_hits_is_refused():
    with pytest.raises(ValueError, match="at least one hit"):
        ratio_to_anchor(outcomes(1, 0), outcomes(0, 0))


def test_retrieval_is_compared_as_gain_and_classification_as_retention():
    student, anchor = outcomes(0.5, seed=0), outcomes(0.3, seed=1)
    ratio = ratio_to_anchor(student, anchor, resamples=50, seed=3)
    gain = compare_to_anchor({GAIN_METRIC: student}, {GAIN_METRIC: anchor}, resamples=50, seed=3)
    assert list(gain) == ["text_to_image_recall@1_gain"]
    shifted = ratio._replace(estimate=ratio.estimate - 1, low=ratio.low - 1, high=ratio.high - 1)
    assert gain["text_to_image_recall@1_gain"] == shifted.to_dict()
    both = [{"top1": side, "top5": side} for side in (student, anchor)]
    assert compare_to_anchor(*both, resamples=50, seed=3) == {"top1_retention": ratio.to_dict()}


def test_no_ratio_where_the_anchor_has_no_hit_or_the_benchmark_no_such_metric():
    assert compare_to_anchor({"top1": outcomes(1, 0)}, {"top1": outcomes(0, 0)}) == {}
    assert compare_to_anchor(*2 * [{"top1": outcomes(1, 0, images=1)}]) == {}  # nor on a single image
    assert compare_to_anchor({"accuracy": outcomes(1, 0)}, {"accuracy": outcomes(1, 0)}) == {}


def test_arms_are_paired_by_seed():
    baseline = {0: 0.10, 1: 0.30, 2: 0.20}
    student = {2: 0.22, 0: 0.12, 1: 0.32}
    difference = compare_arms(student, baseline)
    assert (difference.estimate, difference.low, difference.high) == pytest.approx((0.02, 0.02, 0.02))
    with pytest.raises(ValueError, match=r"same seeds, got \[0, 1\] and \[0, 1, 2\]"):
        compare_arms({0: 0.1, 1: 0.2}, baseline)


def make_arms():
    def run(retrieval, accuracy):
        return {"text_to_image_recall@1": retrieval, "image_to_text_recall@1": 0.5, "top1": accuracy}

    return {
        "anchor": {0: run(0.20, 0.80)},
        "baseline": {0: run(0.22, 0.76), 1: run(0.24, 0.72)},
        "student": {0: run(0.25, 0.76), 1: run(0.27, 0.76)},
    }


def test_summary_holds_gain_retention_and_comparison():
    summary = summarise_arms(make_arms(), pairs=[("student", "baseline")])
    anchor, baseline, student = summary["arms"]
    assert [row["arm"] for row in summary["arms"]] == ["anchor", "baseline", "student"]
    assert "gain" not in anchor and anchor["metrics"]["top1"]["covers"] == "nothing"
    assert student["gain"]["estimate"] == pytest.approx((0.25 + 0.27) / 2 / 0.2 - 1)
    assert student["retention"]["estimate"] == pytest.approx(0.95)
    assert baseline["retention"]["estimate"] == pytest.approx((0.95 + 0.9) / 2)
    assert student["gain"]["covers"] == "seeds" and student["seeds"] == [0, 1]
    compared = summary["comparisons"][0]
    assert (compared["student"], compared["baseline"]) == ("student", "baseline")
    assert compared["metrics"]["text_to_image_recall@1"]["estimate"] == pytest.approx(0.03)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_an_anchor_per_seed_is_paired_by_seed():
    arms = make_arms()
    arms["anchor"] = {0: {**arms["anchor"][0]}, 1: {**arms["anchor"][0], "top1": 0.9}}
    retention = summarise_arms(arms)["arms"][2]["retention"]
    assert retention["estimate"] == pytest.approx((0.76 / 0.8 + 0.76 / 0.9) / 2)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda arms: arms.pop("anchor"), {}, "the anchor 'anchor'"),
        (lambda arms: arms["student"].clear(), {}, "runs of every arm"),
        (lambda arms: arms["student"][1].pop("top1"), {}, "in every run.* for 'student', seed 1"),
        (lambda arms: arms["anchor"][0].update(top1=0.0), {}, "anchor above 0 in 'top1'"),
        (lambda arms: arms["anchor"].update({5: arms["anchor"][0]}), {}, r"got seeds \[0, 5\]"),
        (lambda arms: None, {"pairs": [("student", "teacher")]}, "got .'student', 'teacher'"),
    ],
)
def test_bad_arms_are_named(change, options, message):
    arms = make_arms()
    change(arms)
    with pytest.raises(ValueError, match=message):
        summarise_arms(arms, **options)
