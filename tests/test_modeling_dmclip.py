"""DM-CLIP: a naive MambaVision in float64, MobileCLIP-S1's text tower, and what users do with them."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessorPil, pipeline

from modeling_dclip import (
    DMCLIP_PRESETS,
    DCLIPProcessor,
    DMCLIPConfig,
    DMCLIPModel,
    DMCLIPTextConfig,
    DMCLIPTextModel,
    DMCLIPVisionConfig,
    DMCLIPVisionModel,
    modeling_dmclip,
)
from modeling_dclip.distillation.trainer import BatchesTrainer
from modeling_dclip.modeling_dmclip import DMCLIPDropPath, DMCLIPMambaMixer, merge_windows, partition_windows
from modeling_dclip.selective_scan import selective_scan

VISION = {
    "image_size": 64,
    "hidden_size": 8,
    "stem_dim": 4,
    "depths": (1, 2, 3, 2),
    "num_heads": (1, 1, 2, 4),
    "window_sizes": (8, 8, 4, 2),
    "projection_dim": 12,
}
SCALED = {**VISION, "layer_scale_init_value": 1e-5, "conv_layer_scale_init_value": 1e-5}
SHALLOW = (1, 1, 2, 2)  # one block of each kind in every hybrid stage: tracing takes its time
EOS = 118  # of the tokenizer in conftest.py
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 119,
    "bos_token_id": 117,
    "eos_token_id": EOS,
    "projection_dim": 12,
}


def no_keys_wrong(info):
    return not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"] or info["error_msgs"])


def shaken(model, seed=0):
    """`model` in eval mode with every parameter and statistic far from its start, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name == "logit_scale":
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        last = name.rsplit(".", 1)[-1]
        if last == "running_var":
            tensor.data = 0.5 + noise.abs()
        elif last.startswith("gamma") or (last == "weight" and tensor.dim() == 1):
            tensor.data = 1 + 0.3 * noise
        elif last in ("A_log", "D"):
            tensor.data = tensor.data + 0.3 * noise
        else:
            tensor.data = noise / math.sqrt(tensor[0].numel()) if tensor.dim() > 1 else 0.3 * noise
    return model.eval()


def make_vision(**fields):
    return shaken(DMCLIPVisionModel(DMCLIPVisionConfig(**{**SCALED, **fields})))


def make_dual(**fields):
    torch.manual_seed(0)
    return DMCLIPModel(DMCLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=12, **fields))


