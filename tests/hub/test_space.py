"""The Space answers as the model does, says a visitor's mistakes plainly, and works in a browser without a network."""

import ast
import importlib.util
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fixtures.pictures import png
from PIL import Image

from modeling_dclip import DCLIPTeacher, DCLIPTeacherProcessor
from modeling_dclip.data.scenes import load_scenes
from modeling_dclip.encoders import Encoder
from modeling_dclip.evaluation.embedding import embed_images, embed_texts
from modeling_dclip.hub.space import SpaceAnswers, UserMistake, split_lines

gradio = pytest.importorskip("gradio")

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "hub_cards" / "space"
GALLERY = "scenes:validation,n=8,image_size=48"


@pytest.fixture(scope="module")
def app():
    """The Space's script as a module."""
    specification = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


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
    scores = (embed_texts(Encoder(answers.model, answers.processor), ["a red dog"]) @ answers.image_embeds.T)[0]
    found, remark = answers.find_pictures("  a red dog ", 3)
    order = scores.argsort(descending=True)[:3].tolist()
    for rank, ((picture, label), row) in enumerate(zip(found, order, strict=True), 1):
        assert picture.tobytes() == answers.gallery[row]["image"].tobytes()
        assert label == f"{rank} · {scores[row]:.3f}"
    assert remark.startswith("The 3 nearest of 8 pictures")


def test_texts_come_in_the_order_of_their_cosines(answers):
    picture = answers.picture(2)
    encoder = Encoder(answers.model, answers.processor)
    scores = answers.caption_embeds @ embed_images(encoder, answers.gallery.select([2]))[0]
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
    drawing, remark = taught.attend(upload, "a red dog")
    assert drawing.width > 300 and "9 regions, by grid:3x3" in remark
    assert np.asarray(drawing.convert("RGB")).std() > 10
    own, remark = taught.attend(taught.picture(0), "a red dog")
    assert f"{len(taught.gallery[0]['boxes'])} regions, drawn with the picture" in remark
    assert own.size != drawing.size or own.tobytes() != drawing.tobytes()


def test_a_teacher_that_reads_text_asks_for_one(taught, upload):
    if taught.teacher[0].config.cross_attention == "regions":
        assert "reads no text" in taught.attend(upload, "")[1]
    else:
        assert "reads the text" in taught.attend(upload, "a dog")[1]
        with pytest.raises(UserMistake, match="describe the picture"):
            taught.attend(upload, " ")


def test_without_a_teacher_the_way_to_one_is_named(answers, upload):
    with pytest.raises(UserMistake, match="variable TEACHER"):
        answers.attend(upload, "a dog")


def test_a_folder_is_a_gallery_without_captions(tiny_clip_dir, tmp_path, upload):
    for number in range(3):
        Image.effect_noise((40, 40), 20 + 40 * number).convert("RGB").save(tmp_path / f"{number}.png")
    answers = SpaceAnswers(str(tiny_clip_dir), gallery=str(tmp_path))
    assert len(answers.find_pictures("a dog", 10)[0]) == 3
    with pytest.raises(UserMistake, match="has no captions"):
        answers.find_texts(upload, "")
    assert len(answers.find_texts(upload, "a dog\na circle")[0]) == 2


def test_a_text_too_long_is_answered_with_a_remark(answers):
    found, remark = answers.find_pictures("dog " * 100, 2)
    assert len(found) == 2 and "its last 25 tokens were not read" in remark  # 100, BOS and EOS; 77 are read
    assert "too long" not in answers.find_pictures("dog " * 75, 2)[1]


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
    with pytest.raises(ZeroDivisionError):
        app.said_plainly(lambda: 1 / 0)()


def test_a_visitors_words_are_shown_as_they_are(answers, app):
    words = "<img src=x onerror=alert(1)> ![x](http://a/b.png) {}"

    def mistaken():
        raise app.UserMistake(words)

    shown = "&lt;img src=x onerror=alert(1)> ![x]\\(http://a/b.png) {}"
    assert app.said_plainly(mistaken)() == (None, f"⚠️ {shown}")
    _, remark = answers.classify(answers.picture(0), "red circle, blue square", words)
    assert remark.startswith("Most likely: '&lt;img") and "](http" not in remark


