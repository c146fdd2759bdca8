"""An exported encoder gives the model's numbers at any batch size; what cannot be exported is named."""

import json

import numpy as np
import pytest
import torch
from naive_mambavision import TINY, NaiveMambaVision, random_checkpoint

from modeling_dclip.configuration_dclip import DCLIPVisionConfig
from modeling_dclip.configuration_dmclip import DMCLIPConfig, DMCLIPVisionConfig
from modeling_dclip.hub.convert import load_published
from modeling_dclip.hub.export import compare_onnx, export_onnx, load_image_encoder, main
from modeling_dclip.hub.mambavision import published_mambavision_keys, read_mambavision_config
from modeling_dclip.modeling_dclip import DCLIPModel, DCLIPVisionModel
from modeling_dclip.modeling_dmclip import DMCLIPModel, DMCLIPVisionModel

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is the extra [export]")
pytest.importorskip("onnxscript", reason="ONNX is the extra [export]")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny encoder in which every parameter matters."""
    folder = tmp_path_factory.mktemp("encoder")
    weights = random_checkpoint(TINY)
    (folder / "published.json").write_text(json.dumps(TINY))
    config, _ = read_mambavision_config(weights, "weights", folder / "published.json")
    model = DMCLIPVisionModel(config)
    load_published(model, weights, published_mambavision_keys, "weights", "MambaVision")
    model.save_pretrained(folder / "model")
    return folder / "model"


def test_an_exported_encoder_computes_the_same_at_any_batch_size(encoder_folder, tmp_path, capsys):
    main(["--model", str(encoder_folder), "--output", str(tmp_path / "encoder.onnx")])
    assert "ONNX Runtime's outputs are the model's" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    naive = NaiveMambaVision(random_checkpoint(TINY), TINY)
    for batch_size in (1, 2, 5):
        pixels = torch.randn(batch_size, 3, 64, 64)
        (found,) = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        expected = naive(pixels)[1].numpy()
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    other = load_image_encoder(encoder_folder)
    other.projection.bias.data[0] += 0.01
    with pytest.raises(ValueError, match="to 1e-04, got a difference of"):
        compare_onnx((tmp_path / "encoder.onnx").read_bytes(), other)


def test_another_size_gets_windows_that_divide_its_map(encoder_folder):
    encoder = load_image_encoder(encoder_folder, 96)
    assert encoder.config.image_size == 96 and encoder.config.batch_norm_folded
    assert all(96 // (16, 32)[stage] % window == 0 for stage, window in enumerate(encoder.config.window_sizes[2:]))


def test_the_configs_own_size_gets_windows_that_divide_its_map_only_when_asked_for(tmp_path):
    sizes = {"stem_dim": 4, "hidden_size": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
    DMCLIPVisionModel(DMCLIPVisionConfig(**sizes, image_size=256)).save_pretrained(tmp_path)
    assert load_image_encoder(tmp_path).config.window_sizes == (8, 8, 14, 7)
    assert load_image_encoder(tmp_path, 256).config.window_sizes == (8, 8, 16, 8)


def dual_dclip(tiny_clip_dir):
    return DCLIPModel.from_pretrained(tiny_clip_dir)


def dual_dmclip(_):
    vision = {"stem_dim": 4, "hidden_size": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "image_size": 64}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return DMCLIPModel(DMCLIPConfig(vision_config=vision, text_config=text, projection_dim=16))


@pytest.mark.parametrize("make_dual", [dual_dclip, dual_dmclip])
def test_the_image_encoder_is_loaded_out_of_a_dual_folder(make_dual, tiny_clip_dir, tmp_path):
    dual = make_dual(tiny_clip_dir).eval()
    dual.save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path)
    size = dual.config.vision_config.image_size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = dual.get_image_features(pixels).pooler_output.detach()
    assert (encoder(pixels).image_embeds.detach() - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not hasattr(encoder, "text_model")


def test_a_dual_folder_exports_by_the_command(tiny_clip_dir, tmp_path, capsys):
    dual_dclip(tiny_clip_dir).save_pretrained(tmp_path / "dual")
    main(["--model", str(tmp_path / "dual"), "--output", str(tmp_path / "dual.onnx")])
    assert "ONNX Runtime's outputs are the model's" in capsys.readouterr().out
    assert compare_onnx((tmp_path / "dual.onnx").read_bytes(), load_image_encoder(tmp_path / "dual")) <= 1e-5


def test_a_vit_student_exports_too(tmp_path):
    config = DCLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    DCLIPVisionModel(config).save_pretrained(tmp_path / "student")
    assert export_onnx(load_image_encoder(tmp_path / "student"), tmp_path / "student.onnx") <= 1e-5
    with pytest.raises(ValueError, match="image_size: expected 32"):
        load_image_encoder(tmp_path / "student", 64)


def test_what_is_no_image_encoder_is_named(tiny_clip_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(tiny_clip_dir), "--output", str(tmp_path / "clip.onnx")])
    assert "Expected an image encoder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Expected a .onnx file"):
        export_onnx(DMCLIPVisionModel(DMCLIPVisionConfig()), tmp_path / "encoder.pt")
