"""The teacher: its sums, what is frozen, what padding and text may not change."""

import copy
import hashlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_dclip import DCLIPModel, DCLIPTeacher, DCLIPTeacherConfig
from modeling_dclip.modeling_dclip_teacher import (
    MaskedHeads,
    assign_clusters,
    attention_pool,
    symmetric_info_nce,
    weigh_regions,
)

CROSS_ATTENTIONS = ("bidirectional", "text_to_image", "image_to_text", "none", "regions")
AGGREGATIONS = ("mean", "multi_cluster")
VARIANTS = list(itertools.product(CROSS_ATTENTIONS, AGGREGATIONS))
BOS, EOS = 117, 118


@pytest.fixture
def make_teacher(tiny_clip_dir):
    def make(**overrides):
        torch.manual_seed(0)
        teacher = DCLIPTeacher.from_clip(str(tiny_clip_dir), **overrides)
        if overrides.get("cross_attention") == "regions":  # untrained it is the identity: let the block speak
            nn.init.normal_(teacher.region_encoder.readout.weight, std=0.3)
        return teacher

    return make


def captions(batch=2):
    ids = torch.tensor([[BOS, 38, 79, 80, EOS], [BOS, 81, EOS, EOS, EOS]])[:batch]
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])[:batch]}


def pixels():
    generator = torch.Generator().manual_seed(3)
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.6], [0.0, 0.2, 0.3, 0.9], [0.4, 0.4, 1.0, 0.8]]] * 2)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "region_pixel_values": torch.randn(2, 3, 3, 32, 32, generator=generator),
        "region_boxes": boxes,
        "region_scores": torch.tensor([[0.9, 0.5, 0.3], [0.8, 0.6, 0.0]]),
        "region_mask": torch.tensor([[True, True, True], [True, True, False]]),
    }


def batch():
    return {**captions(), **pixels()}


