"""The results format refuses what is not valid, files are whole or untouched,
and README blocks come from files alone.
"""

import json
import math
import os

import pytest
from fixtures.records import make_test_record as record

from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.records import read_results, write_results
from modeling_dclip.evaluation.reports.document import Table, render_markdown
from modeling_dclip.evaluation.reports.metric_names import percent
from modeling_dclip.evaluation.reports.tables import render_summary, render_table, shorten_paths, show_interval
from modeling_dclip.evaluation.results import main, render_readme
from modeling_dclip.evaluation.statistics import summarise_arms


def test_what_is_written_is_read_back(tmp_path):
    records = [record(), record(benchmark="zero_shot=scenes", metrics={"top1": 0.5}, split=None, label="student")]
    write_results(tmp_path / "new" / "results.json", records)
    assert read_results(tmp_path / "new" / "results.json") == records
    assert os.listdir(tmp_path / "new") == ["results.json"]


def test_one_record_alone_becomes_a_list(tmp_path):
    write_results(tmp_path / "results.json", record())
    assert len(read_results(tmp_path / "results.json")) == 1


def test_a_record_says_what_it_was_measured_with():
    made = record()
    assert list(made)[:4] == ["format_version", "model", "benchmark", "metrics"]
    assert {"python", "torch", "transformers", "modeling_dclip"} <= set(made["versions"])
    assert {"cpu", "cpu_count", "gpus"} <= set(made["hardware"])
    assert made["created"].endswith("+00:00")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("revision"), "the field 'revision' in record 1 of .*results.json"),
        (lambda r: r.update(format_version=2), "'format_version' 1 in record 1 of .*results.json, got 2"),
        (lambda r: r.update(n="many"), "int in the field 'n' of record 1.*got 'many'"),
        (lambda r: r.update(n=True), "int in the field 'n'"),
        (lambda r: r.update(metric={}), "Unknown field 'metric' in record 1"),
        (lambda r: r["metrics"].update(top1=None), "'metrics' / 'top1' of record 1.*got None"),
        (lambda r: r["metrics"].update(top1=math.nan), "'metrics' / 'top1' of record 1.*got nan"),
    ],
)
def test_reading_names_file_and_field(tmp_path, change, message):
    broken = record()
    change(broken)
    (tmp_path / "results.json").write_text(json.dumps([record(), broken]))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Expected JSON in .*results.json"), ("{}", "got dict"), ("[]", "one or more records"), ("[3]", "got int")],
)
def test_what_is_no_list_of_records_is_refused(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "results.json")


def test_a_bad_record_leaves_the_old_file_untouched(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, record())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'metrics' / 'top1'"):
        write_results(path, {**record(), "metrics": {"top1": math.inf}})
    with pytest.raises(ValueError, match="one or more records"):
        write_results(path, [])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"value": math.nan})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["results.json"]


def test_an_interrupted_write_leaves_the_old_file_untouched(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, record())
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(path, record(seed=1))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["results.json"]


