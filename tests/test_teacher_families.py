"""A teacher around a dual encoder of any family: its texts, tokens and crops are the family's own."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.tiny_dual_encoders import FAMILIES, LAYERS, TEXT, VISION, make_word_tokenizer, save_dual_encoder
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import (
    CLIPTextConfig,
    GPT2Config,
    SiglipImageProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from modeling_dclip import DCLIPTeacher, DCLIPTeacherConfig, DCLIPTeacherProcessor, DMCLIPConfig, DMCLIPModel
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.families import shared_width
from modeling_dclip.encoders.loading import load_dual_encoder, load_processor
from modeling_dclip.evaluation.embedding import embed_texts
from modeling_dclip.modeling_dclip_teacher import project_tokens, require_known_pooling

NATIVE = ["siglip", "altclip", "chinese_clip", "metaclip_2", "vision_text"]
TEXTS = ["a red dog", "a photo of the small blue circle and the large square dog", ""]
STAGES = {"hidden_size": 8, "stem_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2)}


def save_dmclip(folder):
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 16}
    model = DMCLIPModel(DMCLIPConfig(text_config=text, vision_config=STAGES, projection_dim=12))
    model.save_pretrained(folder)
    FAMILIES["clip"]()[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """`teachers(family)`: folder of the dual encoder, teacher and processor, made once."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            save_dmclip(folder) if family == "dmclip" else save_dual_encoder(family, folder)
            torch.manual_seed(0)
            teacher = DCLIPTeacher.from_clip(str(folder), num_attention_heads=4)
            processor = DCLIPTeacherProcessor.from_dual_encoder(load_processor(folder), teacher.config.clip_config)
            made[family] = folder, teacher, processor
        return made[family]

    return make


