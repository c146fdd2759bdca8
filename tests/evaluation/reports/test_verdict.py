"""The verdict: a claim only beyond noise, both directions, what zero-shot accuracy it costs, and what n can show."""

from pathlib import Path

import pytest
import torch

from modeling_dclip.evaluation.records import make_record
from modeling_dclip.evaluation.reports.tables import render_table
from modeling_dclip.evaluation.reports.verdict import (
    IF_AT_CHANCE,
    IF_NOT_TOLD_APART,
    MEASURE_ZERO_SHOT,
    judge,
    show_verdicts,
    verdict_lines,
)
from modeling_dclip.evaluation.statistics import (
    FEWEST_IMAGES,
    bootstrap_outcomes,
    compare_to_anchor,
    differences_to_anchor,
)

RETRIEVAL = ("text_to_image_recall@1", "image_to_text_recall@1")


def outcomes(n, **shares):
    """By metric, hits of the first images: what one model finds, a better one finds too."""
    counts = torch.ones(n, 2).double()
    found = {}
    for name, share in shares.items():
        found[name] = counts.clone()
        found[name][:, 0] = (torch.arange(n) < round(share * n)).double()
    return found


def at(t2i, i2t, n):
    return outcomes(n, **dict(zip(RETRIEVAL, (t2i, i2t), strict=True)))


def record(model, values, against=None, **fields):
    """A record as `eval.py` makes it, with or without an anchor's outcomes to compare with."""
    n = len(next(iter(values.values())))
    metrics = {name: float(own[:, 0].sum() / own[:, 1].sum()) for name, own in values.items()}
    filled = {"benchmark": "retrieval=scenes:test", "seed": 0, "split": "test", "revision": f"sha256:{model}",
              "dataset_fingerprint": "sha256:data", "command": "eval.py"}  # fmt: skip
    if n > 1:
        filled["intervals"] = {name: one.to_dict() for name, one in bootstrap_outcomes(values).items()}
    if against is not None:
        found = compare_to_anchor(values, against) | differences_to_anchor(values, against)
        filled["comparison"] = {"anchor": "anchor", "anchor_revision": "sha256:anchor", **found}
    return make_record(model=model, metrics=metrics, n=n, **{**filled, **fields})


def pair(before, after, n=400):
    anchor = at(*before, n)
    return [record("anchor", anchor), record("mine", at(*after, n), anchor)]


def zero_shot(before, after, n=400, spec="scenes"):
    anchor = outcomes(n, top1=before)
    fields = {"benchmark": f"zero_shot={spec}"}
    return [record("anchor", anchor, **fields), record("mine", outcomes(n, top1=after), anchor, **fields)]


def test_a_gain_in_both_directions_is_said_with_points_and_interval_and_the_missing_zero_shot_too():
    (line,) = verdict_lines(pair((0.3, 0.4), (0.4, 0.5)))
    assert line.startswith(
        "mine is better than anchor at retrieval (R@1), in both directions. Zero-shot accuracy was not"
    )
    assert "Text to image R@1 30.0 → 40.0 %: +10.0 points [+" in line and "+33.3 % relative" in line
    assert "Image to text R@1 40.0 → 50.0 %" in line and "400 images of scenes:test" in line and "paired" in line
    assert "within noise" not in line


def test_a_claim_needs_a_difference_beyond_noise():
    (line,) = verdict_lines(pair((0.3, 0.4), (0.3025, 0.3975)))  # one image of 400 each
    assert line.startswith("mine and anchor are not told apart at retrieval (R@1), in both directions.")
    assert line.count("within noise: with these 400 images the interval is ±") == 2
    assert line.count("points, and smaller differences are not seen") == 2
    assert "better" not in line and "worse" not in line


def test_other_cut_offs_beyond_noise_are_said_where_the_first_is_within_it():
    names = [f"{direction}_recall@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    shares = [
        dict(zip(names, values, strict=True)) for values in ((0.3, 0.5, 0.8) * 2, (0.3, 0.6, 0.7, 0.4, 0.6, 0.8))
    ]
    anchor, mine = (outcomes(400, **one) for one in shares)
    (line,) = verdict_lines([record("anchor", anchor), record("mine", mine, anchor)])
    assert "from text to image they are not told apart" in line
    told = "T→I R@5 50.0 → 60.0 % (better), T→I R@10 80.0 → 70.0 % (worse)"
    assert f"Beyond noise, though R@1 is not: {told}." in line
    assert "I→T R@5" not in line  # image to text is told apart at R@1