def test_rewriting_keeps_the_permissions(tmp_path):
    path = tmp_path / "README.md"
    write_results(tmp_path / "a.json", record())
    path.write_text("<!-- results:a source=a.json -->\n<!-- /results:a -->\n")
    path.chmod(0o640)
    assert render_readme(path) == ["a"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_table_has_a_row_per_record_and_bolds_the_best_of_a_benchmark():
    records = [
        record("anchor", metrics={"text_to_image_recall@1": 0.25, "image_to_text_recall@1": 0.4}),
        record(
            "student", metrics={"text_to_image_recall@1": 0.31, "image_to_text_recall@1": 0.3}, label="our | student"
        ),
        record(
            "student",
            benchmark="retrieval=coco",
            metrics={"text_to_image_recall@1": 0.1, "image_to_text_recall@1": 0.2},
        ),
        record("student", benchmark="zero_shot=scenes", metrics={"top1": 0.9}),
    ]
    for one in records[:2]:
        one["intervals"] = {
            name: {
                "estimate": value,
                "low": value - 0.02,
                "high": value + 0.02,
                "confidence": 0.95,
                "covers": "images",
            }
            for name, value in one["metrics"].items()
        }
    text = render_table(records, best=True)
    heading, table, other_heading, other, note = text.split("\n\n")
    assert heading == "Retrieval, 2 benchmarks:" and note.startswith("In brackets: 95%")
    assert table.splitlines()[0].split() == "| Model | Benchmark | n | T→I R@1 | I→T R@1 |".split()
    assert "| scenes:test | 1,000 |     25.0 [23.0, 27.0] | **40.0** [38.0, 42.0] |" in table
    assert "| our \\| student | scenes:test | 1,000 | **31.0** [29.0, 33.0] |     30.0 [28.0, 32.0] |" in table
    assert "| coco        | 1,000 |                  10.0 |                  20.0 |" in table
    assert other_heading == "Zero-shot classification on `scenes`, 1,000 images:"
    assert "| student |  90.0 |" in other
    only = render_table(records, metrics=["image_to_text_recall@1"])
    assert "T→I" not in only and "top-1" not in only
    with pytest.raises(ValueError, match="any of the metrics"):
        render_table(records, metrics=["accuracy"])


def test_table_shows_the_comparison_with_its_interval():
    gain = {"estimate": 0.2, "low": 0.1, "high": 0.35, "confidence": 0.95, "covers": "images"}
    text = render_table([record("anchor"), record("student", comparison={"text_to_image_recall@1_gain": gain})])
    assert "+20.0 [+10.0, +35.0] %" in text
    lines = text.splitlines()
    assert lines[0] == "Retrieval on `scenes:test`, 1,000 images:"
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["Model", "T→I R@1 gain", "T→I R@1"]
    assert [cell.strip() for cell in lines[4].split("|")[1:3]] == ["anchor", "–"]
    assert text.endswith("T→I R@1 gain: relative to the anchor.")


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ({"estimate": 0.5, "low": None, "high": None}, "50.0"),
        ({"estimate": 0.5, "low": 0.48, "high": 0.52}, "50.0 ± 2.0"),
        ({"estimate": 0.5, "low": 0.4, "high": 0.52}, "50.0 [40.0, 52.0]"),
        ({"estimate": 0.5, "low": 0.4, "high": None}, "50.0 [40.0, ∞]"),
        ({"estimate": 0.5, "low": 0.48, "high": 0.52, "covers": "images"}, "50.0 [48.0, 52.0]"),
    ],
)
def test_intervals_are_shown_by_their_shape(interval, text):
    assert show_interval(interval) == text


def test_zero_has_no_minus():
    assert (percent(-0.0001), percent(-0.0001, signed=True), percent(-0.01, signed=True)) == ("0.0", "0.0", "-1.0")


def test_columns_line_up():
    assert render_markdown([Table(["a", "b"], [["long cell", "1"]])]).splitlines() == [
        "| a         |   b |",
        "| --------- | --: |",
        "| long cell |   1 |",
    ]


def make_summary():
    def run(retrieval, accuracy):
        return {"text_to_image_recall@1": retrieval, "image_to_text_recall@1": 0.5, "top1": accuracy}

    arms = {
        "anchor": {0: run(0.20, 0.80)},
        "no teacher": {0: run(0.22, 0.76), 1: run(0.24, 0.72)},
        "student": {0: run(0.25, 0.76), 1: run(0.27, 0.76)},
    }
    return summarise_arms(arms, pairs=[("student", "no teacher")])


def test_summary_shows_arms_gain_retention_and_what_the_interval_covers():
    lines = render_summary(make_summary()).splitlines()
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells == ["student", "2", "26.0 ± 12.7", "50.0 ± 0.0", "76.0 ± 0.0", "+30.0 ± 63.5", "95.0 ± 0.0"]
    assert lines[2].count("–") == 2  # the anchor has neither gain nor retention
    assert "±: 95% t-interval over training seeds, on one test set. Gain" in lines[6]
    assert lines[8].startswith("student minus no teacher, paired by seed, in points: T→I R@1 +3.0 ± 0.0")


@pytest.mark.parametrize("broken", [{}, {"arms": []}, [], {"arms": [{"arm": "a", "seeds": [0], "metrics": {}}]}])
def test_a_summary_that_is_none_is_named(broken):
    with pytest.raises(ValueError, match="summary.json"):
        render_summary(broken, where="summary.json")


README = """# Title

<!-- results:demo source=summary.json table=demo -->
<!-- /results:demo -->
between
<!-- results:real source=runs/*.json metrics=text_to_image_recall@1 best=true -->
old
<!-- /results:real -->
<!-- results:by-hand -->
mine
<!-- /results:by-hand -->
"""


@pytest.fixture
def readme(tmp_path):
    write_json(tmp_path / "summary.json", make_summary())
    write_results(tmp_path / "runs" / "a.json", record("anchor"))
    write_results(tmp_path / "runs" / "b.json", record("student"))
    (tmp_path / "README.md").write_text(README)
    return tmp_path / "README.md"


