"""Gain, retention, arms and weight interpolation."""

import json

import pytest
import torch

from modeling_dclip.evaluation.retrieval import RetrievalRanks, metrics_from_ranks
from modeling_dclip.evaluation.tradeoff import (
    compare_arms,
    compare_to_anchor,
    hits_per_image,
    interpolate_state_dicts,
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


def make_states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        {"weight": torch.randn(5, 3, generator=generator).to(dtype), "positions": torch.arange(4)} for _ in range(2)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ends_of_the_line_are_exact_copies(dtype):
    anchor, student = make_states(dtype)
    for alpha, end in ((0, anchor), (1.0, student)):
        mixed = interpolate_state_dicts(anchor, student, alpha)
        assert all(torch.equal(mixed[key], end[key]) and mixed[key].dtype == end[key].dtype for key in end)
        assert mixed["weight"].data_ptr() != end["weight"].data_ptr()


def test_the_middle_of_the_line_is_the_mean():
    anchor, student = make_states()
    mixed = interpolate_state_dicts(anchor, student, 0.5)
    assert torch.allclose(mixed["weight"], (anchor["weight"] + student["weight"]) / 2, atol=1e-7)
    assert torch.equal(mixed["positions"], torch.arange(4))


@pytest.mark.parametrize(
    ("change", "alpha", "message"),
    [
        (lambda state: state.pop("weight"), 0.5, "one only, the first 'weight'"),
        (lambda state: state.update(extra=torch.ones(1)), 0.5, "one only, the first 'extra'"),
        (lambda state: state.update(weight=torch.ones(3, 5)), 0.0, r"\(5, 3\) torch.float32 and \(3, 5\).*'weight'"),
        (lambda state: state.update(weight=state["weight"].half()), 1.0, "torch.float16 for 'weight'"),
        (lambda state: state.update(positions=torch.zeros(4, dtype=torch.long)), 0.5, "equal integers.*'positions'"),
        (lambda state: None, 1.5, r"alpha in \[0, 1\], got 1.5"),
    ],
)
def test_checkpoints_that_do_not_match_are_refused(change, alpha, message):
    anchor, student = make_states()
    change(student)
    with pytest.raises(ValueError, match=message):
        interpolate_state_dicts(anchor, student, alpha)


def test_interpolated_weights_load_into_a_model(tiny_clip_dir, tiny_clip):
    student = type(tiny_clip[0]).from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        student.visual_projection.weight.add_(1.0)
    state = interpolate_state_dicts(tiny_clip[0].state_dict(), student.state_dict(), 0.25)
    student.load_state_dict(state)
    expected = tiny_clip[0].visual_projection.weight + 0.25
    assert torch.allclose(student.visual_projection.weight, expected, atol=1e-6)
