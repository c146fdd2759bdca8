"""Teachers and captioners: each says what its own library says, with its own preprocessing."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.tiny_dual_encoders import save_dual_encoder
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from modeling_dclip import DCLIPModel, DCLIPProcessor
from modeling_dclip.data.reinforced.teachers import (
    OpenClipTeacher,
    TransformersCaptioner,
    TransformersTeacher,
    build_teacher,
)

TEXTS = ["a red dog", "small circle", "the blue square of the large dog " * 20]


def pictures(count=3):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + 3 * i, 50, 3), np.uint8)) for i in range(count)]


def test_a_transformers_teacher_says_what_transformers_says(tiny_clip_dir):
    teacher, images = build_teacher(str(tiny_clip_dir)), pictures()
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip_dir).eval(), CLIPTokenizer.from_pretrained(tiny_clip_dir)
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip_dir)(images=images, return_tensors="pt")["pixel_values"]
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert tokens["attention_mask"].sum(dim=1).max() == 77  # the last is cut
    with torch.no_grad():
        outputs = model(pixel_values=pixels, **tokens)
    assert isinstance(teacher, TransformersTeacher) and teacher.width == 16
    assert torch.equal(teacher.preprocess(images), pixels)
    assert teacher.logit_scale == pytest.approx(2.6592)  # CLIP's first value
    for embeds, expected in (
        (teacher.encode_images(pixels), outputs.image_embeds),
        (teacher.encode_texts(TEXTS), outputs.text_embeds),
    ):
        assert embeds.dtype == np.float32
        np.testing.assert_allclose(embeds, expected, atol=1e-6)


def test_a_student_of_this_package_may_teach(tiny_clip_dir, tmp_path):
    DCLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    DCLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    clip, student = build_teacher(str(tiny_clip_dir)), build_teacher(str(tmp_path))
    pixels = clip.preprocess(pictures())
    assert torch.equal(student.preprocess(pictures()), pixels)
    np.testing.assert_allclose(student.encode_images(pixels), clip.encode_images(pixels), atol=1e-6)
    np.testing.assert_allclose(student.encode_texts(TEXTS), clip.encode_texts(TEXTS), atol=1e-6)


def test_a_fingerprint_is_of_weights_and_preprocessing(tiny_clip_dir, tmp_path):
    first = build_teacher(str(tiny_clip_dir)).fingerprint
    DCLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    CLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    assert build_teacher(str(tmp_path)).fingerprint == first
    CLIPImageProcessorPil.from_pretrained(tiny_clip_dir, image_mean=[0.5] * 3).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    assert build_teacher(str(tmp_path)).fingerprint != first


def test_what_is_no_clip_is_refused(tmp_path):
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=8, **layers)).save_pretrained(tmp_path / "bert")
    with pytest.raises(TypeError, match="Expected a dual encoder such as CLIPModel .* at .*bert', got BertModel"):
        build_teacher(str(tmp_path / "bert"))


def test_a_siglip_teaches_with_its_text_padded_to_the_full_length(tmp_path):
    save_dual_encoder("siglip", tmp_path)
    teacher = build_teacher(str(tmp_path))
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path, backend="pil")
    tokens = processor.tokenizer(["a red dog"], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(input_ids=tokens).pooler_output)
    np.testing.assert_allclose(teacher.encode_texts(["a red dog"]), expected, atol=1e-6)


def test_a_teacher_that_reads_more_than_pixels_is_refused(tmp_path):
    save_dual_encoder("siglip2_naflex", tmp_path)
    with pytest.raises(ValueError, match="reads pixel_values alone, got .*spatial_shapes"):
        build_teacher(str(tmp_path))


class OpenClipModel(torch.nn.Module):
    """The part of an open_clip model that is used."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))
        self.words = torch.nn.Embedding(256, 6)

    def encode_image(self, pixel_values):
        return pixel_values.flatten(1)[:, :6] * self.logit_scale

    def encode_text(self, tokens):
        return self.words(tokens).sum(dim=1)