def test_readme_blocks_are_rendered_from_their_files_and_all_else_stays(readme):
    assert render_readme(readme) == ["demo", "real"]
    text = readme.read_text()
    assert "26.0 ± 12.7" in text and "Retrieval on `scenes:test`, 1,000 images:" in text
    assert "| student |    25.0 |" in text
    assert "old" not in text and "\nmine\n" in text and text.startswith("# Title\n") and "\nbetween\n" in text
    assert render_readme(readme) == []


def test_check_fails_until_rendered_and_changes_nothing(readme, capsys):
    assert main([str(readme), "--check"]) == 1
    assert "Out of date" in capsys.readouterr().err
    assert readme.read_text() == README
    assert main([str(readme)]) == 0
    assert main([str(readme), "--check"]) == 0
    write_results(readme.parent / "runs" / "b.json", record("student", n=7))
    assert main([str(readme), "--check"]) == 1


@pytest.mark.parametrize(
    ("benchmark", "shown"),
    [
        ("retrieval=parquet:../d/flickr/a.parquet,source=flickr", "retrieval=parquet:flickr/a.parquet,source=flickr"),
        ("retrieval=coco:/d/coco/notes/a.json:/d/coco/val2017", "retrieval=coco:notes/a.json:coco/val2017"),
        ("zero_shot=parquet:./test.parquet", "zero_shot=parquet:test.parquet"),
        ("zero_shot=hub:uoft-cs/cifar100:test", "zero_shot=hub:uoft-cs/cifar100:test"),
        ("zero_shot=wds:https://host.org/sets/cars/test:test", "zero_shot=wds:https://host.org/sets/cars/test:test"),
        ("retrieval=scenes:test,n=1000,seed=1", "retrieval=scenes:test,n=1000,seed=1"),
        ("efficiency", "efficiency"),
    ],
)  # fmt: skip
def test_a_benchmark_is_shown_without_the_folders_of_a_machine(benchmark, shown):
    assert [row["benchmark"] for row in shorten_paths([record(benchmark=benchmark)])] == [shown]


def test_benchmarks_that_would_look_equal_stay_as_they_are():
    names = ["retrieval=parquet:/one/flickr/test.parquet", "retrieval=parquet:/two/flickr/test.parquet"]
    assert [row["benchmark"] for row in shorten_paths([record(benchmark=name) for name in names])] == names


def test_a_model_is_shown_by_its_label_or_without_the_folders_that_all_share():
    records = [
        record("/home/me/runs/3/anchor"),
        record("/home/me/runs/3/arm/student"),
        record("openai/clip-vit-base-patch16"),
    ]
    records += [
        record("/home/me/runs/4/student", label="own label"),
        record("clip"),
        record("/home/me/runs/3/anchor", n=7),
        record("open_clip:ViT-B-32:/home/me/weights/b32.pt"),
    ]
    before = json.dumps(records)
    names = [row.get("label", row["model"]) for row in shorten_paths(records)]
    assert names[:6] == ["anchor", "arm/student", "openai/clip-vit-base-patch16", "own label", "clip", "anchor"]
    assert names[6:] == [records[6]["model"]]
    assert json.dumps(records) == before
    assert [row["label"] for row in shorten_paths([record("../runs/anchor")])] == ["anchor"]
    assert [row["label"] for row in shorten_paths([record("../runs/student")])] == ["runs/student"]
    assert [row["label"] for row in shorten_paths([record("/home/me/runs/dmclip")])] == ["runs/dmclip"]
    assert shorten_paths([]) == []


def test_paths_that_share_no_folder_keep_as_few_parts_as_tell_them_apart():
    names = ["/home/me/runs/mine/student", "/data/models/of/others/student", "/srv/clip/large/anchor"]
    assert [row["label"] for row in shorten_paths([record(name) for name in names])] == [
        "mine/student",
        "others/student",
        "large/anchor",
    ]
    names = ["/a/b/c/one/run/student", "/d/e/f/two/run/student"]
    assert [row["label"] for row in shorten_paths([record(name) for name in names])] == [
        "one/run/student",
        "two/run/student",
    ]


def test_a_block_shows_no_path_of_a_machine(readme):
    path = readme.parent / "measured.json"
    write_results(path, [record("../runs/3/student", "retrieval=parquet:/data/flickr/validation.parquet")])
    readme.write_text("<!-- results:x source=measured.json -->\n<!-- /results:x -->\n")
    before = path.read_bytes()
    assert render_readme(readme) == ["x"] and path.read_bytes() == before
    assert "Retrieval on `parquet:flickr/validation.parquet`" in readme.read_text()
    assert "| 3/student |" in readme.read_text()
    assert "/data" not in readme.read_text() and "runs" not in readme.read_text()


