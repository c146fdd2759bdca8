"""Maps are what their sources define, sum up to what they explain,
and land on the places of the picture they are about.
"""

import numpy as np
import pytest
import torch
from fixtures.tiny_dual_encoders import save_dual_encoder
from PIL import Image
from transformers import AutoProcessor

from modeling_dclip import DCLIPModel, DCLIPTeacher, DCLIPTeacherProcessor, DMCLIPConfig, DMCLIPModel
from modeling_dclip.encoders import Encoder
from modeling_dclip.encoders.loading import load_processor
from modeling_dclip.evaluation.reports import maps
from modeling_dclip.evaluation.reports import plots as diagnostic_plots
from modeling_dclip.evaluation.reports.maps import (
    attention_relevance,
    attention_rollout,
    draw_attention,
    draw_image_maps,
    image_maps,
)
from modeling_dclip.evaluation.reports.plots import plot_image_maps


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, in order."""
    drawn = []
    original = diagnostic_plots.save_figure

    def save(figure, path):
        drawn.append(figure)
        original(figure, path)

    monkeypatch.setattr(diagnostic_plots, "save_figure", save)
    return drawn


@pytest.fixture(scope="module")
def small_dmclip():
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "stem_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "projection_dim": 16}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DMCLIPModel(
        DMCLIPConfig(text_config=text | {"projection_dim": 16}, vision_config=vision, projection_dim=16)
    )
    torch.nn.init.normal_(model.vision_model.projection.bias)
    return model.eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_not_blank(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5


def test_rollout_is_the_product_of_layers_last_first():
    layers = [draw(2, 3, 5, 5, seed=seed).softmax(dim=-1) for seed in range(3)]
    eye = torch.eye(5)
    one, two, three = (0.5 * layer.mean(dim=1) + 0.5 * eye for layer in layers)
    torch.testing.assert_close(attention_rollout(layers), three @ two @ one)
    torch.testing.assert_close(attention_rollout(layers).sum(dim=-1), torch.ones(2, 5))
    with pytest.raises(ValueError, match="one or more layers, got none"):
        attention_rollout([])


def test_a_vits_maps_are_the_definitions(tiny_clip):
    model = tiny_clip[0].eval()
    pixels, texts = draw(2, 3, 32, 32), draw(2, 16, seed=1)
    before = model.vision_model.config._attn_implementation
    maps = image_maps(model, pixels, texts)
    assert model.vision_model.config._attn_implementation == before
    assert {name: tuple(values.shape) for name, values in maps.items()} == dict.fromkeys(maps, (2, 4, 4)) and len(
        maps
    ) == 4
    for name in ("attention_rollout", "class_attention"):
        torch.testing.assert_close(maps[name].sum(dim=(1, 2)), torch.ones(2))
    tower, layer = model.vision_model, model.vision_model.encoder.layers[-1]
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = tower(pixels, output_hidden_states=True, output_attentions=True)
        into_last = outputs.hidden_states[-2]
        for patch in range(16):  # a token given to the layer alone attends to itself only
            alone = layer(into_last[:, 1 + patch : 2 + patch], None)[:, 0]
            embeds = model.visual_projection(tower.post_layernorm(alone))
            expected = torch.cosine_similarity(embeds, texts)
            torch.testing.assert_close(maps["text_similarity"][:, patch // 4, patch % 4], expected)
    tower.set_attn_implementation(before)
    heads = outputs.attentions[-1].mean(dim=1)[:, 0, 1:]
    torch.testing.assert_close(maps["class_attention"].flatten(1), heads / heads.sum(dim=1, keepdim=True))


def test_relevance_follows_only_what_raises_the_cosine(tiny_clip):
    model, pixels, texts = tiny_clip[0].eval(), draw(2, 3, 32, 32), draw(2, 16, seed=1)
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    maps = image_maps(model, pixels, texts)
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    tower, before = model.vision_model, model.vision_model.config._attn_implementation
    tower.set_attn_implementation("eager")
    outputs = tower(pixels, output_attentions=True)
    tower.set_attn_implementation(before)
    for row in range(2):  # image by image, layer by layer, head by head
        score = torch.cosine_similarity(model.visual_projection(outputs.pooler_output)[row], texts[row], dim=0)
        gradients = torch.autograd.grad(score, outputs.attentions, retain_graph=True)
        relevance = torch.eye(17)
        for attention, gradient in zip(outputs.attentions, gradients, strict=True):
            heads = [(attention[row, head] * gradient[row, head]).clamp(min=0) for head in range(2)]
            relevance = relevance + (heads[0] + heads[1]) / 2 @ relevance
        torch.testing.assert_close(maps["text_relevance"][row].flatten(), relevance[0, 1:].detach())
    assert not torch.allclose(image_maps(model, pixels, -texts)["text_relevance"], maps["text_relevance"])
    with pytest.raises(ValueError, match="got 1 for 2"):
        attention_relevance(outputs.attentions, gradients[:1])


def test_dmclips_map_averages_to_the_cosine(small_dmclip):
    pixels, texts = draw(2, 3, 96, 64), draw(2, 16, seed=1)
    maps = image_maps(small_dmclip, pixels, texts)
    assert list(maps) == ["text_similarity"] and maps["text_similarity"].shape == (2, 3, 2)
    with torch.no_grad():
        embeds = small_dmclip.get_image_features(pixels).pooler_output
    torch.testing.assert_close(maps["text_similarity"].mean(dim=(1, 2)), torch.cosine_similarity(embeds, texts))
    assert float(maps["text_similarity"].std()) > 1e-3


def test_rotary_positions_have_maps_too(tiny_clip_dir):
    model = DCLIPModel.from_pretrained(tiny_clip_dir, vision_config={"position_embedding_type": "rope"}).eval()
    maps = image_maps(model, draw(1, 3, 48, 32), draw(1, 16))
    assert all(values.shape == (1, 6, 4) and torch.isfinite(values).all() for values in maps.values())


@pytest.mark.parametrize("kind", ["clip", "dmclip"])
def test_a_map_changes_first_where_the_picture_does(tiny_clip, small_dmclip, kind):
    """Rows and columns are not exchanged: with the encoder's mixing in view,
    the largest change is at the changed place.
    """
    model, side = (tiny_clip[0].eval(), 32) if kind == "clip" else (small_dmclip, 256)
    pixels = torch.zeros(1, 3, side, side)
    changed = pixels.clone()
    changed[..., : side // 4, -side // 4 :] = draw(3, side // 4, side // 4)  # the top right corner
    one, other = (image_maps(model, values, draw(1, 16))["text_similarity"][0] for values in (pixels, changed))
    row, column = np.unravel_index(int((one - other).abs().argmax()), one.shape)
    assert row < one.shape[0] / 2 <= column


def test_models_without_either_form_and_missing_texts_are_named(tiny_clip):
    with pytest.raises(TypeError, match="a DM-CLIP, to draw maps of, got Linear"):
        image_maps(torch.nn.Linear(2, 2), draw(1, 3, 32, 32), draw(1, 16))
    with pytest.raises(ValueError, match="got 1 texts and 2 images"):
        image_maps(tiny_clip[0], draw(2, 3, 32, 32), draw(1, 16))


def test_maps_are_drawn_on_what_the_encoder_sees(tmp_path, tiny_clip, tiny_scenes, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model, processor = tiny_clip
    draw_image_maps(Encoder(model, processor), tiny_scenes, tmp_path / "new" / "maps.png", rows=(2, 5))
    assert is_not_blank(tmp_path / "new" / "maps.png")
    axes = np.array(figures[0].axes)[:15].reshape(3, 5)  # the last row has the scales
    seen = processor.image_processor(tiny_scenes[5]["image"], do_normalize=False, return_tensors="np")["pixel_values"][
        0
    ]
    assert np.allclose(axes[1, 0].images[0].get_array(), seen.transpose(1, 2, 0), atol=1e-5)
    assert axes[1, 0].get_xlabel().replace("\n", " ") == tiny_scenes["captions"][5][0][:90]
    for column in range(1, 5):
        overlay = axes[1, column].images[1]
        assert overlay.get_array().shape == (4, 4) and overlay.get_extent() == [-0.5, 31.5, 31.5, -0.5]
        low, high = overlay.get_clim()
        assert axes[0, column].images[1].get_clim() == (low, high)  # both pictures share the scale, and it is stated
        drawn = np.stack([axes[row, column].images[1].get_array() for row in (0, 1)])
        assert (low, high) == (drawn.min(), drawn.max())
        assert [label.get_text() for label in axes[2, column].get_xticklabels()] == [f"{low:.2g}", f"{high:.2g}"]


def test_other_texts_and_bad_rows(tmp_path, tiny_clip, tiny_scenes, figures):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    draw_image_maps(Encoder(*tiny_clip), tiny_scenes, tmp_path / "maps.png", rows=(0,), texts=["a red circle"])
    assert figures[0].axes[0].get_xlabel() == "a red circle"
    with pytest.raises(ValueError, match=r"rows in \[0, 8\), got \[8\]"):
        draw_image_maps(Encoder(*tiny_clip), tiny_scenes, tmp_path / "no.png", rows=(8,))
    with pytest.raises(ValueError, match="got 2 texts and 1 rows"):
        draw_image_maps(Encoder(*tiny_clip), tiny_scenes, tmp_path / "no.png", rows=(0,), texts=["a", "b"])
    with pytest.raises(ValueError, match=r"a \.png file"):
        draw_image_maps(Encoder(*tiny_clip), tiny_scenes, tmp_path / "no.pdf", rows=(0,))
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]


def test_the_mode_of_the_model_is_restored(tmp_path, tiny_clip_dir, tiny_scenes):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = DCLIPModel.from_pretrained(tiny_clip_dir).train()
    processor = AutoProcessor.from_pretrained(tiny_clip_dir, backend="pil")
    draw_image_maps(Encoder(model, processor), tiny_scenes, tmp_path / "maps.png", rows=(0,))
    assert model.training and not model.text_model.training


@pytest.mark.parametrize(
    ("pictures", "maps", "texts", "message"),
    [
        (np.zeros((2, 4, 4, 3)), {"a": np.zeros((2, 2, 2))}, ["x"], r"\(2, 4, 4, 3\), 1 and 1"),
        (np.zeros((1, 4, 4, 3)), {}, ["x"], "1 and 0"),
        (np.zeros((1, 4, 4, 3)), {"a": np.full((1, 2, 2), np.nan)}, ["x"], "finite values .* in the map 'a'"),
        (np.zeros((1, 4, 4, 3)), {"a": np.zeros((2, 2))}, ["x"], r"got shape \(2, 2\)"),
    ],
)
def test_bad_maps_are_named(tmp_path, pictures, maps, texts, message):
    with pytest.raises(ValueError, match=message):
        plot_image_maps(pictures, maps, texts, tmp_path / "a.png")


@pytest.mark.parametrize("family", ["clip", "siglip", "vision_text"])
def test_a_row_of_a_teachers_attention_is_named_by_its_own_token(family, tmp_path, monkeypatch):
    save_dual_encoder(family, tmp_path)
    teacher = DCLIPTeacher.from_clip(str(tmp_path), num_attention_heads=4).eval()
    processor = DCLIPTeacherProcessor.from_dual_encoder(load_processor(tmp_path), teacher.config.clip_config)
    drawn = {}
    monkeypatch.setattr(
        maps, "plot_region_attention", lambda *given, tokens, note: drawn.update(attention=given[5], tokens=tokens)
    )
    regions = np.array([[0, 0, 20, 30], [5, 5, 40, 40]]), np.array([0.9, 0.5])
    draw_attention(teacher, processor, Image.new("RGB", (40, 40), "red"), regions, "a red dog", tmp_path / "a.png")
    assert drawn["tokens"] == ["a", "red", "dog"]
    inputs = processor(
        text=["a red dog"], images=[Image.new("RGB", (40, 40), "red")], boxes=[regions[0]], box_scores=[regions[1]]
    )
    rows = teacher(**inputs, output_attentions=True).text_to_image_attentions[0].mean(dim=0)
    np.testing.assert_allclose(drawn["attention"], rows[:3].detach().numpy())