@pytest.fixture
def open_clip(monkeypatch):
    """A module of that name, with what it was asked for."""
    torch.manual_seed(0)
    module, model = ModuleType("open_clip"), OpenClipModel()
    module.asked = []

    def create(name, pretrained, precision):
        module.asked.append((name, pretrained, precision))
        return model, lambda image: torch.from_numpy(np.array(image)).float()[:4, :4]

    module.create_model_from_pretrained = create
    module.list_models = lambda: ["ViT-X", "ViT-X-plain"]
    module.list_pretrained_tags_by_model = lambda name: ["some_tag"]
    module.get_pretrained_cfg = lambda name, tag: {"quick_gelu": name == "ViT-X-plain"}
    module.get_model_config = lambda name: {}
    module.get_tokenizer = lambda name: (
        lambda texts, context_length=2: torch.tensor([[ord(text[:1] or "-"), ord(text[-1:] or "-")] for text in texts])
    )
    module.model = model
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


def test_an_open_clip_teacher_asks_for_name_and_weights_and_normalises(open_clip):
    teacher = build_teacher("open_clip:ViT-X:some-tag")
    assert isinstance(teacher, OpenClipTeacher) and open_clip.asked == [("ViT-X", "some-tag", "fp32")]
    assert teacher.name == "open_clip:ViT-X:some-tag" and (teacher.width, teacher.logit_scale) == (6, 4.0)
    pixels = teacher.preprocess(pictures(2))
    assert pixels.shape == (2, 4, 4, 3)
    for embeds in (teacher.encode_images(pixels), teacher.encode_texts(["ab", "c"])):
        assert embeds.shape == (2, 6)
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-6)
    with torch.no_grad():
        open_clip.model.words.weight[0, 0] += 1
    assert OpenClipTeacher("ViT-X:some-tag").fingerprint != teacher.fingerprint
    with pytest.raises(ValueError, match="Expected open_clip:ViT-X-plain-quickgelu:some-tag"):
        build_teacher("open_clip:ViT-X-plain:some-tag")


def test_open_clip_specs_that_miss_something_are_refused(monkeypatch):
    for spec in ("open_clip:ViT-X", "open_clip::tag", "open_clip:ViT-X:"):
        with pytest.raises(ValueError, match="Expected open_clip:NAME:PRETRAINED"):
            build_teacher(spec)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        build_teacher("open_clip:ViT-X:tag")


@pytest.fixture(scope="module")
def blip_dir(tiny_clip_dir, tmp_path_factory):
    """A random BLIP that captions pictures of 32 pixels with the letters of the small CLIP's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("blip"), CLIPTokenizer.from_pretrained(tiny_clip_dir)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    special = {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": tokenizer.eos_token_id}
    special |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = BlipConfig(
        text_config={**layers, **special, "vocab_size": len(tokenizer), "encoder_hidden_size": 16},
        vision_config={**layers, "image_size": 32, "patch_size": 16},
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # far from uniform, and every picture has its own caption
            parameter.mul_(10 if "crossattention" in name else 4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_captioner_writes_of_each_picture(blip_dir):
    images = pictures()
    one = TransformersCaptioner(str(blip_dir), max_new_tokens=6)
    captions = one(images)
    assert [len(row) for row in captions] == [1, 1, 1] and all(text.strip() for (text,) in captions)
    assert one(images) == captions and one(images[1:]) == captions[1:]
    several = TransformersCaptioner(str(blip_dir), captions=4, max_new_tokens=6, seed=1)
    before = torch.get_rng_state()
    drawn = several(images, lot=5)
    assert torch.equal(before, torch.get_rng_state())  # training beside it draws what it would have drawn
    assert several(images, lot=5) == drawn != several(images, lot=6)
    assert all(0 < len(row) == len(set(row)) <= 4 for row in drawn) and max(map(len, drawn)) > 1
    assert (
        len({one.fingerprint, several.fingerprint, TransformersCaptioner(str(blip_dir), captions=4).fingerprint}) == 3
    )


def test_a_captioner_drops_what_has_no_words(blip_dir, monkeypatch):
    captioner = TransformersCaptioner(str(blip_dir), captions=3)
    tokenizer = SimpleNamespace(batch_decode=lambda tokens, **_: [" ", "a dog", "a dog ", "", "", ""])
    monkeypatch.setattr(captioner, "tokenizer", tokenizer)
    assert captioner(pictures(2)) == [["a dog"], []]


def test_a_captioner_of_nothing_is_refused(blip_dir):
    with pytest.raises(ValueError, match="at least one caption"):
        TransformersCaptioner(str(blip_dir), captions=0)
