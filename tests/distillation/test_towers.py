"""The stage anchor from two pretrained towers: trained, saved natively, its stored features the towers'."""

import numpy as np
import pytest
import torch
import yaml
from fixtures.tiny_towers import make_text_tower, make_vision_tower
from fixtures.training import STEPS, equal, run, weights
from transformers import AutoModel, AutoProcessor, VisionTextDualEncoderModel

from modeling_dclip.data.columns import row_keys
from modeling_dclip.distillation.arguments import AnchorArguments
from modeling_dclip.distillation.checks import check_effects
from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.towers import FrozenFeatures, JoinedTowersTrainer, TowerBatches
from modeling_dclip.encoders.towers import JoinedTowers, load_towers

TOWERS = ("vision_model.", "text_model.")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    vision, text = (tmp_path_factory.mktemp(name) for name in ("vision", "text"))
    return {"vision_model": str(make_vision_tower(vision)), "text_model": str(make_text_tower(text))}


def write(folder, towers, **changes):
    anchor = {
        **towers,
        "train_datasets": ["scenes:pretrain,n=16,image_size=32,captions_per_image=2"],
        "projection_dim": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        **STEPS,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "run"), "stages": ["anchor"], "anchor": anchor}))
    return path


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_projections_train_and_the_result_is_a_native_dual_encoder(towers, tmp_path, caplog):
    path = write(tmp_path, towers)
    with caplog.at_level("INFO"):
        folder = run(path) / "anchor"
    assert "and trains 897 weights of them" in caplog.text  # 16 * (32 + 24) + 1
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is VisionTextDualEncoderModel and "auto_map" not in (folder / "config.json").read_text()
    torch.manual_seed(0)
    start = load_towers(**towers, projection_dim=16)[0].state_dict()
    changed = moved(start, model.state_dict())
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} == changed
    assert processor.tokenizer("a red circle")["input_ids"] and processor.image_processor.size["width"] == 32
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    run(path)  # finished: nothing is done again
    assert times == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("free", "prefix"), [("freeze_text", "text_model."), ("freeze_vision", "vision_model.")])
def test_a_tower_that_is_not_frozen_trains(towers, tmp_path, free, prefix):
    folder = run(write(tmp_path, towers, **{free: False, "num_train_epochs": 1})) / "anchor"
    start = load_towers(**towers, projection_dim=16)[0].state_dict()
    changed = moved(start, AutoModel.from_pretrained(folder).state_dict())
    assert {name for name in changed if name.startswith(TOWERS)} and all(
        name.startswith(prefix) for name in changed if name.startswith(TOWERS)
    )


def test_an_interrupted_run_goes_on_to_the_same_weights(towers, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    free = {"freeze_text": False}  # its dropout draws numbers
    whole = run(write(tmp_path / "whole", towers, **free)) / "anchor"
    path, step, taken = write(tmp_path, towers, **free), JoinedTowersTrainer.training_step, []

    def step_or_stop(*args, **kwargs):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(JoinedTowersTrainer, "training_step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert (tmp_path / "run" / "anchor" / "checkpoint-2").is_dir()
    assert equal(weights(whole), weights(run(path) / "anchor"))


def test_stored_features_are_what_the_towers_give(towers, tiny_scenes, tmp_path):
    dual, processor = load_towers(**towers, projection_dim=16)
    keys = {"vision_model": "v", "text_model": "t", "processor": "p"}
    features = FrozenFeatures(dual, processor, tiny_scenes, row_keys(tiny_scenes), tmp_path)
    images, texts = features.of_images(keys), features.of_captions(keys)
    assert images.shape == (8, 32) and texts.shape == (16, 24) and images.dtype == texts.dtype == np.float16
    read = TowerBatches(tiny_scenes, processor)
    stored = TowerBatches(tiny_scenes, processor, image_features=images, text_features=texts)
    rows, captions = np.array([5, 0, 7]), np.array([11, 1, 14])
    model, given = JoinedTowers(dual, freeze_vision=True, freeze_text=True), []
    for batches in (read, stored):
        batch = batches.collate(rows, captions)
        assert batch.pop("image_ids").tolist() == [5, 0, 7]
        given.append(model(**batch))
    for name in ("image_embeds", "text_embeds"):
        assert torch.allclose(given[0][name], given[1][name], atol=2e-3)  # of float16
        assert not torch.allclose(given[0][name][0], given[1][name][1], atol=2e-3)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 2
    features.of_images(keys), features.of_captions(keys)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_wrong_settings_are_refused_in_one_line(towers, tmp_path):
    with pytest.raises(ValueError, match="^vision_model: expected text_model beside it, got none"):
        AnchorArguments(output_dir=str(tmp_path), vision_model="x")
    with pytest.raises(ValueError, match="^text_model: expected vision_model beside it, got none"):
        AnchorArguments(output_dir=str(tmp_path), text_model="x")
    path = write(tmp_path, towers)
    for words, reason in (
        (["--anchor.tokenizer", "captions"], "anchor.vision_model and anchor.text_model name towers that are there"),
        (
            ["--anchor.vision_model", "none", "--anchor.text_model", "none", "--anchor.freeze_text", "false"],
            "are not set",
        ),
    ):
        recipe = parse_recipe(words, path)
        with pytest.raises(ValueError, match=reason):
            check_effects(expand_arms(recipe), recipe)
