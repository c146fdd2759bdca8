"""Tables: the best is bold beyond noise only, in the metric's own direction, on the same data; intervals stand in the
cells; what does not fit or says nothing new has no column."""

import pytest

from modeling_dclip.evaluation.records import make_record
from modeling_dclip.evaluation.reports.document import render_markdown
from modeling_dclip.evaluation.reports.tables import (
    render_before_and_after,
    render_table,
    tabulate_rows,
    tabulate_twins,
)


def record(model, metrics, **fields):
    values = {
        "benchmark": "efficiency", "n": 10, "seed": 0, "split": None, "revision": f"sha256:{model}0123456789",
        "dataset_fingerprint": "sha256:ab", "command": "eval.py",
    }  # fmt: skip
    return make_record(model=model, metrics=metrics, **{**values, **fields})


def interval(value, half):
    return {"estimate": value, "low": value - half, "high": value + half, "confidence": 0.95, "covers": "images"}


def test_the_smaller_latency_is_bold_and_all_that_show_the_same():
    rows = [
        record(name, {"image_latency_ms": value}, spread={"image_latency_ms": {"min": value - 1, "max": value + 1}})
        for name, value in (("a", 20.0), ("b", 13.11), ("c", 13.12))
    ]
    text = render_table(rows, best=True)
    assert "**20" not in text and text.count("**13.1**") == 2
    assert "**" not in render_table(rows[1:], best=True)  # all show the same: bold would say nothing


def test_what_may_be_noise_is_not_bold():
    def row(model, value, half, **fields):
        return record(model, {"top1": value}, intervals={"top1": interval(value, half)}, n=400, **fields)

    assert "**60.0**" in render_table([row("a", 0.5, 0.05), row("b", 0.6, 0.05)], best=True)
    assert "**" not in render_table([row("a", 0.5, 0.05), row("b", 0.54, 0.05)], best=True)
    # the second is as good as the best, so the best is not better than all others
    assert "**" not in render_table([row("a", 0.5, 0.05), row("b", 0.6, 0.05), row("c", 0.61, 0.05)], best=True)
    anchor = row("a", 0.5, 0.05)
    paired = {"anchor": "a", "anchor_revision": anchor["revision"], "top1_difference": interval(0.04, 0.03)}
    assert "**54.0**" in render_table([anchor, row("b", 0.54, 0.05, comparison=paired)], best=True)
    assert "**" not in render_table([record("a", {"top1": 0.5}), record("b", {"top1": 0.9})], best=True)
    sizes = [record("a", {"parameters_millions": 1.0}), record("b", {"parameters_millions": 2.0})]
    assert "**1.0**" in render_table(sizes, best=True)  # counted, without noise


def test_what_has_no_better_direction_or_other_data_is_not_bold():
    gaps = [record(name, {"modality_gap": value}) for name, value in (("a", 0.5), ("b", 0.7))]
    assert "**" not in render_table(gaps, best=True)
    rows = [record("a", {"top1": 0.5}), record("b", {"top1": 0.6}, dataset_fingerprint="sha256:cd")]
    assert "**" not in render_table(rows, best=True)


def test_intervals_stand_in_the_cells_and_below_what_they_are():
    own = {"estimate": 0.5, "low": 0.45, "high": 0.56, "confidence": 0.95, "covers": "images"}
    rows = [record("a", {"top1": 0.5}, intervals={"top1": own}), record("b", {"top1": 0.4})]
    text = render_table(rows)
    assert "50.0 [45.0, 56.0]" in text
    assert text.endswith("In brackets: 95% bootstrap interval over test images, for these checkpoints.")
    assert "In brackets" not in render_table(rows[1:])


def test_columns_are_chosen_by_name():
    (table,) = tabulate_rows([record("a", {"top1": 0.5})], ["top1"], best=False, columns=("model", "revision"))
    assert table.header == ["Model", "Weights", "top-1"] and table.rows[0][:2] == ["a", "a0123456"]


RETRIEVAL = {f"{way}_{name}": 0.5 for way in ("text_to_image", "image_to_text") for name in ("recall@1", "recall@10")}


def test_a_retrieval_table_shows_what_matters_in_120_characters():
    more = {f"{way}_{name}": 0.5 for way in ("text_to_image", "image_to_text") for name in ("recall@5", "mrr", "map")}
    comparison = {"anchor_revision": "sha256:0", "text_to_image_recall@1_gain": interval(0.1, 0.05)}
    fields = {"benchmark": "retrieval=scenes:test,n=8", "n_captions": 40, "comparison": comparison}
    row = record("m" * 30, RETRIEVAL | more, intervals={name: interval(0.5, 0.1) for name in RETRIEVAL}, **fields)
    text = render_table([row], widest=120)
    lines = text.splitlines()
    assert lines[0] == "Retrieval on `scenes:test,n=8`, 10 images with 40 captions:"
    heads = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert heads == ["Model", "T→I R@1 gain", "T→I R@1", "I→T R@1", "T→I R@10", "I→T R@10"]
    assert text.count("[40.0, 60.0]") == 2 and len(lines[2]) <= 120
    narrow = render_table([{**row, "label": "m" * 60}], widest=120).splitlines()[2]
    assert "I→T R@10" not in narrow and "T→I R@1 " in narrow  # the last columns go first


def test_a_metric_that_repeats_another_has_no_column():
    same = {"text_to_image_mrr": 0.25, "text_to_image_map": 0.25, "image_to_text_mrr": 0.5, "image_to_text_map": 0.3}
    (table,) = tabulate_rows([record("a", same)], list(same), best=False, columns=("model",))
    assert table.header == ["Model", "T→I MRR, mAP", "I→T MRR", "I→T mAP"]
    rows = [record(name, {"top1": 0.5, "mean_per_class": value}) for name, value in (("a", 0.5), ("b", 0.4))]
    assert "top-1, mean per class" in render_table(rows[:1]) and "| top-1 | mean per class |" in render_table(rows)


