"""What is exported gives the model's numbers, in the layout its readers expect; what cannot be exported is named."""

import copy
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from fixtures.tiny_dual_encoders import save_dual_encoder, save_fixed_siglip2
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from modeling_dclip.configuration_dclip import DCLIPVisionConfig
from modeling_dclip.configuration_dmclip import DMCLIPConfig, DMCLIPVisionConfig
from modeling_dclip.encoders.loading import load_processor
from modeling_dclip.hub.export import write_export
from modeling_dclip.hub.export.__main__ import main
from modeling_dclip.hub.export.onnx import ImageTower, TextTower, check_outputs, compare_onnx, make_onnx
from modeling_dclip.hub.export.towers import load_model, write_settings
from modeling_dclip.modeling_dclip import DCLIPModel, DCLIPVisionModel
from modeling_dclip.modeling_dmclip import DMCLIPModel, DMCLIPVisionModel
from modeling_dclip.processing_dclip import DCLIPProcessor

TINY_VISION = {"stem_dim": 4, "hidden_size": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "image_size": 64}
TINY_VISION |= {"window_sizes": (8, 8, 4, 2)}


def save_with_processor(model, clip_dir, folder, size):
    processor = DCLIPProcessor.from_pretrained(clip_dir)
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dclip_folder(tiny_clip_dir, tmp_path_factory):
    """A tiny ViT student with CLIP's own positions."""
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    return save_with_processor(model, tiny_clip_dir, tmp_path_factory.mktemp("dclip"), 32)


@pytest.fixture(scope="module")
def dmclip_folder(tiny_clip_dir, tmp_path_factory):
    """A tiny DM-CLIP whose norms' statistics are not 0 and 1."""
    torch.manual_seed(0)
    ids = CLIPModel.from_pretrained(tiny_clip_dir).config.text_config
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": ids.vocab_size, "eos_token_id": ids.eos_token_id, "bos_token_id": ids.bos_token_id}
    model = DMCLIPModel(DMCLIPConfig(vision_config=TINY_VISION, text_config=text, projection_dim=16))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.7, 1.4)
    return save_with_processor(model, tiny_clip_dir, tmp_path_factory.mktemp("dmclip"), 64)


@pytest.fixture(scope="module")
def onnx_folder(dclip_folder, tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="ONNX is the extra [export]")
    pytest.importorskip("onnxscript", reason="ONNX is the extra [export]")
    output = tmp_path_factory.mktemp("onnx") / "exported"
    main(["onnx", "--model", str(dclip_folder), "--output", str(output)])
    return output


def run_onnx(path, inputs):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is the extra [export]")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (place.name for place in session.get_inputs())
    return session.run(None, {name: inputs.numpy()})[0]


