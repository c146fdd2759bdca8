"""Values of a report have one meaning in both forms, and what a file says never becomes markup."""

import ast
from pathlib import Path

import jinja2
import pytest

from modeling_dclip.evaluation.reports import document
from modeling_dclip.evaluation.reports.document import (
    Cell,
    Code,
    Heading,
    Picture,
    Report,
    Table,
    Terms,
    Text,
    Warnings,
    render_html,
    render_markdown,
    render_page,
)

BAD = "<img src=x onerror=alert(1)> & &lt; ![x](http://a/b) | \"'\n<script>"


def blocks_with(text):
    return [
        Heading(text, 2, "part-0", text + "!"),
        Text(text, Code(text)),
        Warnings([text]),
        Table([text, text], [[text, Cell(text, text, text, is_best=True)], [text, text]]),
        Picture("plot.png", text, b"png"),
        Terms([("Term", text)]),
    ]


@pytest.mark.parametrize("index", range(6))
def test_text_of_every_block_is_escaped_in_both_forms(index):
    block = blocks_with(BAD)[index]
    page = render_html(Report(BAD, [Text(BAD)], [block]))
    body = page[page.index("<title>") :]
    assert "<script" not in body and "<img src=x" not in body and "&lt;script&gt;" in body
    assert "&amp;lt;" in body  # an entity in a label is not read as one
    text = render_markdown([block])
    outside_code = text if index != 1 else text[: text.index("`")]
    assert "<img" not in outside_code and "<script" not in outside_code and "](http" not in outside_code
    assert "&amp;lt;" in outside_code and "\n<script" not in text


def test_names_that_are_no_markup_stay_as_they_are():
    for name in ("no_teacher", "R&D *best* [0.1, 0.2] (x)", "student → anchor > all", "a/b:c=1,d"):
        assert render_markdown([Text(name)]) == name


@pytest.mark.parametrize(
    ("code", "expected"),
    [("scenes:test", "`scenes:test`"), ("a `b` c", "`` a `b` c ``"), ("<b>", "`<b>`"), ("``", "``` `` ```")],
)
def test_code_ends_where_its_text_ends(code, expected):
    assert render_markdown([Text("see ", Code(code), ".")]) == f"see {expected}."


def test_code_is_marked_in_html():
    page = render_html(Report("t", [], [Text("run ", Code("eval.py <x>"), " now")]))
    assert "<p>run <code>eval.py &lt;x&gt;</code> now</p>" in page


def test_a_cell_shows_its_interval_below_its_number_in_html():
    cells = [Cell("12.3", "[11.0, 14.1]", "%", is_best=True), Cell("1.0", "± 0.2"), "–"]
    table = Table(["Model", "a", "b", "c"], [["runs/x/a-long-name-of-a-student", *cells]])
    assert render_markdown([table]).splitlines()[2].endswith("| **12.3** [11.0, 14.1] % | 1.0 ± 0.2 |   – |")
    page = render_html(Report("t", [], [table]))
    assert '<td class="number" data-column="a"><b>12.3</b> %<small>[11.0, 14.1]</small></td>' in page
    assert (
        '<td class="number" data-column="b">1.0<small>± 0.2</small></td><td class="number" data-column="c">–</td>'
        in page
    )
    assert '<td class="long" data-column="Model">runs/<wbr>x/<wbr>a-long-name-of-a-student</td>' in page


def test_the_contents_list_parts_with_their_sections():
    headings = [Heading("A", 2, "a"), Heading("A1", 3, "a1"), Heading("A2", 3, "a2"), Heading("B", 2, "b")]
    report = Report("t", [], headings)
    assert [(part.text, [one.text for one in own]) for part, own in report.contents] == [
        ("A", ["A1", "A2"]),
        ("B", []),
    ]
    page = render_html(report)
    assert '<li><a href="#a">A</a><ul><li><a href="#a1">A1</a></li><li><a href="#a2">A2</a></li></ul></li>' in page
    assert [block.level for block in report.all_blocks] == [1, 2, 3, 3, 2]


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="report"):
        render_page("report.html.jinja")


def test_every_template_is_part_of_the_package():
    root = Path(document.__file__).parents[3]
    calls = [node for node in ast.walk(ast.parse((root / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (data,) = [ast.literal_eval(node.value) for node in calls if node.arg == "package_data"]
    packaged = {path for pattern in data["modeling_dclip"] for path in (root / "modeling_dclip").glob(pattern)}
    templates = set(Path(document.__file__).with_name("templates").iterdir())
    assert templates and templates <= packaged
