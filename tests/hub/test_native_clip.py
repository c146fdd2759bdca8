"""A stock CLIP of a student's weights is the student, bit for bit; what is no stock CLIP is said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.publications import make_dmclip, make_student
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor

from modeling_dclip import DCLIPModel, DCLIPProcessor, DCLIPVisionModel
from modeling_dclip.encoders.fingerprints import model_revision
from modeling_dclip.encoders.loading import load_merged
from modeling_dclip.hub.native_clip import (
    check_native,
    is_stock_clip,
    to_native_clip,
    to_native_processor,
)

ROOT = Path(__file__).parents[2]
PICTURES = [Image.fromarray(np.arange(40 * width * 3, dtype=np.uint8).reshape(40, width, 3)) for width in (50, 60)]
TEXTS = ["a red dog", "a"]


def make_batch(folder):
    return dict(DCLIPProcessor.from_pretrained(folder)(images=PICTURES, text=TEXTS, return_tensors="pt"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_student_saved_and_loaded_as_stock_clip_gives_the_students_numbers(tiny_clip_dir, tmp_path, stored):
    student = load_merged(make_student(tmp_path / "student", tiny_clip_dir, dtype=stored))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    to_native_clip(student).save_pretrained(tmp_path / "native")
    native = CLIPModel.from_pretrained(tmp_path / "native").eval()
    check_native(student, native, make_batch(tiny_clip_dir))
    with torch.no_grad():
        native.visual_projection.weight[0, 0] += 0.5
    with pytest.raises(ValueError, match="image_embeds of the stock CLIP"):
        check_native(student, native, make_batch(tiny_clip_dir))
    for name, change in (("text_embeds", "text_projection.weight"), ("logits_per_image", "logit_scale")):
        native = to_native_clip(student)
        with torch.no_grad():
            native.get_parameter(change).view(-1)[0].add_(0.5)
        with pytest.raises(ValueError, match=f"{name} of the stock CLIP"):
            check_native(student, native, make_batch(tiny_clip_dir))


def test_the_stock_processor_reads_the_same_ids_and_names_no_code_of_ours(tiny_clip_dir, tmp_path):
    DCLIPProcessor.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path / "ours")
    ours = DCLIPProcessor.from_pretrained(tmp_path / "ours")
    to_native_processor(ours).save_pretrained(tmp_path / "native")
    for file in (tmp_path / "native").glob("*.json"):
        assert "auto_map" not in file.read_text() and "DCLIP" not in file.read_text()
    theirs = CLIPProcessor.from_pretrained(tmp_path / "native")
    texts = ["a red dog", "blue"]
    ids = [list(p(text=texts, padding=True, return_tensors="pt")["input_ids"].ravel()) for p in (ours, theirs)]
    assert ids[0] == ids[1]
    assert theirs.image_processor.crop_size["height"] == 32


def test_rotary_positions_and_mamba_are_no_stock_clip(tiny_clip_dir, tmp_path):
    student = DCLIPModel.from_pretrained(tiny_clip_dir)
    student.config.vision_config.position_embedding_type = "rope"
    assert not is_stock_clip(student)
    with pytest.raises(ValueError, match="'rope' positions"):
        to_native_clip(student)
    mamba = load_merged(make_dmclip(tmp_path / "dmclip", tiny_clip_dir))
    assert not is_stock_clip(mamba)
    with pytest.raises(ValueError, match="got 'dmclip'"):
        to_native_clip(mamba)


def test_one_tower_is_no_dual_encoder_and_a_missing_weight_is_named(tiny_clip_dir, tmp_path):
    DCLIPVisionModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="Expected a model of type dclip, clip, dmclip, .* got 'dclip_vision'"):
        load_merged(tmp_path / "vision")
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    state = {name: value for name, value in model.state_dict().items() if name != "text_projection.weight"}
    model.save_pretrained(tmp_path / "holed", state_dict=state)
    with pytest.raises(ValueError, match=r"got 1 missing \(text_projection.weight\)"):
        load_merged(tmp_path / "holed")


MOVED = "vision_model.encoder.layers.0.self_attn.q_proj.weight"


def test_adapters_are_merged_into_the_model_they_name(tiny_clip_dir, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are the extra [peft]")
    base = make_student(tmp_path / "base", tiny_clip_dir)
    config = peft.LoraConfig(r=2, target_modules=r"vision_model\..*\.(q_proj|v_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(DCLIPModel.from_pretrained(base), config).eval()
    adapted.save_pretrained(tmp_path / "adapters")
    batch = make_batch(tiny_clip_dir)
    with torch.no_grad():
        expected, before = adapted(**batch), DCLIPModel.from_pretrained(base).eval()(**batch)
        merged = load_merged(tmp_path / "adapters")
        found = merged(**batch)
    assert type(merged) is DCLIPModel and not any("lora" in name for name in merged.state_dict())
    assert (before.image_embeds - expected.image_embeds).abs().max() > 1e-2
    assert torch.allclose(found.image_embeds, expected.image_embeds, rtol=0, atol=1e-6)
    check_native(merged, to_native_clip(merged), batch)
    (tmp_path / "trained").mkdir()  # as training without merged weights leaves it
    (tmp_path / "adapters").rename(tmp_path / "trained" / "adapter")
    assert torch.equal(load_merged(tmp_path / "trained").state_dict()[MOVED], merged.state_dict()[MOVED])


@pytest.mark.parametrize("name", ["demo_anchor", "demo_anchor_2"])
def test_the_committed_small_clips_load_without_this_packages_code_and_are_the_measured_ones(name):
    folder = ROOT / "recipes" / name
    assert not [path.name for path in folder.glob("*.json") if "auto_map" in path.read_text(encoding="utf-8")]
    stock, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, backend="pil")
    assert (type(stock), type(processor)) == (CLIPModel, CLIPProcessor)
    batch = make_batch(folder)
    check_native(load_merged(folder), stock, batch)
    theirs = processor(images=PICTURES, text=TEXTS, return_tensors="pt", padding=True)
    assert all(torch.equal(theirs[key], batch[key]) for key in batch)
    records = json.loads((ROOT / "results" / name / "records.json").read_text(encoding="utf-8"))
    assert {record["revision"] for record in records} == {model_revision(folder, stock)}