def test_the_folder_is_laid_out_as_transformers_js_and_optimum_read_it(onnx_folder, dclip_folder):
    files = {str(path.relative_to(onnx_folder)) for path in onnx_folder.rglob("*") if path.is_file()}
    graphs = {
        f"onnx/{tower}_model{dtype}.onnx" for tower in ("vision", "text") for dtype in ("", "_fp16", "_quantized")
    }
    assert files >= {*graphs, "config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not [name for name in files if name.endswith((".py", ".safetensors"))]
    config = json.loads((onnx_folder / "config.json").read_text())
    assert config["model_type"] == "clip" and "auto_map" not in config
    assert (
        json.loads((onnx_folder / "preprocessor_config.json").read_text())["image_processor_type"]
        == "CLIPImageProcessor"
    )
    text = "a photo of the red circle"
    ours = DCLIPProcessor.from_pretrained(dclip_folder)(text=text)["input_ids"]
    assert AutoTokenizer.from_pretrained(onnx_folder)(text)["input_ids"] == list(np.ravel(ours))


@torch.no_grad()
def test_every_precision_is_as_near_as_its_gate_says(onnx_folder, dclip_folder):
    model = DCLIPModel.from_pretrained(dclip_folder).eval()
    pixels, ids = torch.randn(5, 3, 32, 32), torch.tensor([[76, 3, 9, 4, 77], [76, 5, 77, 77, 77]])
    cases = {
        "vision_model": (pixels, model.get_image_features(pixels).pooler_output),
        "text_model": (ids, model.get_text_features(ids).pooler_output),
    }
    for name, (inputs, expected) in cases.items():
        found = torch.from_numpy(run_onnx(onnx_folder / "onnx" / f"{name}.onnx", inputs))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        for suffix, least in (("_fp16", 0.9999), ("_quantized", 0.99)):
            found = torch.from_numpy(run_onnx(onnx_folder / "onnx" / f"{name}{suffix}.onnx", inputs))
            assert torch.cosine_similarity(found, expected).min() >= least
            assert not torch.allclose(found, expected, atol=1e-6), suffix  # it is another precision
    sizes = {path.name: path.stat().st_size for path in (onnx_folder / "onnx").iterdir()}
    assert sizes["vision_model_quantized.onnx"] < sizes["vision_model_fp16.onnx"] < sizes["vision_model.onnx"]


@pytest.mark.parametrize("dtype, suffix", [("fp32", ""), ("fp16", "_fp16"), ("int8", "_quantized")])
def test_a_graph_of_other_weights_fails_the_gate_of_its_precision(dtype, suffix, onnx_folder, dclip_folder):
    tower = ImageTower(load_model(dclip_folder))
    content = (onnx_folder / "onnx" / f"vision_model{suffix}.onnx").read_bytes()
    compare_onnx(content, tower, dtype)
    other = copy.deepcopy(tower)
    weight = other.model.visual_projection.weight.data
    weight.mul_(1.001) if dtype == "fp32" else weight[:4].neg_()
    with pytest.raises(ValueError, match="Expected ONNX Runtime"):
        compare_onnx(content, other, dtype)


def test_a_not_a_number_fails_every_gate():
    for dtype in ("fp32", "fp16", "int8"):
        with pytest.raises(ValueError, match="got a"):
            check_outputs([(torch.full((2, 4), torch.nan), torch.ones(2, 4))], dtype, "it, got a")


@torch.no_grad()
def test_dmclip_exports_with_windows_that_fit_and_convolutions_in_fewer_products(dmclip_folder, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="ONNX is the extra [export]")
    command = ["onnx", "--model", str(dmclip_folder), "--dtypes", "fp32", "--image_size", "96", "--winograd"]
    main([*command, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert re.search(r"onnx/vision_model.onnx +[\d.]+ MiB  largest difference \d.\de-\d\d of the largest value", said)
    model = load_model(dmclip_folder, 96)
    assert model.config.vision_config.window_sizes[2:] == (3, 3) or model.config.vision_config.window_sizes[2:] == (
        6,
        3,
    )
    pixels, ids = torch.randn(3, 3, 96, 96), torch.tensor([[76, 3, 9, 4, 77], [76, 5, 77, 77, 77]])
    found = run_onnx(tmp_path / "out" / "onnx" / "vision_model.onnx", pixels)
    expected = model.get_image_features(pixels).pooler_output.numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    found = run_onnx(tmp_path / "out" / "onnx" / "text_model.onnx", ids)
    expected = model.get_text_features(ids).pooler_output.numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == {"height": 96, "width": 96} and settings["size"] == {"shortest_edge": 96}


@torch.no_grad()
def test_torch_export_programs_run_at_any_batch_size(dmclip_folder, tmp_path):
    main(["torch_export", "--model", str(dmclip_folder), "--output", str(tmp_path / "out")])
    model = load_model(dmclip_folder)
    pixels = torch.randn(5, 3, 64, 64)
    found = torch.export.load(tmp_path / "out" / "vision_model.pt2").module()(pixels)
    assert torch.allclose(found, model.get_image_features(pixels).pooler_output, atol=1e-6)
    ids = torch.tensor([[76, 3, 9, 77]])
    found = torch.export.load(tmp_path / "out" / "text_model.pt2").module()(ids)
    assert torch.allclose(found, model.get_text_features(ids).pooler_output, atol=1e-6)


def test_an_image_encoder_alone_exports_its_one_tower(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DCLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16)
    DCLIPVisionModel(config).save_pretrained(tmp_path / "student")
    command = ["torch_export", "--model", str(tmp_path / "student"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="Give `--towers image`"):
        main(command)
    assert not (tmp_path / "out").exists()
    main([*command, "--towers", "image"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "vision_model.pt2"}


def test_the_configs_own_size_gets_windows_that_divide_its_map_only_when_asked_for(tmp_path):
    sizes = {"stem_dim": 4, "hidden_size": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
    DMCLIPVisionModel(DMCLIPVisionConfig(**sizes, image_size=256)).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.window_sizes == (8, 8, 14, 7)
    assert load_model(tmp_path, 256).config.window_sizes == (8, 8, 16, 8)


@torch.no_grad()
def test_open_clip_loads_the_folder_and_gives_the_same(dclip_folder, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
    main(["open_clip", "--model", str(dclip_folder), "--output", str(tmp_path / "out")])
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a photo of the red circle", "a dog"])
    model, processor = load_model(dclip_folder), DCLIPProcessor.from_pretrained(dclip_folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    batch = processor(images=[image], text=["a photo of the red circle", "a dog"], return_tensors="pt")
    pixels = transform(image)[None]
    assert (pixels - batch["pixel_values"]).abs().max() <= 0.05  # a grey level
    expected = model.get_image_features(pixels).pooler_output
    assert (theirs.eval().encode_image(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()
    expected = model.get_text_features(batch["input_ids"]).pooler_output
    assert (theirs.encode_text(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True


@torch.no_grad()
def test_sentence_transformers_encodes_pictures_and_texts_alike(dclip_folder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    main(["sentence_transformers", "--model", str(dclip_folder), "--output", str(tmp_path / "out")])
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    model, processor = load_model(dclip_folder), DCLIPProcessor.from_pretrained(dclip_folder)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    batch = processor(images=[image], text=["a dog and a circle", "a dog"], return_tensors="pt")
    expected = model.get_image_features(batch["pixel_values"]).pooler_output.numpy()
    assert np.allclose(encoder.encode([image]), expected, atol=1e-5)
    expected = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output.numpy()
    assert np.allclose(encoder.encode(["a dog and a circle", "a dog"]), expected, atol=1e-5)
    assert not list((tmp_path / "out").rglob("*.py"))


@pytest.mark.parametrize(
    "form, message",
    [
        ("open_clip", "which open_clip has, got 'dmclip'"),
        ("sentence_transformers", "The formats onnx and torch_export take this model"),
    ],
)
def test_a_dmclip_has_no_form_of_clips_readers(form, message, dmclip_folder, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([form, "--model", str(dmclip_folder), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_named(tiny_clip_dir, dclip_folder, tmp_path):
    def error_of(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return ended.value.code

    output = ("--output", tmp_path / "out")
    assert "got nothing there" in error_of("onnx", "--model", tmp_path / "none", *output)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({"model_type": "dclip_teacher"}))
    assert "got 'dclip_teacher'" in error_of("onnx", "--model", tmp_path / "teacher", *output)
    assert "image_size: expected 32" in error_of("onnx", "--model", dclip_folder, "--image_size", 64, *output)
    assert "winograd: expected DM-CLIP" in error_of("onnx", "--model", dclip_folder, "--winograd", *output)
    assert "Expected a new or an empty folder" in error_of("onnx", "--model", dclip_folder, "--output", dclip_folder)
    assert not (tmp_path / "out").exists()
    other = save_with_processor(DCLIPModel.from_pretrained(tiny_clip_dir), tiny_clip_dir, tmp_path / "other", 40)
    assert "got 40" in error_of("torch_export", "--model", other, *output)
    with pytest.raises(ValueError, match="Expected a dtype of"):
        make_onnx(TextTower(load_model(dclip_folder)), "bf16")


def test_a_failed_export_leaves_nothing(tmp_path):
    def write(folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_export(tmp_path / "out", write)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_message_says_what_to_install(dclip_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnx onnxruntime onnxscript"):
        make_onnx(ImageTower(load_model(dclip_folder)), "fp32")


def test_weights_or_a_tokenizer_that_are_not_there_are_never_made_up(dclip_folder, tmp_path):
    shutil.copytree(dclip_folder, tmp_path / "student")
    command = ["sentence_transformers", "--model", str(tmp_path / "student"), "--output", str(tmp_path / "out")]
    (tmp_path / "student" / "tokenizer.json").unlink()
    with pytest.raises(SystemExit, match="a tokenizer that tells letters apart"):
        main(command)
    encoder = DCLIPVisionModel.from_pretrained(dclip_folder)
    encoder.save_pretrained(tmp_path / "vision")
    weights = load_file(tmp_path / "vision" / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "vision" / "model.safetensors", metadata={"format": "pt"})
    command = [
        "torch_export",
        "--towers",
        "image",
        "--model",
        str(tmp_path / "vision"),
        "--output",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit, match=r"all weights .* at '.*vision', got 1 missing \(visual_projection.weight\)"):
        main(command)
    (tmp_path / "vision" / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(SystemExit, match="Expected whole weights in .*vision/model.safetensors', got a damaged file"):
        main(command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["siglip", "vision_text"])  # reads its padding; knows its padding by the id
def test_students_of_other_families_are_exported_in_their_own_format(family, tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX is the extra [export]")
    source, output = save_dual_encoder(family, tmp_path / "student"), tmp_path / "exported"
    main(["onnx", "--model", str(source), "--output", str(output), "--dtypes", "fp32", "--towers", "text"])
    model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == model.config.model_type and "auto_map" not in config
    texts = ["a red dog", "the small blue circle and a large square"]
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    full = {"siglip": {"padding": "max_length", "max_length": 16}}.get(family, {"padding": True})
    inputs = AutoProcessor.from_pretrained(source)(text=texts, return_tensors="pt", **full)
    with torch.no_grad():
        expected = model.get_text_features(**inputs).pooler_output
    found = torch.from_numpy(run_onnx(output / "onnx" / "text_model.onnx", ids))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="a plain ViT, which open_clip has, got .* read without trust_remote_code"):
        main(["open_clip", "--model", str(source), "--output", str(tmp_path / "other")])


def test_an_export_of_a_siglip_2_reads_capitals_as_small_letters_and_pads_on_the_right(tmp_path):
    source = save_fixed_siglip2(tmp_path / "student")
    write_settings(load_model(source), source, tmp_path / "out")
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_processor(source).tokenizer
    assert tokenizer(["A Dog", "a dog"])["input_ids"] == 2 * ours(["a dog"])["input_ids"]
    assert tokenizer.padding_side == "right" and tokenizer.model_max_length == 64