def test_several_benchmarks_of_a_kind_share_a_table_and_rows_of_other_data_are_marked():
    rows = [
        record(name, {"top1": 0.5}, benchmark=f"zero_shot={spec},seed=1") for name in "ab" for spec in ("x", "y:t")
    ]
    lines = render_table(rows, widest=120).splitlines()
    assert lines[0] == "Zero-shot classification, 2 benchmarks:"
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[4:]] == [
        ["a", "x"], ["b", "x"], ["a", "y:t"], ["b", "y:t"],
    ]  # fmt: skip
    assert "x,seed=1" in render_table(rows)  # a page has room for the options
    other = record("c", {"top1": 0.5}, benchmark="zero_shot=x,seed=1", dataset_fingerprint="sha256:cd")
    assert "| Data |" in render_table([rows[0], other])


def test_a_point_between_two_models_says_which_it_is():
    rows = [record("m", {"top1": 0.5}), record("m", {"top1": 0.4}, condition="alpha=0.5", label="ours")]
    assert [line.split(" | ")[0].strip("| ") for line in render_table(rows).splitlines()[4:]] == [
        "m",
        "ours, alpha=0.5",
    ]


def test_before_and_after_has_a_row_for_each_main_metric_and_names_the_interval():
    found = {"text_to_image_recall@1": 0.5, "text_to_image_recall@5": 0.9, "image_to_text_recall@1": 0.25}
    both = {
        "n": 40,
        "benchmark": "retrieval=held_out:run",
        "intervals": {name: interval(value, 0.1) for name, value in found.items()},
    }
    before = record("clip", found, revision="a", **both)
    better = {name: value + 0.1 for name, value in found.items()}
    change = {"text_to_image_recall@1_difference": interval(0.1, 0.05) | {"covers": "images"}}
    compared = {"anchor": "clip", "anchor_revision": "a", **change}
    after = record("mine", better, revision="b", comparison=compared, **both)
    table = render_before_and_after([before, after], names={before["benchmark"]: "test part"})
    _, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:3] for row in cells] == [[f"{way} R@1", "test part", "40 images"] for way in ("T→I", "I→T")]
    assert cells[0][3].startswith("50.0") and cells[0][4].startswith("60.0") and cells[0][5] == "+10.0 [+5.0, +15.0]"
    assert "trained on" not in table
    after["n_trained_on"] = 7
    marked = render_before_and_after([before, after])
    assert marked.count("40 images, 7 trained on") == 2 and "trained on are no evidence for new images" in marked
    assert cells[1][5] == "–"  # no difference was stored
    assert "95% bootstrap interval over test images" in table
    assert render_before_and_after([before]) == render_before_and_after([before, {**after, "revision": "c"}][:1]) == ""


def test_an_interval_that_no_resampling_gives_is_named():
    recall = "text_to_image_recall@1"
    both = {"n": 15, "benchmark": "retrieval=held_out:run"}
    none = {recall: {"estimate": 0.0, "low": 0.0, "high": 0.218, "confidence": 0.95, "covers": "images"}}
    same = {"estimate": 0.0, "low": 0.0, "high": 0.0, "confidence": 0.95, "covers": "images"}
    before = record("clip", {recall: 0.0}, revision="a", intervals=none, **both)
    compared = {"anchor": "clip", "anchor_revision": "a", f"{recall}_difference": same}
    after = record("mine", {recall: 0.0}, revision="b", intervals=none, comparison=compared, **both)
    told = render_before_and_after([before, after])
    assert "Of 0 and of 100 % it is the exact interval of Clopper and Pearson." in told
    # 0.05 ** (1 / 15) is 0.819: with so many changed images or more, 15 of them show one in 95 % of all draws
    assert "Where an interval has no width, none of the images changed; that leaves up to 18.1 points." in told
    moved = {**same, "estimate": 0.1, "low": 0.1, "high": 0.1}
    compared = {"anchor": "clip", "anchor_revision": "a", f"{recall}_difference": moved}
    after = record("mine", {recall: 0.1}, revision="b", comparison=compared, **both)
    assert "no width" not in render_before_and_after([before, after])


def test_teachers_stand_beside_the_twins_of_the_same_seed():
    def teachers(folder, values, condition="as_trained"):
        return [
            record(
                f"{folder}/leak_free/seed-{seed}/teacher",
                {"text_to_teacher_recall@1": value, "teacher_to_text_recall@1": value / 2},
                label="leak_free",
                condition=condition,
            )
            for seed, value in values.items()
        ]

    regions = teachers("a", {0: 0.20, 1: 0.30, 2: 0.40})
    twins = teachers("b", {2: 0.37, 1: 0.28, 0: 0.19})  # in another order: 1, 2 and 3 points below
    others = teachers("a", {0: 0.9}, condition="regions_shuffled")
    text = render_markdown(tabulate_twins(regions + others, twins))
    cells = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    t = 4.3027 / 3**0.5  # half a t-interval of three values, in their standard deviations
    assert cells[:4] == ["leak_free (3 trained)", f"30.0 ± {10 * t:.1f}", f"28.0 ± {9 * t:.1f}", f"+2.0 ± {t:.1f}"]
    assert cells[6] == f"+1.0 ± {t / 2:.1f}" and "paired by seed" in text
    with pytest.raises(ValueError, match="a twin of the same label and path, got .*seed-2/teacher"):
        tabulate_twins(regions, twins[1:])
    with pytest.raises(ValueError, match="a twin of the same label and path, got {}"):
        tabulate_twins(others, others)