def test_directions_that_disagree_are_said():
    assert verdict_lines(pair((0.3, 0.4), (0.4, 0.3)))[0].startswith(
        "The directions disagree: mine is better than anchor at text to image and worse at image to text."
    )
    (line,) = verdict_lines(pair((0.3, 0.4), (0.2, 0.4)))
    assert line.startswith(
        "mine is worse than anchor at retrieval (R@1) from text to image; from image to text they are"
    )


def test_zero_shot_accuracy_is_said_with_the_share_that_is_kept():
    (verdict,) = judge(pair((0.3, 0.4), (0.4, 0.5)) + zero_shot(0.8, 0.72))
    assert verdict.headline.endswith("Zero-shot accuracy fell beyond noise, now 90.0 % of anchor's.")
    assert "Zero-shot top-1 on scenes 80.0 → 72.0 %: -8.0 points [-" in verdict.text
    (verdict,) = judge(pair((0.3, 0.4), (0.4, 0.5)) + zero_shot(0.8, 0.8))
    assert "did not change beyond noise, now 100.0 % of anchor's" in verdict.headline
    assert "none of these 400 images changed; that leaves up to 0.7 points" in verdict.text  # 1 - 0.05 ** (1 / 400)


def test_where_both_guess_nothing_is_claimed_and_chance_is_named():
    guessing = zero_shot(0.11, 0.08, n=1000)  # an image is right for both or for none, so the difference is sure
    for one in guessing:
        one["chance"] = {"top1": 0.1}
    (verdict,) = judge(guessing)
    assert verdict.headline.endswith(
        "Zero-shot accuracy is at chance for both, so it shows nothing that could be forgotten."
    )
    assert "(both at chance, which is 10.0 %)" in verdict.text
    fallen = zero_shot(0.5, 0.1, n=1000)
    for one in fallen:
        one["chance"] = {"top1": 0.1}
    (verdict,) = judge(fallen)
    assert "fell beyond noise, now 20.0 %" in verdict.headline and "(now at chance, which is 10.0 %)" in verdict.text
    del fallen[1]["chance"]  # as in records of earlier versions
    assert "at chance" not in judge(fallen)[0].text
    (line,) = verdict_lines(pair((0.01, 0.0), (0.0, 0.01), n=200))
    assert line.startswith(
        "mine and anchor are both at chance at retrieval (R@1), in both directions: neither finds more"
    )
    assert line.count("both at chance, which is 0.5 %") == 2
    assert "in percent" not in line and "relative" not in line  # of a guess


def test_advice_names_what_measures_zero_shot_accuracy_and_what_to_do_where_nothing_is_told_apart():
    (verdict,) = judge(pair((0.3, 0.4), (0.3025, 0.3975)))
    measure, decide = verdict.advice
    assert '--benchmark "zero_shot=imagefolder:DIR"' in measure and "a larger test part decides more" in decide
    assert measure not in verdict.text and show_verdicts(pair((0.3, 0.4), (0.4, 0.5))).endswith(measure)
    assert judge(pair((0.3, 0.4), (0.4, 0.5)) + zero_shot(0.8, 0.72))[0].advice == ()


def test_advice_is_a_larger_test_part_only_where_a_model_does_more_than_guess():
    def advice(before, after, n=200):
        return judge(pair(before, after, n=n))[0].advice[1:]  # the first is on zero-shot accuracy

    assert advice((0.01, 0.0), (0.0, 0.01)) == (IF_AT_CHANCE,)
    assert advice((0.01, 0.3), (0.0, 0.3)) == (IF_NOT_TOLD_APART,)  # image to text is above chance
    assert advice((0.0, 0.0), (1.0, 1.0), n=3) == (IF_NOT_TOLD_APART,)  # so few show nothing, not even chance
    guessing = zero_shot(0.11, 0.08, n=1000)
    assert judge([{**one, "chance": {"top1": 0.1}} for one in guessing])[0].advice == ()  # its headline says all


@pytest.mark.parametrize("section", ["Zero-shot classification", "If it did not help"])
def test_advice_names_sections_that_are_there(section):
    page = Path(__file__).parents[3] / "docs" / "evaluating.md"
    assert f"\n## {section}\n" in page.read_text()
    assert any(f'"{section}"' in line for line in (MEASURE_ZERO_SHOT, IF_NOT_TOLD_APART, IF_AT_CHANCE))


