"""A DM-CLIP around a pretrained image encoder: every weight and the preprocessing taken over,
what does not fit refused.
"""

import json
import logging
import shutil

import pytest
import torch
import yaml
from fixtures.tiny_towers import make_text_tower
from fixtures.training import equal
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN

from modeling_dclip import DCLIPProcessor, DMCLIPConfig, DMCLIPModel, DMCLIPTextModel, DMCLIPVisionModel
from modeling_dclip.configuration_dmclip import DMCLIPVisionConfig
from modeling_dclip.distillation import dmclip as reinforced_stages
from modeling_dclip.distillation.arguments import DMCLIPArguments
from modeling_dclip.distillation.dmclip import build_dmclip, find_image_size
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.run import SharedData
from modeling_dclip.distillation.stages import run_stages
from modeling_dclip.hub.convert import convert_mambavision
from modeling_dclip.hub.convert.mambavision import published_mambavision_keys

CLASSES = 10
PUBLISHED = {
    "depths": [1, 1, 2, 1],
    "dim": 4,
    "in_dim": 4,
    "num_heads": [1, 1, 2, 2],
    "window_size": [4, 4, 4, 2],
    "mlp_ratio": 4,
    "resolution": 64,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDTH = 8


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """What `hub.convert mambavision` writes of a random tiny classifier with 10 classes for 64 pixels,
    no weight as at its start.
    """
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": PUBLISHED["dim"], "stem_dim": PUBLISHED["in_dim"]}
    named = {name: tuple(PUBLISHED[name]) for name in ("depths", "num_heads")}
    config = DMCLIPVisionConfig(**sizes, **named, projection_dim=CLASSES, layer_scale_init_value=1e-5)
    generator, weights = torch.Generator().manual_seed(0), {}
    for key, tensor in DMCLIPVisionModel(config).state_dict().items():
        drawn = torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        names = published_mambavision_keys(key)
        weights |= {
            name: part.clone()
            for name, part in zip(names, drawn.chunk(len(names)) if tensor.dim() else [drawn], strict=True)
        }
    save_file(weights, folder / "weights.safetensors")
    (folder / "published.json").write_text(json.dumps(PUBLISHED))
    convert_mambavision(folder / "weights.safetensors", folder / "converted", folder / "published.json")
    return str(folder / "converted")


@pytest.fixture(scope="module")
def tokenizer(tiny_clip_dir):
    return AutoTokenizer.from_pretrained(tiny_clip_dir)


@pytest.fixture(scope="module")
def dual(tokenizer, tmp_path_factory):
    """Folder of a random DM-CLIP with a shared space 6 wide."""
    folder = tmp_path_factory.mktemp("dual")
    vision = {"hidden_size": 4, "stem_dim": 4, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "image_size": 32}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**TEXT, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    torch.manual_seed(5)
    model = DMCLIPModel(DMCLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    DCLIPProcessor(CLIPImageProcessorPil(**sizes, image_mean=[0.25] * 3), tokenizer).save_pretrained(folder)
    return str(folder)


def arguments(**fields):
    return DMCLIPArguments(output_dir="x", use_cpu=True, **fields)


def split(state):
    """Backbone and head of an image encoder's weights."""
    head = {name: tensor for name, tensor in state.items() if name.startswith("projection.")}
    return {name: tensor for name, tensor in state.items() if name not in head}, head


def test_every_weight_of_the_backbone_is_the_pretrained_ones_and_a_classifier_gives_way_to_a_new_head(
    encoder, tokenizer, caplog
):
    with caplog.at_level(logging.INFO):
        model, _ = build_dmclip(arguments(vision_model=encoder, text_config=TEXT, projection_dim=WIDTH), tokenizer)
    backbone, head = split(model.vision_model.state_dict())
    assert equal(backbone, split(load_file(f"{encoder}/model.safetensors"))[0]) and len(backbone) > 50
    assert head["projection.weight"].shape == (WIDTH, 32) and not head["projection.bias"].any()
    assert 0.01 < float(head["projection.weight"].std()) < 0.03  # drawn as any Linear, not left as memory was
    assert f"drew a new projection to {WIDTH}, because '{encoder}' has one to {CLASSES}" in caplog.text


@pytest.mark.parametrize("source", ["encoder", "dual"])
def test_a_head_of_the_wanted_width_stays(source, encoder, dual, tokenizer, caplog):
    path, width = {"encoder": (encoder, CLASSES), "dual": (dual, None)}[source]
    with caplog.at_level(logging.INFO):
        model, _ = build_dmclip(arguments(vision_model=path, text_config=TEXT, projection_dim=width), tokenizer)
    stored = DMCLIPVisionModel.from_pretrained(path)
    assert equal(model.vision_model.state_dict(), stored.state_dict())
    assert model.config.projection_dim == stored.config.projection_dim and "drew" not in caplog.text


def test_an_encoder_without_a_head_gets_one_and_a_space_of_512(encoder, tokenizer, tmp_path, caplog):
    shutil.copytree(encoder, tmp_path / "headless")
    backbone, _ = split(load_file(f"{encoder}/model.safetensors"))
    save_file(backbone, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.INFO):
        model, _ = build_dmclip(arguments(vision_model=str(tmp_path / "headless"), text_config=TEXT), tokenizer)
    found, head = split(model.vision_model.state_dict())
    assert equal(found, backbone) and head["projection.weight"].shape == (512, 32)
    assert "drew a new projection to 512" in caplog.text and "has none" in caplog.text


def test_the_text_towers_width_decides_beside_both(encoder, dual, tokenizer):
    model, _ = build_dmclip(arguments(vision_model=encoder, text_model=dual), tokenizer)
    assert equal(model.text_model.state_dict(), DMCLIPTextModel.from_pretrained(dual).state_dict())
    backbone, head = split(model.vision_model.state_dict())
    assert equal(backbone, split(load_file(f"{encoder}/model.safetensors"))[0])
    assert model.config.projection_dim == len(head["projection.weight"]) == 6
    with pytest.raises(ValueError, match="projection_dim: expected 6, as text_model .* has it, got 7"):
        build_dmclip(arguments(vision_model=encoder, text_model=dual, projection_dim=7), tokenizer)


@pytest.mark.parametrize(("asked", "side", "windows"), [({}, 64, (4, 2)), ({"image_size": 96}, 96, (3, 3))])
def test_images_are_prepared_as_the_encoder_was_trained(encoder, tokenizer, asked, side, windows):
    args = arguments(vision_model=encoder, text_config=TEXT, **asked)
    model, processor = build_dmclip(args, tokenizer)
    config, prepared = model.config.vision_config, processor.image_processor
    assert find_image_size(args) == config.image_size == side and config.window_sizes[2:] == windows
    assert (prepared.crop_size["height"], prepared.size["shortest_edge"]) == (side, side)
    assert (list(prepared.image_mean), list(prepared.image_std)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_without_preprocessing_beside_the_weights_it_is_clips_and_that_is_said(encoder, tokenizer, tmp_path, caplog):
    shutil.copytree(encoder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    _, processor = build_dmclip(arguments(vision_model=str(tmp_path / "bare"), text_config=TEXT), tokenizer)
    assert tuple(processor.image_processor.image_mean) == tuple(OPENAI_CLIP_MEAN)
    assert processor.image_processor.crop_size["height"] == 64 and "normalised as for CLIP" in caplog.text


def test_a_text_tower_with_the_tokenizer_of_bert_reads_its_separator_as_the_end(tmp_path):
    """Whatever follows the separator, the embedding is that of the text before it."""
    tokenizer = AutoTokenizer.from_pretrained(make_text_tower(tmp_path / "bert"))
    sizes = {"hidden_size": 4, "stem_dim": 4, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)}
    made = arguments(image_size=32, vision_config=sizes, text_config=TEXT, projection_dim=6)
    model, processor = build_dmclip(made, tokenizer)
    config = model.config.text_config
    assert (config.bos_token_id, config.eos_token_id, tokenizer.eos_token_id) == (2, 3, None)
    model.eval().save_pretrained(tmp_path / "made")
    processor.save_pretrained(tmp_path / "made")
    model = DMCLIPModel.from_pretrained(tmp_path / "made").eval()
    processor = DCLIPProcessor.from_pretrained(tmp_path / "made")
    alone = model.get_text_features(**processor(text=["a dog"], return_tensors="pt"))
    padded = model.get_text_features(
        **processor(text=["a dog", "a dog on a long beach"], padding=True, return_tensors="pt")
    )
    alone, padded = (getattr(one, "pooler_output", one) for one in (alone, padded))
    torch.testing.assert_close(alone[0], padded[0])
    assert (padded[0] - padded[1]).abs().max() > 1e-3
    tokenizer.sep_token = None
    with pytest.raises(
        ValueError, match="ends texts with eos_token or sep_token, got BertTokenizer.*dmclip.tokenizer"
    ):
        build_dmclip(made, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "T"}, "no preset and no vision_config beside"),
        ({"vision_config": {"hidden_size": 4}}, "no preset and no vision_config beside"),
        ({"model": "y"}, "a checkpoint to go on from .* Leave out model, or vision_model"),
    ],
)
def test_an_architecture_beside_an_encoder_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(vision_model="x", **changes)


