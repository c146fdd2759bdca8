"""Arms at equal retention: exact values on made-up lines."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from modeling_dclip.evaluation.equal_retention import compare_at_retention, cross, render_at_retention
from modeling_dclip.evaluation.records import record_key, write_outcomes, write_results
from modeling_dclip.evaluation.results import render_readme

T2I, I2T = "text_to_image_recall@1", "image_to_text_recall@1"
RETRIEVAL, ZERO_SHOT = "retrieval=disk:/data/some/where", "zero_shot=imagefolder:/data/else"


def record(benchmark, metrics, revision, **fields):
    base = {
        "format_version": 1,
        "model": f"runs/{revision}",
        "benchmark": benchmark,
        "metrics": metrics,
        "n": 100,
        "seed": 0,
        "split": None,
        "revision": revision,
        "dataset_fingerprint": "sha256:data",
        "versions": {"modeling_dclip": "0.1"},
        "hardware": {},
        "command": "",
        "created": "2025-01-31T12:00:00+00:00",
    }
    return {**base, **fields}


def line(label, points, student_alpha=1):
    """The records of one run; points are alpha -> (top-1, T->I, I->T); that at `student_alpha` is the run's own."""
    records = []
    for alpha, (top1, t2i, i2t) in points.items():
        fields = {"comparison": {"anchor": "clip", "anchor_revision": "anchor"}}
        if alpha == student_alpha:
            pass
        else:
            settings = {"alpha": alpha} | ({"student_alpha": student_alpha} if student_alpha != 1 else {})
            fields |= {"condition": f"alpha={alpha:g}", "settings": settings}
        if label is not None:
            fields["label"] = label
        records.append(record(RETRIEVAL, {T2I: t2i, I2T: i2t}, label or "alone", **fields))
        records.append(record(ZERO_SHOT, {"top1": top1}, label or "alone", **fields))
    return records


ANCHOR = [
    record(RETRIEVAL, {T2I: 0.2, I2T: 0.3}, "anchor", label="clip"),
    record(ZERO_SHOT, {"top1": 0.8}, "anchor", label="clip"),
]
# At 95 % (0.76): half-way between alpha 0.5 and 1. At 90 % (0.72): the end.
FIRST = {0.5: (0.8, 0.3, 0.4), 1: (0.72, 0.4, 0.2)}
# At 95 %: at alpha 0.75 exactly, though alpha 0.25 was below it already. At 90 %: half-way from there to the end.
SECOND = {0.25: (0.6, 0.1, 0.1), 0.75: (0.76, 0.5, 0.5), 1: (0.68, 0.7, 0.3)}


def outcomes_of(records):
    """Of 100 images, the first ones are the hits: what one model finds, a better one finds too."""
    outcomes = {}
    for one in records:
        hits = {name: (torch.arange(100) < round(100 * value)).double() for name, value in one["metrics"].items()}
        outcomes[record_key(one)] = {name: torch.stack([own, torch.ones(100)], dim=1) for name, own in hits.items()}
    return outcomes


def test_values_are_read_off_where_the_line_crosses():
    first, second = compare_at_retention([*ANCHOR, *line(None, FIRST)], retentions=(0.95, 0.9))
    (arm,) = first["arms"]
    assert arm["arm"] == "runs/alone" and arm["alphas"] == [0, 0.5, 1] and "difference" not in arm
    (run,) = arm["runs"].values()
    assert run["alpha"] == pytest.approx(0.75) and not run["is_end"]
    assert run["metrics"] == pytest.approx({T2I: 0.35, I2T: 0.3})
    assert arm["metrics"][T2I]["low"] is None and arm["metrics"][T2I]["covers"] == "nothing"
    (end,) = second["arms"][0]["runs"].values()
    assert end == {"alpha": 1, "is_end": True, "metrics": {T2I: 0.4, I2T: 0.2}}
    assert first["anchor_metrics"] == {T2I: 0.2, I2T: 0.3} and first["anchor"] == "clip"
    assert (first["n_retrieval"], first["zero_shot"], second["retention"]) == (100, ZERO_SHOT, 0.9)


def test_the_largest_alpha_that_still_keeps_as_much_counts():
    records = [*ANCHOR, *line("a, seed 0", FIRST), *line("a, seed 1", SECOND)]
    (table,) = compare_at_retention(records, retentions=[0.9])
    (arm,) = table["arms"]
    assert [run["alpha"] for run in arm["runs"].values()] == pytest.approx([1, 0.875])
    assert [run["is_end"] for run in arm["runs"].values()] == [True, False]
    assert arm["runs"]["1"]["metrics"] == pytest.approx({T2I: 0.6, I2T: 0.4})
    half = 12.706204736 * math.sqrt(2) * 0.1 / math.sqrt(2)  # Student's t at one degree, of 0.4 and 0.6
    mean = arm["metrics"][T2I]
    assert (mean["estimate"], mean["low"], mean["high"]) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_a_student_that_is_an_average_keeps_its_place_on_the_line():
    """Its own record is the point at 0.5; the end is extrapolated and has a record of its own."""
    records = [*ANCHOR, *line("a, seed 0", FIRST, student_alpha=0.5)]
    (table,) = compare_at_retention(records, retentions=[0.95])
    assert table["arms"][0]["runs"]["0"]["metrics"] == pytest.approx({T2I: 0.35, I2T: 0.3})