def test_several_zero_shot_sets_are_counted():
    sets = [zero_shot(0.8, after, spec=f"set{index}") for index, after in enumerate((0.7, 0.8, 0.9))]
    (verdict,) = judge(pair((0.3, 0.4), (0.4, 0.5)) + [one for own in sets for one in own])
    assert "lower beyond noise on 1 of 3 sets, higher on 1; 100.0 % of anchor's on average" in verdict.headline
    two = [one for own in sets[:2] for one in own]
    assert "fell beyond noise on set0; did not change beyond noise on set1" in judge(two)[0].headline


@pytest.mark.parametrize(
    ("part", "whole"), [("scenes:test,n=256", "scenes:test,n=512"), ("csv:a.csv@40", "csv:a.csv")]
)
def test_a_part_of_a_test_set_is_not_counted_beside_the_whole(part, whole):
    small, large = zero_shot(0.8, 0.4, n=256, spec=part), zero_shot(0.8, 0.6, n=512, spec=whole)
    for order in ([*small, *large], [*large, *small]):
        (verdict,) = judge([*pair((0.3, 0.4), (0.4, 0.5)), *order])
        assert "fell beyond noise, now 74.9 % of anchor's." in verdict.headline  # 307 of 410 hits, and no average
        assert verdict.details[-1].startswith(f"Not counted: 256 images of {part}, beside 512 of the same source.")
    other = zero_shot(0.8, 0.4, n=256, spec="scenes:test,n=256,seed=1")  # other images
    (verdict,) = judge([*pair((0.3, 0.4), (0.4, 0.5)), *other, *large])
    assert "now 62.3 % of anchor's." in verdict.headline and "Not counted" not in verdict.text  # the mean of both


@pytest.mark.parametrize("n", [1, 2, FEWEST_IMAGES - 1])
def test_few_images_show_nothing_however_large_the_difference(n):
    (line,) = verdict_lines(pair((0.0, 0.0), (1.0, 1.0), n=n))
    assert "not told apart" in line and f"{n} image{'s' * (n > 1)} cannot show a difference" in line


def test_fifteen_images_show_only_a_large_difference():
    (line,) = verdict_lines(pair((0.2, 0.2), (0.4, 0.4), n=15))
    assert "not told apart" in line and "with these 15 images the interval is ±" in line
    assert "is better" in verdict_lines(pair((0.2, 0.2), (0.8, 0.8), n=15))[0]


def test_records_of_earlier_versions_are_judged_by_their_gain_and_their_intervals():
    both = pair((0.3, 0.4), (0.4, 0.41))
    for name in RETRIEVAL:
        del both[1]["comparison"][f"{name}_difference"]
    (line,) = verdict_lines(both)
    assert "is better than anchor at retrieval (R@1) from text to image" in line and "% relative [+" in line
    assert "as if the images were not the same" in line  # image to text has no gain
    assert verdict_lines(both[1:]) == []  # the anchor's values are not known


def test_a_ratio_to_a_number_near_0_is_not_given_in_percent():
    both = pair((0.01, 0.02), (0.02, 0.02))
    del both[1]["comparison"]["text_to_image_recall@1_difference"]
    both[1]["comparison"]["text_to_image_recall@1_gain"].update(low=-1.0, high=None)
    (line,) = verdict_lines(both)
    assert (
        "1.0 → 2.0 %: +1.0 points, no gain in percent, because 1.0 is too uncertain to divide by (no interval)" in line
    )
    assert "∞" not in line and "∞" not in (table := render_table(both))
    assert "T→I R@1 gain: no number where the anchor's is 0 or so near it" in table


def test_a_percentage_is_given_where_the_table_gives_one():
    both = pair((0.05, 0.05), (0.05, 0.4), n=20)  # one image of 20: in many draws the anchor has none
    (line,) = verdict_lines(both)
    assert "T→I R@1 gain: no number where the anchor's is 0 or so near it" in render_table(both)
    assert line.count("because 5.0 is too uncertain to divide by") == 1 and "relative" not in line
    assert "+35.0 points [" in line and line.count("both at chance, which is 5.0 %") == 1
    both = pair((0.3, 0.05), (0.3, 0.1), n=20)
    (line,) = verdict_lines(both)
    assert "0.0 % relative" in line and "gain: no number" not in render_table(both)
    assert line.count("too uncertain") == 0  # image to text is at chance
    both = pair((0.3, 0.05), (0.3, 0.4), n=20)
    (line,) = verdict_lines(both)
    assert line.count("too uncertain") == 1  # image to text has no gain in the record: its own interval says it
    sets = [{**one, "chance": {}} for one in zero_shot(0.05, 0.1, n=20)]
    assert "% of anchor's" not in judge(sets)[0].headline and "top-1 kept: no number" in render_table(sets)