def trainable(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def clip_hash(teacher):
    digest = hashlib.sha256()
    for _, weight in sorted(teacher.clip.state_dict().items()):
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


# -- architecture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "expected"), [(512, 2_103_296), (768, 4_727_808)])
def test_the_papers_teacher_trains_exactly_its_number_of_parameters(width, expected):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small_text = {**small, "vocab_size": 100}
    clip = {"text_config": small_text, "vision_config": small, "projection_dim": width}
    teacher = DCLIPTeacher(DCLIPTeacherConfig(clip_config=clip))
    assert sum(weight.numel() for weight in trainable(teacher).values()) == expected


def test_the_default_teacher_is_vit_b16_with_the_papers_number_of_parameters():
    with torch.device("meta"):
        teacher = DCLIPTeacher(DCLIPTeacherConfig())
    assert sum(weight.numel() for weight in trainable(teacher).values()) == 2_103_296
    vision = teacher.clip.vision_model
    assert len(vision.encoder.layers) == 12 and vision.embeddings.position_embedding.weight.shape == (197, 768)


@pytest.mark.parametrize(
    ("cross_attention", "modules"),
    [
        ("bidirectional", {"text_to_image", "image_to_text"}),
        ("text_to_image", {"text_to_image"}),
        ("image_to_text", {"image_to_text"}),
        ("none", set()),
        ("regions", {"region_encoder"}),
    ],
)
def test_only_the_asked_for_block_is_built_and_trains(make_teacher, cross_attention, modules):
    teacher = make_teacher(cross_attention=cross_attention)
    assert {name.split(".")[0] for name in trainable(teacher)} == modules


def test_attention_equals_torchs_with_padding_masked():
    torch.manual_seed(0)
    ours, reference = MaskedHeads(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        reference.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        reference.out_proj.load_state_dict(ours.out_proj.state_dict())
    queries, keys = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    got, weights = ours(queries, keys, mask)
    want, want_weights = reference(queries, keys, keys, key_padding_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(weights, want_weights)


def test_the_bidirectional_teacher_equals_the_equations_written_out(make_teacher):
    teacher = make_teacher()
    inputs = batch()
    _, tokens, token_mask = teacher.encode_text(**captions())
    regions = teacher.encode_regions(inputs["region_pixel_values"], inputs["region_mask"])
    outputs = teacher(**inputs)
    for sample in range(2):
        text = tokens[sample][token_mask[sample]]
        seen = regions[sample][inputs["region_mask"][sample]]
        count = len(seen)
        shares = []
        for region in range(count):
            x1, y1, x2, y2 = inputs["region_boxes"][sample, region].tolist()
            cosine = max(float(F.cosine_similarity(token, seen[region], dim=0)) for token in text)
            shares.append((x2 - x1) * (y2 - y1) * float(inputs["region_scores"][sample, region]) * max(cosine, 0.0))
        shares = [share / sum(shares) for share in shares] if sum(shares) > 0 else [1 / count] * count
        weighted = seen * torch.tensor(shares)[:, None] * count
        pooled = []
        for block, own, other in (
            (teacher.text_to_image, text, weighted),
            (teacher.image_to_text, weighted, text),
        ):
            attention = block.attention
            heads = []
            q, k, v = attention.q_proj(own), attention.k_proj(other), attention.v_proj(other)
            for head in range(8):
                part = slice(2 * head, 2 * head + 2)
                heads.append((q[:, part] @ k[:, part].T / math.sqrt(2)).softmax(dim=-1) @ v[:, part])
            attended = block.norm(own + attention.out_proj(torch.cat(heads, dim=-1)))
            mean = attended.mean(dim=0)
            alpha = (F.cosine_similarity(attended, mean[None], dim=-1) / 2.0).softmax(dim=0)
            pooled.append(alpha @ attended)
        expected = F.normalize(0.5 * pooled[0] + 0.5 * pooled[1], dim=0)
        torch.testing.assert_close(outputs.teacher_embeds[sample], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs.region_weights[sample, :count], torch.tensor(shares), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cross_attention", "aggregation"), VARIANTS)
def test_embeddings_are_unit_vectors_and_every_trained_weight_gets_a_gradient(
    make_teacher, cross_attention, aggregation
):
    teacher = make_teacher(cross_attention=cross_attention, aggregation=aggregation).train()
    outputs = teacher(**batch())
    for embeds in (outputs.teacher_embeds, outputs.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
    if cross_attention == "none":
        assert not outputs.loss.requires_grad  # the ablation trains nothing
        return
    outputs.loss.backward()
    for name, weight in trainable(teacher).items():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
    assert all(weight.grad is None for weight in teacher.clip.parameters())


# -- frozen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_text", [True, False])
def test_the_clip_inside_never_requires_gradient_and_never_trains(make_teacher, tmp_path, freeze_text):
    teacher = make_teacher()
    teacher.clip.config.freeze_text = freeze_text
    teacher.save_pretrained(tmp_path)
    for model in (teacher, DCLIPTeacher.from_pretrained(tmp_path), DCLIPTeacher(teacher.config)):
        model.train()
        assert not any(weight.requires_grad for weight in model.clip.parameters())
        assert not any(module.training for module in model.clip.modules())
        assert model.text_to_image.training and model.text_to_image.norm.weight.requires_grad


def test_training_the_teacher_changes_no_bit_of_its_clip(make_teacher):
    teacher = make_teacher().train()
    before, block_before = clip_hash(teacher), teacher.text_to_image.norm.weight.clone()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        teacher(**batch()).loss.backward()
        optimizer.step()
    assert clip_hash(teacher) == before
    assert not torch.equal(teacher.text_to_image.norm.weight, block_before)


def test_a_teacher_built_from_clip_carries_its_weights(make_teacher, tiny_clip_dir):
    clip = DCLIPModel.from_pretrained(tiny_clip_dir)
    for name, weight in make_teacher().clip.state_dict().items():
        assert torch.equal(weight, clip.state_dict()[name]), name


def test_a_teacher_can_be_built_from_a_saved_student(tiny_clip_dir, tmp_path):
    DCLIPModel.from_pretrained(tiny_clip_dir).save_pretrained(tmp_path)
    teacher = DCLIPTeacher.from_clip(str(tmp_path), text_share=0.25)
    assert teacher.config.text_share == 0.25 and teacher.config.clip_config.projection_dim == 16


def test_a_teacher_is_not_built_from_a_checkpoint_without_a_clips_weights(make_teacher, tmp_path):
    make_teacher().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected a dual encoder of type clip, .*, got 'dclip_teacher'\. Name the dual"
    ):
        DCLIPTeacher.from_clip(str(tmp_path))


def test_a_misspelt_override_is_refused(tiny_clip_dir):
    with pytest.raises(TypeError, match="text_shares"):
        DCLIPTeacher.from_clip(str(tiny_clip_dir), text_shares=0.5)


@torch.no_grad()
@pytest.mark.parametrize("cross_attention", CROSS_ATTENTIONS)
def test_a_reloaded_teacher_gives_identical_outputs(make_teacher, tmp_path, cross_attention):
    teacher = make_teacher(cross_attention=cross_attention)
    teacher.save_pretrained(tmp_path)
    again, info = DCLIPTeacher.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(**batch()).teacher_embeds, teacher(**batch()).teacher_embeds)


# -- what may not change the embedding -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("cross_attention", "aggregation"), VARIANTS)
def test_padding_regions_and_tokens_change_nothing(make_teacher, cross_attention, aggregation):
    teacher = make_teacher(cross_attention=cross_attention, aggregation=aggregation)
    inputs = batch()
    plain = teacher(**inputs)
    padded = dict(inputs)
    for name in ("region_pixel_values", "region_boxes", "region_scores"):
        junk = torch.full_like(inputs[name], 0.7)
        padded[name] = torch.cat([inputs[name], junk, junk], dim=1)
    padded["region_mask"] = F.pad(inputs["region_mask"], (0, 6))
    padded["input_ids"] = F.pad(inputs["input_ids"], (0, 4), value=EOS)
    padded["attention_mask"] = F.pad(inputs["attention_mask"], (0, 4))
    more = teacher(**padded)
    torch.testing.assert_close(more.teacher_embeds, plain.teacher_embeds, rtol=0, atol=2e-6)
    torch.testing.assert_close(more.region_weights[:, :3], plain.region_weights, rtol=0, atol=1e-6)
    assert not more.region_weights[:, 3:].any() and not more.region_embeds[:, 3:].any()
    torch.testing.assert_close(more.loss, plain.loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("cross_attention", "aggregation"), VARIANTS)
def test_a_sample_is_embedded_alike_alone_and_in_a_batch(make_teacher, cross_attention, aggregation):
    teacher = make_teacher(cross_attention=cross_attention, aggregation=aggregation)
    together = teacher(**batch()).teacher_embeds
    for sample in range(2):
        alone = teacher(**{name: value[sample : sample + 1] for name, value in batch().items()}).teacher_embeds
        torch.testing.assert_close(alone[0], together[sample], rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize(("cross_attention", "aggregation"), VARIANTS)
def test_the_order_of_regions_does_not_matter(make_teacher, cross_attention, aggregation):
    teacher = make_teacher(cross_attention=cross_attention, aggregation=aggregation)
    inputs = batch()
    turned = {name: value[:, [2, 0, 1]] if name.startswith("region_") else value for name, value in inputs.items()}
    torch.testing.assert_close(teacher(**turned).teacher_embeds, teacher(**inputs).teacher_embeds, rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_text_enters_the_leak_free_embedding(make_teacher, aggregation):
    teacher = make_teacher(cross_attention="regions", aggregation=aggregation)
    embeds = teacher(**batch()).teacher_embeds
    other = {**batch(), "input_ids": batch()["input_ids"].flip(0), "attention_mask": batch()["attention_mask"].flip(0)}
    assert torch.equal(teacher(**other).teacher_embeds, embeds)
    without = teacher(**pixels())
    assert torch.equal(without.teacher_embeds, embeds)
    assert without.loss is None and without.text_embeds is None


@torch.no_grad()
def test_text_does_enter_the_papers_embedding(make_teacher):
    teacher = make_teacher()
    other = {**batch(), "input_ids": batch()["input_ids"].flip(0), "attention_mask": batch()["attention_mask"].flip(0)}
    assert (teacher(**other).teacher_embeds - teacher(**batch()).teacher_embeds).abs().max() > 1e-3


@torch.no_grad()
def test_the_leak_free_teacher_starts_as_plain_clip_and_then_reads_regions_and_places(tiny_clip_dir, make_teacher):
    untrained = DCLIPTeacher.from_clip(str(tiny_clip_dir), cross_attention="regions")
    whole = untrained.encode_images(batch()["pixel_values"])
    torch.testing.assert_close(untrained(**batch()).teacher_embeds, whole, rtol=0, atol=1e-6)
    teacher = make_teacher(cross_attention="regions")
    embeds = teacher(**batch()).teacher_embeds
    for name in ("pixel_values", "region_pixel_values", "region_boxes"):
        other = {**batch(), name: batch()[name].flip(0 if name == "pixel_values" else 1)}
        assert (teacher(**other).teacher_embeds - embeds).abs().max() > 1e-4, name


@torch.no_grad()
def test_uniform_region_weights_change_nothing(make_teacher):
    weighted, plain = make_teacher(), make_teacher(region_weighting=False)
    embeds = torch.randn(2, 3, 1).expand(2, 3, 16).abs()  # all regions alike, so likeness to the caption is too
    _, tokens, mask = plain.encode_text(**captions())
    inputs = {"region_embeds": F.normalize(embeds, dim=-1), "token_embeds": tokens, "token_mask": mask}
    got, want = weighted(**inputs), plain(**inputs)
    torch.testing.assert_close(got.region_weights, torch.full((2, 3), 1 / 3))
    torch.testing.assert_close(got.teacher_embeds, want.teacher_embeds)


@torch.no_grad()
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("text_share", "changes"), [(1.0, "token_embeds"), (0.0, "region_embeds")])
def test_the_text_share_decides_which_stream_is_read(make_teacher, aggregation, text_share, changes):
    teacher = make_teacher(
        cross_attention="none", aggregation=aggregation, text_share=text_share, region_weighting=False
    )
    inputs = {"region_embeds": F.normalize(torch.randn(2, 3, 16), dim=-1), "token_embeds": torch.randn(2, 4, 16)}
    embeds = teacher(**inputs).teacher_embeds
    for name in inputs:
        moved = (teacher(**{**inputs, name: torch.randn_like(inputs[name])}).teacher_embeds - embeds).abs().max()
        assert (moved > 1e-2) == (name == changes)


# -- precomputed inputs ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cross_attention", CROSS_ATTENTIONS)
def test_precomputed_embeddings_give_the_same_without_running_clip(make_teacher, monkeypatch, cross_attention):
    teacher = make_teacher(cross_attention=cross_attention)
    inputs = batch()
    online = teacher(**inputs)
    text_embeds, token_embeds, token_mask = teacher.encode_text(**captions())
    cached = {
        "region_embeds": teacher.encode_regions(inputs["region_pixel_values"], inputs["region_mask"]),
        "image_embeds": teacher.encode_images(inputs["pixel_values"]),
        "text_embeds": text_embeds,
        "token_embeds": token_embeds,
        "token_mask": token_mask,
        **{name: inputs[name] for name in ("region_boxes", "region_scores", "region_mask")},
    }
    for name in ("get_image_features", "get_text_features"):
        monkeypatch.setattr(teacher.clip, name, None)
    offline = teacher(**cached)
    assert torch.equal(offline.teacher_embeds, online.teacher_embeds)
    torch.testing.assert_close(offline.loss, online.loss)
    half = {name: value.half() if value.is_floating_point() else value for name, value in cached.items()}
    torch.testing.assert_close(teacher(**half).teacher_embeds, online.teacher_embeds, rtol=0, atol=2e-2)
    assert teacher(**half).teacher_embeds.dtype == torch.float32


@torch.no_grad()
def test_padding_regions_cost_no_clip_forward(make_teacher, monkeypatch):
    teacher = make_teacher()
    seen = []
    encode = teacher.clip.get_image_features
    monkeypatch.setattr(
        teacher.clip, "get_image_features", lambda pixel_values: seen.append(len(pixel_values)) or encode(pixel_values)
    )
    teacher(**batch())
    assert seen == [5]


@torch.no_grad()
def test_tokens_between_begin_and_end_are_read_and_an_empty_caption_reads_its_end(make_teacher):
    teacher = make_teacher()
    ids = torch.tensor([[BOS, 38, 79, EOS], [BOS, EOS, EOS, EOS]])
    text_embeds, token_embeds, token_mask = teacher.encode_text(ids)
    assert token_mask.tolist() == [[True, True, False], [True, False, False]]
    hidden = teacher.clip.text_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(token_embeds, teacher.clip.text_projection(hidden)[:, 1:])
    expected = teacher.clip.get_text_features(ids).pooler_output
    torch.testing.assert_close(text_embeds, F.normalize(expected, dim=-1))
    outputs = teacher(**{**pixels(), "input_ids": ids})
    assert outputs.teacher_embeds.isfinite().all()


@torch.no_grad()
def test_old_checkpoints_with_the_wrong_end_token_find_the_same_tokens(make_teacher):
    teacher = make_teacher()
    old = copy.deepcopy(teacher)
    old.config.clip_config.text_config.eos_token_id = old.clip.text_model.eos_token_id = 2
    for ours, theirs in zip(teacher.encode_text(**captions()), old.encode_text(**captions()), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_caption_of_500_tokens_is_cut(make_teacher):
    ids = torch.full((1, 500), 38)
    ids[0, 0], ids[0, -1] = BOS, EOS
    _, tokens, mask = make_teacher().encode_text(ids, torch.ones_like(ids))
    assert tokens.shape == (1, 76, 16) and int(mask.sum()) == 75


@torch.no_grad()
@pytest.mark.parametrize("cross_attention", CROSS_ATTENTIONS)
def test_attention_maps_come_on_request_and_ignore_padding(make_teacher, cross_attention):
    teacher = make_teacher(cross_attention=cross_attention)
    maps = {"text_to_image_attentions": (2, 8, 4, 3), "image_to_text_attentions": (2, 8, 3, 4)}
    outputs, silent = teacher(**batch(), output_attentions=True), teacher(**batch())
    for name, shape in maps.items():
        if cross_attention in ("bidirectional", name.removesuffix("_attentions")):
            assert outputs[name].shape == shape
            torch.testing.assert_close(outputs[name].sum(dim=-1), torch.ones(shape[:-1]))
        else:
            assert name not in outputs
    if "text_to_image_attentions" in outputs:
        assert not outputs.text_to_image_attentions[1, :, :, 2].any()
    if cross_attention == "regions":
        assert [tuple(weights.shape) for weights in outputs.region_attentions] == [(2, 8, 4, 4)] * 2
        assert not outputs.region_attentions[0][1, :, :, 3].any()
    assert not any(name.endswith("attentions") for name in silent)


# -- pure parts ------------------------------------------------------------------------------------------------------


def test_region_weights_fall_back_to_uniform_where_nothing_is_left():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    scores = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, 0.5]])
    weights = weigh_regions(mask, scores=scores)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]))