def test_the_demos_models_are_the_default(app, tmp_path, monkeypatch, capsys):
    for name in ("MODEL", "TEACHER", "GALLERY", "DETECTOR"):
        monkeypatch.delenv(name, raising=False)
    assert app.default_models(tmp_path) == (None, None)
    (tmp_path / "recipes/demo_anchor").mkdir(parents=True)
    assert app.default_models(tmp_path) == (str(tmp_path / "recipes/demo_anchor"), None)
    run = tmp_path / "outputs/demo/leak_free/seed-0"
    (run / "student").mkdir(parents=True)
    (run / "teacher").mkdir()
    assert app.default_models(tmp_path) == (str(run / "student"), str(run / "teacher"))
    monkeypatch.setenv("MODEL", "me/model")
    with pytest.raises(SystemExit):
        app.parse_arguments(["--model", "a", "--port", "999999"])
    assert "--port: expected a number from 0 to 65535, got 999999" in capsys.readouterr().err
    given = app.parse_arguments(["--gallery", "pictures"])
    assert (given.model, given.teacher, given.gallery) == ("me/model", None, "pictures")


def test_a_wrong_model_ends_with_a_message(app):
    with pytest.raises(SystemExit, match="^Failed: Expected a folder with a model at /nowhere"):
        app.main(["--model", "/nowhere"])


def test_the_front_matter_and_requirements_are_what_a_space_needs():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60  # the Hub's limit
    listed = set((SPACE / "requirements.txt").read_text().splitlines()[1:])
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    (needed,) = [ast.literal_eval(node.value) for node in calls if node.arg == "install_requires"]
    assert listed == set(needed) | {"matplotlib>=3.8"}


@pytest.fixture(scope="module")
def server(app, taught):
    """The running page's address."""
    page = app.build_app(taught)
    _, url, _ = app.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
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
    found, remark = client.predict("a red dog", 4, api_name="/search")
    assert len(found) == 4 and remark.startswith("The 4 nearest")
    assert found[0]["caption"] == taught.find_pictures("a red dog", 4)[0][0][1]
    table, _ = client.predict(picture, "", api_name="/texts")
    assert table["data"] == taught.find_texts(upload)[0]
    shares, _ = client.predict(picture, "dog, circle", "a {}", api_name="/classify")
    assert {entry["label"] for entry in shares["confidences"]} == {"dog", "circle"}
    drawing, remark = client.predict(picture, "", api_name="/attention")
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
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("text=The 8 nearest of 8 pictures", timeout=60_000)
    labels = [label for _, label in taught.find_pictures("a red dog", 8)[0]]
    page.wait_for_selector(f"text={labels[-1]}")
    shown = page.locator(".caption-label").all_inner_texts()
    assert [label.strip() for label in shown] == labels
    page.screenshot(path=shots / "search.png", full_page=True)
    page.get_by_label("What should the picture show?").fill("  ")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("text=The text is empty", timeout=30_000)
    page.screenshot(path=shots / "empty.png")
    reads_text = taught.teacher[0].config.cross_attention != "regions"
    for tab, button, answer in (
        ("Picture to text", "Find texts", "captions of the gallery, each with"),
        ("Classify", "Classify", "Most like"),
        ("Teacher's attention", "Show attention", "9 regions, by grid:3x3"),
    ):
        page.get_by_role("tab", name=tab).click()
        panel = page.get_by_role("tabpanel").filter(visible=True)
        upload_file(panel, broken_files(tmp_path, upload)[0])
        panel.get_by_role("button", name=button).click()
        panel.get_by_text("'nothing.png' cannot be read").wait_for(timeout=30_000)
        page.screenshot(path=shots / f"{button}-broken.png")
        panel.get_by_label("Remove Image").or_(panel.get_by_label("Clear")).first.click()
        upload_file(panel, tmp_path / "upload.png")
        if tab == "Teacher's attention" and reads_text:
            panel.get_by_label("What does it show?").fill("a red dog")
        panel.get_by_role("button", name=button).click()
        panel.get_by_text(answer).wait_for(timeout=60_000)
        time.sleep(1)  # pictures arrive after their remark
        page.screenshot(path=shots / f"{button}.png", full_page=True)
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
    assert len(answers.find_pictures("a dog", 10**9)[0]) == 8 and len(answers.find_pictures("a dog", -5)[0]) == 1
    assert len(answers.find_texts(upload, "a\nb", 0)[0]) == 1


def test_attention_over_a_large_picture_is_drawn_small(taught):
    picture = Image.new("RGB", (4000, 2500), (10, 200, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    drawing, remark = taught.attend(picture, "a red dog")
    assert max(drawing.size) < 4000 and "9 regions" in remark
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