def pixels(batch=2, height=64, width=64, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def texts():
    ids = torch.tensor([[117, 38, 79, EOS], [117, 80, EOS, EOS]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


def relative_error(value, expected):
    return float((value - expected).abs().max() / expected.abs().max())


# -- the numbers -----------------------------------------------------------------------------------------------------


def naive_batch_norm(weights, name, maps, eps):
    mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    scaled = (maps - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + eps)
    return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def naive_linear(weights, name, rows):
    product = rows @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def naive_layer_norm(weights, name, rows):
    centred = rows - rows.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def naive_mixer(weights, name, tokens):
    """One window `(P, C)`, one place and one state at a time; the two convolutions apart, as published."""
    places, width = tokens.shape
    half, kernels = width // 2, weights[f"{name}.conv1d.weight"]
    x, z = naive_linear(weights, f"{name}.in_proj", tokens).split(half, dim=-1)
    branches = []
    for branch, kernel in ((x, kernels[:half, 0]), (z, kernels[half:, 0])):
        padded = torch.cat([branch.new_zeros(1, half), branch, branch.new_zeros(1, half)])
        convolved = sum(padded[k : k + places] * kernel[:, k] for k in range(3))
        branches.append(convolved / (1 + torch.exp(-convolved)))
    x, z = branches
    rank = math.ceil(width / 16)
    steps, entering, leaving = naive_linear(weights, f"{name}.x_proj", x).split([rank, 8, 8], dim=-1)
    steps = naive_linear(weights, f"{name}.dt_proj", steps) + weights[f"{name}.dt_proj.bias"]  # added a second time
    steps = torch.log1p(torch.exp(steps))
    rates, state, outputs = -torch.exp(weights[f"{name}.A_log"]), x.new_zeros(half, 8), []
    for place in range(places):
        decay = torch.exp(steps[place][:, None] * rates)
        state = decay * state + (steps[place] * x[place])[:, None] * entering[place]
        outputs.append(state @ leaving[place] + weights[f"{name}.D"] * x[place])
    return naive_linear(weights, f"{name}.out_proj", torch.cat([torch.stack(outputs), z], dim=-1))


def naive_attention(weights, name, tokens, heads):
    width = tokens.shape[1]
    queries, keys, values = naive_linear(weights, f"{name}.qkv", tokens).split(width, dim=-1)
    outputs = []
    for head in torch.arange(width).chunk(heads):
        scores = queries[:, head] @ keys[:, head].T / math.sqrt(width // heads)
        outputs.append(scores.softmax(dim=-1) @ values[:, head])
    return naive_linear(weights, f"{name}.proj", torch.cat(outputs, dim=-1))


def naive_conv(weights, name, maps, stride=1):
    return F.conv2d(maps, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride=stride, padding=1)


def naive_hybrid_stage(weights, config, stage, maps):
    """Windows by plain slicing, each on its own."""
    size, (batch, channels, height, width) = config.window_sizes[stage], maps.shape
    padded = maps.new_zeros(batch, channels, -(-height // size) * size, -(-width // size) * size)
    padded[:, :, :height, :width] = maps
    depth = config.depths[stage]
    for image in range(batch):
        for top in range(0, padded.shape[2], size):
            for left in range(0, padded.shape[3], size):
                window = padded[image, :, top : top + size, left : left + size]
                tokens = window.reshape(channels, size * size).T
                for block in range(depth):
                    name = f"stages.{stage}.blocks.{block}"
                    normed = naive_layer_norm(weights, f"{name}.norm1", tokens)
                    if block < math.ceil(depth / 2):
                        mixed = naive_mixer(weights, f"{name}.mixer", normed)
                    else:
                        mixed = naive_attention(weights, f"{name}.mixer", normed, config.num_heads[stage])
                    tokens = tokens + weights.get(f"{name}.gamma_1", 1) * mixed
                    hidden = naive_linear(
                        weights, f"{name}.mlp.fc1", naive_layer_norm(weights, f"{name}.norm2", tokens)
                    )
                    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                    hidden = naive_linear(weights, f"{name}.mlp.fc2", hidden)
                    tokens = tokens + weights.get(f"{name}.gamma_2", 1) * hidden
                padded[image, :, top : top + size, left : left + size] = tokens.T.reshape(channels, size, size)
    return padded[:, :, :height, :width]


def naive_mambavision(model, images):
    """`(image_embeds, pooled, maps)` in float64, written from the published facts,
    block by block and window by window.
    """
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    maps = naive_batch_norm(weights, "stem.norm1", naive_conv(weights, "stem.conv1", images.double(), 2), 1e-4).relu()
    maps = naive_batch_norm(weights, "stem.norm2", naive_conv(weights, "stem.conv2", maps, 2), 1e-4).relu()
    stages = []
    for stage in range(4):
        if stage < 2:
            for block in range(model.config.depths[stage]):
                name = f"stages.{stage}.blocks.{block}"
                branch = naive_batch_norm(weights, f"{name}.norm1", naive_conv(weights, f"{name}.conv1", maps), 1e-5)
                cubic = math.sqrt(2 / math.pi) * (branch + 0.044715 * branch**3)
                branch = naive_conv(weights, f"{name}.conv2", 0.5 * branch * (1 + torch.tanh(cubic)))
                branch = naive_batch_norm(weights, f"{name}.norm2", branch, 1e-5)
                gain = weights.get(f"{name}.gamma")
                maps = maps + (branch if gain is None else gain[:, None, None] * branch)
        else:
            maps = naive_hybrid_stage(weights, model.config, stage, maps)
        stages.append(maps)
        if stage < 3:
            maps = naive_conv(weights, f"stages.{stage}.downsample", maps, 2)
    pooled = naive_batch_norm(weights, "norm", maps, 1e-5).mean(dim=(2, 3))
    return naive_linear(weights, "projection", pooled), pooled, stages


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 100)], ids=["whole_windows", "padded_windows"])
@pytest.mark.parametrize("fields", [{}, {"layer_scale_init_value": None, "conv_layer_scale_init_value": None}])
def test_every_output_is_the_naive_references(height, width, fields):
    model = make_vision(**fields)
    images = pixels(2, height, width)
    embeds, pooled, stages = naive_mambavision(model, images)
    outputs = model(images, output_hidden_states=True)
    assert relative_error(outputs.image_embeds, embeds) < 2e-6
    assert relative_error(outputs.pooler_output, pooled) < 2e-6
    assert len(outputs.hidden_states) == 5
    for ours, expected in zip(outputs.hidden_states[1:], stages, strict=True):
        assert relative_error(ours, expected) < 2e-6
    torch.testing.assert_close(outputs.last_hidden_state.mean(dim=(2, 3)), outputs.pooler_output)


@torch.no_grad()
def test_the_reference_would_see_a_weight_that_does_nothing():
    model, images = make_vision(), pixels(1)
    expected = naive_mambavision(model, images)[0]
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data = kept + 0.3 * torch.ones_like(kept)
        assert relative_error(model(images).image_embeds, expected) > 2e-5, name
        parameter.data = kept


PUBLISHED_COUNTS = {"T": 31_794_248, "T2": 35_104_008, "S": 50_140_584, "B": 97_685_288, "L": 227_961_048}


@pytest.mark.parametrize("preset", DMCLIP_PRESETS)
def test_a_preset_has_the_published_number_of_parameters(preset):
    with torch.device("meta"):
        model = DMCLIPVisionModel(DMCLIPVisionConfig(**DMCLIP_PRESETS[preset], projection_dim=1000))
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED_COUNTS[preset]
    without_head = sum(weight.numel() for name, weight in model.named_parameters() if "projection" not in name)
    if preset in ("T", "B"):
        assert without_head == {"T": 31_153_248, "B": 96_660_288}[preset]


def test_the_first_half_of_a_hybrid_stage_mixes_and_the_rest_attends():
    with torch.device("meta"):
        model = DMCLIPVisionModel(DMCLIPVisionConfig(**DMCLIP_PRESETS["S"]))  # depths 7 and 5
    is_mixer = [
        [isinstance(block.mixer, DMCLIPMambaMixer) for block in stage.blocks] for stage in list(model.stages)[2:]
    ]
    assert is_mixer == [[True] * 4 + [False] * 3, [True] * 3 + [False] * 2]


def test_the_scans_backend_is_the_configs_and_is_kept_by_fusing_and_loading(tmp_path, monkeypatch):
    taken = []

    def spy(*args, backend, **kwargs):
        taken.append(backend)
        return selective_scan(*args, backend=backend, **kwargs)

    monkeypatch.setattr(modeling_dmclip, "selective_scan", spy)
    model = shaken(make_vision(depths=SHALLOW, scan_backend="reference"))
    model.save_pretrained(tmp_path)
    loaded = DMCLIPVisionModel.from_pretrained(tmp_path)
    outputs = [one(pixels()).image_embeds.detach() for one in (model, model.fuse(), loaded)]
    automatic = DMCLIPVisionModel.from_pretrained(tmp_path, scan_backend="auto")
    assert set(taken) == {"reference"} and len(taken) == 3 * 2  # a mixer in each hybrid stage
    expected = automatic(pixels()).image_embeds.detach()
    assert set(taken[3 * 2 :]) == {"auto"}
    assert all(relative_error(output, expected) < 1e-5 for output in outputs)


@pytest.mark.parametrize("dual", [False, True])
def test_a_backend_that_cannot_run_here_is_an_error_of_the_scan(dual):
    vision = make_dual().vision_model if dual else make_vision()
    vision.config.scan_backend = "mamba_ssm"
    with pytest.raises(ValueError, match="CUDA device for the backend 'mamba_ssm', got cpu"):
        vision(pixels())


def test_windows_come_back_as_they_were_cut():
    maps = torch.arange(2 * 3 * 7 * 9.0).view(2, 3, 7, 9)
    windows = partition_windows(maps, 4)
    assert windows.shape == (2 * 2 * 3, 16, 3) and windows.is_contiguous()
    assert torch.equal(windows[1], maps[0, :, :4, 4:8].flatten(1).T)
    assert float(windows[2].view(4, 4, 3)[:, 1:].abs().max()) == 0  # places beyond the map
    assert torch.equal(merge_windows(windows, 4, 7, 9), maps)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 64), (224, 32), (50, 131)])
