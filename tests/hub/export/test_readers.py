"""Users of an export get the model's embeddings of their texts and pictures, or it says where they do not."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.tiny_dual_encoders import make_word_tokenizer
from PIL import ExifTags, Image
from transformers import CLIPImageProcessorPil

from modeling_dclip.data.images import open_image
from modeling_dclip.encoders.families import projected, tokenize_texts
from modeling_dclip.hub.export.__main__ import main
from modeling_dclip.hub.export.readers import OPEN_PICTURE, Reader, compare_reader, describe_readings, make_pictures
from modeling_dclip.hub.export.towers import load_model
from modeling_dclip.modeling_dclip import DCLIPModel
from modeling_dclip.processing_dclip import DCLIPProcessor

NEEDS = {
    "open_clip": ["open_clip"],
    "sentence_transformers": ["sentence_transformers"],
    "onnx": ["onnxruntime", "onnxscript"],
    "torch_export": ["torch"],
}


@pytest.fixture(scope="module")
def student(tiny_clip_dir, tmp_path_factory):
    """A tiny ViT student whose tokenizer pads on the left, states no length, and whose weights tell inputs apart."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    DCLIPProcessor(CLIPImageProcessorPil(**side), processor.tokenizer).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "left", "model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def read_table(readme):
    rows = re.findall(r"\| (text|picture)s: (.+?) \| ([\d.-]+)( \(differs\))? \|", readme)
    return {(side, kind): (float(cosine), bool(differs)) for side, kind, cosine, differs in rows}