def test_arms_are_compared_by_seed_and_over_images():
    runs = {"a, seed 0": FIRST, "a, seed 1": SECOND, "b, seed 0": SECOND, "b, seed 1": SECOND}
    records = [*ANCHOR, *(one for label, points in runs.items() for one in line(label, points))]
    outcomes = outcomes_of(records)
    (table,) = compare_at_retention(records, outcomes, baseline="a", retentions=[0.95])
    baseline, arm = table["arms"]
    assert "difference" not in baseline
    assert arm["difference"][T2I]["estimate"] == pytest.approx((0.5 - 0.35) / 2)
    assert arm["difference"][T2I]["high"] == pytest.approx(0.075 + 12.706204736 * 0.075)
    found = arm["difference_over_images"][T2I]
    assert found["estimate"] == arm["difference"][T2I]["estimate"] and found["covers"] == "images"
    assert found["low"] < 0.075 < found["high"] and found["high"] - found["low"] < 0.3
    without = compare_at_retention(records[:-1] + [{**records[-1], "revision": "x"}], outcomes, baseline="a")
    assert "difference_over_images" not in without[0]["arms"][1]  # one point has no outcomes
    for draws in (10, 20):
        assert compare_at_retention(records, outcomes, resamples=draws, retentions=[0.95])[0]["arms"][0]["runs"]


def test_every_draw_of_images_finds_its_own_crossing():
    kept = torch.tensor([[1.0, 0.9, 0.8], [1.0, 0.96, 0.94], [1.0, 1.1, 1.2]], dtype=torch.double)
    values = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.double).expand(3, 3, 1)
    found, ends = cross(kept, values, 0.95)
    assert found[:, 0].tolist() == pytest.approx([0.5, 2.0, 3.0]) and ends.tolist() == [False, False, True]
    with pytest.raises(ValueError, match=r"retention in \(0, 1\], got 0"):
        cross(kept, values, 0)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: rows[2:], {}, "imagefolder:/data/else, got no record of the anchor"),
        (lambda rows: rows[:2], {}, "one anchor, got 0 anchors"),
        (lambda rows: [*rows, *line("b, seed 0", FIRST)], {"baseline": "b"}, "same seeds, got "),
        (lambda rows: rows, {"baseline": "c"}, r"among the arms \['a'\], got 'c'"),
        (lambda rows: rows, {"zero_shot": "x"}, "'x' among the zero-shot benchmarks .* got zero_shot=imagefolder"),
        (lambda rows: [*rows, {**rows[1], "benchmark": "zero_shot=y"}], {}, "one of the zero-shot .*y. Name it with"),
        (lambda rows: [one for one in rows if one["benchmark"] == ZERO_SHOT], {}, "retrieval benchmark .* got none"),
        (lambda rows: rows[:-1] + [{**rows[-1], "dataset_fingerprint": "sha256:x"}], {}, "got 2 kinds of it"),
        (lambda rows: [*rows[:2], *rows[3::2]], {}, "a, seed 0 on .*, got only one. Measure the other"),
        (lambda rows: [rows[0], {**rows[1], "metrics": {"top1": 0.0}}, *rows[2:]], {}, "anchor above 0 on zero_shot"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, options, message):
    rows = change([*ANCHOR, *line("a, seed 0", FIRST), *line("a, seed 1", SECOND)])
    with pytest.raises(ValueError, match=message):
        compare_at_retention(rows, **options)


def test_the_tables_are_written_and_rendered_into_a_page(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("eval_script", Path(__file__).resolve().parents[2] / "eval.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runs = {"a, seed 0": FIRST, "a, seed 1": SECOND, "b, seed 0": SECOND, "b, seed 1": SECOND}
    records = [*ANCHOR, *(one for label, points in runs.items() for one in line(label, points))]
    write_results(tmp_path / "lines.json", records)
    write_outcomes(tmp_path / "lines.json", outcomes_of(records))
    words = ["equal_retention", str(tmp_path / "lines.json"), "--baseline", "a", "--retention", "0.9"]
    assert script.main([*words, "--output", str(tmp_path / "table.json")]) == 0
    printed = capsys.readouterr().out
    assert (
        "`retrieval=disk:some/where`, 100 images, at 90 % of clip's top-1 on `zero_shot=imagefolder:data/else`"
        in printed
    )
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
        for row in printed.split("\n")
        if "|" in row
    }
    assert rows["clip"] == ["1", "0", "20.0", "–", "30.0", "–"]
    assert rows["a"][:3] == ["2", "0.94", "50.0 ± 127.1"] and rows["a"][3] == "–"
    assert rows["b"][3].startswith("+10.0 ± 127.1 [") and rows["b"][0] == "2"
    assert "at least 90 %, so that its last point counts: a in 1 of 2 runs.\n" in printed
    assert "measured at alpha 0, 0.25, 0.5, 0.75, 1 on its line" in printed
    page = tmp_path / "page.md"
    page.write_text("<!-- results:x source=table.json table=equal_retention -->\n<!-- /results:x -->\n")
    assert render_readme(page) == ["x"]
    assert page.read_text().split("\n", 1)[1].startswith(printed.partition("Written to")[0].rstrip())
    (tmp_path / "table.json").write_text(json.dumps([{"retention": 0.9}]))
    with pytest.raises(ValueError, match="tables with retention, retrieval, .* Write it with eval.py equal_retention"):
        render_readme(page)


def test_a_single_arm_has_no_column_of_differences():
    text = render_at_retention(compare_at_retention([*ANCHOR, *line(None, FIRST)]))
    assert "minus" not in text and "interval" not in text and "| runs/alone " in text
