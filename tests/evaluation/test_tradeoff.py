"""Gain, retention and arms."""

import json

import pytest
import torch

from modeling_dclip.evaluation.retrieval import RetrievalRanks, metrics_from_ranks
from modeling_dclip.evaluation.tradeoff import (
    compare_arms,
    compare_to_anchor,
    hits_per_image,
    retrieval_gain,
    summarise_arms,
    zero_shot_retention,
)

OWNERS = torch.arange(200) // 5


def make_ranks(share, seed):
    hit = torch.rand(200, generator=torch.Generator().manual_seed(seed)) < share
    ranks = torch.where(hit, 1, 7)
    return RetrievalRanks(ranks, ranks, OWNERS)


def test_gain_is_the_ratio_of_recalls_minus_one_with_a_bracket_around_it():
    student, anchor = make_ranks(0.5, seed=0), make_ranks(0.3, seed=1)
    recalls = [metrics_from_ranks(ranks)["text_to_image_recall@1"] for ranks in (student, anchor)]
    gain = retrieval_gain(student, anchor)
    assert gain.estimate == pytest.approx(recalls[0] / recalls[1] - 1)
    assert gain.low < gain.estimate < gain.high
    assert gain.covers == "images"
    assert retrieval_gain(student, anchor, k=10).estimate == 0


def test_hits_are_counted_by_image_whatever_the_order_of_captions():
    ranks = RetrievalRanks(torch.tensor([1, 3, 1, 9]), torch.ones(4), torch.tensor([1, 0, 1, 0]))
    hits, captions = hits_per_image(ranks, k=3)
    assert (hits.tolist(), captions.tolist()) == ([1, 2], [2, 2])


def test_gain_needs_the_same_captions():
    other = RetrievalRanks(OWNERS, OWNERS, OWNERS.flip(0))
    with pytest.raises(ValueError, match="same captions"):
        retrieval_gain(make_ranks(0.5, 0), other)


def test_retention_is_the_ratio_of_accuracies():
    anchor = torch.arange(100) < 80
    student = torch.arange(100) < 76
    retention = zero_shot_retention(student, anchor)
    assert retention.estimate == pytest.approx(0.95)
    assert retention.low < 0.95 < retention.high <= 1


def test_retention_against_an_anchor_without_hits_is_refused():
    with pytest.raises(ValueError, match="at least one hit"):
        zero_shot_retention(torch.ones(9), torch.zeros(9))


def test_evaluations_of_one_kind_are_compared_and_others_refused():
    retrieval = [
        {"ranks": make_ranks(share, seed), "text_to_image_recall@1": share} for seed, share in enumerate((0.5, 0.3))
    ]
    gain = compare_to_anchor(*retrieval, resamples=50, seed=3)
    assert gain == {
        "text_to_image_recall@1_gain": retrieval_gain(
            retrieval[0]["ranks"], retrieval[1]["ranks"], resamples=50, seed=3
        ).to_dict()
    }
    zero_shot = {"top1_hits": torch.arange(9) < 5, "top1": 5 / 9}
    assert compare_to_anchor(zero_shot, zero_shot)["top1_retention"]["estimate"] == 1
    with pytest.raises(ValueError, match="two evaluations of one kind"):
        compare_to_anchor(zero_shot, retrieval[0])


def test_an_anchor_without_hits_gives_no_ratio():
    nothing = {"top1_hits": torch.zeros(9), "top1": 0.0}
    assert compare_to_anchor({"top1_hits": torch.ones(9), "top1": 1.0}, nothing) == {}


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
