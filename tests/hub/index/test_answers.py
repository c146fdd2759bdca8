"""A search is shown in lines that fit a terminal, and as a page that any browser opens offline."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from modeling_dclip.evaluation.records import make_record, write_results
from modeling_dclip.hub.index import Hit, SearchIndex
from modeling_dclip.hub.index.__main__ import main
from modeling_dclip.hub.index.answers import (
    MOST_COLUMNS,
    NOTHING_FOUND,
    describe_hits,
    describe_query,
    short_name,
    short_place,
    write_page,
)
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


def test_a_model_that_is_known_to_guess_says_so_on_the_page_and_in_the_lines(index, pictures, tmp_path, capsys):
    run = tmp_path / "run"
    model = Path(shutil.copytree(index.model, run / "student"))
    built = build_index(str(model), str(pictures), tmp_path / "index")
    words = ["search", "a dog", "--index", str(tmp_path / "index"), "--page", str(tmp_path / "page.html")]
    share = {"retrieval=scenes:test": ("text_to_image_recall@1", 0.01), "zero_shot=scenes:test": ("top1", 0.1)}
    told = "At chance: in retrieval from text to image on scenes:test this model does no better than a guess."

    def measure(share, revision=built.manifest["revision"]):
        fields = {"n": 100, "seed": 0, "split": "test", "dataset_fingerprint": "sha256:00", "command": "eval.py"}
        fields |= {"model": "m", "revision": revision, "chance": {"top1": 0.1}}
        records = [
            make_record(benchmark=name, metrics={metric: value}, **fields) for name, (metric, value) in share.items()
        ]
        write_results(run / "results" / "records.json", records)
        main(words)
        return capsys.readouterr().out, (tmp_path / "page.html").read_text()

    said, page = measure(share)
    assert said.count("At chance") == page.count("At chance") == 1 and told in said and f"<strong>{told}" in page
    assert "zero-shot" not in said
    main([*words, "--json"])
    out, err = capsys.readouterr()
    assert "At chance" not in out
    for other in (measure({**share, "retrieval=scenes:test": ("text_to_image_recall@1", 0.5)}), measure(share, "x")):
        assert not any("At chance" in text for text in other)
    (run / "results" / "records.json").write_text("[{")
    main(words)
    assert "At chance" not in capsys.readouterr().out


def test_the_page_of_a_picture_shows_it_and_says_what_is_gone(index, pictures, tmp_path):
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
    (moved / NAMES[1]).write_bytes(b"no picture")
    (moved / NAMES[2]).unlink()
    again = SearchIndex.load(index.folder, images=str(moved))
    hits = again.search(pictures / NAMES[0], keep_same=True)
    tiles = write_page(again, Image.open(pictures / NAMES[0]), hits, tmp_path / "page.html", NAMES[0])
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
    *lines, left_out, written = capsys.readouterr().out.splitlines()
    assert left_out == f"Left out, because it is the same picture: {NAMES[3]}. --keep_same shows it too."
    assert written == f"Pictures: {tmp_path}/page.html (open it in a browser)"
    assert len(lines) == 4 and not any(line.endswith(NAMES[3]) for line in lines[1:])
    page = (tmp_path / "page.html").read_text()
    assert "Pictures like &lt;b&gt;.png" in page and "because it is the same picture: &lt;b&gt;.png." in page
    monkeypatch.setattr(SearchIndex, "copies_of", lambda *_: [Hit(1.0, name, None, name) for name in "ab"])
    main(words)
    assert capsys.readouterr().out.endswith("because they are the same picture: a, b. --keep_same shows them too.\n")
    main([*words, "--json", "--keep_same", "--page", str(tmp_path / "page.html")])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in found][0] == NAMES[3] and len(found) == 2
    monkeypatch.setattr(SearchIndex, "load", None)
    (tmp_path / "file").write_text("")
    for page, message in (("page.pdf", "--page: expected a .html file"), ("file/page.html", "is a file")):
        with pytest.raises(SystemExit, match=message):
            main([*words, "--page", str(tmp_path / page)])


def test_the_header_names_a_dataset_by_its_files(index, tmp_path):
    hits = index.search("a dog", 1)
    folder = "/a/long/way/to/the/pictures/of/our/last/holidays/in/the/mountains"
    dataset = SearchIndex.load(index.folder, images=f"csv:{folder}/captions.csv:{folder}/photos,sep=;")
    assert describe_hits(dataset, "“a dog”", hits).startswith("The nearest of 4 pictures in captions.csv, to “a dog”")
    write_page(dataset, "a dog", [], tmp_path / "page.html")
    assert "of 4 pictures in captions.csv, by the model" in (tmp_path / "page.html").read_text()
    deep = tmp_path.joinpath(*["folder"] * 20)
    deep.mkdir(parents=True)
    moved = SearchIndex.load(index.folder, images=str(deep))
    assert describe_hits(moved, "“a dog”", hits).startswith("The nearest of 4 pictures in folder, to “a dog”")
    assert describe_hits(moved, "x" * 110, hits).startswith("The nearest of 4 pictures\n")


@pytest.mark.parametrize(
    "spec, name",
    [
        ("karpathy:/data/dataset_coco.json:/data/coco:test", "dataset_coco.json (test)"),
        ("parquet:/data/flickr8k/test-*.parquet,image=picture", "test-*.parquet"),
        ("images:/data/photos", "photos"),
        ("held_out:outputs/mine", "the held-out pictures of outputs/mine"),
    ],
)
def test_a_dataset_has_a_name_without_folders(spec, name):
    assert short_place(spec) == name


def test_a_models_name_tells_which_it_is(tmp_path):
    for name, shown in (("mine/student", "mine/student"), ("arm/seed-0/student", "arm/seed-0/student"), ("a/b", "b")):
        (tmp_path / name).mkdir(parents=True)
        assert short_name(str(tmp_path / name)) == shown
