"""The Space answers as the model does, says a visitor's mistakes plainly, and works in a browser without a network."""

import ast
import importlib.util
import os
import re
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fixtures.pictures import png
from fixtures.publications import make_native_student
from fixtures.tiny_dual_encoders import save_dual_encoder, save_fixed_siglip2
from PIL import Image

from modeling_dclip import DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.data.scenes.drawing import COLOURS, PATTERNS, SHAPES
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_dual_encoder
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.evaluation.records import make_record, write_results
from modeling_dclip.hub import space
from modeling_dclip.hub.index.build import build_index
from modeling_dclip.hub.index.suggestions import frequent_names, load_learned_captions
from modeling_dclip.hub.space import (
    SpaceAnswers,
    UserMistake,
    describe_origin,
    split_lines,
    suggest_labels,
    suggest_queries,
)

gradio = pytest.importorskip("gradio")

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "hub_cards" / "space"
GALLERY = "scenes:validation,n=8,image_size=48"


def load_script(name):
    specification = importlib.util.spec_from_file_location(f"space_{name}", SPACE / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app():
    """The Space's page as a module."""
    return load_script("page")


@pytest.fixture(scope="module")
def start():
    """The script that starts it."""
    return load_script("app")


@pytest.fixture(scope="module", params=["bidirectional", "regions"])
def teacher_dir(request, tiny_clip_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / request.param
    torch.manual_seed(0)
    teacher = DCLIPTeacher.from_clip(str(tiny_clip_dir), cross_attention=request.param, num_attention_heads=2)
    teacher.save_pretrained(folder)
    DCLIPTeacherProcessor.from_pretrained(tiny_clip_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(tiny_clip_dir):
    """Without a teacher."""
    return SpaceAnswers(str(tiny_clip_dir), gallery=GALLERY)


@pytest.fixture(scope="module")
def taught(tiny_clip_dir, teacher_dir):
    """With one."""
    return SpaceAnswers(str(tiny_clip_dir), str(teacher_dir), gallery=GALLERY)


@pytest.fixture(scope="module")
def upload():
    return load_scenes("test", n=1, image_size=64)[0]["image"]


def test_pictures_come_in_the_order_of_their_cosines(answers):
    dataset = answers.gallery.dataset
    encoder = Encoder(answers.model, answers.processor)
    scores = (embed_texts(encoder, ["a red dog"]) @ embed_images(encoder, dataset).T)[0]
    found = answers.find_pictures("  a red dog ", 3)
    order = scores.argsort(descending=True)[:3].tolist()
    for rank, ((picture, label), hit, row) in enumerate(zip(found.tiles, found.hits, order, strict=True), 1):
        assert picture.tobytes() == dataset[row]["image"].tobytes()
        assert hit.name == hit.image_id == dataset[row]["image_id"]
        assert label == f"{rank} · cosine {scores[row]:.3f}\n{hit.name}"
    assert found.remark.startswith("The 3 nearest of 8 pictures to the text")


def test_a_picture_finds_pictures_and_one_that_was_found_finds_others(answers):
    first = answers.sample(1)[0]
    picture = answers.picture(first)
    found = answers.find_pictures(picture, 3)
    assert first.image_id not in [hit.image_id for hit in found.hits] and len(found.hits) == 3
    assert f"Left out, because it is the same picture: {first.name}." in found.remark
    shown, like = answers.find_like(first, 3)
    assert shown.tobytes() == picture.tobytes() and like.hits == found.hits
    assert like.remark.startswith(f"The 3 nearest of 8 pictures to {first.name}") and "Left out" not in like.remark
    other = picture.copy()
    other.putpixel(
        (0, 0), tuple(255 - value for value in other.getpixel((0, 0)))
    )  # nearly the same is another picture
    assert "Left out" not in (nearly := answers.find_pictures(other, 3)).remark
    assert nearly.hits[0].image_id == first.image_id and nearly.hits[0].score > space.NEARLY_SAME


@pytest.fixture
def photos(tmp_path):
    """A folder of three pictures and two files that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((40, 40), 20 + 40 * number).convert("RGB").save(folder / f"{number} 写真.png")
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    return folder


def test_damaged_pictures_are_left_out_and_named(tiny_clip_dir, app, photos):
    answers = SpaceAnswers(str(tiny_clip_dir), gallery=str(photos))
    assert len(answers.gallery) == 3 and answers.skipped == ["photos/empty.png", "photos/text.jpg"]
    assert len(answers.find_pictures("a dog").tiles) == 3
    assert "⚠️ 2 pictures left out that cannot be read: photos/empty.png, photos/text.jpg" in app.describe_page(answers)
    for path in photos.glob("*写真*"):
        path.write_bytes(b"damaged now")
    found = answers.find_pictures("a dog", 2)
    assert len(found.tiles) == 2 and "**2 cannot be read any more: " in found.remark and "写真.png" in found.remark
    assert app.save_examples(answers) == []
    with pytest.raises(UserMistake, match="写真.png cannot be read any more"):
        answers.find_like(found.hits[0])
    with pytest.raises(ValueError, match="Expected pictures that can be read in .*, got 5 of which none can"):
        SpaceAnswers(str(tiny_clip_dir), gallery=str(photos))


def test_a_model_that_is_known_to_guess_says_so_at_the_top(app, tiny_clip_dir, tmp_path):
    model = Path(shutil.copytree(tiny_clip_dir, tmp_path / "run" / "student"))
    fields = {"n": 100, "seed": 0, "split": "test", "dataset_fingerprint": "sha256:00", "command": "eval.py"}
    fields |= {
        "model": "m",
        "revision": load_dual_encoder(model)[2],
        "metrics": {"top1": 0.1},
        "chance": {"top1": 0.1},
    }
    write_results(tmp_path / "run" / "results.json", [make_record(benchmark="zero_shot=scenes:test", **fields)])
    told = app.describe_page(SpaceAnswers(str(model), gallery=GALLERY))
    assert "⚠️ **At chance: in zero-shot classification on scenes:test this model does no better than a guess." in told
    assert "At chance" not in app.describe_page(SpaceAnswers(str(tiny_clip_dir), gallery=GALLERY))


def test_an_index_is_opened_in_place_of_embedding(tiny_clip_dir, photos, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    index = build_index(str(tiny_clip_dir), str(photos), tmp_path / "index", on_bad_image="skip")
    embedded = SpaceAnswers(str(tiny_clip_dir), gallery=str(photos))
    monkeypatch.setattr(space, "embed_readable", None)
    queries = ("a dog", Image.open(photos / "1 写真.png"))
    expected = [embedded.find_pictures(query, 3) for query in queries]
    moved = photos.rename(tmp_path / "moved")
    opened = SpaceAnswers(index=str(index.folder), gallery=str(moved))
    assert opened.name == str(tiny_clip_dir) and opened.place == str(moved)
    for query, other in zip(queries, expected, strict=True):
        one = opened.find_pictures(query, 3)
        assert [label for _, label in one.tiles] == [label for _, label in other.tiles]
    assert opened.find_like(opened.sample(3)[2], 5)[1].hits[0].name.endswith(".png")
    assert opened.sample(2) != opened.sample(1) and len(suggest_queries(opened)) == 4
    with pytest.raises(UserMistake, match="has no captions"):
        opened.find_texts(Image.open(moved / "1 写真.png"))


def test_what_a_model_was_trained_on_is_said(tmp_path):
    assert describe_origin(str(ROOT / "recipes/demo_anchor")) == "trained on scenes drawn by modeling_dclip"
    assert describe_origin("open_clip:ViT-B-32:laion2b") == "weights “laion2b” of open_clip"
    assert describe_origin(str(tmp_path)) == "its folder does not say on what it was trained"
    (tmp_path / "README.md").write_text("---\ndatasets:\n- me/photos\n---\n")
    assert describe_origin(str(tmp_path)) == "trained on me/photos"
    (tmp_path / "README.md").write_text("---\ntags: [clip]\n---\n")
    assert describe_origin(str(tmp_path)) == "its card does not name its training data"


def test_suggestions_come_from_the_gallery_or_are_neutral(answers, tiny_clip_dir, photos):
    queries = suggest_queries(answers)
    assert len(queries) == 4 and set(queries) <= set(answers.captions)
    of_photos = SpaceAnswers(str(tiny_clip_dir), gallery=str(photos))
    assert suggest_queries(of_photos) == list(space.QUERIES)
    assert suggest_labels(of_photos) == (space.SUGGESTED_LABELS, "a photo of a {}")
    of_shapes = SpaceAnswers(str(ROOT / "recipes/demo_anchor"), gallery=str(photos))
    assert suggest_queries(of_shapes) == list(space.DRAWN_QUERIES)


@pytest.mark.parametrize("family", ["siglip2", "vision_text", "metaclip_2"])
def test_a_student_of_another_family_answers_everything(app, upload, tmp_path, family):
    save = save_fixed_siglip2 if family == "siglip2" else partial(save_dual_encoder, family)
    folder = make_native_student(tmp_path / "student", save, "--clip_model", "google/siglip2-base-patch16-224")
    model = SpaceAnswers(str(folder), gallery=GALLERY)
    assert "student** (fine-tuned from google/siglip2-base-patch16-224 on scenes drawn" in app.describe_page(model)
    found = model.find_pictures("a red circle", 3)
    encoder = Encoder(model.model, model.processor)
    scores = (embed_texts(encoder, ["a red circle"]) @ embed_images(encoder, model.gallery.dataset).T)[0]
    assert [hit.score for hit in found.hits] == pytest.approx(scores.topk(3).values.tolist(), abs=1e-6)
    shares, remark = model.classify(upload, "red circle, blue square", "a {}")
    assert sum(shares.values()) == pytest.approx(1) and "Most likely" in remark
    rows, _ = model.find_texts(upload, "a dog\na cat")
    assert len(rows) == 2 and len(model.find_pictures(upload, 2).hits) == 2
    assert "too long" in model.find_pictures("a red dog " * 60, 1).remark
    app.build_app(model)


def test_labels_come_from_captions_or_folders(answers, tiny_clip_dir, photos):
    labels, prompt = suggest_labels(answers)  # drawn scenes
    assert prompt == "a {}" and 2 <= len(labels.split(", ")) <= 6
    shapes = re.compile(rf"({'|'.join(COLOURS)}|{'|'.join(PATTERNS)}) ({'|'.join(SHAPES)})s?")
    assert all(shapes.fullmatch(label) for label in labels.split(", "))
    for number, folder in enumerate(("kitchen", "work-shop")):
        (photos / folder).mkdir()
        (photos / f"{number} 写真.png").rename(photos / folder / f"{number}.png")
    (photos / "2 写真.png").unlink()
    of_folders = SpaceAnswers(str(tiny_clip_dir), gallery=str(photos))
    assert suggest_labels(of_folders) == ("kitchen, work shop", "a photo of a {}")
    captions = ["a brown dog runs", "two brown dogs", "a small child with a red ball", "a red ball on a table"]
    assert frequent_names(captions) == ["brown dog", "red ball"]
    assert frequent_names(["a dog", "the dog and a cat", "cats"]) == ["dog", "cat"] and frequent_names(["a dog"]) == []


def test_the_hint_of_the_search_box_fits_a_telephone(app, answers):
    page = app.build_app(answers).get_config_file()
    (hint,) = [
        one["props"]["placeholder"]
        for one in page["components"]
        if one["props"].get("label") == "What should the picture show?"
    ]
    assert 0 < len(hint) <= app.SHORT_HINT


def test_an_index_of_a_folder_takes_the_captions_that_its_model_learned_from(tiny_clip_dir, photos, tmp_path, caplog):
    pytest.importorskip("faiss")
    model = shutil.copytree(tiny_clip_dir, tmp_path / "model")
    rows = "".join(f"{number} 写真.png,caption {number}\n" for number in range(3)) + "2 写真.png,\n"
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    arguments = {"train_datasets": ["hub:not/asked:train", f"csv:{tmp_path}/captions.csv:{photos}"]}
    (model / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    assert load_learned_captions(str(model), {f"{photos.name}/1 写真.png", "other/2.png"}) == ["caption 1"]
    index = build_index(str(model), str(photos), tmp_path / "index", on_bad_image="skip")
    ids = set(index.rows["image_id"].to_pylist())
    assert load_learned_captions(str(model), ids) == ["caption 0", "caption 1", "caption 2"]
    assert load_learned_captions(str(tiny_clip_dir), ids) == []
    answers = SpaceAnswers(index=str(index.folder))
    assert suggest_queries(answers) == ["caption 0", "caption 1", "caption 2"]
    assert "without a caption" not in caplog.text  # what training said of the table is not said again
    (tmp_path / "captions.csv").unlink()
    assert load_learned_captions(str(model), ids) == [] and "are not known: No table of captions" in caplog.text


def test_an_index_of_captioned_pictures_suggests_their_captions(tiny_clip_dir, photos, tmp_path):
    pytest.importorskip("faiss")
    rows = "".join(f"{number} 写真.png,caption {number}\n" for number in range(3))
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    spec = f"csv:{tmp_path}/captions.csv:{photos}"
    answers = SpaceAnswers(index=str(build_index(str(tiny_clip_dir), spec, tmp_path / "index").folder))
    assert suggest_queries(answers) == ["caption 0", "caption 1", "caption 2"]
    assert answers.find_texts(Image.open(photos / "0 写真.png"))[1].startswith("The 3 nearest of 3 captions")


def test_texts_come_in_the_order_of_their_cosines(answers):
    picture = answers.gallery.dataset[2]["image"]
    encoder = Encoder(answers.model, answers.processor)
    scores = answers.caption_embeds @ embed_images(encoder, answers.gallery.dataset.select([2]))[0]
    rows, remark = answers.find_texts(picture, "")
    assert [text for text, _ in rows] == [answers.captions[row] for row in scores.argsort(descending=True)[:5]]
    assert "captions of the gallery" in remark
    own, remark = answers.find_texts(picture, "a red dog\n\n a blue circle\na red dog")
    assert sorted(text for text, _ in own) == ["a blue circle", "a red dog"] and "your 2 texts" in remark


def test_shares_are_the_models_own_probabilities(answers, upload):
    shares, remark = answers.classify(upload, "dog, circle\nsquare, dog", "a photo of a {}")
    assert list(shares) == ["dog", "circle", "square"] and sum(shares.values()) == pytest.approx(1)
    inputs = answers.processor(images=upload, text=[f"a photo of a {name}" for name in shares], return_tensors="pt")
    with torch.no_grad():
        expected = answers.model(**inputs).logits_per_image.softmax(dim=1)[0]
    assert np.allclose(list(shares.values()), expected, atol=1e-5)
    assert max(shares, key=shares.get) in remark


def test_attention_is_drawn_over_the_regions_there_are(taught, upload):
    drawing, rows, remark = taught.attend(upload, "a red dog")
    assert drawing.width > 300 and "9 regions, by grid:3x3 (a fixed grid" in remark
    assert np.asarray(drawing.convert("RGB")).std() > 10
    assert sorted(row[0] for row in rows) == list(range(9)) and {row[2] for row in rows} == {1.0}
    shares = [int(row[1].removesuffix("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and 95 <= sum(shares) <= 105
    assert next(row[3] for row in rows if row[0] == 8) == "43, 43, 64, 64"
    scene = taught.gallery.dataset[0]
    own, rows, remark = taught.attend(scene["image"], "a red dog")
    assert f"{len(scene['boxes'])} regions, drawn with the picture" in remark
    boxes = {row[0]: [float(side) for side in row[3].split(", ")] for row in rows}
    assert np.allclose([boxes[number] for number in sorted(boxes)], scene["boxes"], atol=0.51)
    assert own.size != drawing.size or own.tobytes() != drawing.tobytes()


def test_a_teacher_that_reads_text_asks_for_one(taught, upload):
    if taught.teacher[0].config.cross_attention == "regions":
        assert "reads no text" in taught.attend(upload, "")[2]
    else:
        assert "reads the text" in taught.attend(upload, "a dog")[2]
        with pytest.raises(UserMistake, match="describe the picture"):
            taught.attend(upload, " ")


def test_without_a_teacher_the_way_to_one_is_named(answers, upload):
    with pytest.raises(UserMistake, match="variable TEACHER"):
        answers.attend(upload, "a dog")


def test_a_folder_is_a_gallery_without_captions(tiny_clip_dir, photos, upload):
    answers = SpaceAnswers(str(tiny_clip_dir), gallery=str(photos))
    with pytest.raises(UserMistake, match="has no captions"):
        answers.find_texts(upload, "")
    assert len(answers.find_texts(upload, "a dog\na circle")[0]) == 2


def test_a_text_too_long_is_answered_with_a_remark(answers):
    found = answers.find_pictures("dog " * 100, 2)
    assert len(found.hits) == 2 and "its last 25 tokens were not read" in found.remark  # 100, BOS, EOS; 77 are read
    assert "too long" not in answers.find_pictures("dog " * 75, 2).remark


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda a, p: a.find_pictures("  "), "The text is empty"),
        (lambda a, p: a.find_pictures(None), "The text is empty"),
        (lambda a, p: a.find_pictures("a" * 2001), "2001 characters"),
        (lambda a, p: a.find_texts(None), "There is no picture"),
        (lambda a, p: a.find_texts(Image.new("RGB", (3, 90))), "3x90 pixels"),
        (lambda a, p: a.classify(p, "dog", "a {}"), "between 2 and 200 different labels.*there are 1"),
        (lambda a, p: a.classify(p, "dog, dog", "a {}"), "there are 1"),
        (lambda a, p: a.classify(p, "dog, cat", "a photo"), "needs one {}"),
        (lambda a, p: a.classify(None, "dog, cat", "a {}"), "There is no picture"),
    ],
)
def test_a_visitors_mistake_is_named(answers, upload, ask, message):
    with pytest.raises(UserMistake, match=message):
        ask(answers, upload)


def test_labels_are_split_once():
    assert split_lines(" dog, cat\n dog,\n,bird ") == ["dog", "cat", "bird"]
    assert split_lines(None) == []


def test_what_is_no_trained_teacher_is_refused(tiny_clip_dir, tmp_path):
    with pytest.raises(ValueError, match="Expected a trained teacher.*got a model of type 'clip'"):
        SpaceAnswers(str(tiny_clip_dir), str(tiny_clip_dir), gallery=GALLERY)
    teacher = DCLIPTeacher.from_clip(str(tiny_clip_dir))
    kept = {name: tensor for name, tensor in teacher.state_dict().items() if name.startswith("clip.")}
    teacher.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"Expected all weights of DCLIPTeacher at .* missing \("):
        SpaceAnswers(str(tiny_clip_dir), str(tmp_path), gallery=GALLERY)


def test_mistakes_become_a_remark_and_faults_stay_faults(app, answers):
    assert app.said_plainly(answers.find_pictures)("", 3) == (None, "⚠️ The text is empty. Type what the picture "
        "should show, for example one of the examples below.")  # fmt: skip
    empty, remark = app.said_plainly(answers.find_texts)(app.BrokenUpload("'cat.png' cannot be read"), "")
    assert empty is None and remark == "⚠️ 'cat.png' cannot be read"
    assert app.said_plainly(answers.attend, 2)(answers.picture(answers.sample(1)[0]), "")[:2] == (None, None)
    with pytest.raises(ZeroDivisionError):
        app.said_plainly(lambda: 1 / 0)()


def test_a_visitors_words_are_shown_as_they_are(answers, app):
    words = "<img src=x onerror=alert(1)> ![x](http://a/b.png) {}"

    def mistaken():
        raise app.UserMistake(words)

    shown = "&lt;img src=x onerror=alert(1)> ![x]\\(http://a/b.png) {}"
    assert app.said_plainly(mistaken)() == (None, f"⚠️ {shown}")
    _, remark = answers.classify(answers.picture(answers.sample(1)[0]), "red circle, blue square", words)
    assert remark.startswith("Most likely: '&lt;img") and "](http" not in remark


def test_the_demos_models_are_the_default(start, tmp_path, monkeypatch):
    for name in ("INDEX", "MODEL", "TEACHER", "GALLERY", "DETECTOR"):
        monkeypatch.delenv(name, raising=False)
    assert start.default_models(tmp_path) == (None, None)
    (tmp_path / "recipes/demo_anchor").mkdir(parents=True)
    assert start.default_models(tmp_path) == (str(tmp_path / "recipes/demo_anchor"), None)
    run = tmp_path / "outputs/demo/leak_free/seed-0"
    (run / "student").mkdir(parents=True)
    (run / "teacher").mkdir()
    assert start.default_models(tmp_path) == (str(run / "student"), str(run / "teacher"))
    monkeypatch.setenv("MODEL", "me/model")
    with pytest.raises(ValueError, match="--port: .*an integer from 0 to 65535, got '?999999"):
        start.parse_arguments(["--model", "a", "--port", "999999"])
    given = start.parse_arguments(["--gallery", "pictures"])
    assert (given.model, given.teacher, given.gallery, given.index) == ("me/model", None, "pictures", None)
    monkeypatch.delenv("MODEL")
    monkeypatch.setenv("INDEX", "my_index")
    given = start.parse_arguments([])
    assert (given.model, given.index, given.detector) == (None, "my_index", None)  # the index names its model


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "/nowhere"], "^Failed: --model: No model at '/nowhere'"),
        (
            ["--model", "a/b", "--teacher", "./nowhere"],
            "^Failed: --teacher: No model at 'nowhere'",
        ),
        (
            ["--model", "a/b", "--gallery", "nowhere"],
            "^Failed: --gallery: No pictures at 'nowhere'",
        ),
        (["--index", "/nowhere"], "^Failed: --index: expected an index with index.json in '/nowhere'"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_loaded(start, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "page", None)  # importing it would fail
    with pytest.raises(SystemExit, match=message):
        start.main(words)


def test_an_index_whose_model_has_gone_is_refused_at_once(start, tiny_clip_dir, photos, tmp_path):
    pytest.importorskip("faiss")
    model = shutil.copytree(tiny_clip_dir, tmp_path / "model")
    build_index(str(model), str(photos), tmp_path / "index", on_bad_image="skip")
    start.check_places(start.parse_arguments(["--index", str(tmp_path / "index")]))
    model.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="is no longer at .*/model'. Say with --model where it is now"):
        start.check_places(start.parse_arguments(["--index", str(tmp_path / "index")]))
    start.check_places(start.parse_arguments(["--index", str(tmp_path / "index"), "--model", str(tmp_path / "moved")]))


def test_without_a_teacher_there_is_no_tab_for_it(app, answers):
    tabs = [block.label for block in app.build_app(answers).blocks.values() if isinstance(block, gradio.Tab)]
    assert tabs == ["Search", "Texts", "Classify"]


def test_the_front_matter_and_requirements_are_what_a_space_needs():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60  # the Hub's limit
    listed = set((SPACE / "requirements.txt").read_text().splitlines()[1:])
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (needed,) = [ast.literal_eval(node.value) for node in calls if node.arg == "install_requires"]
    assert listed == set(needed) | {"matplotlib>=3.8", "faiss-cpu>=1.8"}


@pytest.fixture(scope="module")
def server(app, taught):
    """The running page's address."""
    page = app.build_app(taught)
    _, url, _ = app.launch(page, server_name="127.0.0.1")
    yield url
    page.close()


def broken_files(folder, upload):
    """A file that is no picture, and half of one."""
    (folder / "nothing.png").write_bytes(b"not a picture")
    upload.save(folder / "half.png")
    whole = (folder / "half.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    return [folder / "nothing.png", folder / "half.png"]


def test_the_server_answers_every_tab(server, taught, tmp_path, upload):
    if taught.teacher[0].config.cross_attention != "regions":
        pytest.skip("one server is enough")
    client = pytest.importorskip("gradio_client").Client(server, verbose=False)
    send = sys.modules["gradio_client"].handle_file
    upload.save(tmp_path / "upload.png")
    picture = send(str(tmp_path / "upload.png"))
    found, remark, *_ = client.predict("a red dog", 4, api_name="/search")
    assert len(found) == 4 and remark.startswith("The 4 nearest")
    assert found[0]["caption"] == taught.find_pictures("a red dog", 4).tiles[0][1]
    found, remark, *_ = client.predict(picture, 3, api_name="/search_by_picture")
    assert [one["caption"] for one in found] == [label for _, label in taught.find_pictures(upload, 3).tiles]
    assert "There is no picture" in client.predict(None, 3, api_name="/search_by_picture")[1]
    table, _ = client.predict(picture, "", api_name="/texts")
    assert table["data"] == taught.find_texts(upload)[0]
    shares, _ = client.predict(picture, "dog, circle", "a {}", api_name="/classify")
    assert {entry["label"] for entry in shares["confidences"]} == {"dog", "circle"}
    drawing, table, remark = client.predict(picture, "", api_name="/attention")
    assert len(table["data"]) == 9
    assert Image.open(drawing).width > 300 and "9 regions" in remark
    for path in broken_files(tmp_path, upload):
        table, remark = client.predict(send(str(path)), "", api_name="/texts")
        assert not table or not table["data"] or table["data"] == [["", ""]]
        assert f"'{path.name}' cannot be read: " in remark and "Give an undamaged" in remark


@pytest.fixture
def browser_page():
    """A page of a headless Chromium that records requests to anywhere but this machine."""
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("needs Chromium: `apt-get install chromium`, or its path in the variable CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.foreign = []
        own = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:")
        page.on("request", lambda request: own.match(request.url) or page.foreign.append(request.url))
        yield page
        browser.close()


@pytest.mark.slow
def test_a_visitor_uses_every_tab_in_a_browser(server, taught, browser_page, tmp_path, upload):
    page, shots = browser_page, Path(os.environ.get("SPACE_SCREENSHOTS") or tmp_path)
    upload.save(tmp_path / "upload.png")
    page.goto(server)
    page.get_by_label("What should the picture show?").fill("a red dog")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector("text=The 8 nearest of 8 pictures", timeout=60_000)
    found = taught.find_pictures("a red dog", 8)
    labels = [label for _, label in found.tiles]
    captions = page.locator(".caption-label")
    captions.nth(len(labels) - 1).wait_for(timeout=30_000)
    assert [label.strip() for label in captions.all_text_contents()] == labels
    page.screenshot(path=shots / "search.png", full_page=True)
    page.locator(".found .thumbnail-item").nth(2).click()
    page.get_by_text(f"The 7 nearest of 8 pictures to {found.hits[2].name}").wait_for(timeout=30_000)
    page.screenshot(path=shots / "like.png", full_page=True)
    page.get_by_label("What should the picture show?").fill("  ")
    page.get_by_role("button", name="Search", exact=True).click()
    page.wait_for_selector("text=The text is empty", timeout=30_000)
    page.screenshot(path=shots / "empty.png")
    reads_text = taught.teacher[0].config.cross_attention != "regions"
    for tab, button, answer in (
        ("Texts", "Find texts", "captions of the gallery, each with"),
        ("Classify", "Classify", "Most likely"),
        ("Teacher", "Show attention", "9 regions, by grid:3x3"),
    ):
        page.get_by_role("tab", name=tab).click()
        panel = page.get_by_role("tabpanel").filter(visible=True)
        upload_file(panel, broken_files(tmp_path, upload)[0])
        panel.get_by_role("button", name=button).click()
        panel.get_by_text("'nothing.png' cannot be read").wait_for(timeout=30_000)
        page.screenshot(path=shots / f"{button}-broken.png")
        panel.get_by_label("Remove Image").or_(panel.get_by_label("Clear")).first.click()
        upload_file(panel, tmp_path / "upload.png")
        if tab == "Teacher" and reads_text:
            panel.get_by_label("What does it show?").fill("a red dog")
        panel.get_by_role("button", name=button).click()
        panel.get_by_text(answer).wait_for(timeout=60_000)
        time.sleep(1)  # pictures arrive after their remark
        page.screenshot(path=shots / f"{button}.png", full_page=True)
        panel.locator("button.gallery-item").nth(1).click()  # a picture of the gallery
        time.sleep(1)
        panel.get_by_role("button", name=button).click()
        panel.get_by_text("drawn with the picture" if tab == "Teacher" else answer).wait_for(timeout=60_000)
    assert page.foreign == []


def upload_file(panel, path):
    """Hand a file to a tab's picture, and wait until it is there."""
    panel.locator("input[type=file]").first.set_input_files(path)
    panel.locator("button[aria-label='Remove Image'], button[aria-label='Clear']").first.wait_for(timeout=30_000)
    time.sleep(1)


# -- limits ----------------------------------------------------------------------------------------------------------


def preprocess(app, path):
    """What the page makes of an upload."""
    payload = SimpleNamespace(path=str(path), orig_name=path.name, url=None)
    return app.make_upload(label="Picture").preprocess(payload)


def test_an_upload_is_refused_by_its_pixels_before_it_is_decoded(app, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png((10_000, 8_000), 8, 2, [b"\0"]))  # 80 million pixels, of which none is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    broken = preprocess(app, path)
    assert isinstance(broken, app.BrokenUpload)
    assert broken.message.startswith(
        "'large.png' cannot be read: expected at most 50,000,000 pixels, got 10000 x 8000."
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert app.said_plainly(lambda given: given)(broken) == (None, f"⚠️ {broken.message}")


def test_an_upload_is_upright_and_over_white_whatever_it_is(app, tmp_path):
    layer = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    layer.paste((200, 0, 0, 255), (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    layer.save(tmp_path / "a.png", exif=exif)
    picture = preprocess(app, tmp_path / "a.png")
    assert picture.mode == "RGB" and picture.size == (10, 20)
    assert picture.getpixel((5, 2)) == (200, 0, 0) and picture.getpixel((5, 15)) == (255, 255, 255)
    (tmp_path / "b.jpg").write_text("no picture")
    broken = preprocess(app, tmp_path / "b.jpg")
    assert "'b.jpg' cannot be read: cannot identify" in broken.message and str(tmp_path) not in broken.message
    assert app.make_upload(label="Picture").preprocess(None) is None
    nowhere = SimpleNamespace(path=None, orig_name=None, url="http://127.0.0.1:9/a.png")
    assert "is no file" in app.make_upload(label="Picture").preprocess(nowhere).message


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda a, p: a.find_texts(p, "\n".join(map(str, range(501)))), "There are 501 texts, more than 500"),
        (lambda a, p: a.find_texts(p, "a" * 2001), "2001 characters"),
        (lambda a, p: a.classify(p, "dog, cat", "{}" + "a" * 500), "prompt has 502 characters, more than 500"),
        (lambda a, p: a.find_texts(Image.new("L", (8000, 7000)), "a"), "8000x7000 pixels, more than 50,000,000"),
    ],
)
def test_what_a_visitor_may_ask_is_bounded(answers, upload, ask, message):
    with pytest.raises(UserMistake, match=message):
        ask(answers, upload)


def test_numbers_of_answers_are_bounded(answers, upload):
    assert [len(answers.find_pictures("a dog", count).hits) for count in (10**9, -5)] == [8, 1]
    assert len(answers.find_texts(upload, "a\nb", 0)[0]) == 1


def test_attention_over_a_large_picture_is_drawn_small(taught):
    picture = Image.new("RGB", (4000, 2500), (10, 200, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    drawing, _, remark = taught.attend(picture, "a red dog")
    assert max(drawing.size) < 4000 and "9 regions" in remark
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
