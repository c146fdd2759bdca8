"""Configs: presets, round trips, and what they refuse."""

import json
import logging
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from modeling_dclip import PRESETS, DCLIPConfig, DCLIPTeacherConfig, DCLIPVisionConfig


@pytest.mark.parametrize(
    "config",
    [
        DCLIPVisionConfig(position_embedding_type="rope", rotary_base=10),
        DCLIPConfig(
            freeze_text=False,
            projection_dim=64,
            vision_config={"patch_size": 16, "position_embedding_type": "rope", "rotary_base": 10},
        ),
        DCLIPTeacherConfig(cross_attention="regions", text_share=0, clip_config={"projection_dim": 64}),
    ],
    ids=lambda config: config.model_type,
)
def test_a_saved_config_is_read_back_equal_through_auto_config(config, tmp_path):
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert (
        again.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)} or again.to_dict() == config.to_dict()
    )


def test_a_config_with_clips_own_positions_is_saved_as_a_stock_clips_and_read_back_equal(tmp_path):
    config = DCLIPConfig(freeze_text=False, projection_dim=64, vision_config={"patch_size": 16})
    config.architectures = ["DCLIPModel"]
    config.save_pretrained(tmp_path)
    stock = AutoConfig.from_pretrained(tmp_path)
    assert type(stock) is CLIPConfig and type(stock.vision_config) is CLIPVisionConfig
    assert stock.architectures == ["CLIPModel"] and stock.vision_config.patch_size == 16
    assert not {"position_embedding_type", "rotary_base"} & set(stock.vision_config.to_dict())
    again = DCLIPConfig.from_pretrained(tmp_path)
    again.architectures = config.architectures
    assert again.to_dict() == config.to_dict()
    # As folders were saved that say of themselves that they are ours.
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert type(AutoConfig.from_pretrained(tmp_path)) is DCLIPConfig


def test_presets_name_the_openai_checkpoints():
    assert PRESETS["dclip-vitb16"] == "openai/clip-vit-base-patch16"
    assert set(PRESETS) == {"dclip-vitb32", "dclip-vitb16", "dclip-vitl14"}


def test_the_default_teacher_is_vit_b16():
    vision = DCLIPTeacherConfig().clip_config.vision_config
    assert (vision.patch_size, vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (16, 768, 12, 224)
    assert DCLIPTeacherConfig().projection_dim == 512


def test_both_towers_take_the_projection_width_of_the_whole():
    config = DCLIPConfig(projection_dim=64)
    assert config.vision_config.projection_dim == config.text_config.projection_dim == 64


def test_a_stock_clip_config_is_read_without_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    CLIPConfig(projection_dim=64, vision_config={"patch_size": 14}).save_pretrained(tmp_path)
    config = DCLIPConfig.from_pretrained(tmp_path)
    assert config.vision_config.patch_size == 14 and config.projection_dim == 64
    assert not caplog.records
    CLIPTextConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    DCLIPConfig.from_pretrained(tmp_path)
    assert "model of type `clip_text_model`" in caplog.text  # the check above would have seen one


def test_an_old_checkpoint_with_both_spellings_of_its_towers_is_read(tmp_path):
    old = {"model_type": "clip", "projection_dim": 768, "text_config_dict": {"hidden_size": 768}, "text_config": {}}
    old["vision_config_dict"] = {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = DCLIPConfig.from_pretrained(tmp_path)
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (768, 1024)
    assert config.vision_config.model_type == "dclip_vision"


def test_the_vision_config_reads_its_width_from_a_dual_checkpoint(tmp_path):
    CLIPConfig(projection_dim=64, vision_config={"hidden_size": 192}).save_pretrained(tmp_path)
    config = DCLIPVisionConfig.from_pretrained(tmp_path)
    assert (config.projection_dim, config.hidden_size) == (64, 192)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (DCLIPVisionConfig, {"position_embedding_type": "sinusoid"}, "position_embedding_type.*'sinusoid'"),
        (DCLIPVisionConfig, {"position_embedding_type": "rope", "hidden_size": 12, "num_attention_heads": 2}, "got 6"),
        (DCLIPTeacherConfig, {"cross_attention": "both"}, "cross_attention.*'both'"),
        (DCLIPTeacherConfig, {"aggregation": "max"}, "aggregation.*'max'"),
        (DCLIPTeacherConfig, {"attention_temperature": 0}, "attention_temperature.*got 0"),
        (DCLIPTeacherConfig, {"text_share": 1.5}, "text_share: expected a number from 0 to 1, got 1.5"),
        (DCLIPTeacherConfig, {"num_clusters": 0}, "num_clusters.*got 0"),
        (DCLIPTeacherConfig, {"num_attention_heads": 7}, "divisor of the embedding width 512, got 7"),
        (DCLIPTeacherConfig, {"region_weighting": "yes"}, "region_weighting"),
        (DCLIPTeacherConfig, {"num_region_layers": 100000}, "num_region_layers.*from 1 to 100, got 100000"),
        (DCLIPTeacherConfig, {"loss_temperature": math.nan}, "loss_temperature.*got nan"),
        (DCLIPVisionConfig, {"num_hidden_layers": 10**6}, "dclip_vision.num_hidden_layers.*from 1 to 1000"),
        (DCLIPVisionConfig, {"num_hidden_layers": -1}, "dclip_vision.num_hidden_layers.*got -1"),
        (DCLIPVisionConfig, {"num_attention_heads": 0}, "dclip_vision.num_attention_heads.*got 0"),
        (DCLIPConfig, {"logit_scale_init_value": math.inf}, "dclip.logit_scale_init_value.*got inf"),
    ],
)
def test_a_bad_field_is_refused_with_its_name_and_value(config_class, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        config_class(**fields)


@pytest.mark.parametrize("tower", ["vision_config", "text_config"])
@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 0), ("hidden_size", -3), ("vocab_size", 10**9)])
def test_a_tower_out_of_this_world_is_refused_before_it_is_built(tower, field, value):
    with pytest.raises(
        (ValueError, StrictDataclassError), match=rf"{field}: expected a number from 1 .*, got {value}"
    ):
        DCLIPConfig(**{tower: {field: value}})
