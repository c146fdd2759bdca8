"""Tables of benchmarks: the numbers of the files that are committed, and of nothing else."""

import json
from pathlib import Path

import pytest

from modeling_dclip.evaluation.reports import benchmark_tables as tables
from modeling_dclip.evaluation.reports.document import render_markdown

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ENVIRONMENT = {"hardware": {"cpu": "a CPU"}, "versions": {"torch": "2"}}


def as_markdown(tabulate):
    return lambda data, **options: render_markdown(tabulate(data, **options))


render_encoders = as_markdown(tables.tabulate_encoders)
render_index = as_markdown(tables.tabulate_index)
render_onnx_towers = as_markdown(tables.tabulate_onnx_towers)
render_retrieval = as_markdown(tables.tabulate_retrieval)
render_scan = as_markdown(tables.tabulate_scan)
render_student_step = as_markdown(tables.tabulate_student_step)


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def cells_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_an_encoder_stands_with_its_cost_and_its_ratio_to_each_baseline():
    data = read("image_encoders")
    header, _, *lines = cells_of(render_encoders(data, cells="native@8,native@1"))
    rows = [row for cell in ("native@8", "native@1") for row in data["rows"] if row["cell"] == cell]
    assert [line[0] for line in lines] == [row["encoder"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        shown = dict(zip(header, line, strict=True))
        assert float(shown["CPU ms"]) == pytest.approx(row["cpu_ms"]["median"], rel=5e-3)
        assert shown["batch"] == str(row["batch_size"]) and shown["GFLOP"] == f"{row['eager_gflops']:.1f}"
        for name, ratio in row["time_over"].items():
            assert shown[f"/ {name}"] == f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.01234, "0.0123"), (0.9999, "1.00"), (8.0, "8.00"), (86.099, "86.1"), (99.96, "100"), (143.6, "144"),
     (2815.4, "2815")],
)  # fmt: skip
def test_a_time_shows_three_digits_and_no_exponent(value, shown):
    row = {"cell": "native@1", "encoder": "a", "image_size": 8, "batch_size": 1, "time_over": {}}
    row |= {"eager_parameters": 1e6, "eager_gflops": 1.0, "latency_ms": {"median": value, "min": value, "max": value}}
    data = {"rows": [row], "clock_of_ratios": "latency_ms", "arguments": {}, "versions": {"torch": "2"}}
    header, _, line = cells_of(render_encoders(data | {"hardware": {"cpu": "a CPU"}}))
    assert dict(zip(header, line, strict=True))["ms"] == shown


def test_an_encoder_is_compared_with_what_is_asked_for_only():
    header = cells_of(render_encoders(read("image_encoders"), over="mobileclip_s1_train_form"))[0]
    assert [name for name in header if name.startswith("/")] == ["/ mobileclip_s1_train_form"]


def test_a_cell_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match="Expected cells of .*native@1.*, got '999@1'"):
        render_encoders(read("image_encoders"), cells="999@1")


def test_a_scan_without_the_slow_algorithm_shows_a_dash():
    data = read("selective_scan")
    lines = cells_of(render_scan(data))[2:]
    assert [line[0] for line in lines] == ["({}, {}, {})".format(*row["shape"]) for row in data["rows"]]
    for line, row in zip(lines, data["rows"], strict=True):
        measured = "mamba_ssm_reference_algorithm" in row["paths"]
        assert (line[2] != "–") == measured
        ratio = row["paths"]["torch"]["forward_backward_times_faster_than_reference"]
        assert line[6].startswith(f"{ratio['median']:.1f} [")


def test_a_step_says_how_many_times_longer_it_takes_online_and_on_what():
    data = read("student_step")
    text = render_student_step(data)
    assert f"{data['online_over_cached']['median']:.2f} [" in cells_of(text)[3][2]
    assert data["hardware"]["cpu"] in text and "1 thread(s)" in text


