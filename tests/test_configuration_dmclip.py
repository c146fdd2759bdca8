"""Configs of DM-CLIP: presets, windows for a resolution, round trips, and what they refuse."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_dclip import DMCLIP_PRESETS, DMCLIPConfig, DMCLIPTextConfig, DMCLIPVisionConfig
from modeling_dclip.configuration_dmclip import SCAN_BACKENDS
from modeling_dclip.selective_scan import BACKENDS


@pytest.mark.parametrize(
    "config",
    [
        DMCLIPVisionConfig(**DMCLIP_PRESETS["L"], dt_init="mamba", scan_backend="reference", projection_dim=64),
        DMCLIPTextConfig(mask_padding=True, num_hidden_layers=3),
        DMCLIPConfig(freeze_text=True, projection_dim=64, vision_config=DMCLIP_PRESETS["B"]),
    ],
    ids=lambda config: config.model_type,
)
def test_a_saved_config_is_read_back_equal_through_auto_config(config, tmp_path):
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_a_config_may_ask_for_every_backend_of_the_scan_and_no_other():
    assert SCAN_BACKENDS == BACKENDS
    for name in BACKENDS:
        assert DMCLIPVisionConfig(scan_backend=name).scan_backend == name


def test_what_json_makes_a_list_is_a_tuple_again():
    fields = json.loads(json.dumps(DMCLIP_PRESETS["B"]))
    assert DMCLIPVisionConfig(**fields).depths == DMCLIP_PRESETS["B"]["depths"] == (3, 3, 10, 5)


def test_the_defaults_are_preset_t_and_the_text_tower_of_mobileclip_s1():
    assert DMCLIPVisionConfig().to_dict() == DMCLIPVisionConfig(**DMCLIP_PRESETS["T"]).to_dict()
    assert DMCLIPVisionConfig().stage_sizes == (80, 160, 320, 640)
    text = DMCLIPConfig().text_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (12, 512, 8)
    assert (text.max_position_embeddings, text.vocab_size, text.projection_dim) == (77, 49408, 512)
    assert text.hidden_act == "gelu" and not text.mask_padding and not DMCLIPConfig().freeze_text


def test_both_towers_take_the_projection_width_of_the_whole_and_can_be_read_alone(tmp_path):
    config = DMCLIPConfig(projection_dim=64, vision_config=DMCLIP_PRESETS["S"], text_config={"num_hidden_layers": 2})
    assert config.vision_config.projection_dim == config.text_config.projection_dim == 64
    config.save_pretrained(tmp_path)
    assert DMCLIPVisionConfig.from_pretrained(tmp_path).to_dict() == config.vision_config.to_dict()
    assert DMCLIPTextConfig.from_pretrained(tmp_path).to_dict() == config.text_config.to_dict()


@pytest.mark.parametrize(
    ("image_size", "windows"),
    [(224, (14, 7)), (256, (16, 8)), (384, (12, 6)), (448, (14, 7)), (512, (16, 8)), (240, (15, 8)), (1024, (16, 8))],
)
def test_windows_for_a_resolution_divide_its_maps(image_size, windows):
    config = DMCLIPVisionConfig()
    other = config.for_image_size(image_size)
    assert other.window_sizes == (8, 8, *windows) and other.image_size == image_size
    for stage in (2, 3):
        assert -(-image_size // 2 ** (stage + 2)) % other.window_sizes[stage] == 0
    assert config.image_size == 224 and config.window_sizes == (8, 8, 14, 7)  # the original is left alone


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (DMCLIPVisionConfig, {"depths": (1, 3, 8)}, r"depths: expected 4 positive entries.*\(1, 3, 8\)"),
        (DMCLIPVisionConfig, {"window_sizes": (8, 8, 14, 0)}, "window_sizes: expected 4 positive entries"),
        (
            DMCLIPVisionConfig,
            {"num_heads": (1, 1, 3, 4)},
            "num_heads: expected a divisor of stage 2's width 320, got 3",
        ),
        (DMCLIPVisionConfig, {"conv_kernel": 4}, "conv_kernel: expected an odd number, got 4"),
        (DMCLIPVisionConfig, {"drop_path_rate": 1.0}, r"drop_path_rate.*\[0, 1\), got 1.0"),
        (DMCLIPVisionConfig, {"state_size": 0}, "state_size: expected a number from 1 to 4096, got 0"),
        (DMCLIPVisionConfig, {"dt_init": "zeros"}, "dt_init.*'zeros'"),
        (DMCLIPVisionConfig, {"scan_backend": "cuda"}, "scan_backend: expected one of .*'triton'.*, got 'cuda'"),
        (DMCLIPVisionConfig, {"batch_norm_folded": True, "layer_scale_init_value": 1e-5}, "batch_norm_folded.*fuse"),
        (DMCLIPVisionConfig, {"depths": "1384"}, "depths"),
        (DMCLIPTextConfig, {"eos_token_id": [1, 2]}, r"eos_token_id: expected one token id, got \[1, 2\]"),
        (DMCLIPTextConfig, {"pad_token_id": None}, "pad_token_id: expected one token id, got None"),
        (DMCLIPConfig, {"freeze_text": "no"}, "freeze_text"),
    ],
)
def test_a_bad_field_is_refused_with_its_name_and_value(config_class, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        config_class(**fields)