@pytest.mark.parametrize("name", ["model", "vision_model", "text_model"])
def test_another_models_folder_is_refused(name, tiny_clip_dir, tokenizer):
    with pytest.raises(ValueError, match=rf"dmclip.{name}: expected the model_type dmclip.* got 'clip'.*hub.convert"):
        build_dmclip(arguments(**{name: str(tiny_clip_dir)}), tokenizer)


def test_an_encoder_is_no_text_tower_nor_a_whole_checkpoint(encoder, tokenizer):
    for name in ("model", "text_model"):
        with pytest.raises(ValueError, match=f"dmclip.{name}: expected the model_type dmclip.* got 'dmclip_vision'"):
            build_dmclip(arguments(**{name: encoder}), tokenizer)


def test_an_encoder_with_folded_norms_is_refused(encoder, tokenizer, tmp_path):
    DMCLIPVisionModel.from_pretrained(encoder).fuse().save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="vision_model: expected an image encoder with its BatchNorms.*fuse"):
        build_dmclip(arguments(vision_model=str(tmp_path / "fused")), tokenizer)


def _renamed(weights):
    weights["stages.0.blocks.0.convolution.weight"] = weights.pop("stages.0.blocks.0.conv1.weight")


def _misshapen(weights):
    weights["stem.conv1.weight"] = weights["stem.conv1.weight"][:2].clone()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda weights: weights.pop("stages.2.blocks.0.mixer.A_log"),
            "1 missing, such as stages.2.blocks.0.mixer.A_",
        ),
        (_renamed, "1 missing, such as stages.0.blocks.0.conv1.weight; 1 left over, such as stages.0.blocks.0.convol"),
        (_misshapen, "1 of another shape, such as stem.conv1.weight"),
    ],
)
def test_damaged_weights_are_named(encoder, tokenizer, tmp_path, damage, message):
    shutil.copytree(encoder, tmp_path / "damaged")
    weights = load_file(f"{encoder}/model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"dmclip.vision_model: expected in .*damaged' the weights.*{message}"):
        build_dmclip(arguments(vision_model=str(tmp_path / "damaged"), text_config=TEXT), tokenizer)


def write_recipe(folder, clip, encoder, **changes):
    steps = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": 4}
    fields = {
        "output_dir": str(folder / "run"),
        "clip_model": str(clip),
        "train_datasets": ["scenes:train,n=8,image_size=64,captions_per_image=2"],
        "reinforce": {"augmentations": 2},
        "dmclip": {**steps, "vision_model": encoder, "text_config": TEXT, "projection_dim": WIDTH, "max_steps": 1},
        **changes,
    }
    fields["dmclip"] |= {"warmup_steps": 0, "learning_rate": 0.0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return folder / "recipe.yaml"


def test_a_run_trains_from_an_encoder_on_pixels_normalised_its_way(encoder, tiny_clip_dir, tmp_path, monkeypatch):
    path, seen = write_recipe(tmp_path, tiny_clip_dir, encoder), []
    step = reinforced_stages.DMCLIPTrainer.loss_terms
    monkeypatch.setattr(
        reinforced_stages.DMCLIPTrainer,
        "loss_terms",
        lambda self, model, batch: seen.append(batch["pixel_values"].clone()) or step(self, model, batch),
    )
    run_stages(parse_recipe([], path))
    folder = tmp_path / "run" / "dmclip"
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    levels = (seen[0] * deviation + mean) * 255
    assert seen[0].shape == (4, 3, 64, 64) and torch.allclose(levels, levels.round(), atol=1e-3)  # whole grey levels
    before, after = load_file(f"{encoder}/model.safetensors"), load_file(folder / "model.safetensors")
    for name, tensor in split(before)[0].items():
        moves = "running" in name or "num_batches" in name  # BatchNorm's statistics follow the data
        assert torch.equal(tensor, after[f"vision_model.{name}"]) != moves, name
    processor = DCLIPProcessor.from_pretrained(folder)
    assert list(processor.image_processor.image_mean) == IMAGENET_DEFAULT_MEAN
    index = json.loads((tmp_path / "run" / "reinforce" / "shards" / "reinforced.json").read_text())
    assert index["settings"]["image_size"] == 64  # the encoder's, though nobody named it
    inputs = json.loads((folder / "stage.json").read_text())["inputs"]
    assert inputs["normalisation"] == [IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]


def test_what_cannot_begin_claims_no_folder(tiny_clip_dir, encoder, tmp_path):
    path, wrong = write_recipe(tmp_path, tiny_clip_dir, encoder), ["--dmclip.vision_model", str(tiny_clip_dir)]
    with pytest.raises(ValueError, match="model_type"):
        run_stages(parse_recipe(wrong, path))
    assert not (tmp_path / "run").exists()  # said before the teachers are asked
    run_stages(parse_recipe(["--stages", "reinforce"], path))
    with pytest.raises(ValueError, match="model_type"):
        run_stages(parse_recipe(["--stages", "dmclip", *wrong], path))
    assert not (tmp_path / "run" / "dmclip").exists()


def test_a_finished_run_from_an_encoder_without_a_head_is_recognised(encoder, tiny_clip_dir, tmp_path, caplog):
    shutil.copytree(encoder, tmp_path / "headless")
    backbone, _ = split(load_file(f"{encoder}/model.safetensors"))
    save_file(backbone, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    path = write_recipe(tmp_path, tiny_clip_dir, str(tmp_path / "headless"))
    run_stages(parse_recipe([], path))
    torch.manual_seed(77)
    with caplog.at_level(logging.INFO):
        run_stages(parse_recipe([], path))
    assert "dmclip: already finished" in caplog.text


def test_named_weights_are_read_once_for_all_arms_and_again_when_they_change(
    encoder, tiny_clip_dir, tmp_path, monkeypatch
):
    shutil.copytree(encoder, tmp_path / "encoder")
    arms = {name: {"dmclip": {"contrastive_loss_weight": weight}} for name, weight in (("a", 1), ("b", 0))}
    path = write_recipe(tmp_path, tiny_clip_dir, str(tmp_path / "encoder"), arms=arms, seeds=[0, 1])
    read, fingerprint = [], reinforced_stages.fingerprint_model
    monkeypatch.setattr(reinforced_stages, "fingerprint_model", lambda model: read.append(model) or fingerprint(model))
    shared = SharedData()
    for one in expand_arms(parse_recipe([], path)):
        run_stages(one.recipe, shared)
    assert len(read) == 1
    for one in expand_arms(parse_recipe([], path)):
        run_stages(one.recipe, shared)  # all finished
    assert len(read) == 1
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    save_file(
        {**weights, "norm.bias": weights["norm.bias"] + 1},
        tmp_path / "encoder" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="made from other inputs .vision_model: "):
        run_stages(expand_arms(parse_recipe([], path))[0].recipe, shared)
    assert len(read) == 2