@torch.no_grad()
@pytest.mark.parametrize(
    "form, options",
    [*((form, ["--dtypes", "fp32"] if form == "onnx" else []) for form in NEEDS), ("onnx", ["--dtypes", "fp16"])],
    ids=str,
)
def test_the_code_in_the_readme_gives_the_models_embeddings(form, options, student, tmp_path, monkeypatch, capsys):
    for name in NEEDS[form]:
        pytest.importorskip(name, reason=f"needs {name}")
    main([form, "--model", str(student), "--output", str(tmp_path / "out"), *options])
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save("photo.png", exif=exif)  # transparent, and to be turned
    readme = (tmp_path / "out" / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    said = capsys.readouterr().out
    short = said[said.index("import ") : said.index("What differs from the model:")]
    compile(short, "what was printed", "exec")
    assert str(tmp_path / "out") in short and "open_picture" not in short and "Image.open" in short
    scope = {}
    exec(code.replace("FOLDER", str(tmp_path / "out")).replace("photo.jpg", "photo.png"), scope)
    model, processor = load_model(student), DCLIPProcessor.from_pretrained(student)
    seen = processor.image_processor([open_image("photo.png")], return_tensors="pt")["pixel_values"]
    expected = F.normalize(model.get_image_features(seen).pooler_output)
    bound = 2**-10 if "fp16" in options else 1e-4  # a number of float16 has 11 bits
    found = torch.as_tensor(np.asarray(scope["image_embeds"]))
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    ids = tokenize_texts(model, processor, ["a photo of a dog"], max_length=77)
    expected = F.normalize(projected(model.get_text_features(**ids)))
    found = torch.as_tensor(np.asarray(scope["text_embeds"]))
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    table = read_table(readme)
    assert table["text", "more words than are read"] == (1, False) and table["picture", "turned by EXIF"][1]
    assert "turned by EXIF (0." in " ".join(said.split())


@torch.no_grad()
def test_what_open_clip_reads_otherwise_is_named_with_its_cosine(student, tmp_path, capsys):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    main(["open_clip", "--model", str(student), "--output", str(tmp_path / "out")])
    said, table = " ".join(capsys.readouterr().out.split()), read_table((tmp_path / "out" / "README.md").read_text())
    folder = f"local-dir:{tmp_path / 'out'}"
    theirs, tokenizer = open_clip.create_model(folder).eval(), open_clip.get_tokenizer(folder)
    model, processor = load_model(student), DCLIPProcessor.from_pretrained(student)
    cases = {
        "curly quotes": ["the dog’s ball", "a “no entry” sign"],
        "HTML entities": ["Tom &amp; Jerry", "a dog &lt;3 a cat", "a red&nbsp;circle"],
        "ligatures": ["ﬁne print", "an oﬃce"],
        "capitals": ["A Dog On THE BEACH"],
    }
    for kind, texts in cases.items():
        ours = projected(model.get_text_features(**tokenize_texts(model, processor, texts, max_length=77)))
        cosine = float(torch.cosine_similarity(theirs.encode_text(tokenizer(texts)), ours).min())
        assert table["text", kind][0] == pytest.approx(cosine, abs=2e-6)
        differs = 1 - cosine > 1e-5
        assert table["text", kind][1] == differs
        assert (f"{kind} ({cosine:.4f})" in said) == differs
    assert table["text", "HTML entities"][1] and table["text", "ligatures"][1]
    assert "repairs every text with ftfy" in said
    for kind in ("transparent", "turned by EXIF"):
        assert table["picture", kind][1] and kind in said
    assert table["picture", "plain"] == (1, False)


def test_an_export_whose_reader_sees_other_pictures_is_refused(student, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    create = open_clip.create_model_from_pretrained

    def darker(name):
        model, transform = create(name)
        return model, lambda picture: transform(picture.point(lambda value: value // 2))

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", darker)
    with pytest.raises(
        SystemExit, match="Expected open_clip on pictures of the kind 'plain' to give the model's outputs"
    ):
        main(["open_clip", "--model", str(student), "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_an_export_whose_reader_sees_other_words_is_refused(student, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    # CLIP's tokenizer, which the export names, splits words otherwise than this one.
    words = make_word_tokenizer(77)
    words.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="sentence-transformers on texts of the kind .plain words. to give the model"):
        main(["sentence_transformers", "--model", str(folder), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["open_clip", "sentence_transformers", "onnx", "torch_export"])
def test_weights_that_are_not_finite_are_refused_by_name(form, student, tmp_path):
    model = DCLIPModel.from_pretrained(student)
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[7, 3] = float("nan")  # of one token alone
    model.save_pretrained(tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        shutil.copy(student / name, tmp_path / "student" / name)
    with pytest.raises(SystemExit, match="finite weights at .* in text_model.embeddings.token_embedding.weight"):
        main([form, "--model", str(tmp_path / "student"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_a_reader_refuses_is_said(student):
    model, processor = load_model(student), DCLIPProcessor.from_pretrained(student)

    def embed(texts):
        if any("\x00" in text for text in texts):
            raise TypeError("no NUL\nplease")
        return projected(model.get_text_features(**tokenize_texts(model, processor, texts, max_length=77)))

    reader = Reader("a reader", embed, None, {"text": "It is old."})
    measured, readings = compare_reader(model, processor, reader)
    assert measured["min_cosine"] == pytest.approx(1)
    (line,) = describe_readings(readings, reader)
    assert line == (
        "a reader reads these texts otherwise than the model (least cosine): control characters (refused by a "
        "reader: no NUL please). It is old."
    )


@pytest.mark.parametrize("size", [32, 35, 224])
def test_pictures_of_every_kind_are_read_by_the_models_own_commands(size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    for files in make_pictures(size).values():
        pixels = processor([open_image(file) for file in files], return_tensors="pt")["pixel_values"]
        assert pixels.shape[1:] == (3, size, size)


def test_pictures_opened_as_the_readme_says_are_those_of_the_models_own_commands():
    scope = {}
    exec(OPEN_PICTURE, scope)
    for kind, files in make_pictures(32).items():
        for file in files:
            opened, expected = scope["open_picture"](io.BytesIO(file)), open_image(file)
            assert np.array_equal(np.asarray(opened), np.asarray(expected)), kind


def test_a_full_disk_leaves_nothing_behind(student, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modeling_dclip.hub.export.onnx.write_bytes", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        main(["torch_export", "--model", str(student), "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def change(folder, name, **fields):
    """Other values in a JSON file, or in the part of it that `.` names."""
    for file, part in (one.partition(":")[::2] for one in name.split()):
        content = json.loads((folder / file).read_text())
        (content[part] if part else content).update(fields)
        (folder / file).write_text(json.dumps(content))


IMAGES = "preprocessor_config.json processor_config.json:image_processor"


@pytest.mark.parametrize(
    ("form", "name", "fields", "message"),
    [
        (
            "open_clip",
            "config.json:text_config",
            {"eos_token_id": 5},
            "whose texts end in the token 5, where the text",
        ),
        ("torch_export", "config.json:text_config", {"eos_token_id": 5}, "whose texts end in the token 5"),
        (
            "open_clip",
            IMAGES,
            {"resample": 1},
            "with bicubic or bilinear interpolation, as open_clip has, got lanczos",
        ),
        ("open_clip", IMAGES, {"do_normalize": False}, "open_clip on pictures of the kind 'plain' to give"),
        ("torch_export", IMAGES, {"do_center_crop": False}, "to resize and to crop, so that all images have one size"),
    ],
)
def test_a_student_that_no_reader_can_read_alike_is_refused(form, name, fields, message, student, tmp_path):
    pytest.importorskip("open_clip", reason="needs open_clip_torch")
    shutil.copytree(student, tmp_path / "student")
    change(tmp_path / "student", name, **fields)
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([form, "--model", str(tmp_path / "student"), "--output", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("left", ["processor_config.json", None])
def test_preprocessing_is_exported_from_either_file_and_its_lack_is_said(left, student, tmp_path, capsys):
    shutil.copytree(student, tmp_path / "student")
    for name in {"processor_config.json", "preprocessor_config.json"} - {left}:
        (tmp_path / "student" / name).unlink()
    command = ["torch_export", "--model", str(tmp_path / "student"), "--output", str(tmp_path / "out")]
    main(command)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert ({"README.md", "preprocessor_config.json", "tokenizer.json"} <= written) == (left is not None)
    said = " ".join(capsys.readouterr().out.split())
    assert ("so the export has neither preprocessing nor tokenizer" in said) == (left is None)