def noise(width=50, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def read(processor, texts=TEXTS):
    features = processor(text=texts)
    return features["input_ids"], features["attention_mask"]


@pytest.mark.parametrize("family", [*NATIVE, "clip", "dmclip"])
def test_a_teacher_reads_texts_as_an_evaluation_of_its_dual_encoder_does(family, teachers):
    folder, teacher, processor = teachers(family)
    ours, tokens, mask = teacher.encode_text(*read(processor))
    model, own, _ = load_dual_encoder(folder)
    theirs = embed_texts(Encoder(model, own), TEXTS[:2])
    torch.testing.assert_close(ours[:2], F.normalize(theirs, dim=-1), rtol=0, atol=1e-6)
    assert tokens.shape[-1] == teacher.config.projection_dim == shared_width(model.config)
    words = [len(text.split()) for text in TEXTS]
    assert mask.sum(dim=1).tolist() == [words[0], words[1], 1]  # without a word, the end token


@torch.no_grad()
@pytest.mark.parametrize("family", NATIVE)
def test_a_sentence_is_the_familys_own_bit_for_bit(family, teachers):
    _, teacher, processor = teachers(family)
    ids, mask = read(processor)
    seen = {} if family == "siglip" else {"attention_mask": mask}
    own = teacher.clip.get_text_features(input_ids=ids, **seen).pooler_output
    assert torch.equal(teacher.encode_text(ids, mask)[0], F.normalize(own, dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("family", [*NATIVE, "clip", "dmclip"])
def test_the_token_at_the_pooled_place_is_the_sentence(family, teachers):
    _, teacher, processor = teachers(family)
    ids, mask = read(processor)
    seen = {} if family == "siglip" else {"attention_mask": mask}
    outputs = teacher.clip.get_text_features(input_ids=ids, **seen)
    tokens = project_tokens(teacher.clip, outputs.last_hidden_state)
    if family == "siglip":
        pooled = tokens[:, -1]
    elif family in ("clip", "metaclip_2", "dmclip"):
        pooled = tokens[torch.arange(len(ids)), mask.sum(dim=1) - 1]  # the end token
    else:
        pooled = tokens[:, 0]
    torch.testing.assert_close(pooled, outputs.pooler_output, rtol=0, atol=1e-6)
    kept = teacher.encode_text(ids, mask)[1]
    start = 0 if family == "siglip" else 1
    torch.testing.assert_close(kept, tokens[:, start : ids.shape[1]], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", [*NATIVE, "dmclip"])
def test_other_texts_of_a_batch_change_no_embedding_and_no_token(family, teachers):
    _, teacher, processor = teachers(family)
    together = teacher.encode_text(*read(processor))
    embeds, tokens, mask = teacher.encode_text(*read(processor, TEXTS[:1]))
    torch.testing.assert_close(embeds[0], together[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens[0][mask[0]], together[1][0][together[2][0]], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_text_that_is_too_long_keeps_its_end_token(teachers):
    _, teacher, processor = teachers("chinese_clip")
    ids = torch.tensor([[0, *[4] * 60, 3], [0, 5, 3, *[1] * 59]])
    mask = (ids != 1).long()
    cut = torch.cat([ids[:, :31], torch.tensor([[3], [1]])], dim=1)
    assert torch.equal(teacher.encode_text(ids, mask)[0], teacher.encode_text(cut, mask[:, :32])[0])


@pytest.mark.parametrize("shape, masked", [((1, 8), True), ((1, 16), False)])
def test_a_siglip_is_not_given_texts_that_it_was_not_trained_with(shape, masked, teachers):
    _, teacher, _ = teachers("siglip")
    ids = torch.full(shape, 4)
    with pytest.raises(ValueError, match=r"expected texts padded to the 16 tokens .* attention_mask, got (8|16) with"):
        teacher.encode_text(ids, torch.ones_like(ids) if masked else None)


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["siglip", "vision_text", "chinese_clip"])
def test_a_crop_is_read_as_a_whole_image_of_the_family_is(family, teachers):
    _, _, processor = teachers(family)
    image, boxes = noise(), [[2, 3, 40, 30], [10, 0, 20, 39]]
    features = processor(image, boxes=[boxes])
    own = processor.image_processor
    for region, box in zip(features["region_pixel_values"][0], boxes, strict=True):
        assert torch.equal(region, own(images=[image.crop(box)], return_tensors="pt")["pixel_values"][0])
    whole = processor(image)
    assert torch.equal(whole["region_pixel_values"][0], whole["pixel_values"])
    assert processor.region_size == (32, 32)


def test_the_image_processor_of_a_family_gets_the_pil_backend_and_stays_of_its_kind(teachers):
    _, teacher, processor = teachers("siglip")
    other = SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    made = DCLIPTeacherProcessor(other, processor.tokenizer, model_type="siglip").image_processor
    assert type(made).__name__ == "SiglipImageProcessorPil" and list(made.image_mean) == [0.1, 0.2, 0.3]


# -- the block, saving, loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [512, 768])
def test_the_block_trains_as_many_parameters_around_a_siglip(width):
    towers = {"text_config": {**LAYERS, "vocab_size": 20, "projection_size": width}, "vision_config": {**VISION}}
    towers["vision_config"]["hidden_size"] = width
    with torch.device("meta"):
        teacher = DCLIPTeacher(DCLIPTeacherConfig(clip_config={"model_type": "siglip", **towers}))
    trained = sum(weight.numel() for weight in teacher.parameters() if weight.requires_grad)
    assert trained == {512: 2_103_296, 768: 4_727_808}[width]


@torch.no_grad()
@pytest.mark.parametrize("family", [*NATIVE, "dmclip", "timm"])
def test_a_saved_teacher_and_its_processor_come_back_as_they_were(family, teachers, tmp_path):
    if family == "timm":
        pytest.importorskip("timm", reason="needs timm")
    _, teacher, processor = teachers(family)
    teacher.train()
    assert not any(module.training for module in teacher.clip.modules())
    assert not any(weight.requires_grad for weight in teacher.clip.parameters())
    teacher.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, report = DCLIPTeacher.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(again.clip) is type(teacher.clip) and again.config.projection_dim == teacher.config.projection_dim
    processor_again = load_processor(tmp_path, DCLIPTeacherProcessor)
    assert type(processor_again.image_processor) is type(processor.image_processor)
    batch = (noise(), "a red dog"), {"boxes": [[[1, 2, 30, 20]]]}
    first, second = (one(*batch[0], **batch[1]) for one in (processor, processor_again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(again(**second).teacher_embeds, teacher(**first).teacher_embeds, rtol=0, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, message",
    [
        ("siglip2_naflex", "expected a dual encoder that takes square images, got SigLIP 2 in its NaFlex form"),
        ("align", "expected a dual encoder of type clip, .* or vision-text-dual-encoder, got 'align'"),
    ],
)
def test_a_teacher_is_not_built_around_an_unknown_family(family, message, tmp_path):
    save_dual_encoder(family, tmp_path)
    with pytest.raises(ValueError, match=f"'{re.escape(str(tmp_path))}': {message}"):
        DCLIPTeacher.from_clip(str(tmp_path))


def test_towers_of_two_widths_share_no_space():
    towers = {"text_config": {**LAYERS, "projection_size": 24}, "vision_config": VISION}
    with pytest.raises(StrictDataclassError, match="image encoder of the text encoder's width 24, got 16"):
        DCLIPTeacherConfig(clip_config={"model_type": "siglip", **towers})


def test_a_processor_without_a_tokenizer_is_no_teachers(teachers):
    _, teacher, processor = teachers("siglip")
    with pytest.raises(ValueError, match="image_processor and tokenizer, got SiglipImageProcessorPil without"):
        DCLIPTeacherProcessor.from_dual_encoder(processor.image_processor, teacher.config.clip_config)


@torch.no_grad()
def test_of_two_towers_the_text_encoder_pools_as_bert_or_as_clip_does(tmp_path):
    text = CLIPTextConfig(**{**TEXT, "max_position_embeddings": 16})
    config = VisionTextDualEncoderConfig.from_vision_text_configs(ViTConfig(**VISION), text, projection_dim=12)
    torch.manual_seed(0)
    VisionTextDualEncoderModel(config).save_pretrained(tmp_path)
    teacher = DCLIPTeacher.from_clip(str(tmp_path), num_attention_heads=4)
    tokens = make_word_tokenizer(16)(["a red dog", "a dog"], padding=True, return_tensors="pt")
    _, embeds, mask = teacher.encode_text(tokens["input_ids"], tokens["attention_mask"])
    assert mask.sum(dim=1).tolist() == [3, 2] and embeds.shape == (2, 4, 12)
    other = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=3)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(ViTConfig(**VISION), other, projection_dim=12)
    with pytest.raises(ValueError, match="embeds a text by a pooler at its first token, .*, got GPT2Model"):
        require_known_pooling(VisionTextDualEncoderModel(config).eval(), "here")