def test_retrieval_shows_both_sides_the_ratios_and_the_growth():
    data = read("retrieval")
    compared, grown = (cells_of(part) for part in render_retrieval(data).split("Captions", 1))
    for line, row in zip(compared[2:], data["rows"], strict=False):
        assert line[:2] == [f"{row['images']:,}", f"{row['captions']:,}"]
        assert float(line[2]) == pytest.approx(row["ours"]["cpu_s"]["median"], abs=5e-3)
        assert float(line[6]) == pytest.approx(row["clip_benchmark"]["peak_memory_mib"]["median"], abs=0.5)
        for cell, name in ((line[4], "times_faster"), (line[7], "times_less_memory")):
            assert cell.startswith(f"{row[name]['median']:.1f} [{row[name]['min']:.1f}, ")
    assert [line[0] for line in grown[-len(data["growth"]) :]] == [f"{row['captions']:,}" for row in data["growth"]]
    assert data["hardware"]["cpu"] in render_retrieval(data)


def test_onnx_towers_show_speed_and_distance_from_the_model():
    data = read("onnx_towers")
    lines = render_onnx_towers(data).splitlines()
    assert len(lines) == 2 + len(data["rows"]) + 2
    row = next(row for row in data["rows"] if (row["tower"], row["form"]) == ("text", "onnx_int8"))
    (shown,) = [line for line in lines if line.startswith("| text, onnx_int8")]
    assert f"{row['min_cosine']:.5f}" in shown and f"{row['eager_over']['median']:.2f} [" in shown
    (eager,) = [line for line in lines if line.startswith("| text, eager")]
    assert eager.count("–") == 3


def test_an_index_shows_build_query_and_recall_of_each_kind_of_vectors():
    data = read("index")
    shown = render_index(data)
    assert "100,000 random unit vectors of 512" in shown
    assert ["clustered, spread 1", "hnsw"] in [cells[:2] for cells in cells_of(shown)]
    row = data["results"]["uniform"]["ivf"]
    (cells,) = [cells for cells in cells_of(shown) if cells[:2] == ["uniform", "ivf"]]
    expected = [f"{row['build_s']:.1f}", f"{row['query_ms']['median']:.2f}", f"{row['query_ms']['p95']:.2f}"]
    assert cells[2:] == [*expected, f"{row['recall@10']:.3f}"]


def test_retrieval_that_was_not_run_says_why():
    data = read("retrieval")
    row = {"images": 99, "captions": 495, "rounds": 0, "not_run": "9 MiB are not free"}
    text = render_retrieval(data | {"rows": [row]})
    assert cells_of(text)[2] == ["99", "495", *["–"] * 6] and "At 99 images: 9 MiB are not free." in text


def test_reliability_is_counted_by_kind_and_in_all():
    outcomes = ("tried", "right", "skipped", "clear_line", "unplaced_line", "silent", "traceback", "hang")
    rows = [dict(zip(("kind", *outcomes), (name, *counts), strict=True)) for name, *counts in
            [("CSV", 10, 3, 2, 5, 0, 0, 0, 0), ("JSON", 1200, 3, 0, 1194, 0, 1, 2, 0)]]  # fmt: skip
    data = {"rows": rows, "arguments": {"seed": 7}, "environment": ENVIRONMENT}
    text = render_markdown(tables.tabulate_fuzz(data))
    header, _, *lines = cells_of(text)
    assert header[:3] == ["Input", "tried", "read right"] and "seed 7" in text and "a CPU" in text
    assert lines[0] == ["CSV", "10", "3", "2", "5", "0", "0", "0", "0"]
    assert lines[-1] == ["all", "1,210", "6", "2", "1,199", "0", "1", "2", "0"]


