"""The student: stock CLIP's keys and numbers, frozen text, rotary positions."""

import hashlib

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, pipeline

from modeling_dclip import DCLIPConfig, DCLIPModel, DCLIPProcessor, DCLIPVisionConfig, DCLIPVisionModel
from modeling_dclip.modeling_dclip import axial_rotary_embedding, rotate_axial, truncate_text

TEXT_BASE = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
TEXT_LARGE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
VISION_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
VISION_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14}
# Widths, patches and resolutions of OpenAI's checkpoints; one layer each, so that it takes seconds.
SHAPES = {
    "vitb32": (512, TEXT_BASE, {**VISION_BASE, "patch_size": 32}),
    "vitb16": (512, TEXT_BASE, {**VISION_BASE, "patch_size": 16}),
    "vitl14": (768, TEXT_LARGE, VISION_LARGE),
    "vitl14-336": (768, TEXT_LARGE, {**VISION_LARGE, "image_size": 336}),
}


def no_keys_wrong(info):
    return not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"] or info["error_msgs"])


def text_hash(model):
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith("text_"):
            digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def inputs(batch=2, size=32):
    torch.manual_seed(1)
    ids = torch.tensor([[117, 38, 79, 118], [117, 80, 118, 118]])[:batch]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])[:batch]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(batch, 3, size, size)}


@pytest.fixture
def rope_model(tiny_clip_dir):
    config = DCLIPConfig.from_pretrained(tiny_clip_dir)
    config.vision_config.position_embedding_type = "rope"
    return DCLIPModel.from_pretrained(tiny_clip_dir, config=config)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_stock_checkpoint_loads_whole_and_gives_bit_equal_outputs(name, tmp_path):
    projection_dim, text, vision = SHAPES[name]
    text = {**text, "num_hidden_layers": 1, "vocab_size": 1000, "eos_token_id": 999, "bos_token_id": 998}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "num_hidden_layers": 1}, projection_dim=projection_dim
    )
    CLIPModel(config).save_pretrained(tmp_path)
    stock = CLIPModel.from_pretrained(tmp_path)
    student, info = DCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert no_keys_wrong(info)
    ids = torch.randint(0, 998, (2, 9))
    ids[:, -1] = 999
    batch = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, config.vision_config.image_size, config.vision_config.image_size),
    }
    ours, theirs = student(**batch, return_loss=True), stock(**batch, return_loss=True)
    for field in ("logits_per_image", "image_embeds", "text_embeds", "loss"):
        assert torch.equal(ours[field], theirs[field]), field
    tower, info = DCLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert no_keys_wrong(info)
    expected = stock.get_image_features(batch["pixel_values"]).pooler_output
    assert torch.equal(tower(batch["pixel_values"]).image_embeds, expected)


@torch.no_grad()
def test_positions_stored_by_old_versions_are_no_surprise(tiny_clip_dir, tmp_path):
    CLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for model_class in (DCLIPModel, DCLIPVisionModel):
        assert no_keys_wrong(model_class.from_pretrained(tmp_path, output_loading_info=True)[1])