def test_any_input_size_gives_an_embedding(height, width):
    outputs = make_vision()(pixels(1, height, width))
    assert outputs.image_embeds.shape == (1, 12) and outputs.image_embeds.isfinite().all()
    assert outputs.last_hidden_state.shape[2:] == (-(-height // 32), -(-width // 32))


@torch.no_grad()
def test_windows_of_another_resolution_take_the_weights_and_pad_nothing():
    model = make_vision()
    config = model.config.for_image_size(96)  # maps of 6 and 3: windows of 3 and 3, or 6 and 3
    assert all(places % size == 0 for places, size in zip((6, 3), config.window_sizes[2:], strict=True))
    other = DMCLIPVisionModel(config).eval()
    other.load_state_dict(model.state_dict())
    images = pixels(1, 96, 96)
    assert relative_error(other(images).image_embeds, naive_mambavision(other, images)[0]) < 2e-6
    assert relative_error(other(images).image_embeds, model(images).image_embeds) > 1e-4  # the model padded to 8 and 4


@pytest.mark.parametrize("images", [None, torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64)])
def test_pixels_that_are_none_are_refused(images):
    with pytest.raises(ValueError, match=r"`pixel_values` of shape \(B, 3, H, W\), got"):
        make_vision()(images)


# -- inference forms -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"layer_scale_init_value": None, "conv_layer_scale_init_value": None}])
def test_a_fused_model_has_one_norm_left_no_gain_and_the_same_outputs(fields):
    model = make_vision(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = model.fuse()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules()) == 1
    assert not any("gamma" in name for name in fused.state_dict()) and not fused.training
    expected, ours = (net(pixels(), output_hidden_states=True) for net in (model, fused))
    for name in ("image_embeds", "pooler_output", "last_hidden_state"):
        assert relative_error(ours[name], expected[name]) < 2e-6, name
    for index in range(5):
        assert relative_error(ours.hidden_states[index], expected.hidden_states[index]) < 2e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(fused.fuse()(pixels()).image_embeds, ours.image_embeds)


@torch.no_grad()
def test_a_fused_model_saves_and_loads_like_any_other(tmp_path):
    fused = make_vision().fuse()
    fused.save_pretrained(tmp_path)
    again, info = DMCLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert no_keys_wrong(info) and again.config.batch_norm_folded
    assert torch.equal(again(pixels()).image_embeds, fused(pixels()).image_embeds)


@torch.no_grad()
def test_a_fused_dual_encoder_ranks_alike_and_leaves_the_original_whole():
    model = shaken(make_dual())
    fused = model.fuse()
    expected, ours = (net(**texts(), pixel_values=pixels()) for net in (model, fused))
    torch.testing.assert_close(ours.logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)
    assert fused.config.vision_config.batch_norm_folded and not model.config.vision_config.batch_norm_folded


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_bfloat16_weights_point_the_same_way_and_the_scans_own_stay_float32(fuse, tmp_path):
    model = make_vision()
    model.save_pretrained(tmp_path)
    half = DMCLIPVisionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half = half.fuse() if fuse else half
    kept = {name.rsplit(".", 1)[-1] for name, weight in half.named_parameters() if weight.dtype == torch.float32}
    assert kept == {"A_log", "D"}
    embeds = half(pixels()).image_embeds
    assert embeds.dtype == torch.bfloat16
    assert F.cosine_similarity(embeds.float(), model(pixels()).image_embeds).min() > 0.9995
    whole = make_vision().to(torch.bfloat16)  # A_log and D too
    assert F.cosine_similarity(whole(pixels()).image_embeds.float(), model(pixels()).image_embeds).min() > 0.9995


@torch.no_grad()
def test_an_offloaded_encoder_gives_the_same_outputs():
    model = make_vision()
    expected = model(pixels()).image_embeds
    cpu_offload(model, execution_device="cpu")
    assert model.stages[2].blocks[0].mixer.dt_proj.bias.is_meta
    assert relative_error(model(pixels()).image_embeds, expected) < 2e-6


@torch.no_grad()
def test_channels_last_changes_nothing_but_memory():
    model = make_vision()
    expected = model(pixels()).image_embeds
    model = model.to(memory_format=torch.channels_last)
    images = pixels().to(memory_format=torch.channels_last)
    assert relative_error(model(images).image_embeds, expected) < 2e-6
    assert model.stem(images).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_the_encoder_compiles_without_a_graph_break(fuse):
    model = make_vision(depths=SHALLOW)
    model = model.fuse() if fuse else model
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = pixels(2, 80, 100)  # padded windows
    assert relative_error(compiled(images).image_embeds, model(images).image_embeds) < 2e-6


def test_the_encoder_trains_compiled_with_the_same_gradients():
    gradients = []
    for compiled in (False, True):
        model = make_vision(depths=SHALLOW, drop_path_rate=0.0).train()
        torch._dynamo.reset()
        net = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        net(pixels()).image_embeds.pow(2).sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():  # of a bias before a BatchNorm it is 0 but for rounding
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6 * largest, msg=name)


