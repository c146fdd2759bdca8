"""Two results files: who is compared with whom, with which interval, and what else differs."""

import json

import pytest
import torch

from modeling_dclip.evaluation.records import make_record, record_key, write_outcomes, write_results
from modeling_dclip.evaluation.reports.comparison import compare_results, find_conflicts, render_comparison


def measure(share, seed=0, n=400, **fields):
    """A record and its outcomes: `share` of the images found, the same ones as far as it goes."""
    luck = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    values = torch.stack([(luck < share).double(), torch.ones(n).double()], dim=1)
    filled = {
        "model": "m",
        "benchmark": "zero_shot=scenes",
        "metrics": {"top1": float(values[:, 0].mean())},
        "n": n,
        "seed": 0,
        "split": "test",
        "revision": f"sha256:{share}",
        "dataset_fingerprint": "sha256:data",
        "command": "eval.py",
    }
    return make_record(**{**filled, **fields}), {"top1": values}


def write(path, *measured, outcomes=True):
    write_results(path, [record for record, _ in measured])
    if outcomes:
        write_outcomes(path, {record_key(record): values for record, values in measured})
    return path


def test_the_same_images_are_compared_in_pairs(tmp_path):
    a, b = write(tmp_path / "a.json", measure(0.5)), write(tmp_path / "b.json", measure(0.55))
    compared = compare_results(a, b)
    (pair,) = compared["pairs"]
    (row,) = pair["metrics"]
    assert row["method"] == "paired" and row["beyond_noise"] is True
    assert row["difference"]["estimate"] == pytest.approx(row["b"] - row["a"])
    text = render_comparison(compared)
    assert "B is better, beyond noise" in text and "paired bootstrap over images" in text
    assert "1 metric of different weights compared, each with a 95% interval; 1 beyond noise" in text
    assert text.startswith("B against A")
    assert "- Zero-shot top-1 on scenes " in text
    assert json.loads(json.dumps(compared)) == compared
    assert "B is worse, beyond noise" in render_comparison(compare_results(b, a))


def test_without_outcomes_the_records_intervals_serve(tmp_path):
    half = {"confidence": 0.95, "covers": "images"}
    a, b = (
        write(
            tmp_path / f"{share}.json",
            measure(share, intervals={"top1": {"estimate": share, "low": share - 0.05, "high": share + 0.05, **half}}),
            outcomes=False,
        )
        for share in (0.5, 0.55)
    )
    compared = compare_results(a, b)
    (row,) = compared["pairs"][0]["metrics"]
    assert row["method"] == "unpaired" and row["beyond_noise"] is False
    text = render_comparison(compared)
    assert "unpaired, normal approximation" in text and "within noise" in text
    assert "Not paired: no outcomes of the images beside A and B" in text


def test_without_anything_there_is_only_the_difference(tmp_path):
    a, b = (write(tmp_path / f"{share}.json", measure(share), outcomes=False) for share in (0.5, 0.55))
    text = render_comparison(compare_results(a, b))
    assert "no interval" in text and "nothing can be said about noise" in text


def test_models_with_the_same_weights_are_said_to_be_the_same(tmp_path):
    a, b = (write(tmp_path / f"{name}.json", measure(0.5, label="anchor")) for name in ("a", "b"))
    text = render_comparison(compare_results(a, b))
    assert "All weights that were compared are the same" in text and "nothing can be said" not in text


def test_other_data_are_never_paired(tmp_path):
    a = write(tmp_path / "a.json", measure(0.5))
    b = write(tmp_path / "b.json", measure(0.6, dataset_fingerprint="sha256:other", n=300, split=None))
    (pair,) = compare_results(a, b)["pairs"]
    assert pair["metrics"][0]["method"] == "none"
    fields = {name: values for name, *values in pair["differences"]}
    assert fields["n"] == ["400", "300"] and fields["split"] == ["test", "none"]
    assert fields["dataset_fingerprint"] == ["data", "other"]
    assert "The data differ" in pair["notes"][0]


def test_models_are_matched_by_name_and_the_last_two_left_are_too(tmp_path):
    a = write(
        tmp_path / "a.json",
        measure(0.4, label="anchor"),
        measure(0.5, label="old"),
        measure(0.5, benchmark="zero_shot=x"),
    )
    b = write(tmp_path / "b.json", measure(0.55, label="new"), measure(0.4, label="anchor"))
    compared = compare_results(a, b)
    assert [(pair["a"], pair["b"], pair["same_weights"]) for pair in compared["pairs"]] == [
        ("anchor", "anchor", True),
        ("old", "new", False),
    ]
    assert compared["unmatched"] == ["m on zero_shot=x (only in A)"]
    assert "1 metric of different weights" in render_comparison(compared)  # the anchor with itself does not count


def test_outcomes_of_another_evaluation_are_refused(tmp_path):
    record, _ = measure(0.5)
    _, others = measure(0.7)
    a, b = write(tmp_path / "a.json", (record, others)), write(tmp_path / "b.json", measure(0.5))
    with pytest.raises(ValueError, match="outcomes of 'top1' that make .*a.outcomes.safetensors.*evaluate again"):
        compare_results(a, b)


def test_files_without_anything_in_common_or_of_another_form_are_named(tmp_path):
    a, b = (
        write(tmp_path / "a.json", measure(0.5)),
        write(tmp_path / "b.json", measure(0.5, benchmark="zero_shot=y", dataset_fingerprint="sha256:other")),
    )
    with pytest.raises(ValueError, match=r"one benchmark in .*a.json and .*b.json, got \['zero_shot=scenes'\] and"):
        compare_results(a, b)
    (tmp_path / "summary.json").write_text('{"arms": []}')
    with pytest.raises(ValueError, match="JSON list of one or more records in .*summary.json"):
        compare_results(a, tmp_path / "summary.json")
    with pytest.raises(FileNotFoundError):
        compare_results(a, tmp_path / "gone.json")


