"""MobileCLIP's text tower out of both kinds of checkpoint:
the same numbers, every key placed, the causal one refused.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from modeling_dclip.configuration_dmclip import DMCLIPTextConfig
from modeling_dclip.hub.convert import convert_mobileclip
from modeling_dclip.hub.convert.__main__ import main
from modeling_dclip.modeling_dmclip_text import DMCLIPTextModel

WIDTH, LAYERS, CONTEXT, VOCABULARY, DIM = 128, 2, 9, 30, 24
TO_APPLE = (
    ("text.transformer.resblocks.", "text_encoder.transformer."),
    ("text.token_embedding.", "text_encoder.embedding_layer."),
    ("text.positional_embedding", "text_encoder.positional_embedding.pos_embed.pos_embed"),
    ("text.text_projection", "text_encoder.projection_layer"),
    ("text.ln_final.", "text_encoder.final_layer_norm."),
    (".ln_1.", ".pre_norm_mha.0."),
    (".attn.in_proj_", ".pre_norm_mha.1.qkv_proj."),
    (".attn.out_proj.", ".pre_norm_mha.1.out_proj."),
    (".ln_2.", ".pre_norm_ffn.0."),
    (".mlp.c_fc.", ".pre_norm_ffn.1."),
    (".mlp.c_proj.", ".pre_norm_ffn.4."),
)
IMAGES = {
    "open_clip": ["visual.trunk.stem.0.conv.weight", "visual.trunk.stages.0.blocks.0.mlp.fc1.weight", "logit_scale"],
    "apple": ["image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight", "logit_scale"],
}


def open_clip_text():
    """Random weights under open_clip's names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embedding.weight": (VOCABULARY, WIDTH),
        "positional_embedding": (CONTEXT, WIDTH),
        "text_projection": (WIDTH, DIM),
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        sizes = {"attn.out_proj.": (WIDTH, WIDTH), "mlp.c_fc.": (4 * WIDTH, WIDTH), "mlp.c_proj.": (WIDTH, 4 * WIDTH)}
        parts = {f"{name}weight": size for name, size in sizes.items()}
        parts |= {f"{name}bias": size[:1] for name, size in sizes.items()}
        parts |= {f"{norm}.{name}": (WIDTH,) for norm in ("ln_1", "ln_2") for name in ("weight", "bias")}
        parts |= {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,)}
        shapes |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in parts.items()}
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        gain = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        weights[f"text.{name}"] = gain + noise * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
    return weights


def as_apple(weights):
    """The same under Apple's names, positions in four dimensions."""
    renamed = {}
    for key, value in weights.items():
        for ours, theirs in TO_APPLE:
            key = key.replace(ours, theirs)
        renamed[key] = value[None, None] if key.endswith("pos_embed") else value
    return renamed


def checkpoint(layout):
    text = open_clip_text() if layout == "open_clip" else as_apple(open_clip_text())
    return text | {key: torch.ones(1) for key in IMAGES[layout]}


