"""Reports: every file is shown or named, rows that are not comparable are said to be, pages need nothing else."""

import functools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from fixtures.records import make_test_record as record

from modeling_dclip.data.files import write_json
from modeling_dclip.evaluation.records import write_results
from modeling_dclip.evaluation.reports import report as report_module
from modeling_dclip.evaluation.reports.gallery import page_name
from modeling_dclip.evaluation.reports.plots import SERIES_COLOURS
from modeling_dclip.evaluation.reports.report import (
    benchmark_heading,
    merge_rows,
    pair_tradeoff,
    read_sources,
    write_report,
)
from modeling_dclip.evaluation.statistics import summarise_arms

ROOT = Path(__file__).resolve().parents[3]
INTERVAL = {"estimate": 0.25, "low": 0.2, "high": 0.31, "confidence": 0.95, "covers": "images"}
HIGHER = {**INTERVAL, "estimate": 0.41, "low": 0.36, "high": 0.47}


@pytest.fixture
def report(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def make(*paths):
        written = write_report(paths or [tmp_path / "in"], tmp_path / "out")
        assert all(path.is_file() for path in written)
        return (tmp_path / "out" / "report.md").read_text(), (tmp_path / "out" / "report.html").read_text()

    return make


class Checked(HTMLParser):
    """Every element that is opened is closed, and what is linked is there."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.data = [], set(), [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        assert tag != "script"
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes["src"])
            assert attributes["alt"]
        if tag not in ("meta", "img", "wbr", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


def check(page, folder=None):
    parser = Checked()
    parser.feed(page)
    assert not parser.open and parser.links
    beside = [link for link in parser.links if not link.startswith("#")]
    assert all(link[1:] in parser.ids for link in parser.links if link not in beside)
    assert all((folder / unquote(link)).is_file() for link in beside)
    assert all(source.startswith("data:image/png;base64,") for source in parser.images)
    return parser


def test_records_become_tables_with_bold_intervals_and_what_they_were_measured_on(tmp_path, report):
    records = [
        record("anchor", intervals={"text_to_image_recall@1": INTERVAL}),
        record("student", metrics={"text_to_image_recall@1": 0.41}, intervals={"text_to_image_recall@1": HIGHER}),
    ]
    write_results(tmp_path / "in" / "deep" / "records.json", records)
    text, page = report()
    assert "25.0 [20.0, 31.0]" in text and "**41.0** [36.0, 47.0]" in text
    shown = '<td class="number" data-column="T→I R@1">25.0<small>[20.0, 31.0]</small></td>'
    assert shown in page and "<b>41.0</b>" in page
    for fact in (
        "- n: 1,000\n",
        "Split: test",
        "Seed: 0",
        "sha256:cd",
        "Command: eval.py",
        "torch ",
        "Hardware: cpu",
        "Date: 20",
        "records.json",
    ):
        assert fact in text
    (picture,) = re.findall(r"!\[.*\]\((plots/.*png)\)", text)
    assert (tmp_path / "out" / picture).is_file()
    assert len(check(page).images) == 1
    assert "⚠" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_fingerprint": "sha256:ef"}, "Not comparable: different data: cd (a); ef (b)"),
        ({"n": 999}, "Not comparable: different n: 1,000 (a); 999 (b)"),
        ({"split": "val"}, "Not comparable: different split"),
        ({"seed": 3}, "Rows of single seeds may differ by chance: seed: 0 (a); 3 (b)"),
        ({"versions": {"torch": "1.0"}}, "Measured with different software: torch"),
    ],
)  # fmt: skip
def test_rows_that_are_not_comparable_are_said_to_be(tmp_path, report, change, message):
    write_results(tmp_path / "in" / "records.json", [record("a"), record("b", **change)])
    text, page = report()
    assert message in text and 'class="warnings"' in page
    assert "Compare rows with care in: Retrieval, scenes:test" in text


def test_other_hardware_matters_to_times_only(tmp_path, report):
    rows = [
        record(name, "efficiency=native", metrics={"image_latency_ms": 3.0 + len(name)}, hardware={"cpu": name})
        for name in ("a", "bb")
    ]
    rows += [record(name, hardware={"cpu": name}) for name in ("a", "bb")]
    write_results(tmp_path / "in" / "records.json", rows)
    text, _ = report()
    assert text.count("⚠") == 1 and "Measured on different hardware: cpu: a (a); bb (bb)" in text
    assert "| 4.00 " in text or " 4.00 |" in text
    assert "image latency, ms" in text


def test_files_that_cannot_be_shown_are_named_and_not_fatal(tmp_path, report):
    folder = tmp_path / "in"
    write_results(folder / "records.json", record("a"))
    (folder / "broken.json").write_text("{")
    (folder / "config.json").write_text('{"hidden_size": 3}')
    write_json(folder / "scan.json", {"benchmark": "selective_scan", "rows": [{}]})
    write_json(folder / "half.json", [record("a", intervals={"text_to_image_recall@1": {"estimate": 1}})])
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.json").write_text("{")
    text, page = report()
    assert "from 1 file: 1 record, 1 model" in text and "3 files are not shown" in text
    for name in ("broken.json", "scan.json", "half.json"):
        assert f"| {folder / name} " in text
    assert "got another form" in text and "Expected an interval" in text
    assert (
        "- Passed over: 1 JSON file without results: config.json" in text and str(folder / "config.json") not in text
    )
    assert ".hidden" not in text
    check(page)
    text, _ = report(folder / "records.json", folder / "config.json")  # named by the user
    assert f"| {folder / 'config.json'} " in text and "hidden_size" in text and "Passed over" not in text


DIFFERENCE = {**INTERVAL, "estimate": 0.1, "low": 0.05, "high": 0.15}


def student(**fields):
    comparison = {"anchor_revision": "sha256:a", "text_to_image_recall@1_difference": DIFFERENCE}
    return record("student", metrics={"text_to_image_recall@1": 0.35}, comparison=comparison, **fields)


def test_the_verdict_comes_first_and_points_between_two_models_fold(tmp_path, report):
    anchor = record("anchor", revision="sha256:a", metrics={"text_to_image_recall@1": 0.25})
    write_results(tmp_path / "in" / "records.json", [anchor, student(condition="alpha=0.5"), student()])
    text, page = report()
    first, folded = (line for line in text.splitlines() if line.startswith("- **"))
    assert "student is better than anchor" in first and "alpha=0.5 is better than anchor" in folded
    assert text.index(first) < text.index("Made 20") < text.index("## Retrieval")
    assert page.index("<b>student is better") < page.index("<summary>1 more") < page.index("<b>student, alpha=0.5 is")
    assert page.index("</details>") < page.index("<nav")
    check(page)


def test_galleries_maps_and_curves_beside_the_results_are_linked(tmp_path, report):
    found = record("a")
    write_results(tmp_path / "in" / "records.json", [found, record("b")])
    names = [f"pages & more/{page_name(found)}.html", f"maps/{page_name(found)}.png"]
    names += ["student/training_curves.png", "leak_free/seed-0/teacher_attention.png", "other.html", "other.png"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("")
    text, page = report()
    links = [link for link in check(page, tmp_path / "out").links if not link.startswith("#")]
    assert sorted(unquote(link) for link in links) == sorted(f"../in/{name}" for name in names[:4])
    assert f"- Gallery: [a](../in/pages%20%26%20more/{page_name(found)}.html)\n" in text
    assert "- Training curves: [student](" in text and "- Teacher's attention: [leak_free, seed-0](" in text
    assert str(tmp_path) not in page.partition("<nav")[0]  # names, never paths


def test_a_model_has_one_colour_in_every_picture(tmp_path, report, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = []
    for name in ("plot_bars", "plot_tradeoff"):
        plot = getattr(report_module, name)
        monkeypatch.setattr(report_module, name, recording(plot, drawn))
    anchor = record("z", revision="sha256:a")
    rows = [record("b"), student(), student(condition="alpha=0.5"), anchor]
    rows += [{**row, "benchmark": "zero_shot=scenes:test", "metrics": {"top1": 0.5}} for row in rows]
    write_results(tmp_path / "in" / "records.json", rows)
    report()
    styles = [options["styles"] for options in drawn]
    assert len(styles) == 3 and all(one == styles[0] for one in styles)
    assert {name: style["color"] for name, style in styles[0].items()} == {
        "z": SERIES_COLOURS[0],
        "b": SERIES_COLOURS[1],
        "student": SERIES_COLOURS[2],
    }


def recording(plot, drawn):
    @functools.wraps(plot)
    def draw(content, path, **options):
        drawn.append(options)
        plot(content, path, **options)

    return draw


def test_the_page_is_laid_out_for_the_dark_for_telephones_and_for_paper(tmp_path, report):
    write_results(tmp_path / "in" / "records.json", [record("a"), record("b")])
    _, page = report()
    for rule in ("screen and (prefers-color-scheme: dark)", "(max-width: 40rem)", "@media print"):
        assert f"@media {rule.removeprefix('@media ')}" in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    (width,) = re.findall(r'<img [^>]*width="(\d+)"', page)
    assert 300 < int(width) < 900  # CSS pixels: the letters of the plot are as large as they were drawn


def test_nothing_to_show_is_an_error_that_names_what_was_found(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"got 1 JSON file and none of these.\n- .*a.json: Expected a JSON list"):
        write_report([tmp_path], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="gone, which does not exist"):
        write_report([tmp_path / "gone"], tmp_path / "out")
    write_results(tmp_path / "a.json", record("a"))
    with pytest.raises(NotADirectoryError, match="the file .*a.json"):
        write_report([tmp_path], tmp_path / "a.json")
    assert not (tmp_path / "out").exists()


def test_a_file_given_twice_is_read_once(tmp_path):
    write_results(tmp_path / "a.json", record("a"))
    assert len(read_sources([tmp_path, tmp_path / "a.json"]).records) == 1


def test_what_a_file_says_is_escaped(tmp_path, report):
    write_results(
        tmp_path / "in" / "r.json", [record("a", label="<script>alert(1)</script> | x"), record("b", command="<b>&")]
    )
    text, page = report()
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;&amp;" in page
    assert "<script>" not in text and "&lt;script>alert(1)&lt;/script> \\| x" in text and "eval.py or &lt;b>&" in text
    assert "| x" in "".join(check(page).data)


def test_runs_of_an_arm_become_their_mean_and_repeated_records_one_row():
    runs = [
        record(f"m{seed}", label=f"arm, seed {seed}", seed=seed, metrics={"text_to_image_recall@1": 0.2 + 0.1 * seed})
        for seed in (0, 1, 2)
    ]
    anchor = record("anchor", label="anchor")
    rows, repeated = merge_rows([*(("one", run) for run in runs), ("one", anchor), ("two", anchor)])
    assert repeated == 1 and [row["label"] for row in rows] == ["arm", "anchor"]
    assert rows[0]["runs"] == 3 and rows[0]["metrics"]["text_to_image_recall@1"] == pytest.approx(0.3)
    assert rows[0]["intervals"]["text_to_image_recall@1"]["covers"] == "seeds" and "seed" not in rows[0]
    other = {**runs[2], "dataset_fingerprint": "sha256:other"}
    assert [row.get("runs") for row in merge_rows([("one", run) for run in (*runs[:2], other)])[0]] == [2, None]


def test_a_row_names_its_file_only_where_another_file_has_a_row_of_that_name():
    one, other = record("a", metrics={"text_to_image_recall@1": 0.2}), record("b", revision="sha256:b")
    assert [row["label"] for row in merge_rows([("one", one), ("two", other)])[0]] == ["a", "b"]
    other = record("a", revision="sha256:other", metrics={"text_to_image_recall@1": 0.3})
    assert [row["label"] for row in merge_rows([("one", one), ("two", other)])[0]] == ["a (one)", "a (two)"]


def beside_anchor(model, value, benchmark="retrieval=scenes:test", metric="text_to_image_recall@1", **fields):
    change = {"estimate": value - 0.2, "low": value - 0.23, "high": value - 0.17, "confidence": 0.95}
    against = {"anchor": "z", "anchor_revision": "sha256:z", f"{metric}_difference": {**change, "covers": "images"}}
    filled = {"metrics": {metric: value}, "revision": "sha256:m", "comparison": against, **fields}
    return record(model, benchmark, **filled)


def test_a_model_of_several_files_has_one_verdict_from_its_newest_records(tmp_path, report):
    old, new = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"
    top1 = beside_anchor("m", 0.1, "zero_shot=scenes:test", "top1", created=old)
    for name, rows in {
        "a": [beside_anchor("m", 0.3, created=old), top1],
        "b": [beside_anchor("m", 0.3, created=new)],
        "c": [beside_anchor("other", 0.3, revision="sha256:other")],
    }.items():
        write_results(tmp_path / "in" / name / "records.json", rows)
    text, _ = report()
    findings = text.partition("Made ")[0]
    assert findings.count("m is better than z at retrieval") == findings.count("other is better than z") == 1
    assert "**m is better" in findings and "Zero-shot accuracy fell beyond noise" in findings  # of the older file
    assert "different numbers" not in findings and findings.count("eval.py measures it with") == 1
    write_results(tmp_path / "in" / "b" / "records.json", [beside_anchor("m", 0.4, created=new)])
    findings = report()[0].partition("Made ")[0]
    assert "20.0 → 40.0 %" in findings and "20.0 → 30.0 %" in findings  # the second is of the other model
    assert "- a and b have different numbers on scenes:test: the newest are shown." in findings
    write_results(tmp_path / "in" / "c" / "records.json", [beside_anchor("m", 0.3, revision="sha256:other")])
    findings = report()[0].partition("Made ")[0]
    assert "**a, b: m is better" in findings and "**c: m is better" in findings  # two models of one name


def test_the_first_columns_of_a_wide_table_stand_below_each_other_on_a_telephone(tmp_path, report):
    names = [f"{way}_{name}" for way in ("text_to_image", "image_to_text") for name in ("recall@1", "recall@5", "mrr")]
    metrics = {name: 0.1 * place for place, name in enumerate([*names, "rsum"], start=1)}
    write_results(tmp_path / "in" / "records.json", [record("a", metrics=metrics), record("b", metrics=metrics)])
    text, page = report()
    first, second = (line for line in text.splitlines() if line.startswith("| Model"))
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["Model", "T→I R@1", "I→T R@1"]
    assert "Weights" in second and "T→I R@5" in second and "R@1" not in second
    assert '<div class="scroll stacks"' in page and '<td class="number" data-column="I→T R@1">' in page


def test_a_table_too_wide_for_a_telephone_says_that_it_scrolls(tmp_path, report):
    metrics = {f"{name}_accuracy": 0.5 for name in "abcdefgh"}
    write_results(tmp_path / "in" / "records.json", record("m", "fine_grained=scenes:test", metrics=metrics))
    _, page = report()
    assert "Scroll the table sideways: it has 10 columns." in page and '<div class="scroll" tabindex' in page


def test_tradeoff_pairs_the_same_weights_and_draws_the_line_between_them():
    def rows(benchmark, *extra):
        models = [
            record(name, benchmark, **fields)
            for name, fields in (("s", {"comparison": {"anchor_revision": "sha256:a"}}), ("a", {}), *extra)
        ]
        return merge_rows([("f", one) for one in models])[0]

    between = [("s", {"condition": f"alpha={alpha}"}) for alpha in (0.7, 0.3)]
    points, curves, benchmarks = pair_tradeoff(rows("retrieval=x", *between), rows("zero_shot=y", *between))
    assert [point["label"] for point in points] == ["a", "s"] and benchmarks == ["zero_shot=y"]
    assert [step["label"] for step in curves["s"]] == ["", "α 0.3", "α 0.7", ""]  # from the anchor to the model
    averaged = [(name, {**fields, "settings": {"student_alpha": 0.5}}) for name, fields in between]
    _, curves, _ = pair_tradeoff(rows("retrieval=x", *averaged), rows("zero_shot=y", *averaged))
    assert [step["label"] for step in curves["s"]] == ["", "α 0.3", "", "α 0.7"]  # the model lies half-way
    assert pair_tradeoff(rows("retrieval=x"), []) == ([], {}, [])
    both = [*rows("zero_shot=y"), *rows("zero_shot=z")]
    points, _, benchmarks = pair_tradeoff(rows("retrieval=x"), both)
    assert benchmarks == ["zero_shot=y", "zero_shot=z"] and points[0]["x"] == 0.5


def test_a_suite_shows_models_side_by_side_with_their_mean(tmp_path, report):
    rows = [
        record(model, f"zero_shot=wds:{name}", metrics={"top1": value})
        for model, value in (("a", 0.4), ("b", 0.5))
        for name in ("cars", "pets")
    ]
    rows.append(record("c", "zero_shot=wds:cars"))
    write_results(tmp_path / "in" / "records.json", [*rows[:1], {**rows[1], "metrics": {"top1": 0.6}}, *rows[2:]])
    text, _ = report()
    suite = text[text.index("### All datasets") :]
    assert re.search(r"\| a +\| +40.0 \| +60.0 \| +50.0 \|", suite)
    assert "suite.png" in suite and not re.search(r"\| c ", suite[: suite.index("Top-1 in percent")])


def test_summaries_have_a_section_with_their_picture(tmp_path, report):
    def run(retrieval, accuracy):
        return {"text_to_image_recall@1": retrieval, "image_to_text_recall@1": 0.5, "top1": accuracy}

    summary = summarise_arms({"anchor": {0: run(0.2, 0.8)}, "student": {0: run(0.3, 0.7), 1: run(0.31, 0.72)}})
    write_json(tmp_path / "in" / "exp" / "summary.json", {**summary, "benchmarks": ["retrieval=scenes:test"]})
    write_results(tmp_path / "in" / "exp" / "records.json", record("a"))
    text, page = report()
    assert "### exp" in text and "± " in text and "tradeoff.png" in text and "- n: 1,000\n" in text
    check(page)


def test_long_names_are_shortened_and_stand_in_full_below(tmp_path, report):
    long = "retrieval=coco:../shared/data/coco/annotations/captions_val2017.json:../shared/data/coco/val2017"
    write_results(tmp_path / "in" / "records.json", record("a", long))
    text, page = report()
    assert "### coco:annotations/captions_val2017.json:coco/val2017\n" in text and f"Benchmark: {long}" in text
    assert f'title="{long}"' in page
    assert len(benchmark_heading("zero_shot=" + "x" * 300)) <= 64


def test_an_interrupted_report_leaves_the_old_page_untouched(tmp_path, report, monkeypatch):
    write_results(tmp_path / "in" / "records.json", record("a"))
    report()
    before = (tmp_path / "out" / "report.html").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        report()
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "out")) == ["report.html", "report.md"]


def test_the_repository_own_results_are_all_shown(tmp_path, report):
    sources = read_sources([ROOT / "results"])
    assert not sources.left_out
    assert ROOT / "results" / "few_captions" / "equal_retention.json" in [file for file, _ in sources.kept]
    folder = ROOT / "results" / "demo"
    text, page = report(folder, ROOT / "benchmarks" / "results" / "student_step.json")
    for part in (
        "### demo",
        "### results/student_step",
        "own regions, another image's caption",
        "teacher and text tower online",
    ):
        assert part in text
    numbers = json.loads((folder / "summary.json").read_text())["arms"][1]["metrics"]
    assert f"| {100 * numbers['top1']['estimate']:.1f} ± " in " ".join(
        text.split()
    )  # columns are padded to their widest
    check(page, tmp_path / "out")
