"""A search is shown in lines that fit a terminal, and as a page that any browser opens offline."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from modeling_dclip.hub.index import Hit, SearchIndex
from modeling_dclip.hub.index.__main__ import main
from modeling_dclip.hub.index.answers import MOST_COLUMNS, NOTHING_FOUND, describe_hits, describe_query, write_page
from modeling_dclip.hub.index.build import build_index

pytest.importorskip("faiss")

NAMES = ("a & b.png", "café 写真.png", "100% #1?.png", "<b>.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(NAMES):
        Image.effect_noise((400, 90), 20 + 40 * number).convert("RGB").save(folder / name)
    return folder


@pytest.fixture(scope="module")
def index(tiny_clip_dir, pictures, tmp_path_factory):
    return build_index(str(tiny_clip_dir), str(pictures), tmp_path_factory.mktemp("index"))


def test_the_page_shows_query_pictures_names_and_scores(index, pictures, tmp_path):
    hits = index.search("a <i>dog</i>")
    assert not any(tile.reason for tile in write_page(index, "a <i>dog</i>", hits, tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "<h1>“a &lt;i&gt;dog&lt;/i&gt;”</h1>" in page and "The 4 nearest of 4 pictures" in page
    assert page.count("data:image/jpeg;base64,") == 4 and 'width="320" height="72"' in page
    assert re.findall(r"</b> (-?\d\.\d{3})<", page) == [f"{hit.score:.3f}" for hit in hits]
    assert [Path(hit.name).name for hit in hits] == [hit.name for hit in hits]
    assert "<b>.png" not in page and "&lt;b&gt;.png" in page and "café 写真.png" in page
    links = re.findall('href="(.*?)"', page)
    assert [(tmp_path / unquote(link)).resolve() for link in links] == [Path(hit.path).resolve() for hit in hits]
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page


def test_the_page_of_a_picture_shows_it_and_says_what_is_gone(index, pictures, tmp_path):
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
    (moved / NAMES[1]).write_bytes(b"no picture")
    (moved / NAMES[2]).unlink()
    again = SearchIndex.load(index.folder, images=str(moved))
    tiles = write_page(
        again, Image.open(pictures / NAMES[0]), again.search(pictures / NAMES[0]), tmp_path / "page.html", NAMES[0]
    )
    page = (tmp_path / "page.html").read_text()
    assert "<h1>Pictures like a &amp; b.png</h1>" in page and page.count("data:image/jpeg") == 3
    assert {tile.hit.name for tile in tiles if tile.reason} == {NAMES[1], NAMES[2]}
    assert page.count("cannot be read: ") == 2 and "No such file" in page


def test_an_index_that_finds_nothing_says_what_to_do(index, tmp_path):
    assert describe_hits(index, "a dog", []) == NOTHING_FOUND
    write_page(index, "a dog", [], tmp_path / "page.html")
    assert NOTHING_FOUND in (tmp_path / "page.html").read_text()


def test_lines_fit_a_terminal_and_keep_the_end_of_a_name(index):
    hits = [Hit(0.5, "a", None, "写" * 100 + "end.png"), Hit(-0.25, "b", None, "x" * 300 + ".png")]
    lines = describe_hits(index, describe_query("many words " * 50), hits).splitlines()
    assert lines[2].startswith("   1   0.500  …写") and lines[2].endswith("写end.png")
    assert lines[3].startswith("   2  -0.250  …xx") and len(lines[3]) == MOST_COLUMNS
    assert len(lines[2]) < MOST_COLUMNS < len(lines[2]) + lines[2].count("写") + 3
    assert all(len(line) <= MOST_COLUMNS for line in lines)


def test_the_command_writes_a_page_and_checks_its_place_first(index, pictures, tmp_path, monkeypatch, capsys):
    words = ["search", str(pictures / NAMES[3]), "--index", str(index.folder), "--top_k", "2"]
    main([*words, "--page", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.splitlines()[-1] == f"Pictures: {tmp_path}/page.html (open it in a browser)"
    assert "Pictures like &lt;b&gt;.png" in (tmp_path / "page.html").read_text()
    main([*words, "--json", "--page", str(tmp_path / "page.html")])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in found][0] == NAMES[3] and len(found) == 2
    monkeypatch.setattr(SearchIndex, "load", None)
    (tmp_path / "file").write_text("")
    for page, message in (("page.pdf", "--page: expected a .html file"), ("file/page.html", "is a file")):
        with pytest.raises(SystemExit, match=message):
            main([*words, "--page", str(tmp_path / page)])