def test_regions_unlike_every_token_are_left_out():
    regions = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    tokens = torch.tensor([[[3.0, 0.0], [-9.0, 0.1]]])
    real_first = torch.tensor([[True, False]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = weigh_regions(mask, region_embeds=regions, token_embeds=tokens, token_mask=real_first)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]))


def test_pooling_weighs_items_by_their_cosine_to_the_mean():
    items = torch.randn(6, 4, dtype=torch.float64)
    mean = items[:4].mean(dim=0)
    alpha = (F.cosine_similarity(items[:4], mean[None]) / 0.7).softmax(dim=0)
    got = attention_pool(items, torch.tensor([1, 1, 1, 1, 0, 0]), 0.7)
    torch.testing.assert_close(got, (alpha @ items[:4]).float())


def test_pooling_nothing_gives_zeros_with_finite_gradients():
    items = torch.randn(2, 3, 4, requires_grad=True)
    pooled = attention_pool(items, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), 2.0)
    pooled.sum().backward()
    assert not pooled[1].any() and items.grad.isfinite().all() and not items.grad[1].any()


def test_clusters_find_three_separate_bundles():
    torch.manual_seed(0)
    axes = torch.eye(8)[[0, 3, 6]]
    labels = torch.tensor([[0, 1, 2, 0, 1, 2, 2, 0]])
    items = (axes[labels] + 0.05 * torch.randn(1, 8, 8)) * torch.rand(1, 8, 1).add(0.5)
    assignment = assign_clusters(items, torch.ones(1, 8, dtype=torch.bool), 3, 5)
    assert assignment.shape == (1, 3, 8) and torch.equal(assignment.sum(dim=1), torch.ones(1, 8))
    together = assignment[0].T @ assignment[0]
    assert torch.equal(together.bool(), labels.T == labels)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_items_than_clusters_leave_clusters_empty(make_teacher, count):
    items = torch.eye(4)[None, :3]
    mask = (torch.arange(3) < count)[None]
    assignment = assign_clusters(items, mask, 3, 5)
    assert assignment.any(dim=-1).sum() == count and not assignment[:, :, count:].any()
    teacher = make_teacher(aggregation="multi_cluster")
    pooled = teacher._pool(items.requires_grad_(), mask.float())
    torch.testing.assert_close(pooled, items[:, :count].mean(dim=1))
    pooled.square().sum().backward()
    assert items.grad.isfinite().all() and items.grad[0, 0].any()


