"""What a recipe cannot do is told before its first stage runs: models are built without weights."""

from pathlib import Path

import pytest

from modeling_dclip.distillation.recipes import expand_arms, parse_recipe
from modeling_dclip.distillation.stages import check_models

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = {"vision_config": '{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16}'}


def check(*words, path=None):
    recipe = parse_recipe(list(words), path)
    for run in expand_arms(recipe):
        check_models(run.recipe, recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_can_be_built(path):
    check(path=path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--student.freeze", "vision_model.nothing.*"],
            "Freeze pattern 'vision_model.nothing.*' matches no parameter",
        ),
        (["--student.freeze", "*"], "leave nothing to train"),
        (["--teacher.num_attention_heads", "7"], "Recipe, teacher: num_attention_heads: expected a divisor of .* 128"),
        (["--anchor.vision_config", '{"num_hidden_layers": 1000000}'], "Recipe, anchor: .*num_hidden_layers.*1000000"),
        (
            ["--anchor.vision_config", '{"num_hidden_layer": 2}'],
            "anchor.vision_config: .*Did you mean 'num_hidden_layers'",
        ),
        (["--anchor.text_config", '{"hidden_size": 30}'], "Recipe, anchor: .*attention heads"),
        (["--regions.detector", "nope"], "Unknown kind 'nope' in the spec 'nope'"),
        (["--train_datasets", "nope:x"], "Unknown kind 'nope'"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(words, message):
    with pytest.raises(ValueError, match=message):
        check("--anchor.vision_config", SMALL["vision_config"], *words)


def test_an_arm_that_freezes_nothing_is_told_before_the_others_train(tmp_path):
    (tmp_path / "recipe.yaml").write_text("arms: {one: {}, two: {student: {freeze: [nothing]}}}\n")
    with pytest.raises(ValueError, match="Freeze pattern 'nothing' matches no parameter"):
        check("--anchor.vision_config", SMALL["vision_config"], path=tmp_path / "recipe.yaml")


def test_the_clip_that_is_there_decides(tiny_clip_dir):
    check("--clip_model", str(tiny_clip_dir), "--teacher.num_attention_heads", "2", "--student.freeze", "*layers.0.*")
    with pytest.raises(ValueError, match="Freeze pattern"):
        check(
            "--clip_model", str(tiny_clip_dir), "--teacher.num_attention_heads", "2", "--student.freeze", "*layers.9.*"
        )