def test_text_between_the_markers_is_replaced_and_nothing_else(readme):
    write_results(readme.parent / "runs" / "c.json", record("\\1", benchmark="zero_shot=x", metrics={"top1": 0.5}))
    readme.write_text("a\n<!-- results:x source=runs/c.json -->\nold\n<!-- /results:x --> b\n")
    assert render_readme(readme) == ["x"]
    first, marker, *table, last = readme.read_text().splitlines()
    assert (first, marker, last) == ("a", "<!-- results:x source=runs/c.json -->", "<!-- /results:x --> b")
    assert len(table) == 5 and table[4].startswith("| \\1 ")


def test_a_verdict_is_a_block_too(readme):
    gain = {"estimate": 0.2, "low": 0.1, "high": 0.35, "confidence": 0.95, "covers": "images"}
    comparison = {"anchor": "anchor", "anchor_revision": "sha256:anchor", "text_to_image_recall@1_gain": gain}
    rows = [record("anchor", revision="sha256:anchor"), record("mine", comparison=comparison, revision="sha256:mine")]
    write_results(readme.parent / "v.json", rows)
    block = "<!-- results:v source=v.json table=verdict{} -->\n<!-- /results:v -->\n"
    readme.write_text(block.format(" model=mine"))
    render_readme(readme)
    lines = readme.read_text().splitlines()
    assert lines[1].startswith("mine is better than anchor at retrieval") and lines[2].startswith(
        "- Text to image R@1"
    )
    readme.write_text(block.format(" model=other"))
    with pytest.raises(ValueError, match="'other', got mine"):
        render_readme(readme)


@pytest.mark.parametrize(
    "blocks",
    [
        "<!-- results:x source=summary.json table=demo -->\n",
        "<!-- results:x source=summary.json table=demo -->\n<!-- /results:xy -->\n",
        2 * "<!-- results:x source=summary.json table=demo -->\n<!-- /results:x -->\n",
    ],
    ids=["missing", "by", "twice"],
)
def test_missing_or_repeated_markers_are_named(readme, blocks):
    readme.write_text(README + blocks)
    with pytest.raises(ValueError, match="results:x -->.*once in .*README.md"):
        render_readme(readme)


@pytest.mark.parametrize(
    ("marker", "error", "message"),
    [
        ("source=gone.json", FileNotFoundError, "gone.json.*block 'x'"),
        ("table=demo", ValueError, "Expected source=FILES.*block 'x'"),
        ("source=summary.json table=fancy", ValueError, "table= one of"),
        ("source=summary.json table=demo best=true", ValueError, "its options in the block 'x'"),
        ("source=summary.json", ValueError, "JSON list of one or more records in .*summary.json"),
    ],
)
def test_bad_markers_are_named(readme, marker, error, message):
    readme.write_text(f"<!-- results:x {marker} -->\n<!-- /results:x -->\n")
    with pytest.raises(error, match=message):
        render_readme(readme)


def test_a_blocks_source_with_brackets_is_the_file_of_this_name(tmp_path):
    write_results(tmp_path / "r[1].json", record(label="right"))
    write_results(tmp_path / "r1.json", record(label="wrong"))
    block = "<!-- results:x source={} table=results -->\n<!-- /results:x -->\n"
    (tmp_path / "page.md").write_text(block.format("r[1].json"))
    render_readme(tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "right" in text and "wrong" not in text
    (tmp_path / "page.md").write_text(block.format("r[0-9].json"))
    render_readme(tmp_path / "page.md")
    assert "wrong" in (tmp_path / "page.md").read_text()


def test_a_block_of_arms_has_one_row_an_arm_and_no_points(tmp_path):
    runs = [
        record(
            model=f"run{seed}", revision=f"r{seed}", label=f"taught, seed {seed}", seed=seed, metrics={"top1": value}
        )
        for seed, value in enumerate((0.25, 0.75))
    ]
    point = {**runs[0], "condition": "alpha=0.5", "metrics": {"top1": 0.125}}
    write_results(tmp_path / "records.json", [*runs, point])
    page = tmp_path / "page.md"
    page.write_text("<!-- results:x source=records.json metrics=top1 arms=true -->\n<!-- /results:x -->\n")
    render_readme(page)
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| taught")]
    assert row.split("|")[1].strip() == "taught" and "50.0 ±" in row
    assert "alpha" not in page.read_text()