def test_the_loss_equals_a_loop_in_float64_even_under_autocast():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    expected = 0.0
    for i in range(5):
        for left, right in ((a, b), (b, a)):
            logits = [float(left[i] @ right[j]) / 0.05 for j in range(5)]
            expected += (math.log(sum(math.exp(logit) for logit in logits)) - logits[i]) / 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = symmetric_info_nce(a.float(), b.float(), 0.05)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_default_loss_temperature_is_the_papers(make_teacher):
    outputs = make_teacher()(**batch())
    torch.testing.assert_close(outputs.loss, symmetric_info_nce(outputs.teacher_embeds, outputs.text_embeds, 0.05))


@torch.no_grad()
@pytest.mark.parametrize("cross_attention", CROSS_ATTENTIONS)
def test_the_attention_of_the_clip_inside_can_be_chosen(make_teacher, tmp_path, cross_attention):
    make_teacher(cross_attention=cross_attention).save_pretrained(tmp_path)
    outputs = {}
    for name in ("eager", "sdpa"):
        teacher = DCLIPTeacher.from_pretrained(tmp_path, attn_implementation=name)
        assert teacher.clip.vision_model.config._attn_implementation == name
        outputs[name] = teacher(**batch()).teacher_embeds
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], rtol=0, atol=1e-5)


def test_the_loss_can_be_left_out(make_teacher):
    assert make_teacher()(**batch(), return_loss=False).loss is None


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "without", "message"),
    [
        ({}, "region_pixel_values", "region_pixel_values or region_embeds"),
        ({}, "input_ids", "input_ids, or token_embeds"),
        ({"cross_attention": "regions"}, "region_boxes", "region_boxes"),
        ({"cross_attention": "regions"}, "pixel_values", "pixel_values or image_embeds"),
    ],
)
def test_a_missing_input_is_named(make_teacher, overrides, without, message):
    inputs = {name: value for name, value in batch().items() if name != without}
    with pytest.raises(ValueError, match=message):
        make_teacher(**overrides)(**inputs)


def test_embeddings_of_another_width_are_refused(make_teacher):
    with pytest.raises(ValueError, match="expected width 16, got 8"):
        make_teacher()(region_embeds=torch.randn(2, 3, 8), **captions())


def test_a_sample_without_a_region_is_named(make_teacher):
    inputs = {**batch(), "region_mask": torch.tensor([[True, False, False], [False, False, False]])}
    with pytest.raises(ValueError, match="none for sample 1"):
        make_teacher()(**inputs)