def test_models_without_an_anchor_have_no_verdict_and_same_weights_say_so():
    assert verdict_lines([record("a", at(0.3, 0.3, 40)), record("b", at(0.4, 0.4, 40))]) == []
    both = pair((0.3, 0.4), (0.3, 0.4))
    both[1]["revision"] = both[0]["revision"]
    assert verdict_lines(both) == ["mine has the same weights as anchor: there is nothing to tell apart."]


def test_the_same_weights_are_said_once_for_all_benchmarks():
    both = pair((0.3, 0.4), (0.3, 0.4))
    both += [{**one, "benchmark": "retrieval=coco"} for one in both]
    for one in both:
        one["revision"] = "sha256:anchor"
    assert len(verdict_lines(both)) == 1


def test_a_headline_says_that_test_images_were_trained_on():
    retrieval, top1 = pair((0.3, 0.4), (0.4, 0.5)), zero_shot(0.8, 0.72)
    retrieval[1]["n_trained_on"] = 90
    (verdict,) = judge(retrieval + top1)
    assert verdict.headline.startswith(
        "mine is better than anchor at retrieval (R@1), in both directions; mine was trained on 90 of the 400 test "
        "images, so this is no evidence for new images. Zero-shot accuracy fell"
    )
    assert verdict.headline.count("no evidence") == 1
    retrieval[0]["n_trained_on"], top1[1]["n_trained_on"] = 1000, 3
    (verdict,) = judge(retrieval + top1)
    assert "90 of the 400 test images, anchor was trained on 1,000 of the 400" in verdict.headline
    assert verdict.headline.endswith(
        "; mine was trained on 3 of the 400 test images of scenes, so this is no evidence for new images."
    )


def test_questions_are_not_counted_as_images_and_runs_of_an_arm_say_the_most():
    anchor = outcomes(40, accuracy=0.3)
    fields = {"benchmark": "fine_grained=scenes"}
    both = [
        record("anchor", anchor, **fields),
        record("mine", outcomes(40, accuracy=0.5), anchor, n_trained_on=1, **fields),
    ]
    assert "mine was trained on 1 test image of scenes, so" in judge(both)[0].headline
    arms = runs((0.4, 0.41, 0.42))
    arms[1]["n_trained_on"], arms[2]["n_trained_on"] = 5, 8
    assert "arm was trained on 8 of the 400 test images" in verdict_lines(arms)[0]


def test_points_between_two_models_have_lines_of_their_own():
    both = pair((0.3, 0.4), (0.4, 0.5))
    # The model that was asked for comes first, wherever its record lies.
    lines = verdict_lines([both[0], {**both[1], "condition": "alpha=0.5"}, both[1]])
    assert lines[0].startswith("mine is better than anchor")
    assert lines[1].startswith("mine, alpha=0.5 is better than anchor")


def runs(shares, n=400):
    anchor = at(0.3, 0.4, n)
    made = [record("anchor", anchor, label="anchor")]
    for seed, share in enumerate(shares):
        label = f"arm, seed {seed}"
        made.append(record(f"run{seed}", at(share, 0.4, n), anchor, label=label, seed=seed))
    return made


def test_runs_of_one_arm_make_one_line_over_seeds():
    (line,) = verdict_lines(runs((0.40, 0.41, 0.42)))
    assert line.startswith("arm is better than anchor at retrieval (R@1) from text to image")
    assert "3 seeds; 95 % intervals over training seeds" in line and "+11.0 points [+8.5, +13.5]" in line
    assert "the same for all 3 seeds" in line


def test_a_difference_beyond_the_seeds_noise_alone_is_no_claim():
    (line,) = verdict_lines(runs((0.45, 0.475, 0.5), n=40))
    assert "is better" in line
    (line,) = verdict_lines(runs((0.325, 0.35, 0.35), n=40))
    assert "not told apart" in line
    (line,) = verdict_lines(runs((0.3075, 0.305, 0.3075)))  # 3, 2 and 3 images of 400
    assert "beyond the noise of the seeds, within that of the images" in line
