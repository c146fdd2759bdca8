"""The gallery shows what the ranks say, names no stranger's code to the browser, and is whole in one file."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from fixtures.records import make_test_record as record
from PIL import Image as PILImage

from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.retrieval_ranks import retrieval_ranks
from modeling_dclip.evaluation.embedding import DatasetEmbeddings
from modeling_dclip.evaluation.reports.gallery import (
    CHOICES,
    GalleryOptions,
    answer_queries,
    choose_queries,
    write_gallery,
    write_pages,
)

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements in order as `(tag, attributes)`, the texts, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def draw_embeddings(images=30, captions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image_embeds = torch.nn.functional.normalize(torch.randn(images, 8, generator=generator), dim=1)
    owners = torch.arange(images).repeat_interleave(captions)
    texts = image_embeds[owners] + 0.5 * torch.randn(len(owners), 8, generator=generator)
    return DatasetEmbeddings(image_embeds, torch.nn.functional.normalize(texts, dim=1), owners)


def make_dataset(captions, side=40):
    rows = {
        "image_id": [f"id-{row}" for row in range(len(captions))],
        "image": [PILImage.new("RGB", (side, 20), (7 * row % 256, 90, 160)) for row in range(len(captions))],
        "captions": captions,
    }
    return Dataset.from_dict(
        rows, features=Features(image_id=Value("string"), image=Image(), captions=List(Value("string")))
    )


def write(tmp_path, embeddings, captions=None, **options):
    images = len(embeddings.image_embeds)
    captions = captions or [[f"caption {row}-{i}" for i in range(3)] for row in range(images)]
    path = tmp_path / "page.html"
    write_gallery(None, make_dataset(captions), path, embeddings=embeddings, options=GalleryOptions(**options))
    return path.read_text(encoding="utf-8")


def test_answers_are_the_whole_matrixs_first_and_agree_with_the_ranks():
    embeddings = draw_embeddings()
    images, texts, owners = embeddings
    ranks, similarity = retrieval_ranks(*embeddings), texts @ images.T
    answered = answer_queries(embeddings, ranks, GalleryOptions(choices=["random"], count=30, top=4))
    for direction, scores in (("text_to_image", similarity), ("image_to_text", similarity.T)):
        queries = answered[direction]["random"]
        assert len(queries) == 30
        for query in queries:
            expected = scores[query.item].topk(4)
            assert [answer.item for answer in query.answers] == expected.indices.tolist()
            assert [answer.score for answer in query.answers] == pytest.approx(expected.values.tolist(), abs=1e-6)
            right = owners == query.item if direction == "image_to_text" else torch.arange(30) == owners[query.item]
            assert [answer.is_right for answer in query.answers] == right[expected.indices].tolist()
            assert query.rank == int((scores[query.item] > scores[query.item][right].max()).sum()) + 1
            assert (query.rank <= 4) == any(answer.is_right for answer in query.answers)
            assert right[query.best.item] and query.best.score == pytest.approx(
                float(scores[query.item][right].max()), abs=1e-6
            )


def test_a_collapsed_model_shows_no_right_answer():
    embeddings = DatasetEmbeddings(torch.eye(8)[[0] * 30], torch.eye(8)[[0] * 90], draw_embeddings().image_of_caption)
    answered = answer_queries(embeddings, retrieval_ranks(*embeddings), GalleryOptions(count=3))
    for by_choice in answered.values():
        assert not by_choice["hits"] and len(by_choice["worst"]) == 3
        for query in by_choice["worst"]:
            assert query.rank > 5 and not any(answer.is_right for answer in query.answers)


def test_choices_are_what_they_are_called():
    ranks, scores = torch.tensor([1, 8, 1, 3, 8, 1]), torch.tensor([0.2, 0.5, 0.9, 0.1, 0.4, 0.3])
    apart = torch.arange(6)
    assert choose_queries(ranks, scores, apart, "worst", 9) == [4, 1, 3]
    assert choose_queries(ranks, scores, apart, "hits", 2) == [2, 5]
    assert choose_queries(ranks, scores, torch.tensor([0, 1, 0, 1, 1, 2]), "hits", 9) == [2, 5]  # one an image
    drawn = [choose_queries(ranks, scores, apart, "random", 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 4
    with pytest.raises(ValueError, match="got 'best' and 1"):
        choose_queries(ranks, scores, apart, "best", 1)


def test_a_page_is_well_formed_marks_hits_and_misses_and_fetches_nothing(tmp_path):
    embeddings = draw_embeddings()
    text = write(tmp_path, embeddings, title="my model", about=["retrieval=x"], count=4)
    page = Page(text)
    assert not page.open and "my model" in page.texts and "retrieval=x" in page.texts
    assert (
        sum(tag == "article" for tag, _ in page.elements) == text.count('class="badge') == text.count("<article>") > 12
    )
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "form"}
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {f"#{anchor}" for anchor in anchors} == {link for link in links if link.startswith("#")}
    assert anchors == {f"{way}-{choice}" for way in ("text_to_image", "image_to_text") for choice in CHOICES}
    for card in re.findall("<article>.*?</article>", text):
        is_miss, is_first = 'class="badge miss"' in card, 'class="badge hit"' in card
        assert is_miss == ("the right one:" in card or "<b>right: </b>" in card)
        assert is_miss != ("✓</figcaption>" in card or 'class="place">' in card and " ✓</span>" in card)
        if is_first:
            assert re.search(r'<figure class="right"|<li class="answer right"', card)


def test_recalls_stand_on_the_page(tmp_path):
    text = write(tmp_path, draw_embeddings(), count=1)
    assert re.search(r"<b>Text to image</b><span>R@1 \d+\.\d % · R@5", text) and "30 images, 90 captions." in text


def test_text_from_data_is_escaped_and_bounded(tmp_path):
    bad = '<script>alert("1")</script> & \' ' + "long " * 400
    text = write(tmp_path, draw_embeddings(), [[bad] * 3] * 30, title="<b>t</b>", about=["<i>a</i>"], count=2)
    assert "<script" not in text and "<b>t" not in text and "<i>a" not in text
    shown = [text for text in Page(text).texts if "alert(" in text]
    assert shown and all(text.startswith('<script>alert("1")</script> & \'') and len(text) < 620 for text in shown)


@pytest.mark.parametrize("size", [16, 64])
def test_thumbnails_are_bounded_and_of_the_image_they_stand_for(tmp_path, size):
    text = write(tmp_path, draw_embeddings(), choices=["random"], count=2, thumbnail_size=size)
    found = re.findall(r'title="id-(\d+)"><div class="frame"><img src="data:image/jpeg;base64,([^"]+)"', text)
    assert found
    for row, content in found:
        picture = PILImage.open(io.BytesIO(base64.b64decode(content)))
        assert picture.size == ((16, 8) if size == 16 else (40, 20))
        assert abs(picture.getpixel((3, 3))[0] - 7 * int(row) % 256) < 6


def test_the_same_call_writes_the_same_page_and_another_seed_another(tmp_path):
    embeddings = draw_embeddings()
    one, same, other = (write(tmp_path, embeddings, choices=["random"], count=3, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


def test_a_model_is_shown_without_embeddings_given(tmp_path, tiny_clip, tiny_scenes):
    options = GalleryOptions(count=2)
    write_gallery(Encoder(*tiny_clip, batch_size=3), tiny_scenes, tmp_path / "new" / "page.html", options=options)
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "8 images, 16 captions." in text and any(caption in text for caption in tiny_scenes["captions"][0])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_picture_that_cannot_be_shown_has_a_placeholder_and_is_named(tmp_path, caplog):
    whole = Image().encode_example(PILImage.effect_noise((40, 40), 50))
    rows = {"image_id": ["a", "broken"], "image": [whole, {"bytes": whole["bytes"][:200], "path": None}]}
    rows["captions"] = [["one"], ["two"]]
    dataset = Dataset.from_dict(
        rows, features=Features(image_id=Value("string"), image=Image(), captions=List(Value("string")))
    )
    embeddings = DatasetEmbeddings(torch.eye(2), torch.eye(2), torch.arange(2))
    write_gallery(
        None, dataset, tmp_path / "page.html", embeddings=embeddings, options=GalleryOptions(choices=["random"])
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not Page(text).open
    assert "1 picture cannot be shown: broken</p>" in " ".join(text.split())
    gone = re.findall(r'<div class="gone" role="img" aria-label="([^"]+)">cannot be shown</div>', text)
    assert len(gone) == 3 and all("broken" in name for name in gone)  # twice an answer, once a query
    assert text.count('alt="image a"') == 1
    assert "Image 'broken' (row 1)" in caplog.text


def test_a_page_names_the_model_never_its_path(tmp_path, tiny_clip_dir):
    folder = tmp_path / "runs" / "mine" / "student"
    shutil.copytree(tiny_clip_dir, folder)
    found = record(str(folder), "retrieval=scenes:test,n=4")
    (page,) = write_pages([found], gallery=tmp_path / "pages", batch_size=4)
    assert page.name.startswith("mine-student-scenes-test-n-4-")
    text = page.read_text(encoding="utf-8")
    assert str(tmp_path) not in text and re.search("<h1>[a-z/]*student</h1>", text)
    assert "retrieval=scenes:test,n=4" in text and re.search("weights [0-9a-f]{8}<", text)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("page.htm", {}, r"a \.html file.*page\.htm"),
        ("page.html", {"choices": ["best"]}, r"got \['best'\]"),
        ("page.html", {"choices": []}, r"got \[\]"),
        ("page.html", {"count": 0}, "count, top and thumbnail_size >= 1"),
        ("page.html", {"top": 0}, "count, top and thumbnail_size >= 1"),
    ],
)
def test_bad_input_is_named(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        write_gallery(None, None, tmp_path / name, embeddings=draw_embeddings(), options=GalleryOptions(**options))


def test_a_page_without_model_and_embeddings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an encoder or its embeddings"):
        write_gallery(None, make_dataset([["a"]]), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
