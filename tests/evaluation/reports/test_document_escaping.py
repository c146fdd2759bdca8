"""Whatever stands in a caption, a label, a name or a message: no page or picture takes it for markup or fails."""

import html.parser
import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_dclip.evaluation.embedding import DatasetEmbeddings
from modeling_dclip.evaluation.reports.document import (
    Cell,
    Code,
    Findings,
    Heading,
    Links,
    Picture,
    Report,
    Table,
    Terms,
    Text,
    Warnings,
    code_markdown,
    escape_markdown,
    link_address,
    render_html,
    render_markdown,
    show_text,
)
from modeling_dclip.evaluation.reports.gallery import GalleryOptions, write_gallery
from modeling_dclip.evaluation.reports.plots import new_figure, save_figure

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg/onload=alert(1)> '",
    "a | b || c",
    "a \\| b",
    "a \\\\| b \\",
    "one ` two `` three",
    "`<b>`",
    "line\none\r\n\n# two\n- three",
    "[x](javascript:alert(1)) ![x](http://a/b.png)",
    "[x]\\(javascript:alert(1)) [x] (y) [x][y]",
    "[x]: javascript:alert(1)",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;script&gt; &amp; &#60;b&#62; &copy",
    "caf\udce9.jpg",
    "half a pair \ud83d",
    "a\x00b \x1b[31mred\x7f",
    "gpj.\u202eexe",
    "-- > --> <!-- ]]>",
    "---\ntitle: x\n---",
]


def place(text):
    """Blocks with a text in each of their fields."""
    return [
        Heading(text, 2, "part-0", text + "!"),
        Text(text, Code(text), text),
        Text(text),
        Findings([(text, [text, text])], [(text, [])]),
        Links([(text, [(text, f"pages/{show_text(text)}")])]),
        Warnings([text]),
        Table([text, text], [[text, Cell(text, text, text, is_best=True)], [text, text]]),
        Picture("plot.png", text, b"png"),
        Terms([(text, text)]),
    ]


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, sorted(name for name, _ in attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_report_has_the_tags_of_its_template_alone(text):
    page, plain = (render_html(Report(one, [Text(one)], place(one))) for one in (text, "plain"))
    found = Page(page.encode("utf-8").decode("utf-8"))
    long = ("td", ["class", "data-column"])  # a long name has a class of its own, and may break after a slash
    tags, expected = (
        [
            (tag, names)
            for tag, names in one.tags
            if tag != "wbr" and (tag, names) not in (long, ("td", ["data-column"]))
        ]
        for one in (found, Page(plain))
    )
    assert tags == expected
    assert show_text(text) in "".join(found.texts)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_markdown_shows_a_text_and_makes_nothing_of_it(text):
    markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py, which gradio brings")
    parse = markdown_it.MarkdownIt("commonmark").enable("table").parse
    shown = " ".join(show_text(text).splitlines())
    for block, plain in zip(place(text), place("plain"), strict=True):
        written = render_markdown([block])
        written.encode("utf-8")
        tokens, expected = (parse(one) for one in (written, render_markdown([plain])))
        assert [token.type for token in tokens] == [token.type for token in expected]
        inner = [one for token in tokens for one in token.children or ()]
        links = [one.attrGet("href") for one in inner if one.type == "link_open"]
        assert len(links) == isinstance(block, Links) and all(link.startswith("pages/") for link in links)
        assert "html_inline" not in {one.type for one in inner}
        assert [one.attrGet("src") for one in inner if one.type == "image"] == (
            ["plots/plot.png"] if isinstance(block, Picture) else []
        )
        if isinstance(block, Table):  # as many cells in each row, each with its text
            cells = ["".join(one.content for one in token.children) for token in tokens if token.type == "inline"]
            assert len(cells) == 6
            assert " ".join(cells[0].split()) == " ".join(shown.split())


@pytest.mark.parametrize(
    ("path", "address"),
    [("javascript:alert(1)", "javascript%3Aalert%281%29"), ("a/b c?#.html", "a/b%20c%3F%23.html"), ("\udce9", "%E9")],
)
def test_an_address_is_the_path_and_nothing_else(path, address):
    assert link_address(path) == address


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_cell_is_one_cell_for_github_too(text):
    for written in (escape_markdown(text, in_table=True), code_markdown(text, in_table=True)):
        place_of_pipe = 0
        while place_of_pipe < len(written):  # a backslash takes the next character with it
            assert written[place_of_pipe] != "|"
            place_of_pipe += 2 if written[place_of_pipe] == "\\" else 1


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_gallery_has_the_tags_of_its_template_alone(text, tmp_path):
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(4, 8)) for _ in range(2))
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    pages = []
    for given in (text, "plain"):
        names = [show_text(given) if "\ud800" <= max(given) <= "\udfff" else given] * 4  # no table holds these
        rows = {"image": [{"bytes": stream.getvalue(), "path": None}] * 4, "captions": [[name] for name in names]}
        dataset = Dataset.from_dict({"image_id": names, **rows}).cast_column("image", ImageFeature())
        options = GalleryOptions(title=given, about=[given], count=2, top=2)
        embeddings = DatasetEmbeddings(images, texts, torch.arange(4))
        write_gallery(None, dataset, tmp_path / "page.html", embeddings=embeddings, options=options)
        pages.append(Page((tmp_path / "page.html").read_bytes().decode("utf-8")))
    assert pages[0].tags == pages[1].tags
    assert show_text(text) in "".join(pages[0].texts)


@pytest.mark.parametrize("text", [*HOSTILE, "$\\frac{$", "a $x$ b"], ids=ascii)
def test_a_picture_draws_every_text_and_reads_none_as_a_formula(text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    figure = new_figure(2, 1)
    axes = figure.subplots()
    axes.set_title(text)
    axes.plot([0, 1], [0, 1], label=text)
    axes.legend()
    save_figure(figure, tmp_path / "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 0
    assert axes.get_title() == show_text(text) and not axes.title.get_parse_math()


def test_what_can_be_shown_stays():
    for text in ("déjà vu\u00a0!", "家族 👨\u200d👩\u200d👧 ❤️", "שלום", "a\tb\nc", "\\x00"):
        assert show_text(text) == text
    assert show_text("caf\udce9 \ud83d \x00\u202e\uffff") == "caf\\xe9 \\ud83d \\x00\\u202e\\uffff"