def naive_text_tower(weights, input_ids, *, causal=False):
    """Embeddings of rows of full length that hold EOS, the highest id, in float64."""
    weights = {key.removeprefix("text."): value.double() for key, value in weights.items()}

    def norm(states, key):
        return F.layer_norm(states, (WIDTH,), weights[f"{key}.weight"], weights[f"{key}.bias"], 1e-5)

    states = weights["token_embedding.weight"][input_ids] + weights["positional_embedding"]
    for layer in range(LAYERS):
        key = f"transformer.resblocks.{layer}"
        qkv = norm(states, f"{key}.ln_1") @ weights[f"{key}.attn.in_proj_weight"].T
        qkv = qkv + weights[f"{key}.attn.in_proj_bias"]
        queries, keys, values = (part.unflatten(-1, (WIDTH // 64, 64)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(64)
        if causal:
            scores = scores.masked_fill(torch.ones(CONTEXT, CONTEXT).triu(1).bool(), float("-inf"))
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        states = states + attended @ weights[f"{key}.attn.out_proj.weight"].T + weights[f"{key}.attn.out_proj.bias"]
        inner = norm(states, f"{key}.ln_2") @ weights[f"{key}.mlp.c_fc.weight"].T + weights[f"{key}.mlp.c_fc.bias"]
        states = states + F.gelu(inner) @ weights[f"{key}.mlp.c_proj.weight"].T + weights[f"{key}.mlp.c_proj.bias"]
    pooled = norm(states, "ln_final")[torch.arange(len(input_ids)), input_ids.argmax(-1)]
    return pooled @ weights["text_projection"]


def texts():
    """Rows of different length, EOS and then zeros, as MobileCLIP pads."""
    ids = torch.randint(1, VOCABULARY - 2, (4, CONTEXT), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((2, 4, 7, CONTEXT)):
        ids[row, length - 1], ids[row, length:] = VOCABULARY - 1, 0
    return ids


@pytest.mark.parametrize("layout", IMAGES)
def test_a_converted_text_tower_computes_what_the_published_one_does(tmp_path, layout):
    torch.save(checkpoint(layout), tmp_path / "weights.pt")
    _, left = convert_mobileclip(tmp_path / "weights.pt", tmp_path / "out")
    assert left == IMAGES[layout]
    model = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = model(texts()).text_embeds.double()
    expected = naive_text_tower(open_clip_text(), texts())
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    causal = naive_text_tower(open_clip_text(), texts(), causal=True)
    assert (causal - expected).abs().max() > 1e-2 * expected.abs().max()  # the gate would notice


def test_the_default_has_as_many_parameters_as_the_published_tower():
    with torch.device("meta"):
        model = DMCLIPTextModel(DMCLIPTextConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 63_428_096


LAYER = "text.transformer.resblocks.1"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda weights: weights.pop(f"{LAYER}.ln_2.bias"), rf"1 missing: {LAYER}\.ln_2\.bias"),
        (
            lambda weights: weights.update({f"{LAYER}.norm.bias": weights.pop(f"{LAYER}.ln_2.bias")}),
            rf"1 missing: {LAYER}\.ln_2\.bias; 1 left over: {LAYER}\.norm\.bias",
        ),
        (
            lambda weights: weights.update({f"{LAYER}.attn.in_proj_weight": torch.zeros(128, 128)}),
            r"1 of another shape: .*in_proj_weight \(expected \(384, 128\), got \(128, 128\)\)",
        ),
        (lambda weights: weights.pop("text.token_embedding.weight"), "'text.token_embedding.weight'.*1 missing"),
        (lambda weights: weights.update({"fusion.weight": torch.zeros(1)}), "1 left over: fusion.weight"),
        (lambda weights: weights.update({"text.token_embedding.weight": torch.zeros(30, 100)}), "a multiple of 64"),
        (
            lambda weights: [weights.pop(key) for key in list(weights) if key.startswith("text.")],
            "Expected a text tower",
        ),
        (
            lambda weights: [weights.pop(key) for key in list(weights) if "resblocks" in key],
            "Expected layers",
        ),
    ],
    ids=["missing", "renamed", "misshapen", "telling", "extra", "width", "no text", "no layers"],
)
def test_a_damaged_checkpoint_is_named_key_by_key(tmp_path, damage, message):
    weights = checkpoint("open_clip")
    damage(weights)
    torch.save(weights, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=message):
        convert_mobileclip(tmp_path / "damaged.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key", ["visual.trunk.blocks.0.attn.qkv.weight", "image_encoder.model.patch_emb.0.block.conv.weight"]
)
def test_the_causal_tower_of_mobileclip_b_is_refused(tmp_path, key):
    torch.save(open_clip_text() | {key: torch.ones(1)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="MobileCLIP-B's text tower is causal"):
        convert_mobileclip(tmp_path / "b.pt", tmp_path / "out")


def test_the_command_says_what_it_left(tmp_path, capsys):
    torch.save(checkpoint("apple"), tmp_path / "weights.pt")
    main(["mobileclip", "--checkpoint", str(tmp_path / "weights.pt"), "--output", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "DMCLIPTextModel" in told and "Left out: 2 keys, under image_encoder, logit_scale" in told
    assert "Apple" in told and "Apple" in (tmp_path / "out" / "README.md").read_text()