@torch.no_grad()
def test_the_dual_encoder_compiles_without_a_graph_break():
    model = shaken(make_dual())
    torch._dynamo.reset()
    batch = {**texts(), "pixel_values": pixels()}
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**batch)
    torch.testing.assert_close(compiled.logits_per_image, model(**batch).logits_per_image, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_exported_encoder_takes_any_batch():
    model = make_vision(depths=SHALLOW)
    dynamic_shapes = {"pixel_values": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(model, (), {"pixel_values": pixels(3)}, dynamic_shapes=dynamic_shapes)
    for batch in (1, 5):
        images = pixels(batch)
        assert relative_error(program.module()(pixel_values=images).image_embeds, model(images).image_embeds) < 2e-6


@torch.no_grad()
def test_an_exported_dual_encoder_ranks_alike():
    model, batch = shaken(make_dual()), {**texts(), "pixel_values": pixels()}
    program = torch.export.export(model, (), batch)
    expected = model(**batch).logits_per_image
    torch.testing.assert_close(program.module()(**batch).logits_per_image, expected, rtol=1e-5, atol=1e-5)


def test_autocast_points_the_same_way_and_its_gradients_are_finite():
    model = make_vision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds = model(pixels()).image_embeds
    assert embeds.dtype == torch.bfloat16
    assert F.cosine_similarity(embeds.float(), model(pixels()).image_embeds).min() > 0.9995
    embeds.float().pow(2).sum().backward()
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in model.parameters())


@torch.no_grad()
def test_eager_and_sdpa_attention_agree_and_eager_shows_its_weights():
    model = make_vision()
    expected = model(pixels()).image_embeds
    model.set_attn_implementation("eager")
    outputs = model(pixels(), output_attentions=True)
    assert relative_error(outputs.image_embeds, expected) < 2e-6
    # one of three blocks of stage 2, one of two of stage 3; one window of 16 and of 4 places an image
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 16, 16), (2, 4, 4, 4)]
    torch.testing.assert_close(outputs.attentions[0].sum(dim=-1), torch.ones(2, 2, 16))