def test_one_benchmark_of_two_names_is_found_by_its_data_and_what_was_trained_on_is_said(tmp_path):
    a = write(tmp_path / "a.json", measure(0.5, benchmark="zero_shot=held_out:a"))
    b = write(tmp_path / "b.json", measure(0.55, benchmark="zero_shot=held_out:b", n_trained_on=90))
    compared = compare_results(a, b)
    (pair,) = compared["pairs"]
    assert pair["metrics"][0]["method"] == "paired" and compared["unmatched"] == []
    assert ["benchmark", "zero_shot=held_out:a", "zero_shot=held_out:b"] in pair["differences"]
    text = render_comparison(compared)
    assert "B was trained on 90 of the 400 test images of held_out:a, so this is no evidence" in text.splitlines()[0]
    other = write(tmp_path / "c.json", measure(0.55, benchmark="retrieval=held_out:b"))
    with pytest.raises(ValueError, match="records of one benchmark"):
        compare_results(a, other)


def test_points_between_two_models_are_comparable_with_both():
    anchor, _ = measure(0.5, model="anchor")
    point, _ = measure(0.6, model="student", settings={"alpha": 0.5, "anchor_revision": "sha256:0.5"})
    assert find_conflicts([anchor, point]) == []
    other, _ = measure(0.6, model="other", settings={"prompts": "another"})
    assert len(find_conflicts([anchor, other])) == 1


def retrieve(share, label, **fields):
    """As [`measure`], of retrieval in both directions."""
    made, outcomes = measure(share, benchmark="retrieval=scenes:test", label=label, **fields)
    names = "text_to_image_recall@1", "image_to_text_recall@1"
    made["metrics"] = dict.fromkeys(names, made["metrics"].pop("top1"))
    return made, {name: outcomes["top1"].clone() for name in names}


def test_two_models_of_one_file_are_compared_and_the_verdict_comes_first(tmp_path):
    path = write(tmp_path / "a.json", retrieve(0.4, "old"), retrieve(0.5, "new"), retrieve(0.6, "newest"))
    compared = compare_results(path, models=("old", "newest"))
    assert [(pair["a"], pair["b"]) for pair in compared["pairs"]] == [("old", "newest")]
    first = render_comparison(compared).splitlines()[0]
    assert first.startswith(
        "newest is better than old at retrieval (R@1), in both directions. Zero-shot accuracy was not"
    )
    shown = render_comparison(compare_results(path, models=("new", "old")))
    assert shown.startswith("old is worse than new") and f"A: new, of `{path}`  \nB: old, of `{path}`" in shown
    with pytest.raises(ValueError, match="model of .*a.json, got 'gone'. It holds: old; new; newest"):
        compare_results(path, models=("old", "gone"))
    with pytest.raises(ValueError, match="two different models"):
        compare_results(path, models=("old", "old"))
    with pytest.raises(ValueError, match="two models in .*a.json, got 3: old; new; newest. Name two with --models"):
        compare_results(path)


def test_a_file_of_two_models_needs_no_names_and_a_point_between_them_counts_as_a_model(tmp_path):
    path = write(tmp_path / "a.json", retrieve(0.4, "old"), retrieve(0.5, "new"))
    assert render_comparison(compare_results(path)).startswith("new is better than old")
    point = retrieve(0.55, "new", revision="sha256:0.5", condition="alpha=0.5")
    path = write(tmp_path / "b.json", retrieve(0.5, "new"), point)
    (pair,) = compare_results(path, models=("new", "new, alpha=0.5"))["pairs"]
    assert not pair["same_weights"] and (pair["a"], pair["b"]) == ("new", "new, alpha=0.5")


def test_models_of_two_files_may_be_named_by_the_last_part_of_their_path(tmp_path):
    a = write(tmp_path / "a.json", measure(0.5, model="/runs/one/student"))
    b = write(tmp_path / "b.json", measure(0.6, model="/runs/two/student"), measure(0.7, model="/runs/three"))
    compared = compare_results(a, b, models=("student", "student"))
    assert compared["pairs"][0]["metrics"][0]["b"] == pytest.approx(0.6, abs=0.05)
    assert (compared["pairs"][0]["a"], compared["pairs"][0]["b"]) == ("one/student", "two/student")  # as in tables
    assert "Also different: weights 0.5 → 0.6." in render_comparison(compared)  # the names are above
    c = write(tmp_path / "c.json", measure(0.5, model="/x/student"), measure(0.6, model="/y/student"))
    with pytest.raises(ValueError, match="one model of the name 'student' in .*c.json, got several"):
        compare_results(a, c, models=("student", "student"))


def test_a_comparison_on_other_data_says_so_at_the_top(tmp_path):
    a = write(tmp_path / "a.json", retrieve(0.4, "old"))
    b = write(tmp_path / "b.json", retrieve(0.6, "new", dataset_fingerprint="sha256:other"))
    assert "The data differ" in render_comparison(compare_results(a, b)).splitlines()[0]


def test_two_files_of_one_benchmark_with_several_other_models_say_how_to_name_them(tmp_path):
    a = write(tmp_path / "a.json", measure(0.5, model="one"), measure(0.6, model="two"))
    b = write(tmp_path / "b.json", measure(0.5, model="three"), measure(0.6, model="four"))
    with pytest.raises(
        ValueError, match=r"got one, two in .*a.json and three, four in .*Name .* with --models two four"
    ):
        compare_results(a, b)