def test_random_weights_are_drawn_as_clips(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    stock = CLIPConfig(text_config={**sizes, "vocab_size": 999}, vision_config=sizes, projection_dim=64)
    stock.save_pretrained(tmp_path)
    theirs = dict(CLIPModel(stock).named_parameters())
    config = DCLIPConfig.from_pretrained(tmp_path)
    tower = DCLIPVisionModel(config.vision_config)
    for name, weight in [*DCLIPModel(config).named_parameters(), *tower.named_parameters()]:
        if weight.dim() > 1 or name == "logit_scale":
            torch.testing.assert_close(
                weight.mean() + weight.std(correction=0),
                theirs[name].mean() + theirs[name].std(correction=0),
                rtol=0.1,
                atol=1e-3,
            )


@torch.no_grad()
def test_the_tower_loads_out_of_the_dual_checkpoint_and_back_from_its_own(tiny_clip_dir, tmp_path):
    dual = DCLIPModel.from_pretrained(tiny_clip_dir)
    dual.save_pretrained(tmp_path / "dual")
    tower, info = DCLIPVisionModel.from_pretrained(tmp_path / "dual", output_loading_info=True)
    assert no_keys_wrong(info)
    assert set(tower.state_dict()) == {name for name in dual.state_dict() if name.startswith("vis")}
    tower.save_pretrained(tmp_path / "tower")
    again, info = DCLIPVisionModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert no_keys_wrong(info)
    pixels = inputs()["pixel_values"]
    assert torch.equal(again(pixels).image_embeds, dual.get_image_features(pixels).pooler_output)


def test_the_vision_model_returns_hidden_states_and_attentions_on_request(tiny_clip_dir):
    tower = DCLIPVisionModel.from_pretrained(tiny_clip_dir, attn_implementation="eager")
    outputs = tower(inputs()["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert outputs.image_embeds.shape == (2, 16) and outputs.pooler_output.shape == (2, 32)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 17, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 17, 17)] * 2


@torch.no_grad()
@pytest.mark.parametrize("position_embedding_type", ["absolute", "rope"])
def test_eager_and_sdpa_attention_agree(tiny_clip_dir, position_embedding_type):
    config = DCLIPVisionConfig.from_pretrained(tiny_clip_dir)
    config.position_embedding_type = position_embedding_type
    pixels = inputs()["pixel_values"]
    eager, sdpa = (
        DCLIPVisionModel.from_pretrained(tiny_clip_dir, config=config, attn_implementation=name)(pixels).image_embeds
        for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager, sdpa, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(rope_model):
    pixels = inputs()["pixel_values"]
    gradients = []
    for checkpointed in (False, True):
        rope_model.train().zero_grad()
        if checkpointed:
            rope_model.gradient_checkpointing_enable({"use_reentrant": False})
        rope_model.get_image_features(pixels).pooler_output.pow(2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in rope_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 30
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


# -- rotary positions ------------------------------------------------------------------------------------------------


def test_rotation_matches_a_pairwise_reference():
    rows, columns, head_dim, base = 3, 2, 8, 100.0
    states = torch.randn(1, 1, 1 + rows * columns, head_dim)
    expected = states.clone()
    for place in range(rows * columns):
        for axis, position in enumerate(divmod(place, columns)):
            for pair in range(head_dim // 4):
                angle = torch.tensor(position * base ** (-4 * pair / head_dim))
                first, second = axis * head_dim // 2 + pair, axis * head_dim // 2 + pair + head_dim // 4
                a, b = states[0, 0, 1 + place, first], states[0, 0, 1 + place, second]
                expected[0, 0, 1 + place, first] = a * angle.cos() - b * angle.sin()
                expected[0, 0, 1 + place, second] = b * angle.cos() + a * angle.sin()
    turned = rotate_axial(states, *axial_rotary_embedding(rows, columns, head_dim, base))
    torch.testing.assert_close(turned, expected)
    assert torch.equal(turned[:, :, 0], states[:, :, 0])  # the class token is not rotated


def test_rotated_products_depend_on_the_offset_only():
    cos, sin = axial_rotary_embedding(6, 6, 16, 100.0)
    query, key = torch.randn(16), torch.randn(16)

    def product(place, other):
        return rotate_axial(query, cos[1 + place], sin[1 + place]) @ rotate_axial(key, cos[1 + other], sin[1 + other])

    torch.testing.assert_close(product(0, 8), product(7, 15))  # both one down, two right
    assert not torch.isclose(product(0, 8), product(0, 13))


@torch.no_grad()
def test_rope_takes_stock_weights_and_any_multiple_of_the_patch(tiny_clip_dir, rope_model):
    _, info = DCLIPModel.from_pretrained(tiny_clip_dir, config=rope_model.config, output_loading_info=True)
    assert no_keys_wrong(info)
    for height, width in ((32, 32), (48, 24), (8, 64)):
        assert rope_model.get_image_features(torch.randn(1, 3, height, width)).pooler_output.shape == (1, 16)


@torch.no_grad()
def test_rope_sees_where_patches_are_and_keeps_no_learned_place(rope_model):
    pixels = inputs()["pixel_values"]
    embeds = rope_model.get_image_features(pixels).pooler_output
    mirrored = rope_model.get_image_features(pixels.unflatten(-1, (4, 8)).flip(-2).flatten(-2)).pooler_output
    assert (embeds - mirrored).abs().max() > 1e-4
    table = rope_model.vision_model.embeddings.position_embedding.weight
    table[1:] = table[1:].roll(5, dims=0)
    torch.testing.assert_close(rope_model.get_image_features(pixels).pooler_output, embeds)


@torch.no_grad()
def test_rope_beside_the_table_starts_at_clip_and_turns_as_far_as_it_is_told(tiny_clip_dir, tmp_path):
    """At a rotation near 0 it is CLIP with interpolated positions, at any size; at 0.3 it is not."""
    absolute, pixels = DCLIPModel.from_pretrained(tiny_clip_dir).eval(), torch.randn(2, 3, 48, 32)
    expected = absolute.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    found = {}
    for scale in (1e-6, 0.3):
        config = DCLIPConfig.from_pretrained(tiny_clip_dir)
        vision = {"position_embedding_type": "rope", "rotary_table": True, "rotary_scale": scale}
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        model = DCLIPModel.from_pretrained(tiny_clip_dir, config=config).eval()
        model.save_pretrained(tmp_path / str(scale))
        again = DCLIPModel.from_pretrained(tmp_path / str(scale)).eval()
        found[scale] = again.get_image_features(pixels).pooler_output
        torch.testing.assert_close(found[scale], model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(found[1e-6], expected, rtol=1e-4, atol=1e-4)
    assert (found[0.3] - expected).abs().max() > 1e-3


def test_centred_angles_differ_by_place_as_angles_from_the_first_patch_do():
    plain, centred = (axial_rotary_embedding(3, 4, 8, 100.0, scale=0.3, centred=flag) for flag in (False, True))
    angles = [torch.atan2(sin, cos)[1:] for cos, sin in (plain, centred)]
    torch.testing.assert_close(angles[0] - angles[0][:1], angles[1] - angles[1][:1])
    assert angles[0].max() == pytest.approx(0.3 * 3) and angles[1].max() == pytest.approx(0.3 * 1.5)
    assert (centred[0][0] == 1).all() and (centred[1][0] == 0).all()  # the class token


def test_rope_survives_saving(rope_model, tmp_path):
    rope_model.save_pretrained(tmp_path)
    again = DCLIPModel.from_pretrained(tmp_path)
    assert again.config.vision_config.position_embedding_type == "rope"
    pixels = inputs()["pixel_values"]
    assert torch.equal(
        again.get_image_features(pixels).pooler_output, rope_model.get_image_features(pixels).pooler_output
    )


@torch.no_grad()
def test_absolute_positions_interpolate_on_request_only(tiny_clip_dir):
    tower = DCLIPVisionModel.from_pretrained(tiny_clip_dir)
    wide = torch.randn(1, 3, 32, 64)
    assert tower(wide, interpolate_pos_encoding=True).image_embeds.shape == (1, 16)
    with pytest.raises(ValueError, match="32\\*64"):
        tower(wide)


@pytest.mark.parametrize("interpolate", [False, True])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(tiny_clip_dir, interpolate):
    tower = DCLIPVisionModel.from_pretrained(tiny_clip_dir)
    with pytest.raises(ValueError, match="multiples of the patch .8 pixels., got 36 x 32"):
        tower(torch.randn(1, 3, 36, 32), interpolate_pos_encoding=interpolate)


def test_missing_pixels_are_named(tiny_clip_dir):
    with pytest.raises(ValueError, match="pixel_values"):
        DCLIPVisionModel.from_pretrained(tiny_clip_dir)()


# -- frozen text -----------------------------------------------------------------------------------------------------


def trainable_text(model):
    return [name for name, weight in model.named_parameters() if weight.requires_grad and name.startswith("text_")]


def test_frozen_text_survives_building_loading_training_and_preparing(tiny_clip_dir, tmp_path):
    model = DCLIPModel(DCLIPConfig.from_pretrained(tiny_clip_dir))
    assert trainable_text(model) == []
    model.save_pretrained(tmp_path)
    model = DCLIPModel.from_pretrained(tmp_path)
    assert model.config.freeze_text and trainable_text(model) == []
    model.train()
    assert trainable_text(model) == [] and not model.text_model.training and model.vision_model.training
    model = Accelerator(cpu=True).prepare(model)
    model.train()
    assert trainable_text(model) == [] and not model.text_model.encoder.layers[0].training
    assert model.visual_projection.weight.requires_grad


def test_training_changes_the_student_and_not_one_bit_of_the_text_tower(tiny_clip_dir):
    model = DCLIPModel.from_pretrained(tiny_clip_dir).train()
    before, vision_before = text_hash(model), model.visual_projection.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs(), return_loss=True).loss.backward()
        optimizer.step()
    assert text_hash(model) == before
    assert not torch.equal(model.visual_projection.weight, vision_before)


def test_text_trains_where_it_is_not_frozen(tiny_clip_dir):
    model = DCLIPModel.from_pretrained(tiny_clip_dir, freeze_text=False).train()
    assert model.text_model.training and len(trainable_text(model)) > 30


def test_logit_scale_stays_float32_in_a_half_precision_model(tiny_clip_dir, tmp_path):
    model = DCLIPModel.from_pretrained(tiny_clip_dir, dtype=torch.bfloat16)
    assert model.logit_scale.dtype == torch.float32 and model.visual_projection.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert DCLIPModel.from_pretrained(tmp_path).logit_scale.dtype == torch.float32


# -- long text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_truncation_keeps_the_end_token_of_every_row(legacy):
    ids = torch.tensor([[8, 1, 2, 3, 4, 9], [8, 1, 9, 9, 9, 9]])
    mask = torch.ones_like(ids)
    kept, kept_mask = truncate_text(ids, mask, max_length=4, eos_token_id=2 if legacy else 9)
    assert kept.tolist() == [[8, 1, 2, 9], [8, 1, 9, 9]]
    assert kept_mask.shape == (2, 4)


def test_text_that_fits_is_left_alone():
    ids = torch.tensor([[8, 1, 9]])
    assert truncate_text(ids, None, max_length=3, eos_token_id=9)[0] is ids


@torch.no_grad()
def test_a_text_of_500_tokens_embeds_as_its_truncation(tiny_clip_dir):
    model = DCLIPModel.from_pretrained(tiny_clip_dir)
    long = torch.full((1, 500), 38)
    long[0, 0], long[0, -1] = 117, 118
    cut = torch.cat([long[:, :76], long[:, -1:]], dim=1)
    expected = model.get_text_features(cut).pooler_output
    positions = torch.arange(500)[None]
    assert torch.equal(model.get_text_features(long, torch.ones_like(long), positions).pooler_output, expected)


def test_the_zero_shot_pipeline_runs_from_a_saved_folder_and_with_our_model_cuts_long_labels(tiny_clip_dir, tmp_path):
    DCLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    processor = DCLIPProcessor.from_pretrained(tiny_clip_dir)
    processor.save_pretrained(tmp_path)
    ours = {"model": DCLIPModel.from_pretrained(tmp_path), "tokenizer": processor.tokenizer}
    ours["image_processor"] = processor.image_processor
    for given, labels in (({"model": str(tmp_path)}, ["a red dog", "blue"]), (ours, ["a red dog", "blue " * 200])):
        classify = pipeline("zero-shot-image-classification", **given)
        answers = classify(Image.new("RGB", (40, 30), "red"), candidate_labels=labels)
        assert {answer["label"] for answer in answers} == set(labels)
        assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)


def test_the_feature_pipeline_runs_from_a_vision_only_folder(tiny_clip_dir, tmp_path):
    DCLIPVisionModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    DCLIPProcessor.from_pretrained(tiny_clip_dir).image_processor.save_pretrained(tmp_path)
    features = pipeline("image-feature-extraction", model=str(tmp_path))(
        Image.new("RGB", (40, 30)), return_tensors=True
    )
    assert features.shape == (1, 16)