def test_a_refusal_is_numbered_and_said_once_below_the_families():
    yes, no = {"end": "yes", "said": ""}, {"end": "refused", "said": "clip_model: expected *another*"}
    rows = [
        {"family": "a", "name": "A", "cells": {"train": yes, "onnx": no}},
        {"family": "b", "name": "B", "cells": {"onnx": no}},
    ]
    text = render_markdown(tables.tabulate_families({"rows": rows, "environment": ENVIRONMENT}))
    assert cells_of(text)[2:] == [["A", "yes", "refused (1)"], ["B", "–", "refused (1)"]]
    assert text.count("(1) clip_model: expected") == 1 and "a CPU" in text


def test_rotary_positions_show_what_is_kept_and_the_difference_by_seed():
    data = read("rotary_positions")
    start, sizes = (cells_of(part) for part in as_markdown(tables.tabulate_rotary_positions)(data).split("The anchor"))
    for line, row in zip(start[2:], data["start"], strict=True):
        top1 = row["metrics"]["top1"]
        assert float(line[3]) == pytest.approx(100 * top1, abs=0.06)
        assert float(line[6]) == pytest.approx(100 * top1 / data["start"][0]["metrics"]["top1"], abs=0.06)
    by_name = {line[0]: line[1:] for line in sizes[2:]}
    side = data["arguments"]["sizes"].index(60)
    values = {
        arm: [
            row["metrics"]["top1"] for row in data["sizes"] if row["model"] == f"{arm}, trained" and row["size"] == 60
        ]
        for arm in ("rope", "absolute")
    }
    means = {arm: 100 * sum(found) / len(found) for arm, found in values.items()}
    assert float(by_name["rope, trained"][side].split(" / ")[2]) == pytest.approx(means["rope"], abs=0.06)
    shown = float(by_name["rope - absolute, trained"][side].split(" / ")[2].split(" ±")[0])
    assert shown == pytest.approx(means["rope"] - means["absolute"], abs=0.06)


def test_kills_are_counted_by_command_and_in_all():
    row = {"command": "train.py", "what": "teacher", "runs": 3, "kills": 5, "resumed_equal": 2, "different": 1}
    other = {**row, "what": "student", "kills": 4, "different": 0}
    rows = [one | {"errors": 0, "leftovers": 0} for one in (row, other)]
    text = render_markdown(tables.tabulate_kills({"rows": rows, "environment": ENVIRONMENT}))
    header, _, *lines = cells_of(text)
    shown = [dict(zip(header, line, strict=True)) for line in lines]
    assert shown[1]["what"] == "student" and shown[1]["kills"] == "4" and shown[-1]["kills"] == "9"
    assert [line["ended otherwise"] for line in shown] == ["1", "0", "1"]


def test_a_picture_stands_with_its_cosine_at_each_door_or_is_refused():
    read = {"name": "grey16", "what": "16 bits", "outcome": "read", "cosines": {"index": 0.99996, "space": 1.0}}
    refused = {"name": "cut", "what": "half a file", "outcome": "refused", "cosines": {}}
    data = {"doors": ["index", "space", "query"], "pictures": [read, refused], "environment": ENVIRONMENT}
    header, _, *lines = cells_of(render_markdown(tables.tabulate_pictures(data)))
    assert header == ["Picture", "what", "index", "space", "query"]
    assert lines == [
        ["grey16", "16 bits", "1.0000", "1.0000", "–"],
        ["cut", "half a file", *["refused"] * 3],
    ]


def test_banks_have_a_row_for_each_size_and_micro_batches_a_line():
    data = read("negatives")
    header, _, *lines = cells_of(render_markdown(tables.tabulate_negatives(data)))
    assert [line[0] for line in lines] == [f"{row['captions']:,}" for row in data["rows"]]
    for line, row in zip(lines, data["rows"], strict=True):
        assert line[4].startswith(f"{100 * row['tiles_over_step']['median']:.1f} [")
        assert line[6:] == [f"{row['grown_mebibytes'][way]:.0f}" for way in ("tiles", "one_matrix")]
    ratio = data["micro_batches_over_accumulated"]["median"]
    assert f"takes {ratio:.2f} times as long" in render_markdown(tables.tabulate_negatives(data))
    assert len(header) == 8