# -- training --------------------------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient():
    model = make_vision().train()
    model(pixels()).image_embeds.pow(2).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        model = shaken(make_dual()).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.vision_model.stages[0].blocks[0].gradient_checkpointing
            assert model.vision_model.stages[3].blocks[1].gradient_checkpointing
        torch.manual_seed(3)  # of drop path
        model(**texts(), pixel_values=pixels(), return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_drop_path_grows_linearly_over_all_blocks():
    model = DMCLIPVisionModel(DMCLIPVisionConfig(**{**VISION, "drop_path_rate": 0.35}))
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.35 * block / 7 for block in range(8)])


def test_drop_path_leaves_out_whole_rows_keeps_the_mean_and_rests_in_eval():
    torch.manual_seed(0)
    layer = DMCLIPDropPath(0.25)
    ones = torch.ones(4000, 3, 2)
    dropped = layer.train()(ones)
    rows = dropped.flatten(1)
    assert (rows == rows[:, :1]).all() and sorted(set(rows[:, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert float(rows[:, 0].mean()) == pytest.approx(1, abs=0.04)
    assert layer.eval()(ones) is ones


@torch.no_grad()
def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    config = {**SCALED, "hidden_size": 32, "conv_layer_scale_init_value": 1e-4}
    model = DMCLIPVisionModel(DMCLIPVisionConfig(**config))
    for name, weight in model.named_parameters():
        module = model.get_submodule(name.rsplit(".", 1)[0])
        if isinstance(module, nn.Linear):
            if name.endswith("bias"):
                assert not weight.any(), name
            else:
                assert float(weight.std()) == pytest.approx(0.02, rel=0.2), name
    mixer = model.stages[2].blocks[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 9).expand(64, 8))
    assert torch.equal(mixer.D, torch.ones(64))
    assert float(model.stages[2].blocks[0].gamma_2.mean()) == pytest.approx(1e-5)
    assert float(model.stages[0].blocks[0].gamma.mean()) == pytest.approx(1e-4)


@torch.no_grad()
def test_mambas_initial_steps_lie_in_its_range_although_the_bias_is_added_twice():
    torch.manual_seed(0)
    config = DMCLIPVisionConfig(**{**VISION, "hidden_size": 128, "dt_init": "mamba"})
    mixer = DMCLIPVisionModel(config).stages[2].blocks[0].mixer
    steps = F.softplus(2 * mixer.dt_proj.bias)
    assert 1e-3 * 0.999 < float(steps.min()) < 2e-3 and 0.05 < float(steps.max()) < 0.1 * 1.001
    assert float(steps.log().mean()) == pytest.approx(math.log(0.01), abs=0.3)  # log-uniform
    assert float(mixer.dt_proj.weight.abs().max()) <= mixer.dt_rank**-0.5


@torch.no_grad()
def test_weights_that_are_missing_are_drawn_as_new_ones(tmp_path):
    DMCLIPVisionModel(DMCLIPVisionConfig(**SCALED)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "mixer" not in name and "gamma" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = DMCLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == weights.keys() - kept.keys()
    mixer = model.stages[2].blocks[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 9).expand(16, 8))
    assert not mixer.dt_proj.bias.any() and 0 < float(mixer.in_proj.weight.abs().max()) < 0.2
    assert torch.equal(model.stages[3].blocks[1].gamma_1, torch.full((64,), 1e-5))


def test_rates_and_skips_of_the_scan_take_no_weight_decay_wherever_the_encoder_sits():
    for model in (make_vision(), make_dual(), nn.Sequential(make_dual())):
        decayed = set(BatchesTrainer.get_decay_parameter_names(None, model))
        matrices = {name for name, weight in model.named_parameters() if weight.dim() >= 2}
        spared = matrices - decayed
        assert decayed <= matrices and len(spared) == 3 and all(name.endswith("A_log") for name in spared)


def test_lora_on_the_mixers_trains_and_merges():
    peft = pytest.importorskip("peft", reason="needs peft, of the extra [peft]")
    model = make_vision()
    expected = model(pixels()).image_embeds.detach()
    config = peft.LoraConfig(r=2, target_modules=r".*mixer\.(in_proj|x_proj|out_proj)")
    wrapped = peft.get_peft_model(model, config)
    torch.testing.assert_close(wrapped(pixel_values=pixels()).image_embeds, expected)
    trainable = [name for name, weight in wrapped.named_parameters() if weight.requires_grad]
    assert len(trainable) == 3 * 3 * 2 and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW([weight for weight in wrapped.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = wrapped(pixel_values=pixels()).image_embeds.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    wrapped.eval()
    with torch.no_grad():
        tuned = wrapped(pixel_values=pixels()).image_embeds
        assert relative_error(tuned, expected) > 1e-3
        merged = wrapped.merge_and_unload()
        assert isinstance(merged, DMCLIPVisionModel)
        assert relative_error(merged(pixels()).image_embeds, tuned) < 1e-5


# -- the text tower --------------------------------------------------------------------------------------------------


def published_text_weights(state, num_layers):
    """The package's keys to ours."""
    ours = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "projection.weight": state["text_projection"].T,
    }
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        ours[f"final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for layer in range(num_layers):
            source, target = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            for letter, part in zip("qkv", state[f"{source}.attn.in_proj_{kind}"].chunk(3), strict=True):
                ours[f"{target}.self_attn.{letter}_proj.{kind}"] = part
            for theirs, name in names.items():
                ours[f"{target}.{name}.{kind}"] = state[f"{source}.{theirs}.{kind}"]
    return ours


@torch.no_grad()
def test_the_text_tower_is_open_clips_mobileclip_s1():
    open_clip = pytest.importorskip("open_clip", reason="needs the package open_clip_torch")
    torch.manual_seed(0)
    fields = open_clip.get_model_config("MobileCLIP-S1")
    theirs = open_clip.model._build_text_tower(fields["embed_dim"], fields["text_cfg"]).eval()
    for weight in theirs.parameters():
        if weight.dim() == 1:
            weight += 0.2 * torch.randn_like(weight)
    ours = DMCLIPTextModel(DMCLIPTextConfig()).eval()
    ours.load_state_dict(published_text_weights(theirs.state_dict(), 12))
    ids = open_clip.get_tokenizer("MobileCLIP-S1")(["a photo of a cat", "hello", "two dogs " * 60])
    expected = theirs(ids)
    assert ids.shape == (3, 77) and expected.shape == (3, 512)
    assert (ours(ids).text_embeds - expected).abs().max() < 1e-5
    assert (ours(torch.where(ids == 0, 49407, ids)).text_embeds - expected).abs().max() < 1e-5  # CLIP's own padding
    assert (ours(ids[:2, :8]).text_embeds - expected[:2]).abs().max() < 1e-5


def make_text(**fields):
    return shaken(DMCLIPTextModel(DMCLIPTextConfig(**{**TEXT, **fields})))


@torch.no_grad()
@pytest.mark.parametrize("mask_padding", [False, True])
def test_how_a_text_was_padded_makes_no_difference(mask_padding):
    model = make_text(mask_padding=mask_padding)
    text = [117, 38, 79, EOS]
    expected = model(torch.tensor([text])).text_embeds
    batch = torch.tensor([[*text, 0, 0, 0], [*text, EOS, EOS, EOS], [*text, 7, 8, 9]])
    torch.testing.assert_close(model(batch).text_embeds, expected.expand(3, -1))
    mask = (torch.arange(7) < 4).int().expand(3, -1)
    torch.testing.assert_close(model(batch, mask).text_embeds, expected.expand(3, -1))
    length = 7 if mask_padding else 77
    assert model(batch).last_hidden_state.shape == (3, length, 32)


@torch.no_grad()
def test_padding_is_attended_to_as_published_and_not_where_it_is_masked():
    ids = torch.tensor([[117, 38, EOS]])
    for mask_padding in (False, True):
        model = make_text(mask_padding=mask_padding)
        before = model(F.pad(ids, (0, 3))).text_embeds
        model.embeddings.token_embedding.weight[0] = torch.randn(32)
        moved = relative_error(model(F.pad(ids, (0, 3))).text_embeds, before)
        assert moved == 0 if mask_padding else moved > 1e-3


@torch.no_grad()
def test_every_token_sees_every_other():
    model = make_text(mask_padding=True)
    ids = torch.tensor([[117, 38, 79, EOS]])
    other = torch.tensor([[117, 38, 80, EOS]])
    moved = (model(ids).last_hidden_state - model(other).last_hidden_state).abs().amax(dim=-1)
    assert (moved > 1e-4).all()  # places 0 and 1 too: no causal mask


@torch.no_grad()
def test_a_text_of_500_tokens_embeds_as_its_truncation():
    model = make_text()
    long = torch.full((1, 500), 38)
    long[0, 0], long[0, -1] = 117, EOS
    cut = torch.cat([long[:, :76], long[:, -1:]], dim=1)
    assert torch.equal(model(long, torch.ones_like(long)).text_embeds, model(cut).text_embeds)


@torch.no_grad()
def test_a_text_without_eos_is_read_to_its_end():
    model = make_text()
    outputs = model(torch.tensor([[117, 38, 79]]))
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 2])


@pytest.mark.parametrize("arguments", [{}, {"input_ids": torch.tensor([117, EOS])}])
def test_ids_that_are_none_are_refused(arguments):
    with pytest.raises(ValueError, match=r"`input_ids` of shape \(B, T\), got"):
        make_text()(**arguments)


def test_places_of_ones_own_are_refused():
    with pytest.raises(ValueError, match="position_ids: expected None"):
        make_text()(texts()["input_ids"], position_ids=torch.arange(4)[None])


@torch.no_grad()
def test_the_text_tower_is_drawn_with_clips_deviations():
    torch.manual_seed(0)
    model = DMCLIPTextModel(
        DMCLIPTextConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, vocab_size=50000)
    )
    layer = model.encoder.layers[0]
    for weight, deviation in (
        (model.embeddings.token_embedding.weight, 0.02),
        (model.embeddings.position_embedding.weight, 0.01),
        (layer.self_attn.q_proj.weight, 128**-0.5),
        (layer.self_attn.out_proj.weight, 128**-0.5 * 4**-0.5),
        (layer.mlp.fc1.weight, 256**-0.5),
        (layer.mlp.fc2.weight, 128**-0.5 * 4**-0.5),
        (model.projection.weight, 128**-0.5),
    ):
        assert float(weight.std()) == pytest.approx(deviation, rel=0.05)


# -- the dual encoder ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_dual_encoder_compares_what_its_towers_say():
    model = shaken(make_dual())
    outputs = model(**texts(), pixel_values=pixels(), return_loss=True)
    images = F.normalize(model.vision_model(pixels()).image_embeds, dim=-1)
    captions = F.normalize(model.text_model(**texts()).text_embeds, dim=-1)
    logits = math.exp(2.6592) * images @ captions.T
    torch.testing.assert_close(outputs.logits_per_image, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.logits_per_text, logits.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.image_embeds, images)
    torch.testing.assert_close(outputs.text_embeds, captions)
    target = torch.arange(2)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(outputs.loss, loss, rtol=1e-5, atol=1e-5)
    assert model(**texts(), pixel_values=pixels()).loss is None


@torch.no_grad()
def test_features_are_the_projected_embeddings_in_an_output_object():
    model = shaken(make_dual())
    image_outputs = model.get_image_features(pixels(), output_hidden_states=True)
    assert torch.equal(image_outputs.pooler_output, model.vision_model(pixels()).image_embeds)
    assert len(image_outputs.hidden_states) == 5
    text_outputs = model.get_text_features(**texts())
    assert torch.equal(text_outputs.pooler_output, model.text_model(**texts()).text_embeds)
    assert isinstance(model.get_text_features(**texts(), return_dict=False), tuple)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_a_tower_loads_out_of_the_dual_checkpoint_and_back_from_its_own(tower, tmp_path):
    dual = shaken(make_dual())
    dual.save_pretrained(tmp_path / "dual")
    model_class = {"vision_model": DMCLIPVisionModel, "text_model": DMCLIPTextModel}[tower]
    for source, target in (("dual", "own"), ("own", "again")):
        model, info = model_class.from_pretrained(tmp_path / source, output_loading_info=True)
        assert no_keys_wrong(info)
        expected = getattr(dual, tower).state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
        model.save_pretrained(tmp_path / target)


def test_frozen_text_survives_building_loading_and_training(tmp_path):
    model = make_dual(freeze_text=True)
    model.save_pretrained(tmp_path)
    model = DMCLIPModel.from_pretrained(tmp_path).train()
    assert not model.text_model.training and model.vision_model.training
    before = {name: weight.clone() for name, weight in model.text_model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stem = model.vision_model.stem.conv1.weight.clone()
    model(**texts(), pixel_values=pixels(), return_loss=True).loss.backward()
    assert all(weight.grad is None for weight in model.text_model.parameters())
    optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.text_model.state_dict().items())
    assert not torch.equal(model.vision_model.stem.conv1.weight, stem)


def test_text_trains_by_default():
    model = make_dual().train()
    model(**texts(), pixel_values=pixels(), return_loss=True).loss.backward()
    assert model.text_model.training
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_logit_scale_and_the_scans_own_stay_float32_in_a_half_precision_model(tmp_path):
    make_dual().save_pretrained(tmp_path)
    model = DMCLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name.rsplit(".", 1)[-1] for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert kept == {"logit_scale", "A_log", "D"}


# -- pipelines -------------------------------------------------------------------------------------------------------


def small_processor(clip_dir):
    processor = DCLIPProcessor.from_pretrained(clip_dir)
    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    return DCLIPProcessor(CLIPImageProcessorPil(**sizes), processor.tokenizer)


def test_the_zero_shot_pipeline_runs_from_a_saved_folder(tiny_clip_dir, tmp_path):
    model = shaken(make_dual())
    processor = small_processor(tiny_clip_dir)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    image, labels = Image.new("RGB", (80, 60), "red"), ["a red dog", "blue " * 200]
    answers = {answer["label"]: answer["score"] for answer in classify(image, candidate_labels=labels)}
    assert answers.keys() == set(labels)
    batch = processor([image], [f"This is a photo of {label}." for label in labels], return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits_per_image.softmax(dim=-1)[0]
    assert [answers[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_feature_pipeline_runs_from_a_vision_only_folder(tiny_clip_dir, tmp_path):
    model, processor = make_vision(), small_processor(tiny_clip_dir)
    model.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    image = Image.new("RGB", (80, 60), "blue")
    features = pipeline("image-feature-extraction", model=str(tmp_path))(image, return_tensors=True)
    with torch.no_grad():
        expected = model(**processor(images=[image], return_tensors="pt")).image_embeds
    assert relative_error(features, expected) < 1e-5
