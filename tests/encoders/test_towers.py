"""Two pretrained towers joined: the dual encoder's own numbers, frozen towers that stay, wrong towers refused."""

import pytest
import torch
from fixtures.tiny_towers import make_text_tower, make_vision_tower
from transformers import AutoModel, ResNetConfig, ResNetModel, VisionTextDualEncoderModel, ViTImageProcessorPil

from modeling_dclip.encoders.families import WrongModelError
from modeling_dclip.encoders.towers import JoinedTowers, load_towers


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return make_vision_tower(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text_tower(tmp_path_factory.mktemp("text"))


@pytest.fixture
def joined(vision, text):
    torch.manual_seed(0)
    dual, processor = load_towers(vision, text, 16)
    inputs = processor.tokenizer(["a red circle", "two dogs"], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return JoinedTowers(dual, freeze_vision=True, freeze_text=True), inputs | {
        "pixel_values": torch.randn(2, 3, 32, 32)
    }


def test_the_towers_keep_their_weights_and_the_projections_fit_them(vision, text):
    dual, processor = load_towers(vision, text, 16)
    assert type(dual) is VisionTextDualEncoderModel and not dual.training
    assert dual.visual_projection.weight.shape == (16, 32) and dual.text_projection.weight.shape == (16, 24)
    for tower, folder in ((dual.vision_model, vision), (dual.text_model, text)):
        stored = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(weight, stored[name]) for name, weight in tower.state_dict().items())
    assert processor.image_processor.size["height"] == 32 and processor.tokenizer.model_max_length == 64


def test_embeddings_are_the_dual_encoders_own(joined):
    towers, inputs = joined
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, found = towers.dual(**inputs), towers(**inputs)
        image_features = towers.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        stored = towers(image_features=image_features, text_features=towers.text_model(**texts).pooler_output)
    for name in ("image_embeds", "text_embeds"):
        assert torch.allclose(found[name], expected[name], atol=1e-6)
        assert torch.equal(found[name], stored[name])


def test_frozen_towers_get_no_gradient_and_stay_in_eval_mode(joined, vision, text):
    towers, inputs = joined
    towers.train()
    assert not towers.vision_model.training and not towers.text_model.training and towers.visual_projection.training
    assert torch.equal(towers(**inputs).text_embeds, towers(**inputs).text_embeds)  # no dropout
    assert {name for name, parameter in towers.named_parameters() if parameter.requires_grad} == {
        "logit_scale",
        "text_projection.weight",
        "visual_projection.weight",
    }
    assert {name for name, _ in towers.named_parameters()} == {name for name, _ in towers.dual.named_parameters()}
    other = JoinedTowers(load_towers(vision, text, 16)[0], freeze_vision=True, freeze_text=False).train()
    assert other.text_model.training and not other.vision_model.training
    assert all(parameter.requires_grad for parameter in other.text_model.parameters())


def test_a_model_of_timm_that_names_its_width_otherwise_is_joined(text, tmp_path):
    pytest.importorskip("timm", reason="the model is timm's")
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(architecture="test_resnet", num_classes=0, num_features=96)
    assert not hasattr(config, "hidden_size")
    TimmWrapperModel(config).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    dual, processor = load_towers(tmp_path / "vision", text, 16)
    assert dual.visual_projection.weight.shape == (16, 96)
    dual.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    again, pixels = AutoModel.from_pretrained(tmp_path / "joined"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = [model.get_image_features(pixel_values=pixels).pooler_output for model in (dual, again)]
    assert torch.allclose(*found, rtol=1e-4, atol=1e-9) and found[0].any()


def test_towers_that_cannot_be_joined_are_refused_in_one_line(vision, text, tmp_path):
    with pytest.raises(ValueError, match="^Expected an image processor at .*preprocessor_config.json"):
        load_towers(text, text, 16)
    with pytest.raises(ValueError, match="^Expected the files of a tokenizer at"):
        load_towers(vision, vision, 16)
    make_vision_tower(tmp_path / "pooled", pooler_output_size=20)
    with pytest.raises(WrongModelError, match="vectors of its hidden_size 32, got 20 from ViTModel"):
        load_towers(tmp_path / "pooled", text, 16)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    with pytest.raises(WrongModelError, match=r"one vector an input, .* got one of shape \(1, 8, 1, 1\) from ResNet"):
        load_towers(tmp_path / "resnet", text, 16)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "text")
    make_text_tower(tmp_path / "text")
    with pytest.raises(WrongModelError, match="an image encoder at .*, which reads pixel_values, got BertModel"):
        load_towers(tmp_path / "text", text, 16)
